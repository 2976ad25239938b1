"""The picture of a sweep: `plot_sweep`, public as `jbptt.plots.plot_sweep`."""

from typing import Any

import numpy as np

from jbptt.report.axes import log_scale, new_axes
from jbptt.report.run_tables import (
    Output,
    RunTable,
    axes_of,
    distinct,
    grouped,
    is_numeric,
    run_table,
    text_of,
)
from jbptt.report.themes import LIGHT, Theme

MOST_LINES = 8
WIDE = 20
"""Positive values that span more than this factor stand on a log scale."""


def plot_sweep(
    dataset: Any,
    variable: str | None = None,
    *,
    x: str | None = None,
    ax: Any = None,
    theme: Theme = LIGHT,
) -> Any:
    """An output of a sweep along an axis: a line for each value of a second one, at most eight.

    Lines are medians over all other axes, bands reach from the lower to the upper quartile; of
    plain points each run is a dot. Runs that are not finite are left out, and counted above.
    Positive numbers that span more than a factor of 20 stand on a log scale.

    Args:
      dataset: what `sweep` or `load_sweep` returns, or a part of it (`found.sel(window=4)`).
      variable: an output of numbers, or with one axis of its own; None: the first one, losses and
        errors before others.
      x: an axis of the sweep, or the output's own; None: its own if it has one, else the first
        axis of numbers that is not `seed`. Of an output with an axis of its own that is not x, the
        last entry is drawn.
      ax: the axes to draw on.
      theme: colours.

    Raises:
      ValueError: it is no dataset of a sweep, an unknown output or axis.
    """
    table = run_table(dataset)
    output = table.output(variable)
    check_axis(table, output, x)
    if x is None and output.own:
        x = output.own
    along_own = bool(output.own) and x == output.own
    first, second = axes_of(table, None if along_own else x, MOST_LINES)
    if along_own:
        second = _lines_of_histories(table, first, second)
    elif first is None:
        raise ValueError("a single run without an axis cannot be drawn; pass the whole dataset")
    ax = new_axes((7.0, 4.4), 1, 1, ax)
    own = str(output.own) if along_own else str(first)
    places = output.places if along_own else table.columns[own]
    shown = _shown(table, second)
    values = (output.values if along_own else output.last).astype(float)
    spots = _spots(ax, own, places, log=not along_own)
    colours = _colours(table, second, len(shown), theme)
    dots = not along_own and not table.is_grid
    strength = 0.18 if len(shown) <= 3 else 0.1
    names = [*([] if along_own else [own]), *([] if second is None else [second])]
    groups = [] if dots else grouped(table, output, values, names)
    where = dict(zip(places.tolist(), spots.tolist(), strict=True))
    drawn: list[np.ndarray] = []
    for label, colour in zip(shown, colours, strict=True):
        name = {} if second is None else {"label": text_of(label)}
        if dots:
            kept = output.good & _part(table, second, label)
            ax.plot(spots[kept], values[kept], "o", color=colour, markersize=5, **name)
            drawn.append(values[kept])
            continue
        of_line = [group for group in groups if second is None or group.at[second] == label]
        if along_own:
            at, (line,) = spots, of_line
            median, low, high = line.median, line.low, line.high
        else:
            of_line.sort(key=lambda group: where[group.at[own]])
            at = np.array([where[group.at[own]] for group in of_line])
            median, low, high = np.array([(g.median, g.low, g.high) for g in of_line]).T
        marks = {"marker": "o", "markersize": 3.5} if len(at) <= 30 else {}
        if not is_numeric(places):  # nothing lies between two names
            marks["linestyle"] = ":"
        ax.plot(at, median, color=colour, **marks, **name)
        if np.any(high > low):
            ax.fill_between(at, low, high, color=colour, alpha=strength, linewidth=0)
        drawn += [median, low, high]
    _dress(ax, own, output, along_own, np.concatenate([*drawn, np.zeros(0)]))
    if second is not None:
        _legend(ax, table, second, len(shown))
    _title(ax, table, output, [own, second], dots)
    for text in (ax.title, ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels()):
        text.set_parse_math(False)
    return ax


def check_axis(table: RunTable, output: Output, x: str | None) -> None:
    """A ValueError unless a picture of this output can go along `x`."""
    known = [*table.axes, *([output.own] if output.own else [])]
    if x is not None and x not in known:
        raise ValueError(f"x must be one of {', '.join(known)}, got {x!r}")


def _lines_of_histories(table: RunTable, first: str | None, second: str | None) -> str | None:
    """The axis whose values are the lines where x is an axis of the output itself."""
    counts = {name: len(distinct(table.columns[name])) for name in (first, second) if name}
    few = [name for name, count in counts.items() if 1 < count <= MOST_LINES]
    if few or not table.is_grid:
        return next(iter(few), None)
    return first if first is not None and counts[first] > 1 else None


def _shown(table: RunTable, second: str | None) -> list[Any]:
    """The values that have a line: all, or eight from the first to the last."""
    if second is None:
        return [None]
    found = distinct(table.columns[second])
    if is_numeric(table.columns[second]):
        found.sort()
    if len(found) <= MOST_LINES:
        return found
    return [found[i] for i in np.linspace(0, len(found) - 1, MOST_LINES).round().astype(int)]


def _part(table: RunTable, second: str | None, label: Any) -> np.ndarray:
    if second is None:
        return np.ones(len(table.finished), bool)
    return np.array([value == label for value in table.columns[second].tolist()])


def _colours(table: RunTable, second: str | None, number: int, theme: Theme) -> list[Any]:
    """Few that are told apart best; of many numbers, from light to dark."""
    import matplotlib

    if number <= len(theme.lines):
        return list(theme.lines[:number])
    if second is not None and is_numeric(table.columns[second]):
        name, low, high = theme.shades
        return list(matplotlib.colormaps[name](np.linspace(low, high, number)))
    more = ("#cc79a7", "#e69f00", "#56b4e9")  # of Okabe and Ito, as the theme's
    return [*theme.lines, *more, theme.muted, theme.ink][:number]


def _spots(ax: Any, name: str, values: np.ndarray, *, log: bool) -> np.ndarray:
    """Where values lie on the x axis, which gets its scale, ticks and label here."""
    ax.set_xlabel(name)
    ax.grid(True)
    found = distinct(values)
    if not is_numeric(values):
        turned = {"rotation": 30, "ha": "right"} if sum(len(str(v)) for v in found) > 50 else {}
        ax.set_xticks(range(len(found)), labels=[text_of(v) for v in found], **turned)
        ax.set_xlim(-0.4, len(found) - 0.6)
        return np.array([found.index(value) for value in values.tolist()])
    numbers = values.astype(float)
    found = np.unique(numbers[np.isfinite(numbers)])
    on_log = log and _is_wide(found)
    if on_log:
        log_scale(ax, "x", found.tolist(), (1, 2, 5) if found[-1] < 1e3 * found[0] else (1,))
    scaled = np.log(found) if on_log else found
    gaps = np.diff(scaled)
    if log and 1 < len(found) <= 10 and gaps.min() > 0.05 * gaps.sum():
        ax.set_xticks(found, labels=[text_of(value) for value in found])
    elif values.dtype.kind in "iu" and not on_log:
        from matplotlib.ticker import MaxNLocator

        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return numbers


def _is_wide(values: np.ndarray) -> bool:
    """Whether numbers are positive and span so much that a log scale shows them better."""
    finite = values[np.isfinite(values)]
    return finite.size > 0 and finite.min() > 0 and bool(finite.max() > WIDE * finite.min())


def _dress(ax: Any, own: str, output: Output, along_own: bool, drawn: np.ndarray) -> None:
    what = "" if along_own or not output.entry else f" ({output.entry})"
    ax.set_ylabel(output.name + what)
    if _is_wide(drawn):
        finite = drawn[np.isfinite(drawn)]
        log_scale(ax, "y", drawn.tolist(), (1,) if finite.max() > 1e3 * finite.min() else (1, 2, 5))


def _legend(ax: Any, table: RunTable, second: str, number: int) -> None:
    """Beside the axes, where it covers nothing; its title names the axis of the lines."""
    count = len(distinct(table.columns[second]))
    title = second if count == number else f"{second}\n({number} of {count} values)"
    place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)}
    legend = ax.legend(title=title, title_fontsize=9, frameon=False, fontsize=9, **place)
    for text in (legend.get_title(), *legend.get_texts()):
        text.set_parse_math(False)


def _title(ax: Any, table: RunTable, output: Output, drawn: list[str | None], dots: bool) -> None:
    """What lines and bands are, and below it what was left out."""
    over = [
        name
        for name in table.axes
        if name not in drawn and name != "run" and len(distinct(table.columns[name])) > 1
    ]
    lines = [f"median and quartiles over {', '.join(over)}"] if over and not dots else []
    if dots:
        lines = ["one dot for each run"]
    number, unfinished = len(table.finished), int((~table.finished).sum())
    left_out = number - unfinished - int(output.good.sum())
    said = []
    if left_out:
        said.append(f"{left_out} of {number} runs not finite, left out")
    if unfinished:
        said.append(f"{unfinished} of {number} not finished")
    lines += ["; ".join(said)] if said else []
    ax.set_title("\n".join(lines))
