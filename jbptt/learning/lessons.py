"""What a training reads: batches in an order of its own for each seed, and what is held out."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbptt import validation
from jbptt.experiments.training import check_batches
from jbptt.types import Batch

NUM_DRAWN = 16
"""Batches held out of a source that draws as many as one likes."""
SHARE = 5
"""One in so many batches is held out, two at least."""


@dataclass(frozen=True)
class Lessons:
    """The data of a study.

    Attributes:
      train: leaves `[N, T, ...]`, or a function of a key that draws a batch `[T, ...]`.
      validation: leaves `[M, T, ...]`: chooses learning rates and checkpoints.
      test: leaves `[M, T, ...]`: judges.
      stream: whether the carry goes on from batch to batch.
    """

    train: Batch | Callable
    validation: Batch
    test: Batch
    stream: bool

    @property
    def num_batches(self) -> int | None:
        """N of the training data; None where they are drawn."""
        return None if callable(self.train) else len(jax.tree.leaves(self.train)[0])

    @property
    def first(self) -> Batch:
        """One batch of the training data."""
        return self.reader(jax.random.key(0), 1, 0)(0)

    def reader(self, key: jax.Array, num_updates: int, begin: Any) -> Callable[[Any], Batch]:
        """`number of an update -> batch`, in the order of this key.

        A stream begins at batch `begin`, and again at the first after the last. Batches that are
        sequences of their own come in a random order, each once before any comes again.
        """
        if callable(self.train):
            draw = self.train
            return lambda number: draw(jax.random.fold_in(key, number))
        batches, num_batches = self.train, len(jax.tree.leaves(self.train)[0])
        if self.stream:
            return lambda number: _at(batches, (begin + number) % num_batches)
        rounds = jax.random.split(key, -(-num_updates // num_batches))
        order = jax.vmap(partial(jax.random.permutation, x=num_batches))(rounds).ravel()
        return lambda number: _at(batches, order[number])


def _at(batches: Batch, index: Any) -> Batch:
    return jax.tree.map(lambda a: a[index], batches)


def lessons_of(batches: Any, heldout: Any, stream: bool, key: jax.Array) -> Lessons:
    """The data of a study, from what the user gave.

    Args:
      batches: leaves `[N, T, ...]`, or a function of a key.
      heldout: leaves `[M, T, ...]`, of which the first half is for validation; None: a fifth of
        the batches, the last ones of a stream, else drawn; or what the function draws.
      stream: whether batch n + 1 goes on where batch n ended.
      key: draws what is held out of a function.

    Raises:
      ValueError: too few batches; shapes that do not go together; a stream from a function, or a
        function that draws the same batch for every key.
    """
    if not isinstance(stream, bool):
        raise ValueError(
            f"stream must be True or False, got {stream!r}; True where each batch goes on where "
            "the one before ended"
        )
    if callable(batches):
        if stream:
            raise ValueError(
                "stream=True needs batches in an order, got a function that draws them; pass "
                "leaves [N, T, ...], or stream=False"
            )
        drawn = jax.jit(jax.vmap(batches))(jax.random.split(key, NUM_DRAWN))
        if all(bool((leaf == leaf[:1]).all()) for leaf in jax.tree.leaves(drawn)):
            raise ValueError(
                "batches must draw another batch for another key, got the same for all; draw with "
                "jax.random from its argument"
            )
        heldout = drawn if heldout is None else heldout
        one = jax.eval_shape(batches, key)
    else:
        num_batches = check_batches(batches)
        if heldout is None:
            away = max(2, num_batches // SHARE)
            if num_batches < 2 + away:
                raise ValueError(
                    f"batches must be at least 4 where heldout is not given, got {num_batches}; "
                    "pass heldout, at least 2 batches that training does not read"
                )
            order = np.arange(num_batches)
            if not stream:  # they may be sorted
                order = np.random.default_rng(0).permutation(order)
            kept, away = np.sort(order[: num_batches - away]), np.sort(order[num_batches - away :])
            heldout, batches = (
                jax.tree.map(lambda a, rows=rows: jnp.asarray(a)[rows], batches)
                for rows in (away, kept)
            )
        one = jax.eval_shape(partial(_at, index=0), batches)
    num_heldout = _check_heldout(heldout, one)
    half = num_heldout // 2
    return Lessons(
        batches,
        jax.tree.map(lambda a: jnp.asarray(a[:half]), heldout),
        jax.tree.map(lambda a: jnp.asarray(a[half:]), heldout),
        stream,
    )


def _check_heldout(heldout: Any, one: Any) -> int:
    """The number of batches held out; a ValueError unless they are like those of training."""
    number = check_batches(heldout)
    validation.check_positive_integer("number of batches in heldout", number, smallest=2)

    def shapes(tree):
        return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]

    if jax.tree.structure(heldout) != jax.tree.structure(one) or shapes(
        jax.eval_shape(partial(_at, index=0), heldout)
    ) != shapes(one):
        raise ValueError(
            f"heldout must hold batches like those of training, {shapes(one)}, got "
            f"{shapes(jax.eval_shape(partial(_at, index=0), heldout))}; cut it to the same T and "
            "number of examples"
        )
    return number
