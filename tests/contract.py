"""Every estimator, in one line each: what the contract tests run. What each covers it says itself."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jbptt import (
    Plan,
    adaptive_bptt,
    full_bptt,
    gated_bptt,
    randomized_bptt,
    rflo,
    rtrl,
    snap,
    truncated_bptt,
    truncation,
    uoro,
)


class Entry(NamedTuple):
    """An estimator under contract.

    Attributes:
      make: `(step, loss) -> Estimator`.
      streams: whether any split of a sequence into updates gives the unsplit total.
      covers: whether it says how much of each pair of steps it counts.
    """

    make: Callable[..., Any]
    streams: bool = False
    covers: bool = True

    def coverage(self, num_steps, key):
        """What it declares of a first update from a state initialised with that key, `[T, T]`."""
        return self.make(None, None).coverage(num_steps, key)


def windows(window, stride=None, **options):
    """Truncated BPTT, which streams."""
    return Entry(partial(truncated_bptt, window=window, stride=stride, **options), streams=True)


def schedule(key, num_steps):
    """Blocks of 4, the first of 3."""
    del key
    return truncation.fixed(num_steps, 4, phase=1)


ESTIMATORS = {
    "full": Entry(full_bptt),
    "segments": Entry(partial(full_bptt, plan=Plan(2))),
    "blocks": windows(3),
    "ragged blocks": windows(4),
    "strides": windows(4, 2),
    "ragged strides": windows(5, 4),
    "sliding": windows(3, 1),
    "parallel blocks": windows(2, plan=Plan(parallel_windows=2)),
    "parallel strides": windows(4, 2, plan=Plan(parallel_windows=3)),
    "adaptive": Entry(partial(adaptive_bptt, tolerance=0.5, max_window=3)),
    "gated": Entry(partial(gated_bptt, gates_fn=schedule)),
    "randomized": Entry(partial(randomized_bptt, keep_prob=0.5)),
    "artbp": Entry(partial(randomized_bptt, mean_length=3.0)),
    "random lengths": Entry(partial(randomized_bptt, length_probs=np.array([0.1, 0.4, 0.3]))),
    "without weights": Entry(partial(randomized_bptt, keep_prob=0.5, reweight=False)),
    "rtrl": Entry(rtrl, streams=True),
    "snap": Entry(partial(snap, order=1), streams=True, covers=False),
    "rflo": Entry(partial(rflo, leak=0.9), streams=True, covers=False),
    "uoro": Entry(uoro, streams=True, covers=False),
}
