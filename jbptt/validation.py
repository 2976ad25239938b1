"""Most checks of the border: on shapes where that is enough, before anything is compiled.

Values are read of static numbers (a window, a probability); traced ones are trusted.
"""

import math
import numbers
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import keystr, tree_flatten_with_path

from jbptt import batch_axes, slips
from jbptt.arrays import is_inexact
from jbptt.batch_axes import OneStep
from jbptt.slips import signature
from jbptt.starts import start_shapes
from jbptt.types import Batch


def check_positive_integer(name: str, value: Any, smallest: int = 1) -> int:
    """`value` as an int; a ValueError unless it is a static integer ≥ `smallest`."""
    if isinstance(value, Tracer):
        raise ValueError(
            f"{name} must be a static integer, got a traced value; close over it, or use gates "
            "(gated_bptt, unroll(gates=...)), which may be data"
        )
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(
            f"{name} must be an integer >= {smallest}, got {value!r}; pass a whole number of steps"
        ) from None
    if number < smallest:
        raise ValueError(
            f"{name} must be an integer >= {smallest}, got {number}; pass at least {smallest}"
        )
    return number


def check_window(window: Any, stride: Any) -> tuple[int, int]:
    """Window and stride as ints with 1 ≤ stride ≤ window; stride None means blocks."""
    window = check_positive_integer("window", window)
    stride = window if stride is None else check_positive_integer("stride", stride)
    if stride > window:
        raise ValueError(
            f"stride must be <= window, got stride={stride} and window={window}; losses between "
            "two windows would never flow back: swap the two, or enlarge window"
        )
    return window, stride


def check_probability(name: str, value: Any) -> None:
    """A ValueError unless every entry lies in (0, 1]; traced values are trusted."""
    if isinstance(value, Tracer):
        return
    try:
        entries = np.asarray(value).astype(float)
    except (TypeError, ValueError):
        entries = np.array(np.nan)
    if isinstance(value, str) or not np.all((entries > 0) & (entries <= 1)):
        raise ValueError(
            f"{name} must lie in (0, 1], got {value!r}; a gate that never opens "
            "cannot be reweighted (for a hard cut use truncation.fixed)"
        )


def check_above(name: str, value: Any, bound: float, why: str) -> None:
    """A ValueError unless `value` is a finite number > `bound`; traced values are trusted."""
    if isinstance(value, Tracer):
        return
    number = isinstance(value, (numbers.Real, np.ndarray, jax.Array)) and not isinstance(
        value, bool
    )
    if not number or getattr(value, "ndim", 0) or not (bound < float(value) < math.inf):
        raise ValueError(f"{name} must be a finite number > {bound:g}, got {value!r}; {why}")


def check_between(name: str, value: Any, low: float, high: float, why: str) -> None:
    """A ValueError unless `low < value < high`; static numbers only."""
    check_above(name, value, low, why)
    if not float(value) < high:
        raise ValueError(f"{name} must lie in ({low:g}, {high:g}), got {value!r}; {why}")


def check_mean_length(value: Any) -> None:
    """A ValueError unless windows of this mean length, in steps, are longer than one step."""
    check_above("mean_length", value, 1, "with 1 the gradient would be cut at every step")


def check_seed(seed: Any) -> int:
    """`seed` as an int in [0, 2³²): `jax.random.key` silently wraps larger ones."""
    try:
        number = operator.index(seed)
    except TypeError:
        raise ValueError(f"seed must be an integer in [0, 2**32), got {seed!r}") from None
    if not 0 <= number < 2**32:
        raise ValueError(
            f"seed must be an integer in [0, 2**32), got {number}; jax.random would wrap it "
            "silently"
        )
    return number


def count_steps(trees: dict[str, Any], length: Any = None) -> int:
    """T, on which the leading axis of every leaf of every named tree must agree."""
    found = (
        {"length": check_positive_integer("length", length, smallest=0)}
        if length is not None
        else {}
    )
    for name, tree in trees.items():
        slips.check_arrays(name, tree)
        for path, leaf in tree_flatten_with_path(tree)[0]:
            shape = np.shape(leaf)
            if not shape:
                raise ValueError(
                    f"{name}{keystr(path)} is a scalar, wanted a leading time axis [T, ...]; stack "
                    "it over time, and pass arrays, not lists"
                )
            found[name + keystr(path)] = shape[0]
    if not found:
        raise ValueError(
            "the number of steps is unknown: no leaf has a time axis; pass xs (a Batch may give "
            "targets, mask or weights [T] instead, unroll length=)"
        )
    if len(set(found.values())) > 1:
        sizes = ", ".join(f"{name}: {size}" for name, size in found.items())
        raise ValueError(
            f"leaves disagree on T, the leading (time) axis: {sizes}; put time first and cut to "
            "one T"
        )
    num_steps = next(iter(found.values()))
    if num_steps < 1:
        raise ValueError(
            f"T must be >= 1, got {num_steps} steps in {next(iter(found))}; pass at least one step"
        )
    return num_steps


def check_params(params: Any) -> None:
    """A ValueError unless every leaf of params can be differentiated."""
    leaves = tree_flatten_with_path(params)[0]
    for path, leaf in leaves:
        is_array = isinstance(
            leaf, (numbers.Number, np.ndarray, np.generic, jax.Array, jax.ShapeDtypeStruct)
        )
        kind = jax.dtypes.result_type(leaf) if is_array else type(leaf).__name__
        if not is_array or not jnp.issubdtype(kind, jnp.inexact):
            raise ValueError(
                f"params{keystr(path)} is {kind}, wanted a floating-point array; cast it, or close "
                "over it in the step if it is not trained"
            )


def check_step(step: Any, params: Any, carry: Any, xs: Any) -> Any:
    """Runs the step on shapes; returns y's. A ValueError names the carry leaf that drifts."""
    carry = start_shapes(carry, params)
    slips.check_arrays("carry", carry)
    x_first = jax.tree.map(lambda leaf: jax.eval_shape(lambda a: a[0], leaf), xs)
    try:
        result = jax.eval_shape(lambda c, x: step(params, c, x), carry, x_first)
    except Exception as error:
        if slip := slips.batch_first(step, params, carry, xs) or slips.input_first(
            step, params, carry, x_first
        ):
            raise ValueError(slip) from error
        error.add_note(slips.where_it_failed("step(params, carry, x)", carry=carry, x=x_first))
        raise
    if not (isinstance(result, tuple) and len(result) == 2):
        raise ValueError(
            f"step must return (carry, y), got {type(result).__name__}; wanted step(params, carry, "
            "x) -> (carry, y)"
        )
    new_carry, y = result
    if drift := _drift(carry, new_carry):
        slip = (
            ""
            if slips.same_shapes(carry, new_carry)
            else slips.batch_first(step, params, carry, xs)
        )
        raise ValueError(slip or drift)
    return y


def _drift(carry: Any, new_carry: Any) -> str:
    """How a step changes the structure, a shape or a dtype of the carry; "" if it does not."""
    before, after = tree_flatten_with_path(carry), tree_flatten_with_path(new_carry)
    if before[1] != after[1]:
        return (
            f"step changes the structure of the carry: it received {before[1]} and returned "
            f"{after[1]}; return a carry of the structure that it was given"
        )
    for (path, old), (_, new) in zip(before[0], after[0], strict=True):
        if signature(old) != signature(new):
            return (
                f"step changes carry{keystr(path)} from {signature(old)} to {signature(new)}; "
                "shape and dtype must stay: build the initial carry with the step's shape and "
                "dtype, or cast inside the step"
            )
    return ""


def check_carry_batch(
    carry: Any,
    batch_shape: tuple[int, ...],
    why: str,
    name: str = "carry",
    one: OneStep | None = None,
) -> None:
    """Every inexact carry leaf must begin with the batch shape, and (with `one`) not by chance."""
    for path, leaf in tree_flatten_with_path(carry)[0]:
        inexact = jnp.issubdtype(jax.dtypes.result_type(leaf), jnp.inexact)
        if inexact and np.shape(leaf)[: len(batch_shape)] != batch_shape:
            raise ValueError(
                f"{name}{keystr(path)} has shape {np.shape(leaf)}, wanted it to begin with the "
                f"batch shape {batch_shape}, because {why}; give every example a carry of its own, "
                "the batch axis first (jnp.moveaxis where it is another)"
            )
    if one:
        batch_axes.check_examples_come_first(one, batch_shape, why)


def check_num_leading(num_leading: Any, tree: Any) -> int:
    """`num_leading` as an int; all inexact leaves must share that many leading axes."""
    num_leading = check_positive_integer("num_leading", num_leading, smallest=0)
    for path, leaf in tree_flatten_with_path(tree)[0]:
        if is_inexact(leaf) and np.ndim(leaf) < num_leading:
            raise ValueError(
                f"num_leading must be at most the number of axes of every leaf, got {num_leading} "
                f"for tree{keystr(path)} of shape {np.shape(leaf)}; count the batch axes that all "
                "leaves begin with"
            )
    for leaf in filter(is_inexact, jax.tree.leaves(tree)):
        check_carry_batch(
            tree, np.shape(leaf)[:num_leading], f"num_leading is {num_leading}", "tree"
        )
    return num_leading


def check_gates_and_mask(gates: Any, mask: Any, carry: Any, one: OneStep | None = None) -> None:
    """Gates are bool or real, masks bool; further axes match the carry's leading ones."""
    if mask is not None:
        if jax.dtypes.result_type(mask) != jnp.bool_:
            raise ValueError(
                f"mask must be bool, got {jax.dtypes.result_type(mask)}; pass mask.astype(bool), "
                "or use weights"
            )
        check_carry_batch(carry, np.shape(mask)[1:], "the mask is per example", one=one)
    if gates is not None:
        if jnp.issubdtype(jax.dtypes.result_type(gates), jnp.complexfloating):
            raise ValueError(f"gates must be bool or real, got {jax.dtypes.result_type(gates)}")
        check_carry_batch(carry, np.shape(gates)[1:], "the gates are per example", one=one)


def check_gates(
    gates: Any, num_steps: int, batch_shape: tuple[int, ...], carry: Any, one: OneStep | None = None
) -> None:
    """Gates are an array `[T]` or `[T, *batch]`, bool or real."""
    if isinstance(gates, (list, tuple)):
        raise ValueError(
            f"gates must be an array, got a {type(gates).__name__}; pass jnp.asarray(gates)"
        )
    if np.shape(gates) not in ((num_steps,), (num_steps, *batch_shape)):
        raise ValueError(
            f"gates disagree on T or the batch: got {np.shape(gates)}, wanted [T] or [T, *batch] = "
            f"{(num_steps, *batch_shape)} (T = {num_steps}, the leading time axis of the batch); "
            "return an array of that shape"
        )
    check_gates_and_mask(gates, None, carry, one)


def check_history(history: Any, batch: Batch, batch_shape: tuple[int, ...]) -> None:
    """A ValueError unless a stream's earlier steps have the shapes of the next batch."""
    kept = {"xs": history.xs, "mask": history.mask}
    for name, tree in {
        "xs": batch.xs,
        "mask": jax.ShapeDtypeStruct((1, *batch_shape), bool),
    }.items():
        past, now = tree_flatten_with_path(kept[name])[0], jax.tree.leaves(tree)
        if len(past) != len(now) or any(
            np.shape(a)[1:] != np.shape(b)[1:] for (_, a), b in zip(past, now, strict=True)
        ):
            raise ValueError(
                f"the state's history does not fit the batch: its {name} have shapes "
                f"{[np.shape(a)[1:] for _, a in past]} behind T, the batch's "
                f"{[np.shape(b)[1:] for b in now]}; initialise a new state for batches of another "
                "shape"
            )


def check_loss(loss: Any, y: Any, targets: Any) -> tuple[tuple[int, ...], Any]:
    """Runs the loss on shapes; returns the batch shape and the aux's shapes (None without aux)."""
    target = jax.tree.map(lambda leaf: jax.eval_shape(lambda a: a[0], leaf), targets)
    try:
        result = jax.eval_shape(loss, y, target)
    except Exception as error:
        error.add_note(slips.where_it_failed("loss(y, target)", y=y, target=target))
        raise
    value, aux = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(value, jax.ShapeDtypeStruct) or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            "loss must return a real floating array (one number per example), or that and aux, "
            f"got {result}"
        )
    for path, leaf in tree_flatten_with_path(aux)[0]:
        if leaf.shape[: len(value.shape)] != value.shape:
            raise ValueError(
                f"the loss's aux{keystr(path)} has shape {leaf.shape}, wanted it to begin with the "
                f"batch shape {value.shape} (one entry per example, like the loss); leave the mean "
                "over examples to the estimate"
            )
    return value.shape, aux


class Sizes(NamedTuple):
    """What the shapes of a problem say: T, the batch shape, and one step on shapes."""

    num_steps: int
    batch_shape: tuple[int, ...]
    one: OneStep


def check_shapes(
    step: Any, loss: Any, params: Any, carry: Any, batch: Batch, gates: Any = None
) -> Sizes:
    """All that the shapes of a problem must hold, whatever is asked of it."""
    if not isinstance(batch, Batch):
        raise ValueError(
            f"batch must be a jbptt.Batch, got {type(batch).__name__}; write Batch(xs, targets)"
        )
    num_steps = count_steps(batch._asdict())
    check_params(params)
    carry = start_shapes(carry, params)
    slips.warn_of_float64({"params": params, "carry": carry, "batch": batch})
    y = check_step(step, params, carry, batch.xs)
    batch_shape, _ = check_loss(loss, y, batch.targets)
    if 0 in batch_shape:
        raise ValueError(
            f"batch has no examples: the loss has shape {batch_shape}; pass at least one example"
        )
    for name, array in {"mask": batch.mask, "weights": batch.weights}.items():
        if array is not None and np.shape(array)[1:] not in ((), batch_shape):
            raise ValueError(
                f"{name} has shape {np.shape(array)}, wanted [T] or [T, *batch] = "
                f"{(num_steps, *batch_shape)}: the loss's shape is the batch shape, and the axes "
                "are aligned from the left"
            )
    if batch.weights is not None and jnp.issubdtype(
        jax.dtypes.result_type(batch.weights), jnp.complexfloating
    ):
        raise ValueError(f"weights must be real, got {jax.dtypes.result_type(batch.weights)}")
    slips.warn_of_cancelling_weights(batch.weights, batch.mask)
    one = batch_axes.first_step(step, loss, params, carry, batch)
    check_gates_and_mask(None, batch.mask, carry, one)
    if gates is not None:
        check_gates(gates, num_steps, batch_shape, carry, one)
    batch_axes.warn_of_doubts_about_loss(one, batch, batch_shape)
    return Sizes(num_steps, batch_shape, one)
