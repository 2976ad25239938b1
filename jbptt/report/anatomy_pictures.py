"""The pictures of the report's second half: the backward pass inside. Drawn from its JSON, as in
`pictures`.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np

from jbptt.report.axes import draw_unit_circle, legend_below, log_scale, new_axes, numbers, positive
from jbptt.report.plots import REMEDY_MEASURES, plot_gradient_flow, plot_remedies
from jbptt.report.themes import LIGHT, Theme

MARKERS = ("o", "s", "^", "D", "v", "P")


def draw_flow(flow: dict[str, Any], *, ax: Any = None, theme: Theme = LIGHT) -> Any:
    """The heat map of one model: a row for each loss, a column for each earlier step."""
    ax = new_axes((6.6, 5.4), 1, 1, ax)
    plot_gradient_flow(numbers(flow["matrix"]), ax=ax, theme=theme)
    ax.set_title(f"{flow['cell']}, after training")
    return ax


def draw_spectra(spectra: dict[str, Any], *, axes: Any = None, theme: Theme = LIGHT) -> Any:
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


def draw_growth(growth: dict[str, Any], *, axes: Any = None, theme: Theme = LIGHT) -> Any:
    """Tanh networks by spectral radius: norms by lag, and gradient norms by length, raw and
    clipped.
    """
    axes = np.ravel(new_axes((10.4, 4.8), 1, 2, axes))
    colours = _shades(len(growth["radii"]), theme)
    for radius, norms, raw, clipped, colour, marker in zip(
        growth["radii"],
        growth["norms"],
        growth["gradient_norms"],
        growth["clipped_norms"],
        colours,
        MARKERS,
        strict=False,
    ):
        every = max(1, len(growth["lags"]) // 8)
        style = {
            "color": colour,
            "marker": marker,
            "markersize": 4.5,
            "label": f"spectral radius {radius:g}",
        }
        axes[0].plot(growth["lags"], positive(norms), markevery=every, **style)
        axes[1].plot(growth["lengths"], positive(raw), **style)
        place = {"color": colour, "linestyle": (0, (1, 1.5)), "linewidth": 2.4}
        axes[1].plot(growth["lengths"], positive(clipped), **place)
    axes[1].axhline(growth["max_norm"], color=theme.muted, linewidth=0.9, linestyle=":")
    axes[0].set_xlabel("lag k (steps)")
    axes[0].set_ylabel("mean norm of the gradient at lag k")
    axes[1].set_xlabel("steps before the loss")
    axes[1].set_ylabel(f"gradient norm; dotted: clipped at {growth['max_norm']:g}")
    largest = 0.0
    for ax, values in zip(axes, (growth["norms"], growth["gradient_norms"]), strict=True):
        flat = positive(np.ravel(numbers(values)))
        log_scale(ax, "y", flat, (1,))
        largest = np.nanmax(flat) if np.isfinite(flat).any() else 1.0
        ax.set_ylim(bottom=max(ax.get_ylim()[0], 1e-14 * largest))
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].figure.legend(
        handles, labels, loc="outside lower left", ncols=5, frameon=False, fontsize=9
    )
    return axes


def _shades(count: int, theme: Theme) -> list[Any]:
    import matplotlib

    name, low, high = theme.shades
    return list(matplotlib.colormaps[name](np.linspace(low + 0.15, high, count)))


def draw_powers(exercises: dict[str, Any], *, axes: Any = None, theme: Theme = LIGHT) -> Any:
    """Eigenvalues of a matrix and of its power in the plane; how fast M^k x turns to one direction,
    or does not.
    """
    axes = np.ravel(new_axes((10.4, 4.8), 1, 2, axes))
    draw_unit_circle(axes[0], theme)
    values = np.array(exercises["eigenvalues"]) @ [1, 1j]
    power, of_power = exercises["power"], np.array(exercises["eigenvalues_of_power"]) @ [1, 1j]
    for points, marker, colour, size, label in (
        (values, "o", theme.lines[0], 6, "λ of M"),
        (values**power, "s", theme.lines[1], 9, f"λ^{power}"),
        (of_power, "x", theme.ink, 6, f"eigenvalues of M^{power}"),
    ):
        place = {
            "color": colour,
            "linestyle": "none",
            "markersize": size,
            "markerfacecolor": "none",
        }
        axes[0].plot(np.real(points), np.imag(points), marker, label=label, **place)
    axes[0].set_aspect("equal", "datalim")
    axes[0].set_xlabel("real part; dotted: the unit circle")
    axes[0].set_ylabel("imaginary part")
    axes[0].grid(True)
    axes[0].legend(frameon=False, fontsize=9)
    colours = [*theme.lines, theme.ink, theme.muted, theme.lines[1]]
    for i, (alignment, colour) in enumerate(zip(exercises["alignments"], colours, strict=False)):
        fails = alignment["case"] != "aligns"
        style = {
            "linestyle": (0, (3, 2)) if fails else "-",
            "marker": MARKERS[i],
            "markersize": 4,
            "markevery": 5,
        }
        axes[1].plot(
            positive(alignment["misalignment"]), color=colour, label=alignment["name"], **style
        )
    log_scale(axes[1], "y", [1.0], (1,))
    shown = [positive(alignment["misalignment"]) for alignment in exercises["alignments"]]
    smallest = min(
        (float(np.nanmin(sines)) for sines in shown if np.isfinite(sines).any()), default=1e-16
    )
    axes[1].set_ylim(max(1e-17, 0.3 * smallest), 3)
    axes[1].set_xlabel("k, applications of the matrix; dashed: no such rate")
    axes[1].set_ylabel("sine of the angle between M^k x and v₁")
    legend_below(axes[1], 3, "")
    return axes


def draw_remedies(remedies: dict[str, Any], *, axes: Any = None, theme: Theme = LIGHT) -> Any:
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
