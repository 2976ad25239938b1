"""`jbptt compare`: the gradients of a small model, or of a user's own, against the exact one."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import optax

from jbptt import cells, clipping, truncation, validation
from jbptt.adaptive import adaptive_bptt
from jbptt.analysis.comparison import PER_ESTIMATOR, Comparison, compare
from jbptt.analysis.costs import Cost, measure_cost
from jbptt.cells import Cell
from jbptt.estimators import full_bptt, randomized_bptt, truncated_bptt
from jbptt.experiments import tasks
from jbptt.experiments.training import train
from jbptt.online.names import check_online_names, online_estimators
from jbptt.report import interruption, output, plots
from jbptt.report.commands import own_models
from jbptt.report.commands.errors import UsageError, device_errors, device_gave_up
from jbptt.report.commands.options import check_belongs
from jbptt.report.questions import gradients, learning
from jbptt.report.text_models import first, take
from jbptt.report.themes import to_svg
from jbptt.types import Batch, Carry, Estimator, Loss, Params, Step

FILES = ("comparison.json", "comparison.svg")
NUM_WARMING = 4
"""Updates that windows which follow a bound see before they are compared."""


@dataclass(frozen=True)
class ComparisonSettings:
    """Everything that shapes the numbers of a comparison.

    Attributes:
      task: characters of a text, copy memory, the adding problem, or recalling the first input.
      text: a UTF-8 text file; None: the documentation of Python inside CPython.
      cell: what the model is made of.
      hidden_size: H.
      num_steps: T, steps per sequence; what full BPTT goes back through.
      batch_size: B, sequences side by side.
      num_updates: of training with full BPTT before the gradients are compared, 200; of a model of
        your own of every training.
      window: steps per block, and per sliding window; several are compared; 16.
      keep_prob: of randomized truncation; several are compared, each with and without its weights;
        0.9375.
      mean_length: of ARTBP, in steps; several are compared; 16.
      tolerance: of windows that follow a bound on the bias (at most max(window) steps); left out if
        not given.
      online: gradients that run forward, compared beside the others: rtrl, snap-N (order N),
        rflo-LEAK (what a step keeps of a unit, 0 to 1), uoro.
      num_samples: draws of each estimator that draws.
      learning_rates: of a model of your own: that every way is first tried with.
      num_seeds: of a model of your own: of every way and rate.
      seed: of everything random, in [0, 2³²).
    """

    task: Literal["text", "copy", "adding", "recall"] = "text"
    text: Path | None = None
    cell: Literal["rnn", "gru", "lstm"] = "lstm"
    hidden_size: int = 64
    num_steps: int = 128
    batch_size: int = 16
    num_updates: int | None = None
    window: tuple[int, ...] | None = None
    keep_prob: tuple[float, ...] | None = None
    mean_length: tuple[float, ...] | None = None
    tolerance: float | None = None
    online: tuple[str, ...] = ()
    num_samples: int = 100
    learning_rates: tuple[float, ...] | None = None
    num_seeds: int | None = None
    seed: int = 0


BUILT_IN = (
    "task", "text", "cell", "hidden_size", "num_steps", "batch_size", "mean_length", "tolerance",
)  # fmt: skip
"""Options of the models that the comparison brings along."""
OF_ITS_OWN = ("learning_rates", "num_seeds")
"""Options of a model of one's own."""
NUM_UPDATES = 200


def windows_of(settings: ComparisonSettings) -> tuple[int, ...]:
    """Those compared with the built-in models."""
    return (16,) if settings.window is None else settings.window


@dataclass(frozen=True)
class Setup:
    """A cell with its task: batches to train on, `[N, T, ...]`, and one that it has not seen."""

    cell: Cell
    loss: Loss
    train: Batch
    heldout: Batch


def check_comparison_settings(settings: ComparisonSettings) -> None:
    """A ValueError says what is wrong, before anything runs."""
    for name in ("hidden_size", "batch_size"):
        validation.check_positive_integer(name, getattr(settings, name))
    if settings.num_updates is not None:
        validation.check_positive_integer("num_updates", settings.num_updates)
    validation.check_positive_integer(
        "num_steps", settings.num_steps, smallest=3 if settings.task == "copy" else 2
    )
    validation.check_positive_integer("num_samples", settings.num_samples, smallest=2)
    if settings.num_seeds is not None:
        validation.check_positive_integer("num_seeds", settings.num_seeds, smallest=2)
    for rate in settings.learning_rates or ():
        validation.check_above("learning_rates", rate, 0, "nothing would be learned")
    validation.check_seed(settings.seed)
    for window in settings.window or ():
        validation.check_positive_integer("window", window)
    for keep_prob in settings.keep_prob or ():
        validation.check_probability("keep_prob", keep_prob)
    for mean_length in settings.mean_length or ():
        validation.check_mean_length(mean_length)
    check_online_names(settings.online)
    if settings.text is not None and settings.task != "text":
        raise ValueError(
            f"text is read by the task text only, got task {settings.task}; leave one of them out"
        )
    if settings.tolerance is not None:
        validation.check_between("tolerance", settings.tolerance, 0, 1, "0.1 means a bias of 10 %")
        if not windows_of(settings):
            raise ValueError(
                "tolerance needs a window, the longest that may be taken; pass --window"
            )


def make_setup(settings: ComparisonSettings) -> Setup:
    """The cell, the loss and the data of a task."""
    make, hidden, steps, examples = (
        getattr(cells, settings.cell),
        settings.hidden_size,
        settings.num_steps,
        settings.batch_size,
    )
    if settings.task == "text":
        task = tasks.text(tasks.read_text(settings.text), num_steps=steps, batch_size=examples)
        size = len(task.vocabulary)
        cell = tasks.on_tokens(cells.with_linear_readout(make(size, hidden), size), size)
        return Setup(
            cell,
            tasks.cross_entropy,
            take(task.train, 0, settings.num_updates or NUM_UPDATES),
            first(task.heldout),
        )
    if settings.task == "copy":
        length = max(1, steps // 8)
        draw = partial(tasks.copy, length=length, delay=steps - 2 * length, batch_size=examples)
        cell, loss = cells.with_linear_readout(make(10, hidden), 10), tasks.cross_entropy
    else:
        task, num_inputs = (tasks.adding, 2) if settings.task == "adding" else (tasks.recall, 1)
        draw = partial(task, num_steps=steps, batch_size=examples)
        cell, loss = cells.with_linear_readout(make(num_inputs, hidden), 1), tasks.squared_error
    keys = jax.random.split(
        jax.random.fold_in(jax.random.key(settings.seed), 1),
        (settings.num_updates or NUM_UPDATES) + 1,
    )
    return Setup(cell, loss, jax.jit(jax.vmap(draw))(keys[1:]), jax.jit(draw)(keys[0]))


def symbols_read(settings: ComparisonSettings) -> dict[str, int] | None:
    """What becomes of the characters of the text; None for a task without one."""
    return tasks.count_symbols(tasks.read_text(settings.text)) if settings.task == "text" else None


def estimators_of(settings: ComparisonSettings, step: Step, loss: Loss) -> dict[str, Estimator]:
    """What is compared, by name; full BPTT first."""
    found = {"full": full_bptt(step, loss)}
    for window in dict.fromkeys(windows_of(settings)):
        found[f"blocks of {window}"] = truncated_bptt(step, loss, window=window, streams=False)
        found[f"sliding {window}"] = truncated_bptt(step, loss, window=window, stride=1)
    for keep_prob in dict.fromkeys((0.9375,) if settings.keep_prob is None else settings.keep_prob):
        found[f"keep {keep_prob}"] = randomized_bptt(step, loss, keep_prob=keep_prob)
        found[f"keep {keep_prob}, no 1/π"] = randomized_bptt(
            step, loss, keep_prob=keep_prob, reweight=False
        )
    for length in dict.fromkeys((16.0,) if settings.mean_length is None else settings.mean_length):
        found[f"artbp {length}"] = randomized_bptt(step, loss, mean_length=length)
    found |= online_estimators(settings.online, step, loss)
    if settings.tolerance is not None:
        longest = max(windows_of(settings))
        found[f"adaptive {settings.tolerance}"] = adaptive_bptt(
            step, loss, tolerance=settings.tolerance, max_window=longest
        )
    return found


def warmed(estimator: Estimator, params: Params, carry: Carry, batches: Batch) -> Estimator:
    """The estimator as it is after it has seen some batches, at the start of another stream."""
    start = estimator.init(params, carry, first(batches))
    state, _ = jax.lax.scan(
        lambda state, batch: (estimator.update(params, state, batch)[1], None), start, batches
    )

    def init(params: Params, carry: Carry, batch: Batch, key=None):
        fresh = estimator.init(params, carry, batch, key=key)
        return state._replace(carry=fresh.carry, history=fresh.history)

    def coverage(num_steps: int, key=None) -> jax.Array:
        del key
        return truncation.window_coverage(num_steps, int(state.window), 1)

    return Estimator(init, estimator.update, coverage)


def run_comparison(
    settings: ComparisonSettings, say: Callable[[str], None]
) -> tuple[Comparison, Cost]:
    """Trains, compares and measures."""
    setup = make_setup(settings)
    if (read := symbols_read(settings)) and read["folded_characters"]:
        say(
            f"text: {read['folded_characters']:,} of {read['characters']:,} characters are none of "
            f"the {read['vocabulary'] - 1} most frequent and are read as one symbol"
        )
    key = jax.random.fold_in(jax.random.key(settings.seed), 0)
    estimators = estimators_of(settings, setup.cell.step, setup.loss)
    say(f"train: {settings.num_updates or NUM_UPDATES} updates with full BPTT")
    optimizer = optax.chain(clipping.clip_by_global_norm(1.0), optax.adam(3e-3))
    run = jax.jit(partial(train, estimators["full"], optimizer))
    carry = setup.cell.initial_carry((settings.batch_size,))
    params, _ = run(jax.jit(setup.cell.init)(key), carry, setup.train)
    problem = params, carry, setup.heldout
    for name in [name for name in estimators if name.startswith("adaptive")]:
        latest = jax.tree.map(lambda a: a[-NUM_WARMING:], setup.train)
        estimators[name] = warmed(estimators[name], params, carry, latest)
    say(f"compare: {len(estimators)} estimators, {settings.num_samples} draws of each that draws")
    look = jax.jit(partial(compare, estimators, reference="full", num_samples=settings.num_samples))
    found = jax.block_until_ready(look(*problem, key=jax.random.fold_in(key, 1)))
    say("measure time and memory")
    return found, measure_cost(estimators, *problem, key=key)


def comparison_json(
    settings: ComparisonSettings, found: Comparison, cost: Cost, command: str
) -> str:
    """Every number, as JSON; what is not finite becomes null."""
    data: dict[str, Any] = {
        name: getattr(found, name) for name in (*PER_ESTIMATOR, "coverage", "alignment")
    }
    data |= {
        "names": found.names,
        "num_samples": found.num_samples,
        "settings": asdict(settings),
        "command": command,
    }
    data |= {"seconds": cost.median_seconds, "seconds_spread": cost.spread_seconds}
    data |= {"temporary_bytes": cost.temporary_bytes, "state_bytes": cost.state_bytes}
    data["text"] = symbols_read(settings)
    data["settings"]["text"] = None if settings.text is None else str(settings.text)
    return (
        json.dumps(output.plain_numbers(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    )


def run_compare(
    settings: ComparisonSettings,
    *,
    model: str | None = None,
    out: Path | None = None,
    command: str = "jbptt compare",
) -> int:
    """Compares estimators, prints two tables and writes what was asked for.

    Raises: UsageError, before anything runs where that can be known.
    """
    files = FILES if model is None else (*FILES, "learning.svg")
    try:
        check_comparison_settings(settings)
        if model is None:
            check_belongs(settings, OF_ITS_OWN, "models of your own")
        else:
            check_belongs(settings, BUILT_IN, "the built-in models")
        if out is not None:
            output.check_target(Path(out), files)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    if model is not None:
        return _run_own(model, settings, None if out is None else Path(out), command)
    try:
        with interruption.unfinished(
            "the comparison was stopped before it was finished; nothing was written"
        ):
            found, cost = run_comparison(
                settings, lambda what: print(what, file=sys.stderr, flush=True)
            )
            if out is not None:
                picture = to_svg(plots.plot_comparison(found).figure)
                texts = comparison_json(settings, found, cost, command), picture
                output.write_files(dict(zip(FILES, texts, strict=True)), Path(out))
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    except device_errors() as error:
        raise device_gave_up(error, "a smaller --hidden-size or --batch-size") from error
    print(found, "", "time of one update, temporary memory, state carried on", cost, sep="\n")
    return 0


def _run_own(target: str, settings: ComparisonSettings, out: Path | None, command: str) -> int:
    """The same for a model of one's own: its gradients, and what each way learns."""
    given = {
        "windows": settings.window,
        "keep_probs": settings.keep_prob,
        "learning_rates": settings.learning_rates,
        "seeds": settings.num_seeds,
        "num_updates": settings.num_updates,
        "online": settings.online,
    }
    with own_models.asking(target, out):
        _, found, study = own_models.compared(
            target, given, settings.num_samples, settings.seed, out
        )
    if out is not None:
        data = gradients.measure(found) | {"learning": learning.numbers_of(study)}
        data |= {"model": target, "command": command, "settings": asdict(settings)}
        pictures = plots.plot_comparison(found), plots.plot_learning_study(study)
        texts = {FILES[0]: output.json_text(data), FILES[1]: to_svg(pictures[0].figure)}
        texts["learning.svg"] = to_svg(pictures[1].figure)
        try:
            output.write_files(texts, out)
        except OSError as error:
            raise UsageError(str(error)) from error
    print(found, "", study, sep="\n")
    return 0
