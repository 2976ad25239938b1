"""Temporary memory of a compiled gradient, from XLA's own account, and what it costs in time."""

from typing import Any

import jax
import jax.numpy as jnp

import jbptt
from benchmarks.timing import alternate, milliseconds
from benchmarks.work import WIDTH, Work, by_estimator, data, our_cell, squared_error
from jbptt import Batch, Plan, full_bptt, truncated_bptt

MEBIBYTE = 2**20


def shapes(work: Work) -> tuple[Any, Any, Any, Batch]:
    """Step and the shapes of what it takes: nothing is allocated."""
    cell, own = our_cell(work)
    series = jax.ShapeDtypeStruct((work.steps, work.examples, WIDTH), jnp.float32)
    params, carry = jax.eval_shape(lambda: (own, cell.initial_carry((work.examples,))))
    return cell.step, params, carry, Batch(series, series)


def temporary_bytes(estimator: Any, params: Any, carry: Any, batch: Batch) -> int:
    def gradient(params, carry, batch):
        estimate, state = estimator.update(params, estimator.init(params, carry, batch), batch)
        return estimate.loss, estimate.grads, state.carry

    return (
        jax.jit(gradient).lower(params, carry, batch).compile().memory_analysis().temp_size_in_bytes
    )


def plain_bytes(step: Any, params: Any, carry: Any, batch: Batch) -> int:
    def loss(params, carry, batch):
        _, ys = jax.lax.scan(lambda carry, x: step(params, carry, x), carry, batch.xs)
        return jnp.mean(squared_error(ys, batch.targets))

    return (
        jax.jit(jax.value_and_grad(loss))
        .lower(params, carry, batch)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
    )


def shares(kind: str, steps: int) -> dict[str, Any]:
    """Truncated and full BPTT against `jax.grad` of the plain scan."""
    step, *given = shapes(Work(kind, 16, steps, 64))
    plain = plain_bytes(step, *given)
    full = temporary_bytes(full_bptt(step, squared_error), *given)
    truncated = temporary_bytes(truncated_bptt(step, squared_error, window=32), *given)
    return {"kind": kind, "plain": plain, "full": full, "truncated, window 32": truncated}


def million(steps: int) -> dict[str, Any]:
    """An exact gradient over a very long sequence: memory, and time per step against that of 1000
    steps.
    """
    long, short = Work("rnn", 1, steps, 64), Work("rnn", 1, 1000, 64)
    step, *given = shapes(long)
    found = {
        "steps": steps,
        "temporary bytes": temporary_bytes(full_bptt(step, squared_error), *given),
    }
    per_step = {}
    for work in (long, short):
        cell, params = our_cell(work)
        run = by_estimator(cell.step, params, cell.initial_carry((1,)), work)
        per_step[work.steps] = milliseconds(alternate({"run": run}, seconds=8)["run"]) / work.steps
        data.cache_clear()
    return {**found, "time per step against 1000 steps": per_step[steps] / per_step[1000]}


def curve(kind: str, steps: int, seconds: float) -> list[dict[str, Any]]:
    """Memory and time against the length of a segment, and the choice under a budget."""
    work = Work(kind, 16, steps, 64)
    cell, params = our_cell(work)
    carry = cell.initial_carry((16,))
    segments = [s for s in (8, 16, 32, 64, 128, 256, 512, 1024, 4096) if s <= steps]
    step, *given = shapes(work)
    times = alternate(
        {str(s): by_estimator(step, params, carry, work, Plan(s)) for s in segments},
        seconds=seconds,
    )
    return [
        {
            "segment": s,
            "bytes": temporary_bytes(full_bptt(step, squared_error, plan=Plan(s)), *given),
            "milliseconds": milliseconds(times[str(s)]),
        }
        for s in segments
    ]


def picture(rows: list[dict[str, Any]], title: str) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    ax = figure.subplots()
    ax.plot([row["bytes"] / MEBIBYTE for row in rows], [row["milliseconds"] for row in rows], "o-")
    for before, row in zip([rows[0], *rows[:-1]], rows, strict=True):
        place = row["bytes"] / MEBIBYTE, row["milliseconds"]
        inside = (
            row["bytes"] < before["bytes"]
        )  # where the curve turns back, the space to the right is taken
        offset, align = ((-6, -4), "right") if inside else ((4, 5), "left")
        ax.annotate(str(row["segment"]), place, xytext=offset, textcoords="offset points", ha=align)
    ax.set(
        xscale="log", xlabel="temporary memory, MiB", ylabel="time of one gradient, ms", title=title
    )
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_ylim(0, 1.15 * max(row["milliseconds"] for row in rows))
    ax.margins(x=0.1)
    ax.grid(alpha=0.3)
    return figure


def run(quick: bool) -> tuple[dict[str, Any], Any, str]:
    steps = 512 if quick else 4096
    rows = [shares(kind, steps) for kind in ("rnn", "gru", "lstm")]
    long = million(10_000 if quick else 1_000_000)
    segments = curve("lstm", steps, 2 if quick else 40)
    cell, params = our_cell(Work("lstm", 16, steps, 64))
    batch = Batch(*data(Work("lstm", 16, steps, 64)))
    given = cell.step, squared_error, params, cell.initial_carry((16,)), batch
    plan, _ = jbptt.choose_plan(*given, memory_budget=8 * MEBIBYTE, num_repeats=2 if quick else 5)
    lines = [
        f"| B 16, T {steps}, H 64 | plain scan, MiB | full | truncated, window 32 |",
        "|---|---|---|---|",
    ]
    for row in rows:
        part = [
            f"{row[n] / MEBIBYTE:.2f} MiB, {row[n] / row['plain']:.2%}"
            for n in ("full", "truncated, window 32")
        ]
        lines.append(
            f"| {row['kind']} | {row['plain'] / MEBIBYTE:.1f} | " + " | ".join(part) + " |"
        )
    lines += [
        "",
        f"Exact gradient over {long['steps']:,} steps (rnn, B 1, H 64): "
        f"{long['temporary bytes'] / MEBIBYTE:.2f} MiB of temporaries, "
        f"{long['time per step against 1000 steps']:.2f} times the time per step of 1,000 steps.",
        "",
        f"Fastest plan of an lstm under 8 MiB, by `choose_plan(memory_budget=…)`: {plan}.",
        "",
        "| segment | MiB | ms |",
        "|---|---|---|",
        *(
            f"| {r['segment']} | {r['bytes'] / MEBIBYTE:.2f} | {r['milliseconds']:.1f} |"
            for r in segments
        ),
    ]
    results = {"shares": rows, "long": long, "segments": segments, "plan under 8 MiB": str(plan)}
    title = f"lstm, B 16, T {steps}, H 64: one point for each segment length"
    return results, picture(segments, title), "\n".join(lines)
