"""From the losses of all trainings to one loss for each way and seed, at its own learning rate."""

import math
from typing import NamedTuple

import numpy as np

MARGIN = 0.02
"""The share of what training gains below which a difference does not matter."""
SAME_COST = 1.1
"""Times that differ by no more than this factor are the same, and so is memory."""
FEWEST_EVALS = 4
STILL_FALLING = 0.02
"""Of what training gains; a loss that falls by less over the last quarter stands still."""


class Curves(NamedTuple):
    """Losses of all trainings.

    Attributes:
      rates: `[way]` lists of learning rates, ascending.
      validation: `[way]` arrays `[rate, seed, evaluation]`, the first before any update.
      test: the same, on other data.
    """

    rates: list[np.ndarray]
    validation: list[np.ndarray]
    test: list[np.ndarray]


class Judged(NamedTuple):
    """The ways at their own learning rates.

    Attributes:
      rate: `[way]`, the index of the rate with the lowest validation loss, mean over seeds.
      losses: `[way, seed]`, test losses at that rate.
    """

    rate: np.ndarray
    losses: np.ndarray


def checkpoints(curves: Curves) -> Curves:
    """The losses of the checkpoint that one would have kept: the lowest validation loss so far.

    The start counts, so a training that diverges is worth what it was worth before.
    """
    kept_validation, kept_test = [], []
    for validation, test in zip(curves.validation, curves.test, strict=True):
        losses = np.where(np.isnan(validation), np.inf, validation)
        numbers = np.arange(losses.shape[-1])
        lowest = np.minimum.accumulate(losses, axis=-1)
        where = np.maximum.accumulate(np.where(losses <= lowest, numbers, 0), axis=-1)
        kept_validation.append(lowest)
        kept_test.append(np.take_along_axis(test, where, axis=-1))
    return Curves(curves.rates, kept_validation, kept_test)


def judge(kept: Curves, places: np.ndarray) -> Judged:
    """Chooses learning rates by validation losses, then takes the test losses.

    One rate for all seeds of a way: where each seed were judged at the rate that the others chose,
    seeds would depend on each other, and intervals be too narrow.

    Args:
      kept: what `checkpoints` returns.
      places: `[way]`, the number of the evaluation at which each way is looked at.
    """
    rate, losses = [], []
    for way, place in enumerate(places):
        rate.append(int(np.argmin(kept.validation[way][..., place].mean(1))))
        losses.append(kept.test[way][rate[-1], :, place])
    return Judged(np.array(rate), np.array(losses))


def places_at_equal_time(seconds: np.ndarray, num_evals: int) -> np.ndarray:
    """The last evaluation of each way within the time of the fastest way's whole training.

    Times that differ by no more than `SAME_COST` count as the same.

    Args:
      seconds: `[way]`, of one update.
      num_evals: evaluations after the first.
    """
    shares = seconds.min() / seconds
    shares = np.where(shares * SAME_COST >= 1, 1.0, shares)
    return np.floor(num_evals * shares + 1e-9).astype(int)


def still_falling(kept: Curves, rate: np.ndarray) -> np.ndarray:
    """`[way]`: the share of all that training gained which came in its last quarter.

    NaN where there are fewer than four evaluations, or a loss is not finite.
    """
    shares = []
    for validation, index in zip(kept.validation, rate, strict=True):
        mean = validation[index].mean(0)
        num_evals = len(mean) - 1
        if num_evals < FEWEST_EVALS or not np.isfinite(mean).all():
            shares.append(np.nan)
            continue
        gained = mean[0] - mean[-1]
        quarter = mean[-1 - math.ceil(num_evals / 4)] - mean[-1]
        shares.append(quarter / gained if gained > 0 else 0.0)
    return np.array(shares)
