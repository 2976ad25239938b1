"""Progress on standard error: a bar with the time left on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Any


class ProgressDisplay:
    """A bar with what runs now and how long is left; plain lines where standard error is not a
    terminal.

    A context manager, called with what runs and the fraction of the whole that is done. Needs rich.

    Args:
      began: when it all began, by `time.monotonic`; None: now.
    """

    def __init__(self, began: float | None = None):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            _time_left_column(),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task("start", total=1.0, asked=time.monotonic(), left=None)
        self._start = time.monotonic() if began is None else began
        self._last = ""

    @property
    def is_terminal(self) -> bool:
        """Whether standard error is one."""
        return self._console.is_terminal

    def __enter__(self) -> "ProgressDisplay":
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def __call__(self, what: str, fraction: float) -> None:
        """Shows that `what` runs now and that `fraction` of everything is done."""
        now = time.monotonic()
        left = (now - self._start) * (1 - fraction) / fraction if fraction > 0 else None
        if self._console.is_terminal:
            self._progress.update(
                self._task, description=what, completed=fraction, asked=now, left=left
            )
        elif what != self._last:
            remaining = "" if left is None else f", {_clock(left)} left"
            print(f"{fraction:4.0%}  {what}{remaining}", file=sys.stderr, flush=True)
        self._last = what


def _time_left_column() -> Any:
    """Time left at the pace so far, counting down between two reports."""
    from rich.progress import ProgressColumn, Task
    from rich.text import Text

    class TimeLeft(ProgressColumn):
        """`0:42 left`."""

        def render(self, task: Task) -> Text:
            left = task.fields["left"]
            if left is None:
                return Text("time left: –")
            return Text(
                f"{_clock(max(0.0, left - (time.monotonic() - task.fields['asked'])))} left"
            )

    return TimeLeft()


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
