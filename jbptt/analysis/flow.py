"""Adjoints, and how much each loss depends on each earlier state."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbptt.arrays import (
    is_inexact,
    split_inexact,
    steps_from,
    times_gate,
    weighted_mean,
    zeros_along,
)
from jbptt.engine import chosen
from jbptt.norms import in_units_of, inner, leafwise, norm, normalised
from jbptt.problem import Problem, answer, problem_of
from jbptt.segments import back_through, back_through_segment, pass_forward
from jbptt.types import Batch, Carry, Loss, Params, Step


class Adjoints(NamedTuple):
    """Carries and their cotangents, leaves `[T+1, ...]`; index t is the carry that enters step t.

    Attributes:
      carries: `carries[0]` is the initial carry, `carries[T]` the last.
      cotangents: `∂L/∂carries[t]` with L the weighted mean loss; zeros for leaves that are not
        inexact.
    """

    carries: Carry
    cotangents: Carry


def adjoints(
    step: Step,
    loss: Loss,
    params: Params,
    carry: Carry,
    batch: Batch,
    *,
    gates: jax.Array | None = None,
) -> Adjoints:
    """Every carry of a sequence and the gradient of the weighted mean loss in it.

        λ_t = ∂L/∂carries[t] = gates[t] · (J_tᵀ λ_{t+1} + (∂y_t/∂carries[t])ᵀ ∂L/∂y_t),   λ_T = 0

    Two forward passes and one backward; memory O(T).

    Args:
      step: `(params, carry, x) -> (carry, y)`.
      loss: `(y, target) -> [*batch]`.
      params: the parameters.
      carry: what enters step 0, or a function of the parameters that gives it.
      batch: T steps.
      gates: `[T]` or `[T, *batch]`; the adjoints of the gated gradient.

    Raises:
      ValueError: what `full_bptt` raises.
    """
    return answer(adjoints_of, problem_of(step, loss, params, carry, batch, gates))


def adjoints_of(problem: Problem) -> Adjoints:
    """`adjoints` of what has passed the border."""
    sums, last, entering, _, outputs_bar = pass_forward(problem)
    outputs_bar = [weighted_mean(bar, sums.weight).astype(bar.dtype) for bar in outputs_bar]

    def one_step_back(cotangents, inputs):
        carry_t, inputs_t, gate_t, outputs_bar_t = inputs
        _, cotangents = problem.pullback(carry_t, inputs_t)(cotangents, outputs_bar_t, None)
        if gate_t is not None:
            cotangents = [times_gate(c, gate_t) for c in cotangents]
        return cotangents, cotangents

    nothing = [jnp.zeros_like(leaf) for leaf in split_inexact(last)[0]]
    steps = entering, problem.inputs, problem.gates, outputs_bar
    _, cotangents = jax.lax.scan(one_step_back, nothing, steps, problem.num_steps, reverse=True)
    cotangents = [jnp.concatenate([a, b[None]]) for a, b in zip(cotangents, nothing, strict=True)]
    carries = jax.tree.map(lambda a, b: jnp.concatenate([a, jnp.asarray(b)[None]]), entering, last)
    filled = iter(cotangents)
    return Adjoints(
        carries,
        jax.tree.map(lambda a: next(filled) if is_inexact(a) else jnp.zeros(a.shape), carries),
    )


def carry_cotangents(path: Adjoints) -> list[jax.Array]:
    """The cotangents of the inexact leaves alone: the zeros beside integers and keys are none."""
    pairs = zip(jax.tree.leaves(path.carries), jax.tree.leaves(path.cotangents), strict=True)
    return [cotangent for leaf, cotangent in pairs if is_inexact(leaf)]


def gradient_flow(
    step: Step,
    loss: Loss,
    params: Params,
    carry: Carry,
    batch: Batch,
    *,
    gates: jax.Array | None = None,
    per_leaf: bool = False,
) -> Any:
    """How much the loss of each step depends on each earlier carry.

        F[t, s] = RMS over examples of ‖∂ℓ_t/∂carries[s]‖,   s ≤ t,   0 above the diagonal

    ℓ_t is unweighted; examples that are masked at step t do not count.

    One forward pass, then one pass back with the cotangents of all losses side by side: T² products
    of a Jacobian and a cotangent, 5/8 of that where T > 192. Memory O(T) carries and the `[T, T]`
    result.

    Args:
      step: `(params, carry, x) -> (carry, y)`; every inexact carry leaf begins with the batch
        shape.
      loss: `(y, target) -> [*batch]`.
      params: the parameters.
      carry: what enters step 0, or a function of the parameters that gives it.
      batch: T steps; its weights are not read.
      gates: `[T]` or `[T, *batch]`; the flow of the gated gradient.
      per_leaf: return a list of matrices, one for each inexact leaf of the carry in the order of
        `jax.tree.leaves`, instead of one over all leaves.

    Raises:
      ValueError: carries that do not begin with the batch shape; what `full_bptt` raises.
    """
    why = "the flow is measured per example"
    problem = problem_of(step, loss, params, carry, batch, gates, per_example=why)
    return answer(_gradient_flow, problem, bool(per_leaf))


def _gradient_flow(problem: Problem, per_leaf: bool) -> Any:
    problem = replace(problem, batch=problem.batch._replace(weights=None))
    num_steps, passed = problem.num_steps, pass_forward(problem)
    inputs = passed.carries, problem.inputs, problem.gates, passed.outputs_bar
    norm_fn = leafwise(norm) if per_leaf else norm
    norms = _adjoint_norms(partial(_one_step_back, problem), inputs, num_steps, norm_fn)
    counted = problem.loss_weights().reshape(num_steps, -1).sum(1)[:, None]
    # The loss of an earlier step has cotangent 0 here, and 0 times an infinite Jacobian is NaN.
    meets = (counted > 0) & jnp.tri(num_steps, dtype=bool)
    return jax.tree.map(
        lambda a: jnp.where(meets, a.T / jnp.sqrt(jnp.maximum(counted, 1)), 0), norms
    )


def _adjoint_norms(one_back: Callable, inputs: Any, num_steps: int, norm_fn: Any) -> Any:
    """‖∂ℓ_t/∂carries[s]‖ over all examples, `[s, t]`; `inputs` as `_one_step_back` takes them."""
    leaves, _ = split_inexact(inputs[0])
    if not leaves:
        return jax.tree.map(lambda a: jnp.zeros((num_steps, num_steps), a.dtype), norm_fn(leaves))

    def body(cotangents, inputs):
        cotangents = one_back(cotangents, inputs)
        return cotangents, norm_fn(cotangents, 1)

    cotangents, rows, last = [leaf[:0] for leaf in leaves], [], num_steps
    # Each stage takes the cotangents of losses first … T − 1 back.
    for first in reversed(range(0, num_steps, stage_length(num_steps))):
        new = [zeros_along(leaf, last - first) for leaf in leaves]
        cotangents = [jnp.concatenate(pair) for pair in zip(new, cotangents, strict=True)]
        steps = jax.tree.map(lambda a, first=first, last=last: a[first:last], inputs)
        cotangents, row = jax.lax.scan(
            body, cotangents, (jnp.arange(last - first), *steps), reverse=True
        )
        rows.append(jax.tree.map(lambda a, first=first: jnp.pad(a, ((0, 0), (first, 0))), row))
        last = first
    return jax.tree.map(lambda *parts: jnp.concatenate(parts[::-1]), *rows)


def _one_step_back(problem: Problem, cotangents: list, inputs: Any) -> list:
    """Takes the cotangents of all later losses back through a step, and starts its own loss's."""
    live = problem.live
    place, carry, given, gate, outputs_bar = inputs
    leaves, rebuild = split_inexact(carry)

    def run(leaves):
        after, outputs = problem.parts.core(problem.params, rebuild(leaves), given)
        return chosen(split_inexact(after)[0], live.carries), chosen(
            split_inexact(outputs)[0], live.outputs
        )

    (emitted, read), pull = jax.vjp(run, leaves)
    (own,) = pull(([jnp.zeros_like(leaf) for leaf in emitted], chosen(outputs_bar, live.outputs)))
    silent = [jnp.zeros_like(y) for y in read]
    (later,) = jax.vmap(lambda c: pull((c, silent)), axis_size=len(cotangents[0]))(
        chosen(cotangents, live.carries)
    )
    cotangents = [a.at[place].set(c) for a, c in zip(later, own, strict=True)]
    return (
        cotangents
        if gate is None
        else [jax.vmap(times_gate, (0, None))(c, gate) for c in cotangents]
    )


def stage_length(num_steps: int) -> int:
    """Steps in one stage of the way back: at most 64, or a quarter of all where that is more.

    A stage leaves out the losses of the steps before it: more stages compute less, and take longer
    to compile.
    """
    return -(-num_steps // min(4, -(-num_steps // 64)))


class GradientSources(NamedTuple):
    """The mean loss's gradient g by source: `S_i = Σ_t w_t G[t, i] / Σ w`, and `Σ_i S_i = g`.

    Attributes:
      norms: `‖S_i‖`, `[T]`.
      leaf_norms: the same for every leaf of the parameters alone, a tree of `[T]`.
      shares: `⟨S_i, g⟩ / ‖g‖²`, `[T]`: how much of the gradient comes from step i. They add up to
        1; a negative share points against the gradient. Zeros where the gradient is zero.
    """

    norms: jax.Array
    leaf_norms: Params
    shares: jax.Array


def gradient_sources(
    step: Step,
    loss: Loss,
    params: Params,
    carry: Carry,
    batch: Batch,
    *,
    gates: jax.Array | None = None,
) -> GradientSources:
    """How much of the gradient enters at each step i, summed over all losses.

        S_i = (∂⁺(h_{i+1}, ℓ_i)/∂w)ᵀ (λ_{i+1}, w_i) / Σ w

    Three forward and three backward passes, one step at a time; memory O(T) carries, one gradient
    at a time.

    Args:
      step: `(params, carry, x) -> (carry, y)`.
      loss: `(y, target) -> [*batch]`.
      params: the parameters.
      carry: what enters step 0, or a function of the parameters that gives it.
      batch: masked steps are no source.
      gates: `[T]` or `[T, *batch]`; the sources of the gated gradient.

    Raises:
      ValueError: what `full_bptt` raises.
    """
    return answer(_gradient_sources, problem_of(step, loss, params, carry, batch, gates))


def _gradient_sources(problem: Problem) -> GradientSources:
    path, exact = adjoints_of(problem), back_through(problem).sums
    in_its_units, direction = in_units_of(exact.grad), normalised(exact.grad)

    def one(inputs):  # the gates are in the cotangents already
        i, entering, emitted = inputs
        source = problem.on(entering, steps_from(problem.batch, i, 1))
        cotangent = [c * exact.weight.astype(c.dtype) for c in emitted]
        source = back_through_segment(source, cotangent).sums.grad
        share = inner(in_its_units(source), direction)
        mean = jax.tree.map(lambda a: weighted_mean(a, exact.weight), source)
        return norm(mean), leafwise(norm)(mean), share

    entering = jax.tree.map(lambda a: a[:-1], path.carries)
    emitted = [c[1:] for c in carry_cotangents(path)]
    return GradientSources(*jax.lax.map(one, (jnp.arange(problem.num_steps), entering, emitted)))
