"""Axes for pictures: what every picture does to them."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from jbptt.report.themes import Theme


def new_axes(size: tuple[float, float], rows: int, columns: int, axes: Any, **shared: Any) -> Any:
    """The axes given, or those of a new figure of `size` inches."""
    if axes is not None:
        return axes
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained").subplots(rows, columns, **shared)


def numbers(values: Any) -> np.ndarray:
    """`values` as floats, None as NaN."""
    return np.array(values, dtype=object).astype(float)


def positive(values: Iterable[float | None]) -> np.ndarray:
    """`values` with NaN for all that a log axis cannot show: None, zero, negative."""
    found = numbers(values)
    return np.where(found > 0, found, np.nan)


def plain_ticks() -> Any:
    """A formatter of ticks: `0.01`, not a power of ten, which needs other fonts."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{value:g}")


def log_scale(
    ax: Any, axis: str, values: Iterable[float | None], steps: tuple[float, ...] = (1, 2, 5)
) -> None:
    """A log axis with plain numbers at `steps` times powers of ten, unless nothing on it is
    positive.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    ax.grid(True)
    if not np.isfinite(positive(list(values))).any():
        return
    ax.set(**{f"{axis}scale": "log"})
    ruler = getattr(ax, f"{axis}axis")
    ruler.set_major_locator(LogLocator(subs=steps))
    ruler.set_major_formatter(plain_ticks())
    ruler.set_minor_formatter(NullFormatter())


def powers_of_two(ax: Any) -> None:
    """A log axis of windows, with plain numbers at powers of two."""
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(plain_ticks())


def legend_below(ax: Any, num_columns: int, title: str) -> None:
    """A legend under the axes, with a title that says what the lines have in common."""
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12), "ncols": num_columns}
    ax.legend(title=title, title_fontsize=9, frameon=False, fontsize=9, **place)


def rule_tolerances(ax: Any, theme: Theme) -> None:
    """Dotted rules at the two errors that windows are recommended for."""
    for level, text in ((0.1, "10 %"), (0.01, "1 %")):
        ax.axhline(level, color=theme.muted, linewidth=0.9, linestyle=":")
        ax.annotate(
            text,
            (0, level),
            (3, 2),
            ax.get_yaxis_transform(),
            "offset points",
            color=theme.muted,
            fontsize=8,
        )


def draw_unit_circle(ax: Any, theme: Theme) -> None:
    """The unit circle, dotted, in the complex plane."""
    circle = np.exp(1j * np.linspace(0, 2 * np.pi, 200))
    ax.plot(np.real(circle), np.imag(circle), color=theme.muted, linewidth=0.9, linestyle=":")


def visible(character: str) -> str:
    """One printable letter for any character: a space, a line end or a tab shows as a sign."""
    signs = {" ": "␣", "\n": "↵", "\t": "⇥"}
    return signs.get(character, character if character.isprintable() else "·")


def label_characters(ax: Any, labels: list[str]) -> None:
    """One letter beside each row and under each column of a matrix."""
    font = {"family": ["DejaVu Sans Mono", "monospace"], "size": 7.5}
    ax.set_xticks(np.arange(len(labels)) + 0.5, labels=labels, fontdict=font)
    ax.set_yticks(np.arange(len(labels)) + 0.5, labels=labels, fontdict=font)
    for label in (*ax.get_xticklabels(), *ax.get_yticklabels()):
        label.set_parse_math(False)


def draw_matrix(ax: Any, matrix: np.ndarray, norm: Any, theme: Theme) -> Any:
    """A lower-triangular matrix by weight; zeros on and below the diagonal are grey, the rest stays
    blank.
    """
    import matplotlib
    from matplotlib.colors import ListedColormap

    name, low, high = theme.shades
    shades = matplotlib.colormaps[name](np.linspace(low, high, 256))
    size = len(matrix)
    cut = np.ma.masked_where(
        (matrix > 0) | np.triu(np.ones_like(matrix, bool), 1), np.ones_like(matrix)
    )
    # "none" stores one pixel per pair, and the browser scales it without blur.
    place = {"interpolation": "none", "extent": (0, size, size, 0)}
    ax.imshow(cut, cmap=ListedColormap([theme.cut]), **place)
    image = ax.imshow(
        np.ma.masked_where(matrix <= 0, matrix), cmap=ListedColormap(shades), norm=norm, **place
    )
    for draw_lines in (ax.hlines, ax.vlines) if size <= 40 else ():
        draw_lines(np.arange(1, size), 0, size, color=theme.paper, linewidth=0.7)
    ax.tick_params(length=0, pad=2)
    return image


def round_ticks(smallest: float, largest: float) -> list[float]:
    """1, 2 and 5 times powers of ten between the two."""
    decades = range(math.floor(math.log10(smallest)), math.ceil(math.log10(largest)) + 1)
    ticks = [factor * 10.0**decade for decade in decades for factor in (1, 2, 5)]
    return [tick for tick in ticks if smallest * 0.999 <= tick <= largest * 1.001]


def shades(count: int, theme: Theme) -> list[Any]:
    """So many colours of a theme's map, all of which stand out from its paper."""
    import matplotlib

    name, low, high = theme.shades
    return list(matplotlib.colormaps[name](np.linspace(low + 0.15, high, count)))


def significant(array: Any, number: int = 5) -> Any:
    """Rounded to so many significant digits: a heat map is no table of logarithms."""
    with np.errstate(divide="ignore", invalid="ignore"):
        array = np.asarray(array, float)
        scale = 10.0 ** (number - 1 - np.floor(np.log10(np.abs(array))))
        return np.where(np.isfinite(scale), np.round(array * scale) / scale, array)
