"""Schedules of gates, and the coverage matrix that each of them stands for.

A schedule is an array `[T]`: `gates[t]` multiplies the gradient that crosses from step t into the
carry that step t received. Hand it to `unroll(gates=...)` or, as a function of a key and T, to
`gated_bptt`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.scipy.linalg import solve_triangular

from jbptt import validation


def full(num_steps: int) -> jax.Array:
    """All ones, `[num_steps]`: full BPTT."""
    validation.check_positive_integer("num_steps", num_steps)
    return jnp.ones(num_steps)


def fixed(
    num_steps: int, window: jax.typing.ArrayLike, *, phase: jax.typing.ArrayLike = 0
) -> jax.Array:
    """Zeros where `(t + phase) % window == 0`, t > 0; ones elsewhere: blocks of `window` steps.

    Args:
      num_steps: T.
      window: steps per block; may be traced, so one compilation serves every window.
      phase: how far into a block step 0 stands; may be traced.

    Raises:
      ValueError: num_steps or window < 1, phase < 0, or one that is not an integer.
    """
    validation.check_positive_integer("num_steps", num_steps)
    if not isinstance(window, Tracer):
        validation.check_positive_integer("window", window)
    if not isinstance(phase, Tracer):
        validation.check_positive_integer("phase", phase, smallest=0)
    t = jnp.arange(num_steps)
    return jnp.where(((t + phase) % window == 0) & (t > 0), 0.0, 1.0)


def randomized(
    key: jax.Array, num_steps: int, keep_prob: jax.typing.ArrayLike, *, reweight: bool = True
) -> jax.Array:
    """`ξ_t / π_t`, `ξ_t ~ Bernoulli(π_t)` independent: unbiased (Tallec & Ollivier, 2017).

    Args:
      key: a PRNG key; a new one for every update.
      num_steps: T.
      keep_prob: π in (0, 1], scalar, `[T]` (each step its own), or `[T, *batch]` (each example its
        own, and gates of its own); may be traced. The variance grows without bound with the length
        if the squared Jacobian over π is ≥ 1.
      reweight: False leaves out 1/π; the gradient is then biased towards short lags.

    Raises:
      ValueError: keep_prob outside (0, 1], or of another length than T.
    """
    keep_prob = _keep_prob_by_step(num_steps, keep_prob)
    kept = jax.random.bernoulli(key, keep_prob)
    return jnp.where(kept, 1 / keep_prob if reweight else 1.0, 0.0)


def _keep_prob_by_step(num_steps, keep_prob):
    """`[T]` or `[T, *batch]`, checked."""
    validation.check_positive_integer("num_steps", num_steps)
    validation.check_probability("keep_prob", keep_prob)
    shape = jnp.shape(keep_prob) or (num_steps,)
    if shape[0] != num_steps:
        raise ValueError(
            f"keep_prob has shape {shape}, wanted a scalar, [T] = ({num_steps},) or [T, *batch]: "
            "time is the first axis"
        )
    return jnp.broadcast_to(jnp.asarray(keep_prob, float), shape)


def artbp(
    key: jax.Array,
    num_steps: int,
    mean_length: jax.typing.ArrayLike,
    *,
    alpha: float = 4.0,
    reweight: bool = True,
) -> jax.Array:
    """Anticipated reweighted truncated backpropagation: cuts grow rarer (ibid., §4).

        c = (α − 1) / ((α − 2) L₀ + δ),     gates[t] = (1 − X_t) / (1 − c),     X_t ~ Bernoulli(c)

    with δ the steps since the last cut (the sequence's start counts as one). The lengths between
    cuts have mean L₀ and a tail δ^{−(α−1)}, so that long ones are not too rare and the weights stay
    moderate.

    Args:
      key: a PRNG key; a new one for every update.
      num_steps: T.
      mean_length: L₀ > 1, in steps; may be traced.
      alpha: α > 2; larger is closer to a constant hazard.
      reweight: False leaves out 1/(1 − c); biased.

    Raises:
      ValueError: mean_length ≤ 1 or alpha ≤ 2.
    """
    return _renewal_gates(key, num_steps, _artbp_hazard(num_steps, mean_length, alpha), reweight)


def _artbp_hazard(num_steps, mean_length, alpha):
    validation.check_positive_integer("num_steps", num_steps)
    validation.check_mean_length(mean_length)
    validation.check_above("alpha", alpha, 2, "the mean length is infinite at alpha <= 2")
    return lambda delta: (alpha - 1) / ((alpha - 2) * mean_length + delta.astype(float))


def check_length_probs(value: Any, num_steps: int | None) -> None:
    """`value` must be a distribution over 1, 2, … steps, and reach `num_steps` if given."""
    if isinstance(value, Tracer):
        return
    try:
        probs = np.asarray(value).astype(float)
    except (TypeError, ValueError):
        probs = np.array(np.nan)
    if probs.ndim != 1 or not probs.size or not np.all(probs >= 0) or not probs.sum() <= 1 + 1e-5:
        raise ValueError(
            f"length_probs must be [L], each >= 0 and together at most 1, got {value!r}; "
            "length_probs[k - 1] is the probability of a window of k steps"
        )
    if num_steps is not None and probs[: num_steps - 1].sum() > 1 - 1e-6:
        raise ValueError(
            f"length_probs lets hardly any window reach T = {num_steps} steps (less than 1e-6), so "
            "that pairs further apart are never seen and no weight makes up for it; leave some "
            "probability to longer windows, or pass reweight=False"
        )


def random_lengths(
    key: jax.Array, num_steps: int, length_probs: jax.Array, *, reweight: bool = True
) -> jax.Array:
    """Windows whose lengths are drawn one after another from any distribution.

        c(δ) = p_δ / (1 − Σ_{k<δ} p_k),   X_t ~ Bernoulli(c(δ)),   gates[t] = (1 − X_t) / (1 − c(δ))

    with δ the steps since the last cut. Constant keep probabilities are geometric lengths, ARTBP's
    have a heavier tail. Language models are often trained with `reweight=False` (Merity et al.,
    AWD-LSTM, 2018), which is biased towards short lags.

    Args:
      key: a PRNG key; a new one for every update.
      num_steps: T.
      length_probs: p, `[L]`: `length_probs[k − 1]` is the probability of k steps; may be traced.
        What is missing to 1 are windows longer than L, which no cut ends within the update.
      reweight: False leaves out 1/(1 − c); biased.

    Raises:
      ValueError: entries below 0 or not finite, a sum above 1; with weights, lengths that all end
        before T: pairs further apart would never be seen, and no weight makes up for that.
    """
    return _renewal_gates(
        key, num_steps, _length_hazard(num_steps, length_probs, reweight), reweight
    )


def _length_hazard(num_steps, length_probs, reweight):
    validation.check_positive_integer("num_steps", num_steps)
    check_length_probs(length_probs, num_steps if reweight else None)
    # On the host where they are known: in float32 what is left of 1 has few digits.
    xp = jnp if isinstance(length_probs, Tracer) else np
    probs = xp.asarray(length_probs, float)
    before = 1 - xp.concatenate([xp.zeros(1), xp.cumsum(probs)[:-1]])  # of being as long
    # Past a length that no window exceeds nothing is ever reached: any hazard will do there.
    hazards = xp.where(probs > 0, probs / xp.where(before > 0, before, 1), 0.0)
    hazards = jnp.append(jnp.clip(hazards, 0, 1), 0.0)
    return lambda delta: hazards[jnp.minimum(delta, len(hazards)) - 1]


def _renewal_gates(key, num_steps, hazard_fn, reweight):
    """Gates whose chance of a cut depends on the steps since the last one."""

    def body(delta, uniform):
        hazard = hazard_fn(delta)
        cut = uniform < hazard
        gate = jnp.where(cut, 0.0, 1 / jnp.where(hazard < 1, 1 - hazard, 1) if reweight else 1.0)
        return jnp.where(cut, 1, delta + 1), gate

    # gates[0] leads into the initial carry only, where the update ends anyway: it stays open.
    _, gates = lax.scan(body, jnp.ones((), int), jax.random.uniform(key, (num_steps,))[1:])
    return jnp.concatenate([jnp.ones(1), gates])


def coverage(gates: jax.Array) -> jax.Array:
    """The weight of each pair (loss t, source i ≤ t): `C[t, i] = Π_{j=i+1..t} gates[j]`.

    Args:
      gates: `[T]`, or `[T, *batch]`.

    Returns:
      `[T, T]` (or `[T, T, *batch]`), lower triangular with a diagonal of ones. Memory O(T²).
    """
    validation.count_steps({"gates": gates})
    gates = jnp.asarray(gates, jnp.result_type(gates, float))
    steps = jnp.arange(len(gates)).reshape((-1,) + (1,) * (gates.ndim - 1))

    def body(row, inputs):
        t, gate = inputs
        # A select, as in the gradient: past a cut the weight is 0 even where another gate is
        # infinite.
        row = jnp.where((steps < t) & (gate != 0) & (row != 0), row * gate, 0)
        row = jnp.where(steps == t, 1.0, row)
        return row, row

    return lax.scan(body, jnp.zeros_like(gates), (jnp.arange(len(gates)), gates))[1]


def full_coverage(num_steps: int) -> jax.Array:
    """Every pair once, `[T, T]`: ones for i ≤ t. A ValueError unless num_steps is an int ≥ 1."""
    validation.check_positive_integer("num_steps", num_steps)
    return jnp.tri(num_steps, dtype=float)


def window_coverage(num_steps: int, window: int, stride: int) -> jax.Array:
    """What `truncated_bptt` covers, `[T, T]`: 1 where `(t // s + 1)·s − window ≤ i ≤ t`.

    A pair's weight does not depend on where the sequence happens to end, so a ragged tail and a
    split stream agree. Raises ValueError for window or stride < 1, not an integer, or stride >
    window.
    """
    validation.check_positive_integer("num_steps", num_steps)
    window, stride = validation.check_window(window, stride)
    t, i = jnp.arange(num_steps)[:, None], jnp.arange(num_steps)[None, :]
    return jnp.where(((t // stride + 1) * stride - window <= i) & (i <= t), 1.0, 0.0)


def randomized_coverage(
    num_steps: int, keep_prob: jax.typing.ArrayLike, *, reweight: bool = True
) -> jax.Array:
    """What `randomized` covers on average: every pair once; unweighted `Π_{j=i+1..t} π_j`.

    Arguments, shapes and errors as there.
    """
    keep_prob = _keep_prob_by_step(num_steps, keep_prob)
    return coverage(jnp.ones_like(keep_prob) if reweight else keep_prob)


def artbp_coverage(
    num_steps: int, mean_length: jax.typing.ArrayLike, *, alpha: float = 4.0, reweight: bool = True
) -> jax.Array:
    """What `artbp` covers on average, `[T, T]`: every pair once; unweighted P(no cut between).

    Arguments and errors as there.
    """
    hazard_fn = _artbp_hazard(num_steps, mean_length, alpha)
    return full_coverage(num_steps) if reweight else _renewal_coverage(num_steps, hazard_fn)


def random_lengths_coverage(
    num_steps: int, length_probs: jax.Array, *, reweight: bool = True
) -> jax.Array:
    """What `random_lengths` covers on average: every pair once; unweighted P(no cut between).

    Arguments and errors as there.
    """
    hazard_fn = _length_hazard(num_steps, length_probs, reweight)
    return full_coverage(num_steps) if reweight else _renewal_coverage(num_steps, hazard_fn)


def _renewal_coverage(num_steps, hazard_fn):
    """P(no cut in i+1 … t): a window that begins at some a ≤ i lasts beyond step t.

    With u_a the probability that one begins at a:

        E C[t, i] = Σ_{a≤i} u_a S(t − a),   S(n) = Π_{δ≤n} (1 − c(δ))

    and u from Σ_{a≤t} u_a S(t − a) = 1: some window
    holds step t.
    """
    survival = jnp.cumprod(jnp.append(1.0, 1 - hazard_fn(jnp.arange(1, num_steps))))
    lags = jnp.arange(num_steps)[:, None] - jnp.arange(num_steps)
    lasting = jnp.where(lags >= 0, survival[jnp.maximum(lags, 0)], 0)
    beginning = solve_triangular(lasting, jnp.ones(num_steps), lower=True)
    return jnp.tril(jnp.cumsum(lasting * beginning, axis=1))
