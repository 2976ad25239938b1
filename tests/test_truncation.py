"""Schedules against closed forms; coverage against its definition, in Python loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import assert_close

from jbptt import truncation

NUM_STEPS = 9


def product_coverage(gates):
    """C[t, i] = Π_{j=i+1..t} gates[j], one factor at a time."""
    table = np.zeros((len(gates), len(gates), *np.shape(gates)[1:]))
    for t in range(len(gates)):
        for i in range(t + 1):
            table[t, i] = 1.0
            for j in range(i + 1, t + 1):
                table[t, i] = table[t, i] * gates[j]
    return table


@pytest.mark.parametrize("shape", [(1,), (NUM_STEPS,), (NUM_STEPS, 2)])
def test_coverage_is_a_product_of_gates(shape):
    gates = np.random.default_rng(0).normal(size=shape)
    gates[len(gates) // 2] = 0.0
    assert_close(truncation.coverage(gates), product_coverage(gates))


def test_coverage_of_boolean_gates_and_past_a_cut():
    gates = np.random.default_rng(1).random(NUM_STEPS) < 0.6
    assert_close(truncation.coverage(gates), product_coverage(gates.astype(float)))
    assert np.asarray(truncation.coverage(np.array([1.0, 0.0, np.inf])))[2].tolist() == [0.0, np.inf, 1.0]


def test_full():
    assert np.array_equal(truncation.full(NUM_STEPS), np.ones(NUM_STEPS))
    assert np.array_equal(truncation.coverage(truncation.full(NUM_STEPS)), np.tri(NUM_STEPS))


@pytest.mark.parametrize("window", range(1, NUM_STEPS + 2))
def test_fixed_keeps_the_pairs_of_a_block(window):
    t = np.arange(NUM_STEPS)
    for phase in range(window):
        block = (t + phase) // window
        gates = truncation.fixed(NUM_STEPS, window, phase=phase)
        assert np.array_equal(truncation.coverage(gates), np.tri(NUM_STEPS) * (block[:, None] == block))
    assert gates[0] == 1


def test_fixed_takes_traced_windows_and_phases():
    windows, phases = jnp.arange(1, 6), jnp.arange(5)
    table = jax.vmap(lambda w, p: truncation.fixed(NUM_STEPS, w, phase=p))(windows, phases)
    rows = [truncation.fixed(NUM_STEPS, int(w), phase=int(p)) for w, p in zip(windows, phases, strict=True)]
    assert np.array_equal(table, rows)


@pytest.mark.parametrize("keep_prob", [0.3, 1.0, np.linspace(0.2, 1, NUM_STEPS)])
def test_randomized_gates_are_zero_or_one_over_keep_prob(keep_prob):
    """That 64 draws of 9 gates hold a 0 is sure up to a chance of (Π π)⁶⁴ < 1e-100."""
    draws = jax.vmap(lambda key: truncation.randomized(key, NUM_STEPS, keep_prob))(
        jax.random.split(jax.random.key(0), 64)
    )
    plain = jax.vmap(lambda key: truncation.randomized(key, NUM_STEPS, keep_prob, reweight=False))(
        jax.random.split(jax.random.key(0), 64)
    )
    kept = np.asarray(draws) != 0
    assert np.array_equal(draws, np.where(kept, 1 / np.asarray(keep_prob), 0))
    assert np.array_equal(plain, kept.astype(float))
    assert np.all(kept[:, np.broadcast_to(keep_prob, NUM_STEPS) == 1])
    assert np.all(kept) == np.all(np.asarray(keep_prob) == 1)


def artbp_gates(gates, mean_length, alpha, reweight):
    """What the gates must be, given where the cuts fell: hazards by hand."""
    since, wanted = 1, [1.0]
    for gate in gates[1:]:
        hazard = (alpha - 1) / ((alpha - 2) * mean_length + since)
        wanted.append(0.0 if gate == 0 else 1 / (1 - hazard) if reweight else 1.0)
        since = 1 if gate == 0 else since + 1
    return np.array(wanted)


@pytest.mark.parametrize("reweight", [True, False])
@pytest.mark.parametrize(("mean_length", "alpha"), [(3.0, 4.0), (5.0, 6.0)])
def test_artbp_gates_follow_their_hazards(mean_length, alpha, reweight):
    """That 16 draws of 39 gates hold a 0 is sure up to a chance below 1e-20 (no cut in any of them)."""
    draws = jax.vmap(lambda key: truncation.artbp(key, 40, mean_length, alpha=alpha, reweight=reweight))(
        jax.random.split(jax.random.key(0), 16)
    )
    assert np.any(np.asarray(draws) == 0)
    for gates in np.asarray(draws):
        assert_close(gates, artbp_gates(gates, mean_length, alpha, reweight), rtol=1e-14)


@pytest.mark.parametrize("reweight", [True, False])
def test_gates_of_random_lengths_follow_their_hazards(reweight):
    """A hazard starts anew after every cut. 16 draws without any cut: chance below 1e-20."""
    probs, gates_of = (
        np.array([0.2, 0.0, 0.4, 0.1]),
        lambda key: truncation.random_lengths(key, 40, probs, reweight=reweight),
    )
    draws = np.asarray(jax.vmap(gates_of)(jax.random.split(jax.random.key(0), 16)))
    assert np.sum(draws == 0) > 16
    for gates in draws:
        since, wanted = 1, [1.0]
        for gate in gates[1:]:
            hazard = probs[since - 1] / (1 - probs[: since - 1].sum()) if since <= 4 else 0.0
            wanted.append(0.0 if gate == 0 else 1 / (1 - hazard) if reweight else 1.0)
            assert hazard > 0 or gate != 0
            since = 1 if gate == 0 else since + 1
        assert_close(gates, np.array(wanted), rtol=1e-14)


@pytest.mark.parametrize(("mean_length", "alpha"), [(3.0, 4.0), (8.0, 5.0)])
def test_artbp_mean_length(mean_length, alpha):
    """Σ_{n≥0} Π_{δ=1..n} (1 − c_δ) = L₀, with the tail closed by the survival's power law; and the draws agree.

    One mean each, within 6 standard errors: false alarm 2e-9 (normal tails; the lengths are cut off at 200).
    """
    base = (alpha - 2) * mean_length
    deltas = np.arange(1, 200_001)
    survival = np.concatenate([[1.0], np.cumprod(1 - (alpha - 1) / (base + deltas))])
    # The survival S_n telescopes as Γ(n + b + 2 − α)/Γ(n + b + 1); its tail sum is S_n (n + b + 1)/(α − 2).
    total = survival[:-1].sum() + survival[-1] * (len(deltas) + base + 2 - alpha + alpha - 1) / (alpha - 2)
    assert_close(total, mean_length, rtol=1e-6)
    draws = jax.jit(jax.vmap(lambda key: truncation.artbp(key, 200, mean_length, alpha=alpha)))
    cuts = np.asarray(draws(jax.random.split(jax.random.key(1), 16_000))) == 0
    first = np.where(cuts.any(1), cuts.argmax(1), 200)
    assert abs(first.mean() - survival[:200].sum()) < 6 * first.std() / np.sqrt(len(first))


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (4, 4), (4, 1), (4, 3), (5, 2), (20, 20), (20, 7)])
def test_window_coverage_by_definition(window, stride):
    table = np.zeros((NUM_STEPS, NUM_STEPS))
    for t in range(NUM_STEPS):
        for i in range(t + 1):
            chunk_end = (t // stride + 1) * stride - 1  # the last step that goes back together with t
            table[t, i] = i > chunk_end - window
    assert np.array_equal(truncation.window_coverage(NUM_STEPS, window, stride), table)
    seen = table.sum(1)
    assert np.all((seen <= window) & (seen >= np.minimum(window - stride, np.arange(NUM_STEPS)) + 1))


def test_window_coverage_at_its_limits():
    blocks = truncation.coverage(truncation.fixed(NUM_STEPS, 4))
    assert np.array_equal(truncation.window_coverage(NUM_STEPS, 4, 4), blocks)
    band = np.tri(NUM_STEPS) - np.tri(NUM_STEPS, k=-4)
    assert np.array_equal(truncation.window_coverage(NUM_STEPS, 4, 1), band)
    assert np.array_equal(truncation.window_coverage(NUM_STEPS, NUM_STEPS, NUM_STEPS), np.tri(NUM_STEPS))
