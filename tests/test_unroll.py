"""`unroll`: values never change, every transformation works, and gates are data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from oracles import python_loop
from problems import EXAMPLES, assert_close, assert_same_bits, usual

from jbptt import Plan, gated_bptt, truncation, unroll

NUM_STEPS = 6
GATES = np.array([1.0, 0.0, 2.5, -1.0, 0.0, 0.3])


def weakly(step):
    """Jit-compiled unroll of a step."""
    return jax.jit(functools.partial(unroll, step), static_argnames=("segment", "length"))


def test_values_match_a_python_loop():
    step, _, params, carry, batch = problems.make("lstm+readout+reset", NUM_STEPS)
    last, ys = weakly(step)(params, carry, batch.xs)
    run, own = jax.jit(step), carry
    for t in range(NUM_STEPS):
        own, y = run(params, own, jax.tree.map(lambda a, t=t: a[t], batch.xs))
        assert_close(ys[t], y)
    assert_close(last, own)


SPECIAL = np.array([-0.0, 0.0, np.inf, -np.inf, np.nan, 5e-324, 1e308])


@pytest.mark.parametrize("dtype", [np.float64, np.float32, jnp.bfloat16, np.complex64])
def test_gates_leave_every_bit_of_the_values(dtype):
    """−0.0, infinities, NaN and denormals go through a gate as they are."""
    with np.errstate(over="ignore"):
        special = SPECIAL.astype(dtype)
    carry = {"real": jnp.asarray(special), "count": jnp.arange(3), "key": jax.random.key(1)}
    step = lambda params, carry, x: ({**carry, "count": carry["count"] + 1}, carry)
    run = weakly(step)
    for gates in (GATES, GATES != 0, np.zeros(NUM_STEPS), np.full(NUM_STEPS, np.inf), np.full(NUM_STEPS, np.nan)):
        last, ys = run(None, carry, jnp.zeros(NUM_STEPS), gates=gates)
        assert_same_bits(last, {**carry, "count": jnp.arange(3) + NUM_STEPS})
        for t in range(NUM_STEPS):
            assert_same_bits(jax.tree.map(lambda a, t=t: a[t], ys), {**carry, "count": jnp.arange(3) + t})


@pytest.mark.parametrize("gates", [GATES, np.zeros(NUM_STEPS), np.ones(NUM_STEPS)])
def test_gated_and_plain_values_are_the_same_bits(gates):
    step, _, params, carry, batch = problems.make("gru", NUM_STEPS)
    assert_same_bits(weakly(step)(params, carry, batch.xs, gates=gates), weakly(step)(params, carry, batch.xs))


def test_a_closed_gate_is_a_hard_zero():
    """d√h/dh at 0 is infinite; a gate of 0 must not make 0·∞ of it."""

    def total(params, gates):
        return unroll(lambda w, h, x: (jnp.sqrt(h) * 0.0 + w * x, h), params, 0.0, jnp.ones(3), gates=gates)[1].sum()

    grad = jax.jit(jax.grad(total))
    assert np.isnan(grad(0.0, jnp.ones(3)))
    assert grad(0.0, jnp.zeros(3)) == 0.0
    slopes = jax.jit(jax.grad(lambda h, gates: unroll(lambda w, h, x: (jnp.sqrt(h),) * 2, None, h, jnp.ones(2),
                     gates=gates)[1].sum()))  # fmt: skip
    assert np.isinf(slopes(0.0, jnp.ones(2)))
    assert slopes(0.0, jnp.array([0.0, 1.0])) == 0.0
    assert slopes(0.0, jnp.array([False, True])) == 0.0


def scalar_total(w, gates, *, segment=None):
    """A scalar function whose gated derivatives are known: h ← w h + x, Σ h."""
    ones = jnp.ones(NUM_STEPS)
    return jnp.sum(unroll(lambda w, h, x: (w * h + x,) * 2, w, 1.0, ones, gates=gates, segment=segment)[1])


def gated_polynomial(gates):
    """Σ_t h_{t+1} where w^n carries the product of the n gates it went through: coefficients of w, one by one.

    With frozen carries, ∂h_{t+1}/∂w = Σ_i C[t, i] w^{t−i} h_i.
    """
    coverage = np.asarray(truncation.coverage(gates))

    def derivative(w):
        h = [1.0]
        for _ in range(NUM_STEPS):
            h.append(w * h[-1] + 1.0)
        return sum(coverage[t, i] * w ** (t - i) * h[i] for t in range(NUM_STEPS) for i in range(t + 1))

    return derivative


@pytest.mark.parametrize("segment", usual([4], [None, 4]))
def test_every_first_derivative_is_gated_alike(segment):
    total = functools.partial(scalar_total, gates=GATES, segment=segment)
    expected = gated_polynomial(GATES)(0.7)
    roads = {
        "grad": jax.grad(total),
        "jacrev": jax.jacrev(total),
        "jacfwd": jax.jacfwd(total),
        "jvp": lambda w: jax.jvp(total, (w,), (1.0,))[1],
        "linearize": lambda w: jax.linearize(total, w)[1](1.0),
        "inside a scan": lambda w: (
            jax.lax.scan(lambda c, _: (c + jax.grad(total)(w), None), 0.0, None, length=2)[0] / 2
        ),
        "under vmap": lambda w: jax.vmap(jax.grad(total))(jnp.stack([w, w]))[1],
        "rematerialised": jax.grad(jax.checkpoint(total)),
    }
    results = jax.jit(lambda w: {name: road(w) for name, road in roads.items()})(0.7)
    for name, result in results.items():
        assert_close({name: result}, {name: expected})


GATE_KINDS = {"open": np.ones(NUM_STEPS), "closed": np.zeros(NUM_STEPS), "mixed": GATES}


@pytest.mark.parametrize("kind", usual(["mixed"], GATE_KINDS))
def test_second_derivatives(kind):
    """As of h ← w·(sg(h) + g·(h − sg(h))) + 1, where sg is a constant in every order."""
    gates = GATE_KINDS[kind]
    h, first, second, firsts, seconds = 1.0, 0.0, 0.0, [], []
    for gate in gates:
        first, second = gate * first, gate * second
        h, first, second = 0.7 * h + 1, h + 0.7 * first, 2 * first + 0.7 * second
        firsts.append(first)
        seconds.append(second)

    @jax.jit
    def derivatives(gates):
        total = functools.partial(scalar_total, gates=gates)
        nested = jax.grad(jax.grad(total)), jax.jacfwd(jax.jacfwd(total)), jax.jacrev(jax.jacfwd(total))
        return jax.grad(total)(0.7), [f(0.7) for f in (jax.hessian(total), *nested)]

    slope, curvatures = derivatives(gates)
    assert_close(slope, sum(firsts))
    for curvature in curvatures:
        assert_close(curvature, sum(seconds))


@pytest.mark.more("test_second_derivatives")
@pytest.mark.parametrize("w", [0.0, 0.1])
def test_second_derivatives_at_a_carry_of_zero(w):
    """At w = 0 every carry is exactly 0; the gates written out with `stop_gradient` are the reference."""
    gates, xs = jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, 2.0, 3.0])

    def step(w, h, x):
        h = jnp.sin(h) + jnp.cos(h) * w * x
        return h, h**2 + h + w * h

    def total(w):
        return jnp.sum(unroll(step, w, jnp.zeros(()), xs, gates=gates)[1])

    def reference(w):
        h, value = jnp.zeros(()), 0.0
        for gate, x in zip(gates, xs, strict=True):
            h, y = step(w, jax.lax.stop_gradient(h) + gate * (h - jax.lax.stop_gradient(h)), x)
            value += y
        return value

    expected = jax.hessian(reference)(w)
    for nested in (jax.hessian, lambda f: jax.grad(jax.grad(f)), lambda f: jax.jacfwd(jax.jacfwd(f))):
        assert_close(nested(total)(w), expected)


@pytest.mark.parametrize("gates", [[1.0, np.inf, 1.0], [1.0, np.nan, 1.0]])
def test_a_gate_that_is_not_finite_stays_visible(gates):
    slope = jax.grad(lambda w: unroll(lambda w, h, x: (w * h + x,) * 2, w, 1.0, jnp.ones(3), gates=np.array(gates))[0])
    assert np.array_equal(slope(0.5), gates[1], equal_nan=True)


BAD_STEP, CUT, BAD_EXAMPLE = 4, 2, 1


def by_step_and_example(step):
    """A step whose parameters are its own for every step and example, `[T, B, ...]`; x is (input, t)."""

    def own(params, carry, x):
        return jax.vmap(step)(jax.tree.map(lambda a: a[x[1]], params), carry, x[0])

    return own


ROADS = {"unroll": None, "unroll, segments": 3, "gated_bptt": None, "gated_bptt, segments": 3}


@functools.cache
def gated_road(cell, road):
    """Loss, last carry and ys (unroll), and the gradients by parameters `[T, B, ...]` and by the initial carry."""
    step, loss, params, carry, batch = problems.make(cell, NUM_STEPS)
    rng, segment = np.random.default_rng(6), ROADS[road]
    batch = batch._replace(xs=(batch.xs, jnp.arange(NUM_STEPS)), mask=rng.random((NUM_STEPS, EXAMPLES)) < 0.8)
    params = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=(NUM_STEPS, EXAMPLES, *p.shape)), params)

    @jax.jit
    def run(gates):
        if road.startswith("gated"):
            estimator = gated_bptt(by_step_and_example(step), loss, gates_fn=lambda key, t: gates, plan=Plan(segment))
            estimate = problems.one_update(estimator, params, carry, batch)
            return (estimate.loss_sum,), (estimate.grad_sum,)

        def total(params, carry):
            last, ys = unroll(by_step_and_example(step), params, carry, batch.xs, gates=gates, mask=batch.mask,
                              segment=segment)  # fmt: skip
            return jnp.sum(jnp.where(batch.mask, jax.vmap(loss)(ys, batch.targets), 0)), (last, ys)

        grads, values = jax.grad(total, argnums=(0, 1), has_aux=True)(params, carry)
        return values, grads

    return run, batch.mask


@pytest.mark.parametrize("bad", usual([np.inf], [np.inf, -np.inf, np.nan]))
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("cell", usual(["lstm"], ["gru", "lstm"]))
def test_a_bad_gate_of_one_example(cell, road, bad):
    """A gate that is infinite or NaN: no bit of a value and no bit of another example's gradient changes.

    In its own example the steps from it on keep every bit, the steps before it, back to a gate of 0, are not finite,
    and what lies behind the 0 keeps every bit again.
    """
    run, mask = gated_road(cell, road)
    gates = np.random.default_rng(7).choice([1.0, 0.5, -2.0], size=(NUM_STEPS, EXAMPLES))
    gates[CUT, BAD_EXAMPLE] = 0.0
    wild = gates.copy()
    wild[BAD_STEP, BAD_EXAMPLE] = bad
    (values, grads), (wild_values, wild_grads) = run(gates), run(wild)
    assert_same_bits(wild_values, values)
    assert_same_bits(values, run(np.ones_like(gates))[0])
    for leaf, wild_leaf in zip(jax.tree.leaves(grads[0]), jax.tree.leaves(wild_grads[0]), strict=True):
        leaf, wild_leaf, own = np.asarray(leaf), np.asarray(wild_leaf), np.arange(EXAMPLES) == BAD_EXAMPLE
        assert_same_bits(wild_leaf[:, ~own], leaf[:, ~own])
        assert_same_bits(wild_leaf[BAD_STEP:, own], leaf[BAD_STEP:, own])
        assert_same_bits(wild_leaf[:CUT, own], leaf[:CUT, own])
        assert np.any(leaf[:CUT, own]) and np.all(np.isfinite(leaf))
        for t in range(CUT, BAD_STEP):
            reached = wild_leaf[t, BAD_EXAMPLE]
            assert not np.all(np.isfinite(reached)) if mask[t, BAD_EXAMPLE] else not np.any(reached)
    assert_same_bits(wild_grads[1:], grads[1:])  # of the initial carry, which lies behind the 0


@pytest.mark.parametrize("cell", usual(["lstm"], ["gru", "lstm"]))
def test_a_bad_gate_on_the_initial_carry_stays_there(cell):
    """`gates[0]` reaches the initial carry of its example and nothing else."""
    run, _ = gated_road(cell, "unroll")
    gates = np.ones((NUM_STEPS, EXAMPLES))
    wild = gates.copy()
    wild[0, BAD_EXAMPLE] = np.inf
    (_, (grad, start)), (_, (wild_grad, wild_start)) = run(gates), run(wild)
    assert_same_bits(wild_grad, grad)
    for leaf, wild_leaf in zip(jax.tree.leaves(start), jax.tree.leaves(wild_start), strict=True):
        assert_same_bits(np.delete(wild_leaf, BAD_EXAMPLE, 0), np.delete(leaf, BAD_EXAMPLE, 0))
        assert np.all(np.isinf(wild_leaf[BAD_EXAMPLE]))


def test_vmap_equals_loop_over_gates_and_params():
    gates = jnp.stack([truncation.fixed(NUM_STEPS, w) for w in range(1, 5)])
    grad = jax.grad(scalar_total)
    table = jax.jit(jax.vmap(grad))(jnp.linspace(0.2, 0.8, 4), gates)
    for i, w in enumerate(np.linspace(0.2, 0.8, 4)):
        assert_close(table[i], gated_polynomial(gates[i])(w))


def test_one_compilation_serves_every_window():
    traces = []

    @jax.jit
    def grad(w, window, phase):
        traces.append(window)
        return jax.grad(scalar_total)(w, truncation.fixed(NUM_STEPS, window, phase=phase))

    for window in range(1, NUM_STEPS + 1):
        expected = gated_polynomial(truncation.fixed(NUM_STEPS, window, phase=window // 2))(0.7)
        assert_close(grad(0.7, window, window // 2), expected)
    assert len(traces) == 1
    assert grad._cache_size() == 1


def test_gates_are_not_differentiated():
    assert not np.any(jax.jit(jax.grad(scalar_total, argnums=1))(0.7, GATES))


def test_the_first_gate_leads_into_the_initial_carry_only():
    step, _, params, carry, batch = problems.make("lstm", NUM_STEPS)

    @jax.jit
    def grads(gates):
        return jax.grad(lambda p, c: jnp.sum(unroll(step, p, c, batch.xs, gates=gates)[1] ** 2), argnums=(0, 1))(
            params, carry
        )

    (one, one_carry), (half, half_carry) = grads(np.ones(NUM_STEPS)), grads(np.r_[0.5, np.ones(NUM_STEPS - 1)])
    assert_close(half, one)
    assert_close(half_carry, jax.tree.map(lambda c: c / 2, one_carry))


@pytest.mark.parametrize("num_steps", usual([EXAMPLES], [EXAMPLES, EXAMPLES + 2]))
def test_gates_per_example(num_steps):
    step, loss, params, carry, batch = problems.make("lstm", num_steps)
    gates = np.random.default_rng(2).integers(0, 3, size=(num_steps, EXAMPLES)) / 2.0

    @jax.jit
    def grads(gates):
        def total(params, carry):
            return jnp.sum(jax.vmap(loss)(unroll(step, params, carry, batch.xs, gates=gates)[1], batch.targets))

        return jax.grad(total, argnums=(0, 1))(params, carry)

    _, *expected, _ = python_loop.gradient(step, loss, params, carry, batch, (EXAMPLES,), gates)
    assert_close(grads(gates), tuple(expected))
    if num_steps == EXAMPLES:
        with pytest.raises(AssertionError):
            assert_close(grads(gates.T), tuple(expected), rtol=1e-3)


@pytest.mark.parametrize("segment", usual([4], [1, 4, NUM_STEPS, NUM_STEPS + 1]))
def test_segments_change_nothing(segment):
    step, _, params, carry, batch = problems.make("gru+reset", NUM_STEPS)
    mask = np.random.default_rng(3).random((NUM_STEPS, EXAMPLES)) < 0.7

    def run(params, carry, segment):
        last, ys = unroll(step, params, carry, batch.xs, gates=GATES, mask=mask, segment=segment)
        return jnp.sum(ys**2) + jnp.sum(last), (last, ys)

    roads = jax.jit(lambda p, c: [jax.value_and_grad(run, (0, 1), has_aux=True)(p, c, s) for s in (None, segment)])
    plain, segmented = roads(params, carry)
    assert_close(segmented, plain)


def test_segments_save_memory():
    step = lambda w, h, x: (jnp.tanh(h * w + x),) * 2
    h, xs = jnp.zeros((64, 64)), jnp.zeros(1024)

    def bytes_of(segment):
        grad = jax.jit(jax.grad(lambda w: jnp.sum(unroll(step, w, h, xs, segment=segment)[0])))
        return grad.lower(jnp.float64(0.5)).compile().memory_analysis().temp_size_in_bytes

    assert bytes_of(32) < 0.15 * bytes_of(None)


def test_keys_and_counters_in_carry_and_inputs():
    """A stochastic step: the draws are those of a Python loop, and the gradient flows around them."""

    def step(w, carry, x):
        key, count, h = carry
        seed, token = x
        noise = jax.random.normal(jax.random.fold_in(key, count)) + jax.random.normal(seed) * token
        return (key, count + 1, w * h + noise), h

    keys = jax.random.split(jax.random.key(4), NUM_STEPS)
    carry, xs = (jax.random.key(5), 3, 0.5), (keys, jnp.arange(NUM_STEPS))
    total = lambda w: unroll(step, w, carry, xs, gates=GATES, segment=4)[0][2]
    value, slope = jax.jit(jax.value_and_grad(total))(0.9)
    draws = [
        jax.random.normal(jax.random.fold_in(carry[0], 3 + t)) + jax.random.normal(keys[t]) * t
        for t in range(NUM_STEPS)
    ]
    hs = [0.5]
    for draw in draws:
        hs.append(0.9 * hs[-1] + float(draw))
    row = np.asarray(truncation.coverage(GATES))[-1]
    assert_close(value, hs[-1])
    assert_close(slope, sum(row[i] * 0.9 ** (NUM_STEPS - 1 - i) * hs[i] for i in range(NUM_STEPS)))


def test_params_may_hold_what_is_not_an_array():
    def step(params, h, x):
        h = params["activation"](params["w"] * h + x)
        return h, h

    def total(w, segment):
        params = {"w": w, "activation": jnp.tanh, "name": "cell"}
        return unroll(step, params, jnp.zeros(()), jnp.ones(5), segment=segment)[0]

    values = jax.jit(lambda w: [jax.value_and_grad(total)(w, s) for s in (None, 2)])(0.5)
    h = slope = 0.0
    for _ in range(5):
        slope = (1 - np.tanh(0.5 * h + 1) ** 2) * (h + 0.5 * slope)
        h = np.tanh(0.5 * h + 1)
    for value in values:
        assert_close(value, (h, slope))


@pytest.mark.parametrize("segment", [None, 2])
def test_length_without_inputs(segment):
    run = weakly(lambda w, h, x: (w * h, h))
    last, ys = run(2.0, 1.0, None, length=5, segment=segment)
    assert (float(last), ys.tolist()) == (32.0, [1.0, 2.0, 4.0, 8.0, 16.0])
