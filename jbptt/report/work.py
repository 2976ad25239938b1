"""How much a report does, how far it is, and its jobs side by side."""

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple


class Effort(NamedTuple):
    """How much work a report does.

    Attributes:
      num_updates: in the training of every model that is looked at.
      blocks: steps per block of the ways that learn.
      rates: learning rates that they are first tried with.
      num_seeds: of each way and rate.
      study_updates: of each of these trainings.
      study_evals: evaluations of each of them.
      cost_windows: timed beside the recommended ones.
      cost_tolerances: how many of the recommended windows are timed, beginning with 10 % of error.
      num_repeats: timed updates of each.
      spectrum_steps: of the trajectory behind a Lyapunov spectrum.
      num_exponents: how many of its exponents, the leading ones.
      num_draws: of each random way to cut; 0 leaves the price of randomness out.
      remedies: whether the remedies are compared, which trains some hundred small networks.
    """

    num_updates: int
    blocks: tuple[int, ...]
    rates: tuple[float, ...]
    num_seeds: int
    study_updates: int
    study_evals: int
    cost_windows: tuple[int, ...]
    cost_tolerances: int
    num_repeats: int
    spectrum_steps: int
    num_exponents: int
    num_draws: int
    remedies: bool

    def total_work(self, num_cells: int) -> float:
        """In the units in which the functions of this study report progress: some seconds each."""
        of_the_last = 5 + len(self.cost_windows)
        of_study = STUDY_WORK * len(self.rates) * self.num_seeds
        return num_cells + of_the_last + of_study + 3 + 4 * (self.num_draws > 0) + 8 * self.remedies


STUDY_WORK = 2
"""Units of work of the trainings of one learning rate and seed."""
FULL = Effort(600, (4, 16), (1e-2, 3e-2, 1e-1), 5, 300, 10, (4, 64), 2, 7, 1024, 64, 64, True)
QUICK = Effort(60, (8,), (3e-2, 1e-1), 3, 60, 5, (), 1, 3, 256, 8, 0, False)


class Progress:
    """Counts finished work over threads; raises CancelledError in every thread once one has
    failed.
    """

    def __init__(self, show: Callable[[str, float], None], total: float):
        self._show, self._total, self._done = show, total, 0.0
        self._lock, self.stop = threading.Lock(), threading.Event()

    def __call__(self, what: str, done: float = 0.0) -> None:
        """Says what runs now, and that `done` units of work have been finished before it."""
        if self.stop.is_set():
            raise CancelledError
        with self._lock:
            self._done += done
            self._show(what, min(1.0, self._done / self._total))


def in_parallel(progress: Progress, jobs: list[Callable[[], Any]]) -> list[Any]:
    """The results of all jobs, two at a time: most of the time is compilation, and more threads
    would hinder it.
    """
    pool = ThreadPoolExecutor(2)
    futures = [pool.submit(job) for job in jobs]
    try:
        for future in as_completed(futures):  # the first that fails, not the first in order
            future.result()
    except BaseException as error:
        progress.stop.set()
        # What a job compiles takes seconds, for which Ctrl-C does not wait: it ends the process.
        pool.shutdown(wait=not isinstance(error, KeyboardInterrupt), cancel_futures=True)
        raise
    pool.shutdown()
    return [future.result() for future in futures]


one_at_a_time = threading.Lock()
"""Held while a program with QR decompositions runs: two of them side by side can deadlock XLA's
threads.
"""
