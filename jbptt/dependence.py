"""What depends on what, read off a traced program: where no gradient can flow, before anything runs."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Literal

from jbptt.types import Carry, Loss, Params, PyTree, Step, is_inexact, split_inexact


def dependences(function: Callable, *arguments: Any) -> list[frozenset[int]]:
    """For each output leaf of `function(*arguments)`, which input leaves (by number) it may depend on.

    One traversal of the jaxpr; an equation's outputs are taken to depend on all of its inputs, so an
    input that is missing here has no influence for certain, and one that is listed may have none.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    sources = {variable: frozenset([i]) for i, variable in enumerate(jaxpr.invars)}

    def of(variables):
        return frozenset().union(*(sources.get(v, frozenset()) for v in variables if not isinstance(v, Literal)))

    for equation in jaxpr.eqns:
        found = of(equation.invars)
        sources.update(dict.fromkeys(equation.outvars, found))
    return [of([variable]) for variable in jaxpr.outvars]


def missing_path(step: Step, loss: Loss, params: Params, carry: Carry, x: PyTree, target: PyTree) -> str:
    """Why the gradient of the loss in `params` is exactly zero whatever their values; "" where it need not be.

    Reads the derivative of one step, in which `stop_gradient`, rounding and integers leave no trace of the
    cotangents: a path leads from a parameter over any number of carries to the loss, or there is none.
    """

    def value_of(y, target):
        result = loss(y, target)
        return result[0] if isinstance(result, tuple) else result

    def pull_loss(cotangent, y, target):
        leaves, rebuild = split_inexact(y)
        return jax.vjp(lambda leaves: value_of(rebuild(leaves), target), leaves)[1](cotangent)

    def pull_step(cotangents, params, carry, x, target):
        leaves, rebuild = split_inexact(carry)

        def run(params, leaves):
            after, y = step(params, rebuild(leaves), x)
            return value_of(y, target), split_inexact(after)[0]

        return jax.vjp(run, params, leaves)[1](cotangents)

    after, y = jax.eval_shape(step, params, carry, x)
    value, emitted = jax.eval_shape(value_of, y, target), [c for c in jax.tree.leaves(after) if is_inexact(c)]
    if not any(0 in found for found in dependences(pull_loss, value, y, target)):
        return "the loss does not depend on y"
    found = dependences(pull_step, (value, emitted), params, carry, x, target)
    to_params, to_carries = found[: len(found) - len(emitted)], found[len(found) - len(emitted) :]
    reached = {0}  # the cotangents that are not zero: the loss's (input 0), those of carries it depends on
    for _ in emitted:
        reached |= {i for i, sources in enumerate(to_carries, 1) if sources & reached}
    return "" if any(sources & reached for sources in to_params) else "no path leads from params to the loss"
