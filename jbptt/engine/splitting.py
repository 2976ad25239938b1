"""A step's program divided: what runs once, before the loop, and what runs in every step.

What depends on the parameters alone is the same in every step: invariant. Products of such an
array with one that varies are products with a weight, and lookups in one are lookups in a table
(`weight_uses`): `weight_products` forms their gradients after the loop.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from jbptt.arrays import is_inexact
from jbptt.engine.jaxprs import Values, evaluate, is_narrower, moved_wide, operands_of, variables_of
from jbptt.engine.primitives import CHEAP, MOVES
from jbptt.engine.weight_uses import Lookup, Product, is_lookup, weight_side


class Invariants(NamedTuple):
    """What the loop takes that is the same in every step, as variables or as arrays.

    Attributes:
      weights: the sides of products and the tables of lookups, whose gradients follow the loop.
      loop_params: what the loop uses of the parameters in any other way (a bias, a factor). It is
        differentiated inside the loop, and its cotangents are summed there, in float32. A weight
        that is also used otherwise is in both lists.
      constants: what has no derivative: integers, keys, arrays that the step closes over.
    """

    weights: list[Any]
    loop_params: list[Any]
    constants: list[Any]


@dataclass(frozen=True, eq=False)
class SplitProgram:
    """A step's program, divided. It holds no array, so that it can be static data of a pytree.

    Attributes:
      jaxpr: the whole program, of parameters, carry and x.
      params: the parameters in it, leaf by leaf.
      hoisted: the equations that run once, before the loop: on parameters alone.
      body: all others, those of the loop.
      products: the products and lookups with weights in the body.
      cast_from: for a parameter that was cast to another floating type, the parameter itself.
      invariants: the variables that the body takes from before the loop.
      result: the structure of (next_carry, y).
    """

    jaxpr: Jaxpr
    params: list[Var]
    hoisted: list[JaxprEqn]
    body: list[JaxprEqn]
    products: list[Product | Lookup]
    cast_from: dict[Var, Var]
    invariants: Invariants
    result: Any

    @property
    def operands(self) -> list[Var]:
        """What the products take from carry and x, each once."""
        return variables_of(atom for product in self.products for atom in product.operands)

    @property
    def accumulators(self) -> list[Var]:
        """Those of the products' weights; see `accumulator`."""
        return list(dict.fromkeys(self.accumulator(product.weight) for product in self.products))

    def accumulator(self, variable: Var) -> Var:
        """Where the gradient of a variable is summed: in the parameter it is a cast of, or itself.

        A cast is the identity but for rounding, which the sum is spared.
        """
        return self.cast_from.get(variable, variable)

    def run_hoisted(self, consts: list, leaves: list, wide_leaves: list | None = None) -> Values:
        """What depends on the parameters' leaves alone, by variable.

        In float32 at least, as far as that is known, where the leaves are given `wide` too.
        """
        wide = {} if wide_leaves is None else dict(zip(self.params, wide_leaves, strict=True))
        variables = [*self.jaxpr.constvars, *self.params]
        values = dict(zip(variables, [*consts, *leaves], strict=True))

        def widely(equation, values):
            return moved_wide(equation, values, wide)

        values = evaluate(self.jaxpr, self.hoisted, values, widely)
        # In the place of what was rounded stands what is known in float32.
        return {**values, **wide}


def split_program(jaxpr: Jaxpr, num_params: int, result: Any) -> SplitProgram:
    """Divides the program of a step, whose first `num_params` inputs are its parameters."""
    params = jaxpr.invars[:num_params]
    # invariant: variables that depend on parameters and constants alone.
    # learned: those of them that depend on a parameter.
    invariant, learned = {*jaxpr.constvars, *params}, {*params}
    on_params, varying = [], []
    for equation in jaxpr.eqns:
        operands = set(variables_of(equation.invars))
        if equation.effects or not operands <= invariant:
            varying.append(equation)
            continue
        on_params.append(equation)
        invariant.update(equation.outvars)
        if operands & learned:
            learned.update(equation.outvars)
    products = _products(varying, invariant, learned)
    hoisted, cheap = _worth_hoisting(on_params, {product.weight for product in products})
    cheap_results = {v for equation in cheap for v in equation.outvars}

    # What the body takes from before the loop, in the order of its use. A weight is among it only
    # where it is used otherwise too.
    multiplied = {id(product.equation) for product in products}
    others = [equation for equation in [*cheap, *varying] if id(equation) not in multiplied]
    products_operands = [atom for product in products for atom in product.operands]
    used = variables_of([*operands_of(others), *jaxpr.outvars, *products_operands])
    used = [v for v in used if v in invariant and v not in cheap_results]
    loop_params = [v for v in used if v in learned and is_inexact(v.aval)]
    invariants = Invariants(
        weights=list(dict.fromkeys(product.weight for product in products)),
        loop_params=loop_params,
        constants=[v for v in used if v not in loop_params],
    )
    casts = _casts(hoisted, params)
    body = [*cheap, *varying]
    return SplitProgram(jaxpr, params, hoisted, body, products, casts, invariants, result)


def _products(equations: list[JaxprEqn], invariant: set, learned: set) -> list[Product | Lookup]:
    """The products and lookups with weights among equations on what varies."""
    products: list[Product | Lookup] = []
    for equation in equations:
        if (side := weight_side(equation, invariant, learned)) is not None:
            products.append(Product(equation, side))
        elif is_lookup(equation, invariant, learned):
            products.append(Lookup(equation))
    return products


def _worth_hoisting(
    equations: list[JaxprEqn],
    weights: set[Var],
) -> tuple[list[JaxprEqn], list[JaxprEqn]]:
    """Divides equations on parameters alone: those to run before the loop, those to leave in it.

    Before it: what leads to a weight, and what is not cheap. The rest costs next to nothing inside
    the loop, and there the loop differentiates the parameter itself: a bias that is only broadcast
    keeps its sum in float32 (`moved_wide`). Arithmetic in half precision is hoisted too, even if
    cheap, so that the gradient in its result is summed in float32.
    """

    def costs(equation):
        name = equation.primitive.name
        if name not in CHEAP:
            return True
        if name in MOVES or name == "convert_element_type":
            return False
        return any(is_narrower(v.aval.dtype, jnp.dtype(jnp.float32)) for v in equation.outvars)

    wanted, hoisted, cheap = set(weights), [], []
    for equation in reversed(equations):
        if wanted.intersection(equation.outvars) or costs(equation):
            wanted.update(variables_of(equation.invars))
            hoisted.append(equation)
        else:
            cheap.append(equation)
    return hoisted[::-1], cheap[::-1]


def _casts(equations: list[JaxprEqn], params: list[Var]) -> dict[Var, Var]:
    """For each cast of a parameter, or cast of a cast, to a floating type, that parameter."""
    origins: dict[Any, Any] = {}
    for equation in equations:
        if equation.primitive is not lax.convert_element_type_p:
            continue
        operand: Any = equation.invars[0]
        result: Any = equation.outvars[0]
        if isinstance(operand, Literal):
            continue
        if all(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in (operand, result)):
            origins[result] = origins.get(operand, operand)
    return {result: origin for result, origin in origins.items() if origin in params}
