"""What is checked before an influence is carried along."""

from dataclasses import replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbptt.arrays import inexact_leaves, real_leaves, split_inexact
from jbptt.memory import usual_memory
from jbptt.online.examples import carry_size, influence_dtype
from jbptt.online.structure import WHY, InfluenceStructure, structure_of
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
    """The checked problem that an estimator is initialised with."""
    problem = problem_of(step, loss, params, carry, batch, per_example=WHY)
    _check_apart(problem)
    return problem


def problem_to_update(
    step: Step, loss: Loss, params: Params, carry: Any, batch: Batch
) -> tuple[Problem, Entered]:
    """The checked problem of an update, and the carry that enters."""
    problem, start = entered_problem(step, loss, params, carry, batch, per_example=WHY)
    _check_apart(problem)
    return problem, start


def _check_apart(problem: Problem) -> None:
    """A ValueError unless a step can be taken example by example."""
    num_examples = problem.batch_shape[0] if problem.batch_shape else 1
    if num_examples == 1:
        return
    check_division(problem, num_examples, WHY, ONE_BY_ONE)
    if not _are_independent(_first_two(problem)):
        raise ValueError(
            f"{WHY}, but in the step examples depend on each other (a mean over the batch, "
            f"perhaps), so that none has one; {ONE_BY_ONE}"
        )


def _first_two(problem: Problem) -> Problem:
    """The problem of two of the examples, on shapes."""

    def two(leaf, axis):
        shape = np.shape(leaf)
        if shape[axis : axis + len(problem.batch_shape)] == problem.batch_shape:
            shape = (*shape[:axis], 2, *shape[axis + 1 :])
        return jax.ShapeDtypeStruct(shape, jax.dtypes.result_type(leaf))

    return replace(
        problem.on(
            jax.tree.map(lambda leaf: two(leaf, 0), problem.carry),
            jax.tree.map(lambda leaf: two(leaf, 1), problem.batch),
        ),
        batch_shape=(2, *problem.batch_shape[1:]),
    )


def _are_independent(problem: Problem) -> bool:
    """Whether of two examples none emits what depends on the carry of the other."""
    structure = structure_of(replace(problem, batch_shape=()))  # both as one example

    def of_example(leaf):
        """To which of the two each of its real numbers belongs."""
        entry = np.arange(leaf.size) // (leaf.size // 2)
        return np.tile(entry, 2 if jnp.iscomplexobj(leaf) else 1)

    owners = np.concatenate([of_example(leaf) for leaf in inexact_leaves(problem.carry)])
    mine = [sum(1 << int(i) for i in np.flatnonzero(owners == number)) for number in (0, 1)]
    pairs = zip(structure.carry, owners, strict=True)
    return not any(structure.sets[number] & mine[1 - owner] for number, owner in pairs)


def check_memory(
    structure: InfluenceStructure, order: int | None, problem: Problem, smaller: str
) -> None:
    """A ValueError, before anything is allocated, if the influence takes more than there is."""
    examples = prod(problem.batch_shape)
    of_one = structure.num_kept(order)
    needed = COPIES * examples * of_one * np.dtype(influence_dtype(problem)).itemsize
    if needed > (available := usual_memory()):
        num_params = sum(leaf.size for leaf in structure.params)
        raise ValueError(
            f"the influence of {num_params:,} parameters on the {structure.size:,} numbers of a "
            f"carry takes {of_one:,} numbers for each of {examples} examples, some "
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
