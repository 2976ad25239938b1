"""Lyapunov exponents: how fast small changes of the carry grow or die out, direction by direction.

A frame of k orthonormal tangent vectors is pushed through the steps and made orthonormal again:

    V = J_{t+m−1} … J_t Q,     V = Q⁺ R,     λ_i = Σ ln |R_ii| / steps
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbptt import slips, validation
from jbptt.analysis.jacobians import check_differentiable, flat_carry, push_tangents
from jbptt.analysis.linalg.scaled_svd import times_power
from jbptt.arrays import one_if_zero, split_time, steps_from, widened_dtype
from jbptt.executables import run
from jbptt.norms import max_or_nan, norm
from jbptt.recurrence import default_segment, unroll
from jbptt.starts import start_of
from jbptt.types import Carry, Params, PyTree, Step

_SINGULAR = 2.0**-48
"""Growth this far below an interval's largest is zero: float64's rounding, and in float32 only
exact zeros.
"""


class LyapunovSpectrum(NamedTuple):
    """The k largest Lyapunov exponents of one trajectory, natural logarithm per step, descending.

    Attributes:
      exponents: `[k]`. −inf where the Jacobians are singular to rounding. In float32 that is every
        exponent more than 13 nats per interval below the largest, while a single singular step may
        go unnoticed.
      standard_errors: `[k]`, by batch means over the kept steps: how far a trajectory of this
        length scatters around an infinitely long one; the effect of rounding is not in them. NaN
        with fewer than two intervals; 0 for an exponent of −inf.
      history: `[num_intervals, k]`, the estimate after each kept interval, its columns in the order
        of `exponents`; the last row is `exponents`. `num_intervals = ⌈kept steps / qr_every⌉`.
    """

    exponents: jax.Array
    standard_errors: jax.Array
    history: jax.Array


def lyapunov_spectrum(
    step: Step,
    params: Params,
    carry: Carry,
    xs: PyTree,
    *,
    length: int | None = None,
    num_exponents: int | None = None,
    qr_every: int = 1,
    num_discarded: int = 0,
    num_batches: int = 20,
    key: jax.Array | None = None,
) -> LyapunovSpectrum:
    """The Lyapunov exponents of a driven or autonomous step, along the trajectory that starts at
    `carry`.

        λ_1 + … + λ_i = lim 1/T · ln vol_i(J_{T−1} … J_0),     J_t = ∂carries[t+1] / ∂carries[t]

    The carry may be any pytree; its n inexact numbers, flattened, are the dimensions, and integer
    and key leaves are carried along. A complex number counts as two, its real and its imaginary
    part, as in `step_jacobians`: m of them have 2m exponents. Of a holomorphic step (no conjugate,
    no modulus) they are equal in pairs, one for each complex direction, so `exponents[::2]` are its
    complex exponents. All of it is one system: a carry with a batch axis is a joint system of B·n
    dimensions; for the spectrum of each example use `jax.vmap`. For exponents per unit of time
    divide by the time that one step takes.

    Costs one step and k tangents per step (forward mode; no Jacobian is formed, but for a step with
    a `custom_vjp`, in reverse mode) and O(n k²) per QR; memory O(n k) and the history.
    Differentiable in `params` and `carry`, forward and in reverse (intervals are then recomputed in
    segments); an exponent of −inf has derivative 0. In chaos the derivative of a long-time average
    grows like exp(λ_1 T), here as in every such calculation.

    −inf: exact, where R has a zero, or R_ii below the rounding of the largest entry of R: in
    float64 for one interval (2⁻⁴⁸), in float32 on average (16 eps). A spread of more than that (33
    and 13 nats) within one interval cannot be resolved; lower `qr_every`. In float32, even with
    `qr_every=1`, diag(1, 1e-6) counts as singular, and a single singular step may count as regular,
    as rounding hides its zero; use float64.

    A carry that stops being finite makes all exponents NaN, even where its derivative is finite (a
    ReLU's at NaN is 0, a linear step's is its matrix). A carry narrower than float32 rounds the
    frame to its own precision at every step, always the same way: exponents are then off by up to
    its ε (bfloat16: 0.008), whatever T is and whatever the standard errors say.

    Args:
      step: `(params, carry, x) -> (carry, y)`; y is not used.
      params: passed to the step as they are.
      carry: what enters step 0, or a function of the parameters that gives it, without a batch
        axis.
      xs: leaves `[T, ...]`, or None with `length` for an autonomous system.
      length: T, where `xs` has no leaves.
      num_exponents: k; None: all n.
      qr_every: steps between two orthonormalisations; a shorter interval takes what is left.
      num_discarded: steps run first and left out, so that trajectory and frame settle.
      num_batches: contiguous batches for the standard errors (fewer if there are fewer intervals).
        A batch should be longer than the memory of the system, else the errors come out too small.
      key: of the frame at the start, random, so that it lies in no invariant subspace. None: a
        fixed key.

    Raises:
      ValueError: an integer out of range; no inexact carry leaf; more exponents than dimensions;
        nothing left after `num_discarded`; what `unroll` raises.

    Benettin, Galgani, Giorgilli & Strelcyn (1980), Meccanica 15; for RNNs: Engelken, Wolf & Abbott
    (2023), Physical Review Research 5.

    >>> doubling = lambda params, carry, x: (params * carry, None)
    >>> lyapunov_spectrum(doubling, 2.0, jnp.zeros(1), None, length=10).exponents
    Array([0.6931472], dtype=float32)
    """
    carry = start_of(carry, params)
    num_steps, size, dtype = _check(step, params, carry, xs, length, num_discarded)
    num_exponents = _check_num_exponents(num_exponents, size)
    qr_every = validation.check_positive_integer("qr_every", qr_every)
    num_batches = validation.check_positive_integer("num_batches", num_batches, smallest=2)
    settings = num_steps, size, dtype, num_exponents, qr_every, num_discarded, num_batches
    return run(_lyapunov_spectrum, (step,), settings, params, carry, xs, key)


def _lyapunov_spectrum(
    step,
    num_steps,
    size,
    dtype,
    num_exponents,
    qr_every,
    num_discarded,
    num_batches,
    params,
    carry,
    xs,
    key,
) -> LyapunovSpectrum:
    """`lyapunov_spectrum` of checked arguments: settings first, then arrays, as `run` has it."""
    key = jax.random.key(0) if key is None else key
    frame = safe_qr(jax.random.normal(key, (size, num_exponents), dtype))[0]
    xs, num_kept = jax.tree.map(jnp.asarray, xs), num_steps - num_discarded
    early, late = steps_from(xs, 0, num_discarded), steps_from(xs, num_discarded, num_kept)
    state, _ = _evolve(step, params, (carry, frame), early, num_discarded, qr_every)
    _, (growth, largest) = _evolve(step, params, state, late, num_kept, qr_every)

    lengths = np.diff([*range(0, num_kept, qr_every), num_kept])
    return _spectrum(growth, largest, lengths, num_batches)


def _check(step, params, carry, xs, length, num_discarded) -> tuple[int, int, Any]:
    """T, the number of dimensions and the dtype of the frame."""
    num_steps = validation.count_steps({"xs": xs}, length)
    slips.warn_of_float64({"params": params, "carry": carry, "xs": xs})
    validation.check_step(step, params, carry, xs)
    validation.check_positive_integer("num_discarded", num_discarded, smallest=0)
    if num_discarded >= num_steps:
        raise ValueError(
            f"num_discarded must be < T = {num_steps}, got {num_discarded}; no step would be left: "
            "run more steps"
        )
    check_differentiable(carry)
    flat = jax.eval_shape(lambda carry: flat_carry(carry)[0], carry)
    return num_steps, flat.size, widened_dtype(flat.dtype)


def _check_num_exponents(num_exponents: Any, size: int) -> int:
    if num_exponents is None:
        return size
    num_exponents = validation.check_positive_integer("num_exponents", num_exponents)
    if num_exponents > size:
        raise ValueError(
            f"num_exponents must be <= {size}, the number of real numbers in the carry, got "
            f"{num_exponents}; None takes all"
        )
    return num_exponents


def advance(
    step: Step, params: Params, carry: Carry, frame: jax.Array, x: PyTree
) -> tuple[Carry, jax.Array]:
    """One step of the carry and of tangent vectors: `frame ← J frame`, `[n, k]`, NaN once the carry
    is not finite.
    """
    flat, whole = flat_carry(carry)

    def run(flat):
        after = step(params, whole(flat), x)[0]
        return flat_carry(after)[0], after

    tangents, after = push_tangents(run, flat, frame.astype(flat.dtype))
    return after, tangents.astype(frame.dtype)


def rescaled(frame: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`frame / 2^exponent`, its largest entry in [½, 1), and the exponent, a constant to every
    derivative.
    """
    largest = lax.stop_gradient(max_or_nan(jnp.abs(frame)))
    exponent = jnp.where(jnp.isfinite(largest), jnp.frexp(largest)[1], 0)
    return times_power(frame, -exponent), exponent


def _evolve(step, params, state, xs, num_steps, qr_every):
    """Runs `(carry, frame)` over all steps; beside it `ln |R_ii|` `[intervals, k]` and `ln max |R|`
    `[intervals]`.
    """

    def interval(params, state, xs, length):
        def body(state, x):
            carry, frame, total = state
            carry, frame = advance(step, params, carry, frame, x)
            frame, exponent = rescaled(frame)  # however long the interval, only ratios are limited
            return (carry, frame, total + exponent), None

        (carry, frame, total), _ = lax.scan(
            body, (*state, jnp.zeros((), jnp.int32)), xs, length=length
        )
        frame, growth, largest = orthonormalise(frame)
        shift = total.astype(frame.dtype) * math.log(2)
        return (carry, frame), (growth + shift, largest + shift)

    def whole_interval(params, state, xs):
        return interval(params, state, xs, qr_every)

    num_whole, rest = divmod(num_steps, qr_every)
    main, tail = split_time(xs, qr_every, num_whole)
    logs = []
    if num_whole:
        segment = default_segment(num_whole)
        state, whole = unroll(
            whole_interval, params, state, main, segment=segment, length=num_whole
        )
        logs.append(whole)
    if rest:
        state, last = interval(params, state, tail, rest)
        logs.append(jax.tree.map(lambda a: a[None], last))
    return state, jax.tree.map(lambda *parts: jnp.concatenate(parts), *logs) if logs else (
        None,
        None,
    )


def _singular(columns: jax.Array, upper: jax.Array) -> jax.Array:
    """`[k]`: which diagonal entries of R are zero, exactly or to the rounding of float64."""
    size = jnp.abs(jnp.diagonal(upper))
    # k columns that are zero outside of r rows have rank r at most, while rounding hides the zero
    # of R_ii, i > r.
    num_rows = jnp.sum(jnp.any(columns != 0, axis=1))
    return (size <= _SINGULAR * max_or_nan(jnp.abs(upper))) | (jnp.arange(len(size)) >= num_rows)


@jax.custom_jvp
def safe_qr(columns: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`columns = Q R`, `[n, k]`, whose derivative stays finite where columns depend on those before
    them.

    Such a column leaves its own in `Q` undetermined; the derivatives of those before it are exact.
    """
    q, r = jnp.linalg.qr(columns)
    return q, r


@safe_qr.defjvp
def _safe_qr_jvp(primals, tangents):
    (columns,), (d_columns,) = primals, tangents
    q, r = safe_qr(columns)
    singular = _singular(columns, r)
    upper = jnp.where(singular, jnp.eye(len(r), dtype=r.dtype), r)
    ratio = lax.linalg.triangular_solve(upper, d_columns)  # dV R⁻¹
    inner = q.T @ ratio
    lower = jnp.tril(inner, -1)
    turn = lower - lower.T
    return (q, r), (q @ (turn - inner) + ratio, (inner - turn) @ r)


def orthonormalise(columns: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`Q` `[n, k]` of `columns = Q R`, `ln |R_ii|` `[k]` (−inf where singular) and `ln max |R|`, a
    scalar.
    """
    frame, upper = safe_qr(columns)
    singular = _singular(columns, upper)
    size = jnp.abs(jnp.where(singular, 1, jnp.diagonal(upper)))
    largest = lax.stop_gradient(max_or_nan(jnp.abs(upper)))
    return frame, jnp.where(singular, -jnp.inf, jnp.log(size)), jnp.log(one_if_zero(largest))


def _spectrum(growth, largest, lengths: np.ndarray, num_batches: int) -> LyapunovSpectrum:
    """Means per step, their order and their errors, from the growth of every interval."""
    total = jnp.cumsum(jnp.column_stack([growth, largest]), axis=0)
    total, largest = total[:, :-1], total[:, -1:]
    # What stays at the level of rounding on average is rounding.
    floor = np.arange(1, len(lengths) + 1) * math.log(16 * float(jnp.finfo(growth.dtype).eps))
    noise = total <= largest + jnp.asarray(floor, growth.dtype)[:, None]
    steps = jnp.asarray(np.cumsum(lengths), growth.dtype)
    history = jnp.where(noise, -jnp.inf, total / steps[:, None])

    order = jnp.argsort(history[-1], descending=True)
    history, growth = history[:, order], growth[:, order]
    errors = _batch_means_error(growth, history[-1], lengths, num_batches)
    return LyapunovSpectrum(history[-1], errors, history)


def _batch_means_error(growth, exponents, lengths: np.ndarray, num_batches: int) -> jax.Array:
    """`sqrt(B / (B − 1) Σ_b w_b² (λ_b − λ)²)`, w_b the share of the steps that batch b holds
    (Schmeiser, 1982).
    """
    num_batches = min(num_batches, len(lengths))
    if num_batches < 2:
        return jnp.full_like(exponents, jnp.nan)
    batch = np.arange(len(lengths)) * num_batches // len(lengths)
    steps = jnp.asarray(np.bincount(batch, lengths, num_batches), growth.dtype)
    zero = exponents == -jnp.inf
    growth = jnp.where(zero, 0, growth)
    sums = jax.ops.segment_sum(growth, jnp.asarray(batch), num_batches)
    deviations = (sums - steps[:, None] * jnp.where(zero, 0, exponents)) / jnp.sum(steps)
    return norm(deviations.T, 1) * math.sqrt(num_batches / (num_batches - 1))
