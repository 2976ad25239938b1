"""The compiled program of runs that stand side by side, one after the other, or on several devices.

`width` runs are one vmapped program; on each of several devices stand as many. The program reads
which runs they are, so one program serves all runs of a combination of static settings.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from jbptt import engine
from jbptt.executables import WeakCache
from jbptt.sweeps.points import RESERVED, Combination, Runs

OF_THREADS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_threefry_partitionable",
    "jax_default_prng_impl",
    "jax_numpy_dtype_promotion",
)
OF_PROCESSES = ("jax_random_seed_offset", "jax_disable_most_optimizations")
_PROGRAMS = WeakCache()
_WIDTHS = WeakCache()
_SHAPES = WeakCache()


class Job(NamedTuple):
    """What a program of runs is made of, beside the function; plain data, so that it travels.

    Attributes:
      settings: static settings by name.
      names: of the point's entries, in order.
      key: data and implementation of the sweep's key.
    """

    settings: tuple[tuple[str, Any], ...]
    names: tuple[str, ...]
    key: tuple[tuple[int, ...], str | None]


class Program(NamedTuple):
    """Compiled for so many runs at once.

    Attributes:
      compiled: on each device, `(key, indices [width], columns [width, ...]) -> outputs`.
      num_runs: width times devices.
      temporary_bytes: what it needs beside its data, on one device; NaN where not told.
      compiling: seconds that it took to compile.
    """

    compiled: tuple[Callable, ...]
    num_runs: int
    temporary_bytes: float
    compiling: float

    def start(self, key: jax.Array, indices: np.ndarray, columns: dict) -> list[dict]:
        """The outputs of at most `num_runs` runs, device by device, still being computed.

        What is missing at the end is filled up with the last run; its outputs stand behind.
        """
        fill = np.minimum(np.arange(self.num_runs), len(indices) - 1)
        shares = fill.reshape(len(self.compiled), -1)
        started = []
        for compiled, own in zip(self.compiled, shares, strict=True):
            data = {name: values[own] for name, values in columns.items()}
            outputs = compiled(key, indices[own].astype(np.uint32), data)
            # One at a time on CPU: of two vmapped trainings of middle size on two devices, XLA's
            # threads were seen to wait for each other for ever.
            if jax.default_backend() == "cpu":
                jax.block_until_ready(outputs)
            started.append(outputs)
        return started


def key_of(job: Job) -> jax.Array:
    """The sweep's key."""
    data, implementation = job.key
    array = jnp.asarray(np.asarray(data, np.uint32))
    if implementation is None:
        return array
    return jax.random.wrap_key_data(array, impl=implementation)


def one_run(run_fn: Callable, job: Job, key: jax.Array, index: Any, columns: dict) -> dict:
    """What run `index` gives: `run_fn(point, fold_in(key, index))`, as arrays."""
    settings = dict(job.settings)
    point = {name: settings[name] if name in settings else columns[name] for name in job.names}
    outputs = run_fn(point, jax.random.fold_in(key, index))
    check_outputs(outputs)
    return {name: jnp.asarray(value) for name, value in outputs.items()}


def check_outputs(outputs: Any) -> None:
    """A ValueError unless run_fn returned a dict of arrays."""
    wanted = 'run_fn must return a dict of arrays, as {"loss": loss}'
    if not isinstance(outputs, dict) or not outputs:
        raise ValueError(f"{wanted}; got {type(outputs).__name__} {outputs!r:.80}")
    for name, value in outputs.items():
        if not isinstance(name, str) or not name.isidentifier() or name in RESERVED:
            raise ValueError(
                f"{wanted}, with Python names other than {', '.join(sorted(RESERVED))}; got "
                f"{name!r}"
            )
        array = isinstance(
            value, jax.Array | np.ndarray | np.generic | bool | int | float | complex
        )
        if not array or jnp.issubdtype(jnp.result_type(value), jax.dtypes.extended):
            raise ValueError(
                f"{wanted}; {name!r} is {type(value).__name__}: return its leaves by names of "
                "their own (of a key jax.random.key_data)"
            )


def known_widths(
    run_fn: Callable, job: Job, shapes: dict, devices: tuple | None
) -> dict[int, float]:
    """The widths that were measured while `run_fn` lives, and seconds of a full call of each.

    Whoever measures another adds it.
    """
    settings = _settings(job, shapes, devices)
    return _WIDTHS.find((run_fn,), settings, lambda run_fn: {})


def program_of(
    run_fn: Callable, job: Job, shapes: dict, width: int, devices: tuple | None
) -> Program:
    """The program for `width` runs on each device, compiled once while `run_fn` lives.

    Args:
      shapes: of one run's columns, by name.
      devices: None: the default device.
    """

    def make(run_fn):
        def runs(key, indices, columns):
            one = partial(one_run, run_fn, job, key)
            if width > 1:
                return engine.with_small_products_as_sums(jax.vmap(one))(indices, columns)
            first = one(indices[0], {name: column[0] for name, column in columns.items()})
            return {name: value[None] for name, value in first.items()}

        arguments = (
            jax.eval_shape(lambda: key_of(job)),
            jax.ShapeDtypeStruct((width,), np.uint32),
            {n: jax.ShapeDtypeStruct((width, *s.shape), s.dtype) for n, s in shapes.items()},
        )
        began = time.perf_counter()
        # A program for each device, not one over all, so that devices can take turns.
        compiled = tuple(
            jax.jit(runs, in_shardings=None if device is None else SingleDeviceSharding(device))
            .lower(*arguments)
            .compile()
            for device in devices or (None,)
        )
        memory = compiled[0].memory_analysis()
        size = np.nan if memory is None else memory.temp_size_in_bytes
        number = width * len(compiled)
        return Program(compiled, number, size, time.perf_counter() - began)

    return _PROGRAMS.find((run_fn,), (width, *_settings(job, shapes, devices)), make)


def _settings(job: Job, shapes: dict, devices: tuple | None) -> tuple:
    """All that a program depends on, beside the function and the width."""
    flags = *number_settings().values(), getattr(jax.config, "jax_default_device")  # noqa: B009
    # 4 and 4.0 are equal, and so are True and 1, but not to run_fn.
    settings = tuple((name, type(value), value) for name, value in job.settings)
    settings = settings, job.names, np.shape(job.key[0]), job.key[1]
    of_columns = tuple((name, *_signature(shape)) for name, shape in shapes.items())
    return settings, of_columns, devices, flags


def number_settings() -> dict[str, Any]:
    """The settings of JAX on which numbers depend; a worker has the same."""
    found = {name: getattr(jax.config, name) for name in OF_THREADS}
    return found | {name: jax.config.values[name] for name in OF_PROCESSES}


def _signature(shape: jax.ShapeDtypeStruct) -> tuple:
    return shape.shape, str(shape.dtype)


def column_shapes(columns: dict[str, np.ndarray]) -> dict[str, jax.ShapeDtypeStruct]:
    """Of one run's data, as JAX will have it."""
    return {
        name: jax.ShapeDtypeStruct(values.shape[1:], jax.dtypes.canonicalize_dtype(values.dtype))
        for name, values in columns.items()
    }


def job_of(runs: Runs, combination: Combination, key: jax.Array) -> Job:
    """What the program of a combination is made of."""
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    data = np.asarray(jax.random.key_data(key) if typed else key)
    implementation = str(jax.random.key_impl(key)) if typed else None
    return Job(
        tuple(combination.settings.items()),
        tuple(runs.coords),
        (tuple(data.tolist()), implementation),
    )


def output_shapes(run_fn: Callable, runs: Runs, key: jax.Array) -> dict[str, jax.ShapeDtypeStruct]:
    """Of one run's outputs; nothing is computed.

    Raises:
      ValueError: run_fn returns something else than a dict of arrays, or its shapes depend on the
        static settings. What run_fn raises is raised, with a note of the settings.
    """
    found: dict = {}
    first = ""
    for combination in runs.combinations:
        job, shapes = job_of(runs, combination, key), column_shapes(runs.columns)

        def trace(run_fn, job=job, shapes=shapes):
            of_key = jax.eval_shape(lambda: key_of(job))
            index = jax.ShapeDtypeStruct((), np.uint32)
            return jax.eval_shape(partial(one_run, run_fn, job), of_key, index, shapes)

        try:
            outputs = _SHAPES.find((run_fn,), _settings(job, shapes, None), trace)
        except Exception as error:
            error.add_note(
                f"jbptt.sweep called run_fn with {_words(combination)}point entries "
                f"{', '.join(runs.coords)} and a key, under jit. Name in static= what shapes the "
                "program."
            )
            raise
        if not found:
            found, first = outputs, str(combination)
        if differing := _difference(found, outputs):
            raise ValueError(
                "run_fn must return the same names, shapes and dtypes for all static settings; "
                f"{differing}, with {first} and with {combination}. Pad what differs, or return a "
                "number in its place"
            )
    return found


def _words(combination: Combination) -> str:
    return f"{combination}, " if combination.settings else ""


def _difference(a: dict, b: dict) -> str:
    """What differs first between two dicts of shapes, in words; "" for nothing."""
    if a.keys() != b.keys():
        return f"got {sorted(a)} and {sorted(b)}"
    for name in a:
        two = [f"{s.dtype.name}{list(s.shape)}" for s in (a[name], b[name])]
        if two[0] != two[1]:
            return f"{name} is {two[0]} and {two[1]}"
    return ""
