"""Models of other libraries that cannot be steps, or not without a word more: what the user is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import (
    HIDDEN,
    INPUT,
    KEY,
    LinenModel,
    NnxModel,
    Sequence,
    equinox_carry,
    equinox_module,
    eqx,
    hk,
    linen,
    linen_variables,
    nnx,
)
from problems import assert_close

from jbptt import interop


class Counting(nnx.Module):
    """Stateful in one of three ways."""

    def __init__(self, way):
        self.cell, self.way, self.calls = nnx.GRUCell(INPUT, HIDDEN, rngs=nnx.Rngs(0)), way, 0
        self.norm = nnx.BatchNorm(HIDDEN, rngs=nnx.Rngs(0))
        self.seen = nnx.Variable(jnp.zeros(()))

    def __call__(self, carry, x):
        if self.way == "attribute":
            self.calls += 1
        if self.way == "variable":
            self.seen[...] = self.seen[...] + 1
        if self.way == "parameter":
            self.cell.dense_h.kernel[...] = 2 * self.cell.dense_h.kernel[...]
        carry, h = self.cell(carry, x)
        return carry, self.norm(h) if self.way == "batch norm" else h


@pytest.mark.parametrize("way", ["attribute", "variable", "parameter", "batch norm"])
def test_nnx_modules_with_a_state_of_their_own(way):
    where = {"attribute": "attributes", "variable": "'seen'", "parameter": "'kernel'", "batch norm": "'norm'"}[way]
    module = Counting(way)
    step, params, initial_carry = interop.from_nnx(module)
    with pytest.raises(
        ValueError, match=rf"Counting cannot be used as a step: one step changed .*{where}.*into the carry"
    ):
        jax.eval_shape(step, params, initial_carry((4,)), jnp.zeros((4, INPUT)))
    module.way = "none"
    module.norm.use_running_average = True
    step, params, initial_carry = interop.from_nnx(module)
    assert np.all(np.isfinite(step(params, initial_carry((4,)), jnp.ones((4, INPUT)))[1]))


def test_batch_norm_with_fixed_statistics_is_a_constant():
    module = Counting("batch norm")
    module.norm.use_running_average = True
    module.norm.mean[...] = jnp.ones(HIDDEN)
    step, params, initial_carry = interop.from_nnx(module)
    plain = interop.from_nnx(Counting("none"))
    x, carry = jnp.ones((4, INPUT)), initial_carry((4,))
    h = plain[0](plain[1], carry, x)[1]
    assert_close(step(params, carry, x)[1], (h - 1) / np.sqrt(1 + 1e-5), rtol=1e-6)

    linen_step, linen_params, start = batch_norm_linen(use_running_average=True)
    cell = linen.GRUCell(HIDDEN)
    h, _ = cell.apply({"params": linen_params["GRUCell_0"]}, start((4,)), x)
    assert_close(linen_step(linen_params, start((4,)), x)[1], h / np.sqrt(1 + 1e-5), rtol=1e-6)


class BatchNormLinen(linen.Module):
    use_running_average: bool = False

    @linen.compact
    def __call__(self, carry, x):
        carry, h = linen.GRUCell(HIDDEN)(carry, x)
        return carry, linen.BatchNorm(self.use_running_average)(h)


class BatchNormHaiku(hk.RNNCore):
    def __call__(self, x, carry):
        y, carry = hk.GRU(HIDDEN)(x, carry)
        return hk.BatchNorm(True, True, 0.9)(y, is_training=True), carry

    def initial_state(self, batch_size):
        return hk.GRU(HIDDEN).initial_state(batch_size)


class LearnedStart(hk.RNNCore):
    def __call__(self, x, carry):
        return hk.GRU(HIDDEN)(x, carry)

    def initial_state(self, batch_size):
        return hk.get_parameter("start", [HIDDEN], init=jnp.zeros)


class RandomStart(LearnedStart):
    def initial_state(self, batch_size):
        return jax.random.normal(hk.next_rng_key(), [HIDDEN])


class MaybeRandom(hk.RNNCore):
    """Draws where it is given a key, and asks for none."""

    def __call__(self, x, carry):
        y, carry = hk.GRU(HIDDEN)(x, carry)
        key = hk.maybe_next_rng_key()
        return y if key is None else hk.dropout(key, 0.5, y), carry

    def initial_state(self, batch_size):
        return hk.GRU(HIDDEN).initial_state(batch_size)


class MaybeRandomLinen(linen.Module):
    @staticmethod
    def initialize_carry(key, input_shape):
        return jnp.zeros((*input_shape[:-1], HIDDEN))

    @linen.compact
    def __call__(self, carry, x):
        carry, h = linen.GRUCell(HIDDEN)(carry, x)
        return carry, linen.Dropout(0.5, deterministic=not self.has_rng("dropout"))(h)


class CompiledInside(nnx.Module):
    def __init__(self):
        self.cell = nnx.GRUCell(INPUT, HIDDEN, rngs=nnx.Rngs(0))

    def __call__(self, carry, x):
        return nnx.remat(lambda cell, carry, x: cell(carry, x))(self.cell, carry, x)

    def initialize_carry(self, input_shape, rngs):
        return self.cell.initialize_carry(input_shape, rngs)

    in_features = INPUT


class Decoding(linen.Module):
    """State in a collection that is written only where it is mutable, as decoders keep their cache."""

    way: str = "cache"

    @linen.compact
    def __call__(self, carry, x):
        h = linen.Dense(INPUT)(x)
        if self.way == "shown":
            self.sow("intermediates", "h", h)
        if self.way == "perturbed":
            h = self.perturb("h", h)
        mutable = self.is_mutable_collection("cache")
        if self.way in ("cache", "counted", "evaluated") or (self.way == "made late" and mutable):
            past = self.variable("cache", "past", jnp.zeros, (INPUT,))
            new = 0.9 * past.value + x.mean(range(x.ndim - 1))
            if mutable:
                past.value = new
            if self.way == "evaluated":  # as a norm: its own statistics, or those that were kept
                return carry, h - (h.mean(0) if mutable else past.value)
            h = h if self.way == "counted" else h + new
        return carry, h


def decoding(way, collections=None):
    variables = Decoding(way).init(KEY, jnp.zeros((2, INPUT)), jnp.zeros((2, INPUT)))
    variables = {name: variables[name] for name in collections or variables}
    return interop.from_linen(Decoding(way), variables, input_size=INPUT, initial_carry=jnp.zeros(INPUT))


class Bridged(nnx.Module):
    """A linen module inside, which may not write there either."""

    def __init__(self):
        zeros = jnp.zeros((2, INPUT))
        self.inner = nnx.bridge.ToNNX(Decoding(), rngs=nnx.Rngs(0)).lazy_init(zeros, zeros)

    def __call__(self, carry, x):
        return self.inner(carry, x)


class Caching(nnx.Module):
    def __init__(self, rngs):
        self.past, self.kernel = nnx.Cache(jnp.zeros(INPUT)), nnx.Param(jnp.ones(INPUT))

    def __call__(self, carry, x):
        self.past[...] = 0.9 * self.past[...] + x.mean(range(x.ndim - 1))
        return carry, x * self.kernel[...] + self.past[...]


def caching_in_linen():
    module = nnx.bridge.to_linen(Caching)
    variables = module.init(KEY, jnp.zeros((2, INPUT)), jnp.zeros((2, INPUT)))
    return interop.from_linen(module, variables, input_size=INPUT, initial_carry=jnp.zeros(INPUT))


class LateState(hk.Module):
    """Keeps nothing while parameters are made."""

    def __call__(self, x, carry):
        if not hk.running_init():
            past = hk.get_state("past", [INPUT], init=jnp.zeros)
            hk.set_state("past", past + x.mean(0))
            x = x + past
        return hk.Linear(INPUT)(x), carry


class HoldsState(eqx.Module):
    state: eqx.nn.State

    def __call__(self, carry, x):
        return carry, x


class StartlessLinen(linen.RNNCellBase):
    @linen.compact
    def __call__(self, carry, x):
        carry = jnp.tanh(linen.Dense(HIDDEN)(jnp.concatenate([carry, x], -1)))
        return carry, carry

    num_feature_axes = 1


class StartlessNnx(nnx.RNNCellBase):
    in_features = INPUT

    def __call__(self, carry, x):
        return carry, x


class StartlessHaiku(hk.RNNCore):
    def __call__(self, x, carry):
        return x, carry

    def initial_state(self, batch_size):
        raise NotImplementedError


class InputFirst(eqx.Module):
    def __call__(self, x, carry):
        return carry + x, x


class Steady(eqx.Module):
    def __call__(self, carry, x):
        return carry + x, x


class LearnedStartNnx(nnx.Module):
    def __init__(self):
        self.cell, self.start = nnx.GRUCell(INPUT, HIDDEN, rngs=nnx.Rngs(0)), nnx.Param(jnp.zeros(HIDDEN))

    def initialize_carry(self, input_shape, rngs):
        return jnp.broadcast_to(self.start[...], (*input_shape[:-1], HIDDEN))

    def __call__(self, carry, x):
        return self.cell(carry, x)


class LearnedStartLinen(linen.Module):
    def setup(self):
        self.cell, self.start = linen.GRUCell(HIDDEN), self.param("start", jax.nn.initializers.zeros, (HIDDEN,))

    def initialize_carry(self, key, input_shape):
        return jnp.broadcast_to(self.start, (*input_shape[:-1], HIDDEN))

    def __call__(self, carry, x):
        return self.cell(carry, x)


class Showing(nnx.Module):
    def __init__(self):
        self.cell = nnx.GRUCell(INPUT, HIDDEN, rngs=nnx.Rngs(0))

    def __call__(self, carry, x):
        carry, h = self.cell(carry, x)
        self.sow(nnx.Intermediate, "hidden", h)
        return carry, h


class Pieces(nnx.Module):
    """Two cells and no word about their carry; the call gives back one array."""

    def __init__(self):
        self.a, self.b = (nnx.GRUCell(INPUT, INPUT, rngs=nnx.Rngs(0)) for _ in range(2))

    def __call__(self, carry, x):
        return self.b(carry, self.a(carry, x)[1])[1]


def step_once(converted, width=INPUT):
    step, params, initial_carry = converted
    return jax.eval_shape(step, params, initial_carry((2,)), jnp.zeros((2, width)))


def step_without_keys(converted):
    """As one who builds the carry by hand."""
    step, params, _ = converted
    return jax.eval_shape(step, params, jnp.zeros((2, HIDDEN)), jnp.zeros((2, INPUT)))


def maybe_random_linen(key=None):
    module = MaybeRandomLinen()
    variables = module.init(KEY, jnp.zeros((2, HIDDEN)), jnp.zeros((2, INPUT)))
    return interop.from_linen(module, variables, input_size=INPUT, key=key)


@pytest.mark.parametrize("name", ["linen", "haiku"])
def test_modules_that_draw_only_where_there_is_a_key(name):
    """Half of y is zero, and other halves with another key."""
    make = {
        "linen": lambda: maybe_random_linen(KEY),
        "haiku": lambda: interop.from_haiku(MaybeRandom, KEY, input_size=INPUT),
    }
    step, params, initial_carry = make[name]()
    x = jnp.ones((64, INPUT))
    shown = [step(params, initial_carry((64,), key), x)[1] == 0 for key in (KEY, jax.random.key(7))]
    share = [float(jnp.mean(zero)) for zero in shown]
    assert 0.3 < min(share) <= max(share) < 0.7 and np.any(shown[0] != shown[1])
    if name == "linen":
        assert not np.any(step_value(maybe_random_linen()) == 0)


def step_value(converted):
    step, params, initial_carry = converted
    return step(params, initial_carry((2,)), jnp.ones((2, INPUT)))[1]


def cells_of_nnx():
    return [nnx.GRUCell(INPUT, HIDDEN, rngs=nnx.Rngs(0)) for _ in range(2)]


def batch_norm_linen(**options):
    module = BatchNormLinen(**options)
    variables = module.init(KEY, jnp.zeros((2, HIDDEN)), jnp.zeros((2, INPUT)))
    return interop.from_linen(module, variables, input_size=INPUT, initial_carry=jnp.zeros(HIDDEN))


def linen_gru(**options):
    cell = linen.GRUCell(HIDDEN)
    return interop.from_linen(cell, cell.init(KEY, jnp.zeros(HIDDEN), jnp.zeros(INPUT)), **options)


def learned_start_linen():
    variables = LearnedStartLinen().init(KEY, jnp.zeros(HIDDEN), jnp.zeros(INPUT))
    return interop.from_linen(LearnedStartLinen(), variables, input_size=INPUT)


def equinox_chain(**options):
    chain = eqx.nn.Sequential([eqx.nn.Linear(2, 2, key=KEY), eqx.nn.Lambda(jnp.tanh)])
    return interop.from_equinox(chain, initial_carry=jnp.zeros(2), **options)


def linen_chain():
    return interop.from_linen(
        linen.Sequential([linen.Dense(2)]), {"params": {}}, input_size=2, initial_carry=jnp.zeros(2)
    )


def equinox_norm():
    norm = eqx.nn.BatchNorm(HIDDEN, axis_name="batch", mode="ema")
    return interop.from_equinox(eqx.nn.Sequential([eqx.nn.Linear(2, 2, key=KEY), norm]), initial_carry=jnp.zeros(2))


REFUSED = {
    "nnx bidirectional": (lambda: interop.from_nnx(nnx.Bidirectional(*map(nnx.RNN, cells_of_nnx()))), "flip"),
    "nnx reversed": (
        lambda: interop.from_nnx(nnx.RNN(cells_of_nnx()[0], reverse=True)),
        r"RNN .* from the end.*\.cell",
    ),
    "not an nnx module": (lambda: interop.from_nnx(equinox_module()), "EquinoxModel .*flax.nnx.Module"),
    "a class": (lambda: interop.from_nnx(nnx.GRUCell), "instance of flax.nnx.Module"),
    "nnx layer": (
        lambda: interop.from_nnx(nnx.LayerNorm(2, rngs=nnx.Rngs(0))),
        "LayerNorm .*must take .carry, x.*call=",
    ),
    "nnx sequence": (
        lambda: interop.from_nnx(cells_of_nnx()[0], call=lambda xs: xs),
        r"GRUCell .*call must take \(module, carry, x\) and return \(carry, y\), but .*whole sequence",
    ),
    "nnx without a carry": (
        lambda: interop.from_nnx(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), call=lambda m, c, x: (c, m(x))),
        "Linear holds 0 recurrent cells",
    ),
    "another nnx layer": (lambda: interop.from_nnx(nnx.Linear(2, 2, rngs=nnx.Rngs(0))), "Linear .*takes inputs first"),
    "two cells": (lambda: interop.from_nnx(Pieces()), "Pieces holds 2 recurrent cells.*initial_carry="),
    "no width": (lambda: interop.from_nnx(NnxModel(nnx.Rngs(0))), "input_size is missing.*NnxModel"),
    "width 0": (
        lambda: interop.from_nnx(NnxModel(nnx.Rngs(0)), input_size=0),
        "input_size must be an integer ≥ 1.*got 0",
    ),
    "width in words": (lambda: linen_gru(input_size="two"), "input_size must be .*got 'two'"),
    "no pair": (
        lambda: step_once(interop.from_nnx(Pieces(), initial_carry=jnp.zeros(INPUT))),
        r"Pieces .*one step must return a pair \(carry, y\), got .*call=",
    ),
    "nnx compiled inside": (
        lambda: step_once(interop.from_nnx(CompiledInside())),
        r"'kernel'.*nnx\.jit and nnx\.remat",
    ),
    "nnx keys forgotten": (
        lambda: step_without_keys(interop.from_nnx(NnxModel(nnx.Rngs(0)), initial_carry=jnp.zeros(HIDDEN))),
        r"NnxModel draws random numbers, so its carry is a pair \(carry, keys\), got .*initial_carry\(batch_shape\)",
    ),
    "linen keys forgotten": (
        lambda: step_without_keys(interop.from_linen(LinenModel(), linen_variables(), input_size=INPUT, key=KEY)),
        "LinenModel draws random numbers, so its carry is a pair",
    ),
    "haiku keys forgotten": (
        lambda: step_without_keys(interop.from_haiku(MaybeRandom, KEY, input_size=INPUT)),
        "core draws random numbers, so its carry is a pair",
    ),
    "equinox keys forgotten": (
        lambda: step_without_keys(
            interop.from_equinox(
                eqx.nn.Dropout(0.5), initial_carry=jnp.zeros(2), call=lambda m, c, x, key: (c, m(x, key=key)), key=KEY
            )
        ),
        "Dropout draws random numbers, so its carry is a pair",
    ),
    "no key": (lambda: interop.from_haiku(lambda: hk.GRU(2), 0, input_size=2), "key must be a key .*got 0"),
    "a number as the next key": (
        lambda: interop.from_linen(LinenModel(), linen_variables(), input_size=INPUT, key=KEY)[2]((2,), 0),
        "key must be a key .*got 0",
    ),
    "batch size": (lambda: interop.from_nnx(cells_of_nnx()[0])[2](4), r"batch_shape must be a tuple.*got 4"),
    "input first": (
        lambda: interop.from_equinox(InputFirst(), initial_carry=jnp.zeros(2)),
        r"InputFirst .*its __call__ takes x first.*call=",
    ),
    "a key for one that takes none": (
        lambda: interop.from_equinox(Steady(), initial_carry=jnp.zeros(2), key=KEY),
        r"Steady .*Leave key= out, or pass call=lambda module, carry, x, key",
    ),
    "a linen RNN with its parent's variables": (
        lambda: interop.from_linen(linen.RNN(linen.GRUCell(2)), {"params": {"GRUCell_0": {}}}, input_size=2),
        r"must hold \"cell\", got \['GRUCell_0'\]",
    ),
    "to_nnx of another model": (
        lambda: interop.to_nnx(cells_of_nnx()[0], nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Param)),
        "params must have the names and shapes of the parameters of GRUCell",
    ),
    "to_nnx of another width": (
        lambda: interop.to_nnx(
            nnx.GRUCell(INPUT, HIDDEN + 1, rngs=nnx.Rngs(0)), nnx.state(cells_of_nnx()[0], nnx.Param)
        ),
        "params must have the names and shapes",
    ),
    "linen bidirectional": (
        lambda: interop.from_linen(
            linen.Bidirectional(*[linen.RNN(linen.GRUCell(2))] * 2), {"params": {}}, input_size=2
        ),
        "Bidirectional .*flip",
    ),
    "linen reversed": (
        lambda: interop.from_linen(linen.RNN(linen.GRUCell(2), reverse=True), {"params": {}}, input_size=2),
        "from the end",
    ),
    "params instead of variables": (
        lambda: interop.from_linen(LinenModel(), linen_variables()["params"], input_size=INPUT),
        'variables must hold "params".*Dense_0',
    ),
    "linen batch norm": (lambda: step_once(batch_norm_linen()), "BatchNormLinen changed a variable.*layer norm"),
    "linen without a key": (
        lambda: step_once(interop.from_linen(LinenModel(), linen_variables(), input_size=INPUT)),
        "LinenModel draws random numbers.*key=",
    ),
    "linen layer": (lambda: interop.from_linen(linen.Dense(2), {"params": {}}, input_size=2), r"Dense .*\(carry, x\)"),
    "linen no carry": (
        lambda: interop.from_linen(BatchNormLinen(), {"params": {}}, input_size=2),
        "BatchNormLinen has no initialize_carry.*initial_carry=",
    ),
    "linen cache": (
        lambda: step_once(decoding("cache")),
        r"Decoding .*\['cache'\]\['past'\].*keep its first value.*carry",
    ),
    "linen cache that comes into being": (
        lambda: step_once(decoding("made late", ["params"])),
        r"Decoding .*\['cache'\]\['past'\].*keep its first value",
    ),
    "linen cache within nnx": (
        lambda: step_once(interop.from_nnx(Bridged(), initial_carry=jnp.zeros(INPUT))),
        r"Bridged .*'past'.*keep its first value",
    ),
    "nnx cache within linen": (lambda: step_once(caching_in_linen()), r"ToLinen .*'past'.*keep its first value"),
    "haiku state in apply alone": (
        lambda: step_once(
            interop.from_haiku(lambda: LateState(), KEY, input_size=INPUT, initial_carry=jnp.zeros(INPUT))
        ),
        r"keeps a state \(late_state\)",
    ),
    "equinox state held": (
        lambda: interop.from_equinox(HoldsState(eqx.nn.State(eqx.nn.Identity())), initial_carry=jnp.zeros(2)),
        "HoldsState .*eqx.nn.State",
    ),
    "linen cell without a start": (
        lambda: interop.from_linen(StartlessLinen(), {"params": {}}, input_size=INPUT),
        "StartlessLinen has no initialize_carry.*initial_carry=",
    ),
    "nnx cell without a start": (
        lambda: interop.from_nnx(StartlessNnx()),
        "StartlessNnx has no initialize_carry.*initial_carry=",
    ),
    "haiku core without a start": (
        lambda: interop.from_haiku(lambda: StartlessHaiku(), KEY, input_size=INPUT),
        "StartlessHaiku has no initial_state.*initial_carry=",
    ),
    "haiku batch norm": (
        lambda: interop.from_haiku(BatchNormHaiku, KEY, input_size=INPUT),
        "keeps a state.*layer norm",
    ),
    "haiku random start": (
        lambda: interop.from_haiku(RandomStart, KEY, input_size=INPUT),
        "initial_state of .* draws random numbers.*initial_carry=",
    ),
    "haiku learned start": (lambda: interop.from_haiku(LearnedStart, KEY, input_size=INPUT), "a function of"),
    "haiku makes no core": (lambda: interop.from_haiku(lambda: 3, KEY, input_size=INPUT), "make_core must return.*int"),
    "haiku layer": (
        lambda: interop.from_haiku(lambda: hk.Linear(2), KEY, input_size=INPUT, initial_carry=jnp.zeros(2)),
        r"Linear .*\(x, carry\).*call=",
    ),
    "haiku no state": (
        lambda: interop.from_haiku(lambda: hk.Linear(2), KEY, input_size=2),
        "Linear has no initial_state",
    ),
    "equinox without a key": (
        lambda: interop.from_equinox(equinox_module(), initial_carry=equinox_carry()),
        r"EquinoxModel .*'key'.*key=jax\.random\.key",
    ),
    "equinox dropout without a key": (
        lambda: step_once(
            interop.from_equinox(eqx.nn.Dropout(0.5), initial_carry=jnp.zeros(2), call=lambda m, c, x: (c, m(x)))
        ),
        "Dropout draws random numbers.*key=",
    ),
    "equinox state": (equinox_norm, "Sequential .*eqx.nn.State.*layer norm"),
    "equinox sequence": (
        lambda: interop.from_equinox(Sequence(eqx.nn.GRUCell(2, 3, key=KEY), eqx.nn.Linear(3, 2, key=KEY))),
        r"Sequence .*must take \(carry, x\).*whole sequence",
    ),
    "nnx learned start": (
        lambda: interop.from_nnx(LearnedStartNnx(), input_size=INPUT),
        "LearnedStartNnx .*depends on its parameters.*initial_carry=.*function of the parameters",
    ),
    "linen learned start": (learned_start_linen, "LearnedStartLinen .*depends on its parameters"),
    "nnx sow": (
        lambda: step_once(interop.from_nnx(Showing())),
        r"Showing .*attribute \['hidden'\].*, which is new.*values to show into y",
    ),
    "nnx chain": (
        lambda: interop.from_nnx(nnx.Sequential(*cells_of_nnx()), initial_carry=jnp.zeros(HIDDEN)),
        "Sequential .*from layer to layer.*call=",
    ),
    "linen chain": (linen_chain, "Sequential .*from layer to layer.*call="),
    "haiku chain": (
        lambda: interop.from_haiku(
            lambda: hk.Sequential([hk.Linear(2)]), KEY, input_size=2, initial_carry=jnp.zeros(2)
        ),
        "Sequential .*from layer to layer.*call=",
    ),
    "equinox chain": (equinox_chain, "Sequential .*from layer to layer.*call="),
    "equinox no carry": (
        lambda: interop.from_equinox(eqx.nn.Identity(), initial_carry=(), call=lambda m, c, x: (c, x)),
        "initial_carry holds no array",
    ),
    "call of an equinox cell": (
        lambda: interop.from_equinox(eqx.nn.GRUCell(2, 3, key=KEY), call=lambda cell, x: x),
        r"GRUCell .*call must take \(module, carry, x\)",
    ),
    "equinox two cells": (lambda: interop.from_equinox(equinox_module(), key=KEY), "holds 2 recurrent cells"),
    "not an equinox module": (lambda: interop.from_equinox(cells_of_nnx()[0]), "GRUCell .*equinox.Module"),
}


@pytest.mark.parametrize("way", ["shown", "perturbed", "counted", "evaluated"])
def test_what_no_later_step_reads_may_be_written(way):
    """Where nothing is mutable it is left out, and the outputs are the same without it."""
    step, params, initial_carry = decoding(way)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, INPUT)))
    wanted = linen.Dense(INPUT).apply({"params": params["Dense_0"]}, x)
    assert_close(step(params, initial_carry((2,)), x)[1], wanted, rtol=1e-6)


def test_a_chain_with_its_call_is_a_step():
    step, params, initial_carry = equinox_chain(call=lambda chain, carry, x: ((h := carry + chain(x)), h))
    assert step(params, initial_carry((4,)), jnp.ones((4, 2)))[1].shape == (4, 2)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_says_so(name):
    call, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        call()


def test_errors_inside_a_module_name_it():
    """The library's own error stays, with a note of whose step it was and what it was given."""
    with pytest.raises(Exception) as caught:
        step_once(interop.from_equinox(eqx.nn.GRUCell(INPUT, HIDDEN, key=KEY)), width=INPUT + 1)
    assert "one step of GRUCell" in caught.value.__notes__[0] and "[3]" in caught.value.__notes__[0]
    with pytest.raises(Exception) as caught:
        step_once(interop.from_nnx(nnx.Dropout(0.5), initial_carry=(), call=lambda m, c, x: (c, m(x))))
    assert "one step of Dropout" in caught.value.__notes__[0]
