"""Where NaN or infinity first appears: in what was given, on the way forward, or on the way back."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from jbptt import validation
from jbptt.adjoint import counted_steps, loss_weights, step_losses, weighted_losses
from jbptt.analysis.flow import adjoints, carry_cotangents
from jbptt.recurrence import held, times_gate, trajectory, zero_masked
from jbptt.types import Batch, Carry, Loss, Params, Step, align_leading, split_inexact

PHASES = ("given", "forward", "backward")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NonFinite:
    """The first number that is not finite, as data: arrays under jit and vmap, words outside of them.

    Attributes:
      found: whether there is one.
      phase_index: into `PHASES`: given (parameters, initial carry, inputs, targets, weights, gates), forward (carries,
        outputs, losses), backward (adjoints, gradients).
      step: the step that read or produced it; 0 for parameters and the initial carry.
      leaf_index: into `leaves`.
      leaves: names of everything that was looked at.
    """

    found: jax.Array
    phase_index: jax.Array
    step: jax.Array
    leaf_index: jax.Array
    leaves: tuple[str, ...] = field(metadata={"static": True})

    @property
    def phase(self) -> str:
        """`given`, `forward` or `backward`; empty if everything is finite. Only outside of jit and vmap."""
        return PHASES[int(self.phase_index)] if self.found else ""

    @property
    def leaf(self) -> str:
        """Its name; empty if everything is finite. Only outside of jit and vmap."""
        return self.leaves[int(self.leaf_index)] if self.found else ""

    def __str__(self) -> str:
        if np.ndim(self.found):
            return repr(self)
        if not self.found:
            return "everything is finite: parameters, inputs, carries, outputs, losses, adjoints and gradients"
        return f"first not finite: {self.leaf}, {_WORDS[self.phase]} at step {int(self.step)}"


_WORDS = {"given": "as given,", "forward": "on the way forward", "backward": "on the way back"}


def _names(prefix: str, tree: Any) -> list[str]:
    """Names of the inexact leaves."""
    return [
        prefix + keystr(path)
        for path, leaf in tree_leaves_with_path(tree)
        if jnp.issubdtype(jax.dtypes.result_type(leaf), jnp.inexact)
    ]


def _bad(tree: Any, num_leading: int = 0) -> jax.Array:
    """`[*leading, leaves]`: which inexact leaves hold something that is not finite."""
    flags = [~jnp.isfinite(leaf).all(tuple(range(num_leading, leaf.ndim))) for leaf in split_inexact(tree)[0]]
    return jnp.stack(flags, -1) if flags else jnp.zeros(0, bool)


def find_nonfinite(
    step: Step, loss: Loss, params: Params, carry: Carry, batch: Batch, *, gates: jax.Array | None = None
) -> NonFinite:
    """Which step, which leaf, forward or backward: where a loss or a gradient first stops being finite.

    In the order of computation: parameters and initial carry; then step by step inputs, gates, the new carry,
    the output, the target, the weight, the loss; then back step by step the adjoint of the carry received and the
    step's part of the parameter gradient. Padding and losses of weight 0 do not count. Two forward
    passes and one backward, and every step's derivative once more, one after another; memory O(T) carries.
    Works under jit and vmap (all fields are data but the names).

    Args:
      step: `(params, carry, x) -> (carry, y)`.
      loss: `(y, target) -> [*batch]`, or that and aux.
      params: the parameters.
      carry: what enters step 0.
      batch: the batch that went wrong.
      gates: `[T]` or `[T, *batch]`, of the gated gradient.

    Raises:
      ValueError: what `full_bptt` raises.
    """
    num_steps, batch_shape = validation.check_problem(step, loss, params, carry, batch, gates)
    gates = None if gates is None else jnp.asarray(gates)
    _, (_, ys) = trajectory(step, params, carry, batch.xs, batch.mask, num_steps)
    path = adjoints(step, loss, params, carry, batch, gates=gates)
    after = jax.tree.map(lambda a: a[1:], path.carries)
    losses, _ = step_losses(loss, ys, batch)

    per_step = jax.vmap(zero_masked)
    xs, ys = (tree if batch.mask is None else per_step(batch.mask, tree) for tree in (batch.xs, ys))
    counted = counted_steps(batch)
    targets = batch.targets if counted is None else per_step(counted, batch.targets)
    weights = None if batch.weights is None else jnp.asarray(batch.weights)
    if batch.mask is not None and weights is not None:  # what is masked has no weight, whatever stands there
        ndim = max(batch.mask.ndim, weights.ndim)
        weights = jnp.where(align_leading(batch.mask, ndim), align_leading(weights, ndim), 0)
    forward = {"xs": xs, "gates": gates, "carry": after, "y": ys, "targets": targets, "weights": weights}
    forward |= {"loss": losses}

    total = jnp.sum(loss_weights(batch, jnp.zeros((num_steps, *batch_shape))))
    entering = jax.tree.map(lambda a: a[:-1], path.carries)
    emitted = [c[1:] for c in carry_cotangents(path)]
    back = partial(_step_back, step, loss, params, total)
    flags_back = jax.lax.map(back, (entering, emitted, batch, gates))

    start, there = _bad((params, carry)), _flags(forward, num_steps)
    names_start = _names("params", params) + _names("carry", carry)
    names_there = [name for prefix, tree in forward.items() for name in _names(prefix, tree)]
    names_back = _names("the adjoint of carry", carry) + _names("the gradient of params", params)
    given = [name.startswith(("xs", "gates", "targets", "weights")) for name in names_there]
    return _first(start, there, flags_back[::-1], given, (*names_start, *names_there, *names_back))


def _flags(trees: dict[str, Any], num_steps: int) -> jax.Array:
    """`[T, leaves]` of all trees side by side."""
    parts = [_bad(tree, 1) for tree in trees.values()]
    return jnp.concatenate([part for part in parts if part.ndim == 2] or [jnp.zeros((num_steps, 0), bool)], axis=1)


def _step_back(step, loss, params, total, inputs):
    """Which leaves of the carry's adjoint and of the gradient one step's derivative makes non-finite."""
    carry, cotangents, batch, gate = inputs
    leaves, rebuild = split_inexact(carry)

    def run(params, leaves):
        after, y = held(step)(params, rebuild(leaves), (batch.xs, batch.mask))
        one = jax.tree.map(lambda a: a[None], (y, batch))
        value, _ = weighted_losses(loss, *one)
        return split_inexact(after)[0], value / jnp.where(total == 0, 1, total)

    (_, value), pull = jax.vjp(run, params, leaves)
    grad, adjoint = pull((cotangents, jnp.ones_like(value)))
    if gate is not None:
        adjoint = [times_gate(a, gate) for a in adjoint]
    return jnp.concatenate([_bad(adjoint), _bad(grad)])


def _first(start, there, back, given, names) -> NonFinite:
    """The first flag of all, in the order of computation."""
    num_steps, width, width_back = there.shape[0], there.shape[1], back.shape[1]
    order = jnp.concatenate([start, there.reshape(-1), back.reshape(-1)])
    found, first = jnp.any(order), jnp.argmax(order)
    i, j = first - len(start), first - len(start) - num_steps * width
    at_start, at_back = i < 0, j >= 0
    column = jnp.where(at_back, j % max(1, width_back), i % max(1, width))
    step = jnp.where(at_back, num_steps - 1 - j // max(1, width_back), i // max(1, width))
    phase = jnp.where(at_back, 2, jnp.where(jnp.asarray([*given, True])[jnp.minimum(column, width)], 0, 1))
    leaf = jnp.where(at_back, len(start) + width + column, len(start) + column)
    return NonFinite(
        found=found,
        phase_index=jnp.where(at_start, 0, phase),
        step=jnp.where(at_start | ~found, 0, step),
        leaf_index=jnp.where(at_start, first, leaf),
        leaves=tuple(names),
    )
