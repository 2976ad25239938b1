"""The loss of the best constant prediction: below it, a model has learned from its inputs."""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from jbptt.arrays import is_inexact, weighted_mean
from jbptt.losses import weighted_losses, where_counted
from jbptt.types import Batch, Loss, PyTree

NUM_ITERATIONS = 100


def best_constant_loss(
    loss: Loss, y: PyTree, batch_shape: tuple[int, ...], batches: Batch
) -> jax.Array:
    """The lowest mean loss that one output, the same for all steps and examples, has.

    The mean for a squared error, the frequencies for a cross-entropy; found by L-BFGS from zeros,
    which is exact for a convex loss. NaN where an output is no floating-point number.

    Args:
      loss: per example.
      y: the shapes of one step's output, which begin with the batch shape.
      batch_shape: of the losses.
      batches: leaves `[M, T, ...]`.
    """
    if not all(map(is_inexact, jax.tree.leaves(y))):
        return jnp.full((), jnp.nan)
    front = len(batch_shape)

    def own(leaf):
        """Without the examples, where a leaf has them."""
        shared = leaf.shape[:front] == batch_shape
        return jnp.zeros(leaf.shape[front:] if shared else leaf.shape, leaf.dtype)

    def mean(constant):
        def everywhere(leaf, value):
            return jnp.broadcast_to(value, (num_steps, *leaf.shape))

        num_steps = jax.tree.leaves(batches)[0].shape[1]
        ys = jax.tree.map(everywhere, y, constant)
        totals = jax.lax.map(partial(weighted_losses, where_counted(loss), ys), batches)
        values, (weights, _) = totals
        return weighted_mean(values.sum(), weights.sum())

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(mean)

    def body(running, _):
        constant, state = running
        value, grads = value_and_grad(constant, state=state)
        updates, state = solver.update(
            grads, state, constant, value=value, grad=grads, value_fn=mean
        )
        return (optax.apply_updates(constant, updates), state), value

    constant = jax.tree.map(own, y)
    _, values = jax.lax.scan(body, (constant, solver.init(constant)), length=NUM_ITERATIONS)
    return jnp.nanmin(values)
