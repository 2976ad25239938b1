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


def pullback(
    step: Step,
    params: Params,
    carry: Carry,
    inputs: PyTree,
    live: Paths,
) -> tuple[tuple, Callable]:
    """A step's results `(next_carry, outputs)` and the way back; see `plain.pullback`."""
    split = split_step(step, params, carry, inputs)
    results, pull = split.vjp(
        split.loop_params,
        split.zeros(carry, inputs),
        carry,
        inputs,
        live,
    )
    next_carry, outputs, operands = results

    def back(next_carry_bar, outputs_bar, total):
        bars = chosen(next_carry_bar, live.carries), chosen(outputs_bar, live.outputs)
        loop_params_bar, products_bar, carry_bar, _ = pull(bars)
        # `add_products` takes stacks over steps: here of one step.
        operand_stacks = [operand[None] for operand in operands]
        bar_stacks = [bar[None] for bar in products_bar]
        sums = split.add_products(split.first_sums(total), operand_stacks, bar_stacks)
        return split.gradient(sums, loop_params_bar), carry_bar

    return (next_carry, outputs), back


def segment_vjp(
    step: Step, params: Params, carry: Carry, inputs: PyTree, num_steps: int, live: Paths
) -> tuple[tuple[Carry, PyTree], Callable]:
    """The carry after all steps and their outputs, and the way back; see `plain.segment_vjp`."""
    loops = cut(step, params, carry, jax.tree.map(lambda a: a[0], inputs), live)
    last_carry, outputs, stacks = loops.forward(carry, inputs, num_steps)

    def back(last_carry_bar, outputs_bar, gates, total):
        total, carry_bar, _ = loops.backward(stacks, last_carry_bar, outputs_bar, gates, total)
        return total, carry_bar

    return (last_carry, outputs), back
