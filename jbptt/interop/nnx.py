"""Flax nnx modules as steps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jbptt.interop import calls
from jbptt.types import Params, PyTree

WRITTEN_BACK = (
    "(nnx.jit and nnx.remat inside a module write every variable back, changed or not: leave them "
    "off there, jit the whole, and recompute by segments)"
)


def from_nnx(
    module: Any,
    *,
    input_size: Any = None,
    initial_carry: Any = None,
    call: Callable[..., Any] | None = None,
) -> calls.StepModel:
    """A Flax nnx module as `(step, params, initial_carry)`: split here, merged inside the step.

    Args:
      module: a cell (`nnx.SimpleCell`, `GRUCell`, `LSTMCell`, `OptimizedLSTMCell`), an `nnx.RNN`
        (its cell is taken), or any module called as `module(carry, x) -> (carry, y)`, x
        `[*batch, ...]`. It is not changed.
      input_size: width of x, or a tree of `jax.ShapeDtypeStruct` like one example's x. None: the
        `in_features` of what `initialize_carry` belongs to, which alone asks for it.
      initial_carry: the carry of one example, or a function of the batch shape. None:
        `initialize_carry(input_shape, rngs)` of the module, or of the one cell in it; for tokens
        the input shape is that of the batch and a width of 1.
      call: `(module, carry, x) -> (carry, y)` instead of `module(carry, x)`.

    Returns:
      step, params (the `nnx.State` of every `nnx.Param`) and initial_carry. Gradients fit
      `nnx.Optimizer.update`; parameters go back by `to_nnx`. Rng streams are part of the carry,
      other variables are constants. Every `initial_carry(batch_shape)` begins with the module's
      streams; `initial_carry(batch_shape, key)` with new keys.

    Raises:
      ValueError: not an nnx module, a wrong call, `nnx.Sequential` without `call`, bidirectional or
        reversed, no way to know the carry, one that depends on the parameters; from the step, while
        it is traced: it changed a parameter, another variable (batch norm's statistics) or an
        attribute.
      ImportError: flax is not installed.

    >>> from flax import nnx
    >>> step, params, initial_carry = from_nnx(nnx.GRUCell(3, 8, rngs=nnx.Rngs(0)))
    >>> initial_carry((2,)).shape
    (2, 8)
    """
    from flax import nnx

    if isinstance(module, nnx.Bidirectional):
        calls.refuse(module, calls.BIDIRECTIONAL)
    if isinstance(module, nnx.RNN):
        if module.reverse:
            calls.refuse(module, calls.REVERSED)
        module = module.cell
    if not isinstance(module, nnx.Module):
        calls.refuse(module, "from_nnx takes an instance of flax.nnx.Module")
    calls.check_call(module, call, nnx.Sequential)
    run = call or (lambda live, carry, x: live(carry, x))
    graph, *trees = nnx.split(module, nnx.Param, nnx.RngState, ...)
    # The trees of a split share their variables with the module: copies do not follow it, nor it
    # them.
    params, streams, constants = _copy(trees)
    is_random = bool(jax.tree.leaves(streams))
    if initial_carry is None:
        initial = _initial_carry(module, input_size)

        def start_of(params, batch_shape):
            return initial(nnx.merge(graph, *_copy((params, streams, constants))), batch_shape)

        start = calls.unlearned(module, start_of, params)
    else:
        start = calls.carry_fn(initial_carry)

    def fits(keys):
        return jax.tree.structure(keys) == jax.tree.structure(streams)

    bridged = any(isinstance(part, nnx.bridge.ToNNX) for _, part in nnx.iter_modules(module))

    def step(params, carry, x):
        inner, streams_t = (
            calls.split_keys(type(module).__name__, carry, fits) if is_random else (carry, streams)
        )
        live = nnx.merge(graph, *_copy((params, streams_t, constants)))
        after, y = calls.call_step(module, run, live, inner, x)
        graph_t, params_t, streams_t, constants_t = nnx.split(live, nnx.Param, nnx.RngState, ...)
        _check_unchanged(module, (graph, params, constants), (graph_t, params_t, constants_t))
        if bridged and (
            found := calls.frozen_state(
                _apply_free(graph, run), constants, params, streams, inner, x
            )
        ):
            calls.refuse(module, calls.FROZEN.format(", ".join(found)))
        return ((after, streams_t) if is_random else after), y

    keys = (
        (lambda _, key: _copy(streams) if key is None else _reseeded(streams, key))
        if is_random
        else None
    )
    return step, params, calls.with_keys(start, keys)


def _apply_free(graph: Any, run: Callable[..., Any]) -> Callable[..., Any]:
    """One step as `frozen_state` runs it: linen modules within may write all but parameters."""
    from flax import linen, nnx
    from flax.core import DenyList

    class Free(linen.Module):
        def __call__(self, constants, params, streams, carry, x):
            live = nnx.merge(graph, *_copy((params, streams, constants)))
            result = run(live, carry, x)
            rest: Any = nnx.split(live, nnx.Param, nnx.RngState, ...)[3]
            after = dict(nnx.to_flat_state(rest))
            return result, nnx.from_flat_state(
                {path: after[path] for path, _ in nnx.to_flat_state(constants)}
            )

    return lambda *args: Free().apply({}, *args, mutable=DenyList("params"))[0]


def _copy(trees: PyTree) -> PyTree:
    """New variables around the same arrays."""
    return jax.tree.map(lambda leaf: leaf, trees)


def _reseeded(streams: PyTree, key: jax.Array) -> PyTree:
    leaves, structure = jax.tree.flatten(streams)
    keys = jax.random.split(key, len(leaves))
    fresh = [
        jax.random.split(k, a.shape) if calls.holds_keys(a) else a
        for k, a in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, fresh)


def _initial_carry(module: Any, input_size: Any) -> Callable[[Any, tuple[int, ...]], Any]:
    """`(module, batch_shape) -> carry`, by `initialize_carry` of the module or of its only cell."""
    from flax import nnx

    def owner_in(module):
        if hasattr(module, "initialize_carry"):
            return module
        return calls.only_cell(
            module, (m for _, m in nnx.iter_modules(module) if isinstance(m, nnx.RNNCellBase))
        )

    owner = owner_in(module)
    # The x of the module need not be the x of a cell inside it, which knows its own width.
    own = getattr(owner, "in_features", None)
    size = own if owner is not module or input_size is None else input_size
    if size is None:
        raise ValueError(
            f"input_size is missing: initialize_carry of {type(owner).__name__} asks for the shape "
            "of x, and it has no in_features. Pass input_size=, the width of x, or initial_carry=."
        )
    calls.input_shapes(size)

    def initial(live, shape):
        with calls.missing_start(owner, "initialize_carry(input_shape, rngs)"):
            return owner_in(live).initialize_carry(calls.first_shape(size, shape), nnx.Rngs(0))

    return initial


def _check_unchanged(module: Any, before: PyTree, after: PyTree) -> None:
    """Compares arrays by identity: an assignment puts another array there, even of equal value."""
    (graph, *old), (graph_t, *new) = before, after
    old, new = (
        {
            jax.tree_util.keystr(path[1:]): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(trees)
        }
        for trees in (old, new)
    )
    changed = [name for name in new if name in old and old[name] is not new[name]]
    changed += [f"the attribute {name}, which is new" for name in new if name not in old]
    if changed or graph != graph_t:
        what = ", ".join(changed) or "its attributes"
        calls.refuse(
            module,
            f"one step changed {what}. {calls.STATEFUL}{calls.FIXED_STATISTICS}. {WRITTEN_BACK}",
        )


def to_nnx(module: Any, params: Params) -> Any:
    """A copy of the nnx module with `params` in it; all else, rng streams too, as in `module`.

    An `nnx.RNN` gets the parameters of its cell. (`nnx.update(module, params)` changes the module
    itself.)

    Raises:
      ValueError: the names or shapes are not those of the module's parameters.
    """
    from flax import nnx

    copy = nnx.clone(module)
    target = copy.cell if isinstance(copy, nnx.RNN) else copy
    wanted, got = _shapes(nnx.state(target, nnx.Param)), _shapes(params)
    if wanted != got:
        wrong = sorted(
            f"{k}: {got.get(k)}, wanted {wanted.get(k)}"
            for k in wanted | got
            if got.get(k) != wanted.get(k)
        )
        raise ValueError(
            f"params must have the names and shapes of the parameters of {type(target).__name__}, "
            f"got {wrong[0]}{f' and {len(wrong) - 1} more' if len(wrong) > 1 else ''}. Pass params "
            "as from_nnx of this module returned them."
        )
    nnx.update(target, params)
    return copy


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    named = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path).removesuffix(".value"): jnp.shape(leaf) for path, leaf in named
    }
