"""How a module of another library is called as a step, and what is said when it cannot be."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from jbptt.arrays import is_key
from jbptt.engine import dependences
from jbptt.types import Carry, Params, PyTree, Step

InitialCarry = Callable[..., Carry]
StepModel = tuple[Step, Params, InitialCarry]

STATEFUL = (
    "A step must be a pure function of (params, carry, x), and running statistics also tie the "
    "examples of a batch together. Put remembered values into the carry and values to show into y, "
    "or use layers without state: layer norm instead of batch norm"
)
INPUT_NAMES = "x", "xs", "input", "inputs"
FIXED_STATISTICS = ", or batch norm with fixed statistics (evaluation mode)"
CHAIN = (
    "it passes one value from layer to layer and has no carry. Pass call=lambda module, carry, x: "
    "…, which runs its layers as one step"
)
LEARNED_START = (
    "its initial carry depends on its parameters, and no step trains those. Pass initial_carry=. "
    "To learn the start, pass the estimator a function of the parameters as the carry "
    "(docs/recipes.md, a learned start)"
)
BIDIRECTIONAL = (
    "its output depends on later inputs, which a step has not seen. Convert its two cells, run one "
    "on xs and the other on jnp.flip(xs, 0), flip those outputs back and combine them in the loss"
)
FROZEN = (
    "it updates {} where that is mutable, and reads it in the next step. A step cannot update it, "
    "so it would keep its first value. Put it into the carry: a step of your own calls the module "
    "with it mutable (docs/interop.md shows one). If it is meant to stay constant, remove the "
    "write from the module"
)
REVERSED = (
    "it reads the sequence from the end. Pass its .cell, and flip xs and targets: jnp.flip(…, 0)"
)


def refuse(module: Any, reason: str) -> NoReturn:
    """A ValueError that names the module."""
    raise ValueError(f"{type(module).__name__} cannot be used as a step: {reason}.")


@contextmanager
def missing_key(module: Any, kind: type[Exception], word: str = "") -> Iterator[None]:
    """Turns a library's error on a missing random key into a ValueError that says what to pass."""
    try:
        yield
    except kind as error:
        if word not in str(error):
            raise
        what = (
            f"{type(module).__name__} draws random numbers in one step: pass key=jax.random.key(…)."
        )
        raise ValueError(what) from error


def check_call(
    module: Any,
    call: Callable[..., Any] | None,
    chain: type,
    own: tuple[str, ...] = ("carry", "x"),
    key: Any = None,
) -> None:
    """`call(module, carry, x)`, or on `own` arguments, must be possible; with `key=` if it has one.

    The library's `chain` of layers would take the arguments and mean something else by them.
    """
    if call is None and isinstance(module, chain):
        refuse(module, CHAIN)
    names = own if call is None else ("module", "carry", "x")
    try:
        signature = inspect.signature(call or module.__call__)
        signature.bind(*names, **({} if key is None else {"key": key}))
    except (AttributeError, TypeError) as error:
        who = "its __call__" if call is None else "call"
        wanted = ", ".join([*names, *([] if key is None else ["key=…"])])
        returned = "y, carry" if names[0] == "x" else "carry, y"
        remedy = (
            "Pass call=lambda module, carry, x: …, which makes one step; of a module that reads a "
            "whole sequence "
        )
        remedy += "pass the cell, or the part that makes a step"
        if "'key'" in str(error):
            without = "Leave key= out, or pass call=lambda module, carry, x, key: …, which uses it"
            remedy = "Pass key=jax.random.key(…)" if key is None else without
        refuse(module, f"{who} must take ({wanted}) and return ({returned}), but {error}. {remedy}")
    first = next(iter(signature.parameters), "")
    if call is None and names[0] == "carry" and first in INPUT_NAMES:
        refuse(
            module,
            f"its __call__ takes {first} first, and a step takes (carry, x) and returns (carry, "
            "y). Pass call=lambda module, carry, x: …, which makes one step",
        )


def frozen_state(apply: Callable[..., tuple[Any, PyTree]], state: PyTree, *args: Any) -> list[str]:
    """The names of what a module would both read and write in a step, were all state mutable.

    `apply(state, *args) -> (result, state)` is traced twice: the first run may create state that is
    not there yet. State that is only written (`sow`) does not count. Empty for a module that cannot
    run with mutable state.
    """

    def again(state, *args):
        result, after = apply(state, *args)
        old = dict(jax.tree.leaves_with_path(state))
        written.update(
            path
            for path, leaf in jax.tree.leaves_with_path(after)
            if old.get(path, leaf) is not leaf
        )
        return result

    written: set[Any] = set()
    try:
        _, state = jax.eval_shape(apply, state, *args)
        read = (
            frozenset().union(*dependences(again, state, *args))
            if jax.tree.leaves(state)
            else frozenset()
        )
    except Exception:
        return []
    paths = [path for path, _ in jax.tree.leaves_with_path(state)]
    return [
        jax.tree_util.keystr(path) for i, path in enumerate(paths) if i in read and path in written
    ]


@contextmanager
def missing_start(owner: Any, method: str) -> Iterator[None]:
    """A method that raises NotImplementedError counts as missing."""
    try:
        yield
    except NotImplementedError as error:
        raise ValueError(no_start(owner, method)) from error


def no_start(owner: Any, method: str) -> str:
    """The message for a module that does not say what its carry looks like."""
    return (
        f"{type(owner).__name__} has no {method}. Pass initial_carry=, the carry of one example or "
        "a function of the batch shape."
    )


def call_step(
    module: Any, function: Callable[..., Any], *args: Any, **options: Any
) -> tuple[Any, Any]:
    """`function(*args)`: its errors say which module failed; a result must be a pair."""
    try:
        result = function(*args, **options)
    except Exception as error:
        given = ", ".join(str(jax.tree.map(jax.typeof, arg)) for arg in args[-2:])
        error.add_note(
            f"This happened in one step of {type(module).__name__}, called with {given}."
        )
        raise
    if not (isinstance(result, tuple) and len(result) == 2):
        got = f"a tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__
        refuse(
            module,
            f"one step must return a pair (carry, y), got {got}. Pass call=lambda module, carry, "
            "x: …",
        )
    return result


def input_shapes(input_size: Any) -> PyTree:
    """An int is the width of a vector x; any other tree holds an example's shapes and dtypes."""
    if isinstance(input_size, int) and not isinstance(input_size, bool) and input_size > 0:
        return jax.ShapeDtypeStruct((input_size,), jnp.result_type(float))
    leaves = jax.tree.leaves(input_size)
    if leaves and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, jax.dtypes.canonicalize_dtype(s.dtype)),
            input_size,
        )
    raise ValueError(
        "input_size must be an integer ≥ 1, the width of x, or a tree of jax.ShapeDtypeStruct, "
        f"one example's x (for tokens jax.ShapeDtypeStruct((), jnp.int32)), got {input_size!r}."
    )


def first_shape(input_size: Any, batch_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the first leaf of a batch's x: what `initialize_carry` of Flax asks for.

    Flax drops the last axis, the width; tokens have none, so they get one.
    """
    return (*batch_shape, *(jax.tree.leaves(input_shapes(input_size))[0].shape or (1,)))


def carry_fn(initial_carry: Any) -> InitialCarry:
    """The carry of one example as a function of the batch shape; a function as it is."""
    if callable(initial_carry):
        return initial_carry
    one = jax.tree.map(jnp.asarray, initial_carry)
    return lambda batch_shape=(): jax.tree.map(
        lambda a: jnp.broadcast_to(a, (*batch_shape, *a.shape)), one
    )


def unlearned(
    module: Any, initial: Callable[[Params, tuple[int, ...]], Carry], params: Params
) -> InitialCarry:
    """`initial(params, batch_shape)` as a function of batch_shape; refused if params change it."""
    if any(dependences(lambda params: initial(params, (1,)), params)):
        refuse(module, LEARNED_START)
    return lambda batch_shape=(): initial(params, batch_shape)


def holds_keys(thing: Any) -> bool:
    """Whether this, which may be anything, is an array of typed keys."""
    return hasattr(thing, "dtype") and is_key(thing)


def typed_key(key: Any) -> jax.Array:
    """Makes a raw key, uint32 `[2]`, a typed one: a mask would take its numbers for examples."""
    if holds_keys(key):
        return key
    if getattr(key, "dtype", None) != jnp.uint32:
        raise ValueError(
            f"key must be a key of JAX's random numbers, got {key!r}. Pass key=jax.random.key(…)."
        )
    return jax.random.wrap_key_data(key)


def split_keys(
    name: str, carry: Any, fits: Callable[[Any], bool] = holds_keys
) -> tuple[Carry, PyTree]:
    """Splits the carry of a module that draws into the module's own carry and the keys."""
    if isinstance(carry, tuple) and len(carry) == 2 and fits(carry[1]):
        return carry
    raise ValueError(
        f"{name} draws random numbers, so its carry is a pair (carry, keys), got "
        f"{jax.tree.map(jax.typeof, carry)}. Take initial_carry(batch_shape), or put yours in "
        "place of its first part."
    )


def with_keys(
    start: InitialCarry, keys: Callable[[tuple[int, ...], jax.Array | None], PyTree] | None
) -> InitialCarry:
    """`initial_carry(batch_shape=(), key=None)`: the module's carry, with its keys if it draws."""

    def initial_carry(batch_shape=(), key=None):
        if not isinstance(batch_shape, tuple):
            raise ValueError(
                f"batch_shape must be a tuple, (16,) for 16 examples, got {batch_shape!r}."
            )
        if keys is None:
            return start(batch_shape)
        return start(batch_shape), keys(batch_shape, None if key is None else typed_key(key))

    return initial_carry


def only_cell(module: Any, cells: Iterable[Any]) -> Any:
    """A module's only recurrent cell, whose carry is the module's; a ValueError if not just one."""
    cells = list(cells)
    if len(cells) != 1:
        raise ValueError(
            f"{type(module).__name__} holds {len(cells)} recurrent cells, so its carry is not "
            "known. Pass initial_carry=, the carry of one example or a function of the batch shape."
        )
    return cells[0]
