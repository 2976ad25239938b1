"""What the study measures: models trained on text, their gradients, costs and learning curves."""

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jbptt import cells, clipping
from jbptt.analysis.comparison import fresh_blocks, measure_cost
from jbptt.analysis.diagnosis import TOLERANCES, Diagnosis, diagnose
from jbptt.cells import Cell
from jbptt.estimators import full_bptt, randomized_bptt, truncated_bptt
from jbptt.experiments import tasks
from jbptt.experiments.training import evaluate, train
from jbptt.types import Carry, Params


class Plan(NamedTuple):
    """How much work a report does."""

    reach_updates: int
    learning_updates: int
    num_evaluations: int
    num_seeds: int
    cost_windows: tuple[int, ...]
    num_repeats: int


FULL = Plan(400, 600, 12, 4, (2, 4, 8, 16, 32, 64), 7)
QUICK = Plan(60, 60, 3, 2, (), 3)


class Progress:
    """Counts finished work over threads; raises CancelledError in every thread once one has failed."""

    def __init__(self, show: Callable[[str, float], None], total: float):
        self._show, self._total, self._done = show, total, 0.0
        self._lock, self.stop = threading.Lock(), threading.Event()

    def __call__(self, what: str, done: float = 0.0) -> None:
        """Says what runs now, and that `done` units of work have been finished before it."""
        if self.stop.is_set():
            raise CancelledError
        with self._lock:
            self._done += done
            self._show(what, min(1.0, self._done / self._total))


def in_parallel(progress: Progress, run: Callable, arguments: list[tuple]) -> list[Any]:
    """`run(*a)` for every a, two at a time: most of the time is compilation, which uses one core each."""
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(run, *argument) for argument in arguments]
        try:
            return [future.result() for future in futures]
        except BaseException:
            progress.stop.set()
            for future in futures:
                future.cancel()
            raise


def over_cores(tree: Any, axis: int) -> Any:
    """Cuts `axis`, the batch, over all devices; the programs that read it then run on all of them."""
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec(*[None] * axis, "batch")
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, spec))


class Model(NamedTuple):
    """A cell on tokens with its fresh parameters, one for each seed, and a carry."""

    name: str
    cell: Cell
    seeds: list[Params]
    carry: Carry


def build(name: str, hidden_size: int, batch_size: int, task: tasks.Text, seed: int, num_seeds: int) -> Model:
    """Draws the parameters one after another: QR decompositions side by side can deadlock XLA's thread pool."""
    size = len(task.vocabulary)
    cell = tasks.on_tokens(cells.with_linear_readout(getattr(cells, name)(size, hidden_size), size), size)
    key, init = jax.random.key(seed), jax.jit(cell.init)
    seeds = [jax.block_until_ready(init(jax.random.fold_in(key, i))) for i in range(num_seeds)]
    return Model(name, cell, seeds, over_cores(cell.initial_carry((batch_size,)), 0))


def _optimizer() -> optax.GradientTransformation:
    return optax.chain(clipping.clip_by_global_norm(1.0), optax.adam(1.5e-3))


def _take(batches: Any, start: int, count: int) -> Any:
    """`count` batches in reading order, from the beginning again after the last."""
    index = (start + np.arange(count)) % batches.xs.shape[0]
    return jax.tree.map(lambda a: a[index], batches)


class Trained(NamedTuple):
    """Trained parameters, and what held-out text says of the gradient before and after."""

    params: Params
    batch: Any
    before: Diagnosis
    after: Diagnosis


def train_and_diagnose(model: Model, task: tasks.Text, plan: Plan, progress: Progress) -> Trained:
    """Trains with full BPTT from the first seed."""
    progress(f"{model.name}: train, and go back lag by lag")
    batch = jax.tree.map(lambda a: a[0], task.heldout)
    look = jax.jit(partial(diagnose, model.cell.step, tasks.cross_entropy, measure=False))
    run = jax.jit(partial(train, full_bptt(model.cell.step, tasks.cross_entropy), _optimizer()))
    trained, _ = run(model.seeds[0], model.carry, _take(task.train, 0, plan.reach_updates))
    before, after = (look(params, model.carry, batch) for params in (model.seeds[0], trained))
    jax.block_until_ready((before, after))
    progress(f"{model.name}: trained", 2)
    return Trained(trained, batch, before, after)


def reach(name: str, stage: str, found: Diagnosis) -> dict[str, Any]:
    """One curve of the picture of norms by lag."""
    norms, last = np.asarray(found.profile.cotangent_norms), int(found.reach)
    return {
        "cell": name,
        "stage": stage,
        "norms": norms,
        "half_life": float(found.half_life),
        "reach": last if last < len(norms) else None,
        "verdict": found.verdict,
    }


def windows(model: Model, trained: Trained, plan: Plan, progress: Progress) -> dict[str, Any]:
    """Error by window of a trained model, with the cost of a few windows and of those recommended."""
    progress(f"{model.name}: time and memory of windows")
    curve, found = trained.after.curve, trained.after
    costs = _costs(model, trained, plan)
    progress(f"{model.name}: measured", 1)

    def part(error, cosine, recommended):
        chosen = {f"{tolerance:g}": int(w) or None for tolerance, w in zip(TOLERANCES, recommended, strict=True)}
        return {"relative_error": error, "cosine": cosine, "recommended": chosen}

    return {
        "cell": model.name,
        "windows": curve.windows,
        "sliding": part(curve.relative_error, curve.cosine, found.sliding_window),
        "block": part(curve.block_relative_error, curve.block_cosine, found.block_window),
        "costs": costs,
    }


def _costs(model: Model, trained: Trained, plan: Plan) -> list[dict[str, Any]]:
    step, loss, found = model.cell.step, tasks.cross_entropy, trained.after
    sizes = [w for w in plan.cost_windows if w < found.num_steps]
    estimators = {("full", found.num_steps): full_bptt(step, loss)}
    for window in sorted({*sizes, *map(int, found.block_window)} - {0, found.num_steps}):
        estimators["block", window] = fresh_blocks(truncated_bptt(step, loss, window=window), window)
    for window in sorted({*sizes, *map(int, found.sliding_window)} - {0}):
        estimators["sliding", window] = truncated_bptt(step, loss, window=window, stride=1)
    # On one device, whatever --cores says: the numbers of two reports stay comparable.
    where = jax.device_put((trained.params, model.carry, trained.batch), jax.devices()[0])
    named = {f"{kind} {window}": estimator for (kind, window), estimator in estimators.items()}
    cost = measure_cost(named, *where, num_repeats=plan.num_repeats)
    columns = zip(estimators, cost.median_seconds, cost.spread_seconds, cost.temporary_bytes, strict=True)
    return [
        {"strategy": kind, "window": window, "seconds": seconds, "seconds_spread": spread, "temporary_bytes": size}
        for (kind, window), seconds, spread, size in columns
    ]


def learning(model: Model, task: tasks.Text, plan: Plan, settings: Any, progress: Progress) -> dict[str, Any]:
    """Held-out perplexity of three strategies from the same starts on the same characters."""
    step, loss = model.cell.step, tasks.cross_entropy
    num_steps, batch_size = task.train.xs.shape[1:]
    strategies = [
        ("full", full_bptt(step, loss), f"all {num_steps} steps"),
        ("fixed", truncated_bptt(step, loss, window=settings.window), f"blocks of {settings.window} steps"),
        (
            "randomized",
            randomized_bptt(step, loss, keep_prob=settings.keep_prob),
            f"each crossing kept with probability {settings.keep_prob:g}",
        ),
    ]
    chunk = max(1, plan.learning_updates // plan.num_evaluations)
    evaluate_seeds = jax.jit(jax.vmap(partial(evaluate, step, loss), in_axes=(0, None, None)))
    optimizer, key = _optimizer(), jax.random.key(settings.seed)

    def run(kind, estimator, detail):
        progress(f"{model.name}: learn with {kind} BPTT, {plan.num_seeds} seeds")
        states = [estimator.init(p, model.carry, _first(task), key=jax.random.fold_in(key, i)) for i, p in seeds]
        running = _stack([(p, state, optimizer.init(p)) for (_, p), state in zip(seeds, states, strict=True)])
        advance = jax.jit(jax.vmap(partial(_advance, estimator, optimizer), in_axes=(0, None)))
        curve = [np.exp(evaluate_seeds(running[0], model.carry, task.heldout))]
        for i in range(plan.num_evaluations):
            running = advance(running, _take(task.train, i * chunk, chunk))
            curve.append(np.exp(evaluate_seeds(running[0], model.carry, task.heldout)))
            progress(f"{model.name}: learn with {kind} BPTT, {plan.num_seeds} seeds", 2 / plan.num_evaluations)
        final = curve[-1]
        mean, deviation = float(np.mean(final)), float(np.std(final, ddof=1))
        return {"name": kind, "detail": detail, "perplexity": curve, "final_mean": mean, "final_std": deviation}

    seeds = list(enumerate(model.seeds))
    return {
        "cell": model.name,
        "batch_size": batch_size,
        "num_steps": num_steps,
        "num_seeds": plan.num_seeds,
        "characters_read": [chunk * num_steps * batch_size * i for i in range(plan.num_evaluations + 1)],
        "strategies": in_parallel(progress, run, strategies),
    }


def _first(task: tasks.Text) -> Any:
    return jax.tree.map(lambda a: a[0], task.train)


def _stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *trees)


def _advance(estimator, optimizer, running, batches):
    params, state, opt_state = running
    params, history = train(estimator, optimizer, params, None, batches, state=state, opt_state=opt_state)
    return params, history.state, history.opt_state
