"""One training of a study: what `sweep` runs, with its losses on data that it did not read."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import all_leaves

from jbptt import clipping
from jbptt.experiments.training import mean_loss, train
from jbptt.learning.lessons import Lessons
from jbptt.learning.ways import GATES, Way, anew, gated
from jbptt.norms import compared_with
from jbptt.types import Batch, Estimator, Loss, Params, Step


def usual_optimizer(learning_rate: Any) -> optax.GradientTransformation:
    """Adam at a constant rate, behind clipping to a global norm of 1."""
    return optax.chain(clipping.clip_by_global_norm(1.0), optax.adam(learning_rate))


def draws_starts(params: Any) -> bool:
    """Whether it is a function of a key, and not a tree that can be called, as a module."""
    return callable(params) and all_leaves([params])


@dataclass(frozen=True)
class Trainings:
    """What all trainings of a study share.

    Attributes:
      step, loss: the user's.
      params: where to start: a tree, or a function of a key.
      carry: what enters a first step: a tree, or a function of the parameters.
      lessons: the data.
      ways: full BPTT first.
      optimizer: `learning rate -> optax transformation`.
      num_updates: a multiple of eval_every.
      eval_every: updates between two evaluations.
      key: all randomness of all seeds.
    """

    step: Step
    loss: Loss
    params: Any
    carry: Any
    lessons: Lessons
    ways: tuple[Way, ...]
    optimizer: Callable
    num_updates: int
    eval_every: int
    key: jax.Array

    def start(self, key: jax.Array) -> Params:
        """Parameters of one seed."""
        return self.params(key) if draws_starts(self.params) else self.params

    def keys(self, seed: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """For the parameters, the order of the data and the draws of the estimator."""
        start, data, draws = jax.random.split(jax.random.fold_in(self.key, seed), 3)
        return start, data, draws

    def reader(self, seed: Any, key: jax.Array) -> Callable[[Any], Batch]:
        """What a seed reads; each begins a stream at another batch, as long as there are some."""
        number = self.lessons.num_batches
        begin = None
        if number is not None:
            begin = jax.random.permutation(self.key, number)[jnp.asarray(seed) % number]
        return self.lessons.reader(key, self.num_updates, begin)

    def run(self, point: dict[str, Any], key: jax.Array) -> dict[str, Any]:
        """One training: losses before the first update and at every evaluation, and the error of
        its gradient at both ends.

        Seeds are paired: the same parameters and batches for every way and learning rate.
        """
        del key  # that of a run would not be the same for all ways
        estimator = self._estimator(point)
        start, data, draws = self.keys(point["seed"])
        params, read = self.start(start), self.reader(point["seed"], data)
        # A scan over numbers, which the estimator turns into batches, holds one batch at a time.
        numbers: Any = jnp.arange(self.num_updates)

        def init(params, carry, number, key=None):
            return estimator.init(params, carry, jax.eval_shape(read, number), key=key)

        def update(params, state, number):
            return estimator.update(params, state, read(number))

        trained, history = train(
            Estimator(init, update),
            self.optimizer(point["learning_rate"]),
            params,
            self.carry,
            numbers,
            key=draws,
            eval_fn=self.losses,
            eval_every=self.eval_every,
        )
        before = self.losses(params, self.carry)
        losses = jax.tree.map(lambda a, b: jnp.append(a, b), before, history.evals)
        errors = {
            "error_at_start": self._gradient_error(estimator, params, read(0), draws),
            "error_at_end": self._gradient_error(estimator, trained, read(0), draws),
        }
        return losses | errors

    def _estimator(self, point: dict[str, Any]) -> Estimator:
        if point["program"] == GATES:
            window, keep_prob = (
                jnp.asarray([getattr(way, name) for way in self.ways])[point["way"]]
                for name in ("window", "keep_prob")
            )
            estimator = gated(self.step, self.loss, window, keep_prob)
        else:
            (way,) = (way for way in self.ways if way.name == point["program"])
            estimator = way.estimator
        return estimator if self.lessons.stream else anew(estimator, self.carry)

    def losses(self, params: Params, carry: Any) -> dict[str, jax.Array]:
        """Mean losses on what is held out; a stream is read on from where training stands."""
        entering = carry if self.lessons.stream else self.carry
        read = partial(
            mean_loss, self.step, self.loss, params, entering, fresh=not self.lessons.stream
        )
        return {"validation": read(self.lessons.validation), "test": read(self.lessons.test)}

    def _gradient_error(
        self, estimator: Estimator, params: Params, batch: Batch, key: jax.Array
    ) -> jax.Array:
        """‖ĝ − g‖ / ‖g‖ on one batch that `carry` enters."""
        whole = gated(self.step, self.loss, jax.tree.leaves(batch)[0].shape[0], 1.0)
        exact, estimate = (
            e.update(params, e.init(params, self.carry, batch, key=key), batch)[0].grad_sum
            for e in (whole, estimator)
        )
        return compared_with(exact)(estimate)[0]
