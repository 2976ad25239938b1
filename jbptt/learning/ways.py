"""The ways to train that a study compares: full BPTT, blocks, sliding windows, random cuts."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax

from jbptt import validation
from jbptt.estimators import full_bptt, gated_bptt, randomized_bptt, truncated_bptt
from jbptt.experiments.treatments import cuts
from jbptt.types import Batch, Carry, Estimate, Estimator, Loss, Params, Step

FULL = "full BPTT"
GATES = "gates"
"""The program that trains all ways that are gates: which gates is data, so it is compiled once."""


class Way(NamedTuple):
    """One way to train.

    Attributes:
      name: as the page has it, "blocks of 8".
      estimator: what one would train with; its cost is measured.
      program: `GATES`, or the name where the way is a program of its own.
      window: steps per block where the way is gates, else T.
      keep_prob: probability that a crossing is kept where the way is gates; else 1.
    """

    name: str
    estimator: Estimator
    program: str
    window: int
    keep_prob: float = 1.0


def default_windows(num_steps: int) -> tuple[int, ...]:
    """2, 8, 32, … below T."""
    return tuple(2 * 4**i for i in range(12) if 2 * 4**i < num_steps)


def middle_window(windows: Sequence[int], num_steps: int) -> int | None:
    """The window nearest to √T on a logarithmic scale; None where there is none."""
    return min(windows, key=lambda w: abs(math.log(w * w / num_steps)), default=None)


def ways_of(
    step: Step,
    loss: Loss,
    num_steps: int,
    *,
    windows: Any = None,
    sliding: Any = None,
    keep_probs: Any = None,
    estimators: Mapping[str, Estimator] | None = None,
) -> tuple[Way, ...]:
    """Full BPTT first, then the others in the order of the arguments.

    Args:
      step: the recurrence.
      loss: per example.
      num_steps: T.
      windows: steps per block; None: `default_windows`.
      sliding: steps of sliding windows; None: the one of the middle.
      keep_probs: of random cuts; None: cut as often as by blocks of the middle.
      estimators: further ones by name.

    Raises:
      ValueError: a window that is no integer in [1, T), a probability out of (0, 1), a name twice.
    """
    blocks = default_windows(num_steps) if windows is None else listed("windows", windows)
    middle = middle_window(blocks, num_steps)
    slides = ((middle,) if middle else ()) if sliding is None else listed("sliding", sliding)
    if keep_probs is None:
        probabilities: tuple = (1 - 1 / middle,) if middle and middle > 1 else ()
    else:
        probabilities = listed("keep_probs", keep_probs)
    for name, values in {"windows": blocks, "sliding": slides}.items():
        for window in values:
            validation.check_positive_integer(name, window)
            if window >= num_steps:
                raise ValueError(
                    f"{name} must be shorter than the {num_steps} steps of a batch, got {window}; "
                    "a window of all steps is full BPTT, which is compared anyway"
                )
    ways = [Way(FULL, full_bptt(step, loss), GATES, num_steps)]
    for window in map(int, blocks):
        estimator = truncated_bptt(step, loss, window=window, streams=False)
        ways.append(Way(f"blocks of {window}", estimator, GATES, window))
    for window in map(int, slides):
        estimator = truncated_bptt(step, loss, window=window, stride=1, streams=False)
        ways.append(Way(f"sliding {window}", estimator, f"sliding {window}", num_steps))
    for keep_prob in probabilities:
        validation.check_between(
            "keep_probs", keep_prob, 0, 1, "1 is full BPTT, which is compared anyway"
        )
        estimator = randomized_bptt(step, loss, keep_prob=keep_prob)
        ways.append(Way(f"random, keep {keep_prob:.4g}", estimator, GATES, num_steps, keep_prob))
    if estimators is not None and not isinstance(estimators, Mapping):
        raise ValueError(f"estimators must be {{name: estimator}}, got {estimators!r}; name them")
    for name, estimator in (estimators or {}).items():
        if not isinstance(estimator, Estimator):
            raise ValueError(
                f"estimators must hold estimators, as full_bptt(step, loss), got {estimator!r} for "
                f"{name!r}; call the function that makes one"
            )
        ways.append(Way(name, estimator, name, num_steps))
    names = [way.name for way in ways]
    if taken := sorted({name for name in names if names.count(name) > 1} | ({GATES} & {*names})):
        raise ValueError(
            f"ways to train must have names of their own, but {taken[0]!r} is taken; leave it out, "
            "or rename it in estimators"
        )
    return tuple(ways)


def listed(name: str, values: Any) -> tuple:
    """As a tuple without repetitions; a ValueError for a number alone."""
    try:
        return tuple(dict.fromkeys(values))
    except TypeError:
        raise ValueError(f"{name} must be a list, got {values!r}; write {name}=[…]") from None


def gated(step: Step, loss: Loss, window: Any, keep_prob: Any) -> Estimator:
    """Any way of the program `GATES`; its numbers may be traced."""
    return gated_bptt(step, loss, gates_fn=partial(cuts, window=window, keep_prob=keep_prob))


STREAMED = ("carry", "history", "phase", "influence", "of_carry", "of_params")
"""What a state remembers of the batch before, by the names of the fields."""


def anew(estimator: Estimator, carry: Any) -> Estimator:
    """The estimator where each batch is a sequence of its own, which `carry` enters.

    Nothing streams: neither the carry nor what windows remember of the batch before. What else a
    state holds goes on: a key, what an adaptive window has seen.
    """

    def blank(state: Any) -> Any:
        return state._replace(**{name: () for name in STREAMED if hasattr(state, name)})

    def init(params: Params, _: Carry, batch: Batch, key: jax.Array | None = None) -> Any:
        return blank(estimator.init(params, carry, batch, key=key))

    def update(params: Params, state: Any, batch: Batch) -> tuple[Estimate, Any]:
        fresh = estimator.init(params, carry, batch, key=getattr(state, "key", None))
        streamed = {name: getattr(fresh, name) for name in STREAMED if hasattr(fresh, name)}
        estimate, after = estimator.update(params, state._replace(**streamed), batch)
        return estimate, blank(after)

    return Estimator(init, update, estimator.coverage)
