"""`learning_study`: with which window should I train?"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jbptt import validation
from jbptt.analysis.costs import measure_cost
from jbptt.arrays import is_key
from jbptt.executables import is_traced
from jbptt.learning.constants import best_constant_loss
from jbptt.learning.lessons import Lessons, lessons_of
from jbptt.learning.rounds import train_all
from jbptt.learning.study_result import LearningStudy
from jbptt.learning.trainings import Trainings, usual_optimizer
from jbptt.learning.ways import ways_of
from jbptt.problem import check_problem
from jbptt.starts import start_of
from jbptt.sweeps.sweeping import sweep
from jbptt.types import Batch, Estimator, Loss, Step

RATES = (1e-3, 3e-3, 1e-2)
FACTOR = 10**0.5
MARGIN = 0.02
NUM_REPEATS = 7
COSTS = "costs.json"


def learning_study(
    step: Step,
    loss: Loss,
    params: Any,
    carry: Any,
    batches: Batch | Callable[[jax.Array], Batch],
    heldout: Batch | None = None,
    *,
    stream: bool = False,
    windows: Sequence[int] | None = None,
    sliding: Sequence[int] | None = None,
    keep_probs: Sequence[float] | None = None,
    estimators: Mapping[str, Estimator] | None = None,
    learning_rates: Sequence[float] = RATES,
    extend: bool = True,
    seeds: int = 5,
    num_updates: int = 500,
    num_evals: int = 20,
    optimizer: Callable[[Any], Any] = usual_optimizer,
    key: jax.Array | None = None,
    store: str | Path | None = None,
    progress: bool = True,
    **how: Any,
) -> LearningStudy:
    """With which window should I train, and what do I gain or lose?

    Trains with full BPTT, blocks, sliding windows and random cuts, each at its own learning rate,
    from several seeds, and compares the losses on data that no training read. All ways make one
    update for each batch, so that only the gradient differs. Then the same is asked for equal
    computing time: each way is looked at after the updates that it makes while the fastest makes
    all of its own.

    A training is judged by the checkpoint with the lowest validation loss so far, the start
    included. Learning rates are chosen by the mean validation loss; a seed is judged at the rate
    that the other seeds chose. Differences are paired over seeds; intervals hold for all pairs of
    ways together in 95 % of studies (t, Bonferroni). May be taken: every way that is not shown to
    be worse than the best and is within one standard error of it, or nearer than 2 % of what
    training gains; of those the cheapest is chosen.

    Costs K · R · S trainings (K ways, R rates at first, S seeds), and S more for each further rate;
    one compilation for full BPTT, blocks and random cuts together, one for each other way. Their
    updates are timed one at a time.

    Args:
      step: `(params, carry, x) -> (carry, y)`.
      loss: `(y, target) -> [*batch]`.
      params: where to start; or a function of a key that draws parameters, one set for each seed.
      carry: what enters a first step: arrays, or a function of the parameters.
      batches: leaves `[N, T, ...]`, read again and again; or a function `key -> Batch` that draws
        one `[T, ...]`, a new one for every update.
      heldout: leaves `[M, T, ...]` that training does not read, M ≥ 2: the first half chooses
        learning rates and checkpoints, the second half judges. None: the last fifth of the batches
        is kept back, or 16 are drawn.
      stream: whether each batch goes on where the one before ended, as in a text: the carry goes on
        too. Else `carry` enters every batch, and their order is drawn.
      windows: steps per block; None: 2, 8, 32, … below T.
      sliding: steps of sliding windows; None: the block nearest to √T.
      keep_probs: of random cuts; None: cut as often as those blocks.
      estimators: further ways by name.
      learning_rates: that every way is tried with.
      extend: whether a way whose best rate is the first or the last gets more, √10 times as far
        each, until its best is bracketed (5 more at most).
      seeds: how many, ≥ 2; 5 or more tell more.
      num_updates: of each training; rounded up to a multiple of num_evals.
      num_evals: evaluations of each training.
      optimizer: `learning_rate -> optax transformation`; clipping to a norm of 1, then Adam, if not
        given. The rate is traced.
      key: of all randomness; None: `jax.random.key(0)`.
      store: a folder that keeps every training; the same call again goes on where this one stopped.
      progress: whether to say on standard error what is being done.
      **how: further arguments of `sweep`: executor, mesh, memory_budget, version, width, changed.

    Raises:
      ValueError: what `lessons_of`, `ways_of` and `sweep` refuse; seeds that would all be the same
        training; rates that are not > 0.
      SweepStopped: Ctrl-C; with a store the same call goes on.
    """
    key = jax.random.key(0) if key is None else key
    _check(key, learning_rates, how)
    seeds = validation.check_positive_integer("seeds", seeds, smallest=2)
    num_evals = validation.check_positive_integer("num_evals", num_evals)
    num_updates = validation.check_positive_integer("num_updates", num_updates)
    eval_every = -(-num_updates // num_evals)
    for_heldout, for_seeds = jax.random.split(key)
    lessons = lessons_of(batches, heldout, stream, for_heldout)
    if (
        not callable(params)
        and not callable(batches)
        and len(jax.tree.leaves(lessons.train)[0]) < 2
    ):
        raise ValueError(
            "seeds would all be the same training: one start and one batch; pass params as a "
            "function of a key, or more batches"
        )
    trainings = Trainings(
        step, loss, params, carry, lessons, (), optimizer, eval_every * num_evals, eval_every,
        for_seeds,
    )  # fmt: skip
    start, first = trainings.start(trainings.keys(0)[0]), lessons.first
    num_steps, batch_shape, *_ = check_problem(step, loss, start, carry, first)
    ways = ways_of(
        step, loss, num_steps, windows=windows, sliding=sliding, keep_probs=keep_probs,
        estimators=estimators,
    )  # fmt: skip
    trainings = replace(trainings, ways=ways)
    tell = partial(_tell, progress)
    folder = None if store is None else Path(store)
    tell(f"{len(ways)} ways: {', '.join(way.name for way in ways)}")
    seconds, sizes = _costs(trainings, start, first, folder, tell)
    version = json.dumps(
        [how.pop("version", None), trainings.num_updates, eval_every, [way.name for way in ways]]
    )
    ask = partial(_sweep, for_seeds, folder, {"version": version, "progress": progress} | how)
    trained, wanted = train_all(
        trainings, tuple(map(float, learning_rates)), seeds, FACTOR if extend else None, ask, tell
    )
    entering = start_of(carry, start)
    _, y = jax.eval_shape(step, start, entering, jax.tree.map(lambda a: a[0], first.xs))
    constant = float(jax.jit(partial(best_constant_loss, loss, y, batch_shape))(lessons.test))
    curves = trained.curves
    study = LearningStudy(
        tuple(way.name for way in ways),
        curves,
        eval_every * np.arange(num_evals + 1),
        seconds,
        sizes,
        trained.output("error_at_start"),
        trained.output("error_at_end"),
        constant,
        0.0,
        tuple(dict.fromkeys(ways[way].name for way, _ in wanted)),
        _data_words(lessons, num_steps, batch_shape),
        "start and data" if callable(params) else "data alone",
    )
    return study.with_margin(MARGIN)


def _check(key: Any, learning_rates: Any, how: dict[str, Any]) -> None:
    if not (isinstance(key, jax.Array) and is_key(key) and key.shape == ()) or is_traced(key):
        raise ValueError(f"key must be one key, as jax.random.key(0), got {key!r}")
    if isinstance(learning_rates, int | float) or not list(learning_rates):
        raise ValueError(
            f"learning_rates must be a list of one rate at least, got {learning_rates!r}; write "
            "[1e-3, 3e-3, 1e-2]"
        )
    for rate in learning_rates:
        validation.check_above("learning_rates", rate, 0, "nothing would be learned")
    allowed = {"executor", "mesh", "memory_budget", "version", "width", "chunk", "changed"}
    if unknown := sorted(set(how) - allowed):
        raise TypeError(f"learning_study got an unexpected argument {unknown[0]!r}")


def _tell(shown: bool, words: str) -> None:
    if shown:
        print(f"jbptt: {words}", file=sys.stderr, flush=True)


def _sweep(
    key: jax.Array, folder: Path | None, options: dict, number: int, run_fn: Callable, points: dict
) -> Any:
    """One round of trainings, in a store of its own."""
    store = None if folder is None else folder / f"round-{number}"
    return sweep(run_fn, points, key=key, static="program", store=store, **options)


def _costs(
    trainings: Trainings, start: Any, first: Batch, folder: Path | None, tell: Callable
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds and temporary bytes of one update of each way; those of the store where it has them.

    They decide what equal time is: a study that goes on must not decide anew.
    """
    names = [way.name for way in trainings.ways]
    kept = None if folder is None else folder / COSTS
    if kept is not None and kept.is_file():
        found = json.loads(kept.read_text())
        if found["ways"] == names:
            return np.array(found["seconds"]), np.array(found["temporary_bytes"], float)
    tell("time one update of each way")
    estimators = {way.name: way.estimator for way in trainings.ways}
    cost = measure_cost(
        estimators, start, trainings.carry, first, num_repeats=NUM_REPEATS,
        key=trainings.keys(0)[2],
    )  # fmt: skip
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        data = {
            "ways": names,
            "seconds": cost.median_seconds.tolist(),
            "temporary_bytes": cost.temporary_bytes.tolist(),
        }
        kept.write_text(json.dumps(data))
    return cost.median_seconds, cost.temporary_bytes


def _data_words(lessons: Lessons, num_steps: int, batch_shape: tuple[int, ...]) -> str:
    examples = " × ".join(map(str, batch_shape)) or "1"
    heldout = [len(jax.tree.leaves(of)[0]) for of in (lessons.validation, lessons.test)]
    if callable(lessons.train):
        train = "a new batch for every update"
    else:
        kind = "in a stream" if lessons.stream else "in an order drawn for each seed"
        train = f"{len(jax.tree.leaves(lessons.train)[0])} batches {kind}"
    return (
        f"{num_steps} steps, {examples} examples; {train}; {heldout[0]} batches choose rates and "
        f"checkpoints, {heldout[1]} judge"
    )
