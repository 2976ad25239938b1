"""Processes that sweep, are killed, run out of disk or are several: what tests of sweeps start.

Nothing is computed on import, so that a process can fork before JAX has threads.
"""

import functools
import os
import random
import resource
import signal
import sys
import time
import warnings
from pathlib import Path

import icechunk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray  # noqa: F401
import zarr  # noqa: F401

import jbptt
from jbptt import grid, sweep
from jbptt.sweeps import programs, run_plans, stores

PHASES = "begin", "compile", "compute", "write", "commit"
POINTS = grid(size=[2, 3], rate=[0.1, 0.4], seed=range(10))


def walk(point, key):
    """A few random numbers; how many is a static setting."""
    steps = jax.random.normal(key, (point["size"], 4)).sum(0)
    return {"path": jnp.cumsum(steps) * point["rate"], "n": jnp.asarray(point["seed"] + 1)}


def ask(chunk=6, **options):
    """The sweep of `walk`, in chunks of so many runs."""
    usual = {"key": jax.random.key(3), "width": 3, "dims": {"path": "step"}, "progress": False}
    return sweep(walk, POINTS, static="size", chunk=chunk, **usual | options)


def on_a_full_disk(path):
    """Files may grow to so many bytes, which a commit's grow to after some chunks."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)  # as the tests: for the same bits
    real, written = stores.Store.write, []

    def write(self, *arguments):
        written.append(1)
        if len(written) == 4:  # before the fourth chunk
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        return real(self, *arguments)

    stores.Store.write = write
    try:
        ask(store=path)
    except OSError as error:
        print(error)


def kill_at_random(folder, num_kills, seed):
    """The processes are forks of this one, which has imported everything and started nothing."""
    folder, num_kills, seed = Path(folder), int(num_kills), int(seed)
    rng, phases, finished_stores, kills = random.Random(seed), {}, 0, 0
    reference = os.fork()
    if not reference:
        jax.config.update("jax_enable_x64", True)
        np.save(folder / "wanted.npy", ask(3).path.values)
        os._exit(0)
    assert os.waitpid(reference, 0)[1] == 0
    while kills < num_kills or not finished_stores:
        log, path = folder / f"log-{finished_stores}", folder / f"store-{finished_stores}"
        before, began, child = {word: count(log, word) for word in PHASES}, time.monotonic(), os.fork()
        if not child:
            sweep_with_a_log(path, log)
            os._exit(0)
        # Somewhere in a phase, which begins for the n-th time; or nowhere, where all kills are done.
        word, nth = rng.choice(PHASES), rng.choice([1, 1, 2, 8, 20])
        delay, reached, ended = rng.expovariate(100), None, (0, 0)
        while not ended[0]:
            if reached is None and kills < num_kills and count(log, word) - before[word] >= nth:
                reached = time.monotonic()
            if reached is not None and time.monotonic() >= reached + delay:
                break
            assert time.monotonic() - began < 60, f"seed {seed}: {log.read_text()[-2000:]}"
            time.sleep(0.001)
            ended = os.waitpid(child, os.WNOHANG)
        if not ended[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
            phase = log.read_text().split("\n")[-2].split()[0]
            phases[phase] = phases.get(phase, 0) + 1
            continue
        assert os.waitstatus_to_exitcode(ended[1]) == 0, log.read_text()[-2000:]
        check_log(log.read_text().splitlines())
        np.testing.assert_array_equal(np.load(f"{path}.npy"), np.load(folder / "wanted.npy"))
        finished_stores += 1
    print(f"seed {seed}: {kills} kills, {finished_stores} sweeps finished, by phase {phases}")


def count(log, word):
    """How often a phase began."""
    return sum(line.split()[:1] == [word] for line in log.read_text().splitlines()) if log.exists() else 0


def sweep_with_a_log(path, log):
    """One process, which says what it does before it does it, and what it has committed."""
    jax.config.update("jax_enable_x64", True)
    with open(log, "a", buffering=1) as file:

        def telling(owner, name, word, after=None):
            real = getattr(owner, name)

            def call(*arguments, **named):
                print(word, *(arguments[2].tolist() if word == "compute" else ()), file=file)
                result = real(*arguments, **named)
                if after:
                    print(after, *(arguments[1][:3] if word == "write" else ()), file=file)
                return result

            setattr(owner, name, call)

        telling(run_plans, "program_of", "compile")
        telling(programs.Program, "start", "compute")
        telling(stores.Store, "write", "write", "kept")
        telling(icechunk.Session, "commit", "commit")
        print("begin", file=file)
        np.save(f"{path}.npy", ask(3, store=path).path.values)


def check_log(lines):
    """What was kept is never computed again."""
    kept = set()
    for line in lines:
        word, *numbers = line.split()
        if word == "kept":
            number, start, stop = map(int, numbers)
            kept |= set(range(20 * number + start, 20 * number + stop))
        elif word == "compute":
            assert not kept & set(map(int, numbers)), line
    assert len(kept) > 20  # a kill may fall between a commit and its line here


def in_step(i, number, port):
    """One of so many processes, each with a device."""
    i, number, port = map(int, (i, number, port))
    if number > 1:
        jax.distributed.initialize(f"localhost:{port}", number, i)
    cell = jbptt.cells.with_linear_readout(jbptt.cells.rnn(2, 3), 1)
    estimator = jbptt.full_bptt(cell.step, jbptt.tasks.squared_error, plan=jbptt.Plan(num_shards=number))

    def run(point, key):
        batches = jbptt.Batch(jax.random.normal(key, (2, 5, 2, 2)), jnp.ones((2, 5, 2, 1)))
        carry = cell.initial_carry((2,))
        _, history = jbptt.train(estimator, optax.sgd(point["rate"]), cell.init(key), carry, batches)
        return {"loss": history.loss}

    ask = functools.partial(sweep, run, grid(rate=[0.1, 0.2]), key=jax.random.key(1), progress=False)
    try:
        print(number == 1 or ask(store="here"))
    except ValueError as error:
        print(error)
    print("losses", *ask().loss.values.ravel())


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*os.fork.*")
    globals()[sys.argv[1]](*sys.argv[2:])
