"""What the analyses cost beside the way one would compute the same numbers without them."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import jbptt
from benchmarks.timing import alternate, milliseconds, ratio
from benchmarks.work import Work, data, our_cell, squared_error
from jbptt import Batch, truncation


def _check(name: str, found: Any, wanted: Any, tolerance: float) -> None:
    error = float(
        np.max(np.abs(np.asarray(found) - np.asarray(wanted))) / np.max(np.abs(np.asarray(wanted)))
    )
    if not error <= tolerance:
        raise SystemExit(f"{name}: results are {error:.2g} apart; nothing was timed.")


def curve(quick: bool) -> tuple[str, dict[str, Callable]]:
    """The errors of 64 windows against 64 gradients: sliding by estimators, blocks vmapped through
    gates.
    """
    steps, windows = (64, 8) if quick else (512, 64)
    work = Work("rnn", 1, steps, 64)
    cell, params = our_cell(work)
    carry, batch = cell.initial_carry((1,)), Batch(*data(work))

    def gradient(estimator):
        return ravel_pytree(
            estimator.update(params, estimator.init(params, carry, batch), batch)[0].grads
        )[0]

    exact = jax.jit(lambda: gradient(jbptt.full_bptt(cell.step, squared_error)))()

    def relative(found):
        return jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)

    @jax.jit
    def at_once(params):
        return jbptt.truncation_curve(
            cell.step, squared_error, params, carry, batch, max_window=windows
        )

    def sliding_of(window):
        estimator = jbptt.truncated_bptt(cell.step, squared_error, window=window, stride=1)
        return jax.jit(lambda _: relative(gradient(estimator)))

    separate = [sliding_of(window) for window in range(1, windows + 1)]

    @jax.jit
    def blocks(params):
        def one(window):
            gates = truncation.fixed(steps, window)

            def loss(params):
                _, ys = jbptt.unroll(cell.step, params, carry, batch.xs, gates=gates)
                return jnp.mean(squared_error(ys, batch.targets))

            return relative(ravel_pytree(jax.grad(loss)(params))[0])

        return jax.vmap(one)(jnp.arange(1, windows + 1))

    _check(
        "truncation curve", at_once(params).relative_error, [one(params) for one in separate], 1e-3
    )
    runs = {
        "truncation_curve": lambda: at_once(params),
        "separate sliding gradients": lambda: [one(params) for one in separate],
        "block gradients vmapped through gates": lambda: blocks(params),
    }
    return f"the errors of {windows} windows, T={steps}, H=64", runs


def flow(quick: bool) -> tuple[str, dict[str, Callable]]:
    """All ‖∂ℓ_t/∂h_s‖ against one vmapped `jacrev` over nudges, and a loop over t."""
    steps = 32 if quick else 256
    work = Work("rnn", 4, steps, 64)
    cell, params = our_cell(work)
    carry, batch = cell.initial_carry((4,)), Batch(*data(work))

    def losses(nudges, params):
        def body(h, inputs):
            x, nudge = inputs
            return cell.step(params, h + nudge, x)

        _, ys = jax.lax.scan(body, carry, (batch.xs, nudges))
        return jnp.sum(squared_error(ys, batch.targets), axis=1)

    def rms(rows):
        return jnp.sqrt(jnp.mean(jnp.sum(rows**2, axis=-1), axis=-1))

    nudges = jnp.zeros((steps, *carry.shape))
    ours = jax.jit(
        lambda params: jbptt.gradient_flow(cell.step, squared_error, params, carry, batch)
    )
    jacobian = jax.jit(lambda params: rms(jax.jacrev(losses)(nudges, params)))
    row = jax.jit(lambda params, t: rms(jax.grad(lambda n: losses(n, params)[t])(nudges)))
    _check("gradient flow", ours(params), jacobian(params), 1e-4)
    runs = {
        "gradient_flow": lambda: ours(params),
        "one vmapped jacrev": lambda: jacobian(params),
        "a loop over t": lambda: [row(params, t) for t in range(steps)],
    }
    return f"gradient flow, T={steps}, B=4, H=64", runs


def lyapunov(quick: bool) -> tuple[str, dict[str, Callable]]:
    """All exponents of a random network against a NumPy loop of QR decompositions; beside it QR and
    nothing else.
    """
    size, steps = (32, 200) if quick else (256, 2000)
    weights = np.random.default_rng(0).normal(size=(size, size)) * 2 / np.sqrt(size)
    w, start = (
        jnp.asarray(weights, jnp.float32),
        jnp.asarray(np.random.default_rng(1).normal(size=size), jnp.float32),
    )

    def step(w, h, x):
        h = w @ jnp.tanh(h)
        return h, h

    ours = jax.jit(lambda w: jbptt.lyapunov_spectrum(step, w, start, None, length=steps).exponents)

    def loop():
        matrix, h, frame = np.asarray(w), np.asarray(start), np.eye(size, dtype=np.float32)
        sums = np.zeros(size)
        for _ in range(steps):
            slope = 1 - np.tanh(h) ** 2
            h = matrix @ np.tanh(h)
            frame, upper = np.linalg.qr((matrix * slope) @ frame)
            sums += np.log(np.abs(np.diag(upper)))
        return sums / steps

    @jax.jit
    def decompositions(w):  # as many of them, by the same routine
        def body(frame, _):
            frame, upper = jnp.linalg.qr(frame + w)
            return frame, jnp.diagonal(upper)

        return jax.lax.scan(body, w, length=steps)[1]

    if abs(float(ours(w)[0]) - loop()[0]) > 0.05:  # a chaotic system in two orders of summation
        raise SystemExit("Lyapunov: the largest exponents differ; nothing was timed.")
    runs = {
        "lyapunov_spectrum": lambda: ours(w),
        "NumPy QR loop": loop,
        "its QR alone": lambda: decompositions(w),
    }
    return f"all {size} Lyapunov exponents, T={steps}", runs


def diagnosis(work: Work, forget: float | None, quick: bool) -> dict[str, Any]:
    """What `diagnose(measure=False)` costs, in exact gradients of the same batch.

    A second call, paired with gradients; and the first call, with the compilation, beside that of
    a gradient: once, in this order.
    """
    cell, params = our_cell(work)
    if forget is not None:
        params = {**params, "b": params["b"].at[work.hidden : 2 * work.hidden].set(forget)}
    carry, batch = cell.initial_carry((work.examples,)), Batch(*data(work))
    estimator = jbptt.full_bptt(cell.step, squared_error)
    state = estimator.init(params, carry, batch)
    gradient = jax.jit(lambda params: estimator.update(params, state, batch)[0].grads)
    runs = {
        "gradient": lambda: gradient(params),
        "diagnose": lambda: jbptt.diagnose(
            cell.step, squared_error, params, carry, batch, measure=False
        ),
    }
    first = {}
    for name, run_first in runs.items():
        start = time.perf_counter()
        found = jax.block_until_ready(run_first())
        first[name] = time.perf_counter() - start
    times = alternate(runs, seconds=2 if quick else 20, fewest=3)
    return {
        "what": f"{work.name}, forget bias {forget:g}" if forget else work.name,
        "lags": int(found.num_lags),
        "gradients": ratio(times["diagnose"], times["gradient"])._asdict(),
        "first_seconds": first,
    }


def diagnoses(quick: bool) -> tuple[list[dict[str, Any]], str]:
    """A gradient that reaches some steps, and one that reaches all."""
    steps, hidden = (32, 16) if quick else (128, 128)
    rows = [diagnosis(Work("lstm", 16, steps, hidden), forget, quick) for forget in (None, 6.0)]
    lines = ["| diagnose, second call | lags measured | gradients (quartiles) | first call |"]
    lines.append("|---|---|---|---|")
    for row in rows:
        spread = "{median:.1f} ({low:.1f} … {high:.1f})".format(**row["gradients"])
        one, whole = row["first_seconds"]["gradient"], row["first_seconds"]["diagnose"]
        first = f"{whole:.1f} s, {whole / one:.1f} times a gradient's"
        lines.append(f"| {row['what']} | {row['lags']} | {spread} | {first} |")
    return rows, "\n".join(lines)


def picture(rows: list[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    bars = [
        (f"{row['what']}\n{name}", r["median"]) for row in rows for name, r in row["ratios"].items()
    ]
    figure = Figure(figsize=(8, 0.8 + 0.7 * len(bars)), layout="constrained")
    ax = figure.subplots()
    ax.barh(range(len(bars)), [value for _, value in bars], color="#0072b2")
    for i, (_, value) in enumerate(bars):
        ax.annotate(
            f"{value:.3g}×",
            (value, i),
            (6, 0),
            textcoords="offset points",
            va="center",
            backgroundcolor="white",
        )
    ax.axvline(1, color="0.4", linewidth=1)
    ax.set_yticks(range(len(bars)), [name for name, _ in bars])
    ax.invert_yaxis()
    ax.set(xscale="log", xlabel="time of the other way / time of jbptt")
    ax.set_xlim(0.5, 3 * max(value for _, value in bars))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    return figure


def run(quick: bool) -> tuple[dict[str, Any], Any, str]:
    rows, lines = [], ["| what | way | ms | ratio (quartiles) |", "|---|---|---|---|"]
    for make in (curve, flow, lyapunov):
        what, runs = make(quick)
        times = alternate(runs, seconds=2 if quick else 20, fewest=3)
        ours = next(iter(runs))
        ratios = {name: ratio(t, times[ours]) for name, t in times.items() if name != ours}
        shown = {name: r._asdict() for name, r in ratios.items()}
        rows.append(
            {
                "what": what,
                "milliseconds": {n: milliseconds(t) for n, t in times.items()},
                "ratios": shown,
            }
        )
        for name, t in times.items():
            r = ratios.get(name)
            about = "–" if r is None else f"{r.median:.2f} ({r.low:.2f} … {r.high:.2f})"
            lines.append(f"| {what} | {name} | {milliseconds(t):.1f} | {about} |")
        jax.clear_caches()
    costs, table = diagnoses(quick)
    return {"rows": rows, "diagnoses": costs}, picture(rows), "\n".join([*lines, "", table])
