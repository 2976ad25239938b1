"""What the losses of all ways say: which is best, which are worse, and which one to take."""

from typing import NamedTuple

import numpy as np

from jbptt.learning.intervals import Differences, differences

BEST, AS_GOOD, NOT_TOLD_APART, WORSE = "best", "as good", "not told apart", "worse"
NOT_FINITE = "not finite"
SAME_COST = 1.1
"""Times that differ by less are the same, and so is memory; full BPTT then comes first."""


class Verdicts(NamedTuple):
    """The outcome of one comparison of ways.

    Attributes:
      best: the way with the lowest mean loss.
      words: of each way, beside the best: "best"; "as good", where the whole interval lies below
        the margin; "worse", where the whole interval lies above 0 and the mean above the margin;
        "not finite", where a loss is not; else "not told apart".
      choice: the cheapest way in time of those that may be taken; of equals the one that takes
        less memory, then the first.
      smallest: the one of them that takes the least memory.
      beside_best, beside_full: the differences to the best way and to full BPTT.
    """

    best: int
    words: tuple[str, ...]
    choice: int
    smallest: int
    beside_best: Differences
    beside_full: Differences

    @property
    def is_tie(self) -> bool:
        """Whether no way is shown to be worse than another."""
        return WORSE not in self.words


def verdicts_of(
    losses: np.ndarray, margin: float, seconds: np.ndarray, sizes: np.ndarray
) -> Verdicts:
    """The verdicts on losses `[way, seed]`, full BPTT first.

    May be taken: what is not worse, and whose mean loss is within one standard error of the best
    (Breiman et al., 1984) or within the margin.

    Args:
      losses: one for each way and seed.
      margin: a difference of no interest.
      seconds: `[way]`, of one update.
      sizes: `[way]`, temporary bytes of one update.
    """
    means = losses.mean(1)
    finite = np.isfinite(means)
    best = int(np.argmin(np.where(finite, means, np.inf)))
    beside = differences(losses, best)
    words = []
    for way in range(len(losses)):
        if not finite[way]:
            words.append(NOT_FINITE)
        elif way == best:
            words.append(BEST)
        elif beside.low[way] > 0 and beside.mean[way] > margin:
            words.append(WORSE)
        elif beside.high[way] <= margin:
            words.append(AS_GOOD)
        else:
            words.append(NOT_TOLD_APART)
    near = beside.mean <= np.maximum(margin, beside.error)
    near &= np.array([word not in (WORSE, NOT_FINITE) for word in words])
    near[best] = True
    taken = np.flatnonzero(near)
    fast = _lowest(taken, seconds)
    return Verdicts(
        best,
        tuple(words),
        int(_lowest(fast, sizes)[0]),
        int(_lowest(taken, sizes)[0]),
        beside,
        differences(losses, 0),
    )


def _lowest(ways: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """The ways whose cost is the lowest, or as good as that."""
    of_ways = costs[ways]
    return ways if np.isnan(of_ways).any() else ways[of_ways <= SAME_COST * of_ways.min()]
