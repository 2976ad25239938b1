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
    """Which variables `Stacks` holds, and the direction of time."""

    num_steps: int
    known: list[Var]
    of: list[Var]
    lagged: list[tuple[Var, Var]]  # a carry received, and the carry emitted that is the same one, a step before
    reverse: bool


@partial(jax.tree_util.register_dataclass, data_fields=["arrays", "stacked", "first"], meta_fields=["layout"])
@dataclass(frozen=True)
class Stacks:
    """What the forward loop leaves.

    Attributes:
      layout: what the arrays are.
      arrays: the same in all steps.
      stacked: one for each step, `[S, ...]`, in the order of the inputs.
      first: of each lagged carry its value in the step that comes first in time.
    """

    layout: Layout
    arrays: list
    stacked: list
    first: list

    @property
    def known(self) -> dict[Var, Any]:
        """By variable: the same in all steps."""
        return dict(zip(self.layout.known, self.arrays, strict=True))

    @property
    def of(self) -> dict[Var, jax.Array]:
        """By variable: one for each step."""
        return dict(zip(self.layout.of, self.stacked, strict=True))

    @property
    def lagged(self) -> dict[Var, tuple[Any, Var]]:
        """By variable: its first value, and the variable that it follows by a step."""
        return {name: (first, other) for (name, other), first in zip(self.layout.lagged, self.first, strict=True)}

    def whole(self, atom: Any) -> jax.Array:
        """All steps; what they share is repeated."""
        if not isinstance(atom, Literal) and atom not in self.layout.known:
            return self.piece(atom, 0, self.layout.num_steps)
        value = read(self.known, atom)
        return jnp.broadcast_to(value, (self.layout.num_steps, *jnp.shape(value)))

    def at(self, name: Var, t: jax.Array) -> Any:
        """Step t."""
        if name in self.lagged:
            first, followed = self.lagged[name]
            last = self.layout.num_steps - 1
            before, begins = (t + 1, t == last) if self.layout.reverse else (t - 1, t == 0)
            earlier = lax.dynamic_index_in_dim(self.of[followed], jnp.clip(before, 0, last), keepdims=False)
            return jnp.where(begins, first, earlier)
        return lax.dynamic_index_in_dim(self.of[name], t, keepdims=False)

    def piece(self, atom: Any, start: Any, length: int) -> jax.Array:
        """Steps start … start + length − 1."""
        if isinstance(atom, Literal) or atom in self.layout.known:
            return self.whole(atom)[:length]
        if atom in self.lagged:
            followed = self.of[self.lagged[atom][1]]
            if self.layout.reverse:
                rest = lax.dynamic_slice_in_dim(followed, start + 1, length - 1)
                return jnp.concatenate([rest, self.at(atom, jnp.asarray(start + length - 1))[None]])
            rest = lax.dynamic_slice_in_dim(followed, start, length - 1)
            return jnp.concatenate([self.at(atom, jnp.asarray(start))[None], rest])
        whole = self.of[atom]
        return whole if length == self.layout.num_steps else lax.dynamic_slice_in_dim(whole, start, length)
