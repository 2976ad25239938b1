"""Recurrent cells as pure functions, and what can be wrapped around a step.

Every cell is a `Cell(init, initial_carry, step)` whose parameters are
`{"w_x": [input, m·H], "w_h": [H, m·H], "b": [m·H]}` (gru: `"b_h"` too), m = 1 for linear and rnn, 3
for gru, 4 for lstm, and whose output is the hidden state: `y = h`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbptt import validation
from jbptt.arrays import select_leading, widened_dtype
from jbptt.types import Carry, Params, PyTree, Step

Initializer = Callable[..., jax.Array]


class Cell(NamedTuple):
    """A recurrent cell.

    Attributes:
      init: `key -> params`.
      initial_carry: `(batch_shape=()) -> carry`, zeros.
      step: `(params, carry, x) -> (carry, y)`, x of shape `[*batch, input]`, y `[*batch, H]`.
    """

    init: Callable[[jax.Array], Params]
    initial_carry: Callable[..., Carry]
    step: Step


def glorot() -> Initializer:
    """Uniform with variance 2 / (fan in + fan out) (Glorot & Bengio, 2010)."""
    return jax.nn.initializers.glorot_uniform()


def orthogonal(scale: float = 1.0) -> Initializer:
    """A random orthogonal matrix times `scale`, each singular value `scale` (Saxe et al., 2014)."""
    return jax.nn.initializers.orthogonal(scale)


def identity(scale: float = 1.0) -> Initializer:
    """`scale` times the identity: with ReLU, the IRNN (Le, Jaitly & Hinton, 2015)."""

    def init(key, shape, dtype=jnp.float32):
        del key
        return scale * jnp.eye(*shape, dtype=dtype)

    return init


def _weights(input_size, hidden_size, num_gates, input_init, recurrent_init, dtype):
    """`init` for the common layout; each gate's block is drawn alone, so it can be orthogonal."""
    validation.check_positive_integer("input_size", input_size)
    validation.check_positive_integer("hidden_size", hidden_size)
    real = jax.dtypes.canonicalize_dtype(dtype)

    def blocks(key, init, rows):
        # One batched draw: several QR decompositions at once can deadlock XLA's thread pool on few
        # cores.
        wide = widened_dtype(real)  # QR knows no half precision
        drawn = jax.vmap(lambda k: init(k, (rows, hidden_size), wide))(
            jax.random.split(key, num_gates)
        )
        return jnp.concatenate(list(drawn), axis=1).astype(real)

    def init(key):
        key_x, key_h = jax.random.split(key)
        return {
            "w_x": blocks(key_x, input_init, input_size),
            "w_h": blocks(key_h, recurrent_init, hidden_size),
            "b": jnp.zeros(num_gates * hidden_size, real),
        }

    def zeros(batch_shape=()):
        return jnp.zeros((*batch_shape, hidden_size), real)

    return init, zeros


def rnn(
    input_size: int,
    hidden_size: int,
    *,
    activation: Callable[[jax.Array], jax.Array] = jnp.tanh,
    input_init: Initializer | None = None,
    recurrent_init: Initializer | None = None,
    dtype: Any = float,
) -> Cell:
    """The simple recurrent network, `h_t = φ(x_t w_x + h_{t−1} w_h + b)` (Elman, 1990).

    Args:
      input_size: width of x.
      hidden_size: H.
      activation: φ, elementwise: `jnp.tanh`, `jax.nn.relu`, `jax.nn.leaky_relu`, …
      input_init: initializer of `w_x`; None: `glorot()`.
      recurrent_init: initializer of `w_h`; None: `orthogonal()`.
      dtype: of the parameters and the carry; float is float32, or float64 with x64 enabled.

    Raises:
      ValueError: a size < 1.
    """
    init, zeros = _weights(
        input_size, hidden_size, 1, input_init or glorot(), recurrent_init or orthogonal(), dtype
    )

    def step(params, h, x):
        h = activation(x @ params["w_x"] + h @ params["w_h"] + params["b"])
        return h, h

    return Cell(init, zeros, step)


def linear(
    input_size: int,
    hidden_size: int,
    *,
    input_init: Initializer | None = None,
    recurrent_init: Initializer | None = None,
    dtype: Any = float,
) -> Cell:
    """The linear recurrence `h_t = x_t w_x + h_{t−1} w_h + b`; arguments as in `rnn`."""
    return rnn(
        input_size,
        hidden_size,
        activation=lambda a: a,
        input_init=input_init,
        recurrent_init=recurrent_init,
        dtype=dtype,
    )


def gru(
    input_size: int,
    hidden_size: int,
    *,
    input_init: Initializer | None = None,
    recurrent_init: Initializer | None = None,
    dtype: Any = float,
) -> Cell:
    """The gated recurrent unit (Cho et al., 2014), gates r, z, n, in PyTorch's form.

    It resets after the product.

        r = σ(x W_r + h U_r + b_r + b_hr)        n = tanh(x W_n + b_n + r ⊙ (h U_n + b_hn))
        z = σ(x W_z + h U_z + b_z + b_hz)        h ← (1 − z) ⊙ n + z ⊙ h

    Arguments as in `rnn`. A `torch.nn.GRU` layer maps by `w_x = weight_ih.T`, `w_h = weight_hh.T`,
    `b = bias_ih`, `b_h = bias_hh`.
    """
    init, zeros = _weights(
        input_size, hidden_size, 3, input_init or glorot(), recurrent_init or orthogonal(), dtype
    )

    def init_with_b_h(key):
        params = init(key)
        return {**params, "b_h": jnp.zeros_like(params["b"])}

    def step(params, h, x):
        r_x, z_x, n_x = jnp.split(x @ params["w_x"] + params["b"], 3, axis=-1)
        r_h, z_h, n_h = jnp.split(h @ params["w_h"] + params["b_h"], 3, axis=-1)
        r, z = jax.nn.sigmoid(r_x + r_h), jax.nn.sigmoid(z_x + z_h)
        n = jnp.tanh(n_x + r * n_h)
        h = (1 - z) * n + z * h
        return h, h

    return Cell(init_with_b_h, zeros, step)


def lstm(
    input_size: int,
    hidden_size: int,
    *,
    forget_bias: float = 1.0,
    input_init: Initializer | None = None,
    recurrent_init: Initializer | None = None,
    dtype: Any = float,
) -> Cell:
    """Long short-term memory (Hochreiter & Schmidhuber, 1997; Gers et al., 2000), gates i, f, g, o.

        i, f, o = σ(x W + h U + b)      g = tanh(x W_g + h U_g + b_g)
        c ← f ⊙ c + i ⊙ g               h ← o ⊙ tanh(c)              carry = (h, c)

    Arguments as in `rnn`; `forget_bias` is where the forget gate's bias starts (Jozefowicz et al.,
    2015). A `torch.nn.LSTM` layer maps by `w_x = weight_ih.T`, `w_h = weight_hh.T`,
    `b = bias_ih + bias_hh`.
    """
    init, zeros = _weights(
        input_size, hidden_size, 4, input_init or glorot(), recurrent_init or orthogonal(), dtype
    )

    def init_with_forget_bias(key):
        params = init(key)
        return {**params, "b": params["b"].at[hidden_size : 2 * hidden_size].set(forget_bias)}

    def step(params, carry, x):
        h, c = carry
        i, f, g, o = jnp.split(x @ params["w_x"] + h @ params["w_h"] + params["b"], 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    return Cell(
        init_with_forget_bias, lambda batch_shape=(): (zeros(batch_shape), zeros(batch_shape)), step
    )


@dataclass(frozen=True)
class ReadoutStep:
    """A step in two parts, `core`, which recurs, and `readout`, which looks; a call runs both."""

    core: Step
    readout: Callable[[Params, PyTree], PyTree]

    def __call__(self, params: Params, carry: Carry, x: PyTree) -> tuple[Carry, PyTree]:
        """One step, both parts."""
        carry, h = self.core(params, carry, x)
        return carry, self.readout(params, h)


def with_readout(step: Step, readout: Callable[[Params, PyTree], PyTree]) -> Step:
    """`step` followed by `y = readout(params, h)`; both parts receive the same `params`.

    The engine runs the two parts apart: all readouts of a segment at once, as one large product.
    """
    return ReadoutStep(step, readout)


def with_linear_readout(cell: Cell, output_size: int) -> Cell:
    """`cell`, then `y = h w_y + b_y`; its params gain `w_y` `[H, output]` and `b_y` `[output]`."""
    validation.check_positive_integer("output_size", output_size)

    def init(key):
        key_cell, key_readout = jax.random.split(key)
        params = cell.init(key_cell)
        w_h = params["w_h"]
        w_y = glorot()(key_readout, (w_h.shape[0], output_size), w_h.dtype)
        return {**params, "w_y": w_y, "b_y": jnp.zeros(output_size, w_h.dtype)}

    def readout(params, h):
        return h @ params["w_y"] + params["b_y"]

    return Cell(init, cell.initial_carry, with_readout(cell.step, readout))


def split_readout(step: Step) -> tuple[Step, Callable[[Params, PyTree], PyTree]]:
    """The two parts of a step; any other step is all core."""
    if isinstance(step, ReadoutStep):
        core, readout = split_readout(step.core)
        return core, lambda params, h: step.readout(params, readout(params, h))
    return step, lambda params, y: y


def with_reset(step: Step, initial_carry: Any) -> Step:
    """`step` on `x = (x, reset)`: where `reset` is True, the step starts from `initial_carry`.

    For boundaries of documents and episodes: neither value nor gradient crosses a reset.

    Args:
      step: any step, with or without a readout.
      initial_carry: a carry, batched or for one example, or a function of the batch shape (as in
        `Cell.initial_carry`). `reset` is bool, `()` or `[*batch]`.
    """
    if isinstance(step, ReadoutStep):
        return ReadoutStep(with_reset(step.core, initial_carry), step.readout)

    def reset_step(params, carry, inputs):
        x, reset = inputs
        reset = jnp.asarray(reset)
        start = initial_carry(reset.shape) if callable(initial_carry) else initial_carry
        start = jax.tree.map(
            lambda s, c: jnp.broadcast_to(s, jnp.shape(c)).astype(jnp.result_type(c)), start, carry
        )
        # A shared leaf goes on while one example does.
        return step(params, select_leading(~reset, carry, start), x)

    return reset_step
