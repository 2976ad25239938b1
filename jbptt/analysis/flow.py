"""Adjoints, and how much each loss depends on each earlier state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jbptt import validation
from jbptt.adjoint import batch_steps, split_inexact, weighted_losses, wide_parts
from jbptt.analysis.lags import linearise, scan_lags
from jbptt.norms import norm
from jbptt.recurrence import held, is_inexact, scan_steps
from jbptt.types import Batch, Carry, Loss, Params, Step, weighted_mean


class Adjoints(NamedTuple):
    """Carries and their cotangents, leaves `[T+1, ...]`; index t is the carry that enters step t.

    Attributes:
      carries: `carries[0]` is the initial carry, `carries[T]` the last.
      cotangents: `∂L/∂carries[t]` with L the weighted mean loss; zeros for leaves that are not inexact.
    """

    carries: Carry
    cotangents: Carry


def adjoints(
    step: Step, loss: Loss, params: Params, carry: Carry, batch: Batch, *, gates: jax.Array | None = None
) -> Adjoints:
    """Every carry of a sequence and the gradient of the weighted mean loss in it.

        λ_t = ∂L/∂carries[t] = gates[t] · (J_tᵀ λ_{t+1} + (∂y_t/∂carries[t])ᵀ ∂L/∂y_t),   λ_T = 0

    One forward and one backward pass; memory O(T). Raises ValueError as `full_bptt` does.
    """
    validation.check_problem(step, loss, params, carry, batch, gates)
    core, readout, wide = wide_parts(step, params)
    leaves, rebuild = split_inexact(carry)
    num_steps = batch_steps(batch)

    def nudged(wide, carry, inputs):
        x, mask, nudge = inputs
        after, outputs = held(core)(wide, carry, (x, mask))
        after_leaves, rebuild = split_inexact(after)
        after = rebuild([leaf + e for leaf, e in zip(after_leaves, nudge, strict=True)])
        return after, (after, outputs)

    def run(leaves, nudges):
        xs = (batch.xs, batch.mask, nudges)
        _, (carries, outputs) = scan_steps(nudged, wide, rebuild(leaves), xs, gates, None, num_steps)
        value, (weight, _) = weighted_losses(loss, readout(wide, outputs), batch)
        return weighted_mean(value, weight), carries

    nudges = [jnp.zeros((num_steps, *leaf.shape), leaf.dtype) for leaf in leaves]
    value, pull, carries = jax.vjp(run, leaves, nudges, has_aux=True)
    first, rest = pull(jnp.ones_like(value))
    cotangents = [jnp.concatenate([a[None], b]) for a, b in zip(first, rest, strict=True)]
    carries = jax.tree.map(lambda a, b: jnp.concatenate([jnp.asarray(a)[None], b]), carry, carries)
    filled = iter(cotangents)
    return Adjoints(carries, jax.tree.map(lambda a: next(filled) if is_inexact(a) else jnp.zeros(a.shape), carries))


def gradient_flow(
    step: Step, loss: Loss, params: Params, carry: Carry, batch: Batch, *, gates: jax.Array | None = None
) -> jax.Array:
    """How much the loss of each step depends on each earlier carry.

        F[t, s] = RMS over examples of ‖∂ℓ_t/∂carries[s]‖,   s ≤ t,   0 above the diagonal

    ℓ_t is unweighted; examples masked at t do not count. All T adjoints advance side by side, one lag at
    a time: T rounds of T step derivatives; memory O(T) carries and the `[T, T]` result.

    Raises:
      ValueError: carries that do not begin with the batch shape; what `full_bptt` raises.
    """
    num_steps, batch_shape = validation.check_problem(step, loss, params, carry, batch, gates)
    validation.check_carry_batch(carry, batch_shape, "the flow is measured per example")
    plain = batch._replace(weights=None)
    problem = linearise(step, loss, params, carry, plain, batch_shape)
    counted = problem.weights.reshape(num_steps, -1).sum(1)

    def read(state, lag, cotangents, _):
        norms = jnp.broadcast_to(norm(cotangents, 1 + len(batch_shape)), (num_steps, *batch_shape))
        total = norm(norms.reshape(num_steps, -1), 1)
        count = jnp.roll(counted, -lag)  # the examples of loss t = s + lag
        return state, jnp.where(count > 0, total / jnp.sqrt(jnp.maximum(count, 1)), 0)

    gates = None if gates is None else jnp.asarray(gates)
    by_lag = scan_lags(problem, gates, num_steps, read, None)
    t, s = jnp.arange(num_steps)[:, None], jnp.arange(num_steps)[None, :]
    return jnp.where(s <= t, by_lag[jnp.maximum(t - s, 0), s], 0)
