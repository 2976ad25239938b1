"""One step and the way back through it, or many steps side by side."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jbptt.arrays import widened
from jbptt.engine.dependence import Paths, chosen
from jbptt.engine.weight_products import split_step
from jbptt.types import Carry, Params, PyTree, Step


def pullback(step: Step, params: Params, carry: Carry, inputs: PyTree, live: Paths) -> tuple[tuple, Callable]:
    """A step's results `(carry, outputs)`, and the way back through it, which is linear.

    The way back takes (cotangents of the carry emitted, cotangents of the outputs, a running total or None) and gives
    (the total plus the gradient, and the cotangents of the carry received). Cotangents are lists over inexact leaves;
    those of leaves that no loss reads, as `live` says, are not looked at.
    """
    split = split_step(step, params, carry, inputs)
    (after, outputs, operands), pull = split.vjp(split.others, split.zeros(carry, inputs), carry, inputs, live)

    def back(carry_bar, outputs_bar, total):
        bars = chosen(carry_bar, live.carries), chosen(outputs_bar, live.outputs)
        others_bar, products_bar, cotangents, _ = pull(bars)
        one_step = [a[None] for a in operands], [bar[None] for bar in products_bar]
        grads = split.add_products(split.first_sums(total), *one_step)
        return split.gradient(grads, others_bar), cotangents

    return (after, outputs), back


def parallel_pullback(
    step: Step, params: Params, carries: Carry, inputs: PyTree, num_steps: int, live: Paths
) -> tuple[tuple, Callable]:
    """`pullback` of all steps at once, each at its own cached (carry, input), leaves `[T, ...]`."""

    def all_at_once(params, carries, inputs):
        return jax.vmap(partial(step, params), axis_size=num_steps)(carries, inputs)

    results, back = pullback(all_at_once, params, carries, inputs, live)

    def one_by_one(carry_bar, outputs_bar, total):
        def body(total, inputs_t):
            (carry_t, x_t), *bars = inputs_t
            return pullback(step, params, carry_t, x_t, live)[1](*bars, total)

        return lax.scan(body, total, ((carries, inputs), carry_bar, outputs_bar), num_steps)

    def all_or_one(carry_bar, outputs_bar, total):
        try:
            return back(carry_bar, outputs_bar, total)
        except (NotImplementedError, TypeError, ValueError):
            # JAX has the derivative of every step, but not that of their vmap (products with sparse weights).
            start = jax.tree.map(lambda a: jnp.zeros_like(widened(a)), params) if total is None else total
            return one_by_one(carry_bar, outputs_bar, start)

    return results, all_or_one
