"""Under every configuration of JAX: dtype promotion, x64, debug_nans, devices; and inside other libraries' modules.

Dtype promotion and sharding are judged while tracing, so most of it needs no compilation (`jax.eval_shape`). What runs
under vmap, scan and jit is in `test_unroll.py` and, for every estimator, in `test_contract.py`.
"""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from contract import ESTIMATORS
from jax.sharding import AxisType, PartitionSpec
from problems import EXAMPLES, HIDDEN, INPUT, assert_close, usual, usual_rows

import jbptt
from jbptt import clipping, truncated_bptt, truncation, unroll
from jbptt.engine import forward_backward

NUM_STEPS, WINDOW = 7, 3
SOME = ("segments", "ragged strides", "parallel strides", "randomized")
FULL = os.environ.get("JBPTT_FULL") == "1"  # everything on two devices, too


def of_blocks(step, params, carry, batch):
    """The estimator that a road of fixed gates must agree with."""
    estimator = truncated_bptt(step, problems.squared_error, window=WINDOW)
    return jax.jit(lambda *args: problems.one_update(estimator, *args))(params, carry, batch)


def series():
    rng = np.random.default_rng(1)
    draw = lambda width: jnp.asarray(rng.normal(size=(NUM_STEPS, EXAMPLES, width)))
    return jbptt.Batch(draw(INPUT), draw(HIDDEN))


def test_inside_nnx():
    """A loss of one's own in `nnx.jit` and `nnx.value_and_grad`: of the package only `unroll` and its gates."""
    nnx = pytest.importorskip("flax.nnx")
    from jbptt import interop

    batch, carry = series(), jnp.zeros((EXAMPLES, HIDDEN))
    model = nnx.GRUCell(INPUT, HIDDEN, dtype=float, param_dtype=float, rngs=nnx.Rngs(0))

    @nnx.jit
    @nnx.value_and_grad
    def loss_and_grads(model):
        graph, state = nnx.split(model)
        step = lambda state, carry, x: nnx.merge(graph, state)(carry, x)
        _, ys = unroll(step, state, carry, batch.xs, gates=truncation.fixed(NUM_STEPS, WINDOW))
        return jnp.mean(jnp.sum((ys - batch.targets) ** 2, axis=-1))

    value, grads = loss_and_grads(model)
    step, params, _ = interop.from_nnx(model)
    estimate = of_blocks(step, params, carry, batch)
    assert_close(value, estimate.loss)
    leaves = [dict(nnx.to_flat_state(tree)) for tree in (grads, estimate.grads)]
    assert_close(*({path: leaf[...] for path, leaf in tree.items()} for tree in leaves))


@pytest.mark.more("test_inside_nnx")
def test_inside_equinox():
    """The same in `eqx.filter_jit` and `eqx.filter_value_and_grad`; params is the module, activation and all."""
    eqx = pytest.importorskip("equinox")
    from jbptt import interop

    batch, carry = series(), jnp.zeros((EXAMPLES, HIDDEN))
    model = eqx.nn.GRUCell(INPUT, HIDDEN, dtype=jnp.float64, key=jax.random.key(0))

    def step(model, h, x):
        h = jax.vmap(model)(x, h)
        return h, h

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss_and_grads(model):
        _, ys = unroll(step, model, carry, batch.xs, gates=truncation.fixed(NUM_STEPS, WINDOW))
        return jnp.mean(jnp.sum((ys - batch.targets) ** 2, axis=-1))

    value, grads = loss_and_grads(model)
    converted, params, _ = interop.from_equinox(model)
    estimate = of_blocks(converted, params, carry, batch)
    assert_close(value, estimate.loss)
    assert_close(jax.tree.leaves(grads), jax.tree.leaves(estimate.grads))


def full_problem(dtype=float):
    """A problem with everything in it: a readout, masks, weights."""
    step, loss, params, carry, batch = problems.make("tanh+readout", NUM_STEPS)
    rng = np.random.default_rng(2)
    mask = rng.random((NUM_STEPS, EXAMPLES)) < 0.8
    batch = batch._replace(weights=rng.random((NUM_STEPS, EXAMPLES)) * (rng.random((NUM_STEPS, EXAMPLES)) < 0.8))
    cast = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, dtype), tree)
    return step, loss, *cast((params, carry)), cast(batch)._replace(mask=jnp.asarray(mask))


GATES = {
    "none": lambda: None,
    "fixed": lambda: truncation.fixed(NUM_STEPS, WINDOW),
    "bool": lambda: truncation.fixed(NUM_STEPS, WINDOW) != 0,
    "by example": lambda: jnp.ones((NUM_STEPS, EXAMPLES), jnp.float32),
}


def roads(step, loss, params, carry, batch):
    """Everything that gives a gradient, `{name: function of (params, carry, batch)}`."""

    def through_unroll(gates, segment):
        def total(params, carry, batch):
            _, ys = unroll(step, params, carry, batch.xs, gates=gates(), mask=batch.mask, segment=segment)
            return jnp.sum(jax.vmap(loss)(ys, batch.targets))

        return jax.grad(total)

    def through(entry):
        def grads(params, carry, batch):
            return problems.one_update(entry.make(step, loss), params, carry, batch, jax.random.key(0)).grad_sum

        return grads

    found = {f"unroll, {name}": through_unroll(gates, None) for name, gates in GATES.items()}
    found["unroll, segments"] = through_unroll(GATES["fixed"], 4)
    return found | {name: through(entry) for name, entry in ESTIMATORS.items()}


def analyses(step, loss):
    """What reads gradients, as functions of (params, carry, batch)."""
    gates = truncation.fixed(NUM_STEPS, WINDOW)
    run = lambda function, **options: lambda *problem: function(step, loss, *problem, **options)
    one = lambda tree: jax.tree.map(lambda a: a[:, 0], tree)
    return {
        "diagnose": run(jbptt.diagnose, measure=False, learning_rate=0.1),
        "diagnose, gates": run(jbptt.diagnose, measure=False, gates=gates),
        "truncation_curve": run(jbptt.truncation_curve, max_window=5),
        "truncation_curve by leaf": run(jbptt.truncation_curve, max_window=5, per_leaf=True),
        "lag_profile": run(jbptt.lag_profile, max_lag=5, gates=gates),
        "gradient_flow": run(jbptt.gradient_flow),
        "gradient_sources": run(jbptt.analysis.gradient_sources),
        "adjoints": run(jbptt.adjoints, gates=gates),
        "adjoint_alignment": run(jbptt.analysis.adjoint_alignment, max_lag=3),
        "find_nonfinite": run(jbptt.find_nonfinite),
        "lyapunov_spectrum": lambda p, c, b: jbptt.lyapunov_spectrum(step, p, c[0], one(b.xs)),
        "jacobian_products": lambda p, c, b: jbptt.jacobian_products(step, p, c[0], one(b.xs), spans=(1, 3)),
    }


def clips():
    """Every way to clip a gradient, after its statistics."""
    ways = clipping.clip_by_global_norm, clipping.clip_by_leaf_norm, clipping.clip_by_value
    return optax.chain(clipping.gradient_stats(), *(clip(1.0, nonfinite="skip") for clip in ways))


def clipped_inside(step, loss):
    """A gradient whose adjoint is clipped at every step, by norm and by value."""

    def clipped(params, carry, x):
        carry = clipping.clip_cotangent(clipping.clip_cotangent(carry, 1.0), max_value=0.5)
        return step(params, carry, x)

    return lambda *problem: problems.one_update(jbptt.full_bptt(clipped, loss), *problem).grads


def clipped_training(step, loss):
    """Two updates with clipped gradients, as a function of (params, carry, batch)."""
    optimizer = optax.chain(clips(), optax.sgd(0.1))

    def run(params, carry, batch):
        batches = jax.tree.map(lambda a: jnp.stack([a, a]), batch)
        return jbptt.train(ESTIMATORS["strides"].make(step, loss), optimizer, params, carry, batches)

    return run


PROMOTED = [("bfloat16", SOME), *((dtype, None) for dtype in ("float64", "float32", "bfloat16"))]


@pytest.mark.parametrize(("dtype", "only"), usual_rows(PROMOTED[:1], PROMOTED))
def test_strict_dtype_promotion(dtype, only):
    """Nothing in the package leaves a dtype to JAX's rules, with x64 on (float64) and off."""
    step, loss, *problem = full_problem(dtype)
    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("strict"):
        found = roads(step, loss, *problem) | {"clipped inside": clipped_inside(step, loss)}
        found["clipping"] = lambda params, *_: clips().update(params, clips().init(params))
        if dtype != "bfloat16":  # optax.apply_updates refuses it by itself
            found |= analyses(step, loss) | {"clipped training": clipped_training(step, loss)}
        for name, function in found.items():
            if only and name not in only:
                continue
            try:
                jax.eval_shape(function, *problem)
            except Exception as error:
                error.add_note(f"in {name}")
                raise


def test_no_false_alarm_under_debug_nans():
    """Padding full of NaN, gates and weights of 0, a part of the batch without weight: all gradients are finite."""
    step, loss, params, carry, batch = full_problem()
    batch = batch._replace(xs=jnp.where(batch.mask[..., None], batch.xs, jnp.nan))
    found = {n: f for n, f in roads(step, loss, params, carry, batch).items() if n.startswith("unroll") or n in SOME}
    del found["unroll, none"], found["unroll, bool"]

    @jax.jit
    def run(*problem):
        return {name: function(*problem) for name, function in found.items()}

    with jax.debug_nans(True):
        for name, grads in run(params, carry, batch).items():
            assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads)), name


@pytest.mark.more("test_no_false_alarm_under_debug_nans")
def test_a_diagnosis_reads_nans_under_debug_nans():
    """NaN is an answer there: of a part of the batch without weight, and where something is broken."""
    step, loss, params, carry, batch = full_problem()
    batch = batch._replace(weights=batch.weights.at[:, 0].set(0))
    broken = batch._replace(mask=None, xs=batch.xs.at[3, 1, 0].set(jnp.nan))
    with jax.debug_nans(True):
        assert np.isnan(jbptt.diagnose(step, loss, params, carry, batch, measure=False).part_norms).any()
        found = jbptt.diagnose(step, loss, params, carry, broken, measure=False)
    assert found.verdict == "non-finite" and int(found.nonfinite.step) == 3


@pytest.mark.parametrize("name", usual(["ragged strides"], ["segments", "ragged strides"]))
def test_an_estimator_inside_checkpoint_scan_and_vmap(name):
    """All three around one update, as in a loss of one's own that recomputes."""
    step, loss, params, carry, batch = full_problem()
    estimator = ESTIMATORS[name].make(step, loss)

    def mean_gradient(scale):
        scaled = jax.tree.map(lambda p: scale * p, params)
        return problems.one_update(estimator, scaled, carry, batch).grads

    @jax.jit
    def run(scales):
        total = jax.lax.scan(
            lambda total, s: (jax.tree.map(jnp.add, total, jax.checkpoint(mean_gradient)(s)), None),
            jax.tree.map(jnp.zeros_like, params),
            scales,
        )[0]
        return total, jax.vmap(mean_gradient)(scales)

    total, each = run(jnp.array([0.5, 1.0]))
    assert_close(total, jax.tree.map(lambda g: g.sum(0), each))
    assert_close(jax.tree.map(lambda g: g[1], each), jax.jit(mean_gradient)(1.0))


PARTS = ["by a plan", "by plans of other estimators", "steps", "by explicit sharding", "by shard_map"]


@pytest.mark.parametrize("part", usual(["by a plan"], PARTS))
def test_on_two_devices(part):
    """Devices are counted before JAX starts, so in another process."""
    same_package = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment = os.environ | same_package | {"JAX_NUM_CPU_DEVICES": "2", "JAX_ENABLE_X64": "1"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0" if FULL else "1"
    process = subprocess.run([sys.executable, __file__, part], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    assert f"all agree on 2 devices, {part}" in process.stdout


def what_cannot_be_divided(step, loss, params, carry, batch):
    """Examples that a device of its own would compute otherwise; and some that look so and are not."""
    keys = jax.random.split(jax.random.key(0), NUM_STEPS)
    number = jnp.arange(2.0)

    def noisy(params, carry, x):
        carry, y = step(params, carry, x[0])
        return carry * jax.random.bernoulli(x[1], 0.5, carry.shape), y

    def by_example(params, carry, x):
        inner, y = step(params, carry[0], x)
        drawn = jax.vmap(lambda key: jax.random.split(key))(carry[1])
        noise = jax.vmap(lambda key: jax.random.normal(key, inner.shape[1:]))(drawn[:, 1])
        return (inner + noise, drawn[:, 0]), y

    scheduled = lambda params, carry, x: step(params, carry, x[0] * jnp.sum(x[1]))
    unused = lambda params, carry, x: step(params, carry, x[0])
    unmasked, schedule = batch._replace(mask=None), jnp.ones((NUM_STEPS, 2))
    beside = lambda more: unmasked._replace(xs=(unmasked.xs, more))
    plan = jbptt.Plan(3, 2)
    for moved, lost, piece, words in (
        (noisy, loss, beside(keys), "from one key are drawn random numbers"),
        (scheduled, loss, beside(schedule), r"take xs\[1\] whole as well as divided"),
        (step, lambda y, target: loss(y, target) + number, unmasked, "does not give one result each"),
        (
            step,
            lambda y, target: jnp.mean(loss(y, target)),
            unmasked._replace(weights=None),
            "the loss has no batch axis",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            problems.one_update(jbptt.full_bptt(moved, lost, plan=plan), params, carry, piece)
    with jax.set_mesh(jax.make_mesh((2,), ("other",))), pytest.raises(ValueError, match="another one is set"):
        problems.one_update(jbptt.full_bptt(step, loss, plan=plan), params, carry, unmasked)

    for moved, start, piece in ((by_example, (carry, keys[:2]), unmasked), (unused, carry, beside(schedule))):
        few, many = (
            problems.one_update(jbptt.full_bptt(moved, loss, plan=jbptt.Plan(3, n)), params, start, piece)
            for n in (1, 2)
        )
        assert_close(jax.device_get(many.grad_sum), jax.device_get(few.grad_sum))
    counted = lambda params, carry, x: ((step(params, carry[0], x)[0], carry[1] + 1), step(params, carry[0], x)[1])
    found, _ = jbptt.choose_plan(counted, loss, params, (carry, 0), unmasked, num_repeats=1)
    assert found.num_shards == 1  # what cannot be divided is no candidate


def on_two_devices(part):
    """Values against one device: what `test_on_two_devices` runs in its process."""
    jax.config.update("jax_disable_most_optimizations", True)
    forward_backward.CHUNK_BYTES = 1  # several chunks even here
    step, loss, params, carry, batch = full_problem()
    # Two examples for two devices.
    problem = step, loss, params, carry[:2], jax.tree.map(lambda a: a[:, :2], batch)
    run = by_a_plan, functools.partial(planned, OTHERS), what_cannot_be_divided, explicitly, mapped
    dict(zip(PARTS, run, strict=True))[part](*problem)
    print(f"all agree on {jax.device_count()} devices, {part}")


def roads_and_gradients(step, loss, params, carry, batch):
    """All roads, some of them, and the gradients that these give on one device."""
    GATES["by example"] = lambda: batch.weights + 0.5
    every = roads(step, loss, params, carry, batch)
    some = {name: road for name, road in every.items() if name in (*SOME, "unroll, by example", "unroll, segments")}
    run = jax.jit(lambda *problem: {name: road(*problem) for name, road in some.items()})
    return every, some, run(params, carry, batch)


def placed(params, batch):
    """How params, carry and batch lie on the devices."""
    by_example = jax.tree.map(lambda a: PartitionSpec(None, "batch"), batch)
    return jax.tree.map(lambda a: PartitionSpec(), params), PartitionSpec("batch"), by_example


def explicitly(step, loss, params, carry, batch):
    GATES["by example"] = lambda: batch.weights + 0.5
    every, some, expected = roads_and_gradients(step, loss, params, carry, batch)
    specs = placed(params, batch)
    explicit = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(explicit):
        problem = jax.tree.map(jax.device_put, (params, carry, batch), specs)
        GATES["by example"] = lambda: jax.sharding.reshard(batch.weights + 0.5, PartitionSpec(None, "batch"))
        found = jax.jit(lambda *problem: {name: road(*problem) for name, road in some.items()})(*problem)
        assert_close(jax.device_get(found), expected)
        one_by_one = analyses(step, loss)
        flow, one_by_itself = jax.jit(one_by_one["gradient_flow"]), (params, carry, batch)
        assert_close(jax.device_get(flow(*problem)), flow(*one_by_itself))
        del one_by_one["lyapunov_spectrum"], one_by_one["jacobian_products"]  # of one example
        for road in (*(every if FULL else some).values(), *one_by_one.values()):
            jax.eval_shape(road, *problem)
        batches = jax.tree.map(lambda a: jnp.stack([a, a]), problem[2])
        for name in ESTIMATORS if FULL else SOME:
            estimator = ESTIMATORS[name].make(step, loss)
            options = {"nonfinite": "stop", "eval_fn": lambda params, carry: carry, "eval_every": 1}
            train = functools.partial(jbptt.train, estimator, optax.sgd(0.1), key=jax.random.key(0), **options)
            jax.eval_shape(train, *problem[:2], batches)


OTHERS = [
    (functools.partial(jbptt.truncated_bptt, window=4), 3),  # a block is under way
    (functools.partial(jbptt.randomized_bptt, keep_prob=0.5), 3),
    (functools.partial(jbptt.truncated_bptt, window=4, streams=False), None),
    (functools.partial(jbptt.truncated_bptt, window=5, stride=2), None),
    (functools.partial(jbptt.adaptive_bptt, tolerance=0.5, max_window=3), None),
]


def planned(ways, step, loss, params, carry, batch):
    for make, segment in ways:

        def both_updates(params, carry, batch, make=make, segment=segment):
            found = []
            for n in (1, 2):
                estimator = make(step, loss, plan=jbptt.Plan(segment, n))
                state = estimator.init(params, carry, batch, key=jax.random.key(1))
                for _ in range(2):
                    estimate, state = estimator.update(params, state, batch)
                    found.append((estimate, state._replace(key=None) if hasattr(state, "key") else state))
            return found

        found = jax.device_get(jax.jit(both_updates)(params, carry, batch))
        one, two = ([np.asarray(leaf, float) for leaf in jax.tree.leaves(part)] for part in (found[:2], found[2:]))
        assert_close(two, one)


def by_a_plan(step, loss, params, carry, batch):
    """And batches that cannot be divided."""
    planned([(jbptt.full_bptt, 3)], step, loss, params, carry, batch)
    shared = lambda params, carry, x: ((step(params, carry[0], x)[0], carry[1]), step(params, carry[0], x)[1])
    for carried, piece, words in (
        ((carry, jnp.zeros(())), batch._replace(mask=None), "no axis of 2 examples in front"),
        ((carry[:1], carry[:1]), jax.tree.map(lambda a: a[:, :1], batch), "must divide the batch of 1 examples"),
    ):
        with pytest.raises(ValueError, match=words):
            problems.one_update(jbptt.full_bptt(shared, loss, plan=jbptt.Plan(3, 2)), params, carried, piece)


def mapped(step, loss, params, carry, batch):
    _, some, expected = roads_and_gradients(step, loss, params, carry, batch)
    specs = placed(params, batch)
    GATES["by example"] = lambda: jnp.full((NUM_STEPS, 1), 0.5)
    manual = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
    for check in (True, False) if FULL else (True,):

        def summed(params, carry, batch, check=check):
            if check:  # else JAX adds up over the devices by itself
                params = jax.lax.pcast(params, ("batch",), to="varying")
            grads = {name: road(params, carry, batch) for name, road in some.items() if name != "unroll, by example"}
            return jax.lax.psum(grads, "batch")

        run = jax.shard_map(summed, mesh=manual, in_specs=specs, out_specs=PartitionSpec(), check_vma=check)
        found = jax.device_get(jax.jit(run)(params, carry, batch))
        assert_close(found, {name: expected[name] for name in found})
    one_gradient_of_all_devices(manual, specs, step, loss, params, carry, batch)


def one_gradient_of_all_devices(mesh, specs, step, loss, params, carry, batch):
    """Of replicated parameters JAX sums the gradient over devices, as in jax.grad: loss and weight it does not."""
    batch = batch._replace(mask=batch.mask.at[1:, 1].set(False))  # devices of unequal weight
    estimator = jbptt.full_bptt(step, loss)
    whole = problems.one_update(estimator, params, carry, batch)

    def as_jax_does(params, carry, batch):
        estimate = problems.one_update(estimator, params, carry, batch)
        return estimate.grad_sum, jax.lax.psum(estimate.weight_sum, "batch")

    def recipe(params, carry, batch):
        estimate = problems.one_update(estimator, jax.lax.pcast(params, "batch", to="varying"), carry, batch)
        sums = jax.lax.psum((estimate.loss_sum, estimate.grad_sum, estimate.weight_sum), "batch")
        together = jbptt.Estimate(*sums, info={})
        return together.loss, together.grads

    run = lambda f: jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    found = jax.device_get(
        jax.jit(lambda *given: [run(f)(*given) for f in (as_jax_does, recipe)])(params, carry, batch)
    )
    assert_close(found, jax.device_get([(whole.grad_sum, whole.weight_sum), (whole.loss, whole.grads)]))


if __name__ == "__main__":
    on_two_devices(sys.argv[1])
