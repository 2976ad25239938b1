"""Sweeps against a Python loop over runs: values, layout, settings, devices, and what is refused."""

import functools
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import killed_sweeps
import numpy as np
import optax
import problems
import pytest
from jax.sharding import Mesh
from problems import usual

from jbptt import Batch, cells, full_bptt, grid, sweep, tasks, train
from jbptt.sweeps import programs, run_plans, sweeping
from jbptt.sweeps.points import runs_of

pytest.importorskip("xarray")
KEY = jax.random.key(7)
POINTS = grid(rate=[0.1, 0.4, 0.6], seed=range(5))
quietly = functools.partial(sweep, key=KEY, progress=False)


def descent(point, key):
    """Gradient descent on x² from a random start."""
    start = jax.random.normal(key, (2,)) + point["seed"]
    path = jax.lax.scan(lambda x, _: ((x_ := x * (1 - 2 * point["rate"])), x_), start, None, length=4)[1]
    return {"path": path, "end": jnp.abs(path[-1]).sum(), "steps": jnp.asarray(4)}


def trained(point, key):
    """An rnn after three updates; its size is a static setting."""
    cell = cells.with_linear_readout(cells.rnn(problems.INPUT, point["size"]), 1)
    start, data = jax.random.split(key)
    batches = Batch(jax.random.normal(data, (3, 6, 2, problems.INPUT)), jnp.ones((3, 6, 2, 1)))
    estimator, carry = full_bptt(cell.step, tasks.squared_error), cell.initial_carry((2,))
    params, history = train(estimator, optax.sgd(point["rate"]), cell.init(start), carry, batches)
    return {"loss": history.loss, "norm": optax.tree.norm(params)}


def summed(point, key):
    """Of as many random numbers as a static setting says."""
    return {"loss": jax.random.normal(key, (point["size"], 3)).sum(0) * point["rate"]}


def one_by_one(run_fn, points, key=KEY):
    """A loop over runs, each a program of its own."""
    rows = [jax.jit(functools.partial(run_fn, point))(jax.random.fold_in(key, i)) for i, point in enumerate(points)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@functools.cache
def of_descent():
    return one_by_one(descent, POINTS)


def assert_same(dataset, wanted, **options):
    for name, values in wanted.items():
        np.testing.assert_allclose(dataset[name].values.reshape(values.shape), values, **{"rtol": 1e-12} | options)
        assert dataset[name].dtype == values.dtype


@pytest.mark.parametrize("options", usual([{}], [{}, {"width": 1}, {"width": 4, "chunk": 8}, {"width": 64}]), ids=str)
def test_a_sweep_is_a_loop_over_runs(options):
    found = quietly(descent, POINTS, dims={"path": ("step", "axis")}, **options)
    assert found.path.dims == ("rate", "seed", "step", "axis") and found.end.dims == ("rate", "seed")
    wanted = of_descent()
    assert_same(found, wanted)
    np.testing.assert_allclose(found.end.sel(rate=0.4, seed=3), wanted["end"][8], rtol=1e-12)
    assert found.finite.all() and "finished" not in found.coords and len(np.unique(wanted["end"])) == 15


def test_static_settings_shape_the_program():
    """By names of the points, in any place among them: the dimensions and numbers of the runs stay."""
    points = grid(rate=[0.1, 0.2], size=[2, 3], seed=range(2))
    rows = [summed(point, jax.random.fold_in(KEY, i)) for i, point in enumerate(points)]
    wanted = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    found = quietly(summed, points, static="size", dims={"loss": "update"})
    assert dict(found.sizes) == {"rate": 2, "size": 2, "seed": 2, "update": 3}
    assert_same(found, wanted)
    # As settings of their own they stand in front, and one value alone is no dimension.
    kinds = []
    found = quietly(
        lambda point, key: (kinds.append(point), summed(point, key))[1],
        {"rate": np.array([0.1, 0.2])},
        static={"size": [3, 2], "name": "rnn"},
    )
    assert found.loss.dims == ("size", "run", "loss_0") and found.name.item() == "rnn" and found.rate.dims == ("run",)
    own = [{"size": size, "rate": rate} for size in (3, 2) for rate in (0.1, 0.2)]
    rows = [summed(point, jax.random.fold_in(KEY, i)) for i, point in enumerate(own)]
    assert_same(found, {name: np.stack([row[name] for row in rows]) for name in wanted})
    assert {(type(point["size"]), point["name"]) for point in kinds} == {(int, "rnn")}
    assert [list(point) for point in kinds[:1]] == [["size", "name", "rate"]]


def test_settings_that_are_equal_are_not_the_same():
    """4 and 4.0, True and 1: other programs, in one process."""
    kinds = {bool: 0, int: 1, float: 2}
    run = lambda point, key: {"kind": jnp.asarray(kinds[type(point["p"])])}
    for values in ([1, 4], [1.0, 4.0], [True, False]):
        found = quietly(run, {"a": [1, 2]}, static={"p": values})
        assert (found.kind == kinds[type(values[0])]).all()


def test_scalars_and_what_is_listed():
    """NumPy's and JAX's scalars are one setting of all runs; ranges, generators and views are axes."""
    run = lambda point, key: {"y": jnp.asarray(point["a"] * point["size"])}
    for size in (4, np.int64(4), jnp.asarray(4)):
        found = quietly(run, grid(a=(i for i in range(3))), static={"size": size})
        assert found.y.dims == ("a",) and found.y.values.tolist() == [0, 4, 8]
    assert grid(a={1: 0, 2: 0}.keys(), b=map(int, "12")).axes["b"].tolist() == [1, 2]


def test_a_setting_of_jax_makes_another_program():
    run = lambda point, key: {"y": jax.random.normal(jax.random.key(1), ()) + 0 * point["a"]}
    first = quietly(run, grid(a=[1, 2]))
    with jax.default_prng_impl("rbg"):
        assert (quietly(run, grid(a=[1, 2])).y != first.y).all()
    assert quietly(run, grid(a=[1, 2])).equals(first)


def test_points_with_axes_of_their_own():
    points = {"w": np.arange(12.0).reshape(4, 3), "on": np.array([True, False, True, False]), "n": np.arange(4)}
    found = quietly(lambda p, key: {"s": jnp.where(p["on"], p["w"].sum(), p["n"])}, points)
    np.testing.assert_array_equal(found.s, [3, 1, 21, 3])
    assert found.w.dims == ("run", "w_0") and found.on.dims == ("run",)


@pytest.mark.parametrize("width", usual([5], [1, 5, 15]))
def test_a_run_that_diverges_changes_no_neighbour(width):
    def run(point, key):
        x = jax.random.normal(key, (3, 3)) * jnp.where(point["seed"] == 2, point["scale"], 1.0)
        x = jax.lax.fori_loop(0, 4, lambda _, x: jnp.tanh(x @ x) + x * x, x)
        return {"x": x, "trace": jnp.trace(x).astype(jnp.bfloat16)}

    calm, wild = (quietly(run, grid(scale=[scale], seed=range(15)), width=width) for scale in (1.0, 1e200))
    assert wild.finite.values.ravel().tolist() == [i != 2 for i in range(15)] and calm.finite.all()
    others = [i for i in range(15) if i != 2]
    assert calm.x.values[:, others].tobytes() == wild.x.values[:, others].tobytes()
    assert wild.trace.dtype == np.float32


def test_one_program_for_each_setting_and_none_in_a_second_call():
    traces = []

    def run(point, key):
        traces.append(point["size"])
        return {"x": jax.random.normal(key, (point["size"],)).sum() + point["seed"]}

    ask = functools.partial(quietly, run, grid(size=[2, 3], seed=range(40)), static=["size"], width=8)
    first = ask()
    assert sorted(traces) == [2, 2, 3, 3]  # for the shapes, for the program
    assert ask().identical(first) and sorted(traces) == [2, 2, 3, 3]


def test_the_plan_is_the_fastest(monkeypatch):
    """By a clock that the width drives: more side by side while that helps, one by one where it does not."""

    def choice(seconds_of, num_runs=1000, compiling=0.0, known=(), **limits):
        asked = []

        def timed(run_fn, job, width, data, devices):
            asked.append(width)
            return width, seconds_of(width), {}

        def program(run_fn, job, columns, width, devices, limits):
            return programs.Program((), width * len(devices or (None,)), 0, compiling)

        monkeypatch.setattr(run_plans, "_timed", timed)
        monkeypatch.setattr(run_plans, "_that_fits", program)
        monkeypatch.setattr(run_plans, "known_widths", lambda *what: dict(known))
        monkeypatch.setattr(run_plans, "program_of", lambda *what: programs.Program((), 1, 0, compiling))
        limits = run_plans.Limits(**{"memory_budget": None, "most_per_chunk": num_runs, "run_bytes": 8} | limits)
        plan, _ = run_plans.find_plan(None, None, np.arange(num_runs), {}, None, limits)
        return plan, asked

    assert choice(lambda width: 1 / width, 1024)[0] == (1024, 1024, 1)
    plan, asked = choice(lambda width: 0.01 * abs(np.log(width / 60)) + 0.01, 1024)
    assert plan.width == 32 and asked == [32, 128, 1] and plan.chunk == 288  # five seconds of 16 ms
    assert choice(lambda width: float(width))[0] == (1, 5, 1)
    assert choice(lambda width: 1e-3, compiling=0.3)[1] == [32]  # one second is left: nothing is tried
    assert choice(lambda width: 1e-3, compiling=0.1)[1] == [32, 125, 1]
    assert choice(lambda width: 1 / width, 10)[0] == (10, 10, 1)
    assert choice(lambda width: 1 / width, most_per_chunk=20)[0].chunk <= 20
    assert choice(lambda width: 1e-6, run_bytes=2**20)[0].chunk <= 64
    assert choice(lambda width: float(width), width=7, chunk=3)[0] == (7, 3, 1)

    # Known widths, and seconds of a full call of each: the fastest, unless another may be worth compiling.
    constant = lambda width: 1e-6
    assert choice(constant, 90, 1.0, {100: 0.5})[1] == [100]
    assert choice(constant, 90, 1.0, {100: 1.5})[1] == [30]
    assert choice(constant, 20, 1.0, {1: 0.01, 64: 0.3})[1] == [1]
    assert choice(constant, 200, 1.0, {1: 0.01, 64: 0.2})[1] == [64]
    assert choice(constant, 90, 1.0, {100: 0.5}, chunk=100)[1] == [30]
    assert choice(constant, 90, 1.0, {100: 0.5}, most_per_chunk=30)[1] == [30]  # for workers


def test_a_later_sweep_of_the_same_function_compiles_nothing():
    """Of fewer runs, with the program that is there: the numbers are those of the same runs in it."""
    traces = []

    def run(point, key):
        traces.append(point["seed"])
        x = jnp.full((8, 8), point["seed"], float)
        return {"x": jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ x), x).sum()}

    first = quietly(run, grid(seed=range(12)))
    assert len(traces) >= 2
    del traces[:]
    later = quietly(run, grid(seed=range(5)))
    assert not traces, "neither for the shapes nor for a program"
    assert later.x.values.tobytes() == first.x.values[:5].tobytes()


def test_a_budget_of_memory():
    def run(point, key):
        x = jax.random.normal(key, (100, 100))
        return {"x": (jnp.sort(x @ x, axis=0) @ x).sum() + point["seed"]}

    points = grid(seed=range(64))
    job = programs.job_of(runs_of(points, None), runs_of(points, None).combinations[0], KEY)
    shapes = programs.column_shapes(runs_of(points, None).columns)
    one, many = (programs.program_of(run, job, shapes, width, None).temporary_bytes for width in (1, 16))
    assert many > 4 * one
    found = quietly(run, points, memory_budget=many / 2)
    assert 1 <= int(found.plan.split()[0]) <= 10
    with pytest.raises(ValueError, match=r"memory_budget must be at least .* bytes, which two runs take"):
        quietly(run, points, memory_budget=10)


def test_a_chunk_too_large_for_the_device_is_halved(monkeypatch):
    """As XLA says it, and once there is room for three runs the rest is done by three."""
    real, widths = programs.Program.start, []

    def full(self, *arguments):
        widths.append(self.num_runs)
        if self.num_runs > 3:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
        return real(self, *arguments)

    monkeypatch.setattr(programs.Program, "start", full)
    found = quietly(descent, POINTS, width=10, chunk=10)
    assert_same(found, of_descent())
    assert widths[:3] == [10, 5, 3] and set(widths[2:]) == {3} and found.plan.startswith("3 side by side")
    monkeypatch.setattr(programs.Program, "start", lambda *_: full(programs.Program((), 9, 0, 0)))
    with pytest.raises(MemoryError, match="a single run takes more memory"):
        quietly(descent, POINTS, width=2)

    def mistaken(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(programs.Program, "start", mistaken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        quietly(descent, POINTS)


def test_once_memory_is_short_later_chunks_are_narrower(monkeypatch):
    real, widths = programs.Program.start, []

    def full(self, key, indices, columns):
        widths.append((self.num_runs, int(indices[0])))
        if self.num_runs > 2 and indices[0] >= 6:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
        return real(self, key, indices, columns)

    monkeypatch.setattr(programs.Program, "start", full)
    found = quietly(descent, POINTS, width=3, chunk=3)
    assert_same(found, of_descent())
    assert [pair for pair in widths if pair[1] >= 6] == [(3, 6), *((2, first) for first in (6, 8, 9, 11, 12, 14))]
    assert found.plan == "3 side by side, in chunks of 3 (some of them 2 side by side)"


def refused(words, *args, **options):
    def case():
        run_fn, points = args
        with pytest.raises(ValueError, match=words), jax.enable_x64("must fit" not in words):
            quietly(run_fn, points() if callable(points) else points, **options)

    return words, case


def returns(value):
    return lambda point, key: value(point)


REFUSED = dict(
    [
        refused("axis rate holds 0.1 twice", descent, lambda: grid(rate=[0.1, 0.2, 0.1])),
        refused("axis rate must be one list of values, got shape", descent, lambda: grid(rate=[[0.1]])),
        refused("rate must hold one value at least", descent, lambda: grid(rate=[])),
        refused("grid must be given one axis at least", descent, grid),
        refused("must not hold NaN", descent, lambda: grid(rate=[0.1, np.nan])),
        refused("must hold values of one kind, got None and numbers", descent, lambda: grid(rate=[8, None])),
        refused("real numbers, bools or strings", descent, lambda: grid(rate=[descent])),
        refused("other than finished, finite, run, got 'run'", descent, lambda: grid(run=[1])),
        refused("got 'a b'", descent, {"a b": [1]}),
        refused("arrays of one length, got rate 2, seed 3", descent, {"rate": [0.1, 0.2], "seed": [1, 2, 3]}),
        refused("points 0 and 2 are the same", descent, {"rate": [0.1, 0.2, 0.1], "seed": [0, 0, 0]}),
        refused("points must be jbptt.grid", descent, [1, 2]),
        refused("points must be jbptt.grid.*got {}", descent, {}),
        refused("cell holds strings.*static", descent, grid(cell=["rnn"])),
        refused("seed must fit int32", descent, {"seed": np.array([0, 2**40])}),
        refused("static must name what points hold, rate, seed, got 'size'", descent, POINTS, static="size"),
        refused("static and points both name rate", descent, POINTS, static={"rate": [1, 2]}),
        refused("static setting w must be one number", descent, {"w": [[1, 2], [3, 4]]}, static="w"),
        refused(
            "must return a dict of arrays.*got ArrayImpl|must return a dict.*Tracer",
            returns(lambda p: p["rate"]),
            POINTS,
        ),
        refused("must return a dict of arrays.*got dict {}", returns(lambda p: {}), POINTS),
        refused("'x' is dict: return its leaves", returns(lambda p: {"x": {"y": 1.0}}), POINTS),
        refused("got 'finite'", returns(lambda p: {"finite": 1.0}), POINTS),
        refused("must not return 'rate'", returns(lambda p: {"rate": 1.0}), POINTS),
        refused(
            r"x is float64\[2\] and float64\[3\], with n=2 and with n=3. Pad",
            returns(lambda p: {"x": jnp.zeros(p["n"])}),
            grid(n=[2, 3]),
            static="n",
        ),
        refused("dims must name outputs of run_fn", descent, POINTS, dims={"loss": "step"}),
        refused("dims of path must name 2 different axes", descent, POINTS, dims={"path": ("step",)}),
        refused("must not be called 'rate'", descent, POINTS, dims={"path": ("rate", "axis")}),
        refused(
            "axes of different lengths different names, got 'i' for a .2. and b .3.",
            returns(lambda p: {"a": jnp.zeros(2), "b": jnp.zeros(3)}),
            POINTS,
            dims={"a": "i", "b": "i"},
        ),
        refused("must not be called 'x_0', as an axis of x is", descent, {"x": np.eye(3)}, static={"x_0": [1, 2]}),
        refused("must not return 'w_0'", returns(lambda p: {"w_0": 1.0}), {"w": [[1, 2]]}),
        refused("must not be called 'w_0'", returns(lambda p: {"y": jnp.ones(5)}), {"w": [[1, 2]]}, dims={"y": "w_0"}),
        refused("must not be called 'run'", returns(lambda p: {"y": jnp.ones(5)}), POINTS, dims={"y": "run"}),
        refused(
            "dims of y must be names of its axes, got 5", returns(lambda p: {"y": jnp.ones(5)}), POINTS, dims={"y": 5}
        ),
        refused("got 'a/b'", returns(lambda p: {"a/b": 1.0}), POINTS),
        refused("static must be names of points", descent, POINTS, static=5),
        refused("a must be in an order, got the set", descent, lambda: grid(a={1, 2})),
        refused("scale must fit float32, got 1e.300", descent, lambda: grid(scale=[1e300, 1.0])),
        refused(
            "chunk must be at least 8, the runs that are computed at once, got 2", descent, POINTS, width=8, chunk=2
        ),
        refused("run_fn must be a function", 3, POINTS),
        refused("executor must be a concurrent.futures.Executor", descent, POINTS, executor=3),
        refused("mesh must be a jax.sharding.Mesh", descent, POINTS, mesh=2),
        refused("width must be an integer >= 1", descent, POINTS, width=0),
        refused("chunk must be an integer >= 1", descent, POINTS, chunk=0),
        refused("memory_budget must be a finite number > 0", descent, POINTS, memory_budget=0),
        refused("changed must be one of refuse, keep, restart", descent, POINTS, changed="overwrite"),
        refused("version must be a string or a number", descent, POINTS, version=1.5j),
    ]
)


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_refused(words, monkeypatch):
    monkeypatch.setattr(sweeping, "computed", lambda *_: pytest.fail("something ran"))
    REFUSED[words]()


@pytest.mark.parametrize("what", usual(["outputs"], ["outputs", "key", "inside"]))
def test_the_key_and_the_place_of_the_call(what):
    if what == "outputs":
        with pytest.raises(TypeError) as error:
            quietly(lambda point, key: {"x": point["rate"] + "a"}, POINTS)
        assert "point entries rate, seed" in error.value.__notes__[-1]
    elif what == "key":
        for key in (3, jax.random.split(KEY), jnp.zeros(2)):
            with pytest.raises(ValueError, match="key must be one key"):
                sweep(descent, POINTS, key=key)
        old = sweep(descent, POINTS, key=jax.random.PRNGKey(7), progress=False)
        assert_same(old, of_descent())
    else:
        with pytest.raises(ValueError, match="outside of jit"):
            jax.jit(lambda key: sweep(descent, POINTS, key=key).end.values)(KEY)


def test_progress_is_told(capsys, monkeypatch):
    monkeypatch.setattr("jbptt.sweeps.reporting.PATIENCE", 0)
    monkeypatch.setattr("jbptt.sweeps.reporting.EVERY", 0)
    sweep(descent, POINTS, key=KEY, width=5, chunk=5)
    plan, *lines = capsys.readouterr().err.splitlines()
    assert plan == "jbptt: 5 side by side, in chunks of 5" and len(lines) == 3
    assert lines[0].startswith(" 33%  5 of 15 runs are done, 0:0") and lines[2].startswith("100%  15 of 15 runs")
    quietly(descent, POINTS)
    assert capsys.readouterr() == ("", "")


def test_what_is_done_is_kept_after_ctrl_c(monkeypatch):
    real = programs.Program.start

    def stopped(self, key, indices, columns):
        if 12 in indices:
            raise KeyboardInterrupt
        return real(self, key, indices, columns)

    monkeypatch.setattr(programs.Program, "start", stopped)
    with pytest.raises(KeyboardInterrupt, match="10 of 15 runs are done; they are in this error's results") as error:
        quietly(descent, POINTS, width=5, chunk=5)
    found, wanted = error.value.results, of_descent()
    assert found.finished.values.ravel().tolist() == [True] * 10 + [False] * 5
    np.testing.assert_allclose(found.end.values.ravel()[:10], wanted["end"][:10], rtol=1e-12)
    assert np.isnan(found.end.values.ravel()[10:]).all()


@pytest.mark.more("test_a_sweep_is_a_loop_over_runs")
@pytest.mark.parametrize("number", usual([2], [2, 4, 8]))
def test_several_devices(number):
    """Each takes its share: the same runs, the same width on each device, the same bits as one device."""
    code = (
        f"import jax; jax.config.update('jax_num_cpu_devices', {number}); jax.config.update('jax_enable_x64', True); "
    )
    code += f"import sys; sys.path.insert(0, sys.argv[1]); import test_sweeps; test_sweeps.on_devices({number})"
    command = [sys.executable, "-c", code, os.path.dirname(__file__)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0 and f"the same on {number} devices" in ended.stdout, ended.stderr[-3000:]


def on_devices(number):
    mesh = Mesh(np.array(jax.devices()), ("runs",))
    ways = [(descent, POINTS, 1), (descent, POINTS, 2)]
    if number > 2:
        ways.append((functools.partial(sized, trained), grid(rate=[0.1, 0.3], seed=range(7)), 3))
    for run_fn, points, width in ways:
        one, many = (quietly(run_fn, points, width=width, mesh=m) for m in (None, mesh))
        side = "one after the other" if width == 1 else f"{width} side by side"
        assert many.plan.startswith(f"{side} on each of {number} devices") and one.equals(many)
    np.testing.assert_allclose(quietly(descent, POINTS, mesh=mesh).end, of_descent()["end"].reshape(3, 5), rtol=1e-12)
    print(f"the same on {number} devices")


ALONE_AND_TWO = (0, 1), (0, 2), (1, 2)  # which process, of how many


@pytest.mark.more("test_a_sweep_is_a_loop_over_runs")
def test_two_processes_of_one_program():
    """`jax.distributed`, each example of a batch on a device of another process: the same dataset."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    commands = [[sys.executable, killed_sweeps.__file__, "in_step", *map(str, (*of, port))] for of in ALONE_AND_TWO]
    processes = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
    ended = [process.communicate(timeout=120) for process in processes]
    alone, *together = [output.split("losses")[-1].split() for output, _ in ended]
    for losses, (output, errors) in zip(together, ended[1:], strict=True):
        assert "store must be None under jax.distributed" in output, errors[-3000:]
        np.testing.assert_allclose(np.array(losses, float), np.array(alone, float), rtol=1e-6)
    assert len(alone) == 4


def sized(run_fn, point, key):
    return run_fn(point | {"size": 3}, key)
