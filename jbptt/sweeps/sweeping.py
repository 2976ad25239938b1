"""`sweep`: all runs of a function in one call. `load_sweep`: what a store holds."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jbptt import validation
from jbptt.arrays import is_key
from jbptt.executables import is_traced
from jbptt.sweeps import manifests, stores
from jbptt.sweeps.chunks import Chunk, Planned, Workplace, computed
from jbptt.sweeps.points import runs_of
from jbptt.sweeps.programs import job_of, output_shapes
from jbptt.sweeps.reporting import Reporter
from jbptt.sweeps.results import Results, output_dims
from jbptt.sweeps.run_plans import Limits, RunPlan

CHUNKS_FOR_WORKERS = 16


class SweepStopped(KeyboardInterrupt):
    """Ctrl-C ended a sweep.

    Attributes:
      results: the dataset so far; its coordinate `finished` says which runs are in it.
    """

    def __init__(self, words: str, results: Any):
        super().__init__(words)
        self.results = results


def sweep(
    run_fn: Callable[[dict[str, Any], jax.Array], dict[str, Any]],
    points: Any,
    *,
    key: jax.Array,
    static: Any = None,
    dims: Mapping[str, Any] | None = None,
    version: str | int | None = None,
    store: Any = None,
    executor: Any = None,
    mesh: Mesh | None = None,
    memory_budget: float | None = None,
    progress: bool = True,
    width: int | None = None,
    chunk: int | None = None,
    changed: str = "refuse",
) -> Any:
    """`run_fn(point, key)` for every point: batched, kept, divided over devices or workers.

    Runs with the same static settings are one compiled program, vmapped over as many runs at once
    as is fastest here: that is measured where it is worth it. Run i of all is given
    `fold_in(key, i)`.

    >>> import jax, jax.numpy as jnp
    >>> from jbptt import grid
    >>> def run(point, key):
    ...     x = jax.lax.fori_loop(0, 9, lambda _, x: x - point["rate"] * 2 * x, 1.0)
    ...     return {"distance": jnp.abs(x)}
    >>> rates = grid(rate=[0.1, 0.4], seed=range(3))
    >>> found = sweep(run, rates, key=jax.random.key(0), progress=False)
    >>> found.distance.sel(rate=0.4).mean("seed").round(4).item()
    0.0

    Args:
      run_fn: `(point, key) -> {name: array}`, pure; as under jit, what it closes over is read once.
        `point` is a dict: static settings are Python's own values, all other numbers are traced
        scalars. The dict that it returns is flat, with the same names, shapes and dtypes in every
        run.
      points: `grid(…)`, one labelled dimension for each axis; or a dict of arrays `[N, ...]`, one
        dimension `run`.
      key: one; every run's key is derived from it.
      static: settings that shape the program (a cell, a size, a window), one program for each
        combination: names of `points`, or `{name: values}` for axes of their own, which stand in
        front; a value alone instead of a list is a setting of all runs.
      dims: names of an output's own axes, `{"loss": ("step",)}`; else they are `loss_0`, ….
      version: of your code, a string or a number; kept in the store, which refuses another one.
        Change it with `run_fn`: a store does not see code.
      store: an Icechunk repository, a local path or an `icechunk.Storage`. Each chunk of runs is
        one atomic commit. The same call again computes what is not in it.
      executor: any `concurrent.futures.Executor`, or a function that makes one, which is called
        again where its workers were lost. run_fn travels by cloudpickle. None: this process.
      mesh: devices of this process over which the runs are divided; None: the default device.
      memory_budget: bytes that a program may take on one device; None: half of the machine's
        memory on CPU, else 80 % of the device's.
      progress: whether the plan, what is done and the time left are told on standard error.
      width: runs side by side on each device; 1: one after the other; None: the fastest, measured
        (under `jax.distributed` 1).
      chunk: runs that are computed and kept together; None: about five seconds of them.
      changed: of a store with another `version` or other settings of JAX: "refuse", "keep" what it
        holds, or "restart".

    Returns:
      An `xarray.Dataset`. Its coordinate `finite` is False for a run that has an output which is
      not finite; its neighbours are unchanged. `attrs["plan"]` says how the runs were computed.
      Half precision comes back as float32.

    Raises:
      ValueError: points that are malformed or there twice, static settings that are unknown, a
        run_fn that returns something else than a dict of arrays of the same shapes for all
        settings or cannot be pickled, wrong `dims`, a store of another sweep, with other settings
        or in use: all before anything runs. When a combination is planned: a `memory_budget` below
        what two runs take. What run_fn raises is raised, with a note of the settings.
      OSError: the store cannot be written; what was kept before is in it.
      MemoryError: a single run takes more memory than the device has.
      RuntimeError: the executor's workers were lost.
      SweepStopped: Ctrl-C.

    Widths are timed, so two calls may round differently: by about 1e-6 for one update in float32,
    and more the longer or the more chaotic a training is. With `width` given, on the same devices,
    a call gives the same bits.
    """
    runs = runs_of(points, static)
    _check(run_fn, key, executor, mesh, changed, version)
    if memory_budget is not None:
        validation.check_above("memory_budget", memory_budget, 0, "no run takes so little")
    for name, number in {"width": width, "chunk": chunk}.items():
        if number is not None:
            validation.check_positive_integer(name, number)
    per_call = (width or 1) * (1 if mesh is None else mesh.size)
    if width is not None and chunk is not None and chunk < per_call:
        raise ValueError(
            f"chunk must be at least {per_call}, the runs that are computed at once, got {chunk}; "
            "leave one of width and chunk out"
        )
    if jax.process_count() > 1:  # nobody may decide by a clock of its own
        _check_alone(store, executor)
        width, chunk = width or 1, chunk or len(runs)
    shapes = output_shapes(run_fn, runs, key)
    results = Results(runs, shapes, output_dims(dims, runs, shapes))
    num_chunks = 1 if executor is None else CHUNKS_FOR_WORKERS
    run_bytes = sum(values[:1].nbytes for values in results.arrays.values())
    limits = Limits(memory_budget, max(1, len(runs) // num_chunks), run_bytes, width, chunk)
    jobs = tuple(job_of(runs, combination, key) for combination in runs.combinations)
    devices = None if mesh is None else tuple(mesh.devices.flat)
    place = Workplace(run_fn, runs, jobs, devices, limits, executor)
    if store is None:
        everything = [Chunk(i, 0, len(c.indices)) for i, c in enumerate(runs.combinations)]
        return _all(place, results, everything, None, progress)
    manifest = manifests.manifest_of(runs, results, jobs[0], version)
    with stores.opened(store, manifest, runs, changed) as kept:
        left = [_as_asked(chunk, limits, place) for chunk in kept.unfinished(results)]
        return _all(place, results, left, kept, progress)


def load_sweep(store: Any) -> Any:
    """The dataset that a store holds, complete or not.

    Args:
      store: an Icechunk repository, a local path or an `icechunk.Storage`.

    Returns:
      An `xarray.Dataset`, as `sweep` gives it. Runs that are missing or damaged (a warning names
      them) hold NaN, 0 or False; while there are any, the coordinate `finished` says which are
      there, and `finite` says nothing of the others.

    Raises:
      ValueError: it is no sweep's store, or one of a newer version.
      OSError: it cannot be read.
    """
    return stores.loaded(store)


def _all(place: Workplace, results: Results, left: list[Chunk], kept: Any, progress: bool) -> Any:
    """Computes what is left and keeps it; the dataset of everything."""
    plans: dict[int, RunPlan] = {} if kept is None else kept.plans
    widths: dict[int, set[int]] = {} if kept is None else kept.widths
    with Reporter(results, place.runs, progress) as tell:
        try:
            for event in computed(place, left):
                if isinstance(event, Planned):
                    plans[event.number] = event.plan
                    tell.plan(event.number, event.plan)
                    if kept is not None:
                        kept.plan(event.number, event.plan, results)
                    continue
                chunk = event.chunk
                if kept is not None:
                    kept.write(chunk, event.outputs, event.width)
                widths.setdefault(chunk.number, set()).add(event.width)
                own = place.runs.combinations[chunk.number].indices[chunk.start : chunk.stop]
                results.put(own, event.outputs)
                tell.progress()
        except KeyboardInterrupt:
            where = "in this error's results" if kept is None else f"in {kept.words}"
            raise SweepStopped(
                f"{tell.counted()}; they are {where}", results.dataset(plans, widths)
            ) from None
    return results.dataset(plans, widths)


def _as_asked(chunk: Chunk, limits: Limits, place: Workplace) -> Chunk:
    """A chunk of a store, under its plan there but for a width that this call asks for."""
    if chunk.plan is None:
        return chunk
    if limits.chunk is not None and limits.chunk != chunk.plan.chunk:
        raise ValueError(
            f"chunk must be {chunk.plan.chunk}, as the store has it, got {limits.chunk}; leave it "
            "out"
        )
    width = chunk.plan.width if limits.width is None else limits.width
    num_devices = len(place.devices or (None,))
    return chunk._replace(plan=chunk.plan._replace(width=width, num_devices=num_devices))


def _check_alone(store: Any, executor: Any) -> None:
    """A ValueError for what several processes of `jax.distributed` cannot do in step."""
    for name, value in {"store": store, "executor": executor}.items():
        if value is not None:
            raise ValueError(
                f"{name} must be None under jax.distributed, where all processes compute every "
                f"run together, got {value!r}; keep what each returns, or sweep from one process"
            )


def _check(run_fn: Any, key: Any, executor: Any, mesh: Any, changed: Any, version: Any) -> None:
    """A ValueError that names what is not what it should be."""
    if not callable(run_fn):
        raise ValueError(
            f"run_fn must be a function (point, key) -> dict of arrays, got {run_fn!r}"
        )
    if not isinstance(key, jax.Array) or key.shape not in ((), (2,), (4,)):
        raise ValueError(f"key must be one key, as jax.random.key(0), got {key!r}")
    if is_traced(key):
        raise ValueError("sweep runs on the host; call it outside of jit, grad and vmap")
    if key.shape != () if is_key(key) else key.dtype != np.uint32:
        raise ValueError(f"key must be one key, as jax.random.key(0), got {key!r}")
    if executor is not None and not callable(executor) and not hasattr(executor, "submit"):
        raise ValueError(
            f"executor must be a concurrent.futures.Executor, or a function that makes one, got "
            f"{executor!r}"
        )
    if mesh is not None and not isinstance(mesh, Mesh):
        raise ValueError(
            f"mesh must be a jax.sharding.Mesh, got {mesh!r}; write jax.make_mesh((2,), ('runs',))"
        )
    if mesh is not None and executor is not None:
        raise ValueError(
            "mesh and executor were both given; the devices of a mesh are this process's, and "
            "workers use their own: leave one out"
        )
    if changed not in manifests.CHANGED:
        raise ValueError(f"changed must be one of {', '.join(manifests.CHANGED)}, got {changed!r}")
    if not isinstance(version, str | int | None):
        raise ValueError(f"version must be a string or a number, got {version!r}")
