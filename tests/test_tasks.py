"""Tasks: texts that cannot be read, streams that lose nothing, and what copy and adding ask for."""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import assert_close, assert_same_bits

from jbptt import Batch, cells, full_bptt, tasks
from jbptt.experiments.tasks import MAX_VOCABULARY, UNKNOWN, read_text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read"),
        (b"", "is empty"),
        (b" \n\t ", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"words\0more words", "binary"),
        (b"caf\xe9 au lait", r"is not UTF-8 \(byte 3\)"),
        ("wide".encode("utf-16"), r"is not UTF-8 \(byte 0\)"),
    ],
)
def test_texts_that_cannot_be_read(tmp_path, content, words):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        read_text(path)
    assert "text.txt" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", [".", "no\0name"])
def test_a_folder_and_an_impossible_name(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="cannot read"):
        read_text(path)


def test_text_is_read_as_it_stands(tmp_path):
    (tmp_path / "text.txt").write_bytes("\ufeffnaïve — 文\n".encode())
    assert read_text(tmp_path / "text.txt") == read_text(str(tmp_path / "text.txt")) == "naïve — 文\n"


def test_the_text_inside_python_is_long_english():
    text = read_text()
    assert len(text) > 100_000 and "the" in text.split() and text == read_text()


def spell(indices, vocabulary):
    return "".join(vocabulary[i] for i in np.asarray(indices))


@pytest.mark.parametrize(("num_steps", "batch_size", "heldout"), [(5, 3, 0.3), (1, 1, 0.5), (7, 2, 0.2), (16, 4, 0.4)])
def test_streams_lose_nothing_but_the_last_partial_batch(num_steps, batch_size, heldout):
    source = "".join(chr(ord("a") + i * i % 23) for i in range(331))
    data = tasks.text(source, num_steps=num_steps, batch_size=batch_size, heldout_fraction=heldout)
    cut = len(source) - int(len(source) * heldout)
    for batches, part in ((data.train, source[:cut]), (data.heldout, source[cut:])):
        num_batches = (len(part) - 1) // (num_steps * batch_size)
        assert batches.xs.shape == batches.targets.shape == (num_batches, num_steps, batch_size)
        assert batches.xs.dtype == batches.targets.dtype == jnp.int32
        row = num_batches * num_steps
        for b in range(batch_size):  # row b of all batches, one after the other, is one stretch of the text
            assert spell(batches.xs[:, :, b].ravel(), data.vocabulary) == part[b * row : (b + 1) * row]
            assert spell(batches.targets[:, :, b].ravel(), data.vocabulary) == part[b * row + 1 : (b + 1) * row + 1]
        assert len(part) - 1 - batch_size * row < num_steps * batch_size


def test_vocabulary_is_by_frequency_then_by_character():
    data = tasks.text("bbbaaac" * 9, num_steps=2, batch_size=1)
    assert data.vocabulary == ("a", "b", "c")


@pytest.mark.parametrize("kinds", [MAX_VOCABULARY, MAX_VOCABULARY + 1, MAX_VOCABULARY + 40])
def test_rare_characters_share_one_symbol(kinds):
    characters = [chr(0x4E00 + i) for i in range(kinds)]
    source = "".join(c * (3 if i < MAX_VOCABULARY - 1 else 1) for i, c in enumerate(characters))
    data = tasks.text(source, num_steps=2, batch_size=2)
    assert len(data.vocabulary) == MAX_VOCABULARY
    capped = kinds > MAX_VOCABULARY
    assert data.vocabulary[:-1] == tuple(characters[: MAX_VOCABULARY - 1])
    assert data.vocabulary[-1] == (UNKNOWN if capped else characters[-1])
    read = spell(data.train.xs[:, :, 0].ravel(), data.vocabulary)
    assert read == source[: len(read)]
    rest = spell(data.heldout.xs[:, :, 1].ravel(), data.vocabulary)
    assert (set(rest) <= {UNKNOWN}) == (kinds == MAX_VOCABULARY + 40)
    assert tasks.count_symbols(source) == {
        "characters": len(source), "distinct_characters": kinds, "vocabulary": MAX_VOCABULARY,
        "folded_characters": kinds - MAX_VOCABULARY + 1 if capped else 0,
    }  # fmt: skip


def test_a_python_without_its_documentation_asks_for_a_text(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ValueError, match="name a UTF-8 text file"):
        read_text()


def test_shortest_text():
    """Both parts need T · B characters and the one that follows."""
    options = {"num_steps": 3, "batch_size": 2, "heldout_fraction": 0.5}
    assert tasks.text("abcdefg" * 2, **options).heldout.xs.shape == (1, 3, 2)
    with pytest.raises(ValueError, match=r"too short: 6 held-out characters of 13, wanted at least .* 7"):
        tasks.text("a" * 13, **options)
    with pytest.raises(ValueError, match="too short: 2 training characters"):
        tasks.text("a" * 20, **options | {"heldout_fraction": 0.9})
    with pytest.raises(ValueError, match="too short: 0 held-out"):
        tasks.text("a" * 9, **options | {"heldout_fraction": 0.1})
    with pytest.raises(ValueError, match="too short: 0 training characters of 0"):
        tasks.text("", **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_steps": 0}, "num_steps must be an integer >= 1, got 0"),
        ({"num_steps": 2.5}, "num_steps"),
        ({"batch_size": -1}, "batch_size must be an integer >= 1, got -1"),
        *(({"heldout_fraction": f}, "heldout_fraction must lie in") for f in (0, 1, -0.1, np.nan)),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        tasks.text("abc" * 50, **{"num_steps": 2, "batch_size": 1} | options)


@pytest.mark.parametrize("task", [tasks.copy, tasks.adding, tasks.recall])
def test_bad_sizes(task):
    good = {"length": 2, "delay": 3, "batch_size": 2} if task is tasks.copy else {"num_steps": 4, "batch_size": 2}
    for name in good:
        with pytest.raises(ValueError, match=f"{name} must be an integer >= "):
            task(jax.random.key(0), **good | {name: 0})
    for task in (tasks.adding, tasks.recall):
        with pytest.raises(ValueError, match="num_steps must be an integer >= 2, got 1"):
            task(jax.random.key(0), num_steps=1, batch_size=2)


@pytest.mark.parametrize(("length", "delay"), [(1, 1), (3, 5), (4, 2)])
def test_copy(length, delay):
    batch = tasks.copy(jax.random.key(1), length=length, delay=delay, batch_size=6, num_symbols=5)
    num_steps = 2 * length + delay
    assert batch.xs.shape == (num_steps, 6, 7) and batch.targets.shape == (num_steps, 6)
    np.testing.assert_array_equal(np.sum(batch.xs, axis=-1), 1)
    shown = np.argmax(batch.xs, axis=-1)
    blank, go = 5, 6
    assert np.all(shown[:length] < 5)
    assert np.all(np.delete(shown[length:], delay - 1, axis=0) == blank)
    assert np.all(shown[length + delay - 1] == go)  # the step before the answer begins
    np.testing.assert_array_equal(batch.targets[-length:], shown[:length])
    np.testing.assert_array_equal(batch.weights, [0] * (length + delay) + [1] * length)


def test_copy_uses_every_symbol_and_a_new_key_gives_new_symbols():
    batch, other = (
        tasks.copy(jax.random.key(seed), length=40, delay=1, batch_size=2, num_symbols=3) for seed in (0, 1)
    )
    assert set(np.asarray(batch.targets[-40:]).ravel()) == {0, 1, 2}
    assert np.any(np.asarray(batch.targets) != np.asarray(other.targets))


@pytest.mark.parametrize("num_steps", [2, 5, 12])
def test_adding(num_steps):
    batch = tasks.adding(jax.random.key(2), num_steps=num_steps, batch_size=64)
    numbers, marks = np.moveaxis(np.asarray(batch.xs), -1, 0)
    assert np.all((numbers >= 0) & (numbers < 1)) and set(marks.ravel()) <= {0.0, 1.0}
    half = num_steps // 2
    np.testing.assert_array_equal(marks[:half].sum(0), 1)
    np.testing.assert_array_equal(marks[half:].sum(0), 1)
    assert np.all(marks.any(axis=1))  # every step is marked in one of 64 examples
    np.testing.assert_allclose(batch.targets[-1, :, 0], np.sum(numbers * marks, axis=0), rtol=1e-15)
    assert batch.targets.shape == (num_steps, 64, 1)
    np.testing.assert_array_equal(batch.weights, np.arange(num_steps) == num_steps - 1)


def test_recall():
    """Only the first input matters; a prediction of 0 has the loss that the docstring says."""
    batch = tasks.recall(jax.random.key(2), num_steps=5, batch_size=4000)
    xs = np.asarray(batch.xs)
    assert xs.shape == (5, 4000, 1) and xs.min() >= -1 and xs.max() < 1 and len(np.unique(xs)) == xs.size
    np.testing.assert_array_equal(batch.targets, np.broadcast_to(xs[0], xs.shape))
    np.testing.assert_array_equal(batch.weights, np.arange(5) == 4)
    of_zero = tasks.squared_error(jnp.zeros((4000, 1)), batch.targets[-1])
    assert abs(np.mean(of_zero) - 1 / 6) < 5 * np.std(of_zero) / 4000**0.5


def test_losses():
    logits, target = np.array([[1.0, 2.0, 0.5], [0.0, 0.0, 700.0]]), np.array([1, 0])
    first = np.log(np.exp(1.0) + np.exp(2.0) + np.exp(0.5)) - 2.0
    np.testing.assert_allclose(tasks.cross_entropy(jnp.asarray(logits), target), [first, 700.0], rtol=1e-14)
    np.testing.assert_allclose(tasks.squared_error(jnp.array([[3.0, 1.0]]), jnp.array([[0.0, 5.0]])), [12.5])


@pytest.mark.parametrize("readout", [False, True])
@pytest.mark.parametrize("make", [cells.rnn, cells.gru, cells.lstm])
def test_tokens_are_one_hot_inputs(make, readout):
    cell = make(4, 3)
    cell = cells.with_linear_readout(cell, 2) if readout else cell
    reads_tokens = tasks.on_tokens(cell, 4)
    params, carry = cell.init(jax.random.key(0)), cell.initial_carry((2,))
    tokens = np.array([[0, 3], [2, 1], [3, 3]])
    targets = np.random.default_rng(0).normal(size=(3, 2, 2 if readout else 3))

    @jax.jit
    def both(params):
        results = []
        for step, xs in ((cell.step, jax.nn.one_hot(tokens, 4)), (reads_tokens.step, tokens)):
            estimator, batch = full_bptt(step, tasks.squared_error), Batch(xs, targets)
            estimate, state = estimator.update(params, estimator.init(params, carry, batch), batch)
            results.append((estimate.loss, estimate.grads, state.carry))
        return results

    expected, found = both(params)
    assert_close(found, expected, rtol=1e-14)
    assert_same_bits(reads_tokens.init(jax.random.key(0)), params)


def test_batches_of_a_text_flow_into_one_another():
    """The last target of a batch is the first input of the next, row by row."""
    train = tasks.text("the quick brown fox jumps over the lazy dog " * 5, num_steps=4, batch_size=3).train
    for before, after in itertools.pairwise(range(len(train.xs))):
        np.testing.assert_array_equal(train.targets[before, -1], train.xs[after, 0])
