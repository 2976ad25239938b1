"""The plain engine: the backward pass in public JAX alone, its equation the body of a loop.

It keeps every carry, differentiates each step anew and adds up the gradient of the weights inside the loop: slower than
the fast engine, with more memory, and sums in half precision are those of each step. It is the fast engine's oracle,
and what is left where a program cannot be read.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jbptt.arrays import split_inexact, times_gate, widened
from jbptt.engine.dependence import Paths, chosen
from jbptt.types import Carry, Params, PyTree, Step


def pullback(step: Step, params: Params, carry: Carry, inputs: PyTree, live: Paths) -> tuple[tuple, Callable]:
    """A step's results `(carry, outputs)`, and the way back through it, which is linear.

    The way back takes (cotangents of the carry emitted, cotangents of the outputs, a running total or None) and gives
    (the total plus the gradient, and the cotangents of the carry received). Cotangents are lists over inexact leaves;
    those of leaves that no loss reads, as `live` says, are not looked at.
    """
    leaves, rebuild = split_inexact(carry)

    def run(params, leaves):
        after, outputs = step(params, rebuild(leaves), inputs)
        of_loss = chosen(split_inexact(after)[0], live.carries), chosen(split_inexact(outputs)[0], live.outputs)
        return of_loss, (after, outputs)

    _, pull, results = jax.vjp(run, params, leaves, has_aux=True)

    def back(carry_bar, outputs_bar, total):
        grads, cotangents = pull((chosen(carry_bar, live.carries), chosen(outputs_bar, live.outputs)))
        grads = jax.tree.map(widened, grads)
        return grads if total is None else jax.tree.map(jnp.add, total, grads), cotangents

    return results, back


def segment_vjp(
    step: Step, params: Params, carry: Carry, inputs: PyTree, num_steps: int, live: Paths
) -> tuple[tuple[Carry, PyTree], Callable]:
    """The carry after `num_steps` steps and their outputs `[S, ...]`, and the way back through them.

        λ_{t-1} = gates[t] · (J_tᵀ λ_t + (∂y_t/∂h_{t-1})ᵀ ȳ_t),     J_t = ∂h_t/∂h_{t-1}

    h_t is the carry that step t emits, λ_t its cotangent from all later steps.

    The way back takes (λ after the last step, ȳ, gates or None, a running total of the gradient or None) and gives λ
    before the first step and the total plus the gradient. λ and ȳ are lists over inexact leaves.
    """

    def forward(carry_t, inputs_t):
        after, outputs = step(params, carry_t, inputs_t)
        return after, (carry_t, outputs)

    after, (carries, outputs) = lax.scan(forward, carry, inputs, num_steps)

    def back(cotangents, outputs_bar, gates, total):
        def body(state, at_t):
            cotangents_t, total = state
            carry_t, inputs_t, outputs_bar_t, gate_t = at_t
            _, pull = pullback(step, params, carry_t, inputs_t, live)
            total, cotangents_t = pull(cotangents_t, outputs_bar_t, total)
            if gate_t is not None:
                cotangents_t = [times_gate(c, gate_t) for c in cotangents_t]
            return (cotangents_t, total), None

        if total is None:
            first = jax.tree.map(lambda a: a[0], (carries, inputs, outputs_bar, gates))
            (_, sums), _ = jax.eval_shape(body, (cotangents, None), first)  # placed on the devices as what is added
            total = jax.tree.map(lambda shape: lax.full_like(shape, 0), sums)
        steps = carries, inputs, outputs_bar, gates
        state, _ = lax.scan(body, (cotangents, total), steps, num_steps, reverse=True)
        return state

    return (after, outputs), back
