"""Diagnoses of carries of every kind: half precision, and integers and keys beside the state or alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from problems import assert_close, usual

from jbptt import Batch, adjoints, diagnose, find_nonfinite
from jbptt.analysis import gradient_sources
from jbptt.diagnosis.question import first_windows

T = 16
STEP, LOSS, PARAMS, CARRY, BATCH = problems.make("tanh", T)
EXAMPLES = problems.EXAMPLES


@functools.partial(jax.jit, static_argnums=0)
def run(step, params, carry, batch):
    """Compiled once for each kind of carry; what the state alone gives, all others are held against."""
    problem = step, LOSS, params, carry, batch
    return gradient_sources(*problem), find_nonfinite(*problem).found, diagnose(*problem, measure=False)


def look(*problem):
    return run(*problem)[2]


@pytest.mark.parametrize(
    "dtype", usual([jnp.bfloat16], [jnp.bfloat16, jnp.float16, jnp.float32], full=(jnp.float16, jnp.float32))
)
@pytest.mark.more("test_rounding_leaves_no_error_to_a_window_of_all_steps")
def test_every_precision_is_diagnosed_and_a_window_of_all_steps_is_exact(dtype):
    params, carry, batch = jax.tree.map(lambda a: a.astype(dtype), (PARAMS, CARRY, BATCH))
    found, wanted = look(STEP, params, carry, batch), look(STEP, PARAMS, CARRY, BATCH)
    assert all(1 <= window <= T for window in found.sliding_window.tolist()) and "> 16" not in str(found)
    assert found.verdict == wanted.verdict
    np.testing.assert_allclose(found.exponent, wanted.exponent, atol=0.02)


def test_rounding_leaves_no_error_to_a_window_of_all_steps():
    errors, windows = jnp.array([0.5, 0.05, 0.02]), np.arange(1, 4)
    assert first_windows(errors, windows, (0.1, 0.01), 3).tolist() == [2, 3]
    assert first_windows(errors, windows, (0.1, 0.01), 4).tolist() == [2, 0]


def test_a_window_counts_from_where_the_error_stays():
    errors, windows = jnp.array([0.05, 0.5, 0.02, jnp.nan]), np.array([1, 2, 4, 8])
    # One that was not measured is none, even the next one after an error too large.
    assert first_windows(errors, windows, (0.1, 0.01), 100).tolist() == [4, 0]


def counting(params, carry, x):
    (n, h) = carry
    h, y = STEP(params, h, x)
    return (n + 1, h), y


def keyed(params, carry, x):
    key, h = carry
    h, y = STEP(params, h, x)
    return (jax.random.split(key)[0], h), y


BESIDE = {
    "an integer": (counting, lambda: (jnp.zeros((), int), CARRY)),
    "an integer of each example": (counting, lambda: (jnp.zeros(EXAMPLES, int), CARRY)),
    "a key": (keyed, lambda: (jax.random.key(0), CARRY)),
}


@pytest.mark.more("test_scan::test_keys_and_integers_in_the_carry_and_among_what_is_closed_over")
@pytest.mark.parametrize("name", usual(["an integer of each example"], BESIDE, full=("an integer",)))
def test_what_stands_beside_the_state_changes_nothing(name):
    step, carry_fn = BESIDE[name]
    carry = carry_fn()
    sources, broken, found = run(step, PARAMS, carry, BATCH)
    plain_sources, plain_broken, plain = run(STEP, PARAMS, CARRY, BATCH)
    assert not broken and not plain_broken
    assert_close(sources, plain_sources, rtol=1e-10)
    for field in ("profile", "curve", "rate", "exponent", "sliding_window", "block_window", "verdict_index", "dead"):
        assert_close(getattr(found, field), getattr(plain, field), rtol=1e-10)
    zeros = jax.jit(lambda: adjoints(step, LOSS, PARAMS, carry, BATCH).cotangents[0])()
    np.testing.assert_array_equal(zeros, np.zeros((T + 1, *np.shape(carry[0]))))


@pytest.mark.more("test_nonfinite::test_planted_in_weights_and_gates")
def test_a_number_that_is_not_finite_is_found_beside_an_integer():
    broken = BATCH._replace(xs=BATCH.xs.at[4, 1, 0].set(jnp.nan))
    found = look(counting, PARAMS, (jnp.zeros(EXAMPLES, int), CARRY), broken)
    assert (found.verdict, found.nonfinite.leaf, int(found.nonfinite.step)) == ("non-finite", "xs", 4)


@pytest.mark.more("test_scan::test_keys_and_integers_in_the_carry_and_among_what_is_closed_over")
def test_integers_alone_carry_no_gradient():
    step = lambda params, n, x: (n + 1, x @ params["w"])
    batch = Batch(jnp.ones((T, EXAMPLES, 2)), jnp.zeros((T, EXAMPLES, 3)))
    found = look(step, {"w": jnp.ones((2, 3))}, jnp.zeros(EXAMPLES, int), batch)
    assert f"\nGradient over {T} steps: no gradient path through the carry\n" in str(found)
