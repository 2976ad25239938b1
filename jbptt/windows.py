"""Truncated BPTT: windows one after another, side by side, or overlapping.

Blocks go back window by window, or in groups under vmap. Windows that overlap are those of TBPTT(k1
= stride, k2 = window), which for each chunk of `stride` losses goes back through the `window` steps
that end with the chunk (Williams & Peng, 1990). With e_c the chunk's last step, all chunks c of a
group go back together, one step at a time, q = 0 … window − 1:

    i = e_c − q,    M_i += λ_c,    λ_c ← J_iᵀ λ_c + [q < stride] (∂y_i/∂h_{i−1})ᵀ ȳ_i

with J_i = ∂h_i/∂h_{i−1}, h_i what step i emits, and ȳ_i the cotangents of the core's outputs. The
weight gradient is one product over all steps, Σ_i (∂⁺h_i/∂w)ᵀ M_i + (∂⁺y_i/∂w)ᵀ ȳ_i, at the end.

Pieces of a batch follow one another: each is handed the carry by the one before it, and the sums of
all add up.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jbptt.arrays import align_leading, split_inexact, steps_from, widened, zeros_along
from jbptt.engine import same_under_vmap
from jbptt.losses import batch_steps
from jbptt.past_steps import PastSteps, empty_history, extend, latest, pad_front, with_stand_ins
from jbptt.problem import Parts, Problem
from jbptt.segments import (
    BackwardPass,
    ForwardPass,
    Sums,
    Updated,
    back_through,
    forward,
    pass_forward,
)
from jbptt.types import Batch


def sum_pieces(
    run: Callable, state: Any, batch: Batch, length: int, sums: Sums | None
) -> tuple[Sums, Any]:
    """Sums what `run(state, piece, sums) -> (sums, state)` finds in pieces of `length` steps.

    The last one may be shorter. A running total goes from piece to piece, so that what is large (a
    table of which few rows are looked up) is not added up whole for each.
    """
    num_whole, rest = divmod(batch_steps(batch), length)
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


def batch_part(batch: Batch, start: int, stop: int) -> Batch:
    """Steps start … stop − 1."""
    return jax.tree.map(lambda a: a[start:stop], batch)


# Blocks: stride = window.


def blocks_at_once(problem: Problem, window: int) -> int:
    """How many blocks go back side by side where the plan does not say.

    Of a single example up to 64, fewer if their carries take more than a mebibyte: nothing else
    makes its products tall. On CPU with more examples, or of few blocks, it may cost more than it
    gives: one, as where the step's program holds something that may compute something else under
    vmap.
    """
    num_windows = problem.num_steps // window
    if math.prod(problem.batch_shape) > 1 or num_windows < 16:
        return 1
    of_step = sum(
        leaf.size * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(problem.carry)
        if hasattr(leaf, "size")
    )
    most = min(64, num_windows, max(1, 2**20 // max(1, window * of_step)))
    x = jax.eval_shape(lambda xs: jax.tree.map(lambda a: a[0], xs), problem.batch.xs)
    # The whole step: a readout, too, may draw or choose.
    if most == 1 or not same_under_vmap(problem.step, problem.params, problem.carry, x):
        return 1
    # Windows that are left over go alone: of the sizes from half of it on, the largest that leaves
    # the fewest.
    return min(range(-(-most // 2), most + 1), key=lambda number: (num_windows % number, -number))


def side_by_side(
    problem: Problem, window: int, segment: int | None, sums: Sums | None
) -> tuple[BackwardPass, list]:
    """Whole windows that go back at once, under vmap; the cotangents of the first one's carry."""
    batch, num_windows = problem.batch, problem.num_steps // window

    def inputs_at(i):
        return problem.on(None, steps_from(batch, i * window, window)).inputs

    carry, starts = forward(problem, inputs_at, num_windows, window)
    pieces = jax.tree.map(
        lambda a: a.reshape(num_windows, window, *a.shape[1:]).swapaxes(0, 1), batch
    )
    core, readout, loss = problem.parts
    parts = Parts(jax.vmap(core, (None, 0, 0)), jax.vmap(readout, (None, 0)), jax.vmap(loss))
    windows = replace(
        problem.on(starts, pieces), parts=parts, batch_shape=(num_windows, *problem.batch_shape)
    )
    passed = back_through(windows, segment or window, sums)
    return passed._replace(carry=carry), [c[0] for c in passed.cotangents]


def in_blocks(
    problem: Problem, *, window: int, segment: int | None, parallel: int | None, streams: bool
) -> Updated:
    """Window after window, or in groups of `parallel`; a history if the last is unfinished."""
    batch, num_steps = problem.batch, problem.num_steps
    if parallel is None:
        parallel = blocks_at_once(problem, window)
    nothing = [jnp.zeros_like(leaf) for leaf in split_inexact(problem.carry)[0]]

    # The state of the pieces: carry, the carry before the last piece, cotangents of the first,
    # whether this is it.
    def one(state, piece, sums):
        carry, _, first, is_first = state
        passed = back_through(problem.on(carry, piece), segment, sums)
        return passed.sums, (
            passed.carry,
            carry,
            _first(first, is_first, passed.cotangents),
            jnp.array(False),
        )

    def group(state, piece, sums):
        carry, _, first, is_first = state
        passed, cotangents = side_by_side(problem.on(carry, piece), window, segment, sums)
        return passed.sums, (
            passed.carry,
            passed.carry,
            _first(first, is_first, cotangents),
            jnp.array(False),
        )

    state, sums = (problem.carry, problem.carry, nothing, jnp.array(True)), None
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
    if rest == 0 or not streams:
        return Updated(sums, after, cotangents)
    last = problem.on(last_start, batch_part(batch, num_steps - rest, num_steps))
    history = empty_history(window - 1, problem.carry, batch, problem.batch_shape)
    history = latest(extend(history, last.trajectory()[1], last.batch), window - 1)
    return Updated(sums, after, cotangents, history)


def _first(before: list, is_first: jax.Array, now: list) -> list:
    """The cotangents of the first piece."""
    pairs = zip(before, now, strict=True)
    return [jnp.where(is_first, of_now, of_before) for of_before, of_now in pairs]


def in_blocks_under_way(
    problem: Problem, history: PastSteps, phase: Any, *, window: int, segment: int | None
) -> Updated:
    """Blocks of a stream, the first begun `phase` (perhaps traced) steps before the batch.

    The batch goes back as one, with a gate of 0 where a block begins. What leaves it goes on
    through the steps of the first block that the history holds.
    """
    num_steps = problem.num_steps
    t = jnp.arange(num_steps)
    gates = ((t + phase) % window != 0) | (t == 0)
    segment = segment or max(window, math.isqrt(num_steps))
    passed = back_through(replace(problem, gates=gates), segment)
    sums = back_through_history(problem, history, phase, passed)
    # The segment with the first of the last window − 1 steps.
    first = max(0, num_steps - (window - 1)) // segment
    start = jax.tree.map(lambda a: a[first], passed.starts)
    later = problem.on(start, batch_part(problem.batch, first * segment, num_steps))
    history = latest(extend(history, later.trajectory()[1], later.batch), window - 1)
    return Updated(sums, passed.carry, passed.cotangents, history)


def back_through_history(
    problem: Problem, history: PastSteps, phase: Any, passed: BackwardPass
) -> Sums:
    """Adds the gradient of a history's last `phase` steps, from what reaches the carry after them.

    Step by step, each at its cached (carry, x), as the loop over a batch would: never side by side.
    """
    length = history.mask.shape[0]
    first = jax.tree.map(lambda a: jnp.asarray(a)[None], problem.carry)
    filled = with_stand_ins(extend(history, first, batch_part(problem.batch, 0, 1)), length)
    steps = latest(filled, length + 1)
    silent = problem.without_losses  # the losses in the history have been counted

    def body(state, inputs):
        grad, cotangents = state
        i, at = inputs
        reached = (i >= length - phase) & at.exists
        cotangents = [jnp.where(reached, c, 0) for c in cotangents]
        pull = silent.pullback(at.carries, (at.xs, at.mask))
        grad, cotangents = pull(cotangents, [None] * len(silent.live.outputs), grad)
        return (grad, cotangents), None

    state = passed.sums.grad, passed.cotangents
    inputs = jnp.arange(length), jax.tree.map(lambda a: a[:-1], steps)
    (grad, _), _ = lax.scan(body, state, inputs, reverse=True)
    return passed.sums._replace(grad=grad)


# Windows that overlap: stride < window.


class Streamed(NamedTuple):
    """A forward pass that goes on from earlier steps: what the backward passes read.

    Attributes:
      passed: the batch's own.
      steps: the history and the batch's steps.
      filled: the same, stand-ins where there never was a step.
      outputs_bar: `∂L` in the core's outputs of `steps`, 0 in the history.
    """

    passed: ForwardPass
    steps: PastSteps
    filled: PastSteps
    outputs_bar: list


def go_on(problem: Problem, history: PastSteps, sums: Sums | None) -> Streamed:
    """Runs batch, readouts and losses. Earlier steps stay as cached, never replayed."""
    passed = pass_forward(problem, sums)
    steps = extend(history, passed.carries, problem.batch)
    num_history = history.mask.shape[0]
    outputs_bar = [jnp.concatenate([zeros_along(y, num_history), y]) for y in passed.outputs_bar]
    return Streamed(passed, steps, with_stand_ins(steps, num_history), outputs_bar)


def chunk_ends(num_history: int, num_steps: int, stride: int, phase: Any) -> jax.Array:
    """Where the chunks of `stride` losses end, from the history's start; `phase` may be traced."""
    # A phase that is an int is 0: the chunks are whole.
    overhang = 0 if isinstance(phase, int) else stride - 1
    num_chunks = -(-(num_steps + overhang) // stride)
    return num_history - phase + stride * jnp.arange(1, num_chunks + 1) - 1


def adjoint_sums(
    problem: Problem, streamed: Streamed, ends: jax.Array, first: Any, window: Any, stride: int
) -> tuple[list, list]:
    """M: for every step, the sum over chunks of the cotangents that reach the carry it emits.

    And beside it the sum of those that reach the carry which step `first` receives (0 if it is
    before all steps). `window` may be traced: the loop then takes as many rounds as it says.
    """
    num_steps, steps = streamed.filled.mask.shape[0], streamed.filled
    leaves, _ = split_inexact(steps.carries)
    # A chunk may end after the last step.
    exists = jnp.concatenate([steps.exists, jnp.zeros(stride, bool)])

    def select(array, keep):
        return jnp.where(align_leading(keep, array.ndim), array, 0)

    def body(q, state):
        cotangents, reaching, entering = state
        i = ends - q
        keep = exists[i]
        is_first = keep & (i == first)
        i = jnp.minimum(i, num_steps - 1)
        # Until a chunk meets its first step it has nothing to carry; before the stream's start,
        # nowhere to.
        cotangents = [select(c, keep) for c in cotangents]
        pairs = zip(reaching, cotangents, strict=True)
        reaching = [m.at[i].add(c.astype(m.dtype)) for m, c in pairs]
        at = jax.tree.map(lambda a: a[i], steps)
        own = [select(y[i], keep & (q < stride)) for y in streamed.outputs_bar]
        pull = problem.parallel_pullback(at.carries, (at.xs, at.mask), ends.shape[0])
        _, cotangents = pull(cotangents, own, None)
        entering = [
            e + jnp.sum(select(c, is_first), 0, e.dtype)
            for e, c in zip(entering, cotangents, strict=True)
        ]
        return cotangents, reaching, entering

    start = [zeros_along(leaf, ends.shape[0]) for leaf in leaves]
    zeros = [widened(jnp.zeros_like(leaf)) for leaf in leaves]
    state = start, zeros, [z[0] for z in zeros]
    _, reaching, entering = lax.fori_loop(0, window, body, state)
    return [m.astype(leaf.dtype) for m, leaf in zip(reaching, leaves, strict=True)], entering


def overlapping_sums(
    problem: Problem,
    streamed: Streamed,
    num_history: int,
    phase: Any,
    first: Any,
    *,
    window: Any,
    stride: int,
) -> tuple[Sums, list]:
    """The sums under TBPTT(stride, window), and the cotangents of what step `first` receives.

    The history must reach back `window − stride` steps, and `phase` more where a chunk is under
    way. Earlier steps are linearised at the given parameters on their cached (carry, x).
    Time O(T·window/stride) step derivatives in `window` rounds, memory O(T + history).

    Args:
      problem: one batch.
      streamed: its forward pass, which goes on from the history.
      num_history: steps of the history.
      phase: steps into the current stride.
      first: the step whose cotangents are asked for, counted from the history's start; may be
        traced.
      window: the most steps that a loss sees; may be traced.
      stride: losses per backward pass.
    """
    steps, num_steps = streamed.filled, streamed.filled.mask.shape[0]
    ends = chunk_ends(num_history, num_steps - num_history, stride, phase)
    reaching, entering = adjoint_sums(problem, streamed, ends, first, window, stride)
    pull = problem.parallel_pullback(steps.carries, (steps.xs, steps.mask), num_steps)
    sums = streamed.passed.sums
    grad, _ = pull(reaching, streamed.outputs_bar, sums.grad)
    return sums._replace(grad=grad), entering


def _chunks_per_group(num_steps: int, window: int, stride: int, smallest: int) -> int:
    """About a window of chunks; if that leaves a rest, half to twice as many that leave none.

    Groups of one size have one body to compile.
    """
    about = max(smallest, -(-window // stride))
    sizes = [about, *range(2 * about, max(smallest - 1, about // 2), -1)]
    return next((size for size in sizes if num_steps % (size * stride) == 0), about)


def in_strides(
    problem: Problem,
    history: PastSteps,
    phase: Any,
    *,
    window: int,
    stride: int,
    parallel: int | None,
) -> Updated:
    """Group after group of chunks that go back side by side, a few windows in memory at a time."""
    # With a phase, a group meets one chunk more than it holds: at least 4, so that this costs
    # little.
    num_chunks = parallel or _chunks_per_group(
        problem.num_steps, window, stride, 1 if phase is None else 4
    )
    if phase is None:
        phase = 0
        if problem.num_steps % stride:
            history = pad_front(history, window - 1)
    length = history.mask.shape[0]

    # `first`: where the carry that entered the update is received; it moves back from group to
    # group.
    def run(state, piece, sums):
        carry, history, first, entering = state
        part = problem.on(carry, piece)
        streamed = go_on(part, history, sums)
        sums, more = overlapping_sums(
            part, streamed, length, phase, first, window=window, stride=stride
        )
        entering = [e + m.astype(e.dtype) for e, m in zip(entering, more, strict=True)]
        return sums, (
            streamed.passed.carry,
            latest(streamed.steps, length),
            first - batch_steps(piece),
            entering,
        )

    entering = [widened(jnp.zeros_like(leaf)) for leaf in split_inexact(problem.carry)[0]]
    state = problem.carry, history, jnp.asarray(length), entering
    sums, (carry, history, _, entering) = sum_pieces(
        run, state, problem.batch, num_chunks * stride, None
    )
    return Updated(sums, carry, entering, history)
