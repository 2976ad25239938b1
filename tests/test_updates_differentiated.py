"""The derivative of an update is that of the numbers it returned, as differences see it; the gradient in its carry."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import ESTIMATORS
from problems import assert_close, one_update, usual

from jbptt import (
    Batch,
    Plan,
    adjoints,
    full_bptt,
    gated_bptt,
    gradient_flow,
    lag_profile,
    truncated_bptt,
    truncation,
    truncation_curve,
    unroll,
)

NUM_STEPS, EXAMPLES = 9, 3
NUMBERS = np.random.default_rng(3)
BATCH = Batch(*(jnp.asarray(NUMBERS.normal(size=(NUM_STEPS, EXAMPLES))) for _ in range(2)))
CARRY = jnp.asarray(NUMBERS.normal(size=EXAMPLES))
PARAMS = {"w": jnp.asarray(0.8), "u": jnp.asarray(1.1), "s": jnp.asarray(0.7)}
GATES = jnp.asarray([1.0, 0.5, 0.0, 1.0, 2.0, 1.0, 0.0, 1.0, 0.3])


def step(p, h, x):
    h = jnp.tanh(p["w"] * h + x * p["u"])
    return h, h * p["s"]


def loss(y, target):
    return (y - target) ** 2


def weighed(tree):
    """One number that every entry of a tree has its part in."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return sum(jnp.sum(jnp.sin(1.0 + jnp.arange(leaf.size)) * leaf.ravel() ** 2) for leaf in leaves)


def assert_derivative_of_the_numbers(function):
    """Along a direction through parameters and carry, against differences."""
    point = PARAMS, CARRY
    direction = jax.tree.map(lambda a: jnp.cos(jnp.arange(1.0, a.size + 1).reshape(a.shape)), point)
    along = jax.jit(lambda t: function(*jax.tree.map(lambda a, d: a + t * d, point, direction)))
    near, far = (float(along(width) - along(-width)) for width in (1e-3, 2e-3))
    measured = (8 * near - far) / 0.012  # of fourth order: rounding and curvature are both below 1e-10
    assert float(jax.jit(jax.grad(along))(0.0)) == pytest.approx(measured, rel=1e-7)


# The loop of an adaptive one may end anywhere.
@pytest.mark.parametrize("name", usual(["ragged strides", "uoro"], [name for name in ESTIMATORS if name != "adaptive"]))
def test_derivative_of_two_updates(name):
    estimator, key = ESTIMATORS[name].make(step, loss), jax.random.key(1)

    def numbers(params, carry):
        state = estimator.init(params, carry, BATCH, key)
        first, state = estimator.update(params, state, BATCH)
        moved = jax.tree.map(lambda p, g: p - 0.1 * g, params, first.grads)
        second, state = estimator.update(moved, state, BATCH)
        return weighed((first.loss, first.grads, second.loss, second.grads, state.carry))

    assert_derivative_of_the_numbers(numbers)


GATED = {
    "gated, in segments": lambda p, c: (
        one_update(gated_bptt(step, loss, gates_fn=lambda key, num_steps: GATES, plan=Plan(2)), p, c, BATCH).grads
    ),
    "adjoints": lambda p, c: adjoints(step, loss, p, c, BATCH, gates=GATES),
    "lag_profile": lambda p, c: lag_profile(step, loss, p, c, BATCH, max_lag=4, gates=GATES),
    "truncation_curve": lambda p, c: truncation_curve(step, loss, p, c, BATCH, max_window=4, gates=GATES)[1:],
    "gradient_flow": lambda p, c: jnp.where(jnp.eye(NUM_STEPS), 0, gradient_flow(step, loss, p, c, BATCH) ** 2),
}


@pytest.mark.parametrize("name", usual(["lag_profile"], GATED))
def test_derivative_of_what_is_gated(name):
    assert_derivative_of_the_numbers(lambda params, carry: weighed(GATED[name](params, carry)))


@pytest.mark.more("test_derivative_of_two_updates")
def test_the_segment_changes_no_derivative():
    """Nor does the way in which the same cuts are written."""
    cuts = lambda key, num_steps: truncation.fixed(num_steps, 4)
    ways = [gated_bptt(step, loss, gates_fn=cuts, plan=Plan(n)) for n in (None, 2)] + [
        truncated_bptt(step, loss, window=4)
    ]
    hypergradients = [
        jax.jit(jax.grad(lambda p, way=way: weighed(one_update(way, p, CARRY, BATCH).grads)))(PARAMS) for way in ways
    ]
    for other in hypergradients[1:]:
        assert_close(other, hypergradients[0])


def covered_carry_gradient(coverage):
    """Of each loss by itself through `unroll`, where it covers the batch's first step."""

    def mean_loss(carry, weights):
        return jnp.sum(weights[:, None] * loss(unroll(step, PARAMS, carry, BATCH.xs)[1], BATCH.targets)) / BATCH.xs.size

    return jax.grad(mean_loss)(CARRY, jnp.asarray(coverage)[:, 0])


COVERING = [name for name, entry in ESTIMATORS.items() if entry.covers]


@pytest.mark.parametrize("name", usual(["ragged strides", "randomized"], COVERING))
def test_gradient_in_the_carry_that_entered(name):
    key = jax.random.key(2)
    estimate = jax.jit(partial(one_update, ESTIMATORS[name].make(step, loss)))(PARAMS, CARRY, BATCH, key)
    coverage = np.asarray(ESTIMATORS[name].coverage(NUM_STEPS, key))
    coverage = coverage * np.asarray(estimate.info.get("gates", [1.0]))[0]  # the first lies on the way into the carry
    assert_close(estimate.info["carry_grads"], covered_carry_gradient(coverage))


LATER = ["full", "ragged blocks", "strides", "sliding", "parallel strides"]


@pytest.mark.more("test_derivative_of_two_updates")
@pytest.mark.parametrize("name", usual(["strides"], LATER))
def test_gradient_in_the_carry_of_a_later_update(name):
    """Of the losses of this update, within their windows; how the stream was split before does not matter."""
    estimator = ESTIMATORS[name].make(step, loss)
    before, now = (jax.tree.map(lambda a, part=part: a[part], BATCH) for part in (slice(0, 2), slice(2, None)))
    state = estimator.init(PARAMS, CARRY, before)
    _, state = estimator.update(PARAMS, state, before)
    found = estimator.update(PARAMS, state, now)[0].info["carry_grads"]
    coverage = np.asarray(ESTIMATORS[name].coverage(NUM_STEPS, None))[2:, 2]
    coverage = np.ones_like(coverage) if name == "full" else coverage

    def mean_loss(carry):
        return jnp.sum(coverage[:, None] * loss(unroll(step, PARAMS, carry, now.xs)[1], now.targets)) / now.xs.size

    assert_close(found, jax.grad(mean_loss)(state.carry))


def test_gates_and_leaves_of_the_carry_gradient():
    """The first gate counts; integers have zeros; gradients are float32 at least."""
    counted = lambda p, c, x: ((step(p, c[0], x)[0], c[1] + 1), step(p, c[0], x)[1])
    estimator = gated_bptt(counted, loss, gates_fn=lambda key, num_steps: GATES.at[0].set(0.5))
    full = full_bptt(counted, loss)
    carry = CARRY, jnp.zeros((), int)
    half, whole = (one_update(e, PARAMS, carry, BATCH).info["carry_grads"] for e in (estimator, full))
    reference = jax.grad(
        lambda c: jnp.mean(loss(unroll(step, PARAMS, c, BATCH.xs, gates=GATES.at[0].set(0.5))[1], BATCH.targets))
    )
    assert_close(half[0], reference(CARRY))
    assert half[1] == whole[1] == 0
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (PARAMS, CARRY, BATCH))
    assert one_update(full_bptt(step, loss), *narrow).info["carry_grads"].dtype == jnp.float32
