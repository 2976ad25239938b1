"""Gradient clipping as optax transformations, safe against overflow, with telemetry in the state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jbptt import validation
from jbptt.norms import scaled_norm, unit


class GlobalNormState(NamedTuple):
    """What the last update looked like; read it with `optax.tree.get(opt_state, "norm")` and the like.

    Attributes:
      norm: the global norm before clipping, float32 at least; inf if it is too large for its dtype.
      scale: what the updates were multiplied by, 1 where they were not clipped.
      finite: whether every entry was finite.
    """

    norm: jax.Array
    scale: jax.Array
    finite: jax.Array


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales updates by `min(1, max_norm / ‖g‖)`, ‖g‖ over all leaves (Pascanu, Mikolov & Bengio, 2013).

    Finite gradients whose squared entries overflow are clipped correctly, in float16 and bfloat16 too
    (the arithmetic is float32 at least). Gradients that are not finite pass unchanged and set
    `finite` to False: they stay visible.

    Raises:
      ValueError: max_norm is not a finite number > 0.

    >>> clip = clip_by_global_norm(1.0)
    >>> grads = {"w": jnp.array([3e30, 4e30])}
    >>> updates, state = clip.update(grads, clip.init(grads))
    >>> updates["w"]
    Array([0.6, 0.8], dtype=float32)
    """
    validation.check_above("max_norm", max_norm, 0, "the updates would all be zero, or reversed")

    def init(params: Any) -> GlobalNormState:
        largest, _ = jax.eval_shape(scaled_norm, params)
        return GlobalNormState(jnp.zeros((), largest.dtype), jnp.ones((), largest.dtype), jnp.array(True))

    def update(updates: Any, state: Any, params: Any = None):
        del state, params
        largest, ratio = scaled_norm(updates)
        finite = jnp.isfinite(largest)
        # ‖g‖ = largest·ratio may overflow, so it is compared and divided by factor after factor.
        clipped = finite & (largest * jnp.maximum(ratio, 1) > max_norm)
        limit = max_norm / jnp.where(ratio == 0, 1, ratio)

        def scale(update):
            wide = update.astype(jnp.promote_types(update.dtype, largest.dtype))
            return jnp.where(clipped, unit(wide, largest) * limit, wide).astype(update.dtype)

        norm = jnp.where(jnp.isfinite(largest), largest * ratio, largest)
        return jax.tree.map(scale, updates), GlobalNormState(norm, jnp.where(clipped, unit(limit, largest), 1), finite)

    return optax.GradientTransformation(init, update)
