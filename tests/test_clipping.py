"""Clipping: optax's where optax is right, and right where its norm overflows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import assert_close, assert_same_bits

from jbptt.clipping import clip_by_global_norm


def clip(grads, max_norm=1.0, **options):
    transformation = clip_by_global_norm(max_norm, **options)
    return jax.jit(transformation.update)(grads, transformation.init(grads))


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 4.9, 5.1, 1e6])
def test_equals_optax_where_its_norm_is_right(max_norm):
    grads = {"a": jnp.array([[3.0, 0.0], [0.0, -2.0]]), "b": (jnp.array(2.0), jnp.array([[[-2.0]], [[2.0]]]))}
    reference = optax.clip_by_global_norm(max_norm)
    updates, state = clip(grads, max_norm)
    assert_close(updates, reference.update(grads, reference.init(grads))[0], rtol=1e-15)
    assert_close((state.norm, state.scale), (5.0, min(1.0, max_norm / 5)), rtol=1e-15)
    assert bool(state.finite)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("fraction", [1.0, 1e-2])
def test_squares_that_overflow(dtype, fraction):
    """Entries 3 s, −4 s of a dtype whose largest number is below (3 s)²."""
    size = float(jnp.finfo(dtype).max) / 5 * fraction
    grads = {"a": jnp.array([3 * size], dtype), "b": jnp.array([-4 * size, 0], dtype)}
    with np.errstate(over="ignore"):
        assert not np.isfinite(np.asarray(grads["a"]) * np.asarray(grads["a"]))[0]
    updates, state = clip(grads)
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(updates["a"], float), [0.6], rtol=tolerance)
    np.testing.assert_allclose(np.asarray(updates["b"], float), [-0.8, 0], rtol=tolerance)
    assert updates["a"].dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(float(state.norm), 5 * size, rtol=tolerance)
    assert bool(state.finite)


@pytest.mark.parametrize("entry", [1e20, 1e30, 3e38])
def test_float32_entries_up_to_the_largest(entry):
    updates, state = clip({"w": jnp.full(4, entry, jnp.float32)})
    np.testing.assert_allclose(updates["w"], 0.5, rtol=1e-6)
    assert bool(state.finite)
    if entry < 1e38:
        np.testing.assert_allclose(state.norm, 2 * entry, rtol=1e-6)
        np.testing.assert_allclose(state.scale, 0.5 / entry, rtol=1e-6)
    else:
        assert np.isinf(state.norm)  # 2 · 3e38 is beyond float32


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_squares_that_underflow(dtype):
    """A norm below the root of the smallest number is a norm still."""
    small = 2.0 ** (-10 if dtype == "float16" else -90)
    grads = jnp.array([3 * small, 4 * small], dtype)
    updates, state = clip(grads, small)
    np.testing.assert_allclose(np.asarray(updates, float), [0.6 * small, 0.8 * small], rtol=1e-3)
    assert float(state.norm) == 5 * small


def test_denormal_entries():
    grads = {"w": jnp.array([1e-40, -3e-39], jnp.float32), "v": jnp.array([1e-310])}
    updates, state = clip(grads)
    assert_same_bits(updates, grads)
    assert bool(state.finite) and float(state.scale) == 1.0
    updates, _ = clip({"w": jnp.array([1e-40, 3e30], jnp.float32)})
    np.testing.assert_allclose(updates["w"], [0, 1], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_passes_unchanged_and_is_seen(bad):
    grads = {"w": jnp.array([1e30, bad, -0.0], jnp.float32), "b": jnp.array([7.0, -0.0])}
    updates, state = clip(grads)
    assert_same_bits(updates, grads)
    assert not bool(state.finite)
    assert float(state.scale) == 1.0
    assert np.isnan(state.norm) if np.isnan(bad) else np.isinf(state.norm)


DTYPES = ["float16", "bfloat16", "float32", "float64"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("policy", ["propagate", "zero", "skip"])
def test_policies_for_what_is_not_finite(policy, bad, dtype):
    grads = {"w": jnp.array([3.0, bad], dtype), "b": jnp.array(4.0, dtype)}
    updates, state = clip(grads, nonfinite=policy)
    assert not bool(state.finite) and int(state.num_nonfinite) == 1
    wanted = {"propagate": [3.0, bad, 4.0], "zero": [0.6, 0.0, 0.8], "skip": [0.0, 0.0, 0.0]}[policy]
    found = np.append(np.asarray(updates["w"], float), float(updates["b"]))
    np.testing.assert_allclose(found, wanted, rtol=float(jnp.finfo(dtype).eps))
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    if policy == "zero":
        np.testing.assert_allclose(float(state.norm), 5.0, rtol=1e-6)
    if policy == "skip":
        assert float(state.norm) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("policy", ["propagate", "zero", "skip", "raise"])
def test_policies_leave_finite_gradients_alone(policy, dtype):
    """Squares that overflow or underflow the dtype are no reason to act; a zero gradient stays zero."""
    largest, smallest = float(jnp.finfo(dtype).max) / 4, float(jnp.finfo(dtype).tiny)
    for entries, wanted in (([largest, -largest], [0.5**0.5, -(0.5**0.5)]), ([smallest, 0.0], [smallest, 0.0])):
        updates, state = clip({"w": jnp.array(entries, dtype)}, nonfinite=policy)
        jax.effects_barrier()
        np.testing.assert_allclose(np.asarray(updates["w"], float), wanted, rtol=2 * float(jnp.finfo(dtype).eps))
        assert bool(state.finite) and int(state.num_nonfinite) == 0


def test_raise_raises_where_the_result_is_waited_for():
    grads = {"w": jnp.array([1.0, np.nan])}
    with pytest.raises((FloatingPointError, jax.errors.JaxRuntimeError), match="NaN or inf"):
        jax.block_until_ready(clip(grads, nonfinite="raise"))
        jax.effects_barrier()


def test_non_finite_updates_are_counted_in_a_scan():
    transformation = clip_by_global_norm(1.0, nonfinite="skip")
    grads = jnp.array([1.0, np.nan, 2.0, np.inf])

    def body(state, g):
        update, state = transformation.update(g, state)
        return state, update

    state, updates = jax.jit(lambda: jax.lax.scan(body, transformation.init(grads[0]), grads))()
    assert int(state.num_nonfinite) == 2 and bool(state.finite) is False
    np.testing.assert_array_equal(updates, [1.0, 0.0, 1.0, 0.0])


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="nonfinite must be one of propagate, zero, skip, raise, got 'ignore'"):
        clip_by_global_norm(1.0, nonfinite="ignore")


@pytest.mark.parametrize("grads", [{}, {"w": jnp.zeros((0, 3))}, {"w": jnp.zeros(3), "e": jnp.zeros(0)}])
def test_nothing_to_clip(grads):
    updates, state = clip(grads)
    assert_same_bits(updates, grads)
    assert (float(state.norm), float(state.scale), bool(state.finite)) == (0.0, 1.0, True)


def test_zero_gradient_has_a_derivative_of_zero():
    """Clipping inside a differentiated function: no NaN at 0."""
    slope = jax.jit(jax.grad(lambda g: jnp.sum(clip(g)[0])))(jnp.zeros(3))
    np.testing.assert_array_equal(slope, 1.0)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_in_a_chain_that_is_scanned(dtype):
    """The state keeps its structure and dtypes from update to update, and its telemetry is found by name."""
    optimizer = optax.chain(clip_by_global_norm(1.0), optax.scale_by_adam(), optax.scale(-0.1))
    params = {"w": jnp.zeros(2, dtype)}

    @jax.jit
    def run(params):
        def body(running, grads):
            params, state = running
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), optax.tree.get(state, "norm")

        return jax.lax.scan(body, (params, optimizer.init(params)), {"w": jnp.array([[3, 4], [0.3, 0.4]], dtype)})

    (_, state), norms = run(params)
    np.testing.assert_allclose(np.asarray(norms, float), [5, 0.5], rtol=1e-2)
    assert float(optax.tree.get(state, "scale")) == 1.0
    assert bool(optax.tree.get(state, "finite"))
    np.testing.assert_allclose(np.asarray(optax.tree.get(state, "mu")["w"], float), [0.084, 0.112], rtol=1e-2)


def test_under_vmap_every_run_has_its_own_norm():
    grads = jnp.array([[3.0, 4.0], [0.3, 0.4], [np.inf, 0.0]])
    transformation = clip_by_global_norm(1.0)
    together = jax.jit(jax.vmap(functools.partial(transformation.update, params=None)))
    updates, state = together(grads, jax.vmap(transformation.init)(grads))
    np.testing.assert_allclose(updates, [[0.6, 0.8], [0.3, 0.4], [np.inf, 0]], rtol=1e-15)
    np.testing.assert_array_equal(state.finite, [True, True, False])


@pytest.mark.parametrize("max_norm", [0, 0.0, -1.0, np.nan, np.inf, -np.inf])
def test_bad_norms(max_norm):
    with pytest.raises(ValueError, match="max_norm must be a finite number > 0"):
        clip_by_global_norm(max_norm)
