"""The contract of every estimator: types, transformations, coverage, means, sums and streams."""

import functools
import importlib.util
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as checkpoint
import problems
import pytest
from contract import ESTIMATORS
from jax import export, lax
from jax.sharding import AxisType, PartitionSpec
from oracles import brute_force
from problems import EXAMPLES, assert_close, cut, usual

from jbptt import Batch, Estimate, testing

NUM_STEPS, NUM_BATCHES = 6, 3
KEY = jax.random.key(8)
# The usual run has one that streams and draws nothing, and one that draws. These differ from another by a number alone.
LIKE_ANOTHER = "segments", "strides", "random lengths", "without weights", "parallel strides"
NAMES = usual(["randomized", "uoro"], ESTIMATORS, full=LIKE_ANOTHER)
COVERING = [name for name, entry in ESTIMATORS.items() if entry.covers]
COVERED = usual(["ragged strides", "randomized"], COVERING, full=LIKE_ANOTHER)
STREAMING = [name for name, entry in ESTIMATORS.items() if entry.streams]
STREAMS = usual(["ragged strides"], STREAMING, full=LIKE_ANOTHER)
COVERED_STREAMS = usual(["ragged strides"], [n for n in STREAMING if n in COVERING], full=LIKE_ANOTHER)


@functools.cache
def stream():
    """A problem, and its batches stacked `[NUM_BATCHES, NUM_STEPS, ...]`, padded and weighted per example."""
    problem = problems.make("tanh+readout", NUM_STEPS * NUM_BATCHES)
    rng = np.random.default_rng(4)
    mask = rng.random((NUM_STEPS * NUM_BATCHES, EXAMPLES)) < 0.8
    mask[NUM_STEPS : NUM_STEPS + 3] = False  # for all examples in a row
    batch = problem.batch._replace(mask=jnp.asarray(mask), weights=jnp.asarray(rng.random(mask.shape)))
    stacked = jax.tree.map(lambda a: a.reshape(NUM_BATCHES, NUM_STEPS, *a.shape[1:]), batch)
    return problem._replace(batch=batch), stacked


@functools.cache
def compiled(name):
    """The estimator with its update compiled once for all tests."""
    (step, loss, *_), _ = stream()
    estimator = ESTIMATORS[name].make(step, loss)
    return estimator._replace(update=jax.jit(estimator.update))


def batch_number(i):
    return jax.tree.map(lambda a: a[i], stream()[1])


@pytest.mark.parametrize("name", NAMES)
def test_types(name):
    (_, _, params, carry, _), _ = stream()
    estimator = compiled(name)
    estimate, state = estimator.update(params, estimator.init(params, carry, batch_number(0), KEY), batch_number(0))
    assert isinstance(estimate, Estimate) and isinstance(estimate.info, dict)
    assert estimate.loss_sum.shape == estimate.weight_sum.shape == estimate.loss.shape == ()
    for tree in (estimate.grad_sum, estimate.grads):
        assert jax.tree.map(lambda a: (a.shape, a.dtype), tree) == jax.tree.map(lambda a: (a.shape, a.dtype), params)
    assert jax.tree.map(jnp.shape, state.carry) == jax.tree.map(jnp.shape, carry)
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, carry))
    halves = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.dtype == float else a, batch_number(0))
    shapes, _ = jax.eval_shape(estimator.update, narrow[0], estimator.init(*narrow, halves, KEY), halves)
    sums = jax.tree.leaves((shapes.loss_sum, shapes.grad_sum, shapes.weight_sum))
    assert {leaf.dtype for leaf in sums} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("name", usual(["full", "ragged strides", "randomized"], COVERING))
def test_gradient_is_the_covered_sum_and_the_mean_is_over_steps(name):
    (step, loss, params, carry, _), _ = stream()
    batch = batch_number(0)
    estimate, state = compiled(name).update(params, compiled(name).init(params, carry, batch, KEY), batch)
    pairs, losses, last = brute_force.pair_gradients(step, loss, params, carry, batch, (EXAMPLES,))
    total = np.sum(np.where(batch.mask, batch.weights, 0))
    grad = brute_force.covered(pairs, ESTIMATORS[name].coverage(NUM_STEPS, KEY), params)
    assert_close((estimate.loss_sum, estimate.grad_sum, estimate.weight_sum), (losses.sum(), grad, total))
    assert_close((estimate.loss, estimate.grads), jax.tree.map(lambda v: v / total, (losses.sum(), grad)))
    assert_close(state.carry, last)


@pytest.mark.parametrize("name", COVERED)
@pytest.mark.parametrize("num_steps", usual([7], [1, 7]))
def test_declared_coverage_is_what_probes_measure(name, num_steps):
    testing.assert_coverage(ESTIMATORS[name].make, num_steps=num_steps, key=KEY)


@pytest.mark.parametrize("name", COVERED_STREAMS)
@pytest.mark.parametrize(
    "split", usual([(4, 1, 2)], [(1,) * 7, (4, 1, 2), (2, 5), (3, 3, 1)], full=[(2, 5), (3, 3, 1)])
)
def test_coverage_of_a_stream_does_not_see_the_updates(name, split):
    testing.assert_coverage(ESTIMATORS[name].make, num_steps=7, split=split)


@pytest.mark.parametrize("name", STREAMS)
def test_every_split_gives_the_unsplit_total(name):
    """Padding, a stretch that is all padding, and pieces of every length among them."""
    (_, _, params, carry, batch), _ = stream()
    estimator = compiled(name)

    def total_of(split):
        state, total = None, None
        for start, stop in itertools.pairwise(np.cumsum((0, *split))):
            piece = cut(batch, start, stop)
            state = estimator.init(params, carry, piece, KEY) if state is None else state
            estimate, state = estimator.update(params, state, piece)
            total = estimate if total is None else total + estimate
        return (total.loss_sum, total.grad_sum, total.weight_sum), state.carry

    whole = total_of([NUM_STEPS * NUM_BATCHES])
    for split in ((6, 6, 6), (1, 5, 6, 5, 1), (5, 1, 6, 1, 5)):
        assert_close(total_of(split), whole)


@pytest.mark.parametrize("name", NAMES)
def test_finite_at_one_step(name):
    (_, _, params, carry, batch), _ = stream()
    one = cut(batch, 0, 1)
    estimate, state = compiled(name).update(params, compiled(name).init(params, carry, one, KEY), one)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((estimate.grads, estimate.loss, state.carry)))


@pytest.mark.parametrize("name", NAMES)
def test_jit_equals_eager(name):
    (step, loss, params, carry, _), _ = stream()
    batch, eager = cut(batch_number(0), 0, 2), ESTIMATORS[name].make(step, loss)
    state = eager.init(params, carry, batch, KEY)
    assert_close(compiled(name).update(params, state, batch)[0], eager.update(params, state, batch)[0])


@pytest.mark.parametrize("name", NAMES)
def test_training_scans_under_vmap(name):
    """Whole runs with carried state as one scan, vmapped over parameters and keys, equal Python loops."""
    (step, loss, params, carry, _), batches = stream()
    estimator, optimizer = ESTIMATORS[name].make(step, loss), optax.sgd(0.05)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), batches)

    def train_step(training, batch):
        params, opt_state, state = training
        estimate, state = estimator.update(params, state, batch)
        updates, opt_state = optimizer.update(estimate.grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, state), estimate.loss

    def start(scale, key):
        own = jax.tree.map(lambda p: scale * p, params)
        return own, optimizer.init(own), estimator.init(own, carry, shapes, key)

    def run(scale, key):
        (params, _, state), losses = jax.lax.scan(train_step, start(scale, key), batches)
        return params, state.carry, losses

    scales, keys, once = jnp.array([0.5, 1.0]), jax.random.split(KEY, 2), jax.jit(train_step)
    together = jax.jit(jax.vmap(run))(scales, keys)
    for i in range(2):
        looped, losses = start(scales[i], keys[i]), []
        for n in range(NUM_BATCHES):
            looped, value = once(looped, batch_number(n))
            losses.append(value)
        wanted = looped[0], looped[2].carry, jnp.stack(losses)
        assert_close(jax.tree.map(lambda a, i=i: a[i], together), wanted, rtol=1e-11)
        assert len({float(value) for value in losses}) == NUM_BATCHES


@pytest.mark.parametrize("name", NAMES)
def test_estimates_of_batches_add(name):
    """Weighted by their weights, not as a mean of means."""
    (_, _, params, carry, _), _ = stream()
    estimator = compiled(name)
    one, state = estimator.update(params, estimator.init(params, carry, batch_number(0), KEY), batch_number(0))
    two, _ = estimator.update(params, state, batch_number(2))
    both = one + two
    assert_close(both.loss, (one.loss_sum + two.loss_sum) / (one.weight_sum + two.weight_sum))
    combined = jax.tree.map(lambda a, b: a * one.weight_sum + b * two.weight_sum, one.grads, two.grads)
    assert_close(both.grads, jax.tree.map(lambda a: a / both.weight_sum, combined))


@pytest.mark.parametrize("name", NAMES)
def test_init_reads_only_shapes(name):
    step, loss, params, carry, batch = problems.make("gru+reset", NUM_STEPS)
    batch = Batch(*batch[:2], mask=jnp.ones((NUM_STEPS, EXAMPLES), bool), weights=jnp.ones(NUM_STEPS))
    estimator = ESTIMATORS[name].make(step, loss)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), batch)
    state = estimator.init(params, carry, shapes, KEY)
    problems.assert_same_bits(state, estimator.init(params, carry, batch, KEY))
    problems.assert_same_bits(state.carry, carry)
    jax.eval_shape(estimator.update, params, state, batch)


@pytest.mark.parametrize("name", NAMES)
def test_states_can_be_donated_pickled_saved_and_exported(name, tmp_path):
    """Keys among them: typed keys are pickled and saved as they are."""
    (step, loss, params, carry, _), _ = stream()
    estimator = ESTIMATORS[name].make(step, loss)

    def first():
        own = jax.tree.map(jnp.array, carry)  # what is donated is gone: the user's own carry and key would be
        return estimator.init(params, own, batch_number(0), jax.random.key(8))

    donating = jax.jit(estimator.update, donate_argnums=1)
    wanted, state = compiled(name).update(params, first(), batch_number(0))
    again = compiled(name).update(params, state, batch_number(1))
    found, moved = donating(params, first(), batch_number(0))
    problems.assert_same_bits((found, moved), (wanted, state))

    pickled = pickle.loads(pickle.dumps(state))
    problems.assert_same_bits(pickled, state)
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(checkpoint.utils.to_shape_dtype_struct, state))
    problems.assert_same_bits(restored, state)
    problems.assert_same_bits(donating(params, moved, batch_number(1)), again)

    exported = export.export(compiled(name).update)(params, state, batch_number(1))
    if importlib.util.find_spec("flatbuffers"):
        exported = export.deserialize(exported.serialize())
    assert_close(exported.call(params, pickled, batch_number(1))[0], again[0])


@pytest.mark.parametrize("check", [True, pytest.param(False, marks=pytest.mark.full)], ids=["checked", "unchecked"])
@pytest.mark.parametrize("name", NAMES)
def test_inside_a_shard_map_as_alone(name, check):
    """Two updates as a scan, whose state must keep its type. A mesh of one device: types are checked all the same."""
    (step, loss, params, carry, _), batches = stream()
    estimator = ESTIMATORS[name].make(step, loss)
    two = jax.tree.map(lambda a: a[:2], batches)

    def run(params, carry, batches):
        state = estimator.init(params, carry, jax.tree.map(lambda a: a[0], batches), KEY)

        def body(state, batch):
            estimate, state = estimator.update(params, state, batch)
            return state, jax.tree.map(lambda a: lax.psum(a, "examples"), (estimate.loss_sum, estimate.weight_sum))

        return lax.scan(body, state, batches)[1]

    mesh, examples = jax.make_mesh((1,), ("examples",), axis_types=(AxisType.Auto,)), PartitionSpec("examples")
    specs = PartitionSpec(), examples, jax.tree.map(lambda a: PartitionSpec(None, None, *examples), two)
    mapped = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=check)
    losses, _ = jax.jit(mapped)(params, carry, two)
    wanted, state = [], estimator.init(params, carry, batch_number(0), KEY)
    for i in range(2):
        estimate, state = compiled(name).update(params, state, batch_number(i))
        wanted.append(estimate.loss_sum)
    assert_close(losses, jnp.stack(wanted))
