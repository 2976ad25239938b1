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

from jbptt import truncation, validation
from jbptt.analysis.advice import TOLERANCES
from jbptt.analysis.blocks import candidate_windows, choose_blocks, gradients_in_turn
from jbptt.analysis.costs import measure_cost
from jbptt.analysis.evidence import (
    curvature_along,
    fit_decay,
    leading_exponent,
    split_batch,
    starts_below_precision,
)
from jbptt.analysis.findings import Diagnosis
from jbptt.analysis.lags import (
    LagProfile,
    Linearised,
    TruncationCurve,
    curve_reader,
    curve_start,
    linearise,
    profile_reader,
    scan_lags,
)
from jbptt.analysis.nonfinite import nonfinite_of
from jbptt.analysis.stuck import share_stuck, stays_zero
from jbptt.arrays import align_leading, weighted_mean
from jbptt.bias_bound import bound_bias
from jbptt.estimators import full_bptt, truncated_bptt
from jbptt.executables import WeakCache, is_traced
from jbptt.norms import norm
from jbptt.problem import Problem, answer, problem_of
from jbptt.segments import Sums, back_through
from jbptt.types import Batch, Carry, Estimator, Loss, Params, Step

MEASURES_ARRAYS = (
    "measure=True needs arrays, got traced values; pass measure=False under jit and vmap"
)


def first_windows(errors: jax.Array, tolerances: tuple[float, ...], num_steps: int) -> jax.Array:
    """For each tolerance the smallest window whose error is within it; 0 if there is none.

    A window of T is exact, whatever rounding to half precision makes of the sum over its lags.
    """
    exact = jnp.arange(1, len(errors) + 1) >= num_steps
    good = exact | (errors <= jnp.array(tolerances)[:, None])
    return jnp.where(jnp.any(good, axis=1), jnp.argmax(good, axis=1) + 1, 0)


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

    The verdict rests on the change that the rate, fitted to the lags before 1 %, makes over the
    lags measured: a tenth or less is vanishing, ten times or more exploding; a gradient that
    becomes exactly zero is never stable, and one lag gives no verdict (the page says so).
    Costs some 25 gradients at T = 16, 35 at 100 and 45 at 4096 (the exact one, one for each of up
    to 16 parts of the batch, one for each window of blocks tried), and max_window rounds of T step
    derivatives side by side; with `measure`, timed updates of up to five estimators more; where
    something is not finite, `find_nonfinite`.

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
    sums, sizes, (blocks, block_error) = _blocks(problem)
    linearised = linearise(problem)
    profile, curve, kept = _lags(linearised, largest, sums)
    weights, carries, num_steps = linearised.weights, linearised.carries, problem.num_steps

    num_lags, num_used_steps = _used_steps(weights, problem.batch.mask, largest)
    smallest = max((float(jnp.finfo(c.dtype).tiny) for c in carries), default=0.0)
    heaviest = jnp.max(jnp.abs(weights))  # the adjoints carry their loss's weight
    decay = fit_decay(
        profile.cotangent_norms, num_lags, smallest / jnp.where(heaviest > 0, heaviest, 1)
    )
    decay = decay._replace(underflow=decay.underflow | starts_below_precision(linearised))
    broken = ~jnp.isfinite(sizes[0]) | ~jnp.isfinite(sums.loss) | (decay.verdict_index == 3)
    verdict = jnp.where(broken, 3, decay.verdict_index)
    bound = bound_bias(*profile, kept, num_lags=num_lags, tolerances=TOLERANCES)
    exponent, exponent_spread = leading_exponent(linearised)
    immovable = stays_zero(problem.step, problem.params, linearised.passed.carries, problem.batch)
    saturated, dead = share_stuck(carries, immovable, problem.batch.mask, problem.batch_shape)
    curvature = None
    if learning_rate is not None:
        learning_rate = jnp.asarray(learning_rate)
        flat, unflatten = ravel_pytree(problem.params)

        def mean_gradient(flat):
            there = replace(problem, params=unflatten(flat), gates=None)
            there = _flat(back_through(there).sums)
            return weighted_mean(there.grad, there.weight)

        curvature = curvature_along(sums.grad, mean_gradient, flat)
    nonfinite = jax.eval_shape(partial(nonfinite_of, problem))
    return Diagnosis(
        **decay._replace(verdict_index=verdict)._asdict(),
        sliding_window=jnp.where(
            broken, 0, first_windows(curve.relative_error, TOLERANCES, num_steps)
        ),
        num_lags=num_lags,
        block_window=jnp.where(broken, 0, blocks),
        block_error=jnp.where(broken, jnp.nan, block_error),
        bias_bound=bound.bias_bound,
        bound_window=jnp.where(broken, 0, bound.bound_window),
        loss=weighted_mean(sums.loss, sums.weight),
        gradient_norm=sizes[0],
        part_norms=sizes[1:],
        exponent=exponent,
        exponent_spread=exponent_spread,
        saturated=saturated,
        dead=dead,
        nonfinite=jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), nonfinite),
        profile=profile,
        curve=curve,
        num_used_steps=num_used_steps,
        num_steps=num_steps,
        num_carry_leaves=len(carries),
        unread=problem.live.unread,
        learning_rate=learning_rate,
        curvature=curvature,
    )


def _used_steps(weights, mask, largest) -> tuple[jax.Array, jax.Array]:
    """How many lags have pairs of a loss and a carry, and how many steps of an example lead to a
    loss.
    """
    num_steps = len(weights)
    steps = jnp.arange(1, num_steps + 1)
    last = jnp.max(
        jnp.where(weights != 0, align_leading(steps, weights.ndim), 0), axis=0
    )  # the loss that counts last
    real = jnp.ones(num_steps, bool) if mask is None else mask
    leads = align_leading(real, weights.ndim) & (align_leading(steps, weights.ndim) <= last)
    return jnp.minimum(jnp.max(last), largest), jnp.max(jnp.sum(leads, axis=0))


def _blocks(problem: Problem) -> tuple[Sums, jax.Array, tuple]:
    """The exact sums, the norm of the mean gradient of the whole and of each part, windows of
    blocks and errors.
    """
    num_steps, batch, gates, batch_shape = (
        problem.num_steps,
        problem.batch,
        problem.gates,
        problem.batch_shape,
    )
    windows, tried = candidate_windows(num_steps)
    part_of, num_parts = split_batch(num_steps, batch_shape)

    def gradient(window, part):
        cuts = align_leading(
            truncation.fixed(num_steps, window), 1 if gates is None else jnp.ndim(gates)
        )
        gated = cuts if gates is None else jnp.where(cuts == 0, 0, gates)
        weights = (
            jnp.ones(num_steps, jnp.float32)
            if batch.weights is None
            else jnp.asarray(batch.weights)
        )
        chosen = jnp.where((part < 0) | (part_of == part), align_leading(weights, part_of.ndim), 0)
        cut = problem.on(problem.carry, batch._replace(weights=chosen), gated)
        return _flat(back_through(cut).sums)

    sums, sizes, errors = gradients_in_turn(gradient, tried, num_parts)
    return sums, sizes, choose_blocks(errors, tried, windows, TOLERANCES)


def _lags(
    linearised: Linearised, largest: int, sums: Sums
) -> tuple[LagProfile, TruncationCurve, jax.Array]:
    """Profile, curve and the norm of what each sliding window leaves: one pass over the lags serves
    all.
    """
    read_profile, read_curve = (
        profile_reader(linearised.weights, signed=False),
        curve_reader(sums.grad),
    )

    def read(state, lag, cotangents, grad):
        grad = ravel_pytree(grad)[0]
        _, profile = read_profile(None, lag, cotangents, grad)
        state, curve = read_curve(state, lag, cotangents, grad)
        return state, (profile, curve, weighted_mean(norm(state[0]), jnp.abs(sums.weight)))

    profile, curve, kept = scan_lags(linearised, largest, read, curve_start(sums.grad))
    return LagProfile(*profile), TruncationCurve(jnp.arange(1, largest + 1), *curve), kept


def _flat(sums: Sums) -> Sums:
    """Sums with the gradient as one vector, in which a program of many norms compiles faster."""
    return sums._replace(grad=ravel_pytree(sums.grad)[0])


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
