"""Training as one scan against a Python loop over updates; evaluation against a loop over steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from oracles import python_loop
from oracles.brute_force import per_example
from problems import EXAMPLES, assert_close, cut, usual, usual_rows

from jbptt import Batch, cells, full_bptt, randomized_bptt, tasks, train, truncated_bptt
from jbptt.clipping import clip_by_global_norm
from jbptt.experiments.training import mean_loss

NUM_BATCHES, NUM_STEPS = 5, 4
OPTIMIZER = optax.chain(clip_by_global_norm(0.5), optax.adam(0.05))
ESTIMATORS = {
    "full": full_bptt,
    "blocks": functools.partial(truncated_bptt, window=NUM_STEPS),
    "sliding, windows over batches": functools.partial(truncated_bptt, window=7, stride=3),
    "randomized": functools.partial(randomized_bptt, keep_prob=0.6),
}


@functools.cache
def stacked_problem(cell="tanh+readout", *, weighted=True):
    """A stream cut into batches `[N, T, ...]`, with padding and weights per example."""
    step, loss, params, carry, stream = problems.make(cell, NUM_BATCHES * NUM_STEPS)
    rng = np.random.default_rng(11)
    if weighted:
        shape = (NUM_BATCHES * NUM_STEPS, EXAMPLES)
        stream = stream._replace(mask=rng.random(shape) < 0.8, weights=rng.random(shape))
    batches = jax.tree.map(lambda a: jnp.reshape(a, (NUM_BATCHES, NUM_STEPS, *a.shape[1:])), stream)
    return step, loss, params, carry, batches, stream


def as_numbers(tree):
    return jax.tree.map(lambda a: np.asarray(a, float), tree)


@functools.cache
def estimator_of(name, cell="tanh+readout"):
    """One for each name and cell, so that the loop is compiled once."""
    return ESTIMATORS[name](*stacked_problem(cell)[:2])


@functools.cache
def one_update(estimator):
    @jax.jit
    def one(params, state, opt_state, batch):
        estimate, state = estimator.update(params, state, batch)
        updates, opt_state = OPTIMIZER.update(estimate.grads, opt_state, params)
        size = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(estimate.grads)))
        return optax.apply_updates(params, updates), state, opt_state, (estimate.loss, size, estimate.info)

    return one


def loop(estimator, params, carry, batches, key=None, policy="propagate"):
    """One update after another in Python: parameters, states and what was seen, after each of them."""
    state = estimator.init(params, carry, batch_of(batches, 0), key)
    running, stopped, rows = (params, state, OPTIMIZER.init(params)), False, []
    for n in range(len(batches.xs)):
        *new, row = one_update(estimator)(*running, batch_of(batches, n))
        finite = all(np.isfinite(a).all() for a in (row[0], row[1]))
        stopped = stopped or (policy == "stop" and not finite)
        if not stopped and (policy == "propagate" or finite):
            running = new
        rows.append((*running, row, finite))
    return rows


def batch_of(batches, n):
    return jax.tree.map(lambda a: a[n], batches)


def check_against(rows, params, history):
    """The history is that of the loop."""
    assert_close(params, rows[-1][0])
    assert_close(history.state.carry, rows[-1][1].carry)
    assert_close(as_numbers(history.opt_state), as_numbers(rows[-1][2]))
    seen = jax.tree.map(lambda *a: jnp.stack(a), *(row[3] for row in rows))
    assert_close((history.loss, history.grad_norm, history.info), seen)
    assert history.finite.tolist() == [row[4] for row in rows]


@pytest.mark.parametrize("name", usual(["randomized"], ESTIMATORS))
def test_train_is_a_loop_over_updates(name):
    _, _, params, carry, batches, _ = stacked_problem()
    estimator, key = estimator_of(name), jax.random.key(3)
    found, history = jax.jit(functools.partial(train, estimator, OPTIMIZER))(params, carry, batches, key=key)
    check_against(loop(estimator, params, carry, batches, key), found, history)
    assert len(set(np.asarray(history.loss).tolist())) == NUM_BATCHES
    assert history.applied.all() and history.updates.tolist() == [*range(NUM_BATCHES)]


def test_plain_descent_by_hand():
    """Two updates of full BPTT with SGD: parameters, losses and norms from the loop over steps."""
    step, loss, params, carry, batches, _ = stacked_problem("tanh", weighted=False)
    descend = jax.jit(functools.partial(train, full_bptt(step, loss), optax.sgd(0.1)))
    found, history = descend(params, carry, cut(batches, 0, 2))
    for n in range(2):
        batch = jax.tree.map(lambda a, n=n: a[n], batches)
        xs, targets = np.asarray(batch.xs), np.asarray(batch.targets)
        value, grad = python_loop.tanh_rnn(params, carry, xs, targets, np.ones(NUM_STEPS))
        count = NUM_STEPS * EXAMPLES
        np.testing.assert_allclose(history.loss[n], value / count, rtol=1e-12)
        size = np.sqrt(sum(np.sum(g**2) for g in grad.values()))
        np.testing.assert_allclose(history.grad_norm[n], size / count, rtol=1e-12)
        for x in xs:  # the carry goes on with the parameters that the batch was read with
            carry = jnp.tanh(x @ params["w_x"] + carry @ params["w_h"] + params["b"])
        params = {name: params[name] - 0.1 * grad[name] / count for name in params}
    assert_close(found, params)
    assert_close(history.state.carry, carry)


@pytest.mark.parametrize("name", usual(["randomized"], ["sliding, windows over batches", "randomized"]))
def test_training_goes_on_where_it_stopped(name):
    step, loss, params, carry, batches, _ = stacked_problem("tanh")
    run = jax.jit(functools.partial(train, ESTIMATORS[name](step, loss), OPTIMIZER))
    whole, history = run(params, carry, batches, key=jax.random.key(4))
    half, one = run(params, carry, cut(batches, 0, 2), key=jax.random.key(4))
    nowhere = jax.tree.map(lambda c: jnp.full_like(c, jnp.nan), carry)  # not read where a state is given
    resumed, two = run(half, nowhere, cut(batches, 2, NUM_BATCHES), state=one.state, opt_state=one.opt_state)
    assert_close(resumed, whole)
    assert_close(jnp.concatenate([one.loss, two.loss]), history.loss)
    assert_close(as_numbers(two.opt_state), as_numbers(history.opt_state))
    assert_close(two.state.carry, history.state.carry)


def test_vmap_over_seeds_is_a_loop():
    cell = cells.with_linear_readout(cells.rnn(problems.INPUT, problems.HIDDEN), problems.OUTPUT)
    _, loss, _, _, batches, _ = stacked_problem()
    estimator = ESTIMATORS["randomized"](cell.step, loss)

    def run(key):
        init_key, key = jax.random.split(key)
        return train(estimator, OPTIMIZER, cell.init(init_key), cell.initial_carry((EXAMPLES,)), batches, key=key)

    keys = jax.random.split(jax.random.key(5), 3)
    params, history = jax.jit(jax.vmap(run))(keys)
    compiled = jax.jit(run)
    for i, key in enumerate(keys):
        one, alone = compiled(key)
        assert_close(jax.tree.map(lambda p, i=i: p[i], params), one)
        assert_close((history.loss[i], history.grad_norm[i]), (alone.loss, alone.grad_norm))
    assert len(set(np.asarray(history.loss[:, 0]).tolist())) == 3
    pytest.importorskip("xarray")
    data = history.to_xarray()
    assert data.loss.dims == ("axis_0", "update")
    np.testing.assert_array_equal(data.grad_norm.isel(axis_0=1).sel(update=2), history.grad_norm[1, 2])
    for path, leaf in jax.tree.leaves_with_path(history.info):
        named = data[f"info{jax.tree_util.keystr(path)}"]
        assert named.dims[:2] == ("axis_0", "update") and named.shape == leaf.shape


def test_optimizer_state_keeps_its_dtypes_in_float32():
    """Narrow parameters beside x64: the scan over updates needs states of constant dtype."""
    cell = cells.rnn(2, 3, dtype=jnp.float32)
    batches = Batch(jnp.ones((3, 4, 2, 2), jnp.float32), jnp.zeros((3, 4, 2, 3), jnp.float32))
    run = jax.jit(functools.partial(train, full_bptt(cell.step, tasks.squared_error), OPTIMIZER))
    params, history = run(cell.init(jax.random.key(0)), cell.initial_carry((2,)), batches)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
    assert np.all(np.isfinite(history.loss))


@pytest.mark.parametrize("cell", usual(["tanh+readout"], ["tanh+readout", "lstm"]))
def test_evaluate_is_a_loop_over_steps(cell):
    step, loss, params, carry, batches, stream = stacked_problem(cell)
    weights = per_example(stream.weights, (EXAMPLES,), NUM_BATCHES * NUM_STEPS, 1.0) * np.asarray(stream.mask)
    total, last = 0.0, carry
    for t in range(NUM_BATCHES * NUM_STEPS):
        x, target, mask = (np.asarray(a)[t] for a in (stream.xs, stream.targets, stream.mask))
        last, value = python_loop.forward_step(step, loss, params, last, x, target, mask, weights[t])
        total += value
    spoiled = batches._replace(
        xs=jnp.where(batches.mask[..., None], batches.xs, jnp.nan),
        targets=jnp.where(batches.mask[..., None], batches.targets, jnp.inf),
    )
    run = jax.jit(functools.partial(mean_loss, step, loss))
    np.testing.assert_allclose(run(params, carry, batches), total / weights.sum(), rtol=1e-12)
    np.testing.assert_allclose(run(params, carry, spoiled), total / weights.sum(), rtol=1e-12)
    assert float(run(params, carry, batches._replace(weights=jnp.zeros_like(batches.weights)))) == 0.0
    merged = jax.tree.map(lambda a: a[None], stream)
    np.testing.assert_allclose(run(params, carry, merged), total / weights.sum(), rtol=1e-12)


def test_learning_reduces_the_held_out_loss():
    """A text that repeats is learnt: from guessing to almost certain."""
    data = tasks.text("abcd" * 400, num_steps=8, batch_size=4)
    size = len(data.vocabulary)
    cell = tasks.on_tokens(cells.with_linear_readout(cells.rnn(size, 4), size), size)
    params, carry = cell.init(jax.random.key(6)), cell.initial_carry((4,))
    estimator = truncated_bptt(cell.step, tasks.cross_entropy, window=4)
    held = jax.jit(functools.partial(mean_loss, cell.step, tasks.cross_entropy))
    trained, history = jax.jit(functools.partial(train, estimator, optax.adam(0.05)))(params, carry, data.train)
    assert held(params, carry, data.heldout) > np.log(size) / 2
    assert held(trained, carry, data.heldout) < 0.2
    assert history.loss[-1] < history.loss[0] / 3


def test_a_randomized_estimator_needs_a_key():
    step, loss, params, carry, batches, _ = stacked_problem("tanh")
    with pytest.raises(ValueError, match="needs a key"):
        train(ESTIMATORS["randomized"](step, loss), OPTIMIZER, params, carry, batches)


@pytest.mark.parametrize("every", usual([2], [1, 2, 3, NUM_BATCHES, NUM_BATCHES + 1]))
def test_evaluations_are_those_of_a_loop(every):
    """After every so many updates, the live carry with it; the updates left over are made, too."""
    _, _, params, carry, batches, _ = stacked_problem()
    estimator, key = estimator_of("randomized"), jax.random.key(3)
    evaluate = lambda params, carry: {"params": params, "carry": carry}
    run = functools.partial(train, estimator, OPTIMIZER, eval_fn=evaluate, eval_every=every)
    found, history = jax.jit(run)(params, carry, batches, key=key, num_done=jnp.array(10))
    rows = loop(estimator, params, carry, batches, key)
    check_against(rows, found, history)
    assert history.updates.tolist() == [*range(10, 10 + NUM_BATCHES)]
    assert history.eval_updates.tolist() == [*range(10 + every, 11 + NUM_BATCHES, every)]
    for i, n in enumerate(range(every, NUM_BATCHES + 1, every)):
        given = {"params": rows[n - 1][0], "carry": rows[n - 1][1].carry}
        assert_close(jax.tree.map(lambda a, i=i: a[i], history.evals), given)
    assert all(len(a) == NUM_BATCHES // every for a in jax.tree.leaves(history.evals))


@pytest.mark.parametrize(
    ("name", "policy"),
    usual_rows(
        [("randomized", "stop")],
        [
            ("randomized", "propagate"),
            ("randomized", "skip"),
            ("randomized", "stop"),
            ("sliding, windows over batches", "skip"),
        ],
    ),
)
def test_an_update_that_is_not_finite(name, policy):
    """Kept out, it leaves parameters, optimizer, carry and key as they were; stopped, so do the others."""
    _, _, params, carry, batches, _ = stacked_problem()
    estimator, key = estimator_of(name), jax.random.key(3)
    broken = batches._replace(xs=batches.xs.at[2].set(jnp.nan))
    run = jax.jit(functools.partial(train, estimator, OPTIMIZER, nonfinite=policy))
    found, history = run(params, carry, broken, key=key)
    check_against(loop(estimator, params, carry, broken, key, policy), found, history)
    number = {"propagate": NUM_BATCHES, "skip": NUM_BATCHES - 1, "stop": 2}[policy]
    assert int(history.applied.sum()) == number and bool(history.stopped) == (policy == "stop")
    if policy != "propagate":
        kept = NUM_BATCHES if policy == "skip" else 2
        without = jax.tree.map(lambda a: jnp.concatenate([a[:2], a[3:kept]]), broken)
        assert_close(found, loop(estimator, params, carry, without, key)[-1][0])
    if policy == "stop":  # as it stays in a call that goes on
        states = {"state": history.state, "opt_state": history.opt_state, "stopped": history.stopped}
        later, after = run(found, None, batches, **states)
        assert_close(later, found)
        assert not after.applied.any() and after.finite.all() and after.stopped


@pytest.mark.parametrize("policy", usual(["skip"], ["propagate", "skip", "stop"]))
def test_a_run_that_breaks_leaves_its_neighbours_alone(policy):
    """Under vmap, bit for bit, and a broken one stays alone, too."""
    _, _, params, carry, batches, _ = stacked_problem()
    estimator, broken = estimator_of("randomized"), batches.xs.at[1, 0, 0, 0].set(jnp.inf)

    def one(xs, key):
        options = {"nonfinite": policy, "eval_fn": lambda params, carry: carry, "eval_every": 2}
        return train(estimator, OPTIMIZER, params, carry, batches._replace(xs=xs, mask=None), key=key, **options)

    run, keys = jax.jit(jax.vmap(one)), jax.random.split(jax.random.key(7), 3)
    whole = run(jnp.stack([batches.xs] * 3), keys)
    found = run(jnp.stack([batches.xs, broken, batches.xs]), keys)
    for i in (0, 2):
        jax.tree.map(np.testing.assert_array_equal, *(as_bits(tree, i) for tree in (found, whole)))
    later = policy != "stop"
    assert found[1].applied[1].tolist() == [True, policy == "propagate", later, later, later]
    assert found[1].finite[::2].all() and not found[1].finite[1, 1]


def as_bits(tree, i):
    keys = lambda a: jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a
    return jax.tree.map(lambda a: np.asarray(keys(a[i])), tree)


@pytest.mark.more("test_a_run_that_breaks_leaves_its_neighbours_alone")
@pytest.mark.parametrize("policy", ["propagate", "skip", "stop"])
def test_runs_on_devices_break_by_themselves(policy):
    """In a shard_map, whose types say what differs between devices, `stopped` too."""
    step, loss, params, carry, batches, _ = stacked_problem("tanh")
    options = {"nonfinite": policy, "eval_fn": lambda params, carry: carry, "eval_every": 2}
    run = functools.partial(train, full_bptt(step, loss), optax.sgd(0.1), **options)

    def one(params, carry):
        own = jax.tree.map(lambda a: a[0], (params, carry))
        return jax.tree.map(lambda a: a[None], run(*own, batches)[1].applied)

    mesh = jax.make_mesh((1,), ("runs",), axis_types=(jax.sharding.AxisType.Auto,))
    runs = jax.sharding.PartitionSpec("runs")
    mapped = jax.shard_map(one, mesh=mesh, in_specs=runs, out_specs=runs)
    given = jax.tree.map(lambda a: a[None], (params, carry))
    assert jax.eval_shape(mapped, *given).shape == (1, NUM_BATCHES)


def test_one_broken_entry_of_a_large_gradient_is_found():
    """The loss is finite, and XLA's maximum on CPU does not see the NaN."""
    params = jnp.ones(5000)
    estimator = full_bptt(lambda params, carry, x: (carry, params * x), lambda y, target: jnp.sum(jnp.sqrt(y)))
    batches = Batch(jnp.ones((2, 1, 5000)).at[0, 0, 4321].set(0.0))
    run = jax.jit(functools.partial(train, estimator, optax.sgd(0.1), nonfinite="skip"))
    found, history = run(params, jnp.zeros(()), batches)
    assert np.isfinite(history.loss).all() and history.finite.tolist() == [False, True]
    assert np.isfinite(found).all()


@pytest.mark.more("test_evaluations_are_those_of_a_loop")
@pytest.mark.parametrize(
    ("name", "policy"), [("full", "skip"), ("full", "stop"), ("sliding, windows over batches", "skip")]
)
def test_a_learned_start_is_evaluated_and_skipped_too(name, policy):
    """Its first update stands before the scan; kept out, the carry is the start's value."""
    _, _, params, _, batches, _ = stacked_problem("tanh")
    start = lambda params: jnp.broadcast_to(params["b"], (EXAMPLES, problems.HIDDEN))
    estimator = estimator_of(name, "tanh")
    options = {"eval_fn": lambda params, carry: (params, carry), "eval_every": 2, "nonfinite": policy}
    run = jax.jit(functools.partial(train, estimator, OPTIMIZER, **options), static_argnums=1)
    found, history = run(params, start, batches)
    rows = loop(estimator, params, start, batches)
    check_against(rows, found, history)
    assert_close(jax.tree.map(lambda a: a[1], history.evals), (rows[3][0], rows[3][1].carry))
    broken = batches._replace(xs=batches.xs.at[0].set(jnp.nan))
    found, history = run(params, start, broken)
    wanted = (params, start(params))
    if policy == "skip":
        *_, (last, state, *_) = loop(estimator, params, start(params), cut(broken, 1, NUM_BATCHES))
        wanted = last, state.carry
    assert_close((found, history.state.carry), wanted)
    assert int(history.applied.sum()) == {"skip": NUM_BATCHES - 1, "stop": 0}[policy]


@pytest.mark.more("test_evaluations_are_those_of_a_loop")
def test_under_vmap_an_evaluation_is_computed_where_it_is_asked_for():
    """And the dataset names its axis."""
    step, loss, params, carry, batches, _ = stacked_problem("tanh")
    seen = []

    def evaluate(params, carry):
        jax.debug.callback(seen.append, params["b"][0])
        return {"b": params["b"], "n": 1}

    options = {"eval_fn": evaluate, "eval_every": 2, "nonfinite": "stop", "num_done": 4}
    run = lambda params: train(full_bptt(step, loss), OPTIMIZER, params, carry, batches, **options)[1]
    history = jax.jit(jax.vmap(run))(jax.tree.map(lambda a: jnp.stack([a, 2 * a]), params))
    jax.effects_barrier()
    found = np.ravel(history.evals["b"][..., 0]).tolist()
    assert sorted(map(float, seen)) == sorted(found) and len(seen) == 4
    pytest.importorskip("xarray")
    data = history.to_xarray()
    assert data["evals['b']"].dims == ("axis_0", "eval_update", "evals['b']_0")
    assert data["evals['n']"].dims == ("axis_0", "eval_update")
    assert data.eval_update.values.tolist() == [6, 8] and data["update"].values.tolist() == [4, 5, 6, 7, 8]
    np.testing.assert_array_equal(data["evals['b']"].isel(axis_0=1).sel(eval_update=8), history.evals["b"][1, 1])
    assert data.applied.dims == data.finite.dims == ("axis_0", "update") and bool(data.applied.all())


def test_aux_of_the_loss_is_in_the_history():
    step, loss, params, carry, batches, _ = stacked_problem("tanh")
    with_aux = lambda y, target: (loss(y, target), {"size": jnp.abs(y)})
    run = jax.jit(functools.partial(train, full_bptt(step, with_aux), optax.sgd(0.0)))
    _, history = run(params, carry, batches)
    for n in range(NUM_BATCHES):
        total, weights = 0.0, np.asarray(batches.weights[n] * batches.mask[n])
        for t in range(NUM_STEPS):
            new, y = step(params, carry, batches.xs[n, t])
            carry = jnp.where(batches.mask[n, t][:, None], new, carry)
            total += weights[t] @ np.abs(y)
        np.testing.assert_allclose(history.info["aux"]["size"][n], total / weights.sum(), rtol=1e-12)


BAD = {
    "eval_every alone": (
        {"eval_every": 2},
        "eval_fn and eval_every belong together, got eval_fn=None and eval_every=2",
    ),
    "eval_fn alone": ({"eval_fn": max}, "eval_fn and eval_every belong together"),
    "no function": ({"eval_fn": 3.0, "eval_every": 2}, "eval_fn must be a function .* got 3.0; pass what computes"),
    "no evaluation": ({"eval_fn": max, "eval_every": 0}, "eval_every must be an integer >= 1, got 0"),
    "half an update": ({"eval_fn": max, "eval_every": 0.5}, "eval_every must be an integer >= 1, got 0.5"),
    "another policy": (
        {"nonfinite": "raise"},
        "nonfinite must be one of propagate, skip, stop, got 'raise'.*clipping",
    ),
    "less than none": ({"num_done": -1}, "num_done must be an integer >= 0, got -1"),
}


def refused(given, message, batches=None, call=train, **options):
    """A ValueError before the step is so much as traced."""
    calls = []
    step = lambda params, carry, x: calls.append(0)
    batches = Batch(jnp.ones((3, 4, 2)), jnp.zeros((3, 4, 2))) if batches is None else batches
    with pytest.raises(ValueError, match=message):
        call(full_bptt(step, tasks.squared_error), OPTIMIZER, {}, jnp.zeros(2), batches, **given, **options)
    assert not calls


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_refused(name):
    refused(*BAD[name])


@pytest.mark.parametrize("shapes", [((0, 4), (0, 4)), ((3, 4), (2, 4)), ((), ())])
def test_batches_agree_on_their_number(shapes):
    message = "batches must have leaves .* one N >= 1, got shapes .*targets"
    refused({}, message, Batch(*map(jnp.ones, shapes)))
