"""Wrong edits to the source, each of which some test must notice: `python -m tests.mutants`.

The tables, one for each floor of the package, are drawn from the design and the source, not from what the tests
happen to check.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    """One wrong edit: in `file`, `old`, which occurs once, is replaced by `new`."""

    name: str
    file: str
    old: str
    new: str
