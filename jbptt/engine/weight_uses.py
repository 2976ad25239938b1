"""One use of a weight in a step, a product or a lookup, and its gradient from all steps at once."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn, Literal

from jbptt.arrays import is_inexact, widened_dtype


class Product(NamedTuple):
    """One `dot_general` with a weight: its equation, and on which side (0, 1) the weight stands."""

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

    def add_gradient(
        self,
        total: jax.Array,
        operands: list[jax.Array],
        bars: jax.Array,
    ) -> jax.Array:
        """`total + Σ_t a_tᵀ z̄_t` from operands and cotangents `[S, ...]`."""
        return total + weight_gradient(self, operands[0], bars).astype(total.dtype)


class Lookup(NamedTuple):
    """Rows (or any slices) of a table, at places that depend on carry or input.

    Its equation is a `gather` or a `dynamic_slice`.
    """

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

    def add_gradient(
        self,
        total: jax.Array,
        operands: list[jax.Array],
        bars: jax.Array,
    ) -> jax.Array:
        """Adds every row's cotangent to the table `total`; operands and cotangents `[S, ...]`."""
        if self.equation.primitive is lax.dynamic_slice_p:
            # One slice a step, with an index for each axis.
            places = jnp.stack(operands, -1)
            offset_axes = indexed_axes = tuple(range(total.ndim))
            collapsed_axes = ()
            # `dynamic_slice` moves inside what would reach over the edge.
            mode = lax.GatherScatterMode.CLIP
        else:
            places = operands[0]
            numbers = self.equation.params["dimension_numbers"]
            offset_axes, collapsed_axes = numbers.offset_dims, numbers.collapsed_slice_dims
            indexed_axes = numbers.start_index_map
            mode = self.equation.params["mode"]
        numbers = lax.ScatterDimensionNumbers(
            update_window_dims=tuple(axis + 1 for axis in offset_axes),  # the first is the steps'
            inserted_window_dims=collapsed_axes,
            scatter_dims_to_operand_dims=indexed_axes,
        )
        return lax.scatter_add(total, places, bars.astype(total.dtype), numbers, mode=mode)


def _other_axes(ndim: int, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axis for axis in range(ndim) if axis not in axes)


def _as_matrix(array: jax.Array, columns: tuple[int, ...]) -> jax.Array:
    """These axes as columns, all others as rows.

    Two axes contracted at once take XLA 2.5 times as long on CPU as one.
    """
    rows = _other_axes(array.ndim, columns)
    shape = [math.prod(array.shape[axis] for axis in axes) for axes in (rows, columns)]
    return array.transpose(*rows, *columns).reshape(shape)


def weight_gradient(product: Product, operands: jax.Array, bars: jax.Array) -> jax.Array:
    """`W̄ = Σ_t a_tᵀ z̄_t` from operands and cotangents `[S, ...]`, in float32 at least."""
    contracted, _ = product.equation.params["dimension_numbers"]
    operand_axes, weight_axes = contracted[1 - product.side], contracted[product.side]
    shape = product.weight.aval.shape
    free_axes = _other_axes(len(shape), weight_axes)
    # Of z the free axes of the left side come first; the axis of the steps comes before all.
    first = 1 if product.side == 0 else bars.ndim - len(free_axes)
    left = _as_matrix(operands, tuple(axis + 1 for axis in operand_axes))
    right = _as_matrix(bars, tuple(range(first, first + len(free_axes))))
    matrix = lax.dot_general(
        left,
        right,
        (((0,), (0,)), ((), ())),
        precision=product.equation.params["precision"],
        preferred_element_type=widened_dtype(left.dtype, right.dtype),
    )
    # Its rows are the contracted axes of W, its columns the free ones: back into W's order.
    order = (*weight_axes, *free_axes)
    inverse = sorted(range(len(shape)), key=order.__getitem__)
    return matrix.reshape([shape[axis] for axis in order]).transpose(inverse)


def _is_placed(aval: Any) -> bool:
    """Whether an explicit mesh divides an axis: then JAX alone knows where the gradient belongs."""
    return any(axis is not None for axis in getattr(getattr(aval, "sharding", None), "spec", ()))


def weight_side(equation: JaxprEqn, invariant: set, learned: set) -> int | None:
    """On which side of a `dot_general` a weight stands; None if that is not what the equation is.

    invariant: the variables that are the same in every step. learned: those of them that depend on
    a parameter.
    """
    if equation.primitive is not lax.dot_general_p:
        return None
    _, batch_axes = equation.params["dimension_numbers"]
    if any(batch_axes):
        return None
    sides = list(enumerate(equation.invars))
    weights = [i for i, v in sides if not isinstance(v, Literal) and v in learned]
    varying = [i for i, v in sides if not isinstance(v, Literal) and v not in invariant]
    if not all(is_inexact(v.aval) and not _is_placed(v.aval) for v in equation.invars):
        return None
    return weights[0] if len(weights) == len(varying) == 1 else None


def is_lookup(equation: JaxprEqn, invariant: set, learned: set) -> bool:
    """Whether an equation takes rows from a table, at places that vary, and not all of it."""
    if equation.primitive is lax.gather_p:
        is_simple = not equation.params["dimension_numbers"].operand_batching_dims
    else:
        is_simple = equation.primitive is lax.dynamic_slice_p
    if not is_simple:
        return False
    table, *places = equation.invars
    if isinstance(table, Literal) or table not in learned:
        return False
    table_aval: Any = table.aval
    rows_aval: Any = equation.outvars[0].aval
    varies = any(not isinstance(v, Literal) and v not in invariant for v in places)
    is_smaller = rows_aval.size < table_aval.size
    return varies and is_smaller and is_inexact(table_aval) and not _is_placed(table_aval)
