"""The strategies side by side: held-out perplexity from the same starts on the same characters."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jbptt.estimators import gated_bptt
from jbptt.experiments import tasks
from jbptt.experiments.training import mean_loss, train
from jbptt.experiments.treatments import cuts
from jbptt.report.measurements import Effort, Model, Progress, Trained, first, optimizer, take
from jbptt.types import Estimator, Params


class Learner(NamedTuple):
    """One model that learns. The strategy is data: one program trains them all.

    Attributes:
      window: steps per block, T for strategies without blocks.
      keep_prob: probability that a crossing is kept, 1 for strategies that draw nothing.
      params: the parameters.
      state: the estimator's state.
      opt_state: the optimizer's state.
    """

    window: jax.Array
    keep_prob: jax.Array
    params: Params
    state: Any
    opt_state: optax.OptState


def strategies(settings: Any) -> dict[str, tuple[int, float, str]]:
    """Window, keep probability and a description of each."""
    num_steps, keep_prob = settings.num_steps, settings.keep_prob
    return {
        "full": (num_steps, 1.0, f"all {num_steps} steps"),
        "fixed": (settings.window, 1.0, f"blocks of {settings.window} steps"),
        "randomized": (num_steps, keep_prob, f"each crossing kept with probability {keep_prob:g}"),
    }


def learn(
    model: Model, task: tasks.Text, effort: Effort, settings: Any, progress: Progress
) -> tuple[dict[str, Any], Trained]:
    """Trains every strategy from every seed; also what full BPTT from the first seed has become."""
    chosen = strategies(settings)
    what = f"{model.name}: learn with {len(chosen)} strategies, {effort.num_seeds} seeds each"
    progress(what)
    chunk = max(1, effort.num_updates // effort.num_evaluations)
    adam = optimizer(chunk * effort.num_evaluations)
    sharding = _share(len(chosen) * effort.num_seeds)
    runs = jax.device_put(_start(model, adam, task, settings.seed, chosen), sharding)
    advance, score = (
        _each_run(partial(function, model, adam), sharding) for function in (_advance, _score)
    )
    curve = [score(runs, task.heldout)]
    for i in range(effort.num_evaluations):
        runs = advance(runs, take(task.train, i * chunk, chunk))
        curve.append(score(runs, task.heldout))
        jax.block_until_ready(curve)
        progress(what, 3 * effort.num_seeds / effort.num_evaluations)
    perplexity = np.asarray(curve).reshape(len(curve), len(chosen), effort.num_seeds)
    numbers = {
        "cell": model.name,
        "batch_size": settings.batch_size,
        "num_steps": settings.num_steps,
        "num_seeds": effort.num_seeds,
        "characters_read": [
            chunk * settings.num_steps * settings.batch_size * i
            for i in range(effort.num_evaluations + 1)
        ],
        "strategies": [
            _summary(name, detail, perplexity[:, i])
            for i, (name, (*_, detail)) in enumerate(chosen.items())
        ],
    }
    params, carry = first((runs.params, runs.state.carry))
    return numbers, Trained(model, params, carry, first(task.heldout))


def _summary(name: str, detail: str, perplexity: np.ndarray) -> dict[str, Any]:
    final = perplexity[-1]
    deviation = float(np.std(final, ddof=1)) if len(final) > 1 else None
    return {
        "name": name,
        "detail": detail,
        "perplexity": perplexity,
        "final_mean": float(np.mean(final)),
        "final_std": deviation,
    }


def _share(num_runs: int) -> jax.sharding.NamedSharding:
    """An equal number of runs on each device."""
    num_devices = max(n for n in range(1, jax.device_count() + 1) if num_runs % n == 0)
    mesh = jax.make_mesh((num_devices,), ("run",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("run"))


def _each_run(function: Callable, sharding: jax.sharding.NamedSharding) -> Callable:
    """`function(learner, batches)` for learners with leaves `[num_runs, ...]`.

    Side by side on an accelerator; one after another on a CPU core, whose caches hold only one of
    them.
    """

    def on_device(runs, batches):
        if jax.default_backend() == "cpu":
            return jax.lax.map(partial(function, batches=batches), runs)
        return jax.vmap(partial(function, batches=batches))(runs)

    runs, everywhere = sharding.spec, jax.sharding.PartitionSpec()
    options = {
        "mesh": sharding.mesh,
        "in_specs": (runs, everywhere),
        "out_specs": runs,
        "check_vma": False,
    }
    return jax.jit(jax.shard_map(on_device, **options))


def strategy_estimator(model: Model, window: jax.Array, keep_prob: jax.Array) -> Estimator:
    """A strategy as gates."""
    gates_fn = partial(cuts, window=window, keep_prob=keep_prob)
    return gated_bptt(model.cell.step, tasks.cross_entropy, gates_fn=gates_fn)


def _start(
    model: Model, adam: optax.GradientTransformation, task: tasks.Text, seed: int, chosen: dict
) -> Learner:
    """All runs, strategy by strategy; the strategies share the seeds' parameters and keys."""

    def one(window, keep_prob, params, key):
        state = strategy_estimator(model, window, keep_prob).init(
            params, model.carry, first(task.train), key=key
        )
        return Learner(window, keep_prob, params, state, adam.init(params))

    key = jax.random.fold_in(jax.random.key(seed), 1)  # `make_model` draws from another
    starts = [
        (jnp.array(window), jnp.array(keep_prob), params, jax.random.fold_in(key, i))
        for window, keep_prob, _ in chosen.values()
        for i, params in enumerate(model.seeds)
    ]
    return jax.jit(jax.vmap(one))(*jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts))


def _advance(
    model: Model, adam: optax.GradientTransformation, learner: Learner, batches: Any
) -> Learner:
    estimator = strategy_estimator(model, learner.window, learner.keep_prob)
    params, history = train(
        estimator,
        adam,
        learner.params,
        None,
        batches,
        state=learner.state,
        opt_state=learner.opt_state,
    )
    return learner._replace(params=params, state=history.state, opt_state=history.opt_state)


def _score(
    model: Model, adam: optax.GradientTransformation, learner: Learner, batches: Any
) -> jax.Array:
    """Reads on from where training stands: from zeros, a trained network may be lost for good."""
    del adam
    return jnp.exp(
        mean_loss(
            model.cell.step, tasks.cross_entropy, learner.params, learner.state.carry, batches
        )
    )
