"""Peak temporary memory, from the compiler: O(T/segment + segment) instead of O(T)."""

import functools

import jax
import jax.numpy as jnp
import pytest
from problems import usual, usual_rows

from jbptt import Batch, Plan, cells, full_bptt, randomized_bptt, truncated_bptt
from jbptt.problem import trusted_problem
from jbptt.windows import blocks_at_once

OPTIMIZED = True

NUM_STEPS, HIDDEN, CHANNELS = 4096, 64, 32
CELLS = {name: make(CHANNELS, HIDDEN, dtype=jnp.float32) for name, make in (("rnn", cells.rnn), ("lstm", cells.lstm))}


def squared_error(y, target):
    return jnp.mean((y - target) ** 2, axis=-1)


def problem(name, examples, num_steps=NUM_STEPS):
    """Shapes alone: nothing of this is ever allocated."""
    cell = CELLS[name]
    core = lambda params, carry, x: cell.step(params["cell"], carry, x)
    step = cells.with_readout(core, lambda params, h: h @ params["w_y"])
    params = {"cell": jax.eval_shape(cell.init, jax.random.key(0)), "w_y": float32(HIDDEN, CHANNELS)}
    carry = jax.eval_shape(lambda: cell.initial_carry((examples,)))
    series = float32(num_steps, examples, CHANNELS)
    return step, params, carry, Batch(series, series)


def float32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def temporary_bytes(function, *shapes):
    return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def plain(step):
    """`jax.grad` through one `lax.scan`, mean loss."""

    def mean_loss(params, carry, batch):
        _, ys = jax.lax.scan(functools.partial(step, params), carry, batch.xs)
        return jnp.mean(jax.vmap(squared_error)(ys, batch.targets))

    return jax.value_and_grad(mean_loss)


def estimated(estimator, key=None):
    def run(params, carry, batch):
        estimate, state = estimator.update(params, estimator.init(params, carry, batch, key), batch)
        return estimate.loss, estimate.grads, state.carry

    return run


@pytest.mark.more("test_memory_grows_with_segments_not_steps")
@pytest.mark.parametrize("examples", usual([16], [1, 16]))
@pytest.mark.parametrize("name", usual(["rnn"], CELLS))
def test_memory_of_estimators(name, examples, record_property):
    step, *shapes = problem(name, examples)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    reference = temporary_bytes(plain(step), *shapes)
    shares = {
        "truncated": temporary_bytes(
            estimated(truncated_bptt(step, squared_error, window=32, plan=Plan(parallel_windows=1))), *shapes
        )
        / reference,
        "full": temporary_bytes(estimated(full_bptt(step, squared_error)), *shapes) / reference,
    }
    for key, value in shares.items():
        record_property(key, f"{value:.2%} of {reference / 2**20:.1f} MiB")
        print(f"{name}, B={examples}, {key}: {value:.2%} of {reference / 2**20:.1f} MiB")
    assert shares["truncated"] <= 0.02
    assert shares["full"] <= 0.05


@pytest.mark.more("test_memory_grows_with_segments_not_steps")
@pytest.mark.parametrize(("examples", "most"), usual_rows([(16, None)], [(1, 6 * 2**20), (16, None)]))
def test_memory_of_windows_side_by_side(examples, most):
    """By default up to 64 windows of a single example, if their carries fit into a mebibyte; else one."""
    step, *shapes = problem("lstm", examples)
    default, one = (
        temporary_bytes(
            estimated(truncated_bptt(step, squared_error, window=32, plan=Plan(parallel_windows=number))), *shapes
        )
        for number in (None, 1)
    )
    assert one < default <= most if most else default == one
    wide, small = cells.lstm(CHANNELS, 2**14, dtype=jnp.float32), cells.rnn(CHANNELS, 4, dtype=jnp.float32)

    def chosen(cell, window, num_windows):
        def of(params, carry, xs):
            loss = lambda y, target: jnp.sum(y)
            found.append(blocks_at_once(trusted_problem(cell.step, loss, params, carry, Batch(xs), None, ()), window))

        found = []
        params, carry = jax.eval_shape(lambda: (cell.init(jax.random.key(0)), cell.initial_carry()))
        jax.eval_shape(of, params, carry, jax.ShapeDtypeStruct((num_windows * window, CHANNELS), jnp.float32))
        return found[0]

    for window, number in ((32, 1), (4, 2), (2, 4)):  # the carries of a step take 128 KiB
        assert chosen(wide, window, 100) == number
    for num_windows, number in ((15, 1), (16, 16), (64, 64), (65, 64), (100, 50), (127, 63)):
        assert chosen(small, 2, num_windows) == number
    assert chosen(small, 2**12, 31) == 15  # 16 fit


@pytest.mark.more("test_memory_grows_with_segments_not_steps")
def test_memory_of_randomized_and_sliding_estimators():
    step, *shapes = problem("rnn", 16)
    reference = temporary_bytes(plain(step), *shapes)
    randomized = estimated(randomized_bptt(step, squared_error, keep_prob=0.9), jax.random.key(0))
    assert temporary_bytes(randomized, *shapes) <= 0.05 * reference
    sliding = estimated(truncated_bptt(step, squared_error, window=32, stride=16))
    assert temporary_bytes(sliding, *shapes) <= 0.05 * reference


def test_memory_grows_with_segments_not_steps():
    step = problem("lstm", 4)[0]
    cost = lambda num_steps: temporary_bytes(
        estimated(truncated_bptt(step, squared_error, window=16)), *problem("lstm", 4, num_steps)[1:]
    )
    assert cost(4096) <= 1.1 * cost(256)
