"""The engine against a complex step in NumPy and against 50 digits, and the oracles against one another."""

import ast
import functools
import pathlib

import jax
import mpmath
import numpy as np
import problems
import pytest
from oracles import by_hand, complex_step, high_precision, rounding
from oracles.shapes import windows_of

from jbptt import Batch, cells, full_bptt, gated_bptt, truncated_bptt

NUM_STEPS, EXAMPLES, INPUT, HIDDEN = 7, 2, 2, 2
CELLS = {name: make(INPUT, HIDDEN) for name, make in
         {"linear": cells.linear, "tanh": cells.rnn, "gru": cells.gru, "lstm": cells.lstm}.items()}  # fmt: skip
TRUNCATIONS = {  # window and stride; the last block, stride and window are ragged
    "full": (NUM_STEPS, NUM_STEPS),
    "blocks": (3, 3),
    "sliding": (3, 1),
    "strides": (5, 3),
}
MAKERS = {
    "full": full_bptt,
    **{
        name: functools.partial(truncated_bptt, window=window, stride=stride)
        for name, (window, stride) in TRUNCATIONS.items()
        if name != "full"
    },
}


def draw(name, kind):
    """Parameters, the carry as a tuple, xs, targets, mask and weights `[T, B]`, from NumPy's generator."""
    rng = np.random.default_rng(3)
    cell = CELLS[name]
    shapes = jax.eval_shape(lambda: (cell.init(jax.random.key(0)), cell.initial_carry((EXAMPLES,))))
    params, carry = jax.tree.map(lambda s: 0.7 * rng.normal(size=s.shape), shapes)
    xs, targets = rng.normal(size=(2, NUM_STEPS, EXAMPLES, INPUT))
    mask, weights = rng.random((NUM_STEPS, EXAMPLES)) < 0.7, rng.normal(size=(NUM_STEPS, EXAMPLES))
    mask[2:4] = False  # a stretch for all examples
    if kind == "plain":
        mask, weights = np.ones_like(mask), np.ones_like(weights)
    return params, carry if isinstance(carry, tuple) else (carry,), xs, targets, mask, weights


@functools.cache
def estimate(name, truncation):
    """The program that gives the sums of one update, for masked and for plain values."""

    def run(params, carry, xs, targets, mask, weights):
        estimator = MAKERS[truncation](CELLS[name].step, problems.squared_error)
        carry = carry if name == "lstm" else carry[0]
        result = problems.one_update(estimator, params, carry, Batch(xs, targets, mask, weights))
        return result.loss_sum, result.grad_sum

    return jax.jit(run)


def runs(truncation):
    """Gates that freeze the carry before each window, and the losses of each chunk."""
    steps = np.arange(NUM_STEPS)
    for losses, cut in windows_of(NUM_STEPS, *TRUNCATIONS[truncation]):
        yield np.where((steps == cut) & (cut > 0), 0.0, 1.0), np.isin(steps, losses)


EVERY_TRUNCATION = pytest.mark.parametrize("truncation", problems.usual(["strides"], TRUNCATIONS))
KINDS = problems.usual(["masked and weighted"], ["plain", "masked and weighted"])


@pytest.mark.parametrize("kind", KINDS)
@EVERY_TRUNCATION
@pytest.mark.parametrize("name", problems.usual(["lstm"], CELLS, full=set(CELLS) - {"tanh", "lstm"}))
def test_against_the_complex_step(name, truncation, kind):
    values = draw(name, kind)
    wanted = complex_step.gradient(name, *values, runs(truncation))
    problems.assert_close(estimate(name, truncation)(*values), wanted)


@pytest.mark.parametrize("name", problems.usual(["lstm"], CELLS))
def test_gates_against_the_complex_step(name):
    """Gates per example, of both signs: they multiply the imaginary part of the carry."""
    values = draw(name, "masked and weighted")
    gates = np.random.default_rng(4).choice([0.0, 1.0, 2.5, -0.3], size=(NUM_STEPS, EXAMPLES))

    @jax.jit
    def run(params, carry, xs, targets, mask, weights):
        estimator = gated_bptt(CELLS[name].step, problems.squared_error, gates_fn=lambda key, num_steps: gates)
        carry = carry if name == "lstm" else carry[0]
        result = problems.one_update(estimator, params, carry, Batch(xs, targets, mask, weights))
        return result.loss_sum, result.grad_sum

    wanted = complex_step.gradient(name, *values, [(gates, np.ones(NUM_STEPS, bool))])
    problems.assert_close(run(*values), wanted)


def difference(found, wanted):
    """The largest |found − wanted| of all entries, relative to the largest entry, taken in 50 digits."""
    with mpmath.workdps(high_precision.DIGITS):
        size = max(abs(w) for leaf in wanted.values() for w in leaf)
        pairs = [pair for key in wanted for pair in zip(found[key], wanted[key], strict=True)]
        return float(max(abs(f - w) for f, w in pairs) / size)


def true_error(found, wanted):
    """Of float64 arrays."""
    return difference({key: map(mpmath.mpf, np.ravel(a).tolist()) for key, a in found.items()}, wanted)


@functools.cache
def exactly(name, truncation, kind):
    windows = windows_of(NUM_STEPS, *TRUNCATIONS[truncation])
    return high_precision.gradient(name, *draw(name, kind), windows)


@pytest.mark.parametrize("kind", KINDS)
@EVERY_TRUNCATION
@pytest.mark.parametrize("name", problems.usual(["lstm"], high_precision.CELLS))
def test_against_fifty_digits(name, truncation, kind):
    """What float64 really loses: about one unit in the last place of the largest entry, far below 1e-12."""
    loss, grad = estimate(name, truncation)(*draw(name, kind))
    wanted_loss, wanted = exactly(name, truncation, kind)
    assert true_error(grad, wanted) < 4e-15
    assert true_error({"": loss}, {"": [wanted_loss]}) < 4e-15


@pytest.mark.parametrize("name", high_precision.CELLS)
def test_the_oracles_agree_to_fifty_digits(name):
    values, truncation = draw(name, "masked and weighted"), "strides"
    wanted = exactly(name, truncation, "masked and weighted")[1]
    stepped = complex_step.gradient(name, *values, runs(truncation))[1]
    params, carry, *arrays = jax.tree.map(lambda a: a[None], values)
    coverage = np.zeros((1, NUM_STEPS, NUM_STEPS, EXAMPLES))
    for losses, cut in windows_of(NUM_STEPS, *TRUNCATIONS[truncation]):
        for t in losses:
            coverage[:, t, cut : t + 1] = 1
    by_pairs = by_hand.gradient(name, params, carry, *arrays, coverage)[1]
    assert true_error(stepped, wanted) < 4e-15
    assert true_error(by_pairs, wanted) < 4e-15
    windows = windows_of(NUM_STEPS, *TRUNCATIONS[truncation])
    narrower = high_precision.gradient(name, *values, windows, width="1e-17")[1]
    assert 0 < difference(narrower, wanted) < 1e-29  # what the width of the difference still decides


def test_the_oracles_share_nothing_with_the_package():
    """By hand, complex step, digits and rounding know NumPy only; no oracle imports the package."""
    folder = pathlib.Path(by_hand.__file__).parent
    imported = {}
    for path in folder.glob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        names = [n.module if isinstance(n, ast.ImportFrom) else a.name for n in nodes
                 if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names]  # fmt: skip
        imported[path.stem] = {name.split(".")[0] for name in names}
    assert not any("jbptt" in names for names in imported.values())
    for name in ("by_hand", "complex_step", "high_precision", "rounding", "shapes"):
        assert "jax" not in imported[name]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_bound_on_rounding_holds_and_is_not_idle(dtype):
    """Random formulas in the narrow format, rounded after every operation, stay within; a tenth of the bound is met."""
    import ml_dtypes

    narrow = lambda a: np.asarray(a).astype(getattr(ml_dtypes, dtype, dtype))
    rng, largest = np.random.default_rng(0), 0.0
    for _ in range(50):
        a, b, c = (narrow(rng.normal(size=(4, 4))) for _ in range(3))
        wrap = rounding.exact_inputs(dtype)
        x, y, z = (wrap(v.astype(float)) for v in (a, b, c))
        found = np.tanh(narrow(a.astype(float) @ b.astype(float)) + c) * (a - b) / (1 + np.exp(-c))
        wanted = np.tanh(x @ y + z) * (x - y) / (1 + np.exp(-z))
        ratio = np.abs(found.astype(float) - wanted.value) / wanted.error
        assert found.dtype == narrow(0.0).dtype and np.all(ratio <= 1)
        largest = max(largest, ratio.max())
    assert largest > 0.1
