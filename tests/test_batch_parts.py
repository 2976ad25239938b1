"""The gradient of each part of a batch, against one whose parameters differ from step to step."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from jax.experimental import sparse
from jax.flatten_util import ravel_pytree
from problems import one_update, usual, usual_rows

from jbptt import Batch, diagnose, full_bptt
from jbptt.analysis.lags import linearise
from jbptt.diagnosis import batch_parts, block_windows, resampling
from jbptt.diagnosis.batch_parts import layout_of, parts_of_batch
from jbptt.plans import check_division
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
        parts = parts_of_batch(problem, passed.carries, passed.outputs, passed.outputs_bar)
        blocks = block_windows.find_blocks(linearised, parts, (0.5, 0.2))
        return jnp.concatenate(blocks.exact, axis=1) * blocks.scale, blocks.window, blocks.errors

    return (step, loss, params, carry, batch), look(params, carry, batch)


@pytest.mark.parametrize(
    ("examples", "num_steps"), usual_rows([(3, 13)], [(3, 13), (17, 4), (1, 40), (1, 33), (32, 3)])
)
def test_parts_add_up_to_the_gradient_and_are_what_they_say(examples, num_steps):
    """Groups of examples, each cut into stretches of time; the last of either may be smaller."""
    problem, (grads, *_) = looked(examples, num_steps)
    sources = by_source(*problem)
    size = -(-examples // 16)
    groups = -(-examples // size)
    length = -(-num_steps // min(num_steps, 16 // groups))
    times = -(-num_steps // length)
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
            seen.append(resampling.errors_of(*(jnp.asarray(a @ a.T) for a in (left, exact))))
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
    tells = lambda parts: bool(resampling.can_tell(jnp.asarray(parts @ parts.T), 1e-10)[0])
    assert tells(parts) and tells(0 * parts) and tells(parts[:1])
    heavy = parts.copy()
    heavy[3] *= 1000
    assert not tells(heavy)
    assert not tells(np.concatenate([parts, -parts]))


def windows_of(step, loss, params, carry, batch):
    found = diagnose(step, loss, params, carry, batch, measure=False)
    exact = one_update(full_bptt(step, loss), params, carry, batch).grads
    np.testing.assert_allclose(found.gradient_norm, np.linalg.norm(ravel_pytree(exact)[0]), rtol=1e-9)
    return found


def normalised(params, h, x):
    """Examples see each other."""
    h = h @ params["w"] + x
    h = jnp.tanh((h - h.mean(0)) / (1e-3 + h.std(0)))
    return h, h


def with_shared_input(params, h, x):
    h = jnp.tanh(h @ params["w"] + x)
    return h, h


def with_a_matrix_beside(params, h, x):
    h = jnp.tanh(h @ params["w"] + x)
    return h, (h, params["w"])


@pytest.mark.more("test_parts_add_up_to_the_gradient_and_are_what_they_say")
@pytest.mark.parametrize("step", usual([normalised], [normalised, with_shared_input, with_a_matrix_beside]))
def test_what_cannot_be_divided_by_examples(step):
    """It is divided in time, and the gradient is that of all examples together; as many examples as features."""
    rng, size = np.random.default_rng(0), 4
    loss = lambda y, target: jnp.sum((jax.tree.leaves(y)[0] - target) ** 2, -1)
    xs = rng.normal(size=(12, size) if step is with_shared_input else (12, size, size))
    batch = Batch(jnp.asarray(xs), jnp.asarray(rng.normal(size=(12, size, size))))
    params = {"w": jnp.asarray(rng.normal(size=(size, size)) / 2)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # as many examples as features: which are which?
        windows_of(step, loss, params, jnp.zeros((size, size)), batch)


@jax.custom_vjp
def on_the_host(w):
    """A derivative that JAX has one by one alone."""
    return 1 * w


on_the_host.defvjp(
    lambda w: (1 * w, None),
    lambda _, bar: (jax.pure_callback(np.asarray, jax.ShapeDtypeStruct(bar.shape, bar.dtype), bar),),
)
PLACES = sparse.BCOO.fromdense(jnp.eye(4)).indices


@pytest.mark.parametrize(
    "weight",
    usual([on_the_host], [on_the_host, lambda w: sparse.BCOO((jnp.diagonal(w), PLACES), shape=w.shape)]),
    ids=["a callback in a rule", "sparse weights"],
)
def test_one_part_where_the_derivative_has_no_vmap(weight):
    step = lambda params, h, x: ((h_ := jnp.tanh(x + h @ weight(params["w"]))), h_)
    loss = lambda y, target: jnp.sum((y - target) ** 2, -1)
    xs, targets = np.random.default_rng(0).normal(size=(2, 9, 3, 4))
    found = windows_of(step, loss, {"w": 0.5 * jnp.eye(4)}, jnp.zeros((3, 4)), Batch(xs, targets))
    assert found.part_norms.shape == (1,)


def checked(y, target):
    """As optax's losses do since 0.2.5, and no later: by an AssertionError."""
    assert y.shape == target.shape, (y.shape, target.shape)
    return jnp.sum((y - target) ** 2, -1)


def test_a_loss_may_assert_its_shapes():
    """What is tried with more or fewer examples may raise anything."""
    step, _, params, carry, batch = problems.make("tanh", 9, examples=4)
    assert layout_of(problem_of(step, checked, params, carry, batch)).groups == 4
    check_division(problem_of(step, checked, params, carry, batch), 2, "two parts", "pass all")

    def takes_all_alone(params, h, x):
        assert len(x) == 4
        return step(params, h, x)

    with pytest.raises(ValueError, match="does not take 2 of the examples alone"):
        check_division(problem_of(takes_all_alone, checked, params, carry, batch), 2, "two parts", "pass all")
    assert layout_of(problem_of(takes_all_alone, checked, params, carry, batch)).groups == 1


@pytest.mark.parametrize(("where", "kind"), [("layout_of", ValueError), ("_way_back", TypeError)])
def test_a_mistake_is_no_missing_rule(monkeypatch, where, kind):
    """It is raised, and does not end in one part."""

    def mistaken(*_):
        raise kind("a mistake")

    monkeypatch.setattr(batch_parts, where, mistaken)
    with pytest.raises(kind, match="a mistake"):
        diagnose(*problems.make("tanh", 4), measure=False)


@pytest.mark.more("test_diagnosis::test_verdict_and_half_life")
def test_a_gap_in_the_mask_ends_no_lags():
    """One loss, at the last step; no step is real three steps before it."""
    step = lambda p, h, x: ((h_ := 0.95 * h + p * x), h_)
    rng = np.random.default_rng(1)
    mask = jnp.ones((30, 16), bool).at[27].set(False)
    weights = jnp.zeros(30).at[-1].set(1.0)
    batch = Batch(*(jnp.asarray(rng.normal(size=(30, 16))) for _ in range(2)), mask, weights)
    found = windows_of(step, lambda y, target: (y - target) ** 2, jnp.ones(()), jnp.zeros(16), batch)
    assert int(found.num_lags) == 30 and int(found.zero_lag) == -1 and found.verdict != "vanishing"
    assert np.all(np.asarray(found.sliding_window) > 20)


def test_lags_go_on_while_parts_hold_what_cancels():
    """A long memory in pairs of examples that cancel on this batch, and need not on others."""
    step = lambda p, h, x: ((h_ := jnp.array([0.2, 0.99]) * h + p * x[:, None]), h_)
    rng = np.random.default_rng(2)
    xs = rng.normal(size=(100, 16))
    xs[:, 1::2] = xs[:, ::2]
    slopes = np.stack([rng.normal(size=(100, 16)), np.tile([1.0, -1.0], (100, 8))], -1)
    batch = Batch(jnp.asarray(xs), jnp.asarray(slopes))
    found = windows_of(step, lambda y, c: jnp.sum(y * c, -1), jnp.ones(2), jnp.zeros((16, 2)), batch)
    assert int(found.num_lags) == 100


@pytest.mark.more("test_lags_go_on_while_parts_hold_what_cancels")
@pytest.mark.parametrize("dtype", usual([jnp.bfloat16], [jnp.bfloat16, jnp.float16, jnp.float32]))
def test_half_precision_can_tell(dtype):
    data = problems.make("tanh", 40, examples=16)
    step, loss = data[:2]
    params, carry, batch = jax.tree.map(lambda a: jnp.asarray(a, dtype), data[2:])
    found = diagnose(step, loss, params, carry, batch._replace(mask=None, weights=None), measure=False)
    assert bool(found.windows.told) and np.all(np.asarray(found.sliding_window) > 0)
