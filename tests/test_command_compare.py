"""`jbptt compare`: two tables and two files, or one clear line."""

import json

import numpy as np
import pytest
from problems import usual

pytest.importorskip("tyro")

from jbptt.report import cli

SMALL = ["--hidden-size=3", "--num-steps=8", "--batch-size=2", "--num-updates=2", "--num-samples=2", "--cell=rnn"]
FEW = [*SMALL, "--window", "2", "--keep-prob", "--mean-length"]
MANY = [*SMALL, "--window", "2", "4", "--keep-prob", "0.5", "--mean-length", "3"]
NAMES = ["full", "blocks of 2", "sliding 2", "blocks of 4", "sliding 4", "keep 0.5", "keep 0.5, no 1/π", "artbp 3.0"]


def assert_tables(shown, names):
    bias, alignment, cost = (part.splitlines() for part in shown.out.strip().split("\n\n"))
    for rows in (bias[1:], cost[1:]):
        found = [next(n for n in sorted(names, key=len, reverse=True) if r.startswith(n)) for r in rows]
        assert found == names
    assert len(alignment) == len(names) + 2


def test_tables_and_files_of_few(tmp_path, monkeypatch, capsys):
    """Without options that draw; what is not asked for is not compared."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", "--task=copy", *FEW, "--out=found"]) == 0
    assert_tables(capsys.readouterr(), NAMES[:3])
    numbers = json.loads((tmp_path / "found" / "comparison.json").read_text())
    assert numbers["names"] == NAMES[:3] and numbers["relative_bias"][0] < 1e-6
    assert "relative to the norm" in (tmp_path / "found" / "comparison.svg").read_text()


@pytest.mark.more("test_tables_and_files_of_few")
@pytest.mark.parametrize("task", usual(["copy"], ["text", "copy", "adding", "recall"], full=("text", "adding")))
def test_tables_and_files(task, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--tolerance=0.3", "--out=found"] if task == "copy" else []
    assert cli.main(["compare", f"--task={task}", *MANY, *options]) == 0
    names = [*NAMES, "adaptive 0.3"] if options else NAMES
    assert_tables(capsys.readouterr(), names)
    if options:
        files = sorted(path.name for path in (tmp_path / "found").iterdir())
        assert files == ["comparison.json", "comparison.svg"]
        numbers = json.loads((tmp_path / "found" / "comparison.json").read_text())
        assert numbers["names"] == names and numbers["command"].startswith("jbptt compare --task=copy")
        assert numbers["variance"][:5] == [0] * 5 and numbers["relative_bias"][0] < 1e-6
        assert all(np.shape(numbers[field]) == (9,) for field in ("cosine", "norm_ratio", "seconds", "temporary_bytes"))
        full, blocks, *_, adaptive = shares = numbers["coverage"]  # shares of the pairs i ≤ t
        assert len(shares) == 9 and full == 1 and 0 < blocks < adaptive <= shares[4]  # sliding 4
        assert numbers["settings"]["window"] == [2, 4] and np.shape(numbers["alignment"]) == (9, 9)
        assert "relative to the norm" in (tmp_path / "found" / "comparison.svg").read_text()
    else:
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--window=0"], "window must be an integer >= 1, got 0"),
        (["--keep-prob=0"], "keep_prob must lie in (0, 1], got 0.0"),
        (["--mean-length=1"], "mean_length must be a finite number > 1, got 1.0"),
        (["--tolerance=1"], "tolerance must lie in (0, 1), got 1.0"),
        (["--tolerance=0.1", "--window"], "tolerance needs a window"),
        (["--num-samples=1"], "num_samples must be an integer >= 2, got 1"),
        (["--seed=-1"], "seed must be an integer in [0, 2**32), got -1"),
        (["--task=copy", "--num-steps=2"], "num_steps must be an integer >= 3, got 2"),
        (["--task=adding", "--text=a.txt"], "text is read by the task text only"),
        (["--text=absent.txt"], "text: cannot read 'absent.txt'"),
        (["--task=sums"], "jbptt compare --help lists every option"),
        (["--out=taken"], "out must be a folder, got the file"),
    ],
)
def test_a_wrong_call_is_one_line_and_status_2(options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("")
    assert cli.main(["compare", *options]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("jbptt: error: ") and shown.err.count("\n") == 1
    assert words in shown.err
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
