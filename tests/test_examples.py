"""Every script of examples/ runs in its short form: it prints a diagnosis and a decision and draws its picture."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from problems import usual

FOLDER = Path(__file__).parent.parent / "examples"
SCRIPTS = {path.stem: path for path in sorted(FOLDER.glob("*.py"))}
NEEDS = {"nnx_characters": ("flax",), "equinox_series": ("equinox",), "haiku_lstm": ("haiku",)}


def load(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS[name])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", usual(["online_stream"], SCRIPTS))
def test_short_form(name, tmp_path, capsys):
    """In single precision, as its users run it."""
    for package in ("matplotlib", *NEEDS.get(name, ())):
        pytest.importorskip(package)
    picture = tmp_path / f"{name}.svg"
    with jax.enable_x64(False):
        module = load(name)
        module.main(picture, **module.SHORT)
    printed = capsys.readouterr().out
    for words in ("Gradient over", "half-life", "full BPTT", "decision: ", f"picture: {picture}"):
        assert words in printed
    assert "nan" not in printed.lower()
    if name == "diagonal_ssm":
        lines = printed.splitlines()[1:4]
        exact, measured = np.array([line.split() for line in lines], float)[:, 1:].T
        np.testing.assert_allclose(measured, exact, rtol=0.05)
    if name == "online_stream":
        rtrl, blocks = (float(line.split("loss ")[1].split()[0]) for line in printed.splitlines()[-5:-3])
        assert rtrl < 0.01 < 0.1 < blocks
    assert picture.read_text().startswith("<?xml")


SIZES = {
    "diagonal_ssm": {"num_modes": 4, "num_steps": 40},
    "rate_network": {"num_units": 6, "num_steps": 60},
    "haiku_lstm": {"hidden_size": 4},
    "nnx_characters": {"hidden_size": 4},
    "equinox_series": {"hidden_size": 4},
    "online_stream": {"delay": 20},
}


@pytest.mark.more("test_short_form")
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_commands_take_its_problem(name, tmp_path, capsys, monkeypatch):
    """`jbptt compare` on a small one: every way learns, from seeds that differ."""
    for package in ("tyro", "icechunk", "matplotlib", *NEEDS.get(name, ())):
        pytest.importorskip(package)
    from jbptt.report import cli

    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(
        f"import sys\nsys.path.insert(0, {str(FOLDER)!r})\nfrom {name} import problem\n"
        f"def small():\n    return problem(**{SIZES[name]!r}) | {{'windows': (3,), 'sliding': (), 'keep_probs': ()}}\n"
    )
    options = ["--num-seeds=2", "--num-updates=20", "--learning-rates=0.01", "--num-samples=2", "--out=found"]
    with jax.enable_x64(False):
        assert cli.main(["compare", "small.py:small", *options]) == 0
    assert "beside full BPTT" in capsys.readouterr().out
    learning = json.loads((tmp_path / "found" / "comparison.json").read_text())["learning"]
    assert learning["seeds_differ_in"] == "start and data"
    starts = np.array(learning["curves"]["test"][0])[0, :, 0]
    assert np.isfinite(starts).all() and starts[0] != starts[1]


@pytest.mark.parametrize("name", SCRIPTS)
def test_says_how_to_run_it(name):
    """By a docstring that asks a question first and names the script, its picture and `--short`."""
    source = SCRIPTS[name].read_text()
    words = source.split('"""')[1]
    assert "?" in words.split("\n\n")[0]
    assert f"python examples/{name}.py [--out {name}.svg] [--short]" in words
    assert f"jbptt report examples/{name}.py:problem" in words
    assert len(source.splitlines()) <= 160
