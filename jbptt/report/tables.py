"""Numbers for people: units, and the tables that the page and the terminal show."""

import math
from typing import Any, NamedTuple

import numpy as np

from jbptt.report.axes import numbers

NOT_FINITE = "not finite"


class Table(NamedTuple):
    """A heading for each column, and rows of as many texts."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def format_seconds(seconds: float | None) -> str:
    """`0.00123` as `1.23 ms`."""
    if seconds is None:
        return NOT_FINITE
    scale, unit = next(
        (s, u) for s, u in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")) if seconds >= s or u == "µs"
    )
    return f"{format_number(seconds / scale)} {unit}"


def format_bytes(size: float | None) -> str:
    """`2048` as `2 KiB`."""
    if size is None:
        return "not known"
    units = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
    scale, unit = next((s, u) for s, u in units if size >= s or u == "B")
    return f"{format_number(size / scale)} {unit}"


def format_number(value: float | None) -> str:
    """Three significant digits, thousands with all of theirs."""
    if value is None:
        return NOT_FINITE
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.3g}"


def format_steps(number: float) -> str:
    """`16 steps`, `1 step`."""
    return f"{format_number(number)} step{'s' * (number != 1)}"


def format_half_life(curve: dict[str, Any]) -> str:
    """`2.5 steps`, or that the gradient does not halve."""
    if curve["verdict"] == "non-finite":
        return NOT_FINITE
    return "does not halve" if curve["half_life"] is None else format_steps(curve["half_life"])


def finite_mean(values: Any) -> float:
    """Over what is finite; NaN where nothing is."""
    found = numbers(values)
    found = found[np.isfinite(found)]
    return float(found.mean()) if found.size else math.nan


def shown(value: float) -> str:
    """Three significant digits, or that the number is not finite."""
    return format_number(value if math.isfinite(value) else None)
