"""A picture of a training run."""

from typing import Any

import jax
import numpy as np

from jbptt.report.axes import log_scale, new_axes, numbers
from jbptt.report.themes import LIGHT, Theme


def plot_history(history: Any, *, ax: Any = None, theme: Theme = LIGHT) -> Any:
    """Loss and gradient norm by update, and every evaluation that is one number.

    A cross at the upper edge marks an update whose loss or gradient was not finite. Log scale,
    unless a loss or an evaluation is zero or negative. What `eval_fn` gave beside single numbers is
    not drawn. The histories of chunks can be drawn on one `ax`.

    Args:
      history: of one run, as from `train`.
      ax: the axes to draw on.
      theme: colours.

    Raises:
      ValueError: a history of several runs.
    """
    if np.ndim(history.loss) != 1:
        raise ValueError(
            f"history must be that of one run, got losses of shape {np.shape(history.loss)}; pass "
            "jax.tree.map(lambda a: a[i], history)"
        )
    ax = new_axes((7.0, 4.4), 1, 1, ax)
    updates, finite = np.asarray(history.updates), np.asarray(history.finite)
    loss, grad_norm = (
        np.where(finite, numbers(values), np.nan) for values in (history.loss, history.grad_norm)
    )
    ax.plot(updates, grad_norm, color=theme.muted, linewidth=0.8, label="gradient norm")
    ax.plot(updates, loss, color=theme.lines[0], label="loss, before the update")
    drawn = [loss]
    colours = [*theme.lines[1:], theme.ink]
    for i, (path, leaf) in enumerate(_single_numbers(history.evals)):
        drawn.append(np.where(np.isfinite(leaf), leaf, np.nan))
        style = {"color": colours[i % len(colours)], "marker": "os^D"[i // len(colours) % 4]}
        name = f"evaluation {jax.tree_util.keystr(path)}".strip()
        ax.plot(history.eval_updates, drawn[-1], markersize=4, linewidth=1.0, label=name, **style)
    broken = updates[~finite]
    if broken.size:
        style = {"color": theme.ink, "marker": "x", "linestyle": "none", "clip_on": False}
        upper_edge = ax.get_xaxis_transform()
        ax.plot(broken, np.ones(broken.size), transform=upper_edge, label="not finite", **style)
    ax.set_xlabel("updates")
    ax.set_ylabel("loss, gradient norm")
    ax.grid(True)
    values = np.concatenate(drawn)
    if np.all(values[np.isfinite(values)] > 0):
        log_scale(ax, "y", [*values, *grad_norm])
    ax.legend(frameon=False, fontsize=9)
    return ax


def _single_numbers(evals: Any) -> list[tuple[Any, np.ndarray]]:
    """The leaves `[num_evals]` of evaluations, real numbers, with their paths."""
    leaves = [(path, np.asarray(leaf)) for path, leaf in jax.tree.leaves_with_path(evals)]
    return [(path, leaf) for path, leaf in leaves if leaf.ndim == 1 and leaf.dtype.kind in "fiub"]
