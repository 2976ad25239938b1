"""A line on the terminal while one waits: what is being done, and since when."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 2.0  # seconds without a word


@contextmanager
def waiting(shown: bool | None) -> Iterator[Callable[[str], None]]:
    """Yields `tell(what)`; from two seconds on standard error shows what was told last.

    The line is wiped at the end. Nothing of it remains in a pipe.

    Args:
      shown: None: where standard error is a terminal.
    """
    if not (sys.stderr.isatty() if shown is None else shown):
        yield lambda what: None
        return
    told, ended, began = ["diagnose"], threading.Event(), time.monotonic()

    def show():
        ended.wait(PATIENCE)
        while not ended.is_set():
            line = f"jbptt: {told[0]} ({time.monotonic() - began:.0f} s)"
            sys.stderr.write(f"\r\x1b[2K{line}")
            sys.stderr.flush()
            ended.wait(0.5)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield lambda what: told.__setitem__(0, what)
    finally:
        ended.set()
        thread.join(1.0)
        if time.monotonic() - began > PATIENCE:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
