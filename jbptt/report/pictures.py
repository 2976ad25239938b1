"""The four pictures of the report. Each function draws on the axes it is given, or makes a figure
of its own.

A picture is reached through its axes: `pictures.draw_reach(reach).figure.savefig("reach.pdf")`. No
pyplot state is read or changed; matplotlib is imported when something is drawn.
"""

from typing import Any

import numpy as np

from jbptt.report.axes import (
    draw_matrix,
    label_characters,
    legend_below,
    log_scale,
    new_axes,
    numbers,
    positive,
    round_ticks,
    rule_tolerances,
    visible,
)
from jbptt.report.themes import LIGHT, Theme

CELL_MARKERS = {"rnn": "o", "gru": "s", "lstm": "^"}
STRATEGIES = (("sliding", "-", "o"), ("block", (0, (5, 2)), "s"))


def draw_coverage(coverage: dict[str, Any], *, axes: Any = None, theme: Theme = LIGHT) -> Any:
    """Three matrices C[t, i]: how much of the loss at character t each strategy sends back to
    character i.

    Returns: the three axes (full, fixed, randomized). Grey pairs are cut; a weight above 1 makes up
    for the pairs that the same draw cuts elsewhere.
    """
    from matplotlib.colors import LogNorm

    axes = new_axes((10.8, 5.0), 1, 3, axes)
    labels = [visible(character) for character in coverage["characters"]]
    matrices = {name: np.asarray(matrix, float) for name, matrix in coverage["matrices"].items()}
    largest = max([2.0, *(float(matrix.max()) for matrix in matrices.values())])
    smallest = min(
        [
            1.0,
            *(
                float(matrix[matrix > 0].min())
                for matrix in matrices.values()
                if (matrix > 0).any()
            ),
        ]
    )
    norm = LogNorm(smallest, largest)
    titles = {
        "full": "full",
        "fixed": f"fixed, window {coverage['window']}",
        "randomized": f"randomized, keep_prob {coverage['keep_prob']:.3g}",
    }
    mesh = None
    for ax, (name, matrix) in zip(axes, matrices.items(), strict=True):
        mesh = draw_matrix(ax, matrix, norm, theme)
        ax.set_title(
            f"{titles[name]}\n{coverage['pairs'][name]} of {coverage['pairs']['full']} pairs"
        )
        label_characters(ax, labels)
        ax.set_xlabel("source: character i")
    axes[0].set_ylabel("loss: character t")
    bar = axes[0].figure.colorbar(
        mesh, ax=list(axes), orientation="horizontal", shrink=0.5, aspect=45, pad=0.02
    )
    bar.set_ticks(
        round_ticks(smallest, largest), labels=[f"{t:g}" for t in round_ticks(smallest, largest)]
    )
    bar.minorticks_off()
    bar.set_label("weight C[t, i] of a pair (grey: cut, weight 0; blank: the future)")
    bar.outline.set_visible(False)
    return axes


def draw_reach(reach: dict[str, Any], *, ax: Any = None, theme: Theme = LIGHT) -> Any:
    """Mean norm of the gradient by lag, log scale: dashed before training, solid after."""
    from matplotlib.ticker import MaxNLocator

    ax = new_axes((8.6, 5.0), 1, 1, ax)
    lags = np.asarray(reach["lags"])
    cells = list(dict.fromkeys(curve["cell"] for curve in reach["curves"]))
    colours = dict(zip(cells, theme.lines, strict=False))
    for curve in reach["curves"]:
        after = curve["stage"] == "after"
        zero = _mark_zeros(ax, lags, curve, colours[curve["cell"]])
        ax.plot(
            lags,
            positive(curve["norms"]),
            color=colours[curve["cell"]],
            linestyle="-" if after else (0, (4, 2)),
            marker=CELL_MARKERS.get(curve["cell"], "o"),
            markevery=max(1, len(lags) // 8),
            markersize=5,
            markerfacecolor=None if after else theme.paper,
            label=f"{curve['cell']} {curve['stage']}: {_half_life(curve)}{zero}",
        )
    norms = positive([norm for curve in reach["curves"] for norm in curve["norms"]])
    log_scale(ax, "y", norms, (1,))
    if np.isfinite(norms).any():
        ax.set_ylim(bottom=max(ax.get_ylim()[0], 1e-12 * np.nanmax(norms)))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("lag k: steps between a loss and the carry it flows back to")
    ax.set_ylabel("mean norm of the gradient at lag k")
    legend_below(
        ax, max(1, len(cells)), "before (dashed) and after (solid) training; half-life in steps"
    )
    return ax


def draw_windows(windows: dict[str, Any], *, axes: Any = None, theme: Theme = LIGHT) -> Any:
    """What each window leaves (error, cosine) and what it costs (time, memory); one column of axes
    per cell.

    Returns: axes [4, cells]. Rings mark the windows that keep 10 % and 1 %.
    """
    from matplotlib.ticker import FuncFormatter

    models = windows["models"]
    axes = new_axes(
        (2.4 + 3.0 * len(models), 9.2), 4, len(models), axes, sharex="col", sharey="row"
    )
    axes = np.asarray(axes).reshape(4, len(models))
    for column, model in zip(axes.T, models, strict=True):
        _draw_error(column[0], model, theme)
        _draw_cosine(column[1], model, theme)
        _draw_cost(column[2], model, "seconds", 1e3, theme)
        _draw_cost(column[3], model, "temporary_bytes", 2.0**-20, theme)
        column[0].set_title(model["cell"])
        column[3].set_xlabel("window (steps)")
        column[3].set_xscale("log", base=2)
        column[3].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    costs = [cost for model in models for cost in model["costs"]]
    curves = [model[strategy] for model in models for strategy, *_ in STRATEGIES]
    log_scale(
        axes[0, 0],
        "y",
        [e for curve in curves for e in curve["relative_error"]] + [0.01, 0.1],
        (1,),
    )
    axes[0, 0].set_ylim(bottom=max(axes[0, 0].get_ylim()[0], 1e-4))
    for row, field in ((2, "seconds"), (3, "temporary_bytes")):
        log_scale(axes[row, 0], "y", [cost[field] for cost in costs])
    for row, label in enumerate(("relative error", "cosine", "time (ms)", "memory (MiB)")):
        axes[row, 0].set_ylabel(label)
    handles, labels = axes[3, 0].get_legend_handles_labels()
    ring = axes[3, 0].plot(
        [], [], "o", color=theme.muted, markerfacecolor="none", markersize=9, markeredgewidth=1.6
    )
    labels += ["window that keeps 10 % or 1 %"]
    columns = 4 if len(models) > 1 else 2  # one cell is half as wide
    axes[0, 0].figure.legend(
        handles + ring, labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=9
    )
    return axes


def draw_learning(learning: dict[str, Any], *, ax: Any = None, theme: Theme = LIGHT) -> Any:
    """Held-out perplexity by characters read: the mean over seeds, and a band of one standard
    deviation.
    """
    from matplotlib.ticker import FuncFormatter

    ax = new_axes((8.6, 4.8), 1, 1, ax)
    read = np.asarray(learning["characters_read"], float)
    styles = zip(
        learning["strategies"], theme.lines, ("o", "s", "^"), ("-", (0, (5, 2)), "-."), strict=False
    )
    for strategy, colour, marker, linestyle in styles:
        runs = numbers(strategy["perplexity"]).reshape(len(read), -1)
        mean = runs.mean(axis=1)
        spread = runs.std(axis=1, ddof=1) if runs.shape[1] > 1 else np.zeros_like(mean)
        label = f"{strategy['name']} ({strategy['detail']})"
        ax.plot(
            read, mean, color=colour, linestyle=linestyle, marker=marker, markersize=5, label=label
        )
        ax.fill_between(read, mean - spread, mean + spread, color=colour, alpha=0.22, linewidth=0)
    # What the untrained model scores would press all differences flat: its point may lie above the
    # picture.
    trained = numbers([strategy["perplexity"][1:] for strategy in learning["strategies"]])
    if len(read) > 2 and np.isfinite(trained).any():
        low, high = np.nanmin(trained), np.nanmax(trained)
        margin = 0.05 * (high - low) or 0.05 * high
        ax.set_ylim(low - margin, high + margin)
    ax.grid(True)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.set_xlabel("characters read in training")
    ax.set_ylabel("held-out perplexity per character")
    legend_below(ax, len(learning["strategies"]), "mean of the seeds; band: one standard deviation")
    return ax


def _mark_zeros(ax: Any, lags: np.ndarray, curve: dict[str, Any], colour: str) -> str:
    """A triangle on the lower edge where a curve leaves the log axis because the norm is exactly
    0.
    """
    zeros = np.flatnonzero(numbers(curve["norms"]) == 0)
    if not zeros.size:
        return ""
    place = {"transform": ax.get_xaxis_transform(), "clip_on": False, "linestyle": "none"}
    ax.plot(lags[zeros[0]], 0.0, "v", color=colour, **place)
    return f", 0 at lag {lags[zeros[0]]}"


def _half_life(curve: dict[str, Any]) -> str:
    if curve["verdict"] == "non-finite":
        return "not finite"
    return "does not halve" if curve["half_life"] is None else f"half-life {curve['half_life']:.3g}"


def _draw_error(ax: Any, model: dict[str, Any], theme: Theme) -> None:
    rule_tolerances(ax, theme)
    for (strategy, linestyle, _), colour in zip(STRATEGIES, theme.lines, strict=False):
        error = positive(model[strategy]["relative_error"])
        ax.plot(model["windows"], error, color=colour, linestyle=linestyle)
        for window in model[strategy]["recommended"].values():
            if window in model["windows"]:
                at = error[model["windows"].index(window)]
                ax.plot(
                    window,
                    at,
                    "o",
                    color=colour,
                    markerfacecolor="none",
                    markersize=9,
                    markeredgewidth=1.6,
                )


def _draw_cosine(ax: Any, model: dict[str, Any], theme: Theme) -> None:
    for (strategy, linestyle, _), colour in zip(STRATEGIES, theme.lines, strict=False):
        ax.plot(
            model["windows"], numbers(model[strategy]["cosine"]), color=colour, linestyle=linestyle
        )
    ax.grid(True)


def _draw_cost(ax: Any, model: dict[str, Any], field: str, scale: float, theme: Theme) -> None:
    """Measured points with their spread; full BPTT, which has no window to choose, as a level."""
    for (strategy, linestyle, marker), colour in zip(STRATEGIES, theme.lines, strict=False):
        costs = sorted(
            (c for c in model["costs"] if c["strategy"] == strategy),
            key=lambda cost: cost["window"],
        )
        places = [cost["window"] for cost in costs]
        values = positive([cost[field] for cost in costs]) * scale
        spread = (
            numbers([cost["seconds_spread"] for cost in costs]) * scale
            if field == "seconds"
            else None
        )
        style = {
            "color": colour,
            "linestyle": linestyle,
            "marker": marker,
            "markersize": 4.5,
            "capsize": 2.5,
        }
        ax.errorbar(
            places, values, spread, label="sliding" if strategy == "sliding" else "blocks", **style
        )
    for cost in model["costs"]:
        if cost["strategy"] == "full" and cost[field]:
            label = f"full BPTT ({cost['window']} steps)"
            ax.axhline(
                cost[field] * scale, color=theme.ink, linewidth=1.3, linestyle="-.", label=label
            )
    ax.grid(True)
