"""Where the influence of the parameters on the carry is kept: only what is not zero by structure.

The influence of a parameter leaf is kept as `[outer, base, inner, S]`: the leaf is `[outer, base,
inner]`, of which `base` alone decides which S entries of the carry its numbers reach. Of a weight
`[input, H]` whose column j feeds unit j alone that is `[input, H, 1, 1]`, and of one whose numbers
reach all of n entries `[1, 1, input · H, n]`: no indices are looked up while it is computed.
"""

from dataclasses import dataclass
from math import isqrt

import numpy as np

from jbptt.online.structure import InfluenceStructure


@dataclass(frozen=True)
class Block:
    """The influence of one real leaf of the parameters.

    Attributes:
      leaf: the leaf's shape.
      shape: `(outer, base, inner)`, whose product is the leaf's size.
      rows: `[base, S]`, the entries of the carry; n where there is none.
      entered: `(outer, base, inner)` again, of which base decides what the leaf enters in one step.
      entered_rows: `rows` of that base; n where a number does not enter in one step.
    """

    leaf: tuple[int, ...]
    shape: tuple[int, int, int]
    rows: np.ndarray
    entered: tuple[int, int, int]
    entered_rows: np.ndarray

    @property
    def num_rows(self) -> int:
        """S."""
        return self.rows.shape[1]

    @property
    def kept(self) -> tuple[int, int, int, int]:
        """The shape of its influence."""
        return *self.shape, self.num_rows


@dataclass(frozen=True)
class Layout:
    """What is kept, and how derivatives of a step are asked for.

    A colour is a set of emitted entries that one way back asks for together, since no two of them
    read the same.

    Attributes:
      size: n.
      params: a block for each real leaf of the parameters; None where it reaches nothing.
      carry: that of the carry that entered the update.
      reads: bool `[n + 1, n + 1]`, whether emitted entry i reads entry j; the last of both is none.
      carry_colours: the colour of each emitted entry, for derivatives in the carry; -1 for entries
        that are not asked for.
      param_colours: the same for derivatives in the parameters.
    """

    size: int
    params: list[Block | None]
    carry: Block
    reads: np.ndarray
    carry_colours: np.ndarray
    param_colours: np.ndarray


def layout_of(structure: InfluenceStructure, order: int | None, jacobian: bool = True) -> Layout:
    """Of influences that are kept where they are not zero after `order` steps; None: exact.

    `jacobian` False: J is not asked for.
    """
    sets, params, carry = structure.after(order)
    members = [_members(bits) for bits in sets]
    direct = [_members(bits) for bits in structure.sets]
    nothing = np.zeros(0, np.int64)
    blocks = [
        _block(reached, members, entered, direct, structure.size)
        for reached, entered in zip(params, structure.params, strict=True)
    ]
    own = _block(carry, members, np.zeros_like(carry), [nothing], structure.size)
    assert own is not None  # an entry reaches itself, and no entries have a block of none
    reads = np.zeros((structure.size + 1, structure.size + 1), bool)
    for j, number in enumerate(structure.carry):
        reads[direct[number], j] = True
    asked = np.zeros_like(reads)
    for block in [*blocks, own]:
        if block is not None and jacobian:
            asked[block.rows[:, :, None], block.rows[:, None, :]] = True
    asked &= reads
    entered = sorted({number for leaf in structure.params for number in np.unique(leaf)})
    return Layout(
        structure.size,
        blocks,
        own,
        reads,
        _colours(reads[:-1, :-1], asked[:-1, :-1]),
        _colours_of_sets(structure.size, [direct[number] for number in entered]),
    )


def _members(bits: int) -> np.ndarray:
    """The entries of a set, ascending."""
    packed = np.frombuffer(bits.to_bytes(bits.bit_length() // 8 + 1, "little"), np.uint8)
    return np.flatnonzero(np.unpackbits(packed, bitorder="little"))


def _block(
    reached: np.ndarray,
    members: list[np.ndarray],
    entered: np.ndarray,
    direct: list[np.ndarray],
    size: int,
) -> Block | None:
    """The block of a leaf, from the sets that its numbers reach, and enter in one step."""
    width = max((len(members[number]) for number in np.unique(reached)), default=0)
    if width == 0 and reached.size:
        return None

    def rows_of(number: int) -> np.ndarray:
        return np.append(members[number], np.full(width - len(members[number]), size))

    def entered_rows_of(number: int, at_once: int) -> np.ndarray:
        rows = rows_of(number)
        return np.where(np.isin(rows, direct[at_once]), rows, size)

    shape, base = _periodic(reached.ravel())
    both = reached.ravel() * len(direct) + entered.ravel()
    entered_shape, pairs = _periodic(both)
    return Block(
        reached.shape,
        shape,
        _stacked([rows_of(number) for number in base], width),
        entered_shape,
        _stacked([entered_rows_of(*divmod(pair, len(direct))) for pair in pairs], width),
    )


def _stacked(rows: list[np.ndarray], width: int) -> np.ndarray:
    return np.array(rows, np.int64).reshape(len(rows), width)


def _periodic(kinds: np.ndarray) -> tuple[tuple[int, int, int], np.ndarray]:
    """The shape `(outer, base, inner)` with the smallest base that alone decides; and that base."""
    inner = _largest(kinds, lambda n: kinds.reshape(-1, n), lambda a: a[:, :1])
    runs = kinds[::inner]
    outer = _largest(runs, lambda n: runs.reshape(n, -1), lambda a: a[:1])
    base = runs[: len(runs) // outer]
    return (outer, len(base), inner), base


def _largest(values: np.ndarray, shaped, first) -> int:
    """The largest divisor n of the length for which `shaped(n)` repeats what is `first` in it."""
    length = len(values)
    small = [n for n in range(1, isqrt(length) + 1) if length % n == 0]
    for n in sorted({*small, *(length // n for n in small)}, reverse=True):
        array = shaped(n)
        if np.array_equal(array, np.broadcast_to(first(array), array.shape)):
            return n
    return 1


def _colours(reads: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Colours of the rows that are asked for: none of two alike reads what is asked of the other.

    The first colour that is free, row by row.
    """
    colours = np.full(len(reads), -1)
    taken: list[tuple[int, int]] = []  # of each colour, what its rows read and what is asked
    for row, (own_reads, own_asked) in enumerate(zip(_bits(reads), _bits(asked), strict=True)):
        if not own_asked:
            continue
        free = (
            number
            for number, (others_read, others_asked) in enumerate(taken)
            if not others_read & own_asked and not others_asked & own_reads
        )
        colours[row] = number = next(free, len(taken))
        if number == len(taken):
            taken.append((0, 0))
        taken[number] = taken[number][0] | own_reads, taken[number][1] | own_asked
    return colours


def _bits(rows: np.ndarray) -> list[int]:
    """Each row of bools as the bits of an integer."""
    packed = np.packbits(rows, axis=1, bitorder="little")
    return [int.from_bytes(row.tobytes(), "little") for row in packed]


def _colours_of_sets(size: int, sets: list[np.ndarray]) -> np.ndarray:
    """Colours of the entries of these sets: no set has two entries of one colour."""
    colours = np.full(size, -1)
    together: list[set] = [set() for _ in range(size)]
    for entries in map(np.ndarray.tolist, sets):
        for i in entries:
            together[i].update(entries)
    for i in range(size):
        if together[i]:
            taken = set(colours[list(together[i])].tolist())
            colours[i] = next(c for c in range(size) if c not in taken)
    return colours
