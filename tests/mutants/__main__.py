"""Puts wrong edits into the gradient code, one at a time, and checks that the tests notice each of them.

    python -m tests.mutants [--names a,b] [--sample N] [--seed S] [--jobs J] [--quick] [--trust] [--list]

Every mutant is a copy of the repository with one edit of the tables beside this file, and the
package in its plainest form, without comments (`edits.plain`). The test files that know the edited
module best run on it first; if they all pass, every other test file does. A mutant that passes them
all has survived: it shows a test that is missing. Most die within a minute; a survivor costs a run
of all the tests.
"""

import argparse
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from . import Mutant
from .analyses import ANALYSES
from .core import CORE
from .edits import check_table, mutated, path_of, plain
from .experiments import EXPERIMENTS
from .interop import INTEROP
from .learning import LEARNING
from .online import ONLINE
from .report import REPORT
from .sweeps import SWEEPS

MUTANTS = CORE + ANALYSES + EXPERIMENTS + SWEEPS + LEARNING + ONLINE + INTEROP + REPORT
ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = shutil.ignore_patterns(
    ".*",
    "__pycache__",
    "*.egg-info",
    "build",
    "dist",
    "jbptt-report*",
    "test_mutants.py",  # which notices that an edit was made, whatever it does
)
TIME_LIMIT = 20 * 60  # seconds for one mutant
REQUIRED = 0.95  # the share of mutants that must die
FEWEST_KILLED = 38  # what a run of the whole table must kill at least
PASSED = (0, 5)  # pytest's status; 5: no test ran, as all need a package that is not installed

# Loaded by pytest from the copy: a run that imports another jbptt says nothing.
GUARD = """
from pathlib import Path


def pytest_collection_finish(session):
    import jbptt

    home = Path(__file__).parent
    assert Path(jbptt.__file__).is_relative_to(home), f"imported {jbptt.__file__}, wanted the copy in {home}"
"""


class Run(NamedTuple):
    """One run of pytest: its exit status (None: out of time) and the first test that failed."""

    status: int | None
    first_failure: str
    output: str


class Verdict(NamedTuple):
    """What became of a mutant: `outcome` is killed, timeout, broken or survived."""

    name: str
    outcome: str
    killer: str
    seconds: float


def run_tests(home: Path, files: list[str], limit: float) -> Run:
    """Runs test files of the copy in `home` until the first failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-o", "addopts=", "--tb=line", "-p", "no:cacheprovider"]
    command += ["-p", "mutant_guard", *(f"tests/{name}.py" for name in files)]
    environment = {**os.environ, "PYTHONPATH": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        command,
        cwd=home,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that what a test starts ends with it
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return Run(None, "", process.communicate()[0])
    failed = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    first = failed[0].split(" - ")[0] if failed else ""
    return Run(process.returncode, first, output)


def copy_of(clean: Path, folder: str) -> Path:
    """A copy of the repository to run tests in."""
    home = Path(folder).resolve() / "copy"
    shutil.copytree(clean, home)
    (home / "mutant_guard.py").write_text(GUARD)
    return home


def test_names(root: Path) -> list[str]:
    """All test modules."""
    return sorted(path.stem for path in (root / "tests").glob("test_*.py"))


def check_clean(clean: Path, files: list[str], jobs: int) -> list[str]:
    """Runs the tests without any edit; returns the outputs of those that fail."""

    def run(name: str) -> str:
        with tempfile.TemporaryDirectory(prefix="clean-") as folder:
            start = time.monotonic()
            result = run_tests(copy_of(clean, folder), [name], TIME_LIMIT)
            print(f"  {name}: status {result.status}, {time.monotonic() - start:.0f} s", flush=True)
            return "" if result.status in PASSED else f"{name} fails without any edit:\n{result.output[-3000:]}"

    with ThreadPoolExecutor(jobs) as pool:
        return [text for text in pool.map(run, files) if text]


def try_mutant(clean: Path, mutant: Mutant, quick: bool) -> Verdict:
    """Runs the closest tests on a mutant, then all others."""
    start = time.monotonic()
    closest = list(mutant.room.closest)
    others = [] if quick else [name for name in test_names(clean) if name not in closest]
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        home = copy_of(clean, folder)
        path = path_of(home, mutant.room)
        path.write_text(mutated(path.read_text(), mutant))
        outcome, killer = "survived", ""
        for files in filter(None, (closest, others)):
            run = run_tests(home, files, TIME_LIMIT - (time.monotonic() - start))
            outcome, killer = judge(mutant, run)
            if outcome != "survived":
                break
    verdict = Verdict(mutant.name, outcome, killer, time.monotonic() - start)
    print(line_of(verdict), flush=True)
    return verdict


def judge(mutant: Mutant, run: Run) -> tuple[str, str]:
    """The outcome of one run and the test that decided it."""
    if run.status is None:
        return "timeout", ""
    if run.status in PASSED:
        return "survived", ""
    collection = run.first_failure.startswith("ERROR ") and "::" not in run.first_failure
    if run.status == 2 or collection:
        return "broken", run.first_failure or "collection"
    if run.status == 1:
        return "killed", run.first_failure.split(" ", 1)[-1]
    if run.status < 0:
        return "killed", f"died of signal {-run.status}"
    raise RuntimeError(f"pytest ended with status {run.status} on {mutant.name}:\n{run.output[-3000:]}")


def line_of(verdict: Verdict) -> str:
    """One line of the report."""
    return f"{verdict.outcome:<9}{verdict.name:<46}{verdict.seconds:6.0f} s  {verdict.killer}"


def chosen(arguments: argparse.Namespace) -> tuple[Mutant, ...]:
    """The mutants that the command line asks for."""
    mutants = MUTANTS
    if arguments.names:
        names = arguments.names.split(",")
        unknown = sorted(set(names) - {mutant.name for mutant in MUTANTS})
        if unknown:
            raise SystemExit(f"unknown mutants: {', '.join(unknown)}; --list shows all")
        mutants = tuple(mutant for mutant in MUTANTS if mutant.name in names)
    if arguments.sample is not None:
        mutants = tuple(random.Random(arguments.seed).sample(mutants, min(arguments.sample, len(mutants))))
    if not mutants:
        raise SystemExit("no mutants chosen")
    return mutants


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--names", help="only these mutants, separated by commas")
    parser.add_argument("--sample", type=int, metavar="N", help="only N of them, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--jobs", type=int, default=2, help="mutants side by side")
    parser.add_argument("--quick", action="store_true", help="only the closest test files of each mutant")
    parser.add_argument("--trust", action="store_true", help="leave out the run without any edit")
    parser.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the mutants; 0 if enough of them died."""
    arguments = parse(argv)
    problems = check_table(ROOT, MUTANTS)
    if problems:
        print("The tables in tests/mutants do not fit the source:", *problems, sep="\n  ")
        return 2
    mutants = chosen(arguments)
    if arguments.list:
        lines = [f"{m.name:<46}{m.room.name}.{m.function}".rstrip(".") for m in mutants]
        print(*lines, f"{len(mutants)} mutants", sep="\n")
        return 0

    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        clean = Path(folder) / "clean"  # what is edited while this runs changes nothing
        shutil.copytree(ROOT, clean, ignore=LEFT_OUT)
        for path in (clean / "jbptt").rglob("*.py"):
            path.write_text(plain(path.read_text()))  # so that an edit is all that a mutant adds
        close = {name for mutant in mutants for name in mutant.room.closest}
        used = [name for name in test_names(clean) if not arguments.quick or name in close]
        if not arguments.trust:
            print("Without any edit:", flush=True)
            failures = check_clean(clean, used, arguments.jobs)
            if failures:
                print(*failures, sep="\n\n")
                return 2
        print(f"{len(mutants)} mutants:", flush=True)
        with ThreadPoolExecutor(arguments.jobs) as pool:
            verdicts = list(pool.map(lambda mutant: try_mutant(clean, mutant, arguments.quick), mutants))
    return report(verdicts, whole=len(mutants) == len(MUTANTS))


def report(verdicts: list[Verdict], whole: bool) -> int:
    """Prints the table and the count; 0 if enough mutants died."""
    print("", *map(line_of, verdicts), "", sep="\n")
    killed = sum(verdict.outcome != "survived" for verdict in verdicts)
    for outcome in ("survived", "broken"):
        names = [verdict.name for verdict in verdicts if verdict.outcome == outcome]
        if names:
            print(f"{outcome}: {', '.join(names)}")
    wanted = max(math.ceil(REQUIRED * len(verdicts)), FEWEST_KILLED if whole else 0)
    print(f"{killed} of {len(verdicts)} killed, wanted at least {wanted}")
    return 0 if killed >= wanted else 1


if __name__ == "__main__":
    sys.exit(main())
