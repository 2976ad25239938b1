"""The files that `jbptt diagnose --out` writes."""

import json

from jbptt.diagnosis.as_dataset import named_numbers
from jbptt.diagnosis.result import Diagnosis
from jbptt.report import plots
from jbptt.report.study import plain_numbers
from jbptt.report.themes import to_svg

FILES = ("diagnosis.txt", "diagnosis.json", "diagnosis.svg")


def texts_of(found: Diagnosis, page: str) -> dict[str, str]:
    """Page, numbers and picture, by the names of their files; what is not finite becomes null."""
    variables, coords, attrs = named_numbers(found)
    numbers = attrs | coords | {name: array for name, (_, array) in variables.items()}
    data = json.dumps(plain_numbers(numbers), indent=1, ensure_ascii=False, allow_nan=False)
    picture = to_svg(plots.plot_diagnosis(found).figure)
    return dict(zip(FILES, (page + "\n", data + "\n", picture), strict=True))
