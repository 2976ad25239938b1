"""Training as one scan against a Python loop over updates; evaluation against a loop over steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from oracles import python_loop
from oracles.brute_force import per_example
from problems import EXAMPLES, assert_close, cut, usual

from jbptt import Batch, cells, full_bptt, randomized_bptt, tasks, train, truncated_bptt
from jbptt.clipping import clip_by_global_norm
from jbptt.experiments.training import mean_loss

NUM_BATCHES, NUM_STEPS = 4, 5
OPTIMIZER = optax.chain(clip_by_global_norm(0.5), optax.adam(0.05))
ESTIMATORS = {
    "full": full_bptt,
    "blocks": functools.partial(truncated_bptt, window=NUM_STEPS),
    "sliding, windows over batches": functools.partial(truncated_bptt, window=7, stride=3),
    "randomized": functools.partial(randomized_bptt, keep_prob=0.6),
}


def stacked_problem(cell="tanh+readout", *, weighted=True):
    """A stream cut into batches `[N, T, ...]`, with padding and weights per example."""
    step, loss, params, carry, stream = problems.make(cell, NUM_BATCHES * NUM_STEPS)
    rng = np.random.default_rng(11)
    if weighted:
        shape = (NUM_BATCHES * NUM_STEPS, EXAMPLES)
        stream = stream._replace(mask=rng.random(shape) < 0.8, weights=rng.random(shape))
    batches = jax.tree.map(lambda a: jnp.reshape(a, (NUM_BATCHES, NUM_STEPS, *a.shape[1:])), stream)
    return step, loss, params, carry, batches, stream


def as_numbers(tree):
    return jax.tree.map(lambda a: np.asarray(a, float), tree)


@pytest.mark.parametrize("name", usual(["randomized"], ESTIMATORS))
def test_train_is_a_loop_over_updates(name):
    step, loss, params, carry, batches, _ = stacked_problem()
    estimator, key = ESTIMATORS[name](step, loss), jax.random.key(3)
    found, history = jax.jit(functools.partial(train, estimator, OPTIMIZER))(params, carry, batches, key=key)

    @jax.jit
    def one(params, state, opt_state, batch):
        estimate, state = estimator.update(params, state, batch)
        updates, opt_state = OPTIMIZER.update(estimate.grads, opt_state, params)
        size = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(estimate.grads)))
        return optax.apply_updates(params, updates), state, opt_state, (estimate.loss, size, estimate.info)

    state = estimator.init(params, carry, jax.tree.map(lambda a: a[0], batches), key)
    opt_state, rows = OPTIMIZER.init(params), []
    for n in range(NUM_BATCHES):
        params, state, opt_state, row = one(params, state, opt_state, jax.tree.map(lambda a, n=n: a[n], batches))
        rows.append(row)
    loss_history, norms, info = jax.tree.map(lambda *a: jnp.stack(a), *rows)
    assert_close(found, params)
    assert_close((history.loss, history.grad_norm, history.info), (loss_history, norms, info))
    assert_close(history.state.carry, state.carry)
    assert_close(as_numbers(history.opt_state), as_numbers(opt_state))
    assert len(set(np.asarray(history.loss).tolist())) == NUM_BATCHES


def test_plain_descent_by_hand():
    """Two updates of full BPTT with SGD: parameters, losses and norms from the loop over steps."""
    step, loss, params, carry, batches, _ = stacked_problem("tanh", weighted=False)
    descend = jax.jit(functools.partial(train, full_bptt(step, loss), optax.sgd(0.1)))
    found, history = descend(params, carry, cut(batches, 0, 2))
    for n in range(2):
        batch = jax.tree.map(lambda a, n=n: a[n], batches)
        xs, targets = np.asarray(batch.xs), np.asarray(batch.targets)
        value, grad = python_loop.tanh_rnn(params, carry, xs, targets, np.ones(NUM_STEPS))
        count = NUM_STEPS * EXAMPLES
        np.testing.assert_allclose(history.loss[n], value / count, rtol=1e-12)
        size = np.sqrt(sum(np.sum(g**2) for g in grad.values()))
        np.testing.assert_allclose(history.grad_norm[n], size / count, rtol=1e-12)
        for x in xs:  # the carry goes on with the parameters that the batch was read with
            carry = jnp.tanh(x @ params["w_x"] + carry @ params["w_h"] + params["b"])
        params = {name: params[name] - 0.1 * grad[name] / count for name in params}
    assert_close(found, params)
    assert_close(history.state.carry, carry)


@pytest.mark.parametrize("name", usual(["randomized"], ["sliding, windows over batches", "randomized"]))
def test_training_goes_on_where_it_stopped(name):
    step, loss, params, carry, batches, _ = stacked_problem("tanh")
    run = jax.jit(functools.partial(train, ESTIMATORS[name](step, loss), OPTIMIZER))
    whole, history = run(params, carry, batches, key=jax.random.key(4))
    half, one = run(params, carry, cut(batches, 0, 2), key=jax.random.key(4))
    nowhere = jax.tree.map(lambda c: jnp.full_like(c, jnp.nan), carry)  # not read where a state is given
    resumed, two = run(half, nowhere, cut(batches, 2, 4), state=one.state, opt_state=one.opt_state)
    assert_close(resumed, whole)
    assert_close(jnp.concatenate([one.loss, two.loss]), history.loss)
    assert_close(as_numbers(two.opt_state), as_numbers(history.opt_state))
    assert_close(two.state.carry, history.state.carry)


def test_vmap_over_seeds_is_a_loop():
    cell = cells.with_linear_readout(cells.rnn(problems.INPUT, problems.HIDDEN), problems.OUTPUT)
    _, loss, _, _, batches, _ = stacked_problem()
    estimator = ESTIMATORS["randomized"](cell.step, loss)

    def run(key):
        init_key, key = jax.random.split(key)
        return train(estimator, OPTIMIZER, cell.init(init_key), cell.initial_carry((EXAMPLES,)), batches, key=key)

    keys = jax.random.split(jax.random.key(5), 3)
    params, history = jax.jit(jax.vmap(run))(keys)
    compiled = jax.jit(run)
    for i, key in enumerate(keys):
        one, alone = compiled(key)
        assert_close(jax.tree.map(lambda p, i=i: p[i], params), one)
        assert_close((history.loss[i], history.grad_norm[i]), (alone.loss, alone.grad_norm))
    assert len(set(np.asarray(history.loss[:, 0]).tolist())) == 3
    pytest.importorskip("xarray")
    data = history.to_xarray()
    assert data.loss.dims == ("axis_0", "update")
    np.testing.assert_array_equal(data.grad_norm.isel(axis_0=1).sel(update=2), history.grad_norm[1, 2])
    for path, leaf in jax.tree.leaves_with_path(history.info):
        named = data[f"info{jax.tree_util.keystr(path)}"]
        assert named.dims[:2] == ("axis_0", "update") and named.shape == leaf.shape


def test_optimizer_state_keeps_its_dtypes_in_float32():
    """Narrow parameters beside x64: the scan over updates needs states of constant dtype."""
    cell = cells.rnn(2, 3, dtype=jnp.float32)
    batches = Batch(jnp.ones((3, 4, 2, 2), jnp.float32), jnp.zeros((3, 4, 2, 3), jnp.float32))
    run = jax.jit(functools.partial(train, full_bptt(cell.step, tasks.squared_error), OPTIMIZER))
    params, history = run(cell.init(jax.random.key(0)), cell.initial_carry((2,)), batches)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
    assert np.all(np.isfinite(history.loss))


@pytest.mark.parametrize("cell", usual(["tanh+readout"], ["tanh+readout", "lstm"]))
def test_evaluate_is_a_loop_over_steps(cell):
    step, loss, params, carry, batches, stream = stacked_problem(cell)
    weights = per_example(stream.weights, (EXAMPLES,), NUM_BATCHES * NUM_STEPS, 1.0) * np.asarray(stream.mask)
    total, last = 0.0, carry
    for t in range(NUM_BATCHES * NUM_STEPS):
        x, target, mask = (np.asarray(a)[t] for a in (stream.xs, stream.targets, stream.mask))
        last, value = python_loop.forward_step(step, loss, params, last, x, target, mask, weights[t])
        total += value
    spoiled = batches._replace(
        xs=jnp.where(batches.mask[..., None], batches.xs, jnp.nan),
        targets=jnp.where(batches.mask[..., None], batches.targets, jnp.inf),
    )
    run = jax.jit(functools.partial(mean_loss, step, loss))
    np.testing.assert_allclose(run(params, carry, batches), total / weights.sum(), rtol=1e-12)
    np.testing.assert_allclose(run(params, carry, spoiled), total / weights.sum(), rtol=1e-12)
    assert float(run(params, carry, batches._replace(weights=jnp.zeros_like(batches.weights)))) == 0.0
    merged = jax.tree.map(lambda a: a[None], stream)
    np.testing.assert_allclose(run(params, carry, merged), total / weights.sum(), rtol=1e-12)


def test_learning_reduces_the_held_out_loss():
    """A text that repeats is learnt: from guessing to almost certain."""
    data = tasks.text("abcd" * 400, num_steps=8, batch_size=4)
    size = len(data.vocabulary)
    cell = tasks.on_tokens(cells.with_linear_readout(cells.rnn(size, 4), size), size)
    params, carry = cell.init(jax.random.key(6)), cell.initial_carry((4,))
    estimator = truncated_bptt(cell.step, tasks.cross_entropy, window=4)
    held = jax.jit(functools.partial(mean_loss, cell.step, tasks.cross_entropy))
    trained, history = jax.jit(functools.partial(train, estimator, optax.adam(0.05)))(params, carry, data.train)
    assert held(params, carry, data.heldout) > np.log(size) / 2
    assert held(trained, carry, data.heldout) < 0.2
    assert history.loss[-1] < history.loss[0] / 3


def test_a_randomized_estimator_needs_a_key():
    step, loss, params, carry, batches, _ = stacked_problem("tanh")
    with pytest.raises(ValueError, match="needs a key"):
        train(ESTIMATORS["randomized"](step, loss), OPTIMIZER, params, carry, batches)
