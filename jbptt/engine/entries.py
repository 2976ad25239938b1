"""Which entries of a program's results depend on which entries of its first argument.

Dependence leaf by leaf (`dependence`) says that a carry depends on itself; entry by entry it says
whether unit i reads unit j. For each variable an array of the variable's shape is kept, whose
entries are the numbers of sets; operations that move numbers move the numbers of their sets. Of a
recurrence few sets are different, so that this is as cheap as a few evaluations of the step.
Nothing runs.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import jax
import numpy as np

from jbptt.engine.primitives import CALLS, ENTRYWISE, FOLDS, SCANS
from jbptt.types import PyTree

Numbers = np.ndarray | None  # of sets, in the variable's shape; None: all empty


class Sets:
    """Sets of entries as bits of integers, each held once; number 0 is the empty one."""

    def __init__(self):
        self.bits = [0]
        self._number = {0: 0}

    def number(self, bits: int) -> int:
        """The number of a set."""
        if bits not in self._number:
            self._number[bits] = len(self.bits)
            self.bits.append(bits)
        return self._number[bits]

    def unions(self, *arrays: np.ndarray) -> np.ndarray:
        """Entry by entry, the numbers of the unions; shapes broadcast."""
        first, *rest = arrays
        for second in rest:
            first, second = np.broadcast_arrays(first, second)
            base = len(self.bits)
            pairs, places = np.unique(first.astype(np.int64) * base + second, return_inverse=True)
            united = [
                self.number(self.bits[pair // base] | self.bits[pair % base])
                for pair in pairs.tolist()
            ]
            first = np.array(united, np.int64)[places].reshape(first.shape)
        return first

    def folded(self, numbers: np.ndarray, axes: Sequence[int]) -> np.ndarray:
        """The union over some axes, which remain with length 1."""
        for axis in axes:
            while (length := numbers.shape[axis]) > 1:
                half = length // 2
                low, high, odd = np.split(numbers, [half, 2 * half], axis)
                united = self.unions(low, high)
                numbers = np.concatenate([united, odd], axis)
            if numbers.shape[axis] == 0:  # a sum over nothing
                numbers = np.zeros_like(numbers, shape=_replaced(numbers.shape, axis, 1))
        return numbers


def _replaced(shape: Sequence[int], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])


def entry_dependence(function: Callable, vector: Any, *others: Any) -> tuple[list[int], PyTree]:
    """For each entry of `function(vector, *others)`, the entries of the vector that it depends on.

    What may be other than zero in the derivative: a choice or an index that depends on the vector
    has none. Sets that are too large are possible, sets that are too small are not: an operation
    that is not known makes all its results depend on all its operands.

    Args:
      function: of arrays.
      vector: one array, or its shape.
      others: trees of arrays or shapes.

    Returns:
      Sets of entries (an integer each, bit j for entry j), and for each leaf of the result an array
      of its shape that numbers the set of each entry.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(vector, *others)
    sets, shape = Sets(), np.shape(vector)
    own = [sets.number(1 << j) for j in range(prod(shape))]
    inputs: list[Numbers] = [None] * len(closed.jaxpr.invars)
    inputs[0] = np.reshape(np.asarray(own, np.int64), shape)
    results = _through_program(sets, closed.jaxpr, inputs)
    leaves, structure = jax.tree.flatten(shapes)
    whole = [
        np.zeros(leaf.shape, np.int64) if numbers is None else numbers
        for numbers, leaf in zip(results, leaves, strict=True)
    ]
    return sets.bits, structure.unflatten(whole)


def _through_program(sets: Sets, jaxpr: Any, inputs: Sequence[Numbers]) -> list[Numbers]:
    """The sets of a program's results, from those of its inputs; constants have none."""
    known: dict[Any, Numbers] = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom):
        return None if hasattr(atom, "val") else known.get(atom)

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        if any(numbers is not None for numbers in operands):
            known.update(zip(equation.outvars, _through(sets, equation, operands), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _through(sets: Sets, equation: Any, operands: list[Numbers]) -> list[Numbers]:
    """The sets of an equation's results; some operand has one."""
    name, params = equation.primitive.name, equation.params
    avals = [atom.aval for atom in equation.invars]
    shapes = [np.shape(variable.aval) for variable in equation.outvars]
    if equation.effects:
        return _all_of_all(sets, operands, shapes)
    if name in CALLS and CALLS[name] in params:
        program = params[CALLS[name]]
        return _through_program(sets, getattr(program, "jaxpr", program), operands)
    if name == "scan":
        return _through_scan(sets, params, operands, avals)
    if name == "cond":
        branches = [_through_program(sets, b.jaxpr, operands[1:]) for b in params["branches"]]
        united = [_united(sets, outputs) for outputs in zip(*branches, strict=True)]
        index = operands[0]
        return united if index is None else _all_of_all(sets, operands, shapes)
    if name == "split":
        ends = np.cumsum(params["sizes"])[:-1]
        return list(np.split(_given(operands[0]), ends, params["axis"]))
    if name == "unstack":
        axis = params["axis"]
        return [part.squeeze(axis) for part in np.split(_given(operands[0]), len(shapes), axis)]
    if name in ENTRYWISE:
        # Operands of no axes are repeated.
        return [np.broadcast_to(_given(_united(sets, operands)), shapes[0])]
    if name in RULES:
        full = [_filled(n, aval) for n, aval in zip(operands, avals, strict=True)]
        try:
            return [RULES[name](sets, params, full, operands, shapes[0])]
        except NotKnown:
            pass
    return _all_of_all(sets, operands, shapes)


class NotKnown(Exception):
    """A use of an operation that its rule does not cover."""


def _given(numbers: Numbers) -> np.ndarray:
    assert numbers is not None
    return numbers


def _united(sets: Sets, operands: Sequence[Numbers]) -> Numbers:
    present = [numbers for numbers in operands if numbers is not None]
    return sets.unions(*present) if present else None


def _filled(numbers: Numbers, aval: Any) -> np.ndarray:
    return np.zeros(np.shape(aval), np.int64) if numbers is None else numbers


def _all_of_all(sets: Sets, operands: Sequence[Numbers], shapes: Sequence) -> list[Numbers]:
    """Everything depends on whatever anything does."""
    bits = 0
    for numbers in operands:
        for number in () if numbers is None else np.unique(numbers):
            bits |= sets.bits[number]
    return [np.full(shape, sets.number(bits), np.int64) for shape in shapes]


def _through_scan(sets: Sets, params: dict, operands: list[Numbers], avals: list) -> list[Numbers]:
    """Of the carry after any number of steps, then of the outputs: of some step each."""
    num_consts, num_carry = params["num_consts"], params["num_carry"]
    consts, carry = operands[:num_consts], operands[num_consts : num_consts + num_carry]
    xs = [
        None if numbers is None else sets.folded(numbers, [0])[0]
        for numbers in operands[num_consts + num_carry :]
    ]
    shapes = [np.shape(aval) for aval in avals[num_consts : num_consts + num_carry]]
    while True:
        results = _through_program(sets, params["jaxpr"].jaxpr, [*consts, *carry, *xs])
        grown = [_united(sets, pair) for pair in zip(carry, results[:num_carry], strict=True)]
        if all(
            np.array_equal(np.zeros(shape) if a is None else a, np.zeros(shape) if b is None else b)
            for a, b, shape in zip(carry, grown, shapes, strict=True)
        ):
            break
        carry = grown
    length = params["length"]
    ys = [
        None if numbers is None else np.broadcast_to(numbers, (length, *numbers.shape))
        for numbers in results[num_carry:]
    ]
    return [*carry, *ys]


# Each takes (sets, params, operands filled with empty sets, operands as they are, shape of the
# result), and gives the numbers of the result's sets.


def _broadcast(sets, params, full, _, shape):
    ones = [1] * len(shape)
    for size, axis in zip(full[0].shape, params["broadcast_dimensions"], strict=True):
        ones[axis] = size
    return np.broadcast_to(full[0].reshape(ones), shape)


def _slice(sets, params, full, _, shape):
    strides = params["strides"] or [1] * len(shape)
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return full[0][tuple(slice(*bound) for bound in bounds)]


def _pad(sets, params, full, operands, shape):
    if operands[1] is not None:  # what is filled in depends on something
        raise NotKnown
    padded = np.zeros(shape, np.int64)
    places = []
    for size, wanted, (low, _, interior) in zip(
        full[0].shape, shape, params["padding_config"], strict=True
    ):
        at = low + (interior + 1) * np.arange(size)
        inside = (at >= 0) & (at < wanted)  # negative padding cuts off
        places.append((np.flatnonzero(inside), at[inside]))
    sources, targets = ([place[k] for place in places] for k in (0, 1))
    padded[np.ix_(*targets)] = full[0][np.ix_(*sources)]
    return padded


def _select(sets, params, full, operands, shape):
    return np.broadcast_to(sets.unions(*full[1:]), shape)


def _fold(sets, params, full, _, shape):
    return sets.folded(full[0], params["axes"]).reshape(shape)


def _scan_along(sets, params, full, _, shape):
    return np.broadcast_to(sets.folded(full[0], [params["axis"]]), shape)


def _product(sets, params, full, operands, shape):
    contracted, batched = params["dimension_numbers"]
    sides = []
    for side, (numbers, sums, shared) in enumerate(zip(full, contracted, batched, strict=True)):
        folded = sets.folded(numbers, sums)
        free = [axis for axis in range(numbers.ndim) if axis not in (*sums, *shared)]
        ordered = folded.transpose([*shared, *free, *sums])[(..., *[0] * len(sums))]
        num_shared, num_free = len(shared), len(free)
        others = len(shape) - num_shared - num_free
        axes = ordered.shape
        # The result has the shared axes, then the free ones of the left side, then of the right.
        ones = (1,) * others
        middle = axes[num_shared:]
        spread = (*middle, *ones) if side == 0 else (*ones, *middle)
        sides.append(ordered.reshape(*axes[:num_shared], *spread))
    return np.broadcast_to(sets.unions(*sides), shape)


def _whole_axes(numbers, sizes):
    """The axes along which a slice of these sizes is whole."""
    return [axis for axis, size in enumerate(sizes) if size == numbers.shape[axis]]


def _from_anywhere(sets, numbers, sizes):
    """A slice of these sizes from a place that is not known."""
    cut = [axis for axis in range(numbers.ndim) if axis not in _whole_axes(numbers, sizes)]
    return np.broadcast_to(sets.folded(numbers, cut), sizes)


def _dynamic_slice(sets, params, full, operands, shape):
    return _from_anywhere(sets, full[0], params["slice_sizes"])


def _dynamic_update_slice(sets, params, full, operands, shape):
    kept, new = full[:2]
    somewhere = [axis for axis in range(new.ndim) if axis not in _whole_axes(kept, new.shape)]
    return sets.unions(kept, np.broadcast_to(sets.folded(new, somewhere), shape))


def _gather(sets, params, full, operands, shape):
    numbers = params["dimension_numbers"]
    if getattr(numbers, "operand_batching_dims", ()):
        raise NotKnown
    sizes = params["slice_sizes"]
    one = _from_anywhere(sets, full[0], sizes).squeeze(tuple(numbers.collapsed_slice_dims))
    ones = [1] * len(shape)
    for size, axis in zip(one.shape, numbers.offset_dims, strict=True):
        ones[axis] = size
    return np.broadcast_to(one.reshape(ones), shape)


def _scatter_add(sets, params, full, operands, shape):
    numbers, kept, updates = params["dimension_numbers"], full[0], full[2]
    if getattr(numbers, "operand_batching_dims", ()):
        raise NotKnown
    windows = tuple(numbers.update_window_dims)
    others = [axis for axis in range(updates.ndim) if axis not in windows]
    one = sets.folded(updates, others).squeeze(tuple(others))
    sizes = list(one.shape)
    for axis in sorted(numbers.inserted_window_dims):
        sizes.insert(axis, 1)
    one = one.reshape(sizes)
    somewhere = [axis for axis in range(len(shape)) if axis not in _whole_axes(kept, sizes)]
    return sets.unions(kept, np.broadcast_to(sets.folded(one, somewhere), shape))


RULES: dict[str, Callable] = {
    "reshape": lambda sets, params, full, _, shape: full[0].reshape(shape),
    "squeeze": lambda sets, params, full, _, shape: full[0].reshape(shape),
    "expand_dims": lambda sets, params, full, _, shape: full[0].reshape(shape),
    "transpose": lambda sets, params, full, _, shape: full[0].transpose(params["permutation"]),
    "rev": lambda sets, params, full, _, shape: np.flip(full[0], params["dimensions"]),
    "stack": lambda sets, params, full, _, shape: np.stack(full, params["axis"]),
    "concatenate": lambda sets, params, full, _, shape: np.concatenate(full, params["dimension"]),
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "pad": _pad,
    "select_n": _select,
    "dot_general": _product,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "scatter-add": _scatter_add,
    "scatter_add": _scatter_add,
    **dict.fromkeys(FOLDS, _fold),
    **dict.fromkeys(SCANS, _scan_along),
}
