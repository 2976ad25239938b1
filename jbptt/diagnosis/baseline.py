"""What predicting without looking would cost: whether a model has learnt anything yet."""

import jax
import jax.numpy as jnp

from jbptt.arrays import align_leading, is_inexact, one_if_zero, weighted_mean, widened
from jbptt.losses import weighted_losses
from jbptt.problem import Problem
from jbptt.types import PyTree

LEARNT = 0.05
"""A loss so much below a constant prediction's, relative to it, is that of a trained model."""


def is_trained(loss: float, constant: float) -> bool:
    """Whether a loss is clearly below that of a constant prediction; False if either is NaN."""
    return loss < constant - LEARNT * abs(constant)


def is_untrained(loss: float, constant: float) -> bool:
    """Whether it is not; False, too, if either is NaN."""
    return loss >= constant - LEARNT * abs(constant)


def constant_loss(problem: Problem, outputs: PyTree) -> jax.Array:
    """The mean loss where every prediction is the mean of all that count; a scalar.

    A model whose loss is no smaller tells nothing of its inputs: it is untrained, or there is
    nothing to learn. NaN where a prediction is no floating-point number, and has no mean. Costs one
    evaluation of readout and losses.

    Args:
      problem: the recurrence and its losses.
      outputs: of the core, `[T, ...]`.
    """
    ys = jax.vmap(lambda output: problem.parts.readout(problem.params, output))(outputs)
    counts = (problem.loss_weights() != 0).astype(float)
    if not all(map(is_inexact, jax.tree.leaves(ys))):
        return jnp.full((), jnp.nan, counts.dtype)

    def mean(leaf):
        """Over steps, and over examples where the prediction has their axes."""
        shared = leaf.shape[: counts.ndim] == counts.shape
        each = counts if shared else jnp.sum(counts, axis=tuple(range(1, counts.ndim)))
        each, axes = align_leading(each, leaf.ndim), tuple(range(each.ndim))
        wide = widened(jnp.where(each > 0, leaf, 0))
        total = jnp.sum(wide * each.astype(wide.dtype), axis=axes, keepdims=True)
        mean = total / one_if_zero(jnp.sum(each)).astype(wide.dtype)
        return jnp.broadcast_to(mean.astype(leaf.dtype), leaf.shape)

    value, (weight, _) = weighted_losses(problem.parts.loss, jax.tree.map(mean, ys), problem.batch)
    return weighted_mean(value, weight)
