"""What each strategy covers: three matrices of weights."""

from typing import Any

import jax
import numpy as np

from jbptt.estimators import full_bptt, randomized_bptt, truncated_bptt
from jbptt.experiments import tasks
from jbptt.probes import declared_coverage
from jbptt.report.axes import (
    draw_matrix,
    label_characters,
    new_axes,
    round_ticks,
    visible,
)
from jbptt.report.one_question import Numbers, Question
from jbptt.report.tables import (
    Table,
    format_number,
)
from jbptt.report.themes import LIGHT, Theme
from jbptt.types import Step


def measure(text: str, step: Step, settings: Any) -> dict[str, Any]:
    """The first characters, cut into blocks of six, and as often on average at random."""
    characters, window = text[:24], 6
    keep_prob = 1 - 1 / window
    model = step, tasks.cross_entropy
    estimators = {
        "full": full_bptt(*model),
        "fixed": truncated_bptt(*model, window=window),
        "randomized": randomized_bptt(*model, keep_prob=keep_prob),
    }
    key = jax.random.key(settings.seed)
    matrices = {
        name: np.asarray(declared_coverage(e, len(characters), key))
        for name, e in estimators.items()
    }
    return {
        "characters": characters,
        "window": window,
        "keep_prob": keep_prob,
        "matrices": matrices,
        "pairs": {name: int(np.count_nonzero(matrix)) for name, matrix in matrices.items()},
    }


def draw(coverage: dict[str, Any], *, axes: Any = None, theme: Theme = LIGHT) -> Any:
    """Three matrices C[t, i]: how much of the loss at character t each strategy sends back to
    character i.

    Returns: the three axes (full, fixed, randomized). Grey pairs are cut; a weight above 1 makes up
    for the pairs that the same draw cuts elsewhere.
    """
    from matplotlib.colors import LogNorm

    axes = new_axes((10.8, 5.0), 1, 3, axes)
    labels = [visible(character) for character in coverage["characters"]]
    matrices = {name: np.asarray(matrix, float) for name, matrix in coverage["matrices"].items()}
    largest = max([2.0, *(float(matrix.max()) for matrix in matrices.values())])
    smallest = min(
        [
            1.0,
            *(
                float(matrix[matrix > 0].min())
                for matrix in matrices.values()
                if (matrix > 0).any()
            ),
        ]
    )
    norm = LogNorm(smallest, largest)
    titles = {
        "full": "full",
        "fixed": f"fixed, window {coverage['window']}",
        "randomized": f"randomized, keep_prob {coverage['keep_prob']:.3g}",
    }
    mesh = None
    for ax, (name, matrix) in zip(axes, matrices.items(), strict=True):
        mesh = draw_matrix(ax, matrix, norm, theme)
        ax.set_title(
            f"{titles[name]}\n{coverage['pairs'][name]} of {coverage['pairs']['full']} pairs"
        )
        label_characters(ax, labels)
        ax.set_xlabel("source: character i")
    axes[0].set_ylabel("loss: character t")
    bar = axes[0].figure.colorbar(
        mesh, ax=list(axes), orientation="horizontal", shrink=0.5, aspect=45, pad=0.02
    )
    bar.set_ticks(
        round_ticks(smallest, largest), labels=[f"{t:g}" for t in round_ticks(smallest, largest)]
    )
    bar.minorticks_off()
    bar.set_label("weight C[t, i] of a pair (grey: cut, weight 0; blank: the future)")
    bar.outline.set_visible(False)
    return axes


def say(coverage: dict[str, Any]) -> str:
    """How many pairs each strategy covers, and how much weight the random one puts on those it
    keeps.
    """
    pairs, total = coverage["pairs"], coverage["pairs"]["full"]
    largest = max(
        (weight for row in coverage["matrices"]["randomized"] for weight in row), default=0.0
    )
    if largest > 1.0005:
        weighting = (
            f" with weights of up to {format_number(largest)}, so that the mean over many draws is "
            "full coverage"
        )
    else:
        weighting = " with no weight above 1"
    return (
        f"Of the {total:,} pairs of a loss and an earlier or equal source among the first "
        f"{len(coverage['characters'])} characters, fixed truncation with a window of "
        f"{coverage['window']} covers {_part(pairs['fixed'], total)}, the same ones every time; "
        "this draw of randomized truncation covers "
        f"{_part(pairs['randomized'], total)},{weighting}."
    )


def _part(count: int, total: int) -> str:
    return f"all {total:,}" if count == total else f"{count:,} ({100 * count / total:.0f} %)"


def table(coverage: dict[str, Any]) -> Table:
    """Pairs and weights of each strategy."""
    rows = []
    for name, matrix in coverage["matrices"].items():
        weights = [weight for row in matrix for weight in row if weight]
        share = coverage["pairs"][name] / max(1, coverage["pairs"]["full"])
        cells = (
            f"{coverage['pairs'][name]:,}",
            f"{100 * share:.0f} %",
            f"{max(weights, default=0):.3g}",
            f"{sum(weights):.4g}",
        )
        rows.append((name, *cells))
    return Table(
        "Pairs covered", ("strategy", "pairs", "share", "largest weight", "sum of weights"), rows
    )


def alt(coverage: Numbers) -> str:
    """What stands in the picture."""
    size = len(coverage["characters"])
    names = ", ".join(coverage["matrices"])
    return (
        f"Three lower-triangular matrices ({names}) of {size} characters by themselves, coloured "
        "by weight."
    )


QUESTION = Question(
    "coverage",
    "What does each strategy cover?",
    "Each row is a loss, each column an earlier or equal character whose part in that loss the "
    "gradient follows back. Full BPTT counts every pair once. Fixed truncation counts pairs "
    "within a block. Randomized truncation cuts at random and weights what is left, so that "
    "every pair counts once on average.",
    1.0,
    draw,
    say,
    table,
    alt,
    has_colour_map=True,
)
