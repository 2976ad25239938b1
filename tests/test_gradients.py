"""Every estimator, schedule and cell against the explicit sum over pairs, a Python loop, and `jax.grad`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from oracles import brute_force, python_loop
from problems import EXAMPLES, assert_close, one_update, usual

from jbptt import Batch, Plan, cells, full_bptt, gated_bptt, randomized_bptt, truncated_bptt, truncation, unroll

WINDOW = 4
LENGTHS = [1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW + 2]
LONGEST = LENGTHS[-1]
BATCH = (EXAMPLES,)
CELLS = [name for name in problems.STEPS if name != "lstm+readout"]  # it comes with a reset

WINDOWED = {
    f"blocks of {WINDOW}": (WINDOW, WINDOW),
    **{f"stride {s} of {WINDOW}": (WINDOW, s) for s in (1, 2, 3)},
}
ESTIMATORS = {
    "full": full_bptt,
    "full, segment 3": functools.partial(full_bptt, plan=Plan(3)),
    **{name: functools.partial(truncated_bptt, window=w, stride=s) for name, (w, s) in WINDOWED.items()},
    "keep_prob": functools.partial(randomized_bptt, keep_prob=0.6, plan=Plan(1)),
    "mean_length": functools.partial(randomized_bptt, mean_length=3.0, plan=Plan(3)),
}


def combinations():
    """Each cell meets each estimator and each length, half of that in CI; one cell all estimators at full length.

    The usual run has one length of two of them.
    """
    for i, cell in enumerate(CELLS):
        for j, num_steps in enumerate(LENGTHS):
            everything = num_steps == LONGEST and cell == "lstm+readout+reset"
            names = tuple(n for k, n in enumerate(ESTIMATORS) if everything or (i + k - j) % 6 == 0)
            rest = pytest.mark.more if everything or (i + j) % 2 else pytest.mark.full
            usual = cell in ("linear", "gru") and j == (i + 1) % len(LENGTHS)
            yield pytest.param(cell, num_steps, names, marks=() if usual else rest)


@functools.cache
def pairs_of(cell):
    """Loss steps × sources at full length; shorter sequences are its upper left corner."""
    problem = problems.make(cell, LONGEST)
    return brute_force.pair_gradients(*problem, BATCH)[0]


def expected(cell, coverage):
    return brute_force.covered(pairs_of(cell), coverage, problems.make(cell, 1).params)


def coverage_of(name, num_steps, info):
    if "gates" in info:
        return truncation.coverage(info["gates"])
    if name in WINDOWED:
        return truncation.window_coverage(num_steps, *WINDOWED[name])
    return np.tri(num_steps)


@pytest.mark.parametrize(("cell", "num_steps", "names"), list(combinations()))
def test_estimators_cover_their_pairs(cell, num_steps, names):
    step, loss, params, carry, batch = problems.make(cell, num_steps)

    for name in names:
        update = jax.jit(functools.partial(one_update, ESTIMATORS[name](step, loss)))
        estimate = update(params, carry, batch, jax.random.key(1))
        assert_close(estimate.grad_sum, expected(cell, coverage_of(name, num_steps, estimate.info)))
        assert float(estimate.weight_sum) == num_steps * EXAMPLES


def schedules(num_steps):
    """Every kind of gate, [kinds, T]."""
    keys = jax.random.split(jax.random.key(2), 2)
    rows = [truncation.full(num_steps), *(truncation.fixed(num_steps, w) for w in (1, WINDOW, num_steps + 1))]
    rows += [truncation.fixed(num_steps, WINDOW, phase=phase) for phase in range(1, WINDOW)]
    rows += [truncation.randomized(keys[0], num_steps, jnp.linspace(0.3, 1, num_steps))]
    rows += [truncation.artbp(keys[1], num_steps, 3.0), truncation.artbp(keys[1], num_steps, 3.0, reweight=False)]
    return jnp.stack([*rows, jnp.linspace(-1.0, 2.0, num_steps)])


@pytest.mark.parametrize(
    "cell", usual(["lstm+readout+reset"], CELLS, full=[c for c in CELLS if "+" not in c and c != "linear"])
)
def test_gated_roads_agree_for_every_schedule(cell):
    num_steps = LONGEST if "+" not in cell else WINDOW + 1
    step, loss, params, carry, batch = problems.make(cell, num_steps)

    @jax.jit
    def run(gates):
        def loss_sum(params, carry):
            last, ys = unroll(step, params, carry, batch.xs, gates=gates)
            return jnp.sum(jax.vmap(loss)(ys, batch.targets)), last

        (total, last), grads = jax.value_and_grad(loss_sum, argnums=(0, 1), has_aux=True)(params, carry)
        estimator = gated_bptt(step, loss, gates_fn=lambda key, num_steps: gates)
        estimate, state = estimator.update(params, estimator.init(params, carry, batch), batch)
        return total, *grads, last, estimate.grad_sum, estimate.loss_sum, state.carry

    for gates in schedules(num_steps):
        total, grad, carry_grad, last, engine_grad, engine_total, engine_last = run(gates)
        looped = python_loop.gradient(step, loss, params, carry, batch, BATCH, np.asarray(gates))
        assert_close((total, grad, carry_grad, last), looped)
        assert_close((engine_total, engine_grad, engine_last), (looped[0], looped[1], looped[3]))
        assert_close(grad, expected(cell, truncation.coverage(gates)))


@pytest.mark.parametrize("cell", usual(["lstm+readout"], ["tanh", "lstm+readout"]))
@pytest.mark.parametrize("num_steps", usual([LONGEST], [WINDOW - 1, WINDOW + 1, LONGEST]))
def test_blocks_are_fixed_gates(cell, num_steps):
    step, loss, params, carry, batch = problems.make(cell, num_steps)

    @jax.jit
    def roads(params):
        def loss_sum(params):
            _, ys = unroll(step, params, carry, batch.xs, gates=truncation.fixed(num_steps, WINDOW))
            return jnp.sum(jax.vmap(loss)(ys, batch.targets))

        return one_update(truncated_bptt(step, loss, window=WINDOW), params, carry, batch).grad_sum, jax.grad(loss_sum)(
            params
        )

    assert_close(*roads(params))


def test_tanh_network_by_hand():
    step, loss, params, carry, batch = problems.make("tanh", LONGEST)
    gates = truncation.fixed(LONGEST, WINDOW, phase=1)
    value, grad = python_loop.tanh_rnn(
        params, carry, np.asarray(batch.xs), np.asarray(batch.targets), np.asarray(gates)
    )
    gated = jax.jit(functools.partial(one_update, gated_bptt(step, loss, gates_fn=lambda key, num_steps: gates)))
    estimate = gated(params, carry, batch)
    assert_close(estimate.grad_sum, grad)
    assert_close(estimate.loss_sum, value)


def test_per_example_gates_cover_each_example_by_itself():
    """`[T, B]` gates with T = B: aligned on the left, never by NumPy's trailing rule."""
    step, loss, params, carry, batch = problems.make("lstm", EXAMPLES)
    gates = np.random.default_rng(3).normal(size=(EXAMPLES, EXAMPLES))
    estimator = gated_bptt(step, loss, gates_fn=lambda key, num_steps: gates)
    estimate = jax.jit(functools.partial(one_update, estimator))(params, carry, batch)
    _, grad, _, _ = python_loop.gradient(step, loss, params, carry, batch, BATCH, gates)
    assert_close(estimate.grad_sum, grad)
    _, transposed, _, _ = python_loop.gradient(step, loss, params, carry, batch, BATCH, gates.T)
    with pytest.raises(AssertionError):
        assert_close(estimate.grad_sum, transposed, rtol=1e-3)


def test_gradients_of_dive_into_deep_learning():
    """h_t = W_hx x_t + W_hh h_{t−1}, o_t = W_qh h_t, L = 1/T Σ l(o_t, y_t), h_0 = 0 (section 9.7)."""
    rng, num_steps = np.random.default_rng(4), 7
    w_hx, w_hh, w_qh = rng.normal(size=(3, 2)), rng.normal(size=(3, 3)) / 2, rng.normal(size=(2, 3))
    xs, ys = rng.normal(size=(num_steps + 1, 2)), rng.normal(size=(num_steps + 1, 2))  # index 0 is not used

    h = np.zeros((num_steps + 1, 3))
    for t in range(1, num_steps + 1):
        h[t] = w_hx @ xs[t] + w_hh @ h[t - 1]
    by_o = 2 * (h @ w_qh.T - ys) / num_steps
    power = functools.partial(np.linalg.matrix_power, w_hh.T)
    by_h = np.zeros_like(h)
    for t in range(1, num_steps + 1):
        by_h[t] = sum(power(num_steps - i) @ w_qh.T @ by_o[num_steps + t - i] for i in range(t, num_steps + 1))
    steps = range(1, num_steps + 1)
    by_w_qh = sum(np.outer(by_o[t], h[t]) for t in steps)
    by_w_hx = sum(np.outer(by_h[t], xs[t]) for t in steps)
    by_w_hh = sum(np.outer(by_h[t], h[t - 1]) for t in steps)

    step = cells.with_readout(cells.linear(2, 3).step, lambda params, h: h @ params["w_q"])
    params = {"w_x": w_hx.T, "w_h": w_hh.T, "b": np.zeros(3), "w_q": w_qh.T}
    update = functools.partial(one_update, full_bptt(step, problems.squared_error))
    grads = jax.jit(update)(params, jnp.zeros(3), Batch(xs[1:], ys[1:])).grads
    assert_close({k: grads[k] for k in ("w_q", "w_x", "w_h")}, {"w_q": by_w_qh.T, "w_x": by_w_hx.T, "w_h": by_w_hh.T})
