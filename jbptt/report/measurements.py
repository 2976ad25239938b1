"""What the study measures: models trained on text, their gradients, and what a window costs."""

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jbptt import cells, clipping
from jbptt.analysis.costs import measure_cost
from jbptt.analysis.lags import lag_profile, truncation_curve
from jbptt.cells import Cell
from jbptt.diagnosis.advice import TOLERANCES
from jbptt.diagnosis.decay import fit_decay
from jbptt.diagnosis.question import diagnose
from jbptt.diagnosis.result import VERDICTS, Diagnosis
from jbptt.estimators import full_bptt, truncated_bptt
from jbptt.experiments import tasks
from jbptt.experiments.training import train
from jbptt.types import Carry, Params


class Effort(NamedTuple):
    """How much work a report does.

    Attributes:
      num_updates: in the training of every model.
      num_evaluations: of held-out perplexity, spread over them.
      num_seeds: runs of each strategy.
      cost_windows: timed beside the recommended ones.
      cost_tolerances: how many of the recommended windows are timed, beginning with 10 % of error.
      windows_of_all_cells: or of the last one only; spectra too.
      num_repeats: timed updates of each.
      spectrum_steps: of the trajectory behind a Lyapunov spectrum.
      num_exponents: how many of its exponents, the leading ones.
      num_draws: of each random way to cut; 0 leaves the price of randomness out.
      remedies: whether the remedies are compared, which trains some hundred small networks.
    """

    num_updates: int
    num_evaluations: int
    num_seeds: int
    cost_windows: tuple[int, ...]
    cost_tolerances: int
    windows_of_all_cells: bool
    num_repeats: int
    spectrum_steps: int
    num_exponents: int
    num_draws: int
    remedies: bool

    def total_work(self, num_cells: int) -> float:
        """In the units in which the functions of this study report progress: some seconds each."""
        per_cell = (num_cells if self.windows_of_all_cells else 1) * (5 + len(self.cost_windows))
        return (
            num_cells
            + per_cell
            + 3 * self.num_seeds
            + 3
            + 4 * (self.num_draws > 0)
            + 8 * self.remedies
        )


FULL = Effort(600, 12, 4, (4, 16, 64), 2, True, 7, 1024, 64, 64, True)
QUICK = Effort(60, 3, 2, (), 1, False, 3, 256, 8, 0, False)


class Progress:
    """Counts finished work over threads; raises CancelledError in every thread once one has
    failed.
    """

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


def in_parallel(progress: Progress, jobs: list[Callable[[], Any]]) -> list[Any]:
    """The results of all jobs, two at a time: most of the time is compilation, and more threads
    would hinder it.
    """
    pool = ThreadPoolExecutor(2)
    futures = [pool.submit(job) for job in jobs]
    try:
        for future in as_completed(futures):  # the first that fails, not the first in order
            future.result()
    except BaseException as error:
        progress.stop.set()
        # What a job compiles takes seconds, for which Ctrl-C does not wait: it ends the process.
        pool.shutdown(wait=not isinstance(error, KeyboardInterrupt), cancel_futures=True)
        raise
    pool.shutdown()
    return [future.result() for future in futures]


one_at_a_time = threading.Lock()
"""Held while a program with QR decompositions runs: two of them side by side can deadlock XLA's
threads.
"""


class Model(NamedTuple):
    """A cell on tokens with its fresh parameters, one for each seed, and a carry."""

    name: str
    cell: Cell
    seeds: list[Params]
    carry: Carry


def make_model(name: str, settings: Any, task: tasks.Text, effort: Effort) -> Model:
    """Draws the parameters of all seeds."""
    size, key = len(task.vocabulary), jax.random.fold_in(jax.random.key(settings.seed), 0)
    make = getattr(cells, name)
    cell = tasks.on_tokens(cells.with_linear_readout(make(size, settings.hidden_size), size), size)
    init = jax.jit(cell.init).lower(key).compile()
    with one_at_a_time:
        seeds = [
            jax.block_until_ready(init(jax.random.fold_in(key, i))) for i in range(effort.num_seeds)
        ]
    return Model(name, cell, seeds, cell.initial_carry((settings.batch_size,)))


def optimizer(num_updates: int) -> optax.GradientTransformation:
    """Adam behind clipping. The learning rate falls to 0, so that no curve ends in the middle of a
    spike.
    """
    learning_rate = optax.cosine_decay_schedule(3e-3, num_updates)
    return optax.chain(clipping.clip_by_global_norm(1.0), optax.adam(learning_rate))


def take(batches: Any, start: int, count: int) -> Any:
    """`count` batches in reading order, from the beginning again after the last."""
    index = (start + np.arange(count)) % batches.xs.shape[0]
    return jax.tree.map(lambda a: a[index], batches)


def first(batches: Any) -> Any:
    """The first of what is stacked along the leading axis: a batch, or a run."""
    return jax.tree.map(lambda a: a[0], batches)


class Trained(NamedTuple):
    """A trained model, and the first batch of held-out text.

    `carry` is where training left it: a trained network may never find its way back from zeros.
    """

    model: Model
    params: Params
    carry: Carry
    batch: Any


def train_fully(
    model: Model, task: tasks.Text, effort: Effort, progress: Progress, device: Any
) -> Trained:
    """Trains with full BPTT from the first seed."""
    progress(f"{model.name}: train")
    run = jax.jit(
        partial(
            train, full_bptt(model.cell.step, tasks.cross_entropy), optimizer(effort.num_updates)
        )
    )
    start = jax.device_put(
        (model.seeds[0], model.carry, take(task.train, 0, effort.num_updates)), device
    )
    params, history = run(*start)
    return Trained(model, params, history.state.carry, first(task.heldout))


def reach(trained: Trained, progress: Progress, device: Any) -> list[dict[str, Any]]:
    """The curves of the picture of norms by lag, before and after training."""
    model = trained.model
    progress(f"{model.name}: go back lag by lag")

    @jax.jit
    def look(params, carry, batch):
        num_steps = batch.xs.shape[0]
        profile = lag_profile(
            model.cell.step, tasks.cross_entropy, params, carry, batch, max_lag=num_steps
        )
        return *profile, fit_decay(profile.cotangent_norms)

    def curve(stage, params, carry):
        norms, grad_norms, decay = jax.device_get(
            look(*jax.device_put((params, carry, trained.batch), device))
        )
        return {
            "cell": model.name,
            "stage": stage,
            "norms": norms,
            "grad_norms": grad_norms,
            "half_life": float(decay.half_life),
            "reach": int(decay.reach) if decay.reach < len(norms) else None,
            "verdict": VERDICTS[decay.verdict_index],
        }

    curves = [
        curve("before", model.seeds[0], model.carry),
        curve("after", trained.params, trained.carry),
    ]
    progress(f"{model.name}: went back", 1)
    return curves


def find_windows(trained: Trained, progress: Progress, device: Any) -> Diagnosis:
    """Which windows the trained model needs."""
    progress(f"{trained.model.name}: find its windows")
    look = jax.jit(partial(diagnose, trained.model.cell.step, tasks.cross_entropy, measure=False))
    found = jax.block_until_ready(
        look(*jax.device_put((trained.params, trained.carry, trained.batch), device))
    )
    progress(f"{trained.model.name}: windows found", 2)
    return found


def windows(
    trained: Trained, found: Diagnosis, effort: Effort, progress: Progress
) -> dict[str, Any]:
    """Error by window of a trained model, with the cost of a few windows and of those
    recommended.
    """
    progress(f"{trained.model.name}: time and memory of windows")
    costs = _costs(trained, found, effort)
    step, loss = trained.model.cell.step, tasks.cross_entropy
    curve = truncation_curve(
        step, loss, trained.params, trained.carry, trained.batch, max_window=found.num_steps
    )
    progress(f"{trained.model.name}: measured", 1 + len(effort.cost_windows))

    def part(error, cosine, recommended):
        chosen = {
            f"{tolerance:g}": int(w) or None
            for tolerance, w in zip(TOLERANCES, recommended, strict=True)
        }
        return {"relative_error": error, "cosine": cosine, "recommended": chosen}

    return {
        "cell": trained.model.name,
        "windows": curve.windows,
        "sliding": part(curve.relative_error, curve.cosine, found.sliding_window),
        "block": part(curve.block_relative_error, curve.block_cosine, found.block_window),
        "costs": costs,
    }


def _costs(trained: Trained, found: Diagnosis, effort: Effort) -> list[dict[str, Any]]:
    step, loss = trained.model.cell.step, tasks.cross_entropy
    sizes = [w for w in effort.cost_windows if w < found.num_steps]
    estimators = {("full", found.num_steps): full_bptt(step, loss)}
    for window in sorted(
        {*sizes, *map(int, found.block_window[: effort.cost_tolerances])} - {0, found.num_steps}
    ):
        estimators["block", window] = truncated_bptt(step, loss, window=window, streams=False)
    for window in sorted({*sizes, *map(int, found.sliding_window[: effort.cost_tolerances])} - {0}):
        estimators["sliding", window] = truncated_bptt(step, loss, window=window, stride=1)
    # On one device, whatever --cores says: the numbers of two reports stay comparable.
    where = jax.device_put((trained.params, trained.carry, trained.batch), jax.devices()[0])
    named = {f"{kind} {window}": estimator for (kind, window), estimator in estimators.items()}
    cost = measure_cost(named, *where, num_repeats=effort.num_repeats)
    columns = zip(
        estimators, cost.median_seconds, cost.spread_seconds, cost.temporary_bytes, strict=True
    )
    return [
        {
            "strategy": kind,
            "window": window,
            "seconds": seconds,
            "seconds_spread": spread,
            "temporary_bytes": size,
        }
        for (kind, window), seconds, spread, size in columns
    ]
