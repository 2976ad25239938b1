"""A learning study where the truth is known: a task that needs 30 steps, and one without memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("icechunk")

SCRIPT = Path(__file__).parent / "learning_answers.py"
REPETITIONS = 20 if os.environ.get("JBPTT_FULL") == "1" else 2


def answers(task):
    """Of a process of its own, in which XLA optimises and numbers are single."""
    environment = {n: v for n, v in os.environ.items() if not n.startswith("JAX_")}
    command = [sys.executable, str(SCRIPT), task, "0", str(REPETITIONS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300 * REPETITIONS)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.more("test_command_own::test_a_report_on_a_model_of_ones_own")
def test_a_task_that_needs_30_steps_gets_a_window_that_reaches_it():
    """Blocks of 4 and 16 never see a sign and its question together; full BPTT and blocks of 40 do."""
    found = answers("latch")
    assert sum(answer["choice"] in ("full BPTT", "blocks of 40") for answer in found) >= 0.9 * REPETITIONS, found


@pytest.mark.more("test_command_own::test_a_report_on_a_model_of_ones_own")
def test_a_task_without_memory_is_a_tie():
    found = answers("memoryless")
    assert all(answer["learned"] for answer in found)
    assert sum(answer["tie"] for answer in found) >= 0.9 * REPETITIONS, found
