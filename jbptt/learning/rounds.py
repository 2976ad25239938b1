"""The trainings of all ways: more learning rates are tried until each way's best is bracketed."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jbptt.learning.judging import Curves, checkpoints
from jbptt.learning.trainings import Trainings

MOST_ROUNDS = 6
"""Of trainings: the rates given, then one more at a time where a way's best is at their end."""


class Trained:
    """The outputs of all trainings so far: by way and learning rate, arrays `[seed, ...]`."""

    def __init__(self, num_ways: int):
        self._found: list[dict[float, dict[str, np.ndarray]]] = [{} for _ in range(num_ways)]

    def add(self, way: int, rate: float, outputs: dict[str, np.ndarray]) -> None:
        """The outputs of all seeds of one way at one rate."""
        self._found[way][rate] = outputs

    def output(self, name: str) -> list[np.ndarray]:
        """`[way]` arrays `[rate, seed, ...]`, rates ascending."""
        return [np.stack([of[rate][name] for rate in sorted(of)]) for of in self._found]

    @property
    def curves(self) -> Curves:
        """Rates and losses of every way."""
        rates = [np.array(sorted(of)) for of in self._found]
        return Curves(rates, self.output("validation"), self.output("test"))

    def missing(self, factor: float) -> list[tuple[int, float]]:
        """A way and one more learning rate wherever the best of a way lies at the end of its own.

        Not where its neighbour is as good, within one standard error over paired seeds: where
        nothing is learned, all rates are alike.
        """
        curves, wanted = self.curves, []
        for way, (rates, kept) in enumerate(
            zip(curves.rates, checkpoints(curves).validation, strict=True)
        ):
            losses = kept[..., -1]
            best = int(np.argmin(losses.mean(1)))
            for end, neighbour, rate in ((0, 1, rates[0] / factor), (-1, -2, rates[-1] * factor)):
                if best != end % len(rates):
                    continue
                if len(rates) > 1:
                    apart = losses[neighbour] - losses[end]
                    if apart.mean() <= apart.std(ddof=1) / len(apart) ** 0.5:
                        continue
                wanted.append((way, float(rate)))
        return wanted


def train_all(
    trainings: Trainings,
    rates: tuple[float, ...],
    num_seeds: int,
    factor: float,
    extend: bool,
    ask: Callable[..., Any],
    tell: Callable[[str], None],
) -> tuple[Trained, list[tuple[int, float]]]:
    """All trainings, and the ways whose best learning rate is still at an end of those tried.

    Args:
      trainings: what they share.
      rates: that every way is tried with at first.
      num_seeds: of each way and rate.
      factor: between one rate and the next that is tried.
      extend: whether more than the given rates are tried.
      ask: `(number of the round, run_fn, points) -> dataset`.
      tell: says what comes next.
    """
    trained = Trained(len(trainings.ways))
    wanted = [(way, rate) for way in range(len(trainings.ways)) for rate in rates]
    for number in range(MOST_ROUNDS):
        ways = ", ".join(dict.fromkeys(trainings.ways[way].name for way, _ in wanted))
        if number:
            tell(f"learning rates, round {number + 1}: the best may lie further out for {ways}")
        else:
            tell(f"train {len(wanted)} pairs of way and learning rate, {num_seeds} seeds each")
        points = {
            "program": [trainings.ways[way].program for way, _ in wanted for _ in range(num_seeds)],
            "way": [way for way, _ in wanted for _ in range(num_seeds)],
            "learning_rate": [rate for _, rate in wanted for _ in range(num_seeds)],
            "seed": list(range(num_seeds)) * len(wanted),
        }
        found = ask(number, trainings.run, points)
        for i, (way, rate) in enumerate(wanted):
            own = slice(i * num_seeds, (i + 1) * num_seeds)
            outputs = {name: np.asarray(found[name])[own] for name in found.data_vars}
            trained.add(way, rate, outputs)
        wanted = trained.missing(factor)
        if not wanted or not extend:
            break
    return trained, wanted
