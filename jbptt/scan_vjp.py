"""The derivative of a scan: the engine's loops as a custom vjp, whole or segment by segment."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jbptt import engine
from jbptt.arrays import inexact_leaves, is_inexact, steps_from
from jbptt.engine import Paths, chosen, warn_that_the_plain_engine_runs
from jbptt.recurrence import first_order_gate, gated
from jbptt.types import Carry, Params, PyTree


@jax.tree_util.register_static
@dataclass(frozen=True)
class Moving:
    """What is known while tracing of the floating leaves of what f closes over, of the first carry and of the inputs.

    Attributes:
      dtypes: of each leaf.
      perturbed: of each leaf, whether its gradient is asked for.
      carry: the slice of them that is the carry's.
      last: of the floating leaves of the last carry, shape, dtype and placement.
    """

    dtypes: tuple[Any, ...]
    perturbed: tuple[bool, ...]
    carry: slice
    last: tuple[Any, ...] = ()

    @property
    def of_consts(self) -> tuple[bool, ...]:
        """Where a gradient is asked for in what f closes over."""
        return self.perturbed[: self.carry.start]

    @property
    def of_inputs(self) -> tuple[bool, ...]:
        """Where a gradient is asked for in the inputs."""
        return self.perturbed[self.carry.stop :]

    def gradients(self, carry_bar: list, grads: list, inputs_bar: list) -> list:
        """One for each leaf, in its dtype; None where none is asked for."""
        found = iter([*grads, *chosen(carry_bar, self.perturbed[self.carry]), *inputs_bar])
        pairs = zip(self.perturbed, self.dtypes, strict=True)
        return [next(found).astype(dtype) if is_asked else None for is_asked, dtype in pairs]


class _Cotangents(NamedTuple):
    """Cotangents of a tree's floating leaves, and whether a loss reads them at all."""

    arrays: list
    read: tuple[bool, ...]


def _cotangents_of(tree: PyTree, zeros: Callable) -> _Cotangents:
    """`zeros` makes what stands for those that no loss reads, of their number among the floating leaves."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    read = tuple(not isinstance(leaf, SymbolicZero) for leaf in leaves)
    arrays = [leaf if is_read else zeros(i) for i, (leaf, is_read) in enumerate(zip(leaves, read, strict=True))]
    return _Cotangents(arrays, read)


@dataclass(frozen=True)
class Recurrence:
    """What is the same on the way forward and on the way back.

    Attributes:
      step: `(consts, carry, (x, mask)) -> (carry, y)`.
      num_steps: T.
      reverse: whether time runs from the last step to the first.
      segment: steps kept at a time, at most num_steps.
    """

    step: Callable
    num_steps: int
    reverse: bool
    segment: int

    @property
    def num_whole(self) -> int:
        """Segments before the last one in time, which is whole or ragged and opens the backward pass."""
        return (self.num_steps - 1) // self.segment

    @property
    def num_last(self) -> int:
        """Steps of the last segment."""
        return self.num_steps - self.num_whole * self.segment

    def piece(self, tree: PyTree, i: Any) -> PyTree:
        """Segment i of those before the last, in the order of the inputs."""
        return steps_from(tree, i * self.segment + (self.num_last if self.reverse else 0), self.segment)

    def last(self, tree: PyTree) -> PyTree:
        """The last segment in time."""
        return steps_from(tree, 0 if self.reverse else self.num_whole * self.segment, self.num_last)

    def joined(self, pieces: PyTree, last: PyTree) -> PyTree:
        """All steps, of the segments before the last `[num_whole, segment, ...]` and the last one."""

        def join(a, b):
            a = a.reshape((-1, *a.shape[2:]))
            return jnp.concatenate([b, a] if self.reverse else [a, b])

        return jax.tree.map(join, pieces, last)

    def through(self, consts: list, init: Carry, inputs: PyTree) -> tuple[tuple[Carry, PyTree], tuple]:
        """The last carry and the ys; then the carries that enter the segments.

        Of those before the last segment in time, `[num_whole, ...]`, and of that one.
        """
        step = partial(self.step, consts)
        ragged = self.num_last != self.segment
        offset = self.num_last if ragged and self.reverse else 0  # backwards in time the ragged segment lies in front

        def body(carry, i):
            piece = steps_from(inputs, i * self.segment + offset, self.segment)
            after, ys = lax.scan(step, carry, piece, self.segment, self.reverse)
            return after, (carry, ys)

        if not ragged:  # one scan over all segments, so that no copy joins the ys
            carry, (starts, ys) = lax.scan(body, init, jnp.arange(self.num_whole + 1), reverse=self.reverse)
            ys = jax.tree.map(lambda a: a.reshape((self.num_steps, *a.shape[2:])), ys)
            at, rest = (0, slice(1, None)) if self.reverse else (-1, slice(-1))
            return (carry, ys), tuple(jax.tree.map(lambda a, part=part: a[part], starts) for part in (rest, at))
        before_last, (starts, pieces) = lax.scan(body, init, jnp.arange(self.num_whole), reverse=self.reverse)
        carry, last = lax.scan(step, before_last, self.last(inputs), self.num_last, self.reverse)
        return (carry, self.joined(pieces, last)), (starts, before_last)

    def loops(self, moving: Moving, consts: list, init: Carry, inputs: PyTree) -> Any:
        """The loops of a step, for gradients in what moves."""
        flags = iter(moving.of_consts)
        moves = [next(flags) if is_inexact(leaf) else False for leaf in consts]

        def step(params, carry, inputs):
            params = iter(params)
            return self.step([next(params) if m else c for m, c in zip(moves, consts, strict=True)], carry, inputs)

        one = jax.tree.map(lambda a: a[0], inputs)
        after, ys = jax.eval_shape(self.step, consts, init, one)
        outputs, carries = ((True,) * len(inexact_leaves(tree)) for tree in (ys, after))
        live = Paths((), outputs, carries, (), (), "")  # until the loss is known
        return engine.fast.cut(
            step, [c for m, c in zip(moves, consts, strict=True) if m], init, one, live, moving.of_inputs
        )

    def run(self, consts: list, init: Carry, inputs: PyTree, gates: jax.Array | None) -> tuple[Carry, PyTree]:
        """The last carry and the ys, differentiable in reverse mode."""
        leaves, structure = jax.tree.flatten((consts, init, inputs))
        still = [None if is_inexact(leaf) else leaf for leaf in leaves]

        before = len(inexact_leaves(consts))
        of_carry = slice(before, before + len(inexact_leaves(init)))

        def given(floating, still):
            rest = iter(floating)
            return structure.unflatten([next(rest) if leaf is None else leaf for leaf in still])

        @jax.custom_vjp
        def values(floating, still, gates):
            del gates
            consts, init, inputs = given(floating, still)
            return lax.scan(partial(self.step, consts), init, inputs, self.num_steps, self.reverse)

        def forward(floating, still, gates):
            perturbed = tuple(leaf.perturbed for leaf in floating)
            floating, still, gates = jax.tree.map(lambda leaf: leaf.value, (floating, still, gates))
            moving = Moving(tuple(leaf.dtype for leaf in floating), perturbed, of_carry)
            results, kept = self.keep(moving, *given(floating, still))
            last = jax.eval_shape(lambda leaves: leaves, inexact_leaves(results[0]))
            moving = replace(moving, last=tuple(last))
            return results, (moving, floating, still, gates, kept)

        def backward(residual, cotangents):
            moving, floating, still, gates, kept = residual
            carry_bar = _cotangents_of(cotangents[0], lambda i: lax.full_like(moving.last[i], 0))
            ys_bar = _cotangents_of(cotangents[1], lambda i: None)
            try:
                consts, init, inputs = given(floating, still)
                found = self.back(moving, consts, init, inputs, gates, kept, carry_bar, ys_bar)
                return moving.gradients(*found), None, None
            except Exception as error:  # what f raises, it has raised already
                warn_that_the_plain_engine_runs(error)

            def plainly(floating):
                consts, init, inputs = given(floating, still)
                carry, ys = self.floating_results(consts, init, inputs, gates)
                return chosen(carry, carry_bar.read), chosen(ys, ys_bar.read)

            _, pull = jax.vjp(plainly, floating)
            bars = chosen(carry_bar.arrays, carry_bar.read), chosen(ys_bar.arrays, ys_bar.read)
            return *pull(bars), None, None

        values.defvjp(forward, backward, symbolic_zeros=True)
        return values([leaf for leaf in leaves if is_inexact(leaf)], still, gates)

    def floating_results(self, consts: list, init: Carry, inputs: PyTree, gates: Any) -> tuple[list, list]:
        """The floating leaves of the last carry and of the ys, by `lax.scan` with gates on the carry."""

        def body(carry, inputs_and_gate):
            inputs, gate = inputs_and_gate
            return self.step(consts, gated(carry, gate, first_order_gate), inputs)

        carry, ys = lax.scan(body, init, (inputs, gates), self.num_steps, self.reverse)
        return inexact_leaves(carry), inexact_leaves(ys)

    def keep(self, moving: Moving, consts: list, init: Carry, inputs: PyTree) -> tuple[tuple[Carry, PyTree], Any]:
        """The results; and for the way back loops and stacks of a single segment, else the carries at the segments."""
        if self.num_whole == 0:
            with contextlib.suppress(Exception):  # the way back meets it again, and says so
                loops = self.loops(moving, consts, init, inputs)
                carry, ys, stacks = loops.forward(init, inputs, self.num_steps, self.reverse)
                return (carry, ys), (loops, stacks)
        return self.through(consts, init, inputs)

    def back(
        self,
        moving: Moving,
        consts: list,
        init: Carry,
        inputs: PyTree,
        gates: Any,
        kept: tuple,
        carry_bar: _Cotangents,
        ys_bar: _Cotangents,
    ) -> tuple[list, Params, list]:
        """Cotangents of the first carry, of the parameters and of the inputs."""
        if not isinstance(kept[0], engine.fast.Loops):  # several segments; or one where the cut failed, and will again
            loops = self.loops(moving, consts, init, inputs).narrowed(carry_bar.read, ys_bar.read)
            return self.back_by_segments(loops, kept, inputs, carry_bar, ys_bar, gates)
        loops, stacks = kept
        loops = loops.narrowed(carry_bar.read, ys_bar.read)
        return loops.backward(stacks, carry_bar.arrays, ys_bar.arrays, gates, None)

    def back_by_segments(
        self, loops: Any, starts: tuple, inputs: PyTree, carry_bar: _Cotangents, ys_bar: _Cotangents, gates: Any
    ) -> tuple[list, Params, list]:
        """Cotangents of the first carry, of the parameters and of the inputs: each segment is run again first."""
        before, before_last = starts
        data = inputs, ys_bar.arrays, gates

        def back(start, piece, num_steps, cotangents, total):
            inputs, ys_bar, gates = piece
            _, _, stacks = loops.forward(start, inputs, num_steps, self.reverse)
            return loops.backward(stacks, cotangents, ys_bar, gates, total)

        def body(state, segment):
            i, start = segment
            cotangents, total, inputs_bar = back(start, self.piece(data, i), self.segment, *state)
            return (cotangents, total), inputs_bar

        cotangents, total, last = back(before_last, self.last(data), self.num_last, carry_bar.arrays, None)
        segments = jnp.arange(self.num_whole), before
        state, pieces = lax.scan(body, (cotangents, total), segments, None, not self.reverse)
        cotangents, total = state
        return cotangents, total, self.joined(pieces, last)
