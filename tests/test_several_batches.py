"""Several batches at once: numbers of all together, windows of one."""

import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import one_update

from jbptt import Batch, cells, diagnose, full_bptt, tasks, truncation_curve
from jbptt.diagnosis.progress_line import waiting

NUM_STEPS, EXAMPLES, NUM_BATCHES = 48, 4, 8
CELL = cells.with_linear_readout(cells.gru(4, 16), 2)
CARRY = CELL.initial_carry((EXAMPLES,))
LOSS = tasks.squared_error


@functools.cache
def parameters():
    return CELL.init(jax.random.key(0))


def draw(seed):
    keys = jax.random.split(jax.random.key(seed))
    shapes = (NUM_STEPS, EXAMPLES, 4), (NUM_STEPS, EXAMPLES, 2)
    return Batch(*map(jax.random.normal, keys, shapes))


@functools.cache
def found():
    return diagnose(CELL.step, LOSS, parameters(), CARRY, [draw(seed) for seed in range(NUM_BATCHES)], measure=False)


def test_numbers_are_those_of_all_batches():
    params = parameters()
    gradient = jax.jit(lambda batch: one_update(full_bptt(CELL.step, LOSS), params, CARRY, batch))
    each = [gradient(draw(seed)) for seed in range(NUM_BATCHES)]
    np.testing.assert_allclose(found().loss, np.mean([one.loss for one in each]), rtol=1e-9)
    mean = np.mean([ravel_pytree(one.grads)[0] for one in each], axis=0)
    np.testing.assert_allclose(found().gradient_norm, np.linalg.norm(mean), rtol=1e-9)
    norms = [np.linalg.norm(ravel_pytree(one.grads)[0]) for one in each]
    np.testing.assert_allclose(found().part_norms, norms, rtol=1e-9)


def test_windows_hold_on_other_batches_of_the_size_of_one():
    curve = jax.jit(functools.partial(truncation_curve, CELL.step, LOSS, max_window=NUM_STEPS))
    errors = np.array([curve(parameters(), CARRY, draw(100 + i)).relative_error for i in range(30)])
    window = int(found().sliding_window[0])
    assert np.mean(errors[:, window - 1] <= 0.1) >= 0.9 and np.mean(errors[:, window // 2 - 1] <= 0.1) < 0.2


@pytest.mark.more("test_numbers_are_those_of_all_batches")
@pytest.mark.parametrize("carry", ["given", "a function of the parameters"])
def test_one_batch_alone_or_twice_is_the_same_but_for_the_windows(carry):
    """With gates, weights and a mask of each example; a readout stays a part of its own."""
    rng = np.random.default_rng(0)
    shape = NUM_STEPS, EXAMPLES
    batch = draw(0)._replace(mask=jnp.asarray(rng.random(shape) < 0.8), weights=jnp.asarray(rng.random(shape)))
    gates = jnp.asarray(rng.random(shape))
    start = CARRY if carry == "given" else lambda params: CARRY + params["b"][:16]
    look = functools.partial(diagnose, CELL.step, LOSS, parameters(), start, measure=False, gates=gates)
    one, two = look(batch), look([batch, batch])
    for name in ("loss", "constant_loss", "gradient_norm", "half_life", "exponent", "reach"):
        np.testing.assert_allclose(getattr(two, name), getattr(one, name), rtol=1e-9, err_msg=name)
    np.testing.assert_allclose(two.flow.arrives, one.flow.arrives, rtol=1e-9)
    np.testing.assert_allclose(two.curve.relative_error, one.curve.relative_error, rtol=1e-9, atol=1e-12)
    assert two.flow.by_example.shape == (NUM_STEPS, 2, EXAMPLES)
    assert look((batch,)).sliding_window.tolist() == one.sliding_window.tolist()


def test_batches_that_differ_in_shape_are_refused():
    short = jax.tree.map(lambda a: a[:5], draw(0))
    for batches, words in (
        ([draw(0), short], "batches must have the same shapes"),
        ([], "1 to 16 of them, got 0 of none"),
        ([draw(0)] * 17, "got 17 of Batch"),
        ([draw(0), None], "got 2 of Batch, NoneType"),
    ):
        with pytest.raises(ValueError, match=words):
            diagnose(CELL.step, LOSS, parameters(), CARRY, batches, measure=False)


def test_a_line_says_what_one_waits_for(monkeypatch, capsys):
    """From the patience on, wiped at the end; never in a pipe unless asked for."""
    monkeypatch.setattr("jbptt.diagnosis.progress_line.PATIENCE", 0.1)
    with waiting(True) as tell:
        tell("measure")
        time.sleep(0.3)
    shown = capsys.readouterr().err
    assert "jbptt: measure (0 s)" in shown and shown.endswith("\r\x1b[2K")
    for shown in (None, False):
        assert not sys.stderr.isatty()
        with waiting(shown) as tell:
            tell("measure")
            time.sleep(0.2)
        assert capsys.readouterr().err == ""
