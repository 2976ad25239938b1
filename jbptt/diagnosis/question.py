"""How far does my gradient reach, which window do I need, what does it cost, and what should I
change?
"""

from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from jbptt import engine, validation
from jbptt.analysis.costs import measure_cost
from jbptt.analysis.lags import LagProfile, TruncationCurve, linearise
from jbptt.analysis.nonfinite import nonfinite_of
from jbptt.arrays import align_leading, is_inexact, one_if_zero, weighted_mean
from jbptt.diagnosis.advice import SHARES, TOLERANCES, is_worth_trying
from jbptt.diagnosis.baseline import constant_loss
from jbptt.diagnosis.batch_parts import parts_of_batch
from jbptt.diagnosis.block_windows import find_blocks
from jbptt.diagnosis.by_lag import LEFT, look_back, measured_windows
from jbptt.diagnosis.decay import decay_of
from jbptt.diagnosis.dynamics import curvature_of, leading_exponent, own_path
from jbptt.diagnosis.progress_line import waiting
from jbptt.diagnosis.resampling import can_tell, products, total
from jbptt.diagnosis.result import Diagnosis, Dynamics, Flow, Units, Windows
from jbptt.diagnosis.several import as_one, batches_of
from jbptt.diagnosis.stuck_units import find_still, share_stuck
from jbptt.diagnosis.trials import recurrent_matrices, try_remedies
from jbptt.estimators import full_bptt, truncated_bptt
from jbptt.executables import WeakCache, is_traced
from jbptt.norms import norm
from jbptt.problem import Problem, answer, problem_of
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
    batch: Batch | Sequence[Batch],
    *,
    gates: jax.Array | None = None,
    max_window: int | None = None,
    learning_rate: float | jax.Array | None = None,
    measure: bool = True,
    num_repeats: int = 5,
    progress: bool | None = None,
) -> Diagnosis:
    """How far the gradient reaches, which window leaves 10 % and 1 % of error, what each costs,
    what to change.

    The verdict rests on how much of the losses' adjoints arrives at each lag, as measured: at most
    a tenth over the last quarter of the lags is vanishing, ten times or more, with a trend that
    says so, exploding; of what is left at lag 1 where that is below 1 %, a readout's own step.
    Lags are measured until less than 10⁻⁴ of the gradient is left and less than 1 % of the adjoints
    arrives. The windows recommended keep their error on batches like this one: on 95 % of those
    drawn from its parts, which are groups of examples, and stretches of time where there are fewer
    than 16 examples, or they see each other. Windows of 0: this batch cannot tell.

    Costs a third to a half of a gradient for each lag measured, half of one for each of the windows
    measured, one for each of some 8 windows of blocks tried, and six for the rest; memory O(T)
    carries and some four times the gradients of up to 16 parts. With `measure`, timed updates of up
    to five estimators more, and where a changed recurrent matrix may help, all of this twice more;
    where something is not finite, `find_nonfinite`.

    Args:
      step: `(params, carry, x) -> (carry, y)`; every inexact carry leaf begins with the batch
        shape. As under jit, a second call with the same functions and shapes compiles nothing, and
        does not see what they close over change.
      loss: `(y, target) -> [*batch]`.
      params: the parameters.
      carry: what enters step 0, or a function of the parameters that gives it.
      batch: real data, arrays; or up to 16 such batches of the same shapes, which tell better how
        batches differ: numbers are those of all together, windows those for one such batch.
      gates: `[T]` or `[T, *batch]`; diagnose the gated gradient (its costs are those without gates,
        its exponent and curvature those of the model).
      max_window: the largest lag and sliding window considered; None: T, 512 at most.
      learning_rate: of plain gradient descent; compared with the curvature along the gradient,
        which costs one second derivative.
      measure: whether to measure costs, and to try what may be advised, on the host; under jit and
        vmap it must be False.
      num_repeats: timed updates of each estimator.
      progress: whether to say on standard error what is being done, from two seconds on; None:
        where that is a terminal. Never where something is traced.

    Raises:
      ValueError: batches of different shapes; a learning rate that is not > 0; measure where
        something is traced; what `truncation_curve` and `lag_profile` raise.
    """
    why = "the gradient is measured per example"
    batches = batches_of(batch)
    problem = problem_of(step, loss, params, carry, batches[0], gates, per_example=why)
    if len(batches) > 1:
        together = as_one(step, loss, params, carry, batches, gates)
        problem = problem_of(*together, per_example=why)
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

    def ask(problem):
        with nullcontext() if traced else _nan_is_an_answer():
            return answer(_read, problem, largest, len(batches), given=(learning_rate,))

    with waiting(False if traced else progress) as tell:
        tell("compile, and measure the gradient by lag")
        found = ask(problem)
        if isinstance(found.verdict_index, Tracer):  # or what the step closes over is traced
            if measure:
                raise ValueError(MEASURES_ARRAYS)
            search = partial(answer, nonfinite_of, problem)
            return replace(
                found,
                nonfinite=lax.cond(found.verdict_index == 3, search, lambda: found.nonfinite),
            )
        if found.verdict == "non-finite":
            tell("look for what is not finite")
            found = replace(found, nonfinite=answer(nonfinite_of, problem))
        if not measure:
            return found
        if is_worth_trying(found):
            tell("try what may be advised")
            found = replace(found, trials=try_remedies(found, problem, ask))
        tell("time full BPTT and the windows")
        return _with_cost(found, step, loss, params, carry, batches[0], num_repeats)


@contextmanager
def _nan_is_an_answer():
    """What has no value, what is broken: no error."""
    with jax.debug_nans(False), jax.debug_infs(False):
        yield


def _read(
    problem: Problem, largest: int, num_batches: int, learning_rate: float | jax.Array | None
) -> Diagnosis:
    """Everything but the search for what is not finite and the costs, as one program."""
    linearised = linearise(problem)
    passed, weights, carries = linearised.passed, linearised.weights, linearised.carries
    parts = parts_of_batch(problem, passed.carries, passed.outputs, passed.outputs_bar, num_batches)
    blocks = find_blocks(linearised, parts, TOLERANCES)
    # Of the leaves of (params, carry, input), on what a step emits, and in its matrix products.
    at_first = problem.params, problem.carry, jax.tree.map(lambda a: a[0], problem.inputs)
    influences, factors = engine.dependences_and_factors(
        lambda *args: problem.parts.core(*args)[0], *at_first
    )
    counted = _counted(problem, influences)
    lags = look_back(linearised, parts, blocks, largest, counted)

    windows = measured_windows(largest)
    loss_sum, weight_sum = passed.sums.loss, passed.sums.weight
    gradient_norm = norm(total(blocks.exact)) * blocks.scale
    by_group = [parts.layout.by_group(leaf) for leaf in blocks.exact]
    part_norms = norm(by_group, 1) * blocks.scale
    part_weights = parts.layout.by_group(parts.layout.divide(jnp.abs(weights), fill_zero=True))
    part_weights = jnp.sum(part_weights, axis=tuple(range(1, part_weights.ndim)))
    decay = decay_of(linearised, lags)
    broken = ~jnp.isfinite(gradient_norm) | ~jnp.isfinite(loss_sum) | (decay.verdict_index == 3)
    rounding = 30 * max((float(jnp.finfo(leaf.dtype).eps) for leaf in carries), default=0.0)
    by_example = parts.layout.by_group(parts.layout.by_group(products(blocks.exact)).T)
    told, one_part = can_tell(by_example, rounding)
    inexact = (lags.upper_error > LEFT) & (windows < problem.num_steps)
    told = told | ~jnp.any(inexact)  # every window is as good as exact
    sliding = first_windows(lags.upper_error, windows, TOLERANCES, problem.num_steps)
    left = tuple(1 - share for share in SHARES)
    sources = first_windows(lags.relative_error, windows, left, problem.num_steps)
    curvature = None
    if learning_rate is not None:
        learning_rate = jnp.asarray(learning_rate)
        curvature = curvature_of(problem)
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
            jnp.where(broken, jnp.nan, blocks.tried_upper),
            lags.upper_error,
            told,
            one_part,
            sources,
        ),
        dynamics=Dynamics(
            *leading_exponent(linearised, counted),
            own_path(linearised, counted),
            curvature,
            learning_rate,
        ),
        units=Units(saturated, dead),
        loss=weighted_mean(loss_sum, weight_sum),
        constant_loss=constant_loss(problem, passed.outputs),
        gradient_norm=weighted_mean(gradient_norm, jnp.abs(weight_sum)),
        part_norms=jnp.where(part_weights > 0, part_norms / one_if_zero(part_weights), jnp.nan),
        nonfinite=jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), nonfinite),
        profile=LagProfile(lags.cotangent_norms, lags.grad_norms),
        curve=curve,
        num_used_steps=_used_steps(weights, problem.batch.mask),
        num_steps=problem.num_steps,
        carry_names=_carry_names(problem),
        recurrent_weights=recurrent_matrices(problem, influences, factors),
        unread=problem.live.unread,
    )


def _counted(problem: Problem, influences: list[frozenset[int]]) -> list[bool]:
    """Which inexact leaves of the carry count: those on which a parameter has an influence.

    All of them if there is none. What flows back through the others reaches no parameter.

    Args:
      problem: the recurrence.
      influences: for each leaf of the carry that a step emits, which leaves of (params, carry,
        input) have an influence on it.
    """
    num_params = len(jax.tree.leaves(problem.params))
    reached = [False] * len(influences)
    for _ in influences:  # each round follows the influence one leaf further
        reached = [
            any(
                i < num_params or reached[i - num_params]
                for i in of
                if i < num_params + len(influences)
            )
            for of in influences
        ]
    leaves = jax.tree.leaves(problem.carry)
    counted = [r for r, leaf in zip(reached, leaves, strict=True) if is_inexact(leaf)]
    return counted if any(counted) else [True] * len(counted)


def _carry_names(problem: Problem) -> tuple[str, ...]:
    """Of its inexact leaves, `carry['h']`."""
    leaves = jax.tree_util.tree_flatten_with_path(problem.carry)[0]
    return tuple(f"carry{jax.tree_util.keystr(p)}" for p, leaf in leaves if is_inexact(leaf))


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
    blocks, sliding = (
        {int(window) for window in np.asarray(of)} - {0}
        for of in (found.block_window, found.sliding_window)
    )
    # Blocks of the whole sequence are full BPTT.
    windows = tuple(sorted(blocks - {found.num_steps})), tuple(sorted(sliding))
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
