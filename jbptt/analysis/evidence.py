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
from jbptt.arrays import align_leading, split_inexact
from jbptt.bias_bound import slope_of
from jbptt.norms import inner, norm, normalised, unit
from jbptt.segments import add_losses

NUM_PARTS = 16


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
    """Reads a profile's `cotangent_norms`.

    The rate is the least-squares slope of `ln norms` against the lag, over the lags before 1 % of
    the first is reached: two lags at least, however fast it falls. Where lag 1 is below that
    already the fit begins there: such a fall is a jump of the readout, no decay. Its standard error
    is that of a slope with independent residuals, `√(Σ r² / (n − 2) / Σ (k − k̄)²)`: how well one
    exponential describes these norms, not how they vary between batches. An exact zero is an
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
    measured = jnp.arange(len(norms)) < num_lags
    one_on = norms[min(1, len(norms) - 1)]
    first = jnp.where((one_on > 0) & (one_on < 1e-2 * norms[0]) & (num_lags > 2), 1, 0)
    faded = jnp.min(jnp.where((lag > first) & (norms < 1e-2 * norms[first]), lag, jnp.inf))
    used = (lag >= first) & (lag < jnp.maximum(faded, first + 2)) & measured
    rate, error, residual = slope_of(lag, jnp.log(jnp.maximum(norms, tiny)), used)

    zero_lag = jnp.min(jnp.where((norms == 0) & measured, lag, len(norms))).astype(int)
    vanished = zero_lag < len(norms)
    before, earlier = norms[jnp.maximum(zero_lag - 1, 0)], norms[jnp.maximum(zero_lag - 2, 0)]
    next_one = before * jnp.minimum(1, before / jnp.where(earlier > 0, earlier, 1))
    underflow = vanished & (zero_lag > 0) & (next_one <= 2.0**10 * smallest)

    span = (jnp.sum(measured) - 1 - first).astype(norms.dtype)
    change = jnp.where(norms[0] > 0, rate * span, -jnp.inf)  # no gradient at all has vanished
    limit = math.log(CHANGE)
    verdict = jnp.where(change >= limit, 2, jnp.where((change <= -limit) | vanished, 0, 1))
    rates = jnp.stack([rate, rate - 2 * error, rate + 2 * error])
    half_lives = jnp.where(rates < 0, math.log(2) / jnp.where(rates < 0, -rates, 1), jnp.inf)
    half_lives = jnp.where(norms[0] == 0, 0.0, half_lives)
    return Decay(
        verdict_index=jnp.where(jnp.all(jnp.isfinite(norms)), verdict, 3),
        rate=rate,
        first_lag=first,
        rate_error=error,
        residual=residual,
        half_life=half_lives[0],
        half_life_interval=half_lives[1:],
        reach=jnp.max(jnp.where((norms > 0) & (norms >= 0.01 * norms[0]), lag + 1, 0)).astype(int),
        zero_lag=jnp.where(vanished, zero_lag, -1),
        underflow=underflow,
    )


def leading_exponent(linearised: Linearised) -> tuple[jax.Array, jax.Array]:
    """The mean and the spread over examples of the leading Lyapunov exponent, in nats per step.

        v ← J_tᵀ v / ‖J_tᵀ v‖ for t = T−1 … 0,   λ₁ = mean over t of ln ‖J_tᵀ v‖

    from one random v on. One vector per example goes back alone, normalised at every step, so it
    neither overflows nor underflows, and a step needs no derivative but the one its gradient needs.
    Masked steps do not count, nor does the first quarter of the others, on which v turns. An
    exponent is −∞ where the state is wiped out on the way (a reset, dead units), NaN where no
    example's derivatives are finite; the spread is the standard deviation over examples. One
    backward pass.
    """
    problem, path = linearised.problem, linearised.passed.carries
    batch, carry, batch_shape, num_steps = (
        problem.batch,
        problem.carry,
        problem.batch_shape,
        problem.num_steps,
    )
    ndim = len(batch_shape)
    random = np.random.default_rng(0)

    def back(cotangents, inputs):
        carry_t, inputs_t = inputs
        leaves, rebuild = split_inexact(carry_t)

        def run(leaves):
            return split_inexact(problem.parts.core(problem.params, rebuild(leaves), inputs_t)[0])[
                0
            ]

        pull = jax.vjp(run, leaves)[1]
        (cotangents,) = pull(cotangents)
        growth = norm(cotangents, ndim)
        return [unit(c, growth).astype(c.dtype) for c in cotangents], growth

    drawn = [random.normal(size=c.shape[ndim:]) for c in split_inexact(carry)[0]]
    length = math.sqrt(sum(float(np.sum(d**2)) for d in drawn)) or 1.0
    start = [
        jnp.zeros_like(c) + (d / length).astype(c.dtype)
        for d, c in zip(drawn, split_inexact(carry)[0], strict=True)
    ]
    growths = lax.scan(back, start, (path, problem.inputs), reverse=True)[1]
    mask = jnp.ones(num_steps, bool) if batch.mask is None else jnp.asarray(batch.mask)
    number = jnp.cumsum(mask, axis=0)
    counted = mask & (number <= number[-1] - number[-1] // 4)
    counted = jnp.broadcast_to(align_leading(counted, 1 + ndim), (num_steps, *batch_shape))
    logs = jnp.sum(jnp.where(counted, jnp.log(align_leading(growths, 1 + ndim)), 0), axis=0)
    exponents = logs / jnp.sum(counted, axis=0, dtype=logs.dtype)
    valid = ~jnp.isnan(exponents)
    mean = jnp.mean(exponents, where=valid)
    deviations = jnp.where(exponents == mean, 0, exponents - mean)  # −∞ everywhere is no spread
    return mean, jnp.sqrt(jnp.mean(deviations**2, where=valid))


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


def split_batch(num_steps: int, batch_shape: tuple) -> tuple[jax.Array, int]:
    """Up to 16 parts of a batch's losses: `[T, *batch]`, the part of each, and their number.

    Groups of examples, and where there are fewer than 16 examples, each group cut into equal times
    too.
    """
    num_examples = math.prod(batch_shape)
    groups = min(num_examples, NUM_PARTS)
    times = min(num_steps, NUM_PARTS // groups)
    group = (jnp.arange(num_examples) * groups // num_examples).reshape(batch_shape)
    time = jnp.arange(num_steps) * times // num_steps
    return align_leading(time, 1 + len(batch_shape)) * groups + group, times * groups


def curvature_along(
    direction: jax.Array, gradient_fn: Callable[[jax.Array], jax.Array], params: jax.Array
) -> jax.Array:
    """The second derivative `vᵀ H v` along the unit vector v of `direction`; 0 where `direction`
    is.

    Forward over reverse: one derivative of `gradient_fn`, about three gradients. All are flat
    vectors.
    """
    along = normalised(direction)
    change = jax.jvp(gradient_fn, (params,), (along.astype(params.dtype),))[1]
    return inner(along, change)
