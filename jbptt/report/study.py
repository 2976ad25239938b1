"""The study behind `jbptt report`: small character models on real text, and what their gradients
do.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jbptt import __version__, validation
from jbptt.estimators import full_bptt, randomized_bptt, truncated_bptt
from jbptt.experiments import tasks
from jbptt.plans import Plan
from jbptt.probes import declared_coverage
from jbptt.report import anatomy, randomness
from jbptt.report.learning import learn
from jbptt.report.measurements import (
    FULL,
    QUICK,
    Progress,
    find_windows,
    first,
    in_parallel,
    make_model,
    reach,
    train_fully,
    windows,
)
from jbptt.types import Step

SCHEMA_VERSION = 1
CellName = Literal["rnn", "gru", "lstm"]


@dataclass(frozen=True)
class ReportSettings:
    """Everything that shapes the numbers of a report.

    Attributes:
      text: a UTF-8 text file; None: the documentation of Python inside CPython.
      cell: the cells compared; the last one also learns with each strategy.
      hidden_size: H.
      num_steps: T, characters per sequence; what full BPTT goes back through.
      batch_size: B, sequences side by side.
      window: steps per block of fixed truncation, less than num_steps.
      keep_prob: probability that randomized truncation lets a step's gradient through.
      seed: of everything random, in [0, 2³²).
      quick: fewer updates, seeds and timings; windows of the last cell only.
    """

    text: Path | None = None
    cell: tuple[CellName, ...] = ("rnn", "gru", "lstm")
    hidden_size: int = 64
    num_steps: int = 128
    batch_size: int = 16
    window: int = 16
    keep_prob: float = 0.9375
    seed: int = 0
    quick: bool = False


def check_report_settings(settings: ReportSettings) -> str:
    """Checks every option and returns the text; a ValueError says what is wrong, before anything
    runs.
    """
    for name in ("hidden_size", "num_steps", "batch_size", "window"):
        validation.check_positive_integer(name, getattr(settings, name))
    validation.check_positive_integer("num_steps", settings.num_steps, smallest=2)
    if settings.window >= settings.num_steps:
        raise ValueError(
            f"window must be < num_steps = {settings.num_steps}, got {settings.window}; a window "
            "of all steps is full BPTT, which the report compares with anyway"
        )
    validation.check_probability("keep_prob", settings.keep_prob)
    validation.check_seed(settings.seed)
    if not settings.cell or not set(settings.cell) <= {"rnn", "gru", "lstm"}:
        raise ValueError(f"cell must be one or more of rnn, gru, lstm, got {settings.cell}")
    text = tasks.read_text(settings.text)
    tasks.text(text, num_steps=settings.num_steps, batch_size=settings.batch_size)
    return text


def run_study(
    settings: ReportSettings, text: str, progress: Callable[[str, float], None]
) -> dict[str, Any]:
    """Runs everything and returns the numbers behind every picture (docs/report.md has the
    schema).
    """
    effort = QUICK if settings.quick else FULL
    task = tasks.text(text, num_steps=settings.num_steps, batch_size=settings.batch_size)
    names = tuple(dict.fromkeys(settings.cell))
    last = len(names) - 1
    chosen = range(len(names)) if effort.windows_of_all_cells else [last]
    count = Progress(progress, effort.total_work(len(names)))

    def teach(i: int):
        """The last model learns with every strategy, the others with full BPTT only."""
        model = make_model(names[i], settings, task, effort)
        if i == last:
            return learn(model, task, effort, settings, count)
        return None, train_fully(model, task, effort, count, jax.devices()[i % jax.device_count()])

    def beside():
        """What needs none of the trained models."""
        rnn = make_model("rnn", settings, task, effort)
        found = {"growth": anatomy.growth(rnn, first(task.heldout), count)}
        found["powers"] = anatomy.exercises(settings.seed, count)
        return found | (
            {"remedies": anatomy.remedies(settings.seed, count)} if effort.remedies else {}
        )

    # What takes longest begins. What is timed waits until everything else is done.
    *taught, others = in_parallel(
        count, [*(partial(teach, i) for i in reversed(range(len(names)))), beside]
    )
    trained = [found for _, found in reversed(taught)]

    def look(function: Callable, i: int, *more: Any):
        return partial(function, trained[i], *more, count, jax.devices()[i % jax.device_count()])

    def reach_and_price(i: int):
        """The lags of every model, and for the last one what random cuts that suit them cost."""
        curves = look(reach, i)()
        if i != last or not effort.num_draws:
            return curves, None
        norms = np.asarray(curves[1]["grad_norms"])
        return curves, look(randomness.price, i, norms, settings.keep_prob, effort)()

    jobs = [
        partial(reach_and_price, i) for i in reversed(range(len(names)))
    ]  # what takes longest begins
    jobs += [look(find_windows, i) for i in chosen]
    jobs += [look(anatomy.spectra, i, task.heldout, effort) for i in chosen]
    *looked, flow = in_parallel(count, [*jobs, look(anatomy.flow, last)])
    (_, price), *_ = lags = looked[: len(names)]
    diagnoses, spectra = looked[len(names) : -len(chosen)], looked[-len(chosen) :]
    random = {}
    if price is not None:
        random["randomness"] = randomness.time_them(
            trained[last], price, settings.keep_prob, effort, count
        )
    measured = [
        windows(trained[i], found, effort, count)
        for i, found in zip(chosen, diagnoses, strict=True)
    ]
    curves = [curve for found, _ in reversed(lags) for curve in found]
    result = {
        "schema_version": SCHEMA_VERSION,
        "seed": settings.seed,
        "dtype": "float32",
        "versions": {
            "jbptt": __version__,
            **{name: version(name) for name in ("jax", "jaxlib", "optax", "numpy")},
            "python": sys.version.split()[0],
        },
        "device": _device(),
        "plan": str(Plan()),
        "settings": {
            **asdict(settings),
            "text": None if settings.text is None else str(settings.text),
        },
        "text": _describe_text(settings, text, task),
        "coverage": _coverage(text, trained[last].model.cell.step, settings),
        "reach": {"lags": list(range(len(curves[0]["norms"]))), "curves": curves},
        "windows": {"models": measured},
        "learning": taught[0][0],
        "flow": flow,
        "spectra": {"models": [model for found in spectra for model in found]},
        **random,
        **others,
    }
    return plain_numbers(result)


def plain_numbers(value: Any) -> Any:
    """Plain Python all the way down; numbers that are not finite become None."""
    if isinstance(value, dict):
        return {str(key): plain_numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_numbers(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return plain_numbers(np.asarray(value).tolist())
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _device() -> dict[str, Any]:
    first = jax.devices()[0]
    return {"platform": first.platform, "kind": first.device_kind, "count": jax.device_count()}


def _describe_text(settings: ReportSettings, text: str, task: tasks.Text) -> dict[str, Any]:
    source = (
        f"pydoc_data.topics (Python {sys.version.split()[0]})"
        if settings.text is None
        else str(settings.text)
    )
    return {
        "source": source,
        **tasks.count_symbols(text),
        "train_characters": task.train.xs.size,
        "heldout_characters": task.heldout.xs.size,
    }


def _coverage(text: str, step: Step, settings: ReportSettings) -> dict[str, Any]:
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
