"""What no way to compute a gradient falls below: its loop, if every step did next to nothing, and
its arithmetic.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.work import WIDTH, Work

GATES = {"rnn": 1, "gru": 3, "lstm": 4}
SIZE = 2048  # of the square matrices whose product measures what the device can do


def _seconds(run: Callable, *arguments: Any) -> float:
    """The fastest of several calls: a floor is not what a busy machine makes of it."""
    jax.block_until_ready(run(*arguments))
    times = []
    for _ in range(7):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        times.append(time.perf_counter() - start)
    return min(times)


@functools.cache
def operations_per_second() -> float:
    """Of one large product, float32, in the precision that is set."""
    matrix = jnp.ones((SIZE, SIZE), jnp.float32)
    return 2 * SIZE**3 / _seconds(jax.jit(jnp.matmul), matrix, matrix)


def operations(work: Work) -> int:
    """Of the products alone: forward, weights and, but for the inputs, the cotangents behind
    them.
    """
    wide = GATES[work.kind] * work.hidden
    inputs, recurrent, head = WIDTH * wide, work.hidden * wide, work.hidden * WIDTH
    return 2 * work.examples * work.steps * (2 * inputs + 3 * recurrent + 3 * head)


def floors(work: Work) -> dict[str, float]:
    """Milliseconds: of 2 T steps that only multiply a carry by a number, and of the products at
    full rate.
    """
    run = jax.jit(lambda h: lax.scan(lambda h, _: (h * 0.5, None), h, length=2 * work.steps)[0])
    loop = _seconds(run, jnp.ones((work.examples, work.hidden), jnp.float32))
    return {"loop": loop * 1e3, "arithmetic": operations(work) / operations_per_second() * 1e3}


def table(rows: list[dict[str, Any]]) -> str:
    """The floors beside the best of ours, in Markdown."""
    lines = [
        "| cell | B | T | H | jbptt, ms | loop, ms | arithmetic, ms | jbptt over the higher |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        ours, under = row["milliseconds"][row["best of ours"]], row["floors"]
        shown = [f"{ours:.2f}", *(f"{under[name]:.2f}" for name in ("loop", "arithmetic"))]
        cells = [row["kind"], row["examples"], row["steps"], row["hidden"], *shown]
        lines.append(f"| {' | '.join(map(str, cells))} | {ours / max(under.values()):.2f} |")
    return "\n".join(lines)
