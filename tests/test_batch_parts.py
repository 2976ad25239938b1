"""The gradient of each part of a batch, against one whose parameters differ from step to step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from problems import usual_rows

from jbptt.analysis import redrawn, remainders
from jbptt.analysis.batch_parts import divide
from jbptt.analysis.lags import linearise
from jbptt.problem import problem_of


def by_source(step, loss, params, carry, batch):
    """`[T, B, N]`: what step i of the parameters adds to the gradient of the losses of each example."""
    num_steps, num_examples = batch.targets.shape[:2]

    def losses(own):
        """The summed losses of all examples, where step i has parameters of its own."""

        def body(h, at_t):
            p, x, target = at_t
            h, y = step(p, h, x)
            return h, loss(y, target)

        return jax.lax.scan(body, carry, (own, batch.xs, batch.targets))[1].sum(0)

    own = jax.tree.map(lambda a: jnp.broadcast_to(a, (num_steps, *a.shape)), params)
    rows = jax.jacrev(losses)(own)
    flat = [np.asarray(leaf).reshape(num_examples, num_steps, -1) for leaf in jax.tree.leaves(rows)]
    return np.moveaxis(np.concatenate(flat, -1), 1, 0)


@functools.cache
def looked(examples, num_steps):
    step, loss, params, carry, batch = problems.make("gru", num_steps, examples=examples)
    batch = batch._replace(mask=None, weights=None)

    @jax.jit
    def look(params, carry, batch):
        problem = problem_of(step, loss, params, carry, batch)
        linearised = linearise(problem)
        passed = linearised.passed
        parts = divide(problem, passed.carries, passed.outputs, passed.outputs_bar)
        blocks = remainders.find_blocks(linearised, parts, (0.5, 0.2))
        return jnp.concatenate(blocks.exact, axis=1) * blocks.scale, blocks.window, blocks.errors

    return (step, loss, params, carry, batch), look(params, carry, batch)


@pytest.mark.parametrize(("examples", "num_steps"), usual_rows([(3, 13)], [(3, 13), (17, 4), (1, 40), (32, 3)]))
def test_parts_add_up_to_the_gradient_and_are_what_they_say(examples, num_steps):
    """Groups of examples, each cut into stretches of time; the last of either may be smaller."""
    problem, (grads, *_) = looked(examples, num_steps)
    sources = by_source(*problem)
    size = -(-examples // 16)
    groups = -(-examples // size)
    times = min(num_steps, 16 // groups)
    length = -(-num_steps // times)
    wanted = [
        sources[t * length : (t + 1) * length, g * size : (g + 1) * size].sum((0, 1))
        for g in range(groups)
        for t in range(times)
    ]
    np.testing.assert_allclose(grads, wanted, rtol=1e-10, atol=1e-12 * np.abs(wanted).max())


def test_errors_of_other_batches():
    """Their quantile, against as many batches drawn anew: parts with a mean, and parts of noise alone."""
    rng = np.random.default_rng(0)
    num_parts, size = 16, 40
    mean = rng.normal(size=size)
    for signal in (0.0, 1.0, 5.0):
        seen, true = [], []
        draw = lambda s=signal: (
            0.05 * (s * mean + rng.normal(size=(num_parts, size))),
            s * mean + rng.normal(size=(num_parts, size)),
        )
        for _ in range(30):
            left, exact = draw()
            seen.append(redrawn.errors_of(*(jnp.asarray(a @ a.T) for a in (left, exact))))
        for _ in range(400):
            left, exact = draw()
            true.append(np.linalg.norm(left.sum(0)) / np.linalg.norm(exact.sum(0)))
        here = np.array([float(e.here) for e in seen])
        upper = np.array([float(e.upper) for e in seen])
        assert np.all(upper >= 0) and abs(np.median(here) / np.median(true) - 1) < 0.2
        assert 0.9 <= np.median(upper) / np.quantile(true, 0.95) <= 1.3


def test_what_one_batch_cannot_tell():
    rng = np.random.default_rng(1)
    parts = rng.normal(size=(16, 30))
    tells = lambda parts: bool(redrawn.can_tell(jnp.asarray(parts @ parts.T), 1e-10))
    assert tells(parts) and tells(0 * parts) and tells(parts[:1])
    heavy = parts.copy()
    heavy[3] *= 1000
    assert not tells(heavy)
    assert not tells(np.concatenate([parts, -parts]))
