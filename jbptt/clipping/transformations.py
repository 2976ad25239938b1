"""Clipping as optax transformations, safe against overflow, with telemetry in the state."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jbptt import validation
from jbptt.norms import clip_to_norm, compared_with, leafwise, norm, normalised, scaled_norm
from jbptt.types import PyTree, exported

Policy = Literal["propagate", "zero", "skip", "raise"]
POLICIES: tuple[Policy, ...] = ("propagate", "zero", "skip", "raise")


@exported
class GlobalNormState(NamedTuple):
    """What the last update looked like to `clip_by_global_norm`.

    Attributes:
      norm: the global norm before clipping, float32 at least; inf if it is too large for its dtype.
        Of what the policy left: entries that it set to zero do not count.
      scale: what the updates were multiplied by, 1 where they were not clipped.
      finite: whether every entry was finite.
      num_nonfinite: how many updates so far were not.
    """

    norm: jax.Array
    scale: jax.Array
    finite: jax.Array
    num_nonfinite: jax.Array


@exported
class LeafNormState(NamedTuple):
    """What the last update looked like to `clip_by_leaf_norm`: `GlobalNormState` leaf by leaf.

    Every attribute is a tree like the parameters, a scalar for each leaf: `finite` says which leaf
    is broken, `num_nonfinite` how often it was.
    """

    norm: PyTree
    scale: PyTree
    finite: PyTree
    num_nonfinite: PyTree


@exported
class ValueState(NamedTuple):
    """What the last update looked like to `clip_by_value`.

    Attributes:
      largest: the largest absolute entry before clipping, of what the policy left; float32 at
        least.
      clipped_share: which share of all entries was clipped, in [0, 1].
      finite: whether every entry was finite.
      num_nonfinite: how many updates so far were not.
    """

    largest: jax.Array
    clipped_share: jax.Array
    finite: jax.Array
    num_nonfinite: jax.Array


@exported
class GradientStatsState(NamedTuple):
    """What `gradient_stats` saw of the last update; norms and the like in float32 at least.

    Attributes:
      norm: the global norm; inf if it is too large for its dtype.
      leaf_norms: the norm of every leaf, a tree like the parameters.
      largest: the largest absolute entry.
      cosine: of the angle to the last finite update before this one; NaN for the first, and where
        either is 0 or this one is not finite.
      num_updates: how many there were.
      finite: whether every entry was finite.
      num_nonfinite: how many updates so far were not.
      direction: the last finite update over its norm, a tree like the parameters; 0 before the
        first.
    """

    norm: jax.Array
    leaf_norms: PyTree
    largest: jax.Array
    cosine: jax.Array
    num_updates: jax.Array
    finite: jax.Array
    num_nonfinite: jax.Array
    direction: PyTree


def _refuse(finite: Any, name: str) -> None:
    if not finite:
        raise FloatingPointError(
            f"the gradient holds NaN or inf ({name}, nonfinite='raise'); jbptt.find_nonfinite says "
            "where it begins"
        )


def _apply_policy(updates: Any, finite: jax.Array, policy: Policy, name: str) -> Any:
    if policy == "raise":
        jax.debug.callback(partial(_refuse, name=name), finite)
    if policy == "zero":
        return jax.tree.map(lambda u: jnp.where(jnp.isfinite(u), u, jnp.zeros_like(u)), updates)
    if policy == "skip":
        return jax.tree.map(lambda u: jnp.where(finite, u, jnp.zeros_like(u)), updates)
    return updates


def _whole(tree: Any) -> bool:
    """For `jax.tree.flatten(tree, is_leaf)`: the tree is one leaf."""
    del tree
    return True


def _clipping(
    state_type: Any, name: str, policy: Any, clip: Callable, is_leaf: Callable | None = _whole
):
    """A clipper made of `clip(part) -> (part, telemetry)`; parts are leaves under `is_leaf`."""
    if policy not in POLICIES:
        raise ValueError(
            f"nonfinite must be one of {', '.join(POLICIES)}, got {policy!r}; pass one of these"
        )

    def init(params: Any) -> Any:
        parts, structure = jax.tree.flatten(params, is_leaf)
        shapes = [jax.eval_shape(lambda part: clip(part)[1], part) for part in parts]

        def each(field):
            value = 1 if field == "scale" else 0
            return structure.unflatten([jnp.full((), value, one[field].dtype) for one in shapes])

        finite = structure.unflatten([jnp.array(True) for _ in parts])
        num_nonfinite = structure.unflatten([jnp.zeros((), jnp.int32) for _ in parts])
        return state_type(*map(each, state_type._fields[:-2]), finite, num_nonfinite)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        parts, structure = jax.tree.flatten(updates, is_leaf)
        finite = [jnp.isfinite(scaled_norm(part)[0]) for part in parts]
        parts = _apply_policy(parts, jnp.array(finite, bool).all(), policy, name)
        pairs = [clip(part) for part in parts]

        def each(field):
            return structure.unflatten([seen[field] for _, seen in pairs])

        finite = structure.unflatten(finite)
        num_nonfinite = jax.tree.map(
            lambda n, ok: n + (~ok).astype(n.dtype), state.num_nonfinite, finite
        )
        seen = state_type(*map(each, state_type._fields[:-2]), finite, num_nonfinite)
        return structure.unflatten([part for part, _ in pairs]), seen

    return optax.GradientTransformation(init, update)


def clip_by_global_norm(
    max_norm: float, *, nonfinite: Policy = "propagate"
) -> optax.GradientTransformation:
    """Scales updates by `min(1, max_norm / ‖g‖)`, g all leaves (Pascanu, Mikolov & Bengio, 2013).

    Finite gradients whose squared entries overflow are clipped correctly, in float16 and bfloat16
    too (the arithmetic is float32 at least). Entries that are denormal in the arithmetic's dtype
    may count as 0. Telemetry: `GlobalNormState`. Time O(size), no memory beside the updates.

    Args:
      max_norm: the largest norm that passes unchanged.
      nonfinite: what happens to a gradient with NaN or inf in it; `finite` is False in any case.
        "propagate": it passes unchanged and stays visible;
        "zero": the entries that are not finite become 0, the others are clipped and used;
        "skip": the whole update becomes 0 (momentum further down the chain still moves: to leave
        the optimizer untouched wrap it in `optax.apply_if_finite`);
        "raise": a FloatingPointError. Under jit the runtime reports it as
        `jax.errors.JaxRuntimeError`, when a result is waited for (`jax.effects_barrier`).

    Raises:
      ValueError: max_norm is not a finite number > 0; another policy.

    >>> clip = clip_by_global_norm(1.0)
    >>> grads = {"w": jnp.array([3e30, 4e30])}
    >>> updates, state = clip.update(grads, clip.init(grads))
    >>> updates["w"]
    Array([0.6, 0.8], dtype=float32)
    """
    return _clipping(GlobalNormState, "clip_by_global_norm", nonfinite, _to_norm(max_norm))


def clip_by_leaf_norm(
    max_norm: float, *, nonfinite: Policy = "propagate"
) -> optax.GradientTransformation:
    """Scales every leaf by `min(1, max_norm / ‖g_leaf‖)`, whatever the others are.

    The whole gradient turns, unless all leaves are clipped alike; its norm is at most
    `max_norm · √leaves`. Overflow, dtypes and cost as in `clip_by_global_norm`. Telemetry:
    `LeafNormState`, a scalar for each leaf.

    Args:
      max_norm: the largest norm of a leaf that passes unchanged.
      nonfinite: as in `clip_by_global_norm`, where "propagate" leaves the leaves that hold NaN or
        inf unchanged and clips the others, and "skip" zeroes the whole update, not only the broken
        leaf: half an update is none that any loss asks for.

    Raises:
      ValueError: max_norm is not a finite number > 0; another policy.

    >>> clip = clip_by_leaf_norm(1.0)
    >>> grads = {"b": jnp.array(0.5), "w": jnp.array([3.0, 4.0])}
    >>> updates, state = clip.update(grads, clip.init(grads))
    >>> updates["w"]
    Array([0.6, 0.8], dtype=float32)
    >>> optax.tree.get((state, "other states"), "LeafNormState").norm
    {'b': Array(0.5, dtype=float32), 'w': Array(5., dtype=float32)}
    """
    return _clipping(
        LeafNormState, "clip_by_leaf_norm", nonfinite, _to_norm(max_norm), is_leaf=None
    )


def _to_norm(max_norm: Any) -> Callable:
    """`part -> (part, telemetry)` for the clippers by norm."""
    validation.check_above("max_norm", max_norm, 0, "the updates would all be zero, or reversed")

    def clip(part):
        part, size, scale = clip_to_norm(part, max_norm)
        return part, {"norm": size, "scale": scale}

    return clip


def clip_by_value(
    max_value: float, *, nonfinite: Policy = "propagate"
) -> optax.GradientTransformation:
    """Clips entries to `[-max_value, max_value]` (Mikolov, 2012); complex ones keep their phase.

    A complex entry z becomes `z · min(1, max_value / |z|)`. The direction of the gradient changes.
    Unlike `optax.clip`, which makes ±inf an inconspicuous ±max_value, entries that are not finite
    meet the policy. Telemetry: `ValueState`. Time O(size), no memory beside the updates.

    Args:
      max_value: the largest absolute entry that passes unchanged.
      nonfinite: as in `clip_by_global_norm`, where "propagate" leaves the entries that are NaN or
        ±inf unchanged and clips the others.

    Raises:
      ValueError: max_value is not a finite number > 0; another policy.

    >>> clip = clip_by_value(1.0)
    >>> updates, state = clip.update(jnp.array([-3.0, 0.5, jnp.inf]), clip.init(jnp.zeros(3)))
    >>> updates, bool(state.finite)
    (Array([-1. ,  0.5,  inf], dtype=float32), False)
    """
    validation.check_above("max_value", max_value, 0, "the updates would all be zero, or reversed")

    def clip(part):
        leaves, structure = jax.tree.flatten(part)
        # An entry is a vector of its own.
        triples = [clip_to_norm(leaf, max_value, leaf.ndim) for leaf in leaves]
        clipped = [jnp.isfinite(size) & (size > max_value) for _, size, _ in triples]
        share = jnp.asarray(sum(map(jnp.count_nonzero, clipped))) / max(
            1, sum(one.size for one in clipped)
        )
        telemetry = {"largest": scaled_norm(part)[0], "clipped_share": share}
        return structure.unflatten([leaf for leaf, _, _ in triples]), telemetry

    return _clipping(ValueState, "clip_by_value", nonfinite, clip)


def gradient_stats() -> optax.GradientTransformation:
    """Changes nothing, bit for bit; keeps norms, largest entry, cosine to the update before.

    `cosine = ⟨g_n, g_{n−1}⟩ / (‖g_n‖ ‖g_{n−1}‖)`, near −1 where steps are too long, near 0 where
    noise rules. An update that is not finite has no direction: its cosine is NaN, and the next is
    compared with the last finite one. Norms and cosines neither overflow nor underflow on the way.
    It sees what stands before it in the chain: put it first for raw gradients, last for what is
    added to the parameters. Without optax: `_, state = stats.update(grads, state)`. Telemetry:
    `GradientStatsState`. Time O(size), memory one gradient, in float32 at least.

    >>> stats = gradient_stats()
    >>> state = stats.init({"w": jnp.zeros(2)})
    >>> for grads in ({"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([-6e30, -8e30])}):
    ...     grads, state = stats.update(grads, state)
    >>> state.norm, state.largest, state.cosine
    (Array(1.e+31, dtype=float32), Array(8.e+30, dtype=float32), Array(-1., dtype=float32))
    """

    def init(params: Any) -> GradientStatsState:
        shapes = jax.eval_shape(lambda p: (norm(p), leafwise(norm)(p), normalised(p)), params)
        size, leaf_norms, direction = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        count = jnp.zeros((), jnp.int32)
        return GradientStatsState(
            size,
            leaf_norms,
            size,
            jnp.full_like(size, jnp.nan),
            count,
            jnp.array(True),
            count,
            direction,
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, GradientStatsState]:
        del params
        largest, _ = scaled_norm(updates)
        finite = jnp.isfinite(largest)
        now = normalised(updates)
        seen = GradientStatsState(
            norm=norm(updates),
            leaf_norms=leafwise(norm)(updates),
            largest=largest,
            cosine=compared_with(state.direction)(updates)[1],
            num_updates=state.num_updates + 1,
            finite=finite,
            num_nonfinite=state.num_nonfinite + (~finite).astype(jnp.int32),
            direction=jax.tree.map(
                lambda new, old: jnp.where(finite, new, old), now, state.direction
            ),
        )
        return updates, seen

    return optax.GradientTransformation(init, update)
