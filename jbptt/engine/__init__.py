"""The engine: all that reads the program of a user's step, behind one door.

Two engines stand behind it. The fast one (`fast`) reads programs through `jax.extend`, which
promises nothing from one release to the next. The plain one (`plain`) is public JAX, and its loop
is the equation. Where the fast one cannot be imported, or cannot read a program, the plain one runs
and a warning says so once.

    segment_vjp(step, …)                    many steps one after another, and the way back
    pullback(step, …), parallel_pullback    one step, or many side by side: windows that overlap,
                                            and most analyses
    outputs_of(step, …)                     a step's outputs as a function of the carry it emits
    with_small_products_as_sums(function)   many small models side by side, on CPU
    paths, dependences, …                   questions to a program, answered without running it
                                            (`dependence`, `entries`, `facts`)

Every way back adds to a running total of the gradient, and gives (total, cotangents of the carry).

How the fast one goes back through a segment of S steps:

    split_step      `weight_products`   Traces the step, finds its products with weights, and runs
                                        once what depends on the parameters alone: a `SplitStep`.
                                        (`splitting` divides the program, `weight_uses` knows what
                                        a product with a weight is.)
    cut             `cutting`           Traces what is left and its pullback as one program, and
                                        divides its equations between two loops: `Loops`.
                                        (`loop_programs` holds what they are made of.)
    Loops.forward   `forward_backward`  A scan. What the way back needs of every step is left as
                                        `Stacks`, `[S, ...]` (`stacks`).
    Loops.backward  `forward_backward`  A scan in reverse, which emits z̄_t for every product
                                        z_t = a_t W. After each chunk of steps `add_products` adds
                                        Σ_t a_tᵀ z̄_t to W̄.

`pullback` goes back through one step and cuts nothing. `jaxprs` reads and evaluates programs, and
`primitives` says what is known of JAX's operations.

Words. A *variable* stands for an array in a program (a jaxpr), an *atom* is a variable or a
literal. A step receives `carry` and emits `next_carry`. `x_bar` is the cotangent of x. `live`
(`Paths`) says which leaves of a step have cotangents: those that a loss reads, now or in a later
step. *Invariant* is what is the same in every step. `loop_params` are the parameters that the step
uses outside products and lookups, such as a bias: only the loop can sum their gradients. *Wide* is
float32 at least.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jbptt.arrays import widened
from jbptt.engine import plain
from jbptt.engine.dependence import (
    Paths,
    chosen,
    dependences,
    dependences_and_factors,
    paths,
    replaced,
)
from jbptt.engine.entries import entry_dependence
from jbptt.engine.facts import calls, draws, same_under_vmap
from jbptt.types import Carry, Params, PyTree, Step

import_error: Exception | None = None
try:
    from jbptt.engine import emitted, fast, small_products
except ImportError as error:  # jax.extend has moved
    emitted, fast, small_products, import_error = None, None, None, error

__all__ = [
    "NO_VMAP",
    "Paths",
    "calls",
    "chosen",
    "dependences",
    "dependences_and_factors",
    "draws",
    "entry_dependence",
    "fast",
    "fast_or_plain",
    "outputs_of",
    "parallel_pullback",
    "paths",
    "pullback",
    "replaced",
    "same_under_vmap",
    "segment_vjp",
    "warn_that_the_plain_engine_runs",
    "with_small_products_as_sums",
]


NO_VMAP = (NotImplementedError, ValueError)
"""What JAX raises where it has a derivative but not that of its vmap: ValueError for products with
sparse weights, NotImplementedError for a callback in a rule."""


def warn_that_the_plain_engine_runs(cause: Exception | None) -> None:
    """A RuntimeWarning; Python shows each text once."""
    warnings.warn(
        f"the plain engine runs, slower and with more memory: {type(cause).__name__} in the fast "
        f"one: {cause}. The numbers are right; please report it",
        RuntimeWarning,
        stacklevel=2,
    )


def fast_or_plain(fast_way: Callable, plain_way: Callable, *arguments: Any) -> Any:
    """`fast_way(*arguments)`; if that raises, a warning and `plain_way(*arguments)`."""
    try:
        return fast_way(*arguments)
    except Exception as error:
        # The plain way first: an error of the user's own step is raised here again, unwarned.
        results = plain_way(*arguments)
        warn_that_the_plain_engine_runs(error)
        return results


def _by_either_engine(name: str, *arguments: Any) -> tuple[tuple, Callable]:
    """`(results, way back)` of the function of this name that both engines have.

    The fast one's as long as it works: it may fail going forward, or only on the way back.
    """
    plain_function = getattr(plain, name)
    if fast is None:
        warn_that_the_plain_engine_runs(import_error)
        return plain_function(*arguments)

    def plain_back(*cotangents):
        return plain_function(*arguments)[1](*cotangents)

    def run_fast(*arguments):
        results, fast_back = getattr(fast, name)(*arguments)
        return results, partial(fast_or_plain, fast_back, plain_back)

    return fast_or_plain(run_fast, plain_function, *arguments)


def segment_vjp(
    step: Step, params: Params, carry: Carry, inputs: PyTree, num_steps: int, live: Paths
) -> tuple[tuple[Carry, PyTree], Callable]:
    """The carry after all steps and their outputs, and the way back; see `plain.segment_vjp`."""
    return _by_either_engine("segment_vjp", step, params, carry, inputs, num_steps, live)


def pullback(
    step: Step, params: Params, carry: Carry, inputs: PyTree, live: Paths
) -> tuple[tuple, Callable]:
    """A step's results `(next_carry, outputs)` and the way back; see `plain.pullback`."""
    return _by_either_engine("pullback", step, params, carry, inputs, live)


def parallel_pullback(
    step: Step, params: Params, carries: Carry, inputs: PyTree, num_steps: int, live: Paths
) -> tuple[tuple, Callable]:
    """`pullback` of all steps at once, each at its own cached (carry, input), leaves `[T, ...]`.

    The gradient is summed over the steps; the cotangents of their carries are `[T, ...]`.
    """

    def all_steps(params, carries, inputs):
        return jax.vmap(partial(step, params), axis_size=num_steps)(carries, inputs)

    results, back_at_once = pullback(all_steps, params, carries, inputs, live)

    def back_one_by_one(next_carries_bar, outputs_bar, total):
        def body(total, at_t):
            carry_t, inputs_t, *bars_t = at_t
            return pullback(step, params, carry_t, inputs_t, live)[1](*bars_t, total)

        if total is None:
            total = jax.tree.map(lambda a: jnp.zeros_like(widened(a)), params)
        return lax.scan(body, total, (carries, inputs, next_carries_bar, outputs_bar), num_steps)

    def back(*cotangents_and_total):
        try:
            return back_at_once(*cotangents_and_total)
        except NO_VMAP:  # any other error of these types comes again from the steps one by one
            return back_one_by_one(*cotangents_and_total)

    return results, back


def outputs_of(
    step: Step, params: Params, carry: Carry, inputs: PyTree, is_read: Sequence[bool]
) -> tuple[Callable, bool]:
    """The outputs of a step as a function of the carry that it emits; see `emitted.outputs_of`.

    Where programs cannot be read, the whole step: all is then read of the carry received.
    """

    def whole_step(*arguments):
        del arguments
        return lambda params, carry, inputs, _: step(params, carry, inputs)[1], True

    if emitted is None:
        warn_that_the_plain_engine_runs(import_error)
        return whole_step()
    return fast_or_plain(emitted.outputs_of, whole_step, step, params, carry, inputs, is_read)


def with_small_products_as_sums(function: Callable) -> Callable:
    """The same function; on CPU what vmap makes of small products takes less time.

    See `small_products`. Where programs cannot be read, the function as it is.
    """

    def run(*arguments):
        if small_products is None or jax.default_backend() != "cpu":
            return function(*arguments)
        return fast_or_plain(partial(small_products.run_with_sums, function), function, *arguments)

    return run
