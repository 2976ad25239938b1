"""How what arrives of an adjoint changes with the lag: verdict, half-life, reach."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbptt.analysis.lags import Linearised
from jbptt.arrays import one_if_zero
from jbptt.bias_bound import slope_of
from jbptt.diagnosis.advice import CHANGE
from jbptt.diagnosis.by_lag import Lags
from jbptt.norms import max_or_nan
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

    zero_lag = jnp.max(jnp.where((norms != 0) & measured, lag + 1, 0)).astype(int)
    vanished = zero_lag < num_lags  # for good: gaps of masks end
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
    slopes = jnp.where(either == 0, slope, jnp.where(jnp.isnan(slopes), 0, slopes))
    half_lives = jnp.where(slopes < 0, math.log(2) / jnp.where(slopes < 0, -slopes, 1), jnp.inf)
    lost = (last - first).astype(norms.dtype) + between
    half_life = jnp.where(crossed, lost, half_lives[0])
    half_life = jnp.where(norms[0] == 0, 0.0, half_life)
    arrives = (norms > 0) & (norms >= 0.01 * norms[first])
    return Decay(
        verdict_index=jnp.where(jnp.all(jnp.isfinite(norms)), verdict, 3),
        rate=rate,
        first_lag=first,
        rate_error=error,
        residual=residual,
        half_life=half_life,
        half_life_interval=half_lives[1:],
        reach=jnp.max(jnp.where(arrives, lag + 1, 0)).astype(int),
        zero_lag=jnp.where(vanished, zero_lag, -1),
        underflow=underflow,
    )


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


def decay_of(linearised: Linearised, lags: Lags) -> Decay:
    """The decay of what arrives at each lag."""
    weights, carries = linearised.weights, linearised.carries
    measured = jnp.arange(len(lags.arrives)) < lags.num_measured
    arrives = jnp.where(measured, lags.arrives, 0)
    smallest = max((float(jnp.finfo(c.dtype).tiny) for c in carries), default=0.0)
    heaviest = one_if_zero(jnp.max(jnp.abs(weights)) * lags.cotangent_norms[0])
    fit = fit_decay(arrives, lags.num_measured, smallest / heaviest)
    return fit._replace(underflow=fit.underflow | starts_below_precision(linearised))
