"""Many small trainings: `jbptt.sweep` beside a loop of jitted runs, fixed ways, and PyTorch.

A run trains an rnn by full BPTT and plain descent, on data of its own. Fixed ways: one run after
the other, many side by side, and both of these on all devices. How `sweep` computes was found in a
long sweep; then all ways take turns on fewer runs.
"""

import functools
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import jbptt
from benchmarks.timing import alternate, geometric_mean, ratio

RATE = 0.01


class Size(NamedTuple):
    """One training: units, examples, steps, updates; runs of each round, and of a long sweep."""

    name: str
    units: int
    examples: int
    steps: int
    updates: int
    runs: int
    many: int


SIZES = [
    Size("tiny", 4, 2, 8, 10, 2048, 65536),
    Size("small", 16, 8, 32, 20, 256, 8192),
    Size("medium", 64, 16, 64, 10, 64, 2048),
    Size("large", 128, 32, 64, 5, 32, 512),
    Size("huge", 512, 32, 64, 3, 16, 128),
]
INPUTS, OUTPUTS = 4, 2


def training(size: Size) -> Callable:
    """`run_fn` of a sweep: `(point, key) -> {"loss": [updates]}`."""
    cell = jbptt.cells.with_linear_readout(jbptt.cells.rnn(INPUTS, size.units), OUTPUTS)
    estimator = jbptt.full_bptt(cell.step, jbptt.tasks.squared_error)

    def run(point, key):
        start, x, y = jax.random.split(key, 3)
        shape = size.updates, size.steps, size.examples
        batches = jbptt.Batch(
            jax.random.normal(x, (*shape, INPUTS)), jax.random.normal(y, (*shape, OUTPUTS))
        )
        carry = cell.initial_carry((size.examples,))
        _, history = jbptt.train(
            estimator, optax.sgd(point["rate"]), cell.init(start), carry, batches
        )
        return {"loss": history.loss}

    return run


def points(number: int) -> dict[str, np.ndarray]:
    """So many runs, alike but for their keys."""
    return {"rate": np.full(number, RATE), "seed": np.arange(number)}


def in_a_loop(run: Callable, number: int) -> Callable[[], Any]:
    """What one writes first: a jitted run, called in a loop over keys."""
    key, once = jax.random.key(0), jax.jit(run)

    def loop():
        losses = [once({"rate": RATE}, jax.random.fold_in(key, i)) for i in range(number)]
        return jax.block_until_ready(losses)

    return loop


def by_torch(size: Size, number: int) -> Callable[[], Any] | None:
    """The same trainings one after the other in PyTorch; None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None

    # Several threads make steps of a few numbers slower.
    torch.set_num_threads(1 if size.units < 64 else os.cpu_count() or 1)

    def loop():
        for seed in range(number):
            torch.manual_seed(seed)
            rnn, readout = torch.nn.RNN(INPUTS, size.units), torch.nn.Linear(size.units, OUTPUTS)
            descent = torch.optim.SGD([*rnn.parameters(), *readout.parameters()], lr=RATE)
            for _ in range(size.updates):
                xs = torch.randn(size.steps, size.examples, INPUTS)
                targets = torch.randn(size.steps, size.examples, OUTPUTS)
                loss = 0.5 * ((readout(rnn(xs)[0]) - targets) ** 2).sum(-1).mean()
                descent.zero_grad()
                loss.backward()
                descent.step()

    return loop


def measure(size: Size, seconds: float) -> dict[str, Any]:
    """One row: milliseconds of a run by each way, and ratios to the way that sweep found."""
    run, key = training(size), jax.random.key(0)
    ask = functools.partial(jbptt.sweep, run, key=key, progress=False)
    mesh = jax.make_mesh((jax.device_count(),), ("runs",))
    began = time.perf_counter()
    plan = ask(points(size.many), mesh=mesh).plan
    long = time.perf_counter() - began
    found = 1 if plan.startswith("one") else int(plan.split()[0])
    width = min(found, size.runs // mesh.size)  # there are fewer runs here than in the long sweep
    fixed = functools.partial(ask, points(size.runs), chunk=size.runs)
    most = min(64, size.runs // 2)
    ways = {
        "sweep": functools.partial(fixed, width=width, mesh=mesh),
        "vmap": functools.partial(fixed, width=most),
        "map": functools.partial(fixed, width=1),
        "sharded vmap": functools.partial(fixed, width=most // 2, mesh=mesh),
        "sharded map": functools.partial(fixed, width=1, mesh=mesh),
        "loop": in_a_loop(run, size.runs),
    }
    few = 4  # PyTorch's runs are alike, too
    if theirs := by_torch(size, few):
        ways["torch"] = theirs
    times = alternate(ways, seconds=seconds, fewest=5, most=30)
    if "torch" in times:
        times["torch"] = size.runs / few * times["torch"]
    others = [way for way in ways if way not in ("sweep", "loop", "torch")]
    fastest = min(others, key=lambda way: np.median(times[way]))
    return {
        "name": size.name,
        "plan": plan,
        "long sweep": {"runs": size.many, "seconds": long},
        "runs": size.runs,
        "milliseconds of a run": {
            way: 1e3 * float(np.median(times[way])) / size.runs for way in ways
        },
        "fastest fixed way": fastest,
        "over the fastest": ratio(times[fastest], times["sweep"])._asdict(),
        "over a loop": ratio(times["loop"], times["sweep"])._asdict(),
        "over PyTorch": ratio(times["torch"], times["sweep"])._asdict()
        if "torch" in ways
        else None,
    }


def scaling(seconds: float) -> dict[str, Any]:
    """One and two devices, one and two workers, of the medium size."""
    size = SIZES[2]
    run, key = training(size), jax.random.key(0)
    ask = functools.partial(jbptt.sweep, run, points(64), key=key, progress=False, width=4, chunk=8)
    devices = jax.devices()
    meshes = [jax.make_mesh((n,), ("runs",), devices=devices[:n]) for n in (1, 2)]
    of_devices = alternate(
        {str(n): functools.partial(ask, mesh=mesh) for n, mesh in zip((1, 2), meshes, strict=True)},
        seconds=seconds,
    )
    spawn = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(1, mp_context=spawn) as one,
        ProcessPoolExecutor(2, mp_context=spawn) as two,
    ):
        pools = {
            "1": functools.partial(ask, executor=one),
            "2": functools.partial(ask, executor=two),
        }
        of_workers = alternate(pools, seconds=seconds)
    return {
        "two devices over one": ratio(of_devices["1"], of_devices["2"])._asdict(),
        "two workers over one": ratio(of_workers["1"], of_workers["2"])._asdict(),
    }


def ten_thousand() -> dict[str, float]:
    """Seconds and the most memory of a process that sweeps over 10,000 tiny trainings."""
    code = "from benchmarks import sweep; sweep.many()"
    began = time.perf_counter()
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return {"seconds": time.perf_counter() - began, "GiB": float(output.stdout.split()[-1])}


def many() -> None:
    """What `ten_thousand` runs."""
    jbptt.sweep(training(SIZES[0]), points(10_000), key=jax.random.key(0), progress=False)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def picture(rows: list[dict[str, Any]]) -> Any:
    """Milliseconds of a run by every way, a group for each size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    ax = figure.subplots()
    ways = list(rows[0]["milliseconds of a run"])
    for i, way in enumerate(ways):
        values = [row["milliseconds of a run"].get(way, np.nan) for row in rows]
        place = np.arange(len(rows)) + (i - len(ways) / 2) * 0.8 / len(ways)
        ax.bar(place, values, 0.8 / len(ways), label=way, align="edge")
    ax.set_yscale("log")
    ax.set_xticks(range(len(rows)), [row["name"] for row in rows])
    ax.set(ylabel="milliseconds of a run")
    figure.legend(loc="outside upper center", ncols=len(ways), fontsize=8)
    return figure


def run(quick: bool) -> tuple[dict[str, Any], Any, str]:
    """All rows; `quick`: two sizes and little time."""
    rows = []
    for size in SIZES[:2] if quick else SIZES:
        rows.append(row := measure(size, seconds=5 if quick else 25))
        print(row, flush=True)
    summary = {
        "the fastest fixed way over sweep, smallest": min(
            row["over the fastest"]["median"] for row in rows
        ),
        "a loop over sweep, tiny": rows[0]["over a loop"]["median"],
        "a loop over sweep, geometric mean": geometric_mean(
            [row["over a loop"]["median"] for row in rows]
        ),
    }
    if rows[0]["over PyTorch"]:
        theirs = [row["over PyTorch"]["median"] for row in rows]
        summary |= {"PyTorch over sweep, smallest": min(theirs)}
    if jax.device_count() > 1:
        for name, value in scaling(5 if quick else 20).items():
            summary[name] = value["median"]
    of_many = ten_thousand()
    summary |= {
        "seconds of 10,000 tiny trainings, from the start of Python": of_many["seconds"],
        "GiB of memory that they take at most": of_many["GiB"],
    }
    lines = [
        "| | |",
        "|---|---|",
        *(f"| {name} | {value:.2f} |" for name, value in summary.items()),
    ]
    ways = list(rows[0]["milliseconds of a run"])
    lines += [
        "",
        "Milliseconds of a run, medians. Ratios: theirs over `sweep`, with quartiles.",
        "",
    ]
    lines += [
        f"| size | {' | '.join(ways)} | plan | long sweep | fastest fixed way | loop | PyTorch |"
    ]
    lines += ["|---" * (len(ways) + 6) + "|"]
    for row in rows:
        cells = [row["name"], *(f"{t:.3g}" for t in row["milliseconds of a run"].values())]
        long = row["long sweep"]
        cells += [row["plan"], f"{1e3 * long['seconds'] / long['runs']:.3g}"]
        for way in ("over the fastest", "over a loop", "over PyTorch"):
            of = row[way]
            cells.append(f"{of['median']:.2f} ({of['low']:.2f}, {of['high']:.2f})" if of else "")
        lines.append("| " + " | ".join(cells) + " |")
    sizes = ", ".join(
        f"{s.name}: {s.units} units, {s.examples} examples, {s.steps} steps, {s.updates} updates, "
        f"{s.runs} runs, {s.many} in a long sweep"
        for s in SIZES
    )
    lines += ["", f"Sizes: {sizes}."]
    return {"summary": summary, "rows": rows}, picture(rows), "\n".join(lines)
