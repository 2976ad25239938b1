"""Training with any estimator: one scan over batches."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jbptt.arrays import weighted_mean, widened
from jbptt.datasets import dataset, variables
from jbptt.losses import weighted_losses, where_counted
from jbptt.norms import norm
from jbptt.recurrence import scan_steps
from jbptt.starts import start_of
from jbptt.types import Batch, Carry, Estimator, Loss, Params, Step


class History(NamedTuple):
    """What training saw, `[N]` updates each, and where it stopped.

    Attributes:
      loss: weighted mean loss of each batch, before its update.
      grad_norm: norm of its estimated gradient, before the optimizer's transformations.
      info: the estimates' `info`, leaves `[N, ...]`.
      state: the estimator's last state (`.carry` is the live carry); pass it on to continue.
      opt_state: the optimizer's last state; pass it on to continue.
    """

    loss: jax.Array
    grad_norm: jax.Array
    info: dict[str, Any]
    state: Any
    opt_state: optax.OptState

    def to_xarray(self) -> Any:
        """An `xarray.Dataset` over `update`: loss, grad_norm and `info`; needs xarray.

        Further axes of a leaf of `info` are called by its name, those of a vmapped call `axis_0`.
        """
        front = np.ndim(self.loss) - 1
        found = [variables(name, getattr(self, name), "update") for name in ("loss", "grad_norm")]
        for path, leaf in jax.tree.leaves_with_path(self.info):
            name = f"info{jax.tree_util.keystr(path)}"
            further = [f"{name}_{i}" for i in range(np.ndim(leaf) - front - 1)]
            found.append(variables(name, leaf, "update", *further))
        return dataset(*found, coords={"update": np.arange(np.shape(self.loss)[-1])})


def train(
    estimator: Estimator,
    optimizer: optax.GradientTransformation,
    params: Params,
    carry: Carry,
    batches: Batch,
    *,
    key: jax.Array | None = None,
    state: Any = None,
    opt_state: optax.OptState | None = None,
) -> tuple[Params, History]:
    """One update for each batch, the carry kept from batch to batch: a pure `lax.scan`.

    Args:
      estimator: any.
      optimizer: any optax transformation.
      params: where to start.
      carry: what enters the first batch, or a function of the parameters that gives it; not read
        where `state` is given.
      batches: leaves `[N, T, ...]`.
      key: for estimators that draw.
      state: an estimator's state to continue from, `history.state`.
      opt_state: an optimizer's state to continue from, `history.opt_state`.

    Returns:
      The trained parameters and the `History`. jit, vmap (over seeds, say) or shard the whole call.

    Raises:
      ValueError: what the estimator's init raises.
    """
    if state is None:
        first = jax.eval_shape(lambda batches: jax.tree.map(lambda a: a[0], batches), batches)
        state = estimator.init(params, carry, first, key=key)
    if opt_state is None:
        opt_state = optimizer.init(jax.tree.map(widened, params))  # as wide as the gradients

    def body(running, batch):
        params, state, opt_state = running
        estimate, state = estimator.update(params, state, batch)
        updates, opt_state = optimizer.update(estimate.grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, state, opt_state), (estimate.loss, norm(estimate.grads), estimate.info)

    running, first = (params, state, opt_state), None
    if callable(state.carry):  # a start, which the first update alone begins with
        running, first = body(running, jax.tree.map(lambda a: a[0], batches))
        batches, first = (
            jax.tree.map(lambda a: a[1:], batches),
            jax.tree.map(lambda a: a[None], first),
        )
    running, seen = jax.lax.scan(body, running, batches)
    if first is not None:
        seen = jax.tree.map(lambda *parts: jnp.concatenate(parts), first, seen)
    (params, state, opt_state), (loss, grad_norm, info) = running, seen
    return params, History(loss, grad_norm, info, state, opt_state)


def mean_loss(step: Step, loss: Loss, params: Params, carry: Carry, batches: Batch) -> jax.Array:
    """The weighted mean loss over batches `[N, T, ...]`, read as one stream with one carry."""

    def body(carry, batch):
        carry, ys = scan_steps(step, params, carry, batch.xs, None, batch.mask)
        value, (weight, _) = weighted_losses(where_counted(loss), ys, batch)
        return carry, (value, weight)

    _, (values, weights) = jax.lax.scan(body, start_of(carry, params), batches)
    return weighted_mean(values.sum(), weights.sum())
