"""How pictures look on light and on dark paper, and how they become SVG."""

import io
import re
from typing import Any, NamedTuple


class Theme(NamedTuple):
    """The colours of one background; `lines` (Okabe and Ito, 2008) can be told apart by
    colour-blind readers.
    """

    ink: str
    muted: str
    paper: str
    cut: str
    shades: tuple[
        str, float, float
    ]  # a colour map and the part of it that stands out from paper and cut
    lines: tuple[str, str, str]


LIGHT = Theme(
    "#1d2329",
    "#5b6570",
    "#ffffff",
    "#e7e9ec",
    ("YlGnBu", 0.3, 1.0),
    ("#0072b2", "#d55e00", "#009e73"),
)
DARK = Theme(
    "#e8eaed",
    "#a3adb8",
    "#1b2027",
    "#343c46",
    ("YlGnBu_r", 0.3, 1.0),
    ("#56b4e9", "#f0a030", "#2fc79b"),
)


def style(theme: Theme) -> Any:
    """Matplotlib settings of a theme, for `matplotlib.rc_context`."""
    edges = ("text.color", "axes.labelcolor", "axes.titlecolor")
    quiet = ("xtick.color", "ytick.color", "axes.edgecolor")
    return {
        "svg.hashsalt": "jbptt",
        "svg.fonttype": "none",  # text stays text
        "font.family": ["DejaVu Sans", "sans-serif"],
        "font.size": 10,
        "axes.titlesize": 10.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.linewidth": 1.8,
        "figure.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "grid.color": theme.muted,
        "grid.alpha": 0.25,
        "grid.linewidth": 0.6,
        **dict.fromkeys(edges, theme.ink),
        **dict.fromkeys(quiet, theme.muted),
    }


def repaint(svg: str, old: Theme, new: Theme) -> str:
    """A picture drawn in one theme in the colours of another: a second of drawing saved. Colour
    maps stay.
    """
    colours = {}
    for before, after in zip(old, new, strict=True):
        if isinstance(before, str):
            colours[before] = after
    colours |= dict(zip(old.lines, new.lines, strict=True))
    return re.sub("|".join(colours), lambda found: colours[found.group()], svg)


def to_svg(figure: Any) -> str:
    """The figure as SVG text, the same bytes for the same figure."""
    buffer = io.StringIO()
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out; saving would do it once more
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
