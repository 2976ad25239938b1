"""Ctrl-C: within two seconds the process ends with status 130, and its last words say what was
stopped.

Python alone cannot do that. It raises KeyboardInterrupt between two of its own steps, so it waits
for whatever XLA compiles or runs; and an interpreter that is taken down while XLA's threads still
run ends in a segmentation fault.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

INTERRUPTED = 130  # what a shell reports of a process that SIGINT ended
SECONDS_TO_TIDY_UP = 1.0
_unfinished: list[str] = []


@contextlib.contextmanager
def unfinished(words: str) -> Iterator[None]:
    """What Ctrl-C would stop while the block runs; KeyboardInterrupt carries these words
    outward.
    """
    _unfinished.append(words)
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(words) from None
    finally:
        _unfinished.pop()


@contextlib.contextmanager
def ends_this_process() -> Iterator[None]:
    """Inside, Ctrl-C ends the process: KeyboardInterrupt first, so that files are tidied up, then
    at once.

    For the main thread of a process that is all ours; elsewhere KeyboardInterrupt is left alone.
    """
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupted = threading.Event()
    sender, receiver = socket.socketpair()
    sender.setblocking(False)

    def interrupt(*_: object) -> NoReturn:
        interrupted.set()
        sys.unraisablehook = lambda _: (
            None
        )  # raised in a finalizer or the collector it is swallowed; the watch goes on
        raise KeyboardInterrupt

    def watch() -> None:
        while received := receiver.recv(1):  # nothing: the other end was closed
            if received[0] == signal.SIGINT:
                words = _unfinished[-1:]
                threading.Event().wait(
                    SECONDS_TO_TIDY_UP
                )  # the main thread is faster wherever it can be
                _end(*words)

    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGINT, interrupt)
    before = signal.set_wakeup_fd(
        sender.fileno(), warn_on_full_buffer=False
    )  # written to even while XLA computes
    words: tuple[str, ...] = ()
    try:
        yield
    except KeyboardInterrupt as stop:
        words = stop.args
        raise
    finally:  # whatever became of the KeyboardInterrupt on its way through other people's code
        if interrupted.is_set():
            _end(*words)
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sender.close()


def last_words(words: str = "stopped") -> str:
    """One line for standard error."""
    return f"jbptt: {words}\n"


def _end(*words: str) -> NoReturn:
    """Without taking the interpreter down, which is not safe while XLA's threads run."""
    with contextlib.suppress(OSError, ValueError):  # a terminal that is gone
        # A progress bar that is cut off stands between print and the terminal, and hides the
        # cursor.
        clean = "\r\x1b[2K\x1b[?25h" if os.isatty(2) else ""
        os.write(2, (clean + last_words(*words)).encode(errors="replace"))
        sys.stdout.flush()
    os._exit(INTERRUPTED)
