"""`scan`: `lax.scan` whose backward pass is the engine's, for any loss of what it returns."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jbptt import batch_axes, validation
from jbptt.arrays import inexact_leaves, is_inexact, steps_from, zero_masked
from jbptt.engine.cutting import cut
from jbptt.engine.dependence import Paths, chosen
from jbptt.engine.forward_backward import Loops
from jbptt.engine.jaxprs import closed_over
from jbptt.recurrence import held
from jbptt.types import Batch, Carry, Params, PyTree


def scan(
    f: Callable[[Carry, PyTree], tuple[Carry, PyTree]],
    init: Carry,
    xs: PyTree = None,
    length: int | None = None,
    *,
    reverse: bool = False,
    segment: int | None = None,
    gates: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> tuple[Carry, PyTree]:
    """`lax.scan` with a faster backward pass that keeps less, for any recurrence and any loss.

        carry, y_t = f(carry, x_t),     λ_t = (∂y_t/∂h_t)ᵀ ȳ_t + gates[t+1] · J_{t+1}ᵀ λ_{t+1}

    The values are `lax.scan`'s. Reverse mode cuts the program of one step and its derivative into a forward and a
    backward loop that keep between them only what is dear to compute, and forms the gradients of weights after the
    loop, in float32 at least. Gradients flow into whatever `f` closes over, into `init` and into `xs`.

    Reverse mode of any order, and forward over reverse, work; under jit, vmap, scan, shard_map and checkpoint too.
    Plain forward mode (`jax.jvp`, `jacfwd`) raises JAX's TypeError: use `lax.scan`, or `unroll`, for it.

    Args:
      f: `(carry, x) -> (carry, y)`; may close over parameters, traced or not.
      init: the carry that enters step 0; floating leaves are differentiated, others pass.
      xs: leaves `[T, ...]`, or None with `length`.
      length: T, where `xs` has no leaves.
      reverse: from the last step to the first, as in `lax.scan`. `gates[t]` and `mask[t]` belong to `xs[t]`.
      segment: recompute in segments of this many steps on the way back: memory O(T/segment + segment) beyond
        what is returned, for one more forward pass. None keeps the whole sequence.
      gates: `[T]` or `[T, *batch]`, bool or real: what the gradient that crosses from step t into the carry that it
        received is multiplied by. 0 every k steps is truncation to blocks of k. They are not differentiated, and a
        second derivative is that of the gradient as returned.
      mask: bool, `[T]` or `[T, *batch]`; a masked step holds the carry and gives `ys = 0`, whatever stands in xs.

    Returns:
      The last carry, and ys with leaves `[T, ...]`.

    Raises:
      ValueError: lengths that disagree; gates or mask that do not fit the carry; a segment < 1; a mutable array
        closed over, with gates, mask or segment. What `lax.scan` raises where the carry changes its type.

    >>> def loss(w):  # the last output looks at all of them
    ...     _, ys = scan(lambda h, x: (w * h + x, w * h + x), 0.0, jnp.ones(3))
    ...     return jnp.max(ys) * jnp.mean(ys)
    >>> round(float(jax.grad(loss)(2.0)), 3)  # 5 · 11/3 + 7 · 2
    32.333
    """
    if segment is not None:
        segment = validation.check_positive_integer("segment", segment)
    if length == 0 or any(jnp.shape(leaf)[:1] == (0,) for leaf in jax.tree.leaves(xs)):
        return lax.scan(f, init, xs, length, reverse)
    num_steps = validation.count_steps({"xs": xs, "gates": gates, "mask": mask}, length)
    init, xs, gates, mask = jax.tree.map(jnp.asarray, (init, xs, gates, mask))
    init, step, consts = _traced(f, init, xs, length, reverse)
    if gates is not None or mask is not None:
        one = batch_axes.first_step(lambda _, c, x: f(c, x), None, (), init, Batch(xs))
        validation.check_gates_and_mask(gates, mask, init, one)
    if any(hasattr(jax.typeof(leaf), "inner_aval") for leaf in consts):
        if not (gates is mask is segment is None):
            raise ValueError(
                "f closes over a mutable array, got gates, mask or segment beside it, which do not go with one: leave "
                "them out, or put the array into the carry"
            )
        return lax.scan(f, init, xs, length, reverse)
    recurrence = _Recurrence(held(step), num_steps, reverse, segment or num_steps)
    carry, ys = recurrence.run(consts, init, (xs, mask), gates)
    return carry, ys if mask is None else jax.vmap(zero_masked)(mask, ys)


def _traced(f: Callable, init: Carry, xs: PyTree, length: int | None, reverse: bool) -> tuple[Carry, Callable, list]:
    """The carry in the dtypes that it keeps, f as `(consts, carry, x) -> (carry, y)`, and what f closes over."""

    def trace(init):
        x = jax.eval_shape(lambda: jax.tree.map(lambda a: a[0], xs))
        return closed_over(f, init, x)

    def types(tree):
        return jax.tree.map(lambda a: (jnp.shape(a), a.dtype, a.weak_type), tree)

    step, consts, (after, _) = trace(init)
    if jax.tree.structure(after) != jax.tree.structure(init) or types(after) != types(init):
        # JAX says what is wrong, or to what a weakly typed carry is promoted.
        after, _ = jax.eval_shape(partial(lax.scan, f, length=length, reverse=reverse), init, xs)
        init = jax.tree.map(lambda a, s: lax.convert_element_type(a, s.dtype), init, after)
        step, consts, _ = trace(init)
    return init, step, consts


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Moving:
    """Of the floating leaves of what f closes over, the first carry and the inputs: what is known while tracing.

    Attributes:
      types: of each: shape, dtype and placement.
      perturbed: whether a gradient in it is asked for.
      carry: which of them are the carry's.
    """

    types: tuple[Any, ...]
    perturbed: tuple[bool, ...]
    carry: slice

    @property
    def of_consts(self) -> tuple[bool, ...]:
        """Where a gradient is asked for in what f closes over."""
        return self.perturbed[: self.carry.start]

    @property
    def of_inputs(self) -> tuple[bool, ...]:
        """And in the inputs."""
        return self.perturbed[self.carry.stop :]

    def gradients(self, carry_bar: list, grads: list, inputs_bar: list) -> list:
        """One for each leaf, in its dtype; None where none is asked for."""
        found = iter([*grads, *chosen(carry_bar, self.perturbed[self.carry]), *inputs_bar])
        pairs = zip(self.perturbed, self.types, strict=True)
        return [_as_gradient(next(found), leaf) if is_asked else None for is_asked, leaf in pairs]


class _Cotangents(NamedTuple):
    """Cotangents of a tree's floating leaves, and whether a loss reads them at all; what none reads is zeros."""

    arrays: list
    read: tuple[bool, ...]


def _cotangents_of(tree: PyTree) -> _Cotangents:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(_type_of(leaf).dtype, jnp.inexact)]
    read = tuple(not isinstance(leaf, SymbolicZero) for leaf in leaves)
    arrays = [leaf if is_read else lax.full_like(_type_of(leaf), 0) for leaf, is_read in zip(leaves, read, strict=True)]
    return _Cotangents(arrays, read)


def _type_of(leaf: Any) -> Any:
    return leaf.aval if isinstance(leaf, SymbolicZero) else jax.typeof(leaf)


def _as_gradient(cotangent: jax.Array, of: Any) -> jax.Array:
    """In the leaf's dtype."""
    return cotangent.astype(of.dtype)


@dataclass(frozen=True)
class _Recurrence:
    """What is the same on the way forward and on the way back.

    Attributes:
      step: `(consts, carry, (x, mask)) -> (carry, y)`.
      num_steps: T.
      reverse: whether time runs from the last step to the first.
      segment: steps kept at a time.
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
        """The last carry and the ys; and the carries that enter the segments before the last, and the last."""
        step = partial(self.step, consts)

        def body(carry, i):
            piece = steps_from(inputs, i * self.segment + offset, self.segment)
            after, ys = lax.scan(step, carry, piece, self.segment, self.reverse)
            return after, (carry, ys)

        if self.num_last == self.segment:  # no copy to join the ys
            offset = 0
            carry, (starts, ys) = lax.scan(body, init, jnp.arange(self.num_whole + 1), reverse=self.reverse)
            ys = jax.tree.map(lambda a: a.reshape((self.num_steps, *a.shape[2:])), ys)
            at, rest = (0, slice(1, None)) if self.reverse else (-1, slice(-1))
            return (carry, ys), tuple(jax.tree.map(lambda a, part=part: a[part], starts) for part in (rest, at))
        offset = self.num_last if self.reverse else 0
        before_last, (starts, pieces) = lax.scan(body, init, jnp.arange(self.num_whole), reverse=self.reverse)
        carry, last = lax.scan(step, before_last, self.last(inputs), self.num_last, self.reverse)
        return (carry, self.joined(pieces, last)), (starts, before_last)

    def loops(self, moving: _Moving, consts: list, init: Carry, inputs: PyTree) -> Loops:
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
        return cut(step, [c for m, c in zip(moves, consts, strict=True) if m], init, one, live, moving.of_inputs)

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
            moving = _Moving(tuple(map(jax.typeof, floating)), perturbed, of_carry)
            consts, init, inputs = given(floating, still)
            if self.num_whole:
                results, starts = self.through(consts, init, inputs)
                return results, (moving, gates, (floating, still, starts))
            loops = self.loops(moving, consts, init, inputs)
            carry, ys, stacks = loops.forward(init, inputs, self.num_steps, self.reverse)
            return (carry, ys), (moving, gates, (loops, stacks))

        def backward(residual, cotangents):
            moving, gates, kept = residual
            carry_bar, ys_bar = map(_cotangents_of, cotangents)
            if self.num_whole:
                floating, still, starts = kept
                arguments = given(floating, still)
                loops = self.loops(moving, *arguments).narrowed(carry_bar.read, ys_bar.read)
                found = self.back_by_segments(loops, starts, arguments[2], carry_bar, ys_bar, gates)
            else:
                loops, stacks = kept
                loops = loops.narrowed(carry_bar.read, ys_bar.read)
                found = loops.backward(stacks, carry_bar.arrays, ys_bar.arrays, gates, None)
            return moving.gradients(*found), None, None

        values.defvjp(forward, backward, symbolic_zeros=True)
        return values([leaf for leaf in leaves if is_inexact(leaf)], still, gates)

    def back_by_segments(
        self, loops: Loops, starts: tuple, inputs: PyTree, carry_bar: _Cotangents, ys_bar: _Cotangents, gates: Any
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
        (cotangents, total), pieces = lax.scan(body, (cotangents, total), segments, reverse=not self.reverse)
        return cotangents, total, self.joined(pieces, last)
