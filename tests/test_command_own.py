"""`jbptt report` and `jbptt compare` on a model of one's own: pages, files, going on, one line for what is wrong."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from problems import usual

for module in ("tyro", "rich", "matplotlib", "jinja2", "icechunk"):
    pytest.importorskip(module)

from jbptt.report import cli  # noqa: E402
from jbptt.report.commands import own_models  # noqa: E402
from jbptt.report.user_models import load_model  # noqa: E402

MODEL = """
import jax, jax.numpy as jnp, jbptt

cell = jbptt.cells.with_linear_readout(jbptt.cells.rnn(2, 3), 1)
common = cell.step, jbptt.tasks.squared_error

def draw(key, examples=4):
    xs = jax.random.normal(key, (6, examples, 2))
    return jbptt.Batch(xs, xs[..., :1] * 0.5 + jnp.roll(xs, 1, axis=0)[..., 1:])

def one():
    return *common, cell.init(jax.random.key(0)), cell.initial_carry((10,)), draw(jax.random.key(1), 10)

def drawn():
    return {"step": cell.step, "loss": common[1], "params": cell.init, "carry": cell.initial_carry((4,)),
            "batches": draw, "windows": (2,), "sliding": (), "keep_probs": ()}

def stacked():
    batches = jax.vmap(draw)(jax.random.split(jax.random.key(2), 6))
    return drawn() | {"batches": batches, "stream": True}

def few():
    return *common, cell.init(jax.random.key(0)), cell.initial_carry((4,)), draw(jax.random.key(1), 4)

def mixed():
    def step(params, h, x):
        h, y = cell.step(params, h, x)
        return h - h.mean(0), y
    return step, *one()[1:]

def other_starts():
    step, loss, params, carry, batch = one()
    return step, loss, params, jax.random.normal(jax.random.key(3), carry.shape), batch

def lacking():
    return {name: value for name, value in drawn().items() if name != "batches"}

def misspelt():
    return drawn() | {"heldin": None}

def failing():
    raise RuntimeError("no data today")
"""
SMALL = ["--num-seeds=2", "--num-updates=4", "--learning-rates", "0.01", "0.03"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MODEL)
    return tmp_path


@pytest.mark.parametrize("name", usual(["drawn"], ["drawn", "one", "stacked"]))
def test_a_report_on_a_model_of_ones_own(name, folder, capsys):
    options = [*SMALL, "--windows", "3"] if name == "one" else SMALL
    assert cli.main(["report", f"mine.py:{name}", "--out=found", *options]) == 0
    shown = capsys.readouterr()
    assert "beside full BPTT" in shown.out and "Report: found/report.html" in shown.out
    data = json.loads(Path("found/report.json").read_text())
    assert data["model"] == f"mine.py:{name}"
    assert data["learning"]["ways"][:2] == ["full BPTT", "blocks of 3" if name == "one" else "blocks of 2"]
    assert np.shape(data["learning"]["curves"]["test"][0])[1] == 2 and data["learning"]["updates"][-1] == 20
    assert data["gradients"]["names"] == data["learning"]["ways"]
    assert data["diagnosis"]["num_steps"] == 6 and data["sentences"]["diagnosis"] == data["diagnosis"][
        "decision"
    ].replace(" %", "\u00a0%")
    page = Path("found/report.html").read_text()
    assert page.count("<img") == 3 and "mine.py" in page and 'href="#learning"' in page
    files = sorted(path.name for path in Path("found").iterdir())
    assert files == ["diagnosis.svg", "gradients.svg", "learning.svg", "report.html", "report.json", "trainings"]


@pytest.mark.more("test_a_report_on_a_model_of_ones_own")
def test_a_comparison_of_a_model_of_ones_own(folder, capsys):
    assert cli.main(["compare", "mine.py:drawn", "--num-samples=2", "--out=found", *SMALL]) == 0
    shown = capsys.readouterr().out
    assert shown.index("relative bias") < shown.index("gradient error") and "blocks of 2" in shown
    data = json.loads(Path("found/comparison.json").read_text())
    assert data["names"] == data["learning"]["ways"] == ["full BPTT", "blocks of 2"]
    files = sorted(path.name for path in Path("found").iterdir())
    assert files == ["comparison.json", "comparison.svg", "learning.svg", "trainings"]


@pytest.mark.more("test_a_report_on_a_model_of_ones_own")
def test_an_interrupted_report_goes_on(folder, capsys, monkeypatch):
    """Ctrl-C after the trainings, then the same command: no training runs again; another file begins anew."""
    call = ["report", "mine.py:drawn", "--out=found", *SMALL]

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(own_models, "tell", lambda words: stop() if "diagnose" in words else None)
        assert cli.main(call) == 130
    said = capsys.readouterr().err
    assert "finished trainings are in found/trainings, and the same command goes on from there" in said
    assert [path.name for path in Path("found").iterdir()] == ["trainings"]
    (kept,) = Path("found/trainings").iterdir()
    before = {path: path.stat().st_mtime_ns for path in kept.rglob("chunks/**/*") if path.is_file()}
    assert before and cli.main(call) == 0
    assert "8 of 8 runs are done" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    Path("mine.py").write_text(MODEL + "\n")
    assert cli.main(call) == 0 and len(list(Path("found/trainings").iterdir())) == 2


@pytest.mark.more("test_a_report_on_a_model_of_ones_own")
def test_a_killed_comparison_goes_on(folder):
    """SIGKILL when trainings are first kept, with no clean-up whatever: the same command ends with the same numbers."""
    command = [sys.executable, "-m", "jbptt", "compare", "mine.py:drawn", "--num-samples=2", *SMALL]

    def start(out):
        return subprocess.Popen([*command, f"--out={out}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    process = start("killed")
    # A store begins with two versions; what follows are trainings.
    while len(list(Path("killed").rglob("round-1/snapshots/*"))) < 3 and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not Path("killed/comparison.json").exists()
    ends = []
    for out in ("killed", "whole"):
        process = start(out)
        _, words = process.communicate()
        assert process.returncode == 0, words
        ends.append(json.loads(Path(out, "comparison.json").read_text()))
    assert ends[0]["learning"]["curves"] == ends[1]["learning"]["curves"]
    assert ends[0]["relative_bias"] == ends[1]["relative_bias"]


def test_one_batch_is_divided_by_examples(folder):
    """Nothing that chooses or judges is trained on, and each held-out example weighs the same."""
    model = load_model("mine.py:one")
    batch = model.problem[-1]
    key = np.arange(20, dtype=np.uint32)
    rows = np.asarray(batch.xs)[0, :, 0]

    def number(values):
        return {int(np.flatnonzero(rows == value)[0]) for value in np.asarray(values)}

    import jax

    drawn = [model.study["batches"](jax.random.key(int(k))) for k in key]
    trained = set.union(*(number(b.xs[0, :, 0]) for b in drawn))
    chooses, judges = (number(model.study["heldout"].xs[i, 0, :, 0]) for i in range(2))
    assert [len(part) for part in (trained, chooses, judges)] == [6, 2, 2]
    assert trained | chooses | judges == {*range(10)} and trained != {*range(6)}  # drawn: they may be sorted
    assert model.data.startswith("6 steps; 6 of 10 examples are trained on, drawn with replacement; 2 choose")
    weights = np.asarray(model.study["heldout"].weights)
    np.testing.assert_allclose(weights.sum(2), 2.0)
    assert (np.asarray(drawn[0].weights) == 1).all()


WRONG = [
    (["report", "mine.py:few"], "has too few examples to hold some out, wanted 10 at least"),
    (["report", "mine.py:mixed"], "the examples of the batch depend on each other; return a dict instead"),
    (["report", "mine.py:other_starts"], "the examples of the batch start from different carries"),
    (["report", "mine.py:lacking"], "returned a dict that lacks batches; wanted step, loss, params, carry, batches"),
    (["report", "mine.py:misspelt"], "returned a dict that holds heldin"),
    (["report", "mine.py:failing"], "no data today"),
    (["report", "mine.py:absent"], "has no function 'absent'"),
    (["report", "mine.py:drawn", "--cell", "gru"], "cell belongs to the built-in models"),
    (["report", "mine.py:drawn", "--windows", "6"], "windows must be shorter than the 6 steps"),
    (["report", "mine.py:drawn", "--num-seeds", "1"], "num_seeds must be"),
    (["compare", "mine.py:drawn", "--task", "copy"], "task belongs to the built-in models"),
    (["compare", "--num-seeds", "5"], "num_seeds belongs to models of your own"),
    (["compare", "mine.py:failing"], "no data today"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_a_wrong_call_is_one_line_and_status_2(arguments, words, folder, capsys):
    assert cli.main([*arguments, "--out=found"]) == 2
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if not line.startswith("jbptt: compare the gradients")]
    assert len(lines) == 1 and lines[0].startswith("jbptt: error: ") and words in lines[0]
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == ["mine.py"]
