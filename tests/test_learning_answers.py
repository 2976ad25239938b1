"""A learning study where the truth is known: a task that needs 30 steps, and one without memory."""

import os

import jax
import jax.numpy as jnp
import pytest

import jbptt
from jbptt import Batch, cells, tasks

pytest.importorskip("icechunk")

REPETITIONS = 20 if os.environ.get("JBPTT_FULL") else 2
LAG = 30
RATES = (3e-3, 1e-2, 3e-2)


def latch(key, num_steps=48, examples=16):
    """A sign at a random step, asked for LAG steps later."""
    key_sign, key_step = jax.random.split(key)
    sign = 2.0 * jax.random.bernoulli(key_sign, shape=(examples,)) - 1.0
    begin = jax.random.randint(key_step, (examples,), 0, num_steps - LAG)
    steps = jnp.arange(num_steps)[:, None]
    shown, asked = steps == begin, steps == begin + LAG
    xs = jnp.stack([jnp.where(shown, sign, 0.0), shown * 1.0, asked * 1.0], axis=-1)
    return Batch(xs, jnp.broadcast_to(sign[:, None], (num_steps, examples, 1)), weights=asked * 1.0)


def without_memory(key, num_steps=12, examples=8):
    """A function of the input of the same step, with noise."""
    key_x, key_noise = jax.random.split(key)
    xs = jax.random.normal(key_x, (num_steps, examples, 3))
    ys = jnp.tanh(xs @ jnp.array([[1.0, -0.5], [0.3, 0.8], [-0.6, 0.2]]))
    return Batch(xs, ys + 0.3 * jax.random.normal(key_noise, ys.shape))


def asked(cell, draw, examples, repetition, **options):
    """One study, in single precision."""
    with jax.enable_x64(False):
        return jbptt.learning_study(
            cell.step, tasks.squared_error, cell.init, cell.initial_carry((examples,)), draw,
            learning_rates=RATES, key=jax.random.key(repetition), progress=False, **options,
        )  # fmt: skip


@pytest.mark.more("test_learning_study::test_a_study_from_end_to_end")
def test_a_task_that_needs_30_steps_gets_a_window_that_reaches_it():
    """Blocks of 4 and 16 never see a sign and its question together, blocks of 40 and full BPTT do."""
    cell = cells.with_linear_readout(cells.gru(3, 16), 1)
    named = []
    for repetition in range(REPETITIONS):
        study = asked(cell, latch, 16, repetition, windows=[4, 16, 40], sliding=[], keep_probs=[], num_updates=300)
        words = dict(zip(study.ways, study.at_equal_data.verdicts.words, strict=True))
        named.append(study.choice)
        print(repetition, study.choice, words)
    right = sum(name in ("full BPTT", "blocks of 40") for name in named)
    assert right >= 0.9 * REPETITIONS, named


@pytest.mark.more("test_learning_study::test_a_study_from_end_to_end")
def test_a_task_without_memory_is_a_tie():
    cell = cells.with_linear_readout(cells.rnn(3, 8), 2)
    ties = []
    for repetition in range(REPETITIONS):
        study = asked(
            cell, without_memory, 8, repetition, windows=[2, 8], sliding=[], keep_probs=[0.9], num_updates=300
        )
        ties.append(study.is_tie)
        print(repetition, study.choice, study.at_equal_data.verdicts.words)
        assert study.learned.all()
    assert sum(ties) >= 0.9 * REPETITIONS, ties
