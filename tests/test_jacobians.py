"""Step Jacobians, their products, gate paths and alignment, against NumPy loops and arithmetic of many digits."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import problems
import pytest
from oracles import brute_force
from problems import EXAMPLES, HIDDEN, INPUT, assert_close, usual, usual_rows

from jbptt import Batch, cells
from jbptt.analysis.alignment import adjoint_alignment
from jbptt.analysis.gate_jacobians import gate_paths
from jbptt.analysis.jacobian_spans import jacobian_products
from jbptt.analysis.jacobians import step_jacobians
from jbptt.analysis.linalg.scaled_svd import from_rows, log_singular_values

OPTIMIZED = True

NUM_STEPS = 24
NAMES = ["linear", "tanh", "gru", "lstm"]
MASK = np.random.default_rng(7).random((NUM_STEPS, EXAMPLES)) < 0.8
WEIGHTS = np.random.default_rng(8).normal(size=(NUM_STEPS, EXAMPLES))
WEIGHTS[3] = 0
GATES = np.linspace(-1.5, 2, NUM_STEPS) * (np.arange(NUM_STEPS) != 9)


@functools.cache
def by_hand(name, masked=False):
    """`J [T, B, n, n]` and `∂ℓ_t/∂carries[t] [T, B, n]`, one step of one example at a time."""
    step, loss, params, carries, batch = problems.make(name, NUM_STEPS)
    jacobians, slopes = [], []
    for b in range(EXAMPLES):
        carry = jax.tree.map(lambda c, b=b: c[b], carries)
        for t in range(NUM_STEPS):
            x, target = jax.tree.map(lambda a, t=t, b=b: a[t, b], (batch.xs, batch.targets))
            mask = jnp.asarray(MASK[t, b] or not masked)
            derivatives = brute_force.linearise(step, loss, params, carry, x, target, mask, 1.0)
            carry, _, ((_, by_carry), (_, slope)) = derivatives
            jacobians.append(np.asarray(by_carry))
            slopes.append(np.asarray(slope))
    n = slopes[0].size
    in_order = lambda rows, shape: np.array(rows).reshape(EXAMPLES, NUM_STEPS, *shape).swapaxes(0, 1)
    return in_order(jacobians, (n, n)), in_order(slopes, (n,))


def of_examples(analysis, name, **options):
    """An analysis of unbatched carries, for every example of a problem: axis 0."""
    step, _, params, carry, batch = problems.make(name, NUM_STEPS)
    run = lambda carry, xs: analysis(step, params, carry, xs, **options)
    return jax.jit(jax.vmap(run, in_axes=(0, 1)))(carry, batch.xs)


def linear_in_x(params, h, x):
    """h ← x h, so that the inputs are the Jacobians."""
    return x @ h, ()


@pytest.mark.parametrize("name", usual(["lstm+readout"], [*NAMES, "lstm+readout", "gru+reset"]))
def test_step_jacobians(name):
    wanted = by_hand(name)[0].swapaxes(0, 1)
    found = of_examples(step_jacobians, name)
    assert_close(found, wanted)
    assert np.max(np.abs(found - wanted.swapaxes(2, 3))) > 0.1  # transposed is something else


def test_a_batch_is_one_joint_system():
    """A leaf [B, H] flattens with the examples outside, so that the joint Jacobian has blocks."""
    step, _, params, carry, batch = problems.make("tanh", NUM_STEPS)
    joint = jax.jit(functools.partial(step_jacobians, step))(params, carry, batch.xs)
    assert joint.shape == (NUM_STEPS, EXAMPLES * HIDDEN, EXAMPLES * HIDDEN)
    blocks = joint.reshape(NUM_STEPS, EXAMPLES, HIDDEN, EXAMPLES, HIDDEN)
    wanted = np.einsum("tbij,bc->tbicj", by_hand("tanh")[0], np.eye(EXAMPLES))
    assert_close(blocks, wanted)


def mixed_step(params, carry, x):
    """A carry of every kind: two precisions, a complex number, a counter and a key."""
    key, subkey = jax.random.split(carry["key"])
    noise = 0 * jax.random.normal(subkey)
    a = params * carry["a"] + carry["z"].real * jnp.arange(1.0, 3) + noise
    single = (carry["single"] * 2 + carry["a"][0] + x).astype(jnp.float32)
    z = (2 + 3j) * carry["z"] + 1j * carry["a"][1]
    return {"a": a, "count": carry["count"] + 1, "key": key, "single": single, "z": z}, carry["count"]


MIXED = {
    "a": jnp.ones(2),
    "count": jnp.zeros((), int),
    "key": jax.random.key(0),
    "single": jnp.ones((), jnp.float32),
    "z": jnp.asarray(1 + 1j),
}


@pytest.mark.more("test_step_jacobians")
def test_pytree_carries():
    """Leaves in tree order; a complex number is its real and imaginary part; the others pass untouched."""
    found = jax.jit(lambda: step_jacobians(mixed_step, 0.5, MIXED, jnp.ones(3)))()
    wanted = [[0.5, 0, 0, 1, 0], [0, 0.5, 0, 2, 0], [1, 0, 2, 0, 0], [0, 0, 0, 2, -3], [0, 1, 0, 3, 2]]
    np.testing.assert_array_equal(found, [wanted] * 3)
    products = jax.jit(lambda: jacobian_products(mixed_step, 0.5, MIXED, jnp.ones(3), spans=[3]))()
    check_against_digits(products.log_singular_values[0], found)
    assert_close(products.singular_values[0], np.linalg.svd(np.linalg.matrix_power(wanted, 3))[1])


def test_autonomous_masked_and_one_step():
    step = lambda w, h, x: (jnp.tanh(w @ h), ())
    w, h = jnp.array([[0.3, 1.2], [-0.7, 0.4]]), jnp.array([0.2, -0.1])
    mask = jnp.array([True, False, True])
    found, held, one = jax.jit(
        lambda: (
            step_jacobians(step, w, h, None, length=3),
            step_jacobians(lambda w, h, x: step(w, h + 0 * x, x), w, h, jnp.array([0, jnp.nan, 0]), mask=mask),
            step_jacobians(step, w, h, None, length=1),
        )
    )()
    after = np.tanh(w @ h)
    first = (1 - after**2)[:, None] * w
    second = (1 - np.tanh(w @ after) ** 2)[:, None] * w
    assert_close(found[:2], np.stack([first, second]))
    assert_close(held, np.stack([first, np.eye(2), second]))
    assert_close(one, first[None])


def test_steps_with_a_derivative_of_their_own_for_reverse_mode():
    @jax.custom_vjp
    def activation(a):
        return jnp.tanh(a)

    activation.defvjp(lambda a: (jnp.tanh(a), a), lambda a, bar: ((1 - jnp.tanh(a) ** 2) * bar,))
    _, _, params, carry, batch = problems.make("tanh", NUM_STEPS)
    step = cells.rnn(INPUT, HIDDEN, activation=activation).step
    run = jax.vmap(lambda carry, xs: step_jacobians(step, params, carry, xs), in_axes=(0, 1))
    assert_close(jax.jit(run)(carry, batch.xs), by_hand("tanh")[0].swapaxes(0, 1))


def digits(jacobians, num_digits):
    """ln of the singular values of the product `J_last … J_first`, in decimal arithmetic of that many digits."""
    with mpmath.workdps(num_digits):
        product = mpmath.eye(len(jacobians[0].tolist()))
        for jacobian in jacobians:
            product = mpmath.matrix(jacobian.tolist()) * product
        values = mpmath.svd_r(product, compute_uv=False)
        smallest = mpmath.mpf(10) ** (10 - num_digits) * max(values)
        assert min(values) > smallest, "too few digits"
        return np.array(sorted((float(mpmath.log(v)) for v in values), reverse=True))


def check_against_digits(logs, jacobians, num_digits=200, tolerance=1e-10):
    wanted = digits(np.asarray(jacobians), num_digits)
    np.testing.assert_allclose(logs, wanted, rtol=0, atol=tolerance)  # of logarithms: relative, of every value
    return wanted


@pytest.mark.parametrize("name", usual(["gru"], NAMES))
def test_products(name):
    spans = (20, 1, 2, 7, 20)
    found, sizes = of_examples(jacobian_products, name, spans=spans, start=3), []
    assert found.spans.tolist() == [list(spans)] * EXAMPLES
    for b in range(EXAMPLES):
        jacobians = by_hand(name)[0][:, b]
        for logs, span in zip(found.log_singular_values[b], spans, strict=True):
            wanted = check_against_digits(logs, jacobians[3 : 3 + span])
            sizes.append(np.exp([wanted[0], wanted[0] - wanted[-1]]))
            if span > 1 and b == 0 and name != "linear":
                for other in (jacobians[3 : 3 + span][::-1], jacobians[4 : 4 + span], jacobians[2 : 2 + span]):
                    wrong = digits(other, 200)
                    assert np.max(np.abs(wrong - wanted)) > 1e-3  # reversed, a step late, a step early
    norms, conditions = np.moveaxis(np.reshape(sizes, (EXAMPLES, len(spans), 2)), -1, 0)
    np.testing.assert_allclose(found.norms, norms, rtol=1e-9)
    np.testing.assert_allclose(found.condition_numbers, conditions, rtol=1e-9)


def test_condition_numbers_far_beyond_double_precision():
    rng = np.random.default_rng(3)
    cell = cells.lstm(INPUT, HIDDEN)
    params = problems.draw(rng, jax.eval_shape(cell.init, jax.random.key(0)), scale=1.0)
    carry = problems.draw(rng, jax.eval_shape(cell.initial_carry))
    xs = rng.normal(size=(60, INPUT))
    common = (cell.step, params, carry, xs)
    found, jacobians = jax.jit(lambda: (jacobian_products(*common, spans=[60]), step_jacobians(*common)))()
    check_against_digits(found.log_singular_values[0], jacobians, num_digits=400)
    assert found.log_condition_numbers[0] > np.log(1e90)


@functools.partial(jax.jit, static_argnames="spans")
def products_of(jacobians, spans):
    carry = jnp.zeros(jacobians.shape[1], jacobians.dtype)
    return jacobian_products(linear_in_x, None, carry, jacobians, spans=spans)


def logs_of(jacobians, spans):
    return products_of(jacobians, spans).log_singular_values


@pytest.mark.parametrize("kind", usual(["both"], ["rows", "columns", "both", "triangular", "far apart"]))
def test_graded_jacobians(kind):
    """Rows or columns far smaller than others, as closed gates make them, are no less accurate."""
    rng = np.random.default_rng(4)
    jacobians = rng.normal(size=(12, 4, 4))
    small = 10.0 ** -np.array([3, 9, 0, 6])
    scaled = {
        "rows": small[:, None] * jacobians,
        "columns": small * jacobians,
        "both": small[:, None] * jacobians * small[::-1],
        "triangular": np.tril(jacobians),
        "far apart": jacobians * 10.0 ** rng.integers(-150, 150, size=(12, 1, 1)),
    }[kind]
    for logs, span in zip(logs_of(scaled, (1, 5, 12)), (1, 5, 12), strict=True):
        check_against_digits(logs, scaled[:span], num_digits=500)


@pytest.mark.more("test_condition_numbers_far_beyond_double_precision")
@pytest.mark.parametrize("radius", usual([0.5], [1.5, 0.5]))
def test_span_of_ten_thousand(radius):
    """2×2: σ₁ and σ₂ from the Frobenius norm and the determinant of the product, which 50 digits give."""
    rng = np.random.default_rng(5)
    jacobian = np.array([[0.9, 0.6], [-0.1, 0.2]])
    jacobian *= radius / np.max(np.abs(np.linalg.eigvals(jacobian)))
    jacobians = jacobian + 0.05 * radius * rng.normal(size=(10_000, 2, 2))
    with mpmath.workdps(50):
        a, b, c, d, determinant = (mpmath.mpf(v) for v in (1, 0, 0, 1, 1))
        for (p, q), (r, s) in jacobians:
            p, q, r, s = map(mpmath.mpf, (p, q, r, s))
            a, b, c, d = p * a + q * c, p * b + q * d, r * a + s * c, r * b + s * d
            determinant *= p * s - q * r
        squares = a * a + b * b + c * c + d * d
        largest = mpmath.log((squares + mpmath.sqrt(squares**2 - 4 * determinant**2)) / 2) / 2
        wanted = [float(largest), float(mpmath.log(abs(determinant)) - largest)]
    assert abs(wanted[0]) > 3000 and wanted[0] - wanted[1] > 9_000
    np.testing.assert_allclose(logs_of(jacobians, (10_000,))[0], wanted, rtol=0, atol=1e-10)
    # 32 bits hold the logarithm to 1e-3; what counts is that 10⁴ scalings add nothing to that.
    single = logs_of(jnp.asarray(jacobians, jnp.float32), (10_000,))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single[0], wanted, rtol=1e-6)


GROWTH = np.diag([1e4, 1e2, 1e-2, 1e-4])


def low_rank(rng, rank, num_steps=6):
    return rng.normal(size=(num_steps, 4, rank)) @ rng.normal(size=(num_steps, rank, 4))


def singular_systems():
    """Jacobians `[6, 4, 4]` and how many singular values of the product of the first 1, 3 and 6 are 0."""
    rng = np.random.default_rng(6)
    plain = rng.normal(size=(6, 4, 4))
    one = lambda edit: np.stack([edit(j) if t == 2 else j for t, j in enumerate(plain)])
    column = np.ones(4)
    column[1] = 0
    yield "regular", plain, (0, 0, 0)
    yield "a dead row", one(lambda j: column[:, None] * j), (0, 1, 1)
    yield "a column not read", one(lambda j: column * j), (0, 1, 1)
    yield "zero", one(lambda j: 0 * j), (0, 4, 4)
    yield "rank one, dense", one(lambda j: np.outer(j[0], j[1])), (0, 3, 3)
    yield "rank two, dense, always", low_rank(rng, 2), (2, 2, 2)
    yield "rank three, dense, constant", np.stack([low_rank(rng, 3)[0]] * 6), (1, 1, 1)
    yield "shift register", np.stack([np.eye(4, k=-1)] * 6), (1, 3, 4)
    yield "nilpotent, dense", np.stack([np.kron(np.eye(2), [[1, -1], [1, -1]])] * 6), (2, 4, 4)
    yield "the direction of growth is lost", np.stack([GROWTH] * 5 + [plain[5] * [0, 1, 1, 1]]), (0, 0, 1)
    yield "identity", np.stack([np.eye(4)] * 6), (0, 0, 0)


@pytest.mark.parametrize(("jacobians", "num_zero"), [pytest.param(j, z, id=i) for i, j, z in singular_systems()])
def test_singular_jacobians(jacobians, num_zero):
    spans = (1, 3, 6)
    found = np.asarray(logs_of(jacobians, spans))
    assert np.isneginf(found).sum(axis=1).tolist() == list(num_zero)
    for logs, span, zeros in zip(found, spans, num_zero, strict=True):
        values = np.linalg.svd(np.linalg.multi_dot([np.eye(4), *jacobians[:span][::-1]]), compute_uv=False)
        np.testing.assert_allclose(np.exp(logs[: 4 - zeros]), values[: 4 - zeros], rtol=1e-8, atol=1e-13 * values[0])
    conditions = products_of(jacobians, spans).condition_numbers
    assert np.isposinf(conditions).tolist() == [zeros > 0 for zeros in num_zero]
    assert not np.any(np.isnan(conditions))


@pytest.mark.more("test_singular_jacobians")
def test_rows_that_depend_on_each_other():
    """Rows that are multiples of one, up to rounding, whatever their sizes: one singular value is left."""
    rng = np.random.default_rng(10)
    rows = np.outer(rng.normal(size=5), rng.normal(size=5))
    found = jax.jit(log_singular_values)(from_rows(jnp.asarray(rows), jnp.array([0, -400, 3, 3000, 2999], jnp.int32)))
    lengths = np.linalg.norm(rows[3:], axis=1)
    np.testing.assert_allclose(found[0], 3000 * np.log(2) + np.log(np.hypot(*lengths * [1, 0.5])), rtol=1e-14)
    assert np.all(np.isneginf(found[1:]))


@pytest.mark.more("test_singular_jacobians")
def test_dead_units_and_what_is_not_finite():
    """A ReLU that is off loses its row; NaN in one Jacobian is NaN from there on, and only there."""
    cell = cells.rnn(1, 2, activation=jax.nn.relu)
    params = {"w_x": jnp.ones((1, 2)), "w_h": jnp.array([[0.5, 0.2], [0.1, 0.4]]), "b": jnp.array([0.0, -10])}
    common = (cell.step, params, jnp.ones(2))
    xs = jnp.ones((4, 1))
    found = jax.jit(lambda xs: jacobian_products(*common, xs, spans=[1, 2, 4]))
    dead = found(xs).log_singular_values
    np.testing.assert_allclose(dead[:, 0], np.log(np.hypot(0.5, 0.1) * np.array([1, 0.5, 0.125])), rtol=1e-13)
    assert np.all(np.isneginf(dead[:, 1]))
    jacobians = np.random.default_rng(0).normal(size=(6, 4, 4))
    jacobians[3, 1, 2] = np.nan
    assert np.isnan(logs_of(jacobians, (1, 3, 6))).all(axis=1).tolist() == [False, False, True]
    after_zero = np.zeros((3, 2, 2))
    after_zero[2] = [[0, np.inf], [0, 0]]
    wanted = np.array([[-np.inf] * 2, [np.nan] * 2])
    np.testing.assert_array_equal(logs_of(after_zero, (2, 3)), wanted)
    # A ReLU's derivative at NaN is 0: the state says it.
    lost = found(xs.at[1].set(jnp.nan)).log_singular_values
    assert np.isnan(lost).all(axis=1).tolist() == [False, True, True] and not np.isnan(lost[0]).any()
    jacobians = step_jacobians(*common, xs.at[1].set(jnp.nan))
    assert np.isnan(jacobians).all(axis=(1, 2)).tolist() == [False, True, True, True]


@pytest.mark.more("test_a_traced_start_may_have_any_dtype")
def test_starts_may_be_traced():
    """One program for all starts, and where there is no product, NaN."""
    step, _, params, carry, batch = problems.make("tanh", NUM_STEPS)
    run = lambda start: jacobian_products(step, params, carry[0], batch.xs[:, 0], spans=(2, 20), start=start)
    found = jax.jit(jax.vmap(run))(jnp.array([0, 4, 5, 22, 23, -1])).log_singular_values
    jacobians = by_hand("tanh")[0][:, 0]
    for row, start, valid in [(0, 0, (2, 20)), (1, 4, (2, 20)), (2, 5, (2,)), (3, 22, (2,)), (4, 23, ()), (5, 0, ())]:
        for logs, span in zip(found[row], (2, 20), strict=True):
            if span in valid:
                check_against_digits(logs, jacobians[start : start + span])
            else:
                assert np.all(np.isnan(logs))


STARTS = [(2**63 - 1, jnp.int64), (2**63 + 5, jnp.uint64), (100, jnp.int8)]


@pytest.mark.parametrize(("start", "dtype"), usual_rows(STARTS[:1], STARTS))
def test_a_traced_start_may_have_any_dtype(start, dtype):
    """start + span is out of the range of start, and the sum not out of the sequence of 300 for all of them."""
    run = lambda start: jacobian_products(lambda w, h, x: (w * h, ()), 2.0, jnp.ones(()), None, **options, start=start)
    options = {"length": 300, "spans": (2, 200, 201)}
    found = jax.jit(run)(jnp.asarray(start, dtype)).log_norms
    wanted = np.log(2) * np.array([2, 200, np.nan]) if dtype == jnp.int8 else np.full(3, np.nan)
    np.testing.assert_allclose(found, wanted, rtol=1e-13)


def two_layers(seed, num_steps):
    """Random Jacobians of two layers of two units, the second fed by the first: block triangular."""
    jacobians = np.random.default_rng(seed).normal(size=(num_steps, 4, 4))
    jacobians[:, :2, 2:] = 0
    return jacobians


@pytest.mark.more("test_condition_numbers_far_beyond_double_precision")
def test_accuracy_where_the_parts_of_a_system_overtake_each_other():
    """1e-10 in 100 steps; in 300 what is documented: what Jacobians changed by ε of their norm have."""
    for seed in range(3):
        check_against_digits(logs_of(two_layers(seed, 100), (100,))[0], two_layers(seed, 100), 300)
    lost = []
    for seed in range(3):
        jacobians, rng = two_layers(seed, 300), np.random.default_rng(100 + seed)
        exact, changed = digits(jacobians, 300), []
        for _ in range(3):
            nudge = rng.normal(size=jacobians.shape)
            size = np.finfo(float).eps * np.linalg.norm(jacobians, axis=(1, 2)) / np.linalg.norm(nudge, axis=(1, 2))
            with mpmath.workdps(300):  # a sum of floats would lose the nudge
                exactly = [
                    mpmath.matrix(j) + mpmath.matrix(e)
                    for j, e in zip(jacobians, size[:, None, None] * nudge, strict=True)
                ]
                changed.append(np.max(np.abs(digits(exactly, 300) - exact)))
        error = np.max(np.abs(logs_of(jacobians, (300,))[0] - exact))
        assert error < 10 * max(changed)
        lost.append(error)
    assert 1e-5 < max(lost) < 1e-2  # of the other two 1e-6 and 1e-8: 1e-10 is not what one may say


def test_masked_steps_are_the_identity_and_one_number_is_a_system():
    step = lambda w, h, x: (w * h * x, ())
    xs, mask = jnp.array([2.0, jnp.nan, 3.0]), jnp.array([True, False, True])
    found = jax.jit(lambda: jacobian_products(step, 0.5, jnp.ones(()), xs, spans=(1, 2, 3), mask=mask))()
    np.testing.assert_allclose(found.log_singular_values, np.log([[1.0], [1.0], [1.5]]), atol=1e-15)
    np.testing.assert_allclose(found.condition_numbers, 1)
    once = jax.jit(lambda: jacobian_products(step, -0.5, jnp.ones(()), jnp.ones(1), spans=[1]))()
    np.testing.assert_allclose(once.norms, [0.5])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"spans": ()}, "spans must name at least one span"),
        ({"spans": 3}, "spans must be a static sequence of integers"),
        ({"spans": (0, 1)}, "spans must be an integer >= 1, got 0"),
        ({"spans": (1.5,)}, "spans must be an integer >= 1, got 1.5"),
        ({"spans": (1, 4)}, "must lie within T = 3 steps, got start = 0 and a span of 4"),
        ({"spans": (2,), "start": 2}, "must lie within T = 3 steps, got start = 2 and a span of 2"),
        ({"spans": (2,), "start": -1}, "got start = -1"),
        ({"spans": (2,), "start": 0.0}, "start must be an integer, got 0.0"),
        ({"spans": (2,), "start": "a"}, "start must be an integer, got 'a'"),
        ({"spans": (2,), "start": True}, "start must be an integer, got True"),
        ({"spans": (2,), "start": None}, "start must be an integer, got None"),
        ({"spans": (2,), "start": jnp.arange(2)}, "use jax.vmap for several starts"),
        ({"spans": (2,), "mask": jnp.ones((3, 2), bool)}, r"mask has shape \(3, 2\), wanted .T. = \(3,\)"),
        ({"spans": (2,), "mask": jnp.ones(3)}, "mask must be bool"),
        ({"spans": (2,), "length": 4}, "disagree on T"),
    ],
)
def test_bad_spans(options, words):
    with pytest.raises(ValueError, match=words):
        jacobian_products(lambda w, h, x: (w * h, ()), 0.5, jnp.ones(2), jnp.ones(3), **options)


@pytest.mark.parametrize("carry", [jnp.zeros((), int), (), jnp.zeros(0), {"key": jax.random.key(0)}])
def test_nothing_to_differentiate(carry):
    step = lambda params, carry, x: (carry, jnp.sum(x))
    xs = jnp.ones((4, 1))
    with pytest.raises(ValueError, match="carry has no floating-point entry"):
        step_jacobians(step, None, carry, xs)
    with pytest.raises(ValueError, match="carry has no floating-point entry"):
        jacobian_products(step, None, carry, xs, spans=[1])
    with pytest.raises(ValueError, match="carry has no floating-point entry"):
        adjoint_alignment(step, lambda y, target: y, {}, carry, Batch(xs), max_lag=2)


def test_the_number_of_steps():
    with pytest.raises(ValueError, match="number of steps is unknown"):
        step_jacobians(linear_in_x, None, jnp.ones(2), None)
    with pytest.raises(ValueError, match="T must be >= 1"):
        step_jacobians(linear_in_x, None, jnp.ones(2), jnp.ones((0, 2, 2)))


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def lstm_paths(params, carry, x):
    """Row-vector formulas by hand: a = x W + h U + b; `∂a_gate/∂h = U_gateᵀ`."""
    h, c = carry
    i, f, g, o = np.split(x @ params["w_x"] + h @ params["w_h"] + params["b"], 4)
    i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
    by_gate = dict(zip(("input", "forget", "candidate", "output"), np.split(params["w_h"], 4, axis=1), strict=True))
    after = f * c + i * g
    through = o * (1 - np.tanh(after) ** 2)  # ∂h/∂c at constant o
    slopes = {"input": i * (1 - i) * g, "forget": f * (1 - f) * c, "candidate": i * (1 - g**2)}
    zero = np.zeros((len(h), len(h)))
    paths = {"cell": np.block([[zero, np.diag(through * f)], [zero, np.diag(f)]])}
    for name, slope in slopes.items():
        inner = slope[:, None] * by_gate[name].T
        paths[name] = np.block([[through[:, None] * inner, zero], [inner, zero]])
    outer = (o * (1 - o) * np.tanh(after))[:, None] * by_gate["output"].T
    paths["output"] = np.block([[outer, zero], [zero, zero]])
    return paths, (o * np.tanh(after), after)


def gru_paths(params, h, x):
    r_x, z_x, n_x = np.split(x @ params["w_x"] + params["b"], 3)
    r_h, z_h, n_h = np.split(h @ params["w_h"] + params["b_h"], 3)
    r, z = sigmoid(r_x + r_h), sigmoid(z_x + z_h)
    n = np.tanh(n_x + r * n_h)
    u_r, u_z, u_n = (u.T for u in np.split(params["w_h"], 3, axis=1))
    new = (1 - z) * (1 - n**2)
    paths = {
        "leak": np.diag(z),
        "reset": (new * n_h * r * (1 - r))[:, None] * u_r,
        "update": ((h - n) * z * (1 - z))[:, None] * u_z,
        "candidate": (new * r)[:, None] * u_n,
    }
    return paths, (1 - z) * n + z * h


PATHS = [("lstm", lstm_paths), ("gru", gru_paths)]


@pytest.mark.parametrize(("name", "formulas"), usual_rows(PATHS[:1], PATHS))
def test_gate_paths(name, formulas):
    _, _, params, carry, batch = problems.make(name, NUM_STEPS)
    params = {key: 1.5 * leaf for key, leaf in params.items()}
    readout = {"w_y": jnp.ones((HIDDEN, 1)), "b_y": jnp.zeros(1)}
    run = jax.vmap(lambda carry, xs: gate_paths({**params, **readout}, carry, xs), in_axes=(0, 1))
    step = problems.STEPS[name]
    whole = jax.vmap(lambda carry, xs: step_jacobians(step, params, carry, xs), in_axes=(0, 1))
    found, whole = jax.jit(lambda: (run(carry, batch.xs), whole(carry, batch.xs)))()
    assert_close(sum(found.jacobians.values()), whole)

    arrays = jax.tree.map(np.asarray, params)
    wanted = {path: np.zeros(whole.shape) for path in found.names}
    for b in range(EXAMPLES):
        now = jax.tree.map(lambda c, b=b: np.asarray(c[b]), carry)
        for t in range(NUM_STEPS):
            paths, now = formulas(arrays, now, np.asarray(batch.xs[t, b]))
            assert tuple(paths) == found.names
            for path, jacobian in paths.items():
                wanted[path][b, t] = jacobian
    assert_close(found.jacobians, wanted)
    norms = np.stack([np.linalg.norm(wanted[path], axis=(2, 3)) for path in found.names], axis=-1)
    assert_close(found.norms, norms)
    assert_close(found.shares, norms / norms.sum(-1, keepdims=True))


def test_an_open_forget_gate_lets_the_cell_path_carry_nearly_everything():
    """And a shut one leaves it next to nothing; an open gate is saturated: no derivative passes through it."""
    cell = cells.lstm(INPUT, HIDDEN)
    rng = np.random.default_rng(0)
    params = problems.draw(rng, jax.eval_shape(cell.init, jax.random.key(0)), scale=0.02)
    xs = rng.normal(size=(NUM_STEPS, INPUT))
    run = jax.jit(lambda bias: gate_paths({**params, "b": bias}, cell.initial_carry(), xs))
    shares = []
    for forget_bias in (-8.0, 8.0):
        found = run(params["b"].at[HIDDEN : 2 * HIDDEN].set(forget_bias))
        shares.append(dict(zip(found.names, found.shares[-1].tolist(), strict=True)))
    assert shares[0]["cell"] < 0.05 and shares[1]["cell"] > 0.95
    assert shares[1]["forget"] < 1e-4


def test_closed_paths_have_no_share():
    """w_h = 0 and a forget gate shut to the last bit: no path at all, and 0 / 0 is 0."""
    params = {"w_x": jnp.ones((1, 4)), "w_h": jnp.zeros((1, 4)), "b": jnp.array([0, -1e4, 0, 0])}
    found = jax.jit(lambda: gate_paths(params, (jnp.ones(1), jnp.ones(1)), jnp.ones((2, 1))))()
    np.testing.assert_array_equal(found.shares, np.zeros((2, 5)))


@pytest.mark.more("test_gate_paths")
def test_gate_paths_of_anything_else():
    gru = {"w_x": jnp.ones((1, 6)), "w_h": jnp.ones((2, 6)), "b": jnp.ones(6), "b_h": jnp.ones(6)}
    lstm = {"w_x": jnp.ones((1, 8)), "w_h": jnp.ones((2, 8)), "b": jnp.ones(8)}
    h, xs = jnp.ones(2), jnp.ones((3, 1))
    for params, carry, words in [
        ({"cell": lstm}, (h, h), "params must be those of cells.gru or cells.lstm"),
        (jnp.ones(3), h, "params must be those of cells.gru or cells.lstm"),
        (
            cells.rnn(1, 2).init(jax.random.key(0)),
            h,
            r"w_h of shape \(2, 2\), wanted .H, 3·H. as a gru .*or .H, 4·H. as an lstm; .*rnn or linear, has no gates",
        ),
        ({**lstm, "w_h": jnp.ones((2, 10))}, (h, h), "only these two cells have gate paths$"),
        ({**lstm, "b": jnp.ones(6)}, (h, h), r"as an lstm has it, but b of shape \(6,\), wanted \(8,\)"),
        ({k: v for k, v in gru.items() if k != "b_h"}, h, r"as a gru has it, but b_h of shape None, wanted \(6,\)"),
        (lstm, h, r"carry must be that of one example of an lstm, of shape \(\(2,\), \(2,\)\), got \(2,\)"),
        (gru, (h, h), r"carry must be that of one example of a gru, of shape \(2,\)"),
        (gru, jnp.ones((5, 2)), r"got \(5, 2\); use jax.vmap"),
        (lstm, (jnp.ones((5, 2)),) * 2, "use jax.vmap"),
    ]:
        with pytest.raises(ValueError, match=words):
            gate_paths(params, carry, xs)
    for xs in (jnp.ones((3, 2)), jnp.ones((3, 4, 1)), jnp.ones(3)):
        with pytest.raises(ValueError, match=r"xs has shape \(3.*wanted .T, 1., as wide as params' w_x is high"):
            gate_paths(gru, h, xs)


@pytest.mark.more("test_gate_paths")
def test_an_lstm_stays_one_whatever_stands_beside_it():
    """A readout may have called its bias b_h, as the gru does a second bias of its own."""
    _, _, params, (h, c), batch = problems.make("lstm", NUM_STEPS)
    alone, beside = (
        gate_paths(p, (h[0], c[0]), batch.xs[:, 0]) for p in (params, {**params, "b_h": jnp.ones(params["b"].shape)})
    )
    assert beside.names == alone.names
    assert_close(beside.jacobians, alone.jacobians)


def flat(tree):
    """Leaves `[T, B, ...]` as one array `[T, B, n]`."""
    return np.concatenate([np.asarray(a).reshape(*a.shape[:2], -1) for a in jax.tree.leaves(tree)], axis=-1)


CASES = {
    "linear": {},
    "gru, weights": {"weights": WEIGHTS},
    "lstm+readout, padding": {"mask": MASK},
    "tanh, everything": {"mask": MASK, "weights": WEIGHTS, "gates": GATES},
}


def alignment_by_hand(name, directions, max_lag, mask=None, weights=None, gates=None):
    """Cosine, misalignment and rate, pair by pair, of adjoints that are explicit products of Jacobians."""
    jacobians, slopes = by_hand(name, mask is not None)
    weights = np.ones((NUM_STEPS, EXAMPLES)) if weights is None else np.abs(weights)
    live = np.ones((NUM_STEPS, EXAMPLES), bool) if mask is None else mask
    gates = np.ones(NUM_STEPS) if gates is None else gates
    cosines, sines = np.full((2, max_lag, NUM_STEPS, EXAMPLES), np.nan)
    pairs = np.zeros((max_lag, NUM_STEPS, EXAMPLES))
    for k, b in np.ndindex(max_lag, EXAMPLES):
        for s in range(NUM_STEPS - k):
            adjoint = slopes[s + k, b] * live[s + k, b] * gates[s + k]
            for t in range(s + k - 1, s - 1, -1):
                adjoint = gates[t] * adjoint @ jacobians[t, b]
            size = np.linalg.norm(adjoint)
            if size:
                cosines[k, s, b] = adjoint @ directions[s, b] / size
                sines[k, s, b] = np.linalg.norm(adjoint / size - cosines[k, s, b] * directions[s, b])
                pairs[k, s, b] = weights[s + k, b] * (live[s:, b].sum() >= 2 * max_lag)
    mean = lambda values: np.nansum(pairs * values, axis=(1, 2)) / pairs.sum(axis=(1, 2))
    falls = np.log(sines[1:, :-1]) - np.log(sines[:-1, 1:])  # of one loss: s + k stays
    first = max_lag // 2
    rate = np.nansum((pairs[1:, :-1] * falls)[first:]) / np.sum(pairs[1:, :-1][first:])
    return mean(np.abs(cosines)), mean(sines), rate


@functools.partial(jax.jit, static_argnames=("name", "max_lag"))
def aligned(name, max_lag, mask=None, weights=None, gates=None, key=None):
    step, loss, params, carry, batch = problems.make(name, NUM_STEPS)
    batch = batch._replace(mask=mask, weights=weights)
    return adjoint_alignment(step, loss, params, carry, batch, max_lag=max_lag, gates=gates, key=key)


@pytest.mark.parametrize("name", usual(["tanh, everything"], CASES))
def test_alignment(name):
    options, name, max_lag = CASES[name], name.split(",")[0], 7
    found = aligned(name, max_lag, **options)
    jacobians, _ = by_hand(name, "mask" in options)
    directions = flat(found.directions)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=-1), 1, rtol=1e-14)
    pulled = np.einsum("tbij,tbi->tbj", jacobians[:-1], directions[1:])
    assert_close(directions[:-1], pulled / np.linalg.norm(pulled, axis=-1, keepdims=True))
    wrong = np.einsum("tbij,tbj->tbi", jacobians[:-1], directions[1:])
    assert np.max(np.abs(directions[:-1] - wrong / np.linalg.norm(wrong, axis=-1, keepdims=True))) > 0.1

    cosine, misalignment, rate = alignment_by_hand(name, directions, max_lag, **options)
    assert_close(found.cosine, cosine)
    np.testing.assert_allclose(found.misalignment, misalignment, rtol=1e-10)
    np.testing.assert_allclose(found.rate, rate, rtol=1e-8)


def left_eigenvectors(jacobian):
    values, vectors = np.linalg.eig(jacobian.T)
    order = np.argsort(-np.abs(values))
    return values[order], vectors[:, order]


def linear_rnn(values, num_steps, dtype=float):
    """`h ← J h` with these eigenvalues, not symmetric; the loss asks for something else at each step."""
    rng = np.random.default_rng(9)
    vectors = rng.normal(size=(len(values), len(values)))
    jacobian = vectors @ np.diag(values) @ np.linalg.inv(vectors)
    targets = rng.normal(size=(num_steps, len(values)))
    return jnp.asarray(jacobian, dtype), jnp.ones(len(values), dtype), Batch(None, targets.astype(dtype))


@functools.partial(jax.jit, static_argnames="max_lag")
def aligned_linear(jacobian, h, batch, max_lag):
    step = lambda w, h, x: (w @ h, w @ h)
    return adjoint_alignment(step, lambda y, target: y @ target, jacobian, h, batch, max_lag=max_lag)


@pytest.mark.parametrize("values", [(0.9, -0.6, 0.3), (1.8, 0.9, -0.5), (-0.05, 0.03, 0.01)])
def test_adjoints_of_a_linear_rnn_turn_to_the_dominant_left_eigenvector(values):
    """At the rate ln|λ₂/λ₁|, however fast the adjoints themselves grow or die out, far below 1e-8."""
    problem = linear_rnn(values, 160)
    found = aligned_linear(*problem, max_lag=70)
    rate = np.log(abs(values[1] / values[0]))
    np.testing.assert_allclose(found.rate, rate, rtol=0.01)
    eigenvalues, vectors = left_eigenvectors(np.asarray(problem[0]))
    np.testing.assert_allclose(eigenvalues[0], values[0])
    np.testing.assert_allclose(np.abs(found.directions[:40] @ vectors[:, 0]), 1, rtol=1e-13)
    right = np.linalg.eig(np.asarray(problem[0]))[1][:, 0]
    assert np.max(np.abs(found.directions[:40] @ right)) < 0.99
    assert np.min(found.misalignment) < 1e-12 and found.misalignment[0] > 0.1


def test_alignment_in_single_precision():
    values = (0.9, -0.6, 0.3)
    with jax.enable_x64(False):
        found = aligned_linear(*linear_rnn(values, 80, np.float32), max_lag=40)
        assert found.cosine.dtype == found.misalignment.dtype == found.rate.dtype == jnp.float32
    np.testing.assert_allclose(found.rate, np.log(2 / 3), rtol=0.03)


@pytest.mark.more("test_alignment")
def test_no_single_direction():
    """A rotation keeps the angles; one number is always aligned."""
    turn = 0.9 * np.array([[np.cos(1), -np.sin(1)], [np.sin(1), np.cos(1)]])
    targets = np.random.default_rng(1).normal(size=(90, 2))
    found = aligned_linear(turn, jnp.ones(2), Batch(None, targets), max_lag=30)
    assert abs(found.rate) < 0.05 and np.all(found.misalignment > 0.5)
    one = Batch(None, jnp.ones((6, 4)))
    scalar = lambda w, h, x: (w * h, h)
    found = jax.jit(lambda: adjoint_alignment(scalar, lambda y, t: y * t, 0.5, jnp.ones(4), one, max_lag=3))()
    np.testing.assert_array_equal((found.cosine, found.misalignment), [[1] * 3, [0] * 3])
    assert found.rate == -np.inf and np.all(np.abs(found.directions) == 1)


@pytest.mark.more("test_alignment")
def test_resets_and_what_has_no_direction():
    """Where a reset cuts the far future off, v begins anew; without a loss that counts there is no angle."""
    step, loss, params, carry, batch = problems.make("gru+reset", 40)
    resets = np.zeros((40, EXAMPLES), bool)
    resets[22, 0] = resets[[12, 26], 1] = True
    batch = batch._replace(xs=(batch.xs[0], jnp.asarray(resets)))
    run = jax.jit(lambda batch: adjoint_alignment(step, loss, params, carry, batch, max_lag=5))
    found = run(batch)
    # Example 0 counts for s ≤ 12 and 23 ≤ s ≤ 30, example 1 for s ≤ 2, 13 ≤ s ≤ 16, 27 ≤ s ≤ 30, example 2 for s ≤ 30.
    ends = [[(0, 12), (23, 30)], [(0, 2), (13, 16), (27, 30)], [(0, 30)]]
    for k in range(5):
        weights = np.zeros((40, EXAMPLES))
        for b, spans in enumerate(ends):
            for first, last in spans:
                weights[first + k : last + k + 1, b] = 1
        other = run(batch._replace(weights=weights))
        np.testing.assert_allclose(other.cosine[k], found.cosine[k], rtol=1e-13)
    for t, lags in [(16, [4]), (17, []), (22, []), (23, [0]), (34, [4]), (35, [])]:
        only = run(batch._replace(weights=np.zeros((40, EXAMPLES)) + (np.arange(40) == t)[:, None] * [1, 0, 0]))
        assert np.flatnonzero(~np.isnan(only.cosine)).tolist() == lags
        assert np.flatnonzero(~np.isnan(only.misalignment)).tolist() == lags
        assert np.isnan(only.rate) == (lags != [4])  # that adjoint can be followed on its last step back


@pytest.mark.more("test_alignment")
def test_alignment_of_a_carry_with_a_counter_under_vmap_and_without_jit():
    step = lambda w, carry, x: ((jnp.tanh(carry[0] @ w + x), carry[1] + 1), carry[0] * (1 + carry[1]))
    rng = np.random.default_rng(2)
    ws, carry = jnp.asarray(rng.normal(size=(2, 3, 3))), (jnp.ones((4, 3)), jnp.zeros((), int))
    batch = Batch(*jnp.asarray(rng.normal(size=(2, 20, 4, 3))))
    keys = jax.random.split(jax.random.key(0))
    run = lambda w, key: adjoint_alignment(step, problems.squared_error, w, carry, batch, max_lag=4, key=key)
    together = jax.jit(jax.vmap(run, in_axes=(0, None)))(ws, keys[0])
    assert_close(jax.tree.map(lambda a: a[0], together), run(ws[0], keys[0]), rtol=1e-11)
    np.testing.assert_array_equal(together.directions[1], np.zeros((2, 20)))
    other = jax.jit(run)(ws[1], keys[1])  # early directions do not depend on where they came from, late ones do
    difference = np.abs(np.abs(other.directions[0]) - np.abs(together.directions[0][1])).max(axis=(1, 2))
    assert difference[0] < 1e-2 and difference[-1] > 0.1


@pytest.mark.parametrize(
    ("max_lag", "words"),
    [(1, "max_lag must be an integer >= 2"), (13, "max_lag must be <= T/2 = 12, got 13"), (2.0, "max_lag must be")],
)
def test_bad_max_lag(max_lag, words):
    with pytest.raises(ValueError, match=words):
        adjoint_alignment(*problems.make("tanh", NUM_STEPS), max_lag=max_lag)


def test_alignment_is_per_example():
    step, loss, params, _, batch = problems.make("tanh", 4, examples=2)
    with pytest.raises(ValueError, match=r"carry has shape \(3,\), wanted it to begin with the batch shape"):
        shared = lambda p, h, x: (step(p, h, x[0])[0], step(p, h, x)[1])
        adjoint_alignment(shared, loss, params, jnp.zeros(HIDDEN), batch, max_lag=2)
