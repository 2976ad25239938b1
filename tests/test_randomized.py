"""Randomized truncation: unbiased by enumeration and by sampling; what a state draws."""

import functools
import itertools
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from oracles import brute_force
from problems import EXAMPLES, assert_close

from jbptt import full_bptt, gated_bptt, randomized_bptt, truncation

NUM_STEPS, MEAN_LENGTH, ALPHA = 6, 3.0, 4.0
STEP, LOSS, PARAMS, CARRY, BATCH = problems.make("tanh+readout", NUM_STEPS)
KEEP_PROBS = np.array([0.9, 0.5, 0.7, 0.3, 1.0, 0.8])
KEEP_PROBS_BY_EXAMPLE = np.stack([KEEP_PROBS, KEEP_PROBS[::-1], np.full(NUM_STEPS, 0.6)], axis=1)
LENGTH_PROBS = np.array([0.1, 0.0, 0.3, 0.2])  # the other 0.4 are longer than the sequence
NUM_SAMPLES, FALSE_ALARM = 8000, 1e-8


@functools.cache
def exact():
    pairs, _, _ = brute_force.pair_gradients(STEP, LOSS, PARAMS, CARRY, BATCH, (EXAMPLES,))
    return brute_force.covered(pairs, np.tri(NUM_STEPS), PARAMS)


def bernoulli_schedules(keep_prob):
    """Every mask, with its probability: gates ξ/π. The first gate matters to no parameter."""
    for kept in itertools.product([True, False], repeat=NUM_STEPS):
        yield np.where(kept, 1 / keep_prob, 0.0), np.prod(np.where(kept, keep_prob, 1 - keep_prob))


def artbp_hazard(since):
    return (ALPHA - 1) / ((ALPHA - 2) * MEAN_LENGTH + since)


def length_hazard(since):
    """The chance that a window which has lasted so long ends now."""
    return LENGTH_PROBS[since - 1] / (1 - LENGTH_PROBS[: since - 1].sum()) if since <= len(LENGTH_PROBS) else 0.0


def renewal_schedules(hazard_fn):
    """Every way to cut at 1 … T−1, with its probability, from the hazards."""
    for cuts in itertools.product([True, False], repeat=NUM_STEPS - 1):
        gates, probability, since = [1.0], 1.0, 1
        for cut in cuts:
            hazard = hazard_fn(since)
            gates.append(0.0 if cut else 1 / (1 - hazard))
            probability *= hazard if cut else 1 - hazard
            since = 1 if cut else since + 1
        yield np.array(gates), probability


SCHEDULES = {
    "constant": lambda: bernoulli_schedules(np.full(NUM_STEPS, 0.6)),
    "by step": lambda: bernoulli_schedules(KEEP_PROBS),
    "artbp": lambda: renewal_schedules(artbp_hazard),
    "lengths": lambda: renewal_schedules(length_hazard),
}


def gated_gradients(gates):
    """One gradient per schedule, `[schedules, ...]`."""

    def one(gates):
        estimator = gated_bptt(STEP, LOSS, gates_fn=lambda key, num_steps: gates)
        return problems.one_update(estimator, PARAMS, CARRY, BATCH).grad_sum

    return jax.jit(jax.vmap(one))(jnp.asarray(gates))


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_mean_over_every_schedule_is_the_full_gradient(kind):
    gates, probabilities = map(np.array, zip(*SCHEDULES[kind](), strict=True))
    assert_close(probabilities.sum(), np.ones(()), rtol=1e-14)
    mean = lambda values: jax.tree.map(lambda v: np.einsum("s,s...->...", probabilities, v), values)
    assert_close(mean(gated_gradients(gates)), exact())
    assert_close(mean(jax.vmap(truncation.coverage)(gates)), np.tri(NUM_STEPS))
    with pytest.raises(AssertionError):  # without the weights: far from it
        assert_close(mean(gated_gradients(gates != 0)), exact(), rtol=1e-2)


OPTIONS = {
    "constant": {"keep_prob": 0.6},
    "by step": {"keep_prob": KEEP_PROBS},
    "artbp": {"mean_length": MEAN_LENGTH},
    "lengths": {"length_probs": LENGTH_PROBS},
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_declared_without_a_key_is_the_mean_over_every_schedule(kind):
    gates, probabilities = map(np.array, zip(*SCHEDULES[kind](), strict=True))
    for reweight, drawn in ((True, gates), (False, gates != 0)):
        declared = randomized_bptt(STEP, LOSS, **OPTIONS[kind], reweight=reweight).coverage(NUM_STEPS)
        covered = np.einsum("s,sti->ti", probabilities, jax.vmap(truncation.coverage)(drawn))
        assert_close(declared, covered)
        assert np.allclose(declared, np.tri(NUM_STEPS)) == reweight


def test_declared_of_examples_that_draw_apart():
    """`[T, T, *batch]`: each example as if it were alone."""
    for reweight in (True, False):
        of = lambda keep_prob, weighted=reweight: randomized_bptt(STEP, LOSS, keep_prob=keep_prob, reweight=weighted)
        alone = [of(KEEP_PROBS_BY_EXAMPLE[:, b]).coverage(NUM_STEPS) for b in range(EXAMPLES)]
        assert_close(of(KEEP_PROBS_BY_EXAMPLE).coverage(NUM_STEPS), np.stack(alone, axis=2))


@pytest.mark.parametrize(
    "options",
    [
        {"keep_prob": KEEP_PROBS_BY_EXAMPLE},
        {"keep_prob": 0.6, "reweight": False},
        {"mean_length": MEAN_LENGTH},
        {"length_probs": LENGTH_PROBS},
    ],
)
def test_declared_with_a_key_is_the_draw_of_the_first_update(options):
    """Eight keys, eager and side by side; what the second update draws is another matrix."""
    estimator = randomized_bptt(STEP, LOSS, **options)

    def run(key):
        first, state = estimator.update(PARAMS, estimator.init(PARAMS, CARRY, BATCH, key), BATCH)
        second, _ = estimator.update(PARAMS, state, BATCH)
        covered = [truncation.coverage(estimate.info["gates"]) for estimate in (first, second)]
        return estimator.coverage(NUM_STEPS, key), *covered

    keys = jax.random.split(jax.random.key(3), 8)
    declared, first, second = jax.jit(jax.vmap(run))(keys)
    problems.assert_same_bits(declared, first)
    problems.assert_same_bits(estimator.coverage(NUM_STEPS, keys[0]), first[0])
    assert np.any(np.asarray(declared) != np.asarray(second))


def test_coverage_of_gates_of_ones_own():
    """Gates that draw have no mean that anybody knows; others need no key."""
    fixed = gated_bptt(STEP, LOSS, gates_fn=lambda key, num_steps: np.arange(num_steps) % 3 != 0)
    blocks = np.arange(NUM_STEPS) // 3
    assert_close(fixed.coverage(NUM_STEPS), np.tri(NUM_STEPS) * (blocks[:, None] == blocks))
    drawing = gated_bptt(STEP, LOSS, gates_fn=lambda key, num_steps: truncation.randomized(key, num_steps, 0.5))
    key = jax.random.key(1)
    assert_close(drawing.coverage(NUM_STEPS, key), randomized_bptt(STEP, LOSS, keep_prob=0.5).coverage(NUM_STEPS, key))
    with pytest.raises(ValueError, match=r"coverage needs a key, got key=None.*_replace"):
        drawing.coverage(NUM_STEPS)
    known = drawing._replace(coverage=lambda num_steps, key=None: np.tri(num_steps))
    assert_close(known.coverage(NUM_STEPS), np.tri(NUM_STEPS))
    with pytest.raises(ValueError, match=r"gates disagree on T or the batch: got \(4,\)"):
        gated_bptt(STEP, LOSS, gates_fn=lambda key, num_steps: np.ones(4)).coverage(NUM_STEPS, key)
    with pytest.raises(RuntimeError, match="of its own"):  # with a key, what gates_fn raises is the user's to see
        gated_bptt(STEP, LOSS, gates_fn=broken).coverage(NUM_STEPS, key)


def broken(key, num_steps):
    raise RuntimeError("of its own")


def quantile(num_comparisons, false_alarm=FALSE_ALARM):
    """What the largest of so many |z| exceeds with this probability at most (normal tails, union bound)."""
    return -NormalDist().inv_cdf(false_alarm / (2 * num_comparisons))


def deviations(options):
    """|mean − exact| in standard errors, for every component of the gradient that varies."""
    estimator = randomized_bptt(STEP, LOSS, **options)
    sample = lambda key: problems.one_update(estimator, PARAMS, CARRY, BATCH, key).grad_sum
    draws = jax.jit(jax.vmap(sample))(jax.random.split(jax.random.key(12), NUM_SAMPLES))
    away = []
    for draw, value in zip(jax.tree.leaves(draws), jax.tree.leaves(exact()), strict=True):
        error = np.asarray(draw).std(axis=0, ddof=1) / np.sqrt(NUM_SAMPLES)
        difference = np.abs(np.asarray(draw).mean(axis=0) - value)
        constant = error < 1e-12 * np.abs(value)  # the readout does not depend on the gates
        assert np.all(difference[constant] < 1e-12 * np.abs(value)[constant])
        away.append((difference / np.where(constant, np.inf, error))[~constant])
    return np.concatenate(away)


@pytest.mark.parametrize(
    "options",
    [
        {"keep_prob": 0.6},
        {"keep_prob": KEEP_PROBS},
        {"keep_prob": KEEP_PROBS_BY_EXAMPLE},
        {"mean_length": MEAN_LENGTH},
        {"length_probs": LENGTH_PROBS},
    ],
)
def test_sampled_mean_is_unbiased_only_with_weights(options):
    """18 means within 6.2 standard errors: false alarm 1e-8 for each of five; without weights far away."""
    found = deviations(options)
    assert len(found) == 18 and np.max(found) < quantile(18)
    assert np.max(deviations({**options, "reweight": False})) > 20


@pytest.mark.parametrize("options", [{"keep_prob": 0.5}, {"mean_length": MEAN_LENGTH}, {"length_probs": LENGTH_PROBS}])
def test_updates_draw_anew_and_states_replay(options):
    """16 schedules that all agree by chance: Σ p¹⁶ ≤ (0.13, the likeliest schedule's p)¹⁵ < 1e-13."""
    estimator = randomized_bptt(STEP, LOSS, **options)
    update = jax.jit(estimator.update)
    state, draws = estimator.init(PARAMS, CARRY, BATCH, jax.random.key(0)), []
    for _ in range(16):
        estimate, later = update(PARAMS, state, BATCH)
        replay, same = update(PARAMS, state, BATCH)
        problems.assert_same_bits((replay, same), (estimate, later))
        draws.append(tuple(np.asarray(estimate.info["gates"]).tolist()))
        state = later._replace(carry=CARRY)
    assert len(set(draws)) > 1


def test_keys_decide_the_draw_and_successive_draws_are_independent():
    """Over many seeds, two updates in a row keep a crossing together as often as chance has it.

    Three shares within 6.0 standard errors: false alarm 1e-8 in all.
    """
    estimator = randomized_bptt(STEP, LOSS, keep_prob=0.5, reweight=False)

    def two(key):
        one, state = estimator.update(PARAMS, estimator.init(PARAMS, CARRY, BATCH, key), BATCH)
        return one.info["gates"], estimator.update(PARAMS, state, BATCH)[0].info["gates"]

    first, second = map(np.asarray, jax.jit(jax.vmap(two))(jax.random.split(jax.random.key(3), 2000)))
    count = first.size
    for share, wanted in ((first.mean(), 0.5), (second.mean(), 0.5), ((first * second).mean(), 0.25)):
        assert abs(share - wanted) < quantile(3) * np.sqrt(wanted * (1 - wanted) / count)


def test_keeping_everything_is_full_bptt():
    run = lambda estimator: problems.one_update(estimator, PARAMS, CARRY, BATCH, jax.random.key(0))
    kept, full = jax.jit(lambda: (run(randomized_bptt(STEP, LOSS, keep_prob=1.0)), run(full_bptt(STEP, LOSS))))()
    assert_close((kept.loss, kept.grads), (full.loss, full.grads))


def test_lengths_are_drawn_from_their_distribution():
    """Shares of the first window's length over 20,000 draws within 6 standard errors: false alarm 1e-8 in all."""
    draw = lambda key: truncation.random_lengths(key, 12, LENGTH_PROBS, reweight=False)
    gates = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(1), 20_000)))
    first = np.where((gates == 0).any(axis=1), np.argmax(gates == 0, axis=1), 12)
    for length, probability in enumerate([*LENGTH_PROBS, 0.0], start=1):
        error = np.sqrt(probability * (1 - probability) / len(gates))
        assert abs(np.mean(first == length) - probability) <= quantile(5) * error


def test_every_example_has_gates_of_its_own():
    """Kept alike in all of 40 steps by chance: 2 · 2⁻⁸⁰."""
    gates = truncation.randomized(jax.random.key(2), 40, np.full((40, EXAMPLES), 0.5))
    assert gates.shape == (40, EXAMPLES) and not np.array_equal(gates[:, 0], gates[:, 1])


@pytest.mark.parametrize(
    ("probs", "words"),
    [
        ([0.5, -0.1], "each >= 0 and together at most 1"),
        ([0.5, 0.6], "each >= 0 and together at most 1"),
        ([0.5, np.nan], "each >= 0 and together at most 1"),
        ([[0.5]], "length_probs must be \\[L\\]"),
        ([], "length_probs must be"),
        ([0.5, 0.5], "lets hardly any window reach T = 6"),
    ],
)
def test_lengths_that_are_no_distribution_are_refused(probs, words):
    with pytest.raises(ValueError, match=words):
        estimator = randomized_bptt(STEP, LOSS, length_probs=np.array(probs))
        estimator.init(PARAMS, CARRY, BATCH, jax.random.key(0))
    if words.startswith("lets"):
        truncation.random_lengths(jax.random.key(0), NUM_STEPS, np.array(probs), reweight=False)
