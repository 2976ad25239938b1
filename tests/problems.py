"""Small problems that several test modules share, drawn from NumPy's generator."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbptt import Batch, cells

INPUT, HIDDEN, OUTPUT, EXAMPLES = 2, 3, 2, 3


def usual(wanted, values, full=()):
    """The values of a test's parameter: those wanted in the usual run, `full` in the full one.

    All others are `more`, for CI.
    """
    return usual_rows(*([(value,) for value in some] for some in (wanted, values, full)))


def usual_rows(wanted, rows, full=()):
    """The same for several parameters at once, a tuple for each case."""

    def param(row):
        marks = () if row in wanted else pytest.mark.full if row in full else pytest.mark.more
        return pytest.param(*row, marks=marks)

    return [param(row) for row in rows]


class Problem(NamedTuple):
    """What a gradient is computed of."""

    step: Any
    loss: Any
    params: Any
    carry: Any
    batch: Batch


def squared_error(y, target):
    return jnp.sum((y - target) ** 2, axis=-1)


CELLS = {
    "linear": cells.linear(INPUT, HIDDEN),
    "tanh": cells.rnn(INPUT, HIDDEN),
    "relu": cells.rnn(INPUT, HIDDEN, activation=jax.nn.relu),
    "leaky_relu": cells.rnn(INPUT, HIDDEN, activation=jax.nn.leaky_relu),
    "gru": cells.gru(INPUT, HIDDEN),
    "lstm": cells.lstm(INPUT, HIDDEN),
}


def readout(params, h):
    return jnp.tanh(h) @ params["w_y"] + params["b_y"]


def cell_core(name):
    return lambda params, carry, x: CELLS[name].step(params["cell"], carry, x)


STEPS = {
    **{name: cell.step for name, cell in CELLS.items()},
    **{f"{name}+readout": cells.with_readout(cell_core(name), readout) for name in ("tanh", "lstm")},
    "gru+reset": cells.with_reset(CELLS["gru"].step, CELLS["gru"].initial_carry),
    "lstm+readout+reset": cells.with_reset(cells.with_readout(cell_core("lstm"), readout), CELLS["lstm"].initial_carry),
}


def draw(rng, shapes, scale=0.6):
    """Normal numbers in the shapes of a tree."""
    return jax.tree.map(lambda s: jnp.asarray(scale * rng.normal(size=s.shape).astype(s.dtype)), shapes)


def make(name, num_steps, *, examples=EXAMPLES, seed=0):
    """A random problem for the step of that name; the same prefix for every `num_steps`."""
    rng = np.random.default_rng(seed)
    cell = CELLS[name.split("+")[0]]
    with_readout = "+readout" in name
    params = draw(rng, jax.eval_shape(cell.init, jax.random.key(0)))
    if with_readout:
        params = {"cell": params, "w_y": rng.normal(size=(HIDDEN, OUTPUT)), "b_y": rng.normal(size=OUTPUT)}
    carry = draw(rng, jax.eval_shape(lambda: cell.initial_carry((examples,))))
    width = OUTPUT if with_readout else HIDDEN
    rows = [
        (rng.normal(size=(examples, INPUT)), rng.normal(size=(examples, width)), rng.random(examples) < 0.2)
        for _ in range(num_steps)
    ]
    xs, targets, resets = (jnp.asarray(np.stack(column)) for column in zip(*rows, strict=True))
    batch = Batch((xs, resets) if "+reset" in name else xs, targets)
    return Problem(STEPS[name], squared_error, jax.tree.map(jnp.asarray, params), carry, batch)


def cut(batch, start, stop):
    """Steps start … stop − 1."""
    return jax.tree.map(lambda a: a[start:stop], batch)


def one_update(estimator, params, carry, batch, key=None):
    """The estimate of a first update."""
    return estimator.update(params, estimator.init(params, carry, batch, key), batch)[0]


def in_one_line(page):
    """What a page says, however its lines are broken."""
    return " ".join(str(page).split())


def assert_close(actual, desired, rtol=1e-12):
    """Leaf by leaf: max |difference| ≤ rtol · max |desired|; infinities and NaN where desired, nowhere else."""
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    for (path, a), d in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(desired), strict=True):
        a, d = np.asarray(a), np.asarray(d)
        assert a.shape == d.shape, (jax.tree_util.keystr(path), a.shape, d.shape)
        finite = np.isfinite(d)
        assert np.array_equal(a[~finite], d[~finite], equal_nan=True), (
            f"{jax.tree_util.keystr(path)}: {a[~finite]} for {d[~finite]}"
        )
        error, size = np.max(np.abs(a[finite] - d[finite]), initial=0), np.max(np.abs(d[finite]), initial=0)
        assert error <= rtol * size, f"{jax.tree_util.keystr(path)}: {error:.3g} off, at a size of {size:.3g}"


def assert_same_bits(actual, desired):
    """Leaf by leaf the same dtype, shape and bytes."""
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    for (path, a), d in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(desired), strict=True):
        a, d = (np.asarray(jax.random.key_data(v) if is_key(v) else v) for v in (a, d))
        assert (a.dtype, a.shape, a.tobytes()) == (d.dtype, d.shape, d.tobytes()), jax.tree_util.keystr(path)


def is_key(leaf):
    return jnp.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.prng_key)
