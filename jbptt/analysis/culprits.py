"""Which of many numbers that are not finite, in order of computation, breaks the first outcome.

A run of the problem has places: one for each leaf that stands at its start, and some in every step.
Asked for a place k, it is done again with everything up to k made finite. The culprit is at the
first place for which the outcome is:

    k* = min {k : the outcome that is the first not finite in the run as given, is finite}
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Places(NamedTuple):
    """In which order things are made finite.

    Attributes:
      num_start: leaves that stand at the start; the first places, one each.
      num_steps: T.
      of_columns: the place within its step of every column. Columns that come out together share
        one: what made all of them not finite would not be seen in the one that is made finite
        first.
    """

    num_start: int
    num_steps: int
    of_columns: np.ndarray

    @property
    def width(self) -> int:
        """How many places a step has."""
        return int(self.of_columns[-1]) + 1

    @property
    def total(self) -> int:
        """All of them."""
        return self.num_start + self.num_steps * self.width


class Looked(NamedTuple):
    """What a run saw that is not finite: leaves, at the start and `[T, columns]`, and outcomes.

    Outcomes are in the order of computation.
    """

    start: jax.Array
    there: jax.Array
    broken: jax.Array


class Culprit(NamedTuple):
    """What was found.

    Attributes:
      outcome: the first that is not finite; 0 too if none is.
      is_place: whether some place makes it finite; else it is its own culprit.
      place: that place, or the number of places.
      step: of the place, 0 at the start.
      column: of the place, within its step; one that by itself breaks an outcome, where several
        share the place.
      given: the run as given.
    """

    outcome: jax.Array
    is_place: jax.Array
    place: jax.Array
    step: jax.Array
    column: jax.Array
    given: Looked


class State(NamedTuple):
    """The search: k* in low … high (`top`: no place makes a difference), then the column there.

    Attributes:
      begun: whether the run as given, which everything is held against, is done.
      low, high, top: of the places.
      outcome: the first that is not finite.
      given: the run as given.
      before: `there` of the last run that did not help; at the end, just before k*.
      after: `broken` of the last that did; at the end, with k* made finite.
      tried: which columns of that place were spared; column: the one that alone breaks an outcome,
        −1 if none did.
    """

    begun: jax.Array
    low: jax.Array
    high: jax.Array
    top: jax.Array
    outcome: jax.Array
    given: Looked
    before: jax.Array
    after: jax.Array
    tried: jax.Array
    column: jax.Array


def _suspects(
    places: Places, place: jax.Array, there: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The step of a place that is not at the start, its columns, and which are not finite."""
    step, within = jnp.divmod(jnp.maximum(place - places.num_start, 0), places.width)
    step = jnp.minimum(step, places.num_steps - 1)
    columns = places.of_columns == within
    return step, columns, columns & there[step] & (place >= places.num_start)


def search(look: Callable, places: Places) -> Culprit:
    """The culprit; `look(place, spared)` runs with all to `place` made finite but column `spared`.

    Halves the places, then spares the columns of the one found, one by one. All runs are the body
    of one loop, which is compiled once; where every outcome is finite it ends with the first.
    """

    def unfinished(state):
        suspects = _suspects(places, state.low, state.before)[2]
        undecided = (
            (state.low < state.top) & (jnp.sum(suspects) > 1) & jnp.any(suspects & ~state.tried)
        )
        return ~state.begun | (state.low < state.high) | (undecided & (state.column < 0))

    def body(state):
        halving = state.low < state.high
        spared = jnp.argmax(_suspects(places, state.low, state.before)[2] & ~state.tried)
        middle = (state.low + state.high) // 2
        place = jnp.where(state.begun, jnp.where(halving, middle, state.low), -1)
        looked = look(place, jnp.where(state.begun & ~halving, spared, -1))

        by_place = [
            jnp.any(looked.there[:, places.of_columns == p], axis=1) for p in range(places.width)
        ]
        flags = jnp.concatenate([looked.start, jnp.stack(by_place, axis=1).reshape(-1)])
        found = jnp.any(looked.broken)
        first, last = jnp.argmax(flags), len(flags) - jnp.argmax(flags[::-1])
        top = jnp.where(found & jnp.any(flags), last, 0)
        begun = state._replace(
            begun=jnp.array(True),
            low=jnp.minimum(first, top),
            high=top,
            top=top,
            outcome=jnp.argmax(looked.broken),
            given=looked,
            before=looked.there,
        )
        helps = ~looked.broken[state.outcome]
        halved = state._replace(
            low=jnp.where(helps, state.low, middle + 1),
            high=jnp.where(helps, middle, state.high),
            before=jnp.where(helps, state.before, looked.there),
            after=jnp.where(helps, looked.broken, state.after),
        )
        guilty = jnp.any(looked.broken & ~state.after)
        asked = state._replace(
            tried=state.tried.at[spared].set(True), column=jnp.where(guilty, spared, state.column)
        )
        later = jax.tree.map(partial(jnp.where, halving), halved, asked)
        return jax.tree.map(partial(jnp.where, state.begun), later, begun)

    seen = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(look, -1, -1))
    zero, none = jnp.zeros((), int), jnp.zeros(len(places.of_columns), bool)
    start = State(
        jnp.array(False), zero, zero, zero, zero, seen, seen.there, seen.broken, none, zero - 1
    )
    end = jax.lax.while_loop(unfinished, body, start)
    is_place = end.low < end.top
    step, columns, suspects = _suspects(places, end.low, end.before)
    first = jnp.argmax(jnp.where(jnp.any(suspects), suspects, columns))
    return Culprit(
        outcome=end.outcome,
        is_place=is_place,
        place=jnp.where(is_place, end.low, places.total),
        step=jnp.where(end.low < places.num_start, 0, step),
        column=jnp.where(end.column >= 0, end.column, first),
        given=end.given,
    )
