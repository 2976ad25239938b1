"""The programs of the forward and the backward loop, and what of them a loss needs."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from jbptt.engine.dependence import Paths, chosen, replaced
from jbptt.engine.jaxprs import needed, reached_from, variables_of


class StepVariables(NamedTuple):
    """The variables of one step and its pullback, by what they are.

    Lists over leaves; cotangents (`bars`, `…_bar`) over inexact leaves. What is computed may be a
    literal. First the inputs of the program, then its outputs.
    """

    loop_params: list[Var]
    carry: list[Var]
    inputs: list[Var]
    bars: list[Var]  # cotangents of next_carry, then of outputs, where a loss reads them
    next_carry: list[Any]
    outputs: list[Any]
    operands: list[Any]  # of the products with weights
    loop_params_bar: list[Any]
    products_bar: list[Any]  # None where it is zero
    carry_bar: list[Any]
    inputs_bar: list[Any]  # of those whose cotangents are asked for

    @property
    def results(self) -> list[Any]:
        """What the backward loop is for."""
        products_bar = [atom for atom in self.products_bar if atom is not None]
        return [*self.loop_params_bar, *products_bar, *self.carry_bar, *self.inputs_bar]


@dataclass(frozen=True, eq=False)
class LoopPrograms:
    """What both loops compute in one step. It holds no array: static data of a pytree.

    Attributes:
      jaxpr: one step and its pullback.
      variables: its variables by what they are.
      invariant: those that are the same in all steps.
      forward: the equations of the forward loop.
      backward: those of the backward loop; what is computed again comes first.
      stacked: what the forward loop leaves of every step.
      lagged: carries received that are not stacked: they are read off the stack of the carry
        emitted, one step behind.
      outputs: the structure of a step's outputs.
      live: which leaves have cotangents.
      perturbed_inputs: the inputs whose cotangents are asked for.
      zero_bars: cotangents that are zero, since no loss reads what they belong to.
    """

    jaxpr: Jaxpr
    variables: StepVariables
    invariant: list[Var]
    forward: list[JaxprEqn]
    backward: list[JaxprEqn]
    stacked: list[Var]
    lagged: list[Var]
    outputs: Any
    live: Paths
    perturbed_inputs: list[Var]
    zero_bars: frozenset[Var] = frozenset()

    def is_zero(self, atom: Any) -> bool:
        """Whether a result of the backward loop is a cotangent that is zero."""
        return not isinstance(atom, Literal) and atom in self.zero_bars

    def narrowed(self, carries: tuple[bool, ...], outputs: tuple[bool, ...]) -> "LoopPrograms":
        """The programs for a loss that reads only these leaves of the last carry and the outputs.

        A pullback is linear: an equation whose cotangents are all zero gives zeros, and is left
        out. (To run it on zeros is not the same: 0·inf is NaN.)
        """
        variables, live = self.variables, self.live
        of_bars = reached_from(variables.bars, self.backward)
        live_outputs = chosen(outputs, live.outputs)
        # A carry leaf that is not read at the end may be read by a later step, so `carries` grows
        # by those whose cotangent is not zero, until it no longer changes.
        while True:
            is_read = [*chosen(carries, live.carries), *live_outputs]
            backward, nonzero = self._nonzero(of_bars, set(chosen(variables.bars, is_read)))
            flows = [not isinstance(v, Literal) and v in nonzero for v in variables.carry_bar]
            grown = _either(carries, flows)
            if grown == carries:
                break
            carries = grown
        zero_bars = frozenset(of_bars - nonzero)
        is_zero = [isinstance(v, Var) and v in zero_bars for v in variables.products_bar]
        variables = variables._replace(
            bars=[v for v in variables.bars if v in nonzero],
            products_bar=replaced(variables.products_bar, is_zero, [None] * sum(is_zero)),
        )
        live = live._replace(
            carries=_both(live.carries, carries),
            outputs=_both(live.outputs, outputs),
        )
        return replace(
            self,
            variables=variables,
            backward=needed(backward, variables.results),
            live=live,
            zero_bars=zero_bars,
        )

    def _nonzero(self, of_bars: set[Var], nonzero: set[Var]) -> tuple[list[JaxprEqn], set[Var]]:
        """The backward loop without what gives zeros, and the cotangents that are not zero.

        of_bars: all that depends on a cotangent. nonzero: the cotangents that come in.
        """
        equations, nonzero = [], set(nonzero)
        for equation in self.backward:
            cotangents = of_bars.intersection(variables_of(equation.invars))
            if not cotangents or cotangents & nonzero:
                equations.append(equation)
                nonzero.update(v for v in equation.outvars if v in of_bars)
        return equations, nonzero


def _either(flags: tuple[bool, ...], others: Any) -> tuple[bool, ...]:
    return tuple(a or b for a, b in zip(flags, others, strict=True))


def _both(flags: tuple[bool, ...], others: Any) -> tuple[bool, ...]:
    return tuple(a and b for a, b in zip(flags, others, strict=True))
