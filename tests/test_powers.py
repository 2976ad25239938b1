"""Eigenvalues of powers and alignment with the dominant eigenvector, against 60 digits and a network's way back.

Matrices are built from their eigenvalues, so that what should happen is known beforehand.
"""

import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from problems import usual

from jbptt import Batch, adjoints, cells
from jbptt.analysis.linalg import powers

OPTIMIZED = True


def similar(matrix, seed=1):
    """The same eigenvalues in a basis that is not orthogonal."""
    basis = np.random.default_rng(seed).normal(size=matrix.shape)
    return basis @ matrix @ np.linalg.inv(basis)


def rotated(matrix, seed=1):
    """The same in a rotated basis; symmetric to the last bit if the matrix is."""
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=matrix.shape))[0]
    turned = basis @ matrix @ basis.T
    return (turned + turned.T) / 2 if np.array_equal(matrix, matrix.T) else turned


def block(*blocks):
    size = sum(len(b) for b in blocks)
    matrix, start = np.zeros((size, size)), 0
    for b in blocks:
        matrix[start : start + len(b), start : start + len(b)] = b
        start += len(b)
    return matrix


def jordan(value, size, coupling=1.0):
    return value * np.eye(size) + coupling * np.eye(size, k=1)


def turn(radius, angle):
    return radius * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def random_start(size, seed=3):
    return np.random.default_rng(seed).normal(size=size)


# Eigenvalues


def eigenvalues_of_power(matrix, k):
    """Of M^k multiplied out in 60 digits, in descending size, beside conjugates the one above the axis first."""
    with mpmath.workdps(60):
        values, _ = mpmath.eig(mpmath.matrix(matrix.tolist()) ** k)
        return np.array([complex(v) for v in sorted(values, key=lambda v: -abs(v))])


def assert_same_set(actual, desired, rtol):
    """Every one has its partner, each relative to its own size."""
    rest = list(desired)
    for value in actual:
        nearest = min(range(len(rest)), key=lambda i: abs(rest[i] - value))
        assert abs(rest[nearest] - value) <= rtol * abs(rest[nearest]), (value, rest[nearest])
        del rest[nearest]


MATRICES = {
    "symmetric": rotated(np.diag([1.3, -1.1, 0.7, 0.4, -0.2])),
    "general": similar(np.diag([1.3, -1.1, 0.7, 0.4, -0.2])),
    "complex": np.random.default_rng(5).normal(size=(6, 6)) / 2,
}


@pytest.mark.parametrize("k", usual([3, 40], [0, 1, 2, 3, 40]))
@pytest.mark.parametrize("name", usual(["symmetric", "general"], MATRICES))
def test_eigenvalues_of_a_power(name, k):
    matrix = MATRICES[name]
    found = np.asarray(powers.eigenvalues(matrix, k))
    assert np.iscomplexobj(found) == (name != "symmetric")
    size = np.abs(found)
    assert np.all(size[1:] <= size[:-1] * (1 + 1e-12))
    assert_same_set(found, eigenvalues_of_power(matrix, k), 1e-10)
    if k <= 3:
        assert_same_set(found, np.linalg.eigvals(np.linalg.matrix_power(matrix, k)), 1e-10)
    traced = jax.jit(lambda m: powers.eigenvalues(m, k))(matrix)
    assert np.iscomplexobj(traced)  # nothing is known of the values there
    assert_same_set(np.asarray(traced), found, 1e-10)


def test_eigenvalues_know_what_they_are_told():
    matrix = MATRICES["symmetric"]
    told = jax.jit(lambda m: powers.eigenvalues(m, 7, symmetric=True))(matrix)
    assert not np.iscomplexobj(told)
    np.testing.assert_allclose(told, powers.eigenvalues(matrix, 7), rtol=1e-12)
    assert np.iscomplexobj(powers.eigenvalues(matrix, 7, symmetric=False))
    both = jax.vmap(lambda m: powers.eigenvalues(m, 7))(np.stack([MATRICES["general"], matrix]))
    np.testing.assert_allclose(both[0], powers.eigenvalues(MATRICES["general"], 7), rtol=1e-10)
    np.testing.assert_array_equal(powers.eigenvalues(np.diag([3, -2]), 5), [243, -32])  # integers, exactly


def test_eigenvalues_beyond_the_range_are_infinite_or_zero():
    found = np.asarray(powers.eigenvalues(similar(np.diag([-3.0, 2.0, 0.5])), 5001))
    assert found[0].real == -np.inf and found[1].real == np.inf and found[2] == 0
    assert not np.any(np.isnan(found.real)) and not np.any(np.isnan(found.imag))


# Alignment


def exact_angles(matrix, x, k):
    """|cos| and sine of the angle between M^j x and v₁, in 60 digits; v₁ by 4000 applications of M to something."""
    with mpmath.workdps(60):
        m = mpmath.matrix(matrix.tolist())
        dominant = m**4000 * mpmath.matrix([1 + i / 7 for i in range(len(matrix))])
        dominant /= mpmath.norm(dominant)
        y, rows = mpmath.matrix(x.tolist()), []
        for _ in range(k + 1):
            y /= mpmath.norm(y)
            along = (dominant.T * y)[0]
            rows.append((float(abs(along)), float(mpmath.norm(y - along * dominant))))
            y = m * y
    return np.array(rows).T


ALIGNING = {
    "diagonal": np.diag([1.0, 0.5]),
    "symmetric": rotated(np.diag([1.0, -0.8, 0.5, 0.1])),
    "symmetric, dominant negative": rotated(np.diag([-1.2, 0.9, 0.2])),
    "general": similar(np.diag([1.0, 0.7, -0.3, 0.1])),
    "general, exploding": similar(np.diag([-3.0, 2.4, 1.0]), seed=2),
    "general, vanishing": similar(np.diag([0.2, 0.17, 0.05]), seed=4),
    "general, fast": similar(np.diag([1.0, 0.1, 0.001])),
    "general, λ₃ near λ₂": similar(np.diag([1.0, 0.7, 0.63])),
    "general, complex λ₂": similar(block(np.diag([1.0]), turn(0.7, 1.0))),
    "general, complex λ₂ that turns slowly": similar(block(np.diag([1.0]), turn(0.7, 0.2))),
}


@pytest.mark.parametrize("name", usual(["symmetric", "general, complex λ₂"], ALIGNING))
def test_alignment(name):
    matrix = ALIGNING[name]
    k, x = 120, random_start(len(matrix))
    found = powers.alignment(matrix, x, k)
    cosine, sine = exact_angles(matrix, x, k)
    rounding = 10 * np.finfo(float).eps * np.linalg.cond(np.linalg.eig(matrix)[1])  # 2e-15 to 5e-14
    np.testing.assert_allclose(found.cosine, cosine, rtol=0, atol=rounding)
    np.testing.assert_allclose(found.misalignment, sine, rtol=0, atol=rounding)
    size = np.sort(np.abs(np.linalg.eigvals(matrix)))[::-1]
    np.testing.assert_allclose(found.predicted_rate, math.log(size[1] / size[0]), rtol=1e-12)
    np.testing.assert_allclose(found.rate, found.predicted_rate, rtol=0.01)
    assert found.case == "aligns"
    assert str(found).startswith(f"M^k x aligns with v₁: ln sine changes by {float(found.rate):.3g} per step")
    assert f"{sine[0]:.3g} at k = 0" in str(found)


DEFECTIVE_PAIR = np.kron(np.eye(2), turn(1.0, 1.0)) + np.kron(np.eye(2, k=1), np.eye(2))  # [[R, 1], [0, R]]

FAILING = {
    "tie": {
        "identity": np.eye(3),
        "opposite signs": np.diag([1.0, -1.0, 0.5]),
        "opposite signs, general": similar(np.diag([1.0, -1.0, 0.5])),
        "twice, general": similar(np.diag([1.0, 1.0, 0.5])),
        "twice, symmetric": rotated(np.diag([1.0, 1.0, 0.5])),
        "a permutation": np.roll(np.eye(3), 1, axis=0),
        "zero": np.zeros((2, 2)),
        "beside a defective smaller one": similar(block(np.eye(2), jordan(0.5, 2))),
        "beside a complex pair": similar(block(np.eye(1), turn(1.0, 1.0), np.diag([0.3]))),
        "two defective": block(jordan(1.0, 2), jordan(-1.0, 2)),
        "two defective, general": similar(block(jordan(1.0, 2), jordan(-1.0, 2))),
    },
    "complex pair": {
        "in the plane": turn(0.9, 0.9),
        "general": similar(block(turn(1.0, 2.0), np.diag([0.5, 0.1]))),
        "two pairs": similar(block(turn(1.0, 2.0), turn(1.0, 0.5))),
        "defective": DEFECTIVE_PAIR,
        "defective, general": similar(DEFECTIVE_PAIR),
        "defective, beside a tie": similar(block(np.eye(1), DEFECTIVE_PAIR)),
    },
    "defective": {
        "of two": jordan(0.9, 2),
        "of three": jordan(0.9, 3),
        "of two, rotated": rotated(jordan(0.9, 2)),
        "of two, coupled weakly": similar(jordan(0.9, 2, 1e-3)),
        "of three, general": similar(jordan(0.9, 3)),
        "of four, general": similar(jordan(0.9, 4)),
        "beside others": similar(block(jordan(0.9, 2), np.diag([0.5]))),
        "nilpotent": jordan(0.0, 2),
        "nilpotent, full": np.triu(np.ones((3, 3)), 1),
        "nilpotent, general": similar(jordan(0.0, 3)),
        **{
            f"{where} {other}{general}": make(block(*blocks))
            for other, size in (("1", np.eye(1)), ("−1", -np.eye(1)), ("a complex pair", turn(1.0, 1.0)))
            for where, blocks in (("before", (jordan(1.0, 2), size)), ("behind", (size, jordan(1.0, 2))))
            for general, make in (("", np.asarray), (", general", similar))
        },
    },
    "aligns": {
        "one number": np.array([[3.0]]),
        "of rank one": np.outer([1.0, 2.0, 3.0], np.ones(3)),
        "slowly": np.diag([1.0, 0.9999]),
        "beside a defective smaller one": similar(block(np.diag([-1.0]), jordan(0.5, 2))),
        "beside a Jordan block": block(np.diag([1.0]), jordan(0.5, 3)),
        "far from normal": np.array([[1.0, 1e6], [0.0, 0.9]]),
        "far from normal, general": similar(np.array([[1.0, 10.0], [0.0, 0.9]])),  # at 100, float32 cannot tell
    },
}
SAID = {
    "tie": "need not align with v₁: |λ₁| = |λ₂|",
    "complex pair": "keeps turning",
    "defective": "like 1/k at best",
    "aligns": "M^k x aligns with v₁: ln sine",
    "orthogonal start": "x has no component on it",
}


def check_what_is_said(case, name, matrix, x, found):
    """That the case is what a loop of NumPy sees: by how much M^j x turns in a step, and where it is from v₁."""
    turned, sine = [], np.asarray(found.misalignment)
    for _ in range(60):
        x = x / np.linalg.norm(x)
        after = matrix @ x
        if not np.any(np.abs(after) > 1e-12):
            assert case == "defective" and name.startswith("nilpotent"), name
            return
        turned.append(np.linalg.norm(after - x * (x @ after)) / np.linalg.norm(after))
        x = after
    if case == "complex pair":
        assert min(turned) > 0.05, name  # keeps turning
    elif case == "tie":
        assert sine[60] > 0.01 and (turned[-1] > 0.05 or turned[-1] < 1e-6), name  # to and fro, or at rest elsewhere
    else:
        assert sine[60] > 1e-3, name  # not exponentially
        assert sine[60] < sine[30] or "weakly" in name, name


@pytest.mark.parametrize("dtype", usual([np.float64], [np.float32, np.float64]))
@pytest.mark.parametrize("case", usual(["aligns", "complex pair", "defective"], FAILING))
def test_cases(case, dtype):
    for name, matrix in FAILING[case].items():
        matrix, x = matrix.astype(dtype), random_start(len(matrix)).astype(dtype)
        for symmetric in (None, False):  # False is the general road, as under jit
            found = powers.alignment(matrix, x, 60, symmetric=symmetric)
            assert found.case == case, name
            assert SAID[case] in str(found), name
            assert found.misalignment.dtype == dtype
            assert not np.isnan(found.predicted_rate), name
            if case != "aligns" and np.any(matrix):
                check_what_is_said(case, name, matrix.astype(float), x, found)


@pytest.mark.parametrize("size", [32, 100])
@pytest.mark.more("test_cases")
def test_large_matrices(size):
    """Random ones are far from every exception, in float32 too; their dominant eigenvalue is real or complex."""
    found, wanted = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        plain = rng.normal(size=(size, size)) / math.sqrt(size)
        for matrix in (plain, plain + plain.T):
            values = np.linalg.eigvals(matrix)
            wanted.append("aligns" if values[np.argmax(np.abs(values))].imag == 0 else "complex pair")
            x = rng.normal(size=size)
            found.append([powers.alignment(matrix.astype(t), x.astype(t), 2).case for t in (np.float32, np.float64)])
    assert found == [[case] * 2 for case in wanted]
    assert len(set(wanted)) == 2


def test_two_orders_of_a_defective_matrix_have_one_limit():
    """v₁ is the eigenvector of the Jordan block, to which M^k x turns, not that of the 1 beside it."""
    x = np.array([0.5, 0.7, 0.4])
    first = powers.alignment(block(np.eye(1), jordan(1.0, 2)), x, 300)
    last = powers.alignment(block(jordan(1.0, 2), np.eye(1)), np.roll(x, -1), 300)
    assert first.case == last.case == "defective"
    # M^j x = (x₁, x₂ + j x₃, x₃)
    j = np.arange(301)
    sine = np.hypot(0.5, 0.4) / np.sqrt(0.5**2 + (0.7 + 0.4 * j) ** 2 + 0.4**2)
    for found in (first, last):
        np.testing.assert_allclose(found.misalignment, sine, rtol=1e-9)


def test_numbers_of_the_cases():
    """What is said of them is what is seen: turning, halves kept, 1/k, nothing left."""
    x = np.array([0.8, 0.6])
    turning = powers.alignment(turn(0.9, 0.9), x, 50)
    np.testing.assert_allclose(turning.cosine, math.sqrt(0.5), rtol=1e-12)  # v₁ = (1, −i)/√2 is complex
    np.testing.assert_allclose([turning.rate, turning.predicted_rate], 0, atol=1e-12)
    tie = powers.alignment(np.diag([1.0, -1.0]), x, 50)
    np.testing.assert_allclose(tie.misalignment, tie.misalignment[0], rtol=1e-12)
    # [[a, 1], [0, a]]^j x = a^j (x₁ + j x₂/a, x₂)
    j = np.arange(51)
    defective = powers.alignment(jordan(0.9, 2), x, 50)
    np.testing.assert_allclose(defective.misalignment, 0.6 / np.hypot(0.8 + j * 0.6 / 0.9, 0.6), rtol=1e-12)
    gone = powers.alignment(jordan(0.0, 2), x, 4)
    np.testing.assert_array_equal(np.isnan(gone.misalignment), [False, False, True, True, True])
    assert str(gone).endswith("M^k x is 0 from k = 2 on.")
    assert powers.alignment(np.zeros((2, 2)), x, 4).predicted_rate == 0
    at_once = powers.alignment(np.diag([1.0, 0.0]), x, 4)
    assert at_once.predicted_rate == -np.inf and np.isnan(at_once.rate) and "too few values" in str(at_once)


@pytest.mark.parametrize("name", ["symmetric", "general", "general, complex λ₂", "general, exploding"])
def test_orthogonal_start(name):
    """Orthogonal to the LEFT eigenvector; orthogonal to v₁ itself is no obstacle."""
    matrix = ALIGNING[name]
    values, right = np.linalg.eig(matrix)
    dominant = np.argmax(np.abs(values))
    v, w = right[:, dominant].real, np.linalg.inv(right)[dominant].real
    x = random_start(len(matrix))
    without = x - w * (w @ x) / (w @ w)
    found = powers.alignment(matrix, without, 20)
    assert found.case == "orthogonal start" and SAID[found.case] in str(found)
    assert found.misalignment[-1] > 0.1
    for share in (1e-9, 1e-3):
        assert (
            powers.alignment(matrix, without + share * np.linalg.norm(x) * w / np.linalg.norm(w), 20).case == "aligns"
        )
    if name != "symmetric":
        assert powers.alignment(matrix, x - v * (v @ x) / (v @ v), 20).case == "aligns"


@pytest.mark.more("test_alignment")
def test_alignment_under_transformations():
    matrices = np.stack([ALIGNING["general"], ALIGNING["symmetric"], MATRICES["general"][:4, :4]])
    xs = np.stack([random_start(4, seed) for seed in range(3)])
    together = jax.jit(jax.vmap(lambda m, x: powers.alignment(m, x, 30)))(matrices, xs)
    for i in range(3):
        alone = powers.alignment(matrices[i], xs[i], 30, symmetric=False)
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-9, atol=1e-13)
    assert "case_index" in str(together)  # no sentence of several
    told = jax.jit(lambda m, x: powers.alignment(m, x, 30, symmetric=True))(matrices[1], xs[1])
    np.testing.assert_allclose(told.misalignment, together.misalignment[1], rtol=1e-9, atol=1e-13)
    broken = jax.jit(lambda m, x: powers.alignment(m, x, 3))
    for m, x in ((matrices[0] * np.nan, xs[0]), (matrices[0], xs[0] * np.inf), (matrices[0], xs[0] * 0)):
        found = broken(m, x)
        assert found.case == "undefined" and np.all(np.isnan(found.cosine))


@pytest.mark.parametrize("scale", usual([1e-300, 1e300], [1e-300, 1e-150, 1e150, 1e300]))
def test_scale_changes_nothing(scale):
    """M^500 is far out of range, and so are squares of its entries."""
    matrix, x = ALIGNING["general"], random_start(4)
    plain, scaled = powers.alignment(matrix, x, 500), powers.alignment(scale * matrix, x / scale, 500)
    assert scaled.case == "aligns"
    for a, b in zip(scaled[:2], plain[:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(scaled.predicted_rate, plain.predicted_rate, rtol=1e-12)
    np.testing.assert_allclose(scaled.rate, plain.rate, rtol=1e-4)  # its last sines have three digits


# A network's way back


def test_adjoints_of_a_linear_rnn_align():
    """λ_t = J^{T−t}ᵀ λ_T with J = w_hᵀ: they turn to the dominant left eigenvector of J, at |λ₂/λ₁| per step."""
    num_steps = 80
    cell = cells.linear(2, 4)
    rng = np.random.default_rng(6)
    w_h = similar(np.diag([0.9, -0.65, 0.3, 0.1]), seed=7)
    params = {"w_x": rng.normal(size=(2, 4)), "w_h": w_h, "b": rng.normal(size=4)}
    xs, targets = rng.normal(size=(num_steps, 2)), rng.normal(size=(num_steps, 4))
    batch = Batch(xs, targets, weights=jnp.zeros(num_steps).at[-1].set(1.0))
    square = lambda y, target: jnp.sum((y - target) ** 2)
    cotangents = adjoints(cell.step, square, params, rng.normal(size=4), batch).cotangents[:-1]
    backwards = np.asarray(cotangents)[::-1]  # by lag

    jacobian = w_h.T
    values, right = np.linalg.eig(jacobian)
    left = np.linalg.inv(right)[np.argmax(np.abs(values))].real
    left = left / np.linalg.norm(left)
    unit = backwards / np.linalg.norm(backwards, axis=1, keepdims=True)
    sine = np.linalg.norm(unit - np.outer(unit @ left, left), axis=1)
    slope = np.polyfit(np.arange(30, 70), np.log(sine[30:70]), 1)[0]
    np.testing.assert_allclose(slope, math.log(0.65 / 0.9), rtol=0.01)

    found = powers.alignment(jacobian.T, backwards[0], num_steps - 1)
    np.testing.assert_allclose(found.misalignment, sine, rtol=1e-6, atol=1e-14)
    np.testing.assert_allclose(found.rate, math.log(0.65 / 0.9), rtol=0.01)
    # The right eigenvector is another direction.
    right = right[:, np.argmax(np.abs(values))].real
    assert np.linalg.norm(unit[-1] - right * (right @ unit[-1])) > 0.1


# The border


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((np.ones((2, 3)), np.ones(3), 1), "matrix must be square"),
        ((np.ones(3), np.ones(3), 1), "matrix must be square"),
        ((np.ones((0, 0)), np.ones(0), 1), "matrix must be square"),
        ((np.eye(2) * 1j, np.ones(2), 1), "matrix must be real"),
        ((np.eye(2) * np.nan, np.ones(2), 1), "matrix must be finite"),
        ((np.eye(2), np.ones(3), 1), r"x must have shape \(2,\)"),
        ((np.eye(2), np.ones((2, 1)), 1), r"x must have shape \(2,\)"),
        ((np.eye(2), np.zeros(2), 1), "x must not be 0"),
        ((np.eye(2), np.array([1.0, np.inf]), 1), "x must be finite"),
        ((np.eye(2), np.ones(2) * 1j, 1), "x must be real"),
        ((np.eye(2), np.ones(2), -1), "k must be an integer >= 0"),
        ((np.eye(2), np.ones(2), 1.5), "k must be an integer >= 0"),
    ],
)
def test_errors(arguments, words):
    with pytest.raises(ValueError, match=words):
        powers.alignment(*arguments)
    if not words.startswith("x"):
        with pytest.raises(ValueError, match=words):
            powers.eigenvalues(arguments[0], arguments[2])


def test_what_is_not_symmetric_is_not_taken_for_it():
    for call in (powers.eigenvalues, lambda m, k, **o: powers.alignment(m, np.ones(2), k, **o)):
        with pytest.raises(ValueError, match="differs from its transpose by up to 1"):
            call(np.array([[1.0, 1.0], [0.0, 1.0]]), 2, symmetric=True)


def test_lists_and_zero_steps():
    found = powers.alignment([[1, 0], [0, 2]], [1, 1], 0)
    np.testing.assert_allclose(found.cosine, [math.sqrt(0.5)], rtol=1e-12)
    np.testing.assert_allclose(found.misalignment, [math.sqrt(0.5)], rtol=1e-12)
    assert np.isnan(found.rate) and found.case == "aligns"


def test_a_warning_of_lost_precision_names_the_call():
    with jax.enable_x64(False):
        for call in (lambda m: powers.alignment(m, jnp.ones(2), 1), lambda m: powers.eigenvalues(m, 1)):
            with pytest.warns(UserWarning, match="matrix is float64") as caught:
                call(np.eye(2))
            assert [warning.filename for warning in caught] == [__file__]
