"""When gradients vanish, when they explode, and what clipping changes."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbptt import clipping
from jbptt.analysis.lags import lag_profile
from jbptt.arrays import weighted_mean
from jbptt.experiments import tasks
from jbptt.norms import norm
from jbptt.problem import problem_of
from jbptt.report.axes import (
    log_scale,
    new_axes,
    numbers,
    positive,
    shades,
    significant,
)
from jbptt.report.one_question import Numbers, Question
from jbptt.report.tables import (
    Table,
    shown,
)
from jbptt.report.text_models import Model
from jbptt.report.themes import LIGHT, Theme
from jbptt.report.words import join_words
from jbptt.report.work import Progress
from jbptt.segments import back_through
from jbptt.types import Batch

RADII = (0.5, 0.9, 1.0, 1.1, 1.5)


MAX_NORM = 1.0


def measure(model: Model, batch: Batch, progress: Progress) -> dict[str, Any]:
    """Tanh networks whose recurrent matrices differ in spectral radius: norms by lag, and of
    gradients, clipped too.
    """
    progress("vanishing and exploding")
    step, loss, num_steps = model.cell.step, tasks.cross_entropy, batch.xs.shape[0]
    lengths = [2**k for k in range(1, num_steps.bit_length()) if 2**k <= num_steps]
    clip = clipping.clip_by_global_norm(MAX_NORM)
    matrix = jax.random.normal(jax.random.key(0), jnp.shape(model.seeds[0]["w_h"]))
    matrix = matrix / np.max(np.abs(np.linalg.eigvals(np.asarray(matrix))))

    def of_radius(radius):
        # Little input leaves the network near its linear regime, where the radius is what decides.
        params = {**model.seeds[0], "w_h": radius * matrix, "w_x": 0.01 * model.seeds[0]["w_x"]}
        profile = lag_profile(step, loss, params, model.carry, batch, max_lag=num_steps)

        def of_length(length):
            last = jnp.arange(num_steps) == length - 1
            weighted = batch._replace(weights=last.astype(jnp.float32))
            sums = back_through(problem_of(step, loss, params, model.carry, weighted)).sums
            grads = jax.tree.map(lambda g: weighted_mean(g, sums.weight), sums.grad)
            return norm(grads), norm(clip.update(grads, clip.init(grads))[0])

        return profile.cotangent_norms, *jax.lax.map(of_length, jnp.array(lengths))

    norms, raw, clipped = jax.device_get(jax.jit(partial(jax.lax.map, of_radius))(jnp.array(RADII)))
    progress("vanished and exploded", 1)
    return {
        "radii": RADII,
        "lags": list(range(num_steps)),
        "norms": significant(norms),
        "lengths": lengths,
        "gradient_norms": raw,
        "clipped_norms": clipped,
        "max_norm": MAX_NORM,
    }


MARKERS = ("o", "s", "^", "D", "v", "P")


def draw(growth: dict[str, Any], *, axes: Any = None, theme: Theme = LIGHT) -> Any:
    """Tanh networks by spectral radius: norms by lag, and gradient norms by length, raw and
    clipped.
    """
    axes = np.ravel(new_axes((10.4, 4.8), 1, 2, axes))
    colours = shades(len(growth["radii"]), theme)
    for radius, norms, raw, clipped, colour, marker in zip(
        growth["radii"],
        growth["norms"],
        growth["gradient_norms"],
        growth["clipped_norms"],
        colours,
        MARKERS,
        strict=False,
    ):
        every = max(1, len(growth["lags"]) // 8)
        style = {
            "color": colour,
            "marker": marker,
            "markersize": 4.5,
            "label": f"spectral radius {radius:g}",
        }
        axes[0].plot(growth["lags"], positive(norms), markevery=every, **style)
        axes[1].plot(growth["lengths"], positive(raw), **style)
        place = {"color": colour, "linestyle": (0, (1, 1.5)), "linewidth": 2.4}
        axes[1].plot(growth["lengths"], positive(clipped), **place)
    axes[1].axhline(growth["max_norm"], color=theme.muted, linewidth=0.9, linestyle=":")
    axes[0].set_xlabel("lag k (steps)")
    axes[0].set_ylabel("mean norm of the gradient at lag k")
    axes[1].set_xlabel("steps before the loss")
    axes[1].set_ylabel(f"gradient norm; dotted: clipped at {growth['max_norm']:g}")
    largest = 0.0
    for ax, values in zip(axes, (growth["norms"], growth["gradient_norms"]), strict=True):
        flat = positive(np.ravel(numbers(values)))
        log_scale(ax, "y", flat, (1,))
        largest = np.nanmax(flat) if np.isfinite(flat).any() else 1.0
        ax.set_ylim(bottom=max(ax.get_ylim()[0], 1e-14 * largest))
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].figure.legend(
        handles, labels, loc="outside lower left", ncols=5, frameon=False, fontsize=9
    )
    return axes


def _rates(growth: dict[str, Any]) -> list[float]:
    """The change of ln norm per step between lag 4 and lag 16, or what there is of it."""
    near = min(4, len(growth["lags"]) - 1)
    far = min(16, len(growth["lags"]) - 1)
    rates = []
    for norms in growth["norms"]:
        norms = numbers(norms)
        ends = norms[near], norms[far]
        known = far > near and min(ends) > 0 and math.isfinite(max(ends))
        rates.append(math.log(ends[1] / ends[0]) / (far - near) if known else math.nan)
    return rates


def say(growth: dict[str, Any]) -> str:
    """Which radii vanish and which explode, and what clipping leaves of the largest gradient."""
    rates = dict(zip(growth["radii"], _rates(growth), strict=True))
    known = {radius: rate for radius, rate in rates.items() if math.isfinite(rate)}
    words = []
    for verb, chosen in (
        ("shrinks", [r for r, rate in known.items() if rate < 0]),
        ("grows", [r for r, rate in known.items() if rate > 0]),
    ):
        if chosen:
            words.append(
                f"{verb} with the lag for a spectral radius of "
                f"{join_words([f'{r:g}' for r in chosen])}"
            )
    raw, clipped = numbers(growth["gradient_norms"]), numbers(growth["clipped_norms"])
    over = np.isfinite(raw) & (raw > growth["max_norm"])
    sentence = (
        f"Between lags 4 and 16 the norm {' and '.join(words)}."
        if words
        else "No norm is finite and positive."
    )
    if not over.any():
        return (
            f"{sentence} No gradient reaches the norm of {growth['max_norm']:g} at which clipping "
            "would begin."
        )
    return (
        f"{sentence} Gradients reach a norm of {shown(float(raw[over].max()))}; clipping leaves a "
        f"norm of {shown(float(clipped[over].max()))} at most and keeps the direction, so that it "
        "tames what explodes, while what has vanished stays as small as it was."
    )


def table(growth: dict[str, Any]) -> Table:
    """Rate by lag beside ln of the radius, and the gradient over the longest sequence."""
    columns = (
        "spectral radius",
        "ln radius",
        "rate, lags 4 to 16 (nats per step)",
        "gradient norm",
        "clipped",
    )
    rows = []
    for radius, rate, raw, clipped in zip(
        growth["radii"],
        _rates(growth),
        growth["gradient_norms"],
        growth["clipped_norms"],
        strict=True,
    ):
        last = shown(float(numbers(raw)[-1])), shown(float(numbers(clipped)[-1]))
        rows.append((f"{radius:g}", f"{math.log(radius):.3g}", shown(rate), *last))
    return Table(
        f"Tanh networks; gradients of one loss after {growth['lengths'][-1]} steps", columns, rows
    )


def alt(growth: Numbers) -> str:
    """What stands in the picture."""
    radii = ", ".join(f"{radius:g}" for radius in growth["radii"])
    return (
        f"Two line plots on log scales for spectral radii {radii}: gradient norm by lag, and "
        "gradient norm by sequence length with and without clipping."
    )


QUESTION = Question(
    "growth",
    "When do gradients vanish, when do they explode, and what does clipping change?",
    "The same random matrix scaled to different spectral radii, in tanh networks that read the "
    "text with small weights. Left: norm by lag, solid. Right: the norm of the gradient of one "
    "loss after so many steps (what its own step and the last before it contribute does not "
    "vanish); dotted, after clipping. Where activations saturate, the radius alone no longer "
    "decides.",
    0.85,
    draw,
    say,
    table,
    alt,
    has_colour_map=True,
)
