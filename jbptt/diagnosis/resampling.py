"""The error of a window on other batches, told from how the parts of one batch differ."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbptt.arrays import one_if_zero

FEW_PARTS = 1.5
"""A gradient that comes from fewer parts than this, `(Σ ‖g[p]‖²)² / Σ ‖g[p]‖⁴`, is one part's."""
NUM_DRAWS = 400
CONFIDENCE = 0.95


def draws(num_parts: int) -> np.ndarray:
    """What each part's deviation from the mean is multiplied by, `[draws, parts]`.

    ±√m, where the parts are drawn with replacement, m times each, and the sign by a coin. Parts of
    another batch deviate in other directions than these: a part drawn m times stands for m such
    parts, whose squares add, not for one m times as long (the wild bootstrap; Wu, 1986).
    """
    random = np.random.default_rng(0)
    often = random.multinomial(num_parts, np.full(num_parts, 1 / num_parts), size=NUM_DRAWS)
    drawn = np.sqrt(often) * random.choice([-1, 1], size=often.shape)
    return drawn - drawn.mean(1, keepdims=True)


def products(gradients: list[jax.Array], others: list[jax.Array] | None = None) -> jax.Array:
    """Inner products of all pairs of parts, `[parts, parts]`, of leaves `[parts, n]`."""
    pairs = zip(gradients, gradients if others is None else others, strict=True)
    total = (jnp.matmul(a, b.T, precision=lax.Precision.HIGHEST) for a, b in pairs)
    return sum(total, jnp.zeros(()))


def total(gradients: list[jax.Array]) -> list[jax.Array]:
    """The gradient of the whole batch, from those of its parts."""
    return [jnp.sum(leaf, axis=0) for leaf in gradients]


class Errors(NamedTuple):
    """Of one window: on this batch, and the quantile over batches drawn from its parts."""

    here: jax.Array
    upper: jax.Array


def errors_of(left: jax.Array, exact: jax.Array, batches: int = 1) -> Errors:
    """The errors of a window, from the inner products of what it leaves out and of the exact
    gradients, `[parts, parts]` each.

    Where the parts are those of several batches, the error is that of one such batch: the sum over
    its parts scatters √batches times as much as a sum over all of them does.
    """
    # How much batches scatter is told by few parts: on the safe side by one standard error.
    safe = 1 + 1 / (2 * max(len(exact) - 1, 1)) ** 0.5
    drawn = jnp.asarray(draws(len(exact)) * (safe * batches**0.5), exact.dtype)

    def squares(products):
        """`‖sum‖²` of this batch, and of others: the mean, without its noise, and noise anew."""
        here, number = jnp.sum(products), len(products)
        noise = (jnp.trace(products) - here / number) * (number / max(number - 1, 1))
        kept = jnp.sqrt(jnp.clip(1 - noise / jnp.where(here > 0, here, 1), 0, 1))
        times = kept + drawn
        there = jnp.einsum("dp,pq,dq->d", times, products, times, precision=lax.Precision.HIGHEST)
        return jnp.maximum(jnp.append(there, here), 0)

    left, exact = squares(left), squares(exact)
    ratio = jnp.sqrt(left / jnp.where(exact > 0, exact, 1))
    ratio = jnp.where(exact > 0, ratio, jnp.where(left > 0, jnp.inf, 0))
    upper = jnp.quantile(ratio[:-1], CONFIDENCE).astype(ratio.dtype)
    return Errors(ratio[-1], jnp.where(jnp.isnan(ratio).any(), jnp.nan, upper))


def can_tell(exact: jax.Array, rounding: float) -> tuple[jax.Array, jax.Array]:
    """Whether a batch tells windows at all, from the inner products of its parts' exact gradients.

    Not where one part carries nearly all of it, which is the second thing returned, and not where
    the parts cancel to rounding.
    """
    if len(exact) == 1:
        return jnp.ones((), bool), jnp.zeros((), bool)
    squares = jnp.diagonal(exact)
    number = jnp.sum(squares) ** 2 / one_if_zero(jnp.sum(squares**2))
    whole = jnp.sqrt(jnp.maximum(jnp.sum(exact), 0))
    one_part = (number < FEW_PARTS) & (jnp.sum(squares) > 0)
    tells = whole > rounding * jnp.sqrt(jnp.sum(squares))
    return (tells & ~one_part) | (jnp.sum(squares) == 0), one_part
