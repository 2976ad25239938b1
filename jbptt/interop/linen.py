"""Flax linen modules as steps."""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import jax

from jbptt.interop import calls

STREAMS = "params", "dropout"


def from_linen(
    module: Any,
    variables: Mapping[str, Any],
    *,
    input_size: Any,
    initial_carry: Any = None,
    call: Callable[..., Any] | None = None,
    key: jax.Array | None = None,
) -> calls.StepModel:
    """A Flax linen module as `(step, params, initial_carry)`.

    Args:
      module: a cell (`linen.SimpleCell`, `GRUCell`, `LSTMCell`, `OptimizedLSTMCell`, `MGUCell`), a
        `linen.RNN` with its variables (the cell and the cell's variables are taken), or any module
        called as `module(carry, x) -> (carry, y)`, x `[*batch, ...]`.
      variables: what `module.init` returned: `"params"` is trained, the other collections are
        constants.
      input_size: width of x, or a tree of `jax.ShapeDtypeStruct` like one example's x.
      initial_carry: the carry of one example, or a function of the batch shape. None: the module's
        `initialize_carry(key, input_shape)`; for tokens the input shape is that of the batch and a
        width of 1.
      call: `(module, carry, x) -> (carry, y)`, bound to the variables, instead of
        `module(carry, x)`.
      key: for modules that draw random numbers, whatever they call their stream (`has_rng` finds
        "params" and "dropout"): it travels in the carry. Every `initial_carry(batch_shape)` begins
        with the same; `initial_carry(batch_shape, key)` with another.

    Returns:
      step, params (`variables["params"]`; of a `linen.RNN` its `["cell"]`) and initial_carry. The
      way back is `{**variables, "params": params}`.

    Raises:
      ValueError: not a linen module, no "params" in the variables, a wrong call, `linen.Sequential`
        without `call`, bidirectional or reversed, no `initialize_carry`, one that depends on the
        parameters, no key in `key`; from the step, while it is traced: a collection is written to,
        or would be if it were mutable (and is read by the next step), a key is missing, here or in
        the carry.
      ImportError: flax is not installed.

    >>> from flax import linen
    >>> import jax.numpy as jnp
    >>> cell, carry = linen.GRUCell(8), jnp.zeros(8)
    >>> variables = cell.init(jax.random.key(0), carry, jnp.zeros(3))
    >>> step, params, initial_carry = from_linen(cell, variables, input_size=3)
    >>> step(params, initial_carry((2,)), jnp.zeros((2, 3)))[1].shape
    (2, 8)
    """
    from flax import errors, linen
    from flax.core import DenyList

    if isinstance(module, linen.Bidirectional):
        calls.refuse(module, calls.BIDIRECTIONAL)
    if not isinstance(module, linen.Module):
        calls.refuse(module, "from_linen takes an instance of flax.linen.Module")
    if not isinstance(variables, Mapping) or "params" not in variables:
        found = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(
            f'variables must hold "params", as module.init(…) returns them, got {found}.'
        )
    if isinstance(module, linen.RNN):
        if module.reverse:
            calls.refuse(module, calls.REVERSED)
        if "cell" not in variables["params"]:
            raise ValueError(
                'variables["params"] of a linen.RNN must hold "cell", got '
                f"{sorted(variables['params'])}. Pass what its own init returned; of a model "
                "that holds it, the part under its name."
            )
        module, variables = (
            module.cell,
            {name: tree["cell"] for name, tree in variables.items() if "cell" in tree},
        )
    calls.check_call(module, call, linen.Sequential)
    start = (
        _initial_carry(module, variables, input_size)
        if initial_carry is None
        else calls.carry_fn(initial_carry)
    )
    constants = {name: tree for name, tree in variables.items() if name != "params"}

    def run(live, carry, x, rngs):
        try:
            return module.apply({**constants, "params": live}, carry, x, rngs=rngs, method=call)
        except errors.ModifyScopeVariableError as error:
            raise ValueError(
                f"{type(module).__name__} changed a variable in one step. "
                f"{calls.STATEFUL}{calls.FIXED_STATISTICS}."
            ) from error

    @cache  # for the shapes of one step: it is traced several times
    def frozen(structure, shapes):
        def apply(state, live, carry, x, rngs):
            free = {"rngs": rngs, "method": call, "mutable": DenyList("params")}
            return module.apply({**state, "params": live}, carry, x, **free)

        return calls.frozen_state(apply, constants, *structure.unflatten(shapes))

    def checked(*args, rngs):
        after = calls.call_step(module, partial(run, rngs=rngs), *args)
        shapes, structure = jax.tree.flatten(jax.eval_shape(lambda *tree: tree, *args, rngs))
        if found := frozen(structure, tuple(shapes)):
            calls.refuse(module, calls.FROZEN.format(", ".join(found)))
        return after

    def step(params, carry, x):
        if key is None:
            with calls.missing_key(module, errors.InvalidRngError):
                return checked(params, carry, x, rngs={})
        inner, key_t = calls.split_keys(type(module).__name__, carry)
        key_t, *used = jax.random.split(key_t, 3)
        # Streams that have no key of their own take that of "params"; modules ask whether there is
        # a "dropout".
        inner, y = checked(params, inner, x, rngs=dict(zip(STREAMS, used, strict=True)))
        return (inner, key_t), y

    own_key = None if key is None else calls.typed_key(key)
    keys = None if key is None else lambda _, new: own_key if new is None else new
    return step, variables["params"], calls.with_keys(start, keys)


def _initial_carry(
    module: Any, variables: Mapping[str, Any], input_size: Any
) -> calls.InitialCarry:
    calls.input_shapes(input_size)
    method = "initialize_carry(key, input_shape)"
    if not hasattr(module, "initialize_carry"):
        raise ValueError(calls.no_start(module, method))
    key = jax.random.key(0)  # as linen.RNN does where no init_key is given

    def initial(params, batch_shape):
        shape = calls.first_shape(input_size, batch_shape)
        return module.apply(
            {**variables, "params": params}, method=lambda live: live.initialize_carry(key, shape)
        )

    with calls.missing_start(module, method):
        return calls.unlearned(module, initial, variables["params"])
