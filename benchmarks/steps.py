"""Any step, not only ours: five that the engine was not written for, against `jax.grad` of a plain
scan.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import Ratio, alternate, geometric_mean, milliseconds, ratio
from benchmarks.work import WIDTH, Contestant, Work, by_estimator, differentiated, squared_error
from jbptt import Plan, cells, interop

WORK = Work("any step", 32, 512, 128)


def _head(params, h):
    return h @ params["w_y"]


def stacked(work: Work):
    """Two layers."""
    lower, upper = cells.gru(WIDTH, work.hidden), cells.lstm(work.hidden, work.hidden)
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"lower": lower.init(keys[0]), "upper": upper.init(keys[1])}
    params["w_y"] = jax.random.normal(keys[2], (work.hidden, WIDTH)) / work.hidden

    def step(params, carry, x):
        first, h = lower.step(params["lower"], carry[0], x)
        second, h = upper.step(params["upper"], carry[1], h)
        return (first, second), h

    return (
        cells.with_readout(step, _head),
        params,
        lambda shape: (lower.initial_carry(shape), upper.initial_carry(shape)),
    )


def layer_norm(work: Work):
    cell, params = _gru(work)

    def step(params, h, x):
        h, _ = cell.step(params, h, x)
        h = params["scale"] * jax.nn.standardize(h)
        return h, h

    return (
        cells.with_readout(step, _head),
        {**params, "scale": jnp.ones(work.hidden)},
        cell.initial_carry,
    )


def dropout(work: Work):
    """By a key of each example's own, in the carry."""
    cell, params = _gru(work)

    def one(params, carry, x):
        h, key = carry
        key, used = jax.random.split(key)
        h, _ = cell.step(params, h, x)
        return (h, key), jnp.where(jax.random.bernoulli(used, 0.9, h.shape), h / 0.9, 0)

    def start(shape):
        return cell.initial_carry(shape), jax.random.split(jax.random.key(1), shape)

    return cells.with_readout(jax.vmap(one, (None, 0, 0)), _head), params, start


def closure(work: Work):
    """A fixed random input expansion, closed over."""
    cell = cells.rnn(4 * WIDTH, work.hidden)
    expansion = jax.random.normal(jax.random.key(3), (WIDTH, 4 * WIDTH)) / np.sqrt(WIDTH)
    params = {
        **cell.init(jax.random.key(0)),
        "w_y": jax.random.normal(jax.random.key(2), (work.hidden, WIDTH)) / 9,
    }

    def step(params, h, x):
        return cell.step(params, h, jax.nn.relu(x @ expansion))

    return cells.with_readout(step, _head), params, cell.initial_carry


def nnx_cell(work: Work):
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.cell = nnx.GRUCell(WIDTH, work.hidden, rngs=rngs)
            self.head = nnx.Linear(work.hidden, WIDTH, rngs=rngs)

        def __call__(self, carry, x):
            carry, h = self.cell(carry, x)
            return carry, self.head(h)

    return interop.from_nnx(Model(nnx.Rngs(0)))


def _gru(work: Work):
    cell = cells.gru(WIDTH, work.hidden)
    params = cell.init(jax.random.key(0))
    return cell, {
        **params,
        "w_y": jax.random.normal(jax.random.key(2), (work.hidden, WIDTH)) / work.hidden,
    }


STEPS = {
    "two stacked layers": stacked,
    "layer norm": layer_norm,
    "dropout by key": dropout,
    "closure over constants": closure,
    "nnx cell": nnx_cell,
}


def measure(name: str, work: Work, seconds: float) -> dict[str, Any]:
    step, params, start = STEPS[name](work)
    carry = start((work.examples,))

    def loss(params, xs, targets):
        _, ys = jax.lax.scan(lambda carry, x: step(params, carry, x), start((xs.shape[1],)), xs)
        return jnp.mean(squared_error(ys, targets))

    plain = differentiated(loss, params, work, sharded=False)
    runs = {"jbptt": by_estimator(step, params, carry, work), "scan": plain}
    num_devices = jax.device_count()
    if num_devices > 1:
        runs["jbptt, sharded"] = by_estimator(
            step, params, carry, work, Plan(num_shards=num_devices)
        )
    if not (error := Contestant(runs["jbptt"], plain).disagreement()) <= 1e-4:
        raise SystemExit(f"{name}: the gradient is {error:.2g} off; nothing was timed.")
    times = alternate(runs, seconds=seconds)
    ratios = {
        ours: ratio(times["scan"], times[ours])._asdict()
        for ours in times
        if ours.startswith("jbptt")
    }
    return {
        "step": name,
        "milliseconds": {n: milliseconds(t) for n, t in times.items()},
        "over plain scan": ratios,
    }


def run(quick: bool) -> tuple[list[dict[str, Any]], dict[str, float], str]:
    """Rows, headlines and a table."""
    work = Work("any step", 8, 64, 32) if quick else WORK
    rows = [measure(name, work, 1 if quick else 6) for name in STEPS]
    jax.clear_caches()
    best = [max(r["median"] for r in row["over plain scan"].values()) for row in rows]
    one = [row["over plain scan"]["jbptt"]["median"] for row in rows]
    headlines = {
        "any step over plain scan, geometric mean": geometric_mean(best),
        "any step over plain scan, smallest": min(best),
        "any step over plain scan, both on one device": geometric_mean(one),
    }
    shape = f"{work.examples}×{work.steps}×{work.hidden}"
    lines = [
        f"| any step, {shape} | scan, ms | jbptt, ms | ratio (quartiles) | sharded, ratio |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        times, ratios = (
            row["milliseconds"],
            {name: Ratio(**r) for name, r in row["over plain scan"].items()},
        )
        own, spread = ratios["jbptt"], ratios.get("jbptt, sharded")
        shown = [row["step"], f"{times['scan']:.2f}", f"{times['jbptt']:.2f}"]
        shown += [
            f"{own.median:.2f} ({own.low:.2f} … {own.high:.2f})",
            "–" if spread is None else f"{spread.median:.2f}",
        ]
        lines.append("| " + " | ".join(shown) + " |")
    return rows, headlines, "\n".join(lines)
