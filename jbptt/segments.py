"""The one engine: a backward pass segment by segment, with gates on every crossing.

    λ_t = ∂ℓ_t/∂h_t + gate_{t+1} · J_{t+1}ᵀ λ_{t+1},     ∂L/∂w = Σ_t (∂⁺h_t/∂w)ᵀ λ_t

`back_through` caches the carries at the segments' starts and goes through the segments from the last to the
first: it recomputes each from its cached carry, runs its readouts and losses at once, runs λ backwards through it
and hands it on, with the running total of the gradient. Memory is O(T/segment + segment).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jbptt.arrays import (
    is_inexact,
    split_inexact,
    steps_from,
    weighted_mean,
    widened,
)
from jbptt.cells import split_readout
from jbptt.engine import Paths, parallel_pullback, paths, segment_vjp
from jbptt.losses import batch_steps, weighted_losses, where_counted
from jbptt.recurrence import default_segment, held
from jbptt.starts import Entered
from jbptt.types import Batch, Carry, Estimate, Loss, Params, PyTree, Step


class Sums(NamedTuple):
    """What adds up over steps, windows and batches: loss, gradient, weight and the loss's aux."""

    loss: jax.Array
    grad: Params
    weight: jax.Array
    aux: PyTree


def estimate_of(sums: Sums, start: Entered, cotangents: list, **info: Any) -> Estimate:
    """What an estimator returns; aux and the cotangents of the carry that entered are turned into means.

    Where that carry is a function of the parameters, its gradient is added.
    """
    aux = {} if sums.aux is None else {"aux": jax.tree.map(lambda a: weighted_mean(a, sums.weight), sums.aux)}
    means = iter(weighted_mean(widened(c), sums.weight) for c in cotangents)
    carry_grads = jax.tree.map(lambda a: next(means) if is_inexact(a) else jnp.zeros(jnp.shape(a)), start.carry)
    grad = sums.grad
    if start.pull is not None:
        grad = jax.tree.map(lambda g, own: g + own.astype(g.dtype), grad, start.pull(cotangents))
    return Estimate(sums.loss, grad, sums.weight, {**aux, "carry_grads": carry_grads, **info})


class Parts(NamedTuple):
    """A step and its loss as the engine runs them: what meets the mask stands inside what may be vmapped.

    Attributes:
      core: `(params, carry, (x, mask)) -> (carry, outputs)`, which holds the carry where the mask is False.
      readout: `(params, outputs) -> y`.
      loss: `(y, target, counted) -> (losses, aux)`, as `where_counted` makes it.
    """

    core: Step
    readout: Callable
    loss: Callable


def parts_of(step: Step, loss: Loss) -> Parts:
    """The parts of a user's step and loss."""
    core, readout = split_readout(step)
    return Parts(held(core), readout, where_counted(loss))


def vmapped(parts: Parts) -> Parts:
    """The parts for a leading axis on everything but the parameters, the mask included."""
    core, readout, loss = parts
    return Parts(jax.vmap(core, (None, 0, 0)), jax.vmap(readout, (None, 0)), jax.vmap(loss))


def paths_of(parts: Parts, params: Params, carry: Carry, batch: Batch) -> Paths:
    """Which leaves of a step have cotangents."""
    one = jax.eval_shape(lambda batch: jax.tree.map(lambda a: a[0], batch), batch)

    def loss(y, target):
        return parts.loss(y, target, None)[0]

    return paths(parts.core, parts.readout, loss, params, carry, (one.xs, one.mask), one.targets)


def add_losses(
    parts: Parts, params: Params, outputs: PyTree, batch: Batch, live: Paths, sums: Sums | None
) -> tuple[Sums, list[jax.Array]]:
    """Adds the losses, their weight and their gradient in the readout alone; and `∂L` in the core's outputs."""

    def look(params, output, _):
        return (), parts.readout(params, output)

    by_readout = live._replace(carries=(), outputs=live.ys)
    (_, ys), pull = parallel_pullback(look, params, outputs, None, batch_steps(batch), by_readout)
    leaves, rebuild = split_inexact(ys)
    value, pull_losses, (weight, aux) = jax.vjp(
        lambda leaves: weighted_losses(parts.loss, rebuild(leaves), batch), leaves, has_aux=True
    )
    (ys_bar,) = pull_losses(jnp.ones_like(value))
    grad, cotangents = pull([], ys_bar, None if sums is None else sums.grad)
    if sums is not None:
        value, weight, aux = jax.tree.map(jnp.add, (value, weight, aux), (sums.loss, sums.weight, sums.aux))
    return Sums(value, grad, weight, aux), cotangents


class BackwardPass(NamedTuple):
    """What a backward pass through a batch, or a segment of it, leaves.

    Attributes:
      sums: with the batch's own added.
      carry: after the last step.
      cotangents: of the carry that entered the first, behind its gate; a list over inexact leaves.
      start: the carry that entered the last segment but one, or the first where there are not as many.
    """

    sums: Sums
    carry: Carry
    cotangents: list
    start: Carry


def back_through_segment(
    parts: Parts, live: Paths, params: Params, carry: Carry, batch: Batch, gates: Any, cotangents: Any, sums: Any
) -> BackwardPass:
    """One segment. `cotangents` belong to the carry after it; None is zero, as `sums` None is."""
    inputs = batch.xs, batch.mask
    (after, outputs), back = segment_vjp(parts.core, params, carry, inputs, batch_steps(batch), live)
    sums, outputs_bar = add_losses(parts, params, outputs, batch, live, sums)
    if cotangents is None:
        cotangents = [jnp.zeros_like(leaf) for leaf in split_inexact(after)[0]]
    cotangents, grad = back(cotangents, outputs_bar, gates, sums.grad)
    return BackwardPass(sums._replace(grad=grad), after, cotangents, carry)


def forward(core: Step, params: Params, carry: Carry, segment_at: Callable, num_segments: int) -> tuple[Carry, Carry]:
    """Runs the recurrent part only; returns the carry after it and the carries at the segments' starts."""

    def body(carry, i):
        batch, _ = segment_at(i)
        after, _ = lax.scan(partial(core_alone, core, params), carry, (batch.xs, batch.mask), batch_steps(batch))
        return after, carry

    return lax.scan(body, carry, jnp.arange(num_segments))


def core_alone(core: Step, params: Params, carry: Carry, inputs: PyTree) -> tuple[Carry, None]:
    """A step whose outputs nobody wants."""
    return core(params, carry, inputs)[0], None


def back_through(
    parts: Parts,
    params: Params,
    carry: Carry,
    batch: Batch,
    gates: jax.Array | None = None,
    segment: int | None = None,
    sums: Sums | None = None,
) -> BackwardPass:
    """One batch, its gradient gated but otherwise exact, added to `sums`.

    Each step is evaluated twice (once in the last segment) and differentiated once.
    """
    num_steps = batch_steps(batch)
    segment = segment or default_segment(num_steps)
    num_whole = (num_steps - 1) // segment  # the last segment, whole or ragged, opens the backward pass
    batch, gates = jax.tree.map(jnp.asarray, (batch, gates))
    live = paths_of(parts, params, carry, batch)

    def segment_at(i):
        return steps_from((batch, gates), i * segment, segment)

    last, last_gates = jax.tree.map(lambda a: a[num_whole * segment :], (batch, gates))
    if num_whole == 0:
        return back_through_segment(parts, live, params, carry, last, last_gates, None, sums)
    before_last, starts = forward(parts.core, params, carry, segment_at, num_whole)
    passed = back_through_segment(parts, live, params, before_last, last, last_gates, None, sums)

    def body(state, inputs):
        i, start = inputs
        batch, gates = segment_at(i)
        one = back_through_segment(parts, live, params, start, batch, gates, *state)
        return (one.cotangents, one.sums), None

    state = passed.cotangents, passed.sums
    (cotangents, sums), _ = lax.scan(body, state, (jnp.arange(num_whole), starts), reverse=True)
    start = jax.tree.map(lambda a: a[-1], starts)
    return BackwardPass(sums, passed.carry, cotangents, start)


def gradient_sums(
    step: Step,
    loss: Loss,
    params: Params,
    carry: Carry,
    batch: Batch,
    gates: jax.Array | None = None,
    segment: int | None = None,
) -> tuple[Sums, Carry]:
    """The sums of one batch, its gradient gated but otherwise exact, and the carry after it."""
    passed = back_through(parts_of(step, loss), params, carry, batch, gates, segment)
    return passed.sums, passed.carry
