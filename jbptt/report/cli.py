"""The command `jbptt`. What a user got wrong ends in one line and exit status 2."""

import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jbptt import __version__
from jbptt.report import interruption

DESCRIPTION = """How far back does the gradient of a recurrent model reach, and what does each
truncation of backpropagation through time cost? `jbptt --version` prints the version."""
COMMANDS = ("report", "diagnose", "compare", "results")
NEEDED = ("tyro", "rich", "matplotlib", "jinja2")


class UsageError(Exception):
    """What the user can put right; its one line says how."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0, 2 for a wrong call, 130 after Ctrl-C.

    And 141 where standard output ends early, as `head` ends it; without a word, as other commands
    do.

    Args:
      arguments: None: those of this process, which Ctrl-C then ends.
    """
    if arguments is not None:
        return _run(list(arguments), contextlib.nullcontext())
    for stream in (sys.stdout, sys.stderr):  # where × or ∞ cannot be shown, ? is
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        return _run(sys.argv[1:], interruption.ends_this_process())
    except BrokenPipeError:
        # Python would try once more to write what is left, when it ends.
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 128 + 13  # as of a command that SIGPIPE ended


def _run(arguments: list[str], guard: contextlib.AbstractContextManager) -> int:
    try:
        with guard:
            status = _dispatch(arguments)
        sys.stdout.flush()
        return status
    except UsageError as error:
        print(f"jbptt: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(interruption.last_words(*stop.args), end="", file=sys.stderr)
        return interruption.INTERRUPTED


def _dispatch(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        print(f"jbptt {__version__}")
        return 0
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise UsageError(
            f"the command line needs {', '.join(missing)}; install with pip install 'jbptt[cli]'"
        )
    import tyro

    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            run = _commands(arguments).cli(
                prog="jbptt",
                description=DESCRIPTION,
                args=arguments or ["--help"],
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as end:
        if end.code:
            raise UsageError(_one_line(errors.getvalue(), arguments)) from None
        return 0
    return run()


def _commands(arguments: list[str]) -> Any:
    """Every subcommand; each returns what is left to run once the whole line has been
    understood.
    """
    import tyro

    from jbptt.report import comparing
    from jbptt.report.study import ReportSettings

    commands = tyro.extras.SubcommandApp()
    command = shlex.join(["jbptt", *arguments])

    @commands.command(name="report")
    def report(
        settings: tyro.conf.OmitArgPrefixes[ReportSettings] = ReportSettings(),  # noqa: B008
        *,
        out: Path = Path("jbptt-report"),
        cores: int | None = None,
    ):
        """Train small character models on real text and write report.html, report.json and the
        figures.

        Args:
            out: the folder to write; files of an earlier report in it are replaced at the very end.
            cores: CPU cores used as devices, over which the runs are spread; all of them if not
                given.
        """
        return lambda: run_report(settings, out=out, cores=cores, command=command)

    @commands.command(name="diagnose")
    def diagnose(
        model: tyro.conf.Positional[str],
        /,
        *,
        max_window: int | None = None,
        learning_rate: float | None = None,
        no_measure: bool = False,
        plans: bool = False,
        explain: bool = False,
        out: Path | None = None,
    ):
        """Print the diagnosis of your own model: how far its gradient reaches, which window it
        needs, what to change.

        Args:
            model: MODULE:FUNCTION or FILE.py:FUNCTION; the function takes nothing and returns
                (step, loss, params, carry, batch).
            max_window: the largest lag and sliding window considered; all steps, 512 at most, if
                not given.
            learning_rate: of your optimizer, to be held against the curvature of the loss.
            no_measure: leave out the time and memory of windows, which takes less time.
            plans: time the ways to compute the full gradient (segment lengths, devices) and print
                the fastest.
            explain: print what each line means and how it was found, too.
            out: a folder to write diagnosis.txt, diagnosis.json and diagnosis.svg into; nothing is
                written if not given.
        """
        options = {
            "max_window": max_window,
            "learning_rate": learning_rate,
            "measure": not no_measure,
        }
        return lambda: run_diagnosis(model, plans=plans, explain=explain, out=out, **options)

    @commands.command(name="compare")
    def compare(
        settings: tyro.conf.OmitArgPrefixes[
            comparing.ComparisonSettings
        ] = comparing.ComparisonSettings(),  # noqa: B008
        *,
        out: Path | None = None,
    ):
        """Train a small model on a task and compare truncated gradients with the exact one: bias,
        variance, cost.

        Args:
            out: a folder to write comparison.json and comparison.svg into; nothing is written if
                not given.
        """
        return lambda: run_compare(settings, out=out, command=command)

    @commands.command(name="results")
    def results(
        store: tyro.conf.Positional[Path],
        /,
        *,
        variable: str | None = None,
        x: str | None = None,
        out: Path | None = None,
    ):
        """Print and plot the results of a sweep in a store, also of one that is still running.

        Args:
            store: the folder that was passed to sweep.
            variable: an output of the runs; all of them in the tables and the first one in the
                picture, losses and errors before others, if not given.
            x: the axis that the picture goes along; the first axis of numbers but seed, or a
                history's own, if not given.
            out: a folder to write results.csv, results.json and results.svg into; nothing is
                written if not given.
        """
        return lambda: run_results(store, variable=variable, x=x, out=out, command=command)

    return commands


def run_compare(settings: Any, *, out: Path | None = None, command: str = "jbptt compare") -> int:
    """Compares estimators on a task, prints two tables and writes what was asked for.

    Raises: UsageError, before anything runs where that can be known.
    """
    from jbptt.report import comparing, output, plots
    from jbptt.report.themes import to_svg

    files = "comparison.json", "comparison.svg"
    try:
        comparing.check_comparison_settings(settings)
        if out is not None:
            output.check_target(Path(out), files)
        with interruption.unfinished(
            "the comparison was stopped before it was finished; nothing was written"
        ):
            found, cost = comparing.run_comparison(
                settings, lambda what: print(what, file=sys.stderr, flush=True)
            )
            if out is not None:
                picture = to_svg(plots.plot_comparison(found).figure)
                texts = comparing.comparison_json(settings, found, cost, command), picture
                output.write_files(dict(zip(files, texts, strict=True)), Path(out))
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    except _device_errors() as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"the device gave up: {reason}; try a smaller --hidden-size or --batch-size"
        ) from error
    print(found, "", "time of one update, temporary memory", cost, sep="\n")
    return 0


def run_diagnosis(
    model: str,
    *,
    plans: bool = False,
    explain: bool = False,
    out: Path | None = None,
    **options: Any,
) -> int:
    """Diagnoses the model that a user's function returns and prints the page, and the plans if they
    are asked for; writes what was asked for.

    Raises: UsageError, for whatever the user can put right.
    """
    from jbptt.analysis.plan_search import choose_plan
    from jbptt.diagnosis.question import diagnose
    from jbptt.report import diagnosing, output
    from jbptt.report.user_models import describe, is_own, load_problem

    stopped = f"the diagnosis of {model} was stopped before it was finished"
    try:
        if out is not None:
            output.check_target(Path(out), diagnosing.FILES)
    except ValueError as error:
        raise UsageError(str(error)) from error
    try:
        with interruption.unfinished(stopped):
            problem = load_problem(model)
            found = diagnose(*problem, **options)
            fastest, cost = choose_plan(*problem) if plans else (None, None)
    except _device_errors() as error:
        raise UsageError(
            f"the device gave up: {str(error).splitlines()[0]}; try a smaller batch"
        ) from error
    except (Exception, SystemExit) as error:
        said = isinstance(error, ValueError) and is_own(error)
        raise UsageError(str(error) if said else f"{model} failed: {describe(error)}") from error
    page = found.explain() if explain else str(found)
    if fastest is not None:
        page += f"\n\nFastest full gradient here: {fastest}.\n{cost}"
    if out is not None:
        try:
            output.write_files(diagnosing.texts_of(found, page), Path(out))
        except OSError as error:
            raise UsageError(str(error)) from error
    print(page)
    return 0


def run_results(store: Path, *, out: Path | None = None, **options: Any) -> int:
    """Prints what a store holds, and writes what was asked for. Raises: UsageError."""
    from jbptt.report import sweep_pages

    try:
        with interruption.unfinished(f"the results of {store} were not shown to the end"):
            page, warned = sweep_pages.page_of_store(Path(store), out=out, **options)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    for line in warned:
        print(f"jbptt: {line}", file=sys.stderr)
    print(page)
    return 0


def run_report(
    settings: Any, *, out: Path, cores: int | None = None, command: str = "jbptt report"
) -> int:
    """Runs the study and writes its report into `out`, all of it or nothing.

    Raises: UsageError, before anything runs where that can be known.
    """
    from jbptt.progress import ProgressDisplay
    from jbptt.report import output, study
    from jbptt.report.display import print_summary

    target = Path(out)
    try:
        output.check_target(target)
        _use_cores(cores)
        text = study.check_report_settings(settings)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    try:
        stopped = (
            f"the report was stopped before it was finished; nothing was written into {target}"
        )
        with interruption.unfinished(stopped), ProgressDisplay() as progress:
            data = study.run_study(settings, text, progress)
            progress("write the report", 1.0)
            data |= {"created": datetime.now(UTC).isoformat(timespec="seconds"), "command": command}
            output.write_report(data, target)
    except (OSError, MemoryError) as error:
        raise UsageError(f"the report could not be finished: {error}") from error
    except _device_errors() as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"the device gave up: {reason}; try a smaller --hidden-size or --batch-size"
        ) from error
    print_summary(data, target)
    return 0


def _use_cores(cores: int | None) -> None:
    """Splits the CPU into `cores` devices, which JAX allows until it has computed something."""
    available = _available_cores()
    if cores is not None and not 1 <= cores <= available:
        raise ValueError(
            f"cores must be in [1, {available}], got {cores}; this process may use {available}"
        )
    if cores is None and "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    import jax

    try:
        jax.config.update("jax_num_cpu_devices", cores or available)
    except RuntimeError:
        if cores is not None:
            raise ValueError(
                f"cores must be chosen before JAX computes anything, got {cores}; start a new "
                "process"
            ) from None


def _available_cores() -> int:
    """The cores that this process may use; a scheduler or a container allows fewer than all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device_errors() -> tuple[type[Exception], ...]:
    import jax

    return (jax.errors.JaxRuntimeError,)


def _one_line(message: str, arguments: list[str]) -> str:
    """The first paragraph of a boxed message without its box, and what may have been meant."""
    command = arguments[0] if arguments and arguments[0] in COMMANDS else ""
    paragraphs = _paragraphs(message)
    text = " ".join(paragraphs[0]) if paragraphs else "the command line was not understood"
    parts = [text.rstrip("."), *_meant(paragraphs[1:], command)]
    return "; ".join([*parts, f"{f'jbptt {command}'.strip()} --help lists every option"])


def _paragraphs(message: str) -> list[list[str]]:
    """The lines between the borders and rules of a boxed message."""
    paragraphs: list[list[str]] = [[]]
    for line in message.splitlines()[1:]:  # the first holds the title
        line = line.strip("│|╭╮╰╯+ ")
        # A border or a rule; ASCII where the terminal has no lines to draw with.
        if re.search(r"─{3,}|-{3,}", line):
            paragraphs.append([])
        elif line:
            paragraphs[-1].append(line)
    return [lines for lines in paragraphs if lines]


def _meant(paragraphs: list[list[str]], command: str) -> list[str]:
    """The options of this command that are like the one it lacks, or the commands there are."""
    found, option = [], ""
    for lines in paragraphs:
        if lines[0].startswith("Available subcommands"):
            return [f"there are {lines[0].partition(': ')[2]}"]
        for line in lines if re.match("Perhaps you meant|Arguments similar to", lines[0]) else []:
            option = line.split()[0] if line.startswith("--") else option
            if option and line == f"in jbptt {command} --help":
                found.append(option)
    return [f"perhaps you meant {' or '.join(sorted(set(found)))}"] if found else []
