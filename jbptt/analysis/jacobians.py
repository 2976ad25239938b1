"""The Jacobian of every step, `J_t = ∂carries[t+1]/∂carries[t]`, of the flattened carry."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbptt import slips, validation
from jbptt.arrays import is_inexact, real_vector, split_inexact
from jbptt.clipping.cotangents import clips_cotangents
from jbptt.executables import run
from jbptt.recurrence import carries_of, held_core
from jbptt.starts import start_of
from jbptt.types import Carry, Params, PyTree, Step


def check_differentiable(carry: Any) -> None:
    """A ValueError unless the carry holds at least one number that a derivative can be taken by."""
    if not any(is_inexact(leaf) and np.size(leaf) for leaf in jax.tree.leaves(carry)):
        raise ValueError(
            f"carry has no floating-point entry (its structure: {jax.tree.structure(carry)}), so "
            "there is no Jacobian; pass the carry that enters step 0, cast to float"
        )


def check_system(step: Any, params: Any, carry: Any, xs: Any, mask: Any, length: Any) -> int:
    """T of an unbatched system whose Jacobians exist; `unroll`'s checks, and an inexact carry."""
    num_steps = validation.count_steps({"xs": xs, "mask": mask}, length)
    check_differentiable(carry)
    if mask is not None and np.ndim(mask) != 1:
        raise ValueError(
            f"mask has shape {np.shape(mask)}, wanted [T] = ({num_steps},): the carry is one "
            "unbatched system; use jax.vmap for a batch"
        )
    slips.warn_of_float64({"params": params, "carry": carry, "xs": xs})
    validation.check_step(step, params, carry, xs)
    validation.check_gates_and_mask(None, mask, carry)
    return num_steps


def flat_carry(carry: Carry) -> tuple[jax.Array, Callable[[jax.Array], Carry]]:
    """The inexact leaves in tree order as one real vector `[n]`, and the way back to the carry.

    A complex leaf counts as two real ones, first its real parts, then its imaginary parts.
    """
    leaves, rebuild = split_inexact(carry)
    flat, back = real_vector(leaves)
    return flat, lambda vector: rebuild(back(vector))


def push_tangents(run: Callable, flat: jax.Array, tangents: jax.Array) -> tuple[jax.Array, Any]:
    """`J tangents`, `[m, k]`, and aux, of `run(flat) = new [m], aux`; `J = ∂new/∂flat`, `[m, n]`.

    NaN where `new` is not finite, which its derivative need not show: a ReLU's at NaN is 0.
    """

    def along(tangent):
        return jax.jvp(run, (flat,), (tangent,), has_aux=True)

    # Forward mode takes a half to a fifth of the time of reverse mode and a fraction of its memory,
    # but JAX refuses it, with a TypeError, for a step with a `custom_vjp` of its own.
    try:
        new, pushed, aux = jax.vmap(along, in_axes=-1, out_axes=(None, -1, None))(tangents)
    except TypeError:
        if clips_cotangents(run, flat):
            raise ValueError(
                "step clips cotangents on the way back (clip_cotangent), so the rows of reverse "
                "mode are not those of its Jacobian; pass the step without it"
            ) from None
        new, aux = run(flat)
        pushed = jnp.matmul(
            jax.jacrev(lambda flat: run(flat)[0])(flat), tangents, precision=lax.Precision.HIGHEST
        )
    return jnp.where(jnp.isfinite(new).all(), pushed, jnp.nan), aux


def step_jacobian(step: Step, params: Params, carry: Carry, x: PyTree) -> jax.Array:
    """`[n, n]`, the derivative of a step's new carry (row) by the one it received (column)."""
    flat, whole = flat_carry(carry)

    def run(flat):
        return flat_carry(step(params, whole(flat), x)[0])[0], ()

    return push_tangents(run, flat, jnp.eye(flat.size, dtype=flat.dtype))[0]


def step_jacobians(
    step: Step,
    params: Params,
    carry: Carry,
    xs: PyTree,
    *,
    length: int | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """The Jacobians `J_t[i, j] = ∂carries[t+1][i] / ∂carries[t][j]`, all steps side by side.

    The carry counts as one system of n numbers: its inexact leaves, flattened in tree order (a
    complex leaf as its real and then its imaginary parts); integer and key leaves pass untouched.
    The Jacobian of a batch would be the joint one, mostly zeros: use vmap,
    `jax.vmap(lambda c, xs: step_jacobians(step, params, c, xs), in_axes=(0, 1))(carry, xs)`.
    One forward pass, then T step derivatives in n directions each, in forward mode (reverse mode
    for a step with a `custom_vjp`); memory O(T n²). jit- and vmap-able.

    Args:
      step: `(params, carry, x) -> (carry, y)`; y is not looked at.
      params: passed to the step as they are.
      carry: what enters step 0, or a function of the parameters that gives it, unbatched.
      xs: leaves `[T, ...]`, or None with `length`.
      length: T, where `xs` has no leaves.
      mask: bool `[T]`; a masked step holds the carry: the identity.

    Returns:
      `[T, n, n]`; NaN where the carry that leaves the step is not finite.

    Raises:
      ValueError: no inexact carry leaf; a mask that is not `[T]`; a step with `clip_cotangent`;
        what `unroll` raises.

    >>> step = lambda w, h, x: (w @ h + x, h)
    >>> step_jacobians(step, jnp.array([[0.0, 2.0], [1.0, 0.0]]), jnp.ones(2), jnp.ones((1, 2)))
    Array([[[0., 2.],
            [1., 0.]]], dtype=float32)
    """
    carry = start_of(carry, params)
    num_steps = check_system(step, params, carry, xs, mask, length)
    return run(_step_jacobians, (step,), (num_steps,), params, carry, xs, mask)


def _step_jacobians(step, num_steps, params, carry, xs, mask) -> jax.Array:
    carries, core = carries_of(step, params, carry, xs, mask, num_steps), held_core(step)
    return jax.vmap(lambda c, x: step_jacobian(core, params, c, x))(carries, (xs, mask))
