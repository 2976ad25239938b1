"""The text reader and the command line on whatever comes: a text, one clear line, or nothing at all."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jbptt.experiments import tasks

for module in ("tyro", "rich", "matplotlib", "jinja2"):
    pytest.importorskip(module)

from jbptt.report import cli  # noqa: E402
from jbptt.report.commands import report as study  # noqa: E402

few = settings(max_examples=60, deadline=None, derandomize=True, database=None)
EVIL = "<script>alert('x')</script>"


@few
@given(st.binary(max_size=400))
@example(b"\xff\xfe\x00a")
@example(b"\xed\xa0\x80 a lone surrogate")
@example("\ufeffa byte order mark".encode())
@example(b"\xf4\x90\x80\x80 beyond the last code point")
def test_any_bytes_are_a_text_or_a_clear_error(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "some file – äöü"
        path.write_bytes(content)
        try:
            text = tasks.read_text(path)
        except ValueError as error:
            assert str(error).startswith("text: ") and "\n" not in str(error)
        else:
            assert text.strip() and "\0" not in text and text == content.decode("utf-8-sig")
        assert [found.name for found in Path(folder).iterdir()] == [path.name]


@few
@given(st.text(max_size=300), st.integers(-1, 9), st.integers(-1, 4))
@example(EVIL * 20, 5, 2)
def test_any_text_is_cut_into_streams_or_refused(text, num_steps, batch_size):
    try:
        found = tasks.text(text, num_steps=num_steps, batch_size=batch_size)
    except ValueError as error:
        assert any(word in str(error) for word in ("text", "num_steps", "batch_size"))
        return
    size = len(found.vocabulary)
    for batch in (found.train, found.heldout):
        for tokens in (batch.xs, batch.targets):
            assert tokens.shape[1:] == (num_steps, batch_size) and tokens.shape[0] >= 1
            assert np.min(tokens) >= 0 and np.max(tokens) < size


@pytest.mark.more("test_any_text_is_cut_into_streams_or_refused")
def test_ten_megabytes_on_one_line():
    found = tasks.text("abcdefghij" * 2**20, num_steps=128, batch_size=16)
    assert found.train.xs.size + found.heldout.xs.size > 0.99 * 10 * 2**20 and len(found.vocabulary) == 10


OPTIONS = ["--text", "--cell", "--hidden-size", "--num-steps", "--batch-size", "--windows", "--keep-prob", "--seed"]
WORDS = st.one_of(
    st.sampled_from([*OPTIONS, "--quick", "--cores", "report", "-1", "0", "nan", "1e400", "rnn", EVIL]),
    st.text(max_size=12),
)


@settings(few, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(WORDS, max_size=6))
@example(["--windows", "4294967296"])
@example(["--num-steps", "9" * 400])
@example(["--text", "\0"])
@example(["--keep-prob", "inf"])
def test_any_command_line_ends_with_a_status_and_writes_nothing(monkeypatch, capsys, words):
    """The study itself is replaced: whatever is accepted would have run."""

    class Accepted(Exception):
        pass

    def stop(*arguments):
        raise Accepted

    monkeypatch.setattr(study, "run_study", stop)
    monkeypatch.setattr(study, "_use_cores", lambda cores: None)
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.chdir(folder)
        try:
            status = cli.main(["report", "--out", "out", *words])
        except Accepted:
            status = 0
        shown = capsys.readouterr()
        assert status in (0, 2) and not list(Path(folder).iterdir())
        if status == 2:
            assert shown.err.startswith("jbptt: error: ") and shown.err.count("\n") == 1
        monkeypatch.chdir("/")
