"""The step Jacobian of gated cells, split by the path that the derivative takes through them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jbptt import cells
from jbptt.analysis.jacobians import check_system, push_tangents
from jbptt.arrays import one_if_zero, widened
from jbptt.executables import run
from jbptt.norms import norm
from jbptt.recurrence import carries_of
from jbptt.starts import start_of
from jbptt.types import Carry, Params, PyTree, Step

GATES = {
    "lstm": ("input", "forget", "candidate", "output"),
    "gru": ("reset", "update", "candidate"),
}
STRAIGHT = {"lstm": "cell", "gru": "leak"}
ARTICLE = {"lstm": "an", "gru": "a"}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GatePaths:
    """Every step's Jacobian as a sum over paths, `J_t = Σ_path jacobians[path][t]`.

    Attributes:
      names: the P paths, the straight one first, then the gates in the order of the cell's weights.
      jacobians: for each name `[T, n, n]`; lstm: n = 2H, the carry (h, c) flattened in that order.
      norms: Frobenius norms of the paths' Jacobians, `[T, P]` in the order of `names`.
      shares: `norms` relative to their sum over paths, `[T, P]`; 0 where all of them are 0.
    """

    names: tuple[str, ...] = field(metadata={"static": True})
    jacobians: dict[str, jax.Array]
    norms: jax.Array
    shares: jax.Array


def check_gated_cell(params: Any, carry: Any, xs: Any) -> tuple[str, Step]:
    """`"gru"` or `"lstm"` and its step, by the shapes of the parameters; else a ValueError."""
    shapes = (
        {name: np.shape(leaf) for name, leaf in params.items()}
        if isinstance(params, Mapping)
        else {}
    )
    if not {"w_x", "w_h", "b"} <= set(shapes) or len(shapes["w_h"]) != 2:
        raise ValueError(
            "params must be those of cells.gru or cells.lstm, with w_x, w_h and b, got "
            f"{jax.tree.structure(params)}; of a model that wraps a cell pass the cell's own "
            "parameters"
        )
    hidden, width = shapes["w_h"]
    kind = {4 * hidden: "lstm", 3 * hidden: "gru"}.get(width)
    if kind is None:
        alone = (
            " (one of width H, rnn or linear, has no gates: its step_jacobians are its only path)"
        )
        raise ValueError(
            f"params have w_h of shape {shapes['w_h']}, wanted [H, 3·H] as a gru has it or [H, "
            "4·H] as an lstm; only these two cells have gate "
            f"paths{alone if width == hidden else ''}"
        )
    biases = {"b", "b_h"} if kind == "gru" else {"b"}
    wanted_widths = {name: (width,) for name in biases} | {"w_x": (*shapes["w_x"][:1], width)}
    for name, wanted in wanted_widths.items():
        if shapes.get(name) != wanted:
            raise ValueError(
                f"params have w_h of shape {shapes['w_h']}, as {ARTICLE[kind]} {kind} has it, but "
                f"{name} of shape {shapes.get(name)}, wanted {wanted}; pass the parameters of "
                f"cells.{kind}"
            )
    wanted = (hidden,) if kind == "gru" else ((hidden,), (hidden,))
    if jax.tree.map(np.shape, carry, is_leaf=lambda c: not isinstance(c, tuple)) != wanted:
        raise ValueError(
            f"carry must be that of one example of {ARTICLE[kind]} {kind}, of shape {wanted}, got "
            f"{jax.tree.map(np.shape, carry)}; use jax.vmap for a batch"
        )
    if jax.tree.leaves(xs) and np.shape(xs)[1:] != shapes["w_x"][:1]:
        raise ValueError(
            f"xs has shape {np.shape(xs)}, wanted [T, {shapes['w_x'][0]}], as wide as params' w_x "
            "is high; pass the inputs of one example (jax.vmap for a batch), or the parameters "
            "that belong to them"
        )
    return kind, _step_of(kind, params)


def _step_of(kind: str, params: Any) -> Step:
    return getattr(cells, kind)(1, len(params["w_h"])).step


def gate_paths(params: Params, carry: Carry, xs: PyTree) -> GatePaths:
    """How much of `∂carries[t+1]/∂carries[t]` passes through each gate of a gru or lstm, by step.

    The derivative is taken along one path at a time; everything else keeps its value of the forward
    pass. The straight path goes past all gates, every other one from h_{t−1} through the
    pre-activation of one gate:

        lstm   cell: ∂(o ⊙ tanh(f ⊙ c + i ⊙ g), f ⊙ c + i ⊙ g)/∂c at constant i, f, g, o
               input, forget, candidate, output: through i, f, g, o
        gru    leak: diag(z), from h ← (1 − z) ⊙ n + z ⊙ h at constant z and n
               reset, update, candidate: through r, z, and the h U_n + b_hn inside n

    The paths sum to the step's Jacobian exactly; their norms do not, where paths cancel. One
    forward pass and P·n tangents of T steps side by side; memory O(P T n²). jit- and vmap-able.

    Args:
      params: of `cells.gru` or `cells.lstm`, told apart by their shapes (3·H or 4·H columns);
        further entries, like a linear readout's, are ignored.
      carry: what enters step 0, or a function of the parameters that gives it, unbatched: `[H]`, or
        for the lstm `([H], [H])`; vmap for batches.
      xs: `[T, input]`.

    Raises:
      ValueError: parameters, a carry or xs of anything else, a batch of them too; what
        `step_jacobians` raises.
    """
    carry = start_of(carry, params)
    kind, step = check_gated_cell(params, carry, xs)
    num_steps = check_system(step, params, carry, xs, None, None)
    return run(_gate_paths, (), (kind, num_steps), params, carry, xs)


def _gate_paths(kind, num_steps, params, carry, xs) -> GatePaths:
    step = _step_of(kind, params)
    names = (STRAIGHT[kind], *GATES[kind])
    carries = carries_of(step, params, carry, xs, None, num_steps)

    # The gates see h only as h @ w_h + bias. A nudge of the bias by (nudge of h) @ w_h, in the
    # columns of one gate, opens that gate alone; a nudge of the carry, taken back in the bias,
    # opens what is left.
    hidden = params["w_h"].shape[0]
    # The gru's b_h stands inside the product with the reset gate.
    bias = "b_h" if kind == "gru" else "b"
    open_carry = jnp.arange(len(names)) == 0
    into_bias = jnp.concatenate([-jnp.ones((1, len(names) - 1)), jnp.eye(len(names) - 1)])
    jacobians = jax.vmap(
        lambda straight, gates: jax.vmap(
            lambda c, x: path_jacobian(
                step, params, c, x, straight, jnp.repeat(gates, hidden), bias
            )
        )(carries, xs)
    )(open_carry, into_bias)

    norms = norm(widened(jacobians), 2).T
    total = jnp.sum(norms, axis=1, keepdims=True)
    shares = norms / one_if_zero(total)
    return GatePaths(names, dict(zip(names, jacobians, strict=True)), norms, shares)


def path_jacobian(
    step: Step,
    params: Params,
    carry: Carry,
    x: PyTree,
    straight: jax.Array,
    columns: jax.Array,
    bias: str,
) -> jax.Array:
    """`[n, n]`: how one step's carry answers a nudge of the carry received, along one path.

    Args:
      step, params, carry, x: one step of a gated cell.
      straight: whether the nudge reaches the carry itself.
      columns: by what the nudge is multiplied in each column of `h @ w_h`.
      bias: the parameter that it is added to there.
    """
    flat, unravel = ravel_pytree(carry)

    def run(nudge):
        nudge_h, *_ = jax.tree.leaves(unravel(nudge))
        nudged = {
            **params,
            bias: params[bias] + (nudge_h @ params["w_h"]) * columns.astype(nudge_h.dtype),
        }
        return ravel_pytree(
            step(nudged, unravel(flat + straight.astype(flat.dtype) * nudge), x)[0]
        )[0], ()

    return push_tangents(run, jnp.zeros_like(flat), jnp.eye(flat.size, dtype=flat.dtype))[0]
