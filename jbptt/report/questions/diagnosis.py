"""How far the gradient of a user's own model reaches, and which windows keep it."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from jbptt.diagnosis.advice import TOLERANCES
from jbptt.diagnosis.decision import decide
from jbptt.diagnosis.page import verdict_words
from jbptt.diagnosis.question import diagnose
from jbptt.report.axes import log_scale, new_axes, numbers, positive
from jbptt.report.one_question import Numbers, Question
from jbptt.report.plots import plot_truncation_curve
from jbptt.report.tables import Table, format_bytes, format_number, format_seconds
from jbptt.report.themes import LIGHT, Theme


def measure(problem: tuple) -> Numbers:
    """The diagnosis of one batch at the parameters that training starts from."""
    found = diagnose(*problem, progress=False)
    lags = int(found.num_lags)
    cost = found.cost
    costs = {}
    if cost is not None:
        both = zip(cost.names, cost.median_seconds, cost.temporary_bytes, strict=True)
        costs = {name: {"seconds": time, "temporary_bytes": size} for name, time, size in both}
    return {
        "page": str(found),
        "decision": decide(found),
        "verdict": verdict_words(found),
        "num_steps": found.num_steps,
        "half_life": found.half_life,
        "reach": int(found.reach),
        "exponent": found.exponent,
        "loss": found.loss,
        "constant_loss": found.constant_loss,
        "gradient_norm": found.gradient_norm,
        "norms": np.asarray(found.profile.cotangent_norms)[:lags],
        "curve": found.curve._asdict(),
        "recommended": {
            kind: {f"{t:g}": int(w) for t, w in zip(TOLERANCES, np.asarray(windows), strict=True)}
            for kind, windows in (
                ("sliding", found.sliding_window),
                ("block", found.block_window),
            )
        },
        "costs": costs,
    }


def draw(diagnosis: Numbers, *, axes: Any = None, theme: Theme = LIGHT) -> Any:
    """Left: the norm by lag. Right: the error by window."""
    axes = np.ravel(new_axes((10.4, 4.4), 1, 2, axes))
    norms = positive(diagnosis["norms"])
    axes[0].plot(norms, color=theme.lines[0], marker="o", markersize=3)
    log_scale(axes[0], "y", norms, (1,))
    axes[0].set_xlabel("lag k: steps between a loss and the carry it flows back to")
    axes[0].set_ylabel("mean norm of the gradient at lag k")
    curve = {name: numbers(values) for name, values in diagnosis["curve"].items()}
    plot_truncation_curve(SimpleNamespace(**curve), ax=axes[1], theme=theme)
    return axes


def say(diagnosis: Numbers) -> str:
    """What the diagnosis decides, before any training."""
    return diagnosis["decision"]


def table(diagnosis: Numbers) -> Table:
    """The windows that keep 10 % and 1 %, and what they cost."""
    rows = []
    for kind, name in (("sliding", "sliding window"), ("block", "blocks")):
        for tolerance, window in diagnosis["recommended"][kind].items():
            cost = diagnosis["costs"].get(f"{kind} {window}")
            error = f"≤ {100 * float(tolerance):g} %"
            words = format_number(window) if window else "none measured"
            full = kind == "block" and window == diagnosis["num_steps"]
            rows.append((name, error, f"all {words}" if full else words, *_cost(cost)))
    full = diagnosis["costs"].get("full")
    rows.append(("full BPTT", "0", f"all {diagnosis['num_steps']}", *_cost(full)))
    columns = ("way", "gradient error", "steps", "time of an update", "memory")
    return Table("Windows that keep the gradient", columns, rows)


def _cost(cost: Numbers | None) -> tuple[str, str]:
    if cost is None:
        return "–", "–"
    return format_seconds(cost["seconds"]), format_bytes(cost["temporary_bytes"])


def alt(diagnosis: Numbers) -> str:
    """What stands in the picture."""
    return (
        f"Two line plots on log scales: gradient norm at lags 0 to {len(diagnosis['norms']) - 1}, "
        "and relative error by window for sliding windows and blocks."
    )


QUESTION = Question(
    "diagnosis",
    "What does its gradient look like before training?",
    "Left: how strongly a loss depends on the hidden state k steps earlier, averaged over this "
    "batch; a straight line is exponential decay. Right: how far the gradient of a window is from "
    "the exact one. Sliding: every loss sees its own step and those before it, as many as the "
    "window has; blocks: averaged over where the cuts fall. The table's windows keep their error "
    "on 95 % of the batches like this one (bootstrap over its parts).",
    0.85,
    draw,
    say,
    table,
    alt,
)
