"""The engine's gradient of any step, whose weights are taken out of the loop, against `jax.grad` of a plain scan."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import sparse
from jax.extend.core import jaxprs_in_params
from problems import assert_close, one_update, squared_error, usual, usual_rows

from jbptt import Batch, Plan, cells, full_bptt, lag_profile, truncated_bptt, truncation_curve
from jbptt.engine import forward_backward
from jbptt.engine.cutting import cut
from jbptt.engine.weight_products import split_step
from jbptt.problem import problem_of

NUM_STEPS, EXAMPLES, INPUT, HIDDEN = 7, 3, 2, 4
NUMBERS = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(NUMBERS.normal(size=shape) / 2)


W_X, W_H, BIAS = draw(INPUT, HIDDEN), draw(HIDDEN, HIDDEN), draw(HIDDEN)


def plain(p, h, x):
    h = jnp.tanh(x @ p["x"] + h @ p["h"] + p["b"])
    return h, h


def weight_on_the_left(p, h, x):
    one = lambda h, x: jnp.tanh(p["x"].T @ x + p["h"] @ h + p["b"])
    h = jax.vmap(one)(h, x)
    return h, h


def weight_on_the_left_of_a_batch(p, h, x):
    h = jnp.tanh((p["x"].T @ x.T + p["h"] @ h.T).T)
    return h, h


def used_in_other_ways(p, h, x):
    """A weight twice in products, as it is and transposed, and once elementwise."""
    h = jnp.tanh(x @ p["x"] + h @ p["h"] + h @ p["h"].T + h * jnp.diag(p["h"]) + p["b"])
    return h, h @ p["h"]


def derived(p, h, x):
    """Weights that are computed from the parameters."""
    norm = p["h"] / jnp.linalg.norm(p["h"])
    x_and_h = jnp.concatenate([p["x"], norm])
    h = jnp.tanh(jnp.concatenate([x, h], axis=-1) @ x_and_h + jax.nn.softplus(p["b"]))
    return h, h


def several_axes(p, h, x):
    heads = h.reshape(*h.shape[:-1], 2, 2)
    weight = p["h"].reshape(2, 2, 2, 2)
    own = jnp.einsum("bhi,ihjk->bjk", heads, weight).reshape(h.shape)  # two contracted axes
    per_head = jnp.einsum("bhi,hij->bhj", heads, weight[0]).reshape(h.shape)  # a batch axis: left as it is
    h = jnp.tanh(own + per_head + x @ p["x"])
    return h, h


def hidden_in_programs(p, h, x):
    """Inner jit, custom derivative, checkpoint, cond, scan."""
    h = jax.jit(lambda h: jnp.tanh(h @ p["h"]))(h)
    h = jax.checkpoint(lambda h: jnp.sin(h @ p["h"]))(h) + jax.nn.relu(x @ p["x"])
    h = jax.lax.cond(jnp.sum(x) > 0, lambda h: h @ p["h"], lambda h: h, h)
    h, _ = jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["h"] + p["b"]), None), h, length=2)
    return h, h


def constants_and_integers(p, carry, x):
    h, count = carry
    h = jnp.tanh(h @ p["h"] + x @ (W_X + p["x"]) + jnp.eye(HIDDEN)[count % HIDDEN] + p["b"])
    return (h, count + 1), (h, p["b"])


def complex_numbers(p, h, x):
    """Complex weights of real parameters, real weights of complex numbers' parts, a cast that is no identity."""
    h = h @ (p["h"] + 0.5j * p["h"].T) + x @ p["x"].astype(complex)
    h = h / (1 + jnp.abs(h)) + 1j * (h.real @ p["h"]) + p["b"]
    return h, h.real + h.imag


def second_order(p, h, x):
    """Both sides depend on the carry: no product with a weight."""
    h = jnp.tanh(jnp.einsum("bi,bj->bij", h, h).sum(-1) / 4 + h @ (h.T @ h) / 9 + x @ p["x"] + h @ p["h"])
    return h, h


def no_width(p, h, x):
    """A product over an axis of size 0, as of a network without input."""
    h = jnp.tanh(x[:, :0] @ p["x"][:0] + h @ p["h"] + p["b"])
    return h, h


# The step, how many products with weights it has, and the first carry.
ZEROS = jnp.zeros((EXAMPLES, HIDDEN))
STEPS = {
    "plain": (plain, 2, ZEROS),
    "weight on the left": (weight_on_the_left, 2, ZEROS),
    "weight on the left of a batch": (weight_on_the_left_of_a_batch, 2, ZEROS),
    "used in other ways": (used_in_other_ways, 4, ZEROS),
    "derived": (derived, 1, ZEROS),
    "several axes": (several_axes, 2, ZEROS),
    "hidden in programs": (hidden_in_programs, 2, ZEROS),
    "constants and integers": (constants_and_integers, 2, (ZEROS, jnp.int32(0))),
    "complex numbers": (complex_numbers, 3, ZEROS.astype(complex)),
    "second order": (second_order, 2, ZEROS),
    "no width": (no_width, 2, ZEROS),
}


def first_output(y):
    return y[0] if isinstance(y, tuple) else y


def loss(y, target):
    extra = jnp.sum(y[1] ** 2) if isinstance(y, tuple) else 0
    return squared_error(first_output(y), target) + extra


READOUTS = (False, None), (True, 4)
WAYS = [(*readout, chunk_bytes) for readout in READOUTS for chunk_bytes in (1, 200, 2**19)]
HALF = [way for way in WAYS if way[0] != (way[2] == 200)]  # the other half is for the full run
KINDS = "weight on the left of a batch", "used in other ways", "hidden in programs", "complex numbers"


@pytest.mark.parametrize(("with_readout", "segment", "chunk_bytes"), usual_rows([(True, 4, 200)], WAYS, full=HALF))
@pytest.mark.parametrize("name", usual(KINDS, STEPS))
def test_gradient_of_any_step(name, with_readout, segment, chunk_bytes, monkeypatch):
    monkeypatch.setattr(forward_backward, "CHUNK_BYTES", chunk_bytes)
    step, num_products, carry = STEPS[name]
    params = {"x": W_X, "h": W_H, "b": BIAS, "unused": draw(2)}
    split = split_step(step, params, carry, draw(EXAMPLES, INPUT))
    assert len(split.program.products) == num_products
    if with_readout:
        step = cells.with_readout(
            step, lambda p, y: first_output(y) @ p["h"] * p["b"] + first_output(y) @ p["x"].T @ p["x"]
        )
    batch = Batch(draw(NUM_STEPS, EXAMPLES, INPUT), draw(NUM_STEPS, EXAMPLES, HIDDEN))

    def mean_loss(params):
        _, ys = jax.lax.scan(partial(step, params), carry, batch.xs)
        return jnp.mean(jax.vmap(loss)(ys, batch.targets))

    estimator = full_bptt(step, loss, plan=Plan(segment))
    estimate, _ = jax.jit(estimator.update)(params, estimator.init(params, carry, batch), batch)
    value, grads = jax.jit(jax.value_and_grad(mean_loss))(params)
    assert_close((estimate.loss, estimate.grads), (value, grads))


MAKERS = [full_bptt, partial(truncated_bptt, window=3), partial(truncated_bptt, window=3, stride=1)]


@pytest.mark.more("test_gradient_of_any_step")
@pytest.mark.parametrize("size", usual([NUM_STEPS], [NUM_STEPS, 2]))
@pytest.mark.parametrize("make", usual(MAKERS[2:], MAKERS))
def test_a_core_that_emits_nothing(make, size):
    """Its readout shows parameters alone, at every step: one that is as long as the sequence is no time axis."""
    step = cells.with_readout(lambda p, h, x: (plain(p, h, x)[0], None), lambda p, _: p["shown"])
    late = lambda y, target: target * jnp.sum(y**2)
    params = {"x": W_X, "h": W_H, "b": BIAS, "shown": draw(size)}
    targets = jnp.broadcast_to(jnp.arange(NUM_STEPS)[:, None], (NUM_STEPS, EXAMPLES)) / 2
    estimator, batch = make(step, late), Batch(draw(NUM_STEPS, EXAMPLES, INPUT), targets)
    estimate, _ = estimator.update(params, estimator.init(params, ZEROS, batch), batch)
    assert_close(estimate.grads["shown"], 2 * params["shown"] * jnp.mean(targets))
    assert not np.any(estimate.grads["h"])


@pytest.mark.parametrize("chunk_bytes", usual([1], [1, 2**19]))
def test_products_wider_than_their_weights(chunk_bytes, monkeypatch):
    """A weight in float32 whose products are float64."""
    monkeypatch.setattr(forward_backward, "CHUNK_BYTES", chunk_bytes)

    def step(p, h, x):
        h = jnp.tanh(jnp.dot(h, p["h"], preferred_element_type=jnp.float64) + x @ p["x"])
        return h.astype(jnp.float32), h

    params = {"x": W_X, "h": W_H.astype(jnp.float32)}
    batch = Batch(draw(NUM_STEPS, EXAMPLES, INPUT), draw(NUM_STEPS, EXAMPLES, HIDDEN))
    start = ZEROS.astype(jnp.float32)
    estimator = full_bptt(step, squared_error)
    estimate, _ = jax.jit(estimator.update)(params, estimator.init(params, start, batch), batch)

    def mean_loss(params):
        return jnp.mean(jax.vmap(squared_error)(jax.lax.scan(partial(step, params), start, batch.xs)[1], batch.targets))

    assert_close(estimate.grads, jax.grad(mean_loss)(params), rtol=1e-6)


@pytest.mark.more("test_gradient_of_any_step")
@pytest.mark.parametrize("make", usual(MAKERS[1:2], MAKERS))
def test_parameters_of_weak_dtype(make):
    """A Python number takes the dtype of what it meets, in overlapping windows too."""
    xs = jnp.linspace(0, 1, NUM_STEPS)
    found = {}
    for dtype in (jnp.bfloat16, jnp.float32):
        with jax.enable_x64(False):
            estimator = make(lambda p, h, x: (h * p + x, h * p + x), lambda y, target: y)
            batch, carry = Batch(jnp.asarray(xs, dtype)), jnp.zeros((), dtype)
            found[dtype] = float(estimator.update(0.5, estimator.init(0.5, carry, batch), batch)[0].grads)
    assert found[jnp.bfloat16] == pytest.approx(found[jnp.float32], rel=0.02)


@pytest.mark.parametrize(("kind", "number"), usual_rows([("lstm", 7)], [("rnn", 1), ("gru", 5), ("lstm", 7)]))
def test_what_is_kept_of_a_step(kind, number):
    """Arrays of the carry's size: the gates and what a derivative needs of them, nothing twice, nothing cheap."""
    cell = getattr(cells, kind)(INPUT, HIDDEN)
    carry = cell.initial_carry((EXAMPLES,))
    params, xs = cell.init(jax.random.key(0)), draw(1, EXAMPLES, INPUT)
    live = problem_of(cell.step, squared_error, params, carry, Batch(xs, xs[..., :1])).live
    kept = cut(cell.step, params, carry, xs[0], live).program.stacked
    assert [v.aval.shape for v in kept] == [(EXAMPLES, HIDDEN)] * number


def test_a_gradient_is_not_rounded_to_a_cast():
    """Parameters in float32, used in bfloat16: the cast rounds the products, not the sum over steps."""

    def step(p, h, x):
        h = jnp.tanh(x.astype(jnp.bfloat16) @ p["x"].astype(jnp.bfloat16) + h @ p["h"].astype(jnp.bfloat16))
        return h, h.astype(jnp.float32)

    params = {"x": W_X.astype(jnp.float32), "h": W_H.astype(jnp.float32)}
    batch = Batch(draw(64, EXAMPLES, INPUT), draw(64, EXAMPLES, HIDDEN))
    estimator = full_bptt(step, squared_error)
    start = ZEROS.astype(jnp.bfloat16)
    for grad in estimator.update(params, estimator.init(params, start, batch), batch)[0].grads.values():
        assert np.mean(grad == grad.astype(jnp.bfloat16)) < 0.5


LONG = [full_bptt, partial(truncated_bptt, window=8, stride=4)]


@pytest.mark.parametrize("stored", usual([jnp.bfloat16], [jnp.bfloat16, jnp.float32]))
@pytest.mark.parametrize("make", usual(LONG[:1], LONG))
def test_what_is_repeated_adds_up_in_float32(make, stored):
    """Over a thousand examples: biases, a factor, rows of tables; in bfloat16 or cast to it in the step."""
    rows = NUMBERS.integers(0, 3, 1024)

    def core(p, h, x):
        p = jax.tree.map(lambda a: a.astype(h.dtype), p)
        h = jnp.tanh(h * p["factor"] + x @ p["x"] + p["b"][:HIDDEN] + p["table"][0] - p["minus"] * 2 + p["rows"][rows])
        return h, h

    def readout(p, h):
        return h + p["b"][HIDDEN:].astype(h.dtype)

    params = {"x": W_X, "b": draw(2 * HIDDEN), "factor": draw(HIDDEN) / 4, "table": draw(3, HIDDEN)}
    params |= {"minus": draw(HIDDEN) / 2, "rows": draw(3, HIDDEN)}
    xs, targets = draw(16, 1024, INPUT), jnp.full((16, 1024, HIDDEN), 2.0)
    cast = lambda tree, dtype: jax.tree.map(lambda a: a.astype(dtype), tree)
    rounded = cast((params, xs, targets), jnp.bfloat16)

    def gradient(stored, dtype):
        params, xs, targets = cast(rounded[0], stored), *cast(rounded[1:], dtype)
        estimator = make(cells.with_readout(core, readout), squared_error)
        batch, carry = Batch(xs, targets), jnp.zeros((1024, HIDDEN), dtype)
        return jax.jit(lambda p: estimator.update(p, estimator.init(p, carry, batch), batch)[0].grads)(params)

    low, high = gradient(stored, jnp.bfloat16), gradient(jnp.float64, jnp.float64)
    for name in params.keys() - {"x"}:  # a product with a weight, whose signs cancel here
        error = np.linalg.norm(np.asarray(low[name], float) - high[name]) / np.linalg.norm(high[name])
        assert low[name].dtype == jnp.float32 and error < 0.005, (name, error)


def test_a_cast_of_a_cast_rounds_twice():
    """What adds up in float32 must not let the values skip the first rounding."""

    def step(p, h, x):
        low = p.astype(jnp.bfloat16).astype(jnp.float8_e4m3fn)
        return h, h + x + jnp.broadcast_to(low, h.shape).astype(jnp.float32)

    params = jnp.asarray(NUMBERS.normal(size=4096), jnp.float32)
    batch, carry = Batch(jnp.zeros((2, 3, 1), jnp.float32)), jnp.zeros((3, 4096), jnp.float32)
    estimator = full_bptt(step, lambda y, _: jnp.sum(y, axis=-1))
    found = estimator.update(params, estimator.init(params, carry, batch), batch)[0].loss_sum
    assert found == pytest.approx(2 * float(jnp.sum(step(params, carry, batch.xs[0])[1])), rel=1e-6)


def test_effects_take_place_once_a_step():
    """In the forward pass; once more where a segment is computed again."""
    seen = []

    def step(p, h, x):
        jax.debug.callback(lambda t: seen.append(int(t)), x[0, 0])
        return plain(p, h, x)

    params, batch = {"x": W_X, "h": W_H, "b": BIAS}, Batch(draw(6, EXAMPLES, INPUT), draw(6, EXAMPLES, HIDDEN))
    batch = batch._replace(xs=batch.xs.at[:, 0, 0].set(jnp.arange(6)))
    for segment, expected in ((6, [*range(6)]), (3, [0, 1, 2, 0, 1, 2, 3, 4, 5])):
        estimator = full_bptt(step, squared_error, plan=Plan(segment))
        seen.clear()
        jax.block_until_ready(estimator.update(params, estimator.init(params, ZEROS, batch), batch))
        jax.effects_barrier()
        assert sorted(seen) == sorted(expected)


def products_in_loops(jaxpr, inside=False):
    """Shapes of what every product inside a loop gives."""
    found = []
    for equation in jaxpr.eqns:
        if inside and equation.primitive.name == "dot_general":
            found.append(equation.outvars[0].aval.shape)
        for inner in jaxprs_in_params(equation.params):
            found += products_in_loops(inner, inside or equation.primitive.name in ("scan", "while"))
    return found


@pytest.mark.parametrize("kind", usual(["lstm"], ["rnn", "gru", "lstm"]))
def test_no_weight_gradient_is_formed_inside_a_loop(kind):
    """One segment: the loops hold products of the examples' rows alone, none of a weight's shape."""
    cell = getattr(cells, kind)(INPUT, HIDDEN)
    params, carry = cell.init(jax.random.key(0)), cell.initial_carry((EXAMPLES,))
    batch = Batch(draw(NUM_STEPS, EXAMPLES, INPUT), draw(NUM_STEPS, EXAMPLES, HIDDEN))
    estimator = full_bptt(cell.step, squared_error)
    program = jax.make_jaxpr(lambda p: estimator.update(p, estimator.init(p, carry, batch), batch)[0].grads)(params)
    shapes = products_in_loops(program.jaxpr)
    assert shapes and all(shape[0] == EXAMPLES for shape in shapes), shapes


def test_bfloat16_over_thousands_of_steps():
    """The weight gradient adds up in float32: ≤ 0.5 % of the float64 gradient at the same rounded inputs, T = 4096."""
    cell = cells.rnn(8, 16, dtype=jnp.bfloat16)
    params, carry = cell.init(jax.random.key(0)), cell.initial_carry((4,))
    xs, targets = (jnp.asarray(NUMBERS.normal(size=(4096, 4, n)), jnp.bfloat16) for n in (8, 16))

    def gradient(dtype):
        p, c, batch = jax.tree.map(lambda a: a.astype(dtype), (params, carry, Batch(xs, targets)))
        estimator = full_bptt(cell.step, squared_error)
        return jax.jit(lambda p: estimator.update(p, estimator.init(p, c, batch), batch)[0].grads)(p)

    low, high = gradient(jnp.bfloat16), gradient(jnp.float64)
    for name in ("w_x", "w_h"):
        error = np.linalg.norm(np.asarray(low[name], float) - high[name]) / np.linalg.norm(high[name])
        assert low[name].dtype == jnp.float32 and error < 0.005, (name, error)


SPARSE = [full_bptt, partial(truncated_bptt, window=4), partial(truncated_bptt, window=3, stride=1)]


@pytest.mark.more("test_batch_parts::test_one_part_where_the_derivative_has_no_vmap")
@pytest.mark.parametrize("make", usual(SPARSE[1:2], SPARSE))
def test_sparse_weights(make):
    """JAX has their derivative step by step, not for all steps under one vmap."""
    dense = jnp.where(W_H > 0, W_H, 0)
    places = sparse.BCOO.fromdense(dense)

    def with_sparse(data, h, x):
        h = jnp.tanh(x + h @ sparse.BCOO((data, places.indices), shape=dense.shape))
        return h, h

    def with_dense(data, h, x):
        h = jnp.tanh(x + h @ jnp.zeros_like(dense).at[tuple(places.indices.T)].set(data))
        return h, h

    batch = Batch(draw(NUM_STEPS, EXAMPLES, HIDDEN), draw(NUM_STEPS, EXAMPLES, HIDDEN))
    found, wanted = (
        jax.jit(partial(one_update, make(step, squared_error)))(places.data, ZEROS, batch).grads
        for step in (with_sparse, with_dense)
    )
    assert_close(found, wanted)
    options = {"max_window": 4, "per_leaf": True}
    problem = squared_error, places.data, ZEROS, batch
    assert_close(truncation_curve(with_sparse, *problem, **options), truncation_curve(with_dense, *problem, **options))


@pytest.mark.more("test_gradient_of_any_step")
def test_constants_of_a_step_reach_a_custom_derivative():
    """A table of literals that the rule indexes at a traced place, as an integrator indexes its times."""

    @jax.custom_vjp
    def interpolated(h, table):
        return h * table[1]

    def back(kept, bar):
        h, table = kept
        place = jnp.argmax(h.ravel()) * 0 + 1
        return bar * table[place], jnp.zeros_like(table)

    interpolated.defvjp(lambda h, table: (interpolated(h, table), (h, table)), back)

    def step(p, h, x):
        h = jnp.tanh(interpolated(h @ p, jnp.array([0.0, 0.5])) + x)
        return h, h

    batch = Batch(draw(NUM_STEPS, EXAMPLES, HIDDEN), draw(NUM_STEPS, EXAMPLES, HIDDEN))
    mean_loss = lambda p: jnp.mean(squared_error(jax.lax.scan(partial(step, p), ZEROS, batch.xs)[1], batch.targets))
    for make in (full_bptt, partial(truncated_bptt, window=NUM_STEPS, stride=1)):
        assert_close(one_update(make(step, squared_error), W_H, ZEROS, batch).grads, jax.grad(mean_loss)(W_H))
    lag_profile(step, squared_error, W_H, ZEROS, batch, max_lag=2)


def test_a_derivative_that_knows_no_vmap():
    """Steps go back one after another where only the rule calls the host; an error of the rule's own comes through."""

    def sine(rule):
        function = jax.custom_vjp(jnp.sin)
        function.defvjp(lambda a: (jnp.sin(a), a), lambda a, bar: (rule(a, bar),))
        return function

    def on_the_host(a, bar):
        return jax.pure_callback(lambda a, bar: np.cos(a) * bar, jax.ShapeDtypeStruct(a.shape, a.dtype), a, bar)

    def fails(a, bar):
        raise ValueError("mine")

    batch = Batch(draw(NUM_STEPS, EXAMPLES, HIDDEN), draw(NUM_STEPS, EXAMPLES, HIDDEN))

    def gradient(sin):
        estimator = truncated_bptt(lambda w, h, x: (sin(h @ w + x),) * 2, loss, window=3, stride=1)
        carry = jnp.zeros((EXAMPLES, HIDDEN))
        return jax.jit(estimator.update)(W_H, estimator.init(W_H, carry, batch), batch)[0].grads

    assert_close(gradient(sine(on_the_host)), gradient(jnp.sin))
    with pytest.raises(ValueError, match="mine"):
        gradient(sine(fails))
