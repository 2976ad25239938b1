"""Which loss depends on which step."""

from functools import partial
from typing import Any

import jax
import numpy as np

from jbptt.analysis.flow import gradient_flow
from jbptt.experiments import tasks
from jbptt.report.axes import (
    new_axes,
    numbers,
    significant,
)
from jbptt.report.one_question import Numbers, Question
from jbptt.report.plots import plot_gradient_flow
from jbptt.report.tables import (
    Table,
    finite_mean,
    shown,
)
from jbptt.report.text_models import Trained
from jbptt.report.themes import LIGHT, Theme
from jbptt.report.work import Progress


def measure(trained: Trained, progress: Progress, device: Any) -> dict[str, Any]:
    """F[t, s] of the trained model on one held-out batch."""
    progress(f"{trained.model.name}: every loss against every step")
    look = jax.jit(partial(gradient_flow, trained.model.cell.step, tasks.cross_entropy))
    matrix = look(*jax.device_put((trained.params, trained.carry, trained.batch), device))
    found = {"cell": trained.model.name, "matrix": significant(jax.device_get(matrix))}
    progress(f"{trained.model.name}: every loss seen", 1)
    return found


def draw(flow: dict[str, Any], *, ax: Any = None, theme: Theme = LIGHT) -> Any:
    """The heat map of one model: a row for each loss, a column for each earlier step."""
    ax = new_axes((6.6, 5.4), 1, 1, ax)
    plot_gradient_flow(numbers(flow["matrix"]), ax=ax, theme=theme)
    ax.set_title(f"{flow['cell']}, after training")
    return ax


def _by_lag(flow: dict[str, Any]) -> list[float]:
    """The mean of F over all pairs at each lag, those below the precision counted as 0."""
    matrix = np.nan_to_num(numbers(flow["matrix"]))
    return [float(np.diagonal(matrix, -lag).mean()) for lag in range(len(matrix))]


def say(flow: dict[str, Any]) -> str:
    """How the flow falls with the distance, and how much the losses differ among themselves."""
    matrix, means = numbers(flow["matrix"]), _by_lag(flow)
    if not np.isfinite(matrix).all() or not means[0]:
        return (
            f"The gradient flow of the {flow['cell']} is not finite or zero, so that nothing can "
            "be said of it."
        )
    lag = min(8, len(means) - 1)
    share = means[lag] / means[0]
    far = np.diagonal(matrix, -lag)
    spread = (
        f", between {shown(float(far.min()))} and {shown(float(far.max()))} from loss to loss"
        if lag
        else ""
    )
    return (
        f"In the trained {flow['cell']} a loss depends on the carry that enters its own step with "
        f"a norm of {shown(means[0])} on average, and on that of {lag} steps before with "
        f"{shown(means[lag])} ({100 * share:.2g} %){spread}."
    )


def table(flow: dict[str, Any]) -> Table:
    """Mean, smallest and largest entry by lag."""
    matrix = numbers(flow["matrix"])
    lags = [lag for lag in (0, 1, 2, 4, 8, 16, 32, 64, 128, 256) if lag < len(matrix)]
    rows = []
    for lag in lags:
        found = np.diagonal(matrix, -lag)
        rows.append(
            (
                f"{lag}",
                shown(finite_mean(found)),
                shown(float(found.min())),
                shown(float(found.max())),
            )
        )
    return Table(
        "Gradient flow by lag", ("lag (steps)", "mean over losses", "smallest", "largest"), rows
    )


def alt(flow: Numbers) -> str:
    """What stands in the picture."""
    size = len(flow["matrix"])
    return f"Heat map of {size} losses by {size} earlier steps on a log scale, lower-triangular."


QUESTION = Question(
    "flow",
    "Which loss depends on which step?",
    "Row t, column s: how strongly the loss at step t depends on the carry that enters step s, "
    "root mean square over held-out examples. Bands parallel to the diagonal are plain decay; "
    "columns that stay strong are steps that many later losses depend on, rows that stay "
    "strong are losses that look far back. Grey: zero. Colours end at 10⁻⁸ of the largest.",
    0.8,
    draw,
    say,
    table,
    alt,
    has_colour_map=True,
)
