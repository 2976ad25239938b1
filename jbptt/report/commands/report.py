"""`jbptt report`: small character models on real text, and what their gradients do."""

import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jbptt import __version__, validation
from jbptt.experiments import tasks
from jbptt.plans import Plan
from jbptt.progress import ProgressDisplay
from jbptt.report import interruption, output
from jbptt.report.commands import own_models
from jbptt.report.commands.errors import UsageError, device_errors, device_gave_up
from jbptt.report.commands.options import check_belongs
from jbptt.report.display import print_summary
from jbptt.report.output import plain_numbers
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
from jbptt.report.text_models import first, make_model, train_fully
from jbptt.report.work import FULL, QUICK, Progress, in_parallel

SCHEMA_VERSION = 2
QUICK_DRAWS = 16
BUILT_IN = ("text", "cell", "hidden_size", "num_steps", "batch_size")
"""Options of the models that the report brings along."""
CellName = Literal["rnn", "gru", "lstm"]
CELLS: tuple[CellName, ...] = ("rnn", "gru", "lstm")
QUICK_CELLS: tuple[CellName, ...] = ("rnn",)
"""That which compiles fastest."""


@dataclass(frozen=True)
class ReportSettings:
    """Everything that shapes the numbers of a report.

    Attributes:
      text: a UTF-8 text file; None: the documentation of Python inside CPython.
      cell: the cells compared; the last one, small, also learns in every way. If not given, rnn,
        gru and lstm; with quick, rnn alone.
      hidden_size: H of the models whose gradients are looked at.
      num_steps: T, characters per sequence; what full BPTT goes back through.
      batch_size: B, sequences side by side.
      windows: steps per block of the ways that learn; 4 and 16 if not given.
      keep_prob: probability that randomized truncation lets a step's gradient through; 0.9375 for
        the built-in models.
      learning_rates: that every way is first tried with.
      num_seeds: of every way and rate.
      num_updates: of every training that the ways are judged by.
      seed: of everything random, in [0, 2³²).
      quick: fewer cells, ways, rates, updates, seeds and timings, and fewer questions.
    """

    text: Path | None = None
    cell: tuple[CellName, ...] | None = None
    hidden_size: int = 64
    num_steps: int = 128
    batch_size: int = 16
    windows: tuple[int, ...] | None = None
    keep_prob: float | None = None
    learning_rates: tuple[float, ...] | None = None
    num_seeds: int | None = None
    num_updates: int | None = None
    seed: int = 0
    quick: bool = False


def check_report_settings(settings: ReportSettings) -> str:
    """Checks every option and returns the text; a ValueError says what is wrong, before anything
    runs.
    """
    for name in ("hidden_size", "batch_size"):
        validation.check_positive_integer(name, getattr(settings, name))
    validation.check_positive_integer("num_steps", settings.num_steps, smallest=2)
    check_learning(settings)
    if settings.cell is not None and not (settings.cell and set(settings.cell) <= {*CELLS}):
        raise ValueError(f"cell must be one or more of rnn, gru, lstm, got {settings.cell}")
    num_steps = learning.steps_of(settings)
    for window in settings.windows or ():
        if window >= num_steps:
            raise ValueError(
                f"windows must be < {num_steps}, the steps of what learns, got {window}; a window "
                "of all steps is full BPTT, which the report compares with anyway"
            )
    text = tasks.read_text(settings.text)
    tasks.text(text, num_steps=settings.num_steps, batch_size=settings.batch_size)
    return text


def check_learning(settings: Any) -> None:
    """Checks the options of the ways that learn; a ValueError says what is wrong."""
    for window in settings.windows or ():
        validation.check_positive_integer("windows", window)
    if settings.keep_prob is not None:
        validation.check_probability("keep_prob", settings.keep_prob)
    for rate in settings.learning_rates or ():
        validation.check_above("learning_rates", rate, 0, "nothing would be learned")
    if settings.num_seeds is not None:
        validation.check_positive_integer("num_seeds", settings.num_seeds, smallest=2)
    if settings.num_updates is not None:
        validation.check_positive_integer("num_updates", settings.num_updates)
    validation.check_seed(settings.seed)


def run_study(
    settings: ReportSettings, text: str, progress: Callable[[str, float], None]
) -> dict[str, Any]:
    """Runs everything and returns the numbers behind every picture (docs/report.md has the
    schema).
    """
    effort, usual_cells = (QUICK, QUICK_CELLS) if settings.quick else (FULL, CELLS)
    names = tuple(dict.fromkeys(settings.cell or usual_cells))
    settings = replace(settings, cell=names)
    keep_prob = learning.keep_prob_of(settings)
    task = tasks.text(text, num_steps=settings.num_steps, batch_size=settings.batch_size)
    last = len(names) - 1
    count = Progress(progress, effort.total_work(len(names)))

    def device(i: int):
        return jax.devices()[i % jax.device_count()]

    def teach(i: int):
        """The models whose gradients are looked at learn with full BPTT."""
        model = make_model(names[i], settings, task, effort)
        return train_fully(model, task, effort, count, device(i))

    def beside():
        """What needs none of the trained models."""
        rnn = make_model("rnn", settings, task, effort)
        found = {"growth": growth.measure(rnn, first(task.heldout), count)}
        found["powers"] = matrix_powers.measure(settings.seed, count)
        if effort.remedies:
            found["remedies"] = treating.measure(settings.seed, count)
        return found

    # What takes longest begins. What is timed waits until everything else is done.
    *taught, others = in_parallel(
        count, [*(partial(teach, i) for i in reversed(range(len(names)))), beside]
    )
    trained = list(reversed(taught))

    def look(function: Callable, i: int, *more: Any):
        return partial(function, trained[i], *more, count, device(i))

    def reach_and_price(i: int):
        """The lags of every model, and for the last one what random cuts that suit them cost."""
        curves = look(reach.measure, i)()
        if i != last or not effort.num_draws:
            return curves, None
        norms = np.asarray(curves[1]["grad_norms"])
        return curves, look(randomness.measure, i, norms, keep_prob, effort)()

    jobs = [partial(reach_and_price, i) for i in reversed(range(len(names)))]
    jobs += [
        look(window_costs.find_windows, last),
        look(spectra.measure, last, task.heldout, effort),
    ]
    *lags, found, spectrums, flows = in_parallel(count, [*jobs, look(flow.measure, last)])
    price = lags[0][1]
    random = {}
    if price is not None:
        random["randomness"] = randomness.time_them(trained[last], price, keep_prob, effort, count)
    measured = window_costs.measure(trained[last], found, effort, count)
    # Alone, since its updates are timed too.
    learned = learning.measure(settings, text, effort, count)
    curves = [curve for found, _ in reversed(lags) for curve in found]
    result = {
        **circumstances(settings),
        "text": _describe_text(settings, text, task),
        "learning": learned,
        "coverage": coverage.measure(text, trained[last].model.cell.step, settings),
        "reach": {"lags": list(range(len(curves[0]["norms"]))), "curves": curves},
        "windows": {"models": [measured]},
        "flow": flows,
        "spectra": {"models": spectrums},
        **random,
        **others,
    }
    return plain_numbers(result)


def circumstances(settings: Any) -> dict[str, Any]:
    """What every report says of how it was made."""
    text = None if settings.text is None else str(settings.text)
    return {
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
        "settings": {**asdict(settings), "text": text},
    }


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


def run_report(
    settings: ReportSettings,
    *,
    model: str | None = None,
    out: Path,
    cores: int | None = None,
    command: str = "jbptt report",
) -> int:
    """Measures and writes a report into `out`, all of it or nothing.

    Raises: UsageError, before anything runs where that can be known.
    """
    target = Path(out)
    try:
        output.check_target(target)
        _use_cores(cores)
        text = None
        if model is None:
            text = check_report_settings(settings)
        else:
            check_belongs(settings, BUILT_IN, "the built-in models")
            check_learning(settings)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    try:
        if model is None:
            stopped = (
                f"the report was stopped before it was finished; nothing was written into {target}"
            )
            with interruption.unfinished(stopped), ProgressDisplay() as progress:
                data = run_study(settings, text or "", progress)
                progress("write the report", 1.0)
        else:
            with own_models.asking(model, target):
                data = run_own_study(model, settings, target)
        data |= {"created": datetime.now(UTC).isoformat(timespec="seconds"), "command": command}
        output.write_report(data, target)
    except (OSError, MemoryError) as error:
        raise UsageError(f"the report could not be finished: {error}") from error
    except device_errors() as error:
        raise device_gave_up(error, "a smaller --hidden-size or --batch-size") from error
    print_summary(data, target)
    return 0


def run_own_study(target: str, settings: ReportSettings, out: Path) -> dict[str, Any]:
    """The numbers of a report on a model of one's own."""
    quick = (
        {"seeds": 3, "num_updates": 100, "learning_rates": QUICK.rates} if settings.quick else {}
    )
    given = quick | {
        name: value
        for name, value in {
            "windows": settings.windows,
            "keep_probs": None if settings.keep_prob is None else (settings.keep_prob,),
            "learning_rates": settings.learning_rates,
            "seeds": settings.num_seeds,
            "num_updates": settings.num_updates,
        }.items()
        if value is not None
    }
    num_draws = QUICK_DRAWS if settings.quick else FULL.num_draws
    model, compared, study = own_models.compared(target, given, num_draws, settings.seed, out)
    own_models.tell("diagnose the gradient before training")
    of = diagnosis.measure(model.problem)
    return plain_numbers(
        {
            **circumstances(settings),
            "model": target,
            "learning": learning.numbers_of(study) | {"model": target, "unit": ""},
            "diagnosis": of,
            "gradients": gradients.measure(compared),
        }
    )


def _use_cores(cores: int | None) -> None:
    """Splits the CPU into `cores` devices, which JAX allows until it has computed something."""
    available = _available_cores()
    if cores is not None and not 1 <= cores <= available:
        raise ValueError(
            f"cores must be in [1, {available}], got {cores}; this process may use {available}"
        )
    if cores is None and "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    import jax

    try:
        jax.config.update("jax_num_cpu_devices", cores or available)
    except RuntimeError:
        if cores is not None:
            raise ValueError(
                f"cores must be chosen before JAX computes anything, got {cores}; start a new "
                "process"
            ) from None


def _available_cores() -> int:
    """The cores that this process may use; a scheduler or a container allows fewer than all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
