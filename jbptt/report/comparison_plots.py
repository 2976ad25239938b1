"""A picture of how estimators agree."""

from typing import Any

import numpy as np

from jbptt.report.axes import new_axes
from jbptt.report.themes import LIGHT, Theme


def plot_agreement(comparison: Any, *, ax: Any = None, theme: Theme = LIGHT) -> Any:
    """The cosine between the mean estimates of every pair of estimators (Marschall, Cho & Savin,
    2020): 1 where two point in the same direction.

    Args:
      comparison: as from `compare`.
      ax: the axes to draw on.
      theme: colours.
    """
    import matplotlib
    from matplotlib.colors import ListedColormap

    names, cosines = comparison.names, np.asarray(comparison.alignment, float)
    size = 0.5 * len(names) + 2.4
    ax = new_axes((size, size - 0.6), 1, 1, ax)
    name, low, high = theme.shades
    shades = matplotlib.colormaps[name](np.linspace(low, high, 256))
    lowest = min(0.0, float(np.nanmin(cosines, initial=0.0)))
    ax.imshow(cosines, cmap=ListedColormap(shades), vmin=lowest, vmax=1.0)
    for (i, j), cosine in np.ndenumerate(cosines):
        words = f"{cosine:.2f}" if np.isfinite(cosine) else "–"
        strong = np.isfinite(cosine) and (cosine - lowest) / (1 - lowest) > 0.5
        ink = theme.paper if strong else theme.ink
        ax.text(j, i, words, ha="center", va="center", fontsize=8, color=ink)
    ax.set_xticks(np.arange(len(names)), labels=names, rotation=45, ha="right")
    ax.set_yticks(np.arange(len(names)), labels=names)
    ax.tick_params(length=0, pad=2)
    ax.set_title("cosine between mean estimates")
    return ax
