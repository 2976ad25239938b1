"""The gradient by lag: how far it reaches, and what every window of BPTT leaves of it.

All T adjoints advance side by side, one lag per round, over the carries of one forward pass:

    V⁰[s] = ∂ℓ_s/∂carries[s],   V^k[s] = ∂ℓ_{s+k}/∂carries[s] = gates[s] · J_sᵀ V^{k−1}[s+1]
    D_k = Σ_t w_t G[t, t−k] = Σ_s (∂⁺carries[s+1]/∂w)ᵀ V^{k−1}[s+1]

D_k is the gradient at lag k, and what a window leaves is a weighted sum of D_k. D_0 comes from the
losses themselves, through readout and outputs of their own step.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbptt import validation
from jbptt.arrays import align_leading, split_inexact, times_gate, weighted_mean
from jbptt.datasets import dataset, variables
from jbptt.norms import compared_leafwise, compared_with, leafwise, norm
from jbptt.problem import Problem, answer, problem_of
from jbptt.segments import ForwardPass, back_through, pass_forward
from jbptt.types import Batch, Carry, Loss, Params, Step


class LagProfile(NamedTuple):
    """The gradient by lag, `[max_lag]` each, lags 0 … max_lag − 1 in steps.

    Attributes:
      cotangent_norms: weighted mean over pairs (t, t−k) and examples of `‖∂ℓ_t/∂carries[t−k]‖`; lag
        0 is the carry that enters step t. By leaf: a list over the carry's inexact leaves.
      grad_norms: `‖Σ_t w_t G[t, t−k]‖ / |Σ w|`. By leaf: a tree like the parameters.
    """

    cotangent_norms: Any
    grad_norms: Any

    def to_xarray(self) -> Any:
        """An `xarray.Dataset` over `lag`, a variable for each leaf; needs xarray."""
        found = [variables(name, tree, "lag") for name, tree in self._asdict().items()]
        lags = np.arange(np.shape(jax.tree.leaves(self.cotangent_norms)[0])[-1])
        return dataset(*found, coords={"lag": lags})


class TruncationCurve(NamedTuple):
    """The error of every window 1 … max_window against the exact gradient, `[max_window]` each.

    Attributes:
      windows: 1 … max_window, in steps.
      relative_error: `‖ĝ − g‖ / ‖g‖` for sliding windows (stride 1).
      cosine: between ĝ and g, sliding.
      block_relative_error: the same for blocks, ĝ averaged over where the first cut falls.
      block_cosine: as `cosine`, for blocks.

    By leaf, all but `windows` are trees like the parameters: each leaf against its own exact
    gradient.
    """

    windows: jax.Array
    relative_error: Any
    cosine: Any
    block_relative_error: Any
    block_cosine: Any

    def to_xarray(self) -> Any:
        """An `xarray.Dataset` over `window`, a variable for each leaf; needs xarray."""
        trees = self._asdict()
        windows = np.asarray(trees.pop("windows"))
        found = [variables(name, tree, "window") for name, tree in trees.items()]
        # The same windows for all, where vmap has made more of them.
        return dataset(*found, coords={"window": windows.reshape(-1, windows.shape[-1])[0]})


class Linearised(NamedTuple):
    """One forward pass, linearised at every step.

    Attributes:
      problem: what was linearised.
      passed: its forward pass; the gradient in `passed.sums` is what the readout adds at lag 0.
      pull: the way back through all steps at once (`Problem.parallel_pullback`).
      carries: the inexact leaves of the carries that enter the steps, `[T, ...]`.
      weights: `mask · weights`, `[T, *batch]`.
    """

    problem: Problem
    passed: ForwardPass
    pull: Callable
    carries: list
    weights: jax.Array


def linearise(problem: Problem) -> Linearised:
    """Runs forward once and linearises every step at its own carry."""
    passed = pass_forward(problem)
    pull = problem.parallel_pullback(passed.carries, problem.inputs, problem.num_steps)
    return Linearised(
        problem, passed, pull, split_inexact(passed.carries)[0], problem.loss_weights()
    )


def scan_lags(linearised: Linearised, num_lags: int, read: Callable, state: Any):
    """Goes back lag by lag, `read(state, lag, V, D) -> (state, row)`; returns all rows."""
    passed, gates = linearised.passed, linearised.problem.gates

    def body(running, lag):
        shifted, outputs_bar, readout_grad, state = running
        grad, cotangents = linearised.pull(shifted, outputs_bar, readout_grad)
        if gates is not None:
            cotangents = [times_gate(c, gates) for c in cotangents]
        state, row = read(state, lag, cotangents, grad)
        shifted = [jnp.concatenate([c[1:], jnp.zeros_like(c[:1])]) for c in cotangents]
        return (shifted, *jax.tree.map(jnp.zeros_like, (outputs_bar, readout_grad)), state), row

    # The losses enter at lag 0 and nothing after it: one body, compiled once, serves every lag.
    zeros = [jnp.zeros_like(c) for c in linearised.carries]
    start = zeros, passed.outputs_bar, passed.sums.grad, state
    return jax.lax.scan(body, start, jnp.arange(num_lags))[1]


def lag_profile(
    step: Step,
    loss: Loss,
    params: Params,
    carry: Carry,
    batch: Batch,
    *,
    max_lag: int,
    gates: jax.Array | None = None,
    per_leaf: bool = False,
) -> LagProfile:
    """How large the gradient still is after 0, 1, … max_lag − 1 steps back.

    One forward pass and max_lag rounds of T step derivatives side by side; memory O(T) carries.

    Args:
      step: `(params, carry, x) -> (carry, y)`; every inexact carry leaf begins with the batch
        shape.
      loss: `(y, target) -> [*batch]`.
      params: the parameters.
      carry: what enters step 0, or a function of the parameters that gives it.
      batch: masked losses and losses of weight 0 do not count.
      max_lag: number of lags, at most T.
      gates: `[T]` or `[T, *batch]`; the profile of the gated gradient.
      per_leaf: a profile for every leaf of the carry and of the parameters instead of one over all.

    Raises:
      ValueError: max_lag < 1 or > T; carries without the batch shape; what `full_bptt` raises.
    """
    why = "the profile is measured per example"
    problem = problem_of(step, loss, params, carry, batch, gates, per_example=why)
    max_lag = validation.check_positive_integer("max_lag", max_lag)
    if max_lag > problem.num_steps:
        raise ValueError(
            f"max_lag must be <= T = {problem.num_steps}, got {max_lag}; there are no pairs "
            "further apart"
        )
    return answer(_lag_profile, problem, max_lag, bool(per_leaf))


def _lag_profile(problem: Problem, max_lag: int, per_leaf: bool) -> LagProfile:
    linearised = linearise(problem)
    return LagProfile(
        *scan_lags(linearised, max_lag, profile_reader(linearised.weights, per_leaf), None)
    )


def profile_reader(weights: jax.Array, per_leaf: bool = False, signed: bool = True) -> Callable:
    """For `scan_lags`: one lag of a `LagProfile`; not `signed` weighs pairs by |w|."""
    total = jnp.abs(jnp.sum(weights))
    norm_fn = leafwise(norm) if per_leaf else norm

    def read(state, lag, cotangents, grad):
        # The adjoints carry their loss's weight: ‖w ∂ℓ‖ = |w| ‖∂ℓ‖, and w's sign is put back.
        valid = align_leading(jnp.arange(len(weights)) < len(weights) - lag, weights.ndim)
        weight = jnp.where(valid, jnp.roll(weights, -lag, axis=0), 0)
        weight, sign = (weight, jnp.sign(weight)) if signed else (jnp.abs(weight), 1)

        def mean(norms):
            return weighted_mean(jnp.sum(jnp.where(weight == 0, 0, sign * norms)), jnp.sum(weight))

        by_carry = jax.tree.map(mean, norm_fn(cotangents, weights.ndim))
        return state, (by_carry, jax.tree.map(partial(weighted_mean, weight=total), norm_fn(grad)))

    return read


def truncation_curve(
    step: Step,
    loss: Loss,
    params: Params,
    carry: Carry,
    batch: Batch,
    *,
    max_window: int,
    gates: jax.Array | None = None,
    per_leaf: bool = False,
) -> TruncationCurve:
    """The error of every window 1 … max_window against the exact gradient, in one pass over lags.

        sliding:                            ĝ_n = Σ_{k<n} D_k
        blocks, averaged over their phase:  ĝ_n = Σ_{k<n} (1 − k/n) D_k

    The gradient in blocks depends on where the first cut falls; here it is averaged over all
    places, and one placement scatters around that. One exact gradient and max_window rounds of T
    step derivatives side by side; memory O(T) carries and a few copies of the parameters.

    Args:
      step: `(params, carry, x) -> (carry, y)`.
      loss: `(y, target) -> [*batch]`.
      params: the parameters.
      carry: what enters step 0, or a function of the parameters that gives it.
      batch: the batch whose exact gradient is the reference.
      max_window: the largest window, in steps; may exceed T (blocks of a longer stream).
      gates: `[T]` or `[T, *batch]`; reference and windows are then those of the gated gradient.
      per_leaf: a curve for every leaf of the parameters instead of one over all.

    Returns:
      A `TruncationCurve`. Where the exact gradient is 0 the error is 0 if the estimate is 0 too,
      else inf, and the cosine is NaN.

    Raises:
      ValueError: max_window < 1; what `full_bptt` raises.
    """
    problem = problem_of(step, loss, params, carry, batch, gates)
    max_window = validation.check_positive_integer("max_window", max_window)
    return answer(_truncation_curve, problem, max_window, bool(per_leaf))


def _truncation_curve(problem: Problem, max_window: int, per_leaf: bool) -> TruncationCurve:
    exact = back_through(problem).sums.grad
    rows = scan_lags(
        linearise(problem), max_window, curve_reader(exact, per_leaf), curve_start(exact)
    )
    return TruncationCurve(jnp.arange(1, max_window + 1), *rows)


def curve_start(exact: Params) -> Any:
    """What `curve_reader` begins with: no lag summed yet."""
    zeros = jax.tree.map(jnp.zeros_like, exact)
    return zeros, zeros


def curve_reader(exact: Params, per_leaf: bool = False) -> Callable:
    """Reads one window of a `TruncationCurve` against the exact gradient, for `scan_lags`."""

    compare = compared_leafwise(exact) if per_leaf else compared_with(exact)

    def read(state, lag, _, grad):
        sliding, blocks = state
        sliding = jax.tree.map(jnp.add, sliding, grad)
        blocks = jax.tree.map(jnp.add, blocks, sliding)  # Σ_{k<n} (n − k) D_k = Σ_{m≤n} ĝ_m
        both = jax.tree.map(
            lambda s, b: jnp.stack([s, b / (lag + 1).astype(b.dtype)]), sliding, blocks
        )
        compared = jax.vmap(compare)(both)
        (error, cosine), (block_error, block_cosine) = (
            jax.tree.map(lambda a, i=i: a[i], compared) for i in (0, 1)
        )
        return (sliding, blocks), (error, cosine, block_error, block_cosine)

    return read
