"""Which plan is fastest here: a measured choice, made when it is asked for and remembered for the process."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbptt import validation
from jbptt.analysis.comparison import Cost, measure_cost
from jbptt.estimators import full_bptt
from jbptt.plans import Plan
from jbptt.types import Batch, Carry, Loss, Params, Step

SEGMENTS = (16, 32, 64, 128, 256)
_CHOICES: dict[Any, tuple[Plan, Cost]] = {}


def candidate_plans(num_steps: int, batch_shape: tuple[int, ...]) -> tuple[Plan, ...]:
    """The default segment, the whole sequence and those of `SEGMENTS` that are shorter, on one device and on all."""
    segments = [None, *(segment for segment in SEGMENTS if segment < num_steps), num_steps]
    num_devices = jax.device_count()
    divisible = bool(batch_shape) and num_devices > 1 and batch_shape[0] % num_devices == 0
    return tuple(Plan(segment, shards) for shards in ([1, num_devices] if divisible else [1]) for segment in segments)


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

    Compiles and runs one update of every candidate: seconds to minutes. The answer is remembered by step, loss and
    shapes, so that asking again costs nothing. It belongs to this machine, and noise may change it between two plans
    that are equally fast; without it an estimator's plan is always the same.

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
      ValueError: no candidates, num_repeats < 1, no candidate within the budget (it names the smallest); what
        `full_bptt` raises.
    """
    num_steps, batch_shape = validation.check_problem(step, loss, params, carry, batch)
    plans = candidate_plans(num_steps, batch_shape) if plans is None else tuple(plans)
    if not plans:
        raise ValueError("plans must name at least one jbptt.Plan, got none; leave it out for the usual candidates")
    shapes = jax.tree.map(lambda a: (jnp.shape(a), jnp.result_type(a)), (params, carry, batch))
    asked = step, loss, plans, num_repeats, str(shapes)
    if asked not in _CHOICES:
        estimators = {str(plan): full_bptt(step, loss, plan=plan) for plan in plans}
        cost = measure_cost(estimators, params, carry, batch, num_repeats=num_repeats)
        _CHOICES[asked] = plans[int(np.argmin(cost.median_seconds))], cost
    fastest, cost = _CHOICES[asked]
    if memory_budget is None:
        return fastest, cost
    fits = cost.temporary_bytes <= memory_budget
    if not fits.any():
        smallest = int(np.nanargmin(cost.temporary_bytes))
        raise ValueError(
            f"memory_budget is {memory_budget:.3g} bytes, and the least that any candidate takes is "
            f"{cost.temporary_bytes[smallest]:.3g} ({plans[smallest]}); allow that much, or shorten the batch"
        )
    return plans[int(np.argmin(np.where(fits, cost.median_seconds, np.inf)))], cost
