"""`jbptt diagnose MODULE:FUNCTION`: the page of a user's own model, or one clear line."""

import json
import queue
import re
import sys

import pytest
from problems import usual

pytest.importorskip("tyro")

from jbptt.report import cli

MODEL = """
import jax, jax.numpy as jnp, jbptt

cell = jbptt.cells.with_linear_readout(jbptt.cells.rnn(3, 4), 2)


def problem():
    batch = jbptt.Batch(jnp.ones((6, 2, 3)), jnp.ones((6, 2, 2)))
    return cell.step, jbptt.tasks.squared_error, cell.init(jax.random.key(0)), cell.initial_carry((2,)), batch


def nothing():
    pass


def broken():
    raise KeyError("x")


def leaving():
    raise SystemExit(3)


def with_step(step):
    return step, *problem()[1:]


def failing_step():
    def step(params, carry, x):
        return carry, carry * params["nope"]

    return with_step(step)


def step_of_another_width():
    return with_step(lambda params, carry, x: (carry, jnp.ones((2, 5)) @ params["w_h"]))


def no_batch():
    return (*problem()[:4], None)


def lacking():
    import not_there_at_all


number = 3
"""


@pytest.fixture(autouse=True)
def model(tmp_path, monkeypatch):
    (tmp_path / "my_model.py").write_text(MODEL)
    (tmp_path / "wrong.py").write_text("def f(:\n")
    (tmp_path / "needs_more.py").write_text("import not_there_at_all\n")
    (tmp_path / "bad_value.py").write_text("x = 1\nint('abc')\n")
    (tmp_path / "leaves.py").write_text("import sys\n\nsys.exit(3)\n")
    (tmp_path / "queue.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("name", usual(["my_model:problem"], ["my_model:problem", "my_model.py:problem"]))
def test_the_page_of_a_users_model(name, capsys):
    assert cli.main(["diagnose", name, "--no-measure", "--max-window", "3"]) == 0
    page = capsys.readouterr().out
    assert "\nGradient over 6 steps, 3 lags measured: " in page and "half-life" in page and "10% sliding" in page


def test_every_option_has_its_help(capsys):
    assert cli.main(["diagnose", "--help"]) == 0
    words = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    for option, begins in {
        "--max-window": "the largest lag",
        "--learning-rate": "of your optimizer",
        "--no-measure": "leave out the time",
        "--plans": "time the ways",
        "--explain": "print what each line",
        "--out": "a folder to write",
    }.items():
        assert re.search(rf"{option}\b[^-]*?{begins}", words), option


def test_plans_are_measured_when_asked_for(capsys):
    assert cli.main(["diagnose", "my_model:problem", "--no-measure", "--max-window", "3", "--plans"]) == 0
    page = capsys.readouterr().out
    fastest = re.search(r"Fastest full gradient here: (segments of .* on one device)\.", page)
    assert fastest and page.count(fastest[1]) == 2  # in the sentence and among the candidates
    assert page.count("on one device") == 2  # six steps are one segment by default


def test_page_numbers_and_picture_are_written(tmp_path, capsys):
    options = ["diagnose", "my_model:problem", "--no-measure", "--max-window", "3", "--explain", "--out", "found"]
    assert cli.main(options) == 0
    page = capsys.readouterr().out
    folder = tmp_path / "found"
    assert sorted(path.name for path in folder.iterdir()) == ["diagnosis.json", "diagnosis.svg", "diagnosis.txt"]
    assert (folder / "diagnosis.txt").read_text() == page and "The leading Lyapunov exponent" in page
    numbers = json.loads((folder / "diagnosis.json").read_text())
    assert numbers["verdict"] in page and page.startswith(numbers["decision"][:60])
    assert len(numbers["arrives"]) == len(numbers["lag"]) == 3 and numbers["window"] == [1, 2, 3]
    assert "<svg" in (folder / "diagnosis.svg").read_text()
    (tmp_path / "taken").write_text("")
    assert cli.main(["diagnose", "my_model:problem", "--out", "taken"]) == 2
    assert "out must be a folder, got the file" in capsys.readouterr().err


WRONG = {
    "my_model": "must be MODULE:FUNCTION or FILE.py:FUNCTION",
    "my_model:no such": "must be MODULE:FUNCTION",
    "my_model:absent": "has no function 'absent'",
    "my_model:number": "has no function 'number'",
    "my_model:nothing": "must return a tuple (step, loss, params, carry, batch), got NoneType",
    "my_model:broken": "my_model:broken failed: KeyError: 'x' (my_model.py, line 17)",
    "my_model:leaving": "my_model:leaving failed: SystemExit: 3 (my_model.py, line 21)",
    "my_model:failing_step": "my_model:failing_step failed: KeyError: 'nope' (my_model.py, line 30)",
    "my_model.py:step_of_another_width": "(my_model.py, line 36)",
    "bad_value.py:f": "bad_value.py cannot be imported: ValueError: invalid literal for int() with base 10: 'abc' "
    "(bad_value.py, line 2)",
    "bad_value:f": "(bad_value.py, line 2)",
    "leaves.py:f": "leaves.py cannot be imported: SystemExit: 3 (leaves.py, line 3)",
    "leaves:f": "leaves cannot be imported: SystemExit: 3 (leaves.py, line 3)",
    "my_model:no_batch": "batch must be a jbptt.Batch, got NoneType",
    "absent:problem": "no module 'absent'; run jbptt from the folder that holds it",
    "needs_more.py:f": "needs_more.py imports 'not_there_at_all', which is not installed where this jbptt is",
    "my_model:lacking": "No module named 'not_there_at_all' (my_model.py, line 44); install it in ",
    "absent.py:problem": "absent.py is not a file",
    "wrong.py:f": "wrong.py cannot be imported: SyntaxError",
    "needs_more:f": "needs_more imports 'not_there_at_all', which is not installed where this jbptt is",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_model_is_one_line_and_status_2(name, capsys):
    assert cli.main(["diagnose", name, "--no-measure"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("jbptt: error: ") and shown.err.count("\n") == 1
    assert WRONG[name] in shown.err


def test_a_wrong_option_is_refused(capsys):
    assert cli.main(["diagnose", "my_model:problem", "--max-window", "0"]) == 2
    assert "max_window must be an integer >= 1, got 0" in capsys.readouterr().err


def test_a_file_does_not_stand_in_for_a_module_of_the_same_name(capsys):
    assert cli.main(["diagnose", "queue.py:no_batch"]) == 2 and "batch must be" in capsys.readouterr().err
    assert sys.modules["queue"] is queue and not hasattr(queue, "no_batch")
