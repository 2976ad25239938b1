"""Clipping: optax's where optax is right, and right where its norm overflows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import assert_close, assert_same_bits, make, usual

from jbptt import full_bptt, train
from jbptt.clipping import (
    GlobalNormState,
    LeafNormState,
    ValueState,
    clip_by_global_norm,
    clip_by_leaf_norm,
    clip_by_value,
    gradient_stats,
)


def clip(grads, max_norm=1.0, **options):
    transformation = clip_by_global_norm(max_norm, **options)
    return jax.jit(transformation.update)(grads, transformation.init(grads))


@pytest.mark.parametrize("max_norm", usual([1.0, 1e6], [1e-3, 1.0, 4.9, 5.1, 1e6]))
def test_equals_optax_where_its_norm_is_right(max_norm):
    grads = {"a": jnp.array([[3.0, 0.0], [0.0, -2.0]]), "b": (jnp.array(2.0), jnp.array([[[-2.0]], [[2.0]]]))}
    reference = optax.clip_by_global_norm(max_norm)
    updates, state = clip(grads, max_norm)
    assert_close(updates, reference.update(grads, reference.init(grads))[0], rtol=1e-15)
    assert_close((state.norm, state.scale), (5.0, min(1.0, max_norm / 5)), rtol=1e-15)
    assert bool(state.finite)


@pytest.mark.parametrize("dtype", usual(["float16"], ["float16", "bfloat16", "float32", "float64"]))
@pytest.mark.parametrize("fraction", usual([1.0], [1.0, 1e-2]))
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


@pytest.mark.parametrize("bad", usual([np.inf], [np.nan, np.inf, -np.inf]))
def test_what_is_not_finite_passes_unchanged_and_is_seen(bad):
    grads = {"w": jnp.array([1e30, bad, -0.0], jnp.float32), "b": jnp.array([7.0, -0.0])}
    updates, state = clip(grads)
    assert_same_bits(updates, grads)
    assert not bool(state.finite)
    assert float(state.scale) == 1.0
    assert np.isnan(state.norm) if np.isnan(bad) else np.isinf(state.norm)


DTYPES = ["float16", "bfloat16", "float32", "float64"]


@pytest.mark.parametrize("dtype", usual(["bfloat16"], DTYPES))
@pytest.mark.parametrize("bad", usual([np.inf], [np.nan, np.inf, -np.inf]))
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


@pytest.mark.parametrize("dtype", usual(["bfloat16"], DTYPES))
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


@pytest.mark.parametrize("dtype", usual(["bfloat16"], ["float32", "float64", "bfloat16"]))
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


# ---- by leaf ----

TREE = {"b": jnp.array(0.25), "e": jnp.zeros((0, 2)), "w": (jnp.array([3.0, -4.0]), jnp.array([[0.6], [0.8]]))}


def run(transformation, grads):
    return jax.jit(transformation.update)(grads, transformation.init(grads))


@pytest.mark.parametrize("max_norm", [1e-3, 0.9, 4.9, 5.1])
def test_by_leaf_is_the_global_norm_of_every_leaf(max_norm):
    updates, state = run(clip_by_leaf_norm(max_norm), TREE)
    reference = optax.clip_by_global_norm(max_norm)
    assert_close(updates, jax.tree.map(lambda g: reference.update(g, optax.EmptyState())[0], TREE), rtol=1e-15)
    norms = {"b": 0.25, "e": 0.0, "w": (5.0, 1.0)}
    assert_close(state.norm, norms, rtol=1e-15)
    assert_close(state.scale, jax.tree.map(lambda n: min(1.0, max_norm / n) if n else 1.0, norms), rtol=1e-15)
    assert jax.tree.leaves(state.finite) == [True] * 4


@pytest.mark.parametrize("dtype", usual(["bfloat16"], DTYPES))
def test_by_leaf_where_squares_overflow_and_underflow(dtype):
    kind = jnp.finfo(dtype)
    large, small = float(kind.max) / 5, float(kind.smallest_normal) * 8
    for size, max_norm in ((large, 1.0), (small, small)):
        grads = {"a": jnp.array([3 * size, -4 * size], dtype), "b": jnp.array([0.5 * small], dtype)}
        updates, state = run(clip_by_leaf_norm(max_norm), grads)
        np.testing.assert_allclose(np.asarray(updates["a"], float) / max_norm, [0.6, -0.8], rtol=4 * float(kind.eps))
        assert_same_bits(updates["b"], grads["b"])
        np.testing.assert_allclose(float(state.norm["a"]) / size, 5, rtol=4 * float(kind.eps))
        assert jax.tree.leaves(state.finite) == [True, True]


BAD = [np.nan, np.inf, -np.inf]


def under_policies(clipper, grads):
    """{policy: (updates, state)} with a leading axis for each bad entry: one compilation for all."""

    def every(grads):
        clips = {policy: clipper(1.0, nonfinite=policy) for policy in ("propagate", "zero", "skip")}
        return {policy: clip.update(grads, clip.init(grads)) for policy, clip in clips.items()}

    return jax.jit(jax.vmap(every))(grads)


@pytest.mark.parametrize("dtype", usual(["bfloat16"], DTYPES))
def test_policies_by_leaf(dtype):
    """A broken leaf does not keep the others from being clipped; "skip" drops the whole update."""
    grads = {"b": jnp.array([[6.0, 8.0]] * 3, dtype), "w": jnp.array([[3.0, bad] for bad in BAD], dtype)}
    for policy, (updates, state) in under_policies(clip_by_leaf_norm, grads).items():
        for k, bad in enumerate(BAD):
            wanted = {"propagate": [0.6, 0.8, 3, bad], "zero": [0.6, 0.8, 1, 0], "skip": [0] * 4}[policy]
            found = [*np.asarray(updates["b"][k], float), *np.asarray(updates["w"][k], float)]
            np.testing.assert_allclose(found, wanted, rtol=float(jnp.finfo(dtype).eps))
            norms = {"propagate": (10, abs(bad)), "zero": (10, 3), "skip": (0, 0)}[policy]
            np.testing.assert_allclose((state.norm["b"][k], state.norm["w"][k]), norms, rtol=1e-6)
        assert (updates["b"].dtype, updates["w"].dtype) == (jnp.dtype(dtype),) * 2
        assert state.finite["b"].all() and not state.finite["w"].any()
        assert not state.num_nonfinite["b"].any() and (state.num_nonfinite["w"] == 1).all()


# ---- by value ----


@pytest.mark.parametrize("max_value", [0.25, 2.0, 1e3])
def test_by_value_is_optax_bit_for_bit_where_all_is_finite(max_value):
    def entries(dtype):
        kind = jnp.finfo(dtype)
        odd = [0.0, -0.0, max_value, -max_value, float(kind.max), float(kind.min), float(kind.smallest_normal)]
        return jnp.array([*odd, 0.3, -1.7, 5e2, -3e3], dtype)

    grads = {dtype: entries(dtype) for dtype in DTYPES}
    updates, state = run(clip_by_value(max_value), grads)
    assert_same_bits(updates, optax.clip(max_value).update(grads, optax.EmptyState())[0])
    flat = np.concatenate([np.asarray(leaf, float) for leaf in grads.values()])
    np.testing.assert_allclose(state.clipped_share, np.mean(np.abs(flat) > max_value), rtol=1e-6)
    assert float(state.largest) == np.finfo(float).max and bool(state.finite)


def test_by_value_leaves_denormals():
    grads = {"w": jnp.array([1e-40, -3e-39], jnp.float32), "v": jnp.array([1e-310, 9.0])}
    updates, state = run(clip_by_value(1.0), grads)
    assert_same_bits(updates, {"w": grads["w"], "v": jnp.array([1e-310, 1.0])})
    assert float(state.clipped_share) == 0.25


@pytest.mark.parametrize("dtype", usual(["bfloat16"], DTYPES))
def test_policies_by_value(dtype):
    """An infinite entry is never hidden as ±max_value."""
    grads = {"b": jnp.array([-4.0] * 3, dtype), "w": jnp.array([[3.0, bad, -0.5] for bad in BAD], dtype)}
    for policy, (updates, state) in under_policies(clip_by_value, grads).items():
        for k, bad in enumerate(BAD):
            wanted = {"propagate": [-1, 1, bad, -0.5], "zero": [-1, 1, 0, -0.5], "skip": [0] * 4}[policy]
            np.testing.assert_array_equal([float(updates["b"][k]), *np.asarray(updates["w"][k], float)], wanted)
            np.testing.assert_array_equal(state.largest[k], {"propagate": abs(bad), "zero": 4, "skip": 0}[policy])
        assert not state.finite.any() and (state.num_nonfinite == 1).all()
        assert (state.clipped_share == (0 if policy == "skip" else 0.5)).all()


def test_by_value_keeps_the_phase_of_complex_entries():
    updates, state = run(clip_by_value(1.0), jnp.array([3 + 4j, 0.3j, -2e200 + 0j]))
    np.testing.assert_allclose(updates, [0.6 + 0.8j, 0.3j, -1], rtol=1e-15)
    np.testing.assert_allclose(state.clipped_share, 2 / 3, rtol=1e-6)


# ---- what all clippers share ----

CLIPPERS = {
    clip_by_global_norm: GlobalNormState,
    clip_by_leaf_norm: LeafNormState,
    clip_by_value: ValueState,
}


@pytest.mark.parametrize("clipper", usual([clip_by_value], list(CLIPPERS)[1:]), ids=lambda c: c.__name__)
@pytest.mark.more("test_policies_leave_finite_gradients_alone")
def test_every_policy_leaves_finite_gradients_alone(clipper):
    grads, wanted = {}, {}
    for dtype in DTYPES:
        largest, smallest = float(jnp.finfo(dtype).max) / 4, float(jnp.finfo(dtype).tiny)
        grads[dtype] = (jnp.array([largest, 0.0], dtype), jnp.array([smallest, -0.0], dtype))
        wanted[dtype] = (jnp.array([1.0, 0.0], dtype), grads[dtype][1])
    clips = [clipper(1.0, nonfinite=policy) for policy in ("propagate", "zero", "skip", "raise")]
    for updates, state in jax.jit(lambda g: [clip.update(g, clip.init(g)) for clip in clips])(grads):
        assert_same_bits(updates, wanted)
        assert all(map(bool, jax.tree.leaves(state.finite))) and not any(jax.tree.leaves(state.num_nonfinite))
    jax.effects_barrier()


@pytest.mark.parametrize("clipper", CLIPPERS, ids=lambda c: c.__name__)
def test_raise_names_the_clipper(clipper):
    grads = {"v": jnp.ones(2), "w": jnp.array([1.0, np.nan])}
    with pytest.raises((FloatingPointError, jax.errors.JaxRuntimeError), match=rf"NaN or inf \({clipper.__name__}"):
        jax.block_until_ready(run(clipper(1.0, nonfinite="raise"), grads))
        jax.effects_barrier()


@pytest.mark.parametrize("clipper", CLIPPERS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("grads", [{}, {"w": jnp.zeros((0, 3))}, {"w": jnp.zeros(3), "e": jnp.zeros(0), "n": None}])
def test_nothing_to_clip_for_any_clipper(clipper, grads):
    updates, state = run(clipper(1.0), grads)
    assert_same_bits(updates, grads)
    assert_same_bits(state, clipper(1.0).init(grads))  # what the state says before the first update


@pytest.mark.parametrize("clipper", usual([clip_by_leaf_norm], CLIPPERS), ids=lambda c: c.__name__)
def test_updates_and_counts_in_a_scan_under_vmap(clipper):
    """Three runs of two updates, each with a norm and counts of its own, equal to the same runs alone."""
    transformation = clipper(1.0)
    grads = {"a": jnp.array([[0.3, 4.0], [np.nan, 2.0], [0.2, np.inf]]), "b": jnp.full((3, 2), 7.0)}

    @jax.jit
    def one(grads):
        def body(state, g):
            updates, state = transformation.update(g, state)
            return state, updates

        return jax.lax.scan(body, transformation.init(jax.tree.map(lambda g: g[0], grads)), grads)

    together = jax.jit(jax.vmap(one))(grads)
    for i in range(3):
        alone = one(jax.tree.map(lambda g, i=i: g[i], grads))
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-15), together, alone)
    counts = jax.tree.leaves(together[0].num_nonfinite)
    np.testing.assert_array_equal(counts[0], [0, 1, 1])


@pytest.mark.parametrize("clipper", usual([clip_by_global_norm], CLIPPERS), ids=lambda c: c.__name__)
@pytest.mark.parametrize("dtype", usual(["bfloat16"], ["bfloat16", "float32"]))
def test_a_bound_that_is_data(clipper, dtype):
    """Under inject_hyperparams the bound is traced, and may fall from update to update."""
    name = "max_value" if clipper is clip_by_value else "max_norm"
    optimizer = optax.inject_hyperparams(clipper)(**{name: lambda count: 2.0 / (count + 1)})
    params = {"w": jnp.zeros(1, dtype)}

    @jax.jit
    def updates():
        body = lambda state, g: optimizer.update(g, state, params)[::-1]
        return jax.lax.scan(body, optimizer.init(params), {"w": jnp.full((3, 1), -8, dtype)})

    state, found = updates()
    np.testing.assert_allclose(np.asarray(found["w"][:, 0], float), [-2, -1, -2 / 3], rtol=1e-2)
    assert isinstance(optax.tree.get(state, CLIPPERS[clipper].__name__), CLIPPERS[clipper])


def test_a_wider_bound_does_not_widen_the_telemetry():
    grads = jnp.array([3.0, 4.0], jnp.float32)
    updates, state = jax.jit(lambda bound: run(clip_by_global_norm(bound), grads))(jnp.float64(2.5))
    assert_close(updates, jnp.array([1.5, 2.0], jnp.float32), rtol=1e-6)
    assert (updates.dtype, state.norm.dtype, state.scale.dtype) == (jnp.float32,) * 3


def test_telemetry_of_several_clippers_is_selected_by_their_states_names():
    """Also where a field's name is a parameter's, and where optax alone would find several."""
    params = {"norm": jnp.array([3.0, 4.0]), "scale": jnp.array(12.0)}
    optimizer = optax.chain(
        clip_by_value(8.0), clip_by_leaf_norm(6.0), clip_by_global_norm(1.0), gradient_stats(), optax.adam(0.1)
    )
    _, state = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    with pytest.raises(KeyError, match="multiple values"):
        optax.tree.get(state, "norm")
    assert_close(optax.tree.get(state, "ValueState").clipped_share, jnp.float32(1 / 3), rtol=1e-6)
    assert_close(optax.tree.get(state, "LeafNormState").norm, {"norm": 5.0, "scale": 8.0})
    assert_close(optax.tree.get(state, "GlobalNormState").norm, np.sqrt(61.0))
    assert_close(optax.tree.get(state, "GradientStatsState").norm, 1.0)
    by_field = functools.partial(optax.tree.get, state, "norm")
    in_state = lambda path, value: getattr(path[-1], "tuple_name", "") == "GlobalNormState"
    assert_close(by_field(filtering=in_state), np.sqrt(61.0))
    twice = optax.chain(clip_by_global_norm(6.0), clip_by_global_norm(2.0))
    _, state = twice.update(params, twice.init(params))
    assert_close([s.norm for _, s in optax.tree.get_all_with_path(state, "GlobalNormState")], [13.0, 6.0])


def test_each_label_of_multi_transform_has_its_own_clippers():
    params = {"b": jnp.array(0.5), "w": jnp.array([3.0, 4.0]), "x": jnp.array([30.0])}
    clippers = {
        "leaf": clip_by_leaf_norm(1.0),
        "whole": optax.chain(clip_by_global_norm(0.25), gradient_stats()),
        "value": clip_by_value(7.0),
    }
    optimizer = optax.multi_transform(clippers, {"b": "whole", "w": "leaf", "x": "value"})
    updates, state = jax.jit(optimizer.update)(params, optimizer.init(params))
    assert_close(updates, {"b": 0.25, "w": np.array([0.6, 0.8]), "x": np.array([7.0])}, rtol=1e-15)
    assert jax.tree.leaves(optax.tree.get(state, "LeafNormState").norm) == [5.0]
    assert float(optax.tree.get(state, "GlobalNormState").norm) == 0.5
    assert float(optax.tree.get(state, "ValueState").clipped_share) == 1.0
    assert float(optax.tree.get(state, "GradientStatsState").norm) == 0.25


def test_inside_a_training_run():
    problem = make("tanh", 4)
    optimizer = optax.chain(gradient_stats(), clip_by_leaf_norm(0.01), clip_by_value(0.005), optax.adam(1e-2))
    batches = jax.tree.map(lambda a: jnp.stack([a] * 5), problem.batch)
    estimator = full_bptt(problem.step, problem.loss)
    _, history = jax.jit(lambda p: train(estimator, optimizer, p, problem.carry, batches))(problem.params)
    stats = optax.tree.get(history.opt_state, "GradientStatsState")
    assert_close(stats.norm, history.grad_norm[-1])
    assert int(stats.num_updates) == 5 and 0.9 < float(stats.cosine) < 1
    assert jax.tree.structure(stats.leaf_norms) == jax.tree.structure(problem.params)
    assert_close(optax.tree.get(history.opt_state, "LeafNormState").norm, stats.leaf_norms)
    assert 0 < float(optax.tree.get(history.opt_state, "clipped_share")) < 1


@pytest.mark.parametrize("clipper", CLIPPERS, ids=lambda c: c.__name__)
def test_bad_arguments_of_every_clipper(clipper):
    name = "max_value" if clipper is clip_by_value else "max_norm"
    for value in (0, -1.0, np.nan, np.inf, "1", None):
        with pytest.raises(ValueError, match=f"{name} must be a finite number > 0, got"):
            clipper(value)
    with pytest.raises(ValueError, match="nonfinite must be one of propagate, zero, skip, raise, got None"):
        clipper(1.0, nonfinite=None)


# ---- gradient_stats ----


def looks(sequence):
    """The states after each update of a sequence of gradients, which must pass bit for bit."""
    stats, states = gradient_stats(), []
    state = stats.init(sequence[0])
    for grads in sequence:
        updates, state = jax.jit(stats.update)(grads, state)
        assert_same_bits(updates, grads)
        states.append(state)
    return states


@pytest.mark.parametrize("dtype", usual(["bfloat16"], DTYPES))
def test_stats_against_numpy(dtype):
    rng = np.random.default_rng(0)
    draw = lambda: {"a": jnp.asarray(rng.normal(size=(4, 3)), dtype), "b": (jnp.asarray(rng.normal(), dtype),)}
    sequence = [draw() for _ in range(4)]
    flat = [np.concatenate([np.asarray(leaf, float).ravel() for leaf in jax.tree.leaves(g)]) for g in sequence]
    rtol = 4 * float(jnp.finfo(jnp.promote_types(dtype, jnp.float32)).eps)
    states = looks(sequence)
    for n, state in enumerate(states):
        np.testing.assert_allclose(state.norm, np.linalg.norm(flat[n]), rtol=rtol)
        np.testing.assert_allclose(state.leaf_norms["a"], np.linalg.norm(flat[n][:-1]), rtol=rtol)
        np.testing.assert_allclose(state.leaf_norms["b"][0], abs(flat[n][-1]), rtol=rtol)
        assert float(state.largest) == np.max(np.abs(flat[n]))
        assert (int(state.num_updates), bool(state.finite), int(state.num_nonfinite)) == (n + 1, True, 0)
        if n:
            cosine = flat[n] @ flat[n - 1] / np.linalg.norm(flat[n]) / np.linalg.norm(flat[n - 1])
            np.testing.assert_allclose(state.cosine, cosine, rtol=rtol, atol=rtol)
    assert np.isnan(states[0].cosine)


@pytest.mark.parametrize("dtype", usual(["bfloat16"], DTYPES))
def test_stats_where_squares_overflow_and_underflow(dtype):
    kind = jnp.finfo(dtype)
    large, small = float(kind.max) / 5, float(kind.smallest_normal) * 8
    grads = [jnp.array([3 * large, 4 * large], dtype), jnp.array([-4 * small, 3 * small], dtype)]
    first, second, third = looks([*grads, jnp.array([-3 * large, -4 * large], dtype)])
    np.testing.assert_allclose(float(first.norm) / large, 5, rtol=4 * float(kind.eps))
    np.testing.assert_allclose(float(second.norm) / small, 5, rtol=4 * float(kind.eps))
    np.testing.assert_allclose([float(second.cosine), float(third.cosine)], 0, atol=4 * float(kind.eps))
    assert float(looks([grads[0], -grads[0]])[1].cosine) == pytest.approx(-1, abs=1e-6)
    huge = looks([jnp.full(4, kind.max, dtype)])[0]
    assert bool(huge.finite) and float(huge.largest) == float(kind.max)


@pytest.mark.parametrize("bad", usual([np.inf], [np.nan, np.inf, -np.inf]))
def test_stats_of_what_is_not_finite(bad):
    """It has no direction, and the next gradient is compared with the last finite one."""
    grads = [{"a": jnp.array([1.0, x]), "b": jnp.array(y)} for x, y in ((0.0, 0.0), (bad, -0.0), (1.0, 0.0))]
    _, broken, after = looks(grads)
    assert np.isnan(broken.cosine) and not bool(broken.finite)
    np.testing.assert_array_equal(broken.norm, abs(bad))
    np.testing.assert_array_equal(broken.largest, abs(bad))
    np.testing.assert_array_equal([broken.leaf_norms["a"], broken.leaf_norms["b"]], [abs(bad), 0])
    np.testing.assert_allclose(after.cosine, 0.5**0.5, rtol=1e-15)
    assert bool(after.finite) and (int(after.num_nonfinite), int(after.num_updates)) == (1, 3)


def test_the_cosine_to_or_of_zero_is_nan():
    one, zero = jnp.array([1.0, 2.0]), jnp.array([0.0, -0.0])
    assert np.isnan([s.cosine for s in looks([one, zero, one, one])]).tolist() == [True, True, True, False]


def test_stats_under_vmap_and_scan():
    stats = gradient_stats()
    grads = jnp.array([[[1.0, 0.0], [1.0, 1.0]], [[0.0, 2.0], [0.0, -2.0]]])

    def one(grads):
        return jax.lax.scan(lambda state, g: stats.update(g, state)[::-1], stats.init(grads[0]), grads)

    state, updates = jax.jit(jax.vmap(one))(grads)
    assert_same_bits(updates, grads)
    np.testing.assert_allclose(state.cosine, [0.5**0.5, -1], rtol=1e-15)


@pytest.mark.parametrize("grads", [{}, {"w": jnp.zeros((0, 3))}])
def test_stats_of_nothing(grads):
    state = looks([grads, grads])[1]
    assert (float(state.norm), float(state.largest), bool(state.finite)) == (0.0, 0.0, True)
    assert np.isnan(state.cosine)
