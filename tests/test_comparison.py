"""Estimators side by side, against the same statistics by hand in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from problems import assert_close

from jbptt import Batch, Cost, compare, full_bptt, gated_bptt, randomized_bptt, truncated_bptt, truncation

NUM_STEPS, NUM_SAMPLES = 6, 40
STEP, LOSS, PARAMS, CARRY, BATCH = problems.make("tanh", NUM_STEPS)
KEY = jax.random.key(5)
ESTIMATORS = {
    "full": full_bptt(STEP, LOSS),
    "blocks": truncated_bptt(STEP, LOSS, window=2),
    "randomized": randomized_bptt(STEP, LOSS, keep_prob=0.6),
    "biased": randomized_bptt(STEP, LOSS, keep_prob=0.6, reweight=False),
}
PAIR = {name: ESTIMATORS[name] for name in ("full", "randomized")}
run = functools.partial(compare, ESTIMATORS, PARAMS, CARRY, BATCH, reference="full", num_samples=NUM_SAMPLES)


@functools.cache
def gradients(name):
    """`[samples, P]`, each from its own key."""
    sample = lambda key: problems.one_update(ESTIMATORS[name], PARAMS, CARRY, BATCH, key).grads
    keys = jnp.stack([jax.random.fold_in(KEY, i) for i in range(NUM_SAMPLES)])
    leaves = jax.tree.leaves(jax.jit(lambda: jax.lax.map(sample, keys))())
    return np.concatenate([leaf.reshape(NUM_SAMPLES, -1) for leaf in leaves], axis=1)


@functools.cache
def found():
    return jax.jit(run)(key=KEY)


def test_moments_are_those_of_the_samples():
    exact = gradients("full")[0]
    size = np.linalg.norm(exact)
    for i, name in enumerate(ESTIMATORS):
        samples = gradients(name)
        mean, lengths = samples.mean(axis=0), np.linalg.norm(samples, axis=1)
        variance = np.sum(samples.var(axis=0, ddof=1)) / size**2 if name in ("randomized", "biased") else 0.0
        wanted = {
            "relative_bias": np.linalg.norm(mean - exact) / size,
            "relative_bias_error": np.sqrt(variance / NUM_SAMPLES),
            "variance": variance,
            "cosine": np.mean(samples @ exact / (lengths * size)),
            "norm_ratio": np.mean(lengths) / size,
        }
        for field, value in wanted.items():
            np.testing.assert_allclose(getattr(found(), field)[i], value, rtol=1e-10, atol=1e-14, err_msg=name)
        others = [gradients(other).mean(axis=0) for other in ESTIMATORS]
        cosines = [mean @ other / np.linalg.norm(mean) / np.linalg.norm(other) for other in others]
        np.testing.assert_allclose(found().alignment[i], cosines, rtol=1e-12)


def share(estimator_of):
    """What `compare` says of one estimator, for a sum over 6 steps and two examples."""
    step, loss = lambda w, h, x: (w * h + x, w * h + x), lambda y, target: y
    given = 0.5, jnp.zeros(2), Batch(jnp.ones((NUM_STEPS, 2)))
    return float(compare({"": estimator_of(step, loss)}, *given, reference=1.0, key=KEY, num_samples=2).coverage[0])


def test_share_of_the_pairs_that_each_counts(monkeypatch):
    """On average: 1 for an unbiased one, 9 of 21 pairs for blocks of 2, and 0.6 to the lag for random cuts."""
    biased = sum((NUM_STEPS - lag) * 0.6**lag for lag in range(NUM_STEPS)) / 21
    np.testing.assert_allclose(found().coverage, [1, 9 / 21, 1, biased], rtol=1e-12)
    gates = np.random.default_rng(0).random((NUM_STEPS, 2))
    by_example = functools.partial(gated_bptt, gates_fn=lambda key, num_steps: gates)
    of_examples = np.mean(np.sum(truncation.coverage(gates), (0, 1))) / 21
    np.testing.assert_allclose(share(by_example), of_examples, rtol=1e-12)
    drawing = functools.partial(gated_bptt, gates_fn=lambda key, n: truncation.randomized(key, n, 0.5))
    silent = lambda *functions: full_bptt(*functions)._replace(coverage=None)
    assert np.isnan(share(drawing)) and np.isnan(share(silent))
    monkeypatch.setattr("jbptt.analysis.comparison.MOST_STEPS", NUM_STEPS - 1)  # no matrix of long batches
    assert np.isnan(share(by_example))


def test_what_draws_nothing_has_no_variance():
    np.testing.assert_array_equal(found().variance[:2], 0)
    assert found().relative_bias[1] > 0.05 and found().variance[2] > 0.05


def test_an_estimator_that_draws_nothing_runs_once():
    calls = []

    def gates_fn(key, num_steps):
        jax.debug.callback(lambda: calls.append(num_steps))
        return truncation.fixed(num_steps, 2) + (0.0 if key is None else 0.0 * jax.random.uniform(key))

    once = gated_bptt(STEP, LOSS, gates_fn=lambda key, num_steps: gates_fn(None, num_steps))
    often = gated_bptt(STEP, LOSS, gates_fn=gates_fn)
    for estimator, wanted in ((once, 1 + 1), (often, 3 + 1)):  # and once for its coverage
        calls.clear()
        one = {"this": estimator}
        exact = jax.tree.map(jnp.ones_like, PARAMS)
        jax.block_until_ready(compare(one, PARAMS, CARRY, BATCH, reference=exact, key=KEY, num_samples=3))
        jax.effects_barrier()
        assert len(calls) == wanted


@pytest.mark.more("test_moments_are_those_of_the_samples")
def test_references_of_three_kinds_agree():
    first = jax.jit(functools.partial(problems.one_update, ESTIMATORS["full"]))
    exact = first(PARAMS, CARRY, BATCH).grads
    by_name, by_itself, by_gradient = (
        jax.jit(lambda r=r: compare(PAIR, PARAMS, CARRY, BATCH, reference=r, key=KEY, num_samples=3))()
        for r in ("full", ESTIMATORS["full"], exact)
    )
    assert_close(by_itself, by_name)
    assert_close(by_gradient, by_name)


@pytest.mark.more("test_moments_are_those_of_the_samples")
def test_eager_and_vmap():
    eager = functools.partial(compare, PAIR, PARAMS, CARRY, BATCH, reference="full", num_samples=3)
    one = eager(key=KEY)
    assert_close(jax.jit(eager)(key=KEY), one, rtol=1e-10)
    keys = jnp.stack([KEY, jax.random.key(6)])
    together = jax.jit(jax.vmap(lambda key: eager(key=key)))(keys)
    assert_close(jax.tree.map(lambda a: a[0], together), one, rtol=1e-10)
    assert together.variance[0, 1] != together.variance[1, 1] and str(together).startswith("Comparison(")


@pytest.mark.more("test_an_estimator_that_draws_nothing_runs_once")
def test_no_gradient_to_compare_with():
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    found = jax.jit(lambda: compare(PAIR, PARAMS, CARRY, BATCH, reference=zero, key=KEY, num_samples=3))()
    assert (
        np.all(np.isinf(found.relative_bias)) and np.all(np.isnan(found.cosine)) and np.all(np.isinf(found.norm_ratio))
    )
    np.testing.assert_array_equal(found.variance, [0, np.inf])
    dark = BATCH._replace(weights=jnp.zeros(NUM_STEPS))
    none = jax.jit(lambda: compare(PAIR, PARAMS, CARRY, dark, reference="full", key=KEY, num_samples=2))()
    np.testing.assert_array_equal((none.relative_bias, none.variance, none.norm_ratio), 0)


@pytest.mark.more("test_an_estimator_that_draws_nothing_runs_once")
def test_sizes_near_the_end_of_the_range():
    """Gradients of 1e±200 have the moments of gradients of 1."""
    for scale in (1e200, 1e-200):
        loss = lambda y, target, scale=scale: scale * LOSS(y, target)
        estimators = {"full": full_bptt(STEP, loss), "randomized": randomized_bptt(STEP, loss, keep_prob=0.6)}
        call = functools.partial(compare, estimators, PARAMS, CARRY, BATCH, reference="full", num_samples=NUM_SAMPLES)
        scaled = jax.jit(call)(key=KEY)
        wanted = [np.asarray(getattr(found(), name))[[0, 2]] for name in ("variance", "cosine", "norm_ratio")]
        np.testing.assert_allclose((scaled.variance, scaled.cosine, scaled.norm_ratio), wanted, rtol=1e-9, atol=1e-14)


def test_table_and_dataset():
    lines = str(found()).splitlines()
    assert " ".join(lines[0].split()) == "estimator relative bias ± s.e. std / ‖g‖ cosine norm ratio"
    name, bias, _, error, std, cosine, ratio = lines[3].split()
    assert name == "randomized" and float(bias) == pytest.approx(float(found().relative_bias[2]), rel=1e-2)
    assert float(error) == pytest.approx(float(found().relative_bias_error[2]), rel=0.1)
    assert float(std) == pytest.approx(float(found().relative_std[2]), rel=1e-2)
    assert float(cosine) == pytest.approx(float(found().cosine[2]), abs=1e-4)
    assert float(ratio) == pytest.approx(float(found().norm_ratio[2]), rel=1e-3)
    assert [float(cell) for cell in lines[-3].split()[2:]] == pytest.approx(found().alignment[1].tolist(), abs=1e-3)
    pytest.importorskip("xarray")
    data = found().to_xarray()
    assert float(data.relative_bias.sel(estimator="blocks")) == float(found().relative_bias[1])
    assert float(data.alignment.sel(estimator="biased", other="blocks")) == float(found().alignment[3, 1])
    assert data.attrs["num_samples"] == NUM_SAMPLES
    assert float(data.coverage.sel(estimator="blocks")) == float(found().coverage[1])


def test_costs_as_a_dataset():
    pytest.importorskip("xarray")
    cost = Cost(("a", "b"), np.array([[1.0, 2.0, 4.0], [3.0, 5.0, 6.0]]), np.array([7, 8]), np.array([5, 6]))
    data = cost.to_xarray()
    assert data.seconds.median("repeat").values.tolist() == cost.median_seconds.tolist() == [2.0, 5.0]
    assert (int(data.temporary_bytes.sel(estimator="b")), int(data.state_bytes.sel(estimator="b"))) == (8, 6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"estimators": {}}, "estimators must not be empty"),
        ({"num_samples": 1}, "num_samples must be an integer >= 2"),
        ({"reference": "fll"}, "reference must name one of the estimators, full, blocks, randomized, biased"),
        ({"reference": "randomized"}, "reference must draw nothing"),
        ({"reference": jnp.ones(3)}, "reference must be an estimator, the name of one, or a gradient"),
    ],
)
def test_wrong_calls(options, words):
    call = {"estimators": ESTIMATORS, "reference": "full", "num_samples": 2} | options
    with pytest.raises(ValueError, match=words):
        compare(call.pop("estimators"), PARAMS, CARRY, BATCH, key=KEY, **call)
