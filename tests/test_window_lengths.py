"""The schedule of least variance: its prediction by enumeration, its optimum by brute force, its gain by measuring."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from problems import usual

from jbptt import Batch, LagProfile, full_bptt, lag_profile, plots, randomized_bptt, truncation
from jbptt.analysis import optimize_schedule, window_lengths


def profile(norms):
    return LagProfile(None, jnp.asarray(norms))


def enumerated_variance(norms, length_probs):
    """Σ_k ‖D_k‖² (E[W_k²] − 1), W from every way to cut T steps, weighted by its probability."""
    num_steps = len(norms)
    survival = 1 - np.concatenate([[0], np.cumsum(length_probs)])
    squares, total = np.zeros(num_steps), 0.0
    for cuts in itertools.product([True, False], repeat=num_steps - 1):
        gates, probability, since = [1.0], 1.0, 1
        for cut in cuts:
            stays = survival[since] / survival[since - 1]
            gates.append(0.0 if cut else 1 / stays)
            probability *= 1 - stays if cut else stays
            since = 1 if cut else since + 1
        total += probability
        for k in range(1, num_steps):
            weights = [np.prod(gates[i + 1 : i + k + 1]) for i in range(num_steps - k)]
            squares[k] += probability * np.mean(np.square(weights))
    np.testing.assert_allclose(total, 1, rtol=1e-12)
    return np.sum(np.square(norms[1:]) * (squares[1:] - 1))


@pytest.mark.parametrize("norms", [0.8 ** np.arange(8), 1 / (1.0 + np.arange(8)), np.array([9.0, 1, 0, 0, 0, 0, 0, 2])])
def test_prediction_is_the_enumerated_variance(norms):
    found = optimize_schedule(profile(norms), 3.0)
    np.testing.assert_allclose(found.predicted_variance, enumerated_variance(norms, found.length_probs), rtol=1e-9)
    constant = found.constant_keep_prob ** np.arange(8)
    np.testing.assert_allclose(found.constant_variance, enumerated_variance(norms, -np.diff(constant)), rtol=1e-9)
    closed_form = np.sum(np.square(norms) * (found.constant_keep_prob ** -np.arange(8.0) - 1))
    np.testing.assert_allclose(found.constant_variance, closed_form, rtol=1e-9)
    np.testing.assert_allclose((found.mean_length, constant.sum()), 3, rtol=1e-9)
    assert found.predicted_variance < found.constant_variance


def test_optimum_of_three_steps_is_the_best_of_a_grid():
    """P(length > 1) = p and P(length > 2) = mean − 1 − p: one number to choose."""
    norms, mean = np.array([3.0, 2.0, 1.0]), 1.9
    values = []
    for p in np.linspace(0.4501, 0.8999, 4000):
        values.append(enumerated_variance(norms, np.array([1 - p, 2 * p + 1 - mean])))
    best = np.linspace(0.4501, 0.8999, 4000)[np.argmin(values)]
    found = optimize_schedule(profile(norms), mean)
    np.testing.assert_allclose(found.predicted_variance, min(values), rtol=1e-6)
    np.testing.assert_allclose(found.keep_prob[0], best, atol=2e-4)


@pytest.mark.more("test_optimum_of_three_steps_is_the_best_of_a_grid")
def test_nothing_near_the_optimum_is_better():
    norms = 1 / (1.0 + np.arange(16))
    found = optimize_schedule(profile(norms), 5.0)
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        logits = jnp.log(jnp.expm1(-jnp.diff(jnp.log(1 - jnp.cumsum(jnp.asarray(found.length_probs))), prepend=0.0)))
        at = lambda logits: float(
            window_lengths.variance(jnp.asarray(norms) ** 2, window_lengths.log_survival(logits, 0.0, 5.0))
        )
        np.testing.assert_allclose(at(logits), found.predicted_variance, rtol=1e-9)
        for _ in range(20):
            assert at(logits + 0.05 * rng.normal(size=15)) >= found.predicted_variance * (1 - 1e-7)


@pytest.mark.more("test_prediction_is_the_enumerated_variance")
def test_measured_variance_falls():
    """A slowly decaying linear network on noise: as predicted within 15 % and 6 standard errors (false alarm 2e-9)."""
    num_steps, width, rng = 32, 40, np.random.default_rng(3)
    step, loss = lambda w, h, x: (0.95 * h + w * x, h), lambda y, target: jnp.sum(y * target)
    batch = Batch(*(jnp.asarray(rng.normal(size=(num_steps, width))) for _ in range(2)))
    rest = jnp.ones(width), jnp.zeros(width), batch
    found = optimize_schedule(jax.jit(lambda: lag_profile(step, loss, *rest, max_lag=num_steps))(), 6.0)
    exact = problems.one_update(full_bptt(step, loss), *rest).grads

    def measured(**options):
        """The mean of ‖ĝ − g‖² over 4000 draws, and its standard error."""
        estimator = randomized_bptt(step, loss, **options)
        sample = lambda key: jnp.sum((problems.one_update(estimator, *rest, key).grads - exact) ** 2)
        draw = jax.jit(lambda keys: jax.lax.map(sample, keys, batch_size=100))
        squares = np.asarray(draw(jax.random.split(jax.random.key(1), 4000)))
        return squares.mean(), squares.std() / np.sqrt(4000)

    optimal, error = measured(length_probs=found.length_probs)
    constant, constant_error = measured(keep_prob=found.constant_keep_prob)
    assert abs(optimal - found.predicted_variance) < 0.15 * found.predicted_variance + 6 * error
    assert abs(constant - found.constant_variance) < 0.15 * found.constant_variance + 6 * constant_error
    assert optimal + 6 * error < 0.6 * (constant - 6 * constant_error)
    ratio = found.predicted_variance / found.constant_variance
    assert f"{ratio:.3g} of that of constant" in str(found)


LONG = {"fast": (0.5 ** np.arange(128), 16.0), "slow": (1 / (1.0 + np.arange(512)), 1.5)}


@pytest.mark.parametrize("decay", usual(["fast"], LONG))
def test_long_sequences_get_lengths_that_can_be_used(decay):
    """No pair is ruled out, however fast the gradient decays, and nothing overflows."""
    norms, mean_length = LONG[decay]
    found = optimize_schedule(profile(norms), mean_length)
    left = 1 - found.length_probs.sum()
    assert left > 0.9e-5 and np.isfinite(found.predicted_variance) and "nan" not in str(found)
    gates = truncation.random_lengths(jax.random.key(0), len(norms), found.length_probs)
    assert np.all(np.isfinite(gates))


def test_a_gradient_of_lag_0_alone_needs_no_windows():
    found = optimize_schedule(profile([1.0, 0.0, 0.0, 0.0]), 2.0)
    assert found.predicted_variance == found.constant_variance == 0
    np.testing.assert_allclose(found.mean_length, 2)


def test_picture():
    found = optimize_schedule(profile(0.8 ** np.arange(6)), 2.0)
    ax = plots.plot_schedule(found)
    np.testing.assert_array_equal(ax.get_lines()[0].get_ydata(), found.keep_prob)
    ax.figure.draw_without_rendering()


@pytest.mark.parametrize(
    ("norms", "mean_length", "words"),
    [
        ([1.0, 0.5], 1.5, "profile must be the finite profile of one gradient over T >= 3 lags"),
        ([1.0, 0.5, np.nan], 1.5, "profile must be the finite profile"),
        (np.ones((2, 4)), 1.5, "profile must be the finite profile"),
        ([1.0, 0.5, 0.2], 1.0, "mean_length must be a finite number > 1"),
        ([1.0, 0.5, 0.2], 3.0, "mean_length must be < T = 3"),
    ],
)
def test_wrong_calls(norms, mean_length, words):
    with pytest.raises(ValueError, match=words):
        optimize_schedule(profile(norms), mean_length)


def test_profiles_by_leaf_are_refused():
    with pytest.raises(ValueError, match="by leaf"):
        optimize_schedule(LagProfile([], {"w": jnp.ones(4)}), 2.0)
