"""Clipping inside the backward pass: of what crosses from step to step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jbptt import validation
from jbptt.arrays import split_inexact
from jbptt.engine import calls
from jbptt.norms import clip_to_norm
from jbptt.types import PyTree


@jax.jit
def _cotangents_are_clipped(leaves: list[jax.Array]) -> list[jax.Array]:
    """The identity, a call of its own in every program: by its name `clips_cotangents` finds it."""
    return leaves


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _clipped_on_the_way_back(
    leaves: list[jax.Array], bound: jax.Array, num_leading: int | None
) -> list[jax.Array]:
    del bound, num_leading
    return _cotangents_are_clipped(leaves)


def _forward(leaves, bound, num_leading):
    del num_leading
    return leaves, bound


def _backward(num_leading, bound, cotangents):
    if num_leading is None:  # every entry is a vector of its own
        return [clip_to_norm(leaf, bound, leaf.ndim)[0] for leaf in cotangents], jnp.zeros_like(
            bound
        )
    return clip_to_norm(cotangents, bound, num_leading)[0], jnp.zeros_like(bound)


_clipped_on_the_way_back.defvjp(_forward, _backward)


def clip_cotangent(
    tree: PyTree, max_norm: Any = None, *, max_value: Any = None, num_leading: int = 0
) -> PyTree:
    """The identity, which clips the cotangent λ on its way back: `λ · min(1, max_norm / ‖λ‖)`.

    Meant for the carry, first thing in a step, `carry = clip_cotangent(carry, 1.0)`, so that the
    adjoint is clipped at every step of the backward pass instead of the gradient at its end:

        λ_t = ∂ℓ_t/∂h_t + clip(J_{t+1}ᵀ λ_{t+1})

    What a step returns is better left alone: where windows overlap, their sum would be clipped
    there.

    The values are `tree`'s, bit for bit; integers, booleans, keys and float0 pass untouched both
    ways. ‖λ‖ is over all floating leaves and neither overflows nor underflows. A cotangent of 0
    stays 0; one that holds NaN or inf passes unchanged and stays visible (by value: those entries
    alone). Under vmap every instance has its own norm. Time O(size), nothing kept for the way back.

    *Nonlinear*: the gradient is no longer that of the loss. No coverage matrix describes it, and
    the gradient of a sum of losses is not the sum of their gradients. So it matters what is
    differentiated: an estimator runs back from the sum `Σ w_t ℓ_t` and divides at the end;
    `jax.grad` of a mean, and `adjoints`, begin with a λ that many times smaller, which `max_norm`
    rarely meets. Windows that overlap clip each chunk's adjoint by itself; `lag_profile`,
    `truncation_curve`, `gradient_flow` and `diagnose` that of each step's loss, which do not add up
    to an estimator's gradient. The bias that `compare` finds is against its reference: build that
    of the step without clipping.

    *Reverse mode only*: `jax.jvp`, `jacfwd` and the function that `linearize` returns raise JAX's
    TypeError, which names `custom_vjp`; `step_jacobians`, `jacobian_products` and
    `lyapunov_spectrum`, for which the rows of reverse mode would be clipped, refuse such a step. A
    second derivative (reverse or forward over reverse) is that of the clipped gradient.

    Args:
      tree: what passes; every floating or complex leaf is clipped.
      max_norm: the largest norm that crosses unchanged; may be traced, is not differentiated.
      max_value: instead, the largest absolute entry (modulus) that does (Mikolov, 2012).
      num_leading: how many leading axes, shared by all floating leaves, are batch axes: each
        example is clipped to its own norm. 0: the whole tree is one example.

    Raises:
      ValueError: not exactly one of max_norm and max_value, or not a finite number > 0; num_leading
        is no integer ≥ 0, goes with max_value, or is not matched by the leaves.

    Pascanu, Mikolov & Bengio (2013, Algorithm 1) clip the gradient; Graves (2013, Generating
    Sequences, §2.1) clips derivatives inside the network, by value.

    >>> jax.grad(lambda h: 5 * clip_cotangent(h, 2.0))(1.0)
    Array(2., dtype=float32)
    """
    if (max_norm is None) == (max_value is None):
        raise ValueError(
            f"exactly one of max_norm and max_value must be given, got max_norm={max_norm!r} and "
            f"max_value={max_value!r}; clip twice if both bounds must hold"
        )
    by_value = max_norm is None
    name, bound = ("max_value", max_value) if by_value else ("max_norm", max_norm)
    validation.check_above(name, bound, 0, "what crosses would be zero, or reversed")
    if by_value and num_leading != 0:
        raise ValueError(
            f"num_leading must be 0 with max_value, got {num_leading}; every entry is clipped by "
            "itself, leave it out"
        )
    num_leading = validation.check_num_leading(num_leading, tree)
    leaves, rebuild = split_inexact(tree)
    return rebuild(
        _clipped_on_the_way_back(
            leaves, jnp.asarray(bound, float), None if by_value else num_leading
        )
    )


def clips_cotangents(function: Callable, *args: Any) -> bool:
    """Whether `clip_cotangent` is anywhere in the program of `function(*args)`."""
    named: Any = _cotangents_are_clipped
    return calls(named.__name__, function, *args)
