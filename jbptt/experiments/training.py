"""Training with any estimator: one scan over batches."""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from jbptt import slips
from jbptt.arrays import split_time, weighted_mean, widened
from jbptt.datasets import dataset, variables
from jbptt.losses import weighted_losses, where_counted
from jbptt.norms import norm
from jbptt.recurrence import scan_steps
from jbptt.starts import start_of
from jbptt.types import Batch, Carry, Estimator, Loss, Params, PyTree, Step
from jbptt.validation import check_positive_integer

Policy = Literal["propagate", "skip", "stop"]
POLICIES: tuple[Policy, ...] = ("propagate", "skip", "stop")


class History(NamedTuple):
    """What training saw, `[N]` updates each, and where it stopped.

    Attributes:
      loss: weighted mean loss of each batch, before its update.
      grad_norm: norm of its estimated gradient, before the optimizer's transformations.
      info: the estimates' `info`, leaves `[N, ...]`; `info["aux"]` where the loss returns aux.
      state: the estimator's last state (`.carry` is the live carry); pass it on to continue.
      opt_state: the optimizer's last state; pass it on to continue.
      finite: bool, whether loss and gradient were finite.
      applied: bool, whether the update was made; False where the policy kept it out.
      updates: the number of updates before each loss, 0, 1, 2, …; those of earlier calls
        (`num_done`) and those that were kept out count.
      evals: what `eval_fn` gave, leaves `[num_evals, ...]`; None without one.
      eval_updates: `[num_evals]`, the number of updates before each evaluation: equal numbers mean
        the same parameters; None without one.
      stopped: bool, whether `nonfinite="stop"` has ended this training.
    """

    loss: jax.Array
    grad_norm: jax.Array
    info: dict[str, Any]
    state: Any
    opt_state: optax.OptState
    finite: jax.Array
    applied: jax.Array
    updates: jax.Array
    evals: PyTree = None
    eval_updates: jax.Array | None = None
    stopped: Any = False

    def to_xarray(self) -> Any:
        """An `xarray.Dataset` over `update` and, of what `eval_fn` gave, `eval_update`; needs
        xarray.

        Both count updates from the first call on. Further axes of a leaf of `info` or `evals` are
        called by its name, those of a vmapped call `axis_0`.
        """
        front = np.ndim(self.loss) - 1
        series = "loss", "grad_norm", "finite", "applied"
        found = [variables(name, getattr(self, name), "update") for name in series]
        coords = {"update": _first_run(self.updates)}
        trees = [("info", self.info, "update")]
        if self.eval_updates is not None:
            coords["eval_update"] = _first_run(self.eval_updates)
            trees.append(("evals", self.evals, "eval_update"))
        for field, tree, dimension in trees:
            for path, leaf in jax.tree.leaves_with_path(tree):
                name = f"{field}{jax.tree_util.keystr(path)}"
                further = [f"{name}_{i}" for i in range(np.ndim(leaf) - front - 1)]
                found.append(variables(name, leaf, dimension, *further))
        return dataset(*found, coords=coords)


def _first_run(counts: Any) -> np.ndarray:
    """Counts are the same in all runs of a vmapped call."""
    return np.asarray(counts).reshape(-1, np.shape(counts)[-1])[0]


class _Running(NamedTuple):
    """What an update changes; `stopped` under "stop" alone."""

    params: Params
    state: Any
    opt_state: optax.OptState
    stopped: jax.Array


def train(
    estimator: Estimator,
    optimizer: optax.GradientTransformation,
    params: Params,
    carry: Carry,
    batches: Batch,
    *,
    key: jax.Array | None = None,
    state: Any = None,
    opt_state: optax.OptState | None = None,
    num_done: Any = 0,
    stopped: Any = False,
    eval_fn: Callable[[Params, Carry], PyTree] | None = None,
    eval_every: int | None = None,
    nonfinite: Policy = "propagate",
) -> tuple[Params, History]:
    """One update for each batch, the carry kept from batch to batch: a pure `lax.scan`.

    Wrap the call in jit; vmap (over seeds, say) or shard it. The carry goes on from batch to batch,
    as in one long stream: begin sequences of their own with `cells.with_reset`.

    To continue, pass the returned `params`, `state=history.state`, `opt_state=history.opt_state`,
    `num_done=` the updates so far and `stopped=history.stopped`; `carry` and `key` are then not
    read. `train_in_chunks` does so.

    Aux that the loss returns beside its value is averaged by the weights of each batch and stacked
    in `history.info["aux"]`.

    Args:
      estimator: of `full_bptt`, `truncated_bptt` or any other.
      optimizer: any optax transformation.
      params: where to start.
      carry: what enters the first batch, or a function of the parameters that gives it; not read
        where `state` is given.
      batches: leaves `[N, T, ...]`, N ≥ 1.
      key: for estimators that draw.
      state: an estimator's state to continue from, `history.state`.
      opt_state: an optimizer's state to continue from, `history.opt_state`.
      num_done: the updates of earlier calls, by which `history.updates` and `.eval_updates` go on;
        may be traced.
      stopped: whether an earlier call stopped; read by "stop" alone; may be traced.
      eval_fn: `(params, carry) -> tree of arrays`, pure: a held-out loss, a lag profile. It gets
        what has been trained so far, and the live carry.
      eval_every: evaluates after updates eval_every, 2·eval_every, …: not before the first, and not
        after a remainder. With fewer updates there is no evaluation. A remainder costs one more
        compilation. Under vmap, too, nothing is evaluated elsewhere.
      nonfinite: what happens to an update whose loss or gradient holds NaN or inf; the history's
        `finite` is False in any case.
        "propagate": it is made, and stays visible;
        "skip": it is not: parameters, optimizer and estimator (carry and key too) stay as before,
        as if the batch had not come;
        "stop": no later update is made either.
        What is kept out takes as long as any other: its loss is that of the parameters as they
        stay. With a learned start: if the first update is kept out, the start is never trained.
        ("zero" and "raise" are policies of single gradients: `jbptt.clipping`;
        `optax.apply_if_finite` spares the parameters and the optimizer, not the carry.)

    Returns:
      The trained parameters and the `History`.

    Raises:
      ValueError: no batches, or leaves of different N; eval_fn without eval_every, or the
        reverse; another policy; what the estimator's init raises.
    """
    num_batches = check_batches(batches)
    eval_every = check_evaluation(eval_fn, eval_every)
    check_policy(nonfinite)
    check_count("num_done", num_done)
    if state is None:
        first = jax.eval_shape(lambda batches: jax.tree.map(lambda a: a[0], batches), batches)
        state = estimator.init(params, carry, first, key=key)
    if opt_state is None:
        opt_state = optimizer.init(jax.tree.map(widened, params))  # as wide as the gradients
    update = partial(_update, estimator, optimizer, nonfinite)
    running = _Running(params, state, opt_state, _flag(stopped, params))
    if eval_fn is None:
        evals, (running, seen) = None, _scan(update, running, batches)
    else:
        running, seen, evals = _scan_in_groups(update, running, batches, eval_fn, eval_every)
    counts = jnp.asarray(num_done, int) + jnp.arange(num_batches)
    eval_updates = None if eval_fn is None else 1 + counts[eval_every - 1 :: eval_every]
    history = History(
        **seen,
        state=running.state,
        opt_state=running.opt_state,
        updates=counts,
        evals=evals,
        eval_updates=eval_updates,
        stopped=running.stopped,
    )
    return running.params, history


def _update(
    estimator: Estimator,
    optimizer: optax.GradientTransformation,
    policy: Policy,
    running: _Running,
    batch: Batch,
) -> tuple[_Running, dict[str, Any]]:
    """One update, and what the history says of it."""
    params, state, opt_state, stopped = running
    estimate, state = estimator.update(params, state, batch)
    updates, opt_state = optimizer.update(estimate.grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    finite = _all_finite((estimate.loss, estimate.grads))
    applied = jnp.ones_like(finite)
    if policy != "propagate":
        applied = finite & ~stopped if policy == "stop" else finite
        held = running.params, _without_start(running), running.opt_state
        params, state, opt_state = optax.tree.where(applied, (params, state, opt_state), held)
        stopped = ~applied if policy == "stop" else stopped
    seen = {
        "loss": estimate.loss,
        "grad_norm": norm(estimate.grads),
        "info": estimate.info,
        "finite": finite,
        "applied": applied,
    }
    return _Running(params, state, opt_state, stopped), seen


def _flag(value: Any, params: Params) -> jax.Array:
    """A bool that differs between the devices of a shard_map where the parameters do."""
    unset = [jnp.zeros_like(leaf, bool).any() for leaf in jax.tree.leaves(params)]
    return reduce(jnp.logical_or, unset, jnp.asarray(value, bool))


def _all_finite(tree: PyTree) -> jax.Array:
    """Whether every entry is; not by the largest one, since XLA's maximum may drop NaN."""
    return reduce(jnp.logical_and, [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)])


def _without_start(running: _Running) -> Any:
    """The estimator's state, its carry in arrays, as it is after an update."""
    state = running.state
    if not callable(state.carry):
        return state
    return state._replace(carry=start_of(state.carry, running.params))


def _scan(body: Callable, running: _Running, xs: PyTree) -> tuple[_Running, PyTree]:
    """`lax.scan`, behind its first step where that begins with a start: a state then changes."""
    if not callable(running.state.carry):
        return jax.lax.scan(body, running, xs)
    running, first = body(running, jax.tree.map(lambda a: a[0], xs))
    first = jax.tree.map(lambda a: jnp.asarray(a)[None], first)
    if jax.tree.leaves(xs)[0].shape[0] == 1:
        return running, first
    running, later = jax.lax.scan(body, running, jax.tree.map(lambda a: a[1:], xs))
    return running, _joined(first, later)


def _scan_in_groups(
    update: Callable, running: _Running, batches: Batch, eval_fn: Callable, size: int
) -> tuple[_Running, PyTree, PyTree]:
    """Updates in groups of `size`, each with an evaluation behind it, then those left over.

    Not one scan with a condition, whose two branches vmap may both compute in every update.
    """

    def group(running, batches):
        running, seen = _scan(update, running, batches)
        return running, (seen, eval_fn(running.params, running.state.carry))

    num_batches = len(jax.tree.leaves(batches)[0])
    num_groups, num_left = divmod(num_batches, size)
    groups, left = split_time(batches, size, num_groups)
    if not num_groups:
        running, seen = _scan(update, running, left)
        one = jax.eval_shape(eval_fn, running.params, running.state.carry)
        return running, seen, jax.tree.map(lambda a: jnp.zeros((0, *a.shape), a.dtype), one)
    running, (seen, evals) = _scan(group, running, groups)
    seen = jax.tree.map(lambda a: a.reshape(num_groups * size, *a.shape[2:]), seen)
    if num_left:
        running, later = _scan(update, running, left)
        seen = _joined(seen, later)
    return running, seen, evals


def _joined(first: PyTree, later: PyTree) -> PyTree:
    """Two histories one after the other."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), first, later)


def check_batches(batches: Any) -> int:
    """N, on which the leading axis of every leaf must agree; a ValueError unless N ≥ 1."""
    slips.check_arrays("batches", batches)
    sizes = {
        f"batches{jax.tree_util.keystr(path)}": np.shape(leaf)
        for path, leaf in jax.tree.leaves_with_path(batches)
    }
    found = {shape[:1] for shape in sizes.values()}
    if len(found) != 1 or found & {(), (0,)}:
        raise ValueError(
            f"batches must have leaves [N, T, ...] with one N >= 1, got shapes {sizes}; stack "
            "whole batches: jax.tree.map(lambda *a: jnp.stack(a), *batches)"
        )
    return found.pop()[0]


def check_evaluation(eval_fn: Any, eval_every: Any) -> int:
    """`eval_every` as an int, 0 without `eval_fn`; a ValueError for one without the other."""
    if (eval_fn is None) != (eval_every is None):
        raise ValueError(
            f"eval_fn and eval_every belong together, got eval_fn={eval_fn!r} and "
            f"eval_every={eval_every!r}; pass both, or neither"
        )
    if eval_fn is None:
        return 0
    if not callable(eval_fn):
        raise ValueError(
            f"eval_fn must be a function (params, carry) -> tree of arrays, got {eval_fn!r}; pass "
            "what computes the evaluation, not its result"
        )
    return check_positive_integer("eval_every", eval_every)


def check_policy(nonfinite: Any) -> None:
    """A ValueError unless it is one of `POLICIES`."""
    if nonfinite not in POLICIES:
        raise ValueError(
            f"nonfinite must be one of {', '.join(POLICIES)}, got {nonfinite!r}; pass one of these "
            "('zero' and 'raise' are policies of jbptt.clipping, for an optimizer's chain)"
        )


def check_count(name: str, value: Any) -> None:
    """A ValueError unless it is a whole number ≥ 0; traced ones are trusted."""
    if not isinstance(value, Tracer):
        check_positive_integer(name, value, smallest=0)


def mean_loss(
    step: Step,
    loss: Loss,
    params: Params,
    carry: Carry,
    batches: Batch,
    *,
    fresh: bool = False,
) -> jax.Array:
    """The weighted mean loss over batches `[N, T, ...]`.

    Args:
      step, loss, params: the model.
      carry: what enters the first batch, or a function of the parameters that gives it.
      batches: read as one stream with one carry.
      fresh: whether `carry` enters every batch instead.
    """
    start = start_of(carry, params)

    def body(carry, batch):
        after, ys = scan_steps(step, params, carry, batch.xs, None, batch.mask)
        value, (weight, _) = weighted_losses(where_counted(loss), ys, batch)
        return start if fresh else after, (value, weight)

    _, (values, weights) = jax.lax.scan(body, start, batches)
    return weighted_mean(values.sum(), weights.sum())
