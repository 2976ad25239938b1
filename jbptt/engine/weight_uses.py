"""One use of a weight in a step, a product or a lookup, and its gradient from all steps of a segment at once."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn, Literal

from jbptt.arrays import is_inexact, widened_dtype


class Product(NamedTuple):
    """One `dot_general` with a weight: its equation, and on which side the weight stands."""

    equation: JaxprEqn
    side: int

    @property
    def weight(self) -> Any:
        """The side that depends on the parameters alone."""
        return self.equation.invars[self.side]

    @property
    def operands(self) -> list[Any]:
        """The other side."""
        return [self.equation.invars[1 - self.side]]

    def bind(self, weight: jax.Array, operands: list) -> jax.Array:
        """The product of one step."""
        sides = [*operands]
        sides.insert(self.side, weight)
        return lax.dot_general_p.bind(*sides, **self.equation.params)

    def add_gradient(self, total: jax.Array, operands: list[jax.Array], cotangents: jax.Array) -> jax.Array:
        """`total + Σ_t a_tᵀ z̄_t` from operands and cotangents `[S, ...]`."""
        return total + weight_gradient(self, operands[0], cotangents).astype(total.dtype)


class Lookup(NamedTuple):
    """Rows (or any slices) of a table, at places that depend on carry or input: a `gather` or a `dynamic_slice`."""

    equation: JaxprEqn

    @property
    def weight(self) -> Any:
        """The table."""
        return self.equation.invars[0]

    @property
    def operands(self) -> list[Any]:
        """The places."""
        return self.equation.invars[1:]

    def bind(self, table: jax.Array, operands: list) -> jax.Array:
        """The rows of one step."""
        return self.equation.primitive.bind(table, *operands, **self.equation.params)

    def add_gradient(self, total: jax.Array, operands: list[jax.Array], cotangents: jax.Array) -> jax.Array:
        """Adds every row's cotangent into the table `total`; operands and cotangents `[S, ...]`."""
        params = self.equation.params
        if self.equation.primitive is lax.dynamic_slice_p:
            axes = tuple(range(total.ndim))
            places, offsets, left_out, into = jnp.stack(operands, -1), axes, (), axes
            mode = lax.GatherScatterMode.CLIP  # as `dynamic_slice` moves what would reach over the edge
        else:
            numbers = params["dimension_numbers"]
            places, offsets, left_out = operands[0], numbers.offset_dims, numbers.collapsed_slice_dims
            into, mode = numbers.start_index_map, params["mode"]
        shifted = tuple(axis + 1 for axis in offsets)  # behind the axis of the steps
        numbers = lax.ScatterDimensionNumbers(shifted, left_out, into)
        return lax.scatter_add(total, places, cotangents.astype(total.dtype), numbers, mode=mode)


def _kept(ndim: int, contracted: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axis for axis in range(ndim) if axis not in contracted)


def _as_matrix(array: jax.Array, columns: tuple[int, ...]) -> jax.Array:
    """Rows: all other axes. Two axes contracted at once take XLA 2.5 times as long on CPU."""
    rows = _kept(array.ndim, columns)
    return array.transpose(*rows, *columns).reshape(
        [math.prod(array.shape[i] for i in axes) for axes in (rows, columns)]
    )


def weight_gradient(product: Product, operands: jax.Array, cotangents: jax.Array) -> jax.Array:
    """`W̄ = Σ_t a_tᵀ z̄_t` from operands and cotangents `[S, ...]`, in float32 at least."""
    axes = product.equation.params["dimension_numbers"][0]
    of_operand, of_weight = tuple(axes[1 - product.side]), tuple(axes[product.side])
    shape = product.weight.aval.shape
    kept = _kept(len(shape), of_weight)
    # z has the kept axes of the left side first; S comes before all of them.
    first = 1 if product.side == 0 else cotangents.ndim - len(kept)
    left = _as_matrix(operands, tuple(axis + 1 for axis in of_operand))
    right = _as_matrix(cotangents, tuple(range(first, first + len(kept))))
    flat = lax.dot_general(
        left,
        right,
        (((0,), (0,)), ((), ())),
        precision=product.equation.params["precision"],
        preferred_element_type=widened_dtype(left.dtype, right.dtype),
    )
    order = (*of_weight, *kept)
    back = sorted(range(len(shape)), key=order.__getitem__)
    return flat.reshape([shape[axis] for axis in order]).transpose(back)


def _is_placed(aval: Any) -> bool:
    """Whether an explicit mesh divides an axis: then JAX alone knows where the gradient belongs."""
    return any(axis is not None for axis in getattr(getattr(aval, "sharding", None), "spec", ()))


def weight_side(equation: JaxprEqn, fixed: set, learned: set) -> int | None:
    """On which side of a `dot_general` a weight stands; None if that is not what the equation is."""
    if equation.primitive is not lax.dot_general_p or any(equation.params["dimension_numbers"][1]):
        return None
    weights = [i for i, v in enumerate(equation.invars) if not isinstance(v, Literal) and v in learned]
    varying = [v for v in equation.invars if not isinstance(v, Literal) and v not in fixed]
    inexact = all(is_inexact(v.aval) and not _is_placed(v.aval) for v in equation.invars)
    return weights[0] if inexact and len(weights) == len(varying) == 1 else None


def is_lookup(equation: JaxprEqn, fixed: set, learned: set) -> bool:
    """Whether an equation takes rows from a table, fewer numbers than the table has, at places that vary."""
    if equation.primitive is lax.gather_p:
        simple = not equation.params["dimension_numbers"].operand_batching_dims
    else:
        simple = equation.primitive is lax.dynamic_slice_p
    if not simple or isinstance(equation.invars[0], Literal) or equation.invars[0] not in learned:
        return False
    table: Any = equation.invars[0].aval
    rows: Any = equation.outvars[0].aval
    varies = any(not isinstance(v, Literal) and v not in fixed for v in equation.invars[1:])
    return varies and is_inexact(table) and not _is_placed(table) and rows.size < table.size
