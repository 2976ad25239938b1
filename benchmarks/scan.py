"""`jbptt.scan` beside `lax.scan`, and in segments beside checkpointed segments; losses that no step
has alone.

One device each. The loss looks at all outputs at once (attention with a learned query), so that
estimators, which want a loss for each step, cannot serve it.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jbptt
from benchmarks.memory import MEBIBYTE
from benchmarks.speed import KINDS, SHAPES
from benchmarks.steps import STEPS
from benchmarks.timing import alternate, geometric_mean, milliseconds, ratio
from benchmarks.work import Work, data, our_cell


def checkpointed(f: Callable, init: Any, xs: Any, segment: int) -> tuple[Any, Any]:
    """`lax.scan` over segments that are computed again on the way back."""
    pieces = jax.tree.map(lambda a: a.reshape((-1, segment, *a.shape[1:])), xs)
    carry, ys = lax.scan(
        jax.checkpoint(lambda carry, piece: lax.scan(f, carry, piece)), init, pieces
    )
    return carry, jax.tree.map(lambda a: a.reshape((-1, *a.shape[2:])), ys)


def gradient_of(scanned: Callable, step: Callable, carry: Any) -> Callable:
    """`(params, query, xs) -> (loss, gradients)`; one step's y or, of several, the first leaf."""

    def loss(params, query, xs):
        _, ys = scanned(partial(step, params), carry, xs)
        weights = jax.nn.softmax(ys @ query, axis=0)
        return jnp.mean(jnp.sum(weights[..., None] * ys, axis=0) ** 2)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def divisor(steps: int) -> int:
    """The length of a segment that divides T, nearest to √T from below."""
    return max(n for n in range(1, int(steps**0.5) + 1) if steps % n == 0)


def measure(
    name: str, step: Callable, params: Any, carry: Any, work: Work, seconds: float
) -> dict[str, Any]:
    """One row: times, memory and the time to the first result."""
    xs, _ = data(work)
    segment = divisor(work.steps)
    ways = {
        "lax.scan": lax.scan,
        "scan": jbptt.scan,
        "checkpointed": partial(checkpointed, segment=segment),
        "scan, segments": partial(jbptt.scan, segment=segment),
    }
    _, y = jax.eval_shape(step, params, carry, xs[0])
    query = jnp.asarray(np.random.default_rng(1).standard_normal(y.shape[-1]), y.dtype)
    runs, first, memory, found = {}, {}, {}, {}
    for way, scanned in ways.items():
        gradient = gradient_of(scanned, step, carry)
        start = time.perf_counter()
        found[way] = jax.block_until_ready(gradient(params, query, xs))
        first[way] = time.perf_counter() - start
        compiled = gradient.lower(params, query, xs).compile()
        memory[way] = compiled.memory_analysis().temp_size_in_bytes
        runs[way] = partial(compiled, params, query, xs)
    for way in ways:
        for ours, theirs in zip(
            jax.tree.leaves(found[way]), jax.tree.leaves(found["lax.scan"]), strict=True
        ):
            error = float(jnp.linalg.norm(ours - theirs) / (jnp.linalg.norm(theirs) + 1e-30))
            if error > 1e-4:
                raise ValueError(
                    f"{name}: the gradient by {way} differs from lax.scan's by {error:.1g}"
                )
    times = alternate(runs, seconds=seconds, fewest=7)
    returned = (
        2 * y.size * y.dtype.itemsize * work.steps
    )  # the ys and their cotangents, which nobody can spare
    return {
        "name": name,
        "segment": segment,
        "milliseconds": {way: milliseconds(times[way]) for way in ways},
        "over lax.scan": ratio(times["lax.scan"], times["scan"])._asdict(),
        "over checkpointed": ratio(times["checkpointed"], times["scan, segments"])._asdict(),
        "MiB": {way: memory[way] / MEBIBYTE for way in ways},
        "memory over lax.scan": {
            way: (memory[way] - returned) / (memory["lax.scan"] - returned)
            for way in ("scan", "scan, segments")
        },
        "first result over lax.scan": first["scan"] / first["lax.scan"],
    }


def problems(quick: bool) -> list[tuple]:
    """Name, step, parameters, carry and work of each row."""
    found = []
    for shape in SHAPES[:1] if quick else SHAPES:
        for kind in KINDS:
            work = Work(kind, *shape)
            cell, params = our_cell(work)
            found.append((work.name, cell.step, params, cell.initial_carry((work.examples,)), work))
    work = Work("rnn", 16, 256, 64)
    for name, make in STEPS.items():
        step, params, start = make(work)
        found.append(
            (name, step, params, start((work.examples,)) if callable(start) else start, work)
        )
    return found


def picture(rows: list[dict[str, Any]]) -> Any:
    """Ratio and quartiles of each row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.28 * len(rows) + 1.2), layout="constrained")
    ax = figure.subplots()
    for i, row in enumerate(rows):
        of = row["over lax.scan"]
        ax.plot([of["low"], of["high"]], [i, i], "-", color="tab:blue")
        ax.plot(of["median"], i, "o", color="tab:blue")
    ax.axvline(1, color="gray", linewidth=1)
    ax.set_yticks(range(len(rows)), [row["name"] for row in rows])
    ax.invert_yaxis()
    ax.set(xlabel="time of lax.scan over time of jbptt.scan (median and quartiles of rounds)")
    return figure


def run(quick: bool) -> tuple[dict[str, Any], Any, str]:
    """All rows; `quick`: the small shape and little time."""
    rows = []
    for problem in problems(quick):
        rows.append(row := measure(*problem, seconds=1 if quick else 4))
        print(row["name"], {way: round(t, 2) for way, t in row["milliseconds"].items()}, flush=True)
    ratios = [row["over lax.scan"]["median"] for row in rows]
    summary = {
        "time, lax.scan over scan, geometric mean": geometric_mean(ratios),
        "smallest": min(ratios),
        "time, checkpointed segments over scan in segments, geometric mean": geometric_mean(
            [row["over checkpointed"]["median"] for row in rows]
        ),
        "memory, scan over lax.scan, geometric mean": geometric_mean(
            [row["memory over lax.scan"]["scan"] for row in rows]
        ),
        "memory, segments over lax.scan, geometric mean": geometric_mean(
            [row["memory over lax.scan"]["scan, segments"] for row in rows]
        ),
        "first result, scan over lax.scan, geometric mean": geometric_mean(
            [row["first result over lax.scan"] for row in rows]
        ),
    }
    lines = [
        "| | |",
        "|---|---|",
        *(f"| {name} | {value:.2f} |" for name, value in summary.items()),
        "",
    ]
    lines += ["Memory is beyond the ys and their cotangents. Milliseconds are medians.", ""]
    ways = list(rows[0]["milliseconds"])
    lines += [
        "| step | "
        + " | ".join(ways)
        + " | over lax.scan (quartiles) | over checkpointed | memory | segments |"
    ]
    lines += ["|---" * (len(ways) + 5) + "|"]
    for row in rows:
        of, by, memory = row["over lax.scan"], row["over checkpointed"], row["memory over lax.scan"]
        cells = [row["name"], *(f"{row['milliseconds'][way]:.2f}" for way in ways)]
        cells += [f"{of['median']:.2f} ({of['low']:.2f}, {of['high']:.2f})", f"{by['median']:.2f}"]
        cells += [f"{memory['scan']:.2f}", f"{memory['scan, segments']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return {"summary": summary, "rows": rows}, picture(rows), "\n".join(lines)
