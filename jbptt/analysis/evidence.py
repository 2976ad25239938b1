"""What advice rests on: decay, exponents, bounds, norms of parts, curvature. All data."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbptt.analysis.advice import CHANGE
from jbptt.analysis.lags import Linearised
from jbptt.arrays import align_leading, one_if_zero, split_inexact
from jbptt.bias_bound import slope_of
from jbptt.norms import inner, max_or_nan, norm, normalised, unit
from jbptt.segments import add_losses

TREND = 1e-3  # a change of ln over all lags below this is none
SLACK = 1e-6  # of rounding, beside the factors that verdicts rest on


class Decay(NamedTuple):
    """How the norms of a gradient change with the lag; the fields of the same names in
    `Diagnosis`.
    """

    verdict_index: jax.Array
    rate: jax.Array
    first_lag: jax.Array
    rate_error: jax.Array
    residual: jax.Array
    half_life: jax.Array
    half_life_interval: jax.Array
    reach: jax.Array
    zero_lag: jax.Array
    underflow: jax.Array


def fit_decay(norms: jax.Array, num_lags: Any = None, smallest: Any = None) -> Decay:
    """Reads how the norms of adjoints change with the lag, from what was measured.

    The verdict: vanishing where no norm of the last quarter of the lags is above a tenth of the
    first one; exploding where one of them is above ten times the first one and the trend over all
    lags says so too, so that a swing is no growth. The half-life is the lag from which on less than
    half is left, between lags by their logarithms; where half is never lost, that of the trend.

    The rate is the least-squares slope of `ln norms` against the lag, over the lags before 1 % of
    the first is reached: two lags at least, however fast it falls. Where lag 1 is below that
    already all is counted from there: such a fall is a jump of the readout, no decay. Its standard
    error is that of a slope with independent residuals, `√(Σ r² / (n − 2) / Σ (k − k̄)²)`: how well
    one exponential describes these norms, not how they vary between batches. An exact zero is an
    underflow if the norms before it, continued at their last pace, would have come within a factor
    of 2¹⁰ of the smallest normal number.

    Args:
      norms: `[K]`.
      num_lags: the lags at which there are pairs of a loss and a carry at all; None: K.
      smallest: normal number of the dtype that the cotangents are computed in, over the weight that
        they carry; None: of the norms' dtype.
    """
    tiny = float(jnp.finfo(norms.dtype).tiny)
    smallest = tiny if smallest is None else smallest
    num_lags = len(norms) if num_lags is None else num_lags
    lag = jnp.arange(len(norms), dtype=norms.dtype)
    number = jnp.arange(len(norms))
    measured = number < num_lags
    one_on = norms[min(1, len(norms) - 1)]
    num_lags = jnp.asarray(num_lags)
    first = jnp.where((one_on > 0) & (one_on < 1e-2 * norms[0]) & (num_lags > 2), 1, 0)
    faded = jnp.min(jnp.where((lag > first) & (norms < 1e-2 * norms[first]), lag, jnp.inf))
    used = (lag >= first) & (lag < jnp.maximum(faded, first + 2)) & measured
    rate, error, residual = slope_of(lag, jnp.log(jnp.maximum(norms, tiny)), used)

    zero_lag = jnp.min(jnp.where((norms == 0) & measured, lag, len(norms))).astype(int)
    vanished = zero_lag < len(norms)
    before, earlier = norms[jnp.maximum(zero_lag - 1, 0)], norms[jnp.maximum(zero_lag - 2, 0)]
    next_one = before * jnp.minimum(1, before / jnp.where(earlier > 0, earlier, 1))
    underflow = vanished & (zero_lag > 0) & (next_one <= 2.0**10 * smallest)

    start = norms[first]
    start = jnp.where(start > 0, start, 1)
    flows = measured & (norms > 0) & (lag >= first)
    trend, trend_error, _ = slope_of(lag, jnp.log(jnp.maximum(norms, tiny)), flows)
    span = (num_lags - 1 - first).astype(norms.dtype)
    quarter = jnp.maximum((num_lags - first) // 4, 1)
    late = measured & (number >= jnp.maximum(num_lags - quarter, first))
    top = max_or_nan(jnp.where(late, norms, 0)) / start
    grows = (top >= CHANGE * (1 - SLACK)) & (trend * span >= math.log(CHANGE) / 2)
    falls = (norms[0] == 0) | (top <= 1 / CHANGE * (1 + SLACK))
    ends = norms[jnp.maximum(num_lags - 1, 0)] == 0
    verdict = jnp.where(grows, 2, jnp.where(falls | ends, 0, 1))

    half = start / 2
    last = jnp.max(jnp.where(measured & (norms > half) & (number >= first), number, first))
    here, after = norms[last], norms[jnp.minimum(last + 1, len(norms) - 1)]
    pace = jnp.log(jnp.where(here > 0, here, 1) / jnp.where(after > 0, after, 1))
    between = jnp.where(after > 0, jnp.log(here / half) / jnp.where(pace > 0, pace, 1), 1)
    crossed = last + 1 < num_lags
    # Where half is never lost, only a trend over all lags tells when it would be: one that is no
    # rounding, and larger than its error where more than two lags tell it.
    known = jnp.where(jnp.isfinite(trend_error), trend_error, 0)
    falling = (trend < -2 * known) & (trend * span < -TREND)
    slope = jnp.where(crossed, rate, jnp.where(falling, trend, 0))
    either = jnp.array([0, -2, 2], norms.dtype)
    slopes = slope + either * jnp.where(crossed, error, trend_error)
    slopes = jnp.where(jnp.isnan(slopes), 0, slopes)
    half_lives = jnp.where(slopes < 0, math.log(2) / jnp.where(slopes < 0, -slopes, 1), jnp.inf)
    lost = (last - first).astype(norms.dtype) + between
    half_life = jnp.where(crossed, lost, half_lives[0])
    half_life = jnp.where(norms[0] == 0, 0.0, half_life)
    return Decay(
        verdict_index=jnp.where(jnp.all(jnp.isfinite(norms)), verdict, 3),
        rate=rate,
        first_lag=first,
        rate_error=error,
        residual=residual,
        half_life=half_life,
        half_life_interval=half_lives[1:],
        reach=jnp.max(jnp.where((norms > 0) & (norms >= 0.01 * norms[0]), lag + 1, 0)).astype(int),
        zero_lag=jnp.where(vanished, zero_lag, -1),
        underflow=underflow,
    )


class Exponent(NamedTuple):
    """The leading Lyapunov exponent of a batch, in nats per step; scalars.

    Attributes:
      exponent: the mean over examples; −∞ where no step of any example lets the state through, NaN
        where no example's derivatives are finite.
      spread: the standard deviation over examples.
      error: how uncertain the mean is: the largest of the standard error from up to 8 stretches of
        time, half of what the two halves of the time differ by, and what two starts differ by.
      num_wiped: steps of an example across which nothing of the state is left (a reset); they do
        not count.
    """

    exponent: jax.Array
    spread: jax.Array
    error: jax.Array
    num_wiped: jax.Array


def leading_exponent(linearised: Linearised) -> Exponent:
    """How fast an adjoint grows on the way back, whatever the loss.

        v ← J_tᵀ v / ‖J_tᵀ v‖ for t = T−1 … 0, twice;   λ₁ = mean over t of ln ‖J_tᵀ v‖

    Two random vectors go back per example. The first time they turn into the leading direction,
    the second time, from where they then are, they are measured: over all steps that count, so that
    λ₁ times their number is a change over the whole sequence. A vector is normalised at every step,
    so it neither overflows nor underflows. Masked steps do not count. Where a step wipes the state
    out, a random vector starts anew. Two backward passes of two vectors, without weight gradients.
    """
    problem = linearised.problem
    inputs = linearised.passed.carries, problem.inputs
    ndim, num_steps = len(problem.batch_shape), problem.num_steps
    leaves = split_inexact(problem.carry)[0]
    fresh = [_random_unit(leaves, ndim, seed) for seed in (0, 1)]

    def back(vectors, at_t):
        carry_t, inputs_t = at_t
        leaves, rebuild = split_inexact(carry_t)

        def run(leaves):
            after = problem.parts.core(problem.params, rebuild(leaves), inputs_t)[0]
            return split_inexact(after)[0]

        pull = jax.vjp(run, leaves)[1]
        # One after the other: not every derivative can be vmapped.
        pairs = [anew(pull(vector)[0], start) for vector, start in zip(vectors, fresh, strict=True)]
        return [vector for vector, _ in pairs], jnp.stack([growth for _, growth in pairs])

    def anew(pulled, start):
        """A vector of norm 1, and how much it had grown; another one where nothing is left."""
        growth = norm(pulled, ndim)
        vector = [
            jnp.where(align_leading(growth == 0, v.ndim), new, unit(v, growth)).astype(v.dtype)
            for v, new in zip(pulled, start, strict=True)
        ]
        return vector, growth

    def once(vectors, _):
        return lax.scan(back, vectors, inputs, reverse=True)

    growths = lax.scan(once, fresh, length=2)[1][1]  # [T, 2, *batch], of the second time
    growths = jnp.moveaxis(growths, 1, 0)
    mask = jnp.ones(num_steps, bool) if problem.batch.mask is None else problem.batch.mask
    real = jnp.broadcast_to(align_leading(jnp.asarray(mask), 1 + ndim), growths.shape[1:])
    return _read_exponent(growths, real)


def _random_unit(leaves: list, ndim: int, seed: int) -> list:
    """A random vector of norm 1, the same for each example; leaves like these."""
    random = np.random.default_rng(seed)
    drawn = [random.normal(size=leaf.shape[ndim:]) for leaf in leaves]
    length = math.sqrt(sum(float(np.sum(d**2)) for d in drawn)) or 1.0
    return [
        jnp.zeros_like(leaf) + (d / length).astype(leaf.dtype)
        for d, leaf in zip(drawn, leaves, strict=True)
    ]


def _read_exponent(growths: jax.Array, real: jax.Array) -> Exponent:
    """From the growth of two vectors at each step, `[2, T, *batch]`, of which `real` ones count."""
    num_steps = growths.shape[1]
    wiped = real & (growths == 0)
    counted = real & (growths != 0)
    logs = jnp.where(counted, jnp.log(jnp.where(counted, growths, 1)), 0)
    number = counted.astype(logs.dtype)

    def mean_of(logs, number):
        """The mean over examples of those over time."""
        by_example = jnp.sum(logs, 0) / one_if_zero(jnp.sum(number, 0))
        valid = (jnp.sum(number, 0) > 0) & ~jnp.isnan(by_example)
        mean = jnp.mean(by_example, where=valid)
        return mean, jnp.sqrt(jnp.mean((by_example - mean) ** 2, where=valid))

    both, spreads = jax.vmap(mean_of)(logs, number)
    nothing_left = jnp.any(wiped) & ~jnp.any(counted)
    mean = jnp.where(nothing_left, -jnp.inf, jnp.mean(both))
    spread = jnp.where(nothing_left, 0, jnp.mean(spreads))

    def error_of(num_batches):
        """The standard error of the mean, from as many stretches of time (Schmeiser, 1982)."""
        of = jnp.arange(num_steps) * num_batches // num_steps
        finite = jnp.where(jnp.isnan(logs), 0, logs)
        sums, numbers = (
            jax.ops.segment_sum(jnp.sum(a, (0, *range(2, a.ndim))), of, num_batches)
            for a in (finite, number)
        )
        total = one_if_zero(jnp.sum(numbers))
        deviations = (sums - numbers * jnp.sum(sums) / total) / total
        return norm(deviations) * math.sqrt(num_batches / max(num_batches - 1, 1))

    errors = jnp.stack(
        [error_of(min(8, num_steps)), error_of(min(2, num_steps)), jnp.abs(both[0] - both[1])]
    )
    error = jnp.where(nothing_left, 0, max_or_nan(errors))
    return Exponent(mean, spread, error, jnp.sum(wiped[0]))


def starts_below_precision(linearised: Linearised) -> jax.Array:
    """Whether the losses' cotangents are zero at the outputs only because they are smaller than the
    dtype can hold.

    One more backward pass through losses and readout, with weights as large as the dtype bears.
    """
    problem, passed, _, _, weights = linearised
    tiny = max((float(jnp.finfo(leaf.dtype).tiny) for leaf in passed.outputs_bar), default=1.0)
    heaviest = jnp.max(jnp.abs(weights))
    heavy = weights / jnp.where(heaviest > 0, heaviest, 1) * min(1 / tiny, 1e30)
    larger = add_losses(
        replace(problem, batch=problem.batch._replace(weights=heavy)), passed.outputs
    )[1]
    zero, still_zero = (
        jnp.all(jnp.array([jnp.all(leaf == 0) for leaf in bar]))
        for bar in (passed.outputs_bar, larger)
    )
    return zero & ~still_zero


def curvature_along(
    gradient: jax.Array, gradient_fn: Callable[[jax.Array], jax.Array], params: jax.Array
) -> jax.Array:
    """The second derivative of the loss along the way down its gradient; 0 where that is 0.

    `vᵀ H v` for the unit vector v along which the loss falls fastest: that of the gradient, and for
    complex parameters its conjugate, since `df = Re Σ g dw`. The largest curvature may be larger.
    Forward over reverse: one derivative of `gradient_fn`, about three gradients. All are flat
    vectors.
    """
    along = jnp.conj(normalised(gradient))
    change = jax.jvp(gradient_fn, (params,), (along.astype(params.dtype),))[1]
    return inner(jnp.conj(along), change)
