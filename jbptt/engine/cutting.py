"""The two loops of a segment, cut out of the program of one step and its derivative.

A step and its pullback are traced as one program. What does not depend on the cotangents belongs to the forward loop,
the rest to the backward loop; between them a cut decides what is kept of every step. What would cost more
to compute again than to read back is kept: matrix products, transcendental functions, whatever is not known to be
cheap. Elementwise sums and products, `where` and changes of shape are computed again if that needs at most one array
more, and no larger one. What is kept is kept once: the carry that
a step emits is the one that the next receives, an output that is a carry is no second array, and what the weights need
is formed after the loops (`weight_products`).

On CPU the time of a scanned backward pass goes into every extra `[S, ...]` array that is written.
"""

from typing import Any

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from jbptt.arrays import inexact_leaves, is_inexact
from jbptt.engine.dependence import Paths, chosen
from jbptt.engine.forward_backward import Loops, LoopsProgram, Names, needed, num_bytes, reached_from
from jbptt.engine.jaxprs import as_arrays, inlined, names_of
from jbptt.engine.primitives import CHEAP
from jbptt.engine.weight_products import SplitStep, split_step
from jbptt.types import Carry, Params, PyTree, Step


def _joint_program(
    split: SplitStep, carry: Carry, inputs: PyTree, live: Paths, of_inputs: tuple[bool, ...]
) -> tuple[ClosedJaxpr, Names, Any]:
    """One step and its pullback as one program, its names, and the structure of the outputs."""
    zeros = split.zeros(carry, inputs)

    def joint(others, carry, inputs, bars):
        (after, outputs, operands), pull = split.vjp(others, zeros, carry, inputs, live, of_inputs)
        return after, outputs, operands, *pull(bars)

    after, (outputs, _) = jax.eval_shape(split.step, split.others, carry, (inputs, zeros))
    of_loss = chosen(inexact_leaves(after), live.carries), chosen(inexact_leaves(outputs), live.outputs)
    # Only the types of the bars matter here: shape, dtype, placement.
    groups = split.others, carry, inputs, tuple([lax.full_like(s, 0) for s in shapes] for shapes in of_loss)
    closed, results = inlined(joint, *groups)
    # The fields of Names are in this order: the groups given, then the results of joint.
    given, made = iter(closed.jaxpr.invars), iter(closed.jaxpr.outvars)
    ins = [[next(given) for _ in jax.tree.leaves(group)] for group in groups]
    outs = [[next(made) for _ in jax.tree.leaves(group)] for group in results]
    return closed, Names(*ins, *outs), jax.tree.structure(outputs)


def _again(forward: list[JaxprEqn], wanted: list[Var], free: set[Var], kept: list[Var]) -> set[int]:
    """Which equations to evaluate again, by id, so that the backward loop has `wanted`; all else goes to `kept`.

    `free` is what that loop has anyway.
    """
    producers = {v: equation for equation in forward for v in equation.outvars}
    again: set[int] = set()

    def is_cheap(v):
        equation = producers[v]
        unknown = [u for u in names_of(equation.invars) if u not in free and u not in kept]
        small = all(num_bytes(u) <= num_bytes(v) for u in unknown)
        return equation.primitive.name in CHEAP and len(unknown) <= 1 and small

    def visit(v):
        if v in free or v in kept or id(producers[v]) in again:
            return
        if is_cheap(v):
            again.add(id(producers[v]))
            for u in names_of(producers[v].invars):
                visit(u)
        else:
            kept.append(v)

    for v in sorted(wanted, key=lambda v: v in producers and is_cheap(v)):
        visit(v)
    return again


def cut(
    step: Step, params: Params, carry: Carry, inputs: PyTree, live: Paths, of_inputs: tuple[bool, ...] = ()
) -> Loops:
    """The loops of `step` for arguments of these shapes, whose leaves have cotangents where `live` says so.

    `of_inputs`: which inexact leaves of the inputs are differentiated too; () for none.
    """
    split = split_step(step, params, carry, inputs)
    closed, names, outputs = _joint_program(split, carry, inputs, live, of_inputs)
    jaxpr = closed.jaxpr
    # What depends on a cotangent belongs to the backward loop, all else to the forward loop.
    of_bars = reached_from(names.bars, jaxpr.eqns)
    backward = [equation for equation in jaxpr.eqns if of_bars.intersection(names_of(equation.invars))]
    forward = [equation for equation in jaxpr.eqns if not of_bars.intersection(names_of(equation.invars))]
    known = [*jaxpr.constvars, *names.others]
    results = names.results
    backward = needed(backward, results)
    # The backward loop has these without keeping them: what is the same in all steps, and the inputs.
    everywhere, emitted = {*known, *names.inputs}, names_of(names.after)
    # Outputs and operands are needed as stacks anyway. Of what the backward loop reads, _again decides the rest.
    kept = [v for v in names_of([*names.outputs, *names.operands]) if v not in everywhere and v not in names.carry]
    wanted = [v for v in names_of([*(v for e in backward for v in e.invars), *results]) if v not in of_bars]
    again = _again(forward, wanted, {*everywhere, *names.carry, *emitted}, kept)
    # Carries count as free so far, received or emitted. Those that are used are kept now, each once.
    used = names_of(
        [*wanted, *names.outputs, *names.operands, *(v for e in forward if id(e) in again for v in e.invars)]
    )
    kept += [v for v in emitted if v in used and v not in everywhere and v not in kept]
    # A carry that a step receives is the one emitted a step before: its stack, read one step behind, serves for both.
    # Where the emitted one has no stack of its own (a constant, an input, a carry handed on), the received one is kept.
    lagged = []
    for name, after in zip(names.carry, names.after, strict=True):
        if name in used and name not in kept:
            shifted = not isinstance(after, Literal) and after not in everywhere and after not in names.carry
            (lagged if shifted else kept).append(name)
            kept += [after] if shifted and after not in kept else []
    # The equations of both loops in the program's order; what is computed again opens the backward loop.
    ahead = needed(forward, [*names.after, *kept])
    back = [equation for equation in forward if id(equation) in again] + backward
    inexact = [v for v, leaf in zip(names.inputs, jax.tree.leaves(inputs), strict=True) if is_inexact(leaf)]
    moving = chosen(inexact, of_inputs) if of_inputs else []
    program = LoopsProgram(jaxpr, names, known, ahead, back, kept, lagged, outputs, live, moving)
    return Loops(program, split, [*as_arrays(closed.consts), *split.others])
