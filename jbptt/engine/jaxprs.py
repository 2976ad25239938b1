"""A function as a program: read, laid open, and evaluated equation by equation, some of them differently."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

from jbptt.arrays import widened
from jbptt.engine.primitives import MOVES, REPEATS
from jbptt.types import PyTree

Values = dict[Any, Any]  # by variable


def read(values: Values, atom: Any) -> Any:
    """What stands for a variable or a literal."""
    return atom.val if isinstance(atom, Literal) else values[atom]


def names_of(atoms: Iterable[Any]) -> list[Any]:
    """The variables among atoms, each once."""
    return list(dict.fromkeys(v for v in atoms if not isinstance(v, Literal)))


def evaluate(jaxpr: Jaxpr, equations: list[JaxprEqn], values: Values, replace: Callable | None = None) -> Values:
    """Adds what the equations compute to `values`; where `replace(equation, values)` gives results, they count."""
    for equation in equations:
        found = None if replace is None else replace(equation, values)
        if found is None:
            names = list(dict.fromkeys(v for v in equation.invars if not isinstance(v, Literal)))
            alone = jaxpr.replace(
                constvars=[], invars=names, outvars=equation.outvars, eqns=[equation], effects=equation.effects
            )
            found = jaxpr_as_fun(ClosedJaxpr(alone, []))(*(values[name] for name in names))
        values.update(zip(equation.outvars, found, strict=True))
    return values


def as_arrays(consts: Any) -> list:
    """A program's constants as JAX has them while it traces: a custom derivative may index one by a traced number."""
    return [c if isinstance(c, jax.Array) else jnp.asarray(c) for c in consts]


def _run_inlined(jaxpr: Jaxpr, consts: Any, *given: Any) -> list:
    """Runs a program with its inner `jit`s, in which a product would be hidden, laid open."""

    def enter(equation, values):
        if equation.primitive.name != "jit":
            return None
        inner = equation.params["jaxpr"]
        return _run_inlined(inner.jaxpr, inner.consts, *(read(values, atom) for atom in equation.invars))

    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*as_arrays(consts), *given], strict=True))
    values = evaluate(jaxpr, jaxpr.eqns, values, enter)
    return [read(values, atom) for atom in jaxpr.outvars]


def inlined(function: Callable, *arguments: Any) -> tuple[ClosedJaxpr, PyTree]:
    """The program of `function(*arguments)` over leaves, without inner `jit`s, and the shapes of its result."""
    leaves, structure = jax.tree.flatten(arguments)
    whole, result = jax.make_jaxpr(lambda *a: function(*structure.unflatten(a)), return_shape=True)(*leaves)
    return jax.make_jaxpr(lambda *a: _run_inlined(whole.jaxpr, whole.consts, *a))(*leaves), result


def moved_wide(equation: JaxprEqn, values: Values, wide: Values) -> list | None:
    """Results of a move or a broadcast of half-precision numbers whose float32 originals `wide` holds; else None.

    The transpose of a broadcast is a sum over the examples, which in half precision loses digits. So the original is
    moved or broadcast, and cast afterwards: the values are the same, and the transpose adds up in float32. `wide`
    grows by the results of moves, and by what is cast to fewer bytes.
    """
    operands = [read(values, atom) for atom in equation.invars]
    results: list[Any] = [v.aval for v in equation.outvars]
    name, is_wide = equation.primitive.name, [not isinstance(v, Literal) and v in wide for v in equation.invars]
    if name == "convert_element_type" and is_wide[0] and is_narrower(results[0].dtype, operands[0].dtype):
        wide[equation.outvars[0]] = widened(operands[0])
        return None
    if name in MOVES and is_wide[0]:
        moved: Any = equation.primitive.bind(wide[equation.invars[0]], *operands[1:], **equation.params)
        moved = moved if equation.primitive.multiple_results else [moved]
        wide.update(zip(equation.outvars, moved, strict=True))
        return [array.astype(result.dtype) for array, result in zip(moved, results, strict=True)]
    if name in REPEATS and any(is_wide):
        shape = jnp.broadcast_shapes(*map(jnp.shape, operands))
        repeated = [
            jnp.broadcast_to(wide[atom], shape).astype(array.dtype)
            if repeats_wide and array.shape != shape and is_narrower(array.dtype, wide[atom].dtype)
            else array
            for repeats_wide, atom, array in zip(is_wide, equation.invars, operands, strict=True)
        ]
        if any(new is not old for new, old in zip(repeated, operands, strict=True)):
            return [equation.primitive.bind(*repeated, **equation.params)]
    return None


def is_narrower(dtype: Any, other: Any) -> bool:
    """Whether both are real floating types, and the first has fewer bytes."""
    return all(jnp.issubdtype(d, jnp.floating) for d in (dtype, other)) and dtype.itemsize < other.itemsize


def closed_over(function: Callable, *arguments: Any) -> tuple[Callable, list, PyTree]:
    """`(consts, *arguments)` instead of a function that closes over them, the consts, and the result's shapes."""
    closed, result = jax.make_jaxpr(function, return_shape=True)(*arguments)
    jaxpr, structure = closed.jaxpr, jax.tree.structure(result)  # no tracer among them

    def run(consts, *arguments):
        return structure.unflatten(jaxpr_as_fun(ClosedJaxpr(jaxpr, consts))(*jax.tree.leaves(arguments)))

    return run, closed.consts, result
