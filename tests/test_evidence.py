"""The evidence behind a diagnosis, piece by piece: loops, NumPy's least squares, long sums, products of Jacobians."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from problems import usual

from jbptt import Batch, bias_bound
from jbptt.analysis import lags
from jbptt.analysis.lags import linearise
from jbptt.analysis.lyapunov import lyapunov_spectrum
from jbptt.diagnosis import decay, dynamics, stuck_units
from jbptt.diagnosis.block_windows import candidate_windows
from jbptt.diagnosis.by_lag import measured_windows
from jbptt.norms import norm
from jbptt.problem import problem_of, trusted_problem
from jbptt.segments import back_through


@pytest.mark.parametrize(
    ("norms", "verdict", "zero_lag", "underflow"),
    [
        ([1.0] * 9 + [1e-20, 1e-37, 0, 0], "vanishing", 11, True),  # flat, then gone
        ([1.0] * 9 + [0, 0, 0, 0], "vanishing", 9, False),
        ([0.5**k for k in range(125)] + [0.0], "vanishing", 125, True),
        ([0.1**k for k in range(20)] + [0.0], "vanishing", 20, False),
        ([2.0**k for k in range(20)] + [0.0], "exploding", 20, False),  # up to a reset
        ([2e-38, 0.0], "vanishing", 1, True),
        ([0.0, 0.0], "vanishing", 0, False),
        ([1.0] * 9, "stable", -1, False),
    ],
)
def test_exact_zeros(norms, verdict, zero_lag, underflow):
    found = jax.jit(decay.fit_decay)(jnp.array(norms, jnp.float32))
    assert ["vanishing", "stable", "exploding"][int(found.verdict_index)] == verdict
    assert (int(found.zero_lag), bool(found.underflow)) == (zero_lag, underflow)


def test_small_weights_hide_no_underflow():
    """Adjoints of weight 1e-6 vanish 1e6 times earlier: norms, which are without the weight, end well above tiny."""
    norms = jnp.array([0.1**k for k in range(32)] + [0.0], jnp.float32)
    tiny = float(jnp.finfo(jnp.float32).tiny)
    assert not jax.jit(decay.fit_decay)(norms).underflow
    assert jax.jit(decay.fit_decay)(norms, None, tiny / 1e-6).underflow


def test_a_jump_at_the_first_lag_is_no_decay():
    fit = jax.jit(decay.fit_decay)
    flat = fit(jnp.array([300.0] + [1.0] * 30))
    assert (int(flat.first_lag), int(flat.verdict_index), int(flat.reach)) == (1, 1, 31)
    np.testing.assert_allclose(flat.rate, 0, atol=1e-12)
    falling = fit(jnp.array([300.0] + [0.9**k for k in range(30)]))
    np.testing.assert_allclose([falling.rate, falling.half_life], [np.log(0.9), np.log(0.5) / np.log(0.9)])
    assert int(falling.verdict_index) == 0
    fast = fit(jnp.array([1e-3**k for k in range(5)]))
    np.testing.assert_allclose(fast.rate, np.log(1e-3))
    for norms in ([300.0, 1.0], [300.0, 0.0, 0.0], [1.0, 0.01, 0.01]):
        assert int(fit(jnp.array(norms)).first_lag) == 0


def test_uncertainty_of_the_fit():
    """Against NumPy's least squares, over the lags before 1 % and among those that have pairs."""
    rng = np.random.default_rng(1)
    norms = np.exp(-0.2 * np.arange(60) + 0.1 * rng.normal(size=60))
    n = np.argmax(norms < 0.01 * norms[0])
    for num_lags in (60, 9):
        used = min(n, num_lags)
        (slope, _), covariance = np.polyfit(np.arange(used), np.log(norms[:used]), 1, cov=True)
        error = np.sqrt(covariance[0, 0])
        found = jax.jit(decay.fit_decay)(norms, num_lags)
        np.testing.assert_allclose([found.rate, found.rate_error], [slope, error], rtol=1e-9)
        residuals = np.log(norms[:used]) - np.polyval(np.polyfit(np.arange(used), np.log(norms[:used]), 1), range(used))
        np.testing.assert_allclose(found.residual, np.sqrt(np.mean(residuals**2)), rtol=1e-9)
        interval = np.log(2) / -np.array([slope - 2 * error, slope + 2 * error])
        np.testing.assert_allclose(found.half_life_interval, interval, rtol=1e-9)
    two = jax.jit(decay.fit_decay)(jnp.array([1.0, 0.5]))
    assert np.isinf(two.rate_error) and two.half_life_interval.tolist() == [0, np.inf]
    np.testing.assert_allclose(two.half_life, 1, rtol=1e-12)


def exponent_of(step, params, carry, batch, batch_shape):
    """The exponent along a forward pass of the step; the loss does not matter."""
    loss = lambda y, target: jnp.zeros(batch_shape)
    problem = trusted_problem(step, loss, params, carry, batch, None, batch_shape)
    linearised = linearise(problem)
    return dynamics.leading_exponent(linearised, [True] * len(linearised.carries))


def test_leading_exponent_against_a_product_of_jacobians():
    """Two vectors, twice through all real steps; example by example."""
    step, _, params, carry, batch = problems.make("gru", 9)
    mask = np.random.default_rng(2).random((9, 3)) < 0.7

    @jax.jit
    def look(mask):
        held = lambda h, inputs: (jnp.where(inputs[1][:, None], step(params, h, inputs[0])[0], h), h)
        carries = jax.lax.scan(held, carry, (batch.xs, mask))[1]
        one = jax.vmap(jax.jacrev(lambda h, x: step(params, h, x)[0]))
        found = exponent_of(step, params, carry, batch._replace(mask=mask), (3,))
        return jax.vmap(one)(carries, batch.xs), found

    jacobians, found = look(jnp.asarray(mask))
    both = []
    for seed in (0, 1):
        exponents = []
        for b in range(3):
            v = np.random.default_rng(seed).normal(size=3)
            steps = [t for t in range(9) if mask[t, b]]
            for _ in range(2):
                growths = []
                for t in reversed(steps):
                    longer = np.asarray(jacobians[t, b]).T @ v
                    growths.append(np.log(np.linalg.norm(longer) / np.linalg.norm(v)))
                    v = longer
            exponents.append(np.mean(growths))
        both.append(exponents)
    wanted = np.mean(both), np.mean(np.std(both, axis=1))
    np.testing.assert_allclose([found.exponent, found.spread], wanted, rtol=1e-10)
    assert found.error >= abs(np.mean(both[0]) - np.mean(both[1])) - 1e-12 and found.num_wiped == 0


def test_leading_exponent_is_the_first_of_the_spectrum():
    """Backwards along one long trajectory, an integer in the carry beside the state."""
    step, _, params, carry, batch = problems.make("tanh", 1500, examples=1)
    counting = lambda params, carry, x: ((carry[0] + 1, step(params, carry[1], x)[0]), None)
    start = jnp.zeros((), int), carry
    run = lambda start: exponent_of(counting, params, start, batch, (1,))
    spectrum = lambda: lyapunov_spectrum(counting, params, start, batch.xs, num_exponents=1, num_discarded=400)
    found, wanted = jax.jit(lambda: (run(start), spectrum()))()
    assert float(found.spread) == 0
    np.testing.assert_allclose(found.exponent, wanted.exponents[0], atol=3 * wanted.standard_errors[0] + 1e-3)
    np.testing.assert_allclose(found.exponent, wanted.exponents[0], atol=3 * found.error + 1e-3)


@pytest.mark.parametrize(
    ("factors", "exponent", "spread", "wiped"),
    [
        ([0.0, 0.0], -np.inf, 0, 12),
        ([0.5, 0.0], -np.log(2), 0, 6),
        ([0.5, 2.0], 0, np.log(2), 0),
        ([0.5, np.nan], -np.log(2), 0, 0),
        ([np.nan, np.nan], np.nan, np.nan, 0),
    ],
)
def test_exponents_of_resets_and_nan(factors, exponent, spread, wiped):
    product = lambda params, h, x: (h * x, None)

    @jax.jit
    def run(factors):
        batch = Batch(jnp.broadcast_to(factors, (6, 2)))
        return exponent_of(product, (), jnp.ones(2), batch, (2,))

    found = run(jnp.array(factors))
    np.testing.assert_allclose([found.exponent, found.spread], [exponent, spread], atol=1e-12)
    assert int(found.num_wiped) == wiped


@pytest.mark.more("test_the_bound_holds_beyond_what_was_measured")
def test_the_rate_of_the_tail():
    """By loops and NumPy's least squares; the slowest of what the later half shows."""
    rng = np.random.default_rng(3)
    for n in (8, 13, 30, 64):
        norms = 0.7 ** np.arange(n) * np.exp(0.05 * rng.normal(size=n))
        start, span = (n - 1) // 2, n // 8
        (slope, _), covariance = np.polyfit(np.arange(start, n), np.log(norms[start:]), 1, cov=True)
        changes = [np.log(norms[k + span] / norms[k]) / span for k in range(start, n - span)]
        wanted = max(slope + 2 * np.sqrt(covariance[0, 0]), *changes)
        padded = jnp.append(norms, jnp.array([7.0, 0.0]))  # past the last pair nothing is read
        np.testing.assert_allclose(jax.jit(bias_bound.tail_rate)(padded, n), wanted, rtol=1e-9)
    run = jax.jit(bias_bound.tail_rate)
    two = 0.2 ** np.arange(32) + 1e-4 * 0.95 ** np.arange(32)  # the slow part shows itself late
    assert run(two, 32) >= np.log(0.95) - 1e-3 > decay.fit_decay(two).rate
    assert run(0.5 ** np.arange(32.0), 7) == jnp.inf == run(np.ones(32), 32), "too few lags, and no decay"
    assert run(np.where(np.arange(32) < 20, 1.0, 0.0), 32) == -jnp.inf


def test_bound_against_long_sums():
    num_lags, far = 30, 4000
    rng = np.random.default_rng(4)
    phi = 0.8 ** np.arange(num_lags) * np.exp(0.02 * rng.normal(size=num_lags))
    beta = np.exp(float(bias_bound.tail_rate(jnp.array(phi), num_lags)))
    last = max(phi[k] * beta ** (num_lags - 1 - k) for k in range((num_lags - 1) // 2, num_lags))
    grads = np.append(1.0, 0.3 * phi[: num_lags - 1] * rng.random(num_lags - 1))
    kept = np.linspace(0.5, 0.6, num_lags)
    long_phi = np.append(phi, last * beta ** np.arange(1, far))
    slope = np.max(grads[1:] / phi[: num_lags - 1])
    error = np.array([slope * long_phi[k - 1 :].sum() for k in range(1, 200)])
    long_kept = np.append(kept, np.full(199 - num_lags, kept[-1]))
    wanted = np.where(error < long_kept, error / np.where(error < long_kept, long_kept - error, 1), np.inf)
    levels = (0.1, 0.01, 1e-6)
    run = jax.jit(bias_bound.bound_bias, static_argnames="tolerances")
    found = run(phi, grads, kept, num_lags=num_lags, tolerances=levels)
    np.testing.assert_allclose(found.bias_bound, wanted[:num_lags], rtol=1e-9)
    assert np.isinf(found.bias_bound[0])
    windows = [int(np.argmax(wanted <= level)) + 1 for level in levels]
    assert found.bound_window.tolist()[:2] == windows[:2] and windows[0] < num_lags < windows[2]
    assert windows[2] <= found.bound_window[2] <= windows[2] + 1  # from the last window measured on, by its own φ
    none = run(np.ones(num_lags), grads, kept, num_lags=num_lags, tolerances=levels)
    assert none.bound_window.tolist() == [0, 0, 0] and np.all(np.isinf(none.bias_bound))
    short = run(np.append(phi[:20], np.zeros(10)), grads, kept, num_lags=20, tolerances=levels)
    assert np.all(np.diff(np.asarray(short.bias_bound)[10:]) < 0)  # where pairs end the decay goes on
    exact = run(np.append(phi[:20], np.zeros(10)), np.append(grads[:20], np.zeros(10)), kept, num_lags=30,
                tolerances=levels)  # fmt: skip
    assert exact.bias_bound[-1] == 0 and exact.bound_window[-1] == 21  # a cut, one lag later nothing is left
    slow = run(1 - 1e-12 * np.arange(30), 1e-30 * grads, kept, num_lags=30, tolerances=levels)
    assert slow.bound_window.tolist() == [1, 1, 1]


def systems():
    """Fast and slow parts together, and the cells: `(step, loss, params, carry, batch)`."""
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    xs, targets, w_x = rng.normal(size=(64, 4, 3)), rng.normal(size=(64, 4, 4)), 0.3 * rng.normal(size=(3, 4))
    zeros, inner = jnp.zeros((4, 4)), lambda y, target: jnp.sum(y * target, -1)

    def linear(params, h, x):
        h = x @ params["w_x"] + h @ params["w_h"]
        return h, h

    def jumping(params, carry, x):
        h = linear(params, carry[0], x)[0]
        return (h, jnp.concatenate([x, x[:, :1]], -1)), h + 300 * carry[1]

    two = {"w_x": w_x * [1, 1, 30, 30], "w_h": np.diag([0.3, 0.3, 0.98, 0.98])}
    yield linear, inner, two, zeros, Batch(xs, targets * [1, 1, 0.005, 0.005])
    for radius in (1.0, 0.9):
        yield jumping, inner, {"w_x": w_x, "w_h": radius * rotation}, (zeros, zeros), Batch(xs, targets)
    for name in ("tanh", "gru", "lstm"):
        yield problems.make(name, 64)


@pytest.mark.parametrize("number", usual([0], range(6)))
def test_the_bound_holds_beyond_what_was_measured(number):
    """Against the true errors of sliding windows, measured over all lags."""
    step, loss, params, carry, batch = list(systems())[number]

    @jax.jit
    def look(params, carry, batch):
        """The profile, the error of each window and the norm of what it keeps."""
        problem = problem_of(step, loss, params, carry, batch)
        linearised, sums = linearise(problem), back_through(problem).sums
        read_profile = lags.profile_reader(linearised.weights)
        read_curve = lags.curve_reader(sums.grad)

        def read(state, lag, cotangents, grad):
            state, curve = read_curve(state, lag, cotangents, grad)
            kept = norm(state[0]) / jnp.sum(linearised.weights)
            return state, (read_profile(None, lag, cotangents, grad)[1], curve[0], kept)

        return lags.scan_lags(linearised, 64, read, lags.curve_start(sums.grad))

    profile, error, kept = look(params, carry, batch)
    error = np.asarray(error)
    run = jax.jit(bias_bound.bound_bias, static_argnames="tolerances")
    for n in (2, 4, 8, 12, 16, 32):
        found = run(*(a[:n] for a in profile), kept[:n], num_lags=n, tolerances=(0.1, 0.01))
        assert np.all(np.asarray(found.bias_bound) >= error[:n])
        for tolerance, window in zip((0.1, 0.01), found.bound_window.tolist(), strict=True):
            assert window == 0 or window > 64 or error[window - 1] <= tolerance
    assert np.any(found.bound_window) == (number != 1), "an orthogonal memory has none, the others do"


def test_shares_of_stuck_units():
    rng = np.random.default_rng(5)
    leaf, mask = rng.normal(size=(8, 3, 5)), np.ones((8, 3), bool)
    leaf[:, :, 0], leaf[:, :, 1] = 0, np.sign(leaf[:, :, 1])
    leaf[:, :, 2] = 0
    leaf[3, 1, 2], mask[2, 1] = 7.0, False  # what a masked step emitted does not count
    leaf[0] = 9.0  # nor does what was given
    leaf[5, 0, 3] = 0
    alone = rng.normal(size=(8, 3))
    zero = [np.ones((8, 3, 5), bool), np.ones((8, 3), bool)]
    held = [still.copy() for still in zero]
    share = jax.jit(functools.partial(stuck_units.share_stuck, batch_shape=(3,)))
    of = lambda leaves, mask: share(leaves, list(map(stuck_units.Still, zero, held))[: len(leaves)], mask)
    np.testing.assert_allclose(of([leaf, alone], mask), (1 / 6, 2 / 6))
    np.testing.assert_allclose(of([leaf, alone], None), (1 / 6, 1 / 6))
    short = [stuck_units.Still(zero[0][:1], held[0][:1])]
    np.testing.assert_allclose(share([leaf[:1]], short, None), (0, 0))
    zero[0][7] = False  # what the last step emits enters none
    np.testing.assert_allclose(of([leaf, alone], None), (1 / 6, 1 / 6))
    zero[0][4, 1, 0] = False  # moved once, where it counts
    np.testing.assert_allclose(of([leaf, alone], mask), (1 / 6, 1 / 6))
    held[0][:4, :, 1] = False  # at ±1, and free to move
    np.testing.assert_allclose(of([leaf, alone], mask), (0, 1 / 6))


@pytest.mark.parametrize(
    ("activation", "bias", "dead"),
    [("relu", -9.0, True), ("relu", 0.5, False), ("tanh", 0.0, False), (None, 0.0, False)],
)
def test_what_is_zero_by_its_data_is_not_dead(activation, bias, dead):
    """A dead ReLU stays at zero however it is nudged; a net at rest and a memory that is not used do not."""
    activate = getattr(jax.nn, activation) if activation else lambda a: a

    def step(params, carry, x):
        h, memory = carry
        h = activate(x @ params["w_x"] + h @ params["w_h"] + params["b"])
        return (h, memory), h

    rng = np.random.default_rng(0)
    params = {"w_x": rng.normal(size=(2, 4)), "w_h": rng.normal(size=(4, 4)), "b": np.full(4, bias)}
    carries = jnp.zeros((5, 3, 4)), jnp.zeros((5, 3, 2))
    batch = Batch(jnp.zeros((5, 3, 2)))
    still = jax.jit(lambda params: stuck_units.find_still(step, params, carries, batch))(params)
    still = [leaf.zero for leaf in still]
    assert [bool(leaf.all()) for leaf in still] == [dead, False] and bool(still[0].any()) == dead
    assert not still[1].any()


def test_two_lags_have_a_half_life():
    fit = jax.jit(decay.fit_decay)
    np.testing.assert_allclose(fit(jnp.array([1.0, 0.9])).half_life, np.log(0.5) / np.log(0.9), rtol=1e-6)
    assert np.isinf(fit(jnp.array([1.0, 1.1])).half_life)


def test_a_gap_is_no_end():
    """Masks leave lags without a pair; what comes after them arrives."""
    assert int(jax.jit(decay.fit_decay)(jnp.array([1.0, 0.5, 0.0, 0.4, 0.2])).zero_lag) == -1
    assert int(jax.jit(decay.fit_decay)(jnp.array([1.0, 0.0, 0.4, 0.0, 0.0])).zero_lag) == 3


@pytest.mark.parametrize("num_steps", [*range(1, 200), 1000, 4096])
def test_windows_tried(num_steps):
    """They are close together and few."""
    windows = candidate_windows(num_steps)
    assert windows[0] == 1 and windows[-1] == num_steps and windows == sorted(set(windows))
    assert all(b <= 2 * a for a, b in itertools.pairwise(windows))
    assert len(windows) <= np.log2(num_steps) + 3
    measured = measured_windows(num_steps)
    assert measured[-1] == num_steps and np.all(np.diff(measured) > 0)
    assert all(b - a <= max(1, a / 4) or b == num_steps for a, b in itertools.pairwise(measured.tolist()))


@pytest.mark.parametrize("scale", [1.0, 1e200, 1e-200])
def test_curvature_is_that_along_the_unit_vector(scale):
    matrix = np.array([[2.0, 0.5, -1.0], [0.5, 1.0, 0.0], [-1.0, 0.0, 3.0]])
    direction = np.array([1.0, 2.0, -2.0])
    found = dynamics.curvature_along(jnp.asarray(scale * direction), lambda v: matrix @ v, jnp.zeros(3))
    np.testing.assert_allclose(found, direction @ matrix @ direction / 9, rtol=1e-12)
