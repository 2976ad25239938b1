"""A batch piece by piece: windows one after another, or in groups that go back side by side.

A piece is handed `(carry, …)` by the one before it, and the sums of all pieces add up. What a window of the
next update may still reach is kept as a `History`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jbptt.arrays import split_inexact, steps_from, widened
from jbptt.cells import split_readout
from jbptt.engine import pullback, same_under_vmap
from jbptt.losses import batch_steps
from jbptt.recurrence import trajectory
from jbptt.segments import BackwardPass, Parts, Sums, back_through, forward, parts_of, paths_of, vmapped
from jbptt.types import Batch, Carry, Loss, Params, Step
from jbptt.windows import (
    History,
    empty_history,
    extend,
    latest,
    overlapping_sums,
    pad_front,
    pass_forward,
    with_stand_ins,
)


def windows_at_once(step: Step, params: Params, carry: Carry, batch: Batch, window: int, batch_shape: tuple) -> int:
    """How many blocks go back at once where no one says: of a single example 64 or what takes a mebibyte of carries.

    Nothing else makes its products tall; on CPU with more examples, or of few blocks, it may cost more than it gives.
    One, if the step holds anything that may compute something else side by side (`programs.same_under_vmap`).
    """
    num_windows = batch_steps(batch) // window
    if math.prod(batch_shape) > 1 or num_windows < 16:
        return 1
    of_step = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(carry) if hasattr(leaf, "size"))
    most = min(64, num_windows, max(1, 2**20 // max(1, window * of_step)))
    x = jax.eval_shape(lambda xs: jax.tree.map(lambda a: a[0], xs), batch.xs)
    if most == 1 or not same_under_vmap(step, params, carry, x):
        return 1
    # Windows that are left over go alone: of the sizes from half of it on, the largest that leaves the fewest.
    return min(range(-(-most // 2), most + 1), key=lambda number: (num_windows % number, -number))


def sum_pieces(run: Callable, state: Any, batch: Batch, length: int, sums: Sums | None) -> tuple[Sums, Any]:
    """Adds what `run(state, piece, sums) -> (sums, state)` finds, over pieces of `length` steps and the ragged rest.

    A running total goes from piece to piece, so that what is large (a table of which few rows are looked up) is not
    added up whole for each.
    """
    num_whole, rest = divmod(batch_steps(batch), length)
    batch = jax.tree.map(jnp.asarray, batch)
    tail = jax.tree.map(lambda a: a[num_whole * length :], batch)
    if num_whole + (rest > 0) == 1:
        return run(state, tail if rest else batch, sums)
    sample = tail if rest else steps_from(batch, 0, length)
    shapes = jax.eval_shape(run, state, sample, sums)[0]
    zeros = jax.tree.map(lambda shape: lax.full_like(shape, 0), shapes)
    total = zeros if sums is None else jax.tree.map(jnp.add, zeros, sums)

    def one(i, sums_and_state):
        sums, state = sums_and_state
        return run(state, steps_from(batch, i * length, length), sums)

    total, state = lax.fori_loop(0, num_whole, one, (total, state))
    return run(state, tail, total) if rest else (total, state)


def side_by_side(
    parts: Parts, params: Params, carry: Carry, batch: Batch, window: int, sums: Sums | None
) -> tuple[BackwardPass, list]:
    """Whole windows whose backward passes run at once, under vmap, and the cotangents of the first one's carry."""
    num_windows = batch_steps(batch) // window

    def window_at(i):
        return steps_from(batch, i * window, window), None

    carry, starts = forward(parts.core, params, carry, window_at, num_windows)
    pieces = jax.tree.map(lambda a: a.reshape(num_windows, window, *a.shape[1:]).swapaxes(0, 1), batch)
    passed = back_through(vmapped(parts), params, starts, pieces, segment=window, sums=sums)
    return passed._replace(carry=carry), [c[0] for c in passed.cotangents]


class Streamed(NamedTuple):
    """What an update of truncated BPTT comes to.

    Attributes:
      sums: loss, gradient, weight and aux.
      carry: after the batch.
      history: what a window of the next update may reach; None where none can.
      cotangents: of the carry that entered the update, a list over inexact leaves.
    """

    sums: Sums
    carry: Carry
    history: History | None
    cotangents: list


def in_blocks(
    step: Step,
    loss: Loss,
    params: Params,
    carry: Carry,
    batch: Batch,
    batch_shape: tuple[int, ...],
    *,
    window: int,
    parallel: int | None,
) -> Streamed:
    """Window after window, or groups of `parallel` windows; a history where the last one is left unfinished."""
    parts = parts_of(step, loss)
    if parallel is None:
        parallel = windows_at_once(step, params, carry, batch, window, batch_shape)
    nothing = [jnp.zeros_like(leaf) for leaf in split_inexact(carry)[0]]

    # The state of the pieces: carry, the carry before the last piece, cotangents of the first, whether this is it.
    def one(state, piece, sums):
        carry, _, first, is_first = state
        passed = back_through(parts, params, carry, piece, sums=sums)
        return passed.sums, (passed.carry, carry, _first(first, is_first, passed.cotangents), jnp.array(False))

    def group(state, piece, sums):
        carry, _, first, is_first = state
        passed, cotangents = side_by_side(parts, params, carry, piece, window, sums)
        return passed.sums, (passed.carry, passed.carry, _first(first, is_first, cotangents), jnp.array(False))

    num_steps, state, sums = batch_steps(batch), (carry, carry, nothing, jnp.array(True)), None
    whole = num_steps - num_steps % (parallel * window) if parallel > 1 else 0
    for run, part, length in (
        (group, batch_part(batch, 0, whole), parallel * window),
        (one, batch_part(batch, whole, num_steps), window),
    ):
        if batch_steps(part):
            sums, state = sum_pieces(run, state, part, length, sums)
    after, last_start, cotangents, _ = state
    assert sums is not None  # a batch has one step at least
    rest = num_steps % window
    if rest == 0:
        return Streamed(sums, after, None, cotangents)
    steps = batch_part(batch, num_steps - rest, num_steps)
    _, (carries, _) = trajectory(split_readout(step)[0], params, last_start, steps.xs, steps.mask, rest)
    history = extend(empty_history(window - 1, carry, batch, batch_shape), carries, steps)
    return Streamed(sums, after, latest(history, window - 1), cotangents)


def _first(before: list, is_first: jax.Array, now: list) -> list:
    """The cotangents of the first piece."""
    return [jnp.where(is_first, b, a) for a, b in zip(before, now, strict=True)]


def in_blocks_under_way(
    step: Step, loss: Loss, params: Params, carry: Carry, batch: Batch, history: History, phase: Any, *, window: int
) -> Streamed:
    """Blocks of a stream whose first has begun `phase` steps before the batch; `phase` may be traced.

    The batch goes back as one, with a gate of 0 where a block begins. What leaves it goes on through the steps of
    the first block that the history holds.
    """
    parts, num_steps = parts_of(step, loss), batch_steps(batch)
    t = jnp.arange(num_steps)
    gates = ((t + phase) % window != 0) | (t == 0)
    segment = max(window, math.isqrt(num_steps))
    passed = back_through(parts, params, carry, batch, gates, segment)
    sums = back_through_history(parts, params, carry, batch, history, phase, passed)
    # The last window − 1 steps lie in the last two segments.
    later = batch_part(batch, max(0, (num_steps - 1) // segment - 1) * segment, num_steps)
    _, (carries, _) = trajectory(parts.core, params, passed.start, (later.xs, later.mask), None, batch_steps(later))
    return Streamed(sums, passed.carry, latest(extend(history, carries, later), window - 1), passed.cotangents)


def back_through_history(
    parts: Parts, params: Params, carry: Carry, batch: Batch, history: History, phase: Any, passed: BackwardPass
) -> Sums:
    """Adds the gradient of the last `phase` steps of a history, from the cotangents of the carry that follows them.

    Step by step, each at its cached (carry, x), as the loop over a batch would: never side by side.
    """
    length = history.mask.shape[0]
    first = jax.tree.map(lambda a: jnp.asarray(a)[None], carry)
    real = with_stand_ins(extend(history, first, batch_part(batch, 0, 1)), length)
    steps = latest(real, length + 1)
    live = paths_of(parts, params, carry, batch)
    silent = live._replace(outputs=(False,) * len(live.outputs))  # the losses in the history have been counted

    def body(state, inputs):
        cotangents, grad = state
        i, at = inputs
        reached = (i >= length - phase) & at.exists
        cotangents = [jnp.where(reached, c, 0) for c in cotangents]
        _, pull = pullback(parts.core, params, at.carries, (at.xs, at.mask), silent)
        grad, cotangents = pull(cotangents, [None] * len(live.outputs), grad)
        return (cotangents, grad), None

    state, inputs = (passed.cotangents, passed.sums.grad), (jnp.arange(length), jax.tree.map(lambda a: a[:-1], steps))
    (_, grad), _ = lax.scan(body, state, inputs, reverse=True)
    return passed.sums._replace(grad=grad)


def batch_part(batch: Batch, start: int, stop: int) -> Batch:
    """Steps start … stop − 1."""
    return jax.tree.map(lambda a: jnp.asarray(a)[start:stop], batch)


def _chunks_per_group(num_steps: int, window: int, stride: int, smallest: int) -> int:
    """About a window; if that leaves a rest, a size between half and two that leaves none, to compile one body."""
    about = max(smallest, -(-window // stride))
    sizes = [about, *range(2 * about, max(smallest - 1, about // 2), -1)]
    return next((size for size in sizes if num_steps % (size * stride) == 0), about)


def in_strides(
    step: Step,
    loss: Loss,
    params: Params,
    carry: Carry,
    batch: Batch,
    history: History,
    phase: Any,
    *,
    window: int,
    stride: int,
    parallel: int | None,
) -> Streamed:
    """Group after group of chunks that go back side by side, a few windows in memory at a time."""
    # With a phase, a group meets one chunk more than it holds: at least 4, so that this costs little.
    num_chunks = parallel or _chunks_per_group(batch_steps(batch), window, stride, 1 if phase is None else 4)
    if phase is None:
        phase = 0
        if batch_steps(batch) % stride:
            history = pad_front(history, window - 1)
    length = history.mask.shape[0]

    # `first`: where the carry that entered the update is received; it moves back from group to group.
    def run(state, piece, sums):
        carry, history, first, entering = state
        passed = pass_forward(step, loss, params, carry, piece, history, sums)
        sums, more = overlapping_sums(passed, length, phase, first, window=window, stride=stride)
        entering = [e + m.astype(e.dtype) for e, m in zip(entering, more, strict=True)]
        return sums, (passed.carry, latest(passed.steps, length), first - batch_steps(piece), entering)

    entering = [widened(jnp.zeros_like(leaf)) for leaf in split_inexact(carry)[0]]
    state = carry, history, jnp.asarray(length), entering
    sums, (carry, history, _, entering) = sum_pieces(run, state, batch, num_chunks * stride, None)
    return Streamed(sums, carry, history, entering)
