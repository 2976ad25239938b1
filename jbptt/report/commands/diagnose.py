"""`jbptt diagnose`: the diagnosis of a user's own model."""

from pathlib import Path
from typing import Any

from jbptt.analysis.plan_search import choose_plan
from jbptt.diagnosis.as_dataset import named_numbers
from jbptt.diagnosis.question import diagnose
from jbptt.diagnosis.result import Diagnosis
from jbptt.report import interruption, output, plots
from jbptt.report.commands.errors import UsageError, device_errors, device_gave_up
from jbptt.report.themes import to_svg
from jbptt.report.user_models import describe, is_own, load_problem

FILES = ("diagnosis.txt", "diagnosis.json", "diagnosis.svg")


def texts_of(found: Diagnosis, page: str) -> dict[str, str]:
    """Page, numbers and picture, by the names of their files; what is not finite becomes null."""
    variables, coords, attrs = named_numbers(found)
    numbers = attrs | coords | {name: array for name, (_, array) in variables.items()}
    data = output.json_text(numbers)
    picture = to_svg(plots.plot_diagnosis(found).figure)
    return dict(zip(FILES, (page + "\n", data, picture), strict=True))


def run_diagnosis(
    model: str,
    *,
    plans: bool = False,
    explain: bool = False,
    out: Path | None = None,
    **options: Any,
) -> int:
    """Diagnoses the model that a user's function returns and prints the page, and the plans if they
    are asked for; writes what was asked for.

    Raises: UsageError, for whatever the user can put right.
    """

    stopped = f"the diagnosis of {model} was stopped before it was finished"
    try:
        if out is not None:
            output.check_target(Path(out), FILES)
    except ValueError as error:
        raise UsageError(str(error)) from error
    try:
        with interruption.unfinished(stopped):
            problem = load_problem(model)
            found = diagnose(*problem, **options)
            fastest, cost = choose_plan(*problem) if plans else (None, None)
    except device_errors() as error:
        raise device_gave_up(error, "a smaller batch") from error
    except (Exception, SystemExit) as error:
        said = isinstance(error, ValueError) and is_own(error)
        raise UsageError(str(error) if said else f"{model} failed: {describe(error)}") from error
    page = found.explain() if explain else str(found)
    if fastest is not None:
        page += f"\n\nFastest full gradient here: {fastest}.\n{cost}"
    if out is not None:
        try:
            output.write_files(texts_of(found, page), Path(out))
        except OSError as error:
            raise UsageError(str(error)) from error
    print(page)
    return 0
