"""What each window leaves out of the gradient, part by part of the batch: so that the error of a
window on other batches can be told from how the parts differ.

With D_k the gradient at lag k (`lags`), g the exact gradient and p a part of the batch:

    sliding windows:   R_n[p] = g[p] − Σ_{k<n} D_k[p]
    blocks:            R_n[p] = what flows across their cuts

    error of a batch drawn from them (`resampling`):   ‖Σ_p w_p R_n[p]‖ / ‖Σ_p w_p g[p]‖
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbptt.analysis.lags import Linearised
from jbptt.arrays import align_leading, one_if_zero, times_gate, widened_dtype
from jbptt.diagnosis.batch_parts import PartsOfBatch
from jbptt.diagnosis.block_windows import Blocks
from jbptt.diagnosis.resampling import errors_of, products, total
from jbptt.norms import inner, norm

LEFT = 1e-4
"""No further lag is measured once less than this of the parts' exact gradients is left …"""
FLOWS = 1e-2
"""… and the mean adjoint is below this part of what it was."""
DENSE = 16
"""Every window up to this one is measured, then four to an octave."""


def measured_windows(largest: int) -> np.ndarray:
    """Windows 1 … 16, then four to an octave, and the largest."""
    windows = set(range(1, min(largest, DENSE) + 1)) | {largest}
    octave = DENSE
    while octave < largest:
        windows |= {octave + octave * i // 4 for i in range(4)}
        octave *= 2
    return np.array(sorted(w for w in windows if w <= largest))


class Lags(NamedTuple):
    """What one pass back over the lags measures. Rows beyond the last lag measured are NaN.

    Attributes:
      num_measured: lags measured, a scalar.
      cotangent_norms, grad_norms: as in `LagProfile`, `[K]`.
      arrives: the mean adjoint at each lag over the mean of the same losses' at lag 0, `[K]`.
      leaf_arrives: the same of each leaf of the carry alone, `[K, leaves]`.
      alive: the share of it that belongs to losses whose adjoint is not exactly zero, `[K]`.
      by_example: `arrives` of each example, `[K, *batch]`.
      relative_error, cosine, block_relative_error, block_cosine: as in `TruncationCurve`, `[W]`.
      upper_error: of sliding windows, the quantile over batches drawn from the parts, `[W]`.
    """

    num_measured: jax.Array
    cotangent_norms: jax.Array
    grad_norms: jax.Array
    arrives: jax.Array
    leaf_arrives: jax.Array
    alive: jax.Array
    by_example: jax.Array
    relative_error: jax.Array
    cosine: jax.Array
    block_relative_error: jax.Array
    block_cosine: jax.Array
    upper_error: jax.Array


def look_back(
    linearised: Linearised, parts: PartsOfBatch, blocks: Blocks, largest: int, counted: list[bool]
) -> Lags:
    """Goes back lag by lag until nothing is left of the exact gradient, `largest` lags at most.

    A lag costs T step derivatives side by side, a window measured one weight gradient.

    Args:
      linearised: the steps.
      parts: of the batch.
      blocks: with the exact gradient of each part.
      largest: lags.
      counted: which leaves of the carry count.
    """
    problem, passed, weights = linearised.problem, linearised.passed, linearised.weights
    exact, scale = blocks.exact, blocks.scale
    num_steps, ndim, dtype = problem.num_steps, weights.ndim, scale.dtype
    windows = measured_windows(largest)
    is_window = jnp.array(np.isin(np.arange(1, largest + 1), windows))
    exact_products, whole = products(exact), total(exact)
    # The readout is in every window: nothing of it is ever left.
    readout_grads = [(leaf / scale).astype(dtype) for leaf in parts.readout_grads]
    left, of_readout = jax.tree.map(jnp.subtract, exact, readout_grads), total(readout_grads)
    nothing = jax.tree.map(jnp.zeros_like, whole)
    real = jnp.ones(num_steps, bool) if problem.batch.mask is None else problem.batch.mask
    real = jnp.broadcast_to(align_leading(jnp.asarray(real), ndim), weights.shape)
    counts = np.flatnonzero(counted)
    wide = widened_dtype(dtype, weights.dtype)
    total_weight = jnp.abs(jnp.sum(weights))

    def norms_of(cotangents):
        """`[leaves, T, *batch]`; and over all leaves that count, `[T, *batch]`."""
        each = [norm(c, ndim).astype(wide) for c in cotangents]
        if not each:
            return jnp.zeros((0, *weights.shape), wide), jnp.zeros_like(weights, wide)
        return jnp.stack(each), _over_leaves(jnp.stack([each[i] for i in counts]))

    def body(state):
        lag, one_on, outputs_bar, summed, left, rest, lag_sum, first, rows, _ = state
        cotangents = linearised.pull(one_on, outputs_bar, None)[1]
        first = jnp.where(lag == 0, norms_of(cotangents)[1], first)
        if problem.gates is not None:
            cotangents = [times_gate(c, problem.gates) for c in cotangents]
        by_leaf, norms = norms_of(cotangents)
        summed = jax.tree.map(jnp.add, summed, one_on)

        def leave_out_less():
            grads = [g.astype(dtype) / scale for g in parts.gradients(summed, outputs_bar)]
            less = jax.tree.map(jnp.subtract, left, grads)
            return less, total(grads), products(less), jax.tree.map(jnp.zeros_like, summed)

        def as_it_is():
            return left, nothing, jnp.zeros_like(exact_products), summed

        at_window = is_window[lag]
        left, grad, left_products, summed = lax.cond(at_window, leave_out_less, as_it_is)
        rest = jax.tree.map(jnp.subtract, rest, grad)
        lag_sum = jax.tree.map(lambda s, g: s + lag.astype(dtype) * g, lag_sum, grad)
        by_phase = jax.tree.map(lambda r, s: r + s / (lag + 1).astype(dtype), rest, lag_sum)
        grad = jax.tree.map(lambda g, r: g + jnp.where(lag == 0, r, 0), grad, of_readout)

        # The pairs (t, s = t − lag), by s: of a loss that has an adjoint, and a real step s.
        inside = align_leading(jnp.arange(num_steps) < num_steps - lag, ndim)
        sent = jnp.where(inside & real, jnp.roll(first, -lag, axis=0), 0)
        arrived = jnp.where(sent > 0, norms, 0)
        weight = jnp.where(inside, jnp.abs(jnp.roll(weights, -lag, axis=0)), 0)
        every = norms if len(counts) == len(by_leaf) else _over_leaves(by_leaf)
        flows = dict(
            sent=jnp.sum(sent, axis=0),
            arrived=jnp.sum(arrived, axis=0),
            leaf_arrived=jnp.sum(jnp.where(sent > 0, by_leaf, 0), axis=tuple(range(1, 1 + ndim))),
            alive=jnp.sum(jnp.where(arrived > 0, sent, 0)),
        )
        # Where padding leaves a lag without a pair, what arrives is what arrived one lag before.
        no_pair = (lag > 0) & ~jnp.any(sent > 0)
        flows = {
            name: jnp.where(no_pair, rows[name][jnp.maximum(lag - 1, 0)], now)
            if name in rows
            else now
            for name, now in flows.items()
        }
        row = flows | dict(
            norms=jnp.sum(jnp.where(weight > 0, every, 0)),
            weight=jnp.sum(weight),
            grad=inner(grad, grad),
            left=left_products,
            along=inner(rest, whole),
            blocks=inner(by_phase, by_phase),
            blocks_along=inner(by_phase, whole),
        )
        rows = {name: rows[name].at[lag].set(row[name]) for name in rows}
        arrives = jnp.sum(row["arrived"]) / one_if_zero(jnp.sum(row["sent"]))
        # Of each part, since what cancels on this batch need not cancel on others.
        little = jnp.trace(left_products) <= LEFT**2 * jnp.trace(exact_products)
        more = jnp.any((inside & (jnp.roll(first, -lag, axis=0) > 0))[1:])  # pairs one lag further
        finite = jnp.isfinite(arrives) & jnp.isfinite(inner(rest, rest))
        go_on = finite & more & ~(little & (arrives <= FLOWS) & at_window)
        one_on = [jnp.concatenate([c[1:], jnp.zeros_like(c[:1])]) for c in cotangents]
        outputs_bar = jax.tree.map(jnp.zeros_like, outputs_bar)
        return (lag + 1, one_on, outputs_bar, summed, left, rest, lag_sum, first, rows, go_on), row

    def unfinished(state):
        return (state[0] < largest) & state[-1]

    at_rest = [jnp.zeros_like(c) for c in linearised.carries]
    first = jnp.zeros_like(weights, wide)
    start = at_rest, passed.outputs_bar, at_rest, left, total(left), nothing, first
    state = jnp.zeros((), int), *start, {}, jnp.array(True)
    rows = {
        name: jnp.broadcast_to(lax.full_like(row, jnp.nan), (largest, *row.shape))
        for name, row in jax.eval_shape(body, state)[1].items()
    }
    state = lax.while_loop(unfinished, lambda state: body(state)[0], (*state[:-2], rows, state[-1]))
    found = _read_rows(
        state[-2], state[0], windows, exact_products, scale, total_weight, parts.layout.batches
    )
    leaves = jnp.where(jnp.array(counted, bool), found.leaf_arrives, jnp.nan)
    return found._replace(leaf_arrives=leaves)


def _over_leaves(norms: jax.Array) -> jax.Array:
    """The norm over all leaves, from that of each, `[leaves, ...]`."""
    return norms[0] if len(norms) == 1 else norm(jnp.moveaxis(norms, 0, -1), norms.ndim - 1)


def _read_rows(rows, num_measured, windows, exact_products, scale, total_weight, batches) -> Lags:
    """Means, errors and cosines, of the sums and inner products that the loop left as arguments."""

    def over(total, mass):
        mass = mass.reshape(*mass.shape, *[1] * (total.ndim - mass.ndim))
        return jnp.where(mass == 0, 0, total / one_if_zero(mass))

    sent = jnp.sum(rows["sent"], axis=tuple(range(1, rows["sent"].ndim)))
    arrived = jnp.sum(rows["arrived"], axis=tuple(range(1, rows["arrived"].ndim)))
    at = windows - 1
    dense = np.arange(1, len(windows) + 1) == windows  # before it every window was measured
    left = rows["left"][at]
    whole, rest = jnp.maximum(jnp.sum(exact_products), 0), jnp.sum(left, axis=(1, 2))

    def compared(rest, along):
        """`(‖ĝ − g‖ / ‖g‖, cosine)`, where ĝ = g − rest."""
        error = jnp.sqrt(jnp.maximum(rest, 0) / one_if_zero(whole))
        estimate = jnp.sqrt(jnp.maximum(whole - 2 * along + rest, 0) * whole)
        cosine = jnp.where(estimate > 0, (whole - along) / one_if_zero(estimate), jnp.nan)
        return jnp.where(whole > 0, error, jnp.where(rest > 0, jnp.inf, rest)), cosine

    error, cosine = compared(rest, rows["along"][at])
    block_error, block_cosine = compared(rows["blocks"][at], rows["blocks_along"][at])
    grad_norms = jnp.sqrt(rows["grad"]) * over(scale * jnp.ones(()), total_weight)
    lag = np.arange(len(grad_norms))
    return Lags(
        num_measured=num_measured,
        cotangent_norms=over(rows["norms"], rows["weight"]),
        grad_norms=jnp.where(lag < DENSE, grad_norms, jnp.nan),
        arrives=over(arrived, sent),
        leaf_arrives=over(rows["leaf_arrived"], sent),
        alive=over(rows["alive"], sent),
        by_example=jnp.where(rows["sent"] > 0, over(rows["arrived"], rows["sent"]), jnp.nan),
        relative_error=error,
        cosine=cosine,
        block_relative_error=jnp.where(dense, block_error, jnp.nan),
        block_cosine=jnp.where(dense, block_cosine, jnp.nan),
        upper_error=jax.vmap(errors_of, (0, None, None))(left, exact_products, batches).upper,
    )
