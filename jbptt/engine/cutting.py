"""The two loops of a segment, cut out of the program of one step and its derivative.

A step and its pullback are traced as one program. What does not depend on the cotangents belongs to
the forward loop, the rest to the backward loop. Between them a cut decides what is stacked, step by
step, for the way back:

- What would cost more to compute again than to read back: matrix products, transcendental
  functions, whatever is not known to be cheap.
- Elementwise sums and products, `where` and changes of shape are computed again, if that needs at
  most one array more, and no larger one.
- Nothing twice: the carry that a step emits is the one that the next receives, an output that is a
  carry is no second array, and what the weights need is formed after the loops
  (`weight_products`).

On CPU the time of a scanned backward pass goes into every extra `[S, ...]` array that is written.
"""

from typing import Any

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from jbptt.arrays import is_inexact
from jbptt.engine.dependence import Paths, chosen
from jbptt.engine.forward_backward import Loops, num_bytes
from jbptt.engine.jaxprs import (
    as_arrays,
    inlined,
    needed,
    operands_of,
    reached_from,
    variables_of,
)
from jbptt.engine.loop_programs import LoopPrograms, StepVariables
from jbptt.engine.primitives import CHEAP
from jbptt.engine.weight_products import SplitStep, split_step
from jbptt.types import Carry, Params, PyTree, Step


def _joint_program(
    split: SplitStep,
    carry: Carry,
    inputs: PyTree,
    live: Paths,
    perturbed: tuple[bool, ...] | None,
) -> tuple[ClosedJaxpr, StepVariables, Any]:
    """One step and its pullback as one program, its variables, and the structure of the outputs."""
    zeros = split.zeros(carry, inputs)

    def joint(loop_params, carry, inputs, bars):
        results, pull = split.vjp(loop_params, zeros, carry, inputs, live, perturbed)
        return *results, *pull(bars)

    next_carry, (outputs, _) = jax.eval_shape(split.step, split.loop_params, carry, (inputs, zeros))
    shapes = live.leaves(next_carry, outputs)
    arguments = (
        split.loop_params,
        carry,
        inputs,
        # Only the types of the cotangents matter here: shape, dtype, placement.
        jax.tree.map(lambda shape: lax.full_like(shape, 0), shapes),
    )
    closed, results = inlined(joint, *arguments)
    # The fields of StepVariables are the arguments and the results of `joint`, in this order.
    ins = jax.tree.unflatten(jax.tree.structure(arguments), closed.jaxpr.invars)
    outs = jax.tree.unflatten(jax.tree.structure(results), closed.jaxpr.outvars)
    variables = StepVariables(*map(jax.tree.leaves, (*ins, *outs)))
    return closed, variables, jax.tree.structure(outputs)


def _recompute(
    forward: list[JaxprEqn], wanted: list[Var], free: set[Var], stacked: list[Var]
) -> tuple[list[JaxprEqn], list[Var]]:
    """Which equations to evaluate again, so that the backward loop has `wanted`, and the stacks.

    free: what that loop has without a stack. stacked: what has a stack anyway; it grows by what is
    too dear to compute again.
    """
    producers = {v: equation for equation in forward for v in equation.outvars}
    again, stacked = set(), list(stacked)

    def is_known(v):
        return v in free or v in stacked

    def is_cheap(v):
        equation = producers[v]
        missing = [u for u in variables_of(equation.invars) if not is_known(u)]
        is_small = all(num_bytes(u) <= num_bytes(v) for u in missing)
        return equation.primitive.name in CHEAP and len(missing) <= 1 and is_small

    def visit(v):
        if is_known(v) or id(producers[v]) in again:
            return
        if not is_cheap(v):
            stacked.append(v)
            return
        again.add(id(producers[v]))
        for operand in variables_of(producers[v].invars):
            visit(operand)

    # What is dear comes first: once it is stacked, more of the rest is cheap.
    for v in sorted(wanted, key=lambda v: v in producers and is_cheap(v)):
        visit(v)
    return [equation for equation in forward if id(equation) in again], stacked


def _with_carries(
    stacked: list[Var],
    carries: list[tuple[Var, Any]],
    used: set[Var],
    at_hand: set[Var],
) -> tuple[list[Var], list[Var]]:
    """The stacks with those of the carries that are `used`, and which of these are lagged.

    A carry that a step receives is the one emitted a step before: the stack of that, read one step
    behind, serves for both. Where the emitted one can have none (a constant, an input, a carry
    handed on), the received one is stacked.

    carries: pairs (received, emitted). at_hand: what needs no stack.
    """
    stacked, lagged = list(stacked), []
    all_received = [received for received, _ in carries]
    for emitted in variables_of(emitted for _, emitted in carries):
        if emitted in used and emitted not in at_hand and emitted not in stacked:
            stacked.append(emitted)
    for received, emitted in carries:
        if received not in used or received in stacked:
            continue
        if isinstance(emitted, Literal) or emitted in at_hand or emitted in all_received:
            stacked.append(received)
            continue
        lagged.append(received)
        if emitted not in stacked:
            stacked.append(emitted)
    return stacked, lagged


def cut(
    step: Step,
    params: Params,
    carry: Carry,
    inputs: PyTree,
    live: Paths,
    perturbed: tuple[bool, ...] | None = None,
) -> Loops:
    """The loops of `step` for arguments of these shapes, with cotangents where `live` says so.

    perturbed: which inexact leaves of the inputs are differentiated too; None for none.
    """
    split = split_step(step, params, carry, inputs)
    closed, variables, outputs = _joint_program(split, carry, inputs, live, perturbed)
    jaxpr = closed.jaxpr
    # What depends on a cotangent belongs to the backward loop, all else to the forward loop.
    of_bars = reached_from(variables.bars, jaxpr.eqns)
    forward, backward = [], []
    for equation in jaxpr.eqns:
        is_backward = of_bars.intersection(variables_of(equation.invars))
        (backward if is_backward else forward).append(equation)
    backward = needed(backward, variables.results)

    # The backward loop has these without a stack of their own: invariants and inputs.
    invariant = [*jaxpr.constvars, *variables.loop_params]
    at_hand = {*invariant, *variables.inputs}
    received, emitted = variables.carry, variables_of(variables.next_carry)
    # Outputs and operands are needed as stacks anyway. Of what the backward loop reads,
    # `_recompute` decides the rest. Carries count as free at first, received or emitted.
    after_the_loop = variables_of([*variables.outputs, *variables.operands])
    stacked = [v for v in after_the_loop if v not in at_hand and v not in received]
    wanted = variables_of([*operands_of(backward), *variables.results])
    wanted = [v for v in wanted if v not in of_bars]
    recomputed, stacked = _recompute(forward, wanted, {*at_hand, *received, *emitted}, stacked)
    # Those carries that are used get their stacks now.
    used = {*wanted, *after_the_loop, *variables_of(operands_of(recomputed))}
    carries = list(zip(received, variables.next_carry, strict=True))
    stacked, lagged = _with_carries(stacked, carries, used, at_hand)

    leaves = zip(variables.inputs, jax.tree.leaves(inputs), strict=True)
    inexact_inputs = [v for v, leaf in leaves if is_inexact(leaf)]
    program = LoopPrograms(
        jaxpr=jaxpr,
        variables=variables,
        invariant=invariant,
        forward=needed(forward, [*variables.next_carry, *stacked]),
        backward=[*recomputed, *backward],
        stacked=stacked,
        lagged=lagged,
        outputs=outputs,
        live=live,
        perturbed_inputs=[] if perturbed is None else chosen(inexact_inputs, perturbed),
    )
    return Loops(program, split, [*as_arrays(closed.consts), *split.loop_params])
