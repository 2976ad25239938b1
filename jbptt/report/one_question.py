"""One question of a report: how its picture, sentence and table are made from its numbers."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jbptt.report.tables import Table

Numbers = dict[str, Any]  # what was measured: the entry of the question's name in report.json


class Question(NamedTuple):
    """One question of the page.

    Attributes:
      name: of its entry in report.json and of its picture.
      heading: the question.
      caption: how to read the picture.
      smallest: how far the picture may shrink before its letters become too small to read.
      draw: `(numbers, theme=...) -> axes`.
      say: the sentence, computed from the numbers.
      table: the table.
      alt: what stands in the picture, for those who do not see it.
      has_colour_map: whether the picture must be drawn again for dark paper, not only repainted.
    """

    name: str
    heading: str
    caption: str
    smallest: float
    draw: Callable[..., Any]
    say: Callable[[Numbers], str]
    table: Callable[[Numbers], Table]
    alt: Callable[[Numbers], str]
    has_colour_map: bool = False
