"""What a learning study found, as data."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from jbptt.diagnosis.baseline import is_trained
from jbptt.learning.judging import (
    MARGIN,
    Curves,
    Judged,
    checkpoints,
    judge,
    places_at_equal_time,
    still_falling,
)
from jbptt.learning.verdicts import Verdicts, verdicts_of


class Comparison(NamedTuple):
    """The ways at one budget.

    Attributes:
      places: `[way]`, the number of the evaluation at which each is looked at.
      judged: rates and losses.
      verdicts: what follows.
    """

    places: np.ndarray
    judged: Judged
    verdicts: Verdicts


@dataclass(frozen=True)
class LearningStudy:
    """With which window to train, and the trainings that say so; `str()` prints the page.

    Attributes:
      ways: names, full BPTT first.
      curves: losses of all trainings.
      updates: `[evaluation]`, the updates before each.
      seconds: `[way]`, median time of one update on this machine.
      temporary_bytes: `[way]`, what a compiled update needs beside arguments and results.
      errors_at_start, errors_at_end: `[way]` arrays `[rate, seed]`, ‖ĝ − g‖ / ‖g‖ of each way's
        own gradient before and after its training, on one batch; of one draw for random cuts.
      constant_loss: test loss of the best constant prediction; NaN where there is none.
      margin: a difference between losses that is of no interest.
      unbracketed: names of ways whose best learning rate is at an end of those tried.
      data: a sentence on what was read.
      seeds_differ_in: what another seed changes.
    """

    ways: tuple[str, ...]
    curves: Curves
    updates: np.ndarray
    seconds: np.ndarray
    temporary_bytes: np.ndarray
    errors_at_start: list[np.ndarray]
    errors_at_end: list[np.ndarray]
    constant_loss: float
    margin: float
    unbracketed: tuple[str, ...]
    data: str
    seeds_differ_in: str

    @property
    def num_seeds(self) -> int:
        """Of each way and rate."""
        return self.curves.test[0].shape[1]

    @property
    def num_updates(self) -> int:
        """Of each training."""
        return int(self.updates[-1])

    @cached_property
    def kept(self) -> Curves:
        """Losses of the checkpoints that one would have kept so far."""
        return checkpoints(self.curves)

    @cached_property
    def at_equal_data(self) -> Comparison:
        """All ways after all updates."""
        return self._compared(np.full(len(self.ways), len(self.updates) - 1))

    @cached_property
    def at_equal_time(self) -> Comparison:
        """All ways in the time that the fastest one's updates took."""
        return self._compared(places_at_equal_time(self.seconds, len(self.updates) - 1))

    def _compared(self, places: np.ndarray) -> Comparison:
        judged = judge(self.kept, places)
        verdicts = verdicts_of(judged.losses, self.margin, self.seconds, self.temporary_bytes)
        return Comparison(places, judged, verdicts)

    @property
    def choice(self) -> str:
        """The way to train with: the cheapest in time of those that learn as well as the best."""
        return self.ways[self.at_equal_data.verdicts.choice]

    @property
    def is_tie(self) -> bool:
        """Whether no way is shown to be worse than another."""
        return self.at_equal_data.verdicts.is_tie

    @property
    def still_falling(self) -> np.ndarray:
        """`[way]`: the share of what training gained that came in its last quarter."""
        return still_falling(self.kept, self.at_equal_data.judged.rate)

    @property
    def known_without_inputs(self) -> float:
        """A constant prediction's test loss, or where there is none the loss before training."""
        if not np.isnan(self.constant_loss):
            return self.constant_loss
        return float(np.mean([test[..., 0].mean() for test in self.curves.test]))

    @property
    def learned(self) -> np.ndarray:
        """`[way]`, whether the mean test loss is 5 % below what is known without inputs."""
        means = self.at_equal_data.judged.losses.mean(1)
        return np.array([is_trained(float(mean), self.known_without_inputs) for mean in means])

    def with_margin(self) -> "LearningStudy":
        """The study where differences below `MARGIN` of what training gains do not matter.

        What it gains: from a constant prediction's loss, or where there is none from the loss
        before training, to the lowest test loss of a way at its own rate.
        """
        means = self.at_equal_data.judged.losses.mean(1)
        gained = self.known_without_inputs - means[np.isfinite(means)].min(initial=np.inf)
        return replace(self, margin=MARGIN * float(gained) if gained > 0 else 0.0)

    def at_own_rate(self, errors: list[np.ndarray]) -> np.ndarray:
        """`[way]`, the median over seeds of what is given by way, rate and seed."""
        chosen = self.at_equal_data.judged.rate
        return np.array([np.median(of[i]) for of, i in zip(errors, chosen, strict=True)])

    def __str__(self) -> str:
        from jbptt.learning.study_page import write_page

        return write_page(self)

    def to_xarray(self) -> Any:
        """An `xarray.Dataset` over `way`, `learning_rate`, `seed` and `update`; needs xarray.

        NaN where a way was not tried at a rate.
        """
        from jbptt.datasets import dataset

        rates = np.unique(np.concatenate(self.curves.rates))
        shape = len(self.ways), len(rates), self.num_seeds
        losses = {name: np.full((*shape, len(self.updates)), np.nan) for name in ("val", "test")}
        errors = {name: np.full(shape, np.nan) for name in ("start", "end")}
        for way, own in enumerate(self.curves.rates):
            at = np.searchsorted(rates, own)
            losses["val"][way, at] = self.curves.validation[way]
            losses["test"][way, at] = self.curves.test[way]
            errors["start"][way, at] = self.errors_at_start[way]
            errors["end"][way, at] = self.errors_at_end[way]
        dims = "way", "learning_rate", "seed"
        found = {
            "validation": ((*dims, "update"), losses["val"]),
            "test": ((*dims, "update"), losses["test"]),
            "error_at_start": (dims, errors["start"]),
            "error_at_end": (dims, errors["end"]),
            "judged_loss": (("way", "seed"), self.at_equal_data.judged.losses),
            "judged_loss_at_equal_time": (("way", "seed"), self.at_equal_time.judged.losses),
            "seconds": (("way",), self.seconds),
            "temporary_bytes": (("way",), self.temporary_bytes),
        }
        coords = {
            "way": list(self.ways),
            "learning_rate": rates,
            "seed": np.arange(self.num_seeds),
            "update": self.updates,
        }
        attrs = {"constant_loss": self.constant_loss, "margin": self.margin, "choice": self.choice}
        return dataset(found, coords=coords, attrs=attrs)
