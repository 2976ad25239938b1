"""How fast a gradient falls with the lag, and the bound on a window's bias that follows from it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jbptt.norms import max_or_nan

TAIL_LAGS = 8
"""Fewer lags than this say nothing about those beyond them."""


def slope_of(x: jax.Array, y: jax.Array, used: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Slope of a line through the points used, its standard error, root mean square residual."""
    points = jnp.where(used, jnp.stack([jnp.ones_like(x), x, y - y[0]]), 0)
    (count, sum_x, sum_y), (_, sum_xx, sum_xy), _ = jnp.matmul(
        points, points.T, precision=lax.Precision.HIGHEST
    )
    spread = sum_xx - sum_x**2 / jnp.maximum(count, 1)
    spread = jnp.where(count > 1, spread, jnp.inf)
    slope = (sum_xy - sum_x * sum_y / jnp.maximum(count, 1)) / spread
    offset = (sum_y - slope * sum_x) / jnp.maximum(count, 1)
    squares = jnp.sum((points[2] - slope * points[1] - offset * points[0]) ** 2)
    error = jnp.where(count > 2, jnp.sqrt(squares / (jnp.maximum(count - 2, 1) * spread)), jnp.inf)
    return slope, error, jnp.sqrt(squares / jnp.maximum(count, 1))


class BiasBound(NamedTuple):
    """What the bound says; the fields of the same names in `Diagnosis`.

    Attributes:
      bias_bound: `[K]`, δ(K) for every sliding window.
      bound_window: for each tolerance the smallest window whose bound keeps it; 0: none does.
    """

    bias_bound: jax.Array
    bound_window: jax.Array


def tail_rate(norms: jax.Array, num_lags: jax.Array) -> jax.Array:
    """The slowest change of ln φ per lag that the later half of the lags measured allows.

    The largest of the least-squares slope over them plus two standard errors, and the mean change
    over any eighth of all lags among them: a slow part of the gradient shows itself late. −∞ where
    the last one is exactly zero; inf below 8 lags, too few to tell, and where there is no decay.

    Args:
      norms: φ, `[K]`.
      num_lags: those at which there are pairs; the others are not read.
    """
    lag = jnp.arange(len(norms))
    later = (lag >= (num_lags - 1) // 2) & (lag < num_lags)
    logs = jnp.log(jnp.where(later & (norms > 0), norms, 1))
    slope, error, _ = slope_of(lag.astype(norms.dtype), logs, later)
    span = jnp.maximum(num_lags // 8, 1)
    ahead = lag + span
    change = (logs[jnp.minimum(ahead, len(norms) - 1)] - logs) / span.astype(logs.dtype)
    rate = jnp.maximum(
        slope + 2 * error, max_or_nan(jnp.where(later & (ahead < num_lags), change, -jnp.inf))
    )
    rate = jnp.where((num_lags < TAIL_LAGS) | (rate >= 0), jnp.inf, rate)
    return jnp.where((num_lags > 0) & (norms[jnp.maximum(num_lags - 1, 0)] == 0), -jnp.inf, rate)


def bound_bias(
    norms: jax.Array,
    grad_norms: jax.Array,
    kept: jax.Array,
    *,
    num_lags: jax.Array,
    tolerances: tuple[float, ...],
) -> BiasBound:
    """Bounds the relative bias of every sliding window K = 1 … (Aicher, Foti & Fox, 2019).

        δ(K) = E(K) / (‖ĝ_K‖ − E(K)),   E(K) = M Σ_{k ≥ K−1} φ_k

    φ_k are the adjoint norms, φ_{k+1} = β φ_k beyond the lags measured, from the largest value on
    that the later ones of them would have there. β is the decay of those later lags (`tail_rate`),
    not of the first ones: the paper's holds beyond a lag τ. M, in the paper a bound on ‖∂⁺h/∂w‖, is
    the smallest number that bounds what each lag measured adds to the gradient, ‖D_k‖ ≤ M φ_{k−1}:
    a larger one would only weaken the bound. inf where there is no decay (β ≥ 1) or E(K) ≥ ‖ĝ_K‖.
    Beyond the windows measured ĝ stays what it is and E(K) falls by β per step.

    Args:
      norms: φ, `[K]`, `LagProfile.cotangent_norms`.
      grad_norms: ‖D_k‖, `[K]`, `LagProfile.grad_norms`.
      kept: ‖ĝ_K‖, `[K]`, the norm of what each window leaves.
      num_lags: lags at which there are pairs.
      tolerances: of the windows.
    """
    rate = tail_rate(norms, num_lags)
    decay, decays = jnp.exp(jnp.minimum(rate, 0)), rate < 0
    lag = jnp.arange(len(norms))
    to_last = num_lags - 1 - lag
    later = (lag >= (num_lags - 1) // 2) & (to_last >= 0)
    last = max_or_nan(
        jnp.where(later, norms * decay ** jnp.maximum(to_last, 0).astype(decay.dtype), 0)
    )
    phi = jnp.where(
        to_last >= 0, norms, last * decay ** jnp.maximum(-to_last, 0).astype(decay.dtype)
    )
    slope = max_or_nan(grad_norms[1:] / jnp.where(phi[:-1] > 0, phi[:-1], jnp.inf), initial=0)
    reached = jnp.where(num_lags == len(norms), last, phi[-1])
    beyond = jnp.where(decays, reached * decay / jnp.where(decays, 1 - decay, 1), jnp.inf)
    error = slope * (jnp.sum(jnp.where(lag >= lag[:, None], phi, 0), axis=1) + beyond)
    bound = jnp.where(kept > error, error / jnp.where(kept > error, kept - error, 1), jnp.inf)

    levels = jnp.array(tolerances)
    first = jnp.min(jnp.where(bound <= levels[:, None], lag + 1, jnp.iinfo(lag.dtype).max), axis=1)
    ratio = error[-1] * (1 + 1 / levels) / kept[-1]
    far = len(norms) + jnp.ceil(jnp.log(ratio) / jnp.abs(rate))
    far = jnp.where(decays & (far < 1e9), jnp.maximum(far, 1), 0).astype(lag.dtype)
    return BiasBound(bound, jnp.where(first <= len(norms), first, far))
