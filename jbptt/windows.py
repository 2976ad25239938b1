"""Backward passes that overlap: every stride a new one, side by side, over cached carries.

TBPTT(k1 = stride, k2 = window) runs, for each chunk of `stride` losses, back through the `window`
steps that end with the chunk (Williams & Peng, 1990). With e_c the chunk's last step, all chunks c of
a group go back together, one step at a time, q = 0 … window − 1:

    i = e_c − q,    M_i += λ_c,    λ_c ← J_iᵀ λ_c + [q < stride] ∂ℓ_i/∂h_i

and the weight gradient is one product over all steps, Σ_i (∂⁺h_{i+1}/∂w)ᵀ M_i, at the end.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbptt.arrays import align_leading, is_key, split_inexact, widened, zeros_along
from jbptt.engine import Paths, parallel_pullback
from jbptt.losses import batch_steps
from jbptt.recurrence import trajectory
from jbptt.segments import Sums, add_losses, parts_of, paths_of
from jbptt.types import Batch, Carry, Loss, Params, PyTree, Step, exported


@exported
class History(NamedTuple):
    """The latest steps before an update, leaves `[length, ...]`; `exists` is False where there is none yet."""

    carries: Carry
    xs: PyTree
    mask: jax.Array
    exists: jax.Array


def empty_history(length: int, carry: Carry, batch: Batch, batch_shape: tuple[int, ...]) -> History:
    """A history of `length` steps that never were. Of `batch` only the shapes behind T are read."""
    carries = jax.tree.map(lambda a: jnp.broadcast_to(a, (length, *jnp.shape(a))), carry)

    def zeros(leaf):
        if is_key(leaf):
            key = jax.random.key(0, impl=jax.random.key_impl(jnp.empty((0,), leaf.dtype)))
            return jnp.broadcast_to(key, (length, *leaf.shape[1:]))
        return zeros_along(leaf, length)

    mask = None if batch.mask is None else ~zeros_along(batch.mask, length)
    mask = _whole_mask(mask, (length, *batch_shape))
    return History(carries, jax.tree.map(zeros, batch.xs), mask, jnp.zeros(length, bool))


def _whole_mask(mask: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
    """A mask `[T]` or `[T, *batch]`, or none, as `[T, *batch]`."""
    if mask is None:
        return jnp.ones(shape, bool)
    return jnp.broadcast_to(align_leading(mask, len(shape)), shape)


def extend(history: History, carries: Carry, batch: Batch) -> History:
    """The history followed by the steps of `batch`, whose entering carries are `carries`."""
    shape = (batch_steps(batch), *history.mask.shape[1:])
    steps = History(carries, batch.xs, _whole_mask(batch.mask, shape), jnp.ones(shape[0], bool))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), history, steps)


def with_stand_ins(steps: History, first: int) -> History:
    """Puts step `first` in the place of those that never were: the user's step meets only real inputs."""
    filled = jax.tree.map(lambda a: jnp.where(align_leading(steps.exists, a.ndim), a, a[first]), steps)
    return filled._replace(exists=steps.exists)


def latest(history: History, length: int) -> History:
    """The last `length` steps."""
    return jax.tree.map(lambda a: a[a.shape[0] - length :], history)


def pad_front(history: History, length: int) -> History:
    """The history with steps that never were in front, up to `length`."""
    missing = length - history.mask.shape[0]
    front = jax.tree.map(lambda a: jnp.broadcast_to(a[:1], (missing, *a.shape[1:])), history)
    front = front._replace(exists=jnp.zeros_like(front.exists))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), front, history)


def chunk_ends(num_history: int, num_steps: int, stride: int, phase: Any) -> jax.Array:
    """Where each chunk of `stride` losses ends, counted from the history's start; `phase` may be traced."""
    overhang = 0 if isinstance(phase, int) else stride - 1
    num_chunks = -(-(num_steps + overhang) // stride)
    return num_history - phase + stride * jnp.arange(1, num_chunks + 1) - 1


class ForwardPass(NamedTuple):
    """A forward pass over one batch, and all that backward passes through it need.

    Attributes:
      sums: with the batch's own added; of the gradient, what the readout alone contributes.
      carry: after the batch.
      steps: the history and the batch's steps.
      real: the same, stand-ins where there never was a step.
      outputs_bar: `∂L` in the core's outputs of `steps`, 0 in the history.
      core: the recurrent part as a step on (x, mask).
      params: its parameters.
      live: which leaves have cotangents.
    """

    sums: Sums
    carry: Carry
    steps: History
    real: History
    outputs_bar: list
    core: Any
    params: Params
    live: Paths


def pass_forward(
    step: Step, loss: Loss, params: Params, carry: Carry, batch: Batch, history: History, sums: Sums | None
) -> ForwardPass:
    """Runs the batch, its readouts and its losses. Earlier steps stay as they are cached, never replayed."""
    parts = parts_of(step, loss)
    live = paths_of(parts, params, carry, batch)
    carry, (carries, outputs) = trajectory(parts.core, params, carry, (batch.xs, batch.mask), None, batch_steps(batch))
    sums, cotangents = add_losses(parts, params, outputs, batch, live, sums)
    steps = extend(history, carries, batch)
    num_history = history.mask.shape[0]
    outputs_bar = [jnp.concatenate([zeros_along(y, num_history), y]) for y in cotangents]
    return ForwardPass(sums, carry, steps, with_stand_ins(steps, num_history), outputs_bar, parts.core, params, live)


def carry_back(passed: ForwardPass, ends: jax.Array, first: Any, window: Any, stride: int) -> tuple[list, list]:
    """M: for every step, the sum over chunks of the cotangents that reach the carry it emits.

    And beside it the sum of those that reach the carry which step `first` receives (0 if it is before all steps).
    `window` may be traced: the loop then takes as many rounds as it says.
    """
    num_steps, steps = passed.real.mask.shape[0], passed.real
    leaves, _ = split_inexact(steps.carries)
    real = jnp.concatenate([steps.exists, jnp.zeros(stride, bool)])  # a chunk may end after the last step

    def select(array, keep):
        return jnp.where(align_leading(keep, array.ndim), array, 0)

    def body(q, state):
        cotangents, total, entering = state
        i = ends - q
        keep = real[i]
        is_first = keep & (i == first)
        i = jnp.minimum(i, num_steps - 1)
        # Until a chunk meets its first step it has nothing to carry; before the stream's start, nowhere to.
        cotangents = [select(c, keep) for c in cotangents]
        total = [m.at[i].add(c.astype(m.dtype)) for m, c in zip(total, cotangents, strict=True)]
        at = jax.tree.map(lambda a: a[i], steps)
        own = [select(y[i], keep & (q < stride)) for y in passed.outputs_bar]
        _, pull = parallel_pullback(
            passed.core, passed.params, at.carries, (at.xs, at.mask), ends.shape[0], passed.live
        )
        _, cotangents = pull(cotangents, own, None)
        entering = [e + jnp.sum(select(c, is_first), 0, e.dtype) for e, c in zip(entering, cotangents, strict=True)]
        return cotangents, total, entering

    start = [zeros_along(leaf, ends.shape[0]) for leaf in leaves]
    zeros = [widened(jnp.zeros_like(leaf)) for leaf in leaves]
    _, total, entering = jax.lax.fori_loop(0, window, body, (start, zeros, [z[0] for z in zeros]))
    return [m.astype(leaf.dtype) for m, leaf in zip(total, leaves, strict=True)], entering


def overlapping_sums(
    passed: ForwardPass, num_history: int, phase: Any, first: Any, *, window: Any, stride: int
) -> tuple[Sums, list]:
    """The sums of one batch under TBPTT(stride, window), and the cotangents of the carry that step `first` receives.

    The history must reach back `window − stride` steps, and `phase` more where a chunk is under way.
    Earlier steps are linearised at the given parameters on their cached (carry, x).
    Time O(T·window/stride) step derivatives in `window` rounds, memory O(T + history).
    """
    real, num_steps = passed.real, passed.real.mask.shape[0]
    ends = chunk_ends(num_history, num_steps - num_history, stride, phase)
    total, entering = carry_back(passed, ends, first, window, stride)
    _, pull = parallel_pullback(passed.core, passed.params, real.carries, (real.xs, real.mask), num_steps, passed.live)
    grad, _ = pull(total, passed.outputs_bar, passed.sums.grad)
    return passed.sums._replace(grad=grad), entering
