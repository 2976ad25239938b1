"""Rows looked up in a table: their gradients add into one table, and none as large as the table is made on the way."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import assert_close, one_update, squared_error, usual, usual_rows

from jbptt import Batch, Plan, cells, full_bptt, lag_profile, truncated_bptt

NUM_STEPS, ROWS, WIDTH = 7, 12, 3
NUMBERS = np.random.default_rng(0)
TABLE, W = (jnp.asarray(NUMBERS.normal(size=shape)) for shape in ((ROWS, WIDTH), (WIDTH, WIDTH)))


def with_rows(rows):
    """A step that adds rows of the table to its state."""

    def step(p, h, token):
        h = jnp.tanh(h @ p["w"] + rows(p["table"], token))
        return h, h

    return step


def tied(p, h, token):
    """Looked up twice, and multiplied by: all three add into one gradient."""
    h = jnp.tanh(h @ p["w"] + p["table"][token] + 0.5 * p["table"][(token + 1) % ROWS])
    return h, h @ p["table"].T[:, :WIDTH] + jnp.sum(p["table"])


def looked_up_alone(p, h, token):
    """No batch axis: one row, cut out of the table."""
    h = jnp.tanh(h @ p["w"] + p["table"][token])
    return h, h


def slices(p, h, token):
    """Starts beyond the last row are moved back inside, as `dynamic_slice` does."""
    piece = jax.lax.dynamic_slice(p["table"], (token + 3, 0), (2, WIDTH))
    h = jnp.tanh(h @ p["w"] + piece[0] * piece[1])
    return h, h


STEPS = {
    "indexed": (with_rows(lambda table, token: table[token]), (4,)),
    "two batch axes": (with_rows(lambda table, token: table[token]), (2, 2)),
    "clipped": (with_rows(lambda table, token: jnp.take(table, token + 3, axis=0, mode="clip")), (4,)),
    "filled": (with_rows(lambda table, token: table.at[token + 3].get(mode="fill", fill_value=0)), (4,)),
    "columns": (with_rows(lambda table, token: table.T[:, token].T), (4,)),
    "derived": (with_rows(lambda table, token: (table / jnp.linalg.norm(table))[token]), (4,)),
    "several rows": (with_rows(lambda table, token: table[jnp.stack([token, token // 2])].sum(0)), (4,)),
    "compiled": (with_rows(jax.jit(lambda table, token: table[token])), (4,)),
    "tied": (tied, (4,)),
    "one row": (looked_up_alone, ()),
    "slices": (slices, ()),
}
ESTIMATORS = {
    "full": (full_bptt, None),
    "segments": (partial(full_bptt, plan=Plan(2)), None),
    "blocks": (partial(truncated_bptt, window=3), 3),
    "sliding": (partial(truncated_bptt, window=NUM_STEPS, stride=1), None),
}


COMBINATIONS = [(name, way) for name in STEPS for way in ESTIMATORS]
LONG = [partial(truncated_bptt, window=8), partial(full_bptt, plan=Plan(8))]
USUAL = [("indexed", "blocks"), ("tied", "segments"), ("filled", "sliding"), ("slices", "full")]


@pytest.mark.parametrize(("name", "way"), usual_rows(USUAL, COMBINATIONS))
def test_gradient_of_a_table(name, way):
    step, batch_shape = STEPS[name]
    make, window = ESTIMATORS[way]
    params, carry = {"table": TABLE, "w": W, "other": W}, jnp.zeros((*batch_shape, WIDTH))
    step = cells.with_readout(step, lambda p, y: y @ p["other"])
    tokens = jnp.asarray(NUMBERS.integers(0, ROWS, (NUM_STEPS, *batch_shape)))
    batch = Batch(tokens, jnp.asarray(NUMBERS.normal(size=(NUM_STEPS, *batch_shape, WIDTH))))

    def mean_loss(params):
        def body(h, inputs):
            t, token, target = inputs
            h = h if window is None else jnp.where(t % window == 0, jax.lax.stop_gradient(h), h)
            h, y = step(params, h, token)
            return h, squared_error(y, target)

        return jnp.mean(jax.lax.scan(body, carry, (jnp.arange(NUM_STEPS), *batch[:2]))[1])

    estimate = jax.jit(partial(one_update, make(step, squared_error)))(params, carry, batch)
    assert_close((estimate.loss, estimate.grads), jax.jit(jax.value_and_grad(mean_loss))(params))


def test_lags_of_a_table():
    step, params, carry = STEPS["indexed"][0], {"table": TABLE, "w": W}, jnp.zeros((4, WIDTH))
    tokens = jnp.asarray(NUMBERS.integers(0, ROWS, (NUM_STEPS, 4)))
    batch = Batch(tokens, jnp.asarray(NUMBERS.normal(size=(NUM_STEPS, 4, WIDTH))))
    one_hot = batch._replace(xs=jax.nn.one_hot(tokens, ROWS))

    def multiplied(p, h, x):
        h = jnp.tanh(h @ p["w"] + x @ p["table"])
        return h, h

    found = lag_profile(step, squared_error, params, carry, batch, max_lag=3, per_leaf=True)
    assert_close(found, lag_profile(multiplied, squared_error, params, carry, one_hot, max_lag=3, per_leaf=True))


def test_rows_in_half_precision_add_up_in_float32():
    """The row of every example and step is the same: its gradient is a sum of 70,000 ones."""
    step = lambda table, h, token: (h, table[token])
    estimator, table = full_bptt(step, lambda y, _: jnp.sum(y, -1)), jnp.zeros((2000, 2), jnp.bfloat16)
    batch, carry = Batch(jnp.full((70, 1000), 5)), jnp.zeros((1000, 1), jnp.bfloat16)
    grads = one_update(estimator, table, carry, batch).grad_sum
    assert grads.dtype == jnp.float32
    assert np.array_equal(grads[5], [70_000, 70_000]) and np.sum(np.asarray(grads) != 0) == 2


@pytest.mark.parametrize("make", usual(LONG[:1], LONG), ids=["blocks", "segments"])
def test_no_gradient_of_the_whole_table_is_made_for_each_piece(make):
    """Temporary memory stays far below the table's 2 MiB, of which the result is the only copy."""
    params = {"table": jnp.zeros((8192, 32)), "w": jnp.zeros((32, 32))}
    step = with_rows(lambda table, token: table[token])
    batch, carry = Batch(jnp.zeros((64, 4), int), jnp.zeros((64, 4, 32))), jnp.zeros((4, 32))
    update = lambda p: one_update(make(step, squared_error), p, carry, batch).grads
    memory = jax.jit(update).lower(params).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.2 * params["table"].nbytes
