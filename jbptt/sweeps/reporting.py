"""What a sweep tells on standard error: its plans, how far it is, and the time left."""

import sys
import time
from types import TracebackType

from jbptt.progress import ProgressDisplay
from jbptt.sweeps.points import Runs
from jbptt.sweeps.results import Results
from jbptt.sweeps.run_plans import RunPlan

PATIENCE = 2.0
"""Seconds without a word of progress."""
EVERY = 10.0
"""Seconds between two lines where standard error is no terminal."""


class Reporter:
    """A context manager; silent where nothing is to be shown."""

    def __init__(self, results: Results, runs: Runs, shown: bool):
        self._results, self._runs, self._shown = results, runs, shown
        self._kept = int(results.finished.sum())
        self._display: ProgressDisplay | None = None
        self._began = self._told = time.monotonic()

    def __enter__(self) -> "Reporter":
        if self._shown and self._kept:
            print(f"jbptt: {self.counted()}", file=sys.stderr)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._display is not None:
            self._display.__exit__(kind, error, traceback)

    def plan(self, number: int, plan: RunPlan) -> None:
        """Says how the runs of a combination are computed."""
        if self._shown:
            of = str(self._runs.combinations[number])
            print(f"jbptt: {of and of + ': '}{plan}", file=sys.stderr, flush=True)

    def progress(self) -> None:
        """Says how many runs are done."""
        now, num_runs = time.monotonic(), len(self._runs)
        if not self._shown or now - self._began < PATIENCE:
            return
        if self._display is None:
            self._display = ProgressDisplay(self._began).__enter__()
        elif not self._display.is_terminal and now - self._told < EVERY:
            return
        self._told = now
        new = int(self._results.finished.sum()) - self._kept
        self._display(self.counted(), new / (num_runs - self._kept))

    def counted(self) -> str:
        """`640 of 10,000 runs are done`."""
        return f"{int(self._results.finished.sum()):,} of {len(self._runs):,} runs are done"
