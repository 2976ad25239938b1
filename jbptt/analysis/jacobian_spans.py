"""Products of step Jacobians over any span: how much they stretch, in every direction."""

import operator
from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jbptt import validation
from jbptt.analysis.jacobians import check_system, flat_carry, step_jacobian
from jbptt.analysis.linalg.scaled_svd import Graded, from_rows, log_singular_values, push
from jbptt.arrays import widened
from jbptt.executables import run
from jbptt.recurrence import carries_of, held_core
from jbptt.starts import start_of
from jbptt.types import Carry, Params, PyTree, Step


class JacobianProducts(NamedTuple):
    """Singular values of `J_{s+span−1} … J_s`, the derivative `∂carries[s + span]/∂carries[s]`.

    Attributes:
      spans: number of factors, `[S]`, in steps.
      log_singular_values: natural logarithms, `[S, n]`, descending; −inf for 0, and for what is 0
        to the rounding of the Jacobians.
    """

    spans: jax.Array
    log_singular_values: jax.Array

    @property
    def singular_values(self) -> jax.Array:
        """`[S, n]`; inf or 0 where a float cannot hold them, which their logarithms still can."""
        return jnp.exp(self.log_singular_values)

    @property
    def log_norms(self) -> jax.Array:
        """Natural logarithm of the spectral norm, `[S]`: the most that the product stretches."""
        return self.log_singular_values[..., 0]

    @property
    def norms(self) -> jax.Array:
        """The spectral norm, the largest singular value, `[S]`."""
        return jnp.exp(self.log_norms)

    @property
    def log_condition_numbers(self) -> jax.Array:
        """Natural logarithm of largest over smallest singular value, `[S]`; inf if singular."""
        smallest = self.log_singular_values[..., -1]
        singular = jnp.isneginf(smallest)
        return jnp.where(singular, jnp.inf, self.log_norms - jnp.where(singular, 0, smallest))

    @property
    def condition_numbers(self) -> jax.Array:
        """The largest over the smallest singular value, `[S]`; inf if the product is singular."""
        return jnp.exp(self.log_condition_numbers)


def check_spans(spans: Any, start: Any, num_steps: int) -> np.ndarray:
    """The spans as integers `[S]`, which must be ≥ 1 and, from a static start, end by T."""
    if (
        isinstance(spans, Tracer)
        or not isinstance(spans, (Sequence, np.ndarray, jax.Array))
        or np.ndim(spans) != 1
    ):
        raise ValueError(
            f"spans must be a static sequence of integers >= 1, got {spans!r}; write spans=(1, 10, "
            "100)"
        )
    if len(spans) == 0:
        raise ValueError("spans must name at least one span, got none; write spans=(1, 10, 100)")
    numbers = np.array([validation.check_positive_integer("spans", span) for span in spans])
    whole = isinstance(start, Integral) and not isinstance(start, bool)
    if isinstance(start, (np.ndarray, jax.Array)):
        whole = start.ndim == 0 and jnp.issubdtype(start.dtype, jnp.integer)
    if not whole:
        raise ValueError(
            f"start must be an integer, got {start!r}; use jax.vmap for several starts"
        )
    first = 0 if isinstance(start, Tracer) else operator.index(start)
    if first < 0 or first > num_steps - numbers.max():
        raise ValueError(
            f"start + span must lie within T = {num_steps} steps, got start = {first} and a span "
            f"of {numbers.max()}; shorten the span, start earlier (start >= 0), or pass a longer "
            "sequence"
        )
    return numbers


def jacobian_products(
    step: Step,
    params: Params,
    carry: Carry,
    xs: PyTree,
    *,
    spans: Sequence[int],
    start: int | jax.Array = 0,
    length: int | None = None,
    mask: jax.Array | None = None,
) -> JacobianProducts:
    """Singular values, norm and condition number of products of step Jacobians, many spans at once.

        P_span = J_{start+span−1} … J_{start+1} J_start = ∂carries[start + span] / ∂carries[start]

    `P = Q W` is carried along with Q orthonormal and the rows of W scaled by integer powers of two,
    so that no span overflows; Jacobi rotations in the scaled form then give every singular value to
    relative accuracy, also those far below ε times the largest (a plain SVD of P loses them).
    Directions that a Jacobian shrinks below the rounding of its own entries (`4·sqrt(n)·ε`,
    relative to its rows and columns) count as 0: −inf. Entries below the normal range of their
    dtype are flushed to 0, as everywhere in XLA.

    Rounding acts like a change of every Jacobian by a few ε of its norm. In a system of one piece
    that moves the values by 1e-10 or less, relative (float64). It can move them by whole nats where
    the system falls into parts that do not all reach one another (stacked layers, triangular
    matrices) and one part outgrows another by 1/ε or more on the way. If in doubt, change the
    parameters by ε and compare, or take a shorter span.

    One forward pass and max(spans) steps, each with the step's Jacobian and two QR decompositions,
    O(n³); then O(n³) per span and sweep of rotations. Memory O(T) carries and O(S n²). jit- and
    vmap-able; not differentiable.

    Args:
      step: `(params, carry, x) -> (carry, y)`.
      params: passed to the step as they are.
      carry: what enters step 0, or a function of the parameters that gives it, unbatched (vmap for
        batches), flattened as in `step_jacobians`.
      xs: leaves `[T, ...]`, or None with `length`.
      spans: numbers of factors, each ≥ 1, static, in any order.
      start: the first step of the product; may be traced. Spans that a traced start carries beyond
        T, or before step 0, have no product and give NaN.
      length: T, where `xs` has no leaves.
      mask: bool `[T]`; a masked step is the identity.

    Returns:
      A `JacobianProducts`. NaN where a Jacobian, or a carry that leaves a step, is not finite.

    Raises:
      ValueError: spans that are empty or < 1; a static start < 0 or with start + span > T; what
        `step_jacobians` raises.
    """
    carry = start_of(carry, params)
    num_steps = check_system(step, params, carry, xs, mask, length)
    numbers = tuple(check_spans(spans, start, num_steps).tolist())
    # Data, so that all starts share a program.
    first = np.asarray(start) if isinstance(start, Integral) else start
    return run(_jacobian_products, (step,), (num_steps, numbers), params, carry, xs, mask, first)


def _jacobian_products(
    step, num_steps, numbers, params, carry, xs, mask, start
) -> JacobianProducts:
    """What `jacobian_products` compiles: its arguments, checked, functions and settings first."""
    numbers = np.array(numbers)
    unique, inverse = np.unique(numbers, return_inverse=True)
    # Where the product after each step is kept; out of range: nowhere.
    slots = np.full(unique[-1], len(unique))
    slots[unique - 1] = np.arange(len(unique))

    core = held_core(step)
    inputs, first = jax.tree.map(jnp.asarray, (xs, mask)), jnp.asarray(start).astype(int)
    carries = carries_of(step, params, carry, xs, mask, num_steps)

    def body(state, k):
        frame, matrix, kept = state
        now = jax.tree.map(lambda a: a[jnp.clip(first + k, 0, num_steps - 1)], (carries, inputs))
        jacobian = widened(step_jacobian(core, params, *now))
        frame, matrix = push(jacobian, frame, matrix)
        kept = jax.tree.map(
            lambda all, new: all.at[jnp.asarray(slots)[k]].set(new, mode="drop"), kept, matrix
        )
        return (frame, matrix, kept), None

    frame, matrix = first_frame(widened(flat_carry(carry)[0]))
    kept = jax.tree.map(lambda a: jnp.zeros((len(unique), *a.shape), a.dtype), matrix)
    (_, _, kept), _ = jax.lax.scan(body, (frame, matrix, kept), jnp.arange(unique[-1]))
    logs = jax.vmap(log_singular_values)(kept)[inverse]
    outside = (start < 0) | (start > num_steps - numbers)  # the sum may be out of start's range
    return JacobianProducts(jnp.asarray(numbers), jnp.where(outside[:, None], jnp.nan, logs))


def first_frame(flat: jax.Array) -> tuple[jax.Array, Graded]:
    """An orthonormal frame and the identity: the product of no steps, but for a rotation.

    The frame is drawn at random (always the same): one that is special to the system, like the unit
    vectors for a triangular one, would need long to turn towards the directions of largest growth.
    """
    drawn = np.random.default_rng(0).normal(size=(flat.size, flat.size))
    frame = jnp.asarray(np.linalg.qr(drawn)[0], flat.dtype)
    return frame, from_rows(jnp.eye(flat.size, dtype=flat.dtype), jnp.zeros(flat.size, jnp.int32))
