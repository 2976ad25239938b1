"""How Jacobians stretch and shrink: exponents, and singular values of products."""

import math
from typing import Any

import jax
import numpy as np

from jbptt.analysis.jacobian_spans import jacobian_products
from jbptt.analysis.lyapunov import lyapunov_spectrum
from jbptt.report.axes import (
    new_axes,
    numbers,
    significant,
)
from jbptt.report.one_question import Numbers, Question
from jbptt.report.tables import (
    Table,
    shown,
)
from jbptt.report.text_models import Trained
from jbptt.report.themes import LIGHT, Theme
from jbptt.report.words import cells_of
from jbptt.report.work import Effort, Progress, one_at_a_time
from jbptt.types import Batch

SPANS = (1, 4, 16)


def measure(
    trained: Trained, heldout: Batch, effort: Effort, progress: Progress, device: Any
) -> list[dict[str, Any]]:
    """Singular values of products of Jacobians and Lyapunov exponents, before and after
    training.
    """
    model = trained.model
    progress(f"{model.name}: spectra")
    xs = np.asarray(heldout.xs)[:, :, 0].reshape(-1)  # the first stream, batch after batch
    xs = np.resize(xs, effort.spectrum_steps)
    size = sum(leaf.size for leaf in jax.tree.leaves(model.cell.initial_carry()))

    def look(params, carry, xs):
        found = lyapunov_spectrum(
            model.cell.step,
            params,
            carry,
            xs,
            num_exponents=min(effort.num_exponents, size),
            num_discarded=effort.spectrum_steps // 4,
            qr_every=4,
        )
        return found, jacobian_products(
            model.cell.step, params, carry, xs[: max(SPANS)], spans=SPANS
        )

    def inputs(params, carry):
        return jax.device_put((params, jax.tree.map(lambda leaf: leaf[0], carry), xs), device)

    compiled = jax.jit(look).lower(*inputs(trained.params, trained.carry)).compile()

    def one(stage, params, carry):
        with one_at_a_time:
            found, products = jax.device_get(compiled(*inputs(params, carry)))
        return {
            "cell": model.name,
            "stage": stage,
            "num_steps": effort.spectrum_steps - effort.spectrum_steps // 4,
            "exponents": found.exponents,
            "standard_errors": found.standard_errors,
            "spans": SPANS,
            "log_singular_values": significant(products.log_singular_values),
        }

    found = [
        one("before", model.seeds[0], model.carry),
        one("after", trained.params, trained.carry),
    ]
    progress(f"{model.name}: spectra measured", 2)
    return found


def draw(spectra: dict[str, Any], *, axes: Any = None, theme: Theme = LIGHT) -> Any:
    """Lyapunov exponents, and singular values of products of Jacobians; dashed before, solid after
    training.

    Returns: axes [2, cells].
    """
    models = spectra["models"]
    cells = list(dict.fromkeys(model["cell"] for model in models))
    size = 2.6 + 3.2 * len(cells), 7.4
    axes = np.asarray(new_axes(size, 2, len(cells), axes, sharey="row", squeeze=False))
    for model in models:
        column = axes[:, cells.index(model["cell"])]
        after = model["stage"] == "after"
        linestyle = "-" if after else (0, (4, 2))
        exponents = numbers(model["exponents"])
        places = np.arange(1, len(exponents) + 1)
        style = {
            "color": theme.lines[0],
            "linestyle": linestyle,
            "label": f"{model['stage']} training",
        }
        column[0].errorbar(
            places, exponents, 2 * numbers(model["standard_errors"]), linewidth=1.4, **style
        )
        for span, values, colour in zip(
            model["spans"], model["log_singular_values"], theme.lines, strict=False
        ):
            values = numbers(values)
            label = f"{span} step{'s' if span > 1 else ''}, {model['stage']}"
            column[1].plot(
                np.arange(1, len(values) + 1),
                values,
                color=colour,
                linestyle=linestyle,
                label=label,
            )
    for cell, column in zip(cells, axes.T, strict=True):
        column[0].set_title(cell)
        column[0].axhline(0, color=theme.muted, linewidth=0.9, linestyle=":")
        column[0].set_xlabel("number of the exponent")
        column[1].axhline(0, color=theme.muted, linewidth=0.9, linestyle=":")
        column[1].set_xlabel("number of the singular value")
        for ax in column:
            ax.grid(True)
    drawn = np.concatenate(
        [numbers(values) for model in models for values in model["log_singular_values"]]
    )
    axes[1, 0].set_ylim(bottom=max(-40.0, np.min(drawn[np.isfinite(drawn)], initial=0.0) - 1))
    axes[0, 0].set_ylabel("Lyapunov exponent (nats per step)")
    axes[1, 0].set_ylabel("ln singular value of the product")
    handles, labels = axes[1, 0].get_legend_handles_labels()
    title = "dashed: before, solid: after training"
    figure = axes[0, 0].figure
    figure.legend(
        handles, labels, loc="outside lower left", ncols=2, frameon=False, fontsize=9, title=title
    )
    return axes


def _regime(leading: float, error: float) -> str:
    """What the sign of the leading exponent says, if it stands out from its error."""
    if not math.isfinite(leading):
        return "is not finite"
    if abs(leading) <= 2 * error:
        return "cannot be told from 0: gradients neither vanish nor explode"
    return (
        "is negative: gradients vanish in the long run"
        if leading < 0
        else "is positive: gradients explode"
    )


def _leading(model: dict[str, Any]) -> tuple[float, float]:
    exponent, error = model["exponents"][0], model["standard_errors"][0]
    return (math.nan if exponent is None else exponent), (0.0 if error is None else error)


def say(spectra: dict[str, Any]) -> str:
    """The leading exponent of every cell before and after training, and what its sign says."""
    clauses = []
    models = {(model["cell"], model["stage"]): model for model in spectra["models"]}
    for cell in dict.fromkeys(cell for cell, _ in models):
        before, (after, error) = (
            _leading(models[cell, "before"])[0],
            _leading(models[cell, "after"]),
        )
        clauses.append(
            f"that of the {cell} goes from {shown(before)} to {shown(after)} ± {shown(error)} "
            f"nats per step and {_regime(after, error)}"
        )
    return f"With training, the leading Lyapunov exponent moves: {'; '.join(clauses)}."


def table(spectra: dict[str, Any]) -> Table:
    """Leading exponents and the norm of each product."""
    spans = spectra["models"][0]["spans"]
    columns = ("cell", "training", "leading exponent", "number above 0")
    columns += tuple(f"ln norm over {span} step{'s' if span > 1 else ''}" for span in spans)
    rows = []
    for model in spectra["models"]:
        leading, error = _leading(model)
        positive = int(np.sum(numbers(model["exponents"]) > 0))
        norms = [shown(float(numbers(values)[0])) for values in model["log_singular_values"]]
        above = f"{positive} of {len(model['exponents'])} measured"
        rows.append(
            (model["cell"], model["stage"], f"{shown(leading)} ± {shown(error)}", above, *norms)
        )
    return Table(
        "Leading Lyapunov exponent (nats per step) and norms of products of Jacobians",
        columns,
        rows,
    )


def alt(spectra: Numbers) -> str:
    """What stands in the picture."""
    return (
        f"For each of {cells_of(spectra['models'])} two plots, before and after training: Lyapunov "
        "exponents in descending order, and singular values of products of Jacobians."
    )


QUESTION = Question(
    "spectra",
    "How do its Jacobians stretch and shrink?",
    "Above: Lyapunov exponents along held-out text, the mean growth rates of small changes of "
    "the carry in its independent directions, with two standard errors. Below: singular values "
    "of products of Jacobians over 1, 4 and 16 steps from the start of the text, natural "
    "logarithm. A line that falls away means that gradients survive in few directions.",
    0.85,
    draw,
    say,
    table,
    alt,
)
