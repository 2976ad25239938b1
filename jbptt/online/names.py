"""Estimators that run forward, by the names that the command line has for them."""

from collections.abc import Sequence

from jbptt.online.rank_one import uoro
from jbptt.online.sparse import rflo, rtrl, snap
from jbptt.types import Estimator, Loss, Step

NAMES = "rtrl, snap-N (order N), rflo-LEAK (what a step keeps of a unit) or uoro"


def online_estimators(names: Sequence[str], step: Step, loss: Loss) -> dict[str, Estimator]:
    """Those of these names, each once.

    Raises:
      ValueError: a name of none.
    """
    return {name: _by_name(name, step, loss) for name in names}


def check_online_names(names: Sequence[str]) -> None:
    """A ValueError for a name of none."""
    for name in names:
        _by_name(name, None, None)


def _by_name(name: str, step: Step | None, loss: Loss | None) -> Estimator:
    kind, _, number = name.partition("-")
    functions: tuple = (step, loss)
    try:
        if name == "rtrl":
            return rtrl(*functions)
        if name == "uoro":
            return uoro(*functions)
        if kind == "snap":
            return snap(*functions, order=int(number))
        if kind == "rflo":
            return rflo(*functions, leak=float(number))
    except ValueError:
        pass
    raise ValueError(f"online must be of {NAMES}, got {name!r}; write snap-1, say")
