"""Windows of blocks: what flows across their cuts, and the shortest that keeps an error."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jbptt.analysis.lags import Linearised
from jbptt.arrays import one_if_zero, times_gate
from jbptt.diagnosis.batch_parts import PartsOfBatch
from jbptt.diagnosis.resampling import Errors, errors_of, products
from jbptt.norms import max_or_nan

FEW_CROSSINGS = 4
"""Groups of examples times cuts: fewer do not tell how what crosses a cut varies."""


class Blocks(NamedTuple):
    """The exact gradient of each part, and the windows of blocks found.

    Attributes:
      exact: as `PartsOfBatch.gradients` gives them.
      scale: their largest number, so that squares of what is divided by it neither overflow nor
        underflow; 1 for zeros.
      window: for each tolerance the shortest window tried that keeps it, T if none does.
      errors: theirs.
      tried_upper: the upper errors of all `candidate_windows`; NaN where one was not tried.
    """

    exact: list[jax.Array]
    scale: jax.Array
    window: jax.Array
    errors: Errors
    tried_upper: jax.Array


def find_blocks(
    linearised: Linearised, parts: PartsOfBatch, tolerances: tuple[float, ...]
) -> Blocks:
    """Looks for the shortest window of blocks for each tolerance, by halving what is left to try.

    Each window tried costs about one gradient; blocks begin at multiples of the window. One loop
    over all of them, opened by the exact gradient, so that one program serves them all.
    """
    num_steps = linearised.problem.num_steps
    tried = candidate_windows(num_steps)[:-1]
    num_tried, levels = len(tried), jnp.array(tolerances)
    windows = jnp.array([*tried, num_steps])
    outputs_bar = linearised.passed.outputs_bar

    def gradients(one_on, exact):
        """At first all that the parameters get from each part, then what blocks leave out."""
        bars = [jnp.where(exact, bar, 0) for bar in outputs_bar]
        pairs = zip(parts.gradients(one_on, bars), parts.readout_grads, strict=True)
        return [grad + jnp.where(exact, readout, 0).astype(grad.dtype) for grad, readout in pairs]

    def choose(first, new, old):
        return jax.tree.map(partial(jnp.where, first), new, old)

    def look(state):
        number, here, upper, low, high, exact, scale, exact_one_on = state
        first = number == 0
        middle = (low + high) // 2
        at = jnp.where(first, num_tried, middle[jnp.argmax(high - low > 1)])
        one_on = adjoints_cut(linearised, windows[at])
        left = choose(first, one_on, jax.tree.map(jnp.subtract, exact_one_on, one_on))
        found = gradients(left, first)
        scale = jnp.where(first, _largest(found), scale)
        found = [leaf / scale for leaf in found]
        exact = choose(first, found, exact)
        errors = errors_of(products(found), products(exact), parts.layout.batches)
        here, upper = (
            jnp.where(first, a, a.at[at].set(e.astype(a.dtype)))
            for a, e in ((here, errors.here), (upper, errors.upper))
        )
        crossings = (num_steps - 1) // windows[at] * parts.layout.groups
        keeps = (errors.upper <= levels) & (crossings >= FEW_CROSSINGS)
        high = jnp.where(~first & keeps, jnp.minimum(high, at), high)
        low = jnp.where(~first & ~keeps, jnp.maximum(low, at), low)
        one_on = choose(first, one_on, exact_one_on)
        return number + 1, here, upper, low, high, exact, scale, one_on

    def unfinished(state):
        return (state[0] == 0) | jnp.any(state[4] - state[3] > 1)

    def zeros_like(shapes):  # placed as they are, in an explicit mesh
        return jax.tree.map(lambda shape: lax.full_like(shape, 0), shapes)

    one_on = zeros_like(jax.eval_shape(partial(adjoints_cut, linearised), jnp.zeros((), int)))
    exact = zeros_like(jax.eval_shape(gradients, one_on, jnp.zeros((), bool)))
    scale = zeros_like(jax.eval_shape(_largest, exact))
    none = jnp.full(num_tried + 1, jnp.nan, scale.dtype).at[-1].set(0)
    bounds = jnp.full(len(tolerances), -1), jnp.full(len(tolerances), num_tried)
    start = 0, none, none, *bounds, [leaf.astype(scale.dtype) for leaf in exact], scale, one_on
    _, here, upper, _, high, exact, scale, _ = lax.while_loop(unfinished, look, start)
    return Blocks(exact, scale, windows[high], Errors(here[high], upper[high]), upper)


def candidate_windows(num_steps: int) -> list[int]:
    """T, T/2, T/4 …, and ¾ T: windows that cut T steps into blocks about as long.

    How long the last block is matters where losses stand at the end: of windows with a rest the
    error does not fall with the window, and halving what is left to try would find any of them.
    """
    halves = {-(-num_steps // (1 << i)) for i in range(num_steps.bit_length())}
    return sorted(halves | {1, -(-3 * num_steps // 4)})


def adjoints_cut(linearised: Linearised, window: jax.Array) -> list[jax.Array]:
    """The adjoints in blocks of a window: cotangents of the carry that each step emits, `[T, ...]`.

    λ goes back through one step after another and is cut where a block begins.
    """
    problem, passed = linearised.problem, linearised.passed
    cut = jnp.arange(problem.num_steps) % window == 0

    def back(one_on, at_t):
        carry_t, inputs_t, bar_t, cut_t, gate_t = at_t
        cotangents = problem.pullback(carry_t, inputs_t)(one_on, bar_t, None)[1]
        if gate_t is not None:
            cotangents = [times_gate(c, gate_t) for c in cotangents]
        return [jnp.where(cut_t, 0, c) for c in cotangents], one_on

    after = [jnp.zeros_like(leaf[0]) for leaf in linearised.carries]
    steps = passed.carries, problem.inputs, passed.outputs_bar, cut, problem.gates
    return lax.scan(back, after, steps, reverse=True)[1]


def _largest(gradients: list[jax.Array]) -> jax.Array:
    """The largest number in them, 1 for zeros."""
    sizes = [max_or_nan(jnp.abs(leaf).ravel()) for leaf in gradients if leaf.size]
    largest = max_or_nan(jnp.stack(sizes)) if sizes else jnp.zeros(())
    return one_if_zero(largest)
