"""The carry that enters a first step: given, or a function of the parameters (learned)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.tree_util import Partial, all_leaves

from jbptt import slips
from jbptt.arrays import split_inexact
from jbptt.types import Carry, Params


class Entered(NamedTuple):
    """The carry that enters an update.

    Attributes:
      carry: its arrays.
      pull: the gradient in the parameters, by the path through the start, of cotangents of the
        carry (a list over its inexact leaves); None where the carry was given.
    """

    carry: Carry
    pull: Callable[[list], Params] | None


def start_of(carry: Any, params: Params) -> Carry:
    """The carry, or what a function of the parameters gives, which must be a tree of arrays."""
    if not callable(carry):
        return carry
    try:
        start = carry(params)
    except Exception as error:  # whatever the user's function raises
        raise ValueError(
            "carry must be a tree of arrays, or a function of the parameters, got a function that "
            f"fails on params ({type(error).__name__}: {error}); of a function of the batch shape "
            "pass what it returns: initial_carry((16,))"
        ) from error
    slips.check_arrays("carry(params)", start)
    return start


def start_shapes(carry: Any, params: Params) -> Carry:
    """`start_of` on shapes alone; a carry that is given stays as it is."""
    return jax.eval_shape(lambda: start_of(carry, params)) if callable(carry) else carry


def kept(carry: Any) -> Any:
    """What a state holds before its first update: arrays, or the function as a leafless tree."""
    return Partial(carry) if callable(carry) and all_leaves([carry]) else carry


def entered(carry: Any, params: Params) -> Entered:
    """`start_of`, and the way back to the parameters."""
    if not callable(carry):
        return Entered(carry, None)

    def run(params):
        start = start_of(carry, params)
        return split_inexact(start)[0], start

    leaves, pull, start = jax.vjp(run, params, has_aux=True)

    def back(cotangents):
        return pull([c.astype(leaf.dtype) for c, leaf in zip(cotangents, leaves, strict=True)])[0]

    return Entered(start, back)
