"""Small products with batch axes as sums: the same numbers, and no other product is touched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbptt
from jbptt import engine
from jbptt.engine import small_products
from jbptt.sweeps import programs
from jbptt.sweeps.points import runs_of

# (shape of a, shape of b, ((contracted of a, of b), (batch of a, of b)))
PRODUCTS = {
    "matrices": ((5, 2, 3), (5, 3, 4), (([2], [1]), ([0], [0]))),
    "both transposed": ((5, 3, 2), (5, 4, 3), (([1], [2]), ([0], [0]))),
    "batch axes apart": ((2, 5, 3), (3, 4, 5), (([2], [0]), ([1], [2]))),
    "two sums": ((5, 2, 3, 2), (2, 5, 3), (([2, 1], [2, 0]), ([0], [1]))),
    "two batch axes": ((5, 6, 2), (6, 2, 5), (([2], [1]), ([1, 0], [0, 2]))),
    "vectors": ((5, 3), (5, 3), (([1], [1]), ([0], [0]))),
    "outer": ((5, 3), (5, 4), (([], []), ([0], [0]))),
    "rows and columns of two axes": ((5, 2, 3, 2), (5, 2, 2, 2), (([1], [1]), ([0], [0]))),
}


def products_in(program):
    """The batched products of a program and of those inside."""
    found = 0
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            found += bool(equation.params["dimension_numbers"][1][0])
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            found += products_in(inner) if hasattr(inner, "eqns") else 0
    return found


def with_sums(function, *arguments):
    """What the function gives, and how many batched products are left."""
    found = jax.jit(engine.with_small_products_as_sums(function))(*arguments)
    left = jax.make_jaxpr(engine.with_small_products_as_sums(function))(*arguments)
    return found, products_in(left.jaxpr)


def drawn(dtype, *shapes):
    rng = np.random.default_rng(0)
    numbers = [rng.normal(size=shape) + 1j * rng.normal(size=shape) for shape in shapes]
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    return [jnp.asarray(both if is_complex else both.real, dtype) for both in numbers]


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_small_product_is_a_sum(name, dtype):
    *shapes, dimensions = PRODUCTS[name]
    product = lambda a, b: jax.lax.dot_general(a, b, dimensions)
    a, b = drawn(dtype, *shapes)
    found, left = with_sums(product, a, b)
    assert left == 0 and products_in(jax.make_jaxpr(product)(a, b).jaxpr) == 1
    np.testing.assert_allclose(found, product(a, b), rtol=1e-13, atol=1e-14)


UNTOUCHED = {
    "large": (np.float32, (3, 8, 8), (3, 8, 9), (([2], [1]), ([0], [0]))),
    "half precision": (jnp.bfloat16, (5, 2, 3), (5, 3, 4), (([2], [1]), ([0], [0]))),
    "integers": (np.int32, (5, 2, 3), (5, 3, 4), (([2], [1]), ([0], [0]))),
    "one matrix": (np.float32, (2, 3), (3, 4), (([1], [0]), ([], []))),
}


@pytest.mark.parametrize("name", UNTOUCHED)
def test_other_products_stay(name):
    dtype, *shapes, dimensions = UNTOUCHED[name]
    product = lambda a, b: jax.lax.dot_general(a, b, dimensions)
    arrays = drawn(dtype, *shapes)
    left = jax.make_jaxpr(engine.with_small_products_as_sums(product))(*arrays)
    assert [equation.primitive.name for equation in left.eqns] == ["dot_general"]


def loops(w, h):
    """A product in a scan, in a loop until, in both branches, behind a checkpoint, inside of jit."""
    once = jax.jit(lambda h: jnp.tanh(h @ w))
    h, ys = jax.lax.scan(lambda h, _: (once(h), h @ w), h, length=3)
    _, h = jax.lax.while_loop(lambda at: at[0] < 3, lambda at: (at[0] + 1, at[1] @ w), (0, h))
    h = jax.lax.cond(h.sum() > 0, lambda h: h @ w, lambda h: -h @ w, h)
    return {"h": jax.checkpoint(once)(h), "ys": ys}


def test_inside_of_what_runs_programs():
    side_by_side = jax.vmap(loops)
    w, h = drawn(np.float64, (5, 3, 3), (5, 2, 3))
    assert products_in(jax.make_jaxpr(side_by_side)(w, h).jaxpr) == 6
    found, left = with_sums(side_by_side, w, h)
    assert left == 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found, side_by_side(w, h))


def test_an_error_of_the_users_is_the_users():
    def failing(x):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        engine.with_small_products_as_sums(failing)(jnp.ones(3))


def test_where_programs_cannot_be_rewritten_the_function_runs(monkeypatch):
    def broken(program):
        raise AttributeError("JAX has moved")

    monkeypatch.setattr(small_products, "as_sums", broken)
    a, b = drawn(np.float64, (5, 2, 3), (5, 3, 4))
    with pytest.warns(RuntimeWarning, match="JAX has moved"):
        found = engine.with_small_products_as_sums(jnp.matmul)(a, b)
    np.testing.assert_array_equal(found, a @ b)


def test_sweeps_compute_so():
    """Side by side, trainings of a small network have no batched product; one has its plain products."""
    cell = jbptt.cells.rnn(2, 3)
    estimator = jbptt.full_bptt(cell.step, jbptt.tasks.squared_error)

    def run(point, key):
        params, batch = cell.init(key), jbptt.Batch(jax.random.normal(key, (3, 2, 2)), jnp.ones((3, 2, 3)))
        state = estimator.init(params, cell.initial_carry((2,)), batch)
        grads = estimator.update(params, state, batch)[0].grads
        return {"w_h": grads["w_h"] * point["rate"]}

    runs = runs_of({"rate": np.arange(1.0, 5.0)}, None)
    (combination,), key = runs.combinations, jax.random.key(0)
    job, shapes = programs.job_of(runs, combination, key), programs.column_shapes(runs.columns)
    products = [
        programs.program_of(run, job, shapes, width, None).compiled[0].as_text().count(" dot(") for width in (1, 4)
    ]
    assert products[0] > 0 and products[1] == 0
    many, one = (jbptt.sweep(run, {"rate": np.arange(1.0, 5.0)}, key=key, width=w, progress=False) for w in (4, 1))
    np.testing.assert_allclose(many.w_h, one.w_h, rtol=1e-12)
