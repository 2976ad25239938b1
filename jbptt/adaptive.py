"""A window that follows the model: as short as a bound on the bias allows.

It is data, so that nothing recompiles.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from jbptt import truncation, validation
from jbptt.arrays import (
    align_leading,
    one_if_zero,
    split_inexact,
    varying,
    weighted_mean,
    widened,
)
from jbptt.bias_bound import TAIL_LAGS, bound_bias
from jbptt.norms import norm
from jbptt.past_steps import PastSteps, empty_history, latest
from jbptt.plans import NO_WINDOWS, Plan, plan_of, planned
from jbptt.problem import Problem, check_problem, entered_problem
from jbptt.segments import Updated, estimate_of
from jbptt.starts import kept, start_of
from jbptt.types import Batch, Carry, Estimate, Estimator, Loss, Params, Step, exported
from jbptt.windows import Streamed, go_on, overlapping_sums, sum_pieces


@exported
class RunningMeans(NamedTuple):
    """Of probes, by lag, `[max_window]` each: sums in which the past fades, and their weights.

    Attributes:
      cotangent_norms: of ‖∂ℓ_t/∂carries[t−k]‖.
      grad_norms: of ‖G[t, t−k]‖, the mean over examples.
      weights: what both are divided by; 0 at lags that no probe has met.
    """

    cotangent_norms: jax.Array
    grad_norms: jax.Array
    weights: jax.Array


@exported
class AdaptiveState(NamedTuple):
    """The live carry, the steps a window may reach, the running means and the next window.

    Attributes:
      carry: the live carry.
      history: the latest max_window − 1 steps.
      means: what the probes saw.
      window: for the next update, an int array.
    """

    carry: Carry
    history: PastSteps
    means: RunningMeans
    window: jax.Array


def adaptive_bptt(
    step: Step,
    loss: Loss,
    *,
    tolerance: float,
    max_window: int,
    smoothing: float = 0.9,
    plan: Plan | None = None,
) -> Estimator:
    """Truncated BPTT whose sliding window bounds the relative bias (Aicher, Foti & Fox, 2019).

        K = min {k : δ(k) ≤ tolerance},   δ(k) = E(k) / (‖ĝ‖ − E(k)),   E(k) = M Σ_{j ≥ k−1} φ_j

    with φ_j the adjoint's norm at lag j and an exponential tail beyond the lags measured. The last
    loss of every update, and of every max_window steps within it, is a probe (of the examples in
    which it has weight and a slope at all: an ignored target says nothing): it goes back max_window
    − 1 steps and updates running means of φ_j and of what the lags add to the gradient, from which
    the *next* update's window follows (`bias_bound.bound_bias`). The first update, which knows
    nothing, takes max_window. Where no window up to max_window keeps the bound, as with a gradient
    that does not decay, max_window is taken, and `info["bias_bound"]` says what is left of the
    promise: inf, if nothing. Nothing is promised by fewer than 8 lags, nor by a zero that fewer
    than 3 probes met (a reset, perhaps).

    Coverage is that of a first update, max_window; a later one's is that of its `info["window"]`,
    `truncation.window_coverage(T, window, 1)`.

    `info["window"]` is the window of the update, `info["bias_bound"]` its δ by all that has been
    seen, this update included; `info["next_window"]` what follows from it. M is measured, not
    proved, and ‖ĝ‖ is that of the update's own gradient, so the bound is an estimate. Biased within
    it. Time: a window's, and one backward pass over max_window steps for each probe, so updates
    shorter than that are dear; memory of a few max_windows. The loop over lags has as many rounds
    as the window says, so reverse mode does not go through `update`.

    Args:
      step: `(params, carry, x) -> (carry, y)`; every inexact carry leaf begins with the batch
        shape.
      loss: `(y, target) -> [*batch]`, or that and aux.
      tolerance: of the relative bias, in (0, 1).
      max_window: the longest window, in steps.
      smoothing: how much of the running means one probe leaves, in [0, 1).
      plan: the devices that the batch is divided over.

    Raises:
      ValueError: tolerance or smoothing out of range, max_window < 1; carries without the batch
        shape; a plan with a segment or parallel_windows; what `full_bptt` raises.
    """
    validation.check_between("tolerance", tolerance, 0, 1, "0.1 means a bias of 10 %")
    max_window = validation.check_positive_integer("max_window", max_window)
    if smoothing != 0:
        validation.check_between(
            "smoothing", smoothing, 0, 1, "the past must fade; 0 keeps only the last probe"
        )

    plan = plan_of(
        plan, {"segment": "windows that overlap are not recomputed in segments", **NO_WINDOWS}
    )
    why = "the probe measures norms per example"

    def init(params: Params, carry: Carry, batch: Batch, key=None) -> AdaptiveState:
        del key
        batch_shape = check_problem(step, loss, params, carry, batch, per_example=why).batch_shape
        start = start_of(carry, params)
        history = empty_history(max_window - 1, start, batch, batch_shape)
        # A buffer each, to be donated.
        means = RunningMeans(*(jnp.zeros(max_window) for _ in RunningMeans._fields))
        seen = varying((means, jnp.array(max_window, int)), (params, start, batch))
        return AdaptiveState(kept(carry), history, *seen)

    def run(problem: Problem, history: PastSteps, seen: tuple, add_up: Callable) -> Updated:
        means, window = seen

        def one(running, piece, sums):
            carry, history, means, total, first, entering = running
            part = problem.on(carry, piece)
            streamed = go_on(part, history, sums)
            sums, more = overlapping_sums(
                part, streamed, max_window - 1, 0, first, window=window, stride=1
            )
            entering = [e + m.astype(e.dtype) for e, m in zip(entering, more, strict=True)]
            weights = jnp.abs(part.loss_weights())
            weights = jnp.where(says_something(streamed, weights, add_up), weights, 0)
            means = probe(part, streamed, weights[-1], means, smoothing, add_up)
            seen = varying((means, total + add_up(jnp.sum(weights))), given)
            history, first = latest(streamed.steps, max_window - 1), first - part.num_steps
            return sums, (streamed.passed.carry, history, *seen, first, entering)

        given = problem.params, problem.carry, problem.batch
        entering = [widened(jnp.zeros_like(leaf)) for leaf in split_inexact(problem.carry)[0]]
        seen = varying((means, jnp.zeros(())), given)
        running = problem.carry, history, *seen, jnp.asarray(max_window - 1), entering
        sums, running = sum_pieces(one, running, problem.batch, max_window, None)
        carry, history, means, total, _, entering = running
        return Updated(sums, carry, entering, history, (means, total))

    def update(
        params: Params, state: AdaptiveState, batch: Batch
    ) -> tuple[Estimate, AdaptiveState]:
        problem, start = entered_problem(step, loss, params, state.carry, batch, per_example=why)
        validation.check_history(state.history, batch, problem.batch_shape)
        updated = planned(plan, run, problem, state.history, (state.means, state.window))
        means, total = updated.seen
        # With weights of both signs per |w|, as the probes.
        size = norm(updated.sums.grad) / one_if_zero(total)
        window, bounds = choose_window(means, size, tolerance, 1 - smoothing**3)
        info = {
            "window": state.window,
            "bias_bound": bounds[state.window - 1],
            "next_window": window,
        }
        return estimate_of(updated, start, **info), AdaptiveState(
            updated.carry, updated.history, means, window
        )

    def coverage(num_steps: int, key=None) -> jax.Array:
        del key
        return truncation.window_coverage(num_steps, max_window, 1)

    return Estimator(init, update, coverage)


def says_something(streamed: Streamed, weights: jax.Array, add_up: Callable) -> jax.Array:
    """Which losses `[S, *batch]` have a slope at all: an ignored target says nothing about memory.

    An output that is not per example counts for all of them; `add_up` adds over the shares of a
    batch that is divided.
    """
    found = jnp.zeros(weights.shape, bool)
    for leaf in streamed.outputs_bar:
        slopes = leaf[leaf.shape[0] - weights.shape[0] :] != 0  # without the history
        own = slopes.shape[: weights.ndim] == weights.shape
        first = weights.ndim if own else 1
        sloped = slopes.any(tuple(range(first, slopes.ndim)))
        sloped = sloped if own else add_up(sloped.astype(int)) > 0
        found |= align_leading(sloped, weights.ndim)
    return found


def probe(
    problem: Problem,
    streamed: Streamed,
    weights: jax.Array,
    means: RunningMeans,
    smoothing: chex.Numeric,
    add_up: Callable,
) -> RunningMeans:
    """Sends the last step's loss, of weights |w| `[*batch]`, back as far as the means reach.

    A loss without weight says nothing, and leaves the means as they are. `add_up` adds over the
    shares of a batch that is divided.
    """
    steps, outputs_bar = streamed.filled, streamed.outputs_bar
    num_lags, last = len(means.weights), steps.mask.shape[0] - 1
    total, ndim = add_up(jnp.sum(weights)), weights.ndim

    def body(cotangents, lag):
        i = last - lag
        at = jax.tree.map(lambda a: a[i], steps)
        own = [jnp.where(lag == 0, y[i], 0) for y in outputs_bar]
        grad, cotangents = problem.pullback(at.carries, (at.xs, at.mask))(cotangents, own, None)
        grad, total_norm = add_up(
            (grad, jnp.sum(jnp.where(weights == 0, 0, norm(cotangents, ndim))))
        )
        return cotangents, (total_norm, norm(grad), steps.exists[i])

    start = [jnp.zeros_like(leaf[last]) for leaf in split_inexact(steps.carries)[0]]
    _, (cotangent_norms, grad_norms, exists) = lax.scan(body, start, jnp.arange(num_lags))
    # What is not finite must not stay in the means for ever.
    usable = exists & (total > 0) & jnp.isfinite(cotangent_norms) & jnp.isfinite(grad_norms)

    def fade(past, new):
        return jnp.where(usable, smoothing * past + (1 - smoothing) * new, past)

    new = RunningMeans(
        weighted_mean(cotangent_norms, total), weighted_mean(grad_norms, total), jnp.ones(num_lags)
    )
    return RunningMeans(*map(fade, means, new))


def choose_window(
    means: RunningMeans, kept: jax.Array, tolerance: float, enough: float
) -> tuple[jax.Array, jax.Array]:
    """The shortest window whose bound keeps the tolerance, or the longest; the bounds of all.

    `kept` is the norm of the gradient, per weight; below the weight `enough` a zero is not taken
    for the end of all.
    """
    longest, num_lags = len(means.weights), jnp.sum(means.weights > 0)
    norms, grad_norms = (weighted_mean(total, means.weights) for total in means[:2])
    last = jnp.maximum(num_lags - 1, 0)
    known = (num_lags >= TAIL_LAGS) & ((norms[last] > 0) | (means.weights[last] >= enough))
    kept = jnp.full_like(norms, kept)
    with jax.debug_nans(False):  # a bound that does not exist is an answer
        found = bound_bias(norms, grad_norms, kept, num_lags=num_lags, tolerances=(tolerance,))
    window = found.bound_window[0]
    window = jnp.where(known & (window >= 1) & (window <= longest), window, longest)
    return window.astype(int), jnp.where(known, found.bias_bound, jnp.inf)
