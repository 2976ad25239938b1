"""Unbiased online recurrent optimization: an influence of rank one, right on average."""

from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from jbptt.arrays import real_leaves, split_inexact, varying
from jbptt.online.checks import plan_without_segments, problem_to_start, problem_to_update
from jbptt.online.examples import Advance, carry_size, influence_dtype
from jbptt.online.forward import Method, run_forward
from jbptt.plans import Plan
from jbptt.problem import Problem
from jbptt.segments import estimate_of
from jbptt.starts import kept
from jbptt.types import Batch, Carry, Estimator, Loss, Params, Step, exported


@exported
class RankOneState(NamedTuple):
    """The live carry, and two vectors for each example whose product stands for its influence.

    Attributes:
      carry: the live carry.
      of_carry: s̃, `[*batch, n]`.
      of_params: w̃, for each real leaf of the parameters `[*batch, *leaf]`.
      key: of the noise, the same for the whole stream.
      number: of the next step of the stream, an int array: step t's noise is the same wherever
        updates end.
    """

    carry: Carry
    of_carry: jax.Array
    of_params: list[jax.Array]
    key: chex.PRNGKey
    number: jax.Array


def uoro(step: Step, loss: Loss, *, plan: Plan | None = None) -> Estimator:
    """Unbiased online recurrent optimization (Tallec & Ollivier, 2018).

        s̃_t = ρ₀ J_t s̃_{t−1} + ρ₁ ν_t,    w̃_t = w̃_{t−1}/ρ₀ + D_tᵀ ν_t/ρ₁,    E s̃_t w̃_tᵀ = P_t

        ρ₀² = ‖w̃_{t−1}‖ / ‖J_t s̃_{t−1}‖,    ρ₁² = ‖D_tᵀ ν_t‖ / ‖ν_t‖

    with J_t = ∂h_t/∂h_{t−1}, D_t = ∂⁺h_t/∂w and ν_t of random signs, new for each example and step.
    The mean over draws is RTRL's gradient, that of full BPTT over the stream. The variance is
    large: it grows with the units and with the memory of the network. Each step costs one way back
    through it and two forward derivatives more than its loss does (one of them for `carry_grads`),
    and as many numbers as there are parameters, for each example.

    Args:
      step: as in `rtrl`.
      loss: `(y, target) -> [*batch]`, or that and aux.
      plan: the devices that the examples are divided over.

    Raises:
      ValueError: init without a key; a plan with a segment or parallel_windows; what `rtrl` raises,
        but for memory.
    """
    plan = plan_without_segments(plan)

    def init(params: Params, carry: Carry, batch: Batch, key=None) -> RankOneState:
        if key is None:
            raise ValueError(
                "uoro needs a key, got key=None; pass init(..., key=jax.random.key(seed))"
            )
        problem = problem_to_start(step, loss, params, carry, batch)
        shape, dtype = problem.batch_shape, influence_dtype(problem)
        reals, _ = real_leaves(split_inexact(params)[0])
        of_carry = jnp.zeros((*shape, carry_size(problem)), dtype)
        of_params = [jnp.zeros((*shape, *leaf.shape), dtype) for leaf in reals]
        of_carry, of_params = varying((of_carry, of_params), (params, problem.carry, batch))
        return RankOneState(kept(carry), of_carry, of_params, key, jnp.zeros((), int))

    def update(params: Params, state: RankOneState, batch: Batch):
        problem, start = problem_to_update(step, loss, params, state, batch, RankOneState)
        # That of the carry that enters the update is a pair of its own, which no noise joins.
        keys = jax.random.split(state.key, problem.batch_shape)  # a noise for each example
        signs = _signs(problem, keys, state.number)
        signs = varying(signs, (params, problem.carry, problem.batch))
        carried = state.of_carry, state.of_params, keys, (signs, signs)
        method = Method(_carry_on, _gradient)
        updated, carried = run_forward(plan, method, problem, carried, state.number)
        of_carry, of_params, _, _ = carried
        number = state.number + problem.num_steps
        return estimate_of(updated, start), RankOneState(
            updated.carry, of_carry, of_params, state.key, number
        )

    return Estimator(init, update)


ENTERING, STEPS = 0, 1
"""What a key draws: the signs of the carry that enters an update, and of steps."""


def _draw(key: chex.PRNGKey, purpose: int, number: Any, size: int, dtype: Any) -> jax.Array:
    """Random signs, `[n]`."""
    key = jax.random.fold_in(jax.random.fold_in(key, purpose), number)
    return jax.random.rademacher(key, (size,), dtype)


def _signs(problem: Problem, keys: chex.PRNGKey, number: jax.Array) -> jax.Array:
    draw = partial(
        _draw,
        purpose=ENTERING,
        number=number,
        size=carry_size(problem),
        dtype=influence_dtype(problem),
    )
    for _ in problem.batch_shape:
        draw = jax.vmap(draw)
    return draw(keys)


def _carry_on(advance: Advance, carried: tuple, number: jax.Array) -> tuple:
    """s̃ and w̃ one step on, and the pair of the carry that entered."""
    of_carry, of_params, key, (own, signs) = carried
    (emitted, pull), dtype = advance.pullback(), of_carry.dtype
    # The way back is linear, and its own way back is the way forward.
    _, transposed = jax.vjp(lambda bar: pull(bar)[1], lax.full_like(emitted, 0))

    def forward(tangent):
        """J · tangent."""
        return transposed(tangent.astype(advance.h.dtype))[0].astype(dtype)

    noise = _draw(key, STEPS, number, len(of_carry), dtype)
    moved = forward(of_carry)
    bar = noise.astype(emitted.dtype) + lax.full_like(emitted, 0)
    entering = [leaf.astype(dtype) for leaf in pull(bar)[0]]
    old, new = _balance(of_params, moved), _balance(entering, noise)
    of_params = [
        _over(now, old) + _over(own_now, new)
        for now, own_now in zip(of_params, entering, strict=True)
    ]
    return old * moved + new * noise, of_params, key, (forward(own), signs)


def _balance(of_params: list[jax.Array], of_carry: jax.Array) -> jax.Array:
    """ρ, with which both vectors have one norm; 0, which leaves the pair out, where one is 0.

    Plain sums of squares: what overflows in them is beyond what noise of this size serves for.
    """
    squares = [optax.tree.norm(tree, squared=True) for tree in (of_params, of_carry)]
    both = (squares[0] > 0) & (squares[1] > 0)
    # A root of 0, which is not taken, has no derivative.
    ratio = jnp.where(both, squares[0], 1) / jnp.where(both, squares[1], 1)
    return jnp.where(both, jnp.sqrt(jnp.sqrt(ratio)), 0)


def _over(array: jax.Array, factor: jax.Array) -> jax.Array:
    return jnp.where(factor == 0, 0, array / jnp.where(factor == 0, 1, factor))


def _gradient(carried: tuple, h_bar: jax.Array) -> tuple[list, jax.Array]:
    """Σ (h_bar · s̃) w̃ for each real leaf; and of each example, in the carry that entered."""
    of_carry, of_params, _, (own, signs) = carried
    sizes = jnp.sum(h_bar * of_carry, -1)
    grads = [jnp.tensordot(sizes, leaf, 1, precision=lax.Precision.HIGHEST) for leaf in of_params]
    return grads, jnp.sum(h_bar * own, -1, keepdims=True) * signs
