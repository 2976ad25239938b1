"""Small things on arrays and trees: inexact leaves, wide sums, axes, masks and gates."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

PyTree = Any


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf is floating (or complex): what a gradient can flow through."""
    return jnp.issubdtype(jax.dtypes.result_type(leaf), jnp.inexact)


def is_key(leaf: Any) -> bool:
    """Whether a leaf (or its shape) holds random keys."""
    return jnp.issubdtype(jax.dtypes.result_type(leaf), jax.dtypes.prng_key)


def inexact_leaves(tree: PyTree) -> list:
    """The leaves that gradients flow through; arrays or shapes."""
    return [leaf for leaf in jax.tree.leaves(tree) if is_inexact(leaf)]


def split_inexact(tree: PyTree) -> tuple[list[jax.Array], Callable[[list[jax.Array]], PyTree]]:
    """The leaves that gradients flow through, and the way back to the whole tree."""
    leaves, structure = jax.tree.flatten(tree)
    inexact = [is_inexact(leaf) for leaf in leaves]

    def rebuild(parts):
        parts = iter(parts)
        return structure.unflatten(
            [next(parts) if i else leaf for i, leaf in zip(inexact, leaves, strict=True)]
        )

    return [jnp.asarray(leaf) for i, leaf in zip(inexact, leaves, strict=True) if i], rebuild


def real_leaves(leaves: list[jax.Array]) -> tuple[list[jax.Array], Callable]:
    """Inexact leaves as real ones, and the way back.

    A complex leaf gives two, its real and its imaginary part. JAX's gradient in it has the sign of
    the latter turned, `∂f/∂x − i ∂f/∂y`, so that `df = Re Σ g·dz`.
    """
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    are_complex = [jnp.iscomplexobj(leaf) for leaf in leaves]
    parts = [
        part
        for leaf, is_complex in zip(leaves, are_complex, strict=True)
        for part in ((leaf.real, leaf.imag) if is_complex else (leaf,))
    ]

    def rebuild(parts):
        rest = iter(parts)
        return [lax.complex(next(rest), next(rest)) if c else next(rest) for c in are_complex]

    return parts, rebuild


def real_vector(tree: PyTree) -> tuple[jax.Array, Callable[[jax.Array], PyTree]]:
    """All numbers of a tree of inexact leaves as one real vector, and the way back.

    The `real_leaves` one after another.
    """
    leaves, structure = jax.tree.flatten(tree)
    parts, join = real_leaves(leaves)
    flat, back = ravel_pytree(parts)
    return flat, lambda vector: structure.unflatten(join(back(vector)))


def align_leading(array: jax.Array, ndim: int) -> jax.Array:
    """Appends axes of size 1: `array` broadcasts along leading axes, never trailing ones."""
    return jnp.reshape(array, jnp.shape(array) + (1,) * (ndim - jnp.ndim(array)))


def one_if_zero(divisor: jax.Array) -> jax.Array:
    """A divisor, 1 in the place of 0: `0 / one_if_zero(0)` is 0 and has a derivative."""
    return jnp.where(divisor == 0, 1, divisor)


def weighted_mean(total: jax.Array, weight: jax.Array) -> jax.Array:
    """`total / weight` along leading axes; 0 where the weight is 0."""
    weight = align_leading(weight, jnp.ndim(total))
    return jnp.where(weight == 0, jnp.zeros_like(total), total / one_if_zero(weight))


def widened_dtype(*dtypes: Any) -> Any:
    """The common dtype of these and float32, under `jax.numpy_dtype_promotion("strict")` too."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(jnp.float32, *dtypes)


def widened(array: jax.Array) -> jax.Array:
    """Sums are held in float32 at least: a long sum of bfloat16 loses all but its first digits."""
    return jnp.asarray(array, widened_dtype(jnp.result_type(array)))


def times_gate(cotangent: jax.Array, gate: jax.Array) -> jax.Array:
    """`gate · cotangent`, a hard 0 where the gate is 0, multiplied in float32 at least.

    1/π must not be rounded to bfloat16.
    """
    wide = widened_dtype(cotangent.dtype, gate.dtype)
    gate = align_leading(gate, cotangent.ndim).astype(jnp.finfo(wide).dtype)
    product = (gate * cotangent.astype(wide)).astype(cotangent.dtype)
    return jnp.where(gate == 0, jnp.zeros_like(product), product)


def select_leading(mask: jax.Array, on_true: PyTree, on_false: PyTree) -> PyTree:
    """Leaf by leaf: `on_true` where the mask holds, along leading axes.

    A leaf that does not begin with the mask's shape is shared by the examples: it is `on_true` as
    soon as one of them is unmasked.
    """

    def one(new, old):
        if jnp.shape(new)[: mask.ndim] == mask.shape:
            return jnp.where(align_leading(mask, jnp.ndim(new)), new, old)
        return jnp.where(jnp.any(mask), new, old)

    return jax.tree.map(one, on_true, on_false)


def zero_masked(mask: jax.Array | None, tree: PyTree) -> PyTree:
    """Replaces what stands under a False mask by zeros, so that NaN there meets no arithmetic."""
    if mask is None:
        return tree

    def one(leaf):
        if is_key(leaf):
            return leaf  # a key can neither be zero nor NaN
        return select_leading(mask, leaf, jnp.zeros_like(leaf))

    return jax.tree.map(one, tree)


def split_time(tree: PyTree, segment: int, num_whole: int) -> tuple[PyTree, PyTree]:
    """Cuts `[T, ...]` leaves into segments `[num_whole, segment, ...]` and what is left."""
    whole = num_whole * segment
    main = jax.tree.map(lambda a: a[:whole].reshape((num_whole, segment, *a.shape[1:])), tree)
    return main, jax.tree.map(lambda a: a[whole:], tree)


def steps_from(tree: PyTree, start: Any, length: int) -> PyTree:
    """`length` steps of `[T, ...]` leaves, cut out where used: slicing all up front copies."""
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, length), tree)


def zeros_along(leaf: Any, length: int) -> jax.Array:
    """`[length, ...]` zeros to be joined to a leaf (or its shape) `[T, ...]`: placed as it is.

    Placement is part of a type: the sharding in an explicit mesh, under shard_map whether devices
    differ.
    """
    zeros = lax.full_like(leaf, 0, jax.dtypes.canonicalize_dtype(leaf.dtype))
    return jnp.broadcast_to(zeros[:1], (length, *leaf.shape[1:]))


def varying(tree: PyTree, given: PyTree) -> PyTree:
    """`tree`, inside a `shard_map` marked as different on each device if something given is.

    A loop wants its carry so from the start.
    """
    leaves = [leaf for leaf in jax.tree.leaves(given) if not is_key(leaf)]
    count = jax.eval_shape(
        lambda leaves: sum(map(jnp.count_nonzero, leaves), jnp.zeros((), int)), leaves
    )
    zero = lax.full_like(count, 0)
    return jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), tree)
