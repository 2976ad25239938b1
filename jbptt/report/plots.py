"""A picture of each result: `plot_*(result, *, ax=None) -> Axes`. Public as `jbptt.plots`.

Each draws on the axes given, or on those of a new figure
(`plots.plot_lag_profile(profile).figure.savefig(...)`). No pyplot state is read or changed, and
matplotlib is imported when something is drawn. Results are those of one model: from a vmapped
analysis pass one element.
"""

from typing import Any

import jax
import numpy as np

from jbptt.diagnosis.page import verdict_words
from jbptt.report.axes import (
    draw_matrix,
    draw_unit_circle,
    label_characters,
    log_scale,
    new_axes,
    numbers,
    plain_ticks,
    positive,
    powers_of_two,
    rule_tolerances,
    visible,
)
from jbptt.report.comparison_plots import plot_agreement as plot_agreement
from jbptt.report.history_plots import plot_history as plot_history
from jbptt.report.learning_plots import plot_learning_curves as plot_learning_curves
from jbptt.report.learning_plots import plot_learning_study as plot_learning_study
from jbptt.report.sweep_pictures import plot_sweep as plot_sweep
from jbptt.report.themes import LIGHT, Theme

_SIZE = (7.0, 4.4)


def plot_coverage(
    coverage: Any, *, labels: str | None = None, ax: Any = None, theme: Theme = LIGHT
) -> Any:
    """A coverage matrix `[T, T]`: grey pairs are cut, blank ones lie in the future.

    Args:
      coverage: C[t, i], as from `truncation.coverage` or `testing.measured_coverage`.
      labels: T characters to write beside the steps.
      ax: the axes to draw on.
      theme: colours.
    """
    from matplotlib.colors import Normalize

    ax = new_axes((5.4, 4.8), 1, 1, ax)
    matrix = np.asarray(coverage, float)
    mesh = draw_matrix(ax, matrix, Normalize(0, max(1.0, float(matrix.max()))), theme)
    if labels is not None:
        label_characters(ax, [visible(character) for character in labels])
    _matrix_axes(ax, mesh, "source: step i", "loss: step t", "weight C[t, i]")
    return ax


def plot_gradient_flow(flow: Any, *, ax: Any = None, theme: Theme = LIGHT) -> Any:
    """A heat map of F[t, s], log scale: how much the loss at step t depends on the carry that
    enters step s.
    """
    from matplotlib.colors import LogNorm

    ax = new_axes((5.4, 4.8), 1, 1, ax)
    matrix = np.asarray(flow, float)
    finite = matrix[np.isfinite(matrix) & (matrix > 0)]
    largest = float(finite.max()) if finite.size else 1.0
    smallest = max(float(finite.min()) if finite.size else 0.1, 1e-8 * largest)
    norm = LogNorm(min(smallest, 0.5 * largest), largest, clip=True)
    mesh = draw_matrix(ax, matrix, norm, theme)
    _matrix_axes(
        ax, mesh, "carry that enters step s", "loss: step t", "RMS norm of ∂loss_t / ∂carry_s"
    )
    return ax


def _matrix_axes(ax: Any, mesh: Any, xlabel: str, ylabel: str, label: str) -> None:
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    bar = ax.figure.colorbar(mesh, ax=ax, shrink=0.85, format=plain_ticks())
    bar.set_label(label)
    bar.outline.set_visible(False)


def plot_adjoints(adjoints: Any, *, ax: Any = None, theme: Theme = LIGHT) -> Any:
    """The norm of ∂L/∂carries[t] by step, over all examples, one line for each leaf of the carry;
    log scale.
    """
    ax = new_axes(_SIZE, 1, 1, ax)
    for leaf, name, colour in _leaves(adjoints.cotangents, theme):
        norms = np.linalg.norm(np.asarray(leaf, float).reshape(len(leaf), -1), axis=1)
        ax.plot(positive(norms), color=colour, label=f"carry{name}")
    _lines(ax, "step t", "norm of ∂L / ∂carries[t]", log=True)
    return ax


def plot_lag_profile(profile: Any, *, ax: Any = None, theme: Theme = LIGHT) -> Any:
    """The gradient by lag, log scale: of one loss in the carry, and of all losses in the
    parameters.

    A profile by leaf gives one line for each leaf.
    """
    ax = new_axes(_SIZE, 1, 1, ax)
    for field, linestyle, what in (
        ("cotangent_norms", "-", "carry"),
        ("grad_norms", (0, (4, 2)), "params"),
    ):
        for norms, name, colour in _leaves(getattr(profile, field), theme):
            ax.plot(positive(norms), color=colour, linestyle=linestyle, label=f"{what}{name}")
    _lines(
        ax,
        "lag k: steps between a loss and the step it flows back to",
        "gradient norm at lag k",
        log=True,
    )
    return ax


def plot_truncation_curve(curve: Any, *, ax: Any = None, theme: Theme = LIGHT) -> Any:
    """Relative error by window, log-log: sliding windows solid, blocks (averaged over their phase)
    dashed.
    """
    ax = new_axes(_SIZE, 1, 1, ax)
    rule_tolerances(ax, theme)
    for field, linestyle, what in (
        ("relative_error", "-", "sliding"),
        ("block_relative_error", (0, (5, 2)), "blocks"),
    ):
        for error, name, colour in _leaves(getattr(curve, field), theme):
            ax.plot(
                curve.windows,
                positive(error),
                color=colour,
                linestyle=linestyle,
                label=f"{what} {name}".strip(),
            )
    _lines(ax, "window (steps)", "relative error of the gradient", log=True)
    ax.set_ylim(bottom=max(ax.get_ylim()[0], 1e-6))
    powers_of_two(ax)
    return ax


def plot_gradient_sources(sources: Any, *, ax: Any = None, theme: Theme = LIGHT) -> Any:
    """Which steps the gradient comes from: each step's share of it, all of which add up to 1."""
    ax = new_axes(_SIZE, 1, 1, ax)
    shares = np.asarray(sources.shares, float)
    ax.bar(np.arange(len(shares)), shares, width=1.0, color=theme.lines[0])
    ax.axhline(0, color=theme.muted, linewidth=0.8)
    _lines(ax, "source: step i", "share of the gradient", legend=False)
    return ax


def plot_cost(cost: Any, *, ax: Any = None, theme: Theme = LIGHT) -> Any:
    """Median time of one update of each estimator, with half the interquartile range, and its
    temporary memory.
    """
    ax = new_axes(_SIZE, 1, 1, ax)
    places = np.arange(len(cost.names))
    ax.barh(
        places,
        1e3 * cost.median_seconds,
        xerr=1e3 * cost.spread_seconds,
        color=theme.lines[0],
        capsize=3,
    )
    labels = [
        f"{name}\n{size / 2**20:.3g} MiB"
        for name, size in zip(cost.names, cost.temporary_bytes, strict=True)
    ]
    ax.set_yticks(places, labels=labels)
    ax.invert_yaxis()
    _lines(ax, "time of one update (ms)", "", legend=False)
    return ax


def plot_comparison(comparison: Any, *, ax: Any = None, theme: Theme = LIGHT) -> Any:
    """Relative bias of each estimator with two standard errors (filled), and its standard deviation
    (hollow).
    """
    names = comparison.names
    ax = new_axes((7.0, 0.4 * len(names) + 1.6), 1, 1, ax)
    places, variance = np.arange(len(names)), numbers(comparison.variance)
    bias, error = numbers(comparison.relative_bias), 2 * numbers(comparison.relative_bias_error)
    style = {"fmt": "o", "color": theme.lines[0], "markersize": 5, "capsize": 3}
    ax.errorbar(
        bias, places - 0.12, xerr=error, label="bias of the mean estimate, ± 2 s.e.", **style
    )
    hollow = {
        "color": theme.lines[1],
        "markerfacecolor": theme.paper,
        "markersize": 5,
        "linestyle": "none",
    }
    ax.plot(
        np.sqrt(variance), places + 0.12, "s", label="standard deviation of one estimate", **hollow
    )
    _lines(ax, "relative to the norm of the exact gradient", "", legend=False)
    ax.set_xscale("symlog", linthresh=0.01)
    ax.xaxis.set_major_formatter(plain_ticks())
    ax.set_xlim(left=-0.002)
    ax.set_yticks(places, labels=names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.legend(
        frameon=False,
        fontsize=9,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.55 / (0.25 * len(names) + 1)),
        ncols=2,
    )
    return ax


def plot_schedule(schedule: Any, *, ax: Any = None, theme: Theme = LIGHT) -> Any:
    """The chance that a window goes on, by the steps that it has lasted, beside constant π of equal
    mean length.
    """
    ax = new_axes(_SIZE, 1, 1, ax)
    places = np.arange(1, len(schedule.keep_prob) + 1)
    ax.plot(places, schedule.keep_prob, color=theme.lines[0], label="least predicted variance")
    ax.axhline(schedule.constant_keep_prob, color=theme.muted, linestyle=":", label="constant π")
    _lines(
        ax,
        "steps since the last cut",
        f"probability to go on (windows of {schedule.mean_length:.3g} steps)",
    )
    ax.set_ylim(0, 1.02)
    return ax


def plot_jacobian_products(products: Any, *, ax: Any = None, theme: Theme = LIGHT) -> Any:
    """Every singular value of the product of Jacobians by span, natural logarithm; the largest is
    its norm.
    """
    ax = new_axes(_SIZE, 1, 1, ax)
    values = np.asarray(products.log_singular_values, float)
    finite = np.where(np.isfinite(values), values, np.nan)
    ax.plot(products.spans, finite, color=theme.muted, linewidth=0.8, alpha=0.7)
    ax.plot(
        products.spans,
        finite[:, 0],
        color=theme.lines[0],
        marker="o",
        markersize=4,
        label="largest",
    )
    ax.plot(
        products.spans,
        finite[:, -1],
        color=theme.lines[1],
        marker="s",
        markersize=4,
        label="smallest",
    )
    _lines(ax, "span (steps)", "ln singular value of the product of Jacobians")
    return ax


def plot_gate_paths(paths: Any, *, ax: Any = None, theme: Theme = LIGHT) -> Any:
    """How much of ∂carry_{t+1}/∂carry_t passes through each gate, by step (Frobenius norms)."""
    import matplotlib

    ax = new_axes(_SIZE, 1, 1, ax)
    colours = [*theme.lines, theme.ink, theme.muted, matplotlib.colormaps["tab10"](6)]
    for name, norms, colour in zip(
        paths.names, np.asarray(paths.norms, float).T, colours, strict=False
    ):
        ax.plot(positive(norms), color=colour, label=name)
    _lines(ax, "step t", "norm of the path's Jacobian", log=True)
    return ax


def plot_lyapunov_spectrum(spectrum: Any, *, ax: Any = None, theme: Theme = LIGHT) -> Any:
    """The exponents in descending order, with two standard errors; above 0 the gradient grows."""
    ax = new_axes(_SIZE, 1, 1, ax)
    exponents = np.asarray(spectrum.exponents, float)
    errors = np.nan_to_num(2 * np.asarray(spectrum.standard_errors, float))
    places = np.arange(1, len(exponents) + 1)
    finite = np.isfinite(exponents)
    ax.axhline(0, color=theme.muted, linewidth=0.9, linestyle=":")
    style = {
        "color": theme.lines[0],
        "marker": "o",
        "markersize": 3.5,
        "linewidth": 1.0,
        "capsize": 2,
    }
    ax.errorbar(places[finite], exponents[finite], errors[finite], **style)
    if not finite.all():
        ax.set_title(f"{int(np.sum(~finite))} of {len(exponents)} exponents are not finite")
    _lines(ax, "number of the exponent", "Lyapunov exponent (nats per step)", legend=False)
    return ax


def plot_alignment(alignment: Any, *, ax: Any = None, theme: Theme = LIGHT) -> Any:
    """How fast vectors turn into one direction: the sine of the angle left, log scale, and the
    fitted rate.

    Of `powers.alignment` (applications of the matrix) or `analysis.adjoint_alignment` (steps back).
    """
    ax = new_axes(_SIZE, 1, 1, ax)
    misalignment = positive(alignment.misalignment)
    ax.plot(
        misalignment,
        color=theme.lines[0],
        marker="o",
        markersize=3,
        linestyle="none",
        label="measured",
    )
    rate, places = float(alignment.rate), np.arange(len(misalignment))
    start = next((k for k in places[len(places) // 4 :] if np.isfinite(misalignment[k])), None)
    if start is not None and np.isfinite(rate):
        line = misalignment[start] * np.exp(rate * (places - start))
        ax.plot(places, positive(line), color=theme.lines[1], label=f"rate {rate:.3g} per step")
    _lines(ax, "steps", "sine of the angle to the direction", log=True)
    finite = misalignment[np.isfinite(misalignment)]
    if finite.size:
        ax.set_ylim(0.3 * finite.min(), 3.0)
    return ax


def plot_eigenvalues(eigenvalues: Any, *, ax: Any = None, theme: Theme = LIGHT) -> Any:
    """Eigenvalues in the complex plane, with the unit circle: those inside vanish in powers, those
    outside explode.
    """
    ax = new_axes((5.0, 4.8), 1, 1, ax)
    values = np.asarray(eigenvalues, complex)
    draw_unit_circle(ax, theme)
    ax.plot(np.real(values), np.imag(values), "o", color=theme.lines[0], markersize=4)
    ax.set_aspect("equal", "datalim")
    _lines(ax, "real part", "imaginary part", legend=False)
    return ax


REMEDY_MEASURES = {
    "adjoint_ratio": "log₁₀ of the adjoint's norm\nat the first step / at the last",
    "exponent": "leading exponent\n(nats per step)",
    "gradient_error": "relative error of\nthe gradient used",
    "loss": "held-out loss",
}


def plot_remedies(
    remedies: Any, *, measure: str = "loss", ax: Any = None, theme: Theme = LIGHT
) -> Any:
    """One measure of every remedy (rows) for each patient, hollow before and filled after training.

    Means over the seeds that stayed finite; dotted in the losses: predicting the mean.

    Args:
      remedies: what `experiments.compare_remedies` returns.
      measure: one of `REMEDY_MEASURES`: adjoint_ratio, exponent, gradient_error, loss.
      ax: the axes to draw on.
      theme: colours.

    Raises:
      ValueError: an unknown measure.
    """
    if measure not in REMEDY_MEASURES:
        raise ValueError(f"measure must be one of {', '.join(REMEDY_MEASURES)}, got {measure!r}")
    ax = new_axes((6.4, 0.34 * len(remedies.remedies) + 1.4), 1, 1, ax)
    rows = np.arange(len(remedies.remedies))
    before, after = (
        _finite_means(getattr(stage, measure)) for stage in (remedies.before, remedies.after)
    )
    for p, (patient, colour) in enumerate(zip(remedies.patients, theme.lines, strict=False)):
        shift = rows + 0.16 * (2 * p - 1)
        ax.hlines(shift, before[p], after[p], color=colour, linewidth=1.0, alpha=0.6)
        ax.plot(before[p], shift, "o", color=colour, markerfacecolor=theme.paper, markersize=5)
        ax.plot(after[p], shift, "o", color=colour, markersize=5, label=f"{patient} at the start")
    ax.axhline(0.5, color=theme.muted, linewidth=0.6)
    _lines(ax, REMEDY_MEASURES[measure], "", legend=False)
    ax.grid(False, axis="y")
    _remedies_scale(ax, measure, np.concatenate([before[:, 0], np.ravel(after)]), theme)
    if measure == "loss":
        constant = float(np.mean(numbers(remedies.constant_loss)))
        ax.axvline(constant, color=theme.muted, linewidth=0.9, linestyle=":")
    ax.set_yticks(rows, labels=remedies.remedies)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    return ax


def _remedies_scale(ax: Any, measure: str, values: np.ndarray, theme: Theme) -> None:
    if measure == "gradient_error":
        ax.set_xscale("symlog", linthresh=0.01)
        ax.xaxis.set_major_formatter(plain_ticks())
        ax.set_xlim(-0.004, 2 * ax.get_xlim()[1])
    elif measure == "loss":
        # What an untrained network scores in millions would press all differences flat: it may lie
        # beyond the edge.
        largest = np.max(values[np.isfinite(values)], initial=0.0)
        if largest > 0:
            ax.set_xlim(0, 1.1 * largest)
    else:
        ax.axvline(0, color=theme.muted, linewidth=0.9, linestyle=":")


def _finite_means(values: Any) -> np.ndarray:
    """Over the last axis, of what is finite; NaN where nothing is."""
    found = numbers(values)
    counts = np.isfinite(found).sum(-1)
    total = np.where(np.isfinite(found), found, 0).sum(-1)
    return np.where(counts > 0, total / np.maximum(counts, 1), np.nan)


def plot_diagnosis(diagnosis: Any, *, ax: Any = None, theme: Theme = LIGHT) -> Any:
    """The truncation curve of a diagnosis, with rings at its recommended windows.

    The curve is that of this batch; the windows keep their tolerance on others too, so that their
    rings lie below it. Those of blocks are at the error of blocks cut at multiples of the window,
    beside the curve's average over where the first cut falls. T, whose error is 0, has none.
    """
    ax = plot_truncation_curve(diagnosis.curve, ax=ax, theme=theme)
    errors = dict(
        zip(
            *map(np.asarray, (diagnosis.curve.windows, diagnosis.curve.relative_error)), strict=True
        )
    )
    rings = [(int(w), float(errors.get(w, 0))) for w in np.asarray(diagnosis.sliding_window)]
    blocks = zip(np.asarray(diagnosis.block_window), np.asarray(diagnosis.block_error), strict=True)
    rings += [(int(window), float(error)) for window, error in blocks]
    style = {
        "color": theme.lines[0],
        "markerfacecolor": "none",
        "markersize": 9,
        "markeredgewidth": 1.6,
    }
    for window, error in rings:
        if window > 0:
            ax.plot(window, positive([error]), "o", **style)
    ax.set_title(
        f"{verdict_words(diagnosis)} over {diagnosis.num_steps} steps; rings: recommended windows"
    )
    return ax


def _leaves(tree: Any, theme: Theme) -> list[tuple[Any, str, str]]:
    """Leaves, their names and a colour for each; one nameless leaf for an array."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    colours = [*theme.lines, theme.ink, theme.muted]
    return [
        (leaf, jax.tree_util.keystr(path), colours[i % len(colours)])
        for i, (path, leaf) in enumerate(found)
    ]


def _lines(ax: Any, xlabel: str, ylabel: str, *, log: bool = False, legend: bool = True) -> None:
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.grid(True)
    if log:
        log_scale(
            ax,
            "y",
            [value for line in ax.get_lines() for value in np.ravel(line.get_ydata())],
            (1,),
        )
    if legend:
        ax.legend(frameon=False, fontsize=9)
