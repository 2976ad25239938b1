"""`scan`: `lax.scan` whose backward pass is the engine's, for any loss of what it returns."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbptt import batch_axes, engine, validation
from jbptt.arrays import zero_masked
from jbptt.recurrence import held
from jbptt.scan_vjp import Recurrence
from jbptt.types import Batch, Carry, PyTree


def scan(
    f: Callable[[Carry, PyTree], tuple[Carry, PyTree]],
    init: Carry,
    xs: PyTree = None,
    length: int | None = None,
    *,
    reverse: bool = False,
    segment: int | None = None,
    gates: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> tuple[Carry, PyTree]:
    """`lax.scan` with a faster backward pass that keeps less, for any recurrence and any loss.

        h_t, y_t = f(h_{t-1}, x_t),     J_t = ∂h_t/∂h_{t-1}
        λ_{t-1} = gates[t] · (J_tᵀ λ_t + (∂y_t/∂h_{t-1})ᵀ ȳ_t)

    The values are `lax.scan`'s. Reverse mode cuts the program of one step and its derivative into a
    forward and a backward loop that keep between them only what is dear to compute, and forms the
    gradients of weights after the loop, in float32 at least. Gradients flow into whatever `f`
    closes over, into `init` and into `xs`.

    A callback in `f` is called again where a segment is computed again.

    Reverse mode of any order, and forward over reverse, work; under jit, vmap, scan, shard_map and
    checkpoint too. Plain forward mode (`jax.jvp`, `jacfwd`) raises JAX's TypeError: use `lax.scan`,
    or `unroll`, for it.

    Args:
      f: `(carry, x) -> (carry, y)`; may close over parameters, traced or not.
      init: the carry that enters step 0; floating leaves are differentiated, others pass.
      xs: leaves `[T, ...]`, or None with `length`.
      length: T, where `xs` has no leaves.
      reverse: from the last step to the first, as in `lax.scan`. `gates[t]` and `mask[t]` belong to
        `xs[t]`.
      segment: recompute in segments of this many steps on the way back: memory
        O(T/segment + segment) beyond what is returned, for one more forward pass. None keeps the
        whole sequence.
      gates: `[T]` or `[T, *batch]`, bool or real: what the gradient that crosses from step t into
        the carry that it received is multiplied by. 0 every k steps is truncation to blocks of k.
        They are not differentiated, and a second derivative is that of the gradient as returned.
      mask: bool, `[T]` or `[T, *batch]`; a masked step holds the carry and gives `ys = 0`, whatever
        stands in xs.

    Returns:
      The last carry, and ys with leaves `[T, ...]`.

    Raises:
      ValueError: lengths that disagree; gates or mask that do not fit the carry; a segment < 1; a
        mutable array closed over, with gates, mask or segment. What `lax.scan` raises where the
        carry changes its type.

    >>> def loss(w):  # the last output looks at all of them
    ...     _, ys = scan(lambda h, x: (w * h + x, w * h + x), 0.0, jnp.ones(3))
    ...     return jnp.max(ys) * jnp.mean(ys)
    >>> round(float(jax.grad(loss)(2.0)), 3)  # 5 · 11/3 + 7 · 2
    32.333
    """
    if segment is not None:
        segment = validation.check_positive_integer("segment", segment)
    if isinstance(length, np.integer):
        length = int(length)
    lengths = [] if length is None else [length]
    lengths += [n for leaf in jax.tree.leaves((xs, gates, mask)) for n in jnp.shape(leaf)[:1]]
    is_known = all(isinstance(n, int) for n in lengths)
    if not is_known and not (gates is mask is segment is None):
        raise ValueError(
            "length must be an integer that is known while tracing, beside gates, mask or segment, "
            f"got {length!r} and leading axes {lengths}; leave these out, or give a number of steps"
        )
    if not lengths or set(lengths) == {0} or not is_known:
        return lax.scan(f, init, xs, length, reverse)  # nothing to do, an error, or a symbolic T
    num_steps = validation.count_steps({"xs": xs, "gates": gates, "mask": mask}, length)
    init, xs, gates, mask = jax.tree.map(jnp.asarray, (init, xs, gates, mask))
    if engine.fast is None:
        engine.warn_that_the_plain_engine_runs(engine.import_error)
        # JAX says what is wrong with f.
        jax.eval_shape(partial(lax.scan, f, length=num_steps, reverse=reverse), init, xs)
        step, consts = (lambda _, carry, x: f(carry, x)), []
    else:
        init, step, consts = _traced(f, init, xs, num_steps, reverse)
    if gates is not None or mask is not None:
        one = batch_axes.first_step(lambda _, c, x: f(c, x), None, (), init, Batch(xs))
        validation.check_gates_and_mask(gates, mask, init, one)
    if any(hasattr(jax.typeof(leaf), "inner_aval") for leaf in consts):
        if not (gates is mask is segment is None):
            raise ValueError(
                "f closes over a mutable array, got gates, mask or segment beside it, which do not "
                "go with one: leave them out, or put the array into the carry"
            )
        return lax.scan(f, init, xs, length, reverse)
    recurrence = Recurrence(held(step), num_steps, reverse, min(segment or num_steps, num_steps))
    run = recurrence.plain if engine.fast is None else recurrence.run
    carry, ys = run(consts, init, (xs, mask), gates)
    return carry, ys if mask is None else jax.vmap(zero_masked)(mask, ys)


def _traced(
    f: Callable,
    init: Carry,
    xs: PyTree,
    length: int,
    reverse: bool,
) -> tuple[Carry, Callable, list]:
    """The carry in the dtypes that it keeps, and f as `(consts, carry, x) -> (carry, y)`, consts.

    The consts are what f closes over.
    """

    def trace(init):
        first_x = jax.eval_shape(lambda: jax.tree.map(lambda a: a[0], xs))
        return engine.fast.closed_over(f, init, first_x)

    def types(tree):
        def type_of(leaf):
            return jnp.shape(leaf), leaf.dtype, getattr(leaf, "weak_type", False)

        return jax.tree.map(type_of, tree)

    step, consts, result = trace(init)
    is_pair = isinstance(result, tuple | list) and len(result) == 2
    carry = result[0] if is_pair else None
    has_structure = jax.tree.structure(carry) == jax.tree.structure(init)
    if not has_structure or types(carry) != types(init):
        # JAX says what is wrong, or to what a weakly typed carry is promoted.
        carry, _ = jax.eval_shape(partial(lax.scan, f, length=length, reverse=reverse), init, xs)
        init = jax.tree.map(lambda a, s: lax.convert_element_type(a, s.dtype), init, carry)
        step, consts, _ = trace(init)
    return init, step, consts
