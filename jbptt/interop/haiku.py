"""Haiku cores as steps."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jbptt.engine import dependences
from jbptt.interop import calls


def from_haiku(
    make_core: Callable[[], Any],
    key: jax.Array,
    *,
    input_size: Any,
    initial_carry: Any = None,
    call: Callable[..., Any] | None = None,
) -> calls.StepModel:
    """A Haiku core as `(step, params, initial_carry)`, with freshly drawn parameters.

    Args:
      make_core: a function without arguments that builds the core (`lambda: hk.LSTM(64)`): a
        `hk.RNNCore`, `hk.DeepRNN` among them, or any module called as
        `core(x, carry) -> (y, carry)`. It runs inside `hk.transform`, on batches: x is `[B, ...]`,
        one axis and no more, as Haiku's own cores take it.
      key: of the parameters and, where a step draws random numbers, of those: then it travels in
        the carry. Every `initial_carry(batch_shape)` begins with the same;
        `initial_carry(batch_shape, key)` with another.
      input_size: width of x, or a tree of `jax.ShapeDtypeStruct` like one example's x.
      initial_carry: the carry of one example, or a function of the batch shape. None: the core's
        `initial_state(batch_size)`, `initial_state(None)` for one example.
      call: `(core, carry, x) -> (carry, y)` instead of `core(x, carry)`.

    Returns:
      step, params (Haiku's own, `{module: {name: array}}`) and initial_carry. Parameters that were
      trained elsewhere, with the same names, can take the place of `params`.

    Raises:
      ValueError: make_core makes no core, no key, a wrong call, `hk.Sequential` without `call`,
        `hk.get_state` in the core (batch norm), an initial state with parameters or random numbers;
        from the step: keys missing in the carry.
      ImportError: haiku is not installed.

    >>> import haiku as hk
    >>> step, params, initial_carry = from_haiku(lambda: hk.GRU(8), jax.random.key(0), input_size=3)
    >>> step(params, initial_carry((2,)), jnp.zeros((2, 3)))[1].shape
    (2, 8)
    """
    import haiku as hk

    start = (
        _initial_carry(make_core, key) if initial_carry is None else calls.carry_fn(initial_carry)
    )
    network = hk.transform_with_state(lambda carry, x: _core_step(make_core, call, carry, x))
    x = jax.tree.map(lambda s: jnp.zeros((1, *s.shape), s.dtype), calls.input_shapes(input_size))
    key_init, key_steps = jax.random.split(calls.typed_key(key))
    params, state = network.init(key_init, start((1,)), x)

    def run(params, key, carry, x):
        after, kept = network.apply(params, state, key, carry, x)
        if kept:  # some keep a state in apply alone (hk.running_init)
            raise ValueError(
                f"make_core's core keeps a state ({', '.join(kept)}): no step. {calls.STATEFUL}."
            )
        return after

    # Asked of the program, because a core may draw only where there is a key.
    is_random = any(dependences(lambda key: run(params, key, start((1,)), x), key_steps))

    def step(params, carry, x):
        if not is_random:
            return run(params, None, carry, x)
        inner, key_t = calls.split_keys("make_core's core", carry)
        key_t, used = jax.random.split(key_t)
        inner, y = run(params, used, inner, x)
        return (inner, key_t), y

    keys = (lambda _, new: key_steps if new is None else new) if is_random else None
    return step, params, calls.with_keys(start, keys)


def _made(make_core: Any) -> Any:
    import haiku as hk

    core = make_core()
    if not isinstance(core, hk.Module) or not callable(core):
        raise ValueError(
            f"make_core must return a haiku module that can be called, got {type(core).__name__}."
        )
    return core


def _core_step(make_core: Any, call: Any, carry: Any, x: Any) -> tuple[Any, Any]:
    import haiku as hk

    core = _made(make_core)
    calls.check_call(core, call, hk.Sequential, own=("x", "carry"))
    if call is not None:
        return calls.call_step(core, call, core, carry, x)
    y, carry = calls.call_step(core, core, x, carry)
    return carry, y


def _initial_carry(make_core: Any, key: jax.Array) -> calls.InitialCarry:
    import haiku as hk

    method = "initial_state(batch_size)"

    def initial_state(batch_size):
        core = _made(make_core)
        if not hasattr(core, "initial_state"):
            raise ValueError(calls.no_start(core, method))
        with calls.missing_start(core, method):
            return core.initial_state(batch_size)

    made = hk.transform(initial_state)
    if jax.eval_shape(lambda: made.init(key, 1)):
        raise ValueError(f"make_core's core cannot be used as a step: {calls.LEARNED_START}.")
    if any(dependences(lambda key: made.apply({}, key, 1), calls.typed_key(key))):
        raise ValueError(
            "initial_state of make_core's core draws random numbers. Pass initial_carry=."
        )

    def initial_carry(batch_shape=()):
        carry = made.apply({}, None, math.prod(batch_shape) if batch_shape else None)
        return (
            jax.tree.map(lambda a: a.reshape(*batch_shape, *a.shape[1:]), carry)
            if batch_shape
            else carry
        )

    return initial_carry
