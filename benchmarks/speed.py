"""Value and gradient of full BPTT beside every library that a user would pick instead."""

import functools
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np

import jbptt
from benchmarks import floors
from benchmarks.steps import run as run_any_step
from benchmarks.timing import alternate, geometric_mean, milliseconds, ratio
from benchmarks.work import OPPONENTS, Contestant, Work, data, our_cell, ours, squared_error

SHAPES = [
    (1, 128, 32),
    (32, 128, 64),
    (1024, 32, 32),
    (16, 4096, 64),
    (32, 512, 128),
    (32, 256, 256),
    (64, 256, 512),
]
ON_GPU = [(16, 1024, 768)]  # what a CPU takes minutes for
KINDS = ["rnn", "gru", "lstm"]
TOLERANCE = 1e-4  # of a float32 gradient as one vector, over up to 4096 steps
LIBRARIES = ["nnx", "linen", "haiku", "equinox"]


def contestants(work: Work) -> dict[str, Contestant]:
    """Ours and theirs on one device, and on all of them where the batch can be divided."""
    found: dict[str, Any] = {"jbptt": ours(work)}
    num_devices = jax.device_count()
    if num_devices > 1 and work.examples % num_devices == 0:
        found["jbptt, sharded"] = ours(work, jbptt.Plan(num_shards=num_devices))
    for name, make in OPPONENTS.items():
        try:
            found[name] = make(work)
            if num_devices > 1 and work.examples % num_devices == 0:
                found[f"{name}, sharded"] = make(work, sharded=True)
        except ImportError:
            found[name] = None
    return {name: one for name, one in found.items() if one is not None}


def first_call(one: Contestant) -> float:
    """Seconds to the first result: tracing, compiling and one run, whoever came before."""
    jax.clear_caches()
    start = time.perf_counter()
    jax.block_until_ready(one.run())
    return time.perf_counter() - start


def measure(work: Work, seconds: float) -> dict[str, Any]:
    """One row of the table: times, and ratios to ours. Raises where gradients differ."""
    runs = contestants(work)
    jax.block_until_ready(
        runs["scan"].run()
    )  # what a process does once, threads and such, is nobody's
    first = {name: first_call(one) for name, one in runs.items()}
    for name, one in runs.items():
        if not (error := one.disagreement()) <= TOLERANCE:
            raise SystemExit(
                f"{work.name}: the gradient of {name} is {error:.2g} off; nothing was timed."
            )
    times = alternate({name: one.run for name, one in runs.items()}, seconds=seconds)
    jax.clear_caches()
    best = min(
        (name for name in times if name.startswith("jbptt")),
        key=lambda name: np.median(times[name]),
    )
    row = {
        "kind": work.kind,
        "examples": work.examples,
        "steps": work.steps,
        "hidden": work.hidden,
        "milliseconds": {name: milliseconds(t) for name, t in times.items()},
        "rounds": len(times["jbptt"]),
        "seconds to the first result": first,
        "best of ours": best,
        "floors": floors.floors(work),
    }
    for ours_name in [name for name in times if name.startswith("jbptt")]:
        row[f"ratios to {ours_name}"] = {
            name: ratio(t, times[ours_name])._asdict()
            for name, t in times.items()
            if name != ours_name
        }
    return row


def against(row: dict[str, Any], ours_name: str, sharded: bool) -> dict[str, float]:
    """The fastest JAX library, a plain scan and PyTorch, as ratios to `ours_name`."""
    ratios = {name: r["median"] for name, r in row.get(f"ratios to {ours_name}", {}).items()}
    ending = ", sharded" if sharded else ""
    libraries = [ratios[name + ending] for name in LIBRARIES if name + ending in ratios]
    found = {"library": min(libraries)} if libraries else {}
    for name in ("scan", "torch"):
        if name + ending in ratios:
            found[name] = ratios[name + ending]
    return found


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The headlines: ours on all devices against theirs as they are, and with their batch divided
    as ours is.
    """
    best = [against(row, row["best of ours"], sharded=False) for row in rows]
    alike = [against(row, "jbptt, sharded", sharded=True) for row in rows]
    engine = [against(row, "jbptt", sharded=False) for row in rows]
    torch = [found["torch"] for found in best if "torch" in found]

    def mean(found, name):
        return geometric_mean([one[name] for one in found if name in one])

    return {
        "over the fastest library, geometric mean": mean(best, "library"),
        "over the fastest library, both sharded": mean(alike, "library"),
        "over the fastest library, both on one device": mean(engine, "library"),
        "over plain scan, geometric mean": mean(best, "scan"),
        "over plain scan, both on one device": mean(engine, "scan"),
        "over plain scan, smallest": min(one["scan"] for one in best),
        "over PyTorch, geometric mean": geometric_mean(torch),
        "over PyTorch, median": float(np.median(torch)) if torch else None,
        "over PyTorch, smallest": min(torch, default=None),
    }


def picture(rows: list[dict[str, Any]]) -> Any:
    """Every cell of the grid: how many times as long the others take."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    names = [f"{row['kind']}  {row['examples']}×{row['steps']}×{row['hidden']}" for row in rows]
    figure = Figure(figsize=(8, 1.2 + 0.3 * len(rows)), layout="constrained")
    ax = figure.subplots()
    marks = {
        "scan": ("plain lax.scan", "o"),
        "library": ("fastest JAX library", "s"),
        "torch": ("PyTorch", "^"),
    }
    for key, (label, mark) in marks.items():
        values = [against(row, row["best of ours"], sharded=False).get(key, np.nan) for row in rows]
        ax.plot(values, range(len(rows)), mark, label=label, alpha=0.85)
    ax.axvline(1, color="0.4", linewidth=1)
    ax.set(
        xscale="log",
        xlabel="time of the other / time of jbptt (right of the line: jbptt is faster)",
    )
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(
        FuncFormatter(lambda value, _: f"{value:g}" if round(value, 2) in (0.5, 2, 3, 5) else "")
    )
    ax.set_yticks(range(len(rows)), names)
    ax.invert_yaxis()
    ax.grid(axis="x", alpha=0.3)
    ax.set_title("Value and gradient of full BPTT; cell, batch × steps × hidden")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3, frameon=False)
    return figure


def table(rows: list[dict[str, Any]], quantity: str) -> str:
    """A quantity of everyone, in Markdown, the smallest in bold."""
    names = list(dict.fromkeys(name for row in rows for name in row[quantity]))
    lines = ["| cell | B | T | H | " + " | ".join(names) + " |", "|---" * (len(names) + 4) + "|"]
    for row in rows:
        times = row[quantity]
        best = min(times.values())
        shown = [
            f"**{times[n]:.2f}**"
            if times.get(n) == best
            else f"{times[n]:.2f}"
            if n in times
            else "–"
            for n in names
        ]
        lines.append(
            f"| {row['kind']} | {row['examples']} | {row['steps']} | {row['hidden']} | "
            + " | ".join(shown)
            + " |"
        )
    return "\n".join(lines)


def windows_side_by_side(kind: str, quick: bool) -> dict[str, Any]:
    """Truncated BPTT of one long example: windows one after another, the default, and four to
    sixty-four at once.
    """
    steps = 512 if quick else 8192
    work = Work(kind, 1, steps, 64)
    cell, params = our_cell(work)
    batch, carry = jbptt.Batch(*data(work)), cell.initial_carry((1,))
    runs = {}
    for number in (None, 1, 4, 16, 64):
        estimator = jbptt.truncated_bptt(
            cell.step, squared_error, window=64, plan=jbptt.Plan(parallel_windows=number)
        )
        state = estimator.init(params, carry, batch)
        update = jax.jit(lambda p, s, b, e=estimator: e.update(p, s, b)[0].grads)
        runs["default" if number is None else f"{number} at once"] = functools.partial(
            update, params, state, batch
        )
    times = alternate(runs, seconds=2 if quick else 10)
    ratios = {name: ratio(times["1 at once"], t)._asdict() for name, t in times.items()}
    return {
        "kind": kind,
        "steps": steps,
        "milliseconds": {n: milliseconds(t) for n, t in times.items()},
        "over one at once": ratios,
    }


def import_seconds(num_rounds: int) -> dict[str, float]:
    """Of new processes in turn: jax and optax, then jbptt as well, then an estimator and an
    analysis of it, too.

    Everyone's bytecode is cached, in a folder of its own. The garbage collector is off: a full
    collection of what jax leaves takes as long as a tenth of its import, and falls to whoever comes
    next.
    """
    both = "import jax, optax"
    lines = {"jax, optax": both, "jbptt": f"{both}, jbptt"}
    lines["jbptt in use"] = f"{both}, jbptt; jbptt.truncated_bptt, jbptt.diagnose"
    found: dict[str, list[float]] = {name: [] for name in lines}
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
        for _ in range(1 + num_rounds):  # the first fills the cache
            for name, times in found.items():
                code = (
                    f"import gc, time; gc.disable(); start = time.perf_counter(); {lines[name]}; "
                )
                command = [sys.executable, "-c", f"{code}print(time.perf_counter() - start)"]
                times.append(
                    float(
                        subprocess.run(
                            command, capture_output=True, check=True, env=environment
                        ).stdout
                    )
                )
    return {modules: float(np.median(times[1:])) for modules, times in found.items()}


def run(quick: bool) -> tuple[dict[str, Any], Any, str]:
    """All rows; `quick`: the small shapes, little time for each."""
    imports = import_seconds(2 if quick else 7)
    shapes = SHAPES[:2] if quick else SHAPES + (ON_GPU if jax.default_backend() == "gpu" else [])
    rows = []
    for shape in shapes:
        for kind in KINDS:
            rows.append(row := measure(Work(kind, *shape), seconds=2 if quick else 6))
            print(
                row["kind"],
                *shape,
                {name: round(t, 2) for name, t in row["milliseconds"].items()},
                flush=True,
            )
    any_step, headlines, any_step_table = run_any_step(quick)
    windows = [windows_side_by_side(kind, quick) for kind in KINDS]
    headlines = {**summary(rows), **headlines}
    if not quick:
        headlines |= {
            f"largest shapes, {name}": value for name, value in summary(rows[-len(KINDS) :]).items()
        }
    for of_kind in windows:
        over = of_kind["over one at once"]
        headlines[f"{of_kind['kind']}, windows side by side over one at once"] = over["default"][
            "median"
        ]
    first = [row["seconds to the first result"] for row in rows]
    headlines["first call, jbptt over plain scan"] = geometric_mean(
        [one["jbptt"] / one["scan"] for one in first]
    )
    headlines["import jax, optax, jbptt over import jax, optax"] = (
        imports["jbptt"] / imports["jax, optax"]
    )
    headlines["the same, and an estimator and diagnose asked for"] = (
        imports["jbptt in use"] / imports["jax, optax"]
    )
    results = {
        "summary": headlines,
        "rows": rows,
        "any step": any_step,
        "windows": windows,
        "import seconds": imports,
    }
    lines = ["| ratio, theirs over ours | |", "|---|---|"]
    lines += [f"| {name} | {value:.2f} |" for name, value in headlines.items() if value is not None]
    lines += ["", "Milliseconds, median:", "", table(rows, "milliseconds"), "", any_step_table, ""]
    rate = f"{floors.operations_per_second() / 1e9:.0f} billion operations per second"
    lines += [
        "Floors: 2 T steps that only multiply a carry; the products at the rate of a large one "
        f"({rate}):",
        "",
    ]
    lines += [floors.table(rows), ""]
    lines += ["Seconds to the first result (tracing, compiling, one run):", ""]
    lines += [table(rows, "seconds to the first result"), ""]
    lines += [f"Windows of 64 over {windows[0]['steps']} steps, B 1, H 64, milliseconds:", ""]
    names = windows[0]["milliseconds"]
    lines += ["| cell | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [
        f"| {of_kind['kind']} | "
        + " | ".join(f"{t:.2f}" for t in of_kind["milliseconds"].values())
        + " |"
        for of_kind in windows
    ]
    return results, picture(rows), "\n".join(lines)
