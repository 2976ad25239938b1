"""The plain engine: the backward pass in public JAX alone, its equation the body of a loop.

It keeps every carry, differentiates each step anew, and sums the weights' gradients inside the
loop: slower than the fast engine, with more memory; where a step computes in half precision, so is
its share of a gradient. It is the fast engine's oracle, and what runs where a program cannot be
read.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jbptt.arrays import split_inexact, times_gate, widened
from jbptt.engine.dependence import Paths, chosen
from jbptt.types import Carry, Params, PyTree, Step


def pullback(
    step: Step,
    params: Params,
    carry: Carry,
    inputs: PyTree,
    live: Paths,
) -> tuple[tuple, Callable]:
    """A step's results `(next_carry, outputs)`, and the way back through it, which is linear.

    The way back takes (cotangents of `next_carry`, cotangents of `outputs`, a running total of the
    gradient or None) and gives (the total plus this step's gradient, the cotangents of `carry`).
    Cotangents are lists over inexact leaves; those of leaves that no loss reads, as `live` says,
    are not looked at.
    """
    leaves, rebuild = split_inexact(carry)

    def run(params, leaves):
        next_carry, outputs = step(params, rebuild(leaves), inputs)
        return live.leaves(next_carry, outputs), (next_carry, outputs)

    _, pull, results = jax.vjp(run, params, leaves, has_aux=True)

    def back(next_carry_bar, outputs_bar, total):
        bars = chosen(next_carry_bar, live.carries), chosen(outputs_bar, live.outputs)
        grads, carry_bar = pull(bars)
        grads = jax.tree.map(widened, grads)
        return grads if total is None else jax.tree.map(jnp.add, total, grads), carry_bar

    return results, back


def segment_vjp(
    step: Step, params: Params, carry: Carry, inputs: PyTree, num_steps: int, live: Paths
) -> tuple[tuple[Carry, PyTree], Callable]:
    """The carry after `num_steps` steps, their outputs `[S, ...]`, and the way back through them.

        λ_{t-1} = gates[t] · (J_tᵀ λ_t + (∂y_t/∂h_{t-1})ᵀ ȳ_t),     J_t = ∂h_t/∂h_{t-1}

    h_t is the carry that step t emits, λ_t its cotangent from all later steps. (`segments` and
    `unroll` count ∂ℓ_t/∂h_t, the loss of step t itself, in λ_t; here it comes in by ȳ_t.)

    The way back takes (λ after the last step, ȳ, gates or None, a running total of the gradient or
    None) and gives (the total plus the gradient, λ before the first step). λ and ȳ are lists over
    inexact leaves.
    """

    def forward(carry_t, inputs_t):
        next_carry, outputs_t = step(params, carry_t, inputs_t)
        return next_carry, (carry_t, outputs_t)

    last_carry, (carries, outputs) = lax.scan(forward, carry, inputs, num_steps)

    def back(last_carry_bar, outputs_bar, gates, total):
        steps = carries, inputs, outputs_bar, gates

        def body(state, at_t):
            total, next_carry_bar = state
            carry_t, inputs_t, outputs_bar_t, gate_t = at_t
            _, pull = pullback(step, params, carry_t, inputs_t, live)
            total, carry_bar = pull(next_carry_bar, outputs_bar_t, total)
            if gate_t is not None:
                carry_bar = [times_gate(c, gate_t) for c in carry_bar]
            return (total, carry_bar), None

        if total is None:
            # Zeros, placed on the devices as what is added to them.
            first_step = jax.tree.map(lambda a: a[0], steps)
            (sums, _), _ = jax.eval_shape(body, (None, last_carry_bar), first_step)
            total = jax.tree.map(lambda shape: lax.full_like(shape, 0), sums)
        state, _ = lax.scan(body, (total, last_carry_bar), steps, num_steps, reverse=True)
        return state

    return (last_carry, outputs), back
