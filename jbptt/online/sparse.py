"""Real-time recurrent learning, and what keeps only a part of its influence: SnAp and RFLO.

    P_t = J_t P_{t−1} + D_t,     J_t = ∂h_t/∂h_{t−1},     D_t = ∂⁺h_t/∂w

with P = ∂h/∂w of each example carried from step to step and from update to update.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jbptt import truncation, validation
from jbptt.arrays import is_inexact, real_vector, varying
from jbptt.engine import chosen
from jbptt.online import influence as influences
from jbptt.online.checks import (
    check_influence,
    check_memory,
    check_structure,
    plan_without_segments,
    problem_to_start,
    problem_to_update,
)
from jbptt.online.examples import Advance, influence_dtype
from jbptt.online.forward import Method, run_forward
from jbptt.online.layout import Layout, layout_of
from jbptt.online.structure import InfluenceStructure, structure_of
from jbptt.plans import Plan
from jbptt.problem import Problem
from jbptt.segments import estimate_of
from jbptt.starts import kept
from jbptt.types import Batch, Carry, Estimator, Loss, Params, Step, exported


@exported
class InfluenceState(NamedTuple):
    """The live carry, and how the parameters have influenced it.

    Attributes:
      carry: the live carry.
      influence: ∂carry/∂params where it may be other than zero: for each real leaf of the
        parameters that reaches the carry at all, `[*batch, outer, base, inner, S]`
        (`online.layout`).
    """

    carry: Carry
    influence: list[jax.Array]


def rtrl(
    step: Step,
    loss: Loss,
    *,
    structure: InfluenceStructure | None = None,
    plan: Plan | None = None,
) -> Estimator:
    """Real-time recurrent learning (Williams & Zipser, 1989): exact, with no way back in time.

        P_t = J_t P_{t−1} + D_t,    ∂ℓ_t/∂w = ∂⁺ℓ_t/∂w + (∂ℓ_t/∂h_t) P_t

        C[t, i] = 1 for every i ≤ t, those of earlier updates too

    with J_t = ∂h_t/∂h_{t−1}, D_t = ∂⁺h_t/∂w and P = ∂h/∂w, which is carried from update to update:
    however a stream is split into updates, the total is full BPTT's over all of it (but for a
    learned start, whose path only the first update's losses count). Where the parameters change
    between updates, P is what the earlier parameters made of it, as in the paper.

    Of P is kept what the program of the step can make other than zero (`influence_structure`).
    Where every unit reads itself alone (diagonal linear units, leaky integrators), that is a number
    for each parameter and example. Where all n numbers of a carry read each other it is n of them,
    and n² multiplications in every step. Memory does not grow with T.

    Args:
      step: `(params, carry, x) -> (carry, y)`; every carry leaf begins with the batch shape, also
        counts and keys. What the step emits of an example depends on no other; nor does y, where
        the batch has a mask for each example.
      loss: `(y, target) -> [*batch]`, or that and aux.
      structure: which parameters reach which numbers of the carry, of `influence_structure`; None:
        read off the step's program.
      plan: the devices that the examples are divided over.

    Raises:
      ValueError: a plan with a segment or parallel_windows; at init or update: examples that depend
        on each other or cannot be told apart, an influence that does not fit into memory, what
        `full_bptt` raises.

    >>> estimator = rtrl(lambda w, h, x: (w * h + x, w * h + x), lambda y, target: y)
    >>> batch = Batch(jnp.ones(3))
    >>> estimate, _ = estimator.update(2.0, estimator.init(2.0, jnp.zeros(()), batch), batch)
    >>> float(estimate.grads)  # that of full_bptt
    2.0
    """
    return _influenced(step, loss, plan, Kept(None, None, structure, "snap(order=1), or uoro"))


def snap(
    step: Step,
    loss: Loss,
    *,
    order: int,
    structure: InfluenceStructure | None = None,
    plan: Plan | None = None,
) -> Estimator:
    """SnAp-n, the sparse n-step approximation of RTRL (Menick et al., 2021).

        P_t = mask ∘ (J_t P_{t−1} + D_t)

    with mask the entries of P that may be other than zero after n steps of the recurrence: of
    SnAp-1 those of D, one number for each weight of a simple network. Where n − 1 steps lead from
    every unit to all that it ever reaches, it is RTRL: with n = 1 for units that read themselves
    alone, with n = 2 for units that all read each other. Biased otherwise: it drops the paths
    through units that a parameter reaches later.

    Each step asks for J once, at most n ways back through the step (as many as J has colours), and
    multiplies what is kept: of SnAp-1 in a network of H units some H times the step. Parameters
    that act before the recurrent units (an embedding) reach all of them in one step.

    Args:
      step: as in `rtrl`.
      loss: `(y, target) -> [*batch]`, or that and aux.
      order: n, in steps.
      structure: as in `rtrl`.
      plan: the devices that the examples are divided over.

    Raises:
      ValueError: order < 1; what `rtrl` raises.
    """
    order = validation.check_positive_integer("order", order)
    smaller = "uoro" if order == 1 else "a smaller order"
    return _influenced(step, loss, plan, Kept(order, None, structure, smaller))


def rflo(
    step: Step,
    loss: Loss,
    *,
    leak: Any,
    structure: InfluenceStructure | None = None,
    plan: Plan | None = None,
) -> Estimator:
    """The influence of random-feedback online learning (RFLO; Murray, 2019).

        P_t = leak · P_{t−1} + D_t

    for units `h_t = leak · h_{t−1} + (1 − leak) · φ(…)`: of J_t only the leak is kept, and all that
    goes through the recurrent weights is dropped. What the loss says of the units is exact here, as
    in Marschall, Cho & Savin (2020); a readout with a derivative of its own (`jax.custom_vjp`)
    makes it the paper's random feedback. Biased. The cheapest: a way back through each step, and as
    many numbers as SnAp-1 keeps.

    Args:
      step: as in `rtrl`.
      loss: `(y, target) -> [*batch]`, or that and aux.
      leak: what a step keeps of each unit, 1 − 1/τ of a unit whose time constant is τ steps; a
        number, or a tree like the carry of one example.
      structure: as in `rtrl`.
      plan: the devices that the examples are divided over.

    Raises:
      ValueError: a leak that does not fit the carry; what `rtrl` raises.
    """
    if leak is None or not all(map(_is_finite, jax.tree.leaves(leak))):
        raise ValueError(
            f"leak must be finite numbers, what a step keeps of each unit, got {leak!r}; pass 0.0 "
            "for units that keep nothing"
        )
    return _influenced(step, loss, plan, Kept(1, leak, structure, "uoro"))


def _is_finite(leak: Any) -> bool:
    if isinstance(leak, Tracer):
        return True
    try:
        return bool(np.isfinite(leak).all())
    except TypeError:
        return False


class Kept(NamedTuple):
    """What an estimator keeps of the influence.

    Attributes:
      order: what is reached within so many steps; None: all.
      leak: takes J's place; None: J itself.
      structure: of the user; None: read off the program.
      smaller: what takes less memory.
    """

    order: int | None
    leak: Any
    structure: InfluenceStructure | None
    smaller: str


def _influenced(step: Step, loss: Loss, plan: Plan | None, keep: Kept) -> Estimator:
    plan = plan_without_segments(plan)

    def layout_for(problem: Problem) -> Layout:
        found = keep.structure
        if found is None:
            found = structure_of(problem)
        else:
            check_structure(found, problem)
            # It may be that of a batch without padding.
            found = found if problem.batch.mask is None else found.with_padding()
        check_memory(found, keep.order, problem, keep.smaller)
        return layout_of(found, keep.order, jacobian=keep.leak is None)

    def init(params: Params, carry: Carry, batch: Batch, key=None) -> InfluenceState:
        del key
        problem = problem_to_start(step, loss, params, carry, batch)
        _leaks(keep.leak, problem)
        dtype = influence_dtype(problem)
        influence = [
            jnp.zeros((*problem.batch_shape, *block.kept), dtype)
            for block in layout_for(problem).params
            if block is not None
        ]
        given = params, problem.carry, batch
        return InfluenceState(kept(carry), varying(influence, given))

    def update(params: Params, state: InfluenceState, batch: Batch):
        problem, start = problem_to_update(step, loss, params, state, batch, InfluenceState)
        layout = layout_for(problem)
        blocks = [block for block in layout.params if block is not None]
        check_influence(state.influence, [(*problem.batch_shape, *block.kept) for block in blocks])
        own = influences.identity(layout.carry, influence_dtype(problem))
        own = jnp.broadcast_to(own, (*problem.batch_shape, *own.shape))
        own = varying(own, (params, problem.carry, problem.batch))
        method = Method(
            partial(_carry_on, layout, _leaks(keep.leak, problem)), partial(_gradient, layout)
        )
        updated, carried = run_forward(plan, method, problem, (state.influence, own), 0)
        return estimate_of(updated, start), InfluenceState(updated.carry, carried[0])

    def coverage(num_steps: int, key=None) -> jax.Array:
        del key
        return truncation.full_coverage(num_steps)

    return Estimator(init, update, coverage if keep.order is None else None)


def _leaks(leak: Any, problem: Problem) -> jax.Array | None:
    """`[n]`: what a step keeps of each entry of an example's carry."""
    if leak is None:
        return None
    ndim, carry = len(problem.batch_shape), problem.carry
    try:
        if jax.tree.structure(leak) == jax.tree.structure(0):
            leak = jax.tree.map(lambda _: leak, carry)
        whole = jax.tree.map(
            lambda own, leaf: jnp.broadcast_to(jnp.asarray(own, float), jnp.shape(leaf)[ndim:]),
            leak,
            carry,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            "leak must be a number or a tree like the carry of one example, whose leaves have "
            f"shapes {[np.shape(leaf)[ndim:] for leaf in jax.tree.leaves(carry)]}, got {leak!r}; "
            "pass 0.9, say"
        ) from error
    pairs = zip(jax.tree.leaves(whole), jax.tree.leaves(carry), strict=True)
    own = [jnp.stack([a, a]) if jnp.iscomplexobj(b) else a for a, b in pairs if is_inexact(b)]
    leaks, _ = real_vector(chosen(own, problem.live.carries))
    return leaks.astype(influence_dtype(problem))


def _carry_on(
    layout: Layout, leaks: jax.Array | None, advance: Advance, carried: tuple, number: Any
) -> tuple:
    """P ← J P + D, and M ← J M of the carry that entered."""
    del number
    influence, own = carried
    emitted, pull = advance.pullback()
    on = _onward(layout, emitted, pull) if leaks is None else _leaking(leaks, advance.mask)

    entered = influences.param_rows(layout, emitted, pull)
    pairs = [
        (block, leaf)
        for block, leaf in zip(layout.params, entered, strict=True)
        if block is not None
    ]
    after = [
        on(block, now) + influences.entering(layout, block, leaf)
        for now, (block, leaf) in zip(influence, pairs, strict=True)
    ]
    return after, on(layout.carry, own)


def _onward(layout: Layout, emitted: jax.Array, pull: Callable) -> Callable:
    """`(block, P) -> J P`."""
    received = influences.carry_rows(layout, emitted, pull)
    return lambda block, now: influences.onward(influences.jacobian(layout, block, received), now)


def _leaking(leaks: jax.Array, mask: jax.Array | None) -> Callable:
    """`(block, P) -> leak · P`; padding holds the carry."""
    held = leaks if mask is None else jnp.where(mask, leaks, 1)
    return lambda block, now: influences.scaled(block, held, now)


def _gradient(layout: Layout, carried: tuple, h_bar: jax.Array) -> tuple[list, jax.Array]:
    """Σ h_bar P for each real leaf, and h_bar M of each example."""
    influence, own = carried
    rest = iter(influence)
    grads = [
        None if block is None else influences.gradient(block, next(rest), h_bar)
        for block in layout.params
    ]
    return grads, influences.gradient_of_each(layout.carry, own, h_bar)
