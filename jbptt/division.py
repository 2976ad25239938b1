"""The examples of a batch divided over devices: what each gets, and whether it then computes the same."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from jbptt.arrays import inexact_leaves
from jbptt.engine import dependences, draws
from jbptt.types import Batch, Carry, Loss, Params, PyTree, Step

SHARDS = "jbptt_shards"


def _is_per_example(leaf: Any, axis: int, num_examples: int) -> bool:
    return jnp.ndim(leaf) > axis and jnp.shape(leaf)[axis] == num_examples


def _specs(tree: PyTree, axis: int, num_examples: int) -> PyTree:
    """Divided along `axis` where that is the batch, whole elsewhere."""

    def one(leaf):
        return PartitionSpec(*[None] * axis, SHARDS) if _is_per_example(leaf, axis, num_examples) else PartitionSpec()

    return jax.tree.map(one, tree)


def divided(
    run: Callable, params: Params, carry: Carry, batch: Batch, gates: Any, num_examples: int, num_shards: int
) -> Any:
    """`run(params, carry, batch, gates) -> (sums, carry, cotangents)`, each device on its examples; sums add up."""
    mesh = jax.make_mesh((num_shards,), (SHARDS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:num_shards])
    whole = PartitionSpec()
    of_carry = _specs(carry, 0, num_examples)

    def own_share(params, carry, batch, gates):
        sums, carry, cotangents = run(params, carry, batch, gates)
        return lax.psum(sums, SHARDS), carry, cotangents

    # Without the check: under it every segment's gradient would be added up over the devices.
    shares = jax.shard_map(
        own_share,
        mesh=mesh,
        in_specs=(whole, of_carry, _specs(batch, 1, num_examples), _specs(gates, 1, num_examples)),
        out_specs=(whole, of_carry, _specs(inexact_leaves(carry), 0, num_examples)),
        check_vma=False,
    )
    return shares(params, carry, batch, gates)


def check_division(
    step: Step,
    loss: Loss,
    params: Params,
    carry: Carry,
    batch: Batch,
    batch_shape: tuple[int, ...],
    num_shards: int,
) -> None:
    """A ValueError unless each device computes of its examples what one device would; from shapes alone."""

    def refuse(reason, remedy="pass num_shards=1", cause=None):
        raise ValueError(f"num_shards={num_shards}: {reason}; {remedy}") from cause

    if not batch_shape:
        refuse("the loss has no batch axis, so there are no examples to divide")
    num_examples = batch_shape[0]
    if num_examples % num_shards:
        refuse(f"it must divide the batch of {num_examples} examples", "pass a number that does")
    if not jax.sharding.get_abstract_mesh().empty:
        refuse("it makes a mesh of its own, and another one is set")
    for path, leaf in jax.tree_util.tree_leaves_with_path(carry):
        if not _is_per_example(leaf, 0, num_examples):
            where = f"carry{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}"
            reason = f"{where} and no axis of {num_examples} examples in front, so it cannot be divided"
            refuse(reason, "pass num_shards=1, or a carry whose leaves are per example")
    share = _Share(step, loss, params, carry, batch, batch_shape, num_examples // num_shards)
    try:
        fits = share.fits(share.inputs)
    except (TypeError, ValueError) as error:
        refuse(f"step or loss does not take {share.size} of the examples alone", cause=error)
    if not fits:
        refuse(f"of {share.size} examples alone, step or loss does not give one result each")
    if share.draws_for_all_at_once():
        remedy = "pass num_shards=1, or give each example a key of its own in the carry"
        refuse("from one key are drawn random numbers for all examples, so each device would draw the same", remedy)
    for name in share.ambiguous():
        remedy = "pass num_shards=1, or hand on among the parameters what all share"
        refuse(f"step and loss take {name} whole as well as divided, so it may not be per example", remedy)


class _Share:
    """One step and its loss on so many of the examples, as shapes."""

    def __init__(self, step, loss, params, carry, batch, batch_shape, size):
        self.size, self.params, self.whole_carry = size, params, carry
        first = jax.eval_shape(
            lambda tree: jax.tree.map(lambda a: a[0], tree), {"xs": batch.xs, "targets": batch.targets}
        )
        named, structure = jax.tree_util.tree_flatten_with_path(first)
        self.names = [path[0].key + jax.tree_util.keystr(path[1:]) for path, _ in named]
        self.whole = [leaf for _, leaf in named]
        self.carry = jax.eval_shape(lambda: jax.tree.map(lambda a: a[:size], carry))
        self.inputs = [
            jax.eval_shape(lambda a: a[:size], a) if _is_per_example(a, 0, batch_shape[0]) else a for a in self.whole
        ]
        self.wanted = jax.tree.map(jnp.shape, self.carry), (size, *batch_shape[1:])

        def one(params, carry, inputs):
            x, target = (structure.unflatten(inputs)[name] for name in ("xs", "targets"))
            after, y = step(params, carry, x)
            value = loss(y, target)
            return after, value[0] if isinstance(value, tuple) else value

        self.one, self.program = one, jax.make_jaxpr(one, return_shape=True)

    def fits(self, inputs: list) -> bool:
        """Whether carries and losses have the share's shapes."""
        after, value = self.program(self.params, self.carry, inputs)[1]
        return (jax.tree.map(jnp.shape, after), value.shape) == self.wanted

    def draws_for_all_at_once(self) -> bool:
        """Whether a key that is not divided gives numbers that are."""
        args = (self.carry, self.inputs), (self.whole_carry, self.whole)
        few, many = (draws(self.program(self.params, *two)[0].jaxpr) for two in args)
        return len(few) != len(many) or any(a[0] == b[0] and a != b for a, b in zip(few, many, strict=True))

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
            except (TypeError, ValueError):  # as it should be
                continue
            found += [name] if fits else []
        return found
