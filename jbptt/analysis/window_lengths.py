"""Which windows randomized truncation should draw: the distribution of lengths of least variance.

Let s_j = P(length > j). A pair at lag k whose source is step a + 1 of its window survives with
probability s_{a+k} / s_a and is weighted by the inverse. With u_i the chance that a window begins
at step i,

    E[W_k²] = 1/(T − k) Σ_{i < T−k} Σ_{a ≤ i} u_{i−a} s_a · s_a / s_{a+k}

and, where what different pairs contribute is uncorrelated, the variance of the gradient is
Σ_k ‖D_k‖² (E[W_k²] − 1), D_k the gradient at lag k.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jbptt import validation
from jbptt.analysis.lags import LagProfile

NUM_ITERATIONS = 300
FLOOR = 1e-5
"""The least chance that a window outlasts the sequence: with 0, no weight makes up for a pair that
is never kept.
"""


@dataclass(frozen=True)
class Schedule:
    """Windows of random length, and the variance predicted for them; str() says it in words.

    Variances are of the mean gradient, in the units of `LagProfile.grad_norms` squared.

    Attributes:
      length_probs: `[T − 1]`, the chance of a window of 1, 2, … steps, for
        `randomized_bptt(length_probs=)`; the rest to 1 is the chance that a window is not cut
        within T steps.
      keep_prob: `[T − 1]`, the chance that a window which has lasted 1, 2, … steps goes on.
      mean_length: `E[min(length, T)]`, in steps.
      predicted_variance: of this schedule.
      constant_keep_prob: π whose windows have the same mean length.
      constant_variance: predicted of constant π.
    """

    length_probs: np.ndarray
    keep_prob: np.ndarray
    mean_length: float
    predicted_variance: float
    constant_keep_prob: float
    constant_variance: float

    def __str__(self) -> str:
        ratio = self.predicted_variance / self.constant_variance if self.constant_variance else 1.0
        chances = ", ".join(
            f"{self.keep_prob[k - 1]:.3g} after {k}"
            for k in (1, 2, 4, 8, 16, 32, 64, 128)
            if k <= len(self.keep_prob)
        )
        return (
            f"windows of {self.mean_length:.3g} steps on average go on with probability {chances} "
            f"steps\npredicted variance {self.predicted_variance:.3g}, {ratio:.3g} of that of "
            f"constant π = {self.constant_keep_prob:.4g} ({self.constant_variance:.3g})"
        )


def optimize_schedule(profile: LagProfile, mean_length: float) -> Schedule:
    """Random windows' lengths of least predicted variance, at a given mean length.

    A constant keep probability and ARTBP fix the lengths by a formula; here they are fitted to how
    the model's gradient falls with the lag: lags that carry much gradient are rarely cut, lags that
    carry none often.

    The prediction takes the contributions of different pairs as uncorrelated, which is exact for
    white noise. Where they are correlated, trust the order of two schedules more than either
    variance (`compare` measures it).

    Runs on the host, in double precision: some 300 steps of L-BFGS, O(T²) each.

    Args:
      profile: of the model, with `max_lag` = T; its `grad_norms` are read.
      mean_length: `E[min(length, T)]`, in steps, in (1, T).

    Raises:
      ValueError: a profile of several models, by leaf, of fewer than 3 lags or not finite; a mean
        length outside (1, T).
    """
    norms = (
        np.asarray(profile.grad_norms, float)
        if not isinstance(profile.grad_norms, (dict, list, tuple))
        else None
    )
    if norms is None or norms.ndim != 1 or len(norms) < 3 or not np.all(np.isfinite(norms)):
        raise ValueError(
            "profile must be the finite profile of one gradient over T >= 3 lags, got grad_norms "
            f"{'by leaf' if norms is None else norms.shape}; pass lag_profile(..., max_lag=T) "
            "without per_leaf"
        )
    num_steps = len(norms)
    validation.check_above(
        "mean_length", mean_length, 1, "with 1 the gradient would be cut at every step"
    )
    if mean_length >= num_steps:
        raise ValueError(
            f"mean_length must be < T = {num_steps} (the profile's lags), got {mean_length}: "
            "nothing is cut"
        )
    size = float(norms[1:].max())
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        squares = np.asarray((norms / size) ** 2 if size else norms, np.float64)
        found, variances = jax.device_get(_optimize(squares, np.float64(mean_length)))
        variances = [size**2 * float(one) for one in variances]
    survival = np.exp(found[0])
    return Schedule(
        length_probs=-np.diff(survival),
        keep_prob=np.exp(np.diff(found[0])),
        mean_length=float(survival.sum()),
        predicted_variance=variances[0],
        constant_keep_prob=math.exp(found[1][1]),
        constant_variance=variances[1],
    )


@jax.jit
def _optimize(
    squares: jax.Array, mean_length: jax.Array
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Log survival and variance of the best schedule and of constant π (twice without gradient)."""
    constant = jnp.zeros(len(squares) - 1)
    rates = _descend(partial(_objective, squares, mean_length), constant)
    rates = jnp.where(jnp.any(squares > 0), rates, constant)
    found = [log_survival(rates, FLOOR, mean_length), log_survival(constant, 0.0, mean_length)]
    return found, [variance(squares, log_s) for log_s in found]


def log_survival(rates: jax.Array, floor: float, mean_length: ArrayLike) -> jax.Array:
    """`ln P(length > j)`, j = 0 … T − 1, from T − 1 hazard logits, scaled to the mean length."""
    total = jnp.concatenate([jnp.zeros(1), jnp.cumsum(jax.nn.softplus(rates))])

    def survival(log_scale):
        return floor + (1 - floor) * jnp.exp(-jnp.exp(log_scale) * total)

    def excess(log_scale):
        return jnp.sum(survival(log_scale)) - mean_length

    def halve(bounds, _):
        low, high = bounds
        middle = (low + high) / 2
        above = excess(middle) > 0  # still longer than wanted: cut more
        return (jnp.where(above, middle, low), jnp.where(above, high, middle)), None

    (low, high), _ = jax.lax.scan(halve, (jnp.asarray(-40.0), jnp.asarray(40.0)), length=70)
    root = jax.lax.stop_gradient((low + high) / 2)
    # One step of Newton's method has the derivative of the root itself.
    slope = jax.lax.stop_gradient(jax.grad(excess)(root))
    log_scale = root - excess(root) / slope
    if floor:
        return jnp.log(survival(log_scale))
    return -jnp.exp(log_scale) * total


def variance(squares: jax.Array, log_survival: jax.Array) -> jax.Array:
    """Σ_k ‖D_k‖² (E[W_k²] − 1), from `‖D_k‖²` and `ln s_j`, both `[T]`."""
    num_steps = len(squares)
    survival = jnp.exp(log_survival)
    ends = jnp.append(-jnp.diff(survival), 0.0)  # ends[j − 1] = P(length = j)

    def begin(starts, i):
        return jnp.concatenate([jnp.array([jnp.sum(starts * ends)]), starts[:-1]]), starts[0]

    _, starts = jax.lax.scan(begin, jnp.zeros(num_steps).at[0].set(1.0), jnp.arange(num_steps))
    number = jnp.cumsum(starts)  # of windows begun until step n
    a, k = jnp.arange(num_steps)[:, None], jnp.arange(1, num_steps)[None, :]
    inside = a + k < num_steps
    squared_weight = jnp.exp(2 * log_survival[a] - log_survival[jnp.minimum(a + k, num_steps - 1)])
    begun = number[jnp.maximum(num_steps - 1 - k - a, 0)]
    means = jnp.sum(jnp.where(inside, begun * squared_weight, 0), axis=0) / (num_steps - k[0])
    return jnp.sum(squares[1:] * (means - 1))


def _objective(squares: jax.Array, mean_length: ArrayLike, rates: jax.Array) -> jax.Array:
    return jnp.log(variance(squares, log_survival(rates, FLOOR, mean_length)))


def _descend(objective: Any, start: jax.Array) -> jax.Array:
    """The best of 300 steps of L-BFGS."""
    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def body(running, _):
        rates, state, best, least = running
        value, grad = value_and_grad(rates, state=state)
        better = value < least
        best, least = jnp.where(better, rates, best), jnp.where(better, value, least)
        updates, state = solver.update(
            grad, state, rates, value=value, grad=grad, value_fn=objective
        )
        return (optax.apply_updates(rates, updates), state, best, least), None

    running = start, solver.init(start), start, jnp.asarray(jnp.inf)
    return jax.lax.scan(body, running, length=NUM_ITERATIONS)[0][2]
