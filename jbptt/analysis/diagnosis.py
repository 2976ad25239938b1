"""The page that answers: how far does my gradient reach, which window do I need, what does it cost?"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from jbptt import truncation, validation
from jbptt.adjoint import Sums, gradient_sums
from jbptt.analysis.comparison import Cost, fresh_blocks, measure_cost
from jbptt.analysis.lags import (
    LagProfile,
    TruncationCurve,
    curve_reader,
    curve_start,
    linearise,
    profile_reader,
    scan_lags,
)
from jbptt.estimators import full_bptt, truncated_bptt
from jbptt.norms import compared_with, norm
from jbptt.types import Batch, Carry, Loss, Params, Step, align_leading, weighted_mean

VERDICTS = ("vanishing", "stable", "exploding", "non-finite")
TOLERANCES = (0.1, 0.01)
_CHANGE = 10.0  # the factor over the measured lags from which on a gradient is said to vanish or explode


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found; `print` it. Arrays but for `cost`, so that it passes through jit and vmap.

    Attributes:
      verdict_index: into `VERDICTS`; `.verdict` is the word.
      rate: fitted change of the log gradient norm per step back (nats per step).
      half_life: `ln 2 / −rate` in steps; inf where the gradient does not shrink.
      reach: number of lags up to the last whose norm is at least 1 % of lag 0's.
      sliding_window: `[2]`, the smallest window with at most 10 % and 1 % relative error; 0: none measured.
      block_window: for blocks cut at multiples of the window: it keeps the error, its half does not; T
        where only full BPTT on the batch does.
      loss: weighted mean loss of the batch.
      gradient_norm: of its exact gradient.
      profile: the gradient by lag.
      curve: the error by window.
      num_steps: T.
      cost: time and memory of full BPTT and of each recommended window; None if not measured.
    """

    verdict_index: jax.Array
    rate: jax.Array
    half_life: jax.Array
    reach: jax.Array
    sliding_window: jax.Array
    block_window: jax.Array
    loss: jax.Array
    gradient_norm: jax.Array
    profile: LagProfile
    curve: TruncationCurve
    num_steps: int = field(metadata={"static": True})
    cost: Cost | None = field(default=None, metadata={"static": True})

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`; only outside of jit and vmap."""
        return VERDICTS[int(self.verdict_index)]

    def __str__(self) -> str:
        return _page(self) if np.ndim(self.verdict_index) == 0 else repr(self)


class Decay(NamedTuple):
    """How the norms of a gradient change with the lag; the fields of the same names in `Diagnosis`."""

    verdict_index: jax.Array
    rate: jax.Array
    half_life: jax.Array
    reach: jax.Array


def fit_decay(norms: jax.Array) -> Decay:
    """Reads a profile's `cotangent_norms`.

    The rate is the least-squares slope of `ln norms` against the lag, over the lags before 1 % of the
    first is reached: two lags at least, however fast it falls.
    """
    size = jnp.log(jnp.maximum(norms, jnp.finfo(norms.dtype).tiny))
    used = (jnp.cumsum(norms < 1e-2 * norms[0]) == 0) | (jnp.arange(len(norms)) < 2)
    lag, count = jnp.arange(len(norms), dtype=norms.dtype), jnp.sum(used)
    centred = jnp.where(used, lag - jnp.sum(jnp.where(used, lag, 0)) / count, 0)
    spread = jnp.sum(centred**2)
    rate = jnp.where(spread > 0, jnp.sum(centred * size) / jnp.where(spread > 0, spread, 1), 0.0)

    change = jnp.where(norms[0] > 0, rate * (len(norms) - 1), -jnp.inf)  # no gradient at all has vanished
    verdict = jnp.where(change <= -jnp.log(_CHANGE), 0, jnp.where(change >= jnp.log(_CHANGE), 2, 1))
    half_life = jnp.where(rate < 0, jnp.log(2.0) / jnp.where(rate < 0, -rate, 1), jnp.inf)
    return Decay(
        verdict_index=jnp.where(jnp.all(jnp.isfinite(norms)), verdict, 3),
        rate=rate,
        half_life=jnp.where(norms[0] == 0, 0.0, half_life),
        reach=jnp.max(jnp.where((norms > 0) & (norms >= 0.01 * norms[0]), lag.astype(int) + 1, 0)),
    )


def first_window(error: jax.Array, tolerance: float) -> jax.Array:
    """The smallest window whose error is within the tolerance; 0 if there is none."""
    good = error <= tolerance
    return jnp.where(jnp.any(good), jnp.argmax(good) + 1, 0)


def block_windows(gradient_fn: Callable, num_steps: int, tolerances: tuple[float, ...]) -> tuple[Sums, jax.Array]:
    """The exact sums, `gradient_fn(T)`, and for each tolerance a window that keeps it while its half does not.

    Bisection: `error(low) > tolerance ≥ error(high)`, a window of 0 keeps nothing. The error need not fall
    with every step of the window, so half of what was found is tried as well. The exact gradient opens
    the one loop over all gradients, which are thus compiled once.
    """
    levels = jnp.array(tolerances)

    def narrow(state):
        exact, found, k, low, high = state
        opening, searching = k < 0, high - low > 1
        n = jnp.where(searching, (low + high) // 2, high // 2)
        sums = gradient_fn(jnp.where(opening, num_steps, jnp.maximum(n, 1)))
        exact = jax.tree.map(partial(jnp.where, opening), sums, exact)
        error, _ = compared_with(exact.grad)(sums.grad)
        good = (n > 0) & (error <= levels[k])
        low = jnp.where(good, jnp.where(searching, low, n - 1), jnp.where(searching, n, low))
        high = jnp.where(good, n, high)
        settled = opening | ~(searching | good)
        found = jnp.where(settled & (jnp.arange(len(levels)) == k), high, found)
        return exact, found, k + settled, jnp.where(settled, 0, low), jnp.where(settled, num_steps, high)

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradient_fn, jnp.array(num_steps)))
    start = zeros, jnp.zeros(len(levels), int), jnp.array(-1), jnp.array(0), jnp.array(num_steps)
    exact, found, *_ = lax.while_loop(lambda state: state[2] < len(levels), narrow, start)
    return exact, found


def diagnose(
    step: Step,
    loss: Loss,
    params: Params,
    carry: Carry,
    batch: Batch,
    *,
    gates: jax.Array | None = None,
    max_window: int | None = None,
    measure: bool = True,
    num_repeats: int = 5,
) -> Diagnosis:
    """How far the gradient reaches, which window leaves 10 % and 1 % of error, and what each costs.

    The verdict compares the fitted change of the gradient norm over the lags measured: a tenth or less
    is vanishing, ten times or more exploding. Costs some 2·log₂ T gradients, to find the blocks, and
    max_window rounds of T step derivatives side by side; with `measure`, timed updates of up to five
    estimators more.

    Args:
      step: `(params, carry, x) -> (carry, y)`; every inexact carry leaf begins with the batch shape.
      loss: `(y, target) -> [*batch]`.
      params: the parameters.
      carry: what enters step 0.
      batch: real data, arrays.
      gates: `[T]` or `[T, *batch]`; diagnose the gated gradient (its costs are those without gates).
      max_window: the largest lag and sliding window considered; None: T, 512 at most.
      measure: whether to measure costs, on the host; False works under jit and vmap.
      num_repeats: timed updates of each estimator.

    Raises:
      ValueError: what `truncation_curve` and `lag_profile` raise.
    """
    num_steps, batch_shape = validation.check_problem(step, loss, params, carry, batch, gates)
    validation.check_carry_batch(carry, batch_shape, "the gradient is measured per example")
    gates = None if gates is None else jnp.asarray(gates)
    num_repeats = validation.check_positive_integer("num_repeats", num_repeats)
    if measure and any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((params, carry, batch, gates))):
        raise ValueError("measure=True needs arrays, got traced values; pass measure=False under jit and vmap")
    largest = min(num_steps, 512) if max_window is None else max_window
    largest = min(validation.check_positive_integer("max_window", largest), num_steps)

    def read(params, carry, batch, gates):
        def windowed(window):
            cuts = align_leading(truncation.fixed(num_steps, window), 1 if gates is None else jnp.ndim(gates))
            gated = cuts if gates is None else jnp.where(cuts == 0, 0, gates)
            return gradient_sums(step, loss, params, carry, batch, gated)[0]

        sums, blocks = block_windows(windowed, num_steps, TOLERANCES)
        problem = linearise(step, loss, params, carry, batch, batch_shape)
        read_profile, read_curve = profile_reader(problem), curve_reader(sums.grad)

        def read_both(state, *lag):  # one pass over the lags serves both
            _, profile = read_profile(None, *lag)
            state, curve = read_curve(state, *lag)
            return state, (profile, curve)

        profile, curve = scan_lags(problem, gates, largest, read_both, curve_start(sums.grad))
        curve = TruncationCurve(jnp.arange(1, largest + 1), *curve)
        return _read(sums, LagProfile(*profile), curve, blocks, num_steps)

    if not measure:
        return read(params, carry, batch, gates)
    found = jax.jit(read)(params, carry, batch, gates)
    return _with_cost(found, step, loss, params, carry, batch, num_repeats)


def _read(sums, profile: LagProfile, curve: TruncationCurve, blocks: jax.Array, num_steps: int) -> Diagnosis:
    decay = fit_decay(profile.cotangent_norms)
    gradient_norm = weighted_mean(norm(sums.grad), sums.weight)
    verdict = jnp.where(jnp.isfinite(gradient_norm) & jnp.isfinite(sums.loss), decay.verdict_index, 3)
    sliding = jnp.stack([first_window(curve.relative_error, tolerance) for tolerance in TOLERANCES])
    return Diagnosis(
        **decay._replace(verdict_index=verdict)._asdict(),
        sliding_window=sliding,
        block_window=jnp.where(verdict == 3, 0, blocks),
        loss=weighted_mean(sums.loss, sums.weight),
        gradient_norm=gradient_norm,
        profile=profile,
        curve=curve,
        num_steps=num_steps,
    )


def _with_cost(found: Diagnosis, step, loss, params, carry, batch, num_repeats) -> Diagnosis:
    blocks = sorted({int(w) for w in found.block_window if w > 0})
    sliding = sorted({int(w) for w in found.sliding_window if w > 0})
    estimators = {"full": full_bptt(step, loss)}
    for window in blocks:
        estimators[f"block {window}"] = fresh_blocks(truncated_bptt(step, loss, window=window), window)
    for window in sliding:
        estimators[f"sliding {window}"] = truncated_bptt(step, loss, window=window, stride=1)
    cost = measure_cost(estimators, params, carry, batch, num_repeats=num_repeats)
    return replace(found, cost=cost)


def _steps(value: Any, largest: int) -> str:
    return f"{int(value)}" if int(value) else f"> {largest}"


def _page(found: Diagnosis) -> str:
    """The page in plain text."""
    largest = len(found.curve.windows)
    norms = np.asarray(found.profile.cotangent_norms)
    half_life = float(found.half_life)
    halves = f"{half_life:.3g} steps" if np.isfinite(half_life) else "none (it does not shrink)"
    if found.rate > 0:
        halves = f"none (it doubles every {np.log(2) / float(found.rate):.3g} steps back)"
    if largest == 1:
        halves = "not measured (one lag)"
    reach = f"{int(found.reach)} steps" if found.reach < largest else f"all {largest} steps measured"
    lines = [
        f"Gradient over {found.num_steps} step{'s' * (found.num_steps > 1)}: {found.verdict}",
        f"  loss {float(found.loss):.4g}, gradient norm {float(found.gradient_norm):.3g}",
    ]
    if found.verdict == "non-finite":
        lines.append("  a loss, an adjoint or the gradient is NaN or infinite: no window can be recommended;")
        return "\n".join([*lines, "  jbptt.find_nonfinite says where that begins"])
    if norms.max() == 0:
        return "\n".join([*lines, "  no gradient flows back through the carry: every window is exact"])
    if found.num_steps == 1:
        return "\n".join([*lines, "  one step: there is nothing to go back through, and nothing to truncate"])
    lines += [
        f"  half-life {halves}; norm {norms[0]:.3g} at lag 0, {norms[-1]:.3g} at lag {largest - 1}",
        f"  reach     {reach} (at least 1 % of lag 0)",
        "",
        f"  {'window for':<14}{'steps':>8}{'time':>12}{'memory':>12}{'vs full BPTT':>24}",
    ]
    costs = (
        {}
        if found.cost is None
        else dict(
            zip(found.cost.names, zip(found.cost.median_seconds, found.cost.temporary_bytes, strict=True), strict=True)
        )
    )
    for kind, windows in (("sliding", found.sliding_window), ("block", found.block_window)):
        for tolerance, window in zip(TOLERANCES, windows, strict=True):
            label = f"{tolerance:.0%} {kind}"
            lines.append(f"  {label:<14}{_steps(window, largest):>8}" + _cost_cells(costs, f"{kind} {int(window)}"))
    lines.append(f"  {'full BPTT':<14}{found.num_steps:>8}" + _cost_cells(costs, "full"))
    lines.append(
        "  error: ‖ĝ − g‖ / ‖g‖ on this batch against the exact gradient; blocks cut at multiples of the window"
    )
    return "\n".join(lines)


def _cost_cells(costs: dict, name: str) -> str:
    if name not in costs:
        return ""
    (seconds, size), (full_seconds, full_size) = costs[name], costs["full"]
    ratio = "" if name == "full" else f"{seconds / full_seconds:.2f}× time, {size / max(full_size, 1):.2f}× memory"
    return f"{1e3 * seconds:>9.2f} ms{size / 2**20:>8.2f} MiB{ratio:>28}"
