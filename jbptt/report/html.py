"""One self-contained page: pictures, tables and sentences, with nothing to load."""

import base64
import re
from typing import Any, NamedTuple

from jbptt.report.contents import asked
from jbptt.report.front import conclusions, introduction, title_of
from jbptt.report.tables import Table


class Answer(NamedTuple):
    """One question of the page and its answer, as the template reads it."""

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


def render_page(data: dict[str, Any], light: dict[str, str], dark: dict[str, str]) -> str:
    """The page as HTML text.

    Args:
      data: the numbers of a study, with `sentences`, `created` and `command` (docs/report.md).
      light: SVG text of each picture on light paper, by name (`contents.draw_pictures`).
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
    answers = [
        Answer(
            name,
            section.heading,
            data["sentences"][name],
            _data_uri(light[name]),
            _data_uri(dark[name]),
            width := _css_width(light[name]),
            round(width * section.smallest),
            f"{section.alt(data[name])} {data['sentences'][name]}",
            section.caption.replace(" %", "\u00a0%"),
            section.table(data[name]),
        )
        for name, section in asked(data).items()
    ]
    settings = {name: _show(value) for name, value in data["settings"].items()}
    return environment.get_template("template.html.jinja").render(
        data=data,
        sections=answers,
        settings=settings,
        title=title_of(data),
        introduction=introduction(data),
        conclusions=conclusions(data),
    )


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
