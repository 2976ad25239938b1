"""Units that pass no gradient: dead (exactly zero whatever comes in) or saturated (held at ±1)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jbptt.arrays import align_leading, one_if_zero, split_inexact
from jbptt.norms import norm
from jbptt.recurrence import held_core
from jbptt.types import Batch, Carry, Params, Step

NUDGE = 1e-3  # of a leaf's root mean square
FOLLOWS = 0.3  # an entry near ±1 that moves by more than this part of the nudge is not held there


class Still(NamedTuple):
    """Which entries of a leaf of the carry, as a step emits them, a nudge does not move.

    Attributes:
      zero: `[T, *batch, ...]`, it stays exactly zero, nudged either way.
      held: `[T, *batch, ...]`, it moves by less than `FOLLOWS` times the nudge.
    """

    zero: jax.Array
    held: jax.Array


def share_stuck(
    carries: list, still: list[Still], mask: jax.Array | None, batch_shape: tuple
) -> tuple[jax.Array, jax.Array]:
    """The shares of the carry's entries that are saturated, and that are dead, at every step and
    example.

    Saturated: within 0.01 of ±1 (where tanh' < 0.02) and held there at 95 % of the steps and
    examples at least. Dead: exactly zero at every one, and immovable. Carries that a step emitted
    and the next one read, masked steps left out; 0 where there is none.

    Args:
      carries: the inexact leaves of the carries that enter the steps, `[T, *batch, ...]`.
      still: for each, what a nudge does not move (`find_still`).
      mask: as in `Batch`.
      batch_shape: of the loss.
    """
    axes = tuple(range(1 + len(batch_shape)))
    saturated, dead, total = jnp.zeros((), int), jnp.zeros((), int), 0
    for leaf, (zero, held) in zip(carries, still, strict=True):
        emitted = jnp.abs(leaf[1:])
        counted = jnp.ones(emitted.shape[: len(axes)], bool)
        if mask is not None:
            counted = counted & align_leading(mask[:-1], len(axes))
        count, counted = jnp.sum(counted), align_leading(counted, emitted.ndim)
        at_one = counted & (jnp.abs(emitted - 1) <= 0.01) & held[:-1]
        near = jnp.sum(at_one, axes, dtype=float) >= 0.95 * count.astype(float)
        saturated += jnp.sum(near & (count > 0))
        dead += jnp.sum(jnp.all(~counted | ((emitted == 0) & zero[:-1]), axes) & (count > 0))
        total += near.size
    return saturated / max(total, 1), dead / max(total, 1)


def find_still(step: Step, params: Params, carries: Carry, batch: Batch) -> list[Still]:
    """Which entries of the carry each step emits as they are however it is nudged.

    Parameters, carry and input are moved a little, each number by its own amount, once either way:
    a dead ReLU stays at zero, while what is zero by its data moves. Two evaluations of the steps
    side by side and no derivative.

    Args:
      step: `(params, carry, x) -> (carry, y)`.
      params: the parameters.
      carries: what enters the steps, leaves `[T, ...]`.
      batch: its inputs and mask.
    """
    core = held_core(step)
    leaves, rebuild = split_inexact(jax.tree.map(jnp.asarray, (params, carries, batch.xs)))

    def emitted(size):
        moved = [_nudged(leaf, i, size) for i, leaf in enumerate(leaves)]
        params, carry, xs = rebuild(moved)
        after = jax.vmap(core, in_axes=(None, 0, 0))(params, carry, (xs, batch.mask))[0]
        return split_inexact(after)[0]

    def compare(up, down):
        nudge = NUDGE * one_if_zero(norm(up) / max(up.size, 1) ** 0.5)
        held = jnp.abs(up - down) <= 2 * FOLLOWS * nudge.astype(up.dtype)
        return Still((up == 0) & (down == 0), held)

    return [compare(*pair) for pair in zip(emitted(NUDGE), emitted(-NUDGE), strict=True)]


def _nudged(leaf: jax.Array, number: int, size: float) -> jax.Array:
    """`leaf` with numbers added, of `size` times its root mean square; of `size` where that is 0.

    They are cosines, no two alike: random numbers would take most of the time that `diagnose` takes
    to compile.
    """
    scale = norm(leaf) / max(leaf.size, 1) ** 0.5
    scale = size * one_if_zero(scale)
    waves = jnp.cos(jnp.arange(leaf.size, dtype=scale.dtype) + number).reshape(leaf.shape)
    return leaf + (scale * waves).astype(leaf.dtype)
