"""How fast adjoints grow or shrink on the way back, whatever the loss; the loss's curvature."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from jbptt.analysis.lags import Linearised
from jbptt.arrays import align_leading, one_if_zero, split_inexact, weighted_mean
from jbptt.norms import inner, max_or_nan, norm, normalised, unit
from jbptt.problem import Problem
from jbptt.segments import back_through


class Exponent(NamedTuple):
    """The leading Lyapunov exponent of a batch, in nats per step; scalars.

    Attributes:
      exponent: the mean over examples; −∞ where no step of any example lets the state through, NaN
        where no example's derivatives are finite.
      spread: the standard deviation over examples.
      error: how uncertain the mean is: the largest of the standard error from up to 8 stretches of
        time, half of what the two halves of the time differ by, and what two starts differ by.
      num_wiped: steps of an example across which nothing of the state is left (a reset); they do
        not count.
    """

    exponent: jax.Array
    spread: jax.Array
    error: jax.Array
    num_wiped: jax.Array


def leading_exponent(linearised: Linearised, counted: list[bool]) -> Exponent:
    """How fast an adjoint grows on the way back, whatever the loss.

        v ← J_tᵀ v / ‖J_tᵀ v‖ for t = T−1 … 0, twice;   λ₁ = mean over t of ln ‖J_tᵀ v‖

    Two random vectors go back per example. The first time they turn into the leading direction,
    the second time, from where they then are, they are measured: over all steps that count, so that
    λ₁ times their number is a change over the whole sequence. A vector is normalised at every step,
    so it neither overflows nor underflows. Masked steps do not count. Where a step wipes the state
    out, a random vector starts anew. Two backward passes of two vectors, without weight gradients.

    Args:
      linearised: the steps.
      counted: which leaves of the carry count; what flows back through others is left out.
    """
    problem = linearised.problem
    inputs = linearised.passed.carries, problem.inputs
    ndim, num_steps = len(problem.batch_shape), problem.num_steps
    leaves = split_inexact(problem.carry)[0]
    if not any(counted):
        unknown = jnp.full((), jnp.nan)
        return Exponent(unknown, unknown, unknown, jnp.zeros((), int))
    fresh = [_chosen(_random_unit(leaves, ndim, seed), counted) for seed in (0, 1)]

    def back(vectors, at_t):
        carry_t, inputs_t = at_t
        leaves, rebuild = split_inexact(carry_t)

        def run(leaves):
            after = problem.parts.core(problem.params, rebuild(leaves), inputs_t)[0]
            return split_inexact(after)[0]

        pull = jax.vjp(run, leaves)[1]
        # One after the other: not every derivative can be vmapped.
        both = zip(vectors, fresh, strict=True)
        pairs = [anew(_chosen(pull(vector)[0], counted), start) for vector, start in both]
        return [vector for vector, _ in pairs], jnp.stack([growth for _, growth in pairs])

    def anew(pulled, start):
        """A vector of norm 1, and how much it had grown; another one where nothing is left."""
        growth = norm(pulled, ndim)
        vector = [
            jnp.where(align_leading(growth == 0, v.ndim), new, unit(v, growth)).astype(v.dtype)
            for v, new in zip(pulled, start, strict=True)
        ]
        return vector, growth

    def once(vectors, _):
        return lax.scan(back, vectors, inputs, reverse=True)

    growths = lax.scan(once, fresh, length=2)[1][1]  # [T, 2, *batch], of the second time
    growths = jnp.moveaxis(growths, 1, 0)
    mask = jnp.ones(num_steps, bool) if problem.batch.mask is None else problem.batch.mask
    real = jnp.broadcast_to(align_leading(jnp.asarray(mask), 1 + ndim), growths.shape[1:])
    return _read_exponent(growths, real)


def _chosen(cotangents: list, counted: list[bool]) -> list:
    """Zeros for the leaves that do not count."""
    pairs = zip(cotangents, counted, strict=True)
    return [leaf if counts else jnp.zeros_like(leaf) for leaf, counts in pairs]


def _random_unit(leaves: list, ndim: int, seed: int) -> list:
    """A random vector of norm 1, the same for each example; leaves like these."""
    random = np.random.default_rng(seed)
    drawn = [random.normal(size=leaf.shape[ndim:]) for leaf in leaves]
    length = math.sqrt(sum(float(np.sum(d**2)) for d in drawn)) or 1.0
    return [
        jnp.zeros_like(leaf) + (d / length).astype(leaf.dtype)
        for d, leaf in zip(drawn, leaves, strict=True)
    ]


def _read_exponent(growths: jax.Array, real: jax.Array) -> Exponent:
    """From the growth of two vectors at each step, `[2, T, *batch]`, of which `real` ones count."""
    num_steps = growths.shape[1]
    wiped = real & (growths == 0)
    counted = real & (growths != 0)
    logs = jnp.where(counted, jnp.log(jnp.where(counted, growths, 1)), 0)
    number = counted.astype(logs.dtype)

    def mean_of(logs, number):
        """The mean over examples of those over time."""
        by_example = jnp.sum(logs, 0) / one_if_zero(jnp.sum(number, 0))
        valid = (jnp.sum(number, 0) > 0) & ~jnp.isnan(by_example)
        mean = jnp.mean(by_example, where=valid)
        return mean, jnp.sqrt(jnp.mean((by_example - mean) ** 2, where=valid))

    both, spreads = jax.vmap(mean_of)(logs, number)
    nothing_left = jnp.any(wiped) & ~jnp.any(counted)
    mean = jnp.where(nothing_left, -jnp.inf, jnp.mean(both))
    spread = jnp.where(nothing_left, 0, jnp.mean(spreads))

    def error_of(num_batches):
        """The standard error of the mean, from as many stretches of time (Schmeiser, 1982)."""
        of = jnp.arange(num_steps) * num_batches // num_steps
        finite = jnp.where(jnp.isnan(logs), 0, logs)
        sums, numbers = (
            jax.ops.segment_sum(jnp.sum(a, (0, *range(2, a.ndim))), of, num_batches)
            for a in (finite, number)
        )
        total = one_if_zero(jnp.sum(numbers))
        deviations = (sums - numbers * jnp.sum(sums) / total) / total
        return norm(deviations) * math.sqrt(num_batches / max(num_batches - 1, 1))

    errors = jnp.stack(
        [error_of(min(8, num_steps)), error_of(min(2, num_steps)), jnp.abs(both[0] - both[1])]
    )
    error = jnp.where(nothing_left, 0, max_or_nan(errors))
    return Exponent(mean, spread, error, jnp.sum(wiped[0]))


def curvature_along(
    gradient: jax.Array, gradient_fn: Callable[[jax.Array], jax.Array], params: jax.Array
) -> jax.Array:
    """The second derivative of the loss along the way down its gradient; 0 where that is 0.

    `vᵀ H v` for the unit vector v along which the loss falls fastest: that of the gradient, and for
    complex parameters its conjugate, since `df = Re Σ g dw`. The largest curvature may be larger.
    Forward over reverse: one derivative of `gradient_fn`, about three gradients. All are flat
    vectors.
    """
    along = jnp.conj(normalised(gradient))
    change = jax.jvp(gradient_fn, (params,), (along.astype(params.dtype),))[1]
    return inner(jnp.conj(along), change)


def own_path(linearised: Linearised, counted: list[bool]) -> jax.Array:
    """How much of a step's Jacobian J lies on its diagonal, a scalar between 0 and 1.

        max over leaves that count of   Σ_i (mean of J_ii)² / Σ_ij mean of J_ij²

    Near 1 where each unit keeps itself (a gate, a leak, an integrator), near 1/n where a matrix
    mixes n of them, 0 where nothing flows. Means are over steps and examples, estimated with signs
    v drawn for each: `v_i (Jᵀ v)_i` is J_ii on average, and `(Jᵀ v)_i²` is `Σ_j J_ji²` (Hutchinson,
    1990). One round of T step derivatives.
    """
    problem, ndim = linearised.problem, linearised.weights.ndim
    signs = [_signs(leaf, seed) for seed, leaf in enumerate(linearised.carries)]
    signs = _chosen(signs, counted)
    at_rest = jax.tree.map(jnp.zeros_like, linearised.passed.outputs_bar)
    pulled = linearised.pull(signs, at_rest, None)[1]
    real = jnp.ones(problem.num_steps, bool) if problem.batch.mask is None else problem.batch.mask
    real = jnp.broadcast_to(align_leading(jnp.asarray(real), ndim), linearised.weights.shape)
    shares = []
    for sign, back in zip(signs, _chosen(pulled, counted), strict=True):
        axes, back = tuple(range(ndim)), jnp.where(align_leading(real, back.ndim), back, 0)
        square = jnp.abs(back) ** 2
        number = jnp.sum(real).astype(square.dtype)
        own = jnp.abs(jnp.sum(sign * back, axes) / one_if_zero(number)) ** 2
        square = jnp.sum(square, axes) / one_if_zero(number)
        # What the mean of so many draws is expected to be by chance alone does not count.
        chance = (square - own) / jnp.maximum(number - 1, 1)
        shares.append(jnp.clip(jnp.sum(own - chance) / one_if_zero(jnp.sum(square)), 0, 1))
    return jnp.max(jnp.stack(shares)) if shares else jnp.zeros(())


def _signs(leaf: jax.Array, seed: int) -> jax.Array:
    """±1 for each entry, by an integer hash.

    `jax.random.rademacher` takes 0.6 to 0.7 s to compile, this 0.08.
    """
    bits = jnp.arange(leaf.size, dtype=jnp.uint32) * np.uint32(0x9E3779B1) + np.uint32(seed)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        bits = (bits ^ (bits >> shift)) * np.uint32(factor)
    signs = jnp.where(bits >> 31 == 0, 1, -1).reshape(leaf.shape)
    return lax.full_like(leaf, 1) * signs.astype(leaf.dtype)  # placed as it is, in an explicit mesh


def curvature_of(problem: Problem) -> jax.Array:
    """The second derivative of a problem's mean loss along its gradient."""
    flat, unflatten = ravel_pytree(problem.params)

    def mean_gradient(flat):
        sums = back_through(replace(problem, params=unflatten(flat), gates=None)).sums
        return weighted_mean(ravel_pytree(sums.grad)[0], sums.weight)

    return curvature_along(mean_gradient(flat), mean_gradient, flat)
