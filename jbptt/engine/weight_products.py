"""A step taken apart at its products with weights, whose gradients are formed after the loop.

Reverse mode adds up the gradient of a weight step by step, `W̄ += a_tᵀ z̄_t` for every product `z_t = a_t W`. For all
steps of a segment at once it is one product of two tall matrices, `W̄ = Aᵀ Z̄` with A `[S·B, K]` and Z̄ `[S·B, M]`: the
loop writes less, and the sum is held in float32, whatever the step computes in.

Rows looked up in a table are such a product too, with a matrix of ones and zeros that nobody forms: reverse mode
makes a gradient of the whole table in every step, `W̄ += onehot(i_t)ᵀ z̄_t`. Here the rows' cotangents of all steps
are added into one table, the running total.

The step's program is read, not the user's code, so this holds for any step. A product with a weight is a
`dot_general` without batch axes of which one side depends on the parameters alone; what does is evaluated once,
before the loop. Every other use of a parameter is differentiated where it stands.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from jbptt.arrays import is_inexact, widened
from jbptt.engine.jaxprs import CHEAP, MOVES, Values, as_arrays, evaluate, inlined, is_narrower, moved_wide, read
from jbptt.engine.weight_uses import Lookup, Product
from jbptt.types import Carry, Params, PyTree, Step


@jax.custom_vjp
def tap(product: jax.Array, zero: jax.Array) -> jax.Array:
    """`product`; its cotangent is that of `zero` as well."""
    del zero
    return product


tap.defvjp(lambda product, zero: (product, None), lambda _, cotangent: (cotangent, cotangent))


class Fixed(NamedTuple):
    """What a step takes from its parameters alone, as names in its program or as values.

    Attributes:
      weights: of the products: constants inside the loop.
      others: all else that depends on the parameters, differentiated where it is used.
      constants: what has no derivative.
    """

    weights: list[Any]
    others: list[Any]
    constants: list[Any]


@dataclass(frozen=True)
class Apart:
    """A step's program for arguments of one shape and given parameters."""

    params: Params
    jaxpr: Jaxpr
    own: list[Var]  # the parameters, leaf by leaf
    before: Callable[..., Values]  # of the parameters' leaves: what depends on them alone; wide, if given wide
    late: list[JaxprEqn]  # all else
    products: list[Product | Lookup]
    cast_from: Values  # for a parameter in another floating type, that parameter
    names: Fixed  # of what the loop takes from the parameters
    values: Fixed
    result: Any  # the structure of (carry, y)

    @property
    def others(self) -> list[jax.Array]:
        """What of the parameters is differentiated inside the loop, in float32 at least."""
        return [widened(value) for value in self.values.others]

    @property
    def operands(self) -> list[Any]:
        """What the products take from carry and x, each once."""
        atoms = [atom for product in self.products for atom in product.operands]
        return list(dict.fromkeys(atom for atom in atoms if not isinstance(atom, Literal)))

    def _multiplied(self, others: list, carry: Carry, x: PyTree, zeros: list | None) -> tuple[Values, list]:
        weights = dict(zip(self.names.weights, self.values.weights, strict=True))
        numbers = {id(product.equation): i for i, product in enumerate(self.products)}
        wide = dict(zip(self.names.others, others, strict=True))
        others = [value.astype(jnp.result_type(own)) for value, own in zip(others, self.values.others, strict=True)]
        names = [*self.names.others, *self.names.constants, *self.jaxpr.invars[len(self.own) :]]
        given = [*others, *self.values.constants, *jax.tree.leaves((carry, x))]
        results = []

        def multiply(equation, values):
            i = numbers.get(id(equation))
            if i is None:
                return moved_wide(equation, values, wide)
            product = self.products[i]
            result = product.bind(weights[product.weight], [read(values, atom) for atom in product.operands])
            results.append(result)
            return [result if zeros is None else tap(result, zeros[i])]

        values = evaluate(self.jaxpr, self.late, dict(zip(names, given, strict=True)), multiply)
        return values, results

    def zeros(self, carry: Carry, x: PyTree) -> list[jax.Array]:
        """One for each product, of its shape and placed as it is."""
        shapes = jax.eval_shape(lambda: self._multiplied(self.others, carry, x, None)[1])  # no effect takes place
        return [lax.full_like(shape, 0) for shape in shapes]

    def step(self, others: list, carry: Carry, inputs: tuple[PyTree, list]) -> tuple[Carry, tuple[PyTree, list]]:
        """`carry, (y, operands)` of a step on `(x, zeros)`; the cotangent of `zeros[i]` is that of product i."""
        x, zeros = inputs
        values, _ = self._multiplied(others, carry, x, zeros)
        carry, y = jax.tree.unflatten(self.result, [read(values, atom) for atom in self.jaxpr.outvars])
        return carry, (y, [read(values, name) for name in self.operands])

    def start(self, total: Params | None) -> Values:
        """What gradients are added to, by variable, in float32 at least: a running total of the parameters', or zeros.

        A weight that is computed from parameters has a place of its own; `gradient` goes on from there.
        """
        leaves = jax.tree.leaves(self.params if total is None else total)
        grads: Values = dict(zip(self.own, map(widened, leaves), strict=True))
        if total is None:
            grads = {name: jnp.zeros_like(leaf) for name, leaf in grads.items()}
        for name, value in zip(self.names.weights, self.values.weights, strict=True):
            if self._home(name) not in grads:
                grads[name] = jnp.zeros_like(widened(value))
        return grads

    @property
    def homes(self) -> list[Any]:
        """Where the gradients of the products' weights are added."""
        return list(dict.fromkeys(self._home(product.weight) for product in self.products))

    def _home(self, name: Any) -> Any:
        """A cast is the identity but for rounding, which the sum is spared."""
        return self.cast_from.get(name, name)

    def add_products(self, grads: Values, operands: Sequence, cotangents: Sequence) -> Values:
        """Adds `W̄` of every weight, from `operands` and the products' cotangents, leaves `[S, ...]`."""
        known, grads = dict(zip(self.operands, operands, strict=True)), dict(grads)
        for product, bar in zip(self.products, cotangents, strict=True):
            home = self._home(product.weight)
            whole = [
                jnp.broadcast_to(atom.val, len(bar)) if isinstance(atom, Literal) else known[atom]
                for atom in product.operands
            ]
            grads[home] = product.add_gradient(grads[home], whole, bar)
        return grads

    def gradient(self, grads: Values, others_bar: list) -> Params:
        """The gradient in the parameters, from `grads` as `add_products` leaves them and the cotangents of `others`."""
        leaves, structure = jax.tree.flatten(self.params)
        grads = dict(grads)
        for name, bar in zip(self.names.others, others_bar, strict=True):
            home = self._home(name)
            grads[home] = grads[home] + bar.astype(grads[home].dtype) if home in grads else bar
        derived = [name for name in grads if name not in self.own]
        if derived:

            def again(wide):
                narrow = [a.astype(jnp.result_type(leaf)) for a, leaf in zip(wide, leaves, strict=True)]
                return list(map(self.before(narrow, wide).__getitem__, derived))

            made, pull = jax.vjp(again, list(map(widened, leaves)))
            (more,) = pull([grads[name].astype(value.dtype) for name, value in zip(derived, made, strict=True)])
            grads |= {name: grads[name] + bar for name, bar in zip(self.own, more, strict=True)}
        return structure.unflatten([grads[name] for name in self.own])


def _is_placed(aval: Any) -> bool:
    """Whether an explicit mesh divides an axis: then JAX alone knows where the gradient belongs."""
    return any(axis is not None for axis in getattr(getattr(aval, "sharding", None), "spec", ()))


def _weight_side(equation: JaxprEqn, fixed: set, learned: set) -> int | None:
    """On which side of a `dot_general` a weight stands; None if that is not what the equation is."""
    if equation.primitive is not lax.dot_general_p or any(equation.params["dimension_numbers"][1]):
        return None
    weights = [i for i, v in enumerate(equation.invars) if not isinstance(v, Literal) and v in learned]
    varying = [v for v in equation.invars if not isinstance(v, Literal) and v not in fixed]
    inexact = all(is_inexact(v.aval) and not _is_placed(v.aval) for v in equation.invars)
    return weights[0] if inexact and len(weights) == len(varying) == 1 else None


def _is_lookup(equation: JaxprEqn, fixed: set, learned: set) -> bool:
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


def _worth_hoisting(equations: list[JaxprEqn], weights: set[Var]) -> tuple[list[JaxprEqn], list[JaxprEqn]]:
    """Those that lead to a weight or to something dear; the others cost nothing where they stand.

    A bias that is only moved or repeated is so a parameter itself, whose gradient adds up in float32. In half
    precision that takes all but moves and casts out of the loop: what comes of them adds up in float32.
    """

    def costs(equation):
        narrow = any(is_narrower(v.aval.dtype, jnp.dtype(jnp.float32)) for v in equation.outvars)
        name = equation.primitive.name
        return name not in CHEAP or (narrow and name not in MOVES and name != "convert_element_type")

    wanted, early, cheap = set(weights), [], []
    for equation in reversed(equations):
        if wanted.intersection(equation.outvars) or costs(equation):
            wanted.update(v for v in equation.invars if not isinstance(v, Literal))
            early.append(equation)
        else:
            cheap.append(equation)
    return early[::-1], cheap[::-1]


def take_apart(step: Step, params: Params, carry: Carry, x: PyTree) -> Apart:
    """Reads the step's program for arguments of these shapes."""
    closed, result = inlined(step, params, carry, x)
    jaxpr = closed.jaxpr
    own = jaxpr.invars[: len(jax.tree.leaves(params))]
    fixed, learned, alone, late = {*jaxpr.constvars, *own}, {*own}, [], []
    for equation in jaxpr.eqns:
        names = {v for v in equation.invars if not isinstance(v, Literal)}
        if equation.effects or not names <= fixed:
            late.append(equation)
            continue
        alone.append(equation)
        fixed.update(equation.outvars)
        learned.update(equation.outvars if names & learned else ())
    products: list[Product | Lookup] = []
    for equation in late:
        if (side := _weight_side(equation, fixed, learned)) is not None:
            products.append(Product(equation, side))
        elif _is_lookup(equation, fixed, learned):
            products.append(Lookup(equation))
    early, cheap = _worth_hoisting(alone, {product.weight for product in products})
    late = cheap + late
    multiplied = {id(product.equation) for product in products}
    used = [v for e in late if id(e) not in multiplied for v in e.invars] + jaxpr.outvars
    used += [v for product in products for v in product.operands]
    used = [v for v in dict.fromkeys(v for v in used if not isinstance(v, Literal)) if v in fixed]
    used = [v for v in used if not any(v in equation.outvars for equation in cheap)]
    others = [v for v in used if v in learned and is_inexact(v.aval)]
    weights = list(dict.fromkeys(product.weight for product in products))
    names = Fixed(weights, others, [v for v in used if v not in others])

    def before(leaves, wide=()):
        known = dict(zip(own, wide, strict=bool(wide)))
        values = dict(zip([*jaxpr.constvars, *own], [*as_arrays(closed.consts), *leaves], strict=True))
        values = evaluate(jaxpr, early, values, lambda equation, values: moved_wide(equation, values, known))
        return {**values, **known}

    values = jax.tree.map(before(jax.tree.leaves(params)).__getitem__, names)
    cast_from: Values = {}
    for equation in early:
        if equation.primitive is lax.convert_element_type_p:
            made: Any = equation.outvars[0]
            given: Any = equation.invars[0]
            if all(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in (made, given)):
                cast_from[made] = cast_from.get(given, given)
    cast_from = {name: origin for name, origin in cast_from.items() if origin in own}
    return Apart(params, jaxpr, own, before, late, products, cast_from, names, values, jax.tree.structure(result))
