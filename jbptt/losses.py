"""The losses of a batch: which steps count, how much, and their weighted sum."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jbptt.arrays import align_leading, widened, widened_dtype, zero_masked
from jbptt.types import Batch, Loss, PyTree


def batch_steps(batch: Batch) -> int:
    """T of a batch that has passed the border."""
    return jax.tree.leaves(batch)[0].shape[0]


def counted_steps(batch: Batch) -> jax.Array | None:
    """Where a loss counts: unmasked and of a weight other than 0; None where all do."""
    nonzero = None if batch.weights is None else jnp.asarray(batch.weights) != 0
    if batch.mask is None or nonzero is None:
        return nonzero if batch.mask is None else batch.mask
    ndim = max(batch.mask.ndim, nonzero.ndim)
    return align_leading(batch.mask, ndim) & align_leading(nonzero, ndim)


def where_counted(loss: Loss) -> Callable:
    """`(y, target, counted) -> (losses, aux)` of one step, 0 where not `counted`; None: all."""

    def counted_loss(y, target, counted):
        # Both sides of the loss are cleared: a NaN target times a zero weight is still NaN on the
        # way back.
        result = loss(zero_masked(counted, y), zero_masked(counted, target))
        value, aux = result if isinstance(result, tuple) else (result, None)
        return zero_masked(counted, value), zero_masked(counted, aux)

    return counted_loss


def step_losses(counted_loss: Callable, ys: PyTree, batch: Batch) -> tuple[jax.Array, PyTree]:
    """Losses `[S, *batch]` (0 where they do not count) and aux of all steps at once."""
    return jax.vmap(counted_loss, axis_size=batch_steps(batch))(
        ys, batch.targets, counted_steps(batch)
    )


def loss_weights(batch: Batch, losses: jax.Array) -> jax.Array:
    """`mask · weights`, broadcast from the left to the losses' shape `[S, *batch]`."""
    weights = jnp.ones_like(widened(losses))
    if batch.weights is not None:
        given = align_leading(jnp.asarray(batch.weights), losses.ndim)
        wide = widened_dtype(weights.dtype, given.dtype)
        weights = weights.astype(wide) * given.astype(wide)
    if batch.mask is not None:
        weights = jnp.where(align_leading(batch.mask, losses.ndim), weights, 0)
    return weights


def weighted_losses(
    counted_loss: Callable, ys: PyTree, batch: Batch
) -> tuple[jax.Array, tuple[jax.Array, PyTree]]:
    """`Σ w_t ℓ_t` and beside it `Σ w_t` and the weighted aux."""
    losses, aux = step_losses(counted_loss, ys, batch)
    weights = loss_weights(batch, losses)

    def total(values):
        w = align_leading(weights, values.ndim)
        wide = widened_dtype(values.dtype, w.dtype)
        return jnp.sum(
            jnp.where(w == 0, 0, w.astype(wide) * values.astype(wide)),
            axis=tuple(range(losses.ndim)),
        )

    return total(losses), (jnp.sum(weights), jax.tree.map(total, aux))
