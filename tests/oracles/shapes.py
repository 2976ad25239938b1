"""Shapes that hypothesis draws, and the numbers that NumPy draws for each: what the generated tests run on.

A `Shape` decides a program (cell, lengths, masks, truncation, split, structure, dtype, how it is run); `Values`
are many draws of numbers for it, float64 arrays whose entries the shape's dtype can hold.
"""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

INPUT, HIDDEN = 2, 3
NUM_BLOCKS = {"linear": 1, "tanh": 1, "gru": 3, "lstm": 4}
MASKS = ["none", "by step", "prefix", "suffix", "lengths", "interior", "stretch", "row", "nothing"]
WEIGHTS = ["none", "by step", "per example", "zero"]
KINDS = ["full", "windows", "gates", "gates per example"]
STRUCTURES = ["plain", "nested", "apart"]
TRANSFORMS = ["jit of vmap", "jit", "vmap", "eager"]
BATCH_SHAPES = [(), (1,), (3,), (2, 2)]
PRIMES = [2, 3, 5, 7, 11, 13]


class Shape(NamedTuple):
    """Everything that decides a program; the values are drawn besides."""

    cell: str
    num_steps: int
    batch_shape: tuple[int, ...]
    mask: str
    weights: str
    kind: str
    window: int
    stride: int
    split: tuple[int, ...]
    structure: str
    transform: str = "jit of vmap"
    dtype: str = "float64"


@st.composite
def shapes(draw, *, dtypes=("float64",), batch_shapes=BATCH_SHAPES, transforms=TRANSFORMS) -> Shape:
    """T is 1, 2, a prime, beside the window or some windows long; one program in five is not jit of vmap."""
    dtype, window = draw(st.sampled_from(dtypes)), draw(st.integers(1, 5))
    lengths = [1, 2, max(1, window - 1), window, window + 1, 3 * window + 2, *PRIMES]
    num_steps = draw(st.sampled_from([t for t in lengths if t <= 5 or dtype in ("float64", "float32")]))
    kind, stride = draw(st.sampled_from([*KINDS, "windows"])), draw(st.integers(1, window))
    split, left = [], num_steps
    while kind == "windows" and left > 1 and len(split) < 2:
        split.append(draw(st.integers(1, left)))
        left -= split[-1]
    return Shape(
        cell=draw(st.sampled_from(list(NUM_BLOCKS))),
        num_steps=num_steps,
        batch_shape=draw(st.sampled_from(batch_shapes)),
        mask=draw(st.sampled_from(MASKS)),
        weights=draw(st.sampled_from(WEIGHTS)),
        kind=kind,
        window=window if kind == "windows" else 1,
        stride=stride if kind == "windows" else 1,
        split=(*split, left) if left else tuple(split),
        structure=draw(st.sampled_from(STRUCTURES)),
        transform=draw(st.sampled_from([*transforms[:1] * 10, *transforms])),
        dtype=dtype,
    )


# What must be among the shapes that a run has seen: the name, and which shapes are such.
OCCASIONS = {
    **{f"T = {t}": lambda s, t=t: s.num_steps == t for t in (1, 2)},
    "T = window - 1": lambda s: s.kind == "windows" and s.num_steps == s.window - 1,
    "T = window": lambda s: s.kind == "windows" and s.num_steps == s.window > 1,
    "T = window + 1": lambda s: s.kind == "windows" and s.num_steps == s.window + 1,
    "T prime, windows leave a rest": lambda s: s.kind == "windows" and s.num_steps in PRIMES and s.num_steps > s.window,
    "blocks": lambda s: s.kind == "windows" and s.stride == s.window > 1,
    "sliding": lambda s: s.kind == "windows" and s.stride == 1 < s.window,
    "strides between": lambda s: s.kind == "windows" and 1 < s.stride < s.window,
    "several updates": lambda s: len(s.split) > 1,
    "a mask and weights per example in a batch of two axes": lambda s: (
        len(s.batch_shape) == 2 and s.mask in ("lengths", "interior", "row") and s.weights == "per example"
    ),
    **{f"mask: {name}": lambda s, name=name: s.mask == name and s.num_steps > 1 for name in MASKS},
    "mask: an example that is all padding": lambda s: s.mask == "row" and s.batch_shape not in ((), (1,)),
    **{f"cell: {name}": lambda s, name=name: s.cell == name for name in NUM_BLOCKS},
    **{f"weights: {name}": lambda s, name=name: s.weights == name for name in WEIGHTS},
    **{f"kind: {name}": lambda s, name=name: s.kind == name for name in KINDS},
    **{f"batch: {shape}": lambda s, shape=shape: s.batch_shape == shape for shape in BATCH_SHAPES},
    **{f"structure: {name}": lambda s, name=name: s.structure == name for name in STRUCTURES},
    **{f"run by: {name}": lambda s, name=name: s.transform == name for name in TRANSFORMS},
}


def missing(seen) -> list[str]:
    """The occasions that did not occur."""
    return [name for name, occurs in OCCASIONS.items() if not any(map(occurs, seen))]


class Values(NamedTuple):
    """Draws of numbers, leading axis first."""

    params: Any
    carry: Any
    xs: Any
    targets: Any
    mask: Any
    weights: Any
    gates: Any


def rounded(array, dtype: str):
    """The nearest numbers that the dtype can hold, as float64."""
    return np.asarray(array).astype(getattr(ml_dtypes, dtype, dtype)).astype(float)


def draw_mask(kind: str, rng, num_draws: int, steps: int, batch):
    """`[draws, T, *batch]`, False is padding."""
    ones = (1,) * len(batch)
    full, time = (num_draws, steps, *batch), np.arange(steps).reshape(1, -1, *ones)
    interior = rng.random(full) < 0.6
    row = rng.random((num_draws, 1, *batch))
    lengths = rng.integers(0, steps + 1, size=(num_draws, 1, *batch))
    start, length = rng.integers(0, steps, size=(2, num_draws, 1, *ones))
    mask = {
        "none": True,
        "by step": rng.random((num_draws, steps, *ones)) < 0.7,
        "prefix": time >= steps // 2,
        "suffix": time < (steps + 1) // 2,
        "lengths": time < lengths,
        "interior": interior,
        "stretch": (time < start) | (time > start + length // 2),  # steps in a row, for all examples
        "row": interior & (row > row.min(axis=tuple(range(2, len(full))), keepdims=True)),  # one example has nothing
        "nothing": False,
    }[kind]
    return np.broadcast_to(mask, full)


def draw_values(shape: Shape, seed: int, num_draws: int, scale: float = 0.7) -> Values:
    """Normal numbers, parameters and carry of standard deviation `scale`."""
    rng, batch = np.random.default_rng(seed), shape.batch_shape
    width = NUM_BLOCKS[shape.cell] * HIDDEN
    normal = lambda *size, scale=1.0: rounded(scale * rng.normal(size=(num_draws, *size)), shape.dtype)
    params = {"w_x": normal(INPUT, width, scale=scale), "w_h": normal(HIDDEN, width, scale=scale)}
    for bias in ("b", "b_h") if shape.cell == "gru" else ("b",):
        params[bias] = normal(width, scale=scale)
    carry = normal(*batch, HIDDEN, scale=scale)
    if shape.cell == "lstm":
        carry = carry, normal(*batch, HIDDEN, scale=scale)
    full = (num_draws, shape.num_steps, *batch)
    mask = draw_mask(shape.mask, rng, *full[:2], batch)
    weights = {
        "none": lambda: np.ones(full),
        "by step": lambda: np.broadcast_to(normal(shape.num_steps, *(1 for _ in batch)), full),
        "per example": lambda: normal(*full[1:]),
        "zero": lambda: np.zeros(full),
    }[shape.weights]()
    gates = rng.choice([0.0, 1.0, 1.0, 2.0, -0.5], size=full if shape.kind == "gates per example" else full[:2])
    return Values(params, carry, normal(*full[1:], INPUT), normal(*full[1:], HIDDEN), mask, weights, gates)


def one_draw(values: Values, draw: int) -> Values:
    """A single draw, without the leading axis."""
    take = lambda tree: (
        {key: a[draw] for key, a in tree.items()}
        if isinstance(tree, dict)
        else tuple(a[draw] for a in tree)
        if isinstance(tree, tuple)
        else tree[draw]
    )
    return Values(*map(take, values))


def windows_of(num_steps: int, window: int, stride: int):
    """For every chunk of `stride` losses: the steps whose losses it holds, and the step before which it is cut."""
    for first in range(0, num_steps, stride):
        yield range(first, min(first + stride, num_steps)), max(0, first + stride - window)


def runs_of(shape: Shape, gates):
    """The passes that make up one draw's gradient: gates `[T]` or `[T, *batch]`, and which losses count, `[T]`."""
    steps = np.arange(shape.num_steps)
    if shape.kind == "full":
        return [(np.ones(shape.num_steps), steps >= 0)]
    if shape.kind == "windows":
        chunks = windows_of(shape.num_steps, shape.window, shape.stride)
        return [(np.where((steps == cut) & (cut > 0), 0.0, 1.0), np.isin(steps, losses)) for losses, cut in chunks]
    return [(gates, steps >= 0)]


def coverage_of(shape: Shape, gates):
    """`[T, T, *batch]` of one draw, by definition: the product of the gates between, in the pass of that loss."""
    matrix = np.zeros((shape.num_steps, shape.num_steps, *shape.batch_shape))
    for run_gates, counted in runs_of(shape, gates):
        for t in np.flatnonzero(counted):
            for i in range(t + 1):
                between = np.prod(run_gates[i + 1 : t + 1], axis=0)
                matrix[t, i] = np.reshape(between, np.shape(between) or (1,) * len(shape.batch_shape))
    return matrix
