"""Adjoints, flow, lags and truncation curves against derivatives taken pair by pair in a Python loop."""

import functools
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree
from oracles import brute_force
from oracles.brute_force import hold, per_example
from problems import EXAMPLES, assert_close, usual

from jbptt import (
    Batch,
    adjoints,
    cells,
    gradient_flow,
    lag_profile,
    truncation,
    truncation_curve,
    unroll,
)
from jbptt.analysis import flow, gradient_sources

NUM_STEPS = 6
BATCH = (EXAMPLES,)
MASK = np.array([[1, 1, 0], [1, 0, 1], [1, 1, 1], [0, 1, 1], [1, 1, 1], [1, 1, 0]], bool)
WEIGHTS = np.array([[1, 0, 2], [0.5, 1, 1], [0, 0, 0], [1.5, 2, -0.7], [1, 3, 0.1], [-0.4, 1, 1]])
GATES = np.array([0.5, 2.0, -1.5, 0.0, 0.7, 1.0])
EXAMPLE_GATES = np.stack([GATES, GATES[::-1], np.linspace(0.4, 1.2, NUM_STEPS)], axis=1)


class Case(NamedTuple):
    cell: str
    mask: np.ndarray | None = None
    weights: np.ndarray | None = None
    gates: np.ndarray | None = None
    num_steps: int = NUM_STEPS
    stage_length: int = NUM_STEPS  # of gradient_flow


CASES = {
    "rnn": Case("tanh"),
    "rnn, one step": Case("tanh+readout", num_steps=1),
    "gru, interior padding": Case("gru", mask=MASK),
    "gru with resets, weights, gates": Case("gru+reset", weights=WEIGHTS, gates=GATES, stage_length=2),
    "lstm, padding of whole steps": Case("lstm", mask=MASK[:, 1], weights=WEIGHTS[:, 0]),
    "lstm with readout, all per example": Case("lstm+readout", MASK, WEIGHTS, EXAMPLE_GATES, stage_length=4),
    "rnn with readout, T = B": Case("tanh+readout", MASK[:3], WEIGHTS[:3], EXAMPLE_GATES[1:4], num_steps=3),
}


# The last but one has a mask, weights and gates of each example, in two stages; the others have some of it.
NAMES = usual(["lstm with readout, all per example"], CASES, full=("rnn", "gru, interior padding"))


def problem_of(case):
    problem = problems.make(case.cell, case.num_steps)
    return problem._replace(batch=problem.batch._replace(mask=case.mask, weights=case.weights))


def spoil_padding(batch):
    """NaN wherever the mask is False: the oracles see clean numbers there, the package must not care."""
    if batch.mask is None:
        return batch

    def spoil(a):
        mask = batch.mask.reshape(batch.mask.shape + (1,) * (a.ndim - batch.mask.ndim))
        return jnp.where(mask, a, jnp.nan if jnp.issubdtype(a.dtype, jnp.floating) else a)

    return batch._replace(xs=jax.tree.map(spoil, batch.xs), targets=spoil(batch.targets))


def counted(case):
    """`mask` and `mask · weights`, `[T, B]`."""
    mask = per_example(case.mask, BATCH, case.num_steps, True)
    return mask, mask * per_example(case.weights, BATCH, case.num_steps, 1.0)


@functools.cache
def by_hand(name):
    """The carries, leaves `[T+1, B, H]`, and `∂ℓ_t/∂carries[s]`, leaves `[T, T+1, B, H]`, of unweighted losses."""
    case = CASES[name]
    step, loss, params, carry, batch = problem_of(case)
    mask, _ = counted(case)
    gates = per_example(case.gates, BATCH, case.num_steps, 1.0)[..., None]

    def run(nudges):
        carries, losses, after = [], [], carry
        for t in range(case.num_steps + 1):
            now = jax.tree.map(lambda c, n, t=t: c + n[t], after, nudges)
            carries.append(now)
            if t < case.num_steps:
                read = jax.tree.map(lambda c, g=gates[t]: g * c + lax.stop_gradient(c - g * c), now)
                x, target = jax.tree.map(lambda a, t=t: a[t], (batch.xs, batch.targets))
                after, y = step(params, read, x)
                after = hold(jnp.asarray(mask[t]), after, read)
                losses.append(jnp.sum(jnp.where(mask[t], loss(y, target), 0)))
        return jnp.stack(losses), jax.tree.map(lambda *a: jnp.stack(a), *carries)

    nudges = jax.tree.map(lambda c: jnp.zeros((case.num_steps + 1, *c.shape)), carry)
    derivatives, carries = jax.jit(jax.jacrev(run, has_aux=True))(nudges)
    return carries, derivatives


def pair_norms(name):
    """`‖∂ℓ_t/∂carries[s]‖` over the whole carry, `[T, T+1, B]`."""
    return np.sqrt(sum(np.sum(np.asarray(d) ** 2, axis=-1) for d in jax.tree.leaves(by_hand(name)[1])))


@functools.cache
def pairs(name):
    """Gated `w_t G[t, i]`, `[T, T, P]`: explicit Jacobians example by example, each with its own coverage."""
    case = CASES[name]
    step, loss, params, carry, batch = problem_of(case)
    gates = per_example(case.gates, BATCH, case.num_steps, 1.0)
    weights = per_example(case.weights, BATCH, case.num_steps, 1.0)
    total = 0
    for b in range(EXAMPLES):
        only = batch._replace(weights=weights * (np.arange(EXAMPLES) == b))
        of_one, _, _ = brute_force.pair_gradients(step, loss, params, carry, only, BATCH)
        total = total + np.asarray(truncation.coverage(gates[:, b]))[..., None] * of_one
    return total


@functools.cache
def analyses(name):
    """Everything the package says about a case, in one compiled program."""
    case = CASES[name]
    step, loss, params, carry, batch = problem_of(case)

    @jax.jit
    def run(params, carry, batch):
        common = (step, loss, params, carry, batch)
        return (
            adjoints(*common, gates=case.gates),
            gradient_flow(*common, gates=case.gates),
            lag_profile(*common, max_lag=case.num_steps, gates=case.gates),
            truncation_curve(*common, max_window=case.num_steps + 2, gates=case.gates),
            gradient_sources(*common, gates=case.gates),
            gradient_flow(*common, gates=case.gates, per_leaf=True),
            lag_profile(*common, max_lag=case.num_steps, gates=case.gates, per_leaf=True),
            truncation_curve(*common, max_window=case.num_steps + 2, gates=case.gates, per_leaf=True),
        )

    with mock.patch.object(flow, "stage_length", lambda num_steps: case.stage_length):
        return run(params, carry, spoil_padding(batch))


@pytest.mark.more("test_curve")
@pytest.mark.parametrize("name", NAMES)
def test_adjoints(name):
    carries, derivatives = by_hand(name)
    _, weights = counted(CASES[name])
    found = analyses(name)[0]
    assert_close(found.carries, carries)
    mean = jax.tree.map(lambda d: np.einsum("tb,tsbh->sbh", weights, d) / weights.sum(), derivatives)
    assert_close(found.cotangents, mean)
    for leaf in jax.tree.leaves(found.cotangents):
        assert not np.any(leaf[-1])  # carries[T] enters no step


@pytest.mark.parametrize("name", NAMES)
def test_flow(name):
    mask, _ = counted(CASES[name])
    squares = np.sum(pair_norms(name)[:, :-1] ** 2, axis=-1)
    assert_close(analyses(name)[1], np.tril(np.sqrt(squares / np.maximum(mask.sum(1), 1)[:, None])))
    assert not np.any(np.triu(analyses(name)[1], 1))


@pytest.mark.parametrize("name", NAMES)
def test_profile(name):
    num_steps = CASES[name].num_steps
    _, weights = counted(CASES[name])
    norms, sums = pair_norms(name), pairs(name)
    cotangent_norms, grad_norms = [], []
    for k in range(num_steps):
        steps = range(k, num_steps)
        weight = sum(weights[t].sum() for t in steps)
        cotangent_norms.append(sum(weights[t] @ norms[t, t - k] for t in steps) / weight if weight else 0.0)
        grad_norms.append(np.linalg.norm(sum(sums[t, t - k] for t in steps)) / weights.sum())
    found = analyses(name)[2]
    assert_close((found.cotangent_norms, found.grad_norms), (np.array(cotangent_norms), np.array(grad_norms)))


def block_gradients(name, windows):
    """For each window the mean over all phases of `jax.grad` through `unroll` with fixed gates."""
    case = CASES[name]
    step, loss, params, carry, batch = problem_of(case)
    own = jnp.asarray(np.ones(case.num_steps) if case.gates is None else case.gates)
    weights = counted(case)[1]

    def gradient(fixed):
        def total(params):
            gates = own * fixed.reshape(fixed.shape + (1,) * (own.ndim - 1))
            _, ys = unroll(step, params, carry, batch.xs, gates=gates, mask=case.mask)
            return jnp.sum(weights * jax.vmap(loss)(ys, batch.targets))

        return ravel_pytree(jax.grad(total)(params))[0]

    schedules = [[truncation.fixed(case.num_steps, n, phase=p) for p in range(n)] for n in windows]
    every = iter(np.asarray(jax.jit(jax.vmap(gradient))(jnp.stack([gates for n in schedules for gates in n]))))
    return [np.mean([next(every) for _ in phases], axis=0) for phases in schedules]


@pytest.mark.parametrize("name", NAMES)
def test_curve(name):
    num_steps = CASES[name].num_steps
    params = problem_of(CASES[name]).params
    found = analyses(name)[3]
    windows = list(range(1, num_steps + 3))  # beyond T too: blocks of a longer stream
    assert found.windows.tolist() == windows
    exact = pairs(name).sum((0, 1))

    def compare(gradients):
        errors = [np.linalg.norm(g - exact) / np.linalg.norm(exact) for g in gradients]
        return np.array(errors), np.array([g @ exact / np.linalg.norm(g) / np.linalg.norm(exact) for g in gradients])

    def sliding(n):
        coverage = truncation.window_coverage(num_steps, n, 1)
        return ravel_pytree(brute_force.covered(pairs(name), coverage, params))[0]

    errors, cosines = compare([sliding(n) for n in windows])
    assert_close(found.cosine, cosines)
    np.testing.assert_allclose(found.relative_error, errors, rtol=1e-12, atol=1e-14)
    errors, cosines = compare(block_gradients(name, windows))
    assert_close(found.block_cosine, cosines)
    np.testing.assert_allclose(found.block_relative_error, errors, rtol=1e-12, atol=1e-14)
    assert np.all(found.relative_error[num_steps - 1 :] < 1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_sources(name):
    """Summed over losses, split by source: Σ_t w_t G[t, i]."""
    found, weight = analyses(name)[4], counted(CASES[name])[1].sum()
    sources = pairs(name).sum(0) / weight
    exact = sources.sum(0)
    np.testing.assert_allclose(found.norms, np.linalg.norm(sources, axis=1), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(found.shares, sources @ exact / (exact @ exact), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(found.shares.sum(), 1, rtol=1e-12)
    for norms, leaf in by_leaf(name, sources, found.leaf_norms):
        np.testing.assert_allclose(norms, np.linalg.norm(leaf, axis=1), rtol=1e-12, atol=1e-14)


def by_leaf(name, rows, *trees):
    """Each tree's leaves beside the part of `rows [..., P]` that belongs to the leaf."""
    params = problem_of(CASES[name]).params
    edges = np.cumsum([np.size(leaf) for leaf in jax.tree.leaves(params)])[:-1]
    assert all(jax.tree.structure(tree) == jax.tree.structure(params) for tree in trees)
    return zip(*(jax.tree.leaves(tree) for tree in trees), np.split(rows, edges, axis=-1), strict=True)


@pytest.mark.parametrize("name", NAMES)
def test_leaf_by_leaf(name):
    """Each leaf of carry and parameters as if it were alone."""
    case, (mask, weights), sums = CASES[name], counted(CASES[name]), pairs(name)
    flow, profile, curve = analyses(name)[5:]
    derivatives = [np.asarray(d) for d in jax.tree.leaves(by_hand(name)[1])]
    assert len(flow) == len(profile.cotangent_norms) == len(derivatives)
    for matrix, norms, d in zip(flow, profile.cotangent_norms, derivatives, strict=True):
        size = np.linalg.norm(d, axis=-1)
        squares = np.sum(size[:, :-1] ** 2, axis=-1)
        assert_close(matrix, np.tril(np.sqrt(squares / np.maximum(mask.sum(1), 1)[:, None])))
        for k in range(case.num_steps):
            steps = range(k, case.num_steps)
            weight = sum(weights[t].sum() for t in steps)
            mean = sum(weights[t] @ size[t, t - k] for t in steps) / weight if weight else 0.0
            np.testing.assert_allclose(norms[k], mean, rtol=1e-12, atol=1e-15)
    lags = np.stack([sum(sums[t, t - k] for t in range(k, case.num_steps)) for k in range(case.num_steps)])
    for norms, errors, cosines, lag in by_leaf(name, lags, profile.grad_norms, curve.relative_error, curve.cosine):
        np.testing.assert_allclose(norms, np.linalg.norm(lag, axis=1) / weights.sum(), rtol=1e-12, atol=1e-15)
        kept, exact = np.cumsum(lag, axis=0), lag.sum(0)
        size = np.linalg.norm(exact)
        wanted = np.linalg.norm(kept - exact, axis=1) / size
        np.testing.assert_allclose(errors[: case.num_steps], wanted, rtol=1e-11, atol=1e-13)
        angle = kept @ exact / size / np.linalg.norm(kept, axis=1)
        np.testing.assert_allclose(cosines[: case.num_steps], angle, rtol=1e-11, atol=1e-13)


def test_lag_zero_is_the_carry_that_enters_the_step():
    """h ← w h, ℓ = h: ∂ℓ_t/∂carries[t−k] = w^{k+1}, and F[t, s] = w^{t−s+1}."""
    common = (lambda w, h, x: (w * h, w * h), lambda y, target: y, 0.5, jnp.ones(()), Batch(jnp.zeros(4)))
    profile = jax.jit(lambda: lag_profile(*common, max_lag=4))()
    np.testing.assert_array_equal(profile.cotangent_norms, [0.5, 0.25, 0.125, 0.0625])
    # D_k = Σ_t w^k h_{t−k}, h_i = w^i, over T steps.
    np.testing.assert_array_equal(profile.grad_norms, [sum(0.5**t for t in range(k, 4)) / 4 for k in range(4)])
    flow = jax.jit(lambda: gradient_flow(*common))()
    np.testing.assert_array_equal(flow, [[0.5 ** (t - s + 1) if s <= t else 0 for s in range(4)] for t in range(4)])


@pytest.mark.parametrize("weights", [[0.0, 0.0], [0.0, 1.0]])
def test_curve_where_the_exact_gradient_is_zero(weights):
    """h ← w − h, ℓ_1 = h_2 = h_0: lag 0 gives 1 and lag 1 gives −1; without weight everything is 0."""
    step = lambda w, h, x: (w - h, w - h)
    batch = Batch(jnp.zeros(2), weights=jnp.asarray(weights))
    curve = jax.jit(lambda: truncation_curve(step, lambda y, target: y, 0.3, jnp.ones(()), batch, max_window=3))()
    some = np.inf if weights[1] else 0.0
    np.testing.assert_array_equal(curve.relative_error, [some, 0, 0])
    np.testing.assert_array_equal(curve.block_relative_error, [some, some, some])
    assert np.all(np.isnan(curve.cosine)) and np.all(np.isnan(curve.block_cosine))


def test_without_weight_profile_and_adjoints_are_zero():
    step, loss, params, carry, batch = problems.make("lstm", 3)
    common = (step, loss, params, carry, batch._replace(weights=np.zeros(3)))
    found = jax.jit(lambda: (lag_profile(*common, max_lag=3), adjoints(*common).cotangents))()
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(found))


def every_analysis(step, loss, params, carry, batch, gates):
    common = (step, loss, params, carry, batch)
    return (
        adjoints(*common, gates=gates),
        gradient_flow(*common, gates=gates),
        lag_profile(*common, max_lag=2, gates=gates),
        truncation_curve(*common, max_window=2, gates=gates),
    )


@pytest.mark.more("test_diagnosis::test_vmap_is_a_loop")
def test_eager_is_jit_and_vmap_is_a_loop():
    step, loss, params, carry, batch = problems.make("tanh+readout", 3)
    batch = batch._replace(mask=MASK[:3], weights=WEIGHTS[:3])
    run = functools.partial(every_analysis, step, loss)
    compiled = jax.jit(run)
    eager = lag_profile(step, loss, params, carry, batch, max_lag=2, gates=GATES[:3])
    assert_close(eager, compiled(params, carry, batch, GATES[:3])[2])
    factors = np.array([0.5, 1.5])
    stacked = jax.tree.map(lambda p: jnp.stack([f * p for f in factors]), params)
    gates = np.stack([GATES[:3], GATES[2:5]])
    looped = [compiled(jax.tree.map(lambda p, i=i: p[i], stacked), carry, batch, gates[i]) for i in range(2)]
    together = jax.jit(jax.vmap(run, in_axes=(0, None, None, 0)))(stacked, carry, batch, gates)
    assert_close(together, jax.tree.map(lambda *a: jnp.stack(a), *looped))


@pytest.mark.parametrize("analysis", usual([gradient_flow], [gradient_flow, functools.partial(lag_profile, max_lag=3)]))
@pytest.mark.more("test_updates_differentiated::test_derivative_of_what_is_gated")
def test_derivatives_of_what_is_gated(analysis):
    """They are those of its numbers: gates scale what flows back, not how the carries depend on the parameters."""
    step, loss, params, carry, batch = problems.make("tanh+readout", NUM_STEPS)
    flat, unravel = ravel_pytree(params)
    along = jnp.asarray(np.random.default_rng(1).normal(size=flat.shape))

    @jax.jit
    def squares(distance):
        found = analysis(step, loss, unravel(flat + distance * along), carry, batch, gates=GATES)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(found) if leaf.dtype.kind == "f")

    assert GATES[1] not in (0, 1)
    numeric = (squares(1e-6) - squares(-1e-6)) / 2e-6
    for derivative in (jax.grad(squares)(0.0), jax.jvp(squares, (0.0,), (1.0,))[1]):
        np.testing.assert_allclose(derivative, numeric, rtol=1e-6)


@pytest.mark.parametrize("num_steps", usual([65], [65, 193]))
def test_flow_in_stages_is_that_in_one(num_steps):
    step = lambda w, h, x: (jnp.tanh(w * h + x),) * 2
    batch = Batch(jnp.asarray(np.random.default_rng(0).normal(size=(num_steps, 2))))
    problem = step, lambda y, t: y**2, 1.2, jnp.zeros(2), batch
    assert num_steps > flow.stage_length(num_steps)
    staged = gradient_flow(*problem)
    with mock.patch.object(flow, "stage_length", lambda num_steps: num_steps):
        assert_close(staged, gradient_flow(*problem))


def test_flow_says_which_losses_meet_an_infinite_derivative():
    """That of step 3, a root at 0: later losses meet it on their way to earlier carries, no others."""
    step = lambda w, h, x: (w * jnp.sqrt(h) + x,) * 2
    batch = Batch(jnp.asarray([0.0, 0.0, -1.0, 1.0, 1.0])[:, None])
    found = np.asarray(gradient_flow(step, lambda y, t: y**2, 1.0, jnp.ones(1), batch))
    t, s = np.arange(5)[:, None], np.arange(5)
    assert np.array_equal(np.isfinite(found), (t < 3) | (s > 3))


@pytest.mark.more("test_curve")
def test_sizes_whose_squares_overflow_and_underflow_in_float32():
    """A loss 10^±30 times as large has the same curve, and 10^±30 times the norms."""
    with jax.enable_x64(False):
        rng = np.random.default_rng(5)
        cell = cells.linear(2, 3)
        params = problems.draw(rng, jax.eval_shape(cell.init, jax.random.key(0)))
        xs, targets = (jnp.asarray(rng.normal(size=(5, 2, n)), jnp.float32) for n in (2, 3))
        loss = lambda y, target: jnp.sum(y * target, axis=-1)
        compiled = jax.jit(functools.partial(every_analysis, cell.step, loss, gates=None))
        ones, large, small = (
            compiled(params, jnp.ones((2, 3)), Batch(xs, targets * scale)) for scale in (1.0, 1e30, 1e-30)
        )
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((large[:3], large[3][1:])))
    for found, scale in ((large, 1e30), (small, 1e-30)):
        sized = jax.tree.map(lambda a: np.asarray(a, float) * scale, (ones[0].cotangents, *ones[1:3]))  # noqa: B023
        assert_close((found[0].cotangents, *found[1:3]), sized, rtol=1e-5)
        assert_close(found[3], ones[3], rtol=1e-5)


def test_integer_carries_have_no_cotangents():
    """A step counter in the carry passes through; its cotangent is zero."""
    step = lambda w, carry, x: ((w * carry[0] + x, carry[1] + 1), w * carry[0])
    carry = (jnp.ones(2), jnp.zeros((), int))
    common = (step, lambda y, target: y, 0.5, carry, Batch(jnp.ones((3, 2))))
    found, flow = jax.jit(lambda: (adjoints(*common), gradient_flow(*common)))()
    np.testing.assert_array_equal(found.carries[1], [0, 1, 2, 3])
    np.testing.assert_array_equal(found.cotangents[1], np.zeros(4))
    np.testing.assert_allclose(found.cotangents[0][:, 0] * 6, [0.875, 0.75, 0.5, 0], rtol=1e-15)
    np.testing.assert_array_equal(flow, [[0.5, 0, 0], [0.25, 0.5, 0], [0.125, 0.25, 0.5]])
    counter = (lambda w, n, x: (n + 1, w * x), lambda y, target: y, 0.5, jnp.zeros(2, int), Batch(jnp.ones((3, 2))))
    np.testing.assert_array_equal(gradient_flow(*counter), np.zeros((3, 3)))
    assert gradient_flow(*counter, per_leaf=True) == []


@pytest.mark.parametrize(
    ("analysis", "options", "words"),
    [
        (lag_profile, {"max_lag": 4}, "max_lag must be <= T = 3, got 4"),
        (lag_profile, {"max_lag": 0}, "max_lag must be an integer >= 1, got 0"),
        (truncation_curve, {"max_window": 0}, "max_window must be an integer >= 1, got 0"),
        (truncation_curve, {"max_window": 2.0}, "max_window must be an integer >= 1, got 2.0"),
        (gradient_flow, {"gates": np.ones(2)}, "disagree on T"),
        (adjoints, {"gates": np.ones((3, 2))}, "wanted .T. or .T, .batch."),
    ],
)
def test_bad_options(analysis, options, words):
    with pytest.raises(ValueError, match=words):
        analysis(*problems.make("tanh", 3), **options)


@pytest.mark.parametrize("analysis", [gradient_flow, functools.partial(lag_profile, max_lag=1)])
def test_carries_without_the_batch_shape(analysis):
    step, loss, params, carry, batch = problems.make("lstm", 3, examples=1)
    batch = jax.tree.map(lambda a: jnp.repeat(a, 2, axis=1), batch)
    step = lambda params, carry, x, inner=step: (inner(params, carry, x[:1])[0], inner(params, carry, x)[1])
    with pytest.raises(ValueError, match=r"carry\[0\] has shape \(1, 3\), wanted .* batch shape \(2,\)"):
        analysis(step, loss, params, carry, batch)
