"""The command `jbptt`. What a user got wrong ends in one line and exit status 2."""

import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jbptt import __version__
from jbptt.report import interruption
from jbptt.report.commands.errors import UsageError

DESCRIPTION = """How far back does the gradient of a recurrent model reach, and what does each
truncation of backpropagation through time cost? `jbptt --version` prints the version."""
COMMANDS = ("report", "diagnose", "compare", "results")
NEEDED = ("tyro", "rich", "matplotlib", "jinja2")


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

    from jbptt.report.commands.compare import ComparisonSettings, run_compare
    from jbptt.report.commands.diagnose import run_diagnosis
    from jbptt.report.commands.report import ReportSettings, run_report
    from jbptt.report.commands.results import run_results

    commands = tyro.extras.SubcommandApp()
    command = shlex.join(["jbptt", *arguments])

    @commands.command(name="report")
    def report(
        model: tyro.conf.Positional[str | None] = None,
        /,
        settings: tyro.conf.OmitArgPrefixes[ReportSettings] = ReportSettings(),  # noqa: B008
        *,
        out: Path = Path("jbptt-report"),
        cores: int | None = None,
    ):
        """With which window should a model train? Measure it, and write report.html, report.json
        and the figures: for small character models on real text, or for a model of your own.

        Args:
            model: your own, MODULE:FUNCTION or FILE.py:FUNCTION; the function takes nothing and
                returns (step, loss, params, carry, batch), or a dict with the arguments of
                jbptt.learning_study. Interrupted, the same command goes on.
            out: the folder to write; files of an earlier report in it are replaced at the very end.
            cores: CPU cores used as devices, over which the runs are spread; all of them if not
                given.
        """
        return lambda: run_report(settings, model=model, out=out, cores=cores, command=command)

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
        model: tyro.conf.Positional[str | None] = None,
        /,
        settings: tyro.conf.OmitArgPrefixes[ComparisonSettings] = ComparisonSettings(),  # noqa: B008
        *,
        out: Path | None = None,
    ):
        """Compare truncated gradients with the exact one, bias, variance and cost: of a small model
        that is trained on a task, or of a model of your own, which then also learns in every way.

        Args:
            model: your own, MODULE:FUNCTION or FILE.py:FUNCTION, as for report.
            out: a folder to write comparison.json and comparison.svg into; nothing is written if
                not given.
        """
        return lambda: run_compare(settings, model=model, out=out, command=command)

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
