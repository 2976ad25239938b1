"""What an update of each estimator costs on this machine, in time and in memory."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbptt import validation
from jbptt.datasets import dataset, variables
from jbptt.executables import compiled
from jbptt.types import Batch, Carry, Estimate, Estimator, Params


class Cost(NamedTuple):
    """Time and memory of one update of each estimator, and the size of its state.

    Attributes:
      names: the estimators, in order.
      seconds: `[estimator, repeat]`, wall time of one compiled update.
      temporary_bytes: `[estimator]`, what the compiled update needs beside its arguments and
        results (XLA's `memory_analysis`), exact and free of timing noise; NaN where the backend
        does not tell.
      state_bytes: `[estimator]`, what is carried from update to update: the carry, and beside it a
        history, an influence or a key.
    """

    names: tuple[str, ...]
    seconds: np.ndarray
    temporary_bytes: np.ndarray
    state_bytes: np.ndarray

    @property
    def median_seconds(self) -> np.ndarray:
        """`[estimator]`, the median over repeats."""
        return np.median(self.seconds, axis=1)

    @property
    def spread_seconds(self) -> np.ndarray:
        """`[estimator]`, half the interquartile range over repeats."""
        low, high = np.quantile(self.seconds, [0.25, 0.75], axis=1)
        return (high - low) / 2

    def to_xarray(self) -> Any:
        """An `xarray.Dataset` over `estimator` and `repeat`; needs xarray."""
        return dataset(*self.variables, coords={"estimator": list(self.names)})

    @property
    def variables(self) -> list[dict]:
        """The arrays with their axes, as datasets hold them."""
        return [
            variables("seconds", self.seconds, "estimator", "repeat"),
            variables("temporary_bytes", self.temporary_bytes, "estimator"),
            variables("state_bytes", self.state_bytes, "estimator"),
        ]

    def __str__(self) -> str:
        times = self.median_seconds, self.spread_seconds
        rows = zip(self.names, *times, self.temporary_bytes, self.state_bytes, strict=True)
        width = max(len(name) for name in self.names)
        return "\n".join(
            f"{name:<{width}}  {1e3 * t:9.2f} ms ± {1e3 * s:.2f}  {size / 2**20:9.2f} MiB"
            f"  {state / 2**20:9.3f} MiB"
            for name, t, s, size, state in rows
        )


def check_estimators(estimators: Any) -> None:
    """A ValueError unless there is one at least."""
    if not estimators:
        raise ValueError("estimators must not be empty, got {}; pass {name: estimator}")


def measure_cost(
    estimators: dict[str, Estimator],
    params: Params,
    carry: Carry,
    batch: Batch,
    *,
    num_repeats: int = 5,
    key: jax.Array | None = None,
) -> Cost:
    """Compiles one update of each estimator and measures its time and memory, on the host.

    `print` shows the time, the temporary memory and the size of the state.

    The estimators take turns within each repeat, so that a machine that slows down slows all of
    them; compilation and a first run are left out.

    Args:
      estimators: by name.
      params: the parameters.
      carry: the initial carry, or a function of the parameters that gives it.
      batch: arrays.
      num_repeats: timed updates of each, ≥ 1.
      key: for estimators that draw; None: `jax.random.key(0)`.

    Raises:
      ValueError: num_repeats < 1, or no estimators; what the estimators raise.
    """
    num_repeats = validation.check_positive_integer("num_repeats", num_repeats)
    check_estimators(estimators)
    key = jax.random.key(0) if key is None else key
    states = {name: e.init(params, carry, batch, key=key) for name, e in estimators.items()}
    lowered = [
        compiled(_estimate, (e.update,)).lower(params, states[name], batch)
        for name, e in estimators.items()
    ]
    # One after the other: a thread that compiles while the interpreter ends takes it down.
    updates = {name: program.compile() for name, program in zip(estimators, lowered, strict=True)}
    seconds = np.zeros((len(updates), num_repeats + 1))
    for repeat in range(num_repeats + 1):
        for i, (name, update) in enumerate(updates.items()):
            start = time.perf_counter()
            jax.block_until_ready(update(params, states[name], batch))
            seconds[i, repeat] = time.perf_counter() - start
    analyses = [update.memory_analysis() for update in updates.values()]  # None on some backends
    sizes = [np.nan if memory is None else memory.temp_size_in_bytes for memory in analyses]
    leaves = (jax.tree.leaves(states[name]) for name in updates)
    of_states = [sum(leaf.nbytes for leaf in map(jnp.asarray, of_one)) for of_one in leaves]
    return Cost(tuple(updates), seconds[:, 1:], np.array(sizes), np.array(of_states))


def _estimate(update, params, state, batch) -> Estimate:
    return update(params, state, batch)[0]
