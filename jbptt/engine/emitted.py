"""What the outputs of a step read of the carry that it emits, cut out of its program."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from jax.extend.core import JaxprEqn, Var

from jbptt.arrays import is_inexact
from jbptt.engine.dependence import replaced
from jbptt.engine.jaxprs import as_arrays, evaluate, inlined, read, variables_of
from jbptt.types import Carry, Params, PyTree, Step


class OutputsOf(NamedTuple):
    """The outputs of a step as a function of the carry that it emits.

    Attributes:
      function: `(params, carry, inputs, emitted) -> outputs`.
      read_carry: whether a path leads to them from the carry that is received, past the emitted.
    """

    function: Callable
    read_carry: bool


def outputs_of(
    step: Step, params: Params, carry: Carry, inputs: PyTree, is_read: Sequence[bool]
) -> OutputsOf:
    """Cuts the program of a step where it emits its carry: what comes behind are the outputs.

    With `y = readout(h)` of the emitted h that is the readout alone. What the outputs compute
    beside the emitted carry stays a function of the carry received, and so does what they read of
    a leaf that no later step hands on to a loss: `is_read` says which inexact leaves one does.
    """
    closed, shapes = inlined(step, params, carry, inputs)
    jaxpr, structure = closed.jaxpr, jax.tree.structure(shapes[1])
    emitted_leaves = jax.tree.leaves(shapes[0])
    num_emitted, inexact = len(emitted_leaves), [is_inexact(leaf) for leaf in emitted_leaves]
    cut_at = replaced(inexact, inexact, is_read)
    results = jaxpr.outvars[num_emitted:]
    made = {variable for equation in jaxpr.eqns for variable in equation.outvars}
    places = {
        variable: place
        for place, variable in enumerate(jaxpr.outvars[:num_emitted])
        if cut_at[place] and isinstance(variable, Var) and variable in made
    }
    equations, wanted = _behind(jaxpr.eqns, results, set(places))
    num_params = len(jax.tree.leaves(params))
    num_carry = len(jax.tree.leaves(carry))
    received = jaxpr.invars[num_params : num_params + num_carry]

    def function(params, carry, inputs, emitted):
        leaves = jax.tree.leaves(emitted)
        given = {variable: leaves[place] for variable, place in places.items()}
        arguments = jax.tree.leaves((params, carry, inputs))
        values = dict(
            zip(
                [*jaxpr.constvars, *jaxpr.invars],
                [*as_arrays(closed.consts), *arguments],
                strict=True,
            )
        )
        values.update(given)
        for equation in equations:
            evaluate(jaxpr, [equation], values)
            values.update(given)  # it may have computed an emitted leaf beside what is wanted
        return structure.unflatten([read(values, atom) for atom in results])

    return OutputsOf(function, not wanted.isdisjoint(received))


def _behind(equations: list[JaxprEqn], results: list, emitted: set) -> tuple[list[JaxprEqn], set]:
    """The equations that lead to the results from the emitted variables, and all that is read."""
    wanted, leading = set(variables_of(results)) - emitted, []
    for equation in reversed(equations):
        if wanted.intersection(equation.outvars):
            wanted.update(set(variables_of(equation.invars)) - emitted)
            leading.append(equation)
    return leading[::-1], wanted
