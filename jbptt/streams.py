"""A batch piece by piece: windows one after another, or in groups that go back side by side.

A piece is handed `(carry, …)` by the one before it, and the sums of all pieces add up. What a window of the
next update may still reach is kept as a `History`.
"""

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jbptt.adjoint import Sums, batch_steps, forward, gradient_sums
from jbptt.cells import split_readout, with_readout
from jbptt.recurrence import steps_from, trajectory
from jbptt.types import Batch, Carry, Loss, Params, Step
from jbptt.windows import History, empty_history, extend, latest, overlapping_sums, pad_front, pass_forward


def windows_at_once(carry: Carry, window: int, batch_shape: tuple[int, ...], num_windows: int) -> int:
    """How many blocks go back at once where no one says: of a single example 64 or what takes a mebibyte of carries.

    Nothing else makes its products tall; on CPU with more examples, or of few blocks, it may cost more than it gives.
    """
    if math.prod(batch_shape) > 1 or num_windows < 16:
        return 1
    of_step = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(carry) if hasattr(leaf, "size"))
    most = min(64, num_windows, max(1, 2**20 // max(1, window * of_step)))
    # Windows that are left over go alone: of the sizes from half of it on, the largest that leaves the fewest.
    return min(range(-(-most // 2), most + 1), key=lambda number: (num_windows % number, -number))


def sum_pieces(run: Callable, state: Any, batch: Batch, length: int) -> tuple[Any, Any]:
    """Adds up `run(state, piece) -> (sums, state)` over pieces of `length` steps and the ragged rest."""
    num_whole, rest = divmod(batch_steps(batch), length)
    batch = jax.tree.map(jnp.asarray, batch)

    def add(sums_and_state, piece):
        sums, state = sums_and_state
        more, state = run(state, piece)
        return jax.tree.map(jnp.add, sums, more), state

    tail = jax.tree.map(lambda a: a[num_whole * length :], batch)
    sample = tail if rest else steps_from(batch, 0, length)
    zeros = jax.tree.map(lambda s: lax.full_like(s, 0), jax.eval_shape(run, state, sample)[0])
    total = (zeros, state)
    if num_whole:
        total = lax.fori_loop(0, num_whole, lambda i, total: add(total, steps_from(batch, i * length, length)), total)
    return add(total, tail) if rest else total


def side_by_side(step: Step, loss: Loss, params: Params, carry: Carry, batch: Batch, window: int) -> tuple[Sums, Carry]:
    """The sums of whole windows whose backward passes run at once, as examples, and the carry after them."""
    num_windows = batch_steps(batch) // window
    core, readout = split_readout(step)
    carry, starts = forward(step, params, carry, lambda i: (steps_from(batch, i * window, window), None), num_windows)
    pieces = jax.tree.map(lambda a: a.reshape(num_windows, window, *a.shape[1:]).swapaxes(0, 1), batch)
    all_windows = with_readout(jax.vmap(core, (None, 0, 0)), jax.vmap(readout, (None, 0)))
    sums, _ = gradient_sums(all_windows, jax.vmap(loss), params, starts, pieces, segment=window)
    return sums, carry


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
) -> tuple[Sums, Carry, History | None]:
    """Window after window, or groups of `parallel` windows; a history where the last one is left unfinished."""
    parallel = parallel or windows_at_once(carry, window, batch_shape, batch_steps(batch) // window)

    def one(state, piece):
        carry, _ = state
        sums, after = gradient_sums(step, loss, params, carry, piece)
        return sums, (after, carry)

    def group(state, piece):
        sums, after = side_by_side(step, loss, params, state[0], piece, window)
        return sums, (after, after)

    num_steps, state = batch_steps(batch), (carry, carry)
    whole = num_steps - num_steps % (parallel * window) if parallel > 1 else 0
    found = []
    for run, part, length in (
        (group, batch_part(batch, 0, whole), parallel * window),
        (one, batch_part(batch, whole, num_steps), window),
    ):
        if batch_steps(part):
            sums, state = sum_pieces(run, state, part, length)
            found.append(sums)
    total = reduce(partial(jax.tree.map, jnp.add), found)
    after, last_start = state
    rest = num_steps % window
    if rest == 0:
        return total, after, None
    steps = batch_part(batch, num_steps - rest, num_steps)
    _, (carries, _) = trajectory(split_readout(step)[0], params, last_start, steps.xs, steps.mask, rest)
    empty = empty_history(window - 1, carry, batch, batch_shape)
    return total, after, latest(extend(empty, carries, steps), window - 1)


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
) -> tuple[Sums, Carry, History]:
    """Group after group of chunks that go back side by side, a few windows in memory at a time."""
    # With a phase, a group meets one chunk more than it holds: at least 4, so that this costs little.
    num_chunks = parallel or _chunks_per_group(batch_steps(batch), window, stride, 1 if phase is None else 4)
    if phase is None:
        phase = 0
        if batch_steps(batch) % stride:
            history = pad_front(history, window - 1)
    length = history.mask.shape[0]

    def run(carry_and_history, piece):
        carry, history = carry_and_history
        passed = pass_forward(step, loss, params, carry, piece, history)
        sums = overlapping_sums(passed, length, phase, window=window, stride=stride)
        return sums, (passed.carry, latest(passed.steps, length))

    sums, (carry, history) = sum_pieces(run, (carry, history), batch, num_chunks * stride)
    return sums, carry, history
