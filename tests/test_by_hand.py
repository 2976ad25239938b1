"""Small cases worked out by hand: what no oracle that runs the same step can see."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import one_update, usual

from jbptt import Batch, cells, full_bptt, gradient_flow, lag_profile, truncated_bptt, unroll


def scalar(w, h, x):
    h = w * h + x
    return h, h


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_initializers_of_recurrent_weights(scale):
    """Every gate's block by itself: orthogonal (and no two alike), or the identity."""
    for make, wanted in ((cells.orthogonal, None), (cells.identity, scale * np.eye(3))):
        w_h = cells.gru(2, 3, recurrent_init=make(scale)).init(jax.random.key(0))["w_h"]
        gates = np.split(np.asarray(w_h), 3, axis=1)
        for block in gates:
            np.testing.assert_allclose(block.T @ block, scale**2 * np.eye(3), atol=1e-12)
            if wanted is not None:
                np.testing.assert_array_equal(block, wanted)
        assert wanted is not None or not np.allclose(gates[0], gates[1])


@pytest.mark.parametrize(("name", "number"), [("gru", 3), ("lstm", 4)])
def test_gate_order(name, number):
    """r, z, n with the reset after the product; i, f, g, o."""
    rng = np.random.default_rng(0)
    x, h, c = rng.normal(size=(3, 2))
    params = {key: rng.normal(size=(2, 2 * number)) for key in ("w_x", "w_h")} | {"b": rng.normal(size=2 * number)}
    from_x, from_h = x @ params["w_x"] + params["b"], h @ params["w_h"]
    if name == "gru":
        params["b_h"] = rng.normal(size=6)
        (x_r, x_z, x_n), (h_r, h_z, h_n) = np.split(from_x, 3), np.split(from_h + params["b_h"], 3)
        z = sigmoid(x_z + h_z)
        after, y = cells.gru(2, 2).step(params, h, x)
        np.testing.assert_allclose(after, (1 - z) * np.tanh(x_n + sigmoid(x_r + h_r) * h_n) + z * h)
    else:
        i, f, g, o = np.split(from_x + from_h, 4)
        (after, cell), y = cells.lstm(2, 2).step(params, (h, c), x)
        np.testing.assert_allclose(cell, sigmoid(f) * c + sigmoid(i) * np.tanh(g))
        np.testing.assert_allclose(after, sigmoid(o) * np.tanh(cell))
    np.testing.assert_array_equal(y, after)


def test_forget_bias_stands_on_the_forget_gate():
    bias = cells.lstm(2, 3, forget_bias=2.0).init(jax.random.key(0))["b"]
    np.testing.assert_array_equal(bias, [0] * 3 + [2] * 3 + [0] * 6)


def test_reset_comes_before_the_step():
    """Reset to 10 at step 1: 2·1 + 1, 2·10 + 1, 2·21 + 1, and nothing flows back into the first carry."""
    cell = cells.linear(1, 1)
    step = cells.with_reset(cell.step, lambda shape: jnp.full((*shape, 1), 10.0))
    params = {"w_x": jnp.eye(1), "w_h": 2 * jnp.eye(1), "b": jnp.zeros(1)}
    run = partial(unroll, step, params, xs=(jnp.ones((3, 1)), jnp.array([False, True, False])))
    np.testing.assert_array_equal(run(jnp.ones(1))[1][:, 0], [3, 21, 43])
    assert jax.grad(lambda carry: run(carry)[0].sum())(jnp.ones(1)) == 0


def test_nested_readouts_both_run():
    """(w·h)² at h = 1, 2 and w = 3: 9 + 36, slope 2·3·(1 + 4)."""
    twice = cells.with_readout(
        cells.with_readout(lambda w, h, x: (h + x, h + x), lambda w, h: w * h), lambda w, y: y**2
    )
    estimate = one_update(full_bptt(twice, lambda y, _: y), 3.0, jnp.zeros(()), Batch(jnp.ones(2)))
    assert (float(estimate.loss_sum), float(estimate.grad_sum)) == (45, 30)


def test_linear_readout_adds_its_bias():
    cell = cells.with_linear_readout(cells.linear(1, 2), 1)
    params = {**cell.init(jax.random.key(0)), "b_y": jnp.array([5.0])}
    assert cell.step(params, jnp.zeros(2), jnp.zeros(1))[1].tolist() == [5.0]


def test_a_readout_meets_one_step_at_a_time():
    """A readout that normalises: over all steps at once it would divide by another norm."""
    step = cells.with_readout(lambda w, h, x: (w * h + x,) * 2, lambda w, h: h / jnp.linalg.norm(h))
    xs = jnp.array([[1.0, 2.0], [0.5, -1.0]])

    def total(w):
        h, value = jnp.zeros(2), 0.0
        for x in xs:
            h = w * h + x
            value += jnp.sum(h / jnp.linalg.norm(h))
        return value

    estimate = one_update(full_bptt(step, lambda y, t: y @ t), 0.5, jnp.zeros(2), Batch(xs, jnp.ones((2, 2))))
    np.testing.assert_allclose(estimate.loss_sum, total(0.5))
    np.testing.assert_allclose(estimate.grad_sum, jax.grad(total)(0.5))


def test_a_gate_is_not_rounded_to_the_carry():
    """11 · (1/0.7) in bfloat16: rounding 1/0.7 first gives another number."""
    run = lambda h: unroll(lambda p, h, x: (h, h), None, h, jnp.zeros(1), gates=jnp.array([1 / 0.7]))[0] * 11
    assert jax.grad(run)(jnp.ones((), jnp.bfloat16)) == jnp.asarray(11 / 0.7, jnp.bfloat16)


def test_a_closed_gate_stops_an_infinite_adjoint():
    """λ overflows at 1e400; behind the gate of 0 it is 0, not NaN, in the flow and in the lags."""
    args = (lambda w, h, x: (w * h, h)), lambda y, _: y, 1e200, jnp.zeros(()), Batch(jnp.ones(4))
    gates = jnp.array([1.0, 0.0, 1.0, 1.0])
    flow = gradient_flow(*args, gates=gates)
    assert flow[3, 0] == 0 and flow[3, 1] == 0
    assert lag_profile(*args, max_lag=4, gates=gates).cotangent_norms[3] == 0


def test_a_leaf_that_examples_share_moves_with_any_of_them():
    step = lambda params, carry, x: ((carry[0] + x, carry[1] + 1), carry[0])
    mask = jnp.array([[True, True], [True, False], [False, False]])
    last, _ = unroll(step, None, (jnp.zeros(2), jnp.array(0)), jnp.ones((3, 2)), mask=mask)
    np.testing.assert_array_equal(last[0], [2, 1])
    assert int(last[1]) == 2


MASKS = {"no mask": None, "open mask": jnp.ones(3, bool)}
MAKERS = {"full": full_bptt, "sliding": partial(truncated_bptt, window=2, stride=1)}


@pytest.mark.parametrize("mask", usual(["open mask"], MASKS))
@pytest.mark.parametrize("make", usual(["sliding"], MAKERS))
def test_a_target_of_weight_zero_is_not_read(make, mask):
    def run(first):
        batch = Batch(jnp.ones(3), jnp.array([first, 1.0, 2.0]), MASKS[mask], jnp.array([0.0, 1, 1]))
        estimator = MAKERS[make](scalar, lambda y, target: (y - target) ** 2)
        return one_update(estimator, 0.5, jnp.zeros(()), batch)

    unread, read = run(jnp.nan), run(0.0)
    assert unread.grads == read.grads and unread.loss == read.loss


def test_a_masked_output_never_meets_the_loss():
    """√y has an infinite slope at the 0 that a masked step gives: h = 0 (held), 1, w + 1; d/dw (1 + √(w + 1))/2."""
    batch = Batch(jnp.ones(3), None, jnp.array([False, True, True]))
    estimate = one_update(full_bptt(scalar, lambda y, _: jnp.sqrt(y)), 0.5, jnp.zeros(()), batch)
    np.testing.assert_allclose(estimate.grads, 0.25 / np.sqrt(1.5))


def test_a_history_that_never_was_is_not_run():
    """√(w·x) is singular at the zeros that stand for steps before the stream."""
    step = lambda w, h, x: (w * h + jnp.sqrt(w * x),) * 2
    estimator = truncated_bptt(step, lambda y, _: y, window=3, stride=1)
    estimate = one_update(estimator, 0.5, jnp.zeros(()), Batch(jnp.ones(2)))
    exact = jax.grad(lambda w: unroll(step, w, jnp.zeros(()), jnp.ones(2))[1].sum())(0.5)
    np.testing.assert_allclose(estimate.grad_sum, exact)
