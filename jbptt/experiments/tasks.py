"""Data to train and analyse on: real text, and two synthetic tests of memory."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jbptt import validation
from jbptt.cells import Cell, ReadoutStep, split_readout
from jbptt.types import Batch

MAX_VOCABULARY = 128
UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class Text(NamedTuple):
    """A text cut into streams: row b of batch n + 1 goes on where row b of batch n ended.

    Attributes:
      train: `xs` and `targets` (the next character) int32 `[N, T, B]`.
      heldout: the same, from the end of the text.
      vocabulary: the characters, most frequent first. Of more than 128 the 127 most frequent stay
        themselves, and all others share U+FFFD; `count_symbols` says how many those are.
    """

    train: Batch
    heldout: Batch
    vocabulary: tuple[str, ...]


def read_text(path: str | Path | None = None) -> str:
    """A UTF-8 text file; None: the documentation of Python's language inside CPython, real English.

    Raises:
      ValueError: the file is missing, a folder, unreadable, binary or empty; None where this Python
        lacks its own.
    """
    if path is None:
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise ValueError(
                "text: this Python comes without its documentation; name a UTF-8 text file"
            ) from None

        return "\n".join(topics[name] for name in sorted(topics))
    try:
        raw = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(
            f"text: cannot read {str(path)!r} ({reason}); pass a UTF-8 text file"
        ) from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text: {str(path)!r} is not UTF-8 (byte {error.start}); convert it, or pass a text "
            "file"
        ) from None
    if "\0" in text:
        raise ValueError(
            f"text: {str(path)!r} holds NUL bytes, so it is binary; pass a UTF-8 text file"
        )
    if not text.strip():
        raise ValueError(f"text: {str(path)!r} is empty; pass a text of some thousand characters")
    return text


def text(text: str, *, num_steps: int, batch_size: int, heldout_fraction: float = 0.1) -> Text:
    """Character-level language modelling: predict the next character.

    Args:
      text: the whole text; its last `heldout_fraction` is held out.
      num_steps: T, characters per row and batch.
      batch_size: B, rows that are read side by side.
      heldout_fraction: in (0, 1).

    Raises:
      ValueError: sizes < 1; a text too short for one batch of training and one held out.
    """
    num_steps = validation.check_positive_integer("num_steps", num_steps)
    batch_size = validation.check_positive_integer("batch_size", batch_size)
    if not 0 < heldout_fraction < 1:
        raise ValueError(
            f"heldout_fraction must lie in (0, 1), got {heldout_fraction!r}; 0.1 is usual"
        )
    vocabulary = tuple(_own_symbols(text))
    if len(vocabulary) < len(set(text)):
        vocabulary += (UNKNOWN,)
    index = {character: i for i, character in enumerate(vocabulary)}
    tokens = np.array([index.get(character, len(vocabulary) - 1) for character in text], np.int32)
    cut = len(tokens) - int(len(tokens) * heldout_fraction)
    need = num_steps * batch_size + 1
    for name, part in (("training", tokens[:cut]), ("held-out", tokens[cut:])):
        if len(part) < need:
            raise ValueError(
                f"text is too short: {len(part)} {name} characters of {len(tokens)}, wanted at "
                f"least num_steps · batch_size + 1 = {need}; pass a longer text, fewer steps or a "
                "smaller batch"
            )
    train, heldout = (
        _streams(part, num_steps, batch_size) for part in (tokens[:cut], tokens[cut:])
    )
    return Text(train, heldout, vocabulary)


def count_symbols(text: str) -> dict[str, int]:
    """A text's characters: how many there are and differ, how many symbols stand for them.

    Returns:
      `characters`; `distinct_characters`; `vocabulary`, symbols that a model tells apart;
      `folded_characters`, those characters that are read as U+FFFD.
    """
    counts, own = Counter(text), _own_symbols(text)
    folded = len(text) - sum(own.values())
    return {
        "characters": len(text),
        "distinct_characters": len(counts),
        "vocabulary": len(own) + (folded > 0),
        "folded_characters": folded,
    }


def _own_symbols(text: str) -> dict[str, int]:
    """The characters that stay themselves with their counts, most frequent first."""
    ranked = sorted(Counter(text).items(), key=lambda item: (-item[1], item[0]))
    return dict(ranked if len(ranked) <= MAX_VOCABULARY else ranked[: MAX_VOCABULARY - 1])


def _streams(tokens: np.ndarray, num_steps: int, batch_size: int) -> Batch:
    num_batches = (len(tokens) - 1) // (num_steps * batch_size)
    used = num_batches * num_steps * batch_size

    def cut(a):  # [B, N, T] -> [N, T, B]
        return jnp.asarray(a.reshape(batch_size, num_batches, num_steps).transpose(1, 2, 0))

    return Batch(cut(tokens[:used]), cut(tokens[1 : used + 1]))


def copy(
    key: jax.Array, *, length: int, delay: int, batch_size: int, num_symbols: int = 8
) -> Batch:
    """Copy memory (Hochreiter & Schmidhuber, 1997): repeat `length` symbols after `delay` blanks.

    T = 2·length + delay. `xs`: one-hot `[T, B, num_symbols + 2]` (blank and go are the last two);
    targets int32 `[T, B]`; weights 1 on the last `length` steps, else 0. Raises ValueError: sizes <
    1.
    """
    for name, value in {
        "length": length,
        "batch_size": batch_size,
        "num_symbols": num_symbols,
    }.items():
        validation.check_positive_integer(name, value)
    validation.check_positive_integer("delay", delay)
    symbols = jax.random.randint(key, (length, batch_size), 0, num_symbols)
    blank, go = num_symbols, num_symbols + 1

    def fill(value, steps):
        return jnp.full((steps, batch_size), value, symbols.dtype)

    xs = jnp.concatenate([symbols, fill(blank, delay - 1), fill(go, 1), fill(blank, length)])
    targets = jnp.concatenate([fill(0, length + delay), symbols])
    weights = jnp.concatenate([jnp.zeros(length + delay), jnp.ones(length)])
    return Batch(jax.nn.one_hot(xs, num_symbols + 2), targets, weights=weights)


def adding(key: jax.Array, *, num_steps: int, batch_size: int) -> Batch:
    """The adding problem (ibid.): after the last step, the sum of two marked numbers, one per half.

    `xs` `[T, B, 2]` (number in [0, 1), marker); targets `[T, B, 1]`; weights 1 on the last step,
    else 0. Raises ValueError: num_steps < 2 or batch_size < 1.
    """
    validation.check_positive_integer("num_steps", num_steps, smallest=2)
    validation.check_positive_integer("batch_size", batch_size)
    key_numbers, key_first, key_second = jax.random.split(key, 3)
    half = num_steps // 2
    numbers = jax.random.uniform(key_numbers, (num_steps, batch_size))
    first = jax.random.randint(key_first, (batch_size,), 0, half)
    second = jax.random.randint(key_second, (batch_size,), half, num_steps)
    t = jnp.arange(num_steps)[:, None]
    marked = (t == first) | (t == second)
    total = jnp.sum(jnp.where(marked, numbers, 0), axis=0)
    targets = jnp.broadcast_to(total[None, :, None], (num_steps, batch_size, 1))
    weights = jnp.zeros(num_steps).at[-1].set(1)
    return Batch(
        jnp.stack([numbers, marked.astype(numbers.dtype)], axis=-1), targets, weights=weights
    )


def recall(key: jax.Array, *, num_steps: int, batch_size: int) -> Batch:
    """The first input, asked for after the last step: the plainest task that takes a memory.

    `xs` `[T, B, 1]`, numbers in [−1, 1), of which only the first of each example matters; targets
    `[T, B, 1]`; weights 1 on the last step, else 0. A prediction of 0 has a `squared_error` of 1/6.
    After the latching problem of Bengio, Simard & Frasconi (1994). Raises ValueError: num_steps < 2
    or batch_size < 1.
    """
    validation.check_positive_integer("num_steps", num_steps, smallest=2)
    validation.check_positive_integer("batch_size", batch_size)
    xs = jax.random.uniform(key, (num_steps, batch_size, 1), minval=-1)
    weights = jnp.zeros(num_steps).at[-1].set(1)
    return Batch(xs, jnp.broadcast_to(xs[:1], xs.shape), weights=weights)


def cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
    """`−ln p(target)` in nats, logits `[*batch, classes]`, integer targets; NaN if out of range."""
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, target)
    return jnp.where((target >= 0) & (target < logits.shape[-1]), loss, jnp.nan)


def squared_error(y: jax.Array, target: jax.Array) -> jax.Array:
    """`½ ‖y − target‖²` over the last axis."""
    return optax.losses.l2_loss(y, target).sum(axis=-1)


def on_tokens(cell: Cell, vocabulary_size: int) -> Cell:
    """A cell of input size `vocabulary_size` that reads integer tokens `[*batch]` as one-hot.

    A token out of range becomes NaN, which shows in the loss; a vector of zeros would not.
    """
    core, readout = split_readout(cell.step)

    def step(params, carry, token):
        known = jnp.expand_dims((token >= 0) & (token < vocabulary_size), -1)
        one_hot = jax.nn.one_hot(token, vocabulary_size, dtype=params["w_x"].dtype)
        return core(params, carry, jnp.where(known, one_hot, jnp.nan))

    return cell._replace(step=ReadoutStep(step, readout))
