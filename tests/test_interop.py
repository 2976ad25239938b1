"""Models of other libraries: their own recurrences, the contract, the analyses, randomness, the way back."""

import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import ESTIMATORS
from foreign import (
    EXAMPLES,
    HIDDEN,
    INPUT,
    KEY,
    MODELS,
    NUM_STEPS,
    OUTPUT,
    LinenModel,
    NnxModel,
    Sequence,
    equinox_carry,
    equinox_module,
    eqx,
    haiku_model,
    hk,
    linen,
    linen_variables,
    nnx,
)
from jax.flatten_util import ravel_pytree
from problems import assert_close, assert_same_bits, one_update, squared_error, usual

import jbptt
from jbptt import Batch, interop, testing
from jbptt.interop import calls

LENGTHS = np.array([5, 1, 3])  # of the examples
MASK = np.arange(NUM_STEPS)[:, None] < LENGTHS


class Recurrence(NamedTuple):
    """A converted cell and the library's own way to run it: `(params, xs) -> (ys, carry after LENGTHS or None)`."""

    step: Any
    params: Any
    initial_carry: Any
    run: Any


def nnx_cell(make, dtype):
    cell = make(INPUT, HIDDEN, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))

    def run(params, xs):
        layer = nnx.RNN(interop.to_nnx(cell, params), time_major=True)
        return layer(xs, seq_lengths=LENGTHS, return_carry=True)[::-1]

    return Recurrence(*interop.from_nnx(cell), run)


def linen_cell(make, dtype):
    cell = make(HIDDEN, dtype=dtype, param_dtype=dtype)
    layer = linen.RNN(cell, time_major=True, return_carry=True)
    variables = layer.init(KEY, jnp.zeros((1, EXAMPLES, INPUT), dtype))

    def run(params, xs):
        return layer.apply({"params": {"cell": params}}, xs, seq_lengths=LENGTHS)[::-1]

    return Recurrence(*interop.from_linen(layer, variables, input_size=INPUT), run)


def haiku_cell(make, dtype):
    def unroll(xs):
        core = make(HIDDEN)
        return hk.dynamic_unroll(core, xs, core.initial_state(EXAMPLES))[0]

    def run(params, xs):
        return hk.transform(unroll).apply(params, None, xs), None

    return Recurrence(*interop.from_haiku(lambda: make(HIDDEN), KEY, input_size=INPUT), run)


def equinox_cell(make, dtype):
    cell = make(INPUT, HIDDEN, dtype=dtype, key=KEY)
    zeros = jnp.zeros(HIDDEN, dtype)
    start = (zeros, zeros) if make is eqx.nn.LSTMCell else zeros

    def run(params, xs):
        live = interop.to_equinox(cell, params)

        def body(hidden, x):
            hidden = live(x, hidden)
            return hidden, hidden[0] if isinstance(hidden, tuple) else hidden

        return jax.vmap(lambda xs: jax.lax.scan(body, start, xs)[1], 1, 1)(xs), None

    return Recurrence(*interop.from_equinox(cell), run)


CELLS = {
    **{f"nnx.{c.__name__}": (nnx_cell, c) for c in (nnx.SimpleCell, nnx.GRUCell, nnx.LSTMCell, nnx.OptimizedLSTMCell)},
    **{
        f"linen.{c.__name__}": (linen_cell, c)
        for c in (linen.SimpleCell, linen.GRUCell, linen.LSTMCell, linen.OptimizedLSTMCell, linen.MGUCell)
    },
    **{f"hk.{c.__name__}": (haiku_cell, c) for c in (hk.VanillaRNN, hk.GRU, hk.LSTM)},
    **{f"eqx.{c.__name__}": (equinox_cell, c) for c in (eqx.nn.GRUCell, eqx.nn.LSTMCell)},
}


def cells_and_dtypes():
    """In float64 every cell, one of each library in the usual run; in float32 one of each library."""
    for name in CELLS:
        one = ".GRU" in name
        yield pytest.param(name, "float64", marks=() if one else pytest.mark.more)
        yield pytest.param(name, "float32", marks=pytest.mark.more if one else pytest.mark.full)


@pytest.mark.parametrize(("name", "dtype"), list(cells_and_dtypes()))
def test_loss_and_gradient_are_those_of_the_library(name, dtype):
    """Mean over the steps within each length; the carry after the last of them where the library gives it.

    In float64 leaf by leaf; in float32 the gradient as one vector. A leaf whose terms cancel keeps the terms' rounding:
    that of `weight_hh` of eqx.LSTMCell is 1e-6 of itself away from the float64 gradient in the library as well.
    """
    make, cell = CELLS[name]
    rng = np.random.default_rng(1)
    with jax.enable_x64(dtype == "float64"):
        own = make(cell, dtype)
        xs, targets = (jnp.asarray(rng.normal(size=(NUM_STEPS, EXAMPLES, n)), dtype) for n in (INPUT, HIDDEN))
        # The libraries start with biases of 0, which would hide where they are added.
        params = jax.tree.map(lambda p: p + jnp.asarray(rng.normal(size=p.shape) / 3, p.dtype), own.params)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}

        def loss_of(params):
            ys, carry = own.run(params, xs)
            return jnp.sum(jnp.where(MASK, squared_error(ys, targets), 0)) / MASK.sum(), carry

        (loss, carry), grads = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
        estimator = jbptt.full_bptt(own.step, squared_error)
        batch = Batch(xs, targets, jnp.asarray(MASK))
        state = estimator.init(params, own.initial_carry((EXAMPLES,)), batch)
        estimate, state = jax.jit(estimator.update)(params, state, batch)
    tolerance = {"float32": 1e-6, "float64": 1e-12}[dtype]
    whole = (lambda tree: ravel_pytree(tree)[0]) if dtype == "float32" else (lambda tree: tree)
    assert_close((estimate.loss, whole(estimate.grads)), (loss, whole(grads)), rtol=tolerance)
    if carry is not None:
        assert_close(state.carry, carry, rtol=tolerance)


def converted(name):
    """A whole model with dropout, or a cell."""
    return MODELS[name]() if name in MODELS else CELLS[name][0](CELLS[name][1], "float64")[:3]


@functools.cache
def problem(name):
    """A model of the library, on padded and weighted data."""
    step, params, initial_carry = converted(name)
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda p: p + jnp.asarray(rng.normal(size=p.shape) / 3), params)
    widths = INPUT, OUTPUT if name in MODELS else HIDDEN
    xs, targets = (jnp.asarray(rng.normal(size=(NUM_STEPS, EXAMPLES, n))) for n in widths)
    batch = Batch(xs, targets, jnp.asarray(MASK), jnp.asarray(rng.random(MASK.shape)))
    return step, squared_error, params, initial_carry((EXAMPLES,)), batch


@functools.cache
def brute_force(name):
    return jax.jit(functools.partial(testing.brute_force_gradient, *problem(name)[:2]))


# In the usual run one estimator on one model; in CI one of each way in which the engine goes through the carry on
# that, three on the others. With `JBPTT_FULL=1` every estimator and every analysis on every model and every cell.
FULL = os.environ.get("JBPTT_FULL") == "1"
WAYS = ["full", "segments", "ragged blocks", "strides", "parallel strides", "adaptive", "randomized"]
NAMES = usual(["nnx"], [*MODELS, *CELLS], full=[name for name in (*MODELS, *CELLS) if name != "nnx"])


def pairs_of_names():
    for name in (*MODELS, *CELLS):
        ways = WAYS if name == "nnx" else ["ragged blocks", "parallel strides", "randomized"]
        for way in ESTIMATORS:
            rest = pytest.mark.more if name in MODELS and way in ways else pytest.mark.full
            usual = name == "nnx" and way == "ragged blocks"
            yield pytest.param(name, way, marks=() if usual else rest)


@functools.cache
def last_carry(name):
    step, _, params, carry, batch = problem(name)
    return jbptt.unroll(step, params, carry, batch.xs, mask=batch.mask)[0]


@pytest.mark.more("test_loss_and_gradient_are_those_of_the_library")
@pytest.mark.parametrize(("name", "estimator"), list(pairs_of_names()))
def test_every_estimator_covers_the_pairs_it_declares(name, estimator):
    step, loss, params, carry, batch = problem(name)
    made = ESTIMATORS[estimator].make(step, loss)
    estimate, state = jax.jit(made.update)(params, made.init(params, carry, batch, KEY), batch)
    coverage = ESTIMATORS[estimator].coverage(NUM_STEPS, KEY)
    assert_close(estimate.grads, brute_force(name)(params, carry, batch, coverage=coverage))
    carries = state.carry, last_carry(name)
    assert_close(*(jax.tree.map(lambda a: a if jbptt.arrays.is_inexact(a) else None, tree) for tree in carries))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.more("test_loss_and_gradient_are_those_of_the_library")
def test_every_split_into_updates_gives_the_unsplit_total(name):
    """The keys go on where the update before left them, so dropout is the same as well."""
    step, loss, params, carry, batch = problem(name)
    estimator = jbptt.truncated_bptt(step, loss, window=3, stride=2)
    state, total = estimator.init(params, carry, batch), None
    for piece in (slice(0, 1), slice(1, 4), slice(4, 5)):
        estimate, state = jax.jit(estimator.update)(params, state, jax.tree.map(lambda a, p=piece: a[p], batch))
        total = estimate if total is None else total + estimate
    assert_close(total.grads, jax.jit(functools.partial(one_update, estimator))(params, carry, batch).grads)


def finite(tree):
    return all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.more("test_every_analysis_of_one_example_runs")
def test_every_analysis_runs(name):
    step, loss, params, carry, batch = problem(name)
    batch = batch._replace(mask=None)
    estimators = {"full": jbptt.full_bptt(step, loss), "sliding": jbptt.truncated_bptt(step, loss, window=2, stride=1)}

    @jax.jit
    def run(params, carry, batch):
        args = step, loss, params, carry, batch
        return {
            "curve": jbptt.truncation_curve(*args, max_window=NUM_STEPS),
            "profile": jbptt.lag_profile(*args, max_lag=3, per_leaf=True),
            "flow": jbptt.gradient_flow(*args),
            "sources": jbptt.analysis.gradient_sources(*args).norms,
            "cotangents": [c for c in jax.tree.leaves(jbptt.adjoints(*args).cotangents) if c.dtype == float],
            "alignment": jbptt.analysis.adjoint_alignment(*args, max_lag=2).misalignment,
            "compared": jbptt.compare(estimators, *args[2:], reference="full", key=KEY, num_samples=2),
            "found": jbptt.find_nonfinite(*args).found,
            "diagnosis": jbptt.diagnose(*args, measure=False) if FULL else None,  # elsewhere by docs/interop.md
        }

    found = run(params, carry, batch)
    assert_close(found["curve"].relative_error[1], found["compared"].relative_bias[1], rtol=1e-10)
    assert len(jax.tree.leaves(found["profile"].grad_norms)) == len(jax.tree.leaves(params))
    assert finite([found[key] for key in ("profile", "flow", "sources", "cotangents", "alignment")])
    assert not found["found"]
    assert not FULL or "Gradient over 5 steps" in str(found["diagnosis"])


@pytest.mark.parametrize("name", NAMES)
def test_every_analysis_of_one_example_runs(name):
    step, params, initial_carry = converted(name)
    xs = problem(name)[-1].xs[:, 0]
    one = step, params, initial_carry(), xs
    jacobians = jbptt.step_jacobians(*one)
    products = jbptt.jacobian_products(*one, spans=(1, NUM_STEPS))
    whole = functools.reduce(lambda a, j: j @ a, np.asarray(jacobians))
    assert_close(np.exp(products.log_norms[1]), np.linalg.norm(whole, 2), rtol=1e-9)
    growth = NUM_STEPS * np.sum(jbptt.lyapunov_spectrum(*one).exponents)
    assert_close(growth, np.sum(np.linalg.slogdet(jacobians)[1]), rtol=1e-9)  # −∞ where all of a ReLU's units die


@pytest.mark.more("test_equinox_keys_are_split_once_a_step")
def test_dropout_is_the_librarys_own():
    """Step after step as the live module, or the key split once a step, would draw it; never twice the same."""
    xs = problem("nnx")[-1].xs
    module = NnxModel(nnx.Rngs(0))
    step, params, initial_carry = interop.from_nnx(module, input_size=INPUT)
    ys = jbptt.unroll(step, params, initial_carry((EXAMPLES,)), xs)[1]
    carry = module.initialize_carry((EXAMPLES, INPUT), nnx.Rngs(0))
    for t in range(NUM_STEPS):
        carry, y = module(carry, xs[t])
        assert_close(ys[t], y, rtol=1e-14)

    constant = jnp.broadcast_to(xs[:1, :1], xs.shape)
    for name in MODELS:
        step, params, initial_carry = MODELS[name]()
        held = jax.jit(lambda p, x, f=initial_carry, s=step: s(p, f((EXAMPLES,)), x)[1])(params, constant[0])
        ys = jbptt.unroll(step, params, initial_carry((EXAMPLES,)), constant)[1]
        assert_close(ys[0], held)
        assert np.any(np.asarray(ys) != np.asarray(ys)[:, :1]), f"{name}: the examples share their dropout"


def test_equinox_keys_are_split_once_a_step():
    module, xs = equinox_module(), problem("equinox")[-1].xs
    step, params, initial_carry = MODELS["equinox"]()
    ys = jbptt.unroll(step, params, initial_carry((EXAMPLES,)), xs)[1]
    for example, key in enumerate(jax.random.split(KEY, EXAMPLES)):
        carry = equinox_carry()
        for t in range(NUM_STEPS):
            key, used = jax.random.split(key)
            carry, y = module(carry, xs[t, example], key=used)
            assert_close(ys[t, example], y, rtol=1e-14)


def numbers(keys):
    """What a module's keys are made of, counters included."""
    return [np.asarray(jax.random.key_data(leaf) if calls.is_key(leaf) else leaf) for leaf in jax.tree.leaves(keys)]


@pytest.mark.parametrize("name", usual(["nnx"], MODELS))
def test_keys_of_the_carry(name):
    """The same at every call, others for another key; a masked example keeps its own, raw keys or typed ones."""
    step, params, initial_carry = MODELS[name]()
    xs = problem(name)[-1].xs[:, :2]

    def ys_of(carry):
        return jbptt.unroll(step, params, carry, xs)[1]

    first = ys_of(initial_carry((2,)))
    assert_same_bits(first, ys_of(initial_carry((2,))))
    before, after = (numbers(carry[1]) for carry in (initial_carry((2,)), step(params, initial_carry((2,)), xs[0])[0]))
    assert any(np.any(a != b) for a, b in zip(before, after, strict=True)), "every step draws the same"
    others = [ys_of(initial_carry((2,), key)) for key in (jax.random.key(1), jax.random.PRNGKey(1))]
    assert_same_bits(*others)
    assert np.any(first[0] != others[0][0])


RAW_KEYS = {
    "linen": lambda key: interop.from_linen(LinenModel(), linen_variables(), input_size=INPUT, key=key),
    "haiku": lambda key: interop.from_haiku(haiku_model, key, input_size=INPUT),
    "equinox": lambda key: interop.from_equinox(equinox_module(), initial_carry=equinox_carry(), key=key),
}


@pytest.mark.parametrize("name", usual(["equinox"], RAW_KEYS))
def test_a_mask_does_not_take_a_raw_key_for_two_examples(name):
    """`PRNGKey` is uint32 `[2]`: in a batch of two, a mask would hold one half of it and change the other."""
    mask = jnp.array([[True, True], [True, False], [True, True]])
    xs = problem(name)[-1].xs[:3, :2]
    found = []
    for key in (jax.random.PRNGKey(5), jax.random.key(5)):
        step, params, initial_carry = RAW_KEYS[name](key)
        found.append(jbptt.unroll(step, params, initial_carry((2,)), xs, mask=mask)[1])
    assert_same_bits(*found)


def test_a_converted_nnx_module_does_not_follow_the_live_one():
    module = NnxModel(nnx.Rngs(0))
    _, params, initial_carry = interop.from_nnx(module, input_size=INPUT)
    before = jax.tree.map(jnp.copy, (params, initial_carry((2,))))
    module(initial_carry((2,))[0], jnp.ones((2, INPUT)))  # its rng streams go on
    nnx.update(module, jax.tree.map(lambda p: 2 * p, nnx.state(module, nnx.Param)))
    module.lower.hidden_features = 7
    assert_same_bits((params, initial_carry((2,))), before)
    initial_carry((2,))[1]["dropout"]["rngs"]["count"][...] = jnp.uint32(9)
    assert_same_bits(initial_carry((2,)), before[1])


@pytest.mark.more("test_keys_of_the_carry")
def test_batch_shapes():
    for name, make in MODELS.items():
        step, params, initial_carry = make()
        for shape in ((), (4,), *(((2, 3),) if name != "haiku" else ())):  # Haiku's own cores take one batch axis
            y = step(params, initial_carry(shape), jnp.ones((*shape, INPUT)))[1]
            assert y.shape == (*shape, OUTPUT), name
    assert jax.tree.leaves(interop.from_haiku(haiku_model, KEY, input_size=INPUT)[2]((2, 3)))[0].shape[:2] == (2, 3)


def test_the_way_back_to_nnx():
    module = NnxModel(nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.state(module))
    step, params, initial_carry = interop.from_nnx(module, input_size=INPUT)
    grads = one_update(
        jbptt.full_bptt(step, squared_error), params, initial_carry((EXAMPLES,)), problem("nnx")[-1]
    ).grads
    changed = interop.to_nnx(module, optax.apply_updates(params, jax.tree.map(lambda g: -0.1 * g, grads)))
    assert_same_bits(jax.tree.leaves(nnx.state(module)), jax.tree.leaves(before))  # neither call touches it
    optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.Param)
    optimizer.update(module, grads)
    assert_close(jax.tree.leaves(nnx.state(changed, nnx.Param)), jax.tree.leaves(nnx.state(module, nnx.Param)))
    layer = nnx.RNN(nnx.GRUCell(INPUT, HIDDEN, rngs=nnx.Rngs(0)))
    doubled = interop.to_nnx(layer, jax.tree.map(lambda p: 2 * p, interop.from_nnx(layer)[1]))
    assert_close(doubled.cell.dense_h.kernel[...], 2 * layer.cell.dense_h.kernel[...])


def test_the_way_back_to_equinox():
    module = equinox_module()
    step, params, initial_carry = interop.from_equinox(module, initial_carry=equinox_carry(), key=KEY)
    carry, batch = initial_carry((EXAMPLES,)), problem("equinox")[-1]
    updates = jax.tree.map(
        lambda g: -0.1 * g, one_update(jbptt.full_bptt(step, squared_error), params, carry, batch).grads
    )
    changed = eqx.apply_updates(module, updates)
    back = interop.to_equinox(module, optax.apply_updates(params, updates))
    assert back.activation is jnp.tanh and eqx.tree_equal(changed, back)


def test_the_way_back_to_linen_and_haiku():
    step, params, initial_carry = MODELS["linen"]()
    variables = {**linen_variables(), "params": params}
    h, _ = LinenModel().apply(variables, jnp.zeros(HIDDEN), jnp.ones(INPUT), rngs={"dropout": KEY})
    assert_close(h, step(params, initial_carry(), jnp.ones(INPUT))[0][0])
    names = hk.transform(lambda x: (c := haiku_model())(x, c.initial_state(None))).init(KEY, jnp.zeros(INPUT))
    assert jax.tree.structure(names) == jax.tree.structure(MODELS["haiku"]()[1])


@pytest.mark.more("test_the_way_back_to_nnx")
def test_training_a_converted_model():
    """The whole of `train`, with params in the library's own type."""
    for name in MODELS:
        step, loss, params, carry, batch = problem(name)
        batches = jax.tree.map(lambda a: jnp.stack([a] * 30), batch)
        trained, history = jbptt.train(jbptt.full_bptt(step, loss), optax.adam(0.02), params, carry, batches)
        assert jax.tree.structure(trained) == jax.tree.structure(params)
        assert np.mean(history.loss[-5:]) < np.mean(history.loss[:5])


class BatchesOnly(hk.RNNCore):
    """As many a core is written: nothing in it knows what to do without a batch axis."""

    def __call__(self, x, carry):
        carry = jnp.tanh(hk.Linear(HIDDEN)(jnp.concatenate([x, carry], axis=1)))
        return carry, carry

    def initial_state(self, batch_size):
        return jnp.zeros([batch_size, HIDDEN])


@pytest.mark.more("test_loss_and_gradient_are_those_of_the_library")
def test_tokens_and_other_inputs():
    """Token inputs by their shape; any other way to call by `call`."""
    tokens = jax.ShapeDtypeStruct((), jnp.int32)

    class Characters(nnx.Module):
        def __init__(self, rngs):
            self.embed, self.cell = nnx.Embed(7, INPUT, rngs=rngs), nnx.GRUCell(INPUT, HIDDEN, rngs=rngs)
            self.readout = nnx.Linear(HIDDEN, 7, rngs=rngs)

        def __call__(self, carry, token):
            carry, h = self.cell(carry, self.embed(token))
            return carry, self.readout(h)

    step, params, initial_carry = interop.from_nnx(Characters(nnx.Rngs(0)))  # one cell: it knows its carry
    assert step(params, initial_carry((4,)), jnp.zeros(4, int))[1].shape == (4, 7)

    class Own(Characters):
        def initialize_carry(self, input_shape, rngs):
            return self.cell.initialize_carry((*input_shape[:-1], INPUT), rngs)

    step, params, initial_carry = interop.from_nnx(Own(nnx.Rngs(0)), input_size=tokens)
    assert initial_carry((4,)).shape == (4, HIDDEN)
    assert step(params, initial_carry((4,)), jnp.zeros(4, int))[1].shape == (4, 7)

    class LinenCharacters(linen.Module):
        def setup(self):
            self.embed, self.cell = linen.Embed(7, INPUT), linen.GRUCell(HIDDEN)

        def initialize_carry(self, key, input_shape):
            return self.cell.initialize_carry(key, (*input_shape[:-1], INPUT))

        def __call__(self, carry, token):
            return self.cell(carry, self.embed(token))

    model = LinenCharacters()
    variables = model.init(KEY, jnp.zeros(HIDDEN), jnp.zeros((), int))
    step, params, initial_carry = interop.from_linen(model, variables, input_size=tokens)
    assert initial_carry((4,)).shape == (4, HIDDEN)
    assert step(params, initial_carry((4,)), jnp.zeros(4, int))[1].shape == (4, HIDDEN)

    embedded = lambda: hk.DeepRNN([hk.Embed(7, INPUT), hk.GRU(HIDDEN)])
    step, params, initial_carry = interop.from_haiku(embedded, KEY, input_size=tokens)
    assert step(params, initial_carry((4,)), jnp.zeros(4, int))[1].shape == (4, HIDDEN)

    step, params, initial_carry = interop.from_haiku(BatchesOnly, KEY, input_size=INPUT)
    assert step(params, initial_carry((4,)), jnp.ones((4, INPUT)))[1].shape == (4, HIDDEN)
    assert initial_carry((2, 3)).shape == (2, 3, HIDDEN)

    sequence = Sequence(eqx.nn.GRUCell(INPUT, HIDDEN, key=KEY), eqx.nn.Linear(HIDDEN, OUTPUT, key=KEY))
    step, params, initial_carry = interop.from_equinox(
        sequence, call=lambda model, h, x: ((h := model.cell(x, h)), model.readout(h))
    )
    xs = problem("equinox")[-1].xs
    ys = jbptt.unroll(step, params, initial_carry((EXAMPLES,)), xs)[1]
    assert_close(ys[-1], jax.vmap(sequence, 1)(xs))
