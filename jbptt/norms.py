"""Euclidean norms that neither overflow nor underflow on the way."""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import tree_util

from jbptt.arrays import align_leading, one_if_zero, widened_dtype
from jbptt.types import PyTree


# Under jit each is traced once for the same shapes, however often a program asks.
@jax.jit
def unit(array: jax.Array, largest: jax.Array) -> jax.Array:
    """`array / largest` along leading axes, at most 1, in the wider dtype; 0 counts as 1."""
    array = array.astype(widened_dtype(array.dtype, largest.dtype))
    # XLA divides by multiplying with 1/m, which is flushed to 0 for the largest m: shrink both
    # first.
    shrink = jnp.where(largest > 1, 2.0**-10, 1.0).astype(largest.dtype)
    safe = jnp.where(largest == 0, 1, largest * shrink)
    return array * align_leading(shrink, array.ndim) / align_leading(safe, array.ndim)


def max_or_nan(values: jax.Array, axis: Any = None, **options: Any) -> jax.Array:
    """`values.max(axis)`, NaN where an entry is NaN.

    XLA's own maximum on CPU drops NaN from 4096 entries on, or 2048 rows along an axis (−inf if
    there is nothing else).
    """
    return jnp.where(jnp.isnan(values).any(axis), jnp.nan, values.max(axis, **options))


@partial(jax.jit, static_argnums=1)
def scaled_norm(tree: PyTree, num_leading: int = 0) -> tuple[jax.Array, jax.Array]:
    """The norm over all but the first `num_leading` axes of all leaves, as two factors `(m, r)`.

    m is the largest absolute entry and `r = sqrt(Σ (x/m)²) ≥ 1`: neither overflows where m is
    finite, while their product, the norm, may. float32 at least; m = 0 gives r = 0, and m is inf or
    NaN where an entry is, in arrays of any size.
    """
    leaves = [
        jnp.asarray(a, widened_dtype(jnp.result_type(a))) for a in tree_util.tree_leaves(tree)
    ]

    def rest(array):
        return tuple(range(num_leading, array.ndim))

    sizes = [jnp.abs(a) for a in leaves if a.size]
    if not sizes:
        return jnp.zeros(()), jnp.zeros(())
    largest = reduce(jnp.maximum, [max_or_nan(size, rest(size)) for size in sizes])
    total = sum(
        (jnp.sum(jnp.square(unit(a, largest)), axis=rest(a)) for a in sizes),
        jnp.zeros((), largest.dtype),
    )
    # Two selects: the derivative of the square root at 0 is infinite, and 0·inf would be NaN.
    return largest, jnp.where(total == 0, 0, jnp.sqrt(one_if_zero(total)))


def norm(tree: PyTree, num_leading: int = 0) -> jax.Array:
    """The Euclidean norm over all but the first `num_leading` axes; see `scaled_norm`."""
    largest, ratio = scaled_norm(tree, num_leading)
    return jnp.where(jnp.isinf(largest), largest, largest * ratio)


def clip_to_norm(
    tree: PyTree, max_norm: Any, num_leading: int = 0
) -> tuple[PyTree, jax.Array, jax.Array]:
    """`tree · min(1, max_norm / ‖tree‖)` along leading axes, ‖tree‖ before, and the factor.

    Where an entry is NaN or inf, everything passes unchanged, with a factor of 1.
    """
    largest, ratio = scaled_norm(tree, num_leading)
    max_norm = jnp.asarray(max_norm, largest.dtype)
    usable = jnp.isfinite(largest)
    # ‖tree‖ = largest·ratio may overflow, so it is compared and divided by factor after factor.
    clipped = usable & (largest * jnp.maximum(ratio, 1) > max_norm)
    limit = max_norm / one_if_zero(ratio)

    def scale(leaf):
        wide = leaf.astype(widened_dtype(leaf.dtype, largest.dtype))
        short = unit(wide, largest) * align_leading(limit, leaf.ndim)
        return jnp.where(align_leading(clipped, leaf.ndim), short, wide).astype(leaf.dtype)

    size = jnp.where(usable, largest * ratio, largest)
    return jax.tree.map(scale, tree), size, jnp.where(clipped, unit(limit, largest), 1)


def leafwise(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of a tree (and more) on every leaf alone; a tree of results."""

    def run(tree, *more):
        return jax.tree.map(lambda leaf: function(leaf, *more), tree)

    return run


def in_units_of(exact: PyTree, num_leading: int = 0) -> Callable[[PyTree], PyTree]:
    """Divides trees by ‖exact‖, which may over- or underflow, along leading axes; by 1 where 0."""
    largest, ratio = scaled_norm(exact, num_leading)
    ratio = one_if_zero(ratio)
    return lambda tree: jax.tree.map(
        lambda a: unit(a, largest) / align_leading(ratio, a.ndim), tree
    )


def normalised(tree: PyTree, num_leading: int = 0) -> PyTree:
    """`tree / ‖tree‖` along leading axes, in float32 at least; 0 where it is 0."""
    return in_units_of(tree, num_leading)(tree)


def inner(left: PyTree, right: PyTree, num_leading: int = 0) -> jax.Array:
    """The inner product `Re Σ conj(left) · right` over all but `num_leading` axes of all leaves."""

    def of_leaf(a, b):
        product = jnp.real(jnp.conj(a) * b)
        return jnp.sum(product, axis=tuple(range(num_leading, product.ndim)))

    products = jax.tree.leaves(jax.tree.map(of_leaf, left, right))
    return reduce(jnp.add, products) if products else jnp.zeros(())


def compared_with(exact: PyTree) -> Callable[[PyTree], tuple[jax.Array, jax.Array]]:
    """Compares estimates with `exact`: `estimate -> (‖estimate − exact‖ / ‖exact‖, cosine)`.

    With exact 0 the error is 0 if the estimate is 0 too, else inf; the cosine is NaN where either
    is 0. What depends on `exact` alone is computed here, once, for a loop over estimates.
    """
    largest, _ = scaled_norm(exact)
    in_its_units = in_units_of(exact)
    direction = in_its_units(exact)

    def compare(estimate):
        error = norm(jax.tree.map(jnp.subtract, in_its_units(estimate), direction))
        size, spread = scaled_norm(estimate)
        angle = inner(jax.tree.map(lambda a: unit(a, size), estimate), direction) / spread
        undefined = jnp.where(size == 0, 0.0, jnp.inf)
        return jnp.where(largest == 0, undefined, error), jnp.where(largest == 0, jnp.nan, angle)

    return compare


def compared_leafwise(exact: PyTree) -> Callable[[PyTree], tuple[PyTree, PyTree]]:
    """`compared_with`, leaf by leaf: `estimate -> (tree of errors, tree of cosines)`."""
    structure = jax.tree.structure(exact)
    compare_fns = [compared_with(leaf) for leaf in jax.tree.leaves(exact)]

    def compare(estimate):
        pairs = [fn(leaf) for fn, leaf in zip(compare_fns, jax.tree.leaves(estimate), strict=True)]
        errors, cosines = zip(*pairs, strict=True) if pairs else ((), ())
        return structure.unflatten(errors), structure.unflatten(cosines)

    return compare
