"""Learning studies where the truth is known, as a script: `python learning_answers.py TASK FIRST LAST`.

A line for each repetition: what it chose, whether it is a tie, the verdicts. Trainings by the thousand are quick only
where XLA optimises, which the tests leave out.
"""

import json
import sys

import jax
import jax.numpy as jnp

import jbptt
from jbptt import Batch, cells, tasks

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


def study(task, repetition):
    """The study of a task, all of it drawn anew for each repetition."""
    if task == "latch":
        cell, draw, examples = cells.with_linear_readout(cells.gru(3, 16), 1), latch, 16
        ways = {"windows": [4, 16, 40], "sliding": [], "keep_probs": []}
    else:
        cell, draw, examples = cells.with_linear_readout(cells.rnn(3, 8), 2), without_memory, 8
        ways = {"windows": [2, 8], "sliding": [], "keep_probs": [0.9]}
    return jbptt.learning_study(
        cell.step, tasks.squared_error, cell.init, cell.initial_carry((examples,)), draw, **ways,
        learning_rates=RATES, num_updates=300, key=jax.random.key(repetition), progress=False,
    )  # fmt: skip


if __name__ == "__main__":
    task, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    for repetition in range(first, last):
        found = study(task, repetition)
        words = dict(zip(found.ways, found.at_equal_data.verdicts.words, strict=True))
        answer = {"choice": found.choice, "tie": found.is_tie, "learned": bool(found.learned.any()), "words": words}
        print(json.dumps(answer), flush=True)
