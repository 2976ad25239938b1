"""How a gradient is computed. Nothing here changes what it is, but for rounding."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from jbptt import validation
from jbptt.adjoint import Sums, gradient_sums
from jbptt.types import Batch, Carry, Loss, Params, PyTree, Step

SHARDS = "jbptt_shards"


@dataclass(frozen=True)
class Plan:
    """How the gradient of one batch is computed.

    Attributes:
      segment: steps recomputed at a time; None: all of T up to 128, then √T, 64 at least.
      num_shards: devices over which the examples are divided, the first of `jax.devices()`. Each takes its share of
        the batch through all of time, and the sums are added at the end. On CPU cores are devices after
        `jax.config.update("jax_num_cpu_devices", n)`, before the first computation. Every leaf of carry, xs and targets
        that has the batch axis is divided; examples must not see each other inside a step.

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
) -> tuple[Sums, Carry]:
    """`gradient_sums` as the plan says."""

    def run(params, carry, batch, gates):
        return gradient_sums(step, loss, params, carry, batch, gates, plan.segment)

    if plan.num_shards == 1:
        return run(params, carry, batch, gates)
    return divided(run, params, carry, batch, gates, batch_shape, plan.num_shards)


def _specs(tree: PyTree, axis: int, num_examples: int) -> PyTree:
    """Divided along `axis` where that is the batch, whole elsewhere."""

    def one(leaf):
        is_batch = jnp.ndim(leaf) > axis and jnp.shape(leaf)[axis] == num_examples
        return PartitionSpec(*[None] * axis, SHARDS) if is_batch else PartitionSpec()

    return jax.tree.map(one, tree)


def check_division(carry: Carry, batch_shape: tuple[int, ...], num_shards: int) -> None:
    """A ValueError unless the examples can be divided, and nothing in the carry belongs to all of them."""
    num_examples = batch_shape[0] if batch_shape else 1
    if num_examples % num_shards:
        raise ValueError(
            f"num_shards={num_shards} must divide the batch of {num_examples} examples; pass a number that does"
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(carry):
        if jnp.shape(leaf)[:1] != (num_examples,):
            raise ValueError(
                f"carry{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)} and no axis of {num_examples} examples "
                "in front, so it cannot be divided; pass num_shards=1, or a carry whose leaves are per example"
            )


def divided(
    run: Callable, params: Params, carry: Carry, batch: Batch, gates: Any, batch_shape: tuple[int, ...], num_shards: int
) -> Any:
    """`run(params, carry, batch, gates) -> (sums, carry)`, each device on its examples, the sums added up."""
    check_division(carry, batch_shape, num_shards)
    num_examples = batch_shape[0]
    mesh = jax.make_mesh((num_shards,), (SHARDS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:num_shards])
    whole = PartitionSpec()
    of_carry = _specs(carry, 0, num_examples)

    def own_share(params, carry, batch, gates):
        sums, carry = run(params, carry, batch, gates)
        return lax.psum(sums, SHARDS), carry

    # Without the check: under it every segment's gradient would be added up over the devices.
    shares = jax.shard_map(
        own_share,
        mesh=mesh,
        in_specs=(whole, of_carry, _specs(batch, 1, num_examples), _specs(gates, 1, num_examples)),
        out_specs=(whole, of_carry),
        check_vma=False,
    )
    return shares(params, carry, batch, gates)
