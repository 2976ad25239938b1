"""What the program of a function shows without running it: draws, names, and whether `vmap` changes a number."""

from collections.abc import Callable
from typing import Any

import jax

from jbptt.arrays import is_key, split_inexact
from jbptt.engine.dependence import inner_programs
from jbptt.engine.primitives import ALIKE, CALLS, RANDOM
from jbptt.types import Carry, Params, PyTree, Step


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


def _is_alike(jaxpr: Any) -> bool:
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


def draws(program: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The shapes of key and numbers of every draw, in order, inner programs included."""
    found = []
    for equation in program.eqns:
        if equation.primitive.name == "random_bits":
            avals: list[Any] = [equation.invars[0].aval, equation.outvars[0].aval]
            found.append((avals[0].shape, avals[1].shape))
        for inner in inner_programs(equation):
            found += draws(inner)
    return found


def calls(name: str, function: Callable, *args: Any) -> bool:
    """Whether a jitted function of this name is called in the program of `function(*args)`, inner programs included."""

    def is_in(program):
        return any(
            equation.params.get("name") == name or any(map(is_in, inner_programs(equation)))
            for equation in program.eqns
        )

    return is_in(jax.make_jaxpr(function)(*args).jaxpr)
