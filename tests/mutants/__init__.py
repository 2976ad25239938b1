"""Wrong edits to the source, each of which some test must notice: `python -m tests.mutants`.

The tables, one for each floor of the package, are drawn from the design and the source, not from
what the tests happen to check.
"""

from typing import NamedTuple


class Room(NamedTuple):
    """A module by the end of its dotted name, and the tests closest to it, most telling first."""

    name: str
    closest: tuple[str, ...]


class Mutant(NamedTuple):
    """One wrong edit: in a function of a room, `old`, which occurs there once, becomes `new`.

    `function` is the end of a dotted name (`backward` or `Loops.backward`; a class will do), or ""
    for the whole module. What is nested in it belongs to it, but for docstrings. `old` is matched
    token by token against what `ast.unparse` makes of the source, so that how the source is laid
    out does not matter: no brackets that change nothing, a tuple in brackets unless it is assigned
    to, adjoining strings as one, either kind of quotes. Few tokens and few names make an edit that
    lasts. Where `new` has several lines, they are indented like the line that `old` begins in.
    """

    name: str
    room: Room
    function: str
    old: str
    new: str
