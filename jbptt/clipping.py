"""Gradient clipping as optax transformations, safe against overflow, with telemetry in the state."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jbptt import validation
from jbptt.norms import scaled_norm, unit

Policy = Literal["propagate", "zero", "skip", "raise"]
POLICIES: tuple[Policy, ...] = ("propagate", "zero", "skip", "raise")


class GlobalNormState(NamedTuple):
    """What the last update looked like; read it with `optax.tree.get(opt_state, "norm")` and the like.

    Attributes:
      norm: the global norm before clipping, float32 at least; inf if it is too large for its dtype. Of
        what the policy left: entries that it set to zero do not count.
      scale: what the updates were multiplied by, 1 where they were not clipped.
      finite: whether every entry was finite.
      num_nonfinite: how many updates so far were not.
    """

    norm: jax.Array
    scale: jax.Array
    finite: jax.Array
    num_nonfinite: jax.Array


def _refuse(finite: Any) -> None:
    if not finite:
        raise FloatingPointError(
            "the gradient holds NaN or inf (clip_by_global_norm, nonfinite='raise'); jbptt.find_nonfinite says where "
            "it begins"
        )


def _apply_policy(updates: Any, finite: jax.Array, policy: Policy) -> Any:
    if policy == "raise":
        jax.debug.callback(_refuse, finite)
    if policy == "zero":
        return jax.tree.map(lambda u: jnp.where(jnp.isfinite(u), u, jnp.zeros_like(u)), updates)
    if policy == "skip":
        return jax.tree.map(lambda u: jnp.where(finite, u, jnp.zeros_like(u)), updates)
    return updates


def clip_by_global_norm(max_norm: float, *, nonfinite: Policy = "propagate") -> optax.GradientTransformation:
    """Scales updates by `min(1, max_norm / ‖g‖)`, ‖g‖ over all leaves (Pascanu, Mikolov & Bengio, 2013).

    Finite gradients whose squared entries overflow are clipped correctly, in float16 and bfloat16 too
    (the arithmetic is float32 at least). Entries that are denormal in the arithmetic's dtype may count as 0.

    Args:
      max_norm: the largest norm that passes unchanged.
      nonfinite: what happens to a gradient with NaN or inf in it; `finite` is False in any case.
        "propagate": it passes unchanged and stays visible;
        "zero": the entries that are not finite become 0, the others are clipped and used;
        "skip": the whole update becomes 0 (momentum further down the chain still moves: to leave the
        optimizer untouched wrap it in `optax.apply_if_finite`);
        "raise": a FloatingPointError. Under jit the runtime reports it as `jax.errors.JaxRuntimeError`,
        when a result is waited for (`jax.effects_barrier`).

    Raises:
      ValueError: max_norm is not a finite number > 0; another policy.

    >>> clip = clip_by_global_norm(1.0)
    >>> grads = {"w": jnp.array([3e30, 4e30])}
    >>> updates, state = clip.update(grads, clip.init(grads))
    >>> updates["w"]
    Array([0.6, 0.8], dtype=float32)
    """
    validation.check_above("max_norm", max_norm, 0, "the updates would all be zero, or reversed")
    if nonfinite not in POLICIES:
        raise ValueError(f"nonfinite must be one of {', '.join(POLICIES)}, got {nonfinite!r}")

    def init(params: Any) -> GlobalNormState:
        largest, _ = jax.eval_shape(scaled_norm, params)
        zero, one = jnp.zeros((), largest.dtype), jnp.ones((), largest.dtype)
        return GlobalNormState(zero, one, jnp.array(True), jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None):
        del params
        finite = jnp.isfinite(scaled_norm(updates)[0])
        updates = _apply_policy(updates, finite, nonfinite)
        largest, ratio = scaled_norm(updates)
        usable = jnp.isfinite(largest)
        # ‖g‖ = largest·ratio may overflow, so it is compared and divided by factor after factor.
        clipped = usable & (largest * jnp.maximum(ratio, 1) > max_norm)
        limit = max_norm / jnp.where(ratio == 0, 1, ratio)

        def scale(update):
            wide = update.astype(jnp.promote_types(update.dtype, largest.dtype))
            return jnp.where(clipped, unit(wide, largest) * limit, wide).astype(update.dtype)

        seen = GlobalNormState(
            norm=jnp.where(usable, largest * ratio, largest),
            scale=jnp.where(clipped, unit(limit, largest), 1),
            finite=finite,
            num_nonfinite=state.num_nonfinite + ~finite,
        )
        return jax.tree.map(scale, updates), seen

    return optax.GradientTransformation(init, update)
