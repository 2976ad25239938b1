"""What each window leaves out of the gradient, part by part of the batch: so that the error of a
window on other batches can be told from how the parts differ.

With D_k the gradient at lag k (`lags`), g the exact gradient and p a part of the batch:

    sliding windows:   R_n[p] = g[p] − Σ_{k<n} D_k[p]
    blocks:            R_n[p] = what flows across their cuts

    error of a batch of parts, each drawn m_p times:   ‖Σ_p m_p R_n[p]‖ / ‖Σ_p m_p g[p]‖
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbptt.analysis.batch_parts import PartsOfBatch
from jbptt.analysis.lags import Linearised
from jbptt.analysis.redrawn import Errors, errors_of, products, total
from jbptt.arrays import align_leading, one_if_zero, times_gate, widened_dtype
from jbptt.norms import inner, max_or_nan, norm

LEFT = 1e-4
"""No further lag is measured once less than this of the parts' exact gradients is left …"""
FLOWS = 1e-2
"""… and the mean adjoint is below this part of what it was."""
DENSE = 16
"""Every window up to this one is measured, then eight to an octave."""
FEW_CROSSINGS = 4
"""Groups of examples times cuts: fewer do not tell how what crosses a cut varies."""


def measured_windows(largest: int) -> np.ndarray:
    """Windows 1 … 16, then eight to an octave, and the largest."""
    windows = set(range(1, min(largest, DENSE) + 1)) | {largest}
    octave = DENSE
    while octave < largest:
        windows |= {octave + octave * i // 8 for i in range(8)}
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


class Blocks(NamedTuple):
    """The exact gradient of each part, and the windows of blocks found.

    Attributes:
      exact: as `PartsOfBatch.gradients` gives them.
      scale: their largest number, so that squares of what is divided by it neither overflow nor
        underflow; 1 for zeros.
      window: for each tolerance the shortest window tried that keeps it, T if none does.
      errors: theirs.
    """

    exact: list[jax.Array]
    scale: jax.Array
    window: jax.Array
    errors: Errors


def find_blocks(
    linearised: Linearised, parts: PartsOfBatch, tolerances: tuple[float, ...]
) -> Blocks:
    """Looks for the shortest window of blocks for each tolerance, by halving what is left to try.

    Each window tried costs about one gradient; blocks begin at multiples of the window. One loop
    over all of them, opened by the exact gradient, so that one program serves them all.
    """
    num_steps = linearised.problem.num_steps
    tried = candidate_windows(num_steps)[:-1]
    num_tried, levels = len(tried), jnp.array(tolerances)
    windows = jnp.array([*tried, num_steps])
    outputs_bar = linearised.passed.outputs_bar

    def gradients(one_on, exact):
        """At first all that the parameters get from each part, then what blocks leave out."""
        bars = [jnp.where(exact, bar, 0) for bar in outputs_bar]
        pairs = zip(parts.gradients(one_on, bars), parts.readout_grads, strict=True)
        return [grad + jnp.where(exact, readout, 0).astype(grad.dtype) for grad, readout in pairs]

    def choose(first, new, old):
        return jax.tree.map(partial(jnp.where, first), new, old)

    def look(state):
        number, here, upper, low, high, exact, scale, exact_one_on = state
        first = number == 0
        middle = (low + high) // 2
        at = jnp.where(first, num_tried, middle[jnp.argmax(high - low > 1)])
        one_on = adjoints_cut(linearised, windows[at])
        left = choose(first, one_on, jax.tree.map(jnp.subtract, exact_one_on, one_on))
        found = gradients(left, first)
        scale = jnp.where(first, _largest(found), scale)
        found = [leaf / scale for leaf in found]
        exact = choose(first, found, exact)
        errors = errors_of(products(found), products(exact))
        here, upper = (
            jnp.where(first, a, a.at[at].set(e))
            for a, e in ((here, errors.here), (upper, errors.upper))
        )
        crossings = (num_steps - 1) // windows[at] * parts.layout.groups
        keeps = (errors.upper <= levels) & (crossings >= FEW_CROSSINGS)
        high = jnp.where(~first & keeps, jnp.minimum(high, at), high)
        low = jnp.where(~first & ~keeps, jnp.maximum(low, at), low)
        one_on = choose(first, one_on, exact_one_on)
        return number + 1, here, upper, low, high, exact, scale, one_on

    def unfinished(state):
        return (state[0] == 0) | jnp.any(state[4] - state[3] > 1)

    def zeros_like(shapes):
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    one_on = zeros_like(jax.eval_shape(partial(adjoints_cut, linearised), jnp.zeros((), int)))
    exact = zeros_like(jax.eval_shape(gradients, one_on, jnp.zeros((), bool)))
    scale = zeros_like(jax.eval_shape(_largest, exact))
    none = jnp.zeros(num_tried + 1, scale.dtype)
    bounds = jnp.full(len(tolerances), -1), jnp.full(len(tolerances), num_tried)
    start = 0, none, none, *bounds, [leaf.astype(scale.dtype) for leaf in exact], scale, one_on
    _, here, upper, _, high, exact, scale, _ = lax.while_loop(unfinished, look, start)
    return Blocks(exact, scale, windows[high], Errors(here[high], upper[high]))


def candidate_windows(num_steps: int) -> list[int]:
    """T, T/2, T/4 …, and ¾ T: windows that cut T steps into blocks about as long.

    How long the last block is matters where losses stand at the end: of windows with a rest the
    error does not fall with the window, and halving what is left to try would find any of them.
    """
    halves = {-(-num_steps // (1 << i)) for i in range(num_steps.bit_length())}
    return sorted(halves | {1, -(-3 * num_steps // 4)})


def adjoints_cut(linearised: Linearised, window: jax.Array) -> list[jax.Array]:
    """The adjoints in blocks of a window: cotangents of the carry that each step emits, `[T, ...]`.

    λ goes back through one step after another and is cut where a block begins.
    """
    problem, passed = linearised.problem, linearised.passed
    cut = jnp.arange(problem.num_steps) % window == 0

    def back(one_on, at_t):
        carry_t, inputs_t, bar_t, cut_t, gate_t = at_t
        cotangents = problem.pullback(carry_t, inputs_t)(one_on, bar_t, None)[1]
        if gate_t is not None:
            cotangents = [times_gate(c, gate_t) for c in cotangents]
        return [jnp.where(cut_t, 0, c) for c in cotangents], one_on

    after = [jnp.zeros_like(leaf[0]) for leaf in linearised.carries]
    steps = passed.carries, problem.inputs, passed.outputs_bar, cut, problem.gates
    return lax.scan(back, after, steps, reverse=True)[1]


def _largest(gradients: list[jax.Array]) -> jax.Array:
    """The largest number in them, 1 for zeros."""
    sizes = [max_or_nan(jnp.abs(leaf).ravel()) for leaf in gradients if leaf.size]
    largest = max_or_nan(jnp.stack(sizes)) if sizes else jnp.zeros(())
    return one_if_zero(largest)


def look_back(
    linearised: Linearised, parts: PartsOfBatch, blocks: Blocks, largest: int, reached: list[bool]
) -> Lags:
    """Goes back lag by lag until nothing is left of the exact gradient, `largest` lags at most.

    A lag costs T step derivatives side by side, a window measured one weight gradient.

    Args:
      linearised: the steps.
      parts: of the batch.
      blocks: with the exact gradient of each part.
      largest: lags.
      reached: which leaves of the carry parameters have an influence on.
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
    counts = [leaf for leaf, used in enumerate(reached) if used or not any(reached)]
    wide = widened_dtype(dtype, weights.dtype)
    total_weight = jnp.abs(jnp.sum(weights))

    def norms_of(cotangents):
        """`[leaves, T, *batch]`; and over all leaves that count, `[T, *batch]`."""
        each = [norm(c, ndim).astype(wide) for c in cotangents]
        if not each:
            return jnp.zeros((0, *weights.shape), wide), jnp.zeros(weights.shape, wide)
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
    first = jnp.zeros(weights.shape, wide)
    start = at_rest, passed.outputs_bar, at_rest, left, total(left), nothing, first
    state = jnp.zeros((), int), *start, {}, jnp.array(True)
    rows = {
        name: jnp.full((largest, *row.shape), jnp.nan, row.dtype)
        for name, row in jax.eval_shape(body, state)[1].items()
    }
    state = lax.while_loop(unfinished, lambda state: body(state)[0], (*state[:-2], rows, state[-1]))
    return _read_rows(state[-2], state[0], windows, exact_products, scale, total_weight)


def _over_leaves(norms: jax.Array) -> jax.Array:
    """The norm over all leaves, from that of each, `[leaves, ...]`."""
    return norms[0] if len(norms) == 1 else norm(jnp.moveaxis(norms, 0, -1), norms.ndim - 1)


def _read_rows(rows, num_measured, windows, exact_products, scale, total_weight) -> Lags:
    """Means, errors and cosines, of the sums and inner products that the loop left."""

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
        by_example=over(rows["arrived"], rows["sent"]),
        relative_error=error,
        cosine=cosine,
        block_relative_error=jnp.where(dense, block_error, jnp.nan),
        block_cosine=jnp.where(dense, block_cosine, jnp.nan),
        upper_error=jax.vmap(errors_of, (0, None))(left, exact_products).upper,
    )
