"""What the losses of all ways say: which is best, which are worse, and which one to take."""

from typing import NamedTuple

import numpy as np

from jbptt.learning.intervals import Differences, differences
from jbptt.learning.judging import SAME_COST

BEST, AS_GOOD, NOT_TOLD_APART = "best", "as good", "not told apart"
SLIGHTLY_WORSE, WORSE, NOT_FINITE = "slightly worse", "worse", "not finite"


class Verdicts(NamedTuple):
    """The outcome of one comparison of ways.

    Attributes:
      best: the way with the lowest mean loss.
      words: of each way: "best"; "worse" than some other way, where the whole interval of that
        difference lies above 0 and its mean above the margin; "as good" as the best, where the
        whole interval lies below the margin; "slightly worse" than the best, where it lies above 0
        and the mean below the margin; "not finite"; else "not told apart" from the best.
      choice: the cheapest way in time of those that may be taken; of equals the one that takes
        less memory, then the first.
      smallest: of those that may be taken the one that takes clearly less memory than the choice;
        the choice itself where there is none.
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

    def named(self, word: str) -> list[int]:
        """The ways with this verdict."""
        return [way for way, own in enumerate(self.words) if own == word]


def verdicts_of(
    losses: np.ndarray, margin: float, seconds: np.ndarray, sizes: np.ndarray
) -> Verdicts:
    """The verdicts on losses `[way, seed]`, full BPTT first.

    May be taken: what is not worse than another way, and whose mean loss is within one standard
    error of the best (Breiman et al., 1984) or within the margin.

    Args:
      losses: one for each way and seed.
      margin: a difference of no interest.
      seconds: `[way]`, of one update.
      sizes: `[way]`, temporary bytes of one update; NaN where they are not known.
    """
    means = losses.mean(1)
    finite = np.isfinite(means)
    best = int(np.argmin(np.where(finite, means, np.inf)))
    beside = differences(losses, best)
    worse = shown_worse(losses, margin)
    words = []
    for way in range(len(losses)):
        if not finite[way]:
            words.append(NOT_FINITE)
        elif way == best:
            words.append(BEST)
        elif worse[way]:
            words.append(WORSE)
        elif beside.high[way] <= margin:
            words.append(AS_GOOD)
        elif beside.low[way] > 0:
            words.append(SLIGHTLY_WORSE)
        else:
            words.append(NOT_TOLD_APART)
    near = beside.mean <= np.maximum(margin, beside.error)
    near &= ~worse & finite
    near[best] = True
    taken = np.flatnonzero(near)
    choice = int(_lowest(_lowest(taken, seconds), sizes)[0])
    smallest = choice
    if not np.isnan(sizes[taken]).any():
        least = int(taken[np.argmin(sizes[taken])])
        smallest = least if sizes[least] * SAME_COST < sizes[choice] else choice
    return Verdicts(best, tuple(words), choice, smallest, beside, differences(losses, 0))


def shown_worse(losses: np.ndarray, margin: float) -> np.ndarray:
    """`[way]`, whether a way is shown to be worse than any other, by more than the margin."""
    found = np.zeros(len(losses), bool)
    for other in range(len(losses)):
        beside = differences(losses, other)
        found |= (beside.low > 0) & (beside.mean > margin)
    return found


def _lowest(ways: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """The ways whose cost is the lowest, or as good as that."""
    of_ways = costs[ways]
    return ways if np.isnan(of_ways).any() else ways[of_ways <= SAME_COST * of_ways.min()]
