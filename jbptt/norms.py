"""Euclidean norms that neither overflow nor underflow on the way."""

import jax
import jax.numpy as jnp
from jax import tree_util

from jbptt.types import PyTree, align_leading


def scaled_norm(tree: PyTree, num_leading: int = 0) -> tuple[jax.Array, jax.Array]:
    """The norm over all but the first `num_leading` axes of all leaves, as two factors `(m, r)`.

    m is the largest absolute entry and `r = sqrt(Σ (x/m)²) ≥ 1`: neither overflows where m is finite,
    while their product, the norm, may. float32 at least; m = 0 gives r = 0, NaN or inf give NaN or inf.
    """
    leaves = [jnp.asarray(a, jnp.promote_types(jnp.result_type(a), jnp.float32)) for a in tree_util.tree_leaves(tree)]

    def rest(array):
        return tuple(range(num_leading, array.ndim))

    sizes = [jnp.abs(a) for a in leaves if a.size]
    if not sizes:
        return jnp.zeros(()), jnp.zeros(())
    largest = sizes[0].max(rest(sizes[0]))
    for size in sizes[1:]:
        largest = jnp.maximum(largest, size.max(rest(size)))
    safe = jnp.where(largest == 0, 1, largest)
    total = sum((jnp.sum(jnp.square(a / align_leading(safe, a.ndim)), axis=rest(a)) for a in sizes), jnp.zeros(()))
    return largest, jnp.sqrt(total)


def norm(tree: PyTree, num_leading: int = 0) -> jax.Array:
    """The Euclidean norm over all but the first `num_leading` axes; see `scaled_norm`."""
    largest, ratio = scaled_norm(tree, num_leading)
    return jnp.where(jnp.isinf(largest), largest, largest * ratio)


def cosine(a: PyTree, b: PyTree) -> jax.Array:
    """`⟨a, b⟩ / (‖a‖ ‖b‖)` over the flattened trees; NaN where one of them is 0."""
    parts = []
    for tree in (a, b):
        largest, ratio = scaled_norm(tree)
        parts.append([leaf / largest / ratio for leaf in tree_util.tree_leaves(tree)])
    return sum((jnp.sum(jnp.real(jnp.conj(x) * y)) for x, y in zip(*parts, strict=True)), jnp.zeros(()))
