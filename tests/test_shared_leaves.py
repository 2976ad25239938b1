"""What all examples share (a counter, a key, a schedule) beside what each has, wherever an axis is added: windows side
by side, all steps at once, models side by side; and sizes at which XLA changes its code."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import ESTIMATORS
from problems import assert_close, assert_same_bits, one_update, squared_error, usual, usual_rows

from jbptt import Batch, Plan, cells, lag_profile, truncated_bptt
from jbptt.engine.facts import same_under_vmap

WINDOW, WIDTH = 2, 3
NUMBERS = np.random.default_rng(0)
W, W_X = (jnp.asarray(NUMBERS.normal(size=(WIDTH, WIDTH)) / 2) for _ in range(2))


def problem(num_steps, examples, kind, impl="threefry2x32"):
    """A step with shared leaves in carry and input, and a batch in which some examples (and steps) are padding."""

    def step(p, carry, x):
        h, shared = carry
        if kind == "counter":
            extra, shared = jnp.sin(shared.astype(float)), shared + 1
        else:
            shared, key = jax.random.split(shared)
            extra = jax.random.bernoulli(key, 0.5, h.shape) * h
        h = jnp.tanh(x["u"] @ W_X + h @ p + extra * x["s"])
        return (h, shared), h

    mask = NUMBERS.random((num_steps, examples)) < 0.8
    mask[[1, 5]] = False
    schedule = np.where(mask.any(1), NUMBERS.normal(size=num_steps), np.nan)  # NaN where nobody looks
    xs = {"u": jnp.asarray(NUMBERS.normal(size=(num_steps, examples, WIDTH))), "s": jnp.asarray(schedule)}
    start = jnp.zeros((), int) if kind == "counter" else jax.random.key(1, impl=impl)
    targets = jnp.asarray(NUMBERS.normal(size=(num_steps, examples, WIDTH)))
    return step, (jnp.zeros((examples, WIDTH)), start), Batch(xs, targets, jnp.asarray(mask))


def window_after_window(step, carry, batch, window=WINDOW):
    """Loss and gradient of a Python loop that cuts the carry at multiples of the window."""
    xs = batch.xs | {"s": jnp.nan_to_num(batch.xs["s"])}

    def total(p):
        now, value = carry, 0.0
        for t in range(len(batch.mask)):
            now = (jax.lax.stop_gradient(now[0]) if t % window == 0 else now[0], now[1])
            on = batch.mask[t]
            (h, shared), y = step(p, now, jax.tree.map(lambda a, t=t: a[t], xs))
            now = jnp.where(on[:, None], h, now[0]), jax.lax.select(on.any(), shared, now[1])
            value += jnp.sum(jnp.where(on, squared_error(y, batch.targets[t]), 0))
        return value / batch.mask.sum()

    return jax.jit(jax.value_and_grad(total))(W)


KINDS = [("counter", 1), ("counter", 3), ("key", 1), ("key", 3)]


@pytest.mark.parametrize("parallel", usual([4], [None, 1, 4]), ids=["by default", "one", "four"])
@pytest.mark.parametrize(("kind", "examples"), usual_rows([("counter", 3)], KINDS))
@pytest.mark.parametrize("num_steps", usual([35], [32, 35]))
def test_blocks_are_window_after_window(kind, examples, num_steps, parallel):
    step, carry, batch = problem(num_steps, examples, kind)
    estimator = truncated_bptt(step, squared_error, window=WINDOW, plan=Plan(parallel_windows=parallel))
    estimate = jax.jit(partial(one_update, estimator))(W, carry, batch)
    assert_close((estimate.loss, estimate.grads), window_after_window(step, carry, batch))


@pytest.mark.parametrize(("num_steps", "examples"), usual_rows([(7, 2)], [(32, 1), (7, 2)]))
def test_blocks_draw_what_window_after_window_draws(num_steps, examples):
    """`rbg` gives other bits under vmap; neither many blocks of one example nor a ragged rest may ask for it."""
    window = WINDOW if examples == 1 else 4
    step, carry, batch = problem(num_steps, examples, "key", impl="rbg")
    update = partial(one_update, truncated_bptt(step, squared_error, window=window))
    estimate = jax.jit(update)(W, carry, batch)
    assert_close((estimate.loss, estimate.grads), window_after_window(step, carry, batch, window))


@pytest.mark.more("test_what_the_program_shows")
@pytest.mark.parametrize("num_steps", [16, 32, 33])
def test_blocks_take_what_has_no_rule_for_vmap(num_steps):
    """A callback in the step; how many blocks there are, and whether they come out even, is not the step's affair."""

    def step(p, h, x):
        outside = jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
        return (jnp.tanh(p * h + outside),) * 2

    def inside(p, h, x):
        return (jnp.tanh(p * h + jnp.sin(x)),) * 2

    batch, loss = Batch(jnp.linspace(0, 3, num_steps * 3).reshape(num_steps, 3)), lambda y, _: jnp.sum(y**2)
    found, wanted = (
        one_update(truncated_bptt(s, loss, window=2, plan=Plan(parallel_windows=n)), 0.5, jnp.zeros(3), batch)
        for s, n in ((step, None), (inside, 1))
    )
    assert_close((found.loss, found.grads), (wanted.loss, wanted.grads))
    streamed = truncated_bptt(step, loss, window=4)
    state = streamed.init(0.5, jnp.zeros(3), batch)
    totals = []
    for start, stop in pairwise((0, 3, 9, num_steps)):
        estimate, state = streamed.update(0.5, state, jax.tree.map(lambda a, s=slice(start, stop): a[s], batch))
        totals.append(estimate.grad_sum)
    assert_close(sum(totals), one_update(truncated_bptt(inside, loss, window=4), 0.5, jnp.zeros(3), batch).grad_sum)


SAFE = {
    "a gru": (cells.gru(2, 3).step, True),
    "relu": (lambda p, h, x: (jax.nn.relu(h), h), True),
    "threefry": (lambda p, h, x: (h + jax.random.normal(jax.random.key(0), h.shape), h), True),
    "rbg": (lambda p, h, x: (h + jax.random.normal(jax.random.key(0, impl="rbg"), h.shape), h), False),
    "cond": (lambda p, h, x: (jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, h), h), False),
    "effect": (lambda p, h, x: (jax.debug.callback(print, x[0]), (h, h))[1], False),
    "sort": (lambda p, h, x: (jnp.sort(h), h), False),
}


@pytest.mark.parametrize("name", SAFE)
def test_what_the_program_shows(name):
    step, is_safe = SAFE[name]
    params = cells.gru(2, 3).init(jax.random.key(0))
    assert same_under_vmap(step, params, jnp.zeros(3), jnp.zeros(2)) == is_safe


@pytest.mark.parametrize("name", usual(["ragged blocks"], ["full", "ragged blocks", "sliding"]))
def test_models_side_by_side(name):
    """vmap of an estimator over parameters and examples: what one model's examples share stays its own."""
    step, carry, batch = problem(7, 2, "counter")
    models = jnp.stack([W, W.T])
    masks = jnp.stack([batch.mask, ~batch.mask])
    estimator = ESTIMATORS[name].make(step, squared_error)
    update = jax.jit(lambda p, mask: one_update(estimator, p, carry, batch._replace(mask=mask)))
    clean = batch.xs | {"s": jnp.nan_to_num(batch.xs["s"])}
    batch = batch._replace(xs=clean)
    together = jax.jit(jax.vmap(update))(models, masks)
    for i in range(2):
        assert_close(jax.tree.map(lambda a, i=i: a[i], together.grads), update(models[i], masks[i]).grads)


def test_lags_of_shared_leaves():
    """All steps at once: padding of one example moves no other's counter, and NaN in padding changes no bit."""
    step, carry, batch = problem(7, 3, "counter")
    clean = batch._replace(xs=batch.xs | {"s": jnp.nan_to_num(batch.xs["s"])})
    found, wanted = (lag_profile(step, squared_error, W, carry, b, max_lag=4) for b in (batch, clean))
    assert_same_bits(found, wanted)


NUM_STEPS = 5
SIZES = [(1, 1), (63, 3), (64, 1), (4095, 1), (4096, 3), (70_000, 1)]  # numbers in a leaf, examples
IN_CI = {"full", "ragged blocks", "sliding", "parallel blocks", "gated"}
NAMES = usual(["ragged blocks"], ESTIMATORS, full=set(ESTIMATORS) - IN_CI)


@pytest.mark.parametrize(("size", "examples"), usual_rows([(64, 1), (4096, 3)], SIZES))
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_any_size(name, size, examples):
    """Units that see only themselves, whose gradients pair by pair are products of numbers; padded, with a counter."""
    numbers = np.random.default_rng(size)
    a, xs, targets = numbers.normal(size=size) / 2, *numbers.normal(size=(2, NUM_STEPS, examples, size))
    mask = numbers.random((NUM_STEPS, examples)) < 0.8
    mask[0] = True

    def step(p, carry, x):
        h, count = carry
        h = jnp.tanh(p * h + x + jnp.sin(count.astype(float)))
        return (h, count + 1), h

    key, batch = jax.random.key(3), Batch(*map(jnp.asarray, (xs, targets, mask)))
    carry = jnp.zeros((examples, size)), jnp.zeros((), int)
    update = jax.jit(partial(one_update, ESTIMATORS[name].make(step, squared_error)))
    estimate = update(jnp.asarray(a), carry, batch, key)
    coverage = np.asarray(ESTIMATORS[name].coverage(NUM_STEPS, key))

    h, count, total, grad = np.zeros((examples, size)), 0, 0.0, np.zeros(size)
    sensitivity = np.zeros((NUM_STEPS, examples, size))  # ∂h/∂a by the step that it comes from
    for t in range(NUM_STEPS):
        on = mask[t][:, None]
        new = np.tanh(a * h + xs[t] + np.sin(float(count)))
        slope = 1 - new**2
        sensitivity = np.where(on, slope * a * sensitivity, sensitivity)
        sensitivity[t] = np.where(on, slope * h, 0)
        h, count = np.where(on, new, h), count + bool(mask[t].any())
        error = np.where(on, new - targets[t], 0)
        total += np.sum(error**2)
        grad += np.einsum("i,ibn,bn->n", coverage[t], sensitivity, 2 * error)
    assert_close((estimate.loss, estimate.grads), (total / mask.sum(), grad / mask.sum()))
