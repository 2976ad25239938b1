"""Estimators as pure functions: scanned, vmapped, jitted; what they evaluate and how often they compile."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from problems import EXAMPLES, assert_close, cut

from jbptt import Batch, full_bptt, gated_bptt, randomized_bptt, truncated_bptt, truncation

NUM_STEPS, NUM_BATCHES = 6, 4
ESTIMATORS = {
    "full": functools.partial(full_bptt, segment=4),
    "blocks": functools.partial(truncated_bptt, window=3),
    "sliding": functools.partial(truncated_bptt, window=3, stride=1),
    "ragged strides": functools.partial(truncated_bptt, window=5, stride=4),
    "gated": functools.partial(gated_bptt, gates_fn=lambda key, n: truncation.fixed(n, 2, phase=1)),
    "randomized": functools.partial(randomized_bptt, keep_prob=0.5),
    "artbp": functools.partial(randomized_bptt, mean_length=3.0),
}


def stream(cell="tanh+readout"):
    """A problem and its batches, stacked `[NUM_BATCHES, NUM_STEPS, ...]`."""
    problem = problems.make(cell, NUM_STEPS * NUM_BATCHES)
    stacked = jax.tree.map(lambda a: a.reshape(NUM_BATCHES, NUM_STEPS, *a.shape[1:]), problem.batch)
    return problem, stacked


@pytest.mark.parametrize("name", ESTIMATORS)
def test_training_scans(name):
    """A whole run as one scan, carried state included, equals a Python loop; jit equals eager."""
    (step, loss, params, carry, _), batches = stream()
    estimator, optimizer = ESTIMATORS[name](step, loss), optax.sgd(0.05)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), batches)

    def train_step(training, batch):
        params, opt_state, state = training
        estimate, state = estimator.update(params, state, batch)
        updates, opt_state = optimizer.update(estimate.grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, state), estimate.loss

    start = params, optimizer.init(params), estimator.init(params, carry, shapes, jax.random.key(0))
    scanned, losses = jax.jit(lambda start: jax.lax.scan(train_step, start, batches))(start)
    looped, loss_list, once = start, [], jax.jit(train_step)
    for i in range(NUM_BATCHES):
        looped, value = once(looped, jax.tree.map(lambda a, i=i: a[i], batches))
        loss_list.append(value)
    assert_close((scanned[0], scanned[2].carry, losses), (looped[0], looped[2].carry, jnp.stack(loss_list)))
    assert len(set(np.asarray(losses).tolist())) == NUM_BATCHES


@pytest.mark.parametrize("name", ["full", "sliding", "randomized"])
def test_jit_equals_eager(name):
    (step, loss, params, carry, _), batches = stream("tanh")
    batch = cut(jax.tree.map(lambda a: a[0], batches), 0, 3)
    run = functools.partial(problems.one_update, ESTIMATORS[name](step, loss), key=jax.random.key(0))
    assert_close(jax.jit(run)(params, carry, batch), run(params, carry, batch))


@pytest.mark.parametrize("name", ["blocks", "sliding", "randomized"])
def test_vmap_over_seeds_equals_a_loop(name):
    """Runs with their own parameters and keys, side by side; two updates each."""
    (step, loss, params, carry, _), batches = stream()
    estimator, (first, second) = (
        ESTIMATORS[name](step, loss),
        [jax.tree.map(lambda a, i=i: a[i], batches) for i in (0, 1)],
    )

    def run(scale, key):
        own = jax.tree.map(lambda p: p * scale, params)
        one, state = estimator.update(own, estimator.init(own, carry, first, key), first)
        two, state = estimator.update(own, state, second)
        return one + two, (one + two).loss, state.carry

    scales, keys = jnp.linspace(0.5, 1.5, 3), jax.random.split(jax.random.key(1), 3)
    together, run = jax.jit(jax.vmap(run))(scales, keys), jax.jit(run)
    for i in range(3):
        assert_close(jax.tree.map(lambda a, i=i: a[i], together), run(scales[i], keys[i]))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_init_reads_only_shapes(name):
    step, loss, params, carry, batch = problems.make("gru+reset", NUM_STEPS)
    batch = batch._replace(mask=jnp.ones((NUM_STEPS, EXAMPLES), bool), weights=jnp.ones(NUM_STEPS))
    estimator, key = ESTIMATORS[name](step, loss), jax.random.key(0)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), batch)
    state = estimator.init(params, carry, shapes, key)
    problems.assert_same_bits(state, estimator.init(params, carry, batch, key))
    problems.assert_same_bits(state.carry, carry)
    jax.eval_shape(estimator.update, params, state, batch)


def test_init_reads_shapes_of_keys():
    """Inputs may hold PRNG keys, and windows reach back over them."""
    step = lambda w, h, x: (w * h + jax.random.normal(x),) * 2
    batch = Batch(jax.random.split(jax.random.key(0), 6), jnp.zeros(6))
    pieces = [cut(batch, 0, 3), cut(batch, 3, 6)]
    estimator = truncated_bptt(step, lambda y, target: (y - target) ** 2, window=4, stride=1)
    state, update = estimator.init(0.5, jnp.zeros(()), pieces[0]), jax.jit(estimator.update)
    one, state = update(0.5, state, pieces[0])
    two, _ = update(0.5, state, pieces[1])
    assert_close((one + two).grad_sum, problems.one_update(estimator, 0.5, jnp.zeros(()), batch).grad_sum)


class Counter:
    """Counts how often a step is evaluated at run time."""

    def __init__(self):
        self.count = 0

    def step(self, w, h, x):
        jax.debug.callback(self.add, h)  # depends on the carry, so that no compiler moves it out of the loop
        h = jnp.tanh(w * h + x)
        return h, h

    def add(self, h):
        self.count += np.size(h)


# T = 12: evaluations of the step's value. A backward pass linearises once per step, which evaluates it; an
# outer pass that caches carries evaluates it once more: twice at most, and once for blocks. Windows that overlap
# go in groups of g = 4 losses: g forward, window · g / stride backward, g + window − stride for the weights.
COUNTS = {
    "strides of 2": (functools.partial(truncated_bptt, window=4, stride=2), 3 * (4 + 4 * 4 // 2 + 4 + 4 - 2)),
    "sliding": (functools.partial(truncated_bptt, window=4, stride=1), 3 * (4 + 4 * 4 // 1 + 4 + 4 - 1)),
    "full, one segment": (full_bptt, 12),
    "full, segments of 4": (functools.partial(full_bptt, segment=4), 12 + 8),
    "full, segments of 5": (functools.partial(full_bptt, segment=5), 12 + 10),
    "blocks of 4": (functools.partial(truncated_bptt, window=4), 12),
    "blocks of 12": (functools.partial(truncated_bptt, window=12), 12),
    "randomized, segments of 4": (functools.partial(randomized_bptt, keep_prob=0.5, segment=4), 12 + 8),
}


@pytest.mark.parametrize("name", COUNTS)
def test_steps_evaluated(name):
    make, expected = COUNTS[name]
    counter = Counter()
    estimator = make(counter.step, lambda y, target: y**2)
    batch = Batch(jnp.linspace(-1, 1, 12))
    state = estimator.init(0.5, jnp.zeros(()), batch, jax.random.key(0))
    jax.block_until_ready(jax.jit(estimator.update)(0.5, state, batch))
    jax.effects_barrier()
    assert counter.count == expected


def compilations(function, arguments):
    """How many programs a jitted function needs for these arguments."""
    jitted = jax.jit(function)
    for args in arguments:
        jitted(*args)
    return jitted._cache_size()


def test_one_compilation_serves_all_seeds_and_keep_probs():
    step, loss, params, carry, batch = problems.make("tanh", NUM_STEPS)

    def update(keep_prob, key):
        estimator = gated_bptt(step, loss, gates_fn=lambda k, n: truncation.randomized(k, n, keep_prob))
        return problems.one_update(estimator, params, carry, batch, key).grads

    settings = [(p, jax.random.key(seed)) for p in (0.2, 0.5, 1.0) for seed in range(3)]
    assert compilations(update, settings) == 1


@pytest.mark.parametrize("name", ["full", "sliding", "randomized"])
def test_one_compilation_per_length(name):
    step, loss, params, carry, batch = problems.make("tanh", NUM_STEPS)
    estimator = ESTIMATORS[name](step, loss)
    update, state = jax.jit(estimator.update), estimator.init(params, carry, batch, jax.random.key(0))
    for scale in (1.0, 2.0, 3.0):
        for num_steps in (NUM_STEPS, 3):
            own = jax.tree.map(lambda p, s=scale: p * s, params)
            _, state = update(own, state, cut(batch, 0, num_steps))
    assert update._cache_size() == 2
