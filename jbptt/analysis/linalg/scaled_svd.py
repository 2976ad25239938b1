"""Matrices whose rows differ by any number of orders of magnitude, and their singular values.

A row is held as `rows[i] · 2^exponents[i]`, the largest entry of `rows[i]` in [½, 1): the powers
are integers and scaling by them is exact, so that nothing overflows, underflows or rounds on their
account. A zero row has the exponent `ZERO`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbptt.arrays import one_if_zero

ZERO = -(2**30)
MAX_SWEEPS = 40


class Graded(NamedTuple):
    """The matrix with the rows `rows[i] · 2^exponents[i]`; `[n, n]` and int32 `[n]`."""

    rows: jax.Array
    exponents: jax.Array


def power_of_two(exponent: jax.Array, dtype) -> jax.Array:
    """`2^exponent`, exactly, by its bits; 0 below the normal numbers."""
    kind = jnp.finfo(dtype)
    bits = jnp.clip(exponent + kind.maxexp - 1, 0, 2 * (kind.maxexp - 1))
    return lax.bitcast_convert_type(bits.astype(f"uint{kind.bits}") << kind.nmant, kind.dtype)


def times_power(array: jax.Array, exponent: jax.Array) -> jax.Array:
    """`array · 2^exponent` in two steps: the power alone may be out of range."""
    half = exponent // 2
    return array * power_of_two(half, array.dtype) * power_of_two(exponent - half, array.dtype)


def from_rows(rows: jax.Array, exponents: jax.Array) -> Graded:
    """Scales each row so that its largest entry is in [½, 1)."""
    largest = jnp.max(jnp.abs(rows), axis=-1)
    shift = jnp.frexp(largest)[1]
    exponents = jnp.where(largest == 0, ZERO, exponents + shift)
    return Graded(times_power(rows, -shift[..., None]), exponents)


def rounding(size: int, dtype) -> float:
    """How large the rounding of a sum of `size` terms may be, relative to them: 4·sqrt(size)·ε."""
    return 4 * math.sqrt(size) * float(jnp.finfo(dtype).eps)


def matrix_product(left: jax.Array, right: jax.Array) -> jax.Array:
    """`left @ right` in the full precision of its dtype on every device."""
    return jnp.matmul(left, right, precision=lax.Precision.HIGHEST)


def multiply(left: jax.Array, matrix: Graded) -> Graded:
    """`left @ matrix`: each new row is summed in the units of its largest term."""
    fraction, exponent = jnp.frexp(left)
    level = jnp.where(left == 0, ZERO, exponent + matrix.exponents)
    top = jnp.max(level, axis=1)
    return from_rows(matrix_product(times_power(fraction, level - top[:, None]), matrix.rows), top)


def row_sorted_qr(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`matrix = Q R` by Householder's reflections, accurate by row; R's mere rounding becomes 0.

    That needs the large rows first (Cox & Higham, 1998); R is triangular, Q's rows are in the order
    given.
    """
    heights = jnp.max(jnp.abs(matrix), axis=1)
    places = jnp.argsort(-heights)
    heights = heights[places, None]
    q, r = jnp.linalg.qr(matrix[places])
    widths = jnp.max(jnp.abs(matrix[places]) / one_if_zero(heights), axis=0)
    r = jnp.where(jnp.abs(r) <= rounding(len(matrix), r.dtype) * heights * widths, 0, r)
    return jnp.zeros_like(q).at[places].set(q), r


def pivots(matrix: jax.Array) -> jax.Array:
    """The order of columns in which each has the longest remainder beside those before it."""

    def body(state, _):
        rest, free = state
        squares = jnp.where(free, jnp.sum(rest**2, axis=0), -1)
        best = jnp.argmax(squares)
        direction = rest[:, best] / jnp.sqrt(jnp.where(squares[best] > 0, squares[best], 1))
        rest = rest - direction[:, None] * matrix_product(direction, rest)
        return (rest, free.at[best].set(False)), best

    return lax.scan(body, (matrix, jnp.ones(len(matrix), bool)), length=len(matrix))[1]


def push(jacobian: jax.Array, frame: jax.Array, matrix: Graded) -> tuple[jax.Array, Graded]:
    """One more factor on the left of `P = frame @ matrix`: returns those of `J P`.

        J = B R,   R frame = Q S,   J P = (B Q) (S matrix)

    The frame stays orthonormal, its columns in the order of growth, and all that is large or small
    is in the rows of `matrix`. The first decomposition, with pivots, makes R's rows fall off in
    size: what a singular J loses are rows of R that are only rounding error, and they become exact
    zeros. A J that is not finite makes everything NaN from here on.
    """
    finite = jnp.isfinite(jacobian).all()
    shift = jnp.frexp(jnp.max(jnp.abs(jacobian)))[1]
    jacobian = times_power(jacobian, -shift)
    columns = pivots(jacobian)
    basis, rest = row_sorted_qr(jacobian[:, columns])
    rest = jnp.zeros_like(rest).at[:, columns].set(rest)

    moved = matrix_product(rest, frame)
    lost = jnp.abs(moved) <= rounding(len(frame), frame.dtype) * matrix_product(
        jnp.abs(rest), jnp.abs(frame)
    )
    q, r = row_sorted_qr(jnp.where(lost | (matrix.exponents == ZERO), 0, moved))
    rows, exponents = multiply(r, matrix)
    exponents = jnp.where(exponents == ZERO, ZERO, exponents + shift)
    return matrix_product(basis, q), Graded(jnp.where(finite, rows, jnp.nan), exponents)


def round_robin(num_rows: int) -> np.ndarray:
    """All pairs of an even number of rows, in rounds of disjoint pairs: `[rounds, 2, pairs]`."""
    ring = np.arange(num_rows - 1)
    rounds = []
    for turn in ring:
        seats = np.concatenate([[num_rows - 1], np.roll(ring, turn)])
        rounds.append(np.stack([seats[: num_rows // 2], seats[: num_rows // 2 - 1 : -1]]))
    return np.stack(rounds)


def rotate(matrix: Graded, pairs: jax.Array) -> tuple[Graded, jax.Array]:
    """Rotates each pair of rows until it is orthogonal; returns also the largest cosine before.

    With a = u 2^e the larger and b = v 2^f the smaller row, ρ = 2^(f−e) ≤ 1, and tan the angle's
    tangent:

        η = (u·u − ρ² v·v) / (2 u·v),   τ = tan/ρ = sign(η) / (|η| + sqrt(ρ² + η²)),
        cos = 1 / sqrt(1 + (ρτ)²)
        u ← cos (u + ρ² τ v),           v ← cos (v − τ u)
    """
    first, second = pairs
    swapped = matrix.exponents[first] < matrix.exponents[second]
    first, second = jnp.where(swapped, second, first), jnp.where(swapped, first, second)
    u, v = matrix.rows[first], matrix.rows[second]
    rho = power_of_two(matrix.exponents[second] - matrix.exponents[first], u.dtype)[:, None]
    uu, vv, uv = (jnp.sum(a * b, axis=1, keepdims=True) for a, b in ((u, u), (v, v), (u, v)))

    scale = jnp.sqrt(uu) * jnp.sqrt(vv)
    cosine = jnp.abs(uv) / one_if_zero(scale)
    orthogonal = cosine <= jnp.finfo(u.dtype).eps
    eta = (uu - rho**2 * vv) / (2 * jnp.where(orthogonal, 1, uv))
    tau = jnp.where(eta < 0, -1, 1) / (jnp.abs(eta) + jnp.sqrt(rho**2 + eta**2))
    tau = jnp.where(orthogonal, 0, tau)
    cos = 1 / jnp.sqrt(1 + (rho * tau) ** 2)
    after = cos * (v - tau * u)
    left, before = (jnp.max(jnp.abs(a), axis=1, keepdims=True) for a in (after, v))
    after = jnp.where(left <= rounding(len(matrix.rows), u.dtype) * before, 0, after)

    top = from_rows(cos * (u + rho**2 * tau * v), matrix.exponents[first])
    bottom = from_rows(after, matrix.exponents[second])
    for index, part in ((first, top), (second, bottom)):
        matrix = jax.tree.map(lambda whole, new, i=index: whole.at[i].set(new), matrix, part)
    return matrix, jnp.max(cosine)


def log_singular_values(matrix: Graded) -> jax.Array:
    """Natural logarithms `[n]`, descending, −inf for 0: one-sided Jacobi (Hestenes, 1958).

    As accurate for the smallest as for the largest singular value: the relative error depends on
    how near the scaled `rows` are to dependence, not on the exponents (Demmel & Veselić, 1992).
    """
    size = len(matrix.rows)
    if size % 2:
        matrix = Graded(jnp.pad(matrix.rows, ((0, 1), (0, 0))), jnp.append(matrix.exponents, ZERO))
    rounds = jnp.asarray(round_robin(len(matrix.rows)))
    tolerance = math.sqrt(size) * float(jnp.finfo(matrix.rows.dtype).eps)

    def unfinished(state):
        _, cosine, sweep = state
        return (cosine > tolerance) & (sweep < MAX_SWEEPS)

    def sweep_once(state):
        matrix, cosines = lax.scan(rotate, state[0], rounds)
        return matrix, jnp.max(cosines), state[2] + 1

    matrix, _, _ = lax.while_loop(
        unfinished, sweep_once, (matrix, jnp.asarray(1.0, matrix.rows.dtype), 0)
    )
    lengths = jnp.sqrt(jnp.sum(matrix.rows**2, axis=1))
    logs = matrix.exponents.astype(lengths.dtype) * math.log(2) + jnp.log(lengths)
    return -jnp.sort(-logs)[:size]
