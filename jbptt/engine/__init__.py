"""The engine: all that reads the program of a user's step, behind one door.

Two engines stand behind it. The fast one (`cutting`, `weight_products`) reads programs through `jax.extend`, which
promises nothing from one release to the next; the plain one (`plain`) is public JAX and says in its loop what is
computed. Where the fast one cannot be imported, or cannot read a program, the plain one runs, and a warning says so
once.

    segment_vjp(step, …)                    many steps one after another, and the way back through them
    pullback(step, …), parallel_pullback    one step, or many side by side
    paths, dependences, same_under_vmap, …  questions to a program, answered without running it

How the fast one goes back through a segment of S steps:

    split_step      `weight_products`   traces the step, finds its products with weights, runs once what depends on
                                        the parameters alone. Gives a `SplitStep`.
    cut             `cutting`           traces what is left and its pullback as one program, and divides its equations
                                        between two loops. Gives `Loops`.
    Loops.forward   `forward_backward`  a scan, which leaves what is kept of every step as `Stacks`, `[S, ...]`.
    Loops.backward  `forward_backward`  a scan in reverse, which emits z̄_t of every product z_t = a_t W. After each
                                        chunk of steps `add_products` adds Σ_t a_tᵀ z̄_t to W̄.

Words: a name is a variable of a program (a jaxpr), an atom a variable or a literal. `x_bar` is the cotangent of x. A
step receives a carry and emits the next one. `live` says which leaves a loss reads. `others` is what the loop uses of
the parameters outside products and lookups. `known` is what has the same value in every step. `wide` is float32 at
least.
"""

import warnings
from collections.abc import Callable
from functools import partial, wraps

import jax
import jax.numpy as jnp
from jax import lax

from jbptt.arrays import widened
from jbptt.engine import plain
from jbptt.engine.dependence import Paths, chosen, dependences, paths
from jbptt.engine.facts import calls, draws, same_under_vmap
from jbptt.types import Carry, Params, PyTree, Step

import_error: Exception | None = None
try:
    from jbptt.engine import fast
except ImportError as error:  # jax.extend has moved
    fast, import_error = None, error

__all__ = [
    "Paths",
    "calls",
    "chosen",
    "dependences",
    "draws",
    "fast",
    "parallel_pullback",
    "paths",
    "pullback",
    "same_under_vmap",
    "say_that_the_plain_one_runs",
    "segment_vjp",
]


def say_that_the_plain_one_runs(cause: Exception | None) -> None:
    """A warning, which Python shows once for each place."""
    warnings.warn(
        f"the plain engine runs, slower and with more memory: {type(cause).__name__} in the fast one: {cause}. The "
        "numbers are right; please report it",
        RuntimeWarning,
        stacklevel=2,
    )


def _fast_or_plain(name: str) -> Callable:
    """The function of this name, of the fast engine where that works."""
    plainly = getattr(plain, name)

    @wraps(plainly)
    def run(*arguments):
        if fast is None:
            say_that_the_plain_one_runs(import_error)
            return plainly(*arguments)
        try:
            results, back = getattr(fast, name)(*arguments)
        except Exception as error:  # what the user's step raises, the plain engine raises too
            found = plainly(*arguments)
            say_that_the_plain_one_runs(error)
            return found

        def either_back(*cotangents):
            try:
                return back(*cotangents)
            except Exception as error:
                found = plainly(*arguments)[1](*cotangents)
                say_that_the_plain_one_runs(error)
                return found

        return results, either_back

    return run


segment_vjp = _fast_or_plain("segment_vjp")
pullback = _fast_or_plain("pullback")


def parallel_pullback(
    step: Step, params: Params, carries: Carry, inputs: PyTree, num_steps: int, live: Paths
) -> tuple[tuple, Callable]:
    """`pullback` of all steps at once, each at its own cached (carry, input), leaves `[T, ...]`."""

    def all_at_once(params, carries, inputs):
        return jax.vmap(partial(step, params), axis_size=num_steps)(carries, inputs)

    results, back = pullback(all_at_once, params, carries, inputs, live)

    def one_by_one(carry_bar, outputs_bar, total):
        def body(total, inputs_t):
            (carry_t, x_t), *bars = inputs_t
            return pullback(step, params, carry_t, x_t, live)[1](*bars, total)

        return lax.scan(body, total, ((carries, inputs), carry_bar, outputs_bar), num_steps)

    def all_or_one(carry_bar, outputs_bar, total):
        try:
            return back(carry_bar, outputs_bar, total)
        except (NotImplementedError, ValueError):
            # JAX has the derivative of every step, but not that of their vmap: a ValueError for products with sparse
            # weights, NotImplementedError for a callback in a rule. Any other error comes again from the steps alone.
            start = jax.tree.map(lambda a: jnp.zeros_like(widened(a)), params) if total is None else total
            return one_by_one(carry_bar, outputs_bar, start)

    return results, all_or_one
