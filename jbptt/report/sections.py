"""The sections of the page, one question each: how its picture, sentence and table are made from
the numbers.
"""

import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from jbptt.report import anatomy_pictures, anatomy_words, pictures, randomness, sentences, tables
from jbptt.report.tables import Table
from jbptt.report.themes import LIGHT, Theme, style, to_svg

MISSING_LETTER = "Glyph .* missing from"  # of Matplotlib, when it draws a box instead
Numbers = dict[str, Any]  # what a section is made from: the entry of its name in report.json


class Section(NamedTuple):
    """One question of the page.

    Attributes:
      question: its heading.
      caption: how to read the picture.
      smallest: how far the picture may shrink before its letters become too small to read.
      draw: `(numbers, theme=...) -> axes`.
      describe: the sentence, computed from the numbers.
      table: the table.
      alt: what stands in the picture, for those who do not see it.
      has_colour_map: whether the picture must be drawn again for dark paper, not only repainted.
    """

    question: str
    caption: str
    smallest: float
    draw: Callable[..., Any]
    describe: Callable[[Numbers], str]
    table: Callable[[Numbers], Table]
    alt: Callable[[Numbers], str]
    has_colour_map: bool = False


def _cells(models: Iterable[Numbers]) -> str:
    return ", ".join(dict.fromkeys(model["cell"] for model in models))


def _alt_coverage(coverage: Numbers) -> str:
    size = len(coverage["characters"])
    names = ", ".join(coverage["matrices"])
    return (
        f"Three lower-triangular matrices ({names}) of {size} characters by themselves, coloured "
        "by weight."
    )


def _alt_reach(reach: Numbers) -> str:
    return (
        f"Line plot of the gradient norm at lags 0 to {reach['lags'][-1]} on a log scale for "
        f"{_cells(reach['curves'])}, before and after training."
    )


def _alt_windows(windows: Numbers) -> str:
    largest = max((model["windows"][-1] for model in windows["models"]), default=0)
    return (
        f"Four stacked plots for each of {_cells(windows['models'])}, over windows of 1 to "
        f"{largest} steps: relative error, cosine, time and memory of sliding windows and blocks."
    )


def _alt_learning(learning: Numbers) -> str:
    names = ", ".join(strategy["name"] for strategy in learning["strategies"])
    return (
        "Line plot of held-out perplexity against characters read, up to "
        f"{learning['characters_read'][-1]:,}, for {names}, with a band for the spread of the "
        "seeds."
    )


def _alt_flow(flow: Numbers) -> str:
    size = len(flow["matrix"])
    return f"Heat map of {size} losses by {size} earlier steps on a log scale, lower-triangular."


def _alt_spectra(spectra: Numbers) -> str:
    return (
        f"For each of {_cells(spectra['models'])} two plots, before and after training: Lyapunov "
        "exponents in descending order, and singular values of products of Jacobians."
    )


def _alt_growth(growth: Numbers) -> str:
    radii = ", ".join(f"{radius:g}" for radius in growth["radii"])
    return (
        f"Two line plots on log scales for spectral radii {radii}: gradient norm by lag, and "
        "gradient norm by sequence length with and without clipping."
    )


def _alt_powers(exercises: Numbers) -> str:
    names = ", ".join(alignment["name"] for alignment in exercises["alignments"])
    return (
        "Left: eigenvalues in the complex plane. Right: the sine of an angle by power on a log "
        f"scale, for {names}."
    )


def _alt_remedies(remedies: Numbers) -> str:
    first, second = remedies["patients"]
    return (
        f"Four dot plots of {len(remedies['remedies'])} remedies for a network that is {first} and "
        f"one that is {second}: adjoint ratio, leading exponent, gradient error, loss."
    )


SECTIONS: dict[str, Section] = {
    "coverage": Section(
        "What does each strategy cover?",
        "Each row is a loss, each column an earlier or equal character whose part in that loss the "
        "gradient follows back. Full BPTT counts every pair once. Fixed truncation counts pairs "
        "within a block. Randomized truncation cuts at random and weights what is left, so that "
        "every pair counts once on average.",
        1.0,
        pictures.draw_coverage,
        sentences.describe_coverage,
        tables.coverage_table,
        _alt_coverage,
        has_colour_map=True,
    ),
    "reach": Section(
        "How far back does the gradient reach?",
        "How strongly a loss depends on the hidden state k steps earlier, averaged over held-out "
        "text. A straight line is exponential decay; the half-life is that of an exponential "
        "fitted to the lags before the norm falls to 1 % of that at lag 0. What lies a million "
        "million times below the largest norm is not shown.",
        0.8,
        pictures.draw_reach,
        sentences.describe_reach,
        tables.reach_table,
        _alt_reach,
    ),
    "windows": Section(
        "What does a window throw away, and what does it cost?",
        "Error and cosine compare the truncated gradient with the exact one on held-out text. "
        "Sliding: every loss sees its own step and those before it, as many as the window has; "
        "blocks: cuts one window apart, averaged over where they fall, so that a loss sees about "
        "half a window. Rings: windows that keep 10 % and 1 %; for blocks checked on one "
        "alignment, which scatters around the average, so a ring may lie beyond the crossing. "
        "Below: the median time of one gradient, with half the interquartile range, and the "
        "temporary memory of the program.",
        0.85,
        pictures.draw_windows,
        sentences.describe_windows,
        tables.windows_table,
        _alt_windows,
    ),
    "learning": Section(
        "Does it matter for learning?",
        "Perplexity on held-out text, the exponential of the mean loss per character: lower is "
        "better. Every strategy starts from the same parameters and reads the same characters. The "
        "untrained models may score above the top of the picture.",
        0.8,
        pictures.draw_learning,
        sentences.describe_learning,
        tables.learning_table,
        _alt_learning,
    ),
    "randomness": Section(
        "What is the price of randomness?",
        "Ways to cut the gradient of one held-out batch, windows of the same mean length. Filled: "
        "how far the mean over all draws is from the exact gradient, with two standard errors; "
        "without bias it is about one of them, never 0. Hollow: how far one draw scatters around "
        "that mean. Fitted lengths: windows of least predicted variance, given how this gradient "
        "falls with the lag.",
        0.8,
        randomness.draw_price,
        randomness.describe_price,
        randomness.price_table,
        randomness.alt_price,
    ),
    "flow": Section(
        "Which loss depends on which step?",
        "Row t, column s: how strongly the loss at step t depends on the carry that enters step s, "
        "root mean square over held-out examples. Bands parallel to the diagonal are plain decay; "
        "columns that stay strong are steps that many later losses depend on, rows that stay "
        "strong are losses that look far back. Grey: zero. Colours end at 10⁻⁸ of the largest.",
        0.8,
        anatomy_pictures.draw_flow,
        anatomy_words.describe_flow,
        anatomy_words.flow_table,
        _alt_flow,
        has_colour_map=True,
    ),
    "spectra": Section(
        "How do its Jacobians stretch and shrink?",
        "Above: Lyapunov exponents along held-out text, the mean growth rates of small changes of "
        "the carry in its independent directions, with two standard errors. Below: singular values "
        "of products of Jacobians over 1, 4 and 16 steps from the start of the text, natural "
        "logarithm. A line that falls away means that gradients survive in few directions.",
        0.85,
        anatomy_pictures.draw_spectra,
        anatomy_words.describe_spectra,
        anatomy_words.spectra_table,
        _alt_spectra,
    ),
    "growth": Section(
        "When do gradients vanish, when do they explode, and what does clipping change?",
        "The same random matrix scaled to different spectral radii, in tanh networks that read the "
        "text with small weights. Left: norm by lag, solid. Right: the norm of the gradient of one "
        "loss after so many steps (what its own step and the last before it contribute does not "
        "vanish); dotted, after clipping. Where activations saturate, the radius alone no longer "
        "decides.",
        0.85,
        anatomy_pictures.draw_growth,
        anatomy_words.describe_growth,
        anatomy_words.growth_table,
        _alt_growth,
        has_colour_map=True,
    ),
    "powers": Section(
        "What do powers of a matrix do?",
        "Two exercises of Dive into Deep Learning (section 9.7 of today's edition, 8.7 of the one "
        "before). Left: eigenvalues of a random matrix, their third powers, and the eigenvalues of "
        "the matrix's third power. Right: the angle between M^k x and the dominant eigenvector, "
        "which falls at the rate ln |λ₂/λ₁| unless the eigenvalues or the vector forbid it.",
        0.85,
        anatomy_pictures.draw_powers,
        anatomy_words.describe_powers,
        anatomy_words.powers_table,
        _alt_powers,
    ),
    "remedies": Section(
        "Which remedy helps?",
        "From a tanh network whose gradients vanish and one whose gradients explode, one remedy "
        "each, on the adding task: mean over the seeds that stayed finite; the table says how many "
        "did not. The first row is no remedy. An exponent near 0 keeps gradients; an error above 0 "
        "means that training uses another gradient than the exact one. A ratio that is missing or "
        "not finite: no gradient reaches the first step. Losses before training may lie beyond the "
        "edge.",
        0.9,
        anatomy_pictures.draw_remedies,
        anatomy_words.describe_remedies,
        anatomy_words.remedies_table,
        _alt_remedies,
    ),
}


def sections_of(data: dict[str, Any]) -> dict[str, Section]:
    """Those whose numbers were measured, in the order of the page."""
    return {name: section for name, section in SECTIONS.items() if name in data}


def write_sentences(data: dict[str, Any]) -> dict[str, str]:
    """The sentence of every section, by its name."""
    found = {name: section.describe(data[name]) for name, section in sections_of(data).items()}
    return {
        name: sentence.replace(" %", "\u00a0%") for name, sentence in found.items()
    }  # no line break before %


def make_tables(data: dict[str, Any]) -> dict[str, Table]:
    """The table of every section, by its name."""
    return {name: section.table(data[name]) for name, section in sections_of(data).items()}


def draw_pictures(
    data: dict[str, Any], theme: Theme = LIGHT, names: Iterable[str] | None = None
) -> dict[str, str]:
    """The pictures of a study, or those named, as SVG text by the section's name.

    The same data gives the same bytes: no date, fixed ids. Letters are drawn as paths. Where
    Matplotlib's own font lacks one (Chinese, say), the letters of that picture stay text, which is
    shown in the fonts of whoever looks at it.
    """
    import matplotlib

    def draw(name: str) -> str:
        axes = SECTIONS[name].draw(data[name], theme=theme)
        return to_svg(np.ravel(axes)[0].figure)

    drawn = {}
    for name in sections_of(data) if names is None else names:
        with matplotlib.rc_context(style(theme)), warnings.catch_warnings():
            warnings.filterwarnings("error", MISSING_LETTER)
            try:
                drawn[name] = draw(name)
            except UserWarning as warning:
                if not re.match(MISSING_LETTER, str(warning)):
                    raise
                warnings.filterwarnings("ignore", MISSING_LETTER)
                matplotlib.rcParams["svg.fonttype"] = "none"
                drawn[name] = draw(name)
    return drawn
