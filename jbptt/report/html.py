"""One self-contained page: pictures, tables and sentences, with nothing to load."""

import base64
import re
from typing import Any, NamedTuple

from jbptt.report.plots import PICTURES
from jbptt.report.tables import Table, make_tables


class Section(NamedTuple):
    """One question of the page and its answer."""

    name: str
    question: str
    sentence: str
    light: str  # data URI of the picture on light paper
    dark: str
    width: int  # of the picture, in CSS pixels
    min_width: int  # under which its letters would be too small to read
    alt: str
    caption: str
    table: Table


QUESTIONS = {
    "coverage": "What does each strategy cover?",
    "reach": "How far back does the gradient reach?",
    "windows": "What does a window throw away, and what does it cost?",
    "learning": "Does it matter for learning?",
}
CAPTIONS = {
    "coverage": "Each row is a loss, each column an earlier or equal character whose part in that loss the gradient "
    "follows back. Full BPTT counts every pair once. Fixed truncation counts pairs within a block. Randomized "
    "truncation cuts at random and weights what is left, so that every pair counts once on average.",
    "reach": "How strongly a loss depends on the hidden state k steps earlier, averaged over held-out text. "
    "A straight line is exponential decay; the half-life is that of an exponential fitted to the lags before the "
    "norm falls to 1 % of that at lag 0. What lies a million million times below the largest norm is not shown.",
    "windows": "Error and cosine compare the truncated gradient with the exact one on held-out text. Sliding: every "
    "loss sees its own step and those before it, as many as the window has; blocks: cuts one window apart, averaged "
    "over where they fall, so that a loss sees about half a window. Rings: windows that keep 10 % and 1 %; for blocks "
    "checked on one alignment, which scatters around the average, so a ring may lie beyond the crossing. Below: "
    "the median time of one gradient, with half the interquartile range, and the temporary memory of the program.",
    "learning": "Perplexity on held-out text, the exponential of the mean loss per character: lower is better. "
    "Every strategy starts from the same parameters and reads the same characters. The untrained models may score "
    "above the top of the picture.",
}
_SMALLEST = {"coverage": 1.0, "reach": 0.8, "windows": 0.85, "learning": 0.8}


def render_page(data: dict[str, Any], light: dict[str, str], dark: dict[str, str]) -> str:
    """The page as HTML text.

    Args:
      data: the numbers of a study, with `sentences`, `created` and `command` (docs/report.md).
      light: SVG text of each picture on light paper, by name (`plots.draw_pictures`).
      dark: the same on dark paper.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jbptt", "report"),
        autoescape=True,  # the text studied, its name and its characters are shown, never run
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    tables, alts = make_tables(data), describe_pictures(data)
    sections = [
        Section(
            name,
            QUESTIONS[name],
            data["sentences"][name],
            _data_uri(light[name]),
            _data_uri(dark[name]),
            width := _css_width(light[name]),
            round(width * _SMALLEST[name]),
            f"{alts[name]} {data['sentences'][name]}",
            CAPTIONS[name],
            tables[name],
        )
        for name in PICTURES
    ]
    settings = {name: _show(value) for name, value in data["settings"].items()}
    return environment.get_template("template.html.jinja").render(data=data, sections=sections, settings=settings)


def describe_pictures(data: dict[str, Any]) -> dict[str, str]:
    """What stands in each picture, for those who do not see it."""
    cells = ", ".join(dict.fromkeys(curve["cell"] for curve in data["reach"]["curves"]))
    last, learning = data["reach"]["lags"][-1], data["learning"]
    names = ", ".join(strategy["name"] for strategy in learning["strategies"])
    models = data["windows"]["models"]
    largest = max((model["windows"][-1] for model in models), default=0)
    return {
        "coverage": f"Three lower-triangular matrices ({', '.join(data['coverage']['matrices'])}) of "
        f"{len(data['coverage']['characters'])} characters by themselves, coloured by weight.",
        "reach": f"Line plot of the gradient norm at lags 0 to {last} on a log scale for {cells}, "
        "before and after training.",
        "windows": f"Four stacked plots for each of {', '.join(model['cell'] for model in models)}, over windows of "
        f"1 to {largest} steps: relative error, cosine, time and memory of sliding windows and blocks.",
        "learning": f"Line plot of held-out perplexity against characters read, up to "
        f"{learning['characters_read'][-1]:,}, for {names}, with a band for the spread of the seeds.",
    }


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _css_width(svg: str) -> int:
    """The width of a picture in CSS pixels, of which 72 points make 96."""
    found = re.search(r'<svg[^>]*\bwidth="([\d.]+)pt"', svg)
    return round(float(found.group(1)) * 96 / 72) if found else 800


def _show(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value)
    if value is None:
        return "–"
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)
