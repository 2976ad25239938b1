"""A batch in up to 16 parts, and the gradient of each in one backward pass.

Parts are groups of examples; where there are fewer than 16 examples, each group is cut into
stretches of time too. The steps of a part stand side by side with those of the others, each part
with parameters of its own, so that their gradients come out apart: the products with weights are
as large in all as those of the whole batch.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbptt import engine
from jbptt.arrays import is_inexact, split_inexact, widened
from jbptt.batch_axes import are_independent, first_step
from jbptt.losses import weighted_losses
from jbptt.plans import check_division
from jbptt.problem import Problem
from jbptt.types import Carry, Params, PyTree

NUM_PARTS = 16
MOST_NUMBERS = 2**27
"""What the gradients of all parts hold together; a larger model is divided into fewer parts."""


class Layout(NamedTuple):
    """How a batch is divided.

    Attributes:
      groups: of examples, along the first axis of the batch.
      times: stretches of steps.
      num_steps, num_examples: T, and the length of the first axis of the batch (1 without one).
      batches: how many batches of one source stand along that axis.
    """

    groups: int
    times: int
    num_steps: int
    num_examples: int
    batches: int = 1

    @property
    def num_parts(self) -> int:
        """Groups of examples times stretches of time."""
        return self.groups * self.times

    @property
    def steps_each(self) -> int:
        """Steps of a part; the last stretch is filled up."""
        return -(-self.num_steps // self.times)

    def divide(self, leaf: jax.Array, fill_zero: bool = False) -> jax.Array:
        """`[T, B, ...]` as `[parts, steps, examples, ...]`; a leaf without the axis of examples is
        repeated.

        The last parts are filled up with what stands last, or with zeros.
        """
        leaf = _filled(leaf, 0, self.times * self.steps_each, fill_zero)
        leaf = leaf.reshape(self.times, self.steps_each, *leaf.shape[1:])
        if self.groups == 1:
            return leaf
        if not (leaf.ndim > 2 and leaf.shape[2] == self.num_examples):
            return jnp.tile(leaf, (self.groups, *[1] * (leaf.ndim - 1)))
        size = -(-self.num_examples // self.groups)
        leaf = _filled(leaf, 2, self.groups * size, fill_zero)
        leaf = leaf.reshape(*leaf.shape[:2], self.groups, size, *leaf.shape[3:])
        leaf = jnp.moveaxis(leaf, 2, 0)
        return leaf.reshape(self.num_parts, *leaf.shape[2:])

    def by_group(self, sums: jax.Array) -> jax.Array:
        """Sums of each part, `[parts, ...]`, as those of each group of examples at all times.

        Where all examples are one group: of each stretch of time.
        """
        if self.groups == 1:
            return sums
        return jnp.sum(sums.reshape(self.groups, self.times, *sums.shape[1:]), axis=1)


def _filled(leaf: jax.Array, axis: int, length: int, with_zero: bool) -> jax.Array:
    short = length - leaf.shape[axis]
    widths = [(0, short if i == axis else 0) for i in range(leaf.ndim)]
    return jnp.pad(leaf, widths, mode="constant" if with_zero else "edge") if short else leaf


def layout_of(problem: Problem, batches: int = 1) -> Layout:
    """Groups of examples where each is as it would be alone, else stretches of time."""
    num_steps, batch_shape = problem.num_steps, problem.batch_shape
    num_numbers = sum(np.size(leaf) for leaf in jax.tree.leaves(problem.params))
    most = int(max(1, min(NUM_PARTS, MOST_NUMBERS // max(num_numbers, 1))))
    num_examples = batch_shape[0] if batch_shape else 1
    size = -(-num_examples // most)
    groups = 1
    if size < num_examples and _takes(problem, size):
        groups = -(-num_examples // size)
    length = -(-num_steps // min(num_steps, max(1, most // groups)))
    return Layout(groups, -(-num_steps // length), num_steps, num_examples, batches)


def _takes(problem: Problem, size: int) -> bool:
    """Whether step and loss take so many of the examples alone, each as it is with all others."""
    num_examples = problem.batch_shape[0]

    def twice(leaf, axis):
        """Twice as many, to be divided in two; shapes alone."""
        shape = list(jnp.shape(leaf))
        if len(shape) > axis and shape[axis] == num_examples:
            shape[axis] = 2 * size
        return jax.ShapeDtypeStruct(shape, jax.dtypes.result_type(leaf))

    carry = jax.tree.map(partial(twice, axis=0), problem.carry)
    batch = jax.tree.map(partial(twice, axis=1), problem.batch)
    shape = (2 * size, *problem.batch_shape[1:])
    one = first_step(problem.step, problem.loss, problem.params, problem.carry, problem.batch)
    try:
        check_division(
            replace(problem, batch_shape=shape).on(carry, batch), 2, "two parts", "pass all"
        )
        x = jax.eval_shape(lambda xs: jax.tree.map(lambda a: a[0], xs), batch.xs)
        wide = jax.eval_shape(problem.step, problem.params, carry, x)
    except Exception:  # whatever the user's functions raise at shapes that do not fit
        return False
    emitted = filter(is_inexact, jax.tree.leaves(wide))
    per_example = all(leaf.shape[:1] == (2 * size,) for leaf in emitted)
    return per_example and bool(are_independent(one, (num_examples,), inputs_too=True))


def _real(grads: jax.Array) -> jax.Array:
    """Complex numbers as two real ones; their inner products are then those of the gradients."""
    if not jnp.iscomplexobj(grads):
        return grads
    return jnp.concatenate([grads.real, grads.imag], axis=1)


class PartsOfBatch(NamedTuple):
    """One forward pass, linearised at every step, part by part.

    Attributes:
      layout: how the batch is divided.
      pull: the way back through all steps of all parts; see `gradients`.
      readout_grads: what the readout alone adds to the gradient of each part, as `gradients` gives
        it.
    """

    layout: Layout
    pull: Any
    readout_grads: list[jax.Array]

    def gradients(self, one_on: list, outputs_bar: list | None) -> list[jax.Array]:
        """`Σ (∂⁺carries[s+1]/∂w)ᵀ one_on[s]` over the steps of each part: for each parameter with a
        gradient its real numbers, `[parts, n]`.

        Args:
          one_on: cotangents of the carry that each step emits, leaves `[T, *batch, ...]`.
          outputs_bar: those of its outputs; None: zeros.
        """
        divide = partial(self.layout.divide, fill_zero=True)
        bars = outputs_bar and list(map(divide, outputs_bar))
        return self.pull(list(map(divide, one_on)), bars)


def parts_of_batch(
    problem: Problem, carries: Carry, outputs: PyTree, outputs_bar: list, batches: int = 1
) -> PartsOfBatch:
    """The parts of a problem's batch, or of `batches` side by side: one part alone where the step's
    derivative cannot be taken for many at once.

    The carries that enter its steps and the core's outputs are known.
    """
    known = problem, carries, outputs, outputs_bar
    layout = layout_of(problem, batches)
    try:
        return divide(*known, layout)
    except engine.NO_VMAP:
        return divide(*known, Layout(1, 1, problem.num_steps, 1, batches))


def divide(
    problem: Problem,
    carries: Carry,
    outputs: PyTree,
    outputs_bar: list,
    layout: Layout,
) -> PartsOfBatch:
    """The parts of this layout."""
    core, readout = problem.parts.core, problem.parts.readout
    ys = jax.vmap(partial(readout, problem.params), axis_size=problem.num_steps)(outputs)
    pull_core = _way_back(layout, core, problem.params, carries, problem.inputs, problem.live)
    at_rest = [jnp.zeros_like(layout.divide(leaf)) for leaf in outputs_bar]

    def pull(one_on, bars):
        return pull_core(one_on, at_rest if bars is None else bars)

    def look(params, output, _):
        return (), readout(params, output)

    by_readout = problem.live._replace(carries=(), outputs=problem.live.ys)
    pull_readout = _way_back(layout, look, problem.params, outputs, None, by_readout)
    leaves, rebuild = split_inexact(ys)
    value, pull_losses = jax.vjp(
        lambda leaves: weighted_losses(problem.parts.loss, rebuild(leaves), problem.batch)[0],
        leaves,
    )
    (ys_bar,) = pull_losses(jnp.ones_like(value))
    ys_bar = [layout.divide(leaf, fill_zero=True) for leaf in ys_bar]
    parts = PartsOfBatch(layout, pull, pull_readout([], ys_bar))
    one_on = [jnp.zeros_like(leaf) for leaf in split_inexact(carries)[0]]
    jax.eval_shape(parts.gradients, one_on, outputs_bar)  # whether it has a way back at all
    return parts


def _way_back(layout, step, params, carries, inputs, live):
    """Through all steps of all parts to the parameters of each."""
    num_parts, length = layout.num_parts, layout.steps_each
    if num_parts == 1:
        back = engine.parallel_pullback(step, params, carries, inputs, length, live)[1]
        return lambda *bars: _numbers(params, back(*jax.tree.map(lambda a: a[0], bars), None)[0], 1)

    def all_parts(params, carries, inputs):
        leaves, rebuild = split_inexact(params)  # what is no number is the same for all parts

        def one_part(leaves, carries, inputs):
            one_step = partial(step, rebuild(leaves))
            return jax.vmap(one_step, axis_size=length)(carries, inputs)

        return jax.vmap(one_part, axis_size=num_parts)(leaves, carries, inputs)

    leaves, rebuild = split_inexact(params)
    each = rebuild([jnp.broadcast_to(leaf, (num_parts, *leaf.shape)) for leaf in leaves])
    carries, inputs = jax.tree.map(layout.divide, (carries, inputs))
    back = engine.pullback(all_parts, each, carries, inputs, live)[1]

    def pull(next_carries_bar, outputs_bar):
        return _numbers(params, back(next_carries_bar, outputs_bar, None)[0], num_parts)

    return pull


def _numbers(params: Params, grads: Params, num_parts: int) -> list[jax.Array]:
    """The gradients in parameters that have one, `[parts, n]` real numbers each."""
    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True)
    grads = [grad for grad, leaf in pairs if is_inexact(leaf)]
    return [_real(widened(grad).reshape(num_parts, -1)) for grad in grads]
