"""Checks for steps and estimators of your own. Each raises an AssertionError that says what it saw.

Run them in float64 (`jax_enable_x64`) on small problems: time and memory grow with T².
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy import stats
from jax.tree_util import keystr, tree_leaves_with_path

from jbptt import validation
from jbptt.arrays import one_if_zero, real_vector
from jbptt.brute_force import brute_force_gradient as brute_force_gradient
from jbptt.brute_force import frozen_loss as frozen_loss
from jbptt.norms import norm
from jbptt.probes import assert_coverage as assert_coverage
from jbptt.probes import declared_coverage
from jbptt.probes import measured_coverage as measured_coverage
from jbptt.types import Batch, Carry, Estimator, Loss, Params, Step


def _sizes(params: Params) -> Params:
    """The unit of every entry: its own size; of a zero the leaf's root mean square, or 1."""

    def one(leaf):
        size, mean = jnp.abs(leaf), norm(leaf) / math.sqrt(max(1, jnp.size(leaf)))
        mean = one_if_zero(mean).astype(size.dtype)
        return jnp.where(size == 0, mean, jnp.maximum(size, 1e-3 * mean))

    return jax.tree.map(one, params)


def _direction(key: chex.PRNGKey, params: Params) -> Params:
    """A random direction, of unit length in the units of `_sizes`.

    One width of a difference then serves all entries.
    """
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        jax.random.normal(k, jnp.shape(a), jnp.result_type(a))
        for k, a in zip(keys, leaves, strict=True)
    ]
    length = norm(drawn)
    drawn = structure.unflatten([a / length.astype(jnp.finfo(a.dtype).dtype) for a in drawn])
    return jax.tree.map(jnp.multiply, _sizes(params), drawn)


def _dot(gradient: Params, direction: Params) -> jax.Array:
    """The slope along a direction: `Re Σ g·d`, unconjugated, as JAX defines complex gradients."""
    products = jax.tree.map(lambda g, d: jnp.sum(jnp.real(g * d)), gradient, direction)
    return sum(jax.tree.leaves(products), jnp.zeros(()))


def _precision(params: Params) -> float:
    return max(
        (float(jnp.finfo(jnp.result_type(a)).eps) for a in jax.tree.leaves(params)), default=1.0
    )


def check_truncated_gradient(
    estimator: Estimator,
    step: Step,
    loss: Loss,
    params: Params,
    carry: Carry,
    batch: Batch,
    *,
    coverage: Any = None,
    key: chex.PRNGKey | None = None,
    num_directions: int = 4,
    rtol: float | None = None,
) -> None:
    """Holds a first update against central differences of `frozen_loss`, along random directions.

    Each entry moves in units of its own size (a zero in that of its leaf), so parameters of any
    size may stand side by side, a time constant of 1000 beside weights. Complex parameters are
    checked as JAX defines their gradient, `dL = Re Σ g·dw`.

    Args:
      estimator: any whose coverage is made of cuts.
      step, loss, params, carry, batch: as in `frozen_loss`.
      coverage: as there; None: what the estimator declares.
      key: for the directions and the estimator; None: `jax.random.key(0)`.
      num_directions: how many; an error e of the gradient shows as about ‖e‖ / √P along each, P the
        number of parameters, and is caught from `rtol · ‖gradient‖` on, both in those units.
      rtol: of the largest slope possible, ‖gradient‖; None: 2·10³ ε^{2/3} (7e-8 in float64).

    Raises:
      AssertionError: a slope differs, or is not finite.
      ValueError: coverage=None and an estimator that declares none; what `frozen_loss` raises.
    """
    key = jax.random.key(0) if key is None else key
    if coverage is None:
        coverage = declared_coverage(estimator, validation.count_steps(batch._asdict()), key)
    function = jax.jit(frozen_loss(step, loss, params, carry, batch, coverage=coverage))
    grads = estimator.update(params, estimator.init(params, carry, batch, key=key), batch)[0].grads
    width = _precision(params) ** (1 / 3)
    allowed = 2e3 * width**2 if rtol is None else rtol
    size = float(norm(jax.tree.map(jnp.multiply, grads, _sizes(params))))
    for i, one in enumerate(jax.random.split(key, num_directions)):
        direction = _direction(one, params)

        ahead, behind = (
            function(jax.tree.map(lambda p, d, h=distance: p + h * d, params, direction))
            for distance in (width, -width)
        )
        measured, claimed = float((ahead - behind) / (2 * width)), float(_dot(grads, direction))
        if not np.all(np.isfinite([measured, claimed, size])):
            raise AssertionError(
                "nothing can be said of numbers that are not finite: the estimated gradient has "
                f"norm {size:.6g}, along random direction {i} it claims a slope of {claimed:.6g}, "
                f"differences measure {measured:.6g}; scale the loss down, or see find_nonfinite"
            )
        if not abs(measured - claimed) <= allowed * max(size, abs(measured)):
            raise AssertionError(
                "the estimated gradient is not that of the truncated function: along random "
                f"direction {i} it claims a slope of {claimed:.12g}, central differences with the "
                f"carries at the cuts frozen measure {measured:.12g} (allowed: {allowed:.2g} of "
                f"{max(size, abs(measured)):.6g})"
            )


def taylor_slope(
    function: Callable[[Params], jax.Array],
    params: Params,
    gradient: Params | None = None,
    *,
    key: chex.PRNGKey | None = None,
) -> float:
    """The order of the first Taylor remainder: 2.00 ± 0.05 if the gradient is right, 1 if wrong.

        |f(w + h·d) − f(w) − h·Re Σ g·d| = O(h²)

    with d random, of unit length in units of the entries' sizes.

    Args:
      function: of the parameters, scalar and twice differentiable near them; `frozen_loss` for
        truncation.
      params: where.
      gradient: g; None: `jax.grad(function)`.
      key: for the direction; None: `jax.random.key(0)`.

    Returns:
      The slope of log remainder against log h over h from 1e-4 to 1e-2 (float64; float32: from 1e-2
      to 1e-1, and rounding blurs it); inf where the function is linear along the direction.
    """
    gradient = jax.grad(function)(params) if gradient is None else gradient
    direction = _direction(jax.random.key(0) if key is None else key, params)
    wide = _precision(params) < 1e-10
    widths = np.geomspace(*((1e-4, 1e-2) if wide else (1e-2, 1e-1)), 9)
    here, claimed = function(params), _dot(gradient, direction)

    def remainder(width):
        there = function(
            jax.tree.map(lambda p, d: p + width.astype(p.dtype) * d, params, direction)
        )
        return jnp.abs(there - here - width * claimed)

    remainders = np.asarray(lax.map(remainder, jnp.asarray(widths, here.dtype)))
    if np.all(
        remainders
        <= 8 * float(jnp.finfo(here.dtype).eps) * max(abs(float(here)), abs(float(claimed)))
    ):
        return float("inf")
    return float(np.polyfit(np.log(widths), np.log(np.maximum(remainders, 1e-300)), 1)[0])


class Unbiasedness(NamedTuple):
    """What `assert_unbiased` measured.

    Attributes:
      largest_z: the largest deviation of a mean from the exact gradient, in standard errors.
      threshold: what it may reach; chance exceeds it with probability `false_alarm` at most.
      relative_bias: ‖mean − exact‖ / ‖exact‖.
      detectable: threshold · the largest standard error / the largest |exact| entry: a smaller bias
        in a single parameter can go unseen; more samples see more.
    """

    largest_z: float
    threshold: float
    relative_bias: float
    detectable: float


def assert_unbiased(
    estimator: Estimator,
    params: Params,
    carry: Carry,
    batch: Batch,
    *,
    exact: Params,
    key: chex.PRNGKey,
    num_samples: int = 4096,
    false_alarm: float = 1e-9,
) -> Unbiasedness:
    """Holds the mean of many first updates, each with a key of its own, against the exact gradient.

    For each of the P parameters (a complex one counts as two, its real and its imaginary part),
    `z = (mean − exact) / (s / √n)` is nearly standard normal if the
    estimator is unbiased and its variance finite. The test fails where |z| exceeds the quantile of
    `false_alarm / (2 P)` (Bonferroni): a right estimator fails with probability `false_alarm` at
    most, as far as n is large enough for the normal law; with the seed fixed it always does the
    same. It sees biases above `detectable` only: look at it.

    Args:
      estimator: draws from its key.
      params, carry, batch: what its init and update take.
      exact: the gradient of the weighted mean loss, `full_bptt`'s or `brute_force_gradient`.
      key: split into num_samples.
      num_samples: n; time and memory O(n) updates, 64 side by side.
      false_alarm: for the whole gradient.

    Raises:
      AssertionError: names the leaf, its mean, the exact value and z.
    """
    exact_flat, _ = real_vector(exact)

    def deviation(one):
        estimate, _ = estimator.update(params, estimator.init(params, carry, batch, key=one), batch)
        return real_vector(estimate.grads)[0] - exact_flat

    deviations = np.asarray(lax.map(deviation, jax.random.split(key, num_samples), batch_size=64))
    mean, spread = deviations.mean(0), deviations.std(0, ddof=1) / np.sqrt(num_samples)
    size = float(np.max(np.abs(exact_flat), initial=0))
    # Where nothing varies, rounding is left.
    rounding = 32 * float(jnp.finfo(exact_flat.dtype).eps) * size
    z = np.abs(mean) / np.maximum(np.hypot(spread, rounding), np.finfo(float).tiny)
    threshold = -float(stats.norm.ppf(false_alarm / (2 * max(1, mean.size))))
    if not np.all(z <= threshold):
        worst = int(np.nanargmax(np.where(np.isnan(z), np.inf, z)))
        raise AssertionError(
            f"biased: the mean of {num_samples} estimates of {_name_entry(exact, worst)} is "
            f"{float(exact_flat[worst]) + mean[worst]:.6g}, the exact gradient "
            f"{float(exact_flat[worst]):.6g}: {z[worst]:.1f} standard errors apart (allowed: "
            f"{threshold:.1f}, which chance exceeds once in {1 / false_alarm:.0e} runs)"
        )
    length = float(norm(exact_flat))
    bias = float(norm(mean)) / length if length else float(norm(mean) > 0)
    detectable = threshold * float(spread.max(initial=0)) / size if size else float("inf")
    return Unbiasedness(float(z.max(initial=0)), threshold, bias, detectable)


def _name_entry(tree: Params, position: int) -> str:
    """The leaf and index of an entry of the tree's `real_vector`."""
    for path, leaf in tree_leaves_with_path(tree):
        for part in (
            ("the real part of ", "the imaginary part of ") if np.iscomplexobj(leaf) else ("",)
        ):
            if position < np.size(leaf):
                index = list(map(int, np.unravel_index(position, np.shape(leaf))))
                return f"{part}params{keystr(path)}{index}"
            position -= np.size(leaf)
    raise IndexError(position)
