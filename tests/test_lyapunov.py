"""Lyapunov spectra against 50-digit arithmetic, plain QR loops, closed forms and the literature."""

import math
import os

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import problems
import pytest
from jax.flatten_util import ravel_pytree
from problems import usual, usual_rows

from jbptt import cells
from jbptt.analysis.lyapunov import lyapunov_spectrum

OPTIMIZED = True

# How many ensembles of the chaotic systems are averaged: 1 in the usual suite, JBPTT_LYAPUNOV=100 in the full run.
NUM_ENSEMBLES = int(os.environ.get("JBPTT_LYAPUNOV", "1"))


def matrix_step(params, h, x):
    """h ← x h: the Jacobians are the inputs themselves."""
    return x @ h, None


def linear_step(params, h, x):
    return params @ h, None


def spectrum(step, params, carry, xs, **options):
    return jax.jit(lambda p, c, x: lyapunov_spectrum(step, p, c, x, **options))(params, carry, xs)


# Against 50 digits


def exponents_of_product(matrices, num_discarded):
    """50 digits: one QR of the plain product of the kept Jacobians, nothing made orthonormal on the way.

    The frame that enters them is aligned by the Jacobians before, from another start than the package's.
    """
    with mpmath.workdps(50):
        matrices = [mpmath.matrix(m) for m in matrices]
        n = matrices[0].rows
        frame = mpmath.eye(n)
        for m in matrices[:num_discarded]:
            frame = mpmath.qr(m * frame)[0]
        product = frame.copy()
        for m in matrices[num_discarded:]:
            product = m * product
        upper = mpmath.qr(product)[1]
        steps = len(matrices) - num_discarded
        return np.array([float(mpmath.log(abs(upper[i, i])) / steps) for i in range(n)])


def driven_matrices():
    """Non-symmetric random matrices that separate their directions fast, so that 40 steps align any frame."""
    rng = np.random.default_rng(1)
    return rng.normal(size=(64, 3, 3)) @ np.diag([2.0, 0.5, 0.1]) @ rng.normal(size=(3, 3))


def tanh_jacobians():
    """50 digits: a driven tanh RNN, h' = tanh(x w_x + h w_h + b); J = diag(1 − h'²) w_hᵀ."""
    rng = np.random.default_rng(2)
    n, num_steps = 3, 104
    params = {"w_x": 0.5 * rng.normal(size=(2, n)), "w_h": rng.normal(size=(n, n)), "b": np.array([0.1, -0.2, 0.3])}
    xs, h = rng.normal(size=(num_steps, 2)), rng.normal(size=n)
    jacobians = []
    with mpmath.workdps(50):
        w_x, w_h, b = (mpmath.matrix(params[name]).T for name in ("w_x", "w_h", "b"))
        state = mpmath.matrix(h)
        for x in xs:
            state = (w_x * mpmath.matrix(x) + w_h * state + b.T).apply(mpmath.tanh)
            jacobians.append(mpmath.diag([1 - a**2 for a in state]) * w_h)
    return params, h, xs, jacobians


def test_driven_product_to_fifty_digits():
    matrices = driven_matrices()
    exact = exponents_of_product(matrices, 40)
    from_key = lambda key: lyapunov_spectrum(matrix_step, None, jnp.ones(3), matrices, num_discarded=40, key=key)
    found = jax.jit(jax.vmap(from_key))(jax.random.split(jax.random.key(5), 3))
    np.testing.assert_allclose(found.exponents, [exact] * 3, rtol=0, atol=1e-12)
    # What a transposed or a reversed accumulation would have given is far away, in every exponent.
    kept, before = matrices[40:], matrices[:40]
    for wrong in (matrices.transpose(0, 2, 1), [*before, *kept[::-1]], [*before, *kept.transpose(0, 2, 1)]):
        assert np.all(np.abs(exponents_of_product(wrong, 40) - exact) > 1e-3)


@pytest.mark.more("test_driven_product_to_fifty_digits")
def test_driven_rnn_to_fifty_digits():
    params, h, xs, jacobians = tanh_jacobians()
    exact = exponents_of_product(jacobians, 80)
    cell = cells.rnn(2, 3)
    found = spectrum(cell.step, params, jnp.asarray(h), xs, num_discarded=80)
    np.testing.assert_allclose(found.exponents, exact, rtol=0, atol=1e-12)
    transposed = exponents_of_product([j.T for j in jacobians], 80)
    assert np.all(np.abs(transposed - exact) > 1e-3)


# Against a QR loop with explicit Jacobians, every cell


def flat_step(step, params, carry):
    """The step on the flattened inexact leaves of a carry, in the order of the tree."""
    flat, unravel = ravel_pytree(carry)
    return flat, lambda h, x: ravel_pytree(step(params, unravel(h), x)[0])[0]


def first_frame(size, num_exponents):
    """Where the package starts without a key."""
    return np.linalg.qr(jax.random.normal(jax.random.key(0), (size, num_exponents)))[0]


def loop_exponents(step, params, carry, xs, num_exponents, num_discarded=0):
    """`[kept, k]` running means from reverse-mode Jacobians, one after another, and NumPy's QR."""
    flat, run = flat_step(step, params, carry)
    jacobian = jax.jit(lambda h, x: (run(h, x), jax.jacrev(run)(h, x)))
    frame, logs = first_frame(flat.size, num_exponents), []
    for x in xs:
        flat, j = jacobian(flat, x)
        frame, upper = np.linalg.qr(np.asarray(j) @ frame)
        logs.append(np.log(np.abs(np.diagonal(upper))))
    logs = logs[num_discarded:]
    means = np.cumsum(logs, axis=0) / np.arange(1, len(logs) + 1)[:, None]
    return means[:, np.argsort(-means[-1])]


CELLS = {"linear": None, "tanh": 1, "leaky_relu": None, "gru": 2, "lstm": None}


@pytest.mark.parametrize(("name", "num_exponents"), usual_rows([("gru", 2)], CELLS.items()))
def test_cells(name, num_exponents):
    step, _, params, carry, batch = problems.make(name, 24)
    carry, xs = jax.tree.map(lambda a: a[0], carry), batch.xs[:, 0]
    exact = loop_exponents(step, params, carry, xs, num_exponents or ravel_pytree(carry)[0].size)
    found = spectrum(step, params, carry, xs, num_exponents=num_exponents)
    np.testing.assert_allclose(found.history, exact, rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.exponents, exact[-1], rtol=0, atol=1e-10)
    assert np.all(np.diff(found.exponents) <= 0)


@pytest.mark.parametrize(("num_discarded", "qr_every"), usual_rows([(9, 4)], [(0, 7), (9, 4), (9, 100)]))
def test_intervals_only_group_the_steps(num_discarded, qr_every):
    """Neither T nor what is discarded is a multiple: the shorter interval at the end counts by its length."""
    matrices = np.eye(3) + 0.2 * np.random.default_rng(10).normal(size=(40, 3, 3))
    exact = loop_exponents(matrix_step, None, jnp.zeros(3), matrices, 3, num_discarded)
    options = {"num_discarded": num_discarded, "qr_every": qr_every}
    found = spectrum(matrix_step, None, jnp.zeros(3), matrices, **options)
    ends = [*range(qr_every, len(exact), qr_every), len(exact)]  # the step of each estimate
    np.testing.assert_allclose(found.history, exact[np.array(ends) - 1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.exponents, exact[-1], rtol=0, atol=1e-12)


GROWTHS = (0.5, 130, np.float32), (2.0, 200, np.float32), (10.0, 400, np.float64), (0.1, 400, np.float64)


@pytest.mark.more("test_driven_product_to_fifty_digits")
@pytest.mark.parametrize(("growth", "qr_every", "dtype"), usual_rows(GROWTHS[1:2], GROWTHS))
def test_an_interval_may_grow_beyond_every_float(growth, qr_every, dtype):
    """The growth of one interval, and its derivative, where neither the product nor its inverse is a float."""
    matrix = np.diag(np.array([growth, 0.99 * growth, 0.98 * growth], dtype))
    options = {"length": 2 * qr_every + 7, "qr_every": qr_every}
    leading = lambda matrix: lyapunov_spectrum(linear_step, matrix, jnp.zeros(3, dtype), None, **options)
    total = lambda matrix: (jnp.sum(leading(matrix).exponents), leading(matrix))
    slope, found = jax.jit(jax.grad(total, has_aux=True))(matrix)
    exact = np.log(np.linalg.det(matrix.astype(float)))
    rtol = 1e-5 if dtype == np.float32 else 1e-12
    np.testing.assert_allclose(np.sum(found.exponents), exact, rtol=rtol)
    np.testing.assert_allclose(np.sum(found.history, axis=1), exact, rtol=rtol)
    np.testing.assert_allclose(slope, np.linalg.inv(matrix), rtol=rtol, atol=rtol)
    np.testing.assert_allclose(found.exponents, np.log(np.diagonal(matrix)), rtol=0, atol=0.05)


def test_history_and_errors_are_those_of_the_intervals():
    rng = np.random.default_rng(3)
    logs = rng.normal(size=103)
    found = spectrum(lambda p, h, x: (x * h, None), None, jnp.ones(()), np.exp(logs), qr_every=4, num_batches=6)
    ends = [*range(4, 103, 4), 103]
    np.testing.assert_allclose(found.history[:, 0], [np.mean(logs[:end]) for end in ends], rtol=1e-12)
    np.testing.assert_allclose(found.exponents, [np.mean(logs)], rtol=1e-12)
    # 26 intervals in 6 batches; the last interval has 3 steps.
    parts = [[] for _ in range(6)]
    for i, start in enumerate([0, *ends[:-1]]):
        parts[i * 6 // 26].extend(logs[start : ends[i]])
    variance = sum((len(p) / 103 * (np.mean(p) - np.mean(logs))) ** 2 for p in parts) * 6 / 5
    np.testing.assert_allclose(found.standard_errors, [math.sqrt(variance)], rtol=1e-10)
    one = spectrum(lambda p, h, x: (x * h, None), None, jnp.ones(()), np.exp(logs), qr_every=200)
    assert np.isnan(one.standard_errors[0])
    np.testing.assert_allclose(one.exponents, [np.mean(logs)], rtol=1e-12)


def test_columns_are_in_one_order():
    """What is discarded turns the first vector to a direction that grows less afterwards: all fields change places."""
    rates = 1.0 + np.arange(8) / 10
    xs = np.stack([np.diag([0.5, 3.0])] * 24 + [np.diag([rate, 1.0]) for rate in rates])
    found = spectrum(matrix_step, None, jnp.zeros(2), xs, num_discarded=24)
    logs = np.log(rates)
    np.testing.assert_allclose(found.exponents, [np.mean(logs), 0], atol=1e-12)
    np.testing.assert_allclose(found.history[:, 0], np.cumsum(logs) / np.arange(1, 9), atol=1e-12)
    np.testing.assert_allclose(found.history[:, 1], 0, atol=1e-12)
    np.testing.assert_allclose(found.standard_errors, [np.std(logs, ddof=1) / math.sqrt(8), 0], atol=1e-12)


# Closed forms and literature


def linear_rnn(matrix):
    size = len(matrix)
    return {"w_x": jnp.ones((1, size)), "w_h": jnp.asarray(matrix), "b": jnp.full(size, 0.1)}


def test_linear_rnn():
    rng = np.random.default_rng(4)
    basis = rng.normal(size=(4, 4))
    eigenvalues = np.array([1.02, -0.8, 0.5, 0.2])
    params = linear_rnn(basis @ np.diag(eigenvalues) @ np.linalg.inv(basis))
    xs = rng.normal(size=(600, 1))
    found = spectrum(cells.linear(1, 4).step, params, jnp.zeros(4), xs, num_discarded=300)
    np.testing.assert_allclose(found.exponents, np.log(np.abs(eigenvalues)), rtol=0, atol=1e-12)


@pytest.mark.more("test_linear_rnn")
def test_linear_rnn_with_complex_eigenvalues():
    """The frame keeps turning in a complex pair's plane, so that the error falls only like 1/T."""
    matrix = np.random.default_rng(1).normal(size=(5, 5)) / math.sqrt(5)
    eigenvalues = np.linalg.eigvals(matrix)
    assert np.sum(eigenvalues.imag > 0) == 2
    options = {"num_discarded": 500, "qr_every": 4}
    found = spectrum(cells.linear(1, 5).step, linear_rnn(matrix), jnp.zeros(5), np.zeros((400_500, 1)), **options)
    exact = np.sort(np.log(np.abs(eigenvalues)))[::-1]
    np.testing.assert_allclose(found.exponents, exact, rtol=0, atol=1e-6)


@pytest.mark.more("test_linear_rnn")
def test_a_complex_linear_system():
    """Its exponents are ln |eigenvalue|, each twice."""
    rng = np.random.default_rng(3)
    basis = rng.normal(size=(3, 3)) + 1j * rng.normal(size=(3, 3))
    eigenvalues = np.array([1.1j, 0.6 - 0.4j, -0.3])
    matrix = jnp.asarray(basis @ np.diag(eigenvalues) @ np.linalg.inv(basis))
    step = lambda w, z, x: (w @ z + x, None)
    found = spectrum(step, matrix, jnp.ones(3, complex), np.zeros(300), num_discarded=150)
    np.testing.assert_allclose(found.exponents, np.repeat(np.log(np.abs(eigenvalues)), 2), rtol=0, atol=1e-12)
    single = spectrum(step, matrix.astype("complex64"), jnp.ones(3, "complex64"), np.zeros(60, "float32"))
    assert single.exponents.dtype == jnp.float32 and single.exponents.shape == (6,)


@pytest.mark.more("test_linear_rnn")
def test_a_complex_carry_is_the_system_of_its_parts():
    """Not holomorphic, driven, beside a real leaf and a count: no two exponents are the same."""

    def step(w, carry, x):
        z, r, count = carry
        new = jnp.tanh((w * z).real + x) + 1j * (w * jnp.conj(z)).imag + 0.1 * r
        return (new, 0.7 * r + 0.2 * jnp.abs(z) ** 2, count + 1), None

    def in_parts(w, carry, x):
        real, imag, r = carry
        (z, r, _), _ = step(w, (jax.lax.complex(real, imag), r, 0), x)
        return (z.real, z.imag, r), None

    rng = np.random.default_rng(6)
    w, real, imag = jnp.asarray(0.9 - 0.7j), jnp.asarray(rng.normal(size=2)), jnp.asarray(rng.normal(size=2))
    r, xs = jnp.asarray(rng.normal(size=2)), rng.normal(size=60)
    found = lyapunov_spectrum(step, w, (jax.lax.complex(real, imag), r, jnp.array(0)), xs)
    wanted = lyapunov_spectrum(in_parts, w, (real, imag, r), xs)
    assert found.exponents.shape == (6,) and np.min(-np.diff(found.exponents)) > 1e-4
    np.testing.assert_allclose(found.exponents, wanted.exponents, rtol=0, atol=1e-12)


def mean_field_exponent(g):
    """½ ln(g² E[sech⁴(σz)]) with σ² = g² E[tanh²(σz)] (Engelken et al., 2023)."""
    z, w = np.polynomial.hermite_e.hermegauss(200)
    w = w / w.sum()
    sigma = 1.0
    for _ in range(500):
        sigma = g * math.sqrt(w @ np.tanh(sigma * z) ** 2)
    return 0.5 * math.log(g**2 * (w @ np.cosh(sigma * z) ** -4.0))


@pytest.mark.more("test_henon_map")
def test_random_networks():
    """N = 1000, 16 nets of 1000 steps each, within 0.005.

    At this N the mean over 40 nets lies 0.0027 (g = 3) and 0.0019 (g = 2) below the limit of large N and the nets
    scatter by 0.0015: 6 standard errors of the mean of 16 are left, false alarm 2e-9.
    """
    size, num_nets = 1000, 16

    @jax.jit
    def leading(matrix, h):
        step = lambda params, h, x: (params @ jnp.tanh(h), None)
        options = {"length": 1200, "num_discarded": 200, "num_exponents": 1}
        return lyapunov_spectrum(step, matrix, h, None, **options).exponents[0]

    for g, expected in ((3, 0.3102), (2, 0.1547)):
        assert abs(mean_field_exponent(g) - expected) < 1e-4
        found = []
        for seed in range(num_nets):
            rng = np.random.default_rng(seed)
            matrix = (g / math.sqrt(size)) * rng.standard_normal((size, size), dtype=np.float32)
            found.append(leading(matrix, rng.standard_normal(size, dtype=np.float32)))
        assert found[0].dtype == jnp.float32
        assert np.std(found, ddof=1) < 0.003
        assert abs(np.mean(found) - expected) < 0.005


def ensemble(step, draw, **options):
    """Exponents of 64 trajectories side by side, as often as asked for: `[trajectories, k]`, and their errors."""
    starts = jax.tree.map(lambda *a: jnp.stack(a), *[draw(np.random.default_rng(i)) for i in range(NUM_ENSEMBLES)])
    one = lambda carry: lyapunov_spectrum(step, None, carry, None, **options)[:2]
    exponents, errors = jax.jit(lambda s: jax.lax.map(jax.vmap(one), s))(starts)
    return np.concatenate(exponents), np.concatenate(errors)


FALSE_ALARM = 6.6  # standard errors: 1e-8 for a mean of 64 trajectories or more (Student's t with 63 degrees)


def mean_and_error(samples):
    return samples.mean(0), samples.std(0, ddof=1) / math.sqrt(len(samples))


def test_henon_map():
    """a = 1.4, b = 0.3: 0.41922, −1.62319 (Sprott, 2003); the determinant is −b at every step."""

    def step(params, carry, x):
        x, y = carry
        return (1 - 1.4 * x**2 + y, 0.3 * x), None

    draw = lambda rng: (rng.uniform(0, 0.1, 64), rng.uniform(0, 0.1, 64))
    samples, errors = ensemble(step, draw, length=20_000, num_discarded=1000, qr_every=4)
    np.testing.assert_allclose(samples.sum(1), math.log(0.3), rtol=0, atol=1e-12)
    mean, error = mean_and_error(samples)
    assert np.all(error < 5e-4 / math.sqrt(NUM_ENSEMBLES))
    assert np.all(np.abs(mean - [0.41922, -1.62319]) < FALSE_ALARM * error)
    # The error that one trajectory claims is the scatter of the 64 (false alarm of each: 2e-9, χ² with 63 degrees).
    claimed = np.sqrt(np.mean(errors**2, axis=0))
    assert np.all(np.abs(np.log(claimed / samples.std(0, ddof=1))) < 0.7)


@pytest.mark.more("test_henon_map")
def test_lorenz_flow():
    """σ = 10, ρ = 28, β = 8/3: 0.9056, 0, −14.5723 per unit of time (Sprott, 2003); trace −(σ + 1 + β) everywhere."""
    dt = 0.005

    def field(state):
        x, y, z = state
        return jnp.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])

    def step(params, state, _):
        k1 = field(state)
        k2 = field(state + dt / 2 * k1)
        k3 = field(state + dt / 2 * k2)
        return state + dt / 6 * (k1 + 2 * k2 + 2 * k3 + field(state + dt * k3)), None

    draw = lambda rng: rng.normal(size=(64, 3)) + np.array([0, 0, 25])
    samples, _ = ensemble(step, draw, length=64_000, num_discarded=4000, qr_every=20)
    mean, error = mean_and_error(samples / dt)
    np.testing.assert_allclose(samples.sum(1) / dt, -41 / 3, rtol=0, atol=1e-5)  # the flow's; RK4 is 6e-6 off
    assert np.all(error < 3e-3 / math.sqrt(NUM_ENSEMBLES))
    assert np.all(np.abs(mean - [0.9056, 0, -14.5723]) < FALSE_ALARM * error + 1e-4)


# Singular Jacobians and states that are not finite


def rotated(matrix, seed=7):
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=matrix.shape))[0]
    return basis @ matrix @ basis.T


SINGULAR = {  # matrices, and how many exponents are −inf
    "diagonal": (np.diag([2.0, 0.0, 0.5]), 1),
    "symmetric": (rotated(np.diag([2.0, 0.5, 0.0])), 1),
    "of rank one": (np.outer([1.0, 2.0, -1.0], [0.5, 1.0, 1.0]), 2),
    "one row zero": (np.array([[0.4, 0.5, 0.6], [0.0, 0.0, 0.0], [0.3, -0.7, 0.2]]), 1),
    "one column zero": (np.array([[0.4, 0.0, 0.6], [0.7, 0.0, 0.1], [0.3, 0.0, -0.2]]), 1),
    "nilpotent in a block": (np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.5]]), 2),
    "nilpotent": (np.triu(np.ones((3, 3)), 1), 3),
    "zero": (np.zeros((3, 3)), 3),
}


def derivative_of_logs(matrix, num_zero):
    """`∂ Σ ln|λ_i| / ∂M = Σ w_i v_iᵀ / (λ_i w_iᵀ v_i)` over the eigenvalues that are not 0, all of them simple."""
    values, right = np.linalg.eig(matrix)
    others, left = np.linalg.eig(matrix.T)
    total = np.zeros(matrix.shape)
    for i in np.argsort(-np.abs(values))[: len(values) - num_zero]:
        w, v = left[:, np.argmin(np.abs(others - values[i]))], right[:, i]
        total += (np.outer(w, v) / (values[i] * (w @ v))).real
    return total


PRECISIONS = (60, jnp.float32), (0, jnp.float64), (60, jnp.float64)


@pytest.mark.parametrize(("num_discarded", "dtype"), usual_rows(PRECISIONS[1:2], PRECISIONS))
def test_singular_jacobians(num_discarded, dtype):
    """−inf and nothing worse: the other exponents, their errors and their derivatives are as without it."""

    def finite_sum(matrix):
        options = {"length": 120, "num_discarded": num_discarded}
        found = lyapunov_spectrum(linear_step, matrix, jnp.zeros(3, dtype), None, **options)
        return jnp.sum(jnp.where(jnp.isfinite(found.exponents), found.exponents, 0)), found

    matrices = jnp.asarray(np.stack([matrix for matrix, _ in SINGULAR.values()]), dtype)
    grads, found = jax.jit(jax.vmap(jax.grad(finite_sum, has_aux=True)))(matrices)
    assert found.exponents.dtype == dtype
    assert not np.any(np.isnan(found.exponents)) and not np.any(np.isnan(found.history))
    assert np.all(np.isfinite(found.standard_errors)) and np.all(np.isfinite(grads))
    for i, (name, (matrix, num_zero)) in enumerate(SINGULAR.items()):
        size = np.sort(np.abs(np.linalg.eigvals(matrix)))[::-1][: 3 - num_zero]
        assert np.all(found.exponents[i, 3 - num_zero :] == -np.inf), name
        np.testing.assert_array_equal(found.standard_errors[i, 3 - num_zero :], 0)
        # From a random frame the error is ln of a constant / T; aligned, it is rounding.
        atol = 0.05 if num_discarded == 0 else 2e-6 if dtype == jnp.float32 else 1e-12
        np.testing.assert_allclose(found.exponents[i, : 3 - num_zero], np.log(size), rtol=0, atol=atol, err_msg=name)
        if num_discarded:
            exact = derivative_of_logs(matrix, num_zero)
            atol = 1e-4 if dtype == jnp.float32 else 1e-8
            np.testing.assert_allclose(grads[i], exact, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("dtype", usual([jnp.float64], [jnp.float32, jnp.float64]))
def test_one_singular_step_is_enough(dtype):
    """Driven, regular before and after: a row of zeros, or in float64 singular in a general position."""
    size = 8
    xs = np.random.default_rng(11).normal(size=(40, size, size)) / 3
    if dtype == jnp.float64:
        left, sizes, right = np.linalg.svd(xs[17])
        xs[17] = (left * [*sizes[:-1], 0.0]) @ right
    else:
        xs[17, 2] = 0
    found = spectrum(matrix_step, None, jnp.zeros(size, dtype), xs.astype(dtype))
    assert np.all(np.isfinite(found.exponents[:-1])) and found.exponents[-1] == -np.inf
    np.testing.assert_array_equal(np.isfinite(found.history[:, -1]), np.arange(40) < 17)


@pytest.mark.more("test_singular_jacobians")
def test_singular_is_to_rounding():
    """What float32 cannot tell, both ways, and float64 can."""
    stiff, dense = np.diag([1.0, 1e-6]), np.random.default_rng(0).normal(size=(20, 3, 3))
    dense[5] = np.outer([1.0, 2.0, 3.0], [1.0, 0.5, -1.0])
    for dtype, singular in ((np.float32, True), (np.float64, False)):
        found = spectrum(linear_step, stiff.astype(dtype), jnp.zeros(2, dtype), None, length=50).exponents
        assert np.isneginf(found).tolist() == [False, singular]
    found = spectrum(matrix_step, None, jnp.zeros(3), dense).exponents  # in float32 by chance: a zero may hide
    assert np.isneginf(found).tolist() == [False, True, True]


@pytest.mark.more("test_singular_jacobians")
def test_float32_knows_noise_from_numbers():
    """Of rank 4 only to rounding: the others are −inf in both precisions. Near-singular steps are not, in float32."""
    rng = np.random.default_rng(12)
    low_rank = rng.normal(size=(2000, 16, 4)) @ rng.normal(size=(2000, 4, 16)) / 16
    regular = rng.normal(size=(2000, 16, 16)) / 4
    options = {"num_discarded": 500}
    run = lambda xs: lyapunov_spectrum(matrix_step, None, jnp.zeros(16, xs.dtype), xs, **options).exponents
    found = []
    for dtype in (np.float32, np.float64):
        found.append(jax.jit(jax.vmap(run))(np.stack([low_rank, regular]).astype(dtype)))
        np.testing.assert_array_equal(np.isfinite(found[-1]).sum(1), [4, 16])
    np.testing.assert_allclose(*found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("activation", usual([jax.nn.relu], [jax.nn.relu, jax.nn.leaky_relu, jnp.tanh]))
def test_a_state_that_is_not_finite_shows(activation):
    """A ReLU's derivative at NaN is 0 and a leaky one's is its slope: the exponents must not be those of that."""
    step = lambda params, h, x: (activation(params @ h + x) * (1.0 if activation is jnp.tanh else 3.0), None)
    xs = np.zeros(1000)
    if activation is jnp.tanh:
        xs[300] = np.nan
    found = spectrum(step, jnp.array([[1.0, 0.2], [0.3, 1.0]]), jnp.ones(2), xs)
    assert np.all(np.isnan(found.exponents))
    last = int(np.argmax(np.isnan(found.history[:, 0])))  # the first bad row, and what came before it stands
    assert 0 < last < 1000 and np.all(np.isfinite(found.history[:last])) and np.all(np.isnan(found.history[last:]))


# Carries, keys, vmap, precision


@pytest.mark.more("test_dtypes_are_those_of_the_carry")
def test_pytree_carry():
    """A tree of scalars, matrices, two precisions, a count and a key has the spectrum of its flat inexact part."""
    rng = np.random.default_rng(13)
    matrices = np.eye(5) * 0.8 + 0.3 * rng.normal(size=(60, 5, 5))

    def step(params, carry, x):
        flat = jnp.concatenate([carry["a"][None], carry["b"]["c"].ravel()])
        flat = x[0] @ flat + carry["count"] * 1e-3
        key, draw = jax.random.split(carry["key"])
        flat = flat + jax.random.normal(draw) + x[1]
        return {"a": flat[0], "b": {"c": flat[1:].reshape(2, 2)}, "count": carry["count"] + 1, "key": key}, None

    carry = {"a": jnp.zeros(()), "b": {"c": jnp.ones((2, 2))}, "count": jnp.zeros((), jnp.int32)}
    carry["key"] = jax.random.key(1)
    xs = (matrices, np.arange(60))
    found = spectrum(step, None, carry, xs)
    flat = spectrum(matrix_step, None, jnp.zeros(5), matrices)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), found, flat)


@pytest.mark.more("test_dtypes_are_those_of_the_carry")
def test_batched_carry_is_one_system_and_vmap_is_for_batches():
    matrices = np.stack([driven_matrices(), 3 * driven_matrices()[::-1]], axis=1)  # [T, B, n, n]
    options = {"num_discarded": 40}
    one_of_them = lambda h, x: lyapunov_spectrum(matrix_step, None, h, x, **options)
    each = jax.jit(jax.vmap(one_of_them, (0, 1)))(jnp.zeros((2, 3)), matrices)
    alone = spectrum(matrix_step, None, jnp.zeros(3), matrices[:, 1], **options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-12, atol=1e-14), each, alone)
    together = lambda params, h, x: (jnp.einsum("bij,bj->bi", x, h), None)
    joint = spectrum(together, None, jnp.zeros((2, 3)), matrices, **options)
    np.testing.assert_allclose(joint.exponents, np.sort(each.exponents.ravel())[::-1], rtol=0, atol=1e-6)


def test_no_invariant_subspace_traps_the_frame():
    found = spectrum(linear_step, jnp.diag(jnp.array([0.5, 3.0])), jnp.zeros(2), None, length=100, num_exponents=1)
    np.testing.assert_allclose(found.exponents, [math.log(3)], atol=0.05)


@pytest.mark.more("test_dtypes_are_those_of_the_carry")
def test_half_precision_carry():
    """The frame is rounded to bfloat16 at every step, the same way: an error below its ε that no error bar shows."""
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    found = spectrum(linear_step, jnp.eye(2, dtype=jnp.bfloat16) / 2, jnp.zeros(2, jnp.bfloat16), None, length=1000)
    assert found.exponents.dtype == found.standard_errors.dtype == jnp.float32
    error = np.abs(found.exponents + math.log(2))
    assert np.all(error < eps) and np.all(error > 1e-3) and np.all(found.standard_errors < 1e-6)
    for seed in range(3):
        drawn = np.random.default_rng(seed).normal(size=(4, 4)) / 2 + np.diag([2, 1, 0.5, 0.2])
        matrix = jnp.asarray(drawn, jnp.bfloat16)
        options = {"length": 200, "num_discarded": 100, "num_exponents": 1}
        found = spectrum(linear_step, matrix, jnp.zeros(4, jnp.bfloat16), None, **options).exponents
        exact = np.max(np.abs(np.linalg.eigvals(np.asarray(matrix, float))))
        np.testing.assert_allclose(found, math.log(exact), rtol=0, atol=eps)


def test_dtypes_are_those_of_the_carry():
    """A float of Python is one of float64 here; float32 carries have errors in float32."""
    scaling = lambda params, carry, x: (jax.tree.map(lambda c: params * c, carry), None)
    for carry in (1.0, (1.0, 2.0), jnp.ones(1)):
        found = lyapunov_spectrum(scaling, 1 / 3, carry, None, length=50)
        assert {a.dtype for a in found} == {jnp.dtype(jnp.float64)}
        np.testing.assert_allclose(found.exponents, -math.log(3), rtol=1e-14)
    found = lyapunov_spectrum(scaling, np.float32(1 / 3), jnp.ones(2, jnp.float32), None, length=50)
    assert {a.dtype for a in found} == {jnp.dtype(jnp.float32)}


@pytest.mark.more("test_singular_jacobians")
def test_steps_with_a_derivative_of_their_own_for_reverse_mode():
    """The spectrum and its derivative in reverse mode are those of the step without it."""

    @jax.custom_vjp
    def activation(a):
        return jnp.tanh(a)

    activation.defvjp(lambda a: (jnp.tanh(a), a), lambda a, bar: ((1 - jnp.tanh(a) ** 2) * bar,))
    xs = np.random.default_rng(16).normal(size=(30, 3))
    found = []
    for f in (activation, jnp.tanh):
        step = lambda params, h, x, f=f: (f(params @ h + x), None)
        one = lambda m, step=step: lyapunov_spectrum(step, m, jnp.zeros(3), xs, num_exponents=2).exponents
        found.append(jax.jit(lambda m, one=one: (one(m), jax.jacrev(one)(m)))(driven_matrices()[0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), *found)


# Derivatives and memory


@pytest.mark.more("test_singular_jacobians")
@pytest.mark.parametrize("num_exponents", usual([2], [None, 2]))
def test_derivatives(num_exponents):
    """Of the sum and of the leading exponent, in reverse and forward, against central differences."""
    cell = cells.rnn(2, 3)
    rng = np.random.default_rng(15)
    w_h = np.array([[0.9, 0.3, 0.1], [-0.1, 0.5, 0.2], [0.2, 0.1, -0.3]])
    params = {"w_x": 0.3 * rng.normal(size=(2, 3)), "w_h": w_h, "b": np.array([0.1, -0.2, 0.3])}
    flat, unravel = ravel_pytree(params)
    h, xs = rng.normal(size=3), rng.normal(size=(300, 2))

    @jax.jit
    def both(flat):
        options = {"num_discarded": 7, "qr_every": 2, "num_exponents": num_exponents}
        exponents = lyapunov_spectrum(cell.step, unravel(flat), h, xs, **options).exponents
        return jnp.stack([jnp.sum(exponents), exponents[0]])

    reverse = jax.jit(jax.jacrev(both))(flat)
    small = 1e-4 * np.eye(flat.size)
    nudged = np.concatenate([flat + c * small for c in (1, -1, 2, -2)])
    up, down, far_up, far_down = jax.jit(jax.vmap(both))(nudged).reshape(4, flat.size, 2)
    central = (8 * (up - down) - (far_up - far_down)) / 12e-4
    np.testing.assert_allclose(reverse, central.T, rtol=1e-6, atol=1e-8)
    direction = rng.normal(size=flat.size)
    forward = jax.jit(lambda f: jax.jvp(both, (f,), (direction,))[1])(flat)
    np.testing.assert_allclose(forward, reverse @ direction, rtol=1e-10)


@pytest.mark.more("test_memory::test_memory_grows_with_segments_not_steps")
def test_memory():
    """Forward: the history and little else. In reverse: less than one frame per step."""
    size, num_exponents, num_steps = 256, 16, 4096
    cell = cells.rnn(1, size, dtype=jnp.float32)
    shapes = jax.eval_shape(cell.init, jax.random.key(0)), jax.ShapeDtypeStruct((size,), jnp.float32)

    def bytes_of(derivative):
        def leading(params, carry, xs):
            return lyapunov_spectrum(cell.step, params, carry, xs, num_exponents=num_exponents).exponents[0]

        function = jax.grad(leading) if derivative else leading
        xs = jax.ShapeDtypeStruct((num_steps, 1), jnp.float32)
        return jax.jit(function).lower(*shapes, xs).compile().memory_analysis().temp_size_in_bytes

    frame, history = 4 * size * num_exponents, 4 * num_exponents * num_steps
    assert bytes_of(derivative=False) < 3 * history  # one frame per step would be 256 of them
    assert bytes_of(derivative=True) < num_steps * frame / 6


# The border


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_exponents": 4}, "num_exponents must be <= 3"),
        ({"num_exponents": 0}, "num_exponents"),
        ({"qr_every": 0}, "qr_every"),
        ({"num_discarded": -1}, "num_discarded"),
        ({"num_discarded": 5}, "num_discarded must be < T = 5"),
        ({"num_batches": 1}, "num_batches"),
        ({"length": 6}, "leaves disagree on T"),
        ({"xs": None}, "number of steps is unknown"),
        ({"carry": jnp.zeros(3, jnp.int32)}, "no floating-point entry"),
        ({"carry": jnp.zeros(3, jnp.complex64), "num_exponents": 7}, "num_exponents must be <= 6, the number of real"),
        ({"step": lambda p, c, x: (c[:2], None)}, "step changes carry"),
    ],
)
def test_errors(options, words):
    arguments = {"step": lambda p, c, x: (c, None), "params": None, "carry": jnp.zeros(3), "xs": jnp.zeros(5)}
    with pytest.raises(ValueError, match=words):
        lyapunov_spectrum(**{**arguments, **options})
