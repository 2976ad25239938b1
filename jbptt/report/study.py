"""The study behind `jbptt report`: small character models on real text, and what their gradients do."""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax

from jbptt import cells, clipping, truncation, validation
from jbptt.analysis.comparison import measure_cost
from jbptt.analysis.diagnosis import TOLERANCES, Diagnosis, diagnose
from jbptt.cells import Cell
from jbptt.estimators import full_bptt, randomized_bptt, truncated_bptt
from jbptt.experiments import tasks
from jbptt.experiments.training import evaluate, train

SCHEMA_VERSION = 1
CellName = Literal["rnn", "gru", "lstm"]
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Settings:
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
      quick: fewer updates, seeds and timings.
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


class Plan(NamedTuple):
    """How much work a report does."""

    reach_updates: int
    learning_updates: int
    num_evaluations: int
    num_seeds: int
    cost_windows: tuple[int, ...]
    num_repeats: int


FULL = Plan(400, 600, 12, 4, (2, 4, 8, 16, 32, 64), 7)
QUICK = Plan(60, 60, 3, 2, (4, 32), 3)


def check_settings(settings: Settings) -> str:
    """Checks every option and returns the text; a ValueError says what is wrong, before anything runs."""
    for name in ("hidden_size", "num_steps", "batch_size", "window"):
        validation.check_positive_integer(name, getattr(settings, name))
    if settings.window >= settings.num_steps:
        raise ValueError(
            f"window must be < num_steps = {settings.num_steps}, got {settings.window}; a window of all steps is "
            "full BPTT, which the report compares with anyway"
        )
    validation.check_probability("keep_prob", settings.keep_prob)
    validation.check_seed(settings.seed)
    if not settings.cell or not set(settings.cell) <= {"rnn", "gru", "lstm"}:
        raise ValueError(f"cell must be one or more of rnn, gru, lstm, got {settings.cell}")
    text = tasks.read_text(settings.text)
    tasks.text(text, num_steps=settings.num_steps, batch_size=settings.batch_size)
    return text


def run_study(settings: Settings, text: str, progress: Progress) -> dict[str, Any]:
    """Runs everything and returns the numbers behind every picture (docs/report.md has the schema)."""
    plan = QUICK if settings.quick else FULL
    task = tasks.text(text, num_steps=settings.num_steps, batch_size=settings.batch_size)
    task = task._replace(train=_over_cores(task.train, 2), heldout=_over_cores(task.heldout, 2))
    names = tuple(dict.fromkeys(settings.cell))
    total, done = 2 * len(names) + 3, 0
    reach, windows = [], []
    for name in names:
        progress(f"{name}: train", done / total)
        model = _model(name, settings, task)
        before, after = _before_and_after(model, settings, task, plan)
        reach += [_reach(name, "before", before), _reach(name, "after", after[0])]
        progress(f"{name}: time and memory of windows", (done + 1) / total)
        windows.append(_windows(name, model, settings, task, plan, *after))
        done += 2
    learning = _learning(names[-1], settings, task, plan, lambda what, part: progress(what, (done + 3 * part) / total))
    progress("done", 1.0)
    result = {
        "schema_version": SCHEMA_VERSION,
        "seed": settings.seed,
        "dtype": "float32",
        "versions": {
            **{name: version(name) for name in ("jbptt", "jax", "jaxlib", "optax", "numpy")},
            "python": sys.version.split()[0],
        },
        "device": _device(),
        "settings": {**asdict(settings), "text": None if settings.text is None else str(settings.text)},
        "text": _describe_text(settings, text, task),
        "coverage": _coverage(text, settings),
        "reach": {"lags": list(range(len(reach[0]["norms"]))), "curves": reach},
        "windows": {"models": windows},
        "learning": learning,
    }
    return to_json(result)


def to_json(value: Any) -> Any:
    """Plain Python all the way down; numbers that are not finite become None."""
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return to_json(np.asarray(value).tolist())
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _device() -> dict[str, Any]:
    first = jax.devices()[0]
    return {"platform": first.platform, "kind": first.device_kind, "count": jax.device_count()}


def _over_cores(tree: Any, axis: int) -> Any:
    """Cuts `axis`, the batch, over all devices; the programs that read it then run on all of them."""
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec(*[None] * axis, "batch")
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, spec))


def _describe_text(settings: Settings, text: str, task: tasks.Text) -> dict[str, Any]:
    source = f"pydoc_data.topics (Python {sys.version.split()[0]})" if settings.text is None else str(settings.text)
    return {
        "source": source,
        "characters": len(text),
        "vocabulary": len(task.vocabulary),
        "train_characters": task.train.xs.size,
        "heldout_characters": task.heldout.xs.size,
    }


def _coverage(text: str, settings: Settings) -> dict[str, Any]:
    """The first characters, cut into blocks of six, and as often on average at random."""
    characters, window = text[:24], 6
    keep_prob = 1 - 1 / window
    draw = truncation.randomized(jax.random.key(settings.seed), len(characters), keep_prob)
    gates = {
        "full": truncation.full(len(characters)),
        "fixed": truncation.fixed(len(characters), window),
        "randomized": draw,
    }
    matrices = {name: np.asarray(truncation.coverage(gate)) for name, gate in gates.items()}
    return {
        "characters": characters,
        "window": window,
        "keep_prob": keep_prob,
        "matrices": matrices,
        "pairs": {name: int(np.count_nonzero(matrix)) for name, matrix in matrices.items()},
    }


def _model(name: str, settings: Settings, task: tasks.Text) -> Cell:
    size = len(task.vocabulary)
    cell = getattr(cells, name)(size, settings.hidden_size)
    return tasks.on_tokens(cells.with_linear_readout(cell, size), size)


def _optimizer() -> optax.GradientTransformation:
    return optax.chain(clipping.clip_by_global_norm(1.0), optax.adam(3e-3))


def _take(batches: Any, start: int, count: int) -> Any:
    """`count` batches in reading order, from the beginning again after the last."""
    index = (start + np.arange(count)) % batches.xs.shape[0]
    return jax.tree.map(lambda a: a[index], batches)


def _before_and_after(model: Cell, settings: Settings, task: tasks.Text, plan: Plan):
    """Diagnoses held-out text with fresh and with trained parameters; the latter come back too."""
    params = model.init(jax.random.key(settings.seed))
    carry = _over_cores(model.initial_carry((settings.batch_size,)), 0)
    batch = _take(task.heldout, 0, 1)
    batch = jax.tree.map(lambda a: a[0], batch)
    look = jax.jit(partial(diagnose, model.step, tasks.cross_entropy, measure=False))
    before = look(params, carry, batch)
    estimator = full_bptt(model.step, tasks.cross_entropy)
    run = jax.jit(partial(train, estimator, _optimizer()))
    trained, _ = run(params, carry, _take(task.train, 0, plan.reach_updates))
    return before, (look(trained, carry, batch), trained, carry, batch)


def _reach(name: str, stage: str, found: Diagnosis) -> dict[str, Any]:
    norms = np.asarray(found.profile.cotangent_norms)
    reach = int(found.reach)
    return {
        "cell": name,
        "stage": stage,
        "norms": norms,
        "half_life": float(found.half_life),
        "reach": reach if reach < len(norms) else None,
        "verdict": found.verdict,
    }


def _windows(name, model, settings, task, plan, found: Diagnosis, params, carry, batch) -> dict[str, Any]:
    step, loss, num_steps = model.step, tasks.cross_entropy, settings.num_steps
    sizes = [w for w in plan.cost_windows if w < num_steps]
    estimators = {("full", num_steps): full_bptt(step, loss)}
    estimators |= {("block", w): truncated_bptt(step, loss, window=w) for w in sizes if num_steps % w == 0}
    estimators |= {("sliding", w): truncated_bptt(step, loss, window=w, stride=1) for w in sizes}
    params, carry, batch = jax.device_put((params, carry, batch), jax.devices()[0])  # one core: comparable
    named = {f"{kind} {window}": estimator for (kind, window), estimator in estimators.items()}
    cost = measure_cost(named, params, carry, batch, num_repeats=plan.num_repeats)
    columns = zip(estimators, cost.median_seconds, cost.spread_seconds, cost.temporary_bytes, strict=True)
    costs = [
        {"strategy": kind, "window": window, "seconds": seconds, "seconds_spread": spread, "temporary_bytes": size}
        for (kind, window), seconds, spread, size in columns
    ]
    curve = found.curve

    def part(error, cosine, recommended):
        chosen = {f"{tolerance:g}": int(w) or None for tolerance, w in zip(TOLERANCES, recommended, strict=True)}
        return {"relative_error": error, "cosine": cosine, "recommended": chosen}

    return {
        "cell": name,
        "windows": curve.windows,
        "sliding": part(curve.relative_error, curve.cosine, found.sliding_window),
        "block": part(curve.block_relative_error, curve.block_cosine, found.block_window),
        "costs": costs,
    }


def _learning(name: str, settings: Settings, task: tasks.Text, plan: Plan, progress: Progress) -> dict[str, Any]:
    """Held-out perplexity of three strategies from the same starts on the same characters."""
    model = _model(name, settings, task)
    step, loss = model.step, tasks.cross_entropy
    strategies = {
        "full": (full_bptt(step, loss), f"all {settings.num_steps} steps"),
        "fixed": (truncated_bptt(step, loss, window=settings.window), f"blocks of {settings.window} steps"),
        "randomized": (
            randomized_bptt(step, loss, keep_prob=settings.keep_prob),
            f"each crossing kept with probability {settings.keep_prob:g}",
        ),
    }
    chunk = max(1, plan.learning_updates // plan.num_evaluations)
    rows = []
    for i, (kind, (estimator, detail)) in enumerate(strategies.items()):

        def report(part, i=i, kind=kind):
            progress(f"{name}: learn with {kind} BPTT, {plan.num_seeds} seeds", (i + part) / len(strategies))

        perplexity = _learn(model, estimator, settings, task, plan, chunk, report)
        final = perplexity[-1]
        rows.append(
            {
                "name": kind,
                "detail": detail,
                "perplexity": perplexity,
                "final_mean": float(np.mean(final)),
                "final_std": float(np.std(final, ddof=1)),
            }
        )
    per_update = settings.num_steps * settings.batch_size
    read = [chunk * per_update * i for i in range(plan.num_evaluations + 1)]
    sizes = {"batch_size": settings.batch_size, "num_steps": settings.num_steps, "num_seeds": plan.num_seeds}
    return {"cell": name, **sizes, "characters_read": read, "strategies": rows}


def _learn(model, estimator, settings, task, plan, chunk, report) -> np.ndarray:
    """Perplexity `[evaluation, seed]`, the seeds side by side under vmap."""
    carry = _over_cores(model.initial_carry((settings.batch_size,)), 0)
    optimizer = _optimizer()
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(settings.seed), np.arange(plan.num_seeds))
    first = jax.tree.map(lambda a: a[0], task.train)

    def start(key):
        params = model.init(key)
        return params, estimator.init(params, carry, first, key=key), optimizer.init(params)

    @jax.jit
    @partial(jax.vmap, in_axes=(0, None))
    def advance(running, batches):
        params, state, opt_state = running
        params, history = train(estimator, optimizer, params, None, batches, state=state, opt_state=opt_state)
        return params, history.state, history.opt_state

    evaluate_one = partial(evaluate, model.step, tasks.cross_entropy)
    measure = jax.jit(jax.vmap(evaluate_one, in_axes=(0, None, None)))
    running = jax.jit(jax.vmap(start))(keys)
    perplexity = [np.exp(measure(running[0], carry, task.heldout))]
    for i in range(plan.num_evaluations):
        report(i / plan.num_evaluations)
        running = advance(running, _take(task.train, i * chunk, chunk))
        perplexity.append(np.exp(measure(running[0], carry, task.heldout)))
    return np.stack(perplexity)
