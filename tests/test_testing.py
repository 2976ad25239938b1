"""The checks for users: right ones pass, wrong ones are caught, and they agree with this suite's own oracle."""

import re
from functools import partial
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from oracles import brute_force
from problems import assert_close, one_update, usual, usual_rows

from jbptt import Batch, Estimate, Estimator, cells, full_bptt, gated_bptt, randomized_bptt, truncated_bptt, truncation
from jbptt.testing import (
    assert_coverage,
    assert_unbiased,
    brute_force_gradient,
    check_truncated_gradient,
    frozen_loss,
    measured_coverage,
    taylor_slope,
)

T = 7
WINDOWS = truncation.window_coverage(T, 3, 2)


@pytest.fixture(scope="module", params=usual(["gru+reset"], ["lstm+readout", "gru+reset"]))
def problem(request):
    return problems.make(request.param, T)


def ragged(problem):
    """The same with padding inside and at the end, and weights of both signs."""
    rng = np.random.default_rng(5)
    mask = rng.random((T, problems.EXAMPLES)) < 0.7
    return problem._replace(batch=problem.batch._replace(mask=mask, weights=rng.normal(size=mask.shape)))


def off_by(estimator, factor):
    """An estimator whose gradient is wrong in one entry of one leaf."""

    def update(params, state, batch):
        estimate, state = estimator.update(params, state, batch)
        leaves, structure = jax.tree.flatten(estimate.grad_sum)
        leaves[-1] = leaves[-1].at[(0,) * leaves[-1].ndim].multiply(factor)
        return type(estimate)(estimate.loss_sum, structure.unflatten(leaves), estimate.weight_sum, estimate.info), state

    return Estimator(estimator.init, update)


def declaring(estimator, coverage):
    return estimator._replace(coverage=lambda num_steps, key=None: coverage)


@pytest.mark.parametrize("coverage", [None, WINDOWS, "per example"], ids=["full", "windows", "per example"])
def test_brute_force_gradient_agrees_with_the_python_loops(problem, coverage):
    problem = ragged(problem)
    step, loss, params, carry, batch = problem
    pairs, _, _ = brute_force.pair_gradients(*problem, (problems.EXAMPLES,))
    total = np.sum(batch.weights * batch.mask)
    if isinstance(coverage, str):  # one example after another, each with its own matrix
        own = np.random.default_rng(1).normal(size=(T, T, problems.EXAMPLES))
        found = brute_force_gradient(*problem, coverage=own)
        wanted = jax.tree.map(jnp.zeros_like, params)
        for b in range(problems.EXAMPLES):
            alone = batch._replace(weights=batch.weights * (np.arange(problems.EXAMPLES) == b))
            part = brute_force.pair_gradients(step, loss, params, carry, alone, (problems.EXAMPLES,))[0]
            wanted = jax.tree.map(jnp.add, wanted, brute_force.covered(part, own[..., b], params))
    else:
        found = brute_force_gradient(*problem, coverage=coverage)
        wanted = brute_force.covered(pairs, np.ones((T, T)) if coverage is None else coverage, params)
    assert_close(found, jax.tree.map(lambda a: a / total, wanted))


def test_brute_force_gradient_of_nothing_is_zero_and_bad_coverage_is_refused(problem):
    empty = problem._replace(batch=problem.batch._replace(mask=np.zeros(T, bool)))
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(brute_force_gradient(*empty)))
    with pytest.raises(ValueError, match="coverage has shape"):
        brute_force_gradient(*problem, coverage=np.ones((T, T + 1)))


@pytest.mark.more("test_a_wrong_truncated_gradient_is_caught")
def test_truncated_gradients_are_those_of_the_frozen_loss(problem):
    problem = ragged(problem)
    estimator = truncated_bptt(problem.step, problem.loss, window=3, stride=2)
    check_truncated_gradient(estimator, *problem)  # of the coverage that it declares
    grads = one_update(estimator, *problem[2:]).grads
    function = jax.jit(frozen_loss(*problem, coverage=WINDOWS))
    assert_close(jax.grad(function)(problem.params), grads)
    assert abs(taylor_slope(function, problem.params, grads) - 2) < 0.05


def test_a_wrong_truncated_gradient_is_caught(problem):
    estimator = truncated_bptt(problem.step, problem.loss, window=3, stride=2)
    for wrong, coverage in (
        (off_by(estimator, 1 + 1e-4), WINDOWS),
        (estimator, truncation.window_coverage(T, 3, 3)),
        (declaring(estimator, truncation.window_coverage(T, 3, 3)), None),
        (full_bptt(problem.step, problem.loss), WINDOWS),
    ):
        with pytest.raises(AssertionError, match="not that of the truncated function"):
            check_truncated_gradient(wrong, *problem, coverage=coverage)
    full = one_update(full_bptt(problem.step, problem.loss), *problem[2:]).grads
    assert abs(taylor_slope(frozen_loss(*problem, coverage=WINDOWS), problem.params, full) - 1) < 0.1


@pytest.mark.parametrize("wrong", [np.ones((T, T)), 0.5 * np.tril(np.ones((T, T))), np.eye(T)[::-1], np.ones(T)])
def test_weights_that_are_no_cuts_cannot_be_frozen(problem, wrong):
    with pytest.raises(ValueError, match="coverage must be"):
        frozen_loss(*problem, coverage=wrong)


def test_taylor_slope_of_a_linear_function_and_in_float32():
    assert taylor_slope(lambda w: jnp.sum(3 * w), jnp.ones(4)) == np.inf
    assert abs(taylor_slope(lambda w: jnp.sum(jnp.exp(w)), jnp.ones(4)) - 2) < 0.05
    assert abs(taylor_slope(lambda w: jnp.sum(jnp.exp(w)), jnp.ones(4, jnp.float32)) - 2) < 0.2


# Complex numbers.


def spin(params, z, x):
    """Complex and real parameters, a complex carry, a real output; holomorphic in neither."""
    z = params["a"] * z + params["r"] * x + 0.1 * jnp.conj(z) * params["a"]
    return z, z.real + 2 * z.imag


def spinning():
    rng = np.random.default_rng(3)
    params = {"a": jnp.array([0.5 + 0.6j, 0.3 - 0.8j]), "r": jnp.array([1.0, -2.0])}
    batch = Batch(*(jnp.asarray(rng.normal(size=(T, 2, 2))) for _ in range(2)))
    return problems.Problem(spin, problems.squared_error, params, jnp.asarray(rng.normal(size=(2, 2)) + 0.5j), batch)


@pytest.mark.more("test_unbiased_with_complex_parameters")
def test_complex_parameters():
    """Every check agrees with `jax.grad`, and catches a gradient that is conjugated."""
    problem = spinning()
    estimator = truncated_bptt(*problem[:2], window=3, stride=2)
    grads = one_update(estimator, *problem[2:]).grads
    function = jax.jit(frozen_loss(*problem, coverage=WINDOWS))
    assert_close(grads, jax.grad(function)(problem.params))
    assert_close(brute_force_gradient(*problem, coverage=WINDOWS), grads)
    check_truncated_gradient(estimator, *problem, coverage=WINDOWS)
    assert abs(taylor_slope(function, problem.params, grads) - 2) < 0.05
    conjugate = jax.tree.map(jnp.conj, grads)
    assert abs(taylor_slope(function, problem.params, conjugate) - 1) < 0.05

    def update(params, state, batch):
        estimate, state = estimator.update(params, state, batch)
        return Estimate(estimate.loss_sum, jax.tree.map(jnp.conj, estimate.grad_sum), estimate.weight_sum, {}), state

    with pytest.raises(AssertionError, match="not that of the truncated function"):
        check_truncated_gradient(Estimator(estimator.init, update), *problem, coverage=WINDOWS)


def test_unbiased_with_complex_parameters():
    """A bias of the imaginary part alone is named as such."""
    problem = spinning()
    exact, key = brute_force_gradient(*problem), jax.random.key(2)
    estimator = randomized_bptt(*problem[:2], keep_prob=0.7)
    found = assert_unbiased(estimator, *problem[2:], exact=exact, key=key, num_samples=512)
    assert found.largest_z <= found.threshold and found.detectable < 2
    off = {**exact, "a": exact["a"].at[1].add(5j * jnp.abs(exact["a"][1]))}
    with pytest.raises(AssertionError, match=re.escape("of the imaginary part of params['a'][1] is")):
        assert_unbiased(estimator, *problem[2:], exact=off, key=key, num_samples=512)


# Parameters and losses of every size.


def rates(params, h, x):
    """τ dh/dt = −h + tanh(…), dt = 20."""
    h = h + 20.0 / params["tau"] * (jnp.tanh(h @ params["w"] + x @ params["u"] / params["unit"]) - h)
    return h, h


def of_rates(tau, unit, scale):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    params = {"w": draw(3, 3), "u": unit * draw(2, 3), "tau": jnp.asarray(tau), "unit": jnp.asarray(unit)}
    loss = lambda y, target: scale * problems.squared_error(y, target)
    return problems.Problem(rates, loss, params, draw(2, 3), Batch(draw(T, 2, 2), draw(T, 2, 3)))


@pytest.mark.more("test_a_wrong_truncated_gradient_is_caught")
@pytest.mark.parametrize(
    "tau, unit, scale",
    usual_rows(
        [(30.0, 1e6, 1e200)],
        [(1000.0, 1.0, 1.0), ([25.0, 1e3, 1e5], 1e-6, 1.0), (30.0, 1e6, 1e200), (30.0, 1.0, 1e-200)],
    ),
)
def test_parameters_and_losses_of_every_size(tau, unit, scale):
    problem = of_rates(tau, unit, scale)
    estimator = truncated_bptt(*problem[:2], window=3, stride=2)
    check_truncated_gradient(estimator, *problem, coverage=WINDOWS)
    function = jax.jit(frozen_loss(*problem, coverage=WINDOWS))
    grads = one_update(estimator, *problem[2:]).grads
    assert abs(taylor_slope(function, problem.params, grads) - 2) < 0.05
    half = off_by(estimator, 0.5)  # of the last leaf
    with pytest.raises(AssertionError, match="not that of the truncated function"):
        check_truncated_gradient(half, *problem, coverage=WINDOWS)


def test_what_is_not_finite_does_not_pass():
    problem = of_rates(30.0, 1.0, 1e308)
    estimator = truncated_bptt(*problem[:2], window=3, stride=2)
    with pytest.raises(AssertionError, match="nothing can be said of numbers that are not finite"):
        check_truncated_gradient(estimator, *problem, coverage=WINDOWS)


SCALAR = (lambda w, h, x: (jnp.tanh(w * h + x),) * 2, lambda y, target: (y - target) ** 2)
SCALAR_ARGS = (jnp.array(0.9), jnp.array(0.1), Batch(jnp.linspace(-1, 1, 6), jnp.ones(6)))


def test_unbiased_estimators_pass_and_their_biased_twins_do_not():
    """One comparison at `assert_unbiased`'s own false alarm, 1e-9; the twin is 30 and more standard errors off."""
    exact = brute_force_gradient(*SCALAR, *SCALAR_ARGS)
    key = jax.random.key(11)
    found = assert_unbiased(randomized_bptt(*SCALAR, keep_prob=0.7), *SCALAR_ARGS, exact=exact, key=key)
    assert found.largest_z <= found.threshold and found.relative_bias < found.detectable < 0.2
    with pytest.raises(AssertionError, match=re.escape("params[]")):
        assert_unbiased(randomized_bptt(*SCALAR, keep_prob=0.7, reweight=False), *SCALAR_ARGS, exact=exact, key=key)


def test_an_estimator_that_draws_nothing_must_be_exact():
    exact = brute_force_gradient(*SCALAR, *SCALAR_ARGS)
    options = {"exact": exact, "key": jax.random.key(0), "num_samples": 4}
    assert assert_unbiased(full_bptt(*SCALAR), *SCALAR_ARGS, **options).relative_bias < 1e-14
    with pytest.raises(AssertionError, match="standard errors"):
        assert_unbiased(off_by(full_bptt(*SCALAR), 1 + 1e-9), *SCALAR_ARGS, **options)


def test_deviations_are_standard_normal_where_nothing_is_biased():
    """The largest of 4000 |z| lies in (2.6, 7): chance leaves it above once in 1e8 runs, below once in 1e16.

    A bias of 20 standard errors in one of them is seen (threshold 7.3): chance hides it once in 1e30 runs.
    """
    exact, num_samples = jnp.zeros(4000), 1024

    def drawing(bias):
        def update(params, state, batch):
            grads = jax.random.normal(state, exact.shape).at[7].add(bias)
            return Estimate(jnp.zeros(()), grads, jnp.ones(()), {}), state

        return Estimator(lambda params, carry, batch, key: key, update)

    run = partial(assert_unbiased, params=exact, carry=None, batch=None, exact=exact, num_samples=num_samples)
    found = run(drawing(0.0), key=jax.random.key(3))
    assert 2.6 < found.largest_z < 7
    assert_close(found.threshold, -NormalDist().inv_cdf(1e-9 / (2 * 4000)), rtol=1e-9)
    with pytest.raises(AssertionError, match=re.escape("params[7]")):
        run(drawing(20 / num_samples**0.5), key=jax.random.key(3))


@pytest.mark.parametrize("split", usual([None, [3, 3, 1]], [None, [T], [1, 2, 4], [3, 3, 1]]))
def test_coverage_as_declared(split):
    assert_coverage(partial(truncated_bptt, window=3, stride=2), WINDOWS, split=split)
    assert_coverage(partial(truncated_bptt, window=5), num_steps=T, split=split)


def test_coverage_of_gates_per_example_and_of_a_draw():
    gates = np.random.default_rng(0).choice([0.0, 1.0, 2.5], size=(T, 2))
    make = lambda step, loss: gated_bptt(step, loss, gates_fn=lambda key, num_steps: gates)
    assert_coverage(make, truncation.coverage(gates))
    key = jax.random.key(4)
    drawn = truncation.randomized(jax.random.split(key)[1], T, 0.5)
    assert_coverage(partial(randomized_bptt, keep_prob=0.5), truncation.coverage(drawn), key=key)
    assert_coverage(make, num_steps=T)
    assert_coverage(partial(randomized_bptt, keep_prob=np.full((T, 2), 0.5)), num_steps=T, key=key)


def test_wrong_coverage_names_the_pair():
    with pytest.raises(AssertionError, match="loss at step t=2 reaches source i=0 with weight 1, declared is 0"):
        assert_coverage(full_bptt, truncation.window_coverage(4, 2, 1), atol=1e-9)
    with pytest.raises(AssertionError, match="loss at step t=1 reaches source i=0 with weight 1, declared is 0"):
        assert_coverage(lambda *args: declaring(full_bptt(*args), np.eye(4)), num_steps=4)
    with pytest.raises(AssertionError):  # what reaches forward in time is found too
        leak = lambda step, loss: truncated_bptt(lambda p, h, x: step(p, h + p[-1], x), loss, window=2)
        assert_coverage(leak, truncation.window_coverage(4, 2, 2))
    with pytest.raises(ValueError, match="split must add up"):
        measured_coverage(full_bptt, 4, split=[1, 2])
    for given in ({}, {"coverage": np.eye(4), "num_steps": 4}):
        with pytest.raises(ValueError, match="needs one of coverage and num_steps"):
            assert_coverage(full_bptt, **given)


def test_what_declares_nothing_is_not_checked_against_it(problem):
    silent = lambda *functions: full_bptt(*functions)._replace(coverage=None)
    with pytest.raises(ValueError, match="coverage must be given, got None"):
        assert_coverage(silent, num_steps=T)
    with pytest.raises(ValueError, match="coverage must be given, got None"):
        check_truncated_gradient(silent(problem.step, problem.loss), *problem)
    assert_coverage(silent, np.tri(T))


@pytest.mark.more("test_coverage_as_declared")
def test_a_problem_with_integer_and_key_carry_leaves():
    cell = cells.rnn(2, 3)

    def step(params, carry, x):
        h, count, key = carry
        key, drop = jax.random.split(key)
        h, y = cell.step(params, h * jax.random.bernoulli(drop, 0.8, h.shape) * 1.25, x)
        return (h, count + 1, key), y * count

    carry = (cell.initial_carry((2,)), jnp.array(1), jax.random.key(5))
    params = cell.init(jax.random.key(0))
    batch = Batch(jax.random.normal(jax.random.key(1), (5, 2, 2)), jnp.ones((5, 2, 3)))
    args = (step, problems.squared_error, params, carry, batch)
    coverage = truncation.window_coverage(5, 2, 2)
    estimator = truncated_bptt(*args[:2], window=2)
    assert_close(brute_force_gradient(*args, coverage=coverage), one_update(estimator, *args[2:]).grads)
    check_truncated_gradient(estimator, *args, coverage=coverage)
