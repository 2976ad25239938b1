"""The outputs of all runs, and the dataset that they become."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbptt.datasets import dataset
from jbptt.sweeps.points import RESERVED, Runs


def output_dims(
    dims: Mapping[str, Sequence[str]] | None, runs: Runs, shapes: Mapping[str, Any]
) -> dict[str, tuple[str, ...]]:
    """The names of each output's own axes; `loss_0`, `loss_1` where none were given.

    Raises:
      ValueError: names for an unknown output, too few or too many, names of the runs' dimensions,
        or a name of axes of different lengths.
    """
    given = {} if dims is None else dims
    if not isinstance(given, Mapping):
        raise ValueError(f'dims must be as {{"loss": ("step",)}}, got {dims!r}')
    if unknown := sorted(set(given) - set(shapes)):
        raise ValueError(
            f"dims must name outputs of run_fn, {', '.join(shapes)}, got {', '.join(unknown)}"
        )
    of_points = {*RESERVED, *runs.dims, *runs.coords}
    of_points |= {dim for of, _ in runs.coords.values() for dim in of}
    found: dict[str, tuple[str, ...]] = {}
    lengths: dict[str, tuple[int, str]] = {}
    for name, shape in shapes.items():
        if name in of_points:
            raise ValueError(
                f"run_fn must not return {name!r}, which points hold already; rename the output"
            )
        own = given.get(name, tuple(f"{name}_{i}" for i in range(len(shape.shape))))
        own = (own,) if isinstance(own, str) else own
        if not isinstance(own, tuple | list) or not all(isinstance(dim, str) for dim in own):
            raise ValueError(f"dims of {name} must be names of its axes, got {own!r}")
        own = tuple(own)
        if len(own) != len(shape.shape) or len(set(own)) < len(own):
            raise ValueError(
                f"dims of {name} must name {len(shape.shape)} different axes, of lengths "
                f"{shape.shape}, got {own}"
            )
        for dim, length in zip(own, shape.shape, strict=True):
            if dim in of_points or dim in shapes:
                raise ValueError(
                    f"dims of {name} must not be called {dim!r}, as points or an output are; "
                    "choose another name"
                )
            before, of = lengths.setdefault(dim, (length, name))
            if before != length:
                raise ValueError(
                    f"dims must give axes of different lengths different names, got {dim!r} for "
                    f"{of} ({before}) and {name} ({length})"
                )
        found[name] = own
    return found


class Results:
    """The outputs of all runs by name, `[N, ...]`, and which runs are finished, `[N]`.

    Half precision is widened to float32, which files and xarray know.
    """

    def __init__(self, runs: Runs, shapes: Mapping[str, jax.ShapeDtypeStruct], dims: dict):
        self.runs, self.dims = runs, dims
        self.arrays = {
            name: np.zeros((len(runs), *shape.shape), kept_dtype(shape.dtype))
            for name, shape in shapes.items()
        }
        self.finished = np.zeros(len(runs), bool)

    def put(self, indices: np.ndarray, outputs: Mapping[str, np.ndarray]) -> None:
        """The outputs of these runs, which are finished by that."""
        for name, values in outputs.items():
            self.arrays[name][indices] = values
        self.finished[indices] = True

    def dataset(self, plans: Mapping[int, Any], widths: Mapping[int, set[int]]) -> Any:
        """An `xarray.Dataset`; the numbers of runs that are not finished are NaN, 0 or False.

        Coordinates `finite` (whether all outputs of a run are) and, where a run is missing,
        `finished` stand beside those of the points. `attrs["plan"]` says how each combination of
        static settings was computed, once where all were alike.

        Args:
          plans: by combination.
          widths: what chunks were computed with, by combination.
        """
        shape, of_runs = tuple(self.runs.dims.values()), tuple(self.runs.dims)
        finite = np.ones(len(self.runs), bool)
        variables: dict[str, Any] = {}
        for name, values in self.arrays.items():
            if values.dtype.kind in "fc":
                finite &= np.isfinite(values).reshape(len(values), -1).all(1)
                values[~self.finished] = np.nan
            variables[name] = (
                (*of_runs, *self.dims[name]),
                values.reshape(*shape, *values.shape[1:]),
            )
        coords: dict[str, Any] = dict(self.runs.coords)
        coords["finite"] = of_runs, finite.reshape(shape)
        if not self.finished.all():
            coords["finished"] = of_runs, self.finished.reshape(shape)
        words = {
            str(self.runs.combinations[number]): plan.told(widths.get(number, set()))
            for number, plan in plans.items()
        }
        if len(set(words.values())) == 1:
            words = {"": next(iter(words.values()))}
        said = "; ".join(f"{of}: {plan}" if of else plan for of, plan in sorted(words.items()))
        return dataset(variables, coords=coords, attrs={"plan": said} if said else {})


def kept_dtype(dtype: Any) -> np.dtype:
    """What NumPy, files and xarray have for it: float32 for half precision, int8 for less."""
    if jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits < 8:
        return np.dtype(np.uint8 if jnp.issubdtype(dtype, jnp.unsignedinteger) else np.int8)
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
        return np.dtype(np.float32)
    return np.dtype(dtype)
