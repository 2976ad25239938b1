"""The forward and the backward loop of one step, run."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from jbptt.arrays import times_gate
from jbptt.engine.dependence import Paths, chosen
from jbptt.engine.jaxprs import evaluate, names_of, read
from jbptt.engine.stacks import Layout, Stacks
from jbptt.engine.weight_products import SplitStep
from jbptt.types import Carry, Params, PyTree

CHUNK_BYTES = 2**19  # of products' cotangents in a chunk: they are used while still in the cache


def num_bytes(v: Any) -> int:
    """Of one step's array."""
    return v.aval.size * v.aval.dtype.itemsize


def needed(equations: list[JaxprEqn], results: list[Any]) -> list[JaxprEqn]:
    """The equations that lead to `results`, in order."""
    wanted, kept = set(names_of(results)), []
    for equation in reversed(equations):
        if wanted.intersection(equation.outvars) or equation.effects:
            wanted.update(names_of(equation.invars))
            kept.append(equation)
    return kept[::-1]


class Names(NamedTuple):
    """The variables of one step and its pullback by what they are: lists over leaves, bars over inexact leaves."""

    others: list[Var]  # see `OfParams.others`
    carry: list[Var]
    inputs: list[Var]
    bars: list[Var]  # cotangents of the carry emitted, then of the outputs
    after: list[Any]
    outputs: list[Any]
    operands: list[Any]
    others_bar: list[Any]
    products_bar: list[Any]  # None where it is zero
    carry_bar: list[Any]
    inputs_bar: list[Any]

    @property
    def results(self) -> list[Any]:
        """What the backward loop is for."""
        found = [*self.others_bar, *self.products_bar, *self.carry_bar, *self.inputs_bar]
        return [atom for atom in found if atom is not None]


def reached_from(sources: list[Var], equations: list[JaxprEqn]) -> set[Var]:
    """`sources`, and all that is computed from them."""
    reached = set(sources)
    for equation in equations:
        if reached.intersection(names_of(equation.invars)):
            reached.update(equation.outvars)
    return reached


def _chunk_length(num_steps: int, bytes_per_step: int) -> int:
    """How many steps go back before their cotangents are used: the largest divisor of all steps that fits.

    All of them where that is less than half of what fits: a prime number of steps would give chunks of one.
    """
    if not isinstance(bytes_per_step, int):  # of a symbolic number of examples
        return num_steps
    largest = max(1, min(num_steps, CHUNK_BYTES // max(bytes_per_step, 1)))
    fitting = max(n for n in range(1, largest + 1) if num_steps % n == 0)
    return fitting if 2 * fitting >= largest else num_steps


def _transposed_once(equations: list[JaxprEqn], known: dict[Var, Any]) -> Callable:
    """Evaluates products `a · Wᵀ` with a matrix that is the same in all steps, with Wᵀ formed once, before the loop."""
    turned = {}
    for equation in equations:
        if equation.primitive is lax.dot_general_p and not any(equation.params["dimension_numbers"][1]):
            name: Any = equation.invars[1]
            axes = equation.params["dimension_numbers"][0][1]
            if not isinstance(name, Literal) and name in known and name.aval.ndim == 2 and tuple(axes) == (1,):
                turned[id(equation)] = known[name].T

    def multiply(equation, values):
        if id(equation) not in turned:
            return None
        (axes, _), batch = equation.params["dimension_numbers"]
        options = {**equation.params, "dimension_numbers": ((axes, (0,)), batch)}
        return [lax.dot_general_p.bind(read(values, equation.invars[0]), turned[id(equation)], **options)]

    return multiply


@dataclass(frozen=True, eq=False)
class LoopsProgram:
    """The program of both loops; it holds no array, so that it can be static data of a pytree.

    Attributes:
      jaxpr: one step and its pullback.
      names: its variables by what they are.
      known: the variables that are the same in all steps.
      ahead: the equations of the forward loop.
      back: those of the backward loop, what is computed again first.
      kept: what the forward loop stacks.
      lagged: carries received that are not kept: they are read off the stack of the carry emitted, one step behind.
      outputs: the structure of a step's outputs.
      live: which leaves have cotangents.
      moving_inputs: the inputs whose cotangents are asked for.
      zero: cotangents that are zero, since no loss reads what they belong to.
    """

    jaxpr: Jaxpr
    names: Names
    known: list[Var]
    ahead: list[JaxprEqn]
    back: list[JaxprEqn]
    kept: list[Var]
    lagged: list[Var]
    outputs: Any
    live: Paths
    moving_inputs: list[Var]
    zero: frozenset[Var] = frozenset()


@partial(jax.tree_util.register_dataclass, data_fields=["split", "known"], meta_fields=["program"])
@dataclass(frozen=True)
class Loops:
    """Forward and backward loop of one step, with the arrays that all steps share."""

    program: LoopsProgram
    split: SplitStep
    known: list

    def forward(
        self, carry: Carry, inputs: PyTree, num_steps: int, reverse: bool = False
    ) -> tuple[Carry, PyTree, Stacks]:
        """The carry after `num_steps` steps, their outputs, and what is kept of them; `reverse` as in `lax.scan`."""
        program, names = self.program, self.program.names
        first, structure = jax.tree.flatten(carry)
        known = dict(zip(program.known, self.known, strict=True))

        def body(leaves_t, inputs_t):
            values = dict(zip([*names.carry, *names.inputs], [*leaves_t, *inputs_t], strict=True))
            values = evaluate(program.jaxpr, program.ahead, {**known, **values})
            return [read(values, v) for v in names.after], [values[v] for v in program.kept]

        inputs = jax.tree.leaves(inputs)
        after, found = lax.scan(body, first, inputs, length=num_steps, reverse=reverse)
        lagged = [
            ((name, emitted), leaf)
            for name, leaf, emitted in zip(names.carry, first, names.after, strict=True)
            if name in program.lagged
        ]
        of = [*names.inputs, *program.kept]
        layout = Layout(num_steps, program.known, of, [pair for pair, _ in lagged], reverse)
        stacks = Stacks(layout, self.known, [*inputs, *found], [leaf for _, leaf in lagged])
        outputs = [stacks.whole(v) for v in names.outputs]
        return structure.unflatten(after), program.outputs.unflatten(outputs), stacks

    def backward(
        self, stacks: Stacks, cotangents: list, outputs_bar: list, gates: jax.Array | None, total: Params | None
    ) -> tuple[list, Params, list]:
        """The cotangents of the first carry, from those of the last and of the outputs; `total` plus the gradient.

                λ_{t-1} = gates[t] · (J_tᵀ λ_t + (∂y_t/∂h_{t-1})ᵀ ȳ_t),     J_t = ∂h_t/∂h_{t-1}

        And the cotangents of the inputs that were asked for, `[S, ...]`. The gate is part of what is computed here,
        not of the program of the step: differentiating the result gives the derivative of these numbers, gates
        included.
        """
        program, names, live = self.program, self.program.names, self.program.live
        known = dict(zip(program.known, self.known, strict=True))
        num_steps, reverse = stacks.layout.num_steps, stacks.layout.reverse
        used = names_of([*(v for equation in program.back for v in equation.invars), *names.results])
        saved = [name for name in used if name in stacks.of or name in stacks.lagged]
        products_bar = [v for v in names.products_bar if v is not None]
        # Of the products' cotangents those that this loop must emit; the rest are kept already, or always the same.
        stacked_bars = [v for v in names_of(products_bar) if v not in saved and v not in known]
        multiply = _transposed_once(program.back, known)
        zero = [v for v in names.results if not isinstance(v, Literal) and v in program.zero]
        length = _chunk_length(num_steps, sum(map(num_bytes, stacked_bars)))
        outputs_bar = chosen(outputs_bar, live.outputs)

        def run(equation, values):
            missing = [v for v in names_of(equation.invars) if v in program.zero]
            if missing and equation.primitive.name == "add_any":
                return [read(values, v) for v in equation.invars if v not in missing]
            values.update({v: jnp.zeros(v.aval.shape, v.aval.dtype) for v in missing})
            return multiply(equation, values)

        def body(state, t):
            cotangents_t, sums = state
            values = {**known, **{name: stacks.at(name, t) for name in saved}}
            outputs_bar_t = [lax.dynamic_index_in_dim(bar, t, keepdims=False) for bar in outputs_bar]
            bars = [*chosen(cotangents_t, live.carries), *outputs_bar_t]
            values.update(zip(names.bars, bars, strict=True))
            values = evaluate(program.jaxpr, program.back, values, run)
            pairs = zip(sums, names.others_bar, strict=True)
            sums = [one if v in zero else one + read(values, v) for one, v in pairs]
            pairs = zip(cotangents_t, names.carry_bar, strict=True)
            cotangents_t = [jnp.zeros_like(c) if v in zero else read(values, v) for c, v in pairs]
            if gates is not None:
                gate = lax.dynamic_index_in_dim(gates, t, keepdims=False)
                cotangents_t = [times_gate(c, gate) for c in cotangents_t]
            pairs = zip(program.moving_inputs, names.inputs_bar, strict=True)
            inputs_bar_t = [jnp.zeros_like(stacks.at(x, t)) if v in zero else read(values, v) for x, v in pairs]
            inputs_bar_t = list(map(jnp.asarray, inputs_bar_t))
            return (cotangents_t, sums), ([values[v] for v in stacked_bars], inputs_bar_t)

        grads, homes = self.split.first_sums(total), self.split.program.homes

        # One chunk: back through its steps; then their cotangents meet the operands while they are in the cache.
        def chunk(state, grads, start):
            (cotangents, sums), (bars_of_chunk, inputs_bar) = lax.scan(
                body, state, start + jnp.arange(length), reverse=not reverse
            )
            layout = Layout(length, program.known, stacked_bars, [], reverse)
            bars = Stacks(layout, self.known, bars_of_chunk, [])
            operands = [stacks.piece(v, start, length) for v in names.operands]
            products_bar = [
                None if v is None else bars.whole(v) if v in stacked_bars else stacks.piece(v, start, length)
                for v in names.products_bar
            ]
            grads = self.split.add_products(grads, operands, products_bar)
            return (cotangents, sums), [grads[home] for home in homes], inputs_bar

        state = cotangents, [jnp.zeros_like(value) for value in self.split.others]
        if length == num_steps:
            state, weight_sums, inputs_bar = chunk(state, grads, 0)
        else:

            def add(running, start):
                state, weight_sums = running
                state, weight_sums, inputs_bar = chunk(state, dict(zip(homes, weight_sums, strict=True)), start)
                return (state, weight_sums), inputs_bar

            # Several chunks: the weights' sums go from chunk to chunk.
            # The sum is placed (and varies over devices) as what is added to it, not as the zeros that it begins with.
            added = jax.eval_shape(lambda state: chunk(state, grads, 0)[1], state)
            first = [grads[home] + lax.full_like(shape, 0) for home, shape in zip(homes, added, strict=True)]
            starts = jnp.arange(0, num_steps, length)
            (state, weight_sums), pieces = lax.scan(add, (state, first), starts, reverse=not reverse)
            inputs_bar = [bar.reshape((num_steps, *bar.shape[2:])) for bar in pieces]
        cotangents, sums = state
        grads = {**grads, **dict(zip(homes, weight_sums, strict=True))}
        return cotangents, self.split.gradient(grads, sums), inputs_bar

    def narrowed(self, carries: tuple[bool, ...], outputs: tuple[bool, ...]) -> "Loops":
        """The loops for a loss that reads only these leaves of the last carry and of the outputs.

        A pullback is linear: an equation whose cotangents are all zero gives zeros, and is left out. (To run it on
        zeros is not the same: 0·inf is NaN.) A carry leaf that is not read at the end may be read by a later step, so
        `carries` grows until it no longer changes.
        """
        program, names, live = self.program, self.program.names, self.program.live
        num_carries = sum(live.carries)
        bars = dict(zip(names.bars[:num_carries], chosen(list(range(len(carries))), live.carries), strict=True))
        read_outputs = chosen(list(outputs), live.outputs)
        of_bars = reached_from(names.bars, program.back)
        while True:
            reads = [carries[i] for i in bars.values()] + read_outputs
            nonzero = {name for name, is_read in zip(names.bars, reads, strict=True) if is_read}
            back = []
            for equation in program.back:
                cotangents = of_bars.intersection(names_of(equation.invars))
                if not cotangents or cotangents & nonzero:
                    back.append(equation)
                    nonzero.update(v for v in equation.outvars if v in of_bars)
            flows = [not isinstance(v, Literal) and v in nonzero for v in names.carry_bar]
            grown = tuple(a or b for a, b in zip(carries, flows, strict=True))
            if grown == carries:
                break
            carries = grown
        zero = frozenset(of_bars - nonzero)
        fewer = names._replace(
            bars=[v for v in names.bars if v in nonzero],
            products_bar=[None if isinstance(v, Var) and v in zero else v for v in names.products_bar],
        )
        back = needed(back, fewer.results)
        live = live._replace(
            carries=tuple(a and b for a, b in zip(live.carries, carries, strict=True)),
            outputs=tuple(a and b for a, b in zip(live.outputs, outputs, strict=True)),
        )
        program = replace(program, names=fewer, back=back, live=live, zero=zero)
        return Loops(program, self.split, self.known)
