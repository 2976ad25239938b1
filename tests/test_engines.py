"""The plain engine beside the fast one: the same numbers, and the road when programs cannot be read."""

import subprocess
import sys
import textwrap
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import ESTIMATORS
from problems import usual
from test_contract import KEY, batch_number, stream

import jbptt
from jbptt import Batch, engine, full_bptt, scan


@pytest.fixture
def plain(monkeypatch):
    """Runs a function on the plain engine alone."""

    def run(function, *arguments):
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the plain engine runs")
            patch.setattr(engine, "fast", None)
            patch.setattr(engine, "import_error", ImportError("hidden"))
            return function(*arguments)

    return run


def assert_same(found, wanted):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), found, wanted)


def two_updates(name):
    """Estimates of the first two updates, and the carry after them, of a stream with masks, weights and a readout."""
    (step, loss, params, carry, _), _ = stream()
    estimator = ESTIMATORS[name].make(step, loss)

    def run(first, second):
        state = estimator.init(params, carry, first, KEY)
        one, state = estimator.update(params, state, first)
        two, state = estimator.update(params, state, second)
        return one, two, state.carry

    return jax.jit(run)(batch_number(0), batch_number(1))


@pytest.mark.parametrize("name", usual(["ragged strides"], ESTIMATORS))
def test_every_estimator(name, plain):
    assert_same(plain(two_updates, name), two_updates(name))


@pytest.mark.more("test_every_estimator")
def test_analyses(plain):
    (step, loss, params, carry, _), _ = stream()
    batch, gates = batch_number(0), jnp.linspace(0, 1, 5)

    def run():
        return [
            analysis(step, loss, params, carry, batch, **options)
            for analysis, options in (
                (jbptt.adjoints, {"gates": gates}),
                (jbptt.gradient_flow, {}),
                (jbptt.lag_profile, {"max_lag": 3}),
                (jbptt.truncation_curve, {"max_window": 3}),
                (jbptt.analysis.adjoint_alignment, {"max_lag": 2}),
            )
        ]

    gates = jnp.linspace(0, 1, batch.mask.shape[0])
    wanted = run()
    jax.clear_caches()
    jbptt.executables._PROGRAMS._values.clear()
    assert_same(plain(run), wanted)


def of_outputs(scanned, w, h, xs):
    h, ys = scanned(lambda h, x: (jnp.tanh(h @ w + x), h), h, xs)
    return jnp.sum(jax.nn.softmax(ys, axis=0) * ys) + jnp.sum(h**2)


OPTIONS = {
    "plain": {},
    "in segments": {"segment": 2},
    "backwards": {"reverse": True},
    "gated, backwards": {"gates": jnp.linspace(0, 2, 5), "reverse": True},
}


@pytest.mark.parametrize("kind", usual(["gated, backwards"], OPTIONS))
def test_scan(kind, plain):
    w, h, xs = (jnp.cos(jnp.arange(float(np.prod(s)))).reshape(s) for s in ((3, 3), (2, 3), (5, 2, 3)))

    def run():
        scanned = partial(scan, **OPTIONS[kind])
        return jax.value_and_grad(partial(of_outputs, scanned), argnums=(0, 1, 2))(w, h, xs)

    assert_same(plain(run), run())


@pytest.mark.parametrize("segment", usual([None], [None, 2]))
def test_second_derivatives_of_a_gated_scan(segment, plain):
    """Both engines differentiate the gated gradient as it is returned, in either order."""
    w, h, xs = jnp.eye(3) / 2, jnp.ones((2, 3)), jnp.cos(jnp.arange(30.0)).reshape(5, 2, 3)
    gated = partial(scan, segment=segment, gates=jnp.linspace(0, 2, 5))
    direction = jnp.cos(jnp.arange(9.0)).reshape(3, 3)

    def run():
        gradient = jax.grad(lambda w: of_outputs(gated, w, h, xs))
        along = jax.grad(lambda w: jnp.vdot(gradient(w), direction))
        return along(w), jax.jvp(gradient, (w,), (direction,))[1]

    assert_same(plain(run), run())


def test_scan_says_that_the_plain_one_runs(monkeypatch):
    monkeypatch.setattr(engine, "fast", None)
    monkeypatch.setattr(engine, "import_error", ImportError("hidden"))
    with pytest.warns(RuntimeWarning, match="the plain engine runs.*hidden"):
        scan(lambda h, x: (h + x, h), 0.0, jnp.ones(3))


def test_what_the_fast_one_cannot_do_the_plain_one_does(monkeypatch):
    """Wherever it stops: while it reads, on the way forward, on the way back."""
    w, h, xs = jnp.eye(3) / 2, jnp.ones((2, 3)), jnp.ones((5, 2, 3))
    step, loss = (lambda w, h, x: (jnp.tanh(h @ w + x), h)), (lambda y, target: jnp.sum(y**2, -1))
    batch = Batch(xs)

    def update():
        estimator = full_bptt(step, loss)
        return estimator.update(w, estimator.init(w, h, batch), batch)[0].grads

    def by_scan(segment=None):
        return jax.grad(partial(of_outputs, partial(scan, segment=segment)), argnums=(0, 1, 2))(w, h, xs)

    runs = update, by_scan, partial(by_scan, segment=2), partial(by_scan, segment=7)
    wanted = [run() for run in runs]

    def fail(*arguments):
        raise KeyError("no such operation")

    for owner, name in ((engine.fast, "cut"), (engine.fast.Loops, "forward"), (engine.fast.Loops, "backward")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            for run, numbers in zip(runs, wanted, strict=True):
                with pytest.warns(RuntimeWarning, match="the plain engine runs.*no such operation"):
                    assert_same(run(), numbers)


def test_an_error_of_the_users_is_the_users():
    def step(w, h, x):
        if step.calls > 6:
            raise OverflowError("mine")
        step.calls += 1
        return w * h + x, h

    step.calls = 0
    with pytest.raises((OverflowError, ValueError), match="mine"), warnings.catch_warnings(action="error"):
        for _ in range(10):
            estimator = full_bptt(step, lambda y, target: y)
            estimator.update(2.0, estimator.init(2.0, jnp.zeros(()), Batch(jnp.ones(3))), Batch(jnp.ones(3)))


def in_a_fresh_process(code):
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)


@pytest.mark.more("test_what_the_fast_one_cannot_do_the_plain_one_does")
def test_without_jax_extend():
    """Estimators, scan and diagnose, where nothing of `jax.extend` can be imported."""
    result = in_a_fresh_process("""
        import sys
        import jax, optax
        for name in [name for name in sys.modules if name.startswith("jax.extend")]:
            sys.modules[name] = None
        sys.modules["jax.extend"] = sys.modules["jax.extend.core"] = None
        import jax.numpy as jnp
        import jbptt
        from jbptt import engine
        assert engine.fast is None
        cell = jbptt.cells.rnn(2, 3)
        params, carry = cell.init(jax.random.key(0)), cell.initial_carry((2,))
        batch = jbptt.Batch(jax.random.normal(jax.random.key(1), (6, 2, 2)), jnp.zeros((6, 2, 3)))
        problem = params, carry, batch
        loss = jbptt.tasks.squared_error
        def mean(scanned, params):
            ys = scanned(lambda h, x: cell.step(params, h, x), carry, batch.xs)[1]
            return jnp.mean(jax.vmap(loss)(ys, batch.targets))
        wanted = jax.grad(lambda p: mean(jax.lax.scan, p))(params)
        full = jbptt.full_bptt(cell.step, loss)
        found = full.update(params, full.init(params, carry, batch), batch)[0].grads
        close = lambda a, b: jax.tree.map(lambda a, b: print(float(jnp.max(jnp.abs(a - b)))), a, b)
        close(found, wanted)
        close(jax.grad(lambda p: mean(jbptt.scan, p))(params), wanted)
        blocks = jbptt.truncated_bptt(cell.step, loss, window=2)
        blocks.update(params, blocks.init(params, carry, batch), batch)
        page = str(jbptt.diagnose(cell.step, loss, *problem, measure=False))
        assert "gradient" in page
    """)
    assert result.returncode == 0, result.stderr
    differences = [float(line) for line in result.stdout.split()]
    assert len(differences) == 6
    assert max(differences) < 1e-6
    assert result.stderr.count("the plain engine runs") >= 1


@pytest.mark.more("test_what_the_fast_one_cannot_do_the_plain_one_does")
def test_a_lookup_that_explicit_sharding_leaves_to_the_compiler():
    """Its operands belong to another mesh than the rest: no program for the fast engine; the numbers are right."""
    result = in_a_fresh_process("""
        import os
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
        import jax, jax.numpy as jnp
        jax.config.update("jax_enable_x64", True)
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        import jbptt
        mesh = jax.make_mesh((2,), ("b",), axis_types=(AxisType.Explicit,))
        jax.set_mesh(mesh)
        params = {"w": jnp.eye(3) / 2, "table": jax.random.normal(jax.random.key(0), (9, 3))}
        def step(p, h, x):
            h = jnp.tanh(h @ p["w"] + p["table"].at[x].get(out_sharding=P("b", None)))
            return h, h
        xs = jax.device_put(jax.random.randint(jax.random.key(1), (5, 4), 0, 9), NamedSharding(mesh, P(None, "b")))
        h = jax.device_put(jnp.zeros((4, 3)), NamedSharding(mesh, P("b", None)))
        loss = lambda y, target: jnp.sum(y**2, -1)
        wanted = jax.grad(lambda p: jnp.mean(loss(jax.lax.scan(lambda h, x: step(p, h, x), h, xs)[1], None)))(params)
        for estimator in (jbptt.full_bptt(step, loss), jbptt.full_bptt(step, loss, plan=jbptt.Plan(2))):
            batch = jbptt.Batch(xs)
            found = jax.jit(estimator.update)(params, estimator.init(params, h, batch), batch)[0].grads
            jax.tree.map(lambda a, b: print(float(jnp.max(jnp.abs(a - b)))), found, wanted)
    """)
    assert result.returncode == 0, result.stderr
    assert max(float(line) for line in result.stdout.split()) < 1e-12


def test_the_plain_engine_is_the_equation():
    """λ_t, step by step, in NumPy."""
    rng = np.random.default_rng(0)
    w, xs, gates = rng.normal(size=(3, 3)) / 2, rng.normal(size=(4, 3)), rng.random(4)
    bars, last = rng.normal(size=(4, 3)), rng.normal(size=3)
    live = engine.Paths((True,), (True,), (True,), (True,), (), "")
    (_, outputs), back = engine.plain.segment_vjp(
        lambda w, h, x: (jnp.tanh(w @ h + x),) * 2, jnp.asarray(w), jnp.zeros(3), jnp.asarray(xs), 4, live
    )
    grad, (cotangents,) = back([jnp.asarray(last)], [jnp.asarray(bars)], jnp.asarray(gates), None)
    carries, total, adjoint = np.concatenate([np.zeros((1, 3)), outputs[:-1]]), np.zeros((3, 3)), last
    for t in reversed(range(4)):
        inside = (adjoint + bars[t]) * (1 - np.asarray(outputs[t]) ** 2)
        total += np.outer(inside, carries[t])
        adjoint = gates[t] * (w.T @ inside)
    assert_same((cotangents, grad), (adjoint, total))
