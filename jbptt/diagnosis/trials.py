"""Remedies tried on the user's own model: what is advised has been followed once."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbptt.arrays import is_inexact
from jbptt.problem import Problem


class Trial(NamedTuple):
    """What a diagnosis found with the recurrent matrices changed.

    Attributes:
      remedy: what was changed, `params['w_h'] × 1.57`.
      verdict, half_life, exponent: as in `Diagnosis`.
    """

    remedy: str
    verdict: str
    half_life: float
    exponent: float


def recurrent_matrices(
    problem: Problem,
    influences: list[frozenset[int]],
    factors: set[tuple[frozenset[int], frozenset[int]]],
) -> tuple[str, ...]:
    """Names of the square parameter matrices that mix the carry's units; none for gated cells.

    As wide as the carry, all of whose inexact leaves have one shape. Each is multiplied with a leaf
    of the carry that it has an influence on, as inputs of a layer and what another one sends are
    not.

    Args:
      problem: the recurrence.
      influences: for each leaf of the carry that a step emits, which leaves of (params, carry, ...)
        it depends on.
      factors: the same of the two sides of each matrix product.
    """
    carry = jax.tree.leaves(problem.carry)
    shapes = {jnp.shape(leaf) for leaf in carry if is_inexact(leaf)}
    if len(shapes) != 1 or len(shape := shapes.pop()) <= len(problem.batch_shape):
        return ()
    leaves = jax.tree_util.tree_flatten_with_path(problem.params)[0]

    def mixes(number):
        """The carry's leaf i, multiplied with this parameter, becomes the carry's leaf i."""
        products = [(a, b) for pair in factors for a, b in (pair, pair[::-1]) if number in a]
        return any(
            number in of and any(len(leaves) + i in b for _, b in products)
            for i, of in enumerate(influences)
        )

    return tuple(
        name_of(path)
        for number, (path, leaf) in enumerate(leaves)
        if is_inexact(leaf) and jnp.shape(leaf) == (shape[-1], shape[-1]) and mixes(number)
    )


def name_of(path: tuple) -> str:
    """A parameter's name, `params['w_h']`."""
    return f"params{jax.tree_util.keystr(path)}"


def try_remedies(found: Any, problem: Problem, ask: Callable[[Problem], Any]) -> tuple[Trial, ...]:
    """Scales the recurrent matrices by `e^{−λ₁}`, makes them orthogonal, and asks again.

    All of them together; those of a pile of layers bring no layer into balance alone.

    Args:
      found: the diagnosis of the problem as it is.
      problem: with arrays.
      ask: the same diagnosis of another problem; it compiles nothing.
    """
    from scipy.linalg import polar  # JAX brings it; few diagnoses need it

    factor = math.exp(-float(found.exponent))
    names = ", ".join(found.recurrent_weights)

    def changed_by(change):
        def one(path, leaf):
            if name_of(path) not in found.recurrent_weights:
                return leaf
            matrix = np.asarray(leaf)
            wide = matrix.astype(complex if np.iscomplexobj(matrix) else float)
            return jnp.asarray(change(wide), matrix.dtype)

        return jax.tree_util.tree_map_with_path(one, problem.params)

    trials = []
    for remedy, change in (
        (f"{names} × {factor:.3g}", lambda matrix: matrix * factor),
        (f"{names} orthogonal", lambda matrix: polar(matrix)[0]),
    ):
        tried = ask(replace(problem, params=changed_by(change)))
        half_life, exponent = float(tried.half_life), float(tried.exponent)
        trials.append(Trial(remedy, tried.verdict, half_life, exponent))
    return tuple(trials)
