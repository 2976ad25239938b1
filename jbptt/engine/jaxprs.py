"""Programs (jaxprs): traced with inner `jit`s inlined, asked who reads what, and evaluated.

`evaluate` runs them equation by equation; a caller may replace what some equations compute.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

from jbptt.arrays import widened
from jbptt.engine.primitives import MOVES, REPEATS
from jbptt.types import PyTree

Values = dict[Any, Any]  # arrays by variable


def read(values: Values, atom: Any) -> Any:
    """The value of a variable or a literal."""
    return atom.val if isinstance(atom, Literal) else values[atom]


def variables_of(atoms: Iterable[Any]) -> list[Any]:
    """The variables among atoms, each once."""
    return list(dict.fromkeys(atom for atom in atoms if not isinstance(atom, Literal)))


def operands_of(equations: Iterable[JaxprEqn]) -> list[Any]:
    """The atoms that the equations read."""
    return [atom for equation in equations for atom in equation.invars]


def needed(equations: list[JaxprEqn], results: list[Any]) -> list[JaxprEqn]:
    """The equations that lead to `results`, and those with effects, in order."""
    wanted, leading = set(variables_of(results)), []
    for equation in reversed(equations):
        if wanted.intersection(equation.outvars) or equation.effects:
            wanted.update(variables_of(equation.invars))
            leading.append(equation)
    return leading[::-1]


def reached_from(sources: list[Var], equations: list[JaxprEqn]) -> set[Var]:
    """`sources`, and all that is computed from them."""
    reached = set(sources)
    for equation in equations:
        if reached.intersection(variables_of(equation.invars)):
            reached.update(equation.outvars)
    return reached


def evaluate(
    jaxpr: Jaxpr,
    equations: list[JaxprEqn],
    values: Values,
    replace: Callable | None = None,
) -> Values:
    """Adds to `values` what the equations of `jaxpr` compute.

    `replace(equation, values)` gives the results of an equation in its place, or None. It may first
    add to `values` what the equation is to read.
    """
    for equation in equations:
        results = None if replace is None else replace(equation, values)
        if results is None:
            # A program of this one equation: JAX evaluates it with all that belongs to it (effects,
            # placement, custom derivatives), whatever primitive it is.
            variables = variables_of(equation.invars)
            program = jaxpr.replace(
                constvars=[],
                invars=variables,
                outvars=equation.outvars,
                eqns=[equation],
                effects=equation.effects,
            )
            operands = [values[v] for v in variables]
            results = jaxpr_as_fun(ClosedJaxpr(program, []))(*operands)
        values.update(zip(equation.outvars, results, strict=True))
    return values


def as_arrays(consts: Any) -> list:
    """A program's constants as JAX has them while it traces.

    A custom derivative may index one by a traced number, which NumPy's arrays refuse.
    """
    return [c if isinstance(c, jax.Array) else jnp.asarray(c) for c in consts]


def _run_inlined(jaxpr: Jaxpr, consts: Any, *arguments: Any) -> list:
    """Runs a program equation by equation, inside inner `jit`s too, which would hide products."""

    def enter(equation, values):
        if equation.primitive.name != "jit":
            return None
        inner = equation.params["jaxpr"]
        operands = [read(values, atom) for atom in equation.invars]
        return _run_inlined(inner.jaxpr, inner.consts, *operands)

    variables = [*jaxpr.constvars, *jaxpr.invars]
    values = dict(zip(variables, [*as_arrays(consts), *arguments], strict=True))
    values = evaluate(jaxpr, jaxpr.eqns, values, enter)
    return [read(values, atom) for atom in jaxpr.outvars]


def inlined(function: Callable, *arguments: Any) -> tuple[ClosedJaxpr, PyTree]:
    """The program of `function(*arguments)` without inner `jit`s, and the shapes of its result.

    Its inputs and outputs are leaves, in JAX's order.
    """
    leaves, structure = jax.tree.flatten(arguments)

    def of_leaves(*leaves):
        return function(*structure.unflatten(leaves))

    closed, shapes = jax.make_jaxpr(of_leaves, return_shape=True)(*leaves)
    # Traced a second time, while it runs equation by equation.
    return jax.make_jaxpr(lambda *a: _run_inlined(closed.jaxpr, closed.consts, *a))(*leaves), shapes


def moved_wide(equation: JaxprEqn, values: Values, wide: Values) -> list | None:
    """The results of a move or broadcast in half precision, made from the float32 originals.

    `wide` holds originals by variable; None where it has none of what is moved or broadcast.

    The transpose of a broadcast is a sum over the examples, which in half precision loses digits.
    So the original is moved or broadcast, and cast afterwards: the values are the same, and the
    transpose adds up in float32. `wide` grows: by the results of moves, and by the operands of
    casts to fewer bytes.
    """
    name = equation.primitive.name
    operands = [read(values, atom) for atom in equation.invars]
    originals = [None if isinstance(atom, Literal) else wide.get(atom) for atom in equation.invars]
    if name in REPEATS and any(original is not None for original in originals):
        return _repeated_wide(equation, operands, originals)
    if not originals or originals[0] is None:
        return None
    results: list[Any] = [v.aval for v in equation.outvars]
    # The operand of a cast is the original of its result; the cast itself is left as it is.
    if name == "convert_element_type" and is_narrower(results[0].dtype, operands[0].dtype):
        wide[equation.outvars[0]] = widened(operands[0])
    if name not in MOVES:
        return None
    moved: Any = equation.primitive.bind(originals[0], *operands[1:], **equation.params)
    moved = moved if equation.primitive.multiple_results else [moved]
    wide.update(zip(equation.outvars, moved, strict=True))
    return [array.astype(result.dtype) for array, result in zip(moved, results, strict=True)]


def _repeated_wide(equation: JaxprEqn, operands: list, originals: list) -> list | None:
    """The result of arithmetic that repeats an operand, which is repeated in float32 first."""
    shape = jnp.broadcast_shapes(*map(jnp.shape, operands))

    def repeat(operand, original):
        if original is None or operand.shape == shape:
            return operand
        if not is_narrower(operand.dtype, original.dtype):
            return operand
        return jnp.broadcast_to(original, shape).astype(operand.dtype)

    repeated = list(map(repeat, operands, originals))
    if all(new is old for new, old in zip(repeated, operands, strict=True)):
        return None
    return [equation.primitive.bind(*repeated, **equation.params)]


def is_narrower(dtype: Any, other: Any) -> bool:
    """Whether both are real floating types, and the first has fewer bytes."""
    are_real = all(jnp.issubdtype(d, jnp.floating) for d in (dtype, other))
    return are_real and dtype.itemsize < other.itemsize


def closed_over(function: Callable, *arguments: Any) -> tuple[Callable, list, PyTree]:
    """The function as one of `(consts, *arguments)`, the consts, and the shapes of its result."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    # What `run` closes over holds no tracer, so that it may outlive this trace.
    jaxpr, structure = closed.jaxpr, jax.tree.structure(shapes)

    def run(consts, *arguments):
        results = jaxpr_as_fun(ClosedJaxpr(jaxpr, consts))(*jax.tree.leaves(arguments))
        return structure.unflatten(results)

    return run, closed.consts, shapes
