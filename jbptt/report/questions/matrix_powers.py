"""What powers of a matrix do: two exercises of Dive into Deep Learning."""

import math
from typing import Any

import jax
import numpy as np

from jbptt.analysis.linalg import powers
from jbptt.report.axes import (
    draw_unit_circle,
    legend_below,
    log_scale,
    new_axes,
    numbers,
    positive,
    significant,
)
from jbptt.report.one_question import Numbers, Question
from jbptt.report.tables import (
    Table,
    shown,
)
from jbptt.report.themes import LIGHT, Theme
from jbptt.report.words import join_words
from jbptt.report.work import Progress


def measure(seed: int, progress: Progress) -> dict[str, Any]:
    """The two exercises: eigenvalues of a power, and vectors that turn to one direction, or do
    not.
    """
    progress("powers of a matrix")
    rng = np.random.default_rng(seed)
    size, power, num_steps = 8, 3, 40
    general = rng.normal(size=(size, size)) / np.sqrt(size)
    symmetric = (general + general.T) / 2
    x = rng.normal(size=size)
    # The same vectors with eigenvalues that the exercise needs not to tie: real, of different
    # sizes.
    basis = rng.normal(size=(size, size))
    spread = (
        basis @ np.diag(0.95 ** np.arange(size) * (-1.0) ** np.arange(size)) @ np.linalg.inv(basis)
    )
    angle = np.array([[0.6, -0.8], [0.8, 0.6]])
    examples = {
        "symmetric": (symmetric, x),
        "general": (spread, x),
        "equal sizes, λ₁ = −λ₂": (np.diag([1.0, -1.0, 0.5]), x[:3]),
        "a complex pair": (0.98 * angle, x[:2]),
        "x ⊥ v₁": (np.diag([1.0, 0.8, 0.5]), np.array([0.0, 1.0, 1.0])),
        "defective": (np.array([[0.9, 1.0], [0.0, 0.9]]), np.array([0.3, 1.0])),
    }
    alignments = []
    for name, (matrix, start) in examples.items():
        with jax.enable_x64(True):
            found = jax.device_get(powers.alignment(matrix, start, num_steps))
        alignments.append(
            {
                "name": name,
                "case": found.case,
                "misalignment": significant(found.misalignment),
                "rate": float(found.rate),
                "predicted_rate": float(found.predicted_rate),
                "sentence": str(found),
            }
        )
    progress("powers taken", 1)
    with jax.enable_x64(True):
        values, raised = (np.asarray(powers.eigenvalues(general, k)) for k in (1, power))
    of_power = np.linalg.eigvals(np.linalg.matrix_power(general, power))
    difference = max(np.min(np.abs(of_power - value)) for value in raised) / np.max(np.abs(raised))
    return {
        "size": size,
        "power": power,
        "eigenvalues": _complex(values),
        "eigenvalues_of_power": _complex(of_power),
        "largest_difference": float(difference),
        "alignments": alignments,
    }


def _complex(values: np.ndarray) -> list[list[float]]:
    """Pairs of real and imaginary part."""
    return [[float(value.real), float(value.imag)] for value in np.asarray(values, complex)]


MARKERS = ("o", "s", "^", "D", "v", "P")


def draw(exercises: dict[str, Any], *, axes: Any = None, theme: Theme = LIGHT) -> Any:
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


def say(exercises: dict[str, Any]) -> str:
    """Whether the eigenvalues are powers, and which of the examples turned to one direction at
    which rate.
    """
    aligned = [a for a in exercises["alignments"] if a["case"] == "aligns"]
    others = [a for a in exercises["alignments"] if a["case"] != "aligns"]
    rates = [
        f"{shown(math.nan if a['rate'] is None else a['rate'])} nats per step in the {a['name']} "
        "example (ln |λ₂/λ₁| = "
        f"{shown(math.nan if a['predicted_rate'] is None else a['predicted_rate'])})"
        for a in aligned
    ]
    sentence = (
        f"The eigenvalues of M^{exercises['power']} are those of M to the power of "
        f"{exercises['power']}, to {exercises['largest_difference']:.1g} of the largest."
    )
    if rates:
        sentence += f" The angle between M^k x and v₁ changes by {join_words(rates)}."
    if others:
        sentence += (
            f" No alignment at such a rate is to be expected in {len(others)} of the examples: "
            + join_words(
                [
                    f"{a['name']} ({a['case']})" if a["case"] not in a["name"] else a["name"]
                    for a in others
                ]
            )
        )
        sentence += "."
    return sentence


def table(exercises: dict[str, Any]) -> Table:
    """Each example, what was measured, and what it means."""
    rows = []
    for a in exercises["alignments"]:
        rate, predicted = (
            math.nan if a[field] is None else a[field] for field in ("rate", "predicted_rate")
        )
        last = numbers(a["misalignment"])[-1]
        rows.append((a["name"], a["case"], shown(rate), shown(predicted), shown(float(last))))
    columns = ("example", "case", "measured rate", "ln |λ₂/λ₁|", "sine after the last step")
    return Table("M^k x against the dominant eigenvector (nats per step)", columns, rows)


def alt(exercises: Numbers) -> str:
    """What stands in the picture."""
    names = ", ".join(alignment["name"] for alignment in exercises["alignments"])
    return (
        "Left: eigenvalues in the complex plane. Right: the sine of an angle by power on a log "
        f"scale, for {names}."
    )


QUESTION = Question(
    "powers",
    "What do powers of a matrix do?",
    "Two exercises of Dive into Deep Learning (section 9.7 of today's edition, 8.7 of the one "
    "before). Left: eigenvalues of a random matrix, their third powers, and the eigenvalues of "
    "the matrix's third power. Right: the angle between M^k x and the dominant eigenvector, "
    "which falls at the rate ln |λ₂/λ₁| unless the eigenvalues or the vector forbid it.",
    0.85,
    draw,
    say,
    table,
    alt,
)
