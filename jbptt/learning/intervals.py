"""Differences between ways over paired seeds, with intervals that hold for all of them at once."""

from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95


class Differences(NamedTuple):
    """Each way's loss minus that of one way, which is 0 against itself.

    Attributes:
      mean: `[way]`, over seeds.
      error: `[way]`, its standard error.
      low, high: `[way]`, the interval.
    """

    mean: np.ndarray
    error: np.ndarray
    low: np.ndarray
    high: np.ndarray


def differences(losses: np.ndarray, reference: int) -> Differences:
    """Paired t intervals, Bonferroni's for all pairs of ways.

    With K ways, each interval is at 1 − 0.05 / (K (K − 1) / 2), so that all pairs, and with them
    all ways beside the best, whichever that is, hold together in 95 % of studies.

    Args:
      losses: `[way, seed]`, one loss per way and seed; 2 seeds at least.
      reference: the way that others are held against.
    """
    from scipy.special import stdtrit  # Student's t; JAX needs SciPy

    num_ways, num_seeds = losses.shape
    apart = losses - losses[reference]
    mean = apart.mean(1)
    error = apart.std(1, ddof=1) / num_seeds**0.5
    num_pairs = max(1, num_ways * (num_ways - 1) // 2)
    reach = stdtrit(num_seeds - 1, 1 - (1 - CONFIDENCE) / num_pairs / 2) * error
    return Differences(mean, error, mean - reach, mean + reach)
