"""Paired measurements: everyone in turn, in one process, so that what disturbs the machine disturbs
all alike.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np


class Ratio(NamedTuple):
    """How many times as long theirs takes as ours, round by round: the median and the quartiles
    around it.
    """

    median: float
    low: float
    high: float


def alternate(
    runs: dict[str, Callable], *, seconds: float, fewest: int = 5, most: int = 300
) -> dict[str, np.ndarray]:
    """Seconds of every call, `[rounds]` each, the order drawn anew each round.

    Two calls of each come first and do not count: compilation, and the first touch of memory. The
    number of rounds is what fits into `seconds`, within the bounds.
    """
    once = 0.0
    for run in runs.values():
        jax.block_until_ready(run())
        start = time.perf_counter()
        jax.block_until_ready(run())
        once += time.perf_counter() - start
    rounds = int(np.clip(seconds / once, fewest, most))
    found: dict[str, list[float]] = {name: [] for name in runs}
    order = np.random.default_rng(0)
    for _ in range(rounds):
        for name in order.permutation(list(runs)):
            start = time.perf_counter()
            jax.block_until_ready(runs[name]())
            found[name].append(time.perf_counter() - start)
    return {name: np.array(times) for name, times in found.items()}


def ratio(theirs: np.ndarray, ours: np.ndarray) -> Ratio:
    """Of two rows of `alternate`, paired by round."""
    low, median, high = np.percentile(theirs / ours, [25, 50, 75])
    return Ratio(float(median), float(low), float(high))


def geometric_mean(values: list[float]) -> float:
    """The mean that a ratio and its inverse agree on."""
    return float(np.exp(np.mean(np.log(values)))) if values else float("nan")


def milliseconds(times: np.ndarray) -> float:
    """The median."""
    return float(np.median(times) * 1e3)
