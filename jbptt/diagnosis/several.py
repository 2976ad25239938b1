"""Several batches of one source, as one batch with an axis more in front of the examples."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbptt.cells import ReadoutStep
from jbptt.diagnosis.batch_parts import NUM_PARTS
from jbptt.executables import WeakCache
from jbptt.starts import start_of
from jbptt.types import Batch, Carry, Loss, Params, Step

_FUNCTIONS = WeakCache()


def batches_of(batch: Batch | Sequence[Batch]) -> Sequence[Batch]:
    """The batches that `diagnose` was given, one or several.

    Raises:
      ValueError: none or more than 16, something else than a batch, or batches of other shapes.
    """
    if isinstance(batch, Batch) or not isinstance(batch, Sequence):
        return [batch]
    if not 1 <= len(batch) <= NUM_PARTS or not all(isinstance(one, Batch) for one in batch):
        kinds = sorted({type(one).__name__ for one in batch})
        raise ValueError(
            f"batch must be a jbptt.Batch, or 1 to {NUM_PARTS} of them, got {len(batch)} of "
            f"{', '.join(kinds) or 'none'}; pass jbptt.Batch(xs, targets), or a list of some"
        )
    shapes = [jax.tree.map(np.shape, one) for one in batch]
    for number, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(
                f"batches must have the same shapes, got {shape} for number {number} beside "
                f"{shapes[0]}; pad them to one length, and say which steps count by mask"
            )
    return batch


def as_one(
    step: Step, loss: Loss, params: Params, carry: Carry, batches: Sequence[Batch], gates: Any
) -> tuple[Step, Loss, Params, Carry, Batch, Any]:
    """Step, loss, params, carry, batch and gates of all batches side by side,
    `[T, batches, *batch, ...]`.

    The functions are vmapped, so that what examples of one batch share stays among them. The
    arguments are those of `diagnose`.
    """
    number = len(batches)
    step, loss = _FUNCTIONS.find((step, loss), "vmapped", _vmapped)
    start = start_of(carry, params)
    start = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (number, *jnp.shape(leaf))), start)
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *batches)
    if gates is not None and jnp.ndim(gates) > 1:
        gates = jnp.stack([jnp.asarray(gates)] * number, axis=1)
    return step, loss, params, start, together, gates


def _vmapped(step: Step, loss: Loss) -> tuple[Step, Loss]:
    return _step_of(step), jax.vmap(loss)


def _step_of(step: Step) -> Step:
    """vmapped over carries and inputs; a readout stays one."""
    if isinstance(step, ReadoutStep):
        return ReadoutStep(_step_of(step.core), jax.vmap(step.readout, (None, 0)))
    return jax.vmap(step, (None, 0, 0))
