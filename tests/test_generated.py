"""Shapes drawn by hypothesis, fifty draws of values each, against derivatives by hand and in forward mode.

`JBPTT_SHAPES=200 pytest tests/test_generated.py` is the full run of 10,000 cases; by default 12 shapes and the
three that are kept, 750 cases.
"""

import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import problems
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from oracles import by_hand

from jbptt import Batch, cells, full_bptt, gated_bptt, truncated_bptt, truncation
from jbptt.testing import brute_force_gradient, frozen_loss

NUM_SHAPES, NUM_DRAWS = int(os.environ.get("JBPTT_SHAPES", "12")), 50
MAKERS = {"linear": cells.linear, "tanh": cells.rnn, "gru": cells.gru, "lstm": cells.lstm}


class Shape(NamedTuple):
    """Everything that decides a program; the values are drawn besides."""

    cell: str
    num_steps: int
    batch_shape: tuple[int, ...]
    mask: str
    weights: str
    kind: str
    window: int
    stride: int
    split: tuple[int, ...]
    wrapped: bool


@st.composite
def shapes(draw) -> Shape:
    window = draw(st.integers(1, 5))
    num_steps = draw(st.sampled_from([1, 2, max(1, window - 1), window, window + 1, 3 * window + 2, 3, 7, 11]))
    kind = draw(st.sampled_from(["full", "windows", "windows", "gates", "gates per example"]))
    split, left = [], num_steps
    while kind == "windows" and left > 1 and len(split) < 2:
        split.append(draw(st.integers(1, left)))
        left -= split[-1]
    split = (*split, left) if left else tuple(split)
    return Shape(
        cell=draw(st.sampled_from(list(MAKERS))),
        num_steps=num_steps,
        batch_shape=draw(st.sampled_from([(), (1,), (3,), (2, 2)])),
        mask=draw(st.sampled_from(["none", "by step", "prefix", "interior", "nothing"])),
        weights=draw(st.sampled_from(["none", "by step", "per example", "zero"])),
        kind=kind,
        window=window,
        stride=draw(st.integers(1, window)),
        split=split,
        wrapped=draw(st.booleans()),
    )


class Values(NamedTuple):
    """Fifty draws, leading axis first."""

    params: Any
    carry: Any
    xs: Any
    targets: Any
    mask: Any
    weights: Any
    gates: Any


def draw_values(shape: Shape, seed: int) -> Values:
    rng, (steps, batch) = np.random.default_rng(seed), (shape.num_steps, shape.batch_shape)
    cell = MAKERS[shape.cell](2, 3)
    normal = lambda s: 0.7 * rng.normal(size=(NUM_DRAWS, *s.shape))
    params = jax.tree.map(normal, jax.eval_shape(cell.init, jax.random.key(0)))
    carry = jax.tree.map(normal, jax.eval_shape(lambda: cell.initial_carry(batch)))
    full = (NUM_DRAWS, steps, *batch)
    mask = {
        "none": np.ones(full, bool),
        "by step": np.broadcast_to(rng.random((NUM_DRAWS, steps, *(1 for _ in batch))) < 0.7, full),
        "prefix": np.broadcast_to(np.arange(steps).reshape(1, -1, *(1 for _ in batch)) >= steps // 2, full),
        "interior": rng.random(full) < 0.6,
        "nothing": np.zeros(full, bool),
    }[shape.mask]
    by_step = rng.normal(size=(NUM_DRAWS, steps, *(1 for _ in batch)))
    weights = {
        "none": np.ones(full),
        "by step": np.broadcast_to(by_step, full),
        "per example": rng.normal(size=full),
        "zero": np.zeros(full),
    }[shape.weights]
    gates = rng.choice([0.0, 1.0, 1.0, 2.0, -0.5], size=full if shape.kind == "gates per example" else full[:2])
    return Values(params, carry, rng.normal(size=(*full, 2)), rng.normal(size=(*full, 3)), mask, weights, gates)


def problem(shape: Shape):
    """Step, loss, and the batch of one draw, perhaps with other structures around the same numbers."""
    cell = MAKERS[shape.cell](2, 3)
    by_step = lambda name, array: array[(slice(None), *(0 for _ in shape.batch_shape))] if name == "by step" else array

    def batch_of(values: Values) -> Batch:
        xs = {"a": values.xs[..., :1], "b": (values.xs[..., 1:],)} if shape.wrapped else values.xs
        mask = None if shape.mask == "none" else by_step(shape.mask, values.mask)
        weights = None if shape.weights == "none" else by_step(shape.weights, values.weights)
        return Batch(xs, values.targets, mask, weights)

    if not shape.wrapped:
        return cell.step, lambda params: params, lambda carry: carry, batch_of

    def step(params, carry, x):
        inner, y = cell.step(params["cell"], carry["state"], jnp.concatenate([x["a"], x["b"][0]], -1))
        return {"state": inner, "count": carry["count"] + 1}, y

    return step, lambda params: {"cell": params}, lambda carry: {"state": carry, "count": jnp.array(0)}, batch_of


def estimate_of(shape: Shape):
    step, wrap, wrap_carry, batch_of = problem(shape)

    def run(values: Values):
        make = {
            "full": full_bptt,
            "windows": functools.partial(truncated_bptt, window=shape.window, stride=shape.stride),
        }.get(shape.kind, functools.partial(gated_bptt, gates_fn=lambda key, num_steps: values.gates))
        estimator, params, batch = make(step, problems.squared_error), wrap(values.params), batch_of(values)
        state, total, start = None, None, 0
        for length in shape.split:
            piece = jax.tree.map(lambda a, s=start, n=length: a[s : s + n], batch)
            start += length
            state = estimator.init(params, wrap_carry(values.carry), piece) if state is None else state
            estimate, state = estimator.update(params, state, piece)
            total = estimate if total is None else total + estimate
        return total.loss_sum, total.grad_sum["cell"] if shape.wrapped else total.grad_sum

    return jax.jit(jax.vmap(run))


def coverage_of(shape: Shape, gates):
    """`[T, T, *batch]` of one draw."""
    if shape.kind == "full":
        matrix = np.tri(shape.num_steps)
    elif shape.kind == "windows":
        matrix = np.asarray(truncation.window_coverage(shape.num_steps, shape.window, shape.stride))
    else:  # by hand: the product of the gates between
        t, batch = shape.num_steps, np.shape(gates)[1:]
        matrix = np.zeros((t, t, *batch))
        for i in range(t):
            for j in range(i, t):
                matrix[j, i] = np.prod(gates[i + 1 : j + 1], axis=0)
    matrix = matrix.reshape(*matrix.shape, *(1 for _ in range(2 + len(shape.batch_shape) - matrix.ndim)))
    return np.broadcast_to(matrix, (shape.num_steps, shape.num_steps, *shape.batch_shape))


def assert_draws_agree(found, wanted):
    """Draw by draw and leaf by leaf: max |difference| ≤ 1e-12 · (the largest entry of the draw's gradient)."""
    leaves = [
        (np.asarray(a), np.asarray(b)) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    ]
    size = np.max([np.abs(b.reshape(len(b), -1)).max(1) for _, b in leaves], axis=0)
    for a, b in leaves:
        error = np.abs(a - b).reshape(len(b), -1).max(1)
        assert np.all(error <= 1e-12 * size), (error.max(), size[np.argmax(error)])


EXAMPLES = [  # cases worth keeping: once wrong, or easily so
    Shape("gru", 11, (2, 2), "interior", "per example", "windows", 4, 3, (5, 1, 5), True),
    Shape("lstm", 7, (3,), "by step", "by step", "gates per example", 3, 1, (7,), False),
    Shape("tanh", 1, (), "nothing", "none", "windows", 5, 2, (1,), False),
]


def keep(test):
    for shape in EXAMPLES:
        test = example(shape)(test)
    return test


@settings(
    max_examples=NUM_SHAPES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
@keep
@given(shapes())
def test_against_derivatives_by_hand(shape):
    values = draw_values(shape, seed=NUM_DRAWS)
    found = estimate_of(shape)(values)
    wanted = []
    for d in range(NUM_DRAWS):
        one = jax.tree.map(lambda a, d=d: np.asarray(a[d]), values)
        carry = one.carry if isinstance(one.carry, tuple) else (one.carry,)
        arrays = one.xs, one.targets, one.mask, one.weights
        wanted.append(by_hand.gradient(shape.cell, one.params, carry, *arrays, coverage_of(shape, one.gates)))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *wanted)
    assert_draws_agree((found[0],), (stacked[0],))
    assert_draws_agree(found[1], stacked[1])


@settings(
    max_examples=NUM_SHAPES // 4,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    database=None,
)
@keep
@given(shapes())
def test_against_brute_force_and_forward_mode(shape):
    """The definition over explicit Jacobians; and for cuts the frozen loss, differentiated forward."""
    values = draw_values(shape, seed=1)
    step, wrap, wrap_carry, batch_of = problem(shape)
    total = np.sum(np.where(values.mask, values.weights, 0).reshape(NUM_DRAWS, -1), axis=1)
    coverage = np.stack([coverage_of(shape, values.gates[d]) for d in range(NUM_DRAWS)])
    found = estimate_of(shape)(values)[1]
    found = jax.tree.map(lambda a: a / np.where(total == 0, 1, total).reshape(-1, *(1 for _ in a.shape[1:])), found)
    unwrap = lambda tree: tree["cell"] if shape.wrapped else tree

    def by_definition(values, coverage):
        args = step, problems.squared_error, wrap(values.params), wrap_carry(values.carry), batch_of(values)
        return unwrap(brute_force_gradient(*args, coverage=coverage))

    assert_draws_agree(found, jax.jit(jax.vmap(by_definition))(values, coverage))
    if shape.kind in ("full", "windows"):
        cuts = coverage[(0, ..., *(0 for _ in shape.batch_shape))]

        def forward_mode(values):
            args = step, problems.squared_error, wrap(values.params), wrap_carry(values.carry), batch_of(values)
            return unwrap(jax.jacfwd(frozen_loss(*args, coverage=cuts))(wrap(values.params)))

        assert_draws_agree(found, jax.jit(jax.vmap(forward_mode))(values))
