"""Pictures of a learning study: what each way ends at, and how it came there."""

from typing import Any

import numpy as np

from jbptt.report.axes import new_axes
from jbptt.report.themes import LIGHT, Theme


def plot_learning_study(study: Any, *, ax: Any = None, theme: Theme = LIGHT) -> Any:
    """The test loss of each way at its own learning rate: all seeds (hollow), and their mean
    (filled).

    The bar around a mean is the 95 % interval of the difference to full BPTT. Dotted: the mean of
    full BPTT, in a band of what does not matter; dashed: a constant prediction. The way to take has
    an arrow.
    """
    num_ways = len(study.ways)
    ax = new_axes((7.0, 0.42 * num_ways + 1.5), 1, 1, ax)
    _, judged, verdicts = study.at_equal_data
    losses, places = judged.losses, np.arange(num_ways)
    means, beside = losses.mean(1), verdicts.beside_full
    full, margin = means[0], study.margin
    ax.axvspan(full - margin, full + margin, color=theme.muted, alpha=0.15, linewidth=0)
    ax.axvline(full, color=theme.muted, linewidth=0.9, linestyle=":")
    hollow = {"color": theme.lines[1], "markerfacecolor": "none", "markersize": 4}
    ax.plot(
        losses.ravel(), np.repeat(places, losses.shape[1]) + 0.18, "o", label="a seed", **hollow
    )
    reach = np.array([means - (full + beside.low), full + beside.high - means])
    style = {"fmt": "o", "color": theme.lines[0], "markersize": 6, "capsize": 3}
    ax.errorbar(
        means,
        places - 0.1,
        xerr=np.maximum(reach, 0),
        label="mean; bar: 95 % interval beside full BPTT",
        **style,
    )
    if np.isfinite(study.constant_loss):
        ax.axvline(
            study.constant_loss,
            color=theme.ink,
            linewidth=0.9,
            linestyle=(0, (5, 3)),
            label="a constant prediction",
        )
    names = [f"→ {name}" if name == study.choice else name for name in study.ways]
    ax.set_yticks(places, labels=names if study.learned.any() else study.ways)
    ax.set_ylim(num_ways - 0.5, -0.5)
    ax.set_xlabel("test loss")
    ax.grid(True, axis="x")
    _legend_below(ax, num_ways)
    return ax


def plot_learning_curves(study: Any, *, ax: Any = None, theme: Theme = LIGHT) -> Any:
    """The test loss of each way by updates, at its own learning rate: the mean over seeds of the
    checkpoints kept so far.
    """
    from matplotlib import colormaps

    ax = new_axes((7.0, 4.4), 1, 1, ax)
    name, low, high = theme.shades
    # Full BPTT has the ink; what is nearly as dark or as light as that is left to it.
    high = low + 0.7 * (high - low)
    shades = colormaps[name](np.linspace(low, high, max(len(study.ways) - 1, 1)))
    _, judged, _ = study.at_equal_data
    for i, way in enumerate(study.ways):
        rate = study.curves.rates[i][judged.rate[i]]
        mean = study.kept.test[i][judged.rate[i]].mean(0)
        style = {"color": theme.ink, "linewidth": 2.2} if i == 0 else {"color": shades[i - 1]}
        ax.plot(study.updates, mean, label=f"{way}, rate {rate:.2g}", **style)
    if np.isfinite(study.constant_loss):
        style = {"color": theme.muted, "linewidth": 0.9, "linestyle": (0, (5, 3))}
        ax.axhline(study.constant_loss, label="a constant prediction", **style)
    ax.set_xlabel("updates")
    ax.set_ylabel("test loss")
    ax.grid(True)
    ax.legend(fontsize=9, facecolor=theme.paper, edgecolor="none", framealpha=0.9)
    return ax


def _legend_below(ax: Any, num_rows: int) -> None:
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.55 / (0.25 * num_rows + 1))}
    ax.legend(frameon=False, fontsize=9, ncols=2, columnspacing=1.2, **place)
