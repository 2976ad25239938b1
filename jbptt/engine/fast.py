"""The fast engine: a step's program is read, split at its weights and cut into two loops."""

from collections.abc import Callable

import jax

from jbptt.engine.cutting import cut
from jbptt.engine.dependence import Paths, chosen
from jbptt.engine.forward_backward import Loops
from jbptt.engine.jaxprs import closed_over
from jbptt.engine.weight_products import split_step
from jbptt.types import Carry, Params, PyTree, Step

__all__ = ["Loops", "closed_over", "cut", "pullback", "segment_vjp"]


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


def segment_vjp(
    step: Step, params: Params, carry: Carry, inputs: PyTree, num_steps: int, live: Paths
) -> tuple[tuple[Carry, PyTree], Callable]:
    """The carry after all steps and their outputs, and the way back; see `plain.segment_vjp`."""
    loops = cut(step, params, carry, jax.tree.map(lambda a: a[0], inputs), live)
    after, outputs, stacks = loops.forward(carry, inputs, num_steps)

    def back(cotangents, outputs_bar, gates, total):
        return loops.backward(stacks, cotangents, outputs_bar, gates, total)[:2]

    return (after, outputs), back
