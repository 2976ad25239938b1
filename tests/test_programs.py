"""What a compiler is given: programs that lower for CPU, CUDA and TPU, and no more of them than are needed.

For lowering nothing is compiled: `jax.export` writes the program for all platforms, and fails where one of them has no
such operation.
"""

import inspect
from functools import partial

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import ESTIMATORS
from problems import HIDDEN, INPUT, usual
from test_configurations import NUM_STEPS, analyses, clipped_training, full_problem, roads

import jbptt
from jbptt import cells, clipping, powers, tasks, truncation

PLATFORMS = "cpu", "cuda", "tpu"


@pytest.fixture(autouse=True)
def count_from_zero():
    """chex counts traces by the name of a function."""
    chex.clear_trace_counter()


HOST = {
    "choose_plan": "times programs on the host",
    "influence_structure": "reads a program, on the host",
    "learning_study": "trains and decides on the host",
    "measure_cost": "times programs on the host",
    "optimize_schedule": "L-BFGS in double precision on the host, before a training",
    "powers.eigenvalues": "of a matrix that is not symmetric: TPUs have no such decomposition",
    "powers.alignment": "the same",
    "tasks.count_symbols": "counts the characters of a text",
    "tasks.read_text": "reads a file",
    "tasks.text": "cuts a text up",
    "train_in_chunks": "a loop on the host over what is lowered as train",
    "grid": "names and numbers",
    "sweep": "a loop on the host over programs of the user's function",
    "load_sweep": "reads files",
}


def others(params, carry, batch):
    """What is not among the roads to a gradient and the analyses of one."""
    step, loss, *_ = full_problem()
    square, key = jnp.eye(3), jax.random.key(0)
    lstm = cells.lstm(INPUT, HIDDEN)
    states = lstm.initial_carry(())
    patients = dict(num_updates=2, num_seeds=1, num_steps=4, hidden_size=3, batch_size=2, num_heldout=2, num_draws=2)
    estimators = {"full": jbptt.full_bptt(step, loss), "blocks": jbptt.truncated_bptt(step, loss, window=2)}
    return {
        "step_jacobians": jbptt.step_jacobians(step, params, carry[0], batch.xs[:, 0]),
        "scan": jax.grad(lambda p: jnp.sum(jbptt.scan(partial(step, p), carry, batch.xs, segment=2)[1]))(params),
        "gate_paths": jbptt.analysis.gate_paths(lstm.init(key), states, batch.xs[:, 0]),
        "compare": jbptt.compare(estimators, params, carry, batch, reference="full", key=key, num_samples=2),
        "experiments.compare_remedies": jbptt.experiments.compare_remedies(key, **patients),
        "powers.eigenvalues": powers.eigenvalues(square, 3, symmetric=True),
        "powers.alignment": powers.alignment(square, square[0], 3, symmetric=True),
        "clip_cotangent": jax.grad(lambda h: jnp.sum(clipping.clip_cotangent(h, 1.0) ** 2))(carry),
        "tasks.copy": tasks.copy(key, length=2, delay=2, batch_size=2),
        "tasks.adding": tasks.adding(key, num_steps=4, batch_size=2),
        "tasks.recall": tasks.recall(key, num_steps=4, batch_size=2),
        "tasks.cross_entropy": tasks.cross_entropy(jnp.zeros((2, 3)), jnp.zeros(2, int)),
        "truncation.coverage": truncation.coverage(truncation.full(NUM_STEPS)),
        "truncation.window_coverage": truncation.window_coverage(NUM_STEPS, 4, 2),
    }


def programs():
    """`{name: function of (params, carry, batch)}`."""
    step, loss, *problem = full_problem()
    found = roads(step, loss, *problem) | analyses(step, loss)
    return found | {"train": clipped_training(step, loss), "others": others}


# What all roads are made of: gates, segments, blocks, overlapping windows and draws; analyses; whole training.
USUAL = ["unroll, fixed", "ragged strides", "randomized", "lag_profile", "train"]


@pytest.mark.parametrize("name", usual(USUAL, programs()))
def test_lowers_for_every_platform(name):
    _, _, *problem = full_problem()
    exported = jax.export.export(jax.jit(programs()[name]), platforms=PLATFORMS)(*problem)
    assert exported.platforms == PLATFORMS


@pytest.mark.more("test_lowers_for_every_platform")
def test_nothing_is_left_out():
    """Public functions are lowered above, by themselves or (gates, clippers, estimators) inside of what is."""
    lowered = {name.split(",")[0].split()[0] for name in programs()}
    lowered |= set(jax.eval_shape(others, *full_problem()[2:]))
    lowered |= {"full_bptt", "truncated_bptt", "gated_bptt", "randomized_bptt", "adaptive_bptt"}  # ESTIMATORS
    public = {name: getattr(jbptt, name) for name in dir(jbptt)}
    for room in (powers, tasks):
        public |= {f"{room.__name__.rsplit('.')[-1]}.{name}": value for name, value in vars(room).items()
                   if getattr(value, "__module__", None) == room.__name__}  # fmt: skip
    public |= {name: getattr(jbptt.analysis, name) for name in dir(jbptt.analysis)}
    public |= {f"experiments.{name}": getattr(jbptt.experiments, name) for name in dir(jbptt.experiments)}
    functions = {n for n, value in public.items() if inspect.isfunction(value) and not n.split(".")[-1].startswith("_")}
    assert functions - lowered - set(HOST) == {"tasks.on_tokens", "tasks.squared_error"}  # makes a cell; in all above
    assert not set(HOST) - functions


def test_what_does_not_lower_says_so():
    matrix = jnp.arange(9.0).reshape(3, 3)
    with pytest.raises(NotImplementedError, match="'eig' not found for platform tpu"):
        jax.export.export(jax.jit(lambda m: powers.eigenvalues(m, 2, symmetric=False)), platforms=["tpu"])(matrix)


@pytest.mark.parametrize("name", usual(["strides"], ["segments", "blocks", "strides", "randomized"]))
def test_a_training_loop_compiles_once(name):
    """Whatever the values: other parameters, inputs, masks, weights and keys are the same program."""
    step, loss, params, carry, batch = full_problem()
    batch = jax.tree.map(lambda a: a[:6], batch)  # whole chunks: the state keeps its structure
    estimator, optimizer = ESTIMATORS[name].make(step, loss), optax.sgd(0.1)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def update(params, state, opt_state, batch):
        estimate, state = estimator.update(params, state, batch)
        updates, opt_state = optimizer.update(estimate.grads, opt_state)
        return optax.apply_updates(params, updates), state, opt_state

    state, opt_state = estimator.init(params, carry, batch, jax.random.key(0)), optimizer.init(params)
    for i in range(4):
        piece = batch._replace(xs=batch.xs + i, mask=jnp.roll(batch.mask, i, 0), weights=batch.weights * i)
        params, state, opt_state = update(params, state, opt_state, piece)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params))


def test_a_ragged_stream_compiles_twice():
    """The first piece that breaks the pattern gives the state a phase; from then on it has one."""
    step, loss, params, carry, batch = full_problem()
    estimator = ESTIMATORS["ragged strides"].make(step, loss)
    update = jax.jit(chex.assert_max_traces(estimator.update, n=2))
    state = estimator.init(params, carry, jax.tree.map(lambda a: a[:4], batch))
    for _ in range(3):
        _, state = update(params, state, jax.tree.map(lambda a: a[:7], batch))


def test_probabilities_and_windows_are_values():
    """A sweep over them is one program."""

    @jax.jit
    @chex.assert_max_traces(n=1)
    def gates(keep_prob, window):
        drawn = truncation.randomized(jax.random.key(0), NUM_STEPS, keep_prob)
        return drawn + truncation.fixed(NUM_STEPS, window)

    assert len({float(gates(keep_prob, window).sum()) for keep_prob, window in ((0.5, 2), (0.9, 3))}) == 2
