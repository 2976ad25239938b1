"""The two loops of a segment, cut out of the program of one step and its derivative.

A step and its pullback are traced as one program. What does not depend on the cotangents belongs to the forward loop,
the rest to the backward loop; between them a cut decides what is kept of every step. Kept is what costs more than to
read it back: products, transcendental functions, whatever is not known to be cheap. Sums, products of numbers, choices
and changes of shape that ask for one more array at most are computed again. What is kept is kept once: the carry that
a step emits is the one that the next receives, an output that is a carry is no second array, and what the weights need
is formed after the loops (`weight_products`).

On CPU the time of a scanned backward pass goes into every extra `[S, ...]` array that is written.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from jbptt.arrays import inexact_leaves, split_inexact, times_gate
from jbptt.engine.dependence import Paths, chosen
from jbptt.engine.jaxprs import CHEAP, as_arrays, evaluate, inlined, read
from jbptt.engine.weight_products import Apart, take_apart
from jbptt.types import Carry, Params, PyTree, Step

CHUNK_BYTES = 2**19  # of cotangents: what is used while it is in the cache, in memory that is touched once


def _names(atoms: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(v for v in atoms if not isinstance(v, Literal)))


def _bytes(v: Any) -> int:
    return v.aval.size * v.aval.dtype.itemsize


def _needed(equations: list[JaxprEqn], results: list[Any]) -> list[JaxprEqn]:
    """The equations that lead to `results`, in order."""
    wanted, kept = set(_names(results)), []
    for equation in reversed(equations):
        if wanted.intersection(equation.outvars) or equation.effects:
            wanted.update(_names(equation.invars))
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
    products_bar: list[Any]
    carry_bar: list[Any]


@dataclass(frozen=True)
class Stacks:
    """What the forward loop leaves, by variable.

    Attributes:
      num_steps: S.
      known: the same in all steps.
      of: one for each step, `[S, ...]`.
      behind: one step behind another: its first value, and the variable that it follows.
    """

    num_steps: int
    known: dict[Var, Any]
    of: dict[Var, jax.Array]
    behind: dict[Var, tuple[Any, Var]]

    def whole(self, atom: Any) -> jax.Array:
        """All steps; what they share is repeated."""
        if not isinstance(atom, Literal) and atom not in self.known:
            return self.piece(atom, 0, self.num_steps)
        value = read(self.known, atom)
        return jnp.broadcast_to(value, (self.num_steps, *jnp.shape(value)))

    def at(self, name: Var, t: jax.Array) -> Any:
        """Step t."""
        if name in self.behind:
            first, followed = self.behind[name]
            before = lax.dynamic_index_in_dim(self.of[followed], jnp.maximum(t - 1, 0), keepdims=False)
            return jnp.where(t == 0, first, before)
        return lax.dynamic_index_in_dim(self.of[name], t, keepdims=False)

    def piece(self, atom: Any, start: Any, length: int) -> jax.Array:
        """Steps start … start + length − 1."""
        if isinstance(atom, Literal) or atom in self.known:
            return self.whole(atom)[:length]
        if atom in self.behind:
            rest = lax.dynamic_slice_in_dim(self.of[self.behind[atom][1]], start, length - 1)
            return jnp.concatenate([self.at(atom, jnp.asarray(start))[None], rest])
        whole = self.of[atom]
        return whole if length == self.num_steps else lax.dynamic_slice_in_dim(whole, start, length)


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


@dataclass(frozen=True)
class Loops:
    """Forward and backward loop of one step's program."""

    apart: Apart
    jaxpr: Jaxpr
    names: Names
    known: dict[Var, Any]  # the same in all steps
    ahead: list[JaxprEqn]  # of the forward loop
    back: list[JaxprEqn]  # of the backward loop, what is computed again first
    kept: list[Var]  # what the forward loop stacks
    entering: list[Var]  # carries that the backward loop needs, one step behind those emitted
    outputs: Any  # the structure of a step's outputs
    live: Paths  # which leaves have cotangents

    def forward(self, carry: Carry, inputs: PyTree, num_steps: int) -> tuple[Carry, PyTree, Stacks]:
        """The carry after `num_steps` steps, their outputs, and what is kept of them."""
        names, (first, structure) = self.names, jax.tree.flatten(carry)

        def body(leaves_t, inputs_t):
            values = dict(zip([*names.carry, *names.inputs], [*leaves_t, *inputs_t], strict=True))
            values = evaluate(self.jaxpr, self.ahead, {**self.known, **values})
            return [read(values, v) for v in names.after], [values[v] for v in self.kept]

        inputs = jax.tree.leaves(inputs)
        after, found = lax.scan(body, first, inputs, length=num_steps)
        of = dict(zip([*names.inputs, *self.kept], [*inputs, *found], strict=True))
        behind = {
            name: (leaf, emitted)
            for name, leaf, emitted in zip(names.carry, first, names.after, strict=True)
            if name in self.entering
        }
        stacks = Stacks(num_steps, self.known, of, behind)
        outputs = [stacks.whole(v) for v in names.outputs]
        return structure.unflatten(after), self.outputs.unflatten(outputs), stacks

    def backward(
        self, stacks: Stacks, cotangents: list, outputs_bar: list, gates: jax.Array | None, total: Params | None
    ) -> tuple[list, Params]:
        """The cotangents of the first carry, from those of the last and of the outputs, and `total` plus the gradient.

            λ_t = gates[t] · (J_tᵀ λ_{t+1} + (∂y_t/∂h_t)ᵀ ȳ_t)

        The gate is part of what is computed here, not of the program of the step: differentiating the result gives
        the derivative of these numbers, gates included.
        """
        names, live = self.names, self.live
        used = _names([*(v for equation in self.back for v in equation.invars), *self.results])
        saved = [name for name in used if name in stacks.of or name in stacks.behind]
        emitted = [v for v in _names(names.products_bar) if v not in saved and v not in self.known]
        multiply = _with_rows_first(self.back, self.known)
        length = _chunk(stacks.num_steps, sum(map(_bytes, emitted)))
        outputs_bar = chosen(outputs_bar, live.outputs)

        def body(state, t):
            cotangents_t, sums = state
            values = {**self.known, **{name: stacks.at(name, t) for name in saved}}
            outputs_bar_t = [lax.dynamic_index_in_dim(bar, t, keepdims=False) for bar in outputs_bar]
            values.update(zip(names.bars, [*chosen(cotangents_t, live.carries), *outputs_bar_t], strict=True))
            values = evaluate(self.jaxpr, self.back, values, multiply)
            sums = [one + read(values, v) for one, v in zip(sums, names.others_bar, strict=True)]
            cotangents_t = [read(values, v) for v in names.carry_bar]
            if gates is not None:
                gate = lax.dynamic_index_in_dim(gates, t, keepdims=False)
                cotangents_t = [times_gate(c, gate) for c in cotangents_t]
            return (cotangents_t, sums), [values[v] for v in emitted]

        def chunk(state, grads, start):
            (cotangents, sums), found = lax.scan(body, state, start + jnp.arange(length), reverse=True)
            bars = Stacks(length, self.known, dict(zip(emitted, found, strict=True)), {})
            operands = [stacks.piece(v, start, length) for v in names.operands]
            products_bar = [
                bars.whole(v) if v in emitted else stacks.piece(v, start, length) for v in names.products_bar
            ]
            grads = self.apart.add_products(grads, operands, products_bar)
            return (cotangents, sums), [grads[home] for home in self.apart.homes]

        state = cotangents, [jnp.zeros_like(value) for value in self.apart.others]
        grads, homes = self.apart.start(total), self.apart.homes
        if length == stacks.num_steps:
            state, found = chunk(state, grads, 0)
        else:

            def add(running, start):
                state, found = running
                return chunk(state, dict(zip(homes, found, strict=True)), start), None

            # The sum is placed (and varies over devices) as what is added to it, not as the zeros that it begins with.
            added = jax.eval_shape(lambda state: chunk(state, grads, 0)[1], state)
            first = [grads[home] + lax.full_like(shape, 0) for home, shape in zip(homes, added, strict=True)]
            starts = jnp.arange(0, stacks.num_steps, length)
            (state, found), _ = lax.scan(add, (state, first), starts, reverse=True)
        cotangents, sums = state
        return cotangents, self.apart.gradient({**grads, **dict(zip(homes, found, strict=True))}, sums)

    @property
    def results(self) -> list[Any]:
        """What the backward loop is for."""
        return [*self.names.others_bar, *self.names.products_bar, *self.names.carry_bar]


def _joint_program(apart: Apart, carry: Carry, inputs: PyTree, live: Paths) -> tuple[ClosedJaxpr, Names, Any]:
    """One step and its pullback as one program, its names, and the structure of the outputs."""
    zeros = apart.zeros(carry, inputs)

    def joint(others, carry, inputs, bars):
        leaves, rebuild = split_inexact(carry)

        def run(others, zeros, leaves):
            after, (outputs, operands) = apart.step(others, rebuild(leaves), (inputs, zeros))
            read = chosen(split_inexact(after)[0], live.carries), chosen(split_inexact(outputs)[0], live.outputs)
            return read, (after, outputs, operands)

        _, pull, (after, outputs, operands) = jax.vjp(run, others, zeros, leaves, has_aux=True)
        return after, outputs, operands, *pull(bars)

    after, (outputs, _) = jax.eval_shape(apart.step, apart.others, carry, (inputs, zeros))
    read = chosen(inexact_leaves(after), live.carries), chosen(inexact_leaves(outputs), live.outputs)
    groups = apart.others, carry, inputs, tuple([lax.full_like(s, 0) for s in shapes] for shapes in read)
    closed, results = inlined(joint, *groups)
    given, made = iter(closed.jaxpr.invars), iter(closed.jaxpr.outvars)
    ins = [[next(given) for _ in jax.tree.leaves(group)] for group in groups]
    outs = [[next(made) for _ in jax.tree.leaves(group)] for group in results]
    return closed, Names(*ins, *outs), jax.tree.structure(outputs)


def _again(forward: list[JaxprEqn], wanted: list[Var], free: set[Var], kept: list[Var]) -> set[int]:
    """Which equations to evaluate again, by id, so that the backward loop has `wanted`; all else goes to `kept`."""
    producers = {v: equation for equation in forward for v in equation.outvars}
    again: set[int] = set()

    def is_cheap(v):
        equation = producers[v]
        unknown = [u for u in _names(equation.invars) if u not in free and u not in kept]
        small = all(_bytes(u) <= _bytes(v) for u in unknown)
        return equation.primitive.name in CHEAP and len(unknown) <= 1 and small

    def visit(v):
        if v in free or v in kept or id(producers[v]) in again:
            return
        if is_cheap(v):
            again.add(id(producers[v]))
            for u in _names(producers[v].invars):
                visit(u)
        else:
            kept.append(v)

    for v in sorted(wanted, key=lambda v: v in producers and is_cheap(v)):  # what must be kept makes the rest cheap
        visit(v)
    return again


def cut(step: Step, params: Params, carry: Carry, inputs: PyTree, live: Paths) -> Loops:
    """The loops of `step` for arguments of these shapes, whose leaves have cotangents where `live` says so."""
    apart = take_apart(step, params, carry, inputs)
    closed, names, outputs = _joint_program(apart, carry, inputs, live)
    jaxpr, late, forward, backward = closed.jaxpr, set(names.bars), [], []
    for equation in jaxpr.eqns:
        is_late = bool(late.intersection(_names(equation.invars)))
        (backward if is_late else forward).append(equation)
        late.update(equation.outvars if is_late else ())
    consts = as_arrays(closed.consts)
    known = dict(zip([*jaxpr.constvars, *names.others], [*consts, *apart.others], strict=True))
    results = [*names.others_bar, *names.products_bar, *names.carry_bar]
    backward = _needed(backward, results)
    everywhere, emitted = {*known, *names.inputs}, _names(names.after)
    kept = [v for v in _names([*names.outputs, *names.operands]) if v not in everywhere and v not in names.carry]
    wanted = [v for v in _names([*(v for e in backward for v in e.invars), *results]) if v not in late]
    again = _again(forward, wanted, {*everywhere, *names.carry, *emitted}, kept)
    used = _names([*wanted, *names.outputs, *names.operands, *(v for e in forward if id(e) in again for v in e.invars)])
    kept += [v for v in emitted if v in used and v not in everywhere and v not in kept]
    entering = []
    for name, after in zip(names.carry, names.after, strict=True):
        if name in used and name not in kept:
            shifted = not isinstance(after, Literal) and after not in everywhere and after not in names.carry
            (entering if shifted else kept).append(name)
            kept += [after] if shifted and after not in kept else []
    ahead = _needed(forward, [*names.after, *kept])
    back = [equation for equation in forward if id(equation) in again] + backward
    return Loops(apart, jaxpr, names, known, ahead, back, kept, entering, outputs, live)
