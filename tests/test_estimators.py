"""What estimators evaluate and how often they compile."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from contract import ESTIMATORS
from problems import assert_close, cut

from jbptt import (
    Batch,
    Estimator,
    Plan,
    adaptive_bptt,
    full_bptt,
    gated_bptt,
    randomized_bptt,
    truncated_bptt,
    truncation,
)

NUM_STEPS = 6


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


def banded(window):
    """Each loss and the window − 1 steps before it."""
    lags = np.arange(NUM_STEPS)[:, None] - np.arange(NUM_STEPS)
    return ((lags >= 0) & (lags < window)).astype(float)


CHUNKS = np.arange(NUM_STEPS) // 2
DECLARED = {
    "full": (full_bptt, np.tri(NUM_STEPS)),
    "full, in segments": (functools.partial(full_bptt, plan=Plan(2)), np.tri(NUM_STEPS)),
    "blocks": (functools.partial(truncated_bptt, window=2), np.tri(NUM_STEPS) * (CHUNKS[:, None] == CHUNKS)),
    "strides": (  # the two losses of a chunk go back to where the chunk before begins
        functools.partial(truncated_bptt, window=4, stride=2),
        np.tri(NUM_STEPS) * (CHUNKS[:, None] - CHUNKS <= 1),
    ),
    "sliding": (functools.partial(truncated_bptt, window=3, stride=1), banded(3)),
    "longer than the sequence": (functools.partial(truncated_bptt, window=9, stride=1), np.tri(NUM_STEPS)),
    "adaptive": (functools.partial(adaptive_bptt, tolerance=0.2, max_window=4), banded(4)),
}


@pytest.mark.parametrize("name", DECLARED)
def test_declared_coverage(name):
    """In closed form; what the estimators really cover is measured under contract. A key changes nothing."""
    make, wanted = DECLARED[name]
    estimator = make(None, None)
    for key in (None, jax.random.key(0)):
        declared = jnp.asarray(estimator.coverage(NUM_STEPS, key))
        assert declared.dtype == float
        np.testing.assert_array_equal(declared, wanted)
    for wrong in (0, 2.5):
        with pytest.raises(ValueError, match="num_steps must be an integer >= 1"):
            estimator.coverage(wrong)


def test_an_estimator_may_declare_nothing():
    init, update, _ = full_bptt(None, None)
    assert Estimator(init, update).coverage is None


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
    "full, segments of 4": (functools.partial(full_bptt, plan=Plan(4)), 12 + 8),
    "full, segments of 5": (functools.partial(full_bptt, plan=Plan(5)), 12 + 10),
    "blocks of 4": (functools.partial(truncated_bptt, window=4), 12),
    "blocks of 12": (functools.partial(truncated_bptt, window=12), 12),
    "randomized, segments of 4": (functools.partial(randomized_bptt, keep_prob=0.5, plan=Plan(4)), 12 + 8),
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


def test_one_compilation_serves_all_windows_phases_and_lengths_of_windows():
    step, loss, params, carry, batch = problems.make("tanh", NUM_STEPS)

    def run(gates_fn):
        return problems.one_update(
            gated_bptt(step, loss, gates_fn=gates_fn), params, carry, batch, jax.random.key(0)
        ).grads

    def fixed(window, phase):
        return run(lambda key, n: truncation.fixed(n, window, phase=phase))

    def lengths(probs):
        return run(lambda key, n: truncation.random_lengths(key, n, probs))

    assert compilations(fixed, [(window, phase) for window in (1, 2, 5) for phase in (0, 1)]) == 1
    assert compilations(lengths, [(jnp.array(probs),) for probs in ([0.5, 0.1], [0.0, 0.9])]) == 1


@pytest.mark.parametrize("name", ["full", "sliding", "randomized", "adaptive", "random lengths"])
def test_one_compilation_per_length(name):
    step, loss, params, carry, batch = problems.make("tanh", NUM_STEPS)
    estimator = ESTIMATORS[name].make(step, loss)
    update, state = jax.jit(estimator.update), estimator.init(params, carry, batch, jax.random.key(0))
    for scale in (1.0, 2.0, 3.0):
        for num_steps in (NUM_STEPS, 3):
            own = jax.tree.map(lambda p, s=scale: p * s, params)
            _, state = update(own, state, cut(batch, 0, num_steps))
    assert update._cache_size() == 2
