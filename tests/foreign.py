"""Recurrent models of other libraries, each with two of: layers, normalisation, dropout, a readout."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jbptt import interop

nnx = pytest.importorskip("flax.nnx")
linen = pytest.importorskip("flax.linen")
hk = pytest.importorskip("haiku")
eqx = pytest.importorskip("equinox")

INPUT, HIDDEN, OUTPUT, EXAMPLES, NUM_STEPS = 2, 3, 2, 3, 5
KEY = jax.random.key(5)
EXACT_NORM = {"use_fast_variance": False, "force_float32_reductions": False}  # float32 otherwise


class NnxModel(nnx.Module):
    """Two layers, normalisation, dropout and a readout."""

    def __init__(self, rngs):
        self.lower = nnx.GRUCell(INPUT, HIDDEN, param_dtype=float, dtype=float, rngs=rngs)
        self.upper = nnx.OptimizedLSTMCell(HIDDEN, HIDDEN, param_dtype=float, dtype=float, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(HIDDEN))  # nnx.LayerNorm computes its moments in float32
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.readout = nnx.Linear(HIDDEN, OUTPUT, param_dtype=float, dtype=float, rngs=rngs)

    def initialize_carry(self, input_shape, rngs):
        inner = (*input_shape[:-1], HIDDEN)
        return self.lower.initialize_carry(input_shape, rngs), self.upper.initialize_carry(inner, rngs)

    def __call__(self, carry, x):
        lower, h = self.lower(carry[0], x)
        upper, h = self.upper(carry[1], self.dropout(self.scale * jax.nn.standardize(h)))
        return (lower, upper), self.readout(h)


class LinenModel(linen.Module):
    @linen.nowrap
    def initialize_carry(self, key, input_shape):
        return linen.GRUCell(HIDDEN, param_dtype=float).initialize_carry(key, input_shape)

    @linen.compact
    def __call__(self, carry, x):
        carry, h = linen.GRUCell(HIDDEN, param_dtype=float)(carry, x)
        h = linen.Dropout(0.3, deterministic=False)(linen.LayerNorm(param_dtype=float, **EXACT_NORM)(h))
        return carry, linen.Dense(OUTPUT, param_dtype=float)(h)


class EquinoxModel(eqx.Module):
    lower: eqx.nn.GRUCell
    upper: eqx.nn.LSTMCell
    dropout: eqx.nn.Dropout
    readout: eqx.nn.Linear
    activation: Any = jnp.tanh

    def __call__(self, carry, x, *, key):
        lower = self.lower(x, carry[0])
        upper = self.upper(self.dropout(lower, key=key), carry[1])
        return (lower, upper), self.readout(self.activation(upper[0]))


def haiku_model():
    dropout = lambda h: hk.dropout(hk.next_rng_key(), 0.3, h)
    return hk.DeepRNN([hk.GRU(HIDDEN), dropout, hk.LSTM(HIDDEN), hk.Linear(OUTPUT)])


def equinox_module(dropout=0.3):
    keys = jax.random.split(KEY, 3)
    lower, upper = eqx.nn.GRUCell(INPUT, HIDDEN, key=keys[0]), eqx.nn.LSTMCell(HIDDEN, HIDDEN, key=keys[1])
    return EquinoxModel(lower, upper, eqx.nn.Dropout(dropout), eqx.nn.Linear(HIDDEN, OUTPUT, key=keys[2]))


def equinox_carry():
    return jnp.zeros(HIDDEN), (jnp.zeros(HIDDEN), jnp.zeros(HIDDEN))


def linen_variables():
    return LinenModel().init({"params": KEY, "dropout": KEY}, jnp.zeros(HIDDEN), jnp.zeros(INPUT))


MODELS = {
    "nnx": lambda: interop.from_nnx(NnxModel(nnx.Rngs(0)), input_size=INPUT),
    "linen": lambda: interop.from_linen(LinenModel(), linen_variables(), input_size=INPUT, key=KEY),
    "haiku": lambda: interop.from_haiku(haiku_model, KEY, input_size=INPUT),
    "equinox": lambda: interop.from_equinox(equinox_module(), initial_carry=equinox_carry(), key=KEY),
}


class Sequence(eqx.Module):
    """A model that reads whole sequences, as Equinox's own examples do."""

    cell: eqx.nn.GRUCell
    readout: eqx.nn.Linear

    def __call__(self, xs):
        return self.readout(jax.lax.scan(lambda h, x: (self.cell(x, h), None), jnp.zeros(HIDDEN), xs)[0])
