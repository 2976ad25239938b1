"""A step taken apart at its products with weights, whose gradients are formed after the loop.

Reverse mode adds up the gradient of a weight step by step, `W̄ += a_tᵀ z̄_t` for every product
`z_t = a_t W`. For all steps of a segment at once it is one product of two tall matrices,
`W̄ = Aᵀ Z̄` with A `[S·B, K]` and Z̄ `[S·B, M]`: the loop writes less, and the sum is held in
float32, whatever the step computes in.

Rows looked up in a table are such a product too, with a matrix of ones and zeros that nobody forms:
reverse mode makes a gradient of the whole table in every step, `W̄ += onehot(i_t)ᵀ z̄_t`. Here the
rows' cotangents of all steps are added into one table, the running total.

The step's program is read, not the user's code, so this holds for any step. A product with a weight
is a `dot_general` without batch axes, one side of which depends on the parameters alone. Every
other use of a parameter is differentiated where it stands.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal

from jbptt.arrays import split_inexact, widened
from jbptt.engine.dependence import Paths, chosen, replaced
from jbptt.engine.jaxprs import Values, as_arrays, evaluate, inlined, moved_wide, read
from jbptt.engine.splitting import Invariants, SplitProgram, split_program
from jbptt.types import Carry, Params, PyTree, Step


@jax.custom_vjp
def tap(product: jax.Array, zero: jax.Array) -> jax.Array:
    """`product`; its cotangent is also given to `zero`, where z̄ is read.

    `product + zero` would do the same and cost an addition.
    """
    del zero
    return product


tap.defvjp(lambda product, zero: (product, None), lambda _, cotangent: (cotangent, cotangent))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "consts", "invariants"],
    meta_fields=["program"],
)
@dataclass(frozen=True)
class SplitStep:
    """A step for arguments of one shape, split at its products with weights, with its arrays.

    Attributes:
      program: the step's.
      params: the parameters.
      consts: arrays that the step closes over.
      invariants: the arrays that the loop takes from before it.
    """

    program: SplitProgram
    params: Params
    consts: list
    invariants: Invariants

    @property
    def loop_params(self) -> list[jax.Array]:
        """What the loop itself differentiates of the parameters, in float32 at least."""
        return [widened(array) for array in self.invariants.loop_params]

    def _run(
        self,
        loop_params: list,
        carry: Carry,
        x: PyTree,
        zeros: list | None,
    ) -> tuple[Values, list]:
        """All values of one step, by variable, and the results of its products.

        loop_params: in float32 at least; they are cast back to what the step computes in.
        zeros: for each product what it is tapped with; None leaves the taps out.
        """
        program, arrays = self.program, self.invariants
        weights = dict(zip(program.invariants.weights, arrays.weights, strict=True))
        wide = dict(zip(program.invariants.loop_params, loop_params, strict=True))
        product_numbers = {id(product.equation): i for i, product in enumerate(program.products)}
        results = []

        def multiply(equation, values):
            i = product_numbers.get(id(equation))
            if i is None:
                return moved_wide(equation, values, wide)
            product = program.products[i]
            operands = [read(values, atom) for atom in product.operands]
            result = product.bind(weights[product.weight], operands)
            results.append(result)
            return [result if zeros is None else tap(result, zeros[i])]

        pairs = zip(loop_params, arrays.loop_params, strict=True)
        narrow = [array.astype(jnp.result_type(original)) for array, original in pairs]
        carry_and_x = program.jaxpr.invars[len(program.params) :]
        variables = [*program.invariants.loop_params, *program.invariants.constants, *carry_and_x]
        inputs = [*narrow, *arrays.constants, *jax.tree.leaves((carry, x))]
        values = dict(zip(variables, inputs, strict=True))
        return evaluate(program.jaxpr, program.body, values, multiply), results

    def zeros(self, carry: Carry, x: PyTree) -> list[jax.Array]:
        """One array of zeros for each product, of its shape and placed as it is: for `tap`."""

        def products():
            return self._run(self.loop_params, carry, x, None)[1]

        shapes = jax.eval_shape(products)  # so no effect of the step takes place
        return [lax.full_like(shape, 0) for shape in shapes]

    def step(
        self,
        loop_params: list,
        carry: Carry,
        x_and_zeros: tuple[PyTree, list],
    ) -> tuple[Carry, tuple[PyTree, list]]:
        """`next_carry, (y, operands)` of a step on `(x, zeros)`.

        The cotangent of `zeros[i]` is that of product i.
        """
        x, zeros = x_and_zeros
        values, _ = self._run(loop_params, carry, x, zeros)
        results = [read(values, atom) for atom in self.program.jaxpr.outvars]
        next_carry, y = jax.tree.unflatten(self.program.result, results)
        return next_carry, (y, [values[v] for v in self.program.operands])

    def vjp(
        self,
        loop_params: list,
        zeros: list,
        carry: Carry,
        inputs: PyTree,
        live: Paths,
        perturbed: tuple[bool, ...] | None = None,
    ) -> tuple[tuple, Callable]:
        """`(next_carry, outputs, operands)`, and the way back from what a loss reads of them.

        The way back takes the cotangents of `live` leaves and gives those of `loop_params`,
        `zeros`, the carry, and the inexact leaves of the inputs that are `perturbed`.

        Args:
          loop_params, zeros: in float32 at least; one for each product (see `zeros`).
          carry, inputs: what one step takes.
          live: which leaves of its results a loss reads.
          perturbed: which inexact leaves of the inputs are differentiated; None for none.
        """
        carry_leaves, rebuild_carry = split_inexact(carry)
        input_leaves, rebuild_inputs = split_inexact(inputs)
        if perturbed is None:
            perturbed = (False,) * len(input_leaves)

        def run(loop_params, zeros, carry_leaves, perturbed_leaves):
            carry = rebuild_carry(carry_leaves)
            inputs = rebuild_inputs(replaced(input_leaves, perturbed, perturbed_leaves))
            next_carry, (outputs, operands) = self.step(loop_params, carry, (inputs, zeros))
            return live.leaves(next_carry, outputs), (next_carry, outputs, operands)

        arguments = loop_params, zeros, carry_leaves, chosen(input_leaves, perturbed)
        _, pull, results = jax.vjp(run, *arguments, has_aux=True)
        return results, pull

    def first_sums(self, total: Params | None) -> Values:
        """What gradients are added to, by variable, in float32 at least.

        For each parameter its running total, or zeros. A weight that is computed from parameters
        has a sum of its own, which `gradient` turns into theirs.
        """
        leaves = jax.tree.leaves(self.params if total is None else total)
        sums: Values = dict(zip(self.program.params, map(widened, leaves), strict=True))
        if total is None:
            sums = {variable: jnp.zeros_like(leaf) for variable, leaf in sums.items()}
        weights = zip(self.program.invariants.weights, self.invariants.weights, strict=True)
        for variable, weight in weights:
            if self.program.accumulator(variable) not in sums:
                sums[variable] = jnp.zeros_like(widened(weight))
        return sums

    def add_products(self, sums: Values, operands: Sequence, products_bar: Sequence) -> Values:
        """Adds W̄ of every weight to `sums`, from stacks `[S, ...]` of operands and cotangents.

        A cotangent None is zero: no loss reads what comes of that product.
        """
        sums = dict(sums)
        stacks = dict(zip(self.program.operands, operands, strict=True))
        for product, bar in zip(self.program.products, products_bar, strict=True):
            if bar is None:
                continue
            of_product = [
                jnp.broadcast_to(atom.val, len(bar)) if isinstance(atom, Literal) else stacks[atom]
                for atom in product.operands
            ]
            accumulator = self.program.accumulator(product.weight)
            sums[accumulator] = product.add_gradient(sums[accumulator], of_product, bar)
        return sums

    def gradient(self, sums: Values, loop_params_bar: list) -> Params:
        """The gradient in the parameters: of `sums`, and of the sums that the loop made itself."""
        program = self.program
        sums = dict(sums)
        for variable, bar in zip(program.invariants.loop_params, loop_params_bar, strict=True):
            accumulator = program.accumulator(variable)
            if accumulator in sums:
                bar = sums[accumulator] + bar.astype(sums[accumulator].dtype)
            sums[accumulator] = bar
        # What is computed from parameters: back through what ran before the loop.
        derived = [variable for variable in sums if variable not in program.params]
        leaves, structure = jax.tree.flatten(self.params)
        if derived:

            def derive(wide_leaves):
                pairs = zip(wide_leaves, leaves, strict=True)
                narrow = [wide.astype(jnp.result_type(leaf)) for wide, leaf in pairs]
                values = program.run_hoisted(self.consts, narrow, wide_leaves)
                return [values[variable] for variable in derived]

            values, pull = jax.vjp(derive, list(map(widened, leaves)))
            pairs = zip(derived, values, strict=True)
            (params_bar,) = pull([sums[variable].astype(value.dtype) for variable, value in pairs])
            for variable, bar in zip(program.params, params_bar, strict=True):
                sums[variable] = sums[variable] + bar
        return structure.unflatten([sums[variable] for variable in program.params])


def split_step(step: Step, params: Params, carry: Carry, x: PyTree) -> SplitStep:
    """Reads the step's program for arguments of these shapes, and runs what is hoisted."""
    closed, shapes = inlined(step, params, carry, x)
    leaves = jax.tree.leaves(params)
    program = split_program(closed.jaxpr, len(leaves), jax.tree.structure(shapes))
    consts = as_arrays(closed.consts)
    values = program.run_hoisted(consts, leaves)
    # The same tuple, each variable replaced by its array.
    invariants = jax.tree.map(values.__getitem__, program.invariants)
    return SplitStep(program, params, consts, invariants)
