"""Every estimator, in one line each: what the contract tests run, and what each declares to cover."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jbptt import adaptive_bptt, full_bptt, gated_bptt, randomized_bptt, truncated_bptt, truncation


class Entry(NamedTuple):
    """An estimator under contract.

    Attributes:
      make: `(step, loss) -> Estimator`.
      coverage: `(T, key) -> [T, T]` of a first update from a state initialised with that key.
      streams: whether any split of a sequence into updates gives the unsplit total.
    """

    make: Callable[..., Any]
    coverage: Callable[[int, Any], Any]
    streams: bool = False


def of_gates(gates_fn):
    """Coverage of the gates that a first update draws."""
    return lambda num_steps, key: truncation.coverage(gates_fn(jax.random.split(key)[1], num_steps))


def windows(window, stride=None, **options):
    """Truncated BPTT, which streams."""
    make = partial(truncated_bptt, window=window, stride=stride, **options)
    return Entry(make, lambda num_steps, _: truncation.window_coverage(num_steps, window, stride or window), True)


def schedule(key, num_steps):
    """Blocks of 4, the first of 3."""
    del key
    return truncation.fixed(num_steps, 4, phase=1)


ESTIMATORS = {
    "full": Entry(full_bptt, lambda num_steps, _: np.tri(num_steps)),
    "segments": Entry(partial(full_bptt, segment=2), lambda num_steps, _: np.tri(num_steps)),
    "blocks": windows(3),
    "ragged blocks": windows(4),
    "strides": windows(4, 2),
    "ragged strides": windows(5, 4),
    "sliding": windows(3, 1),
    "parallel blocks": windows(2, parallel_windows=2),
    "parallel strides": windows(4, 2, parallel_windows=3),
    # Its window is 3 in a first update; a later one's depends on what the first has seen.
    "adaptive": Entry(
        partial(adaptive_bptt, tolerance=0.5, max_window=3),
        lambda num_steps, _: truncation.window_coverage(num_steps, 3, 1),
    ),
    "gated": Entry(partial(gated_bptt, gates_fn=schedule), of_gates(schedule)),
    "randomized": Entry(
        partial(randomized_bptt, keep_prob=0.5), of_gates(partial(truncation.randomized, keep_prob=0.5))
    ),
    "artbp": Entry(partial(randomized_bptt, mean_length=3.0), of_gates(partial(truncation.artbp, mean_length=3.0))),
    "random lengths": Entry(
        partial(randomized_bptt, length_probs=np.array([0.1, 0.4, 0.3])),
        of_gates(partial(truncation.random_lengths, length_probs=np.array([0.1, 0.4, 0.3]))),
    ),
    "without weights": Entry(
        partial(randomized_bptt, keep_prob=0.5, reweight=False),
        of_gates(partial(truncation.randomized, keep_prob=0.5, reweight=False)),
    ),
}
