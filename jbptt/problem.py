"""What every estimator and analysis is asked about: a step and its loss on one batch."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbptt import engine, slips, validation
from jbptt.batch_axes import OneStep, first_step
from jbptt.cells import split_readout
from jbptt.engine import Paths, paths
from jbptt.executables import run
from jbptt.losses import batch_steps, loss_weights, where_counted
from jbptt.recurrence import held_core, trajectory
from jbptt.starts import Entered, entered, start_of
from jbptt.types import Batch, Carry, Loss, Params, PyTree, Step


class Parts(NamedTuple):
    """A step and its loss as the engine runs them, the mask inside what may be vmapped.

    Attributes:
      core: `(params, carry, (x, mask)) -> (carry, outputs)`, which holds the carry where the mask
        is False.
      readout: `(params, outputs) -> y`.
      loss: `(y, target, counted) -> (losses, aux)`, as `where_counted` makes it.
    """

    core: Step
    readout: Callable
    loss: Callable


def parts_of(step: Step, loss: Loss) -> Parts:
    """The parts of a user's step and loss."""
    return Parts(held_core(step), split_readout(step)[1], where_counted(loss))


@dataclass(frozen=True)
class Problem:
    """A step and its loss on one batch.

    Attributes:
      step, loss: the user's functions.
      params: the parameters.
      carry: arrays, what enters step 0.
      batch: the batch.
      gates: on what flows back out of each step, `[T]` or `[T, *batch]`; None: all one.
      batch_shape: the shape of a step's losses.
      parts: step and loss as the engine runs them.
      live: which leaves of a step have cotangents.
    """

    step: Step
    loss: Loss
    params: Params
    carry: Carry
    batch: Batch
    gates: jax.Array | None
    batch_shape: tuple[int, ...]
    parts: Parts
    live: Paths

    @property
    def num_steps(self) -> int:
        """T."""
        return batch_steps(self.batch)

    @property
    def inputs(self) -> PyTree:
        """What the core takes beside parameters and carry, leaves `[T, ...]`."""
        return self.batch.xs, self.batch.mask

    @property
    def without_losses(self) -> "Problem":
        """The same recurrence, of whose outputs nothing is read."""
        return replace(self, live=self.live._replace(outputs=(False,) * len(self.live.outputs)))

    def on(self, carry: Carry, batch: Batch, gates: jax.Array | None = None) -> "Problem":
        """The same on other steps, entered by another carry."""
        return replace(self, carry=carry, batch=batch, gates=gates)

    def gated_by(self, gates: Any) -> "Problem":
        """The same with these gates, which are checked."""
        one = first_step(self.step, self.loss, self.params, self.carry, self.batch)
        validation.check_gates(gates, self.num_steps, self.batch_shape, self.carry, one)
        return replace(self, gates=jnp.asarray(gates))

    def trajectory(self) -> tuple[Carry, Carry, PyTree]:
        """The last carry; the carries that enter the steps, and the core's outputs, `[T, ...]`."""
        # No mask: the core holds by itself, and reads it among its inputs.
        last, (carries, outputs) = trajectory(
            self.parts.core, self.params, self.carry, self.inputs, None, self.num_steps
        )
        return last, carries, outputs

    def pullback(self, carry: Carry, inputs: PyTree) -> Callable:
        """The way back of `engine.pullback`, through one step at its own carry and inputs."""
        return engine.pullback(self.parts.core, self.params, carry, inputs, self.live)[1]

    def parallel_pullback(self, carries: Carry, inputs: PyTree, num_steps: int) -> Callable:
        """The way back of `engine.parallel_pullback`, through many steps, `[num_steps, ...]`."""
        return engine.parallel_pullback(
            self.parts.core, self.params, carries, inputs, num_steps, self.live
        )[1]

    def loss_weights(self) -> jax.Array:
        """`mask · weights`, `[T, *batch]`."""
        return loss_weights(self.batch, jnp.zeros((self.num_steps, *self.batch_shape)))


class Checked(NamedTuple):
    """What the border knows of a problem from shapes alone.

    Attributes:
      num_steps: T.
      batch_shape: the shape of a step's losses.
      one: a step on shapes.
      live: which leaves of a step have cotangents.
    """

    num_steps: int
    batch_shape: tuple[int, ...]
    one: OneStep
    live: Paths


def check_problem(
    step: Step,
    loss: Loss,
    params: Params,
    carry: Any,
    batch: Batch,
    gates: Any = None,
    *,
    per_example: str = "",
) -> Checked:
    """Checks all that an estimator or an analysis needs to hold, before anything is compiled.

    Args:
      step, loss, params, batch, gates: the user's; arrays or shapes.
      carry: the carry, or a function of the parameters that gives it.
      per_example: why every carry leaf must begin with the batch shape; "" if it need not.

    Raises:
      ValueError: names what is wrong, and the remedy.
    """
    num_steps, batch_shape, one = validation.check_shapes(step, loss, params, carry, batch, gates)
    if per_example:
        validation.check_carry_batch(one.carry, batch_shape, per_example, one=one)
    live = _paths(parts_of(step, loss), one, batch.mask)
    slips.warn_of_missing_path(live, params, one.carry, carry)
    return Checked(num_steps, batch_shape, one, live)


def _paths(parts: Parts, one: OneStep, mask: Any) -> Paths:
    """Which leaves of a step have cotangents, from its derivative on shapes."""

    def loss(y, target):
        return parts.loss(y, target, None)[0]

    mask = None if mask is None else jax.eval_shape(lambda mask: jnp.asarray(mask)[0], mask)
    return paths(parts.core, parts.readout, loss, one.params, one.carry, (one.x, mask), one.target)


def problem_of(
    step: Step,
    loss: Loss,
    params: Params,
    carry: Any,
    batch: Batch,
    gates: Any = None,
    *,
    per_example: str = "",
) -> Problem:
    """The checked problem, for `answer`; a carry that is a function is evaluated.

    The arguments are those of `check_problem`.
    """
    checked = check_problem(step, loss, params, carry, batch, gates, per_example=per_example)
    start, parts = start_of(carry, params), parts_of(step, loss)
    # Nothing is turned into arrays here: outside of jit that alone would compile a program for each
    # shape.
    return Problem(
        step, loss, params, start, batch, gates, checked.batch_shape, parts, checked.live
    )


def entered_problem(
    step: Step, loss: Loss, params: Params, carry: Any, batch: Batch, *, per_example: str = ""
) -> tuple[Problem, Entered]:
    """The checked problem, and the carry that enters, with its way back to the parameters."""
    checked = check_problem(step, loss, params, carry, batch, per_example=per_example)
    start = entered(carry, params)
    return trusted_problem(
        step, loss, params, start.carry, batch, None, checked.batch_shape, checked.live
    ), start


def trusted_problem(
    step: Step,
    loss: Loss,
    params: Params,
    carry: Carry,
    batch: Batch,
    gates: Any,
    batch_shape: tuple[int, ...],
    live: Paths | None = None,
) -> Problem:
    """A problem that has passed the border.

    Args:
      step, loss, params, batch, gates: as in `check_problem`.
      carry: arrays.
      batch_shape: what the border found.
      live: the same; None: found anew.
    """
    batch, gates = jax.tree.map(jnp.asarray, (batch, gates))
    parts = parts_of(step, loss)
    if live is None:
        live = _paths(parts, first_step(step, loss, params, carry, batch), batch.mask)
    return Problem(step, loss, params, carry, batch, gates, batch_shape, parts, live)


def answer(question: Callable, problem: Problem, *settings: Any, given: tuple = ()) -> Any:
    """`question(problem, *settings, *given)`, compiled once for step, loss, settings and shapes.

    Args:
      question: a function of a module.
      problem: what it is asked about.
      settings: hashable, whatever the program depends on beside.
      given: further trees of arrays.
    """
    functions, data = (
        (problem.step, problem.loss),
        (problem.params, problem.carry, problem.batch, problem.gates),
    )
    static = question, problem.batch_shape, problem.live, settings
    return run(_answer, functions, static, data, given, name=question.__name__)


def _answer(step, loss, question, batch_shape, live, settings, data, given) -> Any:
    """What `answer` compiles.

    It takes the parts of the problem as arguments of their own: `run` holds functions weakly, finds
    the program by what is static, and traces the data. Of these the problem is made anew.
    """
    params, carry, batch, gates = data
    problem = trusted_problem(step, loss, params, carry, batch, gates, batch_shape, live)
    return question(problem, *settings, *given)
