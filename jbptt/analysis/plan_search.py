"""The fastest plan on this machine: measured when asked for, kept while step and loss live."""

import contextlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jbptt import validation
from jbptt.analysis.costs import Cost, measure_cost
from jbptt.estimators import full_bptt
from jbptt.executables import WeakCache
from jbptt.plans import Plan, check_shards
from jbptt.problem import check_problem, problem_of
from jbptt.recurrence import default_segment
from jbptt.starts import kept, start_shapes
from jbptt.types import Batch, Carry, Loss, Params, Step

SEGMENTS = (16, 32, 64, 128, 256)
_CHOICES = WeakCache()


def candidate_plans(
    step: Step, loss: Loss, params: Params, carry: Carry, batch: Batch
) -> tuple[Plan, ...]:
    """The default segment, all of T, and shorter `SEGMENTS`, on one device and on all.

    All devices only where the examples can be divided over them.
    """
    problem = problem_of(step, loss, params, carry, batch)
    num_steps = problem.num_steps
    default = default_segment(num_steps)
    lengths = [
        segment for segment in (*SEGMENTS, num_steps) if segment <= num_steps and segment != default
    ]
    segments, num_devices, shards = [None, *dict.fromkeys(lengths)], jax.device_count(), [1]
    if num_devices > 1:
        with contextlib.suppress(ValueError):
            check_shards(problem, num_devices)
            shards.append(num_devices)
    return tuple(Plan(segment, number) for number in shards for segment in segments)


def choose_plan(
    step: Step,
    loss: Loss,
    params: Params,
    carry: Carry,
    batch: Batch,
    *,
    plans: Sequence[Plan] | None = None,
    memory_budget: float | None = None,
    num_repeats: int = 5,
) -> tuple[Plan, Cost]:
    """The fastest plan for the full gradient of batches of this shape, measured on the host.

    Compiles and runs one update of every candidate: seconds to minutes. The answer is remembered by
    step, loss (where they can be hashed) and shapes, as long as these two functions live, so that
    asking again costs nothing. It holds for this machine; of two plans that are equally fast, noise
    decides. No estimator searches by itself: its default plan is always the same.

    Args:
      step: `(params, carry, x) -> (carry, y)`.
      loss: `(y, target) -> [*batch]`, or that and aux.
      params, carry, batch: arrays of the shapes to come.
      plans: the candidates; None: `candidate_plans`.
      memory_budget: the most temporary bytes that an update may take; None: any.
      num_repeats: timed updates of each plan.

    Returns:
      The plan, and the `Cost` of all candidates by the words of their plans.

    Raises:
      ValueError: no candidates, num_repeats < 1, a budget ≤ 0 or unknown sizes under it, no
        candidate within the budget (it names the smallest), called while tracing; what `full_bptt`
        raises.
    """
    check_problem(step, loss, params, carry, batch)
    carry = kept(carry)
    if memory_budget is not None:
        validation.check_above("memory_budget", memory_budget, 0, "no plan needs so little")
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((params, carry, batch))):
        raise ValueError(
            "choose_plan measures on the host, and was called inside jit, grad or vmap; call it "
            "before"
        )
    plans = (
        candidate_plans(step, loss, params, carry, batch)
        if plans is None
        else tuple(dict.fromkeys(plans))
    )
    if not plans:
        raise ValueError(
            "plans must name at least one jbptt.Plan, got none; leave it out for the usual "
            "candidates"
        )
    shapes = jax.tree.map(
        lambda a: (jnp.shape(a), jax.dtypes.result_type(a)),
        (params, start_shapes(carry, params), batch),
    )

    def measure(step, loss):
        estimators = {str(plan): full_bptt(step, loss, plan=plan) for plan in plans}
        return measure_cost(estimators, params, carry, batch, num_repeats=num_repeats)

    cost = _CHOICES.find((step, loss), (plans, num_repeats, str(shapes)), measure)
    if memory_budget is None:
        return plans[int(np.argmin(cost.median_seconds))], cost
    fits = cost.temporary_bytes <= memory_budget
    if np.isnan(cost.temporary_bytes).all():
        raise ValueError(
            "memory_budget was given, and this backend does not say how much a program takes; "
            "leave it out"
        )
    if not fits.any():
        smallest = int(np.nanargmin(cost.temporary_bytes))
        raise ValueError(
            f"memory_budget is {memory_budget:.3g} bytes, and the least that any candidate takes "
            f"is {cost.temporary_bytes[smallest]:.3g} ({plans[smallest]}); allow that much, or "
            "shorten the batch"
        )
    return plans[int(np.argmin(np.where(fits, cost.median_seconds, np.inf)))], cost
