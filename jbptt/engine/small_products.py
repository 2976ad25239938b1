"""Products of many small matrices as sums: what vmap makes of the products of a small model.

On CPU, XLA computes a product with batch axes one small matrix after the other, and each costs more
than its arithmetic. The products of entries and their sum are one loop over all of them.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxpr_as_fun

from jbptt.engine.primitives import CALLS

# Multiplications of one matrix with another. Up to here no training measured takes longer, and one
# of 4 units and 2 examples takes less than half the time; with 128 one of 8 units takes 1.1 times
# as long, with 256 1.2 times.
MOST = 64
ENTERED = {*CALLS, "scan", "while", "cond"}


def run_with_sums(function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)`, whose small products with batch axes are sums."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    results = jaxpr_as_fun(as_sums(closed))(*jax.tree.leaves(arguments))
    return jax.tree.structure(shapes).unflatten(results)


def as_sums(program: Any) -> Any:
    """The program, whose small products with batch axes are sums.

    Of a closed one or of an open one; of several; anything else is returned as it is, so that all
    parameters of an equation may be asked for.
    """
    if isinstance(program, ClosedJaxpr):
        return ClosedJaxpr(as_sums(program.jaxpr), program.consts)
    if isinstance(program, Jaxpr):
        return program.replace(eqns=list(map(_equation_as_sums, program.eqns)))
    if isinstance(program, tuple):
        return tuple(map(as_sums, program))
    return program


def _equation_as_sums(equation: JaxprEqn) -> JaxprEqn:
    if equation.primitive.name in ENTERED:
        params = {name: as_sums(value) for name, value in equation.params.items()}
        return equation.replace(params=params)
    if not _is_small_product(equation):
        return equation
    operands: list[Any] = [v.aval for v in equation.invars]
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands]
    sums = jax.jit(partial(sum_of_products, equation.params["dimension_numbers"]))
    (call,) = jax.make_jaxpr(sums)(*shapes).eqns  # one equation, which calls the sums
    return call.replace(invars=equation.invars, outvars=equation.outvars)


def _is_small_product(equation: JaxprEqn) -> bool:
    """With batch axes, few multiplications for each of their entries, in one wide dtype."""
    if equation.primitive.name != "dot_general":
        return False
    (_, summed_of_b), (batch, batch_of_b) = equation.params["dimension_numbers"]
    avals: list[Any] = [v.aval for v in (*equation.invars, *equation.outvars)]
    a, b, result = avals
    if not a.dtype == b.dtype == result.dtype or not a.sharding.mesh.empty:
        return False
    # Half precision adds up in a wider one.
    if not jnp.issubdtype(a.dtype, jnp.inexact) or jnp.finfo(a.dtype).bits < 32:
        return False
    rows_and_sum = [size for i, size in enumerate(a.shape) if i not in batch]
    columns = [size for i, size in enumerate(b.shape) if i not in (*batch_of_b, *summed_of_b)]
    return len(batch) > 0 and math.prod(rows_and_sum) * math.prod(columns) <= MOST


def sum_of_products(dimensions: Any, a: jax.Array, b: jax.Array) -> jax.Array:
    """`lax.dot_general(a, b, dimensions)` as `[*batch, *rows, *columns, *summed]`, summed."""
    (of_a, of_b), (batch, batch_of_b) = dimensions
    rows = [i for i in range(a.ndim) if i not in (*batch, *of_a)]
    columns = [i for i in range(b.ndim) if i not in (*batch_of_b, *of_b)]
    first_column = len(batch) + len(rows)
    a = jnp.transpose(a, (*batch, *rows, *of_a))
    b = jnp.transpose(b, (*batch_of_b, *columns, *of_b))
    a = jnp.expand_dims(a, tuple(range(first_column, first_column + len(columns))))
    b = jnp.expand_dims(b, tuple(range(len(batch), first_column)))
    return jnp.sum(a * b, axis=tuple(range(-len(of_a), 0)))
