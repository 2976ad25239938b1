"""The forward and the backward loop of one step, run over a segment."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn, Literal, Var

from jbptt.arrays import times_gate
from jbptt.engine.dependence import chosen
from jbptt.engine.jaxprs import Values, evaluate, operands_of, read, variables_of
from jbptt.engine.loop_programs import LoopPrograms
from jbptt.engine.stacks import Layout, Stacks
from jbptt.engine.weight_products import SplitStep
from jbptt.types import Carry, Params, PyTree

CHUNK_BYTES = 2**19  # of products' cotangents in a chunk: they are used while still in the cache


def num_bytes(v: Any) -> int:
    """Of one step's array."""
    return v.aval.size * v.aval.dtype.itemsize


def _at(array: jax.Array, t: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(array, t, keepdims=False)


def _chunk_length(num_steps: int, bytes_per_step: int) -> int:
    """How many steps go back before their cotangents are used.

    The largest divisor of all steps that fits. All of them where that is less than half of what
    fits: a prime number of steps would give chunks of one.
    """
    if not isinstance(bytes_per_step, int):  # of a symbolic number of examples
        return num_steps
    largest = max(1, min(num_steps, CHUNK_BYTES // max(bytes_per_step, 1)))
    divisor = max(n for n in range(1, largest + 1) if num_steps % n == 0)
    return divisor if 2 * divisor >= largest else num_steps


def _transposed_once(equations: list[JaxprEqn], invariant: dict[Var, Any]) -> Callable:
    """A replacement (see `evaluate`) for products `a · Wᵀ` with a matrix W that is invariant.

    Wᵀ is formed once, before the loop: with a product that contracts the second axis of W a step
    took up to 1.6 times as long on CPU, and with 512 units as long.
    """
    transposed = {}
    for equation in equations:
        if equation.primitive is not lax.dot_general_p:
            continue
        (_, axes), batch_axes = equation.params["dimension_numbers"]
        matrix: Any = equation.invars[1]
        if any(batch_axes) or isinstance(matrix, Literal) or matrix not in invariant:
            continue
        if matrix.aval.ndim == 2 and tuple(axes) == (1,):
            transposed[id(equation)] = invariant[matrix].T

    def multiply(equation, values):
        if id(equation) not in transposed:
            return None
        (axes, _), batch_axes = equation.params["dimension_numbers"]
        params = {**equation.params, "dimension_numbers": ((axes, (0,)), batch_axes)}
        operand = read(values, equation.invars[0])
        return [lax.dot_general_p.bind(operand, transposed[id(equation)], **params)]

    return multiply


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["split", "invariant_arrays"],
    meta_fields=["program"],
)
@dataclass(frozen=True)
class Loops:
    """Forward and backward loop of one step, with the arrays that all steps share."""

    program: LoopPrograms
    split: SplitStep
    invariant_arrays: list

    @property
    def invariant(self) -> Values:
        """These arrays by variable."""
        return dict(zip(self.program.invariant, self.invariant_arrays, strict=True))

    def narrowed(self, carries: tuple[bool, ...], outputs: tuple[bool, ...]) -> "Loops":
        """The loops for a loss that reads only these leaves of the last carry and the outputs."""
        return replace(self, program=self.program.narrowed(carries, outputs))

    def forward(
        self, carry: Carry, inputs: PyTree, num_steps: int, reverse: bool = False
    ) -> tuple[Carry, PyTree, Stacks]:
        """The carry after `num_steps` steps, their outputs, and what the way back needs of them.

        `reverse` as in `lax.scan`.
        """
        program, variables, invariant = self.program, self.program.variables, self.invariant
        carry_leaves, structure = jax.tree.flatten(carry)
        input_leaves = jax.tree.leaves(inputs)

        def body(carry_t, inputs_t):
            values = dict(zip(variables.carry, carry_t, strict=True))
            values.update(zip(variables.inputs, inputs_t, strict=True))
            values = evaluate(program.jaxpr, program.forward, {**invariant, **values})
            next_carry = [read(values, atom) for atom in variables.next_carry]
            return next_carry, [values[v] for v in program.stacked]

        last_carry, stacked = lax.scan(body, carry_leaves, input_leaves, num_steps, reverse)
        carries = zip(variables.carry, variables.next_carry, carry_leaves, strict=True)
        lagged, first_carries = [], []
        for received, emitted, leaf in carries:
            if received in program.lagged:
                lagged.append((received, emitted))
                first_carries.append(leaf)
        # The inputs are stacks as they are.
        of_stacks = [*variables.inputs, *program.stacked]
        layout = Layout(num_steps, program.invariant, of_stacks, lagged, reverse)
        stacks = Stacks(layout, self.invariant_arrays, [*input_leaves, *stacked], first_carries)
        outputs = [stacks.whole(atom) for atom in variables.outputs]
        return structure.unflatten(last_carry), program.outputs.unflatten(outputs), stacks

    def backward(
        self,
        stacks: Stacks,
        last_carry_bar: list,
        outputs_bar: list,
        gates: jax.Array | None,
        total: Params | None,
    ) -> tuple[Params, list, list]:
        """`total` plus the gradient, from the cotangents of the last carry and of the outputs.

            λ_{t-1} = gates[t] · (J_tᵀ λ_t + (∂y_t/∂h_{t-1})ᵀ ȳ_t),     J_t = ∂h_t/∂h_{t-1}

        Then the cotangents of the first carry, and those `[S, ...]` of the inputs that were asked
        for. The gate is part of what is computed here, not of the program of the step:
        differentiating the result gives the derivative of these numbers, gates included.
        """
        # first_sums   what gradients are added to, by variable: `total`, or zeros
        # weight_sums  of them those of the products' weights (`accumulators`): chunk after chunk
        # loop_sums    the gradients of `loop_params`: step after step, inside the loop
        num_steps, reverse = stacks.layout.num_steps, stacks.layout.reverse
        accumulators = self.split.program.accumulators
        new_bars = self._new_bars(stacks)
        length = _chunk_length(num_steps, sum(map(num_bytes, new_bars)))
        body = self._step_back(stacks, outputs_bar, gates, new_bars)
        first_sums = self.split.first_sums(total)

        def chunk(state, weight_sums, start):
            """Back through some steps; then their cotangents meet the operands in the cache."""
            ts = start + jnp.arange(length)
            state, (bars, inputs_bar) = lax.scan(body, state, ts, reverse=not reverse)
            layout = Layout(length, self.program.invariant, new_bars, [], reverse)
            bar_stacks = Stacks(layout, self.invariant_arrays, bars, [])

            def bar_of_chunk(atom):
                if atom is None:
                    return None
                if atom in new_bars:
                    return bar_stacks.whole(atom)
                return stacks.piece(atom, start, length)

            variables = self.program.variables
            operands = [stacks.piece(atom, start, length) for atom in variables.operands]
            products_bar = list(map(bar_of_chunk, variables.products_bar))
            sums = {**first_sums, **dict(zip(accumulators, weight_sums, strict=True))}
            sums = self.split.add_products(sums, operands, products_bar)
            return state, [sums[v] for v in accumulators], inputs_bar

        state = last_carry_bar, [jnp.zeros_like(array) for array in self.split.loop_params]
        weight_sums = [first_sums[v] for v in accumulators]
        if length == num_steps:
            state, weight_sums, inputs_bar = chunk(state, weight_sums, 0)
        else:
            # Several chunks: the weights' sums go from chunk to chunk. They are placed (and vary
            # over devices) as what is added to them, not as the zeros that they begin with.
            added = jax.eval_shape(lambda state: chunk(state, weight_sums, 0)[1], state)
            pairs = zip(weight_sums, added, strict=True)
            weight_sums = [weight_sum + lax.full_like(shape, 0) for weight_sum, shape in pairs]

            def add_chunk(running, start):
                state, weight_sums = running
                state, weight_sums, inputs_bar = chunk(state, weight_sums, start)
                return (state, weight_sums), inputs_bar

            starts, running = jnp.arange(0, num_steps, length), (state, weight_sums)
            running, inputs_bar = lax.scan(add_chunk, running, starts, reverse=not reverse)
            state, weight_sums = running
            inputs_bar = [bar.reshape((num_steps, *bar.shape[2:])) for bar in inputs_bar]
        carry_bar, loop_sums = state
        sums = {**first_sums, **dict(zip(accumulators, weight_sums, strict=True))}
        return self.split.gradient(sums, loop_sums), carry_bar, inputs_bar

    def _saved(self, stacks: Stacks) -> list[Var]:
        """What the backward loop reads from the stacks."""
        reads = [*operands_of(self.program.backward), *self.program.variables.results]
        return [v for v in variables_of(reads) if v in stacks.stacked or v in stacks.lagged]

    def _new_bars(self, stacks: Stacks) -> list[Var]:
        """The products' cotangents that the backward loop must stack.

        All but those that stand in stacks already, or are invariant.
        """
        atoms = [atom for atom in self.program.variables.products_bar if atom is not None]
        known = {*self._saved(stacks), *self.program.invariant}
        return [v for v in variables_of(atoms) if v not in known]

    def _step_back(
        self,
        stacks: Stacks,
        outputs_bar: list,
        gates: jax.Array | None,
        new_bars: list[Var],
    ) -> Callable:
        """The body of the backward loop, for `lax.scan`.

        From (λ_t, sums over later steps of the cotangents of `loop_params`) and t it gives the same
        one step before, and beside it (the cotangents `new_bars`, those of the inputs) of step t.
        """
        program, variables = self.program, self.program.variables
        invariant, saved = self.invariant, self._saved(stacks)
        live_outputs_bar = chosen(outputs_bar, program.live.outputs)
        replacement = self._replacement()

        def body(state, t):
            next_carry_bar, loop_sums = state
            values = {**invariant, **{v: stacks.at(v, t) for v in saved}}
            bars = [*chosen(next_carry_bar, program.live.carries)]
            bars += [_at(bar, t) for bar in live_outputs_bar]
            values.update(zip(variables.bars, bars, strict=True))
            values = evaluate(program.jaxpr, program.backward, values, replacement)

            def added(loop_sum, atom):
                return loop_sum if program.is_zero(atom) else loop_sum + read(values, atom)

            def carry_bar_of(atom, bar):
                return jnp.zeros_like(bar) if program.is_zero(atom) else read(values, atom)

            def input_bar_of(atom, v):
                is_zero = program.is_zero(atom)
                return jnp.zeros_like(stacks.at(v, t)) if is_zero else read(values, atom)

            loop_sums = list(map(added, loop_sums, variables.loop_params_bar))
            carry_bar = list(map(carry_bar_of, variables.carry_bar, next_carry_bar))
            if gates is not None:
                gate = _at(gates, t)
                carry_bar = [times_gate(bar, gate) for bar in carry_bar]
            inputs_bar = map(input_bar_of, variables.inputs_bar, program.perturbed_inputs)
            inputs_bar = list(map(jnp.asarray, inputs_bar))
            return (carry_bar, loop_sums), ([values[v] for v in new_bars], inputs_bar)

        return body

    def _replacement(self) -> Callable:
        """What replaces equations of the backward loop (see `evaluate`).

        Those that read a cotangent which is zero, and was therefore not computed; and products with
        an invariant matrix transposed.
        """
        program = self.program
        multiply = _transposed_once(program.backward, self.invariant)

        def replacement(equation, values):
            zeros = [v for v in variables_of(equation.invars) if v in program.zero_bars]
            if zeros and equation.primitive.name == "add_any":  # a sum of cotangents: of two
                return [read(values, atom) for atom in equation.invars if atom not in zeros]
            # Any other equation is evaluated as it stands, on these zeros.
            values.update({v: jnp.zeros(v.aval.shape, v.aval.dtype) for v in zeros})
            return multiply(equation, values)

        return replacement
