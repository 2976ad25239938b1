"""Gradients of one batch: full, truncated in windows, gated, randomized.

Every function returns an `Estimator`; hold each against its coverage matrix (`truncation`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jbptt import truncation, validation
from jbptt.past_steps import PastSteps, empty_history
from jbptt.plans import NO_WINDOWS, Plan, plan_of, planned
from jbptt.problem import Problem, check_problem, entered_problem
from jbptt.segments import Updated, back_through, estimate_of
from jbptt.starts import kept, start_of
from jbptt.types import Batch, Carry, Estimator, Loss, Params, Step, exported
from jbptt.windows import in_blocks, in_blocks_under_way, in_strides


@exported
class CarryState(NamedTuple):
    """The live carry."""

    carry: Carry


@exported
class KeyState(NamedTuple):
    """The live carry, and the key that the next update draws from."""

    carry: Carry
    key: chex.PRNGKey | None


@exported
class WindowState(NamedTuple):
    """The live carry, the steps that a window may reach back to, and the phase of the stride.

    Attributes:
      carry: the live carry.
      history: the latest steps; None for blocks that start with each update, and where updates do
        not stream.
      phase: steps into the current stride, an int array; None where updates are whole strides, or
        do not stream.
    """

    carry: Carry
    history: PastSteps | None
    phase: jax.Array | None


def full_bptt(step: Step, loss: Loss, *, plan: Plan | None = None) -> Estimator:
    """Full backpropagation through time (Werbos, 1990): the exact gradient of one batch.

        C[t, i] = 1 for every i ≤ t

    Exact within an update; the carry goes on to the next update, the gradient does not. Time: one
    forward and one backward pass, and one forward pass more where T is more than a segment; memory
    O(T/segment + segment) carries.

    Args:
      step: `(params, carry, x) -> (carry, y)`.
      loss: `(y, target) -> [*batch]`, or that and aux.
      plan: how: the steps recomputed at a time, and the devices that the batch is divided over.

    Raises:
      ValueError: a plan with parallel_windows; at init or update: bad shapes, before anything is
        compiled.

    >>> estimator = full_bptt(lambda w, h, x: (w * h + x, w * h + x), lambda y, target: y)
    >>> batch = Batch(jnp.ones(3))
    >>> estimate, _ = estimator.update(2.0, estimator.init(2.0, jnp.zeros(()), batch), batch)
    >>> float(estimate.grads)  # (1 + w) + (1 + w + w²) + 1 over 3 steps, differentiated
    2.0
    """
    plan = plan_of(plan, NO_WINDOWS)

    def init(params: Params, carry: Carry, batch: Batch, key=None) -> CarryState:
        del key
        check_problem(step, loss, params, carry, batch)
        return CarryState(kept(carry))

    def update(params: Params, state: CarryState, batch: Batch):
        problem, start = entered_problem(step, loss, params, state.carry, batch)
        updated = planned(plan, partial(_as_one, plan.segment), problem)
        return estimate_of(updated, start), CarryState(updated.carry)

    def coverage(num_steps: int, key=None) -> jax.Array:
        del key
        return truncation.full_coverage(num_steps)

    return Estimator(init, update, coverage)


def _as_one(
    segment: int | None, problem: Problem, history: None, seen: None, add_up: Callable
) -> Updated:
    """The batch as one, behind the problem's gates where it has any; for `planned`."""
    del history, seen, add_up
    passed = back_through(problem, segment)
    return Updated(passed.sums, passed.carry, passed.cotangents)


def gated_bptt(
    step: Step,
    loss: Loss,
    *,
    gates_fn: Callable[[chex.PRNGKey | None, int], jax.Array],
    plan: Plan | None = None,
) -> Estimator:
    """BPTT with a gate on every crossing: any schedule, also as data under `vmap`.

        λ_t = ∂ℓ_t/∂h_t + gates[t+1] · J_{t+1}ᵀ λ_{t+1},    C[t, i] = Π_{j=i+1..t} gates[j]

    What it costs is what full BPTT costs: a gate of 0 saves no time. As biased as its coverage; the
    gradient is cut at the update's edge. `info["gates"]` holds the gates used. `coverage(T, key)`
    is that of the draw; without a key that of `gates_fn(None, T)`, for which a gates_fn that draws
    has no answer.

    Args:
      step: `(params, carry, x) -> (carry, y)`.
      loss: `(y, target) -> [*batch]`, or that and aux.
      gates_fn: `(key, T) -> gates`, `[T]` or `[T, *batch]`; windows, phases and keep probabilities
        in it may be traced (docs/recipes.md, "Windows as data"). The key is split off the state's,
        new for every update; None without one.
      plan: as in `full_bptt`.

    Raises:
      ValueError: gates of the wrong length or batch shape; what `full_bptt` raises; `coverage`
        without a key where gates_fn draws from it.
    """
    plan = plan_of(plan, NO_WINDOWS)

    def draw(key: chex.PRNGKey | None, num_steps: int) -> tuple[chex.PRNGKey | None, Any]:
        """The key that the next update draws from, and the gates of this one."""
        key, fresh = (None, None) if key is None else jax.random.split(key)
        return key, gates_fn(fresh, num_steps)

    def init(params: Params, carry: Carry, batch: Batch, key=None) -> KeyState:
        num_steps, batch_shape, one, _ = check_problem(step, loss, params, carry, batch)
        gates = jax.eval_shape(lambda key: gates_fn(key, num_steps), key)
        validation.check_gates(gates, num_steps, batch_shape, one.carry, one)
        return KeyState(kept(carry), key)

    def update(params: Params, state: KeyState, batch: Batch):
        problem, start = entered_problem(step, loss, params, state.carry, batch)
        key, gates = draw(state.key, problem.num_steps)
        problem = problem.gated_by(gates)
        updated = planned(plan, partial(_as_one, plan.segment), problem)
        return estimate_of(updated, start, gates=problem.gates), KeyState(updated.carry, key)

    def coverage(num_steps: int, key=None) -> jax.Array:
        validation.check_positive_integer("num_steps", num_steps)
        try:
            _, gates = draw(key, num_steps)
        except Exception as error:  # whatever a function makes of a key that is not there
            if key is not None:
                raise
            raise ValueError(
                f"coverage needs a key, got key=None, with which gates_fn raised {error!r}; pass "
                "the key of a draw, or, if you know the mean over all draws, make it the "
                "estimator's: estimator._replace(coverage=...)"
            ) from error
        validation.check_gates(gates, num_steps, np.shape(gates)[1:], None)
        return truncation.coverage(jnp.asarray(gates))

    return Estimator(init, update, coverage)


def randomized_bptt(
    step: Step,
    loss: Loss,
    *,
    keep_prob: chex.Numeric | None = None,
    mean_length: chex.Numeric | None = None,
    length_probs: jax.Array | None = None,
    reweight: bool = True,
    plan: Plan | None = None,
) -> Estimator:
    """Randomized truncation: random cuts, survivors weighted up (Tallec & Ollivier, 2017).

        gates[t] = ξ_t / π_t,   ξ_t ~ Bernoulli(π_t),   so that E[C] = 1

    Unbiased within an update; the variance grows with the length, without bound where the squared
    Jacobian over π reaches 1. Costs what full BPTT costs. Every update draws from a key of its own;
    replaying a state replays its draw.

    Args:
      step: `(params, carry, x) -> (carry, y)`.
      loss: `(y, target) -> [*batch]`, or that and aux.
      keep_prob: π, scalar, `[T]` or `[T, *batch]`: `truncation.randomized`. A scalar cuts windows
        of 1/(1 − π) steps on average.
      mean_length: L₀ in steps instead: `truncation.artbp`, whose hazard falls with the lag.
      length_probs: the distribution of the windows' lengths instead: `truncation.random_lengths`.
      reweight: False leaves the weights out; biased towards short lags.
      plan: as in `full_bptt`.

    Raises:
      ValueError: not exactly one of keep_prob, mean_length and length_probs; a value out of range;
        init without a key.
    """
    options = {"keep_prob": keep_prob, "mean_length": mean_length, "length_probs": length_probs}
    given = [name for name, value in options.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"randomized_bptt needs one of keep_prob, mean_length and length_probs, got "
            f"{', '.join(f'{name}={value!r}' for name, value in options.items())}; pass exactly "
            "one of them"
        )
    schedule_fn, mean_fn, check = {
        "keep_prob": (
            truncation.randomized,
            truncation.randomized_coverage,
            partial(validation.check_probability, "keep_prob"),
        ),
        "mean_length": (truncation.artbp, truncation.artbp_coverage, validation.check_mean_length),
        "length_probs": (
            truncation.random_lengths,
            truncation.random_lengths_coverage,
            partial(truncation.check_length_probs, num_steps=None),
        ),
    }[given[0]]
    value = options[given[0]]
    check(value)

    def gates_fn(key, num_steps):
        return schedule_fn(key, num_steps, value, reweight=reweight)

    gated = gated_bptt(step, loss, gates_fn=gates_fn, plan=plan)

    def init(params: Params, carry: Carry, batch: Batch, key=None) -> KeyState:
        if key is None:
            raise ValueError(
                "randomized_bptt needs a key, got key=None; pass init(..., "
                "key=jax.random.key(seed))"
            )
        return gated.init(params, carry, batch, key)

    def coverage(num_steps: int, key=None) -> jax.Array:
        assert gated.coverage is not None
        return (
            mean_fn(num_steps, value, reweight=reweight)
            if key is None
            else gated.coverage(num_steps, key)
        )

    return Estimator(init, gated.update, coverage)


def truncated_bptt(
    step: Step,
    loss: Loss,
    *,
    window: int,
    stride: int | None = None,
    streams: bool = True,
    plan: Plan | None = None,
) -> Estimator:
    """Truncated BPTT: each loss flows back through at most `window` steps, its own included.

        C[t, i] = 1 where (t // stride + 1)·stride − window ≤ i ≤ t

    with t counted over the whole stream.

    TBPTT(k1 = stride, k2 = window) of Williams & Peng (1990): blocks for stride = window, sliding
    for stride = 1. Biased: pairs further apart than the window are lost (for blocks, those across a
    block's edge). Window ≥ T with stride = window is exact. Blocks: one forward and one backward
    pass, memory of one window; of a window or √T steps, and one more forward pass, where an update
    may begin within a block. Otherwise window/stride times as many step derivatives as full BPTT.

    With `Plan(parallel_windows=P)`, first one forward pass records the carry at the start of each
    window; then P windows are differentiated side by side: one more evaluation of every step in
    blocks, and the memory of P windows, for P times fewer sequential steps of the backward pass.
    The gradient is the same. Pays for a single example, whose products are then P times as tall;
    docs/speed.md has numbers.

    The stream goes on from update to update: the state holds the phase of the stride and the steps
    that a window may still reach, so however a sequence is split into updates the total is the
    same. Initialise with the shape of the batches to come: where T is a multiple of the stride,
    blocks need no history. A state's structure changes when an update of another kind breaks that
    pattern. With `streams=False` every update is a stream of its own: its first window begins with
    it, no window reaches behind it, and the state holds the carry alone.

    `info["reach"]` is the most steps that a loss of the update can see: less than the window where
    the stream, or an update whose blocks keep no history, is shorter (a window > T alone means full
    BPTT).

    Args:
      step: `(params, carry, x) -> (carry, y)`.
      loss: `(y, target) -> [*batch]`, or that and aux.
      window: the most steps that a loss may see, ≥ 1.
      stride: losses per backward pass, 1 … window; None: window.
      streams: whether windows go on from one update to the next; False for batches that are whole
        sequences.
      plan: how; see `Plan`.

    Raises:
      ValueError: window or stride < 1, not an integer, or stride > window; a plan with a segment
        where windows overlap; what `full_bptt` raises.
    """
    window, stride = validation.check_window(window, stride)
    if not isinstance(streams, bool):
        raise ValueError(
            f"streams must be True or False, got {streams!r}; False where every update is a "
            "sequence of its own"
        )
    overlap = stride < window
    plan = plan_of(
        plan, {"segment": "windows that overlap are not recomputed in segments"} if overlap else {}
    )

    def init(params: Params, carry: Carry, batch: Batch, key=None) -> WindowState:
        del key
        num_steps, batch_shape, _, _ = check_problem(step, loss, params, carry, batch)
        if not streams:
            return WindowState(kept(carry), None, None)
        aligned = num_steps % stride == 0
        reach = window - stride if aligned else window - 1
        history = (
            empty_history(reach, start_of(carry, params), batch, batch_shape) if reach else None
        )
        return WindowState(kept(carry), history, None if aligned else jnp.zeros((), int))

    def run(problem: Problem, history: PastSteps | None, phase: Any, _: Any) -> Updated:
        parallel = plan.parallel_windows
        if overlap:
            if history is None:  # of an update on its own
                history = empty_history(
                    window - stride, problem.carry, problem.batch, problem.batch_shape
                )
            return in_strides(
                problem, history, phase, window=window, stride=stride, parallel=parallel
            )
        options: Any = {"window": window, "segment": plan.segment}
        if phase is None:
            return in_blocks(problem, parallel=parallel, streams=streams, **options)
        assert history is not None  # there is one where updates are not whole blocks
        return in_blocks_under_way(problem, history, phase, **options)

    def update(params: Params, state: WindowState, batch: Batch):
        problem, start = entered_problem(step, loss, params, state.carry, batch)
        num_steps, history, phase = problem.num_steps, state.history, state.phase
        if history is not None:
            validation.check_history(history, batch, problem.batch_shape)
        updated = planned(plan, run, problem, history, phase)
        furthest = (
            window if phase is None else window - stride + jnp.minimum(phase + num_steps, stride)
        )
        steps = num_steps if history is None else num_steps + jnp.sum(history.exists)
        estimate = estimate_of(updated, start, reach=jnp.minimum(furthest, steps))
        if not streams:
            return estimate, WindowState(updated.carry, None, None)
        if phase is not None:
            phase = (phase + num_steps) % stride
        elif num_steps % stride:
            phase = jnp.asarray(num_steps % stride)
        return estimate, WindowState(updated.carry, updated.history, phase)

    def coverage(num_steps: int, key=None) -> jax.Array:
        del key
        return truncation.window_coverage(num_steps, window, stride)

    return Estimator(init, update, coverage)
