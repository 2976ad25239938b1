"""A step taken apart at its products with weights, whose gradients are formed after the loop.

Reverse mode adds up the gradient of a weight step by step, `W̄ += a_tᵀ z̄_t` for every product `z_t = a_t W`. For all
steps of a segment at once it is one product of two tall matrices, `W̄ = Aᵀ Z̄` with A `[S·B, K]` and Z̄ `[S·B, M]`: the
loop writes less, and the sum is held in float32, whatever the step computes in.

The step's program is read, not the user's code, so this holds for any step. A product with a weight is a
`dot_general` without batch axes of which one side depends on the parameters alone; what does is evaluated once,
before the loop. Every other use of a parameter is differentiated where it stands.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from jbptt.programs import CHEAP, MOVES, Values, evaluate, inlined, is_narrower, moved_wide, read
from jbptt.types import Carry, Params, PyTree, Step, at_least_float32, float32_at_least, is_inexact


class Product(NamedTuple):
    """One `dot_general` with a weight: its equation, and on which side the weight stands."""

    equation: JaxprEqn
    side: int

    @property
    def weight(self) -> Any:
        """The side that depends on the parameters alone."""
        return self.equation.invars[self.side]

    @property
    def operand(self) -> Any:
        """The other side."""
        return self.equation.invars[1 - self.side]


def _kept(ndim: int, contracted: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axis for axis in range(ndim) if axis not in contracted)


def _as_matrix(array: jax.Array, columns: tuple[int, ...]) -> jax.Array:
    """Rows: all other axes. Two axes contracted at once take XLA 2.5 times as long on CPU."""
    rows = _kept(array.ndim, columns)
    return array.transpose(*rows, *columns).reshape(
        [math.prod(array.shape[i] for i in axes) for axes in (rows, columns)]
    )


def weight_gradient(product: Product, operands: jax.Array, cotangents: jax.Array) -> jax.Array:
    """`W̄ = Σ_t a_tᵀ z̄_t` from operands and cotangents `[S, ...]`, in float32 at least."""
    axes = product.equation.params["dimension_numbers"][0]
    of_operand, of_weight = tuple(axes[1 - product.side]), tuple(axes[product.side])
    shape = product.weight.aval.shape
    kept = _kept(len(shape), of_weight)
    # z has the kept axes of the left side first; S comes before all of them.
    first = 1 if product.side == 0 else cotangents.ndim - len(kept)
    left = _as_matrix(operands, tuple(axis + 1 for axis in of_operand))
    right = _as_matrix(cotangents, tuple(range(first, first + len(kept))))
    flat = lax.dot_general(
        left,
        right,
        (((0,), (0,)), ((), ())),
        precision=product.equation.params["precision"],
        preferred_element_type=float32_at_least(left.dtype, right.dtype),
    )
    order = (*of_weight, *kept)
    back = sorted(range(len(shape)), key=order.__getitem__)
    return flat.reshape([shape[axis] for axis in order]).transpose(back)


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
    products: list[Product]
    cast_from: Values  # for a parameter in another floating type, that parameter
    names: Fixed  # of what the loop takes from the parameters
    values: Fixed
    result: Any  # the structure of (carry, y)

    @property
    def others(self) -> list[jax.Array]:
        """What of the parameters is differentiated inside the loop, in float32 at least."""
        return [at_least_float32(value) for value in self.values.others]

    @property
    def operands(self) -> list[Any]:
        """What the products take from carry and x, each once."""
        return list(dict.fromkeys(product.operand for product in self.products))

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
            sides = [read(values, self.products[i].operand)]
            sides.insert(self.products[i].side, weights[self.products[i].weight])
            result = lax.dot_general_p.bind(*sides, **equation.params)
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

    def weight_gradients(self, operands: Sequence, cotangents: Sequence) -> list[jax.Array]:
        """`W̄` of every weight, in float32 at least, from `operands` and the products' cotangents, leaves `[S, ...]`."""
        operand_of = dict(zip(self.operands, operands, strict=True))
        grads: Values = {}
        for product, bar in zip(self.products, cotangents, strict=True):
            grad = weight_gradient(product, operand_of[product.operand], bar)
            grads[product.weight] = grads[product.weight] + grad if product.weight in grads else grad
        return [grads[name] for name in self.names.weights]

    def gradient(self, weights_bar: list, others_bar: list) -> Params:
        """The gradient in the parameters, in float32 at least, from those of weights and others."""
        leaves, structure = jax.tree.flatten(self.params)
        grads = {name: jnp.zeros_like(at_least_float32(leaf)) for name, leaf in zip(self.own, leaves, strict=True)}
        derived: Values = {}
        # A cast is the identity but for rounding, which the sum is spared.
        names: list[Any] = [self.cast_from.get(name, name) for name in [*self.names.weights, *self.names.others]]
        for name, bar in zip(names, [*weights_bar, *others_bar], strict=True):
            into = grads if name in grads else derived
            into[name] = into[name] + bar.astype(into[name].dtype) if name in into else bar
        if derived:

            def again(wide):
                narrow = [a.astype(jnp.result_type(leaf)) for a, leaf in zip(wide, leaves, strict=True)]
                return list(map(self.before(narrow, wide).__getitem__, derived))

            made, pull = jax.vjp(again, list(map(at_least_float32, leaves)))
            (more,) = pull([bar.astype(value.dtype) for bar, value in zip(derived.values(), made, strict=True)])
            grads = {name: grads[name] + bar for name, bar in zip(self.own, more, strict=True)}
        return structure.unflatten(grads.values())


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
    products = [Product(e, side) for e in late if (side := _weight_side(e, fixed, learned)) is not None]
    early, cheap = _worth_hoisting(alone, {product.weight for product in products})
    late = cheap + late
    multiplied = {id(product.equation) for product in products}
    used = [v for e in late if id(e) not in multiplied for v in e.invars] + jaxpr.outvars
    used = [v for v in dict.fromkeys(v for v in used if not isinstance(v, Literal)) if v in fixed]
    used = [v for v in used if not any(v in equation.outvars for equation in cheap)]
    others = [v for v in used if v in learned and is_inexact(v.aval)]
    weights = list(dict.fromkeys(product.weight for product in products))
    names = Fixed(weights, others, [v for v in used if v not in others])

    def before(leaves, wide=()):
        known = dict(zip(own, wide, strict=bool(wide)))
        values = dict(zip([*jaxpr.constvars, *own], [*closed.consts, *leaves], strict=True))
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
