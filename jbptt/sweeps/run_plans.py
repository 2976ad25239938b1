"""How the runs of one program are computed: how many side by side, on how many devices."""

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from jbptt.memory import usual_memory
from jbptt.sweeps.programs import (
    Job,
    Program,
    column_shapes,
    key_of,
    known_widths,
    program_of,
)

FIRST_WIDTH = 32
GROWTH = 4
WIDEST = 2**14
WORTH = 4.0
"""Another width is tried where what is left takes so many times as long as compiling did."""
SECONDS = 5.0
"""A chunk takes about so long: what a kill loses, and what one waits for after Ctrl-C."""
CALLS_AHEAD = 2
"""So many calls are under way: the device computes the next while one is taken."""
CHUNK_BYTES = 2**26
"""The outputs of a chunk hold at most so much."""


class RunPlan(NamedTuple):
    """How the runs of one combination of static settings are computed.

    Attributes:
      width: runs side by side on each device, under vmap; 1: one after the other.
      chunk: runs that are computed, kept and handed to a worker together.
      num_devices: how many have `width` runs in every call.
    """

    width: int
    chunk: int
    num_devices: int = 1

    def __str__(self) -> str:
        side = "one after the other" if self.width == 1 else f"{self.width} side by side"
        where = "" if self.num_devices == 1 else f" on each of {self.num_devices} devices"
        return f"{side}{where}, in chunks of {self.chunk}"

    def told(self, widths: set[int]) -> str:
        """The plan, and what other widths some chunks were computed with."""
        others = ", ".join(map(str, sorted(widths - {self.width})))
        return f"{self} (some of them {others} side by side)" if others else str(self)


class Limits(NamedTuple):
    """What a plan may not exceed.

    Attributes:
      memory_budget: bytes on one device, beside the data; None: half of the host's memory, 0.8 of
        a device's.
      most_per_chunk: runs.
      run_bytes: what one run's outputs take.
      width, chunk: those of the plan, where they were asked for.
    """

    memory_budget: float | None
    most_per_chunk: int
    run_bytes: int
    width: int | None = None
    chunk: int | None = None


class Measured(NamedTuple):
    """One width: seconds of a run and of compiling, and the outputs of the first runs."""

    width: int
    seconds: float
    compiling: float
    outputs: dict[str, np.ndarray]


def find_plan(
    run_fn: Callable,
    job: Job,
    indices: np.ndarray,
    columns: dict[str, np.ndarray],
    devices: tuple | None,
    limits: Limits,
) -> tuple[RunPlan, dict[str, np.ndarray]]:
    """The plan for these runs, and the outputs of the first of them, computed under it.

    A few side by side are measured on the first runs. Then more, then one after the other, where
    compiling is little beside what is left to compute. Of two equally fast ones noise decides. A
    program that an earlier sweep of `run_fn` left takes all runs, places without a run included,
    where that takes less time than compiling it did.
    """
    num_runs, num_devices = len(indices), len(devices or (None,))
    share = -(-num_runs // num_devices)
    most = min(limits.most_per_chunk, limits.chunk or num_runs)
    widest = min(share, max(1, most // num_devices), WIDEST)
    what = run_fn, job, column_shapes(columns)
    known = known_widths(*what, devices)

    def measure(width: int) -> Measured:
        program = _that_fits(run_fn, job, columns, width, devices, limits)
        own = slice(0, min(program.num_runs, num_runs))
        first = indices[own], {name: values[own] for name, values in columns.items()}
        width, seconds, outputs = _timed(
            run_fn, job, program.num_runs // num_devices, first, devices
        )
        known[width] = seconds * min(len(first[0]), width * num_devices)
        return Measured(width, seconds, program.compiling, outputs)

    def evened(width: int) -> int:
        """A little less, so that the last call is not half empty."""
        return -(-share // -(-share // width))

    def known_width() -> int | None:
        """Of the widths that were measured the fastest, where no other is worth compiling."""
        if limits.chunk is not None or limits.most_per_chunk < num_runs or not known:
            return None
        seconds, width = min(
            (-(-share // width) * of_call, width) for width, of_call in known.items()
        )
        return width if seconds <= program_of(*what, width, devices).compiling else None

    def pays(best: Measured) -> bool:
        return best.seconds * num_runs > WORTH * best.compiling

    asked = limits.width or known_width()
    if asked is not None:
        best = measure(asked)
    else:
        best = first = measure(evened(min(FIRST_WIDTH, widest)))
        while best.width < widest and pays(best):
            other = measure(evened(min(GROWTH * best.width, widest)))
            if other.width <= best.width or other.seconds >= best.seconds:
                break
            best = other
        if best is first and first.width > 1 and pays(best):
            best = min(best, measure(1), key=lambda measured: measured.seconds)
    if limits.chunk is not None:
        return RunPlan(best.width, limits.chunk, num_devices), best.outputs
    per_call = best.width * num_devices
    most = min(limits.most_per_chunk, CHUNK_BYTES // max(limits.run_bytes, 1)) // per_call
    calls = min(SECONDS / (best.seconds * per_call), most, -(-num_runs // per_call))
    return RunPlan(best.width, max(1, int(calls)) * per_call, num_devices), best.outputs


def compute(
    run_fn: Callable,
    job: Job,
    plan: RunPlan,
    indices: np.ndarray,
    columns: dict[str, np.ndarray],
    devices: tuple | None,
) -> tuple[dict[str, np.ndarray], int]:
    """The outputs of these runs, `[n, ...]` by name, and the width that they were computed with.

    That is the plan's, or half of it as often as the device has not enough memory.
    """
    shapes, width, key = column_shapes(columns), plan.width, key_of(job)
    pieces: list[dict[str, np.ndarray]] = []
    calls: deque[tuple[slice, list[dict]]] = deque()  # begun, not taken
    at = 0
    while at < len(indices) or calls:
        try:
            while at < len(indices) and len(calls) < CALLS_AHEAD:
                program = program_of(run_fn, job, shapes, width, devices)
                own = slice(at, min(at + program.num_runs, len(indices)))
                data = {name: values[own] for name, values in columns.items()}
                calls.append((own, program.start(key, indices[own], data)))
                at = own.stop
            own, outputs = calls[0]
            taken = [{name: np.asarray(v) for name, v in share.items()} for share in outputs]
            pieces.append(
                {
                    name: np.concatenate([share[name] for share in taken])[: own.stop - own.start]
                    for name in taken[0]
                }
            )
            calls.popleft()
        except jax.errors.JaxRuntimeError as error:
            width = _half(width, error)
            at = calls[0][0].start if calls else at
            calls.clear()
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}, width


def _half(width: int, error: Exception) -> int:
    """Half the width where the device was out of memory; else the error again."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    if width == 1:
        raise MemoryError(
            "a single run takes more memory than the device has; make the model, the batch or the "
            "sequence smaller, or take a plan with shorter segments"
        ) from error
    return -(-width // 2)


def _timed(
    run_fn: Callable, job: Job, width: int, data: tuple, devices: tuple | None
) -> tuple[int, float, dict[str, np.ndarray]]:
    """The width that fits, seconds of a run, and the outputs; what is short is done again."""
    seconds: list[float] = []
    outputs: dict[str, np.ndarray] = {}
    most = 5 if jax.process_count() == 1 else 1  # else all processes must call it as often
    while not seconds or (sum(seconds) < 0.1 and len(seconds) < most):
        began = time.perf_counter()
        outputs, used = compute(run_fn, job, RunPlan(width, 0), data[0], data[1], devices)
        if used == width:
            seconds.append(time.perf_counter() - began)
        width = used  # the device was out of memory, and one call of this does not count
    return width, min(seconds) / len(data[0]), outputs


def _that_fits(
    run_fn: Callable,
    job: Job,
    columns: dict[str, np.ndarray],
    width: int,
    devices: tuple | None,
    limits: Limits,
) -> Program:
    """The program of this width, or of the widest that needs no more than the budget, by XLA's
    count.
    """
    budget = usual_memory() if limits.memory_budget is None else limits.memory_budget
    while True:
        program = program_of(run_fn, job, column_shapes(columns), width, devices)
        needed = CALLS_AHEAD * (program.temporary_bytes + width * limits.run_bytes)
        if not needed > budget:  # NaN where the backend does not tell
            return program
        if width == 1:
            raise ValueError(
                f"memory_budget must be at least {needed:.3g} bytes, which two runs take, got "
                f"{budget:.3g}; allow more, or make the model, the batch or the sequence smaller"
            )
        width = max(1, min(width - 1, int(width * budget / needed)))
