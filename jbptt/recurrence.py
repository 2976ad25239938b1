"""Running a step over time: `lax.scan` with gates on the way back, padding, and segments."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jbptt import batch_axes, validation
from jbptt.arrays import (
    align_leading,
    is_inexact,
    select_leading,
    split_time,
    times_gate,
    widened_dtype,
    zero_masked,
)
from jbptt.cells import split_readout
from jbptt.starts import start_of
from jbptt.types import Batch, Carry, Params, PyTree, Step


@jax.custom_jvp
def first_order_gate(value: jax.Array, gate: jax.Array) -> jax.Array:
    """The identity whose derivative is `gate` (0 is a hard zero: 0·inf stays 0).

    The gate of `scan` on its plain road, and of `gate_cotangent` where arithmetic would change the
    value. JAX drops custom derivatives from what reverse mode caches, so that of a second
    derivative by reverse over reverse only one of the two passes is gated.
    """
    del gate
    return value


@first_order_gate.defjvp
def _first_order_gate_jvp(primals, tangents):
    value, gate = primals
    return first_order_gate(value, gate), times_gate(tangents[0], gate)


def _keeps_bits(size: jax.Array) -> jax.Array:
    """Where `c − (c − c)` is c: 0 and normal numbers, by bits, since floats flush denormals."""
    unsigned = jnp.dtype(f"uint{8 * size.dtype.itemsize}")
    zero = lax.bitcast_convert_type(size, unsigned) == 0
    return ((size >= jnp.finfo(size.dtype).tiny) & jnp.isfinite(size)) | zero


def gate_cotangent(value: jax.Array, gate: jax.Array) -> jax.Array:
    """The identity, bit for bit; its derivative, in every order, is `gate` (0: a hard zero).

    Arithmetic with `stop_gradient`; where that would change the value (denormal, not finite or
    complex entries) or the gate is not finite, `first_order_gate` with its exception.
    """
    if jnp.iscomplexobj(value):
        return first_order_gate(value, gate)
    constant, gate = lax.stop_gradient(value), lax.stop_gradient(gate)
    shape = align_leading(gate, value.ndim)
    finite = jnp.isfinite(gate)
    # +0.0, with the sign of the gate.
    difference = jnp.where(shape > 0, constant - value, value - constant)
    gated = constant - times_gate(difference, jnp.where(finite, jnp.abs(gate), 1))
    plain = _keeps_bits(jnp.abs(constant)) & align_leading(finite, value.ndim)
    gated = jnp.where(plain, gated, first_order_gate(value, gate))
    return jnp.where(shape == 0, constant, gated)


def gated(carry: Carry, gate: jax.Array | None, gate_fn: Callable) -> Carry:
    """Puts a gate (`()` or `[*batch]`) on what flows back into `carry`; values stay as they are."""
    if gate is None:
        return carry
    gate = gate.astype(widened_dtype(gate.dtype))
    return jax.tree.map(
        lambda leaf: gate_fn(jnp.asarray(leaf), gate) if is_inexact(leaf) else leaf, carry
    )


def held(step: Step) -> Step:
    """A step on `(x, mask)`, its carry held where the mask is False; ys are not cleared."""

    def held_step(params, carry, inputs):
        x, mask = inputs
        new_carry, y = step(params, carry, zero_masked(mask, x))
        if mask is None:
            return new_carry, y
        return select_leading(mask, new_carry, carry), y

    return held_step


def gated_step(step: Step, gate_fn: Callable = first_order_gate) -> Step:
    """`held`, on `(x, gate, mask)`: the gate is on what flows back out of the step."""
    step = held(step)

    def run(params, carry, inputs):
        x, gate, mask = inputs
        return step(params, gated(carry, gate, gate_fn), (x, mask))

    return run


def scan_steps(
    step: Step,
    params: Params,
    carry: Carry,
    xs: PyTree,
    gates: jax.Array | None = None,
    mask: jax.Array | None = None,
    length: int | None = None,
    gate_fn: Callable = first_order_gate,
) -> tuple[Carry, PyTree]:
    """`unroll` without the border's checks; ys of masked steps are not cleared.

    The arguments are those of `unroll`, and `gate_fn(leaf, gate)`, which puts a gate on a leaf.
    """
    return lax.scan(
        partial(gated_step(step, gate_fn), params), carry, (xs, gates, mask), length=length
    )


def held_core(step: Step) -> Step:
    """The recurrent part of a step on `(x, mask)`, held where the mask is False."""
    return held(split_readout(step)[0])


def carries_of(
    step: Step, params: Params, carry: Carry, xs: PyTree, mask: jax.Array | None, num_steps: int
) -> Carry:
    """The carries that enter the steps, `[T, ...]`; no readout is run."""
    return trajectory(split_readout(step)[0], params, carry, xs, mask, num_steps)[1][0]


def trajectory(
    step: Step,
    params: Params,
    carry: Carry,
    xs: PyTree,
    mask: jax.Array | None = None,
    length: int | None = None,
) -> tuple[Carry, tuple[Carry, PyTree]]:
    """`scan_steps`, with the carry that enters each step: `(carry, (carries, ys))`."""
    step = held(step)

    def body(carry_t, inputs_t):
        carry_next, y_t = step(params, carry_t, inputs_t)
        return carry_next, (carry_t, y_t)

    return lax.scan(body, carry, (xs, mask), length=length)


def default_segment(num_steps: int) -> int:
    """A segment length for which T/segment + segment is small.

    Short sequences stay whole: to compute them twice took 3 to 27 % of the time, and `lax.scan`
    keeps more of them.
    """
    return num_steps if num_steps <= 512 else max(64, math.isqrt(num_steps))


def unroll(
    step: Step,
    params: Params,
    carry: Carry,
    xs: PyTree,
    *,
    gates: jax.Array | None = None,
    mask: jax.Array | None = None,
    segment: int | None = None,
    length: int | None = None,
) -> tuple[Carry, PyTree]:
    """Runs `step` over time: `carry, y_t = step(params, carry, x_t)` for t = 0 … T−1.

    The gradient that crosses from step t into the carry that step t received is multiplied by
    `gates[t]` (`gates[0]`: into the initial carry only):

        λ_t = ∂ℓ_t/∂h_t + gates[t+1] · J_{t+1}ᵀ λ_{t+1}

    Differentiable in every JAX mode and order, under jit, vmap and scan (one exception, for second
    derivatives at denormal, non-finite or complex carries: `gate_cotangent`). Values and carries do
    not depend on the gates, bit for bit.

    Args:
      step: `(params, carry, x) -> (carry, y)`.
      params: passed to the step as they are; may hold what is not an array.
      carry: what enters step 0, or a function of the parameters that gives it. Integer and key
        leaves pass untouched.
      xs: leaves `[T, ...]`, or None with `length`.
      gates: `[T]` or `[T, *batch]`, bool or real, traced or not; not differentiated. None: all one.
      mask: bool, `[T]` or `[T, *batch]`; see `Batch`.
      segment: recompute in segments of this many steps on the way back (`jax.checkpoint`): memory
        O(T/segment + segment) instead of O(T), for one more forward pass.
      length: T, where `xs` has no leaves.

    Returns:
      The last carry, and ys with leaves `[T, ...]`.

    Raises:
      ValueError: T = 0; leaves that disagree on T; a step whose carry changes shape, dtype or
        structure; gates or mask that do not fit the carry; a segment < 1.

    >>> step = lambda params, carry, x: (params * carry + x, carry)
    >>> unroll(step, 2.0, jnp.zeros(()), jnp.ones(3))[0]
    Array(7., dtype=float32)
    """
    num_steps = validation.count_steps({"xs": xs, "gates": gates, "mask": mask}, length)
    carry = start_of(carry, params)
    validation.check_step(step, params, carry, xs)
    one = batch_axes.first_step(lambda _, c, x: step(params, c, x), None, (), carry, Batch(xs))
    validation.check_gates_and_mask(gates, mask, carry, one)
    gates, mask = jax.tree.map(jnp.asarray, (gates, mask))
    if segment is not None:
        segment = validation.check_positive_integer("segment", segment)
    carry, ys = _scan_segments(
        step, params, carry, (xs, gates, mask), num_steps, segment or num_steps + 1
    )
    return carry, ys if mask is None else jax.vmap(zero_masked)(mask, ys)


def _scan_segments(step, params, carry, inputs, num_steps, segment):
    def run_through(carry, pieces, length):
        return scan_steps(step, params, carry, *pieces, length=length, gate_fn=gate_cotangent)

    num_whole, rest = divmod(num_steps, segment)
    if num_whole == 0:
        return run_through(carry, inputs, length=num_steps)
    main, tail = split_time(inputs, segment, num_whole)

    carry, ys = lax.scan(
        jax.checkpoint(partial(run_through, length=segment)), carry, main, length=num_whole
    )
    ys = jax.tree.map(lambda a: a.reshape((num_whole * segment, *a.shape[2:])), ys)
    if rest == 0:
        return carry, ys
    carry, last = run_through(carry, tail, length=rest)
    return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ys, last)
