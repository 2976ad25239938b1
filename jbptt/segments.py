"""A batch in segments, from the last to the first, with gates on every crossing.

    λ_t = ∂ℓ_t/∂h_t + gate_{t+1} · J_{t+1}ᵀ λ_{t+1},     ∂L/∂w = Σ_t (∂⁺h_t/∂w)ᵀ λ_t

`back_through` caches the carries at the segments' starts and goes through the segments from the
last to the first: it recomputes each from its cached carry, runs its readouts and losses at once,
runs λ backwards through it and hands it on, with the running total of the gradient. Memory is
O(T/segment + segment).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jbptt.arrays import is_inexact, split_inexact, steps_from, weighted_mean, widened
from jbptt.engine import parallel_pullback, segment_vjp
from jbptt.losses import weighted_losses
from jbptt.problem import Problem
from jbptt.recurrence import default_segment
from jbptt.starts import Entered
from jbptt.types import Carry, Estimate, Params, PyTree, Step


class Sums(NamedTuple):
    """What adds up over steps, windows and batches: loss, gradient, weight and the loss's aux."""

    loss: jax.Array
    grad: Params
    weight: jax.Array
    aux: PyTree


class Updated(NamedTuple):
    """What an estimator's update comes to.

    Attributes:
      sums: loss, gradient, weight and aux.
      carry: after the batch.
      cotangents: of the carry that entered the update, a list over inexact leaves.
      history: the steps that a window of the next update may reach; None where none can.
      seen: what else the next update reads (of adaptive windows: running means, and their weight).
    """

    sums: Sums
    carry: Carry
    cotangents: list
    history: Any = None
    seen: Any = None


def estimate_of(updated: Updated, start: Entered, **info: Any) -> Estimate:
    """What an estimator returns: aux, and the entering carry's cotangents, as means.

    Where that carry is a function of the parameters, its gradient is added.
    """
    sums, cotangents = updated.sums, updated.cotangents
    aux = (
        {}
        if sums.aux is None
        else {"aux": jax.tree.map(lambda a: weighted_mean(a, sums.weight), sums.aux)}
    )
    means = iter(weighted_mean(widened(c), sums.weight) for c in cotangents)
    carry_grads = jax.tree.map(
        lambda a: next(means) if is_inexact(a) else jnp.zeros(jnp.shape(a)), start.carry
    )
    grad = sums.grad
    if start.pull is not None:
        grad = jax.tree.map(lambda g, own: g + own.astype(g.dtype), grad, start.pull(cotangents))
    return Estimate(sums.loss, grad, sums.weight, {**aux, "carry_grads": carry_grads, **info})


def add_losses(
    problem: Problem, outputs: PyTree, sums: Sums | None = None
) -> tuple[Sums, list[jax.Array]]:
    """Adds losses, weights and the readout's gradient; also gives `∂L` in the core's outputs."""
    parts, batch = problem.parts, problem.batch

    # A readout is a step whose carry is the core's output, and which emits no carry.
    def look(params, output, _):
        return (), parts.readout(params, output)

    by_readout = problem.live._replace(carries=(), outputs=problem.live.ys)
    (_, ys), pull = parallel_pullback(
        look, problem.params, outputs, None, problem.num_steps, by_readout
    )
    leaves, rebuild = split_inexact(ys)
    value, pull_losses, (weight, aux) = jax.vjp(
        lambda leaves: weighted_losses(parts.loss, rebuild(leaves), batch), leaves, has_aux=True
    )
    (ys_bar,) = pull_losses(jnp.ones_like(value))
    grad, cotangents = pull([], ys_bar, None if sums is None else sums.grad)
    if sums is not None:
        value, weight, aux = jax.tree.map(
            jnp.add, (value, weight, aux), (sums.loss, sums.weight, sums.aux)
        )
    return Sums(value, grad, weight, aux), cotangents


class ForwardPass(NamedTuple):
    """What a forward pass through a batch, readouts and losses included, leaves.

    Attributes:
      sums: with the batch's own added; of the gradient, what the readout alone contributes.
      carry: after the last step.
      carries: what enters the steps, `[T, ...]`.
      outputs: the core's, `[T, ...]`.
      outputs_bar: `w_t ∂ℓ_t` in them, a list over inexact leaves, `[T, ...]`.
    """

    sums: Sums
    carry: Carry
    carries: Carry
    outputs: PyTree
    outputs_bar: list


def pass_forward(problem: Problem, sums: Sums | None = None) -> ForwardPass:
    """Runs the whole batch; memory O(T) carries."""
    carry, carries, outputs = problem.trajectory()
    sums, outputs_bar = add_losses(problem, outputs, sums)
    return ForwardPass(sums, carry, carries, outputs, outputs_bar)


class BackwardPass(NamedTuple):
    """What a backward pass through a batch, or a segment of it, leaves.

    Attributes:
      sums: with the batch's own added.
      carry: after the last step.
      cotangents: of the carry that entered the first, behind its gate; a list over inexact leaves.
      starts: the carries that entered the segments, leaves `[num_segments, ...]`.
    """

    sums: Sums
    carry: Carry
    cotangents: list
    starts: Carry


def back_through_segment(
    problem: Problem, cotangents: Any = None, sums: Any = None
) -> BackwardPass:
    """One segment. `cotangents` belong to the carry after it; None is zero, as `sums` None is."""
    (after, outputs), back = segment_vjp(
        problem.parts.core,
        problem.params,
        problem.carry,
        problem.inputs,
        problem.num_steps,
        problem.live,
    )
    sums, outputs_bar = add_losses(problem, outputs, sums)
    if cotangents is None:
        cotangents = [jnp.zeros_like(leaf) for leaf in split_inexact(after)[0]]
    grad, cotangents = back(cotangents, outputs_bar, problem.gates, sums.grad)
    starts = jax.tree.map(lambda a: jnp.asarray(a)[None], problem.carry)
    return BackwardPass(sums._replace(grad=grad), after, cotangents, starts)


def forward(
    problem: Problem, inputs_at: Callable, num_segments: int, length: int
) -> tuple[Carry, Carry]:
    """Runs the core alone: the carry after it, and the carries at the segments' starts.

    `inputs_at(i)`: what the core takes beside parameters and carry in segment i, `length` steps.
    """

    def body(carry, i):
        after, _ = lax.scan(
            partial(core_alone, problem.parts.core, problem.params), carry, inputs_at(i), length
        )
        return after, carry

    return lax.scan(body, problem.carry, jnp.arange(num_segments))


def core_alone(core: Step, params: Params, carry: Carry, inputs: PyTree) -> tuple[Carry, None]:
    """A step whose outputs nobody wants."""
    return core(params, carry, inputs)[0], None


def back_through(
    problem: Problem, segment: int | None = None, sums: Sums | None = None
) -> BackwardPass:
    """One batch, its gradient gated but otherwise exact, added to `sums`.

    Each step is evaluated twice (once in the last segment) and differentiated once.
    """
    num_steps = problem.num_steps
    segment = segment or default_segment(num_steps)
    # The last segment, whole or ragged, opens the backward pass.
    num_before_last = (num_steps - 1) // segment
    data = problem.batch, problem.gates

    def segment_at(carry, i):
        return problem.on(carry, *steps_from(data, i * segment, segment))

    def last_from(carry):
        return problem.on(carry, *jax.tree.map(lambda a: a[num_before_last * segment :], data))

    if num_before_last == 0:
        return back_through_segment(problem, None, sums)
    before_last, starts = forward(
        problem, lambda i: segment_at(None, i).inputs, num_before_last, segment
    )
    passed = back_through_segment(last_from(before_last), None, sums)

    def body(state, inputs):
        i, start = inputs
        one = back_through_segment(segment_at(start, i), *state)
        return (one.cotangents, one.sums), None

    state = passed.cotangents, passed.sums
    (cotangents, sums), _ = lax.scan(
        body, state, (jnp.arange(num_before_last), starts), reverse=True
    )
    starts = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), starts, passed.starts)
    return BackwardPass(sums, passed.carry, cotangents, starts)
