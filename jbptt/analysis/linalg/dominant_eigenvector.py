"""Which eigenvectors decide where a matrix's powers turn a vector, as far as rounding tells.

With M v_i = λ_i v_i, |λ_1| ≥ |λ_2| ≥ …, left eigenvectors w_iᵀ M = λ_i w_iᵀ and w_iᵀ v_i = 1.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jbptt.arrays import one_if_zero
from jbptt.norms import norm, normalised

CASES = ("aligns", "tie", "complex pair", "orthogonal start", "defective")
"""What `Alignment.case` may say."""


class Spectrum(NamedTuple):
    """λ_i by descending size, v_i of norm 1 (columns), w_i (rows); `1 / ‖w_i‖`: λ_i's sharpness."""

    values: jax.Array
    right: jax.Array
    left: jax.Array
    sharpness: jax.Array


def decompose(matrix: jax.Array, symmetric: bool) -> Spectrum:
    """Eigenvalues and eigenvectors; of a defective M the left ones are inf or as good as."""
    values, vectors = jnp.linalg.eigh(matrix) if symmetric else jnp.linalg.eig(matrix)
    order = jnp.argsort(jnp.abs(values), descending=True)
    values, vectors = values[order], vectors[:, order]
    left = vectors.T if symmetric else jnp.linalg.inv(vectors)
    sharpness = 1 / norm(left, 1)
    return Spectrum(values, vectors, left, jnp.where(jnp.isnan(sharpness), 0, sharpness))


class Lead(NamedTuple):
    """Which eigenvalues decide, whether they are defective, and how near the nearest is, `[n]`."""

    leaders: jax.Array
    defective: jax.Array
    nearest: jax.Array


def doubts_of(matrix: jax.Array, spectrum: Spectrum, rounding: float) -> jax.Array:
    """How far rounding may move each eigenvalue, to first order: `rounding · |w_i|ᵀ |M| |v_i|`."""
    reached = jnp.abs(matrix) @ jnp.abs(spectrum.right)
    doubts = rounding * jnp.sum(jnp.abs(spectrum.left).T * reached, axis=0)
    return jnp.where(jnp.isnan(doubts), jnp.inf, doubts)


def lead(spectrum: Spectrum, doubts: jax.Array, rounding: float, cap: jax.Array) -> Lead:
    """The dominant eigenvalues; of these the defective alone, if any, which outgrow the others.

    A defective eigenvalue splits by as much as it is in doubt, into near-parallel eigenvectors, so
    that its sharpness is small; an eigenvalue with as many eigenvectors as it needs is sharp.
    """
    values, size = spectrum.values, jnp.abs(spectrum.values)
    apart = jnp.where(jnp.eye(len(values), dtype=bool), jnp.inf, jnp.abs(values - values[:, None]))
    nearest = jnp.min(apart, axis=1)
    capped = jnp.minimum(doubts, cap)  # of a smaller defective one nothing is known
    dominant = size >= size[0] - capped - capped[0]
    split = dominant & (nearest <= doubts) & (spectrum.sharpness <= rounding ** (1 / 3))
    defective = jnp.any(split)
    return Lead(jnp.where(defective, split, dominant), defective, nearest)


def classify(
    matrix: jax.Array, spectrum: Spectrum, start: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Which eigenvector is v₁, and the index into `CASES`; `start` has norm 1."""
    values, size = spectrum.values, len(matrix)
    rounding, scale = 20 * math.sqrt(size) * eps, norm(matrix)
    doubts, cap = doubts_of(matrix, spectrum, rounding), math.sqrt(rounding) * scale
    leaders, defective, nearest = lead(spectrum, doubts, rounding, cap)
    dominant = jnp.where(defective, jnp.argmin(jnp.where(leaders, spectrum.sharpness, jnp.inf)), 0)

    # A real defective eigenvalue may split into complex ones, which are then as far from each
    # other.
    real = jnp.abs(values.imag) <= jnp.minimum(doubts, jnp.maximum(2 * nearest, cap))
    # None moves further (Elsner, 1985).
    reach = jnp.minimum(doubts, 2 * scale * rounding ** (1 / size))
    distinct = jnp.abs(values - values[:, None]) > reach + reach[:, None]
    several = jnp.any(distinct & leaders & leaders[:, None])

    gap = nearest[0] / one_if_zero(jnp.abs(values[0])) * spectrum.sharpness[0]
    # Of w₁ itself, which may be huge: its part along x as a share of its norm.
    component = jnp.abs(jnp.sum(normalised(spectrum.left[0]) * start))
    found = {
        "complex pair": ~jnp.any(leaders & real),
        "defective": defective & ~several,
        "tie": jnp.sum(leaders) > 1,
        "orthogonal start": component <= rounding / jnp.maximum(gap, math.sqrt(eps)),
    }
    cases = [jnp.full((), CASES.index(case)) for case in found]
    return dominant, jnp.select([*found.values()], cases, CASES.index("aligns"))
