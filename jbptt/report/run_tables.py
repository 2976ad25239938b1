"""The runs of a sweep's dataset, one row each, and medians of what they gave."""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

REPEATS = "seed"
"""The axis that repeats a run."""
LOSSES = re.compile(
    r"(loss|error)(es|s)?($|[^a-z])|(^|[^a-z])(err|mse|rmse|mae|nll|perplexity|cross_entropy)"
    r"($|[^a-z])"
)


class Output(NamedTuple):
    """What the runs gave under one name.

    Attributes:
      name: of the variable.
      values: `[N]`, or `[N, length]` for an output with one axis of its own.
      own: the name of that axis; "" without one.
      places: `[length]`, where its entries lie; empty without one.
      good: `[N]`, whether a run is finished and all its entries are finite.
    """

    name: str
    values: np.ndarray
    own: str
    places: np.ndarray
    good: np.ndarray

    @property
    def last(self) -> np.ndarray:
        """`[N]`, one number for each run: the last one of an output with an axis of its own."""
        return self.values[:, -1] if self.own else self.values

    @property
    def entry(self) -> str:
        """What `last` is, in words; "" for a plain number."""
        which = [f"last entry, {self.own} {text_of(self.places[-1])}"] if self.own else []
        return "; ".join([*which, *(["1 is true"] if self.values.dtype.kind == "b" else [])])


class Group(NamedTuple):
    """Runs that agree in some axes; numbers are NaN where none of them is finite.

    Attributes:
      at: the values of these axes.
      median: of the runs that are finite, with their lower and upper quartile.
      low: the lower quartile.
      high: the upper one.
      num_runs: all runs of the group.
      num_used: those that the median is of.
      num_unfinished: those that were not computed yet; all others are not finite.
    """

    at: dict[str, Any]
    median: Any
    low: Any
    high: Any
    num_runs: int
    num_used: int
    num_unfinished: int

    @property
    def num_not_finite(self) -> int:
        """Runs that are finished and left out."""
        return self.num_runs - self.num_used - self.num_unfinished


@dataclass(frozen=True)
class RunTable:
    """A dataset of `sweep`, run by run.

    Attributes:
      columns: by name, `[N, ...]`, what the runs differ in: the axes of a grid, or the number of
        each run and the columns of plain points.
      fixed: what all runs have in common.
      finished: `[N]`.
      finite: `[N]`, whether all outputs of a run are.
      is_grid: whether the runs are all combinations of axes.
      plan: how they were computed.
      outputs: by name, losses and errors first.
      left_out: outputs that are no numbers or have more axes of their own, and why.
    """

    columns: dict[str, np.ndarray]
    fixed: dict[str, Any]
    finished: np.ndarray
    finite: np.ndarray
    is_grid: bool
    plan: str
    outputs: dict[str, Output]
    left_out: dict[str, str]

    @property
    def axes(self) -> list[str]:
        """The names that a picture can go along."""
        return [name for name, values in self.columns.items() if values.ndim == 1]

    def output(self, name: str | None) -> Output:
        """The output of this name; None: the first one.

        Raises:
          ValueError: it is unknown, or no number or history.
        """
        known = ", ".join(self.outputs) or "none that can be shown"
        if name is None and not self.outputs:
            said = "; ".join(f"{of}: {why}" for of, why in self.left_out.items())
            raise ValueError(f"the sweep has no output that can be shown ({said})")
        if name in self.left_out:
            raise ValueError(
                f"variable {name} cannot be shown: {self.left_out[name]}; there are {known}"
            )
        if name is not None and name not in self.outputs:
            raise ValueError(f"variable must be one of {known}, got {name!r}")
        return self.outputs[name] if name is not None else next(iter(self.outputs.values()))


def run_table(dataset: Any) -> RunTable:
    """The runs of what `sweep` or `load_sweep` returned, or of a part of it.

    Raises:
      ValueError: it is no such dataset.
    """
    if "finite" not in getattr(dataset, "coords", ()):
        raise ValueError(
            "dataset must be what jbptt.sweep or load_sweep returns, with its coordinate finite, "
            f"got {type(dataset).__name__}"
        )
    dims, columns, fixed = list(map(str, dataset["finite"].dims)), {}, {}
    for dim in dims:  # xarray numbers an axis without values
        columns[dim] = _by_run(dataset[dim], dims, dataset)
    for name, coord in dataset.coords.items():
        if name in ("finite", "finished", *dims):
            continue
        if not coord.dims:
            fixed[str(name)] = coord.values.item()
        elif set(coord.dims) & set(dims):
            columns[str(name)] = _by_run(coord, dims, dataset)
    finite = _by_run(dataset["finite"], dims, dataset)
    finished = np.ones(len(finite), bool)
    if "finished" in dataset.coords:
        finished = _by_run(dataset["finished"], dims, dataset)
    outputs, left_out = {}, {}
    for name in sorted(dataset.data_vars, key=lambda name: not is_loss(str(name))):
        variable = dataset[name]
        own = [str(dim) for dim in variable.dims if dim not in dims]
        if variable.dtype.kind not in "biuf":
            left_out[str(name)] = f"{variable.dtype} is no real number"
        elif len(own) > 1 or 0 in variable.shape:
            sizes = ", ".join(f"{dim} ({dataset.sizes[dim]})" for dim in own)
            left_out[str(name)] = f"it has the axes {sizes} of its own"
        else:
            values = _by_run(variable, dims, dataset)
            good = finished & np.isfinite(values).reshape(len(values), -1).all(1)
            places = np.asarray(dataset[own[0]].values) if own else np.zeros(0)
            outputs[str(name)] = Output(str(name), values, own[0] if own else "", places, good)
    return RunTable(
        columns,
        fixed,
        finished,
        finite,
        "run" not in dims,
        str(dataset.attrs.get("plan", "")),
        outputs,
        left_out,
    )


def _by_run(array: Any, dims: list[str], dataset: Any) -> np.ndarray:
    """`[N, ...]`: spread over the dimensions of the runs, which come first, as one axis."""
    of_runs = [dim for dim in dims if dim in array.dims]
    array = array.transpose(*of_runs, ...)
    further = array.shape[len(of_runs) :]
    spread = [dataset.sizes[dim] if dim in of_runs else 1 for dim in dims]
    full = [dataset.sizes[dim] for dim in dims]
    values = np.reshape(array.values, (*spread, *further))
    return np.broadcast_to(values, (*full, *further)).reshape((-1, *further))


def is_loss(name: str) -> bool:
    """Whether a name suggests a loss or an error, of which less is better."""
    return LOSSES.search(name.lower()) is not None


def distinct(values: np.ndarray) -> list[Any]:
    """Each value once, in the order in which they first occur."""
    return list(dict.fromkeys(values.tolist()))


def is_numeric(values: np.ndarray) -> bool:
    """Whether the values lie on a scale; bools, strings and infinity do not."""
    return values.dtype.kind in "iuf" and bool(np.isfinite(values).all())


def axes_of(table: RunTable, x: str | None, most: int) -> tuple[str | None, str | None]:
    """The axis that a picture goes along (the one asked for), and the one that has its lines.

    Axes of one value are passed over, as are repeats; what is a number comes first. The second one
    has at most `most` values where there is such an axis; of plain points only then.
    """
    counts = {name: len(distinct(table.columns[name])) for name in table.axes}
    told = [name for name in counts if counts[name] > 1 and name not in (REPEATS, "run")]
    told.sort(key=lambda name: not is_numeric(table.columns[name]))
    first = x or next(iter([*told, *(name for name in (REPEATS, "run") if name in counts)]), None)
    first = first or next(iter(counts), None)
    rest = sorted((name for name in told if name != first), key=lambda n: counts[n] > most)
    rest = [name for name in rest if table.is_grid or counts[name] <= most]
    return first, next(iter(rest), None)


def grouped(table: RunTable, output: Output, values: np.ndarray, names: list[str]) -> list[Group]:
    """The runs by the values of these axes, in order; medians of `values`, `[N]` or `[N, length]`.

    Runs that are not finished or not finite in this output are left out of the medians.
    """
    rows: dict[tuple, list[int]] = {}
    own = [table.columns[name].tolist() for name in names]
    for i, at in enumerate(zip(*own, strict=True) if own else [()] * len(table.finished)):
        rows.setdefault(at, []).append(i)
    found = []
    for at, indices in rows.items():
        used = [i for i in indices if output.good[i]]
        numbers = np.full((3, *values.shape[1:]), np.nan)
        if used:
            numbers = np.quantile(values[used].astype(float), [0.25, 0.5, 0.75], axis=0)
        low, median, high = numbers
        unfinished = int((~table.finished[indices]).sum())
        named = dict(zip(names, at, strict=True))
        found.append(Group(named, median, low, high, len(indices), len(used), unfinished))
    return found


def text_of(value: Any) -> str:
    """A value of an axis, or a number, in a few letters."""
    if isinstance(value, np.generic):
        value = value.item()
    return f"{value:.6g}" if isinstance(value, float) else str(value)
