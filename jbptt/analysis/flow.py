"""Adjoints, and how much each loss depends on each earlier state."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbptt import validation
from jbptt.adjoint import batch_steps, gradient_sums, segment_sums, weighted_losses
from jbptt.analysis.lags import linearise, scan_lags
from jbptt.cells import split_readout
from jbptt.norms import leafwise, norm, scaled_norm, unit
from jbptt.recurrence import held, scan_steps, steps_from, zeros_along
from jbptt.types import Batch, Carry, Loss, Params, Step, is_inexact, split_inexact, weighted_mean


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
    core, readout = split_readout(step)
    leaves, rebuild = split_inexact(carry)
    num_steps = batch_steps(batch)

    def nudged(params, carry, inputs):
        x, mask, nudge = inputs
        after, outputs = held(core)(params, carry, (x, mask))
        after_leaves, rebuild = split_inexact(after)
        after = rebuild([leaf + e for leaf, e in zip(after_leaves, nudge, strict=True)])
        return after, (after, outputs)

    def run(leaves, nudges):
        xs = (batch.xs, batch.mask, nudges)
        _, (carries, outputs) = scan_steps(nudged, params, rebuild(leaves), xs, gates, None, num_steps)
        ys = jax.vmap(partial(readout, params), axis_size=num_steps)(outputs)
        value, (weight, _) = weighted_losses(loss, ys, batch)
        return weighted_mean(value, weight), carries

    nudges = [zeros_along(leaf[None], num_steps) for leaf in leaves]
    value, pull, carries = jax.vjp(run, leaves, nudges, has_aux=True)
    first, rest = pull(jnp.ones_like(value))
    cotangents = [jnp.concatenate([a[None], b]) for a, b in zip(first, rest, strict=True)]
    carries = jax.tree.map(lambda a, b: jnp.concatenate([jnp.asarray(a)[None], b]), carry, carries)
    filled = iter(cotangents)
    return Adjoints(carries, jax.tree.map(lambda a: next(filled) if is_inexact(a) else jnp.zeros(a.shape), carries))


def carry_cotangents(path: Adjoints) -> list[jax.Array]:
    """The cotangents of the inexact leaves alone: the zeros beside integers and keys are none."""
    pairs = zip(jax.tree.leaves(path.carries), jax.tree.leaves(path.cotangents), strict=True)
    return [cotangent for leaf, cotangent in pairs if is_inexact(leaf)]


def gradient_flow(
    step: Step,
    loss: Loss,
    params: Params,
    carry: Carry,
    batch: Batch,
    *,
    gates: jax.Array | None = None,
    per_leaf: bool = False,
) -> Any:
    """How much the loss of each step depends on each earlier carry.

        F[t, s] = RMS over examples of ‖∂ℓ_t/∂carries[s]‖,   s ≤ t,   0 above the diagonal

    ℓ_t is unweighted; examples masked at t do not count. All T adjoints advance side by side, one lag at
    a time: T rounds of at most T step derivatives; memory O(T) carries and the `[T, T]` result. With `per_leaf`, a
    list of such matrices, one for each inexact leaf of the carry (in the order of `jax.tree.leaves`).

    Raises:
      ValueError: carries that do not begin with the batch shape; what `full_bptt` raises.
    """
    num_steps, batch_shape = validation.check_problem(step, loss, params, carry, batch, gates)
    validation.check_carry_batch(carry, batch_shape, "the flow is measured per example")
    plain = batch._replace(weights=None)
    problem = linearise(step, loss, params, carry, plain, batch_shape)
    counted = problem.weights.reshape(num_steps, -1).sum(1)

    norm_fn = leafwise(norm) if per_leaf else norm

    def read(state, lag, left, cotangents, _):
        count = jnp.roll(counted, -lag)[:left]  # the examples of loss t = s + lag

        def mean_square_root(size):  # of all examples together; those that are masked add 0
            rms = jnp.where(count > 0, size / jnp.sqrt(jnp.maximum(count, 1)), 0)
            return jnp.concatenate([rms, jnp.zeros(num_steps - left, rms.dtype)])

        return state, jax.tree.map(mean_square_root, norm_fn(cotangents, 1))

    gates = None if gates is None else jnp.asarray(gates)
    by_lag = scan_lags(problem, gates, num_steps, read, None, num_stages=8)
    t, s = jnp.arange(num_steps)[:, None], jnp.arange(num_steps)[None, :]
    return jax.tree.map(lambda rows: jnp.where(s <= t, rows[jnp.maximum(t - s, 0), s], 0), by_lag)


class GradientSources(NamedTuple):
    """The gradient of the weighted mean loss split by source: `S_i = Σ_t w_t G[t, i] / Σ w`, `Σ_i S_i = g`.

    Attributes:
      norms: `‖S_i‖`, `[T]`.
      leaf_norms: the same for every leaf of the parameters alone, a tree of `[T]`.
      shares: `⟨S_i, g⟩ / ‖g‖²`, `[T]`: how much of the gradient comes from step i. They add up to 1; a
        negative share pulls the other way. Zeros where the gradient is zero.
    """

    norms: jax.Array
    leaf_norms: Params
    shares: jax.Array


def gradient_sources(
    step: Step, loss: Loss, params: Params, carry: Carry, batch: Batch, *, gates: jax.Array | None = None
) -> GradientSources:
    """Which steps' inputs the gradient comes from: its part that enters at step i, whatever loss it flows from.

        S_i = (∂⁺(h_{i+1}, ℓ_i)/∂w)ᵀ (λ_{i+1}, w_i) / Σ w

    Three forward and three backward passes, one step at a time; memory O(T) carries, one gradient at a time.

    Args:
      step: `(params, carry, x) -> (carry, y)`.
      loss: `(y, target) -> [*batch]`.
      params: the parameters.
      carry: what enters step 0.
      batch: masked steps are no source.
      gates: `[T]` or `[T, *batch]`; the sources of the gated gradient.

    Raises:
      ValueError: what `full_bptt` raises.
    """
    num_steps, _ = validation.check_problem(step, loss, params, carry, batch, gates)
    batch, gates = jax.tree.map(jnp.asarray, (batch, gates))
    path = adjoints(step, loss, params, carry, batch, gates=gates)
    exact, _ = gradient_sums(step, loss, params, carry, batch, gates)
    largest, ratio = scaled_norm(exact.grad)

    def one(inputs):  # the gates are in the cotangents already
        i, entering, emitted = inputs
        piece = steps_from(batch, i, 1)
        cotangent = [c * exact.weight.astype(c.dtype) for c in emitted]
        source = segment_sums(step, loss, params, entering, piece, None, cotangent)[1].grad
        dots = jax.tree.map(
            lambda a, b: jnp.sum(jnp.real(jnp.conj(unit(a, largest)) * unit(b, largest))), source, exact.grad
        )
        share = sum(jax.tree.leaves(dots), jnp.zeros(())) / jnp.where(ratio == 0, 1, ratio) ** 2
        mean = jax.tree.map(lambda a: weighted_mean(a, exact.weight), source)
        return norm(mean), leafwise(norm)(mean), share

    entering = jax.tree.map(lambda a: a[:-1], path.carries)
    emitted = [c[1:] for c in carry_cotangents(path)]
    return GradientSources(*jax.lax.map(one, (jnp.arange(num_steps), entering, emitted)))
