"""Chunks of runs, computed here or by the workers of an executor, until all are done."""

import concurrent.futures as futures
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jbptt.sweeps import workers
from jbptt.sweeps.points import Runs
from jbptt.sweeps.programs import Job, number_settings
from jbptt.sweeps.run_plans import Limits, RunPlan, compute, find_plan

MOST_PENDING = 64
"""Chunks that an executor has at a time."""
MOST_LOST = 3
"""Workers that may be lost in a row, no chunk finished in between."""


class Chunk(NamedTuple):
    """Runs `start` to `stop` of a combination of static settings.

    Attributes:
      number: of the combination.
      plan: None: whoever takes the chunk finds the plan, and computes the first runs by that.
      begun: outputs of its first runs.
    """

    number: int
    start: int
    stop: int
    plan: RunPlan | None = None
    begun: dict[str, np.ndarray] | None = None


class Planned(NamedTuple):
    """The plan of a combination was found."""

    number: int
    plan: RunPlan


class Finished(NamedTuple):
    """The outputs of a chunk, and the width that it was computed with."""

    chunk: Chunk
    outputs: dict[str, np.ndarray]
    width: int


class Here:
    """The executor of this process: a call ends when its work is done."""

    def submit(self, work: Callable, *arguments: Any) -> futures.Future:
        """A future that is done."""
        future: futures.Future = futures.Future()
        try:
            future.set_result(work(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, **_: Any) -> None:
        """Nothing is left running."""


class Workplace(NamedTuple):
    """Who computes, and of what.

    Attributes:
      run_fn: the user's function.
      runs: all.
      jobs: of each combination.
      devices: of this process, over which a call is divided; None: the default device.
      limits: of the plans.
      executor: an executor, a function that makes one, or None: this process.
    """

    run_fn: Callable
    runs: Runs
    jobs: tuple[Job, ...]
    devices: tuple | None
    limits: Limits
    executor: Any = None


def chunks_of(
    number: int, length: int, plan: RunPlan, begun: dict[str, np.ndarray] | None = None
) -> list[Chunk]:
    """The runs of a combination, in chunks; `begun`: outputs of the first of them."""
    done = 0 if begun is None else len(next(iter(begun.values())))
    chunks = []
    for start in range(0, length, plan.chunk):
        own = slice(start, min(start + plan.chunk, length))
        first = (
            {of: values[own] for of, values in begun.items()} if begun and start < done else None
        )
        chunks.append(Chunk(number, own.start, own.stop, plan, first))
    return chunks


def computed(place: Workplace, chunks: Iterable[Chunk]) -> Iterator[Planned | Finished]:
    """All of these chunks, as they are finished, and the plans where none were known.

    A chunk of a lost worker is done again, by a new executor where `place.executor` makes them.

    Raises:
      RuntimeError: workers were lost, and no more are to be had, or three were lost in a row.
      MemoryError: the device has too little memory for one run.
    """
    queue, pending, lost = deque(chunks), {}, 0
    here = place.executor is None
    made = not here and (isinstance(place.executor, type) or not hasattr(place.executor, "submit"))
    payload = () if here else (workers.packed(place.run_fn), number_settings())
    most = 1 if here else MOST_PENDING
    executor: Any = Here() if here else _made(place.executor) if made else place.executor
    broken: Exception | None = None
    try:
        while queue or pending:
            while queue and len(pending) < most and broken is None:
                chunk = queue.popleft()
                pending[_submitted(place, executor, payload, chunk)] = chunk
            for future in _first_done(pending):
                chunk = pending.pop(future)
                try:
                    result = future.result()
                except Exception as error:
                    if not _is_lost(error):
                        error.add_note(f"jbptt.sweep: in {_words(place.runs, chunk)}")
                        raise
                    queue.appendleft(chunk)
                    if isinstance(error, futures.BrokenExecutor):
                        broken = error  # what was done before is taken first
                        continue
                    lost += 1
                    if lost == MOST_LOST:
                        raise RuntimeError(_of_lost(place.runs, chunk, True)) from error
                    continue
                lost = 0
                if chunk.plan is None:
                    plan, begun = result
                    yield Planned(chunk.number, plan)
                    queue.extendleft(reversed(chunks_of(chunk.number, chunk.stop, plan, begun)))
                    continue
                outputs, width = result
                yield Finished(chunk, _joined(chunk.begun, outputs), width)
                if width < chunk.plan.width:
                    queue = deque(_narrowed(queued, chunk.number, width) for queued in queue)
            if broken is not None and not pending:
                lost += 1
                if lost == MOST_LOST or not made:
                    raise RuntimeError(_of_lost(place.runs, queue[0], made)) from broken
                executor.shutdown(wait=False)
                executor, broken = _made(place.executor), None
    finally:
        for future in pending:
            future.cancel()
        if made:
            executor.shutdown(wait=True)


def _made(make: Callable) -> Any:
    """A new executor; a ValueError where it is none."""
    executor = make()
    if not hasattr(executor, "submit"):
        raise ValueError(f"executor must make a concurrent.futures.Executor, got {executor!r}")
    return executor


def _submitted(place: Workplace, executor: Any, payload: tuple, chunk: Chunk) -> Any:
    """A future of the chunk's plan and first outputs, or of its outputs and their width."""
    begun = 0 if chunk.begun is None else len(next(iter(chunk.begun.values())))
    own = slice(min(chunk.start + begun, chunk.stop), chunk.stop)
    indices = place.runs.combinations[chunk.number].indices[own]
    if not len(indices):  # all of it was computed while the plan was looked for
        future: futures.Future = futures.Future()
        future.set_result(({}, chunk.plan.width if chunk.plan else 1))
        return future
    columns = {name: values[indices] for name, values in place.runs.columns.items()}
    job, rest = place.jobs[chunk.number], (place.devices,)
    work = (find_plan, job, indices, columns, *rest, place.limits)
    if chunk.plan is not None:
        work = (compute, job, chunk.plan, indices, columns, *rest)
    function, *arguments = work
    if not payload:
        return executor.submit(function, place.run_fn, *arguments)
    try:
        return executor.submit(workers.in_worker, *payload, function, *arguments)
    except futures.BrokenExecutor as error:  # it broke before
        future = futures.Future()
        future.set_exception(error)
        return future


def _first_done(pending: dict) -> list:
    """Those that are done, one at least; also of engines whose futures are of their own kind."""
    if all(isinstance(future, futures.Future) for future in pending):
        return list(futures.wait(pending, return_when=futures.FIRST_COMPLETED).done)
    while not (done := [future for future in pending if future.done()]):
        time.sleep(0.05)
    return done


def _joined(begun: dict | None, outputs: dict) -> dict[str, np.ndarray]:
    if begun is None or not outputs:
        return outputs if begun is None else begun
    return {name: np.concatenate([begun[name], outputs[name]]) for name in outputs}


def _narrowed(chunk: Chunk, number: int, width: int) -> Chunk:
    """With at most so many runs side by side, where it belongs to this combination."""
    if chunk.number != number or chunk.plan is None or chunk.plan.width <= width:
        return chunk
    return chunk._replace(plan=chunk.plan._replace(width=width))


def _is_lost(error: Exception) -> bool:
    """Whether the worker went, not the function."""
    return isinstance(error, futures.BrokenExecutor) or type(error).__name__ in (
        "KilledWorker",  # Dask's, after it tried several workers itself
        "UncompletedJobError",  # submitit's
    )


def _words(runs: Runs, chunk: Chunk) -> str:
    """Which runs a chunk holds."""
    combination = runs.combinations[chunk.number]
    numbers = combination.indices[chunk.start : chunk.stop]
    of = f" of {combination}" if combination.settings else ""
    return f"runs {numbers[0]} to {numbers[-1]}{of}"


def _of_lost(runs: Runs, chunk: Chunk, again: bool) -> str:
    what = f"the executor's workers were lost while they computed {_words(runs, chunk)}"
    if again:
        return f"{what}, {MOST_LOST} times in a row; they may need more memory than there is"
    return (
        f"{what}, and it takes no more work; pass a function that makes an executor, as "
        "executor=lambda: ProcessPoolExecutor(…), so that a new one is made, or call again with a "
        "new one: what a store has is kept"
    )
