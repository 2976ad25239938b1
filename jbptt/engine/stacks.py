"""What the forward loop leaves for the backward loop: arrays of every step, by variable."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal, Var

from jbptt.engine.jaxprs import read


@dataclass(frozen=True, eq=False)
class Layout:
    """Whose arrays `Stacks` holds, and the direction of time; static data of a pytree.

    Attributes:
      num_steps: S.
      invariant: the variables that are the same in all steps.
      stacked: those with a stack `[S, ...]` of their own.
      lagged: pairs (a carry that a step receives, the carry that it emits in its place). The first
        has no stack: it is what the second was one step before.
      reverse: whether time runs from the last step to the first.
    """

    num_steps: int
    invariant: list[Var]
    stacked: list[Var]
    lagged: list[tuple[Var, Var]]
    reverse: bool


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["invariant_arrays", "stacked_arrays", "first_carries"],
    meta_fields=["layout"],
)
@dataclass(frozen=True)
class Stacks:
    """What the forward loop leaves.

    Attributes:
      layout: the variables of the arrays, in the same order.
      invariant_arrays: one for all steps.
      stacked_arrays: `[S, ...]`, in the order of the inputs.
      first_carries: of each lagged carry the one that the first step in time receives.
    """

    layout: Layout
    invariant_arrays: list
    stacked_arrays: list
    first_carries: list

    @property
    def invariant(self) -> dict[Var, Any]:
        """By variable: the same in all steps."""
        return dict(zip(self.layout.invariant, self.invariant_arrays, strict=True))

    @property
    def stacked(self) -> dict[Var, jax.Array]:
        """By variable: one for each step."""
        return dict(zip(self.layout.stacked, self.stacked_arrays, strict=True))

    @property
    def lagged(self) -> dict[Var, tuple[Any, Var]]:
        """By variable: its value in the first step, and the variable that it follows by a step."""
        pairs = zip(self.layout.lagged, self.first_carries, strict=True)
        return {received: (first, emitted) for (received, emitted), first in pairs}

    def at(self, variable: Var, t: jax.Array) -> Any:
        """Step t of what is stacked or lagged."""
        if variable not in self.lagged:
            return lax.dynamic_index_in_dim(self.stacked[variable], t, keepdims=False)
        first, emitted = self.lagged[variable]
        last = self.layout.num_steps - 1
        step_before, is_first = (t + 1, t == last) if self.layout.reverse else (t - 1, t == 0)
        step_before = jnp.clip(step_before, 0, last)
        earlier = lax.dynamic_index_in_dim(self.stacked[emitted], step_before, keepdims=False)
        return jnp.where(is_first, first, earlier)

    def piece(self, atom: Any, start: Any, length: int) -> jax.Array:
        """Steps start … start + length − 1 of any atom."""
        if isinstance(atom, Literal) or atom in self.layout.invariant:
            return self._repeated(atom)[:length]
        if atom in self.lagged:
            # The emitted carry's steps, one step earlier; only the first in time needs `at`.
            emitted = self.stacked[self.lagged[atom][1]]
            if self.layout.reverse:
                others = lax.dynamic_slice_in_dim(emitted, start + 1, length - 1)
                first = self.at(atom, jnp.asarray(start + length - 1))
                return jnp.concatenate([others, first[None]])
            others = lax.dynamic_slice_in_dim(emitted, start, length - 1)
            return jnp.concatenate([self.at(atom, jnp.asarray(start))[None], others])
        stack = self.stacked[atom]
        if length == self.layout.num_steps:
            return stack
        return lax.dynamic_slice_in_dim(stack, start, length)

    def whole(self, atom: Any) -> jax.Array:
        """All steps of any atom."""
        if isinstance(atom, Literal) or atom in self.layout.invariant:
            return self._repeated(atom)
        return self.piece(atom, 0, self.layout.num_steps)

    def _repeated(self, atom: Any) -> jax.Array:
        value = read(self.invariant, atom)
        return jnp.broadcast_to(value, (self.layout.num_steps, *jnp.shape(value)))
