"""Compiled programs of users' functions: one for the same settings, dropped with its functions.

JAX compiles once for each function object. An analysis makes its functions anew in every call, so
that JAX alone would compile anew in every call; here a program is found again by the identity of
the step and the loss.
"""

import weakref
from collections.abc import Callable, Hashable
from types import MethodType
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jbptt.cells import ReadoutStep

MOST = 256
"""Values that a cache keeps; the one that has not been asked for longest goes first."""


class WeakCache:
    """What is made of functions, by identity and settings, until a function dies."""

    def __init__(self):
        self._values: dict[Hashable, tuple] = {}

    def find(self, functions: tuple, settings: Hashable, make: Callable) -> Any:
        """`make(*functions)`, made once; what it is given, and its value, hold functions weakly.

        Made in every call, of the functions themselves, where one cannot be hashed (what it
        computes may change) or referred to weakly, or where the settings cannot be hashed.
        """
        try:
            key = tuple(map(_identity, functions)), settings
            hash((functions, key))
            weak = [
                _weakly(function, lambda _: self._values.pop(key, None)) for function in functions
            ]
        except TypeError:
            return make(*functions)
        # Popped and put back: the last one asked for stands last. The weak references stay with the
        # value, since they tell of a death only while they are kept.
        value, weak = self._values.pop(key, None) or (make(*weak), weak)
        self._values[key] = value, weak
        while len(self._values) > MOST:
            self._values.pop(next(iter(self._values)), None)
        return value

    def forget(self, value: Any) -> None:
        """Drops a value."""
        for key in [key for key, (found, _) in list(self._values.items()) if found is value]:
            self._values.pop(key, None)


def _identity(function: Callable) -> Hashable:
    """What tells living functions apart; methods and steps with readouts by their parts."""
    if type(function) is ReadoutStep:
        return _identity(function.core), _identity(function.readout)
    if isinstance(function, MethodType):
        return id(function.__self__), id(function.__func__)
    return id(function)


def _weakly(function: Callable, forget: Callable) -> Callable:
    """A function that calls this one but does not keep it alive; `forget` is told of its death."""
    if type(function) is ReadoutStep:
        return ReadoutStep(_weakly(function.core, forget), _weakly(function.readout, forget))
    reference = (weakref.WeakMethod if isinstance(function, MethodType) else weakref.ref)(
        function, forget
    )

    def call(*arguments, **named):
        alive: Any = reference()
        return alive(*arguments, **named)

    return call


_PROGRAMS = WeakCache()


def compiled(body: Callable, functions: tuple, settings: Hashable = ()) -> Callable:
    """`body(*functions, *arguments)` as one jitted program, the same one in every call."""

    def make(*functions):
        def program(*arguments):
            return body(*functions, *arguments)

        program.__name__ = program.__qualname__ = body.__name__
        return jax.jit(program)

    return _PROGRAMS.find(functions, (body, settings), make)


def run(body: Callable, functions: tuple, settings: tuple, *arguments: Any, name: str = "") -> Any:
    """`body(*functions, *settings, *arguments)`, compiled once for functions, settings, shapes.

    As under jit, what the functions close over is read once. Not compiled where anything is traced
    already, and where a function needs the numbers themselves (for an `if`, or NumPy).

    Args:
      body: a function of a module.
      functions: the user's.
      settings: hashable; whatever the program depends on beside functions, shapes and arguments.
      arguments: trees of arrays and numbers. Whole numbers, bools and strings in them are settings.
      name: of the program; "": the body's.
    """
    leaves, structure = jax.tree.flatten(arguments)
    fixed = tuple(None if _is_array(leaf) else (type(leaf), leaf) for leaf in leaves)
    if is_traced(arguments) or not all(
        pair is None or isinstance(pair[1], int | str) for pair in fixed
    ):
        return body(*functions, *settings, *arguments)

    def make(*functions):
        def program(*arrays):
            rest = iter(arrays)
            filled = [next(rest) if pair is None else pair[1] for pair in fixed]
            return body(*functions, *settings, *structure.unflatten(filled))

        program.__name__ = program.__qualname__ = name or body.__name__
        return jax.jit(program)

    program = _PROGRAMS.find(functions, (body, settings, structure, fixed), make)
    try:
        result = program(*(leaf for leaf, pair in zip(leaves, fixed, strict=True) if pair is None))
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError):
        _PROGRAMS.forget(program)
        return body(*functions, *settings, *arguments)
    if is_traced(result):
        # A function closes over what is traced, which lives no longer than this call.
        _PROGRAMS.forget(program)
    return result


def is_traced(tree: Any) -> bool:
    """Whether a leaf is traced, or all that is computed.

    Under jit a constant is traced, too, and data may be closed over.
    """
    return any(
        isinstance(leaf, Tracer) for leaf in (*jax.tree.leaves(tree), jax.device_put(np.zeros(())))
    )


def _is_array(leaf: Any) -> bool:
    """Whether a program can take it as data; not so NumPy's strings, dates and objects."""
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype.kind not in "OSUMm"
    return isinstance(leaf, jax.Array | float | complex)
