"""A study on one batch: its examples are divided into those to train on, to choose by, to judge by.

Training draws batches of the same size from its examples, with replacement.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbptt.arrays import align_leading
from jbptt.batch_axes import are_independent, first_step
from jbptt.problem import check_problem
from jbptt.starts import start_of
from jbptt.types import Batch, Carry, Loss, Params, Step

FEWEST = 10
REMEDY = (
    "return a dict instead: step, loss, params, carry and batches, leaves [N, T, ...] or a "
    "function key -> Batch, as jbptt.learning_study takes them"
)


def divided(step: Step, loss: Loss, params: Params, carry: Carry, batch: Batch) -> dict[str, Any]:
    """`batches` and `heldout` for `learning_study`, from one batch `[T, B, ...]`.

    A fifth of the examples, drawn, chooses learning rates, a fifth judges; both are repeated to B
    rows and weigh as much as they are many.

    Raises:
      ValueError: fewer than 10 examples, examples that depend on each other, or that start from
        different carries.
    """
    _, batch_shape, *_ = check_problem(step, loss, params, carry, batch)
    if len(batch_shape) != 1 or batch_shape[0] < FEWEST:
        raise ValueError(
            f"one batch of shape {batch_shape} has too few examples to hold some out, wanted "
            f"{FEWEST} at least along one axis; {REMEDY}"
        )
    (size,) = batch_shape
    start = start_of(carry, params)
    if not are_independent(first_step(step, loss, params, start, batch), batch_shape, True):
        raise ValueError(f"the examples of the batch depend on each other; {REMEDY}")
    for leaf in jax.tree.leaves(start):
        leaf = np.asarray(leaf)
        if leaf.shape[:1] == batch_shape and not (leaf == leaf[:1]).all():
            raise ValueError(f"the examples of the batch start from different carries; {REMEDY}")
    away = size // 5
    num_train = size - 2 * away

    def chosen(rows: jax.Array, shares: jax.Array) -> Batch:
        """These rows of the batch, each counted by its share."""

        def take(leaf):
            return leaf[:, rows] if jnp.shape(leaf)[1:2] == batch_shape else leaf

        picked = jax.tree.map(take, batch)
        given = 1.0 if picked.weights is None else align_leading(jnp.asarray(picked.weights), 2)
        num_steps = jax.tree.leaves(batch)[0].shape[0]
        return picked._replace(weights=jnp.broadcast_to(given * shares, (num_steps, size)))

    order = np.random.default_rng(0).permutation(size)  # they may be sorted

    def repeated(first: int) -> Batch:
        places = first + np.arange(size) % away
        return chosen(jnp.asarray(order[places]), jnp.asarray(1 / np.bincount(places)[places]))

    def draw(key: jax.Array) -> Batch:
        places = jax.random.randint(key, (size,), 0, num_train)
        return chosen(jnp.asarray(order)[places], jnp.ones(size))

    heldout = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), repeated(num_train), repeated(num_train + away)
    )
    return {"batches": draw, "heldout": heldout}


def words_of(num_steps: int, size: int) -> str:
    """What a study on one batch reads."""
    away = size // 5
    return (
        f"{num_steps} steps; {size - 2 * away} of {size} examples are trained on, drawn with "
        f"replacement; {away} choose rates and checkpoints, {away} judge"
    )
