"""Common slips in arrays, axes, arguments and weights, where JAX's words come from its inside."""

import numbers
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray, Tracer
from jax.tree_util import keystr

from jbptt.arrays import is_inexact
from jbptt.engine import Paths, dependences
from jbptt.types import Carry, Params, PyTree, Step

# Files whose lines tell the user nothing.
OWN = tuple(f"{Path(module).parent}{os.sep}" for module in (__file__, jax.__file__))
# A sum of weights below this share of the sum of their sizes is a difference of two noisy numbers.
SMALL = 0.05


def not_an_array(leaf: Any) -> str:
    """What a leaf is, if JAX takes it for no array of numbers; "" if it is one."""
    if isinstance(leaf, (np.ndarray, np.generic)):
        return f"a NumPy array of dtype {leaf.dtype}" if leaf.dtype.kind in "OSUMm" else ""
    known = isinstance(leaf, (numbers.Number, jax.Array, jax.ShapeDtypeStruct, ShapedArray))
    if known or hasattr(leaf, "__jax_array__"):
        return ""
    kind = type(leaf)
    module = kind.__module__.split(".")[0]
    return f"a {kind.__name__}" if module == "builtins" else f"a {module}.{kind.__name__}"


def signature(leaf: Any) -> str:
    """Dtype and shape, "float32[3, 4]"."""
    return f"{jax.dtypes.result_type(leaf)}{list(np.shape(leaf))}"


def check_arrays(name: str, tree: PyTree) -> None:
    """A ValueError that names the first leaf that is no array of numbers."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        if found := not_an_array(leaf):
            remedy = "pass JAX or NumPy arrays: np.asarray(...) of tensors and tables"
            if "dtype" in found:
                remedy = (
                    "pass numbers; pad sequences of several lengths to one T, and say which steps "
                    "count by mask"
                )
            raise ValueError(f"{name}{keystr(path)} is {found}, wanted an array; {remedy}")


def warn_user(message: str) -> None:
    """A UserWarning at the user's own line: Python shows it once for each line."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_code.co_filename.startswith(OWN):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def warn_of_float64(trees: dict[str, Any]) -> None:
    """A warning where JAX is about to round float64 to float32, which it does without a word."""
    if jax.dtypes.canonicalize_dtype(np.float64) == np.float64:
        return
    for name, tree in trees.items():
        for path, leaf in jax.tree.leaves_with_path(tree):
            if isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype in (
                np.float64,
                np.complex128,
            ):
                warn_user(
                    f"{name}{keystr(path)} is {leaf.dtype}, which is computed in single precision "
                    "while x64 is off; cast it to float32, or jax.config.update('jax_enable_x64', "
                    "True) before anything else",
                )
                return


def warn_of_cancelling_weights(weights: Any, mask: Any) -> None:
    """A warning where weights of both signs nearly cancel; traced ones are not looked at."""
    if weights is None or not all(
        a is None or isinstance(a, (np.ndarray, jax.Array)) for a in (weights, mask)
    ):
        return
    if isinstance(weights, Tracer) or isinstance(mask, Tracer):
        return
    weights = np.asarray(weights, np.float64)
    if mask is not None:
        ndim = max(weights.ndim, np.ndim(mask))
        weights, mask = (
            np.reshape(a, np.shape(a) + (1,) * (ndim - np.ndim(a))) for a in (weights, mask)
        )
        weights = np.where(mask, weights, 0)
    total, size = abs(weights.sum()), np.abs(weights).sum()
    if total < SMALL * size:
        warn_user(
            f"weights of both signs nearly cancel: they sum to {weights.sum():.3g}, their sizes to "
            f"{size:.3g}, and loss and grads are divided by that sum; divide grad_sum and loss_sum "
            "by the number of steps and examples instead (docs/guide.md, weights of both signs)"
        )


def warn_of_missing_path(live: Paths, params: Params, carry: Carry, start: Any) -> None:
    """A warning where every gradient is zero, or where nothing looks at a parameter.

    `carry` may be shapes; `start` is what was given for it, a function of the parameters perhaps.
    """
    by_start = dependences(start, params) if callable(start) else []
    inexact = [
        of
        for of, leaf in zip(by_start, jax.tree.leaves(carry), strict=bool(by_start))
        if is_inexact(leaf)
    ]
    leads_on = any(
        of and is_read for of, is_read in zip(inexact, live.carries, strict=bool(inexact))
    )
    if live.reason and not leads_on:
        warn_user(
            f"the gradient is exactly zero: {live.reason}; look for stop_gradient, rounding, an "
            "integer or an output that is not returned",
        )
        return
    names = [f"params{keystr(path)}" for path, _ in jax.tree.leaves_with_path(params)]
    in_start = {names[i] for i in frozenset().union(*by_start)}
    if unread := [name for name in live.unread if name not in in_start]:
        warn_user(
            f"no step reads {', '.join(unread)}: the gradient in it is exactly zero. For a learned "
            "start of the carry pass a function of the parameters, carry=lambda params: …; leave "
            "what is not used out of params",
        )


def batch_first(step: Step, params: Params, carry: Carry, xs: PyTree) -> str:
    """What is said where the step runs with the first two axes of xs swapped; else ""."""
    if min(map(np.ndim, jax.tree.leaves(xs)), default=0) < 2:
        return ""
    if not _fits(step, params, carry, jax.tree.map(lambda a: _without(a, 1), xs), 1):
        return ""
    path, leaf = jax.tree.leaves_with_path(xs)[0]
    return (
        f"time must come first: xs{keystr(path)} {list(np.shape(leaf))} hands the step x "
        f"{list(np.shape(leaf)[1:])} for a carry {jax.tree.map(signature, carry)}, and with axes 0 "
        "and 1 swapped the step runs; pass jnp.swapaxes(a, 0, 1) of xs, targets, mask and weights"
    )


def input_first(step: Step, params: Params, carry: Carry, x: PyTree) -> str:
    """What is said where a step that fails runs with x before the carry; "" where it does not."""
    if not _fits(lambda params, carry, x: step(params, x, carry), params, carry, x, 2):
        return ""
    return (
        "step must take (params, carry, x) and return (carry, y): with x before the carry it runs; "
        "pass lambda params, carry, x: step(params, x, carry)"
    )


def where_it_failed(name: str, **given: PyTree) -> str:
    """A note for an error out of the user's function: what it was called with."""
    shapes = (f"{key} {jax.tree.map(signature, tree)}" for key, tree in given.items())
    return (
        f"This happened in one call of {name}, on {', '.join(shapes)}: one step, without the time "
        "axis."
    )


def same_shapes(tree: PyTree, other: PyTree) -> bool:
    """Whether two trees have one structure, and their leaves the same shapes."""
    if jax.tree.structure(tree) != jax.tree.structure(other):
        return False
    return jax.tree.all(jax.tree.map(lambda a, b: np.shape(a) == np.shape(b), tree, other))


def _without(leaf: Any, axis: int) -> jax.ShapeDtypeStruct:
    leaf = jax.eval_shape(lambda a: a, leaf)
    return jax.ShapeDtypeStruct(leaf.shape[:axis] + leaf.shape[axis + 1 :], leaf.dtype)


def _fits(step: Step, params: Params, carry: Carry, x: PyTree, num_parts: int) -> bool:
    """Whether the step runs on these shapes, a carry among the first parts of its result."""
    try:
        result = jax.eval_shape(lambda carry, x: step(params, carry, x), carry, x)
    except Exception:  # whatever the user's step raises
        return False
    return isinstance(result, tuple) and any(
        same_shapes(carry, part) for part in result[:num_parts]
    )
