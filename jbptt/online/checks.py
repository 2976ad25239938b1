"""What is checked before an influence is carried along."""

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jbptt import engine
from jbptt.arrays import inexact_leaves, real_leaves, split_inexact
from jbptt.batch_axes import drawn
from jbptt.cells import split_readout
from jbptt.memory import usual_memory
from jbptt.online.examples import alone, carry_size, for_each, influence_dtype, is_own
from jbptt.online.structure import WHY, InfluenceStructure
from jbptt.plans import NO_WINDOWS, Plan, check_division, plan_of
from jbptt.problem import Problem, entered_problem, problem_of
from jbptt.starts import Entered
from jbptt.types import Batch, Loss, Params, Step

ONE_BY_ONE = "pass one example, without a batch axis, or take a BPTT estimator"
COPIES = 3
"""So many influences are in memory at once: the one received, the one emitted, and what enters."""


def plan_without_segments(plan: Plan | None) -> Plan:
    """The plan; a ValueError where it asks for more than devices."""
    return plan_of(plan, {"segment": "nothing is recomputed on a way forward", **NO_WINDOWS})


def problem_to_start(step: Step, loss: Loss, params: Params, carry: Any, batch: Batch) -> Problem:
    """The checked problem that an estimator is initialised with.

    Examples are taken one by one: by shapes, and once with numbers.
    """
    problem = problem_of(step, loss, params, carry, batch, per_example=WHY)
    if not inexact_leaves(problem.carry):
        raise ValueError(
            "the carry holds no floating numbers, so that nothing of the past has an influence "
            "with a derivative; take full_bptt"
        )
    if problem.batch_shape and problem.batch_shape[0] > 1:
        check_division(problem, problem.batch_shape[0], WHY, ONE_BY_ONE)
    if prod(problem.batch_shape) > 1:
        _check_apart(problem)
    return problem


def problem_to_update(
    step: Step, loss: Loss, params: Params, state: Any, batch: Batch, kind: type
) -> tuple[Problem, Entered]:
    """The checked problem of an update, and the carry that enters; states are of that kind."""
    if not isinstance(state, kind):
        raise ValueError(
            f"state must be the {kind.__name__} that init or the update before returned, got "
            f"{type(state).__name__}: it is that of another estimator; call init again"
        )
    return entered_problem(step, loss, params, state.carry, batch, per_example=WHY)


def _check_apart(problem: Problem) -> None:
    """A ValueError where the batch does not emit what its examples emit one by one.

    On random numbers, in one small program; also those that the step closes over are random where
    they are traced. With a mask for each example outputs are compared, too: what an example in
    padding would emit, which others might read, has no influence.
    """
    mask, shape = problem.batch.mask, problem.batch_shape
    outputs_too = mask is not None and np.ndim(mask) > 1
    step = problem.step if outputs_too else split_readout(problem.step)[0]
    x = jax.eval_shape(lambda tree: jax.tree.map(lambda a: a[0], tree), problem.batch.xs)
    given = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jax.dtypes.result_type(leaf)),
        (problem.params, problem.carry, x),
    )

    def both(params, carry, x):
        own = jax.tree.map(lambda leaf: is_own(leaf, shape), (carry, x))

        def compared(results):
            return inexact_leaves(results if outputs_too else results[0])

        def one(carry, x):
            results = step(params, *alone((carry, x), own, len(shape)))
            return [leaf.reshape(leaf.shape[len(shape) :]) for leaf in compared(results)]

        return compared(step(params, carry, x)), for_each(one, shape, carry, x)

    try:
        if engine.fast is None:
            run, consts = (lambda _, *arguments: both(*arguments)), []
        else:
            run, consts, _ = engine.fast.closed_over(both, *given)
        consts = [drawn(jax.typeof(c)) if isinstance(c, Tracer) else c for c in consts]
        with jax.ensure_compile_time_eval(), jax.debug_nans(False):
            together, apart = jax.jit(run)(consts, *drawn(given))
            pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(together, apart, strict=True)]
    except Exception:  # whatever a step raises that is run where it should not be
        return
    for a, b in pairs:
        tolerance = float(np.sqrt(jnp.finfo(a.dtype).eps))
        wide = np.complex128 if np.iscomplexobj(a) else np.float64
        a, b = a.astype(wide), b.astype(wide)
        size = np.max(np.abs(a), initial=0.0, where=np.isfinite(a))
        if not np.allclose(a, b, rtol=tolerance, atol=tolerance * size, equal_nan=True):
            raise ValueError(
                f"{WHY}, but what the step emits of an example depends on the others, or on which "
                f"one it is (a mean over the batch, perhaps); {ONE_BY_ONE}"
            )


def check_memory(
    structure: InfluenceStructure, order: int | None, problem: Problem, smaller: str
) -> None:
    """A ValueError, before anything is allocated, if the influence takes more than there is."""
    examples, of_one = prod(problem.batch_shape), structure.num_kept(order)
    # Beside it that of the carry which enters an update.
    both = of_one + structure.num_kept_of_carry(order)
    needed = COPIES * examples * both * np.dtype(influence_dtype(problem)).itemsize
    if needed > (available := usual_memory()):
        num_params = sum(leaf.size for leaf in structure.params)
        raise ValueError(
            f"the influence of {num_params:,} parameters, and of the carry that enters an update, "
            f"on the {structure.size:,} numbers of a carry takes {both:,} numbers for each of "
            f"{examples} examples, some "
            f"{needed / 2**30:.3g} GiB in all, and programs may take {available / 2**30:.3g} GiB; "
            f"pass fewer examples, or take {smaller}"
        )


def check_structure(structure: InfluenceStructure, problem: Problem) -> None:
    """A ValueError unless a structure that was handed on is that of such a step."""
    if not isinstance(structure, InfluenceStructure):
        raise ValueError(
            f"structure must be what influence_structure returns, got {type(structure).__name__}; "
            "pass that, or None"
        )
    reals = real_leaves(split_inexact(problem.params)[0])[0]
    wanted = carry_size(problem), [leaf.shape for leaf in reals]
    found = structure.size, [leaf.shape for leaf in structure.params]
    if found != wanted:
        raise ValueError(
            f"structure is that of a carry of {found[0]} numbers and parameters of shapes "
            f"{found[1]}, wanted {wanted[0]} and {wanted[1]}; call influence_structure with this "
            "step, these parameters and this carry"
        )


def check_influence(influence: list, wanted: list[tuple[int, ...]]) -> None:
    """A ValueError unless a state holds the influence that this update goes on with."""
    found = [np.shape(leaf) for leaf in influence]
    if found != wanted:
        raise ValueError(
            f"the state's influence has shapes {found}, wanted {wanted}: it is that of another "
            "estimator, step or number of examples; call init again"
        )
