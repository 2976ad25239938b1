"""Puts wrong edits into the gradient code, one at a time, and checks that the tests notice each of them.

    python -m tests.mutants [--names a,b] [--sample N] [--seed S] [--jobs J] [--quick] [--trust] [--list]

Every mutant is a copy of the repository with one edit of the tables beside this file. The test files that
know the edited module best run on it first; if they all pass, every other test file does. A mutant
that passes them all has survived: it shows a test that is missing. Most die within a minute; a
survivor costs a run of all the tests.
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

from tests.mutants import Mutant
from tests.mutants.analyses import ANALYSES
from tests.mutants.core import CORE
from tests.mutants.experiments import EXPERIMENTS
from tests.mutants.interop import INTEROP

MUTANTS = CORE + ANALYSES + EXPERIMENTS + INTEROP
ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "jbptt-report*")
TIME_LIMIT = 20 * 60  # seconds for one mutant
REQUIRED = 0.95  # the share of mutants that must die
FEWEST_KILLED = 38  # what a run of the whole table must kill at least
PASSED = (0, 5)  # pytest's status; 5: no test ran, as all need a package that is not installed

# The fastest and closest tests of each module, most telling first.
CLOSEST = {
    "jbptt/types.py": ("test_batches",),
    "jbptt/slips.py": ("test_faults", "test_batch_axes", "test_starts"),
    "jbptt/batch_axes.py": ("test_batch_axes", "test_faults"),
    "jbptt/validation.py": ("test_validation", "test_estimators"),
    "jbptt/cells.py": ("test_by_hand", "test_generated", "test_tasks", "test_torch"),
    "jbptt/recurrence.py": ("test_by_hand", "test_unroll", "test_batches", "test_memory", "test_analysis"),
    "jbptt/executables.py": ("test_executables",),
    "jbptt/truncation.py": ("test_truncation", "test_randomized", "test_gradients"),
    "jbptt/engine/jaxprs.py": ("test_weights", "test_by_hand"),
    "jbptt/engine/weight_products.py": ("test_weights", "test_by_hand"),
    "jbptt/engine/weight_uses.py": ("test_weights", "test_lookups"),
    "jbptt/engine/forward_backward.py": ("test_weights", "test_by_hand", "test_scan"),
    "jbptt/division.py": ("test_configurations",),
    "jbptt/analysis/plan_search.py": ("test_plans",),
    "jbptt/arrays.py": ("test_batches", "test_unroll", "test_by_hand"),
    "jbptt/losses.py": ("test_batches", "test_faults"),
    "jbptt/engine/facts.py": ("test_shared_leaves", "test_cotangents"),
    "jbptt/engine/__init__.py": ("test_by_hand", "test_streams"),
    "jbptt/engine/fast.py": ("test_by_hand", "test_streams"),
    "jbptt/engine/plain.py": ("test_engines",),
    "jbptt/engine/stacks.py": ("test_scan", "test_weights"),
    "jbptt/engine/cutting.py": ("test_weights", "test_scan"),
    "jbptt/scan_vjp.py": ("test_scan",),
    "jbptt/scanning.py": ("test_scan",),
    "jbptt/segments.py": ("test_by_hand", "test_starts", "test_streams", "test_batches", "test_gradients"),
    "jbptt/windows.py": ("test_by_hand", "test_streams", "test_batches", "test_gradients"),
    "jbptt/streams.py": ("test_streams", "test_contract", "test_batches"),
    "jbptt/estimators.py": ("test_streams", "test_randomized", "test_batches"),
    "jbptt/bias_bound.py": ("test_evidence", "test_adaptive"),
    "jbptt/adaptive.py": ("test_adaptive",),
    "jbptt/analysis/comparison.py": ("test_comparison",),
    "jbptt/analysis/window_lengths.py": ("test_window_lengths",),
    "jbptt/clipping/transformations.py": ("test_clipping",),
    "jbptt/clipping/cotangents.py": ("test_cotangents",),
    "jbptt/norms.py": ("test_norms", "test_clipping", "test_analysis", "test_diagnosis"),
    "jbptt/analysis/flow.py": ("test_analysis", "test_batches"),
    "jbptt/analysis/lags.py": ("test_analysis", "test_diagnosis", "test_batches"),
    "jbptt/analysis/diagnosis.py": ("test_diagnosis", "test_analysis"),
    "jbptt/analysis/blocks.py": ("test_evidence", "test_diagnosis"),
    "jbptt/analysis/stuck.py": ("test_evidence", "test_advice"),
    "jbptt/analysis/evidence.py": ("test_evidence", "test_diagnosis"),
    "jbptt/analysis/jacobians.py": ("test_jacobians",),
    "jbptt/analysis/linalg/scaled_svd.py": ("test_jacobians",),
    "jbptt/analysis/jacobian_spans.py": ("test_jacobians",),
    "jbptt/analysis/gate_jacobians.py": ("test_jacobians",),
    "jbptt/analysis/alignment.py": ("test_jacobians", "test_powers"),
    "jbptt/analysis/lyapunov.py": ("test_lyapunov",),
    "jbptt/analysis/linalg/dominant_eigenvector.py": ("test_powers",),
    "jbptt/analysis/linalg/powers.py": ("test_powers",),
    "jbptt/analysis/advice.py": ("test_advice", "test_diagnosis"),
    "jbptt/analysis/culprits.py": ("test_nonfinite",),
    "jbptt/analysis/nonfinite.py": ("test_nonfinite", "test_faults"),
    "jbptt/engine/dependence.py": ("test_validation", "test_faults"),
    "jbptt/starts.py": ("test_starts",),
    "jbptt/experiments/treatments.py": ("test_remedies",),
    "jbptt/experiments/outcomes.py": ("test_remedies",),
    "jbptt/experiments/training.py": ("test_training", "test_tasks"),
    "jbptt/experiments/tasks.py": ("test_tasks", "test_training"),
    "jbptt/interop/calls.py": ("test_interop_refusals", "test_interop"),
    "jbptt/interop/nnx.py": ("test_interop_refusals", "test_interop"),
    "jbptt/interop/linen.py": ("test_interop_refusals", "test_interop"),
    "jbptt/interop/haiku.py": ("test_interop_refusals", "test_interop"),
    "jbptt/interop/equinox.py": ("test_interop_refusals", "test_interop"),
}

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


def check_table(root: Path, mutants: tuple[Mutant, ...]) -> list[str]:
    """What is wrong with the table: edits that do not fit the source, names used twice."""
    problems = []
    for mutant in mutants:
        path = root / mutant.file
        count = path.read_text().count(mutant.old) if path.exists() else 0
        if count != 1:
            problems.append(f"{mutant.name}: its old text occurs {count} times in {mutant.file}, wanted once")
        if mutant.old == mutant.new or mutant.file not in CLOSEST:
            problems.append(f"{mutant.name}: changes nothing, or CLOSEST lacks {mutant.file}")
    names = [mutant.name for mutant in mutants]
    return problems + [f"{name}: used twice" for name in sorted({n for n in names if names.count(n) > 1})]


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
    closest = list(CLOSEST[mutant.file])
    others = [] if quick else [name for name in test_names(clean) if name not in closest]
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        home = copy_of(clean, folder)
        path = home / mutant.file
        path.write_text(path.read_text().replace(mutant.old, mutant.new))
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
    return f"{verdict.outcome:<9}{verdict.name:<42}{verdict.seconds:6.0f} s  {verdict.killer}"


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
        print("The source has moved on; mend the tables in tests/mutants:", *problems, sep="\n  ")
        return 2
    mutants = chosen(arguments)
    if arguments.list:
        print(*(f"{mutant.name:<42}{mutant.file}" for mutant in mutants), f"{len(mutants)} mutants", sep="\n")
        return 0

    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        clean = Path(folder) / "clean"  # what is edited while this runs changes nothing
        shutil.copytree(ROOT, clean, ignore=LEFT_OUT)
        close = {name for mutant in mutants for name in CLOSEST[mutant.file]}
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
