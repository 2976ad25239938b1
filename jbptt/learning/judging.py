"""From the losses of all trainings to one loss for each way and seed, at its own learning rate."""

from typing import NamedTuple

import numpy as np

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
      losses: `[way, seed]`, test losses. A seed is judged at the rate that the other seeds chose,
        so that choosing the best of several rates favours nobody.
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

    Args:
      kept: what `checkpoints` returns.
      places: `[way]`, the number of the evaluation at which each way is looked at.
    """
    rate, losses = [], []
    for way, place in enumerate(places):
        validation, test = kept.validation[way][..., place], kept.test[way][..., place]
        rate.append(int(np.argmin(validation.mean(1))))
        num_seeds = validation.shape[1]
        chosen = [
            int(np.argmin(np.delete(validation, seed, axis=1).mean(1))) for seed in range(num_seeds)
        ]
        losses.append(test[chosen, np.arange(num_seeds)])
    return Judged(np.array(rate), np.array(losses))


def places_at_equal_time(seconds: np.ndarray, num_evals: int) -> np.ndarray:
    """The last evaluation of each way within the time of the fastest way's whole training.

    Args:
      seconds: `[way]`, of one update.
      num_evals: evaluations after the first.
    """
    return np.floor(num_evals * seconds.min() / seconds + 1e-9).astype(int)


def still_falling(kept: Curves, rate: np.ndarray) -> np.ndarray:
    """`[way]`: the share of all that training gained which came in its last quarter."""
    shares = []
    for validation, index in zip(kept.validation, rate, strict=True):
        mean = validation[index].mean(0)
        if not np.isfinite(mean).all():
            shares.append(0.0)
            continue
        gained = mean[0] - mean[-1]
        quarter = mean[-1 - max(1, (len(mean) - 1) // 4)] - mean[-1]
        shares.append(quarter / gained if gained > 0 else 0.0)
    return np.array(shares)
