"""Shapes drawn by hypothesis, fifty draws of values each, against derivatives that share no code with the package.

`JBPTT_SHAPES=200 pytest tests/test_generated.py` is the full run of more than 10,000 cases in float64 alone; by
default there are 12 shapes and those that are kept.
"""

import functools
import os
import subprocess
import sys

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from oracles import by_hand, complex_step, rounding
from oracles.shapes import (
    HIDDEN,
    INPUT,
    Shape,
    Values,
    coverage_of,
    draw_values,
    missing,
    one_draw,
    runs_of,
    shapes,
)
from problems import usual

from jbptt import Batch, cells, full_bptt, gated_bptt, truncated_bptt
from jbptt.testing import brute_force_gradient, frozen_loss

OPTIMIZED = True

NUM_SHAPES, NUM_DRAWS = int(os.environ.get("JBPTT_SHAPES", "12")), 50
# The usual run has some of the shapes that are kept, CI the others of them and those that are drawn.
WHICH = pytest.mark.parametrize("which", usual(["some"], ["some", "others", "drawn"]))
MAKERS = {"linear": cells.linear, "tanh": cells.rnn, "gru": cells.gru, "lstm": cells.lstm}


def problem(shape: Shape):
    """Step, what wraps and unwraps parameters, what wraps the carry, and the batch of one draw."""
    cell = MAKERS[shape.cell](INPUT, HIDDEN)
    first = (slice(None), *(0 for _ in shape.batch_shape))
    by_step = lambda name, array: array[first] if name == "by step" else array
    same = lambda tree: tree

    def batch_of(xs, values: Values) -> Batch:
        mask = None if shape.mask == "none" else by_step(shape.mask, values.mask)
        weights = None if shape.weights == "none" else by_step(shape.weights, values.weights)
        return Batch(xs, values.targets, mask, weights)

    def nested(params, carry, x):
        inner, y = cell.step(params["cell"], carry["state"], jnp.concatenate([x["a"], x["b"][0]], -1))
        return {"state": inner, "count": carry["count"] + 1}, y

    def apart(params, carry, x):
        state, y = cell.step(params[0], carry[0], x[0] * x[1])
        return (state, ()), {"h": y}

    if shape.structure == "nested":
        counted = lambda carry: {"state": carry, "count": jnp.array(0)}
        pair = lambda values: {"a": values.xs[..., :1], "b": (values.xs[..., 1:],)}
        return nested, lambda p: {"cell": p}, lambda p: p["cell"], counted, lambda v: batch_of(pair(v), v)
    if shape.structure == "apart":
        step = cells.with_readout(apart, lambda params, y: y["h"])
        ones = lambda values: [values.xs, jnp.ones(shape.num_steps, int)]
        return step, lambda p: [p], lambda p: p[0], lambda carry: (carry, ()), lambda v: batch_of(ones(v), v)
    return cell.step, same, same, same, lambda v: batch_of(v.xs, v)


def estimate_of(shape: Shape):
    """From `Values` to the loss sum and the gradient sum, `[draws, ...]`, in the way that the shape asks for."""
    step, wrap, unwrap, wrap_carry, batch_of = problem(shape)
    narrow = lambda a: a.astype(shape.dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a

    def run(values: Values):
        values = jax.tree.map(lambda a: narrow(jnp.asarray(a)), values)
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
        return total.loss_sum, unwrap(total.grad_sum)

    def draw_by_draw(values):
        """The first draw without any transformation if the shape asks for that, the others by one program."""
        compiled = jax.jit(run)
        rows = [compiled(one_draw(values, d)) for d in range(len(values.mask))]
        if shape.transform == "eager":
            rows[0] = run(one_draw(values, 0))
        return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)

    return {"jit of vmap": jax.jit(jax.vmap(run)), "vmap": jax.vmap(run)}.get(shape.transform, draw_by_draw)


def derivatives_by_hand(shape: Shape, values: Values, **options):
    """Loss sums `[draws]` and gradients `[draws, ...]`."""
    carry = values.carry if isinstance(values.carry, tuple) else (values.carry,)
    coverage = np.stack([coverage_of(shape, gates) for gates in values.gates])
    arrays = values.xs, values.targets, values.mask, values.weights, coverage
    return by_hand.gradient(shape.cell, values.params, carry, *arrays, **options)


def derivatives_by_complex_step(shape: Shape, values: Values, draw: int):
    one = one_draw(values, draw)
    carry = one.carry if isinstance(one.carry, tuple) else (one.carry,)
    arrays = one.xs, one.targets, one.mask, one.weights
    return complex_step.gradient(shape.cell, one.params, carry, *arrays, runs_of(shape, one.gates))


def sum_of_terms(shape: Shape, values: Values):
    """`Σ |w| ℓ` by draw: weights of both signs leave a loss that is smaller than what was added, and rounded."""
    return derivatives_by_hand(shape, values._replace(weights=np.abs(values.weights)))[0]


def assert_draws_agree(found, wanted, size=None):
    """Draw by draw and leaf by leaf: max |difference| ≤ 1e-12 · size (the largest entry of the draw's gradient)."""
    leaves = [
        (np.asarray(a), np.asarray(b)) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    ]
    if size is None:
        size = np.max([np.abs(b.reshape(len(b), -1)).max(1) for _, b in leaves], axis=0)
    for a, b in leaves:
        assert a.shape == b.shape, (a.shape, b.shape)
        error = np.abs(a - b).reshape(len(b), -1).max(1)
        assert np.all(error <= 1e-12 * size), (error.max(), size[np.argmax(error)])


KEPT = [  # cases once wrong, or easily so; together they are all `OCCASIONS`
    Shape("gru", 11, (2, 2), "interior", "per example", "windows", 4, 3, (5, 1, 5), "nested", "jit"),
    Shape("lstm", 5, (3,), "by step", "by step", "gates per example", 1, 1, (5,), "plain"),
    Shape("tanh", 1, (), "nothing", "none", "windows", 5, 2, (1,), "plain"),
    Shape("linear", 2, (1,), "prefix", "none", "full", 1, 1, (2,), "apart", "eager"),
    Shape("tanh", 3, (3,), "row", "per example", "windows", 2, 2, (1, 2), "apart"),
    Shape("lstm", 3, (), "nothing", "zero", "windows", 4, 4, (3,), "nested"),
    Shape("gru", 4, (3,), "lengths", "none", "windows", 4, 1, (2, 2), "plain"),
    Shape("linear", 5, (2, 2), "stretch", "per example", "gates", 1, 1, (5,), "nested", "vmap"),
    Shape("tanh", 5, (1,), "suffix", "by step", "gates", 1, 1, (5,), "plain", "jit"),
    Shape("gru", 5, (2, 2), "none", "by step", "gates per example", 1, 1, (5,), "apart"),
]


def check_shapes(check, which: str, max_examples: int, *, seed: int, some, others, **options) -> list[Shape]:
    """Runs a check on shapes that are kept, or on drawn ones, always the same. Returns what was seen."""
    if which == "drawn":
        return generate(check, max_examples, seed=seed, **options)
    for shape in (kept := {"some": some, "others": others}[which]):
        check(shape)
    return kept


def generate(check, max_examples: int, *, seed: int, **options) -> list[Shape]:
    """Runs a check on drawn shapes, always the same; a failure shrinks. Returns what was seen."""
    seen = []

    def on_each(shape):
        hypothesis.assume(shape not in seen)
        check(shape)
        seen.append(shape)

    quiet = hypothesis.settings(
        max_examples=max_examples, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), database=None
    )
    quiet(hypothesis.seed(seed)(hypothesis.given(shapes(**options))(on_each)))()
    assert len(seen) >= max_examples
    return seen


def test_the_generator_draws_every_kind():
    """All lengths, masks, truncations, structures and ways to run are among 200 shapes; the kept ones have them too."""
    assert not missing(generate(lambda shape: None, 200, seed=0))
    assert not missing(KEPT)
    masks = {shape.mask: draw_values(shape, 0, NUM_DRAWS).mask for shape in KEPT}
    assert np.all(masks["prefix"][:, -1]) and not np.any(masks["prefix"][:, 0])
    assert np.all(masks["suffix"][:, 0]) and not np.any(masks["suffix"][:, -1])
    assert np.all(np.any(np.all(~masks["row"], axis=1), axis=-1)) and np.any(masks["row"])
    assert not np.any(masks["nothing"])
    inside = masks["interior"][:, :-2] & ~masks["interior"][:, 1:-1] & masks["interior"][:, 2:]
    assert np.all(np.any(inside, axis=1).reshape(NUM_DRAWS, -1).any(-1))


@WHICH
def test_against_derivatives_by_hand(which):
    """All draws against derivatives by hand, every fifth against the complex step as well."""

    def check(shape):
        values = draw_values(shape, NUM_DRAWS, NUM_DRAWS)
        found = jax.tree.map(np.asarray, estimate_of(shape)(values))
        loss, grads = derivatives_by_hand(shape, values)
        size = sum_of_terms(shape, values)
        assert_draws_agree((found[0],), (loss,), size)
        assert_draws_agree(found[1], grads)
        some = range(0, NUM_DRAWS, 5)
        stepped = [derivatives_by_complex_step(shape, values, d) for d in some]
        loss, grads = jax.tree.map(lambda *leaves: np.stack(leaves), *stepped)
        assert_draws_agree((found[0][some],), (loss,), size[some])
        assert_draws_agree(jax.tree.map(lambda a: a[some], found[1]), grads)

    check_shapes(check, which, NUM_SHAPES, seed=6, some=KEPT[:4], others=KEPT[4:])


@pytest.mark.more("test_against_derivatives_by_hand")
@WHICH
def test_against_brute_force_and_forward_mode(which):
    """The definition over explicit Jacobians; and for cuts the frozen loss, differentiated forward."""

    def check(shape):
        values = draw_values(shape, 1, NUM_DRAWS)
        step, wrap, unwrap, wrap_carry, batch_of = problem(shape)
        total = np.sum(np.where(values.mask, values.weights, 0).reshape(NUM_DRAWS, -1), axis=1)
        coverage = np.stack([coverage_of(shape, gates) for gates in values.gates])
        found = estimate_of(shape)(values)[1]
        found = jax.tree.map(lambda a: a / np.where(total == 0, 1, total).reshape(-1, *(1 for _ in a.shape[1:])), found)
        args = lambda v: (step, problems.squared_error, wrap(v.params), wrap_carry(v.carry), batch_of(v))

        def by_definition(values, coverage):
            return unwrap(brute_force_gradient(*args(values), coverage=coverage))

        assert_draws_agree(found, jax.jit(jax.vmap(by_definition))(values, coverage))
        if shape.kind in ("full", "windows"):
            cuts = coverage[(0, ..., *(0 for _ in shape.batch_shape))]

            def forward_mode(values):
                return unwrap(jax.jacfwd(frozen_loss(*args(values), coverage=cuts))(wrap(values.params)))

            assert_draws_agree(found, jax.jit(jax.vmap(forward_mode))(values))

    sides = {"some": KEPT[6:7], "others": KEPT[:2]}
    check_shapes(check, which, NUM_SHAPES // 4, seed=2, **sides, transforms=("jit of vmap",))


SLACK = 3  # where the oracle rounds a product, the engine also rounds its gate and the sum of all λ that pass there
LOW = {"float32": 1e-5, "float16": 0.03, "bfloat16": 0.2}  # and what the median bound may be, of the largest entry


@WHICH
def test_in_low_precision(which):
    """Entry by entry within what rounding can do, against the float64 gradient of the same rounded inputs.

    The bound comes from a running error analysis of the formulas by hand (`oracles/rounding.py`), gradients added up
    in float32 as the engine promises; the largest errors are a tenth of it. The inputs are small and half precision
    short, so that it stays a few per cent (a few millionths in float32) of the largest entry, and says something.
    """

    def check(shape):
        values = draw_values(shape, 3, NUM_DRAWS, scale=0.4)
        found = jax.tree.map(lambda a: np.asarray(a, float), estimate_of(shape)(values))
        exactly, zero = rounding.exact_inputs(shape.dtype), rounding.sum_in_float32()
        loss, grads = derivatives_by_hand(shape, values, exactly=exactly, zero=zero)
        sizes = np.max([np.abs(g.value.reshape(NUM_DRAWS, -1)).max(1) for g in grads.values()], axis=0)[:, None]
        errors = np.concatenate([g.error.reshape(NUM_DRAWS, -1) for g in grads.values()], axis=1)
        relative = errors / np.where(sizes == 0, np.inf, sizes)
        assert np.median(relative) < LOW[shape.dtype]
        for name, wanted in [(None, loss), *grads.items()]:
            actual = (found[0] if name is None else found[1][name]).reshape(wanted.shape)
            assert np.all(np.abs(actual - wanted.value) <= SLACK * wanted.error), name

    kept = (KEPT[0]._replace(num_steps=5, split=(5,)), KEPT[1], KEPT[9])
    dtypes = "float16", "bfloat16", "float32"
    keep = [shape._replace(dtype=dtype, transform="jit") for shape, dtype in zip(kept, dtypes, strict=True)]
    options = {"dtypes": tuple(LOW), "transforms": ("jit of vmap", "jit")}
    sides = {"some": keep[2:], "others": keep[:2]}
    seen = check_shapes(check, which, NUM_SHAPES // 6, seed=3, **sides, **options)
    found = {shape.dtype for shape in seen}
    assert found and found == {"some": {"float32"}, "others": {"float16", "bfloat16"}}.get(which, found)


def on_two_devices(which):
    """The batch shared between two devices: what `test_sharded` runs in a process of its own."""
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(array, *axes):
        return jax.device_put(array, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)))

    def check(shape):
        values = draw_values(shape, 4, NUM_DRAWS)
        per_example = {"xs", "targets", "mask", "weights"} | ({"gates"} if shape.kind == "gates per example" else set())
        placed = {
            name: jax.tree.map(lambda a, n=name: place(a, None, None, "batch") if n in per_example else place(a), array)
            for name, array in values._asdict().items()
        }
        placed["carry"] = jax.tree.map(lambda a: place(a, None, "batch"), values.carry)
        program = estimate_of(shape).lower(Values(**placed)).compile()
        assert "all-reduce" in program.as_text()
        found = jax.tree.map(np.asarray, program(Values(**placed)))
        loss, grads = derivatives_by_hand(shape, values)
        assert_draws_agree((found[0],), (loss,))
        assert_draws_agree(found[1], grads)

    options = {"batch_shapes": [(2,), (4,), (2, 2)], "transforms": ("jit of vmap",)}
    keep = [KEPT[0]._replace(transform="jit of vmap"), KEPT[9]]
    seen = check_shapes(check, which, NUM_SHAPES // 6, seed=4, some=keep[1:], others=keep[:1], **options)
    print(f"{len(seen)} shapes agree on {jax.device_count()} devices")


@WHICH
def test_sharded(which):
    """Devices are counted before JAX starts, so in another process."""
    same_package = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment = os.environ | same_package | {"JAX_NUM_CPU_DEVICES": "2", "JAX_ENABLE_X64": "1"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0" if os.environ.get("JBPTT_FULL") == "1" else "1"
    process = subprocess.run([sys.executable, __file__, which], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "agree on 2 devices" in process.stdout


if __name__ == "__main__":
    on_two_devices(sys.argv[1])
