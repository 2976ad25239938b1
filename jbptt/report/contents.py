"""The questions of a report, in the order of the page."""

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np

from jbptt.report.one_question import Question
from jbptt.report.questions import (
    coverage,
    diagnosis,
    flow,
    gradients,
    growth,
    learning,
    matrix_powers,
    randomness,
    reach,
    spectra,
    treating,
    window_costs,
)
from jbptt.report.tables import Table
from jbptt.report.themes import LIGHT, Theme, style, to_svg

ROOMS = (
    learning,
    diagnosis,
    gradients,
    window_costs,
    reach,
    coverage,
    randomness,
    flow,
    spectra,
    growth,
    treating,
    matrix_powers,
)
QUESTIONS: dict[str, Question] = {room.QUESTION.name: room.QUESTION for room in ROOMS}


def asked(data: dict[str, Any]) -> dict[str, Question]:
    """Those whose numbers were measured, in the order of the page."""
    return {name: question for name, question in QUESTIONS.items() if name in data}


def write_sentences(data: dict[str, Any]) -> dict[str, str]:
    """The sentence of every question, by its name."""
    found = {name: question.say(data[name]) for name, question in asked(data).items()}
    return {
        name: sentence.replace(" %", "\u00a0%") for name, sentence in found.items()
    }  # no line break before %


def make_tables(data: dict[str, Any]) -> dict[str, Table]:
    """The table of every question, by its name."""
    return {name: question.table(data[name]) for name, question in asked(data).items()}


def draw_pictures(
    data: dict[str, Any], theme: Theme = LIGHT, names: Iterable[str] | None = None
) -> dict[str, str]:
    """The pictures of a study, or those named, as SVG text by the question's name.

    The same data gives the same bytes: no date, fixed ids. Letters are text, in any script, shown
    in the fonts of whoever looks at them.
    """
    import matplotlib

    drawn = {}
    for name in asked(data) if names is None else names:
        with matplotlib.rc_context(style(theme)), warnings.catch_warnings():
            # The widths of such letters are guessed; they are not drawn here.
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            axes = QUESTIONS[name].draw(data[name], theme=theme)
            drawn[name] = to_svg(np.ravel(axes)[0].figure)
    return drawn
