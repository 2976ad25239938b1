"""The wrong edits that tests must notice: each finds its place, however the source is laid out."""

import ast
from pathlib import Path

import pytest
from mutants import Mutant, Room
from mutants.__main__ import MUTANTS
from mutants.edits import check_table, mutated, path_of, plain

ROOT = Path(__file__).parent.parent
LOOPS = Room("loops", ("test_loops",))
SOURCE = '''
"""What happens where t == 0."""

LIMIT = 3


class Loops:
    def backward(self, carry, t, name="the first"):
        """The carry; nothing where t == 0."""

        def inner(x):
            return x + 1

        if t == 0 and carry:
            return {"name": name}, f"{name!r} of {LIMIT:.3g}", (carry + t) * LIMIT
        return carry


def all_backward(carry, t):
    return carry[t:] if t == 0 else [0.5, -0.0]
'''
LAID_OUT_ANEW = """
def all_backward(
    carry, t,  # where t == 0
):
    return (
        carry[t :] if
        (t == 0) else [0.5, -0.0,]
    )

class Loops:
  def backward(
      self, carry, t, name='the '
      'first',
  ):
    '''Another text, where t == 0.'''
    def inner(x): return (x + 1)

    # t == 0
    if (
        t == 0
        and carry
    ):
        return (
            {'name': name,},
            f'{name!r} '
            f'of {LIMIT:.3g}',
            (carry + t)
            * LIMIT,
        )
    return (carry)

LIMIT = \\
    3
"""
EDITS = [
    ("Loops.backward", "t == 0", "t == 1"),
    ("backward", "t==0 and carry", "carry"),
    ("backward", '"name": name', '"name": 0'),
    ("backward", 'name="the first"', 'name="the second"'),
    ("backward", "!r} of", "!s} of"),
    ("backward", "(carry + t) *", "carry *"),
    ("backward", "return carry", "if not t:\n    carry = self\nreturn carry"),
    ("inner", "1", "2"),
    ("Loops", "class Loops:", "class Loops(list):"),
    ("all_backward", "t == 0", "t != 0"),
    ("all_backward", "0", "1"),  # neither 0.5 nor 0.0 is 0
    ("all_backward", ", -0.0", ""),
    ("", "LIMIT = 3", "LIMIT = 4"),
]


def mutant(function, old, new, room=LOOPS):
    return Mutant("wrong", room, function, old, new)


def statements(source):
    """The statements of a module, in any order, without docstrings."""
    tree = ast.parse(source)
    homes = ast.FunctionDef | ast.ClassDef | ast.Module
    for node in ast.walk(tree):
        if isinstance(node, homes) and ast.get_docstring(node):
            del node.body[0]
    return sorted(map(ast.dump, tree.body))


def test_every_edit_fits_the_source():
    assert check_table(ROOT, MUTANTS) == []


@pytest.mark.more("test_every_edit_fits_the_source")
def test_what_mutants_run_is_the_package():
    for path in (ROOT / "jbptt").rglob("*.py"):
        source = path.read_text()
        assert ast.dump(ast.parse(plain(source))) == ast.dump(ast.parse(source)), path.name


@pytest.mark.parametrize("edit", EDITS)
def test_the_layout_does_not_matter(edit):
    assert statements(SOURCE) == statements(LAID_OUT_ANEW)
    edited = statements(mutated(SOURCE, mutant(*edit)))
    assert edited == statements(mutated(LAID_OUT_ANEW, mutant(*edit)))
    assert len({*edited} - {*statements(SOURCE)}) == 1, "one statement changes"


def test_an_edit_is_made_in_its_place():
    edit = mutant("backward", "return carry", "if not t:\n    carry = self\nreturn carry")
    place = "        return carry\n\ndef"
    assert plain(SOURCE).count(place) == 1
    anew = "        if not t:\n            carry = self\n        return carry\n\ndef"
    assert mutated(SOURCE, edit) == plain(SOURCE).replace(place, anew)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (mutant("inner", "1", "2", Room("lops", ())), "there is no module lops"),
        (mutant("iner", "1", "2"), "there is no function iner"),
        (mutant("ner", "1", "2"), "there is no function ner"),
        (mutant("inner", "x - 1", "2"), "'x - 1' occurs 0 times in inner, as ast"),
        (mutant("inner", "", "2"), "'' occurs"),
        (mutant("backward", "t", "2"), "'t' occurs 3 times in backward"),
        (mutant("", "t == 0", "t"), "'t == 0' occurs 2 times in the module"),
        (mutant("inner", "x + 1", "x +"), "'x +' gives no program: invalid syntax: return x +"),
        (mutant("inner", "x + 1", "(x + 1)"), "changes nothing"),
        (mutant("inner", "1", "2", Room("loops", ("test_lops",))), "its closest tests test_lops"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path, wrong, message):
    home(tmp_path, "engine/loops.py", "other.py")
    problems = check_table(tmp_path, (wrong,))
    assert len(problems) == 1 and message in problems[0], problems


def test_names_are_used_once(tmp_path):
    home(tmp_path, "loops.py")
    good = mutant("inner", "1", "2")
    assert check_table(tmp_path, (good,)) == []
    assert check_table(tmp_path, (good, good)) == ["wrong: used twice"]


def test_a_room_may_move(tmp_path):
    """It is found by the end of its name; where that fits two, a longer one says which."""
    home(tmp_path, "engine/__init__.py", "engine/deep/loops.py", "hoops.py")
    assert path_of(tmp_path, LOOPS) == tmp_path / "jbptt/engine/deep/loops.py"
    assert path_of(tmp_path, Room("engine", ())) == tmp_path / "jbptt/engine/__init__.py"
    two = tmp_path / "two"
    home(two, "loops.py", "engine/loops.py")
    message = r"which module loops\? There are jbptt.engine.loops, jbptt.loops"
    with pytest.raises(ValueError, match=message):
        path_of(two, LOOPS)
    assert path_of(two, Room("jbptt.loops", ())) == two / "jbptt/loops.py"
    assert path_of(two, Room("engine.loops", ())) == two / "jbptt/engine/loops.py"


def home(root, *files):
    """A repository whose modules hold `SOURCE`."""
    for path in [root / "tests/test_loops.py", *(root / "jbptt" / name for name in files)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SOURCE)
