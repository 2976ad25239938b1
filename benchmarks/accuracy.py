"""How exact a low-precision gradient of a long sequence is: bfloat16 against float64 at the same
rounded inputs.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.work import WIDTH, squared_error
from jbptt import Batch, cells, full_bptt

EXAMPLES, HIDDEN = 4, 64
LENGTHS = (64, 256, 1024, 4096)


def gradients(kind: str, steps: int) -> dict[str, dict[str, np.ndarray]]:
    """Ours and that of `jax.grad` of a plain scan in bfloat16, and the float64 gradient."""
    rng = np.random.default_rng(0)
    cell = getattr(cells, kind)(WIDTH, HIDDEN, dtype=jnp.bfloat16)
    low = cell.init(jax.random.key(0)), cell.initial_carry((EXAMPLES,))
    low += (
        Batch(
            *(
                jnp.asarray(rng.normal(size=(steps, EXAMPLES, n)), jnp.bfloat16)
                for n in (WIDTH, HIDDEN)
            )
        ),
    )

    def ours(params, carry, batch):
        estimator = full_bptt(cell.step, squared_error)
        return estimator.update(params, estimator.init(params, carry, batch), batch)[0].grads

    def plain(params, carry, batch):
        def loss(params):
            _, ys = jax.lax.scan(lambda carry, x: cell.step(params, carry, x), carry, batch.xs)
            return jnp.mean(squared_error(ys, batch.targets).astype(jnp.float32))

        return jax.grad(loss)(params)

    with jax.enable_x64(True):
        exact = jax.jit(ours)(*jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), low))
    found = {"exact": exact, "jbptt": jax.jit(ours)(*low), "plain scan": jax.jit(plain)(*low)}
    return {
        name: {k: np.asarray(g, float) for k, g in grads.items()} for name, grads in found.items()
    }


def error(found: dict[str, np.ndarray], exact: dict[str, np.ndarray], name: str) -> float:
    """Of one parameter."""
    return float(np.linalg.norm(found[name] - exact[name]) / np.linalg.norm(exact[name]))


def picture(rows: list[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    ax = figure.subplots()
    for kind, colour in (("rnn", "#0072b2"), ("lstm", "#d55e00")):
        own = [row for row in rows if row["kind"] == kind]
        for name, style in (("plain scan", "--"), ("jbptt", "-")):
            label = f"{kind}, {name}"
            ax.plot(
                [r["steps"] for r in own],
                [r[name] for r in own],
                style,
                marker="o",
                color=colour,
                label=label,
            )
    ax.axhline(0.005, color="0.5", linewidth=1)
    ax.set(
        xscale="log", yscale="log", xlabel="steps", ylabel="relative error of the gradient of w_h"
    )
    ax.set_title("bfloat16 against float64 at the same rounded inputs (line: 0.5 %)")
    ax.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:.3%}" if value < 0.001 else f"{value:.1%}")
    )
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    return figure


def run(quick: bool) -> tuple[dict[str, Any], Any, str]:
    rows = []
    for kind in ("rnn", "lstm"):
        for steps in LENGTHS[:2] if quick else LENGTHS:
            found = gradients(kind, steps)
            own = {
                name: error(found[name], found["exact"], "w_h") for name in ("jbptt", "plain scan")
            }
            own |= {
                f"{name}, b": error(found[name], found["exact"], "b")
                for name in ("jbptt", "plain scan")
            }
            rows.append({"kind": kind, "steps": steps, **own})
    lines = [
        "| cell | steps | jbptt, w_h | plain scan, w_h | jbptt, b | plain scan, b |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['kind']} | {r['steps']} | {r['jbptt']:.3%} | {r['plain scan']:.2%} | "
        f"{r['jbptt, b']:.3%} | {r['plain scan, b']:.2%} |"
        for r in rows
    ]
    return {"rows": rows}, picture(rows), "\n".join(lines)
