"""With which window to train: a learning study, drawn and told."""

from dataclasses import fields
from typing import Any

import jax
import numpy as np

from jbptt import cells
from jbptt.experiments import tasks
from jbptt.learning.judging import Curves
from jbptt.learning.studies import learning_study
from jbptt.learning.study_page import (
    after_equal_time,
    beside_full,
    budget,
    decision,
    foretold,
    share_words,
)
from jbptt.learning.study_result import LearningStudy
from jbptt.report.axes import new_axes, numbers
from jbptt.report.learning_plots import plot_learning_curves, plot_learning_study
from jbptt.report.one_question import Numbers, Question
from jbptt.report.tables import Table, format_bytes, format_number, format_seconds
from jbptt.report.themes import LIGHT, Theme
from jbptt.report.words import capital
from jbptt.report.work import STUDY_WORK, Effort, Progress

NUM_STEPS, NUM_UNITS, NUM_ROWS, NUM_HELDOUT = 64, 32, 8, 8
"""A small model of its own: what decides is many trainings, not large ones."""
KEEP_PROB = 0.9375
WIDTH = 5
"""Trainings side by side: given, since times decide nothing that the same seed must repeat."""


def measure(settings: Any, text: str, effort: Effort, progress: Progress) -> Numbers:
    """The study of the last cell, small, on the text as a stream."""
    name = settings.cell[-1]
    num_seeds = settings.num_seeds or effort.num_seeds
    progress(f"{name}: learn in different ways, {num_seeds} seeds each")
    num_steps, keep_prob = steps_of(settings), keep_prob_of(settings)
    task = tasks.text(text, num_steps=num_steps, batch_size=min(NUM_ROWS, settings.batch_size))
    size = len(task.vocabulary)
    core = getattr(cells, name)(size, min(NUM_UNITS, settings.hidden_size))
    cell = tasks.on_tokens(cells.with_linear_readout(core, size), size)
    heldout = jax.tree.map(lambda a: a[:NUM_HELDOUT], task.heldout)
    windows = settings.windows or tuple(w for w in effort.blocks if w < num_steps)
    study = learning_study(
        cell.step,
        tasks.cross_entropy,
        cell.init,
        cell.initial_carry((min(NUM_ROWS, settings.batch_size),)),
        task.train,
        heldout,
        stream=True,
        windows=windows,
        sliding=(),
        keep_probs=(keep_prob,) if keep_prob < 1 else (),
        learning_rates=settings.learning_rates or effort.rates,
        seeds=num_seeds,
        num_updates=settings.num_updates or effort.study_updates,
        num_evals=effort.study_evals,
        key=jax.random.key(settings.seed),
        progress=False,
        width=WIDTH,
    )
    progress(f"{name}: learned", STUDY_WORK * len(effort.rates) * effort.num_seeds)
    return numbers_of(study) | {"model": f"{name}, {core_units(cell)} units", "unit": "nats"}


def steps_of(settings: Any) -> int:
    """T of what learns."""
    return min(NUM_STEPS, settings.num_steps)


def keep_prob_of(settings: Any) -> float:
    """Of the random cuts of the built-in models."""
    return KEEP_PROB if settings.keep_prob is None else settings.keep_prob


def core_units(cell: cells.Cell) -> int:
    """H of a cell."""
    return jax.tree.leaves(cell.initial_carry())[0].shape[-1]


def numbers_of(study: LearningStudy) -> Numbers:
    """All of a study, for report.json."""
    found = {field.name: getattr(study, field.name) for field in fields(study)}
    return found | {"curves": study.curves._asdict(), "choice": study.choice}


def study_of(learning: Numbers) -> LearningStudy:
    """The study that these numbers are of."""
    curves = Curves(*([numbers(of) for of in learning["curves"][name]] for name in Curves._fields))
    start, end = (
        [numbers(of) for of in learning[name]] for name in ("errors_at_start", "errors_at_end")
    )
    return LearningStudy(
        ways=tuple(learning["ways"]),
        curves=curves,
        updates=np.array(learning["updates"]),
        seconds=numbers(learning["seconds"]),
        temporary_bytes=numbers(learning["temporary_bytes"]),
        errors_at_start=start,
        errors_at_end=end,
        constant_loss=float(numbers(learning["constant_loss"])),
        margin=float(numbers(learning["margin"])),
        unbracketed=tuple(learning["unbracketed"]),
        data=learning["data"],
        seeds_differ_in=learning["seeds_differ_in"],
    )


def draw(learning: Numbers, *, axes: Any = None, theme: Theme = LIGHT) -> Any:
    """How each way learns, and what it ends at."""
    study = study_of(learning)
    shape = {"height_ratios": (1.2, 1)}
    size = (8.6, 5.2 + 0.4 * len(study.ways))
    axes = np.ravel(new_axes(size, 2, 1, axes, **shape))
    plot_learning_curves(study, ax=axes[0], theme=theme)
    plot_learning_study(study, ax=axes[1], theme=theme)
    for ax in axes:
        along = ax.set_ylabel if ax is axes[0] else ax.set_xlabel
        along(f"test loss ({learning['unit']})" if learning["unit"] else "test loss")
    return axes


def say(learning: Numbers) -> str:
    """The decision, whether it holds for longer training, and what gradient errors foretold."""
    study = study_of(learning)
    notes = [budget(study), after_equal_time(study), foretold(study)]
    return " ".join([decision(study), *(f"{capital(words)}." for words in notes if words)])


def table(learning: Numbers) -> Table:
    """Every way at its own learning rate."""
    study = study_of(learning)
    _, judged, verdicts = study.at_equal_data
    places, in_time, _ = study.at_equal_time
    before, after = (
        study.at_own_rate(errors) for errors in (study.errors_at_start, study.errors_at_end)
    )
    rows = []
    for i, way in enumerate(study.ways):
        full = i == 0
        rows.append(
            (
                way,
                f"{study.curves.rates[i][judged.rate[i]]:.3g}",
                f"{judged.losses[i].mean():.4g}",
                "–" if full else beside_full(study, i, ": "),
                verdicts.words[i],
                "0" if full else share_words(float(before[i])),
                "0" if full else share_words(float(after[i])),
                format_seconds(float(study.seconds[i])),
                format_bytes(_known(study.temporary_bytes[i])),
                f"{in_time.losses[i].mean():.4g} ({format_number(int(study.updates[places[i]]))})",
            )
        )
    columns = (
        "way",
        "learning rate",
        "test loss",
        "beside full BPTT (95 % interval)",
        "verdict",
        "gradient error before",
        "after training",
        "time of an update",
        "memory",
        "test loss in equal time (updates)",
    )
    title = f"{study.num_updates:,} updates, {study.num_seeds} seeds, {learning['model']}"
    return Table(title, columns, rows)


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def alt(learning: Numbers) -> str:
    """What stands in the picture."""
    ways = ", ".join(learning["ways"])
    return (
        f"Above, a line plot of test loss against updates for {ways}; below, a dot plot of the "
        "test loss at the end, with every seed and an interval."
    )


QUESTION = Question(
    "learning",
    "With which window should it train?",
    "Every way to train has its own learning rate, the one with the lowest validation loss of "
    "those tried, and starts from the same parameters and reads the same data for each seed. Each "
    "way makes one update for each batch, so that only the gradient differs. A training counts by "
    "the checkpoint with the lowest validation loss so far. Bars: the interval of the difference "
    "to full BPTT, paired over seeds; intervals hold for all pairs of ways at once. Grey band: "
    "differences that do not matter (2 % of what training gains). A constant prediction is the "
    "best one that ignores the inputs.",
    0.8,
    draw,
    say,
    table,
    alt,
    has_colour_map=True,
)
