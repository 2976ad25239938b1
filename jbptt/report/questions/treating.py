"""Which remedy helps a network whose gradients vanish, and one whose gradients explode."""

import math
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from jbptt.experiments.outcomes import Remedies
from jbptt.experiments.remedies import compare_remedies
from jbptt.report.axes import (
    new_axes,
    numbers,
)
from jbptt.report.one_question import Numbers, Question
from jbptt.report.plots import REMEDY_MEASURES, plot_remedies
from jbptt.report.tables import (
    Table,
    finite_mean,
    shown,
)
from jbptt.report.themes import LIGHT, Theme
from jbptt.report.words import join_words
from jbptt.report.work import Progress, one_at_a_time


def measure(seed: int, progress: Progress) -> dict[str, Any]:
    """What each of the usual remedies does to a vanishing and to an exploding network."""
    progress("remedies")
    with one_at_a_time:
        found: Remedies = jax.device_get(compare_remedies(jax.random.key(seed)))
    progress("remedies compared", 8)
    return {
        "patients": found.patients,
        "remedies": found.remedies,
        "radii": found.radii,
        "num_updates": found.num_updates,
        "num_steps": found.num_steps,
        "before": found.before._asdict(),
        "after": found.after._asdict(),
        "diverged": found.diverged,
    }


def draw(remedies: dict[str, Any], *, axes: Any = None, theme: Theme = LIGHT) -> Any:
    """Four measures of every remedy (rows) for both patients, hollow before and filled after
    training.
    """
    stages = {stage: SimpleNamespace(**remedies[stage]) for stage in ("before", "after")}
    found = SimpleNamespace(patients=remedies["patients"], remedies=remedies["remedies"], **stages)
    axes = np.ravel(new_axes((12.0, 0.34 * len(found.remedies) + 2.2), 1, 4, axes, sharey=True))
    for ax, measure in zip(axes, REMEDY_MEASURES, strict=True):
        plot_remedies(found, measure=measure, ax=ax, theme=theme)
    handles, labels = axes[0].get_legend_handles_labels()
    labels = [f"{label}, after training (hollow: before)" for label in labels]
    axes[0].figure.legend(
        handles, labels, loc="outside lower left", ncols=2, frameon=False, fontsize=9
    )
    return axes


def say(remedies: dict[str, Any]) -> str:
    """Which remedies end with a lower loss than no remedy by more than the seeds' spread, and which
    with a higher.
    """
    clauses = []
    for p, patient in enumerate(remedies["patients"]):
        losses = numbers(remedies["after"]["loss"])[p]
        base, base_spread = losses[0].mean(), losses[0].std(ddof=1) if losses.shape[1] > 1 else 0.0
        better, worse, lost = [], [], []
        for name, runs in zip(remedies["remedies"][1:], losses[1:], strict=True):
            if not np.isfinite(runs).all() or not math.isfinite(base):
                lost.append(name)
                continue
            spread = math.hypot(base_spread, runs.std(ddof=1) if len(runs) > 1 else 0.0)
            if abs(runs.mean() - base) > spread:
                (better if runs.mean() < base else worse).append(name)
        words = [f"lower with {join_words(better)}"] if better else []
        words += [f"higher with {join_words(worse)}"] if worse else []
        words += [f"not finite in some run with {join_words(lost)}"] if lost else []
        clauses.append(
            f"for the {patient} network it is {'; '.join(words) if words else 'the same with all'}"
        )
    return (
        f"After {remedies['num_updates']} updates the held-out loss differs from that of no remedy "
        f"by more than the seeds' spread as follows: {'; '.join(clauses)}."
    )


def table(remedies: dict[str, Any]) -> Table:
    """All four measures after training."""
    columns = (
        "network",
        "remedy",
        "log₁₀ adjoint ratio",
        "leading exponent",
        "gradient error",
        "loss before",
        "after",
    )
    columns += ("runs diverged",)
    rows = []
    for p, patient in enumerate(remedies["patients"]):
        for r, name in enumerate(remedies["remedies"]):
            after = [
                shown(finite_mean(remedies["after"][field][p][r]))
                for field in ("adjoint_ratio", "exponent")
            ]
            error, before = (
                shown(finite_mean(remedies["before"][field][p][r]))
                for field in ("gradient_error", "loss")
            )
            runs = numbers(remedies["after"]["loss"][p][r])
            lost = f"{int(np.sum(~np.isfinite(runs)))} of {len(runs)}"
            rows.append((patient, name, *after, error, before, shown(finite_mean(runs)), lost))
    title = "Adjoint ratio and exponent after training; error of the gradient used, before it"
    return Table(title, columns, rows)


def alt(remedies: Numbers) -> str:
    """What stands in the picture."""
    first, second = remedies["patients"]
    return (
        f"Four dot plots of {len(remedies['remedies'])} remedies for a network that is {first} and "
        f"one that is {second}: adjoint ratio, leading exponent, gradient error, loss."
    )


QUESTION = Question(
    "remedies",
    "Which remedy helps?",
    "From a tanh network whose gradients vanish and one whose gradients explode, one remedy "
    "each, on the adding task: mean over the seeds that stayed finite; the table says how many "
    "did not. The first row is no remedy. An exponent near 0 keeps gradients; an error above 0 "
    "means that training uses another gradient than the exact one. A ratio that is missing or "
    "not finite: no gradient reaches the first step. Losses before training may lie beyond the "
    "edge.",
    0.9,
    draw,
    say,
    table,
    alt,
)
