"""The one engine: a backward pass segment by segment, with gates on every crossing.

    λ_t = ∂ℓ_t/∂h_t + gate_{t+1} · J_{t+1}ᵀ λ_{t+1},     ∂L/∂w = Σ_t (∂⁺h_t/∂w)ᵀ λ_t

`forward` caches the carries at the segments' starts; `backward` goes through the segments from the
last to the first, recomputes each from its cached carry, runs its readouts and losses at once, runs λ
backwards through it and hands it on. Memory is O(T/segment + segment).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jbptt.cells import split_readout
from jbptt.loops import cut
from jbptt.recurrence import default_segment, gated_step, scan_steps, steps_from, zero_masked
from jbptt.types import (
    Batch,
    Carry,
    Estimate,
    Loss,
    Params,
    PyTree,
    Step,
    align_leading,
    at_least_float32,
    float32_at_least,
    split_inexact,
    weighted_mean,
)
from jbptt.weights import take_apart


class Sums(NamedTuple):
    """What adds up over steps, windows and batches: loss, gradient, weight and the loss's aux."""

    loss: jax.Array
    grad: Params
    weight: jax.Array
    aux: PyTree


def estimate_of(sums: Sums, **info: Any) -> Estimate:
    """What an estimator returns; the aux is turned into its means."""
    aux = {} if sums.aux is None else {"aux": jax.tree.map(lambda a: weighted_mean(a, sums.weight), sums.aux)}
    return Estimate(sums.loss, sums.grad, sums.weight, {**aux, **info})


def batch_steps(batch: Batch) -> int:
    """T of a batch that has passed the border."""
    return jax.tree.leaves(batch)[0].shape[0]


def counted_steps(batch: Batch) -> jax.Array | None:
    """Where a loss counts: unmasked and of a weight other than 0; None where all do."""
    nonzero = None if batch.weights is None else jnp.asarray(batch.weights) != 0
    if batch.mask is None or nonzero is None:
        return nonzero if batch.mask is None else batch.mask
    ndim = max(batch.mask.ndim, nonzero.ndim)
    return align_leading(batch.mask, ndim) & align_leading(nonzero, ndim)


def step_losses(loss: Loss, ys: PyTree, batch: Batch) -> tuple[jax.Array, PyTree]:
    """Losses `[S, *batch]` (0 where they do not count) and aux of all steps at once."""

    def one(y, target, counted):
        # Both sides of the loss are cleared: a NaN target times a zero weight is still NaN on the way back.
        result = loss(zero_masked(counted, y), zero_masked(counted, target))
        value, aux = result if isinstance(result, tuple) else (result, None)
        return zero_masked(counted, value), zero_masked(counted, aux)

    return jax.vmap(one, axis_size=batch_steps(batch))(ys, batch.targets, counted_steps(batch))


def loss_weights(batch: Batch, losses: jax.Array) -> jax.Array:
    """`mask · weights`, broadcast from the left to the losses' shape `[S, *batch]`."""
    weights = jnp.ones_like(at_least_float32(losses))
    if batch.weights is not None:
        given = align_leading(jnp.asarray(batch.weights), losses.ndim)
        wide = float32_at_least(weights.dtype, given.dtype)
        weights = weights.astype(wide) * given.astype(wide)
    if batch.mask is not None:
        weights = jnp.where(align_leading(batch.mask, losses.ndim), weights, 0)
    return weights


def weighted_losses(loss: Loss, ys: PyTree, batch: Batch) -> tuple[jax.Array, tuple[jax.Array, PyTree]]:
    """`Σ w_t ℓ_t` and beside it `Σ w_t` and the weighted aux."""
    losses, aux = step_losses(loss, ys, batch)
    weights = loss_weights(batch, losses)

    def total(values):
        w = align_leading(weights, values.ndim)
        wide = float32_at_least(values.dtype, w.dtype)
        return jnp.sum(jnp.where(w == 0, 0, w.astype(wide) * values.astype(wide)), axis=tuple(range(losses.ndim)))

    return total(losses), (jnp.sum(weights), jax.tree.map(total, aux))


def parallel_pullback(
    step: Step, params: Params, carries: Carry, inputs: PyTree, num_steps: int
) -> tuple[tuple[Carry, PyTree], Callable]:
    """All steps at once, each at its own cached (carry, input), leaves `[T, ...]`: what they return, and the way back.

    The way back is linear: from (cotangents of the carries emitted, cotangents of the outputs) to (gradient summed
    over steps, as `weights` forms it, and cotangents of the carries received), lists over inexact leaves.
    """

    def all_at_once(params, carries, inputs):
        return jax.vmap(partial(step, params), axis_size=num_steps)(carries, inputs)

    apart = take_apart(all_at_once, params, carries, inputs)
    leaves, rebuild = split_inexact(carries)

    def run(others, zeros, leaves):
        after, (outputs, operands) = apart.step(others, rebuild(leaves), (inputs, zeros))
        return (split_inexact(after)[0], split_inexact(outputs)[0]), (after, outputs, operands)

    _, pull, (after, outputs, operands) = jax.vjp(run, apart.others, apart.zeros(carries, inputs), leaves, has_aux=True)

    def back(bars):
        others_bar, zeros_bar, cotangents = pull(bars)
        weights_bar = apart.weight_gradients([a[None] for a in operands], [bar[None] for bar in zeros_bar])
        return apart.gradient(weights_bar, others_bar), cotangents

    return (after, outputs), back


def output_cotangents(
    step: Step, loss: Loss, params: Params, outputs: PyTree, batch: Batch
) -> tuple[Sums, list[jax.Array]]:
    """The sums of the losses, their gradient in the readout alone, and their cotangents at the core's outputs."""
    _, readout = split_readout(step)

    def look(params, output, _):
        return (), readout(params, output)

    (_, ys), pull = parallel_pullback(look, params, outputs, None, batch_steps(batch))
    leaves, rebuild = split_inexact(ys)
    value, pull_losses, (weight, aux) = jax.vjp(
        lambda leaves: weighted_losses(loss, rebuild(leaves), batch), leaves, has_aux=True
    )
    grad, cotangents = pull(([], *pull_losses(jnp.ones_like(value))))
    return Sums(value, grad, weight, aux), cotangents


def segment_sums(step, loss, params, carry, batch, gates, cotangent):
    """One segment: the cotangent that leaves its first carry, its sums, and the carry after it.

    `cotangent` belongs to the carry after the segment, a list over its inexact leaves; None is zero.
    """
    core, _ = split_readout(step)
    inputs = batch.xs, gates, batch.mask
    loops = cut(gated_step(core), params, carry, jax.tree.map(lambda a: a[0], inputs))
    after, outputs, stacks = loops.forward(carry, inputs, batch_steps(batch))
    sums, outputs_bar = output_cotangents(step, loss, params, outputs, batch)
    if cotangent is None:
        cotangent = [jnp.zeros_like(leaf) for leaf in split_inexact(after)[0]]
    cotangent, grad = loops.backward(stacks, cotangent, outputs_bar)
    return cotangent, sums._replace(grad=jax.tree.map(jnp.add, sums.grad, grad)), after


def forward(step: Step, params: Params, carry: Carry, segment_at: Callable, num_segments: int) -> tuple[Carry, Carry]:
    """Runs the recurrent part only; returns the carry after it and the carries at the segments' starts."""
    core, _ = split_readout(step)

    def body(carry, i):
        batch, _ = segment_at(i)
        return scan_steps(core, params, carry, batch.xs, None, batch.mask, batch_steps(batch))[0], carry

    return lax.scan(body, carry, jnp.arange(num_segments))


def backward(step, loss, params, starts, segment_at, num_segments, cotangent, sums):
    """Runs λ through the segments from the last to the first, adding to `sums`."""

    def body(state, inputs):
        cotangent, sums = state
        i, start = inputs
        batch, gates = segment_at(i)
        cotangent, more, _ = segment_sums(step, loss, params, start, batch, gates, cotangent)
        return (cotangent, jax.tree.map(jnp.add, sums, more)), None

    return lax.scan(body, (cotangent, sums), (jnp.arange(num_segments), starts), reverse=True)[0]


def gradient_sums(
    step: Step,
    loss: Loss,
    params: Params,
    carry: Carry,
    batch: Batch,
    gates: jax.Array | None = None,
    segment: int | None = None,
) -> tuple[Sums, Carry]:
    """The sums of one batch, its gradient gated but otherwise exact, and the carry after it.

    Each step is evaluated twice (once in the last segment) and differentiated once.
    """
    num_steps = batch_steps(batch)
    segment = segment or default_segment(num_steps)
    num_whole = (num_steps - 1) // segment  # the last segment, whole or ragged, opens the backward pass
    batch, gates = jax.tree.map(jnp.asarray, (batch, gates))

    def segment_at(i):
        return steps_from((batch, gates), i * segment, segment)

    last, last_gates = jax.tree.map(lambda a: a[num_whole * segment :], (batch, gates))
    if num_whole == 0:
        _, sums, carry = segment_sums(step, loss, params, carry, last, last_gates, None)
        return sums, carry
    carry, starts = forward(step, params, carry, segment_at, num_whole)
    cotangent, sums, carry = segment_sums(step, loss, params, carry, last, last_gates, None)
    _, sums = backward(step, loss, params, starts, segment_at, num_whole, cotangent, sums)
    return sums, carry
