"""Which remedy helps a network whose gradients vanish, and one whose gradients explode."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from jbptt.experiments.outcomes import MEANINGFUL_ERROR, Remedies, excess
from jbptt.experiments.remedies import compare_remedies
from jbptt.experiments.treatments import NOTHING
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
        "constant_loss": found.constant_loss,
        "diverged": found.diverged,
    }


def draw(remedies: dict[str, Any], *, axes: Any = None, theme: Theme = LIGHT) -> Any:
    """Four measures of every remedy (rows) for both patients, hollow before and filled after
    training.
    """
    stages = {stage: SimpleNamespace(**remedies[stage]) for stage in ("before", "after")}
    found = SimpleNamespace(
        patients=remedies["patients"],
        remedies=remedies["remedies"],
        constant_loss=remedies["constant_loss"],
        **stages,
    )
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
    """What learned anything at all, and what ends lower or higher than no remedy by more than the
    seeds' spread.
    """
    constant = float(np.mean(numbers(remedies["constant_loss"])))
    learned, beside = [], []
    for patient, losses in zip(
        remedies["patients"], numbers(remedies["after"]["loss"]), strict=True
    ):
        runs = dict(zip(remedies["remedies"], losses, strict=True))
        below = [name for name, of in runs.items() if _apart(of, constant) < 0]
        learned.append(f"the {patient} network does better {_with(below, list(runs))}")
        beside.append(f"the {patient} network ends {_beside_none(runs)}")
    number = remedies["num_updates"]
    return (
        f"Predicting the mean has a loss of {constant:.2g}; after {number} updates "
        f"{', '.join(learned)}. Against no remedy, by more than the seeds' spread: "
        f"{'; '.join(beside)}."
    )


def _apart(losses: np.ndarray, reference: Any) -> float:
    """By how much they differ on average, 0 where the seeds' spread is larger or one is not
    finite.
    """
    reference = np.broadcast_to(reference, losses.shape)
    mean, spread = excess(losses, reference)
    return mean if np.isfinite(losses - reference).all() and abs(mean) > spread else 0.0


def _with(names: list[str], all_names: list[str]) -> str:
    """`with a and b`; the shorter of the two lists where most are named."""
    others = [name for name in all_names if name not in names]
    if not names:
        return "with nothing that was tried"
    if not others:
        return "with whatever was tried"
    if len(others) < len(names):
        return f"with all but {join_words(list(map(_named, others)))}"
    return f"with {join_words(list(map(_named, names)))}"


def _named(remedy: str) -> str:
    return "no remedy" if remedy == NOTHING else remedy


def _beside_none(runs: dict[str, np.ndarray]) -> str:
    """`lower with a and b, higher with c`, beside the first of these runs; seeds are paired."""
    none, *names = runs
    apart = {name: _apart(runs[name], runs[none]) for name in names}
    lower = [name for name in names if apart[name] < 0]
    higher = [name for name in names if apart[name] > 0]
    words = [f"lower with {join_words(lower)}"] if lower else []
    words += [f"higher with {join_words(higher)}"] if higher else []
    lost = [name for name in names if not np.isfinite(runs[name]).all()]
    words += [f"not finite in some run with {join_words(lost)}"] if lost else []
    if not np.isfinite(runs[none]).all():
        words += ["not finite in some run with no remedy, so that nothing is compared"]
    return ", ".join(words) or "alike with all"


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
                finite_mean(remedies["before"][field][p][r]) for field in ("gradient_error", "loss")
            )
            if error < MEANINGFUL_ERROR:  # rounding
                error = 0.0
            runs = numbers(remedies["after"]["loss"][p][r])
            lost = f"{int(np.sum(~np.isfinite(runs)))} of {len(runs)}"
            losses = shown(before), shown(finite_mean(runs))
            rows.append((patient, name, *after, shown(error), *losses, lost))
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
    "each, which are to say after the last step what the first input was: mean over the seeds that "
    "stayed finite; the table says how many did not. The first row is no remedy. Dotted beside the "
    "losses: predicting the mean, which takes no memory. An exponent near 0 keeps gradients; an "
    "error above 0 means that training uses another gradient than the exact one. A ratio that is "
    "missing or not finite: no gradient reaches the first step. Losses before training may lie "
    "beyond the edge.",
    0.9,
    draw,
    say,
    table,
    alt,
)
