"""What `jbptt report` and `jbptt compare` do with a model of one's own."""

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jbptt.analysis.comparison import Comparison
from jbptt.learning.studies import learning_study
from jbptt.learning.study_result import LearningStudy
from jbptt.learning.ways import ways_of
from jbptt.online.names import online_estimators
from jbptt.problem import check_problem
from jbptt.report import interruption
from jbptt.report.commands.errors import UsageError, device_errors, device_gave_up
from jbptt.report.questions import gradients
from jbptt.report.user_models import UserModel, describe, is_own, load_model, source_of
from jbptt.types import Estimator

KEPT = "trainings"
"""The folder, in the one that is written, where every finished training is kept."""
OPTIONS = ("windows", "keep_probs", "learning_rates", "seeds", "num_updates")


@contextmanager
def asking(target: str, out: Path | None) -> Iterator[None]:
    """What goes wrong with a user's model is one line; Ctrl-C says where the trainings are."""
    kept = "nothing was written" if out is None else f"finished trainings are in {out / KEPT}"
    again = "" if out is None else ", and the same command goes on from there"
    try:
        with interruption.unfinished(f"{target} was stopped before it was finished; {kept}{again}"):
            yield
    except UsageError:
        raise
    except device_errors() as error:
        raise device_gave_up(error, "a smaller batch") from error
    except (Exception, SystemExit) as error:
        said = isinstance(error, ValueError) and is_own(error)
        raise UsageError(str(error) if said else f"{target} failed: {describe(error)}") from error


def arguments_of(model: UserModel, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `learning_study`: the function's, under those of the command line.

    Of these `online` names estimators, which join those that the function gives.
    """
    step, loss, *_ = model.problem
    given = {name: value for name, value in given.items() if value is not None}
    arguments = model.study | given
    if online := online_estimators(arguments.pop("online", ()), step, loss):
        arguments["estimators"] = {**(arguments.get("estimators") or {}), **online}
    return arguments


def estimators_of(arguments: dict[str, Any], problem: tuple) -> dict[str, Estimator]:
    """What is compared, by name; full BPTT first."""
    step, loss, params, carry, batch = problem
    num_steps, *_ = check_problem(step, loss, params, carry, batch)
    names = ("windows", "sliding", "keep_probs", "estimators")
    ways = ways_of(step, loss, num_steps, **{n: arguments.get(n) for n in names})
    return {way.name: way.estimator for way in ways}


def study(target: str, arguments: dict[str, Any], seed: int, out: Path | None) -> LearningStudy:
    """The learning study; with a folder its trainings are kept there, and it goes on."""
    store = None
    if out is not None:
        text = {name: repr(arguments.get(name)) for name in OPTIONS} | {"seed": seed}
        text["estimators"] = repr(sorted(arguments.get("estimators") or {}))
        mark = hashlib.sha256(source_of(target) + json.dumps(text, sort_keys=True).encode())
        # Another file or other options are other trainings.
        store = out / KEPT / mark.hexdigest()[:12]
    return learning_study(**arguments, key=jax.random.key(seed), store=store)


def compared(
    target: str, given: dict[str, Any], num_draws: int, seed: int, out: Path | None
) -> tuple[UserModel, Comparison, LearningStudy]:
    """The gradients of all ways against the exact one, then what the ways learn."""
    model = load_model(target)
    arguments = arguments_of(model, given)
    tell(f"compare the gradients of all ways, {num_draws} draws of each that draws")
    found = gradients.compared(estimators_of(arguments, model.problem), model.problem, num_draws)
    learned = study(target, arguments, seed, out)
    return model, found, replace(learned, data=model.data or learned.data)


def tell(words: str) -> None:
    """A line on standard error."""
    print(f"jbptt: {words}", file=sys.stderr, flush=True)
