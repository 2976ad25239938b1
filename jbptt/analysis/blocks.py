"""Which window to cut a batch into blocks with: the gradients of a few windows, and the choice
among them.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbptt.arrays import weighted_mean
from jbptt.norms import compared_with, norm
from jbptt.segments import Sums


def candidate_windows(num_steps: int) -> tuple[list[int], list[int]]:
    """Windows that cut T steps into blocks of equal length, and with their halves all that must be
    tried.

    Of 1, 2, 3, 4, 6, 8, 12 … blocks, a factor of √2 apart on average: closer windows cannot be told
    apart on other batches. And T, T/2, T/4 …, so that one of them keeps what its half does not,
    whatever the errors.
    """
    numbers = {
        base << i
        for i in range(num_steps.bit_length())
        for base in (1, 3)
        if base << i <= num_steps
    }
    windows = {-(-num_steps // n) for n in numbers} | {
        num_steps >> i for i in range(num_steps.bit_length())
    }
    return sorted(windows), sorted(windows | {w // 2 for w in windows if w > 1})


def choose_blocks(
    errors: jax.Array, tried: list[int], windows: list[int], tolerances: tuple[float, ...]
) -> tuple[jax.Array, jax.Array]:
    """For each tolerance, of the windows that keep it while half of them do not, the one of the
    smallest error.

    The last window, T, which has none, only where there is no other. Returns the windows and their
    errors.
    """
    of = {window: i for i, window in enumerate(tried)}
    error = errors[np.array([of[w] for w in windows])]
    half = jnp.append(errors, jnp.inf)[np.array([of.get(w // 2, len(tried)) for w in windows])]
    levels = jnp.array(tolerances)[:, None]
    kept = jnp.where((error <= levels) & (half > levels), error, jnp.inf).at[:, -1].set(jnp.inf)
    first = jnp.where(jnp.min(kept, axis=1) < jnp.inf, jnp.argmin(kept, axis=1), len(windows) - 1)
    return jnp.array(windows)[first], error[first]


def gradients_in_turn(
    gradient_fn: Callable, windows: list[int], num_parts: int
) -> tuple[Sums, jax.Array, jax.Array]:
    """The exact sums, norms of the mean gradient (of the whole, of each part), the error of blocks
    of each window.

    One loop over all gradients, which are thus compiled once; the exact one opens it.
    `gradient_fn(window, part) -> Sums`, part −1 is the whole batch; the last window is T.
    """
    whole = windows[-1]
    turns = (
        jnp.array([whole] * (1 + num_parts) + windows),
        jnp.array([-1, *range(num_parts)] + [-1] * len(windows)),
    )

    def body(exact, turn):
        i, window, part = turn
        sums = gradient_fn(window, part)
        exact = jax.tree.map(partial(jnp.where, i == 0), sums, exact)
        error, _ = compared_with(exact.grad)(sums.grad)
        return exact, (error, weighted_mean(norm(sums.grad), jnp.abs(sums.weight)), sums.weight)

    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradient_fn, whole, -1)
    )
    exact, (errors, sizes, weights) = lax.scan(body, zeros, (jnp.arange(len(turns[0])), *turns))
    sizes = jnp.where((weights == 0) & (jnp.arange(len(weights)) > 0), jnp.nan, sizes)
    return exact, sizes[: 1 + num_parts], errors[1 + num_parts :]
