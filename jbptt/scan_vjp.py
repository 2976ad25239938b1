"""The derivative of a scan: the engine's loops as a custom vjp, whole or segment by segment."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jbptt import engine
from jbptt.arrays import inexact_leaves, is_inexact, steps_from
from jbptt.engine import Paths, chosen, fast_or_plain, replaced
from jbptt.recurrence import first_order_gate, gated
from jbptt.types import Carry, Params, PyTree


@jax.tree_util.register_static
@dataclass(frozen=True)
class FloatingLeaves:
    """What is known while tracing of the floating leaves of (what f closes over, init, inputs).

    Attributes:
      dtypes: of each leaf.
      perturbed: of each leaf, whether its gradient is asked for.
      carry: the slice of them that is the carry's.
      last_carry: shapes of the floating leaves of the last carry, with dtype and placement.
    """

    dtypes: tuple[Any, ...]
    perturbed: tuple[bool, ...]
    carry: slice
    last_carry: tuple[Any, ...] = ()

    @property
    def perturbed_consts(self) -> tuple[bool, ...]:
        """Where a gradient is asked for in what f closes over."""
        return self.perturbed[: self.carry.start]

    @property
    def perturbed_carry(self) -> tuple[bool, ...]:
        """Where a gradient is asked for in the first carry."""
        return self.perturbed[self.carry]

    @property
    def perturbed_inputs(self) -> tuple[bool, ...]:
        """Where a gradient is asked for in the inputs."""
        return self.perturbed[self.carry.stop :]

    def gradients(self, consts_bar: list, carry_bar: list, inputs_bar: list) -> list:
        """One for each leaf, in its dtype; None where none is asked for."""
        bars = [*consts_bar, *chosen(carry_bar, self.perturbed_carry), *inputs_bar]
        dtypes = chosen(self.dtypes, self.perturbed)
        grads = [bar.astype(dtype) for bar, dtype in zip(bars, dtypes, strict=True)]
        return replaced([None] * len(self.dtypes), self.perturbed, grads)


class _Cotangents(NamedTuple):
    """Cotangents of a tree's floating leaves, and whether a loss reads them at all."""

    arrays: list
    read: tuple[bool, ...]


def _cotangents_of(tree: PyTree, shapes: Sequence = ()) -> _Cotangents:
    """Where no loss reads a leaf stand zeros of its shape, or None where no shapes are given."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    read = tuple(not isinstance(leaf, SymbolicZero) for leaf in leaves)

    def array_of(leaf, is_read, shape):
        if is_read:
            return leaf
        return None if shape is None else lax.full_like(shape, 0)

    shapes = shapes or [None] * len(leaves)
    return _Cotangents(list(map(array_of, leaves, read, shapes)), read)


@dataclass(frozen=True)
class Recurrence:
    """What is the same on the way forward and on the way back.

    Attributes:
      step: `(consts, carry, (x, mask)) -> (next_carry, y)`.
      num_steps: T.
      reverse: whether time runs from the last step to the first.
      segment: steps kept at a time, at most num_steps.
    """

    step: Callable
    num_steps: int
    reverse: bool
    segment: int

    @property
    def num_before_last(self) -> int:
        """Segments before the last one in time, which is whole or ragged and goes back first."""
        return (self.num_steps - 1) // self.segment

    @property
    def num_last(self) -> int:
        """Steps of the last segment."""
        return self.num_steps - self.num_before_last * self.segment

    # Backwards in time the last segment lies in front of the others, in the order of the inputs.

    def piece(self, tree: PyTree, i: Any) -> PyTree:
        """Segment i of those before the last, in the order of the inputs."""
        offset = self.num_last if self.reverse else 0
        return steps_from(tree, i * self.segment + offset, self.segment)

    def last(self, tree: PyTree) -> PyTree:
        """The last segment in time."""
        start = 0 if self.reverse else self.num_before_last * self.segment
        return steps_from(tree, start, self.num_last)

    def joined(self, pieces: PyTree, last: PyTree) -> PyTree:
        """All steps, from `pieces` `[num_before_last, segment, ...]` and the last segment."""

        def join(pieces, last):
            pieces = pieces.reshape((-1, *pieces.shape[2:]))
            return jnp.concatenate([last, pieces] if self.reverse else [pieces, last])

        return jax.tree.map(join, pieces, last)

    def by_segments(
        self, step: Callable, init: Carry, inputs: PyTree, recompute: bool = False
    ) -> tuple[tuple[Carry, PyTree], tuple[PyTree, Carry]]:
        """`lax.scan` segment by segment; and the carries that enter the segments.

        Of those before the last segment in time, `[num_before_last, ...]`, and of that one.
        """
        is_ragged = self.num_last != self.segment

        def scan(carry, piece, length):
            run = partial(lax.scan, step, length=length, reverse=self.reverse)
            return jax.checkpoint(run)(carry, piece) if recompute else run(carry, piece)

        def body(carry, i):
            piece = self.piece(inputs, i) if is_ragged else whole_piece(i)
            next_carry, ys = scan(carry, piece, self.segment)
            return next_carry, (carry, ys)

        def whole_piece(i):
            return steps_from(inputs, i * self.segment, self.segment)

        if is_ragged:
            numbers = jnp.arange(self.num_before_last)
            before_last, (starts, pieces) = lax.scan(body, init, numbers, reverse=self.reverse)
            carry, last = scan(before_last, self.last(inputs), self.num_last)
            return (carry, self.joined(pieces, last)), (starts, before_last)
        # One scan over all segments, the last among them, so that no copy joins the ys.
        numbers = jnp.arange(self.num_before_last + 1)
        carry, (starts, ys) = lax.scan(body, init, numbers, reverse=self.reverse)
        ys = jax.tree.map(lambda a: a.reshape((self.num_steps, *a.shape[2:])), ys)
        before, last = (slice(1, None), 0) if self.reverse else (slice(-1), -1)
        starts_before = jax.tree.map(lambda a: a[before], starts)
        return (carry, ys), (starts_before, jax.tree.map(lambda a: a[last], starts))

    def plain(
        self,
        consts: list,
        init: Carry,
        inputs: PyTree,
        gates: jax.Array | None,
    ) -> tuple[Carry, PyTree]:
        """The last carry and the ys, in public JAX: `lax.scan` with gates on the carry."""

        def step(carry, inputs_and_gate):
            inputs_t, gate = inputs_and_gate
            return self.step(consts, gated(carry, gate, first_order_gate), inputs_t)

        if self.num_before_last == 0:
            return lax.scan(step, init, (inputs, gates), self.num_steps, self.reverse)
        results, _ = self.by_segments(step, init, (inputs, gates), recompute=True)
        return results

    def run(
        self,
        consts: list,
        init: Carry,
        inputs: PyTree,
        gates: jax.Array | None,
    ) -> tuple[Carry, PyTree]:
        """The last carry and the ys, whose reverse mode is the engine's loops."""
        leaves, structure = jax.tree.flatten((consts, init, inputs))
        is_floating = list(map(is_inexact, leaves))
        floating = chosen(leaves, is_floating)
        discrete = replaced(leaves, is_floating, [None] * len(floating))
        num_consts, num_carry = len(inexact_leaves(consts)), len(inexact_leaves(init))
        of_carry = slice(num_consts, num_consts + num_carry)

        def rebuild(floating, discrete):
            return structure.unflatten(replaced(discrete, is_floating, floating))

        # All arrays are arguments: what a custom_vjp closes over must not be a tracer.
        @jax.custom_vjp
        def values(floating, discrete, gates):
            del gates
            consts, init, inputs = rebuild(floating, discrete)
            step = partial(self.step, consts)
            return lax.scan(step, init, inputs, self.num_steps, self.reverse)

        def forward(floating, discrete, gates):
            perturbed = tuple(leaf.perturbed for leaf in floating)
            arguments = floating, discrete, gates
            floating, discrete, gates = jax.tree.map(lambda leaf: leaf.value, arguments)
            of_leaves = FloatingLeaves(tuple(leaf.dtype for leaf in floating), perturbed, of_carry)
            results, kept = self.keep(of_leaves, *rebuild(floating, discrete))
            shapes = jax.eval_shape(lambda leaves: leaves, inexact_leaves(results[0]))
            of_leaves = replace(of_leaves, last_carry=tuple(shapes))
            return results, (of_leaves, floating, discrete, gates, kept)

        def backward(residual, cotangents):
            of_leaves, floating, discrete, gates, kept = residual
            last_carry_bar = _cotangents_of(cotangents[0], of_leaves.last_carry)
            ys_bar = _cotangents_of(cotangents[1])
            bars = last_carry_bar, ys_bar

            def by_loops():
                arguments = rebuild(floating, discrete)
                return of_leaves.gradients(*self.back(of_leaves, arguments, gates, kept, bars))

            def plainly():
                def run(floating):
                    consts, init, inputs = rebuild(floating, discrete)
                    carry, ys = self.plain(consts, init, inputs, gates)
                    return (
                        chosen(inexact_leaves(carry), last_carry_bar.read),
                        chosen(inexact_leaves(ys), ys_bar.read),
                    )

                _, pull = jax.vjp(run, floating)
                return pull(tuple(chosen(bar.arrays, bar.read) for bar in bars))[0]

            return fast_or_plain(by_loops, plainly), None, None

        values.defvjp(forward, backward, symbolic_zeros=True)
        return values(floating, discrete, gates)

    def loops(self, of_leaves: FloatingLeaves, consts: list, init: Carry, inputs: PyTree) -> Any:
        """The loops of one step, for gradients in what is perturbed."""
        flags = iter(of_leaves.perturbed_consts)
        is_param = [is_inexact(leaf) and next(flags) for leaf in consts]

        def step(params, carry, inputs_t):
            return self.step(replaced(consts, is_param, params), carry, inputs_t)

        first_inputs = jax.tree.map(lambda a: a[0], inputs)
        carry, ys = jax.eval_shape(self.step, consts, init, first_inputs)
        all_ys, all_carries = ((True,) * len(inexact_leaves(tree)) for tree in (ys, carry))
        live = Paths((), all_ys, all_carries, (), (), "")  # until the loss is known: `narrowed`
        params = chosen(consts, is_param)
        return engine.fast.cut(step, params, init, first_inputs, live, of_leaves.perturbed_inputs)

    def keep(
        self, of_leaves: FloatingLeaves, consts: list, init: Carry, inputs: PyTree
    ) -> tuple[tuple[Carry, PyTree], tuple]:
        """The results, and what the way back needs.

        That is loops and stacks of a single segment; of several, the carries that enter them.
        """
        if self.num_before_last == 0:
            with contextlib.suppress(Exception):  # the way back meets it again, and says so
                loops = self.loops(of_leaves, consts, init, inputs)
                carry, ys, stacks = loops.forward(init, inputs, self.num_steps, self.reverse)
                return (carry, ys), (loops, stacks)
        return self.by_segments(partial(self.step, consts), init, inputs)

    def back(
        self,
        of_leaves: FloatingLeaves,
        arguments: tuple[list, Carry, PyTree],
        gates: jax.Array | None,
        kept: tuple,
        bars: tuple[_Cotangents, _Cotangents],
    ) -> tuple[Params, list, list]:
        """Cotangents of the parameters, of the first carry and of the inputs.

        From `bars`, those of the last carry and of the ys. kept: what `keep` has left.
        """
        last_carry_bar, ys_bar = bars
        if isinstance(kept[0], engine.fast.Loops):
            loops, stacks = kept
            loops = loops.narrowed(last_carry_bar.read, ys_bar.read)
            return loops.backward(stacks, last_carry_bar.arrays, ys_bar.arrays, gates, None)
        # Several segments; or one, where the cut has failed and will fail again.
        consts, init, inputs = arguments
        loops = self.loops(of_leaves, consts, init, inputs)
        loops = loops.narrowed(last_carry_bar.read, ys_bar.read)
        steps = inputs, ys_bar.arrays, gates
        return self.back_by_segments(loops, kept, steps, last_carry_bar.arrays)

    def back_by_segments(
        self, loops: Any, starts: tuple, steps: tuple, last_carry_bar: list
    ) -> tuple[Params, list, list]:
        """Cotangents of the parameters, of the first carry and of the inputs.

        Each segment is run again first, from its start. steps: inputs, cotangents of the ys, gates.
        """
        before, before_last = starts

        def back(start, steps, num_steps, total, carry_bar):
            inputs, ys_bar, gates = steps
            _, _, stacks = loops.forward(start, inputs, num_steps, self.reverse)
            return loops.backward(stacks, carry_bar, ys_bar, gates, total)

        def body(state, segment):
            i, start = segment
            *state, inputs_bar = back(start, self.piece(steps, i), self.segment, *state)
            return tuple(state), inputs_bar

        last_steps = self.last(steps)
        *state, last = back(before_last, last_steps, self.num_last, None, last_carry_bar)
        segments = jnp.arange(self.num_before_last), before
        state, pieces = lax.scan(body, tuple(state), segments, None, not self.reverse)
        total, carry_bar = state
        return total, carry_bar, self.joined(pieces, last)
