"""The latest steps before an update, which a window may still reach: cached, never replayed."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jbptt.arrays import align_leading, is_key, zeros_along
from jbptt.losses import batch_steps
from jbptt.types import Batch, Carry, PyTree, exported


@exported
class PastSteps(NamedTuple):
    """Earlier steps, leaves `[length, ...]`; `exists` is False where there is none yet."""

    carries: Carry
    xs: PyTree
    mask: jax.Array
    exists: jax.Array


def empty_history(
    length: int, carry: Carry, batch: Batch, batch_shape: tuple[int, ...]
) -> PastSteps:
    """A history of `length` steps that never were. Of `batch` only the shapes behind T are read."""
    carries = jax.tree.map(lambda a: jnp.broadcast_to(a, (length, *jnp.shape(a))), carry)

    def zeros(leaf):
        if is_key(leaf):
            key = jax.random.key(0, impl=jax.random.key_impl(jnp.empty((0,), leaf.dtype)))
            return jnp.broadcast_to(key, (length, *leaf.shape[1:]))
        return zeros_along(leaf, length)

    mask = None if batch.mask is None else ~zeros_along(batch.mask, length)
    mask = _whole_mask(mask, (length, *batch_shape))
    return PastSteps(carries, jax.tree.map(zeros, batch.xs), mask, jnp.zeros(length, bool))


def _whole_mask(mask: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
    """A mask `[T]` or `[T, *batch]`, or none, as `[T, *batch]`."""
    if mask is None:
        return jnp.ones(shape, bool)
    return jnp.broadcast_to(align_leading(mask, len(shape)), shape)


def extend(history: PastSteps, carries: Carry, batch: Batch) -> PastSteps:
    """The history followed by the steps of `batch`, whose entering carries are `carries`."""
    shape = (batch_steps(batch), *history.mask.shape[1:])
    steps = PastSteps(carries, batch.xs, _whole_mask(batch.mask, shape), jnp.ones(shape[0], bool))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), history, steps)


def with_stand_ins(steps: PastSteps, first: int) -> PastSteps:
    """Puts step `first` where there never was one: the user's step meets only real inputs."""
    filled = jax.tree.map(
        lambda a: jnp.where(align_leading(steps.exists, a.ndim), a, a[first]), steps
    )
    return filled._replace(exists=steps.exists)


def latest(history: PastSteps, length: int) -> PastSteps:
    """The last `length` steps."""
    return jax.tree.map(lambda a: a[a.shape[0] - length :], history)


def pad_front(history: PastSteps, length: int) -> PastSteps:
    """The history with steps that never were in front, up to `length`."""
    missing = length - history.mask.shape[0]
    front = jax.tree.map(lambda a: jnp.broadcast_to(a[:1], (missing, *a.shape[1:])), history)
    front = front._replace(exists=jnp.zeros_like(front.exists))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), front, history)
