"""Training on the host: what `train` does, handed over every few updates."""

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jbptt.arrays import is_key, widened
from jbptt.executables import run
from jbptt.experiments.training import (
    History,
    Policy,
    check_batches,
    check_evaluation,
    check_policy,
    train,
)
from jbptt.slips import check_arrays, signature
from jbptt.types import Batch, Carry, Estimator, Params, PyTree
from jbptt.validation import check_positive_integer


class TrainingChunk(NamedTuple):
    """Some updates of `train_in_chunks`, and where they ended.

    Attributes:
      num_done: how many updates there have been, those of earlier calls included.
      params: the parameters after them.
      history: that of this chunk's updates alone.
    """

    num_done: int
    params: Params
    history: History

    @property
    def checkpoint(self) -> dict[str, Any]:
        """All that a run goes on from: a tree of arrays to save, and arguments of
        `train_in_chunks` (params, state, opt_state, num_done, stopped).

        An estimator's random key is in its state.
        """
        return {
            "params": self.params,
            "state": self.history.state,
            "opt_state": self.history.opt_state,
            "num_done": np.asarray(self.num_done),
            "stopped": self.history.stopped,
        }


def train_in_chunks(
    estimator: Estimator,
    optimizer: optax.GradientTransformation,
    params: Params,
    carry: Carry,
    batches: Batch | Iterable[Batch],
    *,
    every: int,
    key: jax.Array | None = None,
    state: Any = None,
    opt_state: optax.OptState | None = None,
    num_done: Any = 0,
    stopped: Any = False,
    eval_fn: Callable[[Params, Carry], PyTree] | None = None,
    eval_every: int | None = None,
    nonfinite: Policy = "propagate",
) -> Iterator[TrainingChunk]:
    """`train` as a loop on the host that yields a `TrainingChunk` after every `every` updates.

    For whatever is no pure function: a log, a checkpoint, a line of progress. To stop early, leave
    the loop. A chunk is trained when the loop asks for it. JAX computes in the background: your
    code waits only where it reads a value.

        for chunk in train_in_chunks(estimator, optimizer, params, carry, batches, every=100):
            print(chunk.num_done, chunk.history.loss.mean())

    From a saved `chunk.checkpoint`, and the batches that were still to come, a run goes on with the
    same bits as one that was never broken off (with the same `every`, on the same machine):

        train_in_chunks(estimator, optimizer, carry=None, batches=rest, every=100, **checkpoint)

    One program is compiled for all chunks, one more for a last chunk that is shorter, one for a
    first that begins with a learned start. A later call with the same function objects (estimator,
    optimizer, eval_fn) and shapes compiles nothing. Of NumPy arrays and iterators the batches of
    one chunk are on the device; JAX arrays stay there as a whole.

    Args:
      estimator, optimizer, params, key, state, opt_state, stopped, nonfinite: as in `train`.
      carry: as in `train`; not read where `state` is given.
      batches: leaves `[N, T, ...]`, or an iterable of single batches `[T, ...]` of one shape, as
        many as come. The first is taken from it at the call.
      every: updates of a chunk. The last has what is left.
      num_done: updates of earlier calls.
      eval_fn: as in `train`.
      eval_every: as in `train`, counted from the start of the call; it must divide `every`.

    Raises:
      ValueError: at the call, what `train` raises, for one batch; an `every` that `eval_every` does
        not divide; no batch. Later: a batch of another shape.
    """
    every = check_positive_integer("every", every)
    evaluation = check_evaluation(eval_fn, eval_every)
    check_policy(nonfinite)
    num_done = check_positive_integer("num_done", num_done, smallest=0)
    if evaluation and every % evaluation:
        raise ValueError(
            f"every must be a multiple of eval_every, got every={every} and "
            f"eval_every={eval_every}; evaluations are counted within a chunk"
        )
    first, pieces = (
        _cut(batches, every) if isinstance(batches, Batch) else _collected(batches, every)
    )
    # A learned start is one of the functions that a program is found by, so the first chunk makes
    # its state anew.
    starts = state is None and callable(carry)
    if state is not None:
        jax.eval_shape(estimator.update, params, state, first)
    else:
        state = estimator.init(params, carry, first, key=key)
    if opt_state is None:
        opt_state = optimizer.init(jax.tree.map(widened, params))  # as wide as the gradients
    running = {
        "params": params,
        "opt_state": opt_state,
        "num_done": np.asarray(num_done),
        "stopped": np.asarray(stopped),
        "state": None if starts else state,
        "key": key if starts else None,
    }
    functions = (
        estimator.init,
        estimator.update,
        optimizer.update,
        _nothing if eval_fn is None else eval_fn,
        carry if starts else _nothing,
    )
    return _loop(
        tuple(map(_lasting, functions)),
        (evaluation, nonfinite),
        jax.tree.map(_typed, running),
        num_done,
        pieces,
    )


def _loop(
    functions: tuple,
    settings: tuple,
    running: dict[str, Any],
    num_done: int,
    pieces: Iterator[Batch],
) -> Iterator[TrainingChunk]:
    """Trains on one piece after another; holds the functions, which their program does not."""
    for batches in pieces:
        num_done += len(jax.tree.leaves(batches)[0])
        params, history = run(train_chunk, functions, settings, running, batches)
        del batches  # before the next are read
        chunk = TrainingChunk(num_done, params, history)
        running = chunk.checkpoint | {"key": None}
        yield chunk


def train_chunk(
    init: Callable,
    update: Callable,
    update_optimizer: Callable,
    eval_fn: Callable,
    start: Callable,
    eval_every: int,
    nonfinite: Policy,
    running: dict[str, Any],
    batches: Batch,
) -> tuple[Params, History]:
    """What is compiled: `train` with its arguments as `run` hands them over."""
    unused: Any = _nothing  # states are given
    return train(
        Estimator(init, update),
        optax.GradientTransformation(unused, update_optimizer),
        carry=start,
        batches=batches,
        eval_fn=eval_fn if eval_every else None,
        eval_every=eval_every or None,
        nonfinite=nonfinite,
        **running,
    )


def _nothing(*_: Any) -> None:
    """In the place of a function that is not there."""


def _lasting(function: Callable) -> Callable:
    """A function that a program can be found by: hashable, with weak references to it.

    What is not, such as a module with arrays in it, is wrapped for this call.
    """
    try:
        hash(function)
        weakref.ref(function)
    except TypeError:
        return lambda *arguments, **named: function(*arguments, **named)
    return function


def _typed(leaf: Any) -> Any:
    """An array of the type that an update gives, so that the second chunk has the first's program.

    Python's numbers, and what is made of them alone, have a weaker one.
    """
    return leaf if is_key(leaf) else jnp.asarray(leaf, jnp.result_type(leaf))


def _cut(batches: Batch, every: int) -> tuple[Batch, Iterator[Batch]]:
    """The shapes of one of the batches `[N, T, ...]`, and pieces of `every` of them."""
    number = check_batches(batches)
    first = jax.eval_shape(lambda batches: jax.tree.map(lambda a: a[0], batches), batches)

    def piece(start):
        length = min(every, number - start)

        def cut(leaf):
            if isinstance(leaf, np.ndarray):
                return leaf[start : start + length]
            return jax.lax.dynamic_slice_in_dim(leaf, start, length)

        return batches if length == number else jax.tree.map(cut, batches)

    return first, map(piece, range(0, number, every))


def _collected(batches: Any, every: int) -> tuple[Batch, Iterator[Batch]]:
    """The first of the single batches, and pieces of `every` of them, stacked when asked for."""
    if not isinstance(batches, Iterable):
        raise ValueError(
            f"batches must be a jbptt.Batch [N, T, ...] or an iterable of batches [T, ...], got "
            f"{type(batches).__name__}; write Batch(xs, targets)"
        )
    source = iter(batches)
    first = next(source, None)
    if first is None:
        raise ValueError("batches must hold at least one batch, got none; is the iterator used up?")
    _check_single(first, first, 0)
    like = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(np.shape(a), jax.dtypes.result_type(a)), first
    )
    numbered = enumerate(itertools.chain([first], source))

    def next_piece():
        piece = []
        for number, batch in itertools.islice(numbered, every):
            _check_single(batch, like, number)
            piece.append(batch)
        return jax.tree.map(_stacked, *piece) if piece else None

    return like, iter(next_piece, None)


def _check_single(batch: Any, like: Batch, number: int) -> None:
    """A ValueError unless it is a batch of the first one's shapes."""
    if not isinstance(batch, Batch):
        raise ValueError(
            f"batches must be a jbptt.Batch [N, T, ...] or an iterable of batches [T, ...], got an "
            f"iterable with a {type(batch).__name__}; write Batch(xs, targets)"
        )
    check_arrays(f"batches[{number}]", batch)
    found, wanted = (jax.tree.map(signature, one) for one in (batch, like))
    if found != wanted:
        raise ValueError(
            f"batches must have one shape, got {found} as batches[{number}] and {wanted} as "
            "batches[0]; pad them, and say by mask what counts"
        )


def _stacked(*leaves: Any) -> Any:
    """On the host where the leaves are there: one transfer instead of many."""
    on_device = any(isinstance(leaf, jax.Array) for leaf in leaves)
    return jnp.stack(leaves) if on_device else np.stack(leaves)
