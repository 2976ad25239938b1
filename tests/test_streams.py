"""Streams: however a sequence is cut into updates, the total is that of the whole."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from oracles import brute_force
from problems import EXAMPLES, assert_close, cut, usual, usual_rows

from jbptt import Batch, Plan, cells, full_bptt, gated_bptt, truncated_bptt, truncation
from jbptt.testing import measured_coverage

NUM_STEPS = 11
SPLITS = [(1,) * 11, (4, 4, 3), (2, 1, 4, 4)]


def masked_problem(cell):
    """Masks and weights per example, padding inside and at the end, clean numbers under it."""
    problem = problems.make(cell, NUM_STEPS)
    rng = np.random.default_rng(7)
    mask = rng.random((NUM_STEPS, EXAMPLES)) < 0.8
    mask[5:7, 1] = mask[9:, 2] = False
    weights = rng.random((NUM_STEPS, EXAMPLES))
    return problem._replace(batch=problem.batch._replace(mask=jnp.asarray(mask), weights=jnp.asarray(weights)))


def stream(update, init, params, carry, batch, split):
    """The sum of the estimates, and the last carry."""
    edges = np.cumsum((0, *split))
    pieces = [cut(batch, start, stop) for start, stop in itertools.pairwise(edges)]
    state, total = init(params, carry, pieces[0]), None
    for piece in pieces:
        estimate, state = update(params, state, piece)
        total = estimate if total is None else total + estimate
    return total, state.carry


WINDOWS = [(4, 4), (4, 1), (5, 3), (1, 1), (20, 20)]


@pytest.mark.parametrize(("window", "stride"), usual_rows([(5, 3)], WINDOWS))
def test_splits_do_not_matter(window, stride):
    step, loss, params, carry, batch = masked_problem("gru+reset" if window == 5 else "tanh+readout")
    pairs, losses, last = brute_force.pair_gradients(step, loss, params, carry, batch, (EXAMPLES,))
    grad = brute_force.covered(pairs, truncation.window_coverage(NUM_STEPS, window, stride), params)
    init, update, _ = truncated_bptt(step, loss, window=window, stride=stride)
    update = jax.jit(update)
    for split in SPLITS:
        total, live = stream(update, init, params, carry, batch, split)
        assert_close(total.grad_sum, grad)
        assert_close(total.loss_sum, losses.sum())
        assert_close(total.weight_sum, np.sum(np.where(batch.mask, batch.weights, 0)))
        assert_close(live, last)


@pytest.mark.more("test_splits_do_not_matter")
def test_every_cut_in_two_gives_the_whole():
    """T = 11 in blocks of 4, ragged wherever the cut falls."""
    step, loss, params, carry, batch = masked_problem("tanh")
    init, update, _ = truncated_bptt(step, loss, window=4)
    update = jax.jit(update)
    whole, last = stream(update, init, params, carry, batch, (NUM_STEPS,))
    for first in range(1, NUM_STEPS):
        total, live = stream(update, init, params, carry, batch, (first, NUM_STEPS - first))
        assert_close((total.grad_sum, total.loss_sum, live), (whole.grad_sum, whole.loss_sum, last))


APART = [(3, None), (4, None), (4, 2), (3, 1), (9, None)]


@pytest.mark.more("test_splits_do_not_matter")
@pytest.mark.parametrize(("window", "stride"), usual_rows([(4, 2)], APART))
def test_updates_that_are_streams_of_their_own(window, stride):
    """No window reaches behind its update, whose first begins with it; the state is the carry alone."""
    make = functools.partial(truncated_bptt, window=window, stride=stride, streams=False)
    found = measured_coverage(make, NUM_STEPS, split=[7, 4])
    wanted = np.zeros((11, 11))
    for part in (slice(0, 7), slice(7, 11)):
        wanted[part, part] = truncation.window_coverage(part.stop - part.start, window, stride or window)
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    step, loss, params, carry, batch = problems.make("tanh", 7)
    estimator = make(step, loss)
    state = estimator.init(params, carry, batch)
    after = estimator.update(params, state, batch)[1]
    assert state.history is state.phase is after.history is after.phase is None


def test_a_readout_that_draws_does_not_go_side_by_side():
    """`rbg` draws other bits under vmap: by default blocks then go one after another."""

    def core(w, h, x):
        h = jnp.tanh(w * h + x[1])
        return h, (x[0], h)

    step = cells.with_readout(core, lambda w, output: output[1] + jax.random.normal(output[0]))
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 32)
    batch = Batch((keys, jnp.linspace(0, 1, 32)))
    found = [
        problems.one_update(
            truncated_bptt(step, lambda y, target: y**2, window=2, plan=Plan(parallel_windows=number)), 0.5, 0.3, batch
        ).grads
        for number in (None, 1)
    ]
    assert_close(*found)


def test_whether_updates_stream_is_said_by_a_bool():
    with pytest.raises(ValueError, match="streams must be True or False, got None"):
        truncated_bptt(None, None, window=2, streams=None)


def test_reach_grows_with_the_stream_up_to_the_window():
    step, loss, params, carry, batch = masked_problem("tanh+readout")
    init, update, _ = truncated_bptt(step, loss, window=7, stride=2)
    update = jax.jit(update)
    state, reached = init(params, carry, cut(batch, 0, 3)), []
    for start in (0, 3, 6):
        estimate, state = update(params, state, cut(batch, start, start + 3))
        reached.append(int(estimate.info["reach"]))
    assert reached == [3, 6, 7]
    # In blocks a loss sees no step before its own block, however much history there is.
    init, update, _ = truncated_bptt(step, loss, window=4)
    update = jax.jit(update)
    state, reached = init(params, carry, cut(batch, 0, 3)), []
    for start, stop in ((0, 3), (3, 4), (4, 5)):
        estimate, state = update(params, state, cut(batch, start, stop))
        reached.append(int(estimate.info["reach"]))
    assert reached == [3, 4, 1]


CUT = [full_bptt, functools.partial(gated_bptt, gates_fn=lambda key, t: jnp.ones(t))]


@pytest.mark.parametrize("make", usual(CUT[:1], CUT))
def test_full_and_gated_estimators_cut_at_the_edge_of_an_update(make):
    step, loss, params, carry, batch = masked_problem("lstm")
    pairs, losses, last = brute_force.pair_gradients(step, loss, params, carry, batch, (EXAMPLES,))
    update_of = np.repeat(np.arange(3), (4, 4, 3))
    init, update, _ = make(step, loss)
    total, live = stream(jax.jit(update), init, params, carry, batch, (4, 4, 3))
    assert_close(total.grad_sum, brute_force.covered(pairs, update_of[:, None] == update_of, params))
    assert_close(total.loss_sum, losses.sum())
    assert_close(live, last)


@pytest.mark.parametrize(("window", "stride"), usual_rows([(4, 2)], [(3, 1), (4, 2), (4, 4)]))
@pytest.mark.parametrize("split", usual([(4, 1, 3)], [(1, 2, 1, 2, 2), (4, 1, 3)]))
def test_parameters_that_change_between_updates(window, stride, split):
    """h ← w h + x, ℓ = (h − y)²: live losses, earlier steps linearised at today's w on their cached carries.

    Loss t in an update with parameter w sees source i as 2 (h_{t+1} − y_t) w^{t−i} h_i, every h as visited.
    """
    rng = np.random.default_rng(8)
    xs, ys = rng.normal(size=(2, sum(split)))
    ws = rng.normal(size=len(split))
    coverage = np.asarray(truncation.window_coverage(sum(split), window, stride))
    estimator = truncated_bptt(lambda w, h, x: (w * h + x,) * 2, lambda y, target: (y - target) ** 2,
                               window=window, stride=stride)  # fmt: skip
    update = jax.jit(estimator.update)
    edges = np.cumsum((0, *split))
    h, hs = 0.5, []
    state = estimator.init(0.0, jnp.asarray(h), cut(Batch(xs, ys), 0, split[0]))
    for w, start, stop in zip(ws, edges[:-1], edges[1:], strict=True):
        loss_sum = grad = 0.0
        for t in range(start, stop):
            hs.append(h)
            h = w * h + xs[t]
            loss_sum += (h - ys[t]) ** 2
            grad += sum(coverage[t, i] * 2 * (h - ys[t]) * w ** (t - i) * hs[i] for i in range(t + 1))
        estimate, state = update(jnp.asarray(w), state, cut(Batch(xs, ys), start, stop))
        assert_close((estimate.loss_sum, estimate.grad_sum, state.carry), (loss_sum, grad, h))


def test_stacked_parameters_change_in_a_nonlinear_network():
    """The same rule for a network with a readout: one VJP per step at today's parameters on cached carries."""
    step, loss, params, carry, batch = problems.make("tanh+readout", 7)
    later = jax.tree.map(lambda p: p * 0.7 + 0.1, params)
    estimator = truncated_bptt(step, loss, window=5, stride=2)
    update = jax.jit(estimator.update)
    _, state = update(params, estimator.init(params, carry, cut(batch, 0, 4)), cut(batch, 0, 4))
    estimate, _ = update(later, state, cut(batch, 4, 7))

    carries = [carry]
    for t in range(7):
        now = params if t < 4 else later
        x, target = batch.xs[t], batch.targets[t]
        carries.append(brute_force.linearise(step, loss, now, carries[t], x, target, np.ones(3, bool), np.ones(3))[0])
    lines = [
        brute_force.linearise(step, loss, later, carries[t], batch.xs[t], batch.targets[t], np.ones(3, bool),
                              np.ones(3))[2]
        for t in range(7)
    ]  # fmt: skip
    coverage = truncation.window_coverage(7, 5, 2)
    total = 0
    for t in range(4, 7):
        total = total + lines[t][1][0]
        row = lines[t][1][1]
        for i in range(t - 1, -1, -1):
            total = total + coverage[t, i] * (row @ lines[i][0][0])
            row = row @ lines[i][0][1]
    assert_close(estimate.grad_sum, jax.flatten_util.ravel_pytree(later)[1](total))


SHAPES = [((), 34), ((1,), 34), ((1,), 30), ((2,), 34)]


@pytest.mark.parametrize(("batch_shape", "num_steps"), usual_rows(SHAPES[1:2], SHAPES))
def test_windows_of_a_single_example_go_back_side_by_side(batch_shape, num_steps):
    """Sixteen or more of them; fewer, and those of more examples, in turn. The gradient is the same."""
    step = lambda w, h, x: (jnp.tanh(w * h + x),) * 2
    batch = Batch(*jnp.asarray(np.random.default_rng(0).normal(size=(2, num_steps, *batch_shape))))
    found, programs = {}, {}
    for parallel in (None, 1, 17):
        estimator = truncated_bptt(step, lambda y, t: (y - t) ** 2, window=2, plan=Plan(parallel_windows=parallel))
        state = estimator.init(0.9, jnp.zeros(batch_shape), batch)
        found[parallel] = jax.jit(estimator.update)(0.9, state, batch)
        programs[parallel] = str(jax.make_jaxpr(estimator.update)(0.9, state, batch))
    assert programs[None] == programs[17 if batch_shape != (2,) else 1]
    assert (programs[1] == programs[17]) == (num_steps < 34)
    assert_close([found[1], found[17]], [found[None]] * 2)
