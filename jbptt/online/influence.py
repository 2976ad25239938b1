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


def jacobian(layout: Layout, block: Block, found: jax.Array) -> jax.Array:
    """`[base, S, S]`: J from the rows of a block to its rows."""
    rows, colours = block.rows, np.append(layout.carry_colours, -1)
    by_colour = colours[rows][:, :, None]
    if (layout.reads[rows[:, :, None], rows[:, None, :]]).all() and _counts(
        by_colour[..., 0], rows
    ):
        return found[None]
    padded = jnp.pad(found, ((0, 0), (0, 1)))
    entries = padded[np.maximum(by_colour, 0), rows[:, None, :]]
    return jnp.where(layout.reads[rows[:, :, None], rows[:, None, :]], entries, 0)


def _counts(colours: np.ndarray, rows: np.ndarray) -> bool:
    """Whether the one set of rows is all rows in order, each with its own colour."""
    count = np.arange(rows.shape[1])[None]
    return np.array_equal(colours, count) and np.array_equal(rows, count)


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
    return jnp.where(enters, picked, 0).reshape(block.kept)


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
    return influence * jnp.pad(factors, (0, 1))[block.rows][None, :, None]


def gradient(block: Block, influence: jax.Array, h_bar: jax.Array) -> jax.Array:
    """λ P of one block, in the leaf's shape."""
    at_rows = jnp.pad(h_bar, (0, 1))[block.rows]  # [base, S]
    if block.num_rows == 1:
        found = influence[..., 0] * at_rows[None]
    else:
        found = jnp.einsum("obis,bs->obi", influence, at_rows, precision=HIGHEST)
    return found.reshape(block.leaf)
