"""A carry given as a function of the parameters: the gradient goes through the start, once, and analyses take it."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.tree_util import Partial
from problems import usual

import jbptt
from jbptt import (
    Batch,
    Plan,
    adaptive_bptt,
    cells,
    full_bptt,
    gated_bptt,
    randomized_bptt,
    testing,
    truncated_bptt,
    truncation,
    unroll,
)

T, B, H = 8, 2, 3
NUMBERS = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(NUMBERS.normal(size=shape))


PARAMS = {"w": 0.5 * draw(H, H), "b": 0.3 * draw(H), "h0": draw(H)}
BATCH = Batch(draw(T, B, H), draw(T, B, H))


def step(params, carry, x):
    """A network beside a counter."""
    h = jnp.tanh(carry["h"] @ params["w"] + params["b"] + x)
    return {"h": h, "n": carry["n"] + 1}, h


def loss(y, target):
    return jnp.sum((y - target) ** 2, -1)


def start(params):
    """Reads a parameter of its own and one that the step reads too."""
    h0 = jnp.tanh(params["h0"] + params["b"])
    return {"h": jnp.broadcast_to(h0, (B, H)), "n": jnp.zeros(B, int)}


def mean_loss(params, gates=None, xs=BATCH.xs, targets=BATCH.targets):
    """By a plain scan with the start inside."""
    if gates is None:
        _, ys = lax.scan(partial(step, params), start(params), xs)
    else:
        _, ys = unroll(step, params, start(params), xs, gates=gates)
    return jnp.mean(jax.vmap(loss)(ys, targets))


def cut_at(first):
    """A window's loss at step t sees the start where its window begins there."""
    frozen = testing.frozen_loss(step, loss, PARAMS, start, BATCH, coverage=first)
    return jax.grad(frozen)(PARAMS)


EXACT = jax.grad(mean_loss)(PARAMS)
CASES = {
    "full": (full_bptt(step, loss), lambda: EXACT),
    "segments": (full_bptt(step, loss, plan=Plan(3)), lambda: EXACT),
    "one block": (truncated_bptt(step, loss, window=T), lambda: EXACT),
    "blocks": (truncated_bptt(step, loss, window=4), lambda: jax.grad(mean_loss)(PARAMS, truncation.fixed(T, 4))),
    "ragged blocks": (
        truncated_bptt(step, loss, window=3),
        lambda: jax.grad(mean_loss)(PARAMS, truncation.fixed(T, 3)),
    ),
    "side by side": (
        truncated_bptt(step, loss, window=2, plan=Plan(parallel_windows=2)),
        lambda: jax.grad(mean_loss)(PARAMS, truncation.fixed(T, 2)),
    ),
    "sliding": (truncated_bptt(step, loss, window=3, stride=1), lambda: cut_at(truncation.window_coverage(T, 3, 1))),
    "strides": (truncated_bptt(step, loss, window=4, stride=2), lambda: cut_at(truncation.window_coverage(T, 4, 2))),
    "adaptive": (
        adaptive_bptt(step, loss, tolerance=0.5, max_window=3),
        lambda: cut_at(truncation.window_coverage(T, 3, 1)),
    ),
    "gated": (
        gated_bptt(step, loss, gates_fn=lambda key, num_steps: jnp.linspace(0.3, 1.2, num_steps)),
        lambda: jax.grad(mean_loss)(PARAMS, jnp.linspace(0.3, 1.2, T)),
    ),
}


def assert_same(found, wanted, tolerance=1e-12):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), found, wanted)


def first_update(estimator, carry=start, key=None, **given):
    state = estimator.init(PARAMS, carry, BATCH, key=key)
    return jax.jit(estimator.update)(PARAMS, state, BATCH)


@pytest.mark.parametrize("name", usual(["ragged blocks"], CASES))
def test_every_estimator_counts_the_start_with_the_first_step(name):
    estimator, wanted = CASES[name]
    with warnings.catch_warnings(action="error"):
        estimate, state = first_update(estimator)
    assert_same(estimate.grads, wanted())
    given, same = first_update(estimator, start(PARAMS))
    assert_same(state, same)  # from here on the state holds arrays
    assert_same(estimate.info, given.info)  # carry_grads too: the gradient in the carry
    assert np.all(estimate.grads["h0"] != 0)
    assert not given.grads["h0"].any()


def test_random_cuts_are_those_of_the_gates_drawn():
    estimate, _ = first_update(randomized_bptt(step, loss, keep_prob=0.7), key=jax.random.key(5))
    assert_same(estimate.grads, jax.grad(mean_loss)(PARAMS, estimate.info["gates"]))


@pytest.mark.parametrize("window", usual([3], [None, 3]))
def test_a_second_update_knows_no_start(window):
    estimator = full_bptt(step, loss) if window is None else truncated_bptt(step, loss, window=window, stride=1)
    (_, state), (_, same) = first_update(estimator), first_update(estimator, start(PARAMS))
    assert_same(*(estimator.update(PARAMS, s, BATCH)[0].grads for s in (state, same)))


def test_training_begins_at_the_start_and_learns_it():
    estimator, optimizer = full_bptt(step, loss), optax.sgd(0.1)
    batches = jax.tree.map(lambda a: jnp.stack([a, a]), BATCH)
    params, history = jax.jit(lambda p: jbptt.train(estimator, optimizer, p, start, batches))(PARAMS)
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, PARAMS, EXACT)
    estimate, state = estimator.update(PARAMS, estimator.init(PARAMS, start, BATCH), BATCH)
    later, _ = estimator.update(moved, state, BATCH)
    assert_same(params, jax.tree.map(lambda p, g: p - 0.1 * g, moved, later.grads))
    assert_same(history.loss, jnp.stack([estimate.loss, later.loss]))


def test_examples_on_two_devices():
    with jax.debug_nans(False):
        estimate, _ = first_update(full_bptt(step, loss, plan=Plan(num_shards=min(2, jax.device_count()))))
    assert_same(estimate.grads, EXACT)


def test_models_side_by_side():
    estimator = truncated_bptt(step, loss, window=3, stride=1)
    several = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), PARAMS)

    def gradient(params):
        return estimator.update(params, estimator.init(params, start, BATCH), BATCH)[0].grads

    found = jax.vmap(gradient)(several)
    for i in range(2):
        one = jax.tree.map(lambda a, i=i: a[i], several)
        assert_same(jax.tree.map(lambda a, i=i: a[i], found), gradient(one))


def test_a_start_that_holds_arrays_is_a_function_too():
    shift = jnp.arange(1.0, 1 + H)

    def shifted(shift, params):
        return {"h": jnp.broadcast_to(params["h0"] * shift, (B, H)), "n": jnp.zeros(B, int)}

    estimate, _ = first_update(full_bptt(step, loss), Partial(shifted, shift))
    wanted = jax.grad(lambda p: jnp.mean(loss(unroll(step, p, shifted(shift, p), BATCH.xs)[1], BATCH.targets)))(PARAMS)
    assert_same(estimate.grads, wanted)


@pytest.mark.more("test_every_estimator_counts_the_start_with_the_first_step")
def test_half_precision():
    params, batch = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (PARAMS, BATCH))
    for estimator in (full_bptt(step, loss), adaptive_bptt(step, loss, tolerance=0.5, max_window=T)):
        estimate, state = estimator.update(params, estimator.init(params, start, batch), batch)
        assert estimate.grads["h0"].dtype == jnp.float32
        assert state.carry["h"].dtype == jnp.bfloat16
        wide = jax.grad(mean_loss)(jax.tree.map(lambda a: a.astype(float), params))
        np.testing.assert_allclose(estimate.grads["h0"], wide["h0"], atol=0.05 * np.abs(wide["h0"]).max())


def test_mean_and_covariance_of_a_filter():
    """A Kalman filter whose first mean and covariance are parameters."""
    observed = draw(T, 2)
    params = {"a": 0.9 * jnp.eye(2) + 0.1, "mean": jnp.array([1.0, -1.0]), "root": jnp.array([[1.0, 0.0], [0.4, 0.7]])}

    def filtered(params, carry, x):
        mean, covariance = carry
        mean, covariance = params["a"] @ mean, params["a"] @ covariance @ params["a"].T + 0.1 * jnp.eye(2)
        spread = covariance + 0.2 * jnp.eye(2)
        gain = jnp.linalg.solve(spread, covariance).T
        score = (x - mean) @ jnp.linalg.solve(spread, x - mean) + jnp.linalg.slogdet(spread)[1]
        return (mean + gain @ (x - mean), covariance - gain @ covariance), score

    def first(params):
        return params["mean"], params["root"] @ params["root"].T

    def own(score, target):
        return score

    estimator, batch = full_bptt(filtered, own), Batch(observed)
    estimate, _ = estimator.update(params, estimator.init(params, first, batch), batch)
    wanted = jax.grad(lambda p: jnp.mean(lax.scan(partial(filtered, p), first(p), observed)[1]))(params)
    assert_same(estimate.grads, wanted)


def test_what_neither_step_nor_start_reads_is_named():
    with pytest.warns(UserWarning, match=r"no step reads params\['h0'\]"):
        full_bptt(step, loss).init(PARAMS, start(PARAMS), BATCH)
    with pytest.warns(UserWarning, match=r"no step reads params\['other'\]: .* carry=lambda params"):
        full_bptt(step, loss).init(PARAMS | {"other": jnp.ones(2)}, start, BATCH)


@pytest.mark.parametrize("counts", usual([False], [True, False]))
def test_a_gradient_that_has_a_path_by_the_start_alone_is_not_zero(counts):
    def fixed(params, carry, x):
        h, dead = carry
        return (jnp.sin(h + x), dead * 0.0 if counts else dead), h

    def first(params):
        return (params, jnp.zeros(())) if counts else (jnp.zeros(()), params)

    estimator, batch = full_bptt(fixed, lambda y, target: y), Batch(jnp.ones(4))
    if not counts:
        with pytest.warns(UserWarning, match="exactly zero"):
            estimator.init(0.5, first, batch)
        return
    with warnings.catch_warnings(action="error"):
        estimate, _ = estimator.update(0.5, estimator.init(0.5, first, batch), batch)
    wanted = jax.grad(lambda w: jnp.mean(unroll(fixed, w, first, batch.xs)[1]))(0.5)
    np.testing.assert_allclose(estimate.grads, wanted, rtol=1e-12)


def test_a_function_of_the_batch_shape_by_mistake():
    cell = cells.gru(H, H)
    params = cell.init(jax.random.key(0))
    given = params, cell.initial_carry
    with pytest.raises(ValueError, match=r"carry must be a tree of arrays, or a function of the param.*initial_carry"):
        full_bptt(cell.step, loss).init(*given, BATCH)
    with pytest.raises(ValueError, match=r"carry must be a tree of arrays, or a function of the param.*initial_carry"):
        unroll(cell.step, *given, BATCH.xs)
    with pytest.raises(ValueError, match=r"carry\(params\)\['h'\] is a str, wanted an array"):
        full_bptt(step, loss).init(PARAMS, lambda params: {"h": "zeros"}, BATCH)
    with pytest.raises(ValueError, match=r"step changes carry\['h'\] from .*\[2, 3, 1\]"):
        full_bptt(lambda p, c, x: ({"h": jnp.zeros((B, H))}, c["h"]), loss).init(
            PARAMS, lambda params: {"h": jnp.zeros((B, H, 1))}, BATCH
        )


def test_unroll_evaluates_the_start_differentiably():
    wanted = jax.grad(lambda p: jnp.mean(loss(unroll(step, p, start, BATCH.xs)[1], BATCH.targets)))(PARAMS)
    assert_same(wanted, EXACT)


ANALYSES = {
    "adjoints": jbptt.adjoints,
    "flow": jbptt.gradient_flow,
    "sources": jbptt.analysis.gradient_sources,
    "lags": partial(jbptt.lag_profile, max_lag=4),
    "curve": partial(jbptt.truncation_curve, max_window=4),
    "nonfinite": jbptt.find_nonfinite,
    "alignment": partial(jbptt.analysis.adjoint_alignment, max_lag=3),
    "diagnose": partial(jbptt.diagnose, measure=False),
}


@pytest.mark.parametrize("name", usual(["lags"], ANALYSES))
def test_an_analysis_takes_the_start_as_given(name):
    with warnings.catch_warnings(action="error"):
        found = ANALYSES[name](step, loss, PARAMS, start, BATCH)
    with warnings.catch_warnings(action="ignore"):
        wanted = ANALYSES[name](step, loss, PARAMS, start(PARAMS), BATCH)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


SYSTEMS = {
    "jacobians": jbptt.step_jacobians,
    "products": partial(jbptt.jacobian_products, spans=(1, 4)),
    "exponents": partial(jbptt.lyapunov_spectrum, num_discarded=1),
}


@pytest.mark.parametrize("name", usual(["exponents"], SYSTEMS))
def test_an_analysis_of_one_example_takes_it_too(name):
    def first(params):
        return {"h": params["h0"], "n": jnp.array(0)}

    found, wanted = (SYSTEMS[name](step, PARAMS, carry, BATCH.xs[:, 0]) for carry in (first, first(PARAMS)))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_gate_paths_takes_it_too():
    cell = cells.gru(H, H)
    params = cell.init(jax.random.key(0)) | {"h0": PARAMS["h0"]}
    found = jbptt.analysis.gate_paths(params, lambda params: params["h0"], BATCH.xs[:, 0])
    jax.tree.map(np.testing.assert_array_equal, found, jbptt.analysis.gate_paths(params, params["h0"], BATCH.xs[:, 0]))


def test_estimators_are_compared_and_measured_with_the_start():
    with warnings.catch_warnings(action="error"):
        estimators = {"full": full_bptt(step, loss)}
        found = jbptt.compare(estimators, PARAMS, start, BATCH, reference=EXACT, key=jax.random.key(0), num_samples=2)
        cost = jbptt.measure_cost(estimators, PARAMS, start, BATCH, num_repeats=1)
        plan, _ = jbptt.choose_plan(step, loss, PARAMS, start, BATCH, plans=[Plan(4)], num_repeats=1)
    assert found.relative_bias[0] < 1e-12
    assert cost.names == ("full",)
    assert plan == Plan(4)


@pytest.mark.more("test_every_estimator_counts_the_start_with_the_first_step")
def test_checks_of_estimators_count_the_start():
    assert_same(testing.brute_force_gradient(step, loss, PARAMS, start, BATCH), EXACT)
    coverage = truncation.window_coverage(T, 3, 1)
    brute = testing.brute_force_gradient(step, loss, PARAMS, start, BATCH, coverage=coverage)
    assert_same(brute, cut_at(coverage))
    sliding = truncated_bptt(step, loss, window=3, stride=1)
    testing.check_truncated_gradient(sliding, step, loss, PARAMS, start, BATCH, coverage=coverage)
