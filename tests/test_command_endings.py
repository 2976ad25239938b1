"""How the command ends when it does not come to its end: Ctrl-C, a reader that has gone."""

import signal
import subprocess
import sys
import threading
import time

import pytest
from problems import usual_rows

pytest.importorskip("tyro")

MODEL = """
import jax, jax.numpy as jnp, jbptt

cell = jbptt.cells.with_linear_readout(jbptt.cells.lstm(8, 32), 4)


def problem():
    print("go", flush=True)
    batch = jbptt.Batch(jnp.ones((300, 16, 8)), jnp.ones((300, 16, 4)))
    return cell.step, jbptt.tasks.squared_error, cell.init(jax.random.key(0)), cell.initial_carry((16,)), batch
"""


def interrupted(arguments, folder, *, after, seconds):
    """What a process wrote and returned, and how long it took, that is interrupted so long after a line of output."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background inherits "ignore"
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1,
    )  # fmt: skip
    signal.signal(signal.SIGINT, before)
    deadline = threading.Timer(300, process.kill)
    deadline.start()
    lines = []
    while not lines or after not in lines[-1]:
        lines.append(process.stdout.readline())
        assert lines[-1], f"ended before {after!r}: {lines}"
    time.sleep(seconds)
    assert process.poll() is None, "ended before it was interrupted"
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    lines += process.communicate()[0].splitlines(keepends=True)
    deadline.cancel()
    return lines, process.returncode, time.monotonic() - start


# How the report and the comparison end is how the diagnosis does, later in a longer run.
CASES = [
    (
        ["diagnose", "model.py:problem"],
        "go",
        2.0,
        "the diagnosis of model.py:problem was stopped before it was finished",
    ),
    (["compare", "--task=copy", "--out=new"], "train:", 2.0, "the comparison was stopped before"),
    (["report", "--quick", "--out=new"], "train", 2.0, "the report was stopped before it was finished"),
]
NAMES = ["diagnose", "compare", "report"]


@pytest.mark.parametrize(("arguments", "after", "seconds", "words"), usual_rows(CASES[:1], CASES), ids=NAMES)
def test_ctrl_c_ends_at_once_and_says_what_was_stopped(arguments, after, seconds, words, tmp_path):
    (tmp_path / "model.py").write_text(MODEL)
    found = interrupted(["-m", "jbptt", *arguments], tmp_path, after=after, seconds=seconds)
    lines, status, took = found
    assert status == 130 and took < 2, found
    assert lines[-1].startswith(f"jbptt: {words}") and not any("Traceback" in line for line in lines), found
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["model.py"]


STUBBORN = """
import time

print("go", flush=True)
while True:
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        pass
"""
FINALIZER = """
import time


class Finalizer:
    def __del__(self):
        print("go", flush=True)
        time.sleep(60)


Finalizer()
time.sleep(60)
"""
MEASURING = """
import jbptt, model

step, loss, *rest = model.problem()
windows = [jbptt.truncated_bptt(step, loss, window=window, stride=1) for window in (8, 16, 24, 32)]
jbptt.measure_cost(dict(enumerate(windows)), *rest, num_repeats=1000)
"""


@pytest.mark.more("test_ctrl_c_ends_at_once_and_says_what_was_stopped")
@pytest.mark.parametrize(
    ("work", "seconds"),
    [(STUBBORN, 0.1), (FINALIZER, 0.1), (MEASURING, 1.5)],
    ids=["stubborn", "finalizer", "measuring"],
)
def test_what_does_not_heed_ctrl_c_is_ended_too(work, seconds, tmp_path):
    """Code that swallows it; programs that are compiled on threads, for which the main thread waits."""
    (tmp_path / "model.py").write_text(MODEL)
    lines = ["from jbptt.report import interruption", "with interruption.ends_this_process():"]
    lines += [
        "    with interruption.unfinished('work was stopped'):",
        *(f"        {line}" for line in work.splitlines()),
    ]
    found = interrupted(["-c", "\n".join(lines)], tmp_path, after="go", seconds=seconds)
    lines, status, took = found
    assert status == 130 and took < 2 and lines == ["go\n", "jbptt: work was stopped\n"], found


@pytest.mark.parametrize("arguments", ["report --help", "--version"])
def test_a_reader_that_has_gone_ends_the_command_in_silence(arguments, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "jbptt", *arguments.split()],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=300) == 141
