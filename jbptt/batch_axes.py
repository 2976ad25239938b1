"""Which axes hold examples: one step is run on shapes with another number of them.

An axis of examples can be resized in the carry, the inputs and the targets, and the parameters do
not mind. An axis of features cannot: the parameters fix its size.
"""

from collections.abc import Callable
from itertools import count
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbptt import slips
from jbptt.arrays import is_inexact
from jbptt.types import Batch, Carry, Loss, Params, PyTree, Step

Shape = tuple[int, ...]
WHAT_A_LOSS_RETURNS = (
    "a loss returns one number per example, of the batch shape: sum or average over features and "
    "outputs in it, jnp.sum(..., axis=-1), and leave the mean over examples and steps to the "
    "estimate"
)


class OneStep(NamedTuple):
    """One step and its loss on shapes. `loss` may be None."""

    step: Step
    loss: Loss | None
    params: Params
    carry: Carry
    x: PyTree
    target: PyTree

    def resized(self, change: Callable[[Shape], Shape], params_too: bool = False) -> "OneStep":
        """With other shapes of the carry, the inputs and the targets."""

        def change_all(tree):
            return jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(change(a.shape), a.dtype), _shapes(tree)
            )

        params = change_all(self.params) if params_too else self.params
        return self._replace(
            params=params,
            carry=change_all(self.carry),
            x=change_all(self.x),
            target=change_all(self.target),
        )

    def run(self) -> tuple[PyTree, Shape] | None:
        """The shapes of y and of the loss; None if it fails or the carry drifts."""
        try:
            after, y = jax.eval_shape(self.step, self.params, self.carry, self.x)
            if _sizes(after) != _sizes(self.carry):
                return None
            value = () if self.loss is None else jax.eval_shape(self.loss, y, self.target)
        except Exception:  # whatever the user's functions raise at shapes that do not fit
            return None
        return y, getattr(value[0] if isinstance(value, tuple) and value else value, "shape", ())


def first_step(
    step: Step, loss: Loss | None, params: Params, carry: Carry, batch: Batch
) -> OneStep:
    """What is asked of other numbers of examples: one step, on shapes."""
    x, target = jax.eval_shape(
        lambda tree: jax.tree.map(lambda a: a[0], tree), (batch.xs, batch.targets)
    )
    return OneStep(step, loss, params, carry, x, target)


def _shapes(tree: PyTree) -> PyTree:
    return jax.eval_shape(lambda t: t, tree)


def _sizes(tree: PyTree) -> list[Shape]:
    return [np.shape(leaf) for leaf in jax.tree.leaves(tree)]


def _begins(shape: Shape, prefix: Shape) -> bool:
    return shape[: len(prefix)] == prefix


def _new_size(size: int, *trees: PyTree) -> int:
    """A multiple of the size that stands nowhere else, so that hardly anything fits by chance.

    A mesh that divides the axis divides a multiple of it too.
    """
    taken = {n for shape in _sizes(trees) for n in shape}
    return next(n for n in count(2 * size or 1, size or 1) if n not in taken)


def _at_the_end_of(prefix: Shape, new: int) -> Callable[[Shape], Shape]:
    """Resizes the last axis of a leading `prefix` where there is one."""
    return lambda shape: (
        (*prefix[:-1], new, *shape[len(prefix) :]) if _begins(shape, prefix) else shape
    )


def _everywhere(size: int, new: int) -> Callable[[Shape], Shape]:
    return lambda shape: tuple(new if n == size else n for n in shape)


def warn_of_doubts_about_loss(one: OneStep, batch: Batch, batch_shape: Shape) -> None:
    """A warning where what the loss returns looks like anything but one number per example."""
    counted: list[Any] = [array for array in (batch.mask, batch.weights) if array is not None]
    if batch_shape and any(np.shape(array)[1:] == batch_shape for array in counted):
        return  # the user counts along these axes too
    if doubts := doubts_about_loss(one, batch_shape):
        slips.warn_user(doubts)


def doubts_about_loss(one: OneStep, batch_shape: Shape) -> str:
    """Why the loss's axes look like no examples; "" where they look like some.

    Costs nothing where sizes leave no doubt: the first axes of the carry are the loss's, and no
    parameter is as long.
    """
    carries = _sizes(list(filter(is_inexact, jax.tree.leaves(one.carry))))
    pinned = {n for shape in _sizes(one.params) for n in shape}
    for axis, size in enumerate(batch_shape):
        prefix = batch_shape[: axis + 1]
        if any(_begins(shape, prefix) for shape in carries):
            fixed = size > 1 and size in pinned and _fixed_by_params(one, prefix, batch_shape)
            if fixed and not misplaced_examples(one, batch_shape):
                return (
                    f"the loss has shape {batch_shape}, and its axis {axis}, of size {size}, is "
                    f"one that params fix: features, not examples; {WHAT_A_LOSS_RETURNS}"
                )
        elif axis and any(_begins(shape, prefix[:-1]) for shape in carries):
            return (
                f"the loss has shape {batch_shape}, but no leaf of the carry begins with {prefix} "
                f"(they have shapes {carries}): its axis {axis} is one too many; "
                f"{WHAT_A_LOSS_RETURNS}"
            )
    if _pools_examples(one, [shape for shape in carries if shape], batch_shape):
        return (
            f"the loss has shape {batch_shape}, but the carry's first axis (its leaves have shapes "
            f"{carries}) looks like one of examples: the inputs and outputs have it too, and no "
            f"row depends on another; {WHAT_A_LOSS_RETURNS}"
        )
    return ""


def _fixed_by_params(one: OneStep, prefix: Shape, batch_shape: Shape) -> bool:
    """Whether `prefix`'s last axis cannot be resized alone, and its entries depend on each other.

    Where that cannot be tried: whether it can be resized together with all that is as long in the
    parameters.
    """
    size, axis = prefix[-1], len(prefix) - 1
    new = _new_size(size, one.params, one.carry, one.x, one.target)
    for params_too in (False, True):  # models side by side have parameters of their own
        found = one.resized(_at_the_end_of(prefix, new), params_too).run()
        if found and found[1] == (*batch_shape[:axis], new, *batch_shape[axis + 1 :]):
            return False
    if (independent := are_independent(one, prefix)) is not None:
        return not independent
    found = one.resized(_everywhere(size, new), params_too=True).run()
    return found is not None and found[1] == _everywhere(size, new)(batch_shape)


def _pools_examples(one: OneStep, carries: list[Shape], batch_shape: Shape) -> bool:
    """Whether the carry's first axis, which the loss lacks, is one of examples.

    That is: free, and before one of features.
    """
    leading, xs = {shape[0] for shape in carries}, _sizes(one.x)
    if len(leading) != 1 or min(map(len, carries)) < 2 or not xs:
        return False
    size = leading.pop()
    if _begins(batch_shape, (size,)) or not all(_begins(shape, (size,)) for shape in xs):
        return False
    new = _new_size(size, one.params, one.carry, one.x, one.target)
    found = one.resized(_at_the_end_of((size,), new)).run()
    if (
        not found
        or found[1] != batch_shape
        or not all(_begins(shape, (new,)) for shape in _sizes(found[0]))
    ):
        return False
    free = [one.resized(_at_the_end_of(shape[:2], new)).run() for shape in set(carries)]
    return not all(free) and bool(are_independent(one, (size,)))


def drawn(shapes: PyTree) -> PyTree:
    """Random numbers and keys in these shapes; zeros where they are integers or bools."""
    numbers = np.random.default_rng(0)

    def one(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            (key,) = (
                key
                for impl in ("threefry2x32", "rbg", "unsafe_rbg")
                if (key := jax.random.key(0, impl=impl)).dtype == leaf.dtype
            )
            return jax.random.split(key, leaf.shape) if leaf.shape else key
        # In NumPy: of jax.numpy each operation would be a program to compile.
        normal = numbers.normal(size=leaf.shape) if is_inexact(leaf) else np.zeros(leaf.shape)
        return np.asarray(normal, leaf.dtype)

    return jax.tree.map(one, shapes)


def are_independent(one: OneStep, prefix: Shape, inputs_too: bool = False) -> bool | None:
    """Whether what comes out at an index of `prefix`'s last axis needs the carry there alone.

    And, with `inputs_too`, the inputs there. One step is run on random numbers, with NaN at index
    0: a small program. None if that fails, as where the step closes over traced values.
    """
    axis = len(prefix) - 1

    def poisoned(leaf):
        if not is_inexact(leaf) or not _begins(leaf.shape, prefix):
            return leaf
        nan_at_0 = np.array(leaf)
        nan_at_0[(slice(None),) * axis + (0,)] = np.nan
        return nan_at_0

    def rest_is_finite(leaf):
        if not is_inexact(leaf) or not _begins(np.shape(leaf), prefix):
            return True
        return bool(np.isfinite(np.asarray(leaf)[(slice(None),) * axis + (slice(1, None),)]).all())

    try:
        with jax.ensure_compile_time_eval(), jax.debug_nans(False):
            params, carry, x = drawn(_shapes((one.params, one.carry, one.x)))
            carry = jax.tree.map(poisoned, carry)
            x = jax.tree.map(poisoned, x) if inputs_too else x
            results = jax.jit(one.step)(params, carry, x)
            return all(map(rest_is_finite, jax.tree.leaves(results)))
    except Exception:
        return None


def check_examples_come_first(one: OneStep, batch_shape: Shape, why: str) -> None:
    """A ValueError where the carry begins with the batch shape only by chance.

    Its examples are then on another axis.
    """
    if found := misplaced_examples(one, batch_shape):
        raise ValueError(
            f"carry{jax.tree_util.keystr(found.path)} has shape {found.shape}, wanted the batch "
            f"axis first, because {why}, but its axis {found.axis} holds the examples (with "
            "another number of them the step runs only if that axis changes); pass "
            f"jnp.moveaxis(leaf, {found.axis}, 0), and move it back and forth inside the step"
        )


class Misplaced(NamedTuple):
    """A carry leaf, and which of its axes holds the examples."""

    path: Any
    shape: Shape
    axis: int


def misplaced_examples(one: OneStep, batch_shape: Shape) -> Misplaced | None:
    """The carry leaf whose examples are on another axis than the first, though that one is as long.

    Costs nothing where no further axis is as long as the batch.
    """
    if len(batch_shape) != 1:
        return None
    (size,) = batch_shape
    named = [
        (path, np.shape(leaf))
        for path, leaf in jax.tree.leaves_with_path(one.carry)
        if is_inexact(leaf)
    ]
    if not any(size in shape[1:] for _, shape in named):
        return None
    new = _new_size(size, one.params, one.carry, one.x)
    if one.resized(_at_the_end_of(batch_shape, new)).run():
        return None
    for axis in sorted({i for _, shape in named for i, n in enumerate(shape) if i and n == size}):

        def moved(shape, axis=axis):
            if shape[axis : axis + 1] == batch_shape:
                return (*shape[:axis], new, *shape[axis + 1 :])
            return _at_the_end_of(batch_shape, new)(shape)

        carry = one.resized(moved).carry
        if one.resized(_at_the_end_of(batch_shape, new))._replace(carry=carry).run():
            return next(
                Misplaced(path, shape, axis)
                for path, shape in named
                if shape[axis : axis + 1] == batch_shape
            )
    return None
