"""How a gradient is computed. Nothing here changes what it is, but for rounding."""

from dataclasses import dataclass

import jax

from jbptt import validation
from jbptt.division import check_division, divided
from jbptt.segments import Sums, back_through, parts_of
from jbptt.types import Batch, Carry, Loss, Params, Step


@dataclass(frozen=True)
class Plan:
    """How the gradient of one batch is computed.

    Attributes:
      segment: steps recomputed at a time; None: all of T up to 512, then √T, 64 at least.
      num_shards: devices over which the examples are divided, the first of `jax.devices()`. Each takes its share of
        the batch through all of time, and the sums are added at the end. On CPU cores are devices after
        `jax.config.update("jax_num_cpu_devices", n)`, before the first computation. Every leaf of carry, xs and targets
        that has the batch axis is divided; examples must not see each other inside a step, and random numbers must come
        from a key per example.

    Raises:
      ValueError: a segment or num_shards < 1, or more shards than devices.

    >>> print(Plan(segment=32))
    segments of 32 steps on one device
    """

    segment: int | None = None
    num_shards: int = 1

    def __post_init__(self):
        if self.segment is not None:
            validation.check_positive_integer("segment", self.segment)
        validation.check_positive_integer("num_shards", self.num_shards)
        if self.num_shards > 1 and self.num_shards > jax.device_count():  # 1 must not start a backend
            raise ValueError(
                f"num_shards must be at most the number of devices, {jax.device_count()}, got {self.num_shards}. On "
                'CPU cores become devices by jax.config.update("jax_num_cpu_devices", n) before the first computation'
            )

    def __str__(self):
        segments = "segments of default length" if self.segment is None else f"segments of {self.segment} steps"
        where = "one device" if self.num_shards == 1 else f"{self.num_shards} devices, the batch divided over them"
        return f"{segments} on {where}"


def plan_of(segment: int | None, plan: Plan | None) -> Plan:
    """What an estimator was given: a segment alone, a whole plan, or neither."""
    if plan is None:
        return Plan(segment)
    if not isinstance(plan, Plan):
        raise ValueError(f"plan must be a jbptt.Plan, got {type(plan).__name__}; write Plan(segment=…, num_shards=…)")
    if segment is not None:
        raise ValueError(f"segment={segment} and a plan were given; write plan=Plan(segment={segment}, …)")
    return plan


def planned_sums(
    step: Step,
    loss: Loss,
    params: Params,
    carry: Carry,
    batch: Batch,
    gates: jax.Array | None,
    batch_shape: tuple[int, ...],
    plan: Plan,
) -> tuple[Sums, Carry, list]:
    """The sums of one batch as the plan says, the carry after it, and the cotangents of the one that entered."""
    parts = parts_of(step, loss)

    def run(params, carry, batch, gates):
        passed = back_through(parts, params, carry, batch, gates, plan.segment)
        return passed.sums, passed.carry, passed.cotangents

    if plan.num_shards == 1:
        return run(params, carry, batch, gates)
    check_division(step, loss, params, carry, batch, batch_shape, plan.num_shards)
    return divided(run, params, carry, batch, gates, batch_shape[0], plan.num_shards)
