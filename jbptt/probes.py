"""What an estimator really covers: every pair's weight, on a sum whose derivatives are all 1."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jbptt.types import Batch, Estimator, Loss, Step


def _probe_step(params: jax.Array, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    h = h + x @ params
    return h, h


def _probe_loss(y: jax.Array, target: None) -> jax.Array:
    del target
    return y


_PROBE = _probe_step, _probe_loss


def declared_coverage(estimator: Estimator, num_steps: int, key: chex.PRNGKey | None) -> jax.Array:
    """The coverage that an estimator declares of a first update with this key."""
    if estimator.coverage is None:
        raise ValueError(
            "coverage must be given, got None, and the estimator declares none; pass its matrix "
            "[T, T], or declare it: Estimator(init, update, coverage) with coverage(num_steps, "
            "key=None) -> [T, T]"
        )
    return estimator.coverage(num_steps, key)


def measured_coverage(
    make_estimator: Callable[[Step, Loss], Estimator],
    num_steps: int,
    *,
    key: chex.PRNGKey | None = None,
    split: Sequence[int] | None = None,
    batch_shape: tuple[int, ...] = (),
) -> jax.Array:
    """C[t, i] as an estimator really weighs each pair, `[T, T]` or `[T, T, *batch]`.

        h_{t+1} = h_t + a_t,   ℓ_t = h_{t+1}:   every G[t, i] = ∂ℓ_t/∂a_i = 1 for i ≤ t

    so the estimated gradient in a_i, with all weight on loss t, is the pair's weight itself. One
    probe for each loss; all share the key and thus the draw.

    Args:
      make_estimator: `(step, loss) -> Estimator`, say `partial(truncated_bptt, window=4)`.
      num_steps: T.
      key: for estimators that draw.
      split: lengths of successive updates that add up to T, the state handed on; None: one update.
      batch_shape: of the loss.
    """

    split = [num_steps] if split is None else list(split)
    if sum(split) != num_steps:
        raise ValueError(f"split must add up to num_steps = {num_steps}, got {split}")
    estimator = make_estimator(*_PROBE)
    params, carry, xs = jnp.zeros(num_steps), jnp.zeros(batch_shape), jnp.eye(num_steps)
    edges = np.cumsum([0, *split])

    def row(weights):
        total, state = jnp.zeros(num_steps), None
        for start, stop in pairwise(edges):
            batch = Batch(xs[start:stop], None, None, weights[start:stop])
            state = estimator.init(params, carry, batch, key=key) if state is None else state
            estimate, state = estimator.update(params, state, batch)
            total = total + estimate.grad_sum
        return total

    size = num_steps * int(np.prod(batch_shape))
    rows = jax.jit(jax.vmap(row))(jnp.eye(size).reshape(size, num_steps, *batch_shape))
    return jnp.moveaxis(rows.reshape(num_steps, *batch_shape, num_steps), -1, 1)


def assert_coverage(
    make_estimator: Callable[[Step, Loss], Estimator],
    coverage: Any = None,
    *,
    num_steps: int | None = None,
    key: chex.PRNGKey | None = None,
    split: Sequence[int] | None = None,
    atol: float = 1e-5,
) -> None:
    """Holds an estimator's declared coverage against the measured; pairs i > t must be 0.

    Args:
      make_estimator: as in `measured_coverage`.
      coverage: C, `[T, T]` or `[T, T, *batch]`; None: what the estimator declares of num_steps and
        key.
      num_steps: T, where coverage is None.
      key, split: as in `measured_coverage`.
      atol: of each entry, relative to entries above 1.

    Raises:
      AssertionError: names the pair.
      ValueError: both or neither of coverage and num_steps; no coverage and an estimator that
        declares none.
    """
    if (coverage is None) == (num_steps is None):
        given = f"coverage={'None' if coverage is None else 'a matrix'}, num_steps={num_steps!r}"
        raise ValueError(
            f"assert_coverage needs one of coverage and num_steps, got {given}; pass num_steps for "
            "the coverage that the estimator declares"
        )
    if num_steps is not None:
        coverage = declared_coverage(make_estimator(*_PROBE), num_steps, key)
    declared = np.asarray(coverage)
    found = np.asarray(
        measured_coverage(
            make_estimator, len(declared), key=key, split=split, batch_shape=declared.shape[2:]
        )
    )
    wrong = np.argwhere(~(np.abs(found - declared) <= atol * np.maximum(1, np.abs(declared))))
    if len(wrong):
        t, i, *_ = where = tuple(map(int, wrong[0]))
        raise AssertionError(
            f"coverage differs in {len(wrong)} of {declared.size} entries: the loss at step t={t} "
            f"reaches source i={i} with weight {found[where]:.6g}, declared is "
            f"{declared[where]:.6g}"
        )
