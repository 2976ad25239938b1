"""What depends on what, read off a traced program: where no gradient can flow; nothing runs."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.tree_util import keystr, tree_leaves_with_path

from jbptt.arrays import inexact_leaves, split_inexact
from jbptt.engine.primitives import CALLS
from jbptt.types import Carry, Loss, Params, PyTree, Step

Sources = frozenset[int]  # numbers of input leaves


def dependences(function: Callable, *arguments: Any) -> list[Sources]:
    """For each output leaf of `function(*arguments)`, the numbers of the inputs it may depend on.

    One traversal of the program, inner programs included. An equation that is not known to hold a
    program makes all its outputs depend on all its inputs. So an input that is missing here has no
    influence for certain, and one that is listed may have none.
    """
    return jax.tree.leaves(_dependence_tree(function, *arguments))


def dependences_and_factors(
    function: Callable, *arguments: Any
) -> tuple[list[Sources], set[tuple[Sources, Sources]]]:
    """`dependences`, and for each matrix product on the way the inputs of its left and right side.

    Those of inner programs included, where they are known to be programs.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    inputs, seen = [frozenset([i]) for i in range(len(closed.jaxpr.invars))], set()
    return _sources_of_outputs(closed.jaxpr, inputs, seen), seen


def _dependence_tree(function: Callable, *arguments: Any) -> PyTree:
    """`dependences` in the structure of the result."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    inputs = [frozenset([i]) for i in range(len(closed.jaxpr.invars))]
    return jax.tree.unflatten(jax.tree.structure(shapes), _sources_of_outputs(closed.jaxpr, inputs))


def _union(sources: Sequence[Sources]) -> Sources:
    return frozenset().union(*sources)


def _sources_of_outputs(
    jaxpr: Any, inputs: list[Sources], seen: set | None = None
) -> list[Sources]:
    """The sources of a program's outputs, from those of its inputs. Constants have none.

    To `seen` are added those of both sides of each matrix product.
    """
    sources: dict[Any, Sources] = dict(zip(jaxpr.invars, inputs, strict=True))

    def sources_of(atom):
        is_literal = hasattr(atom, "val")
        return frozenset() if is_literal else sources.get(atom, frozenset())

    for equation in jaxpr.eqns:
        operands = list(map(sources_of, equation.invars))
        if seen is not None and equation.primitive.name == "dot_general":
            seen.add(tuple(operands))
        sources.update(zip(equation.outvars, _through(equation, operands, seen), strict=True))
        if equation.effects:  # a mutable array holds from here on what may have been written to it
            mutable = [atom for atom in equation.invars if hasattr(atom.aval, "inner_aval")]
            sources.update(dict.fromkeys(mutable, _union(operands)))
    return list(map(sources_of, jaxpr.outvars))


def _through(equation: Any, operands: list[Sources], seen: set | None) -> list[Sources]:
    """The sources of an equation's outputs, from those of its operands."""
    name, params = equation.primitive.name, equation.params
    if not equation.effects:
        if name in CALLS and CALLS[name] in params:
            program = params[CALLS[name]]
            return _sources_of_outputs(getattr(program, "jaxpr", program), operands, seen)
        if name == "scan":
            return _through_scan(params, operands, seen)
        if name == "cond":
            index, *operands = operands
            branches = [_sources_of_outputs(b.jaxpr, operands, seen) for b in params["branches"]]
            return [_union([index, *outputs]) for outputs in zip(*branches, strict=True)]
    return [_union(operands)] * len(equation.outvars)


def _through_scan(params: dict, operands: list[Sources], seen: set | None) -> list[Sources]:
    """Those of the carry after any number of steps, then those of the outputs."""
    num_consts, num_carry = params["num_consts"], params["num_carry"]
    consts, carry = operands[:num_consts], operands[num_consts : num_consts + num_carry]
    xs = operands[num_consts + num_carry :]

    def body(carry):
        results = _sources_of_outputs(params["jaxpr"].jaxpr, [*consts, *carry, *xs], seen)
        return results[:num_carry], results[num_carry:]

    while True:
        next_carry, ys = body(carry)
        grown = [a | b for a, b in zip(carry, next_carry, strict=True)]
        if grown == carry:
            return [*carry, *ys]
        carry = grown


class Paths(NamedTuple):
    """Which leaves of a step have cotangents, since a loss reads them: a bool for each.

    JAX has no cotangent of what no loss reads. An array of zeros in its place is not the same:
    where the derivative is not finite (a norm at 0), 0·inf makes NaN of a gradient that is finite.

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

    def leaves(self, next_carry: Carry, outputs: PyTree) -> tuple[list, list]:
        """The leaves of a step's results that have cotangents: of the carry, of the outputs."""
        carry_leaves, output_leaves = inexact_leaves(next_carry), inexact_leaves(outputs)
        return chosen(carry_leaves, self.carries), chosen(output_leaves, self.outputs)


def paths(
    core: Step,
    readout: Callable,
    loss: Loss,
    params: Params,
    carry: Carry,
    x: PyTree,
    target: PyTree,
) -> Paths:
    """The paths of one step, from its derivative: `stop_gradient`, rounding and integers have none.

    Over any number of steps: a carry leaf is read if a leaf that is read depends on it in the next
    step. Three small programs are traced, nothing runs.

    Args:
      core: `(params, carry, x) -> (carry, outputs)`.
      readout: `(params, outputs) -> y`.
      loss: `(y, target) -> losses`, or that and aux.
      params, carry, x, target: of one step; arrays or shapes.
    """
    next_carry, outputs = jax.eval_shape(core, params, carry, x)
    y = jax.eval_shape(readout, params, outputs)
    of_loss = _flow_back(_value_of(loss), (), y, target)
    of_readout = _flow_back(readout, params, outputs)
    of_core = _flow_back(core, params, carry, x)

    # Backwards, as cotangents go: from the loss to y, through the readout, through the core.
    ys = _reached(of_loss.leaves, {0})
    outputs_read = _reached(of_readout.leaves, _numbers(ys))
    num_carries = len(inexact_leaves(next_carry))
    # The core's cotangents are those of its carry, then those of its outputs.
    bars = {num_carries + i for i in _numbers(outputs_read)}
    # What is read of the carry received is read of the carry that the step before emits.
    while not (grown := _numbers(_reached(of_core.leaves, bars))) <= bars:
        bars |= grown
    carries = tuple(i in bars for i in range(num_carries))
    by_readout = _reached(of_readout.params, _numbers(ys))
    by_core = _reached(of_core.params, bars)
    params_read = tuple(a or b for a, b in zip(by_readout, by_core, strict=True))

    names = [f"params{keystr(path)}" for path, _ in tree_leaves_with_path(params)]
    looks = zip(names, of_readout.looks_at, of_core.looks_at, strict=True)
    unread = tuple(name for name, in_readout, in_core in looks if not in_readout | in_core)
    reason = ""
    if names and not any(params_read):
        reason = "no path leads from params to the loss"
    if names and not any(ys):
        reason = "the loss does not depend on y"
    return Paths(ys, outputs_read, carries, params_read, unread, reason)


class _Flow(NamedTuple):
    """Through one function `(params, tree, …)`, backwards.

    Attributes:
      params: for each leaf of the parameters, which cotangents reach it, by number among those of
        the inexact leaves of the results.
      leaves: the same for each inexact leaf of `tree`.
      looks_at: for each leaf of the parameters, whether a result depends on it.
    """

    params: list[Sources]
    leaves: list[Sources]
    looks_at: list[bool]


def _flow_back(function: Callable, params: Params, tree: PyTree, *others: Any) -> _Flow:
    def pullback_and_results(bars, params, tree, *others):
        leaves, rebuild = split_inexact(tree)

        def run(params, leaves):
            results = function(params, rebuild(leaves), *others)
            return inexact_leaves(results), results

        _, pull, results = jax.vjp(run, params, leaves, has_aux=True)
        return pull(bars), results

    bars = inexact_leaves(jax.eval_shape(function, params, tree, *others))
    by_bars, by_all = _dependence_tree(pullback_and_results, bars, params, tree, *others)
    params_bar, leaves_bar = by_bars
    of_results = _union(jax.tree.leaves(by_all))
    # Behind the cotangents the parameters are the next inputs.
    looks_at = [len(bars) + i in of_results for i in range(len(jax.tree.leaves(params)))]
    return _Flow(jax.tree.leaves(params_bar), leaves_bar, looks_at)


def _reached(sources: list[Sources], bars: set[int]) -> tuple[bool, ...]:
    """For each of the sources, whether one of these cotangents is among them."""
    return tuple(not bars.isdisjoint(of_one) for of_one in sources)


def _numbers(flags: Sequence[bool]) -> set[int]:
    """The numbers of those that are True."""
    return {i for i, flag in enumerate(flags) if flag}


def _value_of(loss: Loss) -> Callable:
    def value(_, y, target):
        result = loss(y, target)
        return result[0] if isinstance(result, tuple) else result

    return value


def chosen(leaves: Sequence, which: Sequence[bool]) -> list:
    """The leaves for which `which` says so."""
    return [leaf for leaf, is_chosen in zip(leaves, which, strict=True) if is_chosen]


def replaced(leaves: Sequence, which: Sequence[bool], new: Sequence) -> list:
    """The leaves, those that `which` chooses replaced by the `new` ones, in order."""
    new_leaves = iter(new)
    pairs = zip(leaves, which, strict=True)
    return [next(new_leaves) if is_chosen else leaf for leaf, is_chosen in pairs]


def inner_programs(equation: Any) -> list[Any]:
    """The programs that an equation holds, whatever it does with them."""
    programs = []
    for parameter in equation.params.values():
        for value in parameter if isinstance(parameter, tuple | list) else [parameter]:
            program = getattr(value, "jaxpr", value)
            programs += [program] if hasattr(program, "eqns") else []
    return programs
