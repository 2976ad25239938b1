"""`jbptt diagnose MODULE:FUNCTION`: the page of a user's own model, or one clear line."""

import pytest

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


def no_batch():
    return (*problem()[:4], None)


number = 3
"""


@pytest.fixture(autouse=True)
def model(tmp_path, monkeypatch):
    (tmp_path / "my_model.py").write_text(MODEL)
    (tmp_path / "wrong.py").write_text("def f(:\n")
    (tmp_path / "needs_more.py").write_text("import not_there_at_all\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("name", ["my_model:problem", "my_model.py:problem"])
def test_the_page_of_a_users_model(name, capsys):
    assert cli.main(["diagnose", name, "--no-measure", "--max-window", "3"]) == 0
    page = capsys.readouterr().out
    assert page.startswith("Gradient over 6 steps: ") and "half-life" in page and "10% sliding" in page


WRONG = {
    "my_model": "must be MODULE:FUNCTION or FILE.py:FUNCTION",
    "my_model:no such": "must be MODULE:FUNCTION",
    "my_model:absent": "has no function 'absent'",
    "my_model:number": "has no function 'number'",
    "my_model:nothing": "must return a tuple (step, loss, params, carry, batch), got NoneType",
    "my_model:broken": "my_model:broken failed: KeyError: 'x' (my_model.py, line 17)",
    "my_model:no_batch": "batch must be a jbptt.Batch, got NoneType",
    "absent:problem": "no module 'absent'",
    "absent.py:problem": "absent.py is not a file",
    "wrong.py:f": "wrong.py cannot be imported: SyntaxError",
    "needs_more:f": "no module 'not_there_at_all', needed for needs_more",
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
