"""One example of a batch: its carry as a vector, and what a step of it depends on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbptt.arrays import inexact_leaves, real_leaves, real_vector, split_inexact, widened_dtype
from jbptt.engine import chosen, replaced
from jbptt.problem import Problem
from jbptt.types import Carry, PyTree


def is_own(leaf: Any, batch_shape: tuple[int, ...]) -> bool:
    """Whether a leaf holds something for each example."""
    return jnp.shape(leaf)[: len(batch_shape)] == batch_shape


def for_each(function: Callable, batch_shape: tuple[int, ...], *trees: PyTree) -> Any:
    """`function(*trees)` example by example, under vmap.

    Leaves that begin with the batch shape are divided, the others whole.
    """
    axes = jax.tree.map(lambda leaf: 0 if is_own(leaf, batch_shape) else None, trees)
    for _ in batch_shape:
        function = jax.vmap(function, in_axes=axes)
    return function(*trees)


def alone(tree: PyTree, own: PyTree, ndim: int) -> PyTree:
    """A single example's leaves as a batch of one."""

    def one(leaf, is_own):
        return jnp.reshape(leaf, (1,) * ndim + jnp.shape(leaf)) if is_own else leaf

    return jax.tree.map(one, tree, own)


def split_read(problem: Problem, carry: Carry) -> tuple[list[jax.Array], Callable]:
    """The inexact leaves of a carry that a later loss reads, and the way back to the whole.

    What no loss reads has no influence, as it has no cotangent: a derivative there that is not
    finite would meet a zero (`engine.Paths`).
    """
    leaves, rebuild = split_inexact(carry)
    is_read = problem.live.carries
    return chosen(leaves, is_read), lambda parts: rebuild(replaced(leaves, is_read, parts))


class Advance(NamedTuple):
    """A step of one example between vectors.

    The carry of a vector is what `split_read` leaves of it.

    Attributes:
      function: `(reals, h) -> h'`, from the real leaves of the parameters and the carry received.
      reals: those leaves.
      h: the carry received, `[n]`.
      mask: whether it is a step at all, and no padding; None: it is.
    """

    function: Callable
    reals: list[jax.Array]
    h: jax.Array
    mask: jax.Array | None

    def pullback(self) -> tuple[jax.Array, Callable]:
        """The carry emitted, and `h'_bar -> (cotangents of the reals, of h)`."""
        return jax.vjp(self.function, self.reals, self.h)


def advances(problem: Problem) -> Callable:
    """`(carry, inputs) -> Advance`, from one example's leaves."""
    shape, ndim = problem.batch_shape, len(problem.batch_shape)
    own = jax.tree.map(lambda leaf: is_own(leaf, shape), (problem.carry, _first_inputs(problem)))

    def advance_of(carry: Carry, inputs: PyTree) -> Advance:
        params, rebuild_params = split_inexact(problem.params)
        reals, join = real_leaves(params)
        leaves, rebuild_carry = split_read(problem, carry)
        h, of_vector = real_vector(leaves)

        def function(reals, h):
            given = alone((rebuild_carry(of_vector(h)), inputs), own, ndim)
            emitted, _ = problem.parts.core(rebuild_params(join(reals)), *given)
            return real_vector(split_read(problem, emitted)[0])[0]

        return Advance(function, reals, h, inputs[1])

    return advance_of


def _first_inputs(problem: Problem) -> PyTree:
    """The inputs of one step, as shapes."""
    return jax.eval_shape(lambda tree: jax.tree.map(lambda a: a[0], tree), problem.inputs)


def sample(problem: Problem) -> tuple[Carry, PyTree]:
    """One example's carry and inputs of one step, as shapes."""
    shape = problem.batch_shape

    def first(leaf):
        return leaf[(0,) * len(shape)] if is_own(leaf, shape) else leaf

    given = problem.carry, _first_inputs(problem)
    return jax.eval_shape(lambda tree: jax.tree.map(first, tree), given)


def carry_size(problem: Problem) -> int:
    """n, the real numbers in what losses read of one example's carry."""
    leaves = chosen(inexact_leaves(sample(problem)[0]), problem.live.carries)
    return sum(leaf.size * (2 if jnp.iscomplexobj(leaf) else 1) for leaf in leaves)


def influence_dtype(problem: Problem) -> Any:
    """Of influences: real, float32 at least."""
    dtypes = [jnp.finfo(leaf.dtype).dtype for leaf in inexact_leaves(problem.carry)]
    return widened_dtype(*dtypes)
