"""What a function's program shows without running it: draws, names, what `vmap` would change."""

from collections.abc import Callable
from typing import Any

import jax

from jbptt.arrays import inexact_leaves, is_key, split_inexact
from jbptt.engine.dependence import inner_programs
from jbptt.engine.primitives import ALIKE, CALLS, RANDOM
from jbptt.types import Carry, Params, PyTree, Step


def same_under_vmap(step: Step, params: Params, carry: Carry, x: PyTree) -> bool:
    """Whether the program of a step and its derivative shows that `vmap` changes no number.

    And that it refuses nothing. Only what is known passes. A callback may have no rule, `rbg` draws
    other bits, and a `cond` becomes a choice between both branches, whose derivatives both count.
    """

    def step_and_pullback(params, carry, x):
        leaves, rebuild = split_inexact(carry)

        def run(params, leaves):
            return inexact_leaves(step(params, rebuild(leaves), x))

        results, pull = jax.vjp(run, params, leaves)
        return pull(results)

    return _is_alike(jax.make_jaxpr(step_and_pullback)(params, carry, x).jaxpr)


def _is_alike(jaxpr: Any) -> bool:
    return all(_is_alike_equation(equation) for equation in jaxpr.eqns)


def _is_alike_equation(equation: Any) -> bool:
    name = equation.primitive.name
    if equation.effects:
        return False
    if name in RANDOM:
        avals: list[Any] = [v.aval for v in (*equation.invars, *equation.outvars)]
        return all(str(aval.dtype) == "key<fry>" for aval in avals if is_key(aval))
    program = equation.params.get(CALLS.get(name, ""))
    return name in ALIKE if program is None else _is_alike(getattr(program, "jaxpr", program))


def draws(function: Callable, *args: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The shapes of key and numbers of every draw in `function(*args)`, in order, at any depth."""

    def of(program):
        shapes = []
        for equation in program.eqns:
            if equation.primitive.name == "random_bits":
                avals: list[Any] = [equation.invars[0].aval, equation.outvars[0].aval]
                shapes.append((avals[0].shape, avals[1].shape))
            for inner in inner_programs(equation):
                shapes += of(inner)
        return shapes

    return of(jax.make_jaxpr(function)(*args).jaxpr)


def calls(name: str, function: Callable, *args: Any) -> bool:
    """Whether `function(*args)` calls a jitted function of this name, at any depth."""

    def is_in(program):
        return any(
            equation.params.get("name") == name or any(map(is_in, inner_programs(equation)))
            for equation in program.eqns
        )

    return is_in(jax.make_jaxpr(function)(*args).jaxpr)
