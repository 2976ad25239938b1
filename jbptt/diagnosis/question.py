"""How far does my gradient reach, which window do I need, what does it cost, and what should I
change?
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.flatten_util import ravel_pytree

from jbptt import engine, validation
from jbptt.analysis.costs import measure_cost
from jbptt.analysis.lags import LagProfile, Linearised, TruncationCurve, linearise
from jbptt.analysis.nonfinite import nonfinite_of
from jbptt.arrays import align_leading, is_inexact, one_if_zero, weighted_mean
from jbptt.diagnosis.advice import TOLERANCES
from jbptt.diagnosis.batch_parts import parts_of_batch
from jbptt.diagnosis.block_windows import find_blocks
from jbptt.diagnosis.by_lag import LEFT, Lags, look_back, measured_windows
from jbptt.diagnosis.decay import Decay, fit_decay, starts_below_precision
from jbptt.diagnosis.dynamics import curvature_along, leading_exponent
from jbptt.diagnosis.resampling import can_tell, products, total
from jbptt.diagnosis.result import Diagnosis, Dynamics, Flow, Units, Windows
from jbptt.diagnosis.stuck_units import find_still, share_stuck
from jbptt.estimators import full_bptt, truncated_bptt
from jbptt.executables import WeakCache, is_traced
from jbptt.norms import norm
from jbptt.problem import Problem, answer, problem_of
from jbptt.segments import back_through
from jbptt.types import Batch, Carry, Estimator, Loss, Params, Step

MEASURES_ARRAYS = (
    "measure=True needs arrays, got traced values; pass measure=False under jit and vmap"
)


def first_windows(
    errors: jax.Array, windows: np.ndarray, tolerances: tuple[float, ...], num_steps: int
) -> jax.Array:
    """For each tolerance the window from which on no error measured exceeds it; 0 if there is none.

    A window of T is exact, whatever rounding to half precision makes of the sum over its lags.
    NaN, a window that was not measured since nothing was left to measure, exceeds nothing.
    """
    levels = jnp.array(tolerances)[:, None]
    bad = (errors > levels) & (windows < num_steps)
    number = jnp.arange(len(windows))
    first = jnp.max(jnp.where(bad, number, -1), axis=1) + 1
    measured = jnp.sum(~jnp.isnan(errors))
    found = jnp.array([*windows, 0])[jnp.minimum(first, len(windows))]
    return jnp.where((first < measured) | (measured == 0), found, 0)


def diagnose(
    step: Step,
    loss: Loss,
    params: Params,
    carry: Carry,
    batch: Batch,
    *,
    gates: jax.Array | None = None,
    max_window: int | None = None,
    learning_rate: float | jax.Array | None = None,
    measure: bool = True,
    num_repeats: int = 5,
) -> Diagnosis:
    """How far the gradient reaches, which window leaves 10 % and 1 % of error, what each costs,
    what to change.

    The verdict rests on how much of the losses' adjoints arrives at each lag, as measured: at most
    a tenth over the last quarter of the lags is vanishing, ten times or more, with a trend that
    says so, exploding. Lags are measured until less than 10⁻⁴ of the gradient is left and less than
    1 % of the adjoints arrives. The windows recommended keep their error on batches like this one:
    on 95 % of those drawn with replacement from its parts, which are groups of examples, and
    stretches of time where there are fewer than 16 examples, or they see each other. Windows of 0:
    this batch cannot tell.

    Costs a third to a half of a gradient for each lag measured, half of one for each of the windows
    measured, one for each of some 8 windows of blocks tried, and six for the rest; memory O(T)
    carries and some four times the gradients of up to 16 parts. With `measure`, timed updates of up
    to five estimators more; where something is not finite, `find_nonfinite`.

    Args:
      step: `(params, carry, x) -> (carry, y)`; every inexact carry leaf begins with the batch
        shape. As under jit, a second call with the same functions and shapes compiles nothing, and
        does not see what they close over change.
      loss: `(y, target) -> [*batch]`.
      params: the parameters.
      carry: what enters step 0, or a function of the parameters that gives it.
      batch: real data, arrays.
      gates: `[T]` or `[T, *batch]`; diagnose the gated gradient (its costs are those without gates,
        its exponent and curvature those of the model).
      max_window: the largest lag and sliding window considered; None: T, 512 at most.
      learning_rate: of plain gradient descent; compared with the curvature along the gradient,
        which costs one second derivative.
      measure: whether to measure costs, on the host; under jit and vmap it must be False.
      num_repeats: timed updates of each estimator.

    Raises:
      ValueError: a learning rate that is not > 0; measure where something is traced; what
        `truncation_curve` and `lag_profile` raise.
    """
    why = "the gradient is measured per example"
    problem = problem_of(step, loss, params, carry, batch, gates, per_example=why)
    num_repeats = validation.check_positive_integer("num_repeats", num_repeats)
    if learning_rate is not None:
        validation.check_above(
            "learning_rate", learning_rate, 0, "it scales the step down the gradient"
        )
    traced = is_traced((params, problem.carry, batch, gates, learning_rate))
    if measure and traced:
        raise ValueError(MEASURES_ARRAYS)
    largest = min(problem.num_steps, 512) if max_window is None else max_window
    largest = min(validation.check_positive_integer("max_window", largest), problem.num_steps)

    if traced:
        found = answer(_read, problem, largest, given=(learning_rate,))
    else:
        with (
            jax.debug_nans(False),
            jax.debug_infs(False),
        ):  # here they are answers: what has no value, what is broken
            found = answer(_read, problem, largest, given=(learning_rate,))
    if isinstance(found.verdict_index, Tracer):  # or what the step closes over is traced
        if measure:
            raise ValueError(MEASURES_ARRAYS)
        search = partial(answer, nonfinite_of, problem)
        return replace(
            found, nonfinite=lax.cond(found.verdict_index == 3, search, lambda: found.nonfinite)
        )
    if found.verdict == "non-finite":
        found = replace(found, nonfinite=answer(nonfinite_of, problem))
    return _with_cost(found, step, loss, params, carry, batch, num_repeats) if measure else found


def _read(problem: Problem, largest: int, learning_rate: float | jax.Array | None) -> Diagnosis:
    """Everything but the search for what is not finite and the costs, as one program."""
    linearised = linearise(problem)
    passed, weights, carries = linearised.passed, linearised.weights, linearised.carries
    parts = parts_of_batch(problem, passed.carries, passed.outputs, passed.outputs_bar)
    blocks = find_blocks(linearised, parts, TOLERANCES)
    lags = look_back(linearised, parts, blocks, largest, _reached(problem))

    windows = measured_windows(largest)
    loss_sum, weight_sum = passed.sums.loss, passed.sums.weight
    gradient_norm = norm(total(blocks.exact)) * blocks.scale
    by_group = [parts.layout.by_group(leaf) for leaf in blocks.exact]
    part_norms = norm(by_group, 1) * blocks.scale
    part_weights = parts.layout.by_group(parts.layout.divide(jnp.abs(weights), fill_zero=True))
    part_weights = jnp.sum(part_weights, axis=tuple(range(1, part_weights.ndim)))
    decay = _decay(linearised, lags)
    broken = ~jnp.isfinite(gradient_norm) | ~jnp.isfinite(loss_sum) | (decay.verdict_index == 3)
    rounding = 30 * max((float(jnp.finfo(leaf.dtype).eps) for leaf in carries), default=0.0)
    told = can_tell(products(blocks.exact), rounding)
    inexact = (lags.upper_error > LEFT) & (windows < problem.num_steps)
    told = told | ~jnp.any(inexact)  # every window is as good as exact
    sliding = first_windows(lags.upper_error, windows, TOLERANCES, problem.num_steps)
    curvature = None
    if learning_rate is not None:
        learning_rate = jnp.asarray(learning_rate)
        curvature = _curvature(problem)
    still = find_still(problem.step, problem.params, passed.carries, problem.batch)
    saturated, dead = share_stuck(carries, still, problem.batch.mask, problem.batch_shape)
    nonfinite = jax.eval_shape(partial(nonfinite_of, problem))
    block_error = jnp.where(broken, jnp.nan, blocks.errors.here)
    curve = TruncationCurve(
        jnp.array(windows),
        lags.relative_error,
        lags.cosine,
        lags.block_relative_error,
        lags.block_cosine,
    )
    return Diagnosis(
        decay=decay._replace(verdict_index=jnp.where(broken, 3, decay.verdict_index)),
        flow=Flow(lags.num_measured, lags.arrives, lags.leaf_arrives, lags.alive, lags.by_example),
        windows=Windows(
            jnp.where(broken | ~told, 0, sliding),
            jnp.where(broken | ~told, 0, blocks.window),
            block_error,
            lags.upper_error,
            told,
        ),
        dynamics=Dynamics(*leading_exponent(linearised), curvature, learning_rate),
        units=Units(saturated, dead),
        loss=weighted_mean(loss_sum, weight_sum),
        gradient_norm=weighted_mean(gradient_norm, jnp.abs(weight_sum)),
        part_norms=jnp.where(part_weights > 0, part_norms / one_if_zero(part_weights), jnp.nan),
        nonfinite=jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), nonfinite),
        profile=LagProfile(lags.cotangent_norms, lags.grad_norms),
        curve=curve,
        num_used_steps=_used_steps(weights, problem.batch.mask),
        num_steps=problem.num_steps,
        num_carry_leaves=len(carries),
        unread=problem.live.unread,
    )


def _reached(problem: Problem) -> list[bool]:
    """For each inexact leaf of the carry, whether any parameter has an influence on it."""
    arguments = problem.params, problem.carry, jax.tree.map(lambda a: a[0], problem.inputs)
    num_params = len(jax.tree.leaves(problem.params))
    emitted = engine.dependences(lambda *args: problem.parts.core(*args)[0], *arguments)
    reached = [False] * len(emitted)
    for _ in emitted:  # each round follows the influence one leaf further
        reached = [
            any(
                i < num_params or reached[i - num_params]
                for i in of
                if i < num_params + len(emitted)
            )
            for of in emitted
        ]
    leaves = jax.tree.leaves(problem.carry)
    return [r for r, leaf in zip(reached, leaves, strict=True) if is_inexact(leaf)]


def _decay(linearised: Linearised, lags: Lags) -> Decay:
    """The decay of what arrives at each lag."""
    weights, carries = linearised.weights, linearised.carries
    measured = jnp.arange(len(lags.arrives)) < lags.num_measured
    arrives = jnp.where(measured, lags.arrives, 0)
    smallest = max((float(jnp.finfo(c.dtype).tiny) for c in carries), default=0.0)
    heaviest = one_if_zero(jnp.max(jnp.abs(weights)) * lags.cotangent_norms[0])
    fit = fit_decay(arrives, lags.num_measured, smallest / heaviest)
    return fit._replace(underflow=fit.underflow | starts_below_precision(linearised))


def _curvature(problem: Problem) -> jax.Array:
    """The second derivative of the mean loss along its gradient."""
    flat, unflatten = ravel_pytree(problem.params)

    def mean_gradient(flat):
        sums = back_through(replace(problem, params=unflatten(flat), gates=None)).sums
        return weighted_mean(ravel_pytree(sums.grad)[0], sums.weight)

    return curvature_along(mean_gradient(flat), mean_gradient, flat)


def _used_steps(weights: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The largest number of real steps of an example up to its last loss that counts."""
    num_steps = len(weights)
    steps = align_leading(jnp.arange(1, num_steps + 1), weights.ndim)
    last = jnp.max(jnp.where(weights != 0, steps, 0), axis=0)
    real = jnp.ones(num_steps, bool) if mask is None else mask
    leads = align_leading(real, weights.ndim) & (steps <= last)
    return jnp.max(jnp.sum(leads, axis=0))


def _with_cost(found: Diagnosis, step, loss, params, carry, batch, num_repeats) -> Diagnosis:
    """With the costs of full BPTT and of the windows recommended; the arguments of `diagnose`."""
    windows = tuple(
        tuple(sorted({w for w in np.asarray(of).tolist() if w > 0}))
        for of in (found.block_window, found.sliding_window)
    )
    # The same estimators in every call: their updates are compiled once.
    estimators = _ESTIMATORS.find((step, loss), windows, partial(_recommended, *windows))
    cost = measure_cost(estimators, params, carry, batch, num_repeats=num_repeats)
    return replace(found, cost=cost)


_ESTIMATORS = WeakCache()


def _recommended(blocks, sliding, step, loss) -> dict[str, Estimator]:
    estimators = {"full": full_bptt(step, loss)}
    for window in blocks:
        estimators[f"block {window}"] = truncated_bptt(step, loss, window=window, streams=False)
    for window in sliding:
        estimators[f"sliding {window}"] = truncated_bptt(step, loss, window=window, stride=1)
    return estimators
