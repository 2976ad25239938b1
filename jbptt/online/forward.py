"""A batch step after step, with what each example carries along instead of a way back in time.

A loss reads the carry that its step emits, and perhaps more of the one received:

    ∂ℓ_t/∂w = ∂⁺ℓ_t/∂w + (∂⁺ℓ_t/∂h_{t−1}) P_{t−1} + (∂ℓ_t/∂h_t) P_t,     P = ∂h/∂w
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbptt import engine
from jbptt.arrays import (
    inexact_leaves,
    real_leaves,
    real_vector,
    select_leading,
    split_inexact,
    varying,
    zero_masked,
)
from jbptt.cells import split_readout
from jbptt.online.examples import advances, carry_size, for_each, influence_dtype, split_read
from jbptt.plans import Plan, planned
from jbptt.problem import Problem
from jbptt.segments import Sums, Updated, add_losses
from jbptt.types import Batch, Params, PyTree
from jbptt.windows import sum_pieces


class Method(NamedTuple):
    """How one example carries its influence along.

    M is the influence of the carry that entered the update.

    Attributes:
      carry_on: `(advance, carried, number) -> carried` of one example, one step on; number: of the
        step, counted over the stream.
      gradient: `(carried, h_bar) -> (Σ h_bar P, h_bar M)` of all examples, leaves
        `[examples, ...]`: for each real leaf of the parameters (None where it is zero for certain)
        the sum over the examples; and `[examples, n]`.
    """

    carry_on: Callable
    gradient: Callable


def run_forward(
    plan: Plan, method: Method, problem: Problem, carried: PyTree, first: Any
) -> tuple[Updated, PyTree]:
    """What a batch comes to, and what the next one carries along.

    Time goes forward once, and memory does not grow with the steps.

    Args:
      plan: the devices that the batch is divided over.
      method: of carrying the influence along.
      problem: one batch.
      carried: leaves `[*batch, ...]`.
      first: the number of the batch's first step in its stream.
    """

    # What is divided like a history of one step.
    def run(problem, history, first, _):
        updated, carried = _on_one_device(
            method, problem, jax.tree.map(lambda a: a[0], history), first
        )
        return updated._replace(history=jax.tree.map(lambda a: a[None], carried))

    updated = planned(plan, run, problem, jax.tree.map(lambda a: a[None], carried), first)
    return updated, jax.tree.map(lambda a: a[0], updated.history)


def _on_one_device(
    method: Method, problem: Problem, carried: PyTree, first: Any
) -> tuple[Updated, PyTree]:
    dtype, shape = influence_dtype(problem), problem.batch_shape
    core, advance_of = split_readout(problem.step)[0], advances(problem)
    is_read, live = problem.live.carries, problem.live._replace(carries=())

    num_examples = prod(shape)

    def vectors(bars):
        """Cotangents of the examples' carries in real numbers, `[examples, n]`."""
        flat = [jnp.conj(bar).reshape(num_examples, *bar.shape[len(shape) :]) for bar in bars]
        joined = jax.vmap(lambda leaves: real_vector(leaves)[0], axis_size=num_examples)
        return joined(flat).astype(dtype)

    def say(carried, bars):
        """What cotangents of the carry say of the parameters, and of the carry that entered."""
        flat = jax.tree.map(lambda a: a.reshape(num_examples, *a.shape[len(shape) :]), carried)
        grads, entered = method.gradient(flat, vectors(bars))
        return grads, entered.reshape(*shape, -1)

    def of_one(number, own):
        """An example's influence one step on."""
        carry, inputs, carried = own
        return method.carry_on(advance_of(carry, inputs), carried, number)

    def one(state, piece: Batch, sums: Sums | None):
        carry, carried, reached, number = state
        part = problem.on(carry, piece)
        x, mask = inputs = jax.tree.map(lambda a: a[0], part.inputs)
        given = zero_masked(mask, x)
        emitted, outputs = core(problem.params, carry, given)
        sums, outputs_bar = add_losses(part, jax.tree.map(lambda a: a[None], outputs), sums)
        outputs_from, reads_received = engine.outputs_of(
            core, problem.params, carry, given, is_read
        )

        # What the outputs read is a step's carry, received and emitted; it emits none.
        def look(params, both, _):
            return (), outputs_from(params, both[0], given, both[1])

        _, pull = engine.pullback(look, problem.params, (carry, emitted), None, live)
        grad, bars = pull([], [bar[0] for bar in outputs_bar], sums.grad)
        received_bars, emitted_bars = (
            engine.chosen(own, is_read) for own in (bars[: len(is_read)], bars[len(is_read) :])
        )
        said = [say(carried, received_bars)] if reads_received else []
        carried = for_each(partial(of_one, number), shape, (carry, inputs, carried))
        said.append(say(carried, emitted_bars))
        grads, entered = jax.tree.map(lambda *parts: sum(parts), *said)
        after = emitted if mask is None else select_leading(mask, emitted, carry)
        return sums._replace(grad=add_real(grad, grads)), (
            after,
            carried,
            reached + entered,
            number + 1,
        )

    reached = jnp.zeros((*shape, carry_size(problem)), dtype)
    reached = varying(reached, (problem.params, problem.carry, problem.batch))
    state = problem.carry, carried, reached, jnp.asarray(first)
    sums, (carry, carried, reached, _) = sum_pieces(one, state, problem.batch, 1, None)
    return Updated(sums, carry, _as_cotangents(problem, reached)), carried


def add_real(grad: Params, found: list[jax.Array | None]) -> Params:
    """Adds gradients in real leaves to a gradient in JAX's convention."""
    leaves, rebuild = split_inexact(grad)
    parts, join = real_leaves(leaves)
    own = [
        jnp.zeros_like(part) if g is None else g.astype(part.dtype)
        for g, part in zip(found, parts, strict=True)
    ]
    return rebuild([a + jnp.conj(b) for a, b in zip(leaves, join(own), strict=True)])


def _as_cotangents(problem: Problem, reached: jax.Array) -> list[jax.Array]:
    """`[*batch, n]` in the carry's real numbers as cotangents of its inexact leaves."""

    def of_one(leaves, vector):
        _, rebuild = real_vector(leaves)
        return [jnp.conj(leaf) for leaf in rebuild(vector)]

    read = split_read(problem, problem.carry)[0]
    found = for_each(of_one, problem.batch_shape, read, reached)
    silent = [jnp.zeros_like(leaf) for leaf in inexact_leaves(problem.carry)]
    return engine.replaced(silent, problem.live.carries, found)
