"""The page of a diagnosis, in plain text of at most 100 columns."""

import math
from typing import Any

import numpy as np

from jbptt.diagnosis.advice import TOLERANCES
from jbptt.diagnosis.decay_shapes import shape_of

NO_PATH = (
    "  no gradient path: every gradient is exactly zero; the loss ignores y or has no weight, all",
    "  units are dead, or the output depends on neither parameters nor carry",
)
PERFECT = ("  loss and gradient are exactly zero: a perfect fit, nothing is left to learn",)
BELOW = (
    "  vanished below precision: every gradient is exactly zero because the loss's derivative is",
    "  smaller than its dtype can hold; scale the loss up, or compute in float32",
)
ONE_LAG = "not measured (one lag)"


def write_page(found: Any) -> str:
    """The page of one `Diagnosis`."""
    lines = [f"  loss {float(found.loss):.4g}, gradient norm {float(found.gradient_norm):.3g}"]
    norms = np.asarray(found.profile.cotangent_norms)[: int(found.flow.num_lags)]
    span, title = f"{found.num_steps} step{'s' * (found.num_steps > 1)}", verdict_words(found)
    if found.verdict == "non-finite":
        lines += _nonfinite(found)
    elif norms.max() == 0 and found.gradient_norm == 0:
        title, words = _no_gradient(found)
        lines += words
    elif norms.max() == 0:
        title = "no gradient path through the carry"
        lines.append("  no gradient flows back through the carry: every window is exact")
    elif found.num_steps == 1:
        lines.append("  one step: there is nothing to go back through, and nothing to truncate")
    else:
        span += (
            f", {int(found.flow.num_lags)} lags measured"
            if 1 < found.flow.num_lags < found.num_steps
            else ""
        )
        lines += [*_decay(found, norms), *_dynamics(found), "", *_windows(found)]
    if found.unread:
        lines.insert(
            1,
            f"  {', '.join(found.unread)}: read by no step, so without gradient (a learned start, "
            "perhaps)",
        )
    advice = [f"  {advice}" for advice in found.advice]
    return "\n".join(
        [f"Gradient over {span}: {title}", *lines, *(["", "  advice", *advice] if advice else [])]
    )


def verdict_words(found: Any) -> str:
    """The verdict, or that one lag gives none."""
    one = found.flow.num_lags == 1 < found.num_steps and found.verdict != "non-finite"
    return ONE_LAG if one else found.verdict


def _no_gradient(found: Any) -> tuple[str, tuple[str, ...]]:
    """Title and words where not even lag 0 has a gradient."""
    if found.decay.underflow:
        return "vanished below precision", BELOW
    if found.loss == 0 and found.num_used_steps > 0:
        return "zero loss", PERFECT
    return "no gradient path", NO_PATH


def _nonfinite(found: Any) -> list[str]:
    lines = [
        "  a loss, an adjoint or the gradient is NaN or infinite: no window can be recommended"
    ]
    if found.nonfinite.found:
        lines.append(f"  {found.nonfinite}")
    return lines


def _decay(found: Any, norms: np.ndarray) -> list[str]:
    """Half-life, fit and reach."""
    largest = int(found.flow.num_lags)
    rate, half_life = float(found.decay.rate), float(found.half_life)
    low, high = (float(h) for h in found.half_life_interval)
    halves = "none (it does not shrink)"
    if math.isfinite(half_life):
        beyond = f" (beyond the lags measured: {low:.3g} to {high:.3g})".replace("inf", "∞")
        halves = f"{half_life:.3g} steps" + (beyond if half_life > largest - 1 else "")
    elif rate > 0:
        halves = f"none (it doubles every {math.log(2) / rate:.3g} steps back)"
    if largest == 1:
        halves = ONE_LAG
    elif found.decay.zero_lag == 1:
        halves = "under one step"
    arrives = float(found.flow.arrives[largest - 1])
    lines = [
        f"  half-life {halves}",
        f"  arrives   of what leaves a loss {arrives:.3g} arrives at lag {largest - 1}",
    ]
    shape = shape_of(found.flow.arrives[:largest], found.flow.alive[:largest])
    if shape.words:
        lines.append(f"  decay     {shape.words}")
    if found.decay.first_lag == 1:
        lines.append(
            f"  jump      to {float(found.flow.arrives[1]):.3g} at lag 1; half-life from there on"
        )
    if found.decay.zero_lag > 0 and found.decay.underflow:
        lag = int(found.decay.zero_lag)
        lines.append(
            f"  vanished below precision: exactly zero from lag {lag} on ({norms[lag - 1]:.2g} "
            "before)"
        )
    elif found.decay.zero_lag > 0:
        lines.append(
            f"  exactly zero from lag {int(found.decay.zero_lag)} on: no older step has influence"
        )
    reach = int(found.reach)
    reach = (
        f"all {largest} steps measured" if reach >= largest else f"{reach} step{'s' * (reach > 1)}"
    )
    return [*lines, f"  reach     {reach} (at least 1 % arrives)"]


def _dynamics(found: Any) -> list[str]:
    """Exponent, norms of parts, curvature."""
    lines = []
    exponent = float(found.exponent)
    if exponent == -math.inf:
        lines.append(
            "  exponent  −∞: something on the way wipes out the carry (a reset, dead units)"
        )
    elif not math.isnan(exponent):
        wiped = int(found.dynamics.num_wiped)
        lines.append(
            f"  exponent  {exponent:+.3g} ± {float(found.dynamics.error):.2g} per step (leading"
            + (f"; {wiped} reset{'s' * (wiped > 1)} of an example left out)" if wiped else ")")
        )
    median, high, largest = (float(q) for q in found.norm_quantiles)
    num_parts = int(np.sum(np.isfinite(found.part_norms)))
    if num_parts > 1:
        lines.append(
            f"  parts     gradient norm of {num_parts}: median {median:.3g}, 90 % {high:.3g}, "
            f"largest {largest:.3g}"
        )
    if found.dynamics.curvature is not None:
        curvature = float(found.dynamics.curvature)
        stable = (
            f"no learning rate above {2 / curvature:.3g} is stable"
            if curvature > 0
            else "not a valley"
        )
        lines.append(f"  curvature {curvature:.3g} along the gradient: {stable}")
    return lines


def _windows(found: Any) -> list[str]:
    """The table of windows with their costs."""
    heading, costs = f"  {'window for':<14}{'steps':>8}", {}
    if found.cost is not None:
        heading += f"{'time':>12}{'memory':>12}{'vs full BPTT':>24}"
        columns = zip(found.cost.median_seconds, found.cost.temporary_bytes, strict=True)
        costs = dict(zip(found.cost.names, columns, strict=True))
    lines = [heading]
    for kind, windows in (("sliding", found.sliding_window), ("block", found.block_window)):
        for tolerance, window in zip(TOLERANCES, windows, strict=True):
            steps = f"{int(window)}" if int(window) else f"> {int(found.curve.windows[-1])}"
            cells = _cost_cells(costs, f"{kind} {int(window)}")
            lines.append(f"  {f'{tolerance:.0%} {kind}':<14}{steps:>8}{cells}")
    lines.append(f"  {'full BPTT':<14}{found.num_steps:>8}{_cost_cells(costs, 'full')}")
    if not found.windows.told:
        return [
            "  windows: this batch cannot tell. One part of it carries nearly all of the gradient,",
            "  or its parts cancel to rounding; ask with more examples, or with longer sequences",
            lines[-1],
        ]
    return [
        *lines,
        "  error: ‖ĝ − g‖ / ‖g‖, kept on 95 % of the batches drawn from parts of this one",
    ]


def _cost_cells(costs: dict, name: str) -> str:
    if name not in costs:
        return ""
    (seconds, size), (full_seconds, full_size) = costs[name], costs["full"]
    ratio = (
        ""
        if name == "full"
        else f"{seconds / full_seconds:.2f}× time, {size / max(full_size, 1):.2f}× memory"
    )
    return f"{1e3 * seconds:>9.2f} ms{size / 2**20:>8.2f} MiB{ratio:>28}".rstrip()
