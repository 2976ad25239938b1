"""Small models on text: fresh, and trained."""

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jbptt import cells, clipping
from jbptt.cells import Cell
from jbptt.estimators import full_bptt
from jbptt.experiments import tasks
from jbptt.experiments.training import train
from jbptt.report.work import Effort, Progress, one_at_a_time
from jbptt.types import Carry, Params


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
