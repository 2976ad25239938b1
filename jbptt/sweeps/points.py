"""What the runs of a sweep differ in: points, axes, and settings that shape the program."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

RESERVED = {"run", "finite", "finished"}
"""Names that the result of a sweep has itself."""


@dataclass(frozen=True)
class Points:
    """The product of axes, one point for each combination of their values, the last axis fastest.

    `len(points)` counts them, `points[i]` is one as a dict, in the order of the runs.

    Attributes:
      axes: `[length]` values by name.
    """

    axes: dict[str, np.ndarray]

    def __len__(self) -> int:
        return math.prod(map(len, self.axes.values()))

    def __getitem__(self, i: int) -> dict[str, Any]:
        shape = [len(values) for values in self.axes.values()]
        if not 0 <= i < len(self):
            raise IndexError(f"point {i} of {len(self)}")
        places = np.unravel_index(i, shape)
        return {
            name: values[place].item()
            for (name, values), place in zip(self.axes.items(), places, strict=True)
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))


def grid(**axes: Any) -> Points:
    """All combinations of the values of these axes: points for `sweep`.

    Args:
      axes: by name, values `[length]`: all numbers, all bools or all strings. Each becomes a
        labelled dimension of the result; the last varies fastest. One value alone is an axis of
        length 1. What shapes the program must be named in `sweep(static=…)` too.

    Raises:
      ValueError: no axes; one that is empty, a set, holds a value twice, NaN, numbers beside
        strings, or lists; one called run, finite or finished.

    >>> points = grid(rate=[0.1, 0.4], seed=range(3))
    >>> len(points), points[1]
    (6, {'rate': 0.1, 'seed': 1})
    """
    if not axes:
        raise ValueError("grid must be given one axis at least; write grid(seed=range(8))")
    return Points({name: axis_values(name, values) for name, values in axes.items()})


def axis_values(name: str, values: Any) -> np.ndarray:
    """`[length]` values that tell runs apart; a ValueError where they do not."""
    values = _listed(name, values)
    array = column(name, [values] if np.ndim(values) == 0 else values)
    if array.ndim != 1:
        raise ValueError(
            f"axis {name} must be one list of values, got shape {array.shape}; number its values "
            "and look them up inside run_fn"
        )
    if len(np.unique(array)) < len(array):
        twice = next(v for i, v in enumerate(array.tolist()) if v in array[:i].tolist())
        raise ValueError(
            f"axis {name} holds {twice!r} twice; leave one out (repeats are an axis of their own: "
            "seed=range(8))"
        )
    return array


def column(name: str, values: Any) -> np.ndarray:
    """Values of points `[N, ...]`: numbers, bools or strings of one kind, none of them NaN."""
    if not isinstance(name, str) or not name.isidentifier() or name in RESERVED:
        raise ValueError(
            f"points must be named by Python names other than {', '.join(sorted(RESERVED))}, got "
            f"{name!r}; rename it"
        )
    values = _listed(name, values)
    kinds = {_kind(value) for value in values} if isinstance(values, list | tuple) else set()
    if len(kinds) > 1:
        raise ValueError(
            f"{name} must hold values of one kind, got {' and '.join(sorted(kinds))}; write them "
            "alike (1.0 beside 0.5, a name beside a name)"
        )
    array = np.asarray(values)
    if array.dtype.kind == "O" and all(isinstance(value, str) for value in array.flat):
        array = array.astype(str)
    if array.dtype.kind not in "biufU":
        raise ValueError(
            f"{name} must hold real numbers, bools or strings, got {values!r}; pass names and look "
            "the things up inside run_fn"
        )
    if array.ndim == 0 or array.size == 0:
        raise ValueError(f"{name} must hold one value at least, got {values!r}; leave it out")
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise ValueError(f"{name} must not hold NaN, which equals nothing; leave it out")
    return array


def _listed(name: str, values: Any) -> Any:
    """Ranges, generators and the like as lists; a ValueError for sets, which have no order."""
    if isinstance(values, set | frozenset):
        raise ValueError(f"{name} must be in an order, got the set {values!r}; sort it")
    ordered = isinstance(values, str | list | tuple | np.ndarray | np.generic | jax.Array)
    return values if ordered or not isinstance(values, Iterable) else list(values)


def _kind(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "bools"
    if isinstance(value, str):
        return "strings"
    if isinstance(value, Sequence):
        return "lists"
    return "None" if value is None else "numbers"


@dataclass(frozen=True)
class Combination:
    """Runs that are one program.

    Attributes:
      settings: the static values that all have.
      indices: `[N]`, which of all runs they are, ascending.
    """

    settings: dict[str, Any]
    indices: np.ndarray

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings.items())


@dataclass(frozen=True)
class Runs:
    """All runs of a sweep, numbered through.

    Attributes:
      dims: the length of each dimension of the result, in order; runs are numbered with the last
        one fastest.
      coords: by name, the dimensions and the values of what runs differ in, as the result has them.
      columns: by name, `[N, ...]`, the same for every run: what is data of the program.
      combinations: the runs by their static settings.
    """

    dims: dict[str, int]
    coords: dict[str, tuple[tuple[str, ...], np.ndarray]]
    columns: dict[str, np.ndarray]
    combinations: tuple[Combination, ...]

    def __len__(self) -> int:
        return math.prod(self.dims.values())


def runs_of(points: Any, static: Any) -> Runs:
    """The runs that `sweep(points=…, static=…)` speaks of.

    Raises:
      ValueError: points or static settings that are malformed, or points that are there twice.
    """
    dims: dict[str, int] = {}
    coords: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    names: set[str] = set()
    if isinstance(static, Mapping):
        for name, values in static.items():
            names.add(name)
            if np.ndim(values := _listed(name, values)) == 0:
                coords[name] = (), column(name, [values])[0]
                continue
            coords[name] = (name,), axis_values(name, values)
            dims[name] = len(coords[name][1])
    elif static is not None:
        listed = [static] if isinstance(static, str) else static
        if not isinstance(listed, Iterable) or not all(isinstance(name, str) for name in listed):
            raise ValueError(
                f"static must be names of points, or {{name: values}}, got {static!r}; write "
                'static="size"'
            )
        names = set(listed)
    of_points = _of_points(points)
    if both := sorted(set(coords) & set(of_points)):
        raise ValueError(
            f"static and points both name {', '.join(both)}; leave it out of one of them"
        )
    for name, (of, values) in of_points.items():
        coords[name] = of, values
        dims[of[0]] = len(values)
    if unknown := sorted(names - set(coords)):
        raise ValueError(
            f"static must name what points hold, {', '.join(of_points)}, got "
            f"{', '.join(map(repr, unknown))}; pass static={{name: values}} for settings of their "
            "own"
        )
    own = [dim for of, _ in coords.values() for dim in of[1:]]
    taken = {*coords, *dims}
    for dim in own:
        if dim in taken or own.count(dim) > 1:
            raise ValueError(
                f"points must not be called {dim!r}, as an axis of {dim[: dim.rindex('_')]} is; "
                "rename it"
            )
    runs = numbered(dims, coords, names)
    for name, values in runs.columns.items():
        _check_data(name, values)
    return runs


def numbered(dims: dict[str, int], coords: dict, names: set[str]) -> Runs:
    """The runs of these dimensions and coordinates; `names` are the static ones.

    Raises:
      ValueError: a static setting that is no single value.
    """
    shape, order = tuple(dims.values()), list(dims)
    columns: dict[str, np.ndarray] = {}
    for name, (of, values) in coords.items():
        values, axes = np.asarray(values), [order.index(dim) for dim in of if dim in dims]
        spread = [n if i in axes else 1 for i, n in enumerate(shape)]
        further = values.shape[len(axes) :]
        full = np.broadcast_to(values.reshape(*spread, *further), (*shape, *further))
        columns[name] = full.reshape(-1, *further)
    for name in names:
        if columns[name].ndim > 1:
            raise ValueError(
                f"static setting {name} must be one number, bool or string for each run, got shape "
                f"{columns[name].shape[1:]}; number its values"
            )
    data = {name: values for name, values in columns.items() if name not in names}
    return Runs(dims, coords, data, _combinations(columns, [n for n in coords if n in names]))


def _of_points(points: Any) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """By name, dimensions and values: an axis each, or all along `run`."""
    if isinstance(points, Points):
        return {name: ((name,), values) for name, values in points.axes.items()}
    if not isinstance(points, Mapping) or not points:
        raise ValueError(
            f"points must be jbptt.grid(…) or a dict of arrays [N, ...], got {points!r}; write "
            "grid(learning_rate=[0.1, 0.01], seed=range(8))"
        )
    columns = {name: column(name, values) for name, values in points.items()}
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(
            f"points must be arrays of one length, got {said}; for all combinations write grid(…)"
        )
    rows: dict[tuple, int] = {}
    for i in range(next(iter(lengths.values()))):
        row = tuple(values[i].tobytes() for values in columns.values())
        if row in rows:
            raise ValueError(
                f"points {rows[row]} and {i} are the same; leave one out, or tell them apart by a "
                "column seed"
            )
        rows[row] = i
    return {
        name: (("run", *[f"{name}_{i}" for i in range(values.ndim - 1)]), values)
        for name, values in columns.items()
    }


def _check_data(name: str, values: np.ndarray) -> None:
    """A ValueError unless JAX takes the values as data without changing them beyond rounding."""
    if values.dtype.kind == "U":
        raise ValueError(
            f"{name} holds strings, which cannot be data of a program; name it in static"
        )
    dtype = jax.dtypes.canonicalize_dtype(values.dtype)
    if dtype.kind in "iu" and not np.array_equal(values.astype(dtype), values):
        raise ValueError(
            f"{name} must fit {dtype.name}, got values from {values.min()} to {values.max()}; use "
            "smaller numbers, or switch on jax_enable_x64"
        )
    with np.errstate(over="ignore"):
        beyond = dtype.kind == "f" and np.isinf(values.astype(dtype)).sum() > np.isinf(values).sum()
    if beyond:
        raise ValueError(
            f"{name} must fit {dtype.name}, got {np.abs(values[np.isfinite(values)]).max():g}; use "
            "smaller numbers, or switch on jax_enable_x64"
        )


def _combinations(columns: dict[str, np.ndarray], names: list[str]) -> tuple[Combination, ...]:
    """The runs of each combination of static settings, in the order in which they first occur."""
    of_run = list(zip(*(columns[name].tolist() for name in names), strict=True))
    if not names:
        number = len(next(iter(columns.values())))
        return (Combination({}, np.arange(number)),)
    found: dict[tuple, list[int]] = {}
    for i, settings in enumerate(of_run):
        found.setdefault(settings, []).append(i)
    return tuple(
        Combination(dict(zip(names, settings, strict=True)), np.array(indices))
        for settings, indices in found.items()
    )
