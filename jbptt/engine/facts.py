"""What the program of a function shows without running it: draws, names, and whether `vmap` changes a number."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Jaxpr, jaxprs_in_params

from jbptt.arrays import is_key, split_inexact
from jbptt.engine.dependence import CALLS
from jbptt.engine.jaxprs import CHEAP, MOVES
from jbptt.types import Carry, Params, PyTree, Step

# fmt: off
# Give the same numbers side by side, under `vmap`, as one after another; of random numbers, threefry's alone.
ALIKE = CHEAP | MOVES | frozenset((
    "acos", "acosh", "argmax", "argmin", "asin", "asinh", "atan", "atan2", "atanh", "bitcast_convert_type", "cbrt",
    "ceil", "clamp", "cos", "cosh", "cummax", "cummin", "cumprod", "cumsum", "digamma", "div", "dot_general",
    "dynamic_update_slice", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "iota", "lgamma", "log", "log1p",
    "logistic", "nextafter", "pow", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum",
    "rem", "round", "rsqrt", "scatter-add", "scatter_add", "shift_left", "shift_right_arithmetic",
    "shift_right_logical", "sin", "sinh", "sqrt", "tan", "tanh",
))
RANDOM = frozenset(("random_bits", "random_fold_in", "random_seed", "random_split", "random_unwrap", "random_wrap"))
# fmt: on


def same_under_vmap(step: Step, params: Params, carry: Carry, x: PyTree) -> bool:
    """Whether the program of a step and its derivative shows that `vmap` changes no number and refuses nothing.

    Only what is known passes. A callback may have no rule, `rbg` draws other bits, and a `cond` becomes a choice
    between both branches, whose derivatives both count.
    """

    def both_ways(params, carry, x):
        leaves, rebuild = split_inexact(carry)
        after, pull = jax.vjp(lambda params, leaves: split_inexact(step(params, rebuild(leaves), x))[0], params, leaves)
        return pull(after)

    return _is_alike(jax.make_jaxpr(both_ways)(params, carry, x).jaxpr)


def _is_alike(jaxpr: Jaxpr) -> bool:
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in RANDOM:
            shapes: list[Any] = [v.aval for v in (*equation.invars, *equation.outvars)]
            alike = all(str(shape.dtype) == "key<fry>" for shape in shapes if is_key(shape))
        else:
            inner = equation.params.get(CALLS.get(name, ""))
            alike = name in ALIKE if inner is None else _is_alike(getattr(inner, "jaxpr", inner))
        if equation.effects or not alike:
            return False
    return True


def draws(program: Jaxpr) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The shapes of key and numbers of every draw, in order, inner programs included."""
    found = []
    for equation in program.eqns:
        if equation.primitive.name == "random_bits":
            avals: list[Any] = [equation.invars[0].aval, equation.outvars[0].aval]
            found.append((avals[0].shape, avals[1].shape))
        for inner in jaxprs_in_params(equation.params):
            found += draws(inner)
    return found


def calls(name: str, function: Callable, *args: Any) -> bool:
    """Whether a jitted function of this name is called in the program of `function(*args)`, inner programs included."""

    def is_in(program):
        return any(
            equation.params.get("name") == name or any(map(is_in, jaxprs_in_params(equation.params)))
            for equation in program.eqns
        )

    return is_in(jax.make_jaxpr(function)(*args).jaxpr)
