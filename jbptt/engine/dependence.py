"""What depends on what, read off a traced program: where no gradient can flow, before anything runs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.tree_util import keystr, tree_leaves_with_path

from jbptt.arrays import inexact_leaves, split_inexact
from jbptt.engine.primitives import CALLS
from jbptt.types import Carry, Loss, Params, PyTree, Step

Sources = frozenset[int]


def dependences(function: Callable, *arguments: Any) -> list[Sources]:
    """For each output leaf of `function(*arguments)`, which input leaves (by number) it may depend on.

    One traversal of the program, inner programs included. An equation that is not known to hold a program makes all
    its outputs depend on all its inputs, so an input that is missing here has no influence for certain, and one that
    is listed may have none.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    return _outputs(jaxpr, [frozenset([i]) for i in range(len(jaxpr.invars))])


def _outputs(jaxpr: Any, inputs: list[Sources]) -> list[Sources]:
    """The sources of a program's outputs, from those of its inputs. Constants have none."""
    known: dict[Any, Sources] = dict(zip(jaxpr.invars, inputs, strict=True))

    def of(atom):
        return frozenset() if hasattr(atom, "val") else known.get(atom, frozenset())

    for equation in jaxpr.eqns:
        given = [of(atom) for atom in equation.invars]
        known.update(zip(equation.outvars, _through(equation, given), strict=True))
        if equation.effects:  # a mutable array holds from here on what may have been written into it
            mutable = [a for a in equation.invars if hasattr(a.aval, "inner_aval")]
            known.update(dict.fromkeys(mutable, frozenset().union(*given)))
    return [of(atom) for atom in jaxpr.outvars]


def _through(equation: Any, inputs: list[Sources]) -> list[Sources]:
    """The sources of an equation's outputs, from those of its operands."""
    name, params = equation.primitive.name, equation.params
    if equation.effects:
        return [frozenset().union(*inputs)] * len(equation.outvars)
    if name in CALLS and CALLS[name] in params:
        inner = params[CALLS[name]]
        return _outputs(getattr(inner, "jaxpr", inner), inputs)
    if name == "scan":
        first, num_carry = params["num_consts"], params["num_carry"]
        consts, carry, xs = inputs[:first], inputs[first : first + num_carry], inputs[first + num_carry :]

        def body(carry):
            return _outputs(params["jaxpr"].jaxpr, [*consts, *carry, *xs])

        carry = _settled(lambda carry: body(carry)[:num_carry], carry)
        return [*carry, *body(carry)[num_carry:]]
    if name == "cond":
        branches = [_outputs(branch.jaxpr, inputs[1:]) for branch in params["branches"]]
        return [inputs[0].union(*found) for found in zip(*branches, strict=True)]
    return [frozenset().union(*inputs)] * len(equation.outvars)


def _settled(step: Callable, carry: list[Sources]) -> list[Sources]:
    """The sources of a loop's carry after any number of steps."""
    while (grown := [a | b for a, b in zip(carry, step(carry), strict=True)]) != carry:
        carry = grown
    return carry


class Paths(NamedTuple):
    """Where cotangents flow in one step: a bool for each inexact leaf, and for each parameter.

    JAX has no cotangent of what no loss reads. An array of zeros in its place is not the same: where the derivative
    is not finite (a norm at 0), 0·inf makes NaN of a gradient that is finite.

    Attributes:
      ys: the loss reads it.
      outputs: of the core's outputs, a readout hands it on to the loss.
      carries: of the carry that is emitted, a later loss reads it.
      params: of all leaves, a path leads from it to a loss.
      unread: the names of those at which neither core nor readout looks.
      reason: why the whole gradient is exactly zero, "" where it need not be.
    """

    ys: tuple[bool, ...]
    outputs: tuple[bool, ...]
    carries: tuple[bool, ...]
    params: tuple[bool, ...]
    unread: tuple[str, ...]
    reason: str


def paths(core: Step, readout: Callable, loss: Loss, params: Params, carry: Carry, x: PyTree, target: PyTree) -> Paths:
    """The paths of one step, from its derivative, in which `stop_gradient`, rounding and integers leave no trace.

    Over any number of steps: a carry leaf is read if a leaf that is read depends on it in the next step. Arguments
    may be shapes; three small programs are traced, nothing runs.
    """
    after, outputs = jax.eval_shape(core, params, carry, x)
    y = jax.eval_shape(readout, params, outputs)
    value = jax.eval_shape(_value_of(loss), y, target)
    emitted, given = inexact_leaves(after), inexact_leaves(outputs)
    num_params = len(jax.tree.leaves(params))

    def pull_loss(cotangent, y, target):
        leaves, rebuild = split_inexact(y)
        return jax.vjp(lambda leaves: _value_of(loss)(rebuild(leaves), target), leaves)[1](cotangent)

    def pull_readout(cotangents, params, outputs):
        leaves, rebuild = split_inexact(outputs)

        def run(params, leaves):
            return split_inexact(readout(params, rebuild(leaves)))[0]

        return jax.vjp(run, params, leaves)[1](cotangents), readout(params, outputs)

    def pull_core(cotangents, params, carry, x):
        leaves, rebuild = split_inexact(carry)

        def run(params, leaves):
            after, outputs = core(params, rebuild(leaves), x)
            return (split_inexact(after)[0], split_inexact(outputs)[0]), (after, outputs)

        _, pull, results = jax.vjp(run, params, leaves, has_aux=True)
        return pull(cotangents), results

    ys = tuple(0 in found for found in dependences(pull_loss, value, y, target))
    by_readout = dependences(pull_readout, inexact_leaves(y), params, outputs)
    reached = {i for i, is_read in enumerate(ys) if is_read}
    from_readout = [bool(found & reached) for found in by_readout[: num_params + len(given)]]
    outputs_read = tuple(from_readout[num_params:])

    by_core = dependences(pull_core, (emitted, given), params, carry, x)
    reached = {len(emitted) + i for i, is_read in enumerate(outputs_read) if is_read}
    to_carries = by_core[num_params : num_params + len(emitted)]
    while (more := {i for i, found in enumerate(to_carries) if found & reached} | reached) != reached:
        reached = more
    from_core = [bool(found & reached) for found in by_core[:num_params]]
    params_read = tuple(a or b for a, b in zip(from_readout[:num_params], from_core, strict=True))

    looks = [
        (len(ys), frozenset().union(*by_readout[num_params + len(given) :])),
        (len(emitted) + len(given), frozenset().union(*by_core[num_params + len(emitted) :])),
    ]
    names = [f"params{keystr(path)}" for path, _ in tree_leaves_with_path(params)]
    unread = tuple(name for i, name in enumerate(names) if not any(first + i in looked for first, looked in looks))
    reason = "" if any(params_read) or not num_params else "no path leads from params to the loss"
    if num_params and not any(ys):
        reason = "the loss does not depend on y"
    carries = tuple(i in reached for i in range(len(emitted)))
    return Paths(ys, outputs_read, carries, params_read, unread, reason)


def _value_of(loss: Loss) -> Callable:
    def value(y, target):
        result = loss(y, target)
        return result[0] if isinstance(result, tuple) else result

    return value


def chosen(leaves: list, which: tuple[bool, ...]) -> list:
    """The leaves for which `which` says so."""
    return [leaf for leaf, is_chosen in zip(leaves, which, strict=True) if is_chosen]


def inner_programs(equation: Any) -> list[Any]:
    """The programs that an equation holds, whatever it does with them."""
    found = []
    for value in equation.params.values():
        for one in value if isinstance(value, tuple | list) else [value]:
            one = getattr(one, "jaxpr", one)
            found += [one] if hasattr(one, "eqns") else []
    return found
