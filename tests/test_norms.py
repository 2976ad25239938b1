"""Norms, and all that asks them what is not finite, at the sizes at which XLA changes its code."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import usual

from jbptt import Batch, clipping, diagnose, lyapunov_spectrum, powers
from jbptt.bias_bound import bound_bias
from jbptt.norms import clip_to_norm, compared_with, in_units_of, inner, max_or_nan, norm, normalised, scaled_norm

SIZES = 1, 63, 64, 4095, 4096, 70_000
DTYPES = "float32", "float64", "bfloat16", "complex64"
CLIPPERS = clipping.clip_by_global_norm, clipping.clip_by_leaf_norm, clipping.clip_by_value


def planted(shape, index, value, dtype="float32"):
    return jnp.ones(shape, dtype).at[index].set(value)


def numbers_of(array):
    """Everything that the norm of one array goes into."""
    ones = jnp.ones_like(array)
    of_ones = compared_with(ones)(array)
    others = scaled_norm(array), norm(array), clip_to_norm(array, 1.0)[1], norm(in_units_of(array)(ones)), of_ones
    return jnp.array(jax.tree.leaves((max_or_nan(jnp.abs(array)), others, compared_with(array)(ones))))


@pytest.mark.parametrize("size", usual(SIZES[-1:], SIZES))
@pytest.mark.parametrize("dtype", usual(DTYPES[:1], DTYPES))
def test_nan_is_seen_in_arrays_of_every_size(dtype, size):
    compiled = jax.jit(numbers_of)
    ratio = np.sqrt(size)
    wanted = [2, 2, ratio, 2 * ratio, 2 * ratio, 0.5, 1, 1, 0.5, 1]
    np.testing.assert_allclose(compiled(jnp.full(size, 2, dtype)), wanted, rtol=1e-6)
    for broken in (
        planted(size, size // 3, np.nan, dtype),
        planted(size, -1, np.nan, dtype),
        jnp.full(size, np.nan, dtype),
    ):
        found = compiled(broken)
        assert np.all(np.isnan(np.delete(found, 2))), found  # the ratio beside a NaN means nothing
    assert np.isnan(norm(broken)) and np.isnan(max_or_nan(jnp.abs(broken)))  # without jit
    assert norm(planted(size, size // 3, -np.inf, dtype)) == np.inf
    both = planted(size, -1, np.nan, dtype).at[0].set(np.inf)
    assert not np.isfinite(norm(both)) and not np.isfinite(scaled_norm({"a": both, "b": jnp.ones(2)})[0])


@pytest.mark.parametrize("shape, axis", [((2048, 3), 0), ((3, 4096), 1), ((64, 64), 1), ((3, 1100, 2), 1)])
def test_nan_is_seen_along_an_axis(shape, axis):
    """By examples too: only the one that holds it is NaN."""
    index = tuple(size // 2 for size in shape)
    values = planted(shape, index, np.nan)
    for maximum in (max_or_nan, jax.jit(max_or_nan, static_argnums=1)):
        np.testing.assert_array_equal(maximum(values, axis), np.max(np.asarray(values), axis))
    by_example = jnp.moveaxis(values, axis, -1)
    wanted = np.where(np.isnan(by_example).any(-1), np.nan, np.sqrt(shape[axis]))
    np.testing.assert_allclose(norm(by_example, by_example.ndim - 1), wanted, rtol=1e-6)


def test_the_derivative_of_a_norm_is_what_it_was():
    values = jnp.asarray(np.random.default_rng(0).normal(size=4096))
    np.testing.assert_allclose(jax.grad(norm)(values), values / np.linalg.norm(values), rtol=1e-12)
    assert not np.any(jax.grad(norm)(jnp.zeros(4096)))


@pytest.mark.parametrize(
    "dtype, size",
    [
        *(("float32", size) for size in SIZES),
        ("float64", 4096),
        ("bfloat16", 4096),
        ("complex64", 63),
        ("complex64", 4096),
    ],
)
def test_every_policy_sees_what_is_not_finite(dtype, size):
    """All clippers and policies in one program: no NaN gets into an update that leaves it out."""
    transforms = [
        (policy, make(1.0, nonfinite=policy)) for policy in ("propagate", "zero", "skip") for make in CLIPPERS
    ]
    other = jnp.full(2, 0.25, dtype)

    def run(grads):
        return [clip.update(grads, clip.init(grads)) for _, clip in transforms], clipping.gradient_stats().update(
            grads, clipping.gradient_stats().init(grads)
        )[1]

    compiled = jax.jit(run)
    for bad in (np.nan, np.inf):
        leaf = planted(size, size // 3, bad, dtype)
        results, stats = compiled({"large": leaf, "small": other})
        assert not stats.finite and stats.num_nonfinite == 1 and not np.isfinite(stats.norm)
        assert not np.isfinite(stats.leaf_norms["large"]) and not np.isfinite(stats.largest) and np.isnan(stats.cosine)
        for (policy, _), (updates, state) in zip(transforms, results, strict=True):
            seen = jax.tree.map(bool, state.finite)
            assert seen in (False, {"large": False, "small": True}), (policy, type(state), seen)
            assert max(jax.tree.leaves(state.num_nonfinite)) == 1
            if policy == "propagate":
                assert np.array_equal(updates["large"], leaf, equal_nan=True)
            elif policy == "zero":
                assert np.all(np.isfinite(updates["large"])) and updates["large"][size // 3] == 0
                assert np.all(np.asarray(updates["small"]) != 0)
            else:
                assert not np.any(jax.tree.leaves(updates)[0]) and not np.any(updates["small"])
        assert size == 1 or np.all(results[5][0]["large"][0] == 1)  # by value: what is finite passes


@pytest.mark.parametrize("make", CLIPPERS, ids=lambda make: make.__name__)
def test_raise_sees_nan_in_a_large_leaf(make):
    clip = make(1.0, nonfinite="raise")
    grads = planted(4096, 5, np.nan)
    with pytest.raises(Exception, match="the gradient holds NaN or inf"):
        jax.block_until_ready(jax.jit(clip.update)(grads, clip.init(grads)))
        jax.effects_barrier()


def test_the_bound_of_thousands_of_lags_that_are_not_all_numbers():
    """As with few: no window is promised anything."""
    bound_of = jax.jit(partial(bound_bias, tolerances=(0.1,)))
    for num_lags in (64, 4097):
        norms = jnp.exp(-0.001 * jnp.arange(num_lags))
        assert np.all(np.isfinite(bound_of(norms, norms, jnp.full(num_lags, 1e6), num_lags=num_lags).bias_bound))
        for broken in ((norms.at[num_lags - 2].set(jnp.nan), norms), (norms, norms.at[3].set(jnp.nan))):
            found = bound_of(*broken, jnp.full(num_lags, 1e6), num_lags=num_lags)
            assert np.all(np.isinf(found.bias_bound)), num_lags


@pytest.mark.more("test_every_policy_sees_what_is_not_finite")
def test_diagnosis_of_a_wide_model_that_is_not_finite():
    def step(params, h, x):
        return 0.5 * h + params["w"][:2] * x, params["w"].sum() * h

    params = {"w": planted(4096, 7, np.nan)}
    batch = Batch(jnp.ones((3, 2), jnp.float32), jnp.ones((3, 2), jnp.float32))
    found = diagnose(step, lambda y, t: jnp.sum((y - t) ** 2), params, jnp.zeros(2, jnp.float32), batch, measure=False)
    assert found.verdict == "non-finite" and np.isnan(found.gradient_norm)
    assert "params['w']" in str(found) and "-inf" not in str(found)


def test_exponents_of_a_wide_carry_that_is_not_finite():
    """64 × 64 numbers in the frame, one of whose columns would be dropped, not seen."""
    step = lambda w, h, x: (w * h * jnp.where(x == 1, jnp.nan, 1.0), None)
    found = lyapunov_spectrum(step, 0.5, jnp.ones(64), jnp.array([0.0, 1.0, 0.0]))
    assert np.all(np.isnan(found.exponents))


def test_powers_of_a_large_matrix_that_is_not_finite():
    matrix = jax.jit(lambda: planted((64, 64), (3, 5), np.nan))()
    found = jax.jit(lambda m: powers.alignment(m, jnp.ones(64), 3))(matrix)
    assert int(found.case_index) == -1


def test_inner_products_and_unit_vectors_of_each_example():
    """Of trees with complex leaves; an example of zeros has no direction, a huge or tiny one does."""
    rng = np.random.default_rng(0)

    def draw():
        return {
            "real": rng.normal(size=(3, 4)),
            "complex": rng.normal(size=(3, 2, 5)) + 1j * rng.normal(size=(3, 2, 5)),
        }

    def flat(tree):
        return np.concatenate([np.asarray(tree[name]).reshape(3, -1) for name in ("real", "complex")], axis=1)

    left, right = draw(), draw()
    wanted = np.sum(flat(left).conj() * flat(right), axis=1).real
    np.testing.assert_allclose(inner(left, right, 1), wanted, rtol=1e-12)
    np.testing.assert_allclose(inner(left, right), wanted.sum(), rtol=1e-12)
    assert inner({}, {}) == 0

    scales = np.array([1e200, 0, 1e-200])
    scaled = jax.tree.map(lambda a: a * scales.reshape(3, *[1] * (a.ndim - 1)), left)
    sizes = np.linalg.norm(flat(left), axis=1)[:, None]
    np.testing.assert_allclose(flat(normalised(scaled, 1)), (scales != 0)[:, None] * flat(left) / sizes, rtol=1e-12)
