"""Padding, masks and weights: garbage changes nothing, and every mean is over steps and examples."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from contract import ESTIMATORS
from oracles import brute_force
from problems import EXAMPLES, assert_close, assert_same_bits, cut, one_update, usual, usual_rows

from jbptt import Batch, cells, full_bptt, truncated_bptt, unroll

NUM_STEPS = 6
NAMES = ["full", "segments", "blocks", "ragged blocks", "strides", "sliding", "gated", "randomized"]


def per_example_mask():
    """Padding at the front, inside and at the end, a row of the batch that is all padding, T = 2·B."""
    mask = np.ones((NUM_STEPS, EXAMPLES), bool)
    mask[:1, 0] = mask[2:4, 0] = mask[5:, 0] = mask[:, 2] = False
    return mask


MASKS = {"[T]": np.array([True, True, False, False, True, False]), "[T, B]": per_example_mask()}


COMBINATIONS = [(name, "[T]") for name in ("full", "blocks", "strides")]
COMBINATIONS += [(name, "[T, B]") for name in NAMES]


def embedded_problem():
    """xs = (token, vector): integer inputs look up an embedding; a norm loss, whose slope at 0 is infinite."""
    cell = cells.with_readout(problems.cell_core("tanh"), problems.readout)
    base = problems.make("tanh+readout", NUM_STEPS)
    params = {**base.params, "embedding": jnp.asarray(np.random.default_rng(5).normal(size=(4, problems.INPUT)))}

    def core(params, carry, x):
        token, vector = x
        return cell.core(params, carry, params["embedding"][token] * vector)

    def loss(y, target):
        return jnp.linalg.norm(y - target[0], axis=-1) * (1.0 + target[1]), {"label": target[1].astype(float)}

    tokens, labels = np.random.default_rng(6).integers(0, 4, size=(2, NUM_STEPS, EXAMPLES))
    batch = Batch((jnp.asarray(tokens), base.batch.xs), (base.batch.targets, jnp.asarray(labels)))
    return cells.with_readout(core, problems.readout), loss, params, base.carry, batch


def fill(tree, mask, number, integer):
    """Puts garbage under a False mask."""

    def one(leaf):
        where = mask.reshape(mask.shape + (1,) * (leaf.ndim - mask.ndim))
        return jnp.where(where, leaf, jnp.asarray(integer if leaf.dtype == int else number, leaf.dtype))

    return jax.tree.map(one, tree)


GARBAGE = [(0.0, 0), (np.nan, 10**9), (np.inf, -(10**9)), (-1e308, 2**62)]


@pytest.mark.parametrize(("name", "kind"), usual_rows([("full", "[T]"), ("strides", "[T, B]")], COMBINATIONS))
def test_garbage_in_padding_changes_no_bit_of_an_estimate(name, kind):
    step, loss, params, carry, batch = embedded_problem()
    estimator = ESTIMATORS[name].make(step, loss)
    mask = MASKS[kind]

    @jax.jit
    def run(batch):
        state = estimator.init(params, carry, batch, jax.random.key(0))
        estimate, state = estimator.update(params, state, batch)
        again, state = estimator.update(params, state, batch)  # windows may reach into the padding before
        return estimate, again, state.carry, again.loss, again.grads

    clean, *dirty = (
        run(Batch(fill(batch.xs, mask, *garbage), fill(batch.targets, mask, *garbage), jnp.asarray(mask)))
        for garbage in GARBAGE
    )
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(clean[0].grad_sum))
    for other in dirty:
        assert_same_bits(other, clean)


@pytest.mark.parametrize("kind", usual(["[T, B]"], MASKS))
@pytest.mark.parametrize("segment", usual([4], [None, 4]))
def test_garbage_in_padding_changes_no_bit_of_unroll(kind, segment):
    step, _, params, carry, batch = embedded_problem()
    mask = jnp.asarray(MASKS[kind])

    @jax.jit
    def run(xs):
        def total(params, carry):
            last, ys = unroll(step, params, carry, xs, mask=mask, segment=segment)
            return jnp.sum(ys**2) + sum(jnp.sum(leaf) for leaf in jax.tree.leaves(last)), (last, ys)

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, carry)

    clean, *dirty = (run(fill(batch.xs, mask, *garbage)) for garbage in GARBAGE)
    for other in dirty:
        assert_same_bits(other, clean)
    padded = ~np.broadcast_to(mask.reshape(mask.shape + (1,) * (2 - mask.ndim)), (NUM_STEPS, EXAMPLES))
    assert not np.any(np.asarray(clean[0][1][1])[padded])  # ys are zero there


def test_masked_steps_hold_the_carry():
    step, _, params, carry, batch = problems.make("lstm", NUM_STEPS)
    mask = per_example_mask()
    last, _ = jax.jit(functools.partial(unroll, step))(params, carry, batch.xs, mask=mask)
    run = jax.jit(step)
    for example in range(EXAMPLES):
        own = jax.tree.map(lambda leaf, e=example: leaf[e], carry)
        for t in np.flatnonzero(mask[:, example]):
            own, _ = run(params, own, batch.xs[t, example])
        assert_close(jax.tree.map(lambda leaf, e=example: leaf[e], last), own)
    assert_same_bits(*(jax.tree.map(lambda leaf: leaf[2], tree) for tree in (last, carry)))


@pytest.mark.parametrize(("name", "kind"), usual_rows([("strides", "[T]"), ("full", "[T, B]")], COMBINATIONS[:-1]))
def test_masks_and_weights_follow_the_contract(name, kind):
    """A masked step counts for windows and lags, holds the carry, has no source and no loss."""
    step, loss, params, carry, batch = problems.make("tanh+readout", NUM_STEPS)
    rng = np.random.default_rng(9)
    weights = rng.random(NUM_STEPS) if kind == "[T, B]" else rng.random((NUM_STEPS, EXAMPLES))
    batch = batch._replace(mask=jnp.asarray(MASKS[kind]), weights=jnp.asarray(weights))
    entry = ESTIMATORS[name]
    estimate = jax.jit(functools.partial(one_update, entry.make(step, loss)))(params, carry, batch)
    pairs, losses, _ = brute_force.pair_gradients(step, loss, params, carry, batch, (EXAMPLES,))
    total = np.sum(
        brute_force.per_example(batch.mask, (EXAMPLES,), NUM_STEPS, True)
        * brute_force.per_example(weights, (EXAMPLES,), NUM_STEPS, 1.0)
    )
    grad = brute_force.covered(pairs, entry.coverage(NUM_STEPS, jax.random.key(0)), params)
    assert_close((estimate.loss_sum, estimate.grad_sum, estimate.weight_sum), (losses.sum(), grad, total))
    assert_close((estimate.loss, estimate.grads), jax.tree.map(lambda v: v / total, (losses.sum(), grad)))


def test_axes_align_on_the_left_when_steps_and_examples_are_as_many():
    """[T] masks and weights with T = B belong to steps, whatever NumPy's trailing rule says."""
    step, loss, params, carry, batch = problems.make("tanh", EXAMPLES)
    by_step = np.array([0.5, 2.0, 3.0])
    run = jax.jit(functools.partial(one_update, full_bptt(step, loss)))
    for weights, mask in ((by_step, None), (None, by_step > 1)):
        wide = [a if a is None else jnp.tile(a[:, None], (1, EXAMPLES)) for a in (weights, mask)]
        narrow = run(params, carry, batch._replace(weights=weights, mask=mask))
        assert_close(narrow, run(params, carry, batch._replace(weights=wide[0], mask=wide[1])))
        turned = [a if a is None else a.T for a in wide]
        other = run(params, carry, batch._replace(weights=turned[0], mask=turned[1]))
        assert abs(narrow.loss - other.loss) > 1e-3


@pytest.mark.parametrize("name", usual(["full"], ["full", "blocks", "sliding"]))
def test_ragged_rows_equal_their_own_sequences(name):
    """A padded batch is the sum of its rows, each run alone at its true length."""
    step, loss, params, carry, batch = problems.make("tanh+readout", NUM_STEPS)
    lengths = [6, 4, 1]
    mask = np.arange(NUM_STEPS)[:, None] < np.array(lengths)
    run = jax.jit(functools.partial(one_update, ESTIMATORS[name].make(step, loss)))
    together = run(params, carry, batch._replace(mask=mask))
    rows = []
    for e, n in enumerate(lengths):
        own_carry, own = jax.tree.map(lambda a, e=e: a[e], carry), jax.tree.map(lambda a, e=e: a[:, e], batch)
        rows.append(run(params, own_carry, cut(own, 0, n)))
    alone = functools.reduce(lambda a, b: a + b, rows)
    assert_close(
        (together.loss_sum, together.grad_sum, together.weight_sum), (alone.loss_sum, alone.grad_sum, alone.weight_sum)
    )
    assert_close(together.loss, sum(r.loss * n for r, n in zip(rows, lengths, strict=True)) / sum(lengths))


@pytest.mark.parametrize("name", usual(["full"], ["full", "ragged blocks", "sliding", "randomized"]))
def test_a_total_weight_of_zero(name):
    step, loss, params, carry, batch = embedded_problem()
    estimator = ESTIMATORS[name].make(step, loss)
    run = jax.jit(lambda batch: one_update(estimator, params, carry, batch, jax.random.key(0)))
    nan = fill(batch, np.zeros(NUM_STEPS, bool), np.nan, 7)
    estimate = run(nan._replace(mask=np.zeros(NUM_STEPS, bool)))
    zeros = jax.tree.map(jnp.zeros_like, params)
    assert_same_bits((estimate.loss, estimate.weight_sum), (jnp.zeros(()), jnp.zeros(())))
    assert_close((estimate.grads, estimate.grad_sum), (zeros, zeros), rtol=0)
    assert float(estimate.info["aux"]["label"]) == 0
    estimate = run(batch._replace(weights=np.zeros(NUM_STEPS)))
    assert_close((estimate.loss, estimate.grads), (jnp.zeros(()), zeros), rtol=0)


@pytest.mark.parametrize("name", usual(["ragged blocks"], ["full", "blocks", "ragged blocks", "sliding"]))
def test_means_are_over_steps(name):
    """Losses 0 … T−1: the last target is not dropped, and a ragged tail is not weighted as a full window."""
    for num_steps in (NUM_STEPS, NUM_STEPS + 1):
        step = lambda w, h, x: (h, w * x)
        estimator = ESTIMATORS[name].make(step, lambda y, target: (y + target, 2 * target))
        batch = Batch(jnp.arange(num_steps) * 1.0, jnp.arange(num_steps) ** 2.0)
        estimate = jax.jit(functools.partial(one_update, estimator))(2.0, jnp.zeros(()), batch)
        t = np.arange(num_steps)
        assert_close((estimate.loss, estimate.grads), (np.mean(2 * t + t**2), np.mean(t)))
        assert_close(estimate.info["aux"], np.mean(2 * t**2))


def test_estimates_add():
    """Sums add exactly, and aux means combine by weight, also under vmap and scan."""
    step, loss, params, carry, batch = embedded_problem()
    weights = jnp.asarray(np.random.default_rng(11).random((NUM_STEPS, EXAMPLES)))
    batch = batch._replace(weights=weights)
    init, update, _ = full_bptt(step, loss)
    halves = [cut(batch, 0, 3), cut(batch, 3, 6)]
    state = init(params, carry, halves[0])
    a, state = jax.jit(update)(params, state, halves[0])
    b, _ = jax.jit(update)(params, state, halves[1])
    total = a + b
    whole = jax.jit(functools.partial(one_update, truncated_bptt(step, loss, window=3)))(params, carry, batch)
    assert set(total.info) == {"aux"} and int(whole.info["reach"]) == 3  # what describes one update does not add up
    assert_close(total, replace(whole, info={"aux": whole.info["aux"]}))
    labels = np.asarray(batch.targets[1])
    assert_close(total.info["aux"]["label"], np.sum(weights * labels) / np.sum(weights))

    scanned = jax.jit(lambda state: jax.lax.scan(lambda s, piece: update(params, s, piece)[::-1], state,
                      jax.tree.map(lambda *h: jnp.stack(h), *halves))[1])(init(params, carry, halves[0]))  # fmt: skip
    for i, one in enumerate((a, b)):
        assert_close(scanned.loss[i], one.loss)
        assert_close(jax.tree.map(lambda g, i=i: g[i], scanned.grads), one.grads)
    doubled = scanned + scanned
    assert_close((doubled.loss, doubled.grads, doubled.info["aux"]), (scanned.loss, scanned.grads, scanned.info["aux"]))


def test_estimates_are_right_under_vmap():
    """One estimate per weighting: leading axes of the sums, a total weight of zero among them."""
    step, loss, params, carry, batch = problems.make("tanh", NUM_STEPS)
    weightings = jnp.asarray(np.random.default_rng(12).random((NUM_STEPS, NUM_STEPS)))  # as many runs as steps
    weightings = weightings.at[1].set(0)
    run = lambda weights: one_update(full_bptt(step, loss), params, carry, batch._replace(weights=weights))
    together, run = jax.jit(jax.vmap(run))(weightings), jax.jit(run)
    for i, weights in enumerate(weightings):
        one = run(weights)
        assert_close(jax.tree.map(lambda v, i=i: v[i], (together.loss, together.grads)), (one.loss, one.grads))
    assert together.loss[1] == 0


def test_sums_of_low_precision_parameters_are_float32():
    step, loss, params, carry, batch = problems.make("tanh", 4)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, carry, batch))
    estimate = jax.jit(functools.partial(one_update, full_bptt(step, loss)))(*half)
    leaves = [estimate.loss_sum, estimate.weight_sum, *jax.tree.leaves(estimate.grad_sum)]
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}
