"""What a window throws away, and what it costs."""

from typing import Any, NamedTuple

import jax
import numpy as np

from jbptt.analysis.costs import measure_cost
from jbptt.analysis.lags import TruncationCurve, truncation_curve
from jbptt.diagnosis.advice import TOLERANCES
from jbptt.diagnosis.question import diagnose
from jbptt.estimators import full_bptt, truncated_bptt
from jbptt.experiments import tasks
from jbptt.report.axes import (
    log_scale,
    new_axes,
    numbers,
    positive,
    rule_tolerances,
)
from jbptt.report.one_question import Numbers, Question
from jbptt.report.tables import (
    Table,
    format_bytes,
    format_seconds,
    format_steps,
)
from jbptt.report.text_models import Trained
from jbptt.report.themes import LIGHT, Theme
from jbptt.report.words import cells_of, join_words
from jbptt.report.work import Effort, Progress


class Found(NamedTuple):
    """What each window throws away.

    Attributes:
      block, sliding: the windows recommended for each of `TOLERANCES`, 0: none.
      curve: the error of every window on this batch.
    """

    block: np.ndarray
    sliding: np.ndarray
    curve: TruncationCurve


def find_windows(trained: Trained, progress: Progress, device: Any) -> Found:
    """Which windows the trained model needs."""
    progress(f"{trained.model.name}: find its windows")
    functions = trained.model.cell.step, tasks.cross_entropy

    @jax.jit
    def look(params, carry, batch):
        # Of the diagnosis the windows alone: the rest of it is not compiled.
        found = diagnose(*functions, params, carry, batch, measure=False)
        curve = truncation_curve(*functions, params, carry, batch, max_window=len(batch.xs))
        return Found(found.block_window, found.sliding_window, curve)

    given = jax.device_put((trained.params, trained.carry, trained.batch), device)
    found = jax.device_get(look(*given))
    progress(f"{trained.model.name}: windows found", 2)
    return found


def measure(trained: Trained, found: Found, effort: Effort, progress: Progress) -> dict[str, Any]:
    """Error by window of a trained model, with the cost of a few windows and of those
    recommended.
    """
    progress(f"{trained.model.name}: time and memory of windows")
    costs, curve = _costs(trained, found, effort), found.curve
    progress(f"{trained.model.name}: measured", 1 + len(effort.cost_windows))

    def part(error, cosine, recommended):
        chosen = {
            f"{tolerance:g}": int(w) or None
            for tolerance, w in zip(TOLERANCES, recommended, strict=True)
        }
        return {"relative_error": error, "cosine": cosine, "recommended": chosen}

    return {
        "cell": trained.model.name,
        "windows": curve.windows,
        "sliding": part(curve.relative_error, curve.cosine, found.sliding),
        "block": part(curve.block_relative_error, curve.block_cosine, found.block),
        "costs": costs,
    }


def _costs(trained: Trained, found: Found, effort: Effort) -> list[dict[str, Any]]:
    step, loss = trained.model.cell.step, tasks.cross_entropy
    num_steps, first = len(trained.batch.xs), slice(effort.cost_tolerances)
    sizes = [w for w in effort.cost_windows if w < num_steps]
    estimators = {("full", num_steps): full_bptt(step, loss)}
    for window in sorted({*sizes, *map(int, found.block[first])} - {0, num_steps}):
        estimators["block", window] = truncated_bptt(step, loss, window=window, streams=False)
    for window in sorted({*sizes, *map(int, found.sliding[first])} - {0}):
        estimators["sliding", window] = truncated_bptt(step, loss, window=window, stride=1)
    # On one device, whatever --cores says: the numbers of two reports stay comparable.
    where = jax.device_put((trained.params, trained.carry, trained.batch), jax.devices()[0])
    named = {f"{kind} {window}": estimator for (kind, window), estimator in estimators.items()}
    cost = measure_cost(named, *where, num_repeats=effort.num_repeats)
    columns = zip(
        estimators, cost.median_seconds, cost.spread_seconds, cost.temporary_bytes, strict=True
    )
    return [
        {
            "strategy": kind,
            "window": window,
            "seconds": seconds,
            "seconds_spread": spread,
            "temporary_bytes": size,
        }
        for (kind, window), seconds, spread, size in columns
    ]


STRATEGIES = (("sliding", "-", "o"), ("block", (0, (5, 2)), "s"))


def draw(windows: dict[str, Any], *, axes: Any = None, theme: Theme = LIGHT) -> Any:
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


def say(windows: dict[str, Any]) -> str:
    """The windows for 10 % and 1 % error, and the time and memory that blocks take beside full
    BPTT.
    """
    needs = [
        f"the {model['cell']} {verb}a sliding window of {_needs(model, 'sliding')} or blocks of "
        f"{_needs(model, 'block')} steps"
        for model, verb in zip(windows["models"], ("needs ", "", ""), strict=False)
    ]
    sentence = f"For at most 10 % (1 %) of gradient error, {join_words(needs)}."
    costs = [cost for model in windows["models"] if (cost := _block_cost(model))]
    if not costs:
        return sentence
    return (
        f"{sentence} At the measured block size next to that for 10 %, one gradient takes these "
        f"parts of the time and temporary memory of full BPTT: {join_words(costs)}."
    )


def _needs(model: dict[str, Any], strategy: str) -> str:
    """`12 (30)`: the windows for 10 % and for 1 %."""
    return f"{format_window(model, strategy, '0.1')} ({format_window(model, strategy, '0.01')})"


def _block_cost(model: dict[str, Any]) -> str:
    """`0.5 and 0.1 with blocks of 16 (rnn)`: the measured block next to the one for 10 %; empty if
    there is none.
    """
    full, cost = (
        full_cost(model),
        cost_near(model, "block", recommended_window(model, "block", "0.1")),
    )
    if not full or not cost:
        return ""
    parts = []
    for field in ("seconds", "temporary_bytes"):
        known = cost[field] is not None and full[field]
        parts.append(f"{cost[field] / full[field]:.2g}" if known else "not known")
    return f"{parts[0]} and {parts[1]} with blocks of {cost['window']} ({model['cell']})"


def full_cost(model: Numbers) -> dict[str, Any] | None:
    """The measured cost of full BPTT; None if it was not measured."""
    return next((cost for cost in model["costs"] if cost["strategy"] == "full"), None)


def cost_near(model: Numbers, strategy: str, window: int | None) -> dict[str, Any] | None:
    """The cost at `window`, or at the next larger window that was measured."""
    costs = [
        c
        for c in model["costs"]
        if c["strategy"] == strategy and window is not None and c["window"] >= window
    ]
    return min(costs, key=lambda cost: cost["window"], default=None)


def recommended_window(model: Numbers, strategy: str, tolerance: str) -> int | None:
    """The smallest window within the tolerance; None where only full BPTT is."""
    window, full = model[strategy]["recommended"][tolerance], full_cost(model)
    return None if window is None or (full is not None and window >= full["window"]) else window


def format_window(model: Numbers, strategy: str, tolerance: str) -> str:
    """The smallest window within the tolerance; `all 128` where only full BPTT is, `more than 64`
    if unmeasured.
    """
    window, full, last = (
        model[strategy]["recommended"][tolerance],
        full_cost(model),
        model["windows"][-1],
    )
    if window is None:
        return (
            "no number of" if full is not None and last >= full["window"] else f"more than {last}"
        )
    return f"all {window}" if full is not None and window >= full["window"] else f"{window}"


def table(windows: dict[str, Any]) -> Table:
    """The recommended windows and what they cost, beside full BPTT."""
    columns = (
        "cell",
        "strategy",
        "gradient error",
        "window",
        "time",
        "temporary memory",
        "measured at",
    )
    rows = []
    for model in windows["models"]:
        for strategy, name in (("sliding", "sliding"), ("block", "blocks")):
            for tolerance in model[strategy]["recommended"]:
                window = recommended_window(model, strategy, tolerance)
                measured = _time_memory_window(cost_near(model, strategy, window))
                chosen = format_window(model, strategy, tolerance).replace("no number of", "none")
                rows.append(
                    (model["cell"], name, f"≤ {100 * float(tolerance):g} %", chosen, *measured)
                )
        if full := full_cost(model):
            rows.append(
                (
                    model["cell"],
                    "full BPTT",
                    "0",
                    f"all {full['window']}",
                    *_time_memory_window(full),
                )
            )
    return Table("Windows and their cost", columns, rows)


def _time_memory_window(cost: dict[str, Any] | None) -> tuple[str, str, str]:
    if cost is None:
        return "–", "–", "–"
    spread = (
        "" if cost["seconds_spread"] is None else f" ± {format_seconds(cost['seconds_spread'])}"
    )
    return (
        format_seconds(cost["seconds"]) + spread,
        format_bytes(cost["temporary_bytes"]),
        format_steps(cost["window"]),
    )


def alt(windows: Numbers) -> str:
    """What stands in the picture."""
    largest = max((model["windows"][-1] for model in windows["models"]), default=0)
    return (
        f"Four stacked plots for each of {cells_of(windows['models'])}, over windows of 1 to "
        f"{largest} steps: relative error, cosine, time and memory of sliding windows and blocks."
    )


QUESTION = Question(
    "windows",
    "What does a window throw away, and what does it cost?",
    "Error and cosine compare the truncated gradient with the exact one on held-out text. "
    "Sliding: every loss sees its own step and those before it, as many as the window has; "
    "blocks: cuts one window apart, averaged over where they fall, so that a loss sees about "
    "half a window. Rings: windows that keep 10 % and 1 %; for blocks checked on one "
    "alignment, which scatters around the average, so a ring may lie beyond the crossing. "
    "Below: the median time of one gradient, with half the interquartile range, and the "
    "temporary memory of the program.",
    0.85,
    draw,
    say,
    table,
    alt,
)
