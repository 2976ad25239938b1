"""`jbptt results STORE`: what a sweep found, in tables, files and a picture, or one clear line."""

import csv
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tyro")
pytest.importorskip("icechunk")

from jbptt import grid, load_sweep, sweep
from jbptt.report import cli
from jbptt.sweeps import programs

GRID = grid(rate=[0.01, 0.1, 0.4], window=[2, 4], seed=range(5))


def run(point, key):
    """A loss that falls to what its median is for, by hand; one run is not finite."""
    del key
    rate, seed = jnp.asarray(point.get("rate", 0.1), float), point.get("seed", 1)
    last = jnp.abs(rate - 0.1) + 0.01 * seed + 0.0075 * (point["window"] - 2)
    loss = jnp.where((rate > 0.3) & (seed == 0), jnp.nan, last + jnp.arange(2.0, -1.0, -1.0))
    return {"score": 1 - last, "loss": loss, "matrix": jnp.zeros((2, 2)), "updates": jnp.asarray(3)}


def asked(store, points=GRID, static="window", **options):
    options = {"dims": {"loss": "step"}, "key": jax.random.key(0), "progress": False, "width": 5} | options
    return sweep(run, points, static=static, store=store, **options)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweeps") / "runs"
    asked(path)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweeps") / "plain"
    points = {"rate": np.linspace(0.02, 0.4, 35), "window": np.full(35, 2), "seed": np.arange(35) % 2, "w": np.eye(35)}
    asked(path, points, None)
    return path


def shown(capsys, *arguments):
    assert cli.main(["results", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_the_tables_of_a_grid(store, capsys):
    page = shown(capsys, store)
    assert page.startswith(f"{store}: 30 runs, all finished, 2 of them not finite (some output is NaN or infinite)\n")
    assert "  rate    0.01, 0.1, 0.4\n  window  2, 4\n  seed    0, 1, 2, 3, 4\n" in page
    assert "\nComputed 5 side by side, in chunks of " in page
    loss, score, updates, rest = page.split("\n\n")[1:]
    assert loss.splitlines() == [
        "loss (last entry, step 2): median and quartiles over seed",
        "  rate  window  median  quartiles         runs",
        "  0.01  2       0.11    0.1 to 0.12       5",
        "  0.01  4       0.125   0.115 to 0.135    5",
        "  0.1   2       0.02    0.01 to 0.03      5",
        "  0.1   4       0.035   0.025 to 0.045    5",
        "  0.4   2       0.325   0.3175 to 0.3325  4 of 5",
        "  0.4   4       0.34    0.3325 to 0.3475  4 of 5",
        "2 runs are not finite here and left out of medians.",
        "Smallest median: 0.02 at rate=0.1, window=2.",
        "Quartiles overlap those of the smallest median: rate=0.1, window=4.",
    ]
    assert score.startswith("score: median") and "Smallest" not in score
    assert "0.4   2       0.68    0.67 to 0.69    5" in score  # finite where the loss is not
    assert updates == "updates: 3 in all 30 finite runs"
    assert rest.startswith("Not shown: matrix, as it has the axes matrix_0 (2), matrix_1 (2) of its own")


def test_one_variable_and_the_files(store, tmp_path, capsys):
    page = shown(capsys, store, "--variable", "score", "--x", "window", "--out", tmp_path / "found")
    assert page.count("median and quartiles") == 1 and "loss" not in page
    folder = tmp_path / "found"
    assert sorted(path.name for path in folder.iterdir()) == ["results.csv", "results.json", "results.svg"]
    numbers = json.loads((folder / "results.json").read_text())
    assert numbers["num_runs"] == 30 and numbers["num_not_finite"] == 2 and numbers["axes"]["rate"] == [0.01, 0.1, 0.4]
    assert numbers["plan"] in page and numbers["command"].startswith("jbptt results")
    (score,) = numbers["outputs"]
    assert score["rows"][2]["at"] == {"rate": 0.1, "window": 2} and score["smallest"] is None
    np.testing.assert_allclose([score["rows"][2]["median"], *score["rows"][2]["quartiles"]], [0.98, 0.97, 0.99])
    rows = list(csv.DictReader((folder / "results.csv").open()))
    wanted = load_sweep(store)
    assert len(rows) == 30 and list(rows[0]) == [
        "rate", "window", "seed", "finished", "finite", "loss[step=2]", "score", "updates",
    ]  # fmt: skip
    for name, values in {
        "loss[step=2]": wanted.loss[..., -1],
        "score": wanted.score,
        "seed": GRID.axes["seed"],
    }.items():
        values = np.broadcast_to(values, (3, 2, 5)).ravel()
        np.testing.assert_array_equal([float(row[name]) for row in rows], values)
    assert [i for i, row in enumerate(rows) if row["finite"] == "False"] == [20, 25]
    picture = (folder / "results.svg").read_text()
    assert all(f">{text}</text>" in picture for text in ("window", "score", "0.4"))


def test_plain_points_are_a_table_of_runs(plain, capsys):
    page = shown(capsys, plain)
    assert "  window  2\n" in page and "  seed    0, 1\n" in page and "  run  rate" in page
    best = int(np.nanargmin(load_sweep(plain).loss[:, -1]))
    rows = [line.split() for line in page.splitlines() if line.startswith("  ") and "0." in line][1:]
    assert len(rows) == 30 and rows[0][0] == str(best)
    assert "\n5 more rows are left out; these 30 have the smallest values.\n" in page
    value, rate = rows[0][4], rows[0][1]
    wanted = f"Smallest loss: {value} at run={best}, rate={rate}, window=2, seed=0; one run each says nothing"
    assert wanted in page and float(value) == pytest.approx(abs(float(rate) - 0.1), abs=1e-5)
    assert page.count("not finite") == 1  # in the first line: such runs come last, and are left out


ROWS = [
    (
        grid(rate=[0.01, 0.1], window=[2, 4]),
        ["loss (last entry, step 2): one run each", "  0.1   2       0.01", "  0.1   4       0.025"],
        "Smallest loss: 0.01 at rate=0.1, window=2; one run each says nothing of the spread between runs.",
    ),
    (
        grid(rate=[0.01, 0.1], window=2, width=[8, 9, 10], depth=[1, 2]),
        [
            "loss (last entry, step 2): median and quartiles over depth",
            "  0.1   8      0.01    0.01 to 0.01  2",
        ],
        "Fewer than 4 runs in each row: quartiles of so few say little.",
    ),
    (
        grid(window=4, seed=[1, 2, 3]),
        ["loss (last entry, step 2): median and quartiles over seed", "  4       0.035   0.03 to 0.04  3"],
        None,
    ),
    (
        grid(rate=[-0.3, 0.4], window=2, seed=[0, 6, 7, 8]),
        ["  -0.3  2       0.465   0.445 to 0.4725  4", "Smallest median: 0.465 at rate=-0.3, window=2."],
        "Not compared, with fewer than 4 finished and finite runs: rate=0.4, window=2.",
    ),
    (
        grid(rate=np.arange(1, 41) / 100, window=2, seed=range(4)),
        ["  0.1   2       0.015", "10 more rows are left out; these 30 have the smallest values."],
        "Not compared, with fewer than 4 finished and finite runs: rate=0.31, window=2 | rate=0.32, window=2 | "
        "rate=0.33, window=2 | rate=0.34, window=2 and 6 more.",
    ),
]


@pytest.mark.more("test_the_tables_of_a_grid")
@pytest.mark.parametrize(("points", "lines", "last"), ROWS)
def test_the_rows_of_other_grids(points, lines, last, tmp_path, capsys):
    """Without repeats, with few of them, with nothing else, with more rows than are printed."""
    asked(tmp_path / "other", points, "window")
    page = shown(capsys, tmp_path / "other", "--variable", "loss", "--out", tmp_path / "out").splitlines()
    assert [line for line in lines if not any(of.startswith(line) for of in page)] == []
    assert page[-1] == last or (last is None and "Smallest" not in "".join(page))


def test_a_store_that_is_being_written_is_read(tmp_path, capsys, monkeypatch):
    """From its first moment on: nothing yet, then what is finished so far."""
    path, real, seen = tmp_path / "running", programs.Program.start, []

    def call(self, *arguments):
        status = cli.main(["results", str(path), "--out", str(tmp_path / f"out-{len(seen)}")])
        seen.append((status, capsys.readouterr()))
        return real(self, *arguments)

    monkeypatch.setattr(programs.Program, "start", call)
    asked(path, grid(rate=[0.1, 0.2], window=2, seed=range(4)), width=4, chunk=4)
    (status, first), (second_status, second) = seen[0], seen[-1]
    assert status == 2 and first.err.count("\n") == 1 and "holds no finished run of 8 yet" in first.err
    assert second_status == 0 and "8 runs, 4 finished so far, all finite" in second.out
    assert "not finite" not in second.out
    assert re.search(r"\n  0.1 +2 +0.015 .* 4\n  0.2 +2 +not finished +0 of 4\n", second.out)
    assert [entry.name for entry in sorted(tmp_path.glob("out*"))] == [f"out-{len(seen) - 1}"]
    rows = list(csv.DictReader((tmp_path / f"out-{len(seen) - 1}" / "results.csv").open()))
    assert [row["updates"] for row in rows] == ["3"] * 4 + [""] * 4
    assert [row["finished"] for row in rows] == ["True"] * 4 + ["False"] * 4


@pytest.mark.more("test_a_store_that_is_being_written_is_read")
def test_another_process_reads_what_is_being_written(tmp_path, monkeypatch):
    path, real, seen = tmp_path / "running", programs.Program.start, []

    def call(self, *arguments):
        command = [sys.executable, "-m", "jbptt", "results", str(path)]
        seen.append(subprocess.run(command, capture_output=True, text=True, timeout=300, check=False))
        return real(self, *arguments)

    monkeypatch.setattr(programs.Program, "start", call)
    asked(path, grid(rate=0.1, window=2, seed=range(4)), width=2, chunk=2)
    assert (seen[0].returncode, seen[-1].returncode) == (2, 0), seen
    assert "2 finished so far" in seen[-1].stdout


def test_damage_is_said_beside_what_is_left(store, tmp_path, capsys):
    path = tmp_path / "damaged"
    asked(path, grid(rate=0.1, window=2, seed=range(4)), width=2, chunk=2)
    for file in sorted((path / "chunks").iterdir(), key=lambda file: file.stat().st_mtime_ns)[-2:]:
        file.write_bytes(b"")
    assert cli.main(["results", str(path)]) == 0
    page = capsys.readouterr()
    assert page.err.startswith(f"jbptt: store {path}: runs 2 to 3 of window=2 are damaged (")
    assert page.err.count("\n") == 1 and "4 runs, 2 finished so far" in page.out
    for folder, words in {
        "chunks": r"runs 0 to 1 of window=2 are damaged \(.*\), and none of the 4 is left; call sweep again",
        "snapshots": r"store \S+ cannot be read: \w.*; name another",
    }.items():
        for file in (path / folder).iterdir():
            file.write_bytes(b"")
        assert cli.main(["results", str(path)]) == 2
        page = capsys.readouterr()
        assert page.out == "" and page.err.count("\n") == 1 and re.search(words, page.err), page.err


WRONG = [
    (["absent"], "store absent is no folder; name that of a sweep"),
    (["taken"], "store taken is no folder"),
    (["other"], "store other is no Icechunk repository"),
    (["STORE", "--variable=lost"], "variable must be one of loss, score, updates, got 'lost'"),
    (["STORE", "--variable=matrix"], "variable matrix cannot be shown: it has the axes matrix_0 (2), matrix_1 (2)"),
    (["STORE", "--x=rates"], "x must be one of rate, window, seed, step, got 'rates'"),
    (["STORE", "--variable=score", "--x=step"], "x must be one of rate, window, seed, got 'step'"),
    (["STORE", "--out=taken"], "out must be a folder, got the file"),
    (["STORE", "--out=STORE"], "out must not lie in the store"),
    (["STORE", "--varable", "loss"], "perhaps you meant --variable"),
    ([], "jbptt results --help lists every option"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG)
def test_a_wrong_call_is_one_line_and_status_2(arguments, words, store, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("")
    (tmp_path / "other").mkdir()
    before = sorted(path.name for path in store.iterdir())
    assert cli.main(["results", *(one.replace("STORE", str(store)) for one in arguments)]) == 2
    seen = capsys.readouterr()
    assert seen.out == "" and seen.err.startswith("jbptt: error: ") and seen.err.count("\n") == 1
    assert words in seen.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "taken"]
    assert sorted(path.name for path in store.iterdir()) == before and list((tmp_path / "other").iterdir()) == []
