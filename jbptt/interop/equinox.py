"""Equinox modules as steps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jbptt.interop import calls
from jbptt.types import Params


def from_equinox(
    module: Any,
    *,
    initial_carry: Any = None,
    call: Callable[..., Any] | None = None,
    key: jax.Array | None = None,
) -> calls.StepModel:
    """An Equinox module of one example as `(step, params, initial_carry)`, vmapped over the batch.

    Args:
      module: a cell (`eqx.nn.GRUCell`, `LSTMCell`; y = h), or any module called as
        `module(carry, x) -> (carry, y)` on one example. All its floating arrays are trained, as
        with `eqx.filter_grad`.
      initial_carry: the carry of one example, or a function of the batch shape. None: zeros for the
        only cell in the module. A start that the module itself holds is not used: no step reads it,
        so it would not be trained. Every leaf has the batch axes.
      call: `(module, carry, x) -> (carry, y)` on one example, instead of `module(carry, x)`.
      key: for modules that draw random numbers: the call gets a new one as `key=` in each step and
        for each example. Every `initial_carry(batch_shape)` begins with the same;
        `initial_carry(batch_shape, key)` with others.

    Returns:
      step, params (`eqx.filter(module, eqx.is_inexact_array)`) and initial_carry. Updates fit
      `eqx.apply_updates`; parameters go back by `to_equinox`.

    Raises:
      ValueError: not an Equinox module, a wrong call, `eqx.nn.Sequential` without `call`, an
        `eqx.nn.State` or a layer with one, no way to know the carry, a carry without arrays, no key
        in `key`; from the step, while it is traced: a key is missing, here or in the carry.
      ImportError: equinox is not installed.

    >>> import equinox as eqx
    >>> step, params, initial_carry = from_equinox(eqx.nn.GRUCell(3, 8, key=jax.random.key(0)))
    >>> step(params, initial_carry((2,)), jnp.zeros((2, 3)))[1].shape
    (2, 8)
    """
    import equinox as eqx

    cell_types = eqx.nn.GRUCell, eqx.nn.LSTMCell
    if not isinstance(module, eqx.Module):
        calls.refuse(module, "from_equinox takes an instance of equinox.Module")
    if _held(module, (eqx.nn.StateIndex, eqx.nn.State)):
        calls.refuse(
            module, f"it holds an eqx.nn.State, or a layer that keeps one. {calls.STATEFUL}"
        )
    is_cell = isinstance(module, cell_types)
    if call is not None or not is_cell:
        calls.check_call(module, call, eqx.nn.Sequential, key=key)
    run = call or (_call_cell if is_cell else _call_module)
    key = None if key is None else calls.typed_key(key)
    if initial_carry is None:
        initial_carry = _zeros(calls.only_cell(module, _held(module, cell_types)))
    start = calls.carry_fn(initial_carry)
    params, static = eqx.partition(module, eqx.is_inexact_array)

    def example_step(params, carry, x):
        live = eqx.combine(params, static)
        if key is None:
            with calls.missing_key(module, RuntimeError, "key"):  # what Equinox's layers raise
                return calls.call_step(module, run, live, carry, x)
        inner, key_t = calls.split_keys(type(module).__name__, carry)
        key_t, used = jax.random.split(key_t)
        inner, y = calls.call_step(module, lambda *args: run(*args, key=used), live, inner, x)
        return (inner, key_t), y

    keys = (
        None
        if key is None
        else lambda batch_shape, new: jax.random.split(key if new is None else new, batch_shape)
    )
    first_carry = calls.with_keys(start, keys)
    leaves = jax.tree.leaves(jax.eval_shape(first_carry))
    if not leaves:
        raise ValueError(
            "initial_carry holds no array, so a step cannot tell one example from a batch. Give it "
            "one, such as jnp.zeros(()), and hand it on."
        )
    example_rank = jnp.ndim(leaves[0])

    def step(params, carry, x):
        batched = example_step
        for _ in range(jnp.ndim(jax.tree.leaves(carry)[0]) - example_rank):
            batched = jax.vmap(batched, (None, 0, 0))
        return batched(params, carry, x)

    return step, params, first_carry


def _call_cell(cell: Any, carry: Any, x: Any, **random: Any) -> tuple[Any, Any]:
    carry = cell(x, carry, **random)
    return carry, carry[0] if isinstance(carry, tuple) else carry


def _call_module(module: Any, carry: Any, x: Any, **random: Any) -> tuple[Any, Any]:
    return module(carry, x, **random)


def _held(module: Any, types: Any) -> list[Any]:
    """The parts of the module that are of these types; not the parts of such a part."""
    return [
        m
        for m in jax.tree.leaves(module, is_leaf=lambda m: isinstance(m, types))
        if isinstance(m, types)
    ]


def _zeros(cell: Any) -> Any:
    import equinox as eqx

    zeros = jnp.zeros(cell.hidden_size, cell.weight_hh.dtype)
    return (zeros, zeros) if isinstance(cell, eqx.nn.LSTMCell) else zeros


def to_equinox(module: Any, params: Params) -> Any:
    """The Equinox module with `params` in it; everything else as in `module`."""
    import equinox as eqx

    return eqx.combine(params, module)
