"""Training in chunks against `train` of all batches; runs that are broken off and go on."""

import functools
import gc
import os
import signal
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from problems import EXAMPLES, assert_close, usual_rows
from test_training import BAD, NUM_BATCHES, OPTIMIZER, batch_of, cut, estimator_of, refused, stacked_problem

from jbptt import Batch, full_bptt, train, train_in_chunks

KEY = jax.random.key(3)
EVALUATION = {"eval_fn": lambda params, carry: {"b": params["b_y"], "carry": carry}, "eval_every": 2}


def on_the_host(batches):
    return jax.tree.map(np.asarray, batches)


def singles(batches):
    for n in range(len(batches.xs)):
        yield batch_of(batches, n)


SOURCES = {
    "stacked": lambda batches: batches,
    "stacked, on the host": on_the_host,
    "one by one": singles,
    "one by one, on the host": lambda batches: singles(on_the_host(batches)),
    "a list": lambda batches: [*singles(batches)],
}


def joined(histories):
    """The histories of chunks as one."""
    fields = {}
    for field in ("loss", "grad_norm", "info", "finite", "applied", "updates", "evals", "eval_updates"):
        parts = [getattr(history, field) for history in histories]
        fields[field] = jax.tree.map(lambda *a: jnp.concatenate(a), *parts)
    return histories[-1]._replace(**fields)


def count_programs(monkeypatch):
    """A list that grows with every program that is made."""
    traces = []
    monkeypatch.setattr(
        "jbptt.experiments.training_chunks.train", lambda *a, **named: traces.append(0) or train(*a, **named)
    )
    return traces


def as_bits(tree):
    """Its numbers, keys too."""
    is_key = lambda a: jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
    return [np.asarray(jax.random.key_data(a) if is_key(a) else a) for a in map(jnp.asarray, jax.tree.leaves(tree))]


def assert_same_bits(one, other):
    jax.tree.map(np.testing.assert_array_equal, as_bits(one), as_bits(other))


@pytest.mark.parametrize(
    ("source", "name"),
    usual_rows(
        [("stacked", "randomized"), ("one by one, on the host", "randomized")],
        [*((source, "randomized") for source in SOURCES), ("a list", "sliding, windows over batches")],
    ),
)
def test_training_chunks_are_one_training(source, name, monkeypatch):
    """Chunks of two updates and one of what is left, in two programs; counts go on from those of earlier calls."""
    _, _, params, carry, batches, _ = stacked_problem()
    traces = count_programs(monkeypatch)
    options = {"key": KEY, "num_done": 7, **EVALUATION}
    chunks = [
        *train_in_chunks(estimator_of(name), OPTIMIZER, params, carry, SOURCES[source](batches), every=2, **options)
    ]
    found, history = jax.jit(functools.partial(train, estimator_of(name), OPTIMIZER, **options))(params, carry, batches)
    assert len(traces) <= 2  # fewer where another case has them compiled
    assert [chunk.num_done for chunk in chunks] == [9, 11, 12]
    assert_close(chunks[-1].params, found)
    as_numbers = lambda history: jax.tree.map(lambda a: np.asarray(a, float), history._replace(state=0))
    assert_close(as_numbers(joined([chunk.history for chunk in chunks])), as_numbers(history))
    assert_close(chunks[-1].history.state.carry, history.state.carry)
    assert chunks[1].history.eval_updates.tolist() == [11]


def test_a_run_goes_on_from_a_checkpoint_with_the_same_bits():
    """From the end of a chunk, on the batches still to come; the key is in the state, and no carry is read."""
    _, _, params, carry, batches, _ = stacked_problem()
    go = functools.partial(train_in_chunks, estimator_of("randomized"), OPTIMIZER, every=2, **EVALUATION)
    whole = [*go(params, carry, batches, key=KEY)]
    saved = jax.tree.map(lambda a: a + 0 if jnp.issubdtype(a.dtype, jnp.number) else a, whole[0].checkpoint)
    rest = [*go(carry=None, batches=cut(batches, 2, NUM_BATCHES), **saved)]
    assert [chunk.num_done for chunk in rest] == [4, NUM_BATCHES]
    assert_same_bits(rest, whole[1:])


@pytest.mark.more("test_training::test_an_update_that_is_not_finite")
def test_a_run_that_stopped_stays_stopped():
    _, _, params, carry, batches, _ = stacked_problem()
    broken = batches._replace(xs=batches.xs.at[1].set(jnp.inf))
    go = functools.partial(train_in_chunks, estimator_of("randomized"), OPTIMIZER, every=2, nonfinite="stop")
    chunks = [*go(params, carry, broken, key=KEY)]
    assert [chunk.history.applied.tolist() for chunk in chunks] == [[True, False], [False, False], [False]]
    assert chunks[-1].num_done == NUM_BATCHES and chunks[0].history.stopped
    assert_same_bits(chunks[-1].params, chunks[0].params)
    assert_same_bits(chunks[-1].history.state, chunks[0].history.state)
    again = next(go(carry=None, batches=cut(batches, 2, NUM_BATCHES), **chunks[0].checkpoint))
    assert not again.history.applied.any()


def test_nothing_is_read_or_trained_before_it_is_asked_for():
    """One batch at the call, a chunk's for each chunk; nothing is held of those that were trained on."""
    _, _, params, carry, batches, _ = stacked_problem()
    batches, alive, read = on_the_host(batches), [], []

    def source():
        for n in [*range(NUM_BATCHES)] * 4:
            xs = batches.xs[n].copy()
            alive[:] = [one for one in alive if one() is not None] + [weakref.ref(xs)]
            read.append(len(alive))
            yield batch_of(batches, n)._replace(xs=xs)

    options = {"every": 2, "key": KEY, **EVALUATION}
    chunks = train_in_chunks(estimator_of("randomized"), OPTIMIZER, params, carry, source(), **options)
    assert len(read) == 1
    for number in (2, 4, 6):
        assert next(chunks).num_done == number == len(read)
    chunks.close()  # as a loop does that is left
    assert len(read) == 6 and max(read) <= 3  # the one read last may still be held by its source


class Held:
    """An evaluation with arrays in it, which has no hash."""

    __hash__ = None

    def __init__(self, shift):
        self.shift = shift

    def __call__(self, params, carry):
        return params["b"] + self.shift


@pytest.mark.more("test_training_chunks_are_one_training")
@pytest.mark.parametrize("kind", ["a Python number", "no hash", "learned start"])
def test_one_program_for_all_chunks(kind, monkeypatch):
    """And one for a shorter last chunk, one for a first with a learned start; a second call finds them.

    What has no hash may have changed between the calls.
    """
    tanh_step, loss, params, carry, batches, _ = stacked_problem("tanh")
    params, options = params | {"factor": 1.0}, {}
    step = lambda params, carry, x: (tanh_step(params, carry, x)[0], params["factor"] * tanh_step(params, carry, x)[1])
    estimator = full_bptt(step, loss)
    if kind == "no hash":
        options = {"eval_fn": Held(jnp.ones(problems.HIDDEN)), "eval_every": 1}
    if kind == "learned start":
        carry = lambda params: jnp.broadcast_to(params["b"], (EXAMPLES, problems.HIDDEN))
    traces = count_programs(monkeypatch)
    run = lambda: [*train_in_chunks(estimator, OPTIMIZER, params, carry, batches, every=2, **options)]
    first = run()
    assert len(traces) == (3 if kind == "learned start" else 2)
    again = run()
    assert len(traces) == (4 if kind == "no hash" else 3 if kind == "learned start" else 2)
    assert_same_bits(again, first)
    _, history = jax.jit(lambda params: train(estimator, OPTIMIZER, params, carry, batches, **options))(params)
    assert_close(jnp.concatenate([chunk.history.loss for chunk in first]), history.loss)


@pytest.mark.more("test_training_chunks_are_one_training")
def test_nothing_is_kept_of_what_was_dropped():
    """Neither functions nor what they close over, once the last of them is gone."""

    def trained():
        tanh_step, loss, params, _, batches, _ = stacked_problem("tanh")
        held = jnp.ones(problems.HIDDEN)
        step = lambda params, carry, x: tanh_step(params, carry + 0 * held, x)
        start = lambda params: jnp.broadcast_to(params["b"] * held, (EXAMPLES, problems.HIDDEN))
        options = {"every": 2, "eval_fn": lambda params, carry: held.sum(), "eval_every": 2}
        chunk = next(train_in_chunks(full_bptt(step, loss), OPTIMIZER, params, start, batches, **options))
        return chunk, [weakref.ref(one) for one in (step, start, options["eval_fn"])]

    chunk, references = trained()
    gc.collect()
    assert [one() for one in references] == [None] * 3 and chunk.num_done == 2


BAD_CHUNKS = {
    **{name: (*BAD[name], None) for name in BAD},
    "every": ({"every": 0}, "every must be an integer >= 1, got 0", None),
    "evaluations between chunks": (
        {"every": 4, "eval_fn": max, "eval_every": 3},
        "every must be a multiple of eval_every, got every=4 and eval_every=3",
        None,
    ),
    "numbers that differ": ({}, "batches must have leaves", Batch(jnp.ones((3, 4)), jnp.ones((2, 4)))),
    "no batches": ({}, "an iterable of batches .* got int; write Batch", 3),
    "none left": ({}, "at least one batch, got none", iter(())),
    "arrays": ({}, "iterable with a ArrayImpl; write Batch", jnp.ones((3, 4))),
    "words": ({}, r"batches\[0\].xs is a str, wanted an array", [Batch("abc")]),
}


@pytest.mark.parametrize("name", BAD_CHUNKS)
def test_bad_options_are_refused_at_the_call(name):
    given, message, batches = BAD_CHUNKS[name]
    refused({"every": 2} | given, message, batches, call=train_in_chunks)


def test_a_batch_of_another_shape_is_named():
    _, _, params, carry, batches, _ = stacked_problem()
    given, options = [*singles(batches)], {"every": 2, "key": KEY, **EVALUATION}
    given[3] = cut(given[3], 0, 2)
    chunks = train_in_chunks(estimator_of("randomized"), OPTIMIZER, params, carry, given, **options)
    assert next(chunks).num_done == 2
    with pytest.raises(ValueError, match=r"one shape, got .*\[2, 3, 2\].* as batches\[3\] and .*\[4, 3, 2\]"):
        next(chunks)


def test_a_state_that_does_not_fit_is_refused_at_the_call():
    """Where no state is made, an update is tried on shapes."""
    estimator, (_, _, params, carry, batches, _) = estimator_of("sliding, windows over batches"), stacked_problem()
    state = estimator.init(params, carry, batch_of(batches, 0))
    other = state._replace(history=state.history._replace(xs=state.history.xs[:, :2]))
    with pytest.raises(ValueError, match="history does not fit the batch"):
        train_in_chunks(estimator, OPTIMIZER, params, None, batches, every=2, state=other)


CHILD = """
import os, signal, sys
import jax, jax.numpy as jnp, numpy as np, optax, orbax.checkpoint as ocp
import jbptt

cell = jbptt.cells.rnn(2, 3)
draw = np.random.default_rng(0).normal
batches = jbptt.Batch(draw(size=(8, 5, 2, 2)).astype("float32"), draw(size=(8, 5, 2, 3)).astype("float32"))
estimator = jbptt.randomized_bptt(cell.step, jbptt.tasks.squared_error, keep_prob=0.6)
optimizer, carry = optax.adam(0.1), cell.initial_carry((2,))
run = dict(params=cell.init(jax.random.key(0)), key=jax.random.key(1))
folder, kill_at = sys.argv[1], int(sys.argv[2])
with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
    if manager.latest_step() is not None:
        first = jax.tree.map(lambda a: a[:1], batches)
        begin = lambda: next(jbptt.train_in_chunks(estimator, optimizer, carry=carry, batches=first, every=1, **run))
        shapes = jax.eval_shape(lambda: begin().checkpoint)
        run = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(shapes))
    print("from", int(run.get("num_done", 0)))
    rest = jax.tree.map(lambda a: a[int(run.get("num_done", 0)):], batches)
    for chunk in jbptt.train_in_chunks(estimator, optimizer, carry=carry, batches=rest, every=2, **run):
        manager.save(chunk.num_done, args=ocp.args.StandardSave(chunk.checkpoint))
        if chunk.num_done == kill_at:
            manager.wait_until_finished()
            os.kill(os.getpid(), signal.SIGKILL)
leaves = jax.tree.leaves((chunk.params, chunk.history.opt_state, jax.random.key_data(chunk.history.state.key)))
print("bits", b"".join(np.asarray(a).tobytes() for a in (*leaves, chunk.history.loss)).hex())
"""


@pytest.mark.more("test_a_run_goes_on_from_a_checkpoint_with_the_same_bits")
def test_a_killed_run_goes_on_from_orbax_with_the_same_bits(tmp_path):
    pytest.importorskip("orbax.checkpoint")

    def start(folder, kill_at):
        command = [sys.executable, "-c", CHILD, str(tmp_path / folder), str(kill_at)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)

    whole, killed, resumed = start("whole", 0), start("killed", 4), start("killed", 0)
    assert killed.returncode == -signal.SIGKILL and "bits" not in killed.stdout, killed.stderr
    assert whole.returncode == resumed.returncode == 0, whole.stderr + resumed.stderr
    assert "from 0" in whole.stdout and "from 4" in resumed.stdout
    bits = [run.stdout.split("bits ")[1] for run in (whole, resumed)]
    assert bits[0] == bits[1] and len(bits[0]) > 200
