"""What first makes a loss or a gradient not finite: what was given, the way forward or back.

Some infinities are intended: log 0 in transitions, a mask of −inf, a maximum that starts at −inf.
So a leaf that is not finite is named only if it makes a loss, an adjoint or a gradient not finite.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from jbptt.analysis.culprits import Culprit, Looked, Places, search
from jbptt.analysis.flow import adjoints_of, carry_cotangents
from jbptt.arrays import (
    align_leading,
    is_inexact,
    one_if_zero,
    split_inexact,
    times_gate,
    weighted_mean,
    zero_masked,
)
from jbptt.engine import chosen
from jbptt.losses import counted_steps, loss_weights, step_losses, weighted_losses
from jbptt.problem import Problem, answer, problem_of, trusted_problem
from jbptt.recurrence import held, trajectory
from jbptt.types import Batch, Carry, Loss, Params, PyTree, Step

PHASES = ("given", "forward", "backward")
GIVEN = ("xs", "gates", "targets", "weights")

# What stands in for NaN and infinity: 0.5 is in the domain of nearly every function; e⁴⁰ and its
# square do not overflow, and e⁻⁴⁰ vanishes beside 1, as e^−∞ does.
NAN, LARGE = 0.5, 40.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NonFinite:
    """What first makes a loss, adjoint or gradient not finite; under jit and vmap as arrays.

    Attributes:
      found: whether a loss, an adjoint or a gradient is not finite.
      phase_index: into `PHASES`: given (parameters, initial carry, inputs, targets, weights,
        gates), forward (carries, outputs, losses), backward (adjoints, gradients).
      step: the step that read or produced it; 0 for parameters and the initial carry.
      leaf_index: into `leaves`.
      absorbed: `[leaves]`, which leaves hold NaN or infinity before that step (anywhere, if nothing
        is found) and yet leave every loss, adjoint and gradient finite.
      leaves: names of everything that was looked at.
    """

    found: jax.Array
    phase_index: jax.Array
    step: jax.Array
    leaf_index: jax.Array
    absorbed: jax.Array
    leaves: tuple[str, ...] = field(metadata={"static": True})

    @property
    def phase(self) -> str:
        """`given`, `forward` or `backward`; empty if none. Only outside of jit and vmap."""
        return PHASES[int(self.phase_index)] if self.found else ""

    @property
    def leaf(self) -> str:
        """Its name; empty if nothing is found. Only outside of jit and vmap."""
        return self.leaves[int(self.leaf_index)] if self.found else ""

    def __str__(self) -> str:
        if np.ndim(self.found):
            return repr(self)
        absorbed = ", ".join(
            name for name, flag in zip(self.leaves, self.absorbed, strict=True) if flag
        )
        if self.found:
            words = f"first not finite: {self.leaf}, {_WORDS[self.phase]} at step {int(self.step)}"
            return (
                f"{words} (not finite before it, but absorbed: {absorbed})" if absorbed else words
            )
        if absorbed:
            return (
                f"losses, adjoints and gradients are finite; not finite, but absorbed: {absorbed}"
            )
        return (
            "everything is finite: parameters, inputs, carries, outputs, losses, adjoints and "
            "gradients"
        )


_WORDS = {"given": "as given,", "forward": "on the way forward", "backward": "on the way back"}


def _names(prefix: str, tree: Any) -> list[str]:
    """Names of the inexact leaves."""
    return [prefix + keystr(path) for path, leaf in tree_leaves_with_path(tree) if is_inexact(leaf)]


def _bad(tree: Any, num_leading: int = 0) -> jax.Array:
    """`[*leading, leaves]`: which inexact leaves hold something that is not finite."""
    flags = [
        ~jnp.isfinite(leaf).all(tuple(range(num_leading, leaf.ndim)))
        for leaf in split_inexact(tree)[0]
    ]
    return jnp.stack(flags, -1) if flags else jnp.zeros(0, bool)


def find_nonfinite(
    step: Step,
    loss: Loss,
    params: Params,
    carry: Carry,
    batch: Batch,
    *,
    gates: jax.Array | None = None,
) -> NonFinite:
    """Which step, which leaf, forward or backward, first makes a loss or gradient not finite.

    In the order of computation: parameters and initial carry; then step by step inputs, gates, the
    new carry and the output, the target, the weight, the loss; then back step by step the adjoint
    of the carry received and the step's part of the parameter gradient. A leaf that is not finite
    but leaves every loss, adjoint and gradient finite (log 0 in transitions, a running maximum that
    starts at −inf, a leaf that no loss reads) is not named, but listed in `absorbed`. To tell the
    two apart, the search computes everything again with whatever is not finite up to some place
    replaced by finite numbers, and bisects for that place. Padding and losses of weight 0 do not
    count.

    Three forward passes and one backward, and every step's derivative once more, one by one; that
    about log₂(T · leaves) times where a loss or a gradient is not finite. Memory O(T) carries.
    Works under jit and vmap (all fields are data but the names).

    Args:
      step: `(params, carry, x) -> (carry, y)`.
      loss: `(y, target) -> [*batch]`, or that and aux.
      params: the parameters.
      carry: what enters step 0, or a function of the parameters that gives it.
      batch: the batch that went wrong.
      gates: `[T]` or `[T, *batch]`, of the gated gradient.

    Raises:
      ValueError: what `full_bptt` raises.

    >>> step = lambda w, h, x: (jnp.maximum(h, x), jnp.sqrt(w * x))
    >>> batch = Batch(jnp.array([4.0, 1.0, -3.0, 9.0]))
    >>> print(find_nonfinite(step, lambda y, target: y, 0.5, -jnp.inf, batch))
    first not finite: y, on the way forward at step 2 (not finite before it, but absorbed: carry)
    """
    return answer(nonfinite_of, problem_of(step, loss, params, carry, batch, gates))


def nonfinite_of(problem: Problem) -> NonFinite:
    """`find_nonfinite` of what has passed the border."""
    catalogue = _catalogue(problem)
    return _result(search(partial(_look, problem, catalogue), catalogue.places), catalogue)


class _Catalogue(NamedTuple):
    """Names of the leaves looked at, and their places.

    Attributes:
      start: of parameters and initial carry.
      columns: by prefix the columns of what every step has: xs, gates, carry, y, targets, weights,
        loss.
      names: of the columns.
      back: of adjoints and gradients.
      places: where all but the last stand. The new carry and the output share one.
    """

    start: list[str]
    columns: dict[str, range]
    names: list[str]
    back: list[str]
    places: Places


def _catalogue(problem: Problem) -> _Catalogue:
    params, carry, batch, gates = problem.params, problem.carry, problem.batch, problem.gates
    num_steps = problem.num_steps
    run = partial(trajectory, problem.step, length=num_steps)
    _, (_, ys) = jax.eval_shape(run, params, carry, batch.xs, batch.mask)
    forward = {"xs": batch.xs, "gates": gates, "carry": carry, "y": ys, "targets": batch.targets}
    forward |= {"weights": batch.weights, "loss": jnp.zeros(())}
    columns, names, places = {}, [], []
    for prefix, tree in forward.items():
        found = _names(prefix, tree)
        columns[prefix] = range(len(names), len(names) + len(found))
        names += found
        next_place = places[-1] + 1 if places else 0
        if prefix == "y" and columns["carry"]:
            next_place -= 1
        places += [
            next_place if prefix in ("carry", "y") else next_place + i for i in range(len(found))
        ]
    start = _names("params", params) + _names("carry", carry)
    back = _names("the adjoint of carry", carry) + _names("the gradient of params", params)
    return _Catalogue(start, columns, names, back, Places(len(start), num_steps, np.array(places)))


def _made_finite(tree: PyTree, flags: list[Any]) -> PyTree:
    """Stand-ins for what is not finite in inexact leaves; by leading axes where `flags` say so."""
    leaves, rebuild = split_inexact(tree)
    pairs = zip(map(jnp.asarray, leaves), map(jnp.asarray, flags), strict=True)

    def stand_in(a):
        return jnp.nan_to_num(a, nan=NAN, posinf=LARGE, neginf=-LARGE)

    return rebuild([jnp.where(align_leading(flag, a.ndim), stand_in(a), a) for a, flag in pairs])


def _look(problem: Problem, catalogue: _Catalogue, place: jax.Array, spared: jax.Array) -> Looked:
    """One run with all up to `place` made finite, but for the column `spared` at that place itself.

    Outcomes: the loss of every step, their weighted mean, and back from the last step the adjoints
    and gradients.
    """
    places, given = catalogue.places, problem.batch
    limit = place - places.num_start - places.width * jnp.arange(places.num_steps)

    def settle(prefix, tree, limit):
        at = [(column, int(places.of_columns[column])) for column in catalogue.columns[prefix]]
        return _made_finite(
            tree, [(limit > p) | ((limit == p) & (column != spared)) for column, p in at]
        )

    def settled_step(params, carry, inputs):
        x, limit = inputs
        after, y = problem.step(params, carry, x)
        return settle("carry", after, limit), settle("y", y, limit)

    at_start = problem.params, problem.carry
    params, carry = _made_finite(at_start, [place >= i for i in range(places.num_start)])
    gates = settle("gates", problem.gates, limit)
    xs, targets, weights = (
        settle(name, getattr(given, name), limit) for name in ("xs", "targets", "weights")
    )
    batch = Batch((xs, limit), targets, given.mask, weights)
    settled = trusted_problem(
        settled_step, problem.loss, params, carry, batch, gates, problem.batch_shape
    )

    path = adjoints_of(settled)
    _, (_, ys) = trajectory(settled_step, params, carry, batch.xs, batch.mask, places.num_steps)
    losses, _ = step_losses(settled.parts.loss, ys, batch)
    after = jax.tree.map(lambda a: a[1:], path.carries)

    per_step = jax.vmap(zero_masked)
    xs, ys = (tree if batch.mask is None else per_step(batch.mask, tree) for tree in (xs, ys))
    counted = counted_steps(batch)
    targets = targets if counted is None else per_step(counted, targets)
    # What is masked has no weight, whatever stands there.
    if batch.mask is not None and weights is not None:
        ndim = max(batch.mask.ndim, weights.ndim)
        weights = jnp.where(align_leading(batch.mask, ndim), align_leading(weights, ndim), 0)
    forward = xs, gates, after, ys, targets, weights, losses
    there = jnp.concatenate(
        [flags for tree in forward if (flags := _bad(tree, 1)).ndim == 2], axis=1
    )

    by_loss = loss_weights(batch, losses)
    weight, mean = jnp.sum(by_loss), jnp.sum(jnp.where(by_loss == 0, 0, by_loss * losses))
    entering = jax.tree.map(lambda a: a[:-1], path.carries)
    emitted = [c[1:] for c in carry_cotangents(path)]
    one_back = partial(_step_back, settled, weight)
    back = jax.lax.map(one_back, (entering, emitted, batch, gates))
    lost = there[:, -1] & (limit < places.width - 1)  # a loss that is made finite counts as finite
    outcomes = lost, ~jnp.isfinite(weighted_mean(mean, weight))[None], back[::-1].reshape(-1)
    return Looked(_bad((params, carry)), there, jnp.concatenate(outcomes))


def _step_back(problem: Problem, total: jax.Array, inputs: Any) -> jax.Array:
    """Which leaves of the carry's adjoint and of the gradient one step's derivative breaks."""
    carry, cotangents, batch, gate = inputs
    leaves, rebuild = split_inexact(carry)

    def run(params, leaves):
        after, y = held(problem.step)(params, rebuild(leaves), (batch.xs, batch.mask))
        one = jax.tree.map(lambda a: a[None], (y, batch))
        value, _ = weighted_losses(problem.parts.loss, *one)
        return chosen(split_inexact(after)[0], problem.live.carries), value / one_if_zero(total)

    (_, value), pull = jax.vjp(run, problem.params, leaves)
    grad, adjoint = pull((chosen(cotangents, problem.live.carries), jnp.ones_like(value)))
    if gate is not None:
        adjoint = [times_gate(a, gate) for a in adjoint]
    return jnp.concatenate([_bad(adjoint), _bad(grad)])


def _result(found: Culprit, catalogue: _Catalogue) -> NonFinite:
    """A forward place; else an adjoint or gradient; else, of a mean not finite, the last loss."""
    num_start, num_steps, places = catalogue.places
    num_there, num_back = len(catalogue.names), max(1, len(catalogue.back))
    is_any, at_start = jnp.any(found.given.broken), found.is_place & (found.place < num_start)
    back = found.outcome - num_steps - 1
    is_back = ~found.is_place & (back >= 0)
    column = jnp.where(found.is_place, found.column, num_there - 1)
    step = jnp.where(
        found.is_place,
        found.step,
        jnp.where(is_back, num_steps - 1 - back // num_back, num_steps - 1),
    )

    given = np.isin(
        np.arange(num_there), [column for prefix in GIVEN for column in catalogue.columns[prefix]]
    )
    phase = jnp.where(is_back, 2, jnp.where(at_start | jnp.asarray(given)[column], 0, 1))
    leaf = jnp.where(is_back, num_start + num_there + back % num_back, num_start + column)
    there = num_start + catalogue.places.width * np.arange(num_steps)[:, None] + places
    absorbed = (
        found.given.start & (np.arange(num_start) < found.place),
        jnp.any(found.given.there & (there < found.place), axis=0),
        jnp.zeros(len(catalogue.back), bool),
    )
    return NonFinite(
        found=is_any,
        phase_index=jnp.where(is_any, phase, 0),
        step=jnp.where(is_any, step, 0),
        leaf_index=jnp.where(is_any, jnp.where(at_start, found.place, leaf), 0),
        absorbed=jnp.concatenate(absorbed),
        leaves=(*catalogue.start, *catalogue.names, *catalogue.back),
    )
