"""Gradients as their definition says, T² terms one by one: what every engine is held against.

Nothing here is shared with the engine but the border checks. For small problems, in float64.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbptt.arrays import align_leading, is_inexact, one_if_zero, real_vector
from jbptt.problem import check_problem
from jbptt.starts import start_of
from jbptt.types import Batch, Carry, Loss, Params, Step


def _spread(array: Any, default: Any, shape: tuple[int, ...]) -> jax.Array:
    """A mask or weights as `[T, *batch]`."""
    array = jnp.asarray(default if array is None else array)
    return jnp.broadcast_to(align_leading(array, len(shape)), shape)


def _flat_carry(carry: Carry) -> tuple[jax.Array, Callable[[jax.Array, Carry], Carry]]:
    """A carry's floating leaves as one real vector, and the way back into another carry's rest."""
    leaves, structure = jax.tree.flatten(carry)
    floating = [is_inexact(leaf) for leaf in leaves]
    flat, back = real_vector([leaf for leaf, f in zip(leaves, floating, strict=True) if f])

    def rebuild(vector, rest):
        parts = iter(back(vector))
        kept = zip(jax.tree.leaves(rest), floating, strict=True)
        return structure.unflatten([next(parts) if f else leaf for leaf, f in kept])

    return flat, rebuild


def _hold(mask: jax.Array, new: Carry, old: Carry) -> Carry:
    """`new` where the mask holds; a leaf that all examples share moves on with any of them."""

    def one(a, b):
        own = jnp.shape(a)[: mask.ndim] == mask.shape
        return jnp.where(align_leading(mask, jnp.ndim(a)) if own else jnp.any(mask), a, b)

    return jax.tree.map(one, new, old)


def _one_step(
    step: Step, loss: Loss, params: Params, carry: Carry, inputs: Any
) -> tuple[Carry, jax.Array]:
    """The carry after a step and its weighted losses `[*batch]`."""
    x, target, mask, weight = inputs
    after, y = step(params, carry, x)
    value = loss(y, target)
    value = value[0] if isinstance(value, tuple) else value
    return _hold(mask, after, carry), jnp.where(mask & (weight != 0), weight * value, 0)


def _inputs(step, loss, params, carry, batch: Batch) -> tuple[tuple, tuple[int, ...], jax.Array]:
    """What the steps scan over, the batch shape, and `Σ mask·weights`."""
    num_steps, batch_shape, _, _ = check_problem(step, loss, params, carry, batch)
    mask = _spread(batch.mask, True, (num_steps, *batch_shape))
    weights = jnp.where(mask, _spread(batch.weights, 1.0, mask.shape), 0)
    return (batch.xs, batch.targets, mask, weights), batch_shape, jnp.sum(weights)


def brute_force_gradient(
    step: Step, loss: Loss, params: Params, carry: Carry, batch: Batch, *, coverage: Any = None
) -> Params:
    """The gradient as its definition says, from explicit Jacobians of every step.

        Σ_t Σ_{i≤t} C[t, i] · w_t ∂ℓ_t/∂h_t · J_t … J_{i+1} · ∂⁺h_i/∂w   /   Σ_t w_t

    Args:
      step: any; padding under the mask must hold finite numbers.
      loss: `(y, target) -> [*batch]`; aux is left out.
      params: the parameters.
      carry: what enters step 0, or a function of the parameters, whose gradient belongs to source
        0.
      batch: a small one: T² products of `[n, n]` Jacobians, n the size of the whole batch's carry.
      coverage: `[T, T]` or `[T, T, *batch]`; None: all ones, the exact gradient.

    Raises:
      ValueError: what the estimators raise; a coverage of another shape.
    """
    inputs, batch_shape, total = _inputs(step, loss, params, carry, batch)
    num_steps = inputs[2].shape[0]
    coverage = jnp.ones((num_steps, num_steps)) if coverage is None else jnp.asarray(coverage)
    wanted = ((num_steps, num_steps), (num_steps, num_steps, *batch_shape))
    if coverage.shape not in wanted:
        raise ValueError(
            f"coverage has shape {coverage.shape}, wanted [T, T] or [T, T, *batch] = {wanted[1]}"
        )
    coverage = jnp.broadcast_to(align_leading(coverage, 2 + len(batch_shape)), wanted[1])
    coverage = coverage.reshape(num_steps, num_steps, -1)
    flat_params, to_params = real_vector(params)
    first = start_of(carry, params)

    def body(carry, inputs_t):
        flat, rebuild = _flat_carry(carry)

        def run(vector, flat):
            after, losses = _one_step(step, loss, to_params(vector), rebuild(flat, carry), inputs_t)
            return (_flat_carry(after)[0], losses.reshape(-1)), after

        by_params, _ = jax.jacrev(run, has_aux=True)(flat_params, flat)
        by_carry, after = jax.jacrev(run, argnums=1, has_aux=True)(flat_params, flat)
        return after, (by_params, by_carry)

    _, ((sources, own), (jacobians, slopes)) = lax.scan(body, first, inputs)

    def back(state, i):
        """Every loss t > i goes one step further back, to the carry that step i emits."""
        rows, grad = state
        t = jnp.arange(num_steps)[:, None, None]
        later = jacobians[jnp.minimum(i + 1, num_steps - 1)]
        rows = jnp.where(t == i + 1, slopes, rows @ later)
        weighed = jnp.where(t > i, coverage[:, i, :, None] * rows, 0)
        return (rows, grad + jnp.sum(weighed, (0, 1)) @ sources[i]), None

    diagonal = jnp.einsum("tb,tbp->p", coverage[jnp.arange(num_steps), jnp.arange(num_steps)], own)
    (rows, grad), _ = lax.scan(
        back, (jnp.zeros_like(slopes), diagonal), jnp.arange(num_steps)[::-1]
    )
    if callable(carry):  # what step 0 receives belongs to its source

        def start(vector):
            return _flat_carry(start_of(carry, to_params(vector)))[0]

        rows = jnp.where(jnp.arange(num_steps)[:, None, None] == 0, slopes, rows @ jacobians[0])
        grad += jnp.sum(coverage[:, 0, :, None] * rows, (0, 1)) @ jax.jacrev(start)(flat_params)
    grad = to_params(jnp.where(total == 0, 0, grad / one_if_zero(total)))
    return jax.tree.map(jnp.conj, grad)  # JAX's ∂f/∂x − i ∂f/∂y where parameters are complex


def frozen_loss(
    step: Step, loss: Loss, params: Params, carry: Carry, batch: Batch, *, coverage: Any
) -> Callable[[Params], jax.Array]:
    """What a truncated gradient is the gradient of: carries at cuts stay as at `params`.

        f(w) = Σ_t w_t ℓ_t(run from step s(t) with the carry that entered it, frozen) / Σ_t w_t

    with s(t) the first source that C[t, ·] keeps. Finite differences of f see what `stop_gradient`
    hides; those of the plain loss do not agree with any truncated gradient.

    Args:
      step, loss, params, carry, batch: as in `brute_force_gradient`; T² evaluations of the step.
      coverage: `[T, T]` of zeros and ones, each row one run of ones up to its diagonal.

    Raises:
      ValueError: a coverage that is not of this kind (weights other than 0 and 1 are no cuts).
    """
    inputs, _, total = _inputs(step, loss, params, carry, batch)
    num_steps = inputs[2].shape[0]
    coverage = np.asarray(coverage)
    starts = (
        np.argmax(coverage != 0, axis=1)
        if coverage.shape == (num_steps, num_steps)
        else np.zeros(num_steps, int)
    )
    t, i = np.arange(num_steps)[:, None], np.arange(num_steps)[None]
    if coverage.shape != (num_steps, num_steps) or np.any(
        coverage != ((starts[:, None] <= i) & (i <= t))
    ):
        raise ValueError(
            f"coverage must be [T, T] = {(num_steps, num_steps)} of zeros and ones with one run of "
            f"ones up to the diagonal in each row, got {coverage.tolist()}; reweighted gates are "
            "checked with assert_unbiased"
        )

    def record(carry, inputs_t):
        return _one_step(step, loss, params, carry, inputs_t)[0], carry

    frozen = lax.scan(record, start_of(carry, params), inputs)[1]

    def one_loss(params, t, start):
        def body(carry, here):
            j, frozen_j, inputs_j = here
            carry = jax.tree.map(partial(jnp.where, (j == start) & (j > 0)), frozen_j, carry)
            after, losses = _one_step(step, loss, params, carry, inputs_j)
            return after, jnp.where(j == t, jnp.sum(losses), 0)

        first = start_of(carry, params)
        return jnp.sum(lax.scan(body, first, (jnp.arange(num_steps), frozen, inputs))[1])

    def function(params):
        losses = jax.vmap(partial(one_loss, params))(jnp.arange(num_steps), jnp.asarray(starts))
        return jnp.sum(losses) / one_if_zero(total)

    return function
