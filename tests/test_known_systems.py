"""What `diagnose` says of systems whose truth is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import in_one_line, usual

from jbptt import Batch, cells, diagnose, gradient_flow, tasks, truncation_curve
from jbptt.diagnosis.decay_shapes import shape_of

NUM_STEPS, EXAMPLES = 100, 4
SYSTEMS = {}


def system(function):
    """Adds a system: it gives `(problem, options)`, and what must hold of the diagnosis."""
    SYSTEMS[function.__name__] = function
    return function


def linear(params, h, x):
    h = h @ params["w_h"] + x @ params["w_x"]
    return h, h


def inner_product(y, slope):
    """Its cotangent is the target: every adjoint is known, A^k c."""
    return jnp.sum(y * slope, -1)


def linear_problem(matrix, slopes, num_steps=NUM_STEPS, examples=EXAMPLES):
    rng = np.random.default_rng(0)
    size = len(matrix)
    params = {"w_x": rng.normal(size=(3, size)), "w_h": np.asarray(matrix, float)}
    slopes = np.broadcast_to(np.asarray(slopes, float), (num_steps, examples, size))
    return (
        linear,
        inner_product,
        params,
        jnp.zeros((examples, size)),
        Batch(rng.normal(size=(num_steps, examples, 3)), slopes),
    )


def scalar_problem(step, weights=None, num_steps=NUM_STEPS, examples=8, mask=None, params=1.0):
    rng = np.random.default_rng(0)
    xs, targets = rng.normal(size=(2, num_steps, examples))
    batch = Batch(jnp.asarray(xs), jnp.asarray(targets), mask, weights)
    return step, lambda y, target: (y - target) ** 2, params, jnp.zeros(examples), batch


def leaky(params, h, x):
    h = 0.5 * h + params * x
    return h, h


def integrator(params, h, x):
    h = h + params * x
    return h, h


@system
def an_orthogonal_network_with_losses_of_different_size():
    """Norms at different lags are means over different losses; what arrives of each stays what it was."""
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
    size = np.where(np.arange(NUM_STEPS) >= 95, 1, 1e-3)[:, None, None]
    found = yield linear_problem(rotation, size * np.ones((NUM_STEPS, EXAMPLES, 8))), {}
    np.testing.assert_allclose(found.flow.arrives, 1, rtol=1e-9)
    assert found.verdict == "stable" and found.half_life > 1e6
    np.testing.assert_allclose(found.exponent, 0, atol=1e-9)
    assert not {advice.topic for advice in found.advice} & {"regularisation", "recurrent initialisation"}


@system
def a_small_part_of_the_loss_reads_a_growing_mode():
    found = yield linear_problem(np.diag([0.5, 1.1]), [0.999, 0.001]), {}
    assert found.verdict == "exploding" and np.isinf(found.half_life)
    np.testing.assert_allclose(found.flow.arrives[99], 27.59, rtol=1e-3)


@system
def two_time_scales():
    found = yield linear_problem(np.diag([0.5, 2**-0.001]), [0.95, 0.05]), {}
    shape = shape_of(found.flow.arrives, found.flow.alive)
    assert shape.kind == "two time scales" and shape.words in in_one_line(found)
    np.testing.assert_allclose(shape.half_lives, [1, 1000], rtol=0.05)


@system
def a_memory_of_seven_inputs_of_one_or_minus_one():
    """Nothing is saturated: what stands at ±1 moves with its input."""
    step, loss, params, carry, batch = linear_problem(np.diag(np.ones(7), 1), np.eye(8)[7])
    params["w_x"] = np.zeros((3, 8))
    params["w_x"][0, 0] = 1
    xs = np.sign(np.random.default_rng(5).normal(size=(NUM_STEPS, EXAMPLES, 3)))
    found = yield (step, loss, params, carry, batch._replace(xs=xs)), {}
    assert float(found.saturated) == 0 and "activation" not in str(found)


@system
def an_undamped_oscillator_whose_norm_swings():
    angle = 2 * np.pi / 20
    rotation, scale = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]), np.diag([1, 1000.0])
    found = yield linear_problem(np.linalg.inv(scale) @ rotation @ scale, [1.0, 0]), {}
    assert found.verdict == "stable" and found.half_life > NUM_STEPS
    assert abs(found.exponent) <= 2 * found.dynamics.error + 1e-6
    assert "recurrent initialisation" not in {advice.topic for advice in found.advice}


def leading_mode(num_steps, lead, rest):
    modes = np.full(64, rest)
    modes[0] = lead
    return linear_problem(np.diag(modes), np.ones(64), num_steps=num_steps)


@system
def three_steps_of_a_wide_network():
    found = yield leading_mode(3, 1.0, 0.01), {}
    np.testing.assert_allclose(found.exponent, 0, atol=1e-6)


@system
def a_hundred_steps_of_modes_close_together():
    found = yield leading_mode(100, 1.0, 0.95), {}
    np.testing.assert_allclose(found.exponent, 0, atol=3e-3)
    assert abs(found.exponent) <= 3 * found.dynamics.error


def gated(params, h, x):
    h = x[0] * h + x[1] @ params["w"]
    return h, h


@system
def a_network_that_shrinks_first_and_grows_then():
    """The exponent is over all steps, whichever come first."""
    factor = jnp.where(jnp.arange(NUM_STEPS) < 50, 0.9, 1.1)[:, None, None] * jnp.ones((NUM_STEPS, EXAMPLES, 4))
    xs = factor, jax.random.normal(jax.random.key(0), (NUM_STEPS, EXAMPLES, 3))
    batch = Batch(xs, jnp.ones((NUM_STEPS, EXAMPLES, 4)))
    problem = gated, inner_product, {"w": jnp.ones((3, 4))}, jnp.zeros((EXAMPLES, 4)), batch
    found = yield problem, {}
    np.testing.assert_allclose(found.exponent, np.log(0.99) / 2, rtol=1e-9)
    assert found.dynamics.error > abs(found.exponent)


@system
def a_running_sum_that_no_parameter_reaches():
    def step(params, carry, x):
        h = 0.3 * carry[0] + x @ params["w"]
        total = carry[1] + x[..., 0]
        return (h, total), (h, total)

    carry = jnp.zeros((EXAMPLES, 4)), jnp.zeros(EXAMPLES)
    batch = Batch(np.random.default_rng(0).normal(size=(NUM_STEPS, EXAMPLES, 3)))
    loss = lambda y, target: jnp.sum(y[0], -1) + y[1]
    found = yield (step, loss, {"w": jnp.ones((3, 4))}, carry, batch), {}
    assert found.verdict == "vanishing"
    np.testing.assert_allclose(found.half_life, np.log(2) / -np.log(0.3), rtol=1e-6)
    assert np.all(found.sliding_window <= 5)


@system
def a_shift_register():
    found = yield linear_problem(np.diag(np.ones(49), 1), np.eye(50)[49]), {}
    np.testing.assert_allclose(found.flow.arrives[:49], 1, rtol=1e-9)
    assert (found.verdict, int(found.zero_lag), int(found.reach)) == ("vanishing", 49, 49)
    assert "undiminished over 49 steps, then nothing" in in_one_line(found) and "activation" not in str(found)


def heavy_tail(seed):
    slopes = np.random.default_rng(seed).standard_cauchy((NUM_STEPS, 16, 1)) ** 3
    return linear_problem([[0.9]], slopes, examples=16)


@system
def losses_with_heavy_tails():
    found = yield heavy_tail(1), {}
    assert not found.windows.told and found.sliding_window.tolist() == found.block_window.tolist() == [0, 0]
    assert "one part of it carries nearly all of the gradient" in in_one_line(found)
    np.testing.assert_allclose(found.half_life, np.log(2) / -np.log(0.9), rtol=1e-6)


@system
def examples_that_cancel():
    step, loss, params, carry, batch = linear_problem([[0.9]], [1.0], examples=16)
    xs = np.array(batch.xs)
    xs[:, 1::2] = xs[:, ::2]
    signs = np.where(np.arange(16) % 2, 1.0, -1.0)[None, :, None] * np.ones((NUM_STEPS, 16, 1))
    found = yield (step, loss, params, carry, Batch(xs, signs)), {}
    assert not found.windows.told and "its parts cancel to rounding" in in_one_line(found)


@system
def targets_that_the_loss_ignores():
    step, _, params, carry, batch = scalar_problem(integrator)
    ignored = batch._replace(targets=batch.targets.at[80:].set(-100.0))
    loss = lambda y, target: jnp.where(target == -100.0, 0.0, (y - target) ** 2)
    found = yield (step, loss, params, carry, ignored), {}
    assert (found.verdict, int(found.num_lags), int(found.zero_lag)) == ("stable", 80, -1)
    assert found.half_life > 1e6


@system
def a_loss_at_the_last_step_only():
    num_steps = 512
    step = lambda params, h, x: ((h_ := params["a"] * h + x * params["w"]), h_)
    params = {"a": jnp.asarray(0.5), "w": jnp.asarray(1.0)}
    weights = jnp.zeros(num_steps).at[-1].set(1.0)
    found = yield scalar_problem(step, weights, num_steps, params=params), {}
    assert np.all(np.asarray(found.block_window) <= [8, 16]) and np.all(np.asarray(found.sliding_window) <= [8, 12])
    assert np.all(np.asarray(found.block_error) <= [0.1, 0.01])


@system
def rows_padded_on_the_left():
    lengths = np.array([100, 50, 20, 10, 5, 3, 2, 1])
    mask = (np.arange(NUM_STEPS)[:, None] < lengths)[::-1]
    found = yield scalar_problem(leaky, mask=jnp.asarray(mask)), {}
    assert (found.verdict, int(found.reach)) == ("vanishing", 7)
    np.testing.assert_allclose(found.half_life, 1, rtol=1e-9)


@system
def a_memory_that_is_overwritten():
    """What a loss sends back is whole up to the last write; only the mean over losses seems to decay."""

    def step(params, h, x):
        value, write = x
        h = jnp.where(write, value * params, h)
        return h, h

    step, loss, params, carry, batch = scalar_problem(step, num_steps=200)
    write = jnp.broadcast_to((jnp.arange(200) % 50 == 0)[:, None], (200, 8))
    found = yield (step, loss, params, carry, batch._replace(xs=(batch.xs, write))), {}
    # Of the 200 losses, t mod 50 = 0 … 49 steps after a write, those that are k steps before T − k count.
    np.testing.assert_allclose(found.flow.arrives[:49], found.flow.alive[:49], rtol=1e-9)
    assert np.all(np.diff(found.flow.alive[:49]) < 0) and float(found.flow.alive[49]) == 0
    assert 20 < found.half_life < 30 and "undiminished back to a cut or a write" in in_one_line(found)


@system
def an_error_that_comes_back():
    """A window counts from where the error stays."""

    def step(params, h, x):
        c, s = jnp.cos(params), jnp.sin(params)
        h = 0.97 * jnp.stack([c * h[0] - s * h[1], s * h[0] + c * h[1]]) + jnp.stack([x, 0 * x])
        return h, h[0]

    batch = Batch(jax.random.normal(jax.random.key(0), (60,)), jnp.zeros(60))
    problem = step, lambda y, target: (y - target) ** 2, jnp.array(0.2), jnp.zeros(2), batch
    found = yield problem, {}
    error = np.asarray(truncation_curve(*problem, max_window=60).relative_error)
    for tolerance, window in zip((0.1, 0.01), found.sliding_window.tolist(), strict=True):
        assert window > 0 and np.all(error[window - 1 :] <= tolerance)


@system
def one_reset_of_one_example():
    step = lambda w, h, x: ((h_ := jnp.tanh(jnp.where(x[1][:, None], 0.0, h) @ w + x[0])), h_)
    rng = np.random.default_rng(0)
    w = 0.95 * np.linalg.qr(rng.normal(size=(16, 16)))[0]
    xs, targets = 0.1 * rng.normal(size=(60, 8, 16)), rng.normal(size=(60, 8, 16))
    reset = jnp.zeros((60, 8), bool).at[30, 3].set(True)
    problem = step, tasks.squared_error, jnp.asarray(w), jnp.zeros((8, 16)), Batch((jnp.asarray(xs), reset), targets)
    found = yield problem, {"max_window": 20}
    assert -0.12 < found.exponent < -0.05 and int(found.dynamics.num_wiped) == 1
    assert "1 reset of an example left out" in in_one_line(found)


@system
def modes_that_are_close_and_one_example():
    decay = -jnp.linspace(0.018, 0.06, 16)
    step = lambda log_decay, h, x: ((h_ := jnp.exp(log_decay) * h + x), h_)
    xs, targets = np.random.default_rng(1).normal(size=(2, 60, 1, 16))
    found = yield (step, tasks.squared_error, decay, jnp.zeros((1, 16)), Batch(jnp.asarray(xs), targets)), {}
    assert found.dynamics.error > 0 and abs(found.exponent + 0.018) <= 6 * found.dynamics.error


@system
def complex_parameters():
    """The curvature is that along the way down, for which the gradient is conjugated."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))

    def step(params, z, x):
        z = params["lam"] * z + x[:, None] * params["b"]
        return z, jnp.real(z @ params["c"])

    params = {
        "lam": jnp.asarray(0.9 * np.exp(1j * np.linspace(0, 3, 4))),
        "b": draw(4) + 1j * draw(4),
        "c": draw(4) + 1j * draw(4),
    }
    loss, batch, carry = (
        lambda y, target: (y - target) ** 2,
        Batch(draw(40, 3), draw(40, 3)),
        jnp.zeros((3, 4), complex),
    )
    found = yield (step, loss, params, carry, batch), {"learning_rate": 0.01}
    flat, back = jax.flatten_util.ravel_pytree(params)

    @jax.jit
    def mean_loss(w):
        return jnp.mean(loss(jax.lax.scan(lambda z, x: step(back(w), z, x), carry, batch.xs)[1], batch.targets))

    way = jnp.conj(jax.grad(mean_loss)(flat))
    way = 1e-4 * way / jnp.linalg.norm(way)
    wanted = (mean_loss(flat + way) - 2 * mean_loss(flat) + mean_loss(flat - way)) / 1e-8
    np.testing.assert_allclose(found.curvature, wanted, rtol=1e-4)


MENDS_ONE_MATRIX = {"gated cell", "recurrent initialisation", "regularisation"}


def topics(found):
    return {advice.topic for advice in found.advice}


@system
def a_reservoir_whose_weights_are_fixed():
    """Its gradient vanishes; no parameter can mend that."""
    rng = np.random.default_rng(0)
    fixed, into = 0.3 * np.linalg.qr(rng.normal(size=(16, 16)))[0], rng.normal(size=(3, 16))

    def step(params, h, x):
        h = jnp.tanh(h @ fixed + x @ into)
        return h, h @ params["w_y"]

    batch = Batch(rng.normal(size=(NUM_STEPS, EXAMPLES, 3)), rng.normal(size=(NUM_STEPS, EXAMPLES, 2)))
    found = yield (step, tasks.squared_error, {"w_y": jnp.ones((16, 2))}, jnp.zeros((EXAMPLES, 16)), batch), {}
    assert found.recurrent_weights == () and not topics(found) & MENDS_ONE_MATRIX


@system
def a_logistic_map():
    """It is chaotic, as it should be; there is no matrix to penalise."""
    step = lambda r, h, x: ((h_ := r * h * (1 - h) + 0 * x), h_)
    start = jnp.linspace(0.1, 0.9, 8)
    step_, loss, params, _, batch = scalar_problem(step, num_steps=30, params=jnp.asarray(4.0))
    found = yield (step_, loss, params, start, batch), {}
    assert found.verdict == "exploding" and not topics(found) & MENDS_ONE_MATRIX
    np.testing.assert_allclose(found.exponent, np.log(2), atol=0.15)


def cell_problem(cell, scale=1.0):
    rng = np.random.default_rng(0)
    params = cell.init(jax.random.key(0))
    params = {**params, "w_h": scale * params["w_h"]}
    batch = Batch(rng.normal(size=(NUM_STEPS, EXAMPLES, 3)), rng.normal(size=(NUM_STEPS, EXAMPLES, 16)))
    return cell.step, tasks.squared_error, params, cell.initial_carry((EXAMPLES,)), batch


@system
def a_gru_that_forgets():
    found = yield cell_problem(cells.gru(3, 16)), {}
    assert found.verdict == "vanishing" and not topics(found) & MENDS_ONE_MATRIX


@system
def an_lstm_that_forgets():
    found = yield cell_problem(cells.lstm(3, 16)), {}
    assert found.verdict == "vanishing" and not topics(found) & MENDS_ONE_MATRIX


@system
def an_lstm_that_forgets_little():
    """The forget gate alone would keep half for 2,000 steps; lags compare the same losses."""
    cell = cells.lstm(3, 16, forget_bias=8.0)
    found = yield cell_problem(cell, 0.05), {"max_window": 20}
    assert found.half_life > 300 and found.verdict == "stable"


@system
def a_network_without_recurrence():
    step = lambda params, h, x: ((y := jnp.tanh(x @ params["w"])), y)
    rng = np.random.default_rng(0)
    batch = Batch(rng.normal(size=(NUM_STEPS, EXAMPLES, 3)), rng.normal(size=(NUM_STEPS, EXAMPLES, 4)))
    found = yield (step, tasks.squared_error, {"w": jnp.ones((3, 4))}, jnp.zeros((EXAMPLES, 4)), batch), {}
    assert "Any window will do" in found.decision and found.advice == ()


@system
def spikes_with_a_leak():
    """The membrane keeps itself: gates would be nothing new."""

    @jax.custom_jvp
    def spike(v):
        return (v > 1).astype(v.dtype)

    spike.defjvp(lambda v, dv: (spike(v[0]), dv[0] / (1 + 10 * jnp.abs(v[0] - 1)) ** 2))

    def step(params, v, x):
        v = 0.9 * v + x @ params["w"] + 0.1 * spike(v) @ params["w_h"] - spike(v)
        return v, spike(v)

    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3, 16))), "w_h": jnp.asarray(rng.normal(size=(16, 16)))}
    batch = Batch(rng.normal(size=(NUM_STEPS, EXAMPLES, 3)), rng.normal(size=(NUM_STEPS, EXAMPLES, 16)))
    found = yield (step, tasks.squared_error, params, jnp.zeros((EXAMPLES, 16)), batch), {}
    assert not topics(found) & {"gated cell", "recurrent initialisation"}


@system
def a_filter_of_mean_and_covariance():
    """Kalman's, whose matrix is the system's and no cell's."""

    def step(params, carry, x):
        mean, covariance = carry
        mean, covariance = mean @ params["a"].T, params["a"] @ covariance @ params["a"].T + 0.1 * jnp.eye(2)
        gain = covariance[..., :, 0] / (covariance[..., 0, 0] + 0.1)[..., None]
        mean = mean + gain * (x - mean[..., 0])[..., None]
        covariance = covariance - gain[..., :, None] * covariance[..., 0, :][..., None, :]
        return (mean, covariance), mean[..., 0]

    rng = np.random.default_rng(0)
    carry = jnp.zeros((EXAMPLES, 2)), jnp.broadcast_to(jnp.eye(2), (EXAMPLES, 2, 2))
    xs = rng.normal(size=(2, NUM_STEPS, EXAMPLES))
    params = {"a": jnp.array([[0.9, 0.2], [0.0, 0.8]])}
    found = yield (step, lambda y, target: (y - target) ** 2, params, carry, Batch(*xs)), {}
    assert not topics(found) & MENDS_ONE_MATRIX


@system
def one_mode_over_far_more_steps_than_are_measured():
    num_steps = 20_000
    step = lambda params, h, x: ((h_ := params["a"] * h + params["w"] * x), h_)
    params = {"a": jnp.asarray(0.999), "w": jnp.asarray(0.5)}
    found = yield scalar_problem(step, num_steps=num_steps, examples=1, params=params), {}
    np.testing.assert_allclose(found.half_life, np.log(2) / -np.log(0.999), rtol=0.05)
    assert "20000 steps, 512 lags measured: stable, reaches all 512 steps measured" in in_one_line(found)
    assert found.advice == ()


@pytest.mark.more("test_what_is_said_of")
@pytest.mark.parametrize("num_steps", usual([3], [2, 3, 5]))
def test_what_arrives_is_what_the_flow_of_single_losses_says(num_steps):
    """Of one example: F[t, t − k] summed over t, over that of the same losses at lag 0."""
    cell = cells.with_linear_readout(cells.gru(3, 8), 2)
    rng = np.random.default_rng(0)
    batch = Batch(*(jnp.asarray(rng.normal(size=(num_steps, 1, n))) for n in (3, 2)))
    problem = cell.step, tasks.squared_error, cell.init(jax.random.key(0)), cell.initial_carry((1,)), batch
    found = diagnose(*problem, measure=False)
    flow = np.asarray(gradient_flow(*problem))
    for k in range(int(found.num_lags)):
        wanted = np.trace(flow, -k) / np.trace(flow[k:, k:])
        np.testing.assert_allclose(found.flow.arrives[k], wanted, rtol=1e-9)
    assert int(found.num_lags) == num_steps and f"Gradient over {num_steps} steps: " in in_one_line(found)


@pytest.mark.parametrize("length", [3, 20, 60])
@pytest.mark.more("test_what_is_said_of")
def test_a_plateau_of_any_length(length):
    found = diagnose(*linear_problem(np.diag(np.ones(length - 1), 1), np.eye(length)[-1]), measure=False)
    assert f"undiminished over {length - 1} steps, then nothing" in in_one_line(found)
    assert "where it is cut" in in_one_line(found)


@pytest.mark.parametrize("share", [0.01, 0.02, 0.05, 0.2])
@pytest.mark.more("test_what_is_said_of")
def test_two_time_scales_in_any_mixture(share):
    found = diagnose(*linear_problem(np.diag([0.5, 2**-0.01]), [1 - share, share]), measure=False)
    shape = shape_of(found.flow.arrives, found.flow.alive)
    assert shape.kind == "two time scales", shape
    np.testing.assert_allclose(shape.half_lives, [1, 100], rtol=0.05)


TELLING = ["an_orthogonal_network_with_losses_of_different_size"]


@pytest.mark.parametrize("name", usual(TELLING, SYSTEMS))
def test_what_is_said_of(name):
    checks = SYSTEMS[name]()
    (step, loss, *data), options = next(checks)
    found = diagnose(step, loss, *data, measure=False, **options)
    with pytest.raises(StopIteration):
        checks.send(found)


@pytest.mark.more("test_several_batches::test_windows_hold_on_other_batches_of_the_size_of_one")
@pytest.mark.parametrize("examples", usual([4], [1, 4, 16]))
def test_windows_hold_on_other_batches_and_half_of_them_do_not(examples):
    """Of six batches, the windows for 10 % that five recommend keep it on 9 of 10 others."""
    cell = cells.with_linear_readout(cells.rnn(4, 16), 2)
    params, carry = cell.init(jax.random.key(0)), cell.initial_carry((examples,))
    shapes = (48, examples, 4), (48, examples, 2)
    data = lambda seed: Batch(*(jax.random.normal(jax.random.key(2 * seed + i), s) for i, s in enumerate(shapes)))
    curve = jax.jit(functools.partial(truncation_curve, cell.step, tasks.squared_error, max_window=48))
    errors = np.array([curve(params, carry, data(1000 + i)).relative_error for i in range(30)])
    windows = [
        int(diagnose(cell.step, tasks.squared_error, params, carry, data(seed), measure=False).sliding_window[0])
        for seed in range(6)
    ]
    held = [np.mean(errors[:, w - 1] <= 0.1) for w in windows]
    assert 0 not in windows and sum(share >= 0.9 for share in held) >= 5
    assert np.mean([np.mean(errors[:, w // 2 - 1] <= 0.1) for w in windows]) < 0.2
