"""Gradients that run forward: time per step against the units, beside theory and code by hand.

A simple network of H units with 8 inputs; and linear units that feed themselves alone, with 16
inputs. One example, one device, float32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jbptt
from benchmarks.memory import MEBIBYTE
from benchmarks.timing import alternate, milliseconds, ratio
from jbptt import Batch, cells

INPUTS = {"network": 8, "diagonal": 16}
# Doubling grids, from where a step takes longer than starting it.
SIZES = {
    ("network", "rtrl"): (8, 16, 32, 64, 128, 256),
    ("network", "snap-1"): (64, 128, 256, 512, 1024, 2048),
    ("network", "rflo"): (64, 128, 256, 512, 1024, 2048),
    ("network", "uoro"): (64, 128, 256, 512, 1024, 2048),
    ("diagonal", "rtrl"): (256, 512, 1024, 2048, 4096, 8192),
}
METHODS = {
    "rtrl": jbptt.rtrl,
    "snap-1": partial(jbptt.snap, order=1),
    "rflo": partial(jbptt.rflo, leak=0.5),
    "uoro": jbptt.uoro,
}
THEORY = {
    ("network", "rtrl"): 4.0,
    ("network", "snap-1"): 3.0,
    ("network", "rflo"): 2.0,
    ("network", "uoro"): 2.0,
    ("diagonal", "rtrl"): 1.0,
}
"""Of H in the multiplications of a step: n² P; the Jacobian, H ways back of H²; P; P; P."""


def loss(y: jax.Array, target: jax.Array) -> jax.Array:
    """Squared error."""
    return jnp.sum((y - target) ** 2, -1)


def problem(kind: str, size: int, num_steps: int, examples: int = 1) -> tuple:
    """Step, parameters, carry and batch."""
    inputs = INPUTS[kind]
    key = jax.random.key(0)
    if kind == "network":
        cell = cells.rnn(inputs, size, dtype=jnp.float32)
        step, params = cell.step, cell.init(key)
    else:
        params = {"decay": jnp.full(size, 0.9), "w": 0.1 * jax.random.normal(key, (inputs, size))}

        def step(params, h, x):
            h = params["decay"] * h + x @ params["w"]
            return h, h

    xs = jax.random.normal(jax.random.key(1), (num_steps, examples, inputs))
    batch = Batch(xs, jnp.zeros((num_steps, examples, size)))
    return step, params, jnp.zeros((examples, size)), batch


def update_of(name: str, step: Callable, params: Any, carry: Any, batch: Batch) -> Any:
    """A compiled update, to be called without arguments, and its temporary memory in bytes."""
    estimator = METHODS[name](step, loss)
    state = estimator.init(params, carry, batch, jax.random.key(2))
    compiled = jax.jit(estimator.update).lower(params, state, batch).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    return partial(compiled, params, state, batch), memory


def by_hand(params: Any, carry: jax.Array, batch: Batch) -> Any:
    """RTRL of the network, written out for its three leaves."""
    w_x, w_h, b = params["w_x"], params["w_h"], params["b"]
    examples, size = carry.shape

    def onward(influence, jacobian):
        flat = influence.reshape(examples, -1, size) @ jacobian.swapaxes(1, 2)
        return flat.reshape(influence.shape)

    def body(state, at_t):
        h, (of_x, of_h, of_b), (g_x, g_h, g_b), total = state
        x, target = at_t
        new = jnp.tanh(x @ w_x + h @ w_h + b)
        slope = 1 - new**2
        jacobian, entering = slope[:, :, None] * w_h.T, slope[:, :, None] * jnp.eye(size)
        of_x = onward(of_x, jacobian) + x[:, :, None, None] * entering[:, None]
        of_h = onward(of_h, jacobian) + h[:, :, None, None] * entering[:, None]
        of_b = onward(of_b, jacobian) + entering
        bar = 2 * (new - target)
        g_x += jnp.einsum("zijs,zs->ij", of_x, bar)
        g_h += jnp.einsum("zijs,zs->ij", of_h, bar)
        g_b += jnp.einsum("zjs,zs->j", of_b, bar)
        influence = of_x, of_h, of_b
        return (new, influence, (g_x, g_h, g_b), total + jnp.sum(loss(new, target))), None

    leaves = w_x, w_h, b
    influence = tuple(jnp.zeros((examples, *leaf.shape, size)) for leaf in leaves)
    state = carry, influence, tuple(map(jnp.zeros_like, leaves)), jnp.zeros(())
    return lax.scan(body, state, (batch.xs, batch.targets))[0]


def forward(step: Callable, params: Any, carry: Any, batch: Batch) -> Any:
    """The losses alone."""

    def body(carry, at_t):
        x, target = at_t
        carry, y = step(params, carry, x)
        return carry, jnp.sum(loss(y, target))

    return lax.scan(body, carry, (batch.xs, batch.targets))


def grid(kind: str, name: str, quick: bool) -> dict[str, Any]:
    """Microseconds of a step for each size, and the exponent over the largest three."""
    sizes = SIZES[kind, name][: 3 if quick else None]
    times, memories, counts = [], [], []
    for size in sizes:
        num_steps = 4 if name == "rtrl" and kind == "network" else 16 if name == "snap-1" else 128
        run, memory = update_of(name, *problem(kind, size, num_steps))
        found = alternate({"update": run}, seconds=0.5 if quick else 3, fewest=5)["update"]
        times.append(float(np.min(found)) * 1e6 / num_steps)
        memories.append(memory / MEBIBYTE)
        counts.append(sum(leaf.size for leaf in jax.tree.leaves(problem(kind, size, 1)[1])))
        print(kind, name, size, f"{times[-1]:.1f} µs", flush=True)
    log = np.log(times[-3:])
    return {
        "kind": kind,
        "name": name,
        "sizes": sizes,
        "params": counts,
        "microseconds": times,
        "MiB": memories,
        "exponent": float(np.polyfit(np.log(sizes[-3:]), log, 1)[0]),
        "over all sizes": float(np.polyfit(np.log(sizes), np.log(times), 1)[0]),
        "in parameters": float(np.polyfit(np.log(counts[-3:]), log, 1)[0]),
        "theory": THEORY[kind, name],
    }


def pairs(quick: bool) -> list[dict[str, Any]]:
    """Dense RTRL beside code by hand; diagonal RTRL beside the losses alone."""
    rows = []
    for size, examples in ((16, 1), (32, 1), (64, 1), (32, 8))[: 1 if quick else None]:
        step, *of = problem("network", size, 32, examples)
        run, _ = update_of("rtrl", step, *of)
        theirs = partial(jax.jit(by_hand), *of)
        found, wanted = run()[0].grad_sum["w_h"], theirs()[2][1]
        assert float(jnp.max(jnp.abs(found - wanted))) < 1e-3 * float(jnp.max(jnp.abs(wanted)))
        times = alternate({"ours": run, "theirs": theirs}, seconds=1 if quick else 4)
        name = f"network, {size} units, {examples} examples, over code by hand"
        rows.append(row_of(name, times))
    for size, examples in ((64, 1), (256, 1), (1024, 1), (64, 16))[: 1 if quick else None]:
        step, *of = problem("diagonal", size, 256, examples)
        run, _ = update_of("rtrl", step, *of)
        theirs = partial(jax.jit(partial(forward, step)), *of)
        times = alternate({"ours": run, "theirs": theirs}, seconds=1 if quick else 4)
        name = f"diagonal, {size} units, {examples} examples, over the losses alone"
        rows.append(row_of(name, times))
    return rows


def row_of(name: str, times: dict[str, np.ndarray]) -> dict[str, Any]:
    """How many times as long ours takes."""
    return {
        "name": name,
        "milliseconds": milliseconds(times["ours"]),
        **ratio(times["ours"], times["theirs"])._asdict(),
    }


def picture(rows: list[dict[str, Any]]) -> Any:
    """Time per step by units."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    ax = figure.subplots()
    for row in rows:
        label = f"{row['name']}, {row['kind']}: H^{row['exponent']:.1f}"
        ax.plot(row["sizes"], row["microseconds"], "o-", label=label)
    ax.set(xscale="log", yscale="log", xlabel="units H", ylabel="µs per step, one example")
    ax.legend(frameon=False, fontsize=9)
    return figure


def run(quick: bool) -> tuple[dict[str, Any], Any, str]:
    """The grid, and the pairs."""
    rows = [grid(*key, quick) for key in SIZES]
    beside = pairs(quick)
    lines = [
        "| | units H | µs per step | exponent of H, largest three | all | in theory | "
        "of parameters, largest three |"
    ]
    lines.append("|---" * 7 + "|")
    for row in rows:
        times = ", ".join(f"{time:.3g}" for time in row["microseconds"])
        sizes = ", ".join(map(str, row["sizes"]))
        lines.append(
            f"| {row['name']}, {row['kind']} | {sizes} | {times} | {row['exponent']:.2f} | "
            f"{row['over all sizes']:.2f} | {row['theory']:.0f} | {row['in parameters']:.2f} |"
        )
    lines += [
        "",
        "RFLO and UORO touch every number of the influence a few times in a step and compute "
        "little: while it fits into the cache nearest to the core they grow more slowly than "
        "theory says, and once where it no longer does (4 MiB at H = 1024, 16 MiB at 2048) faster.",
        "",
    ]
    lines += ["| | ms of an update | times as long (quartiles) |", "|---|---|---|"]
    for row in beside:
        lines.append(
            f"| {row['name']} | {row['milliseconds']:.3g} | {row['median']:.2f} "
            f"({row['low']:.2f}, {row['high']:.2f}) |"
        )
    lines += [
        "",
        "Diagonal units: the losses alone read the weights once in a step, for all examples. The "
        "influence and the gradient are as large as the weights, for each example, and are read "
        "and written in every step.",
    ]
    return {"grid": rows, "beside": beside}, picture(rows), "\n".join(lines)
