"""How far back the gradient reaches, before and after training."""

import math
from typing import Any

import jax
import numpy as np

from jbptt.analysis.lags import lag_profile
from jbptt.diagnosis.decay import fit_decay
from jbptt.diagnosis.result import VERDICTS
from jbptt.experiments import tasks
from jbptt.report.axes import (
    legend_below,
    log_scale,
    new_axes,
    numbers,
    positive,
)
from jbptt.report.one_question import Numbers, Question
from jbptt.report.tables import (
    Table,
    format_half_life,
    format_number,
    format_steps,
)
from jbptt.report.text_models import Trained
from jbptt.report.themes import LIGHT, Theme
from jbptt.report.words import cells_of, join_words
from jbptt.report.work import Progress


def measure(trained: Trained, progress: Progress, device: Any) -> list[dict[str, Any]]:
    """The curves of the picture of norms by lag, before and after training."""
    model = trained.model
    progress(f"{model.name}: go back lag by lag")

    @jax.jit
    def look(params, carry, batch):
        num_steps = batch.xs.shape[0]
        profile = lag_profile(
            model.cell.step, tasks.cross_entropy, params, carry, batch, max_lag=num_steps
        )
        return *profile, fit_decay(profile.cotangent_norms)

    def curve(stage, params, carry):
        norms, grad_norms, decay = jax.device_get(
            look(*jax.device_put((params, carry, trained.batch), device))
        )
        return {
            "cell": model.name,
            "stage": stage,
            "norms": norms,
            "grad_norms": grad_norms,
            "half_life": float(decay.half_life),
            "reach": int(decay.reach) if decay.reach < len(norms) else None,
            "verdict": VERDICTS[decay.verdict_index],
        }

    curves = [
        curve("before", model.seeds[0], model.carry),
        curve("after", trained.params, trained.carry),
    ]
    progress(f"{model.name}: went back", 1)
    return curves


CELL_MARKERS = {"rnn": "o", "gru": "s", "lstm": "^"}


def draw(reach: dict[str, Any], *, ax: Any = None, theme: Theme = LIGHT) -> Any:
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


_VERBS = {
    "vanishing": "vanishes",
    "stable": "neither vanishes nor explodes",
    "exploding": "explodes",
    "non-finite": "is not finite",
}


def say(reach: dict[str, Any]) -> str:
    """What the gradient of each cell does after training, and how training changed its
    half-life.
    """
    curves = {(curve["cell"], curve["stage"]): curve for curve in reach["curves"]}
    cells = list(dict.fromkeys(cell for cell, _ in curves))
    after = [curves[cell, "after"] for cell in cells if (cell, "after") in curves]
    groups: dict[str, list[str]] = {}
    for curve in after:
        groups.setdefault(curve["verdict"], []).append(
            f"the {curve['cell']}{_how_far(curve, reach['lags'][-1])}"
        )
    clauses = [f"{_VERBS[verdict]} in {join_words(names)}" for verdict, names in groups.items()]
    changes = [
        _change(cell, curves[cell, "before"], curves[cell, "after"])
        for cell in cells
        if {(cell, "before"), (cell, "after")} <= set(curves)
    ]
    sentence = (
        f"After training, the gradient {'; it '.join(clauses)}; percentages are of the norm at lag "
        "0."
    )
    return (
        f"{sentence} Half-life before and after training: {', '.join(changes)}."
        if changes
        else sentence
    )


def _how_far(curve: dict[str, Any], last: int) -> str:
    """In brackets: the half-life, and the lag from which the norm is under 1 % of that at lag 0."""
    if curve["verdict"] == "non-finite":
        return ""
    half = "no halving" if curve["half_life"] is None else f"half-life {format_half_life(curve)}"
    if curve["reach"] is None:
        return f" ({half}; still at least 1 % at lag {last})"
    return f" ({half}; under 1 % from lag {curve['reach']} on)" if curve["reach"] else " (zero)"


def _change(cell: str, before: dict[str, Any], after: dict[str, Any]) -> str:
    """`rnn 1.4 steps → 2.4 steps (longer)`."""
    words = [format_half_life(curve) for curve in (before, after)]
    pair = f"{cell} {words[0]} → {words[1]}"
    if "non-finite" in (before["verdict"], after["verdict"]):
        return pair
    if words[0] == words[1]:
        return f"{pair} (unchanged)"
    lives = [
        math.inf if curve["half_life"] is None else curve["half_life"] for curve in (before, after)
    ]
    return f"{pair} ({'longer' if lives[1] > lives[0] else 'shorter'})"


def table(reach: dict[str, Any]) -> Table:
    """Verdict, half-life and reach of each cell, before and after training."""
    columns = (
        "cell",
        "training",
        "verdict",
        "half-life",
        "reach (1 % of lag 0)",
        "norm at lag 0",
        "at the last lag",
    )
    rows = []
    for curve in reach["curves"]:
        far = (
            f"more than {reach['lags'][-1]} steps"
            if curve["reach"] is None
            else format_steps(curve["reach"])
        )
        ends = format_number(curve["norms"][0]), format_number(curve["norms"][-1])
        rows.append(
            (curve["cell"], curve["stage"], curve["verdict"], format_half_life(curve), far, *ends)
        )
    return Table("Gradient norm by lag", columns, rows)


def alt(reach: Numbers) -> str:
    """What stands in the picture."""
    return (
        f"Line plot of the gradient norm at lags 0 to {reach['lags'][-1]} on a log scale for "
        f"{cells_of(reach['curves'])}, before and after training."
    )


QUESTION = Question(
    "reach",
    "How far back does the gradient reach?",
    "How strongly a loss depends on the hidden state k steps earlier, averaged over held-out "
    "text. A straight line is exponential decay; the half-life is that of an exponential "
    "fitted to the lags before the norm falls to 1 % of that at lag 0. What lies a million "
    "million times below the largest norm is not shown.",
    0.8,
    draw,
    say,
    table,
    alt,
)
