"""Sweeps by workers: the same numbers as in this process, whoever computes, and whoever is lost."""

import contextlib
import functools
import multiprocessing
import os
import signal
import time
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import usual

from jbptt import grid, load_sweep, sweep
from jbptt.sweeps import run_plans, workers
from jbptt.sweeps.programs import number_settings

pytest.importorskip("xarray")
pytest.importorskip("cloudpickle")
POINTS = grid(size=[2, 3], rate=[0.1, 0.4], seed=range(8))


def walk(folder=None, until=0):
    """A function that travels as a whole; each worker notes the chunks that it computes, and may be slow at first."""

    def noted():
        file = Path(folder) / f"{os.getpid()}-{time.monotonic_ns()}"
        file.write_text("")
        if len(list(Path(folder).iterdir())) <= until:
            time.sleep(0.5)

    def run(point, key):
        if folder is not None:
            jax.debug.callback(noted)
        steps = jax.random.normal(key, (point["size"], 4)).sum(0)
        return {"path": jnp.cumsum(steps) * point["rate"]}

    return run


ask = functools.partial(sweep, points=POINTS, key=jax.random.key(5), static="size", progress=False, width=2)


@functools.cache
def wanted():
    return ask(walk())


class Engine:
    """An executor and futures of their own kind, as submitit's: work is done when it is asked for."""

    class Job:
        def __init__(self, work, arguments):
            self.work, self.arguments, self.asked = work, arguments, 0

        def done(self):
            self.asked += 1
            return self.asked > 2

        def result(self):
            return self.work(*self.arguments)

        def cancel(self):
            raise AssertionError("nothing is left to be cancelled")

    def submit(self, work, *arguments):
        return self.Job(work, arguments)


def spawned(number=2):
    return ProcessPoolExecutor(number, mp_context=multiprocessing.get_context("spawn"))


def reusable():
    return pytest.importorskip("loky").get_reusable_executor(2)


EXECUTORS = {"threads": lambda: ThreadPoolExecutor(2), "its own kind": Engine, "processes": spawned, "loky": reusable}


@pytest.mark.parametrize("name", usual(["threads", "its own kind", "processes"], EXECUTORS))
def test_workers_give_the_same_bits(name, tmp_path):
    made = EXECUTORS[name]()
    found = ask(walk(tmp_path), executor=made)
    assert found.equals(wanted())
    processes = {file.name.split("-")[0] for file in tmp_path.iterdir()}
    assert (str(os.getpid()) in processes) == (name not in ("processes", "loky"))
    if isinstance(made, Executor):
        made.shutdown()


def test_there_is_work_for_every_worker(monkeypatch):
    chunks = []
    real = run_plans.compute
    monkeypatch.setattr(
        "jbptt.sweeps.chunks.compute", lambda *arguments: (chunks.append(len(arguments[3])), real(*arguments))[1]
    )
    with ThreadPoolExecutor(1) as executor:
        found = sweep(walk(), POINTS, key=jax.random.key(5), static="size", progress=False, executor=executor)
    assert len(chunks) + 2 >= 16 and max(chunks) <= 2  # beside the two that were computed to find the plans
    np.testing.assert_allclose(found.path, wanted().path, rtol=1e-12)


def test_a_function_is_unpacked_once(monkeypatch):
    taken = []
    monkeypatch.setattr(workers.pickle, "loads", lambda data: taken.append(data) or walk())
    monkeypatch.setattr(workers, "_FUNCTIONS", type(workers._FUNCTIONS)())
    with ThreadPoolExecutor(1) as executor:
        assert ask(walk(), executor=executor, chunk=2).equals(wanted())
    assert len(taken) == 1


def killing(pool, folder, after=3):
    """An executor whose first worker is killed once some chunks were computed."""

    class Killing(type(pool)):
        def submit(self, *arguments, **named):
            future = super().submit(*arguments, **named)
            if len(list(Path(folder).iterdir())) >= after and self._processes:
                with contextlib.suppress(ProcessLookupError):  # it went already
                    os.kill(next(iter(self._processes)), signal.SIGKILL)
            return future

    pool.__class__ = Killing
    return pool


@pytest.mark.parametrize("kept", usual([True], [True, False]))
def test_a_lost_worker_is_replaced(tmp_path, kept):
    """By a function that makes executors; the chunks of the lost one are computed again, those done are not."""
    notes, pools = tmp_path / "notes", []
    notes.mkdir()

    def make():
        pools.append(spawned(1))
        return killing(pools[0], notes) if len(pools) == 1 else pools[-1]

    store = tmp_path / "store" if kept else None
    found = ask(walk(notes), executor=make, store=store, chunk=2)
    assert found.equals(wanted()) and len(pools) == 2
    assert len(list(notes.iterdir())) <= 32 + 2 * 4  # runs; two chunks at most, of measuring too, are done twice
    if kept:
        assert load_sweep(store).path.equals(wanted().path)


def test_an_executor_that_broke_says_what_to_do(tmp_path):
    pool = killing(spawned(1), tmp_path, after=0)
    with pytest.raises(RuntimeError, match=r"workers were lost while they computed runs \d+ to \d+.*executor=lambda"):
        ask(walk(tmp_path), executor=pool)
    pools = []

    def make():
        pools.append(killing(spawned(1), tmp_path, after=0))
        return pools[-1]

    with pytest.raises(RuntimeError, match="3 times in a row; they may need more memory"):
        ask(walk(tmp_path), executor=make)
    assert len(pools) == 3


def test_what_was_done_before_a_pool_broke_is_kept(tmp_path):
    """The third chunk breaks it, when the first two are done but not yet taken."""
    submitted = []

    class Breaking(ThreadPoolExecutor):
        def submit(self, work, *arguments):
            submitted.append(arguments)
            future = super().submit(work, *arguments)
            if len(submitted) == 5:
                future.result()
                future = Future()
                future.set_exception(BrokenExecutor("gone"))
            return future

    store = tmp_path / "store"
    with Breaking(1) as pool, pytest.raises(RuntimeError, match="takes no more work"):
        ask(walk(), executor=pool, store=store, chunk=2)
    assert load_sweep(store).finished.sum() >= 2 * (len(submitted) - 4)
    submitted.clear()
    assert ask(walk(), executor=lambda: Breaking(1), chunk=2).equals(wanted())
    assert len(submitted) <= 2 + 16 + 1


def test_what_is_no_executor():
    assert ask(walk(), executor=ThreadPoolExecutor).equals(wanted())  # a class makes one
    with pytest.raises(ValueError, match=r"executor must make a concurrent.futures.Executor, got None"):
        ask(walk(), executor=lambda: None)


def test_what_a_run_raises_says_where():
    def run(point, key):
        def fail(x):
            raise ZeroDivisionError("of the user")

        return {"x": jax.pure_callback(fail, jax.ShapeDtypeStruct((), float), point["rate"])}

    for executor in (None, ThreadPoolExecutor):
        with pytest.raises(Exception, match="of the user") as error:
            sweep(run, {"rate": [0.1, 0.2]}, key=jax.random.key(0), executor=executor, progress=False, width=1)
        assert "jbptt.sweep: in runs 0 to 1" in error.value.__notes__


def test_a_function_that_cannot_be_pickled():
    lock = multiprocessing.Lock()

    def run(point, key):
        with lock:
            return {"x": point["rate"]}

    with ThreadPoolExecutor(1) as executor, pytest.raises(ValueError, match="run_fn must be picklable for an executor"):
        ask(run, executor=executor)


@pytest.mark.more("test_workers_give_the_same_bits")
def test_settings_of_jax_travel():
    """A worker computes in the caller's precision, and has its own again afterwards."""
    assert jax.config.jax_enable_x64
    with spawned(1) as executor:
        before = executor.submit(number_settings).result()
        with jax.enable_x64(False), jax.default_matmul_precision("highest"):
            low = ask(walk())
            assert low.path.dtype == np.float32 and ask(walk(), executor=executor).equals(low)
        assert ask(walk(), executor=executor).equals(wanted())
        assert before == executor.submit(number_settings).result() != number_settings()


@pytest.mark.more("test_workers_give_the_same_bits")
@pytest.mark.parametrize("killed", [False, True])
def test_dask(tmp_path, killed):
    distributed = pytest.importorskip("distributed")
    notes = tmp_path / "notes"
    notes.mkdir()
    with (
        distributed.LocalCluster(
            2, threads_per_worker=1, dashboard_address=None, local_directory=str(tmp_path)
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        executor = client.get_executor()
        if killed:
            real = executor.submit

            def submit(*arguments, **named):
                future = real(*arguments, **named)
                done = {file.name.split("-")[0] for file in notes.iterdir()}
                if len(list(notes.iterdir())) >= 3 and not submit.killed:
                    submit.killed = done.pop()
                    os.kill(int(submit.killed), signal.SIGKILL)
                return future

            submit.killed = None
            executor.submit = submit
        found = ask(walk(notes), executor=executor, chunk=2, store=tmp_path / "store")
        assert found.equals(wanted())
        assert not killed or submit.killed
