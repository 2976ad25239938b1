"""How a gradient is computed. Nothing here changes what it is, but for rounding."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from jbptt import validation
from jbptt.engine import dependences, draws
from jbptt.problem import Problem
from jbptt.segments import Updated
from jbptt.types import PyTree

SHARDS = "jbptt_shards"


@dataclass(frozen=True)
class Plan:
    """How an estimator computes the gradient of one batch.

    Attributes:
      segment: steps recomputed at a time. Not for windows that overlap, which keep a few windows.
        None:

        - all of T up to 512 steps, then √T, 64 at least;
        - of blocks the same of a window's steps;
        - of blocks side by side the whole window;
        - where an update may begin within a block, the window or √T, whichever is more.
      num_shards: devices over which the examples are divided, the first of `jax.devices()`. Each
        takes its share of the batch through all of time, and the sums are added at the end. On CPU
        cores are devices after `jax.config.update("jax_num_cpu_devices", n)`, before the first
        computation. Every leaf of carry, xs and targets that has the batch axis is divided;
        examples must not see each other inside a step, and random numbers must come from a key per
        example.
      parallel_windows: of `truncated_bptt`, backward passes side by side, under vmap over time.
        None: of 16 blocks and more of a single example up to 64 (fewer if their carries take more
        than a mebibyte), if the step's program shows that vmap changes nothing (no callback, no
        cond, no random numbers but threefry's); of other blocks one; where windows overlap about
        window/stride, those that share their steps. Where an update may begin within a block,
        nothing goes side by side, whatever is given here.

    Raises:
      ValueError: a number < 1, or more shards than devices.

    >>> print(Plan(segment=32))
    segments of 32 steps on one device
    """

    segment: int | None = None
    num_shards: int = 1
    parallel_windows: int | None = None

    def __post_init__(self):
        for name in ("segment", "parallel_windows"):
            if getattr(self, name) is not None:
                validation.check_positive_integer(name, getattr(self, name))
        validation.check_positive_integer("num_shards", self.num_shards)
        several = self.num_shards > 1  # one device must not start a backend
        if several and self.num_shards > jax.device_count():
            raise ValueError(
                f"num_shards must be at most the number of devices, {jax.device_count()}, got "
                f"{self.num_shards}. On CPU cores become devices by "
                'jax.config.update("jax_num_cpu_devices", n) before the first computation'
            )

    def __str__(self):
        segments = (
            "segments of default length"
            if self.segment is None
            else f"segments of {self.segment} steps"
        )
        windows = (
            ""
            if self.parallel_windows is None
            else f", {self.parallel_windows} windows side by side,"
        )
        where = (
            "one device"
            if self.num_shards == 1
            else f"{self.num_shards} devices, the batch divided over them"
        )
        return f"{segments}{windows} on {where}"


def plan_of(plan: Plan | None, unused: dict[str, str]) -> Plan:
    """The plan, or the default; a ValueError where it asks what this estimator cannot do."""
    if plan is None:
        return Plan()
    if not isinstance(plan, Plan):
        raise ValueError(
            f"plan must be a jbptt.Plan, got {type(plan).__name__}; write Plan(segment=…, "
            "num_shards=…)"
        )
    for name, why in unused.items():
        if (value := getattr(plan, name)) is not None:
            raise ValueError(f"plan must leave {name} at None, got {value}: {why}")
    return plan


NO_WINDOWS = {"parallel_windows": "only the windows of truncated_bptt can go back side by side"}


def planned(
    plan: Plan, run: Callable, problem: Problem, history: PyTree = None, seen: PyTree = None
) -> Updated:
    """`run(problem, history, seen, add_up)`, on one device or on shares of the examples.

    Args:
      plan: its `num_shards`.
      run: gives an `Updated`, whose `sums` are added up over the shares afterwards. `add_up` does
        that with a tree of what `run` needs summed earlier.
      problem: the whole batch.
      history: leaves `[length, ...]`, divided like the batch.
      seen: what else the update reads (a phase; running means and a window). Every device has it
        whole.

    Raises:
      ValueError: examples that cannot be divided.
    """
    if plan.num_shards == 1:
        return run(problem, history, seen, lambda tree: tree)
    check_shards(problem, plan.num_shards)
    num_examples, devices = problem.batch_shape[0], jax.devices()[: plan.num_shards]
    mesh = jax.make_mesh(
        (plan.num_shards,), (SHARDS,), axis_types=(AxisType.Auto,), devices=devices
    )
    share = num_examples // plan.num_shards, *problem.batch_shape[1:]

    def on_share(params, carry, batch, gates, history, seen, add_up):
        """`run` on one device; `shard_map` divides arguments, so all data are arguments."""
        own = replace(problem, params=params, batch_shape=share).on(carry, batch, gates)
        updated = run(own, history, seen, add_up)
        return updated._replace(sums=add_up(updated.sums))

    of_time, whole = partial(_specs, axis=1, num_examples=num_examples), PartitionSpec()
    of_carry = partial(_specs, axis=0, num_examples=num_examples)
    data = problem.params, problem.carry, problem.batch, problem.gates, history, seen
    in_specs = whole, of_carry(data[1]), *map(of_time, data[2:5]), whole
    shapes = jax.eval_shape(lambda: run(problem, history, seen, lambda tree: tree))
    of_sums: Any = whole
    out_specs = Updated(
        of_sums, of_carry(shapes.carry), of_carry(shapes.cotangents), of_time(shapes.history), whole
    )
    # Without the check: under it every segment's gradient would be added up over the devices.
    added = partial(on_share, add_up=partial(lax.psum, axis_name=SHARDS))
    return jax.shard_map(added, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(
        *data
    )


def _is_per_example(leaf: Any, axis: int, num_examples: int) -> bool:
    return jnp.ndim(leaf) > axis and jnp.shape(leaf)[axis] == num_examples


def _specs(tree: PyTree, axis: int, num_examples: int) -> PyTree:
    """Divided along `axis` where that is the batch, whole elsewhere."""

    def one(leaf):
        return (
            PartitionSpec(*[None] * axis, SHARDS)
            if _is_per_example(leaf, axis, num_examples)
            else PartitionSpec()
        )

    return jax.tree.map(one, tree)


def check_shards(problem: Problem, num_shards: int) -> None:
    """A ValueError unless, by shapes, each device computes what one device would."""
    what, otherwise = f"num_shards={num_shards}", "pass num_shards=1"
    if not jax.sharding.get_abstract_mesh().empty:
        raise ValueError(f"{what}: it makes a mesh of its own, and another one is set; {otherwise}")
    check_division(problem, num_shards, what, otherwise)


def check_division(problem: Problem, num_parts: int, what: str, otherwise: str) -> None:
    """A ValueError unless, by shapes, each part of the examples computes what all of them would.

    Args:
      problem: the whole batch.
      num_parts: of as many examples each.
      what: is asked for, as the error names it.
      otherwise: what to do without.
    """

    def refuse(reason, remedy="", cause=None):
        raise ValueError(f"{what}: {reason}; {remedy or otherwise}") from cause

    batch_shape, carry = problem.batch_shape, problem.carry
    if not batch_shape:
        refuse("the loss has no batch axis, so there are no examples to divide")
    num_examples = batch_shape[0]
    if num_examples % num_parts:
        refuse(f"it must divide the batch of {num_examples} examples", "pass a number that does")
    for path, leaf in jax.tree_util.tree_leaves_with_path(carry):
        if not _is_per_example(leaf, 0, num_examples):
            where = f"carry{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}"
            reason = (
                f"{where} and no axis of {num_examples} examples in front, so it cannot be divided"
            )
            refuse(reason, f"{otherwise}, or a carry whose leaves are per example")
    share = _Share(problem, num_examples // num_parts)
    try:
        fits = share.fits(share.inputs)
    except Exception as error:  # whatever the user's functions raise at shapes that do not fit
        refuse(f"step or loss does not take {share.size} of the examples alone", cause=error)
    if not fits:
        refuse(f"of {share.size} examples alone, step or loss does not give one result each")
    if share.draws_for_all_at_once():
        refuse(
            "from one key are drawn random numbers for all examples, so each part would draw the "
            "same",
            f"{otherwise}, or give each example a key of its own in the carry",
        )
    for name in share.ambiguous():
        refuse(
            f"step and loss take {name} whole as well as divided, so it may not be per example",
            f"{otherwise}, or hand on among the parameters what all share",
        )


class _Share:
    """One step and its loss on so many of the examples, as shapes."""

    def __init__(self, problem: Problem, size: int):
        carry, batch, num_examples = problem.carry, problem.batch, problem.batch_shape[0]
        self.size, self.params, self.whole_carry = size, problem.params, carry
        first = jax.eval_shape(
            lambda tree: jax.tree.map(lambda a: a[0], tree),
            {"xs": batch.xs, "targets": batch.targets},
        )
        named, structure = jax.tree_util.tree_flatten_with_path(first)
        self.names = [path[0].key + jax.tree_util.keystr(path[1:]) for path, _ in named]
        self.whole = [leaf for _, leaf in named]
        self.carry = jax.eval_shape(lambda tree: jax.tree.map(lambda a: a[:size], tree), carry)
        self.inputs = [
            jax.eval_shape(lambda a: a[:size], a) if _is_per_example(a, 0, num_examples) else a
            for a in self.whole
        ]
        self.wanted = jax.tree.map(jnp.shape, self.carry), (size, *problem.batch_shape[1:])

        def one(params, carry, inputs):
            x, target = (structure.unflatten(inputs)[name] for name in ("xs", "targets"))
            after, y = problem.step(params, carry, x)
            value = problem.loss(y, target)
            return after, value[0] if isinstance(value, tuple) else value

        self.one = one

    def fits(self, inputs: list) -> bool:
        """Whether carries and losses have the share's shapes."""
        after, value = jax.eval_shape(self.one, self.params, self.carry, inputs)
        return (jax.tree.map(jnp.shape, after), value.shape) == self.wanted

    def draws_for_all_at_once(self) -> bool:
        """Whether a key that is not divided gives numbers that are."""
        args = (self.carry, self.inputs), (self.whole_carry, self.whole)
        few, many = (draws(self.one, self.params, *two) for two in args)
        return len(few) != len(many) or any(
            a[0] == b[0] and a != b for a, b in zip(few, many, strict=True)
        )

    def ambiguous(self) -> list[str]:
        """What may as well be one axis of something that all examples share."""
        found = []
        sources = frozenset().union(*dependences(self.one, self.params, self.carry, self.inputs))
        before = len(jax.tree.leaves((self.params, self.carry)))
        for i, name in enumerate(self.names):
            if self.inputs[i] is self.whole[i] or before + i not in sources:
                continue
            try:
                fits = self.fits([*self.inputs[:i], self.whole[i], *self.inputs[i + 1 :]])
            except Exception:  # as it should be, whatever the user's functions raise
                continue
            found += [name] if fits else []
        return found
