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
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from jbptt.arrays import is_inexact, split_inexact, widened
from jbptt.engine.dependence import Paths, chosen
from jbptt.engine.jaxprs import Values, as_arrays, evaluate, inlined, is_narrower, moved_wide, read
from jbptt.engine.primitives import CHEAP, MOVES
from jbptt.engine.weight_uses import Lookup, Product, is_lookup, weight_side
from jbptt.types import Carry, Params, PyTree, Step


@jax.custom_vjp
def tap(product: jax.Array, zero: jax.Array) -> jax.Array:
    """`product`; its cotangent is also given to `zero`, where z̄ is read. `product + zero` would cost an addition."""
    del zero
    return product


tap.defvjp(lambda product, zero: (product, None), lambda _, cotangent: (cotangent, cotangent))


class OfParams(NamedTuple):
    """What a step takes from its parameters alone, as names in its program or as values.

    Attributes:
      weights: the sides of products and the tables of lookups: constants of the loop, whose gradients follow it.
      others: what the loop uses of the parameters in any other way (a bias, a factor): differentiated inside the
        loop, its cotangents added up there in float32. A weight that is also used otherwise is in both lists.
      constants: what has no derivative: integers, keys, arrays that the step closes over.
    """

    weights: list[Any]
    others: list[Any]
    constants: list[Any]


@dataclass(frozen=True, eq=False)
class SplitProgram:
    """A step's program, split; it holds no array, so that it can be static data of a pytree.

    Attributes:
      jaxpr: the whole program, of parameters, carry and x.
      own: the parameters in it, leaf by leaf.
      early: the equations on parameters alone that are worth running once, before the loop.
      late: all others, those of the loop.
      products: the products and lookups with weights among the late ones.
      cast_from: for a parameter in another floating type, that parameter.
      names: of what the loop takes from the parameters.
      result: the structure of (carry, y).
    """

    jaxpr: Jaxpr
    own: list[Var]
    early: list[JaxprEqn]
    late: list[JaxprEqn]
    products: list[Product | Lookup]
    cast_from: Values
    names: OfParams
    result: Any

    @property
    def operands(self) -> list[Any]:
        """What the products take from carry and x, each once."""
        atoms = [atom for product in self.products for atom in product.operands]
        return list(dict.fromkeys(atom for atom in atoms if not isinstance(atom, Literal)))

    @property
    def homes(self) -> list[Any]:
        """Where the gradients of the products' weights are added up; see `home`."""
        return list(dict.fromkeys(self.home(product.weight) for product in self.products))

    def home(self, name: Any) -> Any:
        """Where the gradient of `name` is added up: the parameter that it is a cast of, or itself.

        A cast is the identity but for rounding, which the sum is spared.
        """
        return self.cast_from.get(name, name)

    def before_the_loop(self, consts: list, leaves: list, wide: Sequence = ()) -> Values:
        """What depends on the parameters' leaves alone; in float32 at least where they are given `wide` too."""
        known = dict(zip(self.own, wide, strict=bool(wide)))
        values = dict(zip([*self.jaxpr.constvars, *self.own], [*consts, *leaves], strict=True))
        values = evaluate(self.jaxpr, self.early, values, lambda equation, values: moved_wide(equation, values, known))
        return {**values, **known}


@partial(jax.tree_util.register_dataclass, data_fields=["params", "consts", "values"], meta_fields=["program"])
@dataclass(frozen=True)
class SplitStep:
    """A step for arguments of one shape, split at its products with weights, with the arrays of its parameters.

    Attributes:
      program: the step's.
      params: the parameters.
      consts: arrays that the step closes over.
      values: what the loop takes from the parameters.
    """

    program: SplitProgram
    params: Params
    consts: list
    values: OfParams

    @property
    def others(self) -> list[jax.Array]:
        """What of the parameters is differentiated inside the loop, in float32 at least."""
        return [widened(value) for value in self.values.others]

    def _run(self, others: list, carry: Carry, x: PyTree, zeros: list | None) -> tuple[Values, list]:
        program, values = self.program, self.values
        names = program.names
        weights = dict(zip(names.weights, values.weights, strict=True))
        numbers = {id(product.equation): i for i, product in enumerate(program.products)}
        wide = dict(zip(names.others, others, strict=True))
        others = [one.astype(jnp.result_type(own)) for one, own in zip(others, values.others, strict=True)]
        inner = [*names.others, *names.constants, *program.jaxpr.invars[len(program.own) :]]
        given = [*others, *values.constants, *jax.tree.leaves((carry, x))]
        results = []

        def multiply(equation, values):
            i = numbers.get(id(equation))
            if i is None:
                return moved_wide(equation, values, wide)
            product = program.products[i]
            operands = [read(values, atom) for atom in product.operands]
            result = product.bind(weights[product.weight], operands)
            results.append(result)
            return [result if zeros is None else tap(result, zeros[i])]

        inside = evaluate(program.jaxpr, program.late, dict(zip(inner, given, strict=True)), multiply)
        return inside, results

    def zeros(self, carry: Carry, x: PyTree) -> list[jax.Array]:
        """One array of zeros for each product, of its shape and placed as it is: the second argument of `tap`."""
        shapes = jax.eval_shape(lambda: self._run(self.others, carry, x, None)[1])  # no effect takes place
        return [lax.full_like(shape, 0) for shape in shapes]

    def step(self, others: list, carry: Carry, inputs: tuple[PyTree, list]) -> tuple[Carry, tuple[PyTree, list]]:
        """`carry, (y, operands)` of a step on `(x, zeros)`; the cotangent of `zeros[i]` is that of product i."""
        x, zeros = inputs
        values, _ = self._run(others, carry, x, zeros)
        results = [read(values, atom) for atom in self.program.jaxpr.outvars]
        carry, y = jax.tree.unflatten(self.program.result, results)
        return carry, (y, [read(values, name) for name in self.program.operands])

    def vjp(
        self,
        others: list,
        zeros: list,
        carry: Carry,
        inputs: PyTree,
        live: Paths,
        of_inputs: tuple[bool, ...] = (),
    ) -> tuple[tuple, Callable]:
        """`(carry, outputs, operands)`, and the way back from the carry and the outputs that a loss reads.

        The way back takes the cotangents of those leaves and gives those of `others`, `zeros`, the carry and the
        inputs; of the inexact leaves of the inputs, those that `of_inputs` chooses, () for none.
        """
        leaves, rebuild = split_inexact(carry)
        input_leaves, rebuild_inputs = split_inexact(inputs)
        of_inputs = of_inputs or (False,) * len(input_leaves)

        def run(others, zeros, leaves, moving):
            moving = iter(moving)
            pairs = zip(of_inputs, input_leaves, strict=True)
            inputs = rebuild_inputs([next(moving) if moves else leaf for moves, leaf in pairs])
            after, (outputs, operands) = self.step(others, rebuild(leaves), (inputs, zeros))
            of_loss = chosen(split_inexact(after)[0], live.carries), chosen(split_inexact(outputs)[0], live.outputs)
            return of_loss, (after, outputs, operands)

        moving = chosen(input_leaves, of_inputs)
        _, pull, results = jax.vjp(run, others, zeros, leaves, moving, has_aux=True)
        return results, pull

    def first_sums(self, total: Params | None) -> Values:
        """What gradients are added to, by variable, in float32 at least: a running total of the parameters', or zeros.

        A weight that is computed from parameters has a place of its own; `gradient` goes on from there.
        """
        leaves = jax.tree.leaves(self.params if total is None else total)
        grads: Values = dict(zip(self.program.own, map(widened, leaves), strict=True))
        if total is None:
            grads = {name: jnp.zeros_like(leaf) for name, leaf in grads.items()}
        for name, value in zip(self.program.names.weights, self.values.weights, strict=True):
            if self.program.home(name) not in grads:
                grads[name] = jnp.zeros_like(widened(value))
        return grads

    def add_products(self, grads: Values, operands: Sequence, cotangents: Sequence) -> Values:
        """Adds `W̄` of every weight, from `operands` and the products' cotangents, leaves `[S, ...]`.

        A cotangent None is zero: no loss reads what comes of that product.
        """
        known, grads = dict(zip(self.program.operands, operands, strict=True)), dict(grads)
        for product, bar in zip(self.program.products, cotangents, strict=True):
            if bar is None:
                continue
            home = self.program.home(product.weight)
            whole = [
                jnp.broadcast_to(atom.val, len(bar)) if isinstance(atom, Literal) else known[atom]
                for atom in product.operands
            ]
            grads[home] = product.add_gradient(grads[home], whole, bar)
        return grads

    def gradient(self, grads: Values, others_bar: list) -> Params:
        """The gradient in the parameters, from `grads` as `add_products` leaves them and the cotangents of `others`."""
        program = self.program
        leaves, structure = jax.tree.flatten(self.params)
        grads = dict(grads)
        for name, bar in zip(program.names.others, others_bar, strict=True):
            home = program.home(name)
            grads[home] = grads[home] + bar.astype(grads[home].dtype) if home in grads else bar
        derived = [name for name in grads if name not in program.own]
        if derived:

            def again(wide):
                narrow = [a.astype(jnp.result_type(leaf)) for a, leaf in zip(wide, leaves, strict=True)]
                values = program.before_the_loop(self.consts, narrow, wide)
                return [values[name] for name in derived]

            made, pull = jax.vjp(again, list(map(widened, leaves)))
            (more,) = pull([grads[name].astype(value.dtype) for name, value in zip(derived, made, strict=True)])
            grads |= {name: grads[name] + bar for name, bar in zip(program.own, more, strict=True)}
        return structure.unflatten([grads[name] for name in program.own])


def _worth_hoisting(equations: list[JaxprEqn], weights: set[Var]) -> tuple[list[JaxprEqn], list[JaxprEqn]]:
    """Divides equations on parameters alone: those to run once, before the loop, and those that stay in it.

    Run once: what leads to a weight, and what is not cheap. The rest costs next to nothing inside the loop, and there
    the loop differentiates the parameter itself: a bias that is only broadcast keeps its sum in float32 (`moved_wide`).
    Arithmetic in half precision is run once too, even if cheap, so that what comes of it adds up in float32.
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


def split_step(step: Step, params: Params, carry: Carry, x: PyTree) -> SplitStep:
    """Reads the step's program for arguments of these shapes."""
    closed, result = inlined(step, params, carry, x)
    jaxpr = closed.jaxpr
    own = jaxpr.invars[: len(jax.tree.leaves(params))]
    # fixed: variables that depend on parameters and constants alone; learned: those of them that depend on a parameter.
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
        if (side := weight_side(equation, fixed, learned)) is not None:
            products.append(Product(equation, side))
        elif is_lookup(equation, fixed, learned):
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
    names = OfParams(weights, others, [v for v in used if v not in others])
    cast_from: Values = {}
    for equation in early:
        if equation.primitive is lax.convert_element_type_p:
            made: Any = equation.outvars[0]
            given: Any = equation.invars[0]
            if all(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in (made, given)):
                cast_from[made] = cast_from.get(given, given)
    cast_from = {name: origin for name, origin in cast_from.items() if origin in own}
    structure = jax.tree.structure(result)
    program = SplitProgram(jaxpr, own, early, late, products, cast_from, names, structure)
    consts = as_arrays(closed.consts)
    values = program.before_the_loop(consts, jax.tree.leaves(params))
    return SplitStep(program, params, consts, jax.tree.map(values.__getitem__, names))
