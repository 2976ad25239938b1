"""Finds the one place of each wrong edit in the source, however the source is laid out."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from . import Mutant, Room

TOKEN = re.compile(r"\d[\w.]*|\w+|\*\*|//|<<|>>|->|[-+*/%@&|^<>=!:]=|\S")
DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Token(NamedTuple):
    """A word of the source, and where it begins and ends."""

    word: str
    start: int
    end: int


class Source(NamedTuple):
    """A module in its plainest form, its tokens, and where its definitions and statements lie."""

    text: str
    tokens: list[Token]
    definitions: list[tuple[str, tuple[int, int]]]  # with dotted names, those inside others too
    statements: list[tuple[int, int]]  # of the module itself


def plain(source: str) -> str:
    """The same program as `ast.unparse` writes it: one statement a line, no comments."""
    return ast.unparse(ast.parse(source)) + "\n"


def mutated(source: str, mutant: Mutant) -> str:
    """The source, in its plainest form, with the edit.

    Raises:
        ValueError: The edit does not fit the source, gives no program, or changes nothing.
    """
    read = _read(source)
    start, end = 0, len(read.text)
    if mutant.function:
        start, end = _only("function", mutant.function, read.definitions)
    tokens = [token for token in read.tokens if start <= token.start < end]
    words, old = [token.word for token in tokens], [token.word for token in _tokens(mutant.old)]
    places = [i for i in range(len(words)) if words[i : i + len(old)] == old]
    if not old or len(places) != 1:
        home = f"{mutant.function or 'the module'}, as ast.unparse writes it"
        raise ValueError(f"{mutant.old!r} occurs {len(places)} times in {home}; wanted once")

    first, last = tokens[places[0]], tokens[places[0] + len(old) - 1]
    begin = max(start for start, _ in read.statements if start <= first.start)
    finish = min(end for _, end in read.statements if last.end <= end)
    before, after = read.text[begin : first.start], read.text[last.end : finish]
    line = before.rpartition("\n")[2]
    indentation = line[: len(line) - len(line.lstrip())]
    text = before + mutant.new.replace("\n", "\n" + indentation) + after
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        wrong = text.split("\n")[(error.lineno or 1) - 1].strip()
        raise ValueError(f"{mutant.new!r} gives no program: {error.msg}: {wrong}") from None
    if ast.dump(tree) == ast.dump(ast.parse(read.text[begin:finish])):
        raise ValueError(f"{mutant.new!r} for {mutant.old!r} changes nothing")
    return read.text[:begin] + text + read.text[finish:]


def path_of(root: Path, room: Room) -> Path:
    """The file of a room.

    Raises:
        ValueError: No module or more than one has this name.
    """
    return _only("module", room.name, _modules(root))


def check_table(root: Path, mutants: tuple[Mutant, ...]) -> list[str]:
    """What is wrong with the table: edits that do not fit, absent tests, names used twice."""
    problems = []
    for mutant in mutants:
        try:
            mutated(path_of(root, mutant.room).read_text(), mutant)
        except ValueError as error:
            problems.append(f"{mutant.name}, in {mutant.room.name}: {error}")
    for room in sorted({mutant.room for mutant in mutants}):
        absent = [name for name in room.closest if not (root / "tests" / f"{name}.py").exists()]
        problems += [f"{room.name}: its closest tests {name} are not there" for name in absent]
    counts = Counter(mutant.name for mutant in mutants)
    return problems + [f"{name}: used twice" for name, count in counts.items() if count > 1]


def _only(kind: str, end: str, named: list[tuple[str, Any]]) -> Any:
    """What has this dotted name, or else what has a name that ends so, if that is one thing."""
    found = [(name, value) for name, value in named if name == end]
    found = found or [(name, value) for name, value in named if name.endswith("." + end)]
    if not found:
        raise ValueError(f"there is no {kind} {end}")
    if len(found) > 1:
        raise ValueError(f"which {kind} {end}? There are {', '.join(name for name, _ in found)}")
    return found[0][1]


@lru_cache
def _modules(root: Path) -> list[tuple[str, Path]]:
    paths = sorted((root / "jbptt").rglob("*.py"))
    names = [".".join(path.relative_to(root).with_suffix("").parts) for path in paths]
    return [(name.removesuffix(".__init__"), path) for name, path in zip(names, paths, strict=True)]


@lru_cache
def _read(source: str) -> Source:
    text = plain(source)
    tree = ast.parse(text)
    begins = [0, *(match.end() for match in re.finditer("\n", text))]

    def span(node: ast.stmt) -> tuple[int, int]:
        first = min(part.lineno for part in [node, *getattr(node, "decorator_list", [])])
        return begins[first - 1], begins[node.end_lineno]

    code, named = text, list(_definitions(tree))
    for home in [tree, *(node for _, node in named)]:
        if ast.get_docstring(home) is not None:
            start, end = span(home.body[0])
            code = code[:start] + " " * (end - start) + code[end:]
    definitions = [(name, span(node)) for name, node in named]
    return Source(text, _tokens(code), definitions, [span(node) for node in tree.body])


def _definitions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, DEFINITIONS]]:
    """Functions and classes by their dotted names, those inside others too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, DEFINITIONS):
            yield prefix + child.name, child
            yield from _definitions(child, f"{prefix}{child.name}.")
        else:
            yield from _definitions(child, prefix)


def _tokens(text: str) -> list[Token]:
    return [Token(m[0].replace('"', "'"), m.start(), m.end()) for m in TOKEN.finditer(text)]
