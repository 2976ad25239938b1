"""The variance of randomized truncation on h ← c h + w x, loss h_T: finite for c²/π < 1, without bound beyond."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest

from jbptt import Batch, gated_bptt, randomized_bptt


def problem(c, num_steps):
    """∂h_T/∂w = Σ_k c^k for x = 1: the source k steps back contributes c^k."""
    step = lambda w, h, x: (c * h + w * x,) * 2
    batch = Batch(jnp.ones(num_steps), weights=jnp.zeros(num_steps).at[-1].set(1.0))
    return step, lambda y, target: y, jnp.array(1.0), jnp.zeros(()), batch


def variance(c, keep_prob, num_steps):
    """Σ_{k, m} c^(k + m) (π^−min(k, m) − 1): the crossings that two sources share decide."""
    one, other = np.arange(num_steps)[:, None], np.arange(num_steps)[None, :]
    return np.sum(float(c) ** (one + other) * (float(keep_prob) ** -np.minimum(one, other) - 1))


@pytest.mark.parametrize(("c", "keep_prob"), [(0.7, 0.6), (0.9, 0.5)])
def test_closed_form_is_what_every_schedule_gives(c, keep_prob):
    num_steps = 7
    step, loss, *rest = problem(c, num_steps)
    kept = np.array(list(itertools.product([True, False], repeat=num_steps - 1)))
    probabilities = np.prod(np.where(kept, keep_prob, 1 - keep_prob), axis=1)
    gates = np.concatenate([np.ones((len(kept), 1)), np.where(kept, 1 / keep_prob, 0)], axis=1)
    one = lambda g: problems.one_update(gated_bptt(step, loss, gates_fn=lambda key, n: g), *rest).grads
    grads = np.asarray(jax.jit(jax.vmap(one))(gates))
    mean = probabilities @ grads
    np.testing.assert_allclose(mean, np.sum(c ** np.arange(num_steps)), rtol=1e-12)
    np.testing.assert_allclose(probabilities @ (grads - mean) ** 2, variance(c, keep_prob, num_steps), rtol=1e-12)


def test_finite_below_one_and_unbounded_beyond():
    below, beyond = (0.8, 0.8), (0.8, 0.5)  # c²/π = 0.8 and 1.28
    lengths = (50, 100, 200)
    finite, growing = ([variance(*setting, n) for n in lengths] for setting in (below, beyond))
    assert finite[2] / finite[1] - 1 < 1e-4 < finite[1] / finite[0] - 1 < 0.1
    for shorter, longer, steps in zip(growing, growing[1:], (50, 100), strict=False):
        np.testing.assert_allclose(np.log(longer / shorter) / steps, np.log(1.28), rtol=0.01)


def test_measured_variance_is_the_closed_form():
    """4000 draws, c²/π = 0.61: within 6 standard errors, false alarm 2e-9; the draws give the spread of the squares."""
    c, keep_prob, num_steps = 0.7, 0.8, 40
    step, loss, *rest = problem(c, num_steps)
    sample = lambda key: problems.one_update(randomized_bptt(step, loss, keep_prob=keep_prob), *rest, key).grads
    key, count = jax.random.key(4), 4000
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))
    grads = np.asarray(jax.jit(lambda: jax.lax.map(sample, keys, batch_size=100))())
    squares = (grads - grads.mean()) ** 2
    assert abs(squares.mean() - variance(c, keep_prob, num_steps)) < 6 * squares.std() / np.sqrt(count)
