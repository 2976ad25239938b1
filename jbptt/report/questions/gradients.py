"""The gradients of the ways to train a user's own model, against the exact one."""

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from jbptt.analysis.comparison import PER_ESTIMATOR, Comparison, compare
from jbptt.report.axes import numbers
from jbptt.report.one_question import Numbers, Question
from jbptt.report.plots import plot_comparison
from jbptt.report.tables import Table, format_number
from jbptt.report.themes import LIGHT, Theme
from jbptt.types import Estimator


def compared(estimators: Mapping[str, Estimator], problem: tuple, num_draws: int) -> Comparison:
    """All ways on one batch, at the parameters that training starts from; the first is exact."""
    ways, reference = dict(estimators), next(iter(estimators))
    look = jax.jit(partial(compare, ways, reference=reference, num_samples=num_draws))
    _, _, params, carry, batch = problem
    return jax.device_get(look(params, carry, batch, key=jax.random.key(1)))


def measure(comparison: Comparison) -> Numbers:
    """Bias and scatter of each way."""
    fields = {field: getattr(comparison, field) for field in PER_ESTIMATOR}
    return {"names": comparison.names, "num_samples": comparison.num_samples, **fields}


def draw(gradients: Numbers, *, ax: Any = None, theme: Theme = LIGHT) -> Any:
    """Bias and standard deviation of each way."""
    return plot_comparison(SimpleNamespace(**gradients), ax=ax, theme=theme)


def say(gradients: Numbers) -> str:
    """The ways by how far one of their gradients is from the exact one, root mean square."""
    bias, variance = (numbers(gradients[name]) for name in ("relative_bias", "variance"))
    if len(bias) == 1:
        return f"{gradients['names'][0]} was the only way to train, nothing was compared."
    off = np.sqrt(bias[1:] ** 2 + variance[1:])
    if not np.isfinite(off).all():
        return "A gradient is not finite, or the exact one is zero: nothing can be compared."
    order = np.argsort(off, kind="stable")
    told = [f"{gradients['names'][1 + i]} ({format_number(100 * float(off[i]))} %)" for i in order]
    return (
        "Before training, one gradient is so far from the exact one, root mean square and relative "
        f"to its norm: {', '.join(told)}."
    )


def table(gradients: Numbers) -> Table:
    """A row for each way."""
    rows = []
    for i, name in enumerate(gradients["names"]):
        of = {field: float(numbers(gradients[field])[i]) for field in PER_ESTIMATOR}
        spread = (
            f"{format_number(of['relative_bias'])} ± {format_number(of['relative_bias_error'])}"
        )
        rows.append(
            (
                name,
                spread,
                format_number(float(np.sqrt(of["variance"]))),
                format_number(of["cosine"]),
                format_number(of["norm_ratio"]),
            )
        )
    columns = ("way", "relative bias ± s.e.", "std / norm", "mean cosine", "mean norm ratio")
    return Table(f"One batch, {gradients['num_samples']} draws of what draws", columns, rows)


def alt(gradients: Numbers) -> str:
    """What stands in the picture."""
    return f"Dot plot of relative bias and standard deviation for {', '.join(gradients['names'])}."


QUESTION = Question(
    "gradients",
    "How far is each way's gradient from the exact one?",
    "On one batch, at the parameters that training starts from. Filled: how far the mean over all "
    "draws is from the exact gradient, with two standard errors. Hollow: how far one draw scatters "
    "around that mean; 0 where nothing is drawn.",
    0.8,
    draw,
    say,
    table,
    alt,
)
