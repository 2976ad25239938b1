"""The influence P = ∂h/∂w of the parameters on an example's carry, step by step.

    P ← J P + D,    J = ∂h'/∂h,    D = ∂⁺h'/∂w

of which what the layout has is kept. Leaves are `[outer, base, inner, S]` (`layout`).
"""

from collections.abc import Callable
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbptt.arrays import widened_dtype
from jbptt.online.layout import Block, Layout

HIGHEST = lax.Precision.HIGHEST


def identity(block: Block, dtype: Any) -> jax.Array:
    """The influence of a carry on itself, `[outer, base, inner, S]`."""
    entries = np.arange(prod(block.shape)).reshape(block.shape)
    return jnp.asarray(block.rows[None, :, None, :] == entries[..., None], dtype)


def _asked(colours: np.ndarray, emitted: jax.Array) -> jax.Array:
    """For each colour ones at its entries, `[colours, n]`; one of none where nothing is asked."""
    num_colours = max(1, colours.max(initial=-1) + 1)
    asked = colours == np.arange(num_colours)[:, None]
    return jnp.where(asked, lax.full_like(emitted, 1), lax.full_like(emitted, 0))


def carry_rows(layout: Layout, emitted: jax.Array, pull: Callable) -> jax.Array:
    """`[colours, n]`: the sum over the entries i of a colour of ∂h'_i/∂h.

    `emitted` and `pull` are h' and the way back: `h'_bar -> (cotangents of the real leaves, of h)`.
    """
    rows = jax.vmap(lambda bar: pull(bar)[1])(_asked(layout.carry_colours, emitted))
    return rows.astype(widened_dtype(rows.dtype))


def param_rows(layout: Layout, emitted: jax.Array, pull: Callable) -> list[jax.Array]:
    """The same of ∂⁺h'_i/∂w for each real leaf, `[colours, *leaf]`."""
    rows = jax.vmap(lambda bar: pull(bar)[0])(_asked(layout.param_colours, emitted))
    return [leaf.astype(widened_dtype(leaf.dtype)) for leaf in rows]


def at_rows(vector: jax.Array, rows: np.ndarray) -> jax.Array:
    """`[..., n]` at rows `[base, S]`, 0 where there is none."""
    count = np.arange(vector.shape[-1])
    if np.array_equal(rows, count[:, None]):
        return vector[..., None]
    if np.array_equal(rows, count[None]):
        return vector[..., None, :]
    padded = jnp.pad(vector, [(0, 0)] * (vector.ndim - 1) + [(0, 1)])
    return padded[..., rows]


def jacobian(layout: Layout, block: Block, found: jax.Array) -> jax.Array:
    """`[base, S, S]`: J from the rows of a block to its rows; `found` is that of `carry_rows`."""
    rows, colours = block.rows, np.append(layout.carry_colours, -1)[block.rows]
    reads = layout.reads[rows[:, :, None], rows[:, None, :]]
    in_order = np.arange(layout.size)[None]
    if np.array_equal(rows, in_order) and np.array_equal(colours, in_order):
        entries = found[None]  # all of it, as it is
    elif len(found) == 1:
        entries = at_rows(found[0], rows)[:, None, :]
    else:
        padded = jnp.pad(found, ((0, 0), (0, 1)))
        entries = padded[np.maximum(colours, 0)[:, :, None], rows[:, None, :]]
    return entries if reads.all() else jnp.where(reads, entries, 0)


def entering(layout: Layout, block: Block, found: jax.Array) -> jax.Array:
    """`[outer, base, inner, S]`: D, from `[colours, *leaf]`."""
    rows = block.entered_rows
    colours = np.append(layout.param_colours, -1)[rows]
    by_colour = found.reshape(-1, *block.entered)
    if len(by_colour) == 1:
        picked = by_colour[0][..., None]
    else:
        base = np.arange(rows.shape[0])[:, None]
        picked = by_colour[np.maximum(colours, 0), :, base]  # [base, S, outer, inner]
        picked = picked.transpose(2, 0, 3, 1)
    enters = (rows < layout.size)[None, :, None, :]
    if not enters.all():
        picked = jnp.where(enters, picked, 0)
    return picked.reshape(block.kept)


def onward(jacobian: jax.Array, influence: jax.Array) -> jax.Array:
    """J P of one block."""
    base, size, _ = jacobian.shape
    if size == 1:
        return influence * jacobian[None, :, 0, None]
    if base == 1:
        flat = influence.reshape(-1, size)
        return jnp.matmul(flat, jacobian[0].T, precision=HIGHEST).reshape(influence.shape)
    return jnp.einsum("obis,bts->obit", influence, jacobian, precision=HIGHEST)


def scaled(block: Block, factors: jax.Array, influence: jax.Array) -> jax.Array:
    """J P of one block where J is diagonal, `[n]`."""
    return influence * at_rows(factors, block.rows)[None, :, None]


def gradient(block: Block, influence: jax.Array, h_bar: jax.Array) -> jax.Array:
    """Σ λ P of one block over examples, in the leaf's shape; leaves `[examples, …]`."""
    weights = at_rows(h_bar, block.rows)
    # A product over the examples: several times as fast as a sum of what is multiplied first.
    found = jnp.einsum("zobis,zbs->obi", influence, weights, precision=HIGHEST)
    return found.reshape(block.leaf)


def gradient_of_each(block: Block, influence: jax.Array, h_bar: jax.Array) -> jax.Array:
    """λ P of one block for each example, `[examples, size]`."""
    weights = at_rows(h_bar, block.rows)
    found = jnp.einsum("zobis,zbs->zobi", influence, weights, precision=HIGHEST)
    return found.reshape(len(found), -1)
