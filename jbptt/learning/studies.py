"""`learning_study`: with which window should I train?"""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbptt import validation
from jbptt.analysis.costs import measure_cost
from jbptt.arrays import is_key, widened
from jbptt.executables import is_traced
from jbptt.learning.constants import best_constant_loss
from jbptt.learning.lessons import Lessons, lessons_of
from jbptt.learning.rounds import train_all
from jbptt.learning.study_result import LearningStudy
from jbptt.learning.trainings import Trainings, draws_starts, usual_optimizer
from jbptt.learning.ways import listed, ways_of
from jbptt.problem import check_problem
from jbptt.starts import start_of
from jbptt.sweeps.sweeping import sweep
from jbptt.types import Batch, Estimator, Loss, Step

RATES = (1e-3, 3e-3, 1e-2)
FACTOR = 10**0.5
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
    included. Each way has the learning rate with the lowest mean validation loss. Differences are
    paired over seeds; intervals are Student's t at 95 % for all pairs of ways together
    (Bonferroni). May be taken: every way that is not shown to be worse than another and is within
    one standard error of the best, or nearer than 2 % of what training gains; of those the cheapest
    is chosen.

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
        learning rates and checkpoints, the second half judges. None: a fifth of the batches is kept
        back, or 16 are drawn: where `batches` draws from a fixed set, training reads that too.
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
      store: a folder that keeps every training; the same call again goes on where this one stopped,
        and another one (data, start, loss, optimizer, ways, budget) is refused.
      progress: whether to say on standard error what is being done.
      **how: further arguments of `sweep`: executor, mesh, memory_budget, version, width, changed.

    Raises:
      ValueError: what `lessons_of`, `ways_of` and `sweep` refuse; seeds that would all be the same
        training; rates that are not > 0.
      SweepStopped: Ctrl-C; with a store the same call goes on.
    """
    key = jax.random.key(0) if key is None else key
    learning_rates = listed("learning_rates", learning_rates)
    _check(key, learning_rates, optimizer, how)
    seeds = validation.check_positive_integer("seeds", seeds, smallest=2)
    num_evals = validation.check_positive_integer("num_evals", num_evals)
    num_updates = validation.check_positive_integer("num_updates", num_updates)
    eval_every = -(-num_updates // num_evals)
    for_heldout, for_seeds = jax.random.split(key)
    lessons = lessons_of(batches, heldout, stream, for_heldout)
    _check_seeds(seeds, params, lessons)
    first = lessons.first
    start = params(for_seeds) if draws_starts(params) else params
    num_steps, batch_shape, *_ = check_problem(step, loss, start, carry, first)
    ways = ways_of(
        step,
        loss,
        num_steps,
        windows=windows,
        sliding=sliding,
        keep_probs=keep_probs,
        estimators=estimators,
    )
    trainings = Trainings(
        step,
        loss,
        params,
        carry,
        lessons,
        ways,
        optimizer,
        eval_every * num_evals,
        eval_every,
        for_seeds,
    )
    mark = mark_of(trainings)
    tell = partial(_tell, progress)
    folder = None if store is None else Path(store)
    tell(f"{len(ways)} ways: {', '.join(way.name for way in ways)}")
    seconds, sizes = _costs(trainings, first, folder, mark, tell)
    version = f"{how.pop('version', None)}, {mark}"
    ask = partial(_sweep, for_seeds, folder, {"version": version, "progress": progress} | how)
    trained, wanted = train_all(trainings, learning_rates, seeds, FACTOR, extend, ask, tell)
    entering = start_of(carry, start)
    _, y = jax.eval_shape(step, start, entering, jax.tree.map(lambda a: a[0], first.xs))
    constant = float(jax.jit(partial(best_constant_loss, loss, y, batch_shape))(lessons.test))
    study = LearningStudy(
        tuple(way.name for way in ways),
        trained.curves,
        eval_every * np.arange(num_evals + 1),
        seconds,
        sizes,
        trained.output("error_at_start"),
        trained.output("error_at_end"),
        constant,
        0.0,
        tuple(dict.fromkeys(ways[way].name for way, _ in wanted)),
        _data_words(lessons, num_steps, batch_shape),
        "start and data" if draws_starts(params) else "data alone",
    )
    return study.with_margin()


def _check_seeds(seeds: int, params: Any, lessons: Lessons) -> None:
    """A ValueError where two seeds would be the same training."""
    number = lessons.num_batches
    if draws_starts(params) or number is None:
        return
    if number < 2 or (lessons.stream and seeds > number):
        raise ValueError(
            f"{seeds} seeds would be the same training in part: one start, and {number} batches to "
            "train on; pass params as a function of a key, more batches, or fewer seeds"
        )


def mark_of(trainings: Trainings) -> str:
    """What tells two studies apart: ways, budget, data, the first seed's start and its losses, and
    what the optimizer does to it.

    Raises:
      ValueError: a loss on what is held out is not finite before training.
    """
    # As one program each: outside of jit every operation of a start or an update is one.
    start = jax.jit(lambda: trainings.start(trainings.keys(0)[0]))()
    losses = jax.jit(lambda: trainings.losses(start, trainings.carry))()
    for name, value in losses.items():
        if not np.isfinite(value):
            raise ValueError(
                f"the {name} loss is {float(value)} before training; look for what is not finite "
                "by jbptt.find_nonfinite, or in heldout"
            )

    @jax.jit
    def moved(start):
        """How far each leaf moves for a gradient of ones."""
        ones = jax.tree.map(jnp.ones_like, jax.tree.map(widened, start))
        optimizer = trainings.optimizer(1e-2)
        updates, _ = optimizer.update(ones, optimizer.init(ones), ones)
        return [jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(updates)]

    lessons = trainings.lessons
    data = lessons.first if callable(lessons.train) else lessons.train
    mark = hashlib.sha256()
    for leaf in jax.tree.leaves((data, lessons.validation, lessons.test, start)):
        leaf = jax.random.key_data(leaf) if is_key(leaf) else leaf
        mark.update(f"{np.shape(leaf)}".encode() + np.asarray(leaf).tobytes())
    # Rounded, since another machine may add up in another order.
    rounded = [f"{float(value):.3g}" for value in losses.values()]
    rounded += [f"{float(size):.3g}" for size in moved(start)]
    settings = [way.name for way in trainings.ways], trainings.num_updates, trainings.eval_every
    mark.update(f"{settings} {lessons.stream} {rounded}".encode())
    return mark.hexdigest()[:16]


def _check(key: Any, learning_rates: tuple, optimizer: Any, how: dict[str, Any]) -> None:
    if not (isinstance(key, jax.Array) and is_key(key) and key.shape == ()) or is_traced(key):
        raise ValueError(f"key must be one key, as jax.random.key(0), got {key!r}")
    if not learning_rates:
        raise ValueError("learning_rates must hold one rate at least; write [1e-3, 3e-3, 1e-2]")
    for rate in learning_rates:
        validation.check_above("learning_rates", rate, 0, "nothing would be learned")
    if not callable(optimizer) or not hasattr(optimizer(learning_rates[0]), "update"):
        raise ValueError(
            "optimizer must be a function of a learning rate that returns an optax "
            f"transformation, got {optimizer!r}; write lambda rate: optax.adam(rate)"
        )
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
    trainings: Trainings, first: Batch, folder: Path | None, mark: str, tell: Callable
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds and temporary bytes of one update of each way; those of the store where it has them.

    They decide what equal time is: a study that goes on must not decide anew.
    """
    kept = None if folder is None else folder / COSTS
    if kept is not None and kept.is_file():
        found = json.loads(kept.read_text())
        if found["mark"] == mark:
            return np.array(found["seconds"]), np.array(found["temporary_bytes"], float)
    tell("time one update of each way")
    estimators = {way.name: way.estimator for way in trainings.ways}
    start_key, _, draws = trainings.keys(0)
    cost = measure_cost(
        estimators,
        trainings.start(start_key),
        trainings.carry,
        first,
        num_repeats=NUM_REPEATS,
        key=draws,
    )
    seconds, sizes = cost.median_seconds, cost.temporary_bytes
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        data = {"mark": mark, "seconds": seconds.tolist(), "temporary_bytes": sizes.tolist()}
        beside = kept.with_suffix(".new")
        beside.write_text(json.dumps(data))
        beside.replace(kept)  # whole, or not at all
    return seconds, sizes


def _data_words(lessons: Lessons, num_steps: int, batch_shape: tuple[int, ...]) -> str:
    examples = " × ".join(map(str, batch_shape)) or "1"
    heldout = [len(jax.tree.leaves(of)[0]) for of in (lessons.validation, lessons.test)]
    if callable(lessons.train):
        train = "a new batch for every update"
    else:
        kind = "in a stream" if lessons.stream else "in an order drawn for each seed"
        train = f"{len(jax.tree.leaves(lessons.train)[0])} batches {kind}"
    chooses, judges = (f"{n} batch{'es' * (n > 1)}" for n in heldout)
    return (
        f"{num_steps} steps, {examples} example{'s' * (examples != '1')}; {train}; held out: "
        f"{chooses} to choose rates and checkpoints by, {judges} to judge by"
    )
