"""Windows that follow a bound: what the probes measure, which gradient results, and what the bound is worth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from oracles import brute_force
from problems import EXAMPLES, assert_close, cut, usual

from jbptt import (
    Batch,
    adaptive_bptt,
    bias_bound,
    cells,
    full_bptt,
    lag_profile,
    randomized_bptt,
    train,
    truncated_bptt,
)

MAX_WINDOW, TOLERANCE = 12, 0.2


def shrunk(name, num_steps, scale):
    """A problem whose recurrent weights are scaled."""
    problem = problems.make(name, num_steps)
    return problem._replace(params=problem.params | {"w_h": scale * problem.params["w_h"]})


@functools.cache
def compiled(step, loss, tolerance=TOLERANCE, max_window=MAX_WINDOW, **options):
    """The estimator with its update compiled once for all tests."""
    estimator = adaptive_bptt(step, loss, tolerance=tolerance, max_window=max_window, **options)
    return estimator._replace(update=jax.jit(estimator.update))


def updates_of(problem, split, **options):
    """The estimates of a stream cut into updates of these lengths."""
    step, loss, params, carry, batch = problem
    estimator = compiled(step, loss, **options)
    update, estimates, start = estimator.update, [], 0
    state = estimator.init(params, carry, cut(batch, 0, split[0]))
    for length in split:
        estimate, state = update(params, state, cut(batch, start, start + length))
        estimates.append(estimate)
        start += length
    return estimates, state, update


def test_gradient_is_that_of_the_window_in_info():
    """Over three updates with two different windows, pair by pair."""
    problem = shrunk("tanh", 36, 0.3)
    compiled.cache_clear()  # to count the programs of these three updates alone
    estimates, _, update = updates_of(problem, (12, 12, 12))
    used = [int(estimate.info["window"]) for estimate in estimates]
    assert used[0] == MAX_WINDOW and 1 < used[1] < MAX_WINDOW  # so that the bound decided
    assert [int(estimate.info["next_window"]) for estimate in estimates[:2]] == used[1:]
    assert update._cache_size() == 1
    pairs, losses, _ = brute_force.pair_gradients(*problem, (EXAMPLES,))
    t, i = np.arange(36)[:, None], np.arange(36)[None, :]
    for number, (estimate, window) in enumerate(zip(estimates, used, strict=True)):
        coverage = (t // 12 == number) & (i <= t) & (i > t - window)
        wanted = brute_force.covered(pairs, coverage.astype(float), problem.params)
        assert_close((estimate.grad_sum, estimate.loss_sum), (wanted, losses[12 * number : 12 * number + 12].sum()))


@pytest.mark.parametrize("name", usual(["tanh"], ["tanh", "lstm"]))
def test_probes_are_the_lag_profile_of_their_losses(name):
    """One loss for every max_window steps; running means of the two."""
    step, loss, params, carry, batch = problems.make(name, 2 * MAX_WINDOW)
    _, state, _ = updates_of((step, loss, params, carry, batch), (2 * MAX_WINDOW,), smoothing=0.75)
    profiles = []
    for last in (MAX_WINDOW - 1, 2 * MAX_WINDOW - 1):
        one = batch._replace(weights=jnp.zeros(2 * MAX_WINDOW).at[last].set(3.0))
        profiles.append(lag_profile(step, loss, params, carry, one, max_lag=MAX_WINDOW))
    mean = jax.tree.map(lambda a, b: (0.75 * 0.25 * a + 0.25 * b) / (0.25 + 0.75 * 0.25), *profiles)
    norms, grads, weights = state.means
    assert_close(norms / weights, mean.cotangent_norms)
    assert_close((grads / weights)[1:], mean.grad_norms[1:])  # at lag 0 the readout adds its own


@pytest.mark.more("test_gradient_is_that_of_the_window_in_info")
def test_window_is_the_first_whose_bound_keeps_the_tolerance():
    problem = shrunk("tanh", MAX_WINDOW, 0.3)
    (estimate,), state, _ = updates_of(problem, (MAX_WINDOW,))
    norms, grads, weights = state.means
    kept = np.linalg.norm(np.concatenate([np.ravel(g) for g in jax.tree.leaves(estimate.grads)]))
    bounds = bias_bound.bound_bias(
        norms / weights, grads / weights, jnp.full(MAX_WINDOW, kept), num_lags=jnp.array(MAX_WINDOW), tolerances=(1.0,)
    ).bias_bound
    assert int(state.window) == 1 + np.flatnonzero(np.asarray(bounds) <= TOLERANCE)[0]
    assert_close(estimate.info["bias_bound"], bounds[-1])  # of the window used: the longest


def bias_marks(name, scale):
    if (name, scale) == ("tanh", 0.4):
        return ()
    return pytest.mark.more if name == "lstm" or scale == 0.4 else pytest.mark.full


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        pytest.param(name, scale, marks=bias_marks(name, scale))
        for name in ("tanh", "linear", "lstm")
        for scale in (0.2, 0.4, 0.6)
    ],
)
def test_bias_stays_below_the_tolerance(name, scale):
    """On a long stream, once the means have seen something; and the window is no longer than 4 times what is needed."""
    step, loss, params, carry, batch = problem = shrunk(name, 96, scale)
    estimates, state, _ = updates_of(problem, (96,), max_window=32)
    assert int(estimates[0].info["window"]) == 32 and np.isfinite(estimates[0].info["bias_bound"])
    window = int(state.window)
    gradient = lambda estimator: jax.jit(lambda: problems.one_update(estimator, params, carry, batch).grads)()
    exact = gradient(full_bptt(step, loss))

    def error(window):
        cut_off = gradient(truncated_bptt(step, loss, window=window, stride=1))
        leaves = zip(jax.tree.leaves(cut_off), jax.tree.leaves(exact), strict=True)
        return np.sqrt(sum(np.sum((a - b) ** 2) for a, b in leaves) / sum(np.sum(b**2) for b in jax.tree.leaves(exact)))

    assert window < 32 and error(window) <= TOLERANCE
    if window >= 4:
        assert error(window // 4) > TOLERANCE / 20


def rotation(num_steps, scale=1.0):
    """A linear system that turns: nothing is forgotten at scale 1."""
    turn = scale * jnp.array([[0.6, -0.8], [0.8, 0.6]])
    rng = np.random.default_rng(2)
    xs, targets = (jnp.asarray(rng.normal(size=(num_steps, EXAMPLES, 2))) for _ in range(2))
    step = lambda params, h, x: (h @ turn + params * x, h)
    return step, problems.squared_error, jnp.array(0.5), jnp.zeros((EXAMPLES, 2)), Batch(xs, targets)


@pytest.mark.parametrize("scale", usual([1.0], [1.0, 1.1]))
def test_a_gradient_that_does_not_decay_has_no_bound_and_the_longest_window(scale):
    estimates, state, _ = updates_of(rotation(3 * MAX_WINDOW, scale), (2 * MAX_WINDOW, MAX_WINDOW))
    for estimate in estimates:
        assert np.isinf(estimate.info["bias_bound"]) and int(estimate.info["next_window"]) == MAX_WINDOW
    assert int(state.window) == MAX_WINDOW


@pytest.mark.more("test_gradient_is_that_of_the_window_in_info")
def test_weights_of_both_signs_are_no_small_gradient():
    """Their sum is next to nothing; what the bound compares is per |w|."""
    step, loss, params, carry, batch = shrunk("tanh", 3 * MAX_WINDOW, 0.5)
    weights = np.random.default_rng(5).normal(size=3 * MAX_WINDOW)
    weights += 1e-3 - weights.mean()
    signed = batch._replace(weights=jnp.asarray(weights))
    (estimate,), state, _ = updates_of((step, loss, params, carry, signed), (3 * MAX_WINDOW,))
    scaled = batch._replace(weights=jnp.asarray(1000 * weights))
    (other,), same, _ = updates_of((step, loss, params, carry, scaled), (3 * MAX_WINDOW,))
    assert int(state.window) == int(same.window) > 1
    assert_close(estimate.info["bias_bound"], other.info["bias_bound"], rtol=1e-9)


@pytest.mark.more("test_a_gradient_that_does_not_decay_has_no_bound_and_the_longest_window")
def test_one_reset_is_no_end_of_all_memory():
    """A system that forgets nothing, reset at its first step, where the first probes end in a zero."""
    step, loss, params, carry, batch = rotation(MAX_WINDOW + 1)
    reset = cells.with_reset(step, lambda batch_shape=(): jnp.zeros((*batch_shape, 2)))
    flags = jnp.zeros((MAX_WINDOW + 1, EXAMPLES), bool).at[0].set(True)
    problem = reset, loss, params, carry, batch._replace(xs=(batch.xs, flags))
    estimates, _, _ = updates_of(problem, (1, MAX_WINDOW - 2, 2))
    assert all(np.isinf(estimate.info["bias_bound"]) for estimate in estimates)
    assert all(int(estimate.info["next_window"]) == MAX_WINDOW for estimate in estimates)


def test_masked_and_broken_losses_leave_the_means_alone():
    step, loss, params, carry, batch = shrunk("tanh", 2 * MAX_WINDOW, 0.3)
    _, before, _ = updates_of((step, loss, params, carry, batch), (MAX_WINDOW,))
    late = cut(batch, MAX_WINDOW, 2 * MAX_WINDOW)._replace(mask=jnp.ones(MAX_WINDOW, bool))
    padded = late._replace(mask=jnp.arange(MAX_WINDOW) < MAX_WINDOW - 1)
    broken = late._replace(targets=late.targets.at[-1].set(jnp.nan))
    for other in (padded, broken):
        _, after = compiled(step, loss).update(params, before, other)
        problems.assert_same_bits(after.means, before.means)


@pytest.mark.more("test_masked_and_broken_losses_leave_the_means_alone")
def test_losses_that_ignore_their_target_are_no_evidence():
    """Of a step whose every loss is ignored nothing is learned; of some examples, what weights of 0 would tell."""
    step, loss, params, carry, batch = shrunk("tanh", 4 * MAX_WINDOW, 0.3)
    unless_ignored = lambda y, target: jnp.where(target[..., 0] == -100, 0.0, loss(y, target))
    ends = np.arange(MAX_WINDOW - 1, 4 * MAX_WINDOW, MAX_WINDOW)

    def means(loss, batch):
        estimates, state, _ = updates_of((step, loss, params, carry, batch), (4 * MAX_WINDOW,))
        return state.means, estimates[0].info

    ignored = batch._replace(targets=batch.targets.at[ends].set(-100.0))
    found, info = means(unless_ignored, ignored)
    assert not np.any(found.weights) and np.isinf(info["bias_bound"]) and int(info["next_window"]) == MAX_WINDOW

    some = batch._replace(targets=batch.targets.at[ends, 1:].set(-100.0))
    found, info = means(unless_ignored, some)
    weights = jnp.ones((4 * MAX_WINDOW, EXAMPLES)).at[ends, 1:].set(0.0)
    wanted, other = means(loss, batch._replace(weights=weights))
    assert_close(found, wanted)
    for name in ("window", "bias_bound", "next_window"):
        assert_close(info[name], other[name])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tolerance": 0.0}, "tolerance must be a finite number > 0"),
        ({"tolerance": 1.0}, "tolerance must lie in \\(0, 1\\)"),
        ({"tolerance": "a"}, "tolerance must be a finite number > 0"),
        ({"max_window": 0}, "max_window must be an integer >= 1"),
        ({"smoothing": 1.0}, "smoothing must lie in \\(0, 1\\)"),
        ({"smoothing": -0.1}, "smoothing must be a finite number > 0"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        adaptive_bptt(None, None, **{"tolerance": 0.1, "max_window": 4} | options)


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(adaptive_bptt, tolerance=0.1, max_window=4),
        functools.partial(truncated_bptt, window=3, stride=1),
    ],
)
def test_history_of_another_batch_is_refused(make):
    step, loss, params, carry, batch = problems.make("tanh", 4)
    estimator = make(step, loss)
    smaller = jax.tree.map(lambda a: a[:, :2], batch)
    state = estimator.init(params, carry, batch)._replace(carry=carry[:2])
    with pytest.raises(ValueError, match=r"history does not fit the batch.*initialise a new state"):
        estimator.update(params, state, smaller)


# Influence balancing in small (Tallec & Ollivier, 2017)

UNITS, POSITIVE = 23, 10
MATRIX = 0.5 * np.eye(UNITS) + 0.5 * np.eye(UNITS, k=1)
INFLUENCE = np.where(np.arange(UNITS) < POSITIVE, 1.0, -1.0)


def balancing(num_steps):
    """s' = A s + θ b, loss ½ (s¹ − 1)² of the new state; θ moves s¹ up at once and down in the long run."""
    matrix, influence = jnp.asarray(MATRIX), jnp.asarray(INFLUENCE)

    def step(theta, s, x):
        s = matrix @ s + theta * influence
        return s, s[0]

    return step, lambda y, target: 0.5 * (y - 1) ** 2, Batch(jnp.zeros((num_steps, 0)))


@functools.cache
def sums_of_influence():
    """Σ_{k<K} (A^k b)₁ for K = 1, 2, …: what a window of K steps sees of ∂s¹/∂θ."""
    terms, vector = [], INFLUENCE
    for _ in range(4000):
        terms.append(vector[0])
        vector = MATRIX @ vector
    return np.cumsum(terms)


@pytest.mark.more("test_short_windows_run_away_from_it")
def test_short_windows_have_the_wrong_sign():
    seen = sums_of_influence()
    assert np.all(seen[:40] > 0) and np.all(seen[40:] < 0)  # windows ≤ 40 and ≥ 41
    num_steps = 120
    step, loss, batch = balancing(num_steps)
    last = batch._replace(weights=jnp.zeros(num_steps).at[-1].set(1.0))
    theta, start = jnp.array(0.5), jnp.ones(UNITS)
    run = lambda estimator: problems.one_update(estimator, theta, start, last)
    exact = jax.jit(lambda: run(full_bptt(step, loss)))()
    error = np.sqrt(2 * float(exact.loss))  # |s¹ − 1|, s¹ < 1 where the sums are negative
    for window in (1, 10, 40, 41, 60):
        estimator = truncated_bptt(step, loss, window=window, stride=1)
        grad = jax.jit(lambda e=estimator: run(e))().grads
        np.testing.assert_allclose(abs(grad), abs(error * seen[window - 1]), rtol=1e-10)
        assert np.sign(grad) == (1 if window >= 41 else -1) * np.sign(exact.grads)


OPTIMUM = -1 / 6  # (1 − A)⁻¹ = 2 · (ones on and above the diagonal), so that s¹ = 2 (10 − 13) θ


@functools.cache
def descended(make, num_updates=150, num_steps=150):
    """θ after plain gradient descent from ½, every update with the loss of its last step."""
    step, loss, batch = balancing(num_steps)
    last = batch._replace(weights=jnp.zeros(num_steps).at[-1].set(1.0))
    estimator = make(step, loss)
    optimizer, start = optax.sgd(0.005), jnp.ones(UNITS)
    batches = jax.tree.map(lambda a: jnp.broadcast_to(a, (num_updates, *a.shape)), last)
    run = lambda: train(estimator, optimizer, jnp.array(0.5), start, batches, key=jax.random.key(3))
    theta, history = jax.jit(run)()
    return float(theta), history.info


UNBIASED = {
    "full": full_bptt,
    "constant": functools.partial(randomized_bptt, keep_prob=0.98),
    "artbp": functools.partial(randomized_bptt, mean_length=40.0),
}


@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased_estimators_find_the_optimum(name):
    """The noise is proportional to the distance, so that it ends where the distance does."""
    assert abs(descended(UNBIASED[name])[0] - OPTIMUM) < 1e-3


def test_short_windows_run_away_from_it():
    assert descended(functools.partial(truncated_bptt, window=10, stride=1))[0] > 0.6


@pytest.mark.more("test_bias_stays_below_the_tolerance")
def test_adaptive_windows_are_right_or_without_bound():
    theta, info = descended(functools.partial(adaptive_bptt, tolerance=0.2, max_window=75))
    assert np.all(np.isinf(info["bias_bound"]) | (info["next_window"] >= 41))
    assert np.all(info["window"] >= 41) and abs(theta - OPTIMUM) < 1e-3


@pytest.mark.more("test_a_gradient_that_does_not_decay_has_no_bound_and_the_longest_window")
def test_the_bound_knows_when_the_longest_window_is_too_short():
    """Up to lag 32 the adjoint does not shrink: nothing is promised."""
    _, info = descended(functools.partial(adaptive_bptt, tolerance=0.2, max_window=32), 20)
    assert np.all(np.isinf(info["bias_bound"])) and np.all(info["window"] == 32)
