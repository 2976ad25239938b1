"""The block window recommended on one batch, on others: it keeps its promise.

What scatters is the error from batch to batch; `diagnose` tells how much from the parts of the batch that it is given.
The promise is for batches as large as the one diagnosed: on smaller ones the error is larger.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jbptt import cells, clipping, diagnose, full_bptt, gated_bptt, tasks, train, truncation
from jbptt.norms import compared_with

OPTIMIZED = True

NUM_STEPS, EXAMPLES, HIDDEN, NUM_UPDATES, NUM_HELDOUT = 120, 32, 16, 40, 20
TOLERANCE = 0.1
# The same in the usual run, of a problem that is made for it.
IN_SMALL = "test_known_systems::test_windows_hold_on_other_batches_and_half_of_them_do_not"
WORDS = "the a river field stone small old quiet dark runs turns falls under over into house road light stands"


@functools.cache
def text():
    """Words drawn at random: what follows a letter depends on the letters since the last space."""
    length = (NUM_UPDATES + 2 * NUM_HELDOUT) * NUM_STEPS * EXAMPLES
    words = np.array(WORDS.split())
    drawn = " ".join(words[np.random.default_rng(0).integers(len(words), size=length // 4)])
    return tasks.text(drawn, num_steps=NUM_STEPS, batch_size=EXAMPLES, heldout_fraction=0.4)


def text_problem(cell_fn):
    task = text()
    size = len(task.vocabulary)
    cell = tasks.on_tokens(cells.with_linear_readout(cell_fn(size, HIDDEN), size), size)
    return cell, tasks.cross_entropy, task.train, task.heldout


def adding_problem(cell_fn):
    cell = cells.with_linear_readout(cell_fn(2, HIDDEN), 1)
    draw = jax.vmap(functools.partial(tasks.adding, num_steps=NUM_STEPS, batch_size=EXAMPLES))
    keys = jax.random.split(jax.random.key(1), NUM_UPDATES + NUM_HELDOUT + 1)
    return cell, tasks.squared_error, draw(keys[:NUM_UPDATES]), draw(keys[NUM_UPDATES:])


@pytest.mark.parametrize(
    ("cell_fn", "problem_fn"),
    [
        pytest.param(cell_fn, problem_fn, marks=marks, id=f"{cell_fn.__name__}-{problem_fn.__name__}")
        for cell_fn, problem_fn, marks in (
            (cells.rnn, text_problem, pytest.mark.more(IN_SMALL)),
            (cells.lstm, adding_problem, pytest.mark.full),
            (cells.gru, text_problem, pytest.mark.full),
            (cells.lstm, text_problem, pytest.mark.full),
            (cells.rnn, adding_problem, pytest.mark.full),
            (cells.gru, adding_problem, pytest.mark.full),
        )
    ],
)
def test_promise(cell_fn, problem_fn):
    cell, loss, batches, heldout = problem_fn(cell_fn)
    batches = jax.tree.map(lambda a: a[:NUM_UPDATES], batches)
    heldout = jax.tree.map(lambda a: a[: NUM_HELDOUT + 1], heldout)
    optimizer = optax.chain(clipping.clip_by_global_norm(1.0), optax.adam(1e-2))
    start = cell.init(jax.random.key(0)), cell.initial_carry((EXAMPLES,))
    params, history = jax.jit(functools.partial(train, full_bptt(cell.step, loss), optimizer))(*start, batches)
    assert history.loss[-1] < 0.8 * history.loss[0]
    carry = history.state.carry
    one = jax.tree.map(lambda a: a[0], heldout)
    window = int(diagnose(cell.step, loss, params, carry, one, measure=False, max_window=2).block_window[0])
    assert 2 <= window < NUM_STEPS

    @jax.jit
    def errors(windows):
        """`[batch, window]`, blocks of each window on the batches that were not diagnosed."""

        def gradient(batch, window):
            gated = gated_bptt(cell.step, loss, gates_fn=lambda key, num_steps: truncation.fixed(num_steps, window))
            return gated.update(params, gated.init(params, carry, batch), batch)[0].grads

        def one_batch(batch):
            compare = compared_with(gradient(batch, NUM_STEPS))
            return jax.lax.map(lambda window: compare(gradient(batch, window))[0], windows)

        return jax.lax.map(one_batch, jax.tree.map(lambda a: a[1:], heldout))

    assert np.sum(errors(jnp.array([window])) <= TOLERANCE) >= 0.9 * NUM_HELDOUT
