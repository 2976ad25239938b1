"""Powers of a matrix: what they do to its eigenvalues, and to which direction they turn a vector.

The two exercises of the chapter on backpropagation through time in "Dive into Deep Learning"
(Zhang, Lipton, Li & Smola, 2023, section 9.7). With M v_i = λ_i v_i, |λ_1| ≥ |λ_2| ≥ …, left
eigenvectors w_iᵀ M = λ_i w_iᵀ and w_iᵀ v_i = 1:

    M^k v_i = λ_i^k v_i,     M^k x = Σ_i λ_i^k (w_iᵀ x) v_i
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from jbptt import slips, validation
from jbptt.analysis.linalg.dominant_eigenvector import CASES, classify, decompose
from jbptt.arrays import one_if_zero, widened_dtype
from jbptt.norms import max_or_nan, norm, normalised, unit


class Alignment(NamedTuple):
    """How near M^j x is to the dominant eigenvector v₁, j = 0 … k.

    Attributes:
      cosine: |cos| of the angle between M^j x and v₁, `[k+1]`; NaN once M^j x is 0.
      misalignment: the sine of that angle, `[k+1]`, accurate down to rounding.
      rate: measured slope of ln misalignment, a scalar, natural logarithm per step, over the later
        3/5 of the steps that come before rounding; NaN where that leaves fewer than two.
      predicted_rate: ln |λ₂/λ₁|, a scalar; −∞ where λ₂ is 0 or missing, 0 where all eigenvalues are
        0.
      case_index: into `CASES`; −1 where M or x is not finite or x is 0 (under a transformation;
        else an error).
    """

    cosine: jax.Array
    misalignment: jax.Array
    rate: jax.Array
    predicted_rate: jax.Array
    case_index: jax.Array

    @property
    def case(self) -> str:
        """The word of `CASES`, or "undefined". Only outside of jit and vmap."""
        index = int(self.case_index)
        return CASES[index] if index >= 0 else "undefined"

    def __str__(self) -> str:
        if np.ndim(self.case_index):
            return repr(self)
        return _sentence(self)


def eigenvalues(matrix: Any, k: int, *, symmetric: bool | None = None) -> jax.Array:
    """The eigenvalues of M^k, which are those of M to the power of k: λ_i^k, in descending |λ_i|.

    M^k itself is never formed: its small eigenvalues would drown in the rounding of the large ones.
    Real and imaginary parts that overflow become ±inf, those that are 0 stay 0. O(n³); the general
    case runs on CPU.

    Args:
      matrix: M, real `[n, n]`.
      k: the power, a static integer ≥ 0.
      symmetric: whether M equals its transpose; None: compare them; under jit or vmap, M is taken
        as general.

    Returns:
      `[n]`, real if symmetric, else complex.

    Raises:
      ValueError: M not square, not real or not finite; k < 0 or not an integer; `symmetric=True`
        though M is not.

    >>> eigenvalues(jnp.diag(jnp.array([1.0, -2.0])), 3)
    Array([-8.,  1.], dtype=float32)
    """
    matrix, symmetric = _check_matrix(matrix, symmetric)
    return _eigenvalues(matrix, validation.check_positive_integer("k", k, smallest=0), symmetric)


@partial(jax.jit, static_argnums=(1, 2))
def _eigenvalues(matrix: jax.Array, k: int, symmetric: bool) -> jax.Array:
    values = jnp.linalg.eigvalsh(matrix) if symmetric else jnp.linalg.eigvals(matrix)
    values = values[jnp.argsort(jnp.abs(values), descending=True)]
    if symmetric:
        return lax.integer_pow(values, k)
    size = jnp.abs(values)
    turned, size = lax.integer_pow(values / one_if_zero(size), k), lax.integer_pow(size, k)
    # 0·inf is not to be NaN.
    parts = (jnp.where(part == 0, 0, size * part) for part in (turned.real, turned.imag))
    return lax.complex(*parts)


def alignment(matrix: Any, x: Any, k: int, *, symmetric: bool | None = None) -> Alignment:
    """How M^j x, j = 0 … k, turns to the dominant eigenvector v₁; how fast it should, if at all.

        sin ∠(M^j x, v₁) ∝ |λ₂/λ₁|^j

    if |λ₁| > |λ₂| and x has a component on v₁, w₁ᵀ x ≠ 0. Otherwise `case` says why not. All
    comparisons allow for rounding, `20·sqrt(n)·ε·|w_i|ᵀ|M||v_i|` for λ_i: a case means that, to
    rounding, M is such a matrix.

    - "tie": |λ₁| = |λ₂| (also λ₁ = −λ₂): two directions can keep their shares.
    - "complex pair": the dominant eigenvalues are conjugates, defective or not: M^j x keeps
      turning; v₁ is complex.
    - "orthogonal start": w₁ᵀ x = 0, with the left eigenvector: x lies in the space of the other
      eigenvectors. M^j x stays there until rounding lets v₁ in.
    - "defective": a dominant eigenvalue has fewer eigenvectors than its multiplicity: v₁ is its
      eigenvector, and the angle falls like 1/j only, if at all (of several such eigenvalues:
      "tie"). Powers of an M that is defective only to rounding do so at first.

    The vector is scaled to norm 1 at every step, so that nothing overflows. O(n³ + k n²); memory
    O(k + n²). Works under jit and vmap; the general case runs on CPU.

    Args:
      matrix: M, real `[n, n]`.
      x: where to start, real `[n]`, not 0.
      k: the number of steps, a static integer ≥ 0.
      symmetric: whether M equals its transpose; None: compare them; under jit or vmap, M is taken
        as general.

    Returns:
      An `Alignment`; `print` it for a sentence.

    Raises:
      ValueError: M not square, not real or not finite; x of another shape, not real, not finite or
        0; k < 0 or not an integer; `symmetric=True` though M is not.

    >>> found = alignment(jnp.diag(jnp.array([1.0, 0.5])), jnp.ones(2), 10)
    >>> print(*str(found).split(". "), sep="\\n")
    M^k x aligns with v₁: ln sine changes by -0.693 per step, ln |λ₂/λ₁| = -0.693
    Sine of the angle: 0.707 at k = 0, 0.000977 at k = 10.
    """
    matrix, symmetric = _check_matrix(matrix, symmetric)
    x = _check_start(x, len(matrix)).astype(matrix.dtype)
    return _align(matrix, x, validation.check_positive_integer("k", k, smallest=0), symmetric)


@partial(jax.jit, static_argnums=(2, 3))
def _align(matrix: jax.Array, x: jax.Array, k: int, symmetric: bool) -> Alignment:
    largest, start = max_or_nan(jnp.abs(matrix)), normalised(x)
    matrix = unit(matrix, largest)  # the eigenvectors stay, and so do the ratios of the eigenvalues
    spectrum = decompose(matrix, symmetric)
    ratio, eps = _ratio(spectrum.values), float(jnp.finfo(matrix.dtype).eps)
    dominant, case = classify(matrix, spectrum, start, eps)
    direction = spectrum.right[:, dominant]

    def step(y, _):
        return normalised(matrix @ y), _angle(y, direction)

    _, (cosine, sine) = lax.scan(step, start, None, length=k + 1)
    # Rounding turns M^j x and v₁ by ε / (1 − |λ₂/λ₁|); sines a thousand times that have three
    # digits.
    floor = 1000 * len(matrix) * eps / (spectrum.sharpness[dominant] * jnp.maximum(1 - ratio, eps))
    finite = jnp.isfinite(largest) & jnp.isfinite(x).all() & jnp.any(x != 0)
    slope = _slope(sine, jnp.minimum(floor, 0.01))
    return Alignment(cosine, sine, slope, jnp.log(ratio), jnp.where(finite, case, -1))


def _check_matrix(matrix: Any, symmetric: bool | None) -> tuple[jax.Array, bool]:
    """M as a floating-point array and whether to treat it as symmetric."""
    shape = np.shape(matrix)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] < 1:
        raise ValueError(
            f"matrix must be square, [n, n], got shape {shape}; pass one matrix, and vmap for "
            "several"
        )
    matrix = _check_real("matrix", matrix)
    if isinstance(matrix, Tracer):
        return matrix, bool(symmetric)
    values = np.asarray(matrix)
    found = np.array_equal(values, values.T)
    if symmetric and not found:
        raise ValueError(
            "symmetric=True, but matrix differs from its transpose by up to "
            f"{np.max(np.abs(values - values.T)):.3g}; pass (matrix + matrix.T) / 2, or leave "
            "symmetric out"
        )
    return matrix, found if symmetric is None else symmetric


def _check_real(name: str, value: Any) -> jax.Array:
    """`value` as a real array, float32 at least, finite unless it is traced."""
    value = value if hasattr(value, "dtype") else np.asarray(value)
    slips.warn_of_float64({name: value})
    dtype = jax.dtypes.result_type(value)
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise ValueError(f"{name} must be real, got {dtype}; pass floating-point numbers")
    kind = widened_dtype(dtype) if jnp.issubdtype(dtype, jnp.floating) else float
    array = jnp.asarray(value, jax.dtypes.canonicalize_dtype(kind))
    if not isinstance(array, Tracer) and not np.all(np.isfinite(array)):
        raise ValueError(
            f"{name} must be finite, got NaN or infinity in it; see find_nonfinite for where it "
            "began"
        )
    return array


def _check_start(x: Any, size: int) -> jax.Array:
    if np.shape(x) != (size,):
        raise ValueError(
            f"x must have shape ({size},), one number per column of matrix, got {np.shape(x)}; "
            "pass [n]"
        )
    x = _check_real("x", x)
    if not isinstance(x, Tracer) and not np.any(x):
        raise ValueError(
            "x must not be 0, which has no direction; pass a vector with a number other than 0"
        )
    return x


def _ratio(values: jax.Array) -> jax.Array:
    """|λ₂/λ₁|; 0 for n = 1, 1 where both are 0."""
    size = jnp.abs(values)
    if len(size) == 1:
        return jnp.zeros_like(size[0])
    return jnp.where(size[0] == 0, 1, size[1] / one_if_zero(size[0]))


def _angle(y: jax.Array, direction: jax.Array) -> tuple[jax.Array, jax.Array]:
    """|cos| and sine of the angle between unit vectors, without cancellation; NaN if y is 0."""
    along = jnp.vdot(direction, y)
    sine = norm(y - direction * along)
    gone = jnp.all(y == 0)
    return jnp.where(gone, jnp.nan, jnp.abs(along)), jnp.where(gone, jnp.nan, sine)


def _slope(sine: jax.Array, floor: jax.Array) -> jax.Array:
    """Least-squares slope of ln sine per step, of the steps above the floor, less the first 2/5.

    Those still hold eigenvectors that die out faster than the second. The weights fall off to both
    ends, which averages out the turning of a complex λ₂, down to a percent or so in fifty steps.
    """
    step = jnp.arange(len(sine))
    above = sine > floor
    end = jnp.where(jnp.all(above), len(sine), jnp.argmin(above))
    start = jnp.maximum(jnp.minimum(2 * end // 5, end - 3), 0)
    kept = (step >= start) & (step < end)
    place = (step - start + 1) / (end - start + 1)
    weight = jnp.where(kept, place * (1 - place), 0)
    share = weight / jnp.maximum(jnp.sum(weight), jnp.finfo(sine.dtype).tiny)
    log = jnp.log(jnp.where(kept, sine, 1))
    offset = step - jnp.sum(share * step)
    spread = jnp.sum(share * offset**2)
    slope = jnp.sum(share * offset * log) / one_if_zero(spread)
    return jnp.where(end < 2, jnp.nan, slope).astype(sine.dtype)


def _sentence(found: Alignment) -> str:
    """What happens, from the numbers."""
    sine = np.asarray(found.misalignment)
    last, there = len(sine) - 1, np.flatnonzero(np.isfinite(sine))
    rate, predicted = float(found.rate), f"ln |λ₂/λ₁| = {float(found.predicted_rate):.3g}"
    if found.case == "aligns":
        measured = (
            f"changes by {rate:.3g} per step"
            if math.isfinite(rate)
            else "has too few values to fit"
        )
        verdict = f"M^k x aligns with v₁: ln sine {measured}, {predicted}"
    else:
        verdict = {
            "tie": (
                "M^k x need not align with v₁: |λ₁| = |λ₂| to rounding, so that two directions can "
                "keep shares"
            ),
            "complex pair": (
                "M^k x keeps turning and aligns with nothing: the eigenvalues that lead are a "
                "complex pair"
            ),
            "orthogonal start": (
                "M^k x does not align with v₁: x has no component on it to rounding, w₁ᵀ x = 0, "
                f"until that brings one in (after that, {predicted})"
            ),
            "defective": (
                "M^k x aligns with v₁ like 1/k at best, like powers with a λ₁ that has too few "
                "eigenvectors, from which this λ₁ cannot be told to rounding"
            ),
            "undefined": "M or x is not finite, or x is 0",
        }[found.case]
    if len(there) == 0:
        return f"{verdict}."
    end = there[-1]
    gone = f"; M^k x is 0 from k = {end + 1} on" if end < last else ""
    return (
        f"{verdict}. Sine of the angle: {sine[0]:.3g} at k = 0, {sine[end]:.3g} at k = {end}{gone}."
    )
