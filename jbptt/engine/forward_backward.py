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

CHUNK_BYTES = 2**19  # of cotangents: what is used while it is in the cache, in memory that is touched once


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

    others: list[Var]  # what comes from the parameters and is differentiated in the loop
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


def _chunk(num_steps: int, bytes_per_step: int) -> int:
    """How many steps go back before their cotangents are used: a divisor of all steps, or all of them."""
    largest = max(1, min(num_steps, CHUNK_BYTES // max(bytes_per_step, 1)))
    fitting = max(n for n in range(1, largest + 1) if num_steps % n == 0)
    return fitting if 2 * fitting >= largest else num_steps


def _with_rows_first(equations: list[JaxprEqn], known: dict[Var, Any]) -> Callable:
    """Turns matrices around once, before the loop, whose second axis a product would contract in every step."""
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
    """The program of both loops; it holds no array, so that a cotangent function can keep it.

    Attributes:
      jaxpr: one step and its pullback.
      names: its variables by what they are.
      known: the variables that are the same in all steps.
      ahead: the equations of the forward loop.
      back: those of the backward loop, what is computed again first.
      kept: what the forward loop stacks.
      entering: carries that the backward loop needs, one step behind those emitted.
      outputs: the structure of a step's outputs.
      live: which leaves have cotangents.
    """

    jaxpr: Jaxpr
    names: Names
    known: list[Var]
    ahead: list[JaxprEqn]
    back: list[JaxprEqn]
    kept: list[Var]
    entering: list[Var]
    outputs: Any
    live: Paths


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
        behind = [
            ((name, emitted), leaf)
            for name, leaf, emitted in zip(names.carry, first, names.after, strict=True)
            if name in program.entering
        ]
        of = [*names.inputs, *program.kept]
        layout = Layout(num_steps, program.known, of, [pair for pair, _ in behind], reverse)
        stacks = Stacks(layout, self.known, [*inputs, *found], [leaf for _, leaf in behind])
        outputs = [stacks.whole(v) for v in names.outputs]
        return structure.unflatten(after), program.outputs.unflatten(outputs), stacks

    def backward(
        self, stacks: Stacks, cotangents: list, outputs_bar: list, gates: jax.Array | None, total: Params | None
    ) -> tuple[list, Params, list]:
        """The cotangents of the first carry, from those of the last and of the outputs; `total` plus the gradient.

            λ_t = gates[t] · (J_tᵀ λ_{t+1} + (∂y_t/∂h_t)ᵀ ȳ_t)

        And the cotangents of the inputs that were asked for, `[S, ...]`. The gate is part of what is computed here,
        not of the program of the step: differentiating the result gives the derivative of these numbers, gates
        included.
        """
        program, names, live = self.program, self.program.names, self.program.live
        known = dict(zip(program.known, self.known, strict=True))
        num_steps, reverse = stacks.layout.num_steps, stacks.layout.reverse
        used = names_of([*(v for equation in program.back for v in equation.invars), *names.results])
        saved = [name for name in used if name in stacks.of or name in stacks.behind]
        products_bar = [v for v in names.products_bar if v is not None]
        emitted = [v for v in names_of(products_bar) if v not in saved and v not in known]
        multiply = _with_rows_first(program.back, known)
        length = _chunk(num_steps, sum(map(num_bytes, emitted)))
        outputs_bar = chosen(outputs_bar, live.outputs)

        def body(state, t):
            cotangents_t, sums = state
            values = {**known, **{name: stacks.at(name, t) for name in saved}}
            outputs_bar_t = [lax.dynamic_index_in_dim(bar, t, keepdims=False) for bar in outputs_bar]
            bars = [*chosen(cotangents_t, live.carries), *outputs_bar_t]
            values.update(zip(names.bars, bars, strict=True))
            values = evaluate(program.jaxpr, program.back, values, multiply)
            sums = [one + read(values, v) for one, v in zip(sums, names.others_bar, strict=True)]
            cotangents_t = [read(values, v) for v in names.carry_bar]
            if gates is not None:
                gate = lax.dynamic_index_in_dim(gates, t, keepdims=False)
                cotangents_t = [times_gate(c, gate) for c in cotangents_t]
            inputs_bar_t = [jnp.asarray(read(values, v)) for v in names.inputs_bar]
            return (cotangents_t, sums), ([values[v] for v in emitted], inputs_bar_t)

        def chunk(state, grads, start):
            (cotangents, sums), (found, inputs_bar) = lax.scan(
                body, state, start + jnp.arange(length), reverse=not reverse
            )
            layout = Layout(length, program.known, emitted, [], reverse)
            bars = Stacks(layout, self.known, found, [])
            operands = [stacks.piece(v, start, length) for v in names.operands]
            products_bar = [
                None if v is None else bars.whole(v) if v in emitted else stacks.piece(v, start, length)
                for v in names.products_bar
            ]
            grads = self.split.add_products(grads, operands, products_bar)
            return (cotangents, sums), [grads[home] for home in homes], inputs_bar

        state = cotangents, [jnp.zeros_like(value) for value in self.split.others]
        grads, homes = self.split.first_sums(total), self.split.program.homes
        if length == num_steps:
            state, found, inputs_bar = chunk(state, grads, 0)
        else:

            def add(running, start):
                state, found = running
                state, found, inputs_bar = chunk(state, dict(zip(homes, found, strict=True)), start)
                return (state, found), inputs_bar

            # The sum is placed (and varies over devices) as what is added to it, not as the zeros that it begins with.
            added = jax.eval_shape(lambda state: chunk(state, grads, 0)[1], state)
            first = [grads[home] + lax.full_like(shape, 0) for home, shape in zip(homes, added, strict=True)]
            starts = jnp.arange(0, num_steps, length)
            (state, found), pieces = lax.scan(add, (state, first), starts, reverse=not reverse)
            inputs_bar = [bar.reshape((num_steps, *bar.shape[2:])) for bar in pieces]
        cotangents, sums = state
        grads = {**grads, **dict(zip(homes, found, strict=True))}
        return cotangents, self.split.gradient(grads, sums), inputs_bar

    def narrowed(self, carries: tuple[bool, ...], outputs: tuple[bool, ...]) -> "Loops":
        """The loops for a loss that reads less than was thought: of the last carry and of the outputs, these leaves.

        An equation of the backward loop is linear in cotangents: where all that it is given are zero, so is all
        that it gives, and it is left out. (To run it on zeros is not the same: 0·inf is NaN.)
        """
        program, names, live = self.program, self.program.names, self.program.live
        num_carries = sum(live.carries)
        bars = dict(zip(names.bars[:num_carries], chosen(list(range(len(carries))), live.carries), strict=True))
        read_outputs = chosen(list(outputs), live.outputs)
        late = late_of(program.back, names.bars)
        while True:
            reads = [carries[i] for i in bars.values()] + read_outputs
            nonzero = {name for name, is_read in zip(names.bars, reads, strict=True) if is_read}
            back = []
            for equation in program.back:
                cotangents = late.intersection(names_of(equation.invars))
                if not cotangents or cotangents & nonzero:
                    back.append(equation)
                    nonzero.update(v for v in equation.outvars if v in late)
            flows = [not isinstance(v, Literal) and v in nonzero for v in names.carry_bar]
            grown = tuple(a or b for a, b in zip(carries, flows, strict=True))
            if grown == carries:
                break
            carries = grown
        zero = late - nonzero
        products_bar = [None if isinstance(v, Var) and v in zero else v for v in names.products_bar]
        fewer = names._replace(bars=[v for v in names.bars if v in nonzero], products_bar=products_bar)
        back = needed(back, fewer.results)
        used = names_of([*(v for equation in back for v in equation.invars), *fewer.results])
        zeros = [v for v in used if v in zero]
        live = live._replace(
            carries=tuple(a and b for a, b in zip(live.carries, carries, strict=True)),
            outputs=tuple(a and b for a, b in zip(live.outputs, outputs, strict=True)),
        )
        known = [*self.known, *(jnp.zeros(v.aval.shape, v.aval.dtype) for v in zeros)]
        program = replace(program, names=fewer, known=[*program.known, *zeros], back=back, live=live)
        return Loops(program, self.split, known)


def late_of(equations: list[JaxprEqn], bars: list[Var]) -> set[Var]:
    """The cotangents, and what is computed from them."""
    late = set(bars)
    for equation in equations:
        if late.intersection(names_of(equation.invars)):
            late.update(equation.outvars)
    return late
