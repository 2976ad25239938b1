"""The workload, and who does it: value and gradient of a mean squared error with an output head,
float32.

Everyone is written in the best form its own documentation has for a recurrent layer of one kind.
What is returned is `(loss, gradients)`, so that the gradients can be held against each other before
anything is timed.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import jbptt
from jbptt import cells, interop

WIDTH = 32  # of inputs and outputs


class Work(NamedTuple):
    """One cell of the grid."""

    kind: str
    examples: int
    steps: int
    hidden: int

    @property
    def name(self) -> str:
        return f"{self.kind} B{self.examples} T{self.steps} H{self.hidden}"


class Contestant(NamedTuple):
    """Who is timed.

    Attributes:
      run: gives (loss, gradients).
      expected: the same by another road: a library's by jbptt's engine on that library's model,
        ours by a plain scan.
      comparable: what `expected` is held against, where it is not what `run` gives.
    """

    run: Callable[[], tuple[Any, Any]]
    expected: Callable[[], tuple[Any, Any]]
    comparable: Callable[[], tuple[Any, Any]] | None = None

    def disagreement(self) -> float:
        """The largest relative distance of loss and gradient, each as one vector."""
        found, wanted = (self.comparable or self.run)(), self.expected()
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        pairs = [
            (ravel_pytree(f)[0], ravel_pytree(w)[0]) for f, w in zip(found, wanted, strict=True)
        ]
        return max(float(jnp.linalg.norm(f - w) / jnp.linalg.norm(w)) for f, w in pairs)


def squared_error(y, target):
    return jnp.mean((y - target) ** 2, axis=-1)


@functools.cache
def data(work: Work) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    shape = work.steps, work.examples, WIDTH
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))


def our_cell(work: Work):
    cell = cells.with_linear_readout(getattr(cells, work.kind)(WIDTH, work.hidden), WIDTH)
    return cell, cell.init(jax.random.key(0))


def by_estimator(step, params, carry, work: Work, plan=None) -> Callable[[], tuple[Any, Any]]:
    batch = jbptt.Batch(*data(work))
    estimator = jbptt.full_bptt(step, squared_error, plan=plan)
    state = estimator.init(params, carry, batch)

    @jax.jit
    def update(params, state, batch):
        estimate, _ = estimator.update(params, state, batch)
        return estimate.loss, estimate.grads

    return lambda: update(params, state, batch)


def ours(work: Work, plan: jbptt.Plan | None = None) -> Contestant:
    cell, params = our_cell(work)
    carry = cell.initial_carry((work.examples,))
    return Contestant(by_estimator(cell.step, params, carry, work, plan), scan(work).run)


def differentiated(
    loss: Callable, params: Any, work: Work, sharded: bool
) -> Callable[[], tuple[Any, Any]]:
    """`jax.value_and_grad` of `loss(params, xs, targets)`; sharded: each device on its examples, as
    ours does it.
    """
    value_and_grad = jax.value_and_grad(loss)
    if sharded:
        mesh = jax.make_mesh(
            (jax.device_count(),), ("batch",), axis_types=(jax.sharding.AxisType.Auto,)
        )
        whole, divided = jax.P(), jax.P(None, "batch")
        value_and_grad = jax.shard_map(
            lambda *given: jax.lax.pmean(jax.value_and_grad(loss)(*given), "batch"),
            mesh=mesh,
            in_specs=(whole, divided, divided),
            out_specs=whole,
            check_vma=False,
        )
    value_and_grad = jax.jit(value_and_grad)
    xs, targets = data(work)
    return lambda: value_and_grad(params, xs, targets)


def scan(work: Work, sharded: bool = False) -> Contestant:
    """Plain `lax.scan` of the same cell."""
    cell, params = our_cell(work)

    def loss(params, xs, targets):
        _, ys = jax.lax.scan(
            functools.partial(cell.step, params), cell.initial_carry((xs.shape[1],)), xs
        )
        return jnp.mean(squared_error(ys, targets))

    expected = by_estimator(cell.step, params, cell.initial_carry((work.examples,)), work)
    return Contestant(differentiated(loss, params, work, sharded), expected)


def nnx(work: Work, sharded: bool = False) -> Contestant:
    from flax import nnx

    cells = {"rnn": nnx.SimpleCell, "gru": nnx.GRUCell, "lstm": nnx.OptimizedLSTMCell}

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.RNN(cells[work.kind](WIDTH, work.hidden, rngs=rngs), time_major=True)
            self.head = nnx.Linear(work.hidden, WIDTH, rngs=rngs)

        def __call__(self, xs):
            return self.head(self.layer(xs))

    model = Model(nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, xs, targets):
        return jnp.mean(squared_error(nnx.merge(graph, params, rest, copy=True)(xs), targets))

    def call(model, carry, x):
        carry, h = model.layer.cell(carry, x)
        return carry, model.head(h)

    step, params, start = interop.from_nnx(model, call=call, input_size=WIDTH)
    expected = by_estimator(step, params, start((work.examples,)), work)
    return Contestant(differentiated(loss, params, work, sharded), expected)


def linen(work: Work, sharded: bool = False) -> Contestant:
    from flax import linen

    kinds = {"rnn": linen.SimpleCell, "gru": linen.GRUCell, "lstm": linen.OptimizedLSTMCell}

    class Model(linen.Module):
        def setup(self):
            self.cell = kinds[work.kind](work.hidden)
            self.layer, self.head = linen.RNN(self.cell, time_major=True), linen.Dense(WIDTH)

        def __call__(self, xs):
            return self.head(self.layer(xs))

        def step(self, carry, x):
            carry, h = self.cell(carry, x)
            return carry, self.head(h)

        def initialize_carry(self, key, input_shape):
            return self.cell.initialize_carry(key, input_shape)

    model = Model()
    variables = model.init(jax.random.key(0), data(work)[0][:1])

    def loss(params, xs, targets):
        return jnp.mean(squared_error(model.apply({"params": params}, xs), targets))

    step, params, start = interop.from_linen(model, variables, call=Model.step, input_size=WIDTH)
    expected = by_estimator(step, params, start((work.examples,)), work)
    return Contestant(differentiated(loss, params, work, sharded), expected)


def haiku(work: Work, sharded: bool = False) -> Contestant:
    import haiku as hk

    kinds = {"rnn": hk.VanillaRNN, "gru": hk.GRU, "lstm": hk.LSTM}

    def make():
        return hk.DeepRNN([kinds[work.kind](work.hidden), hk.Linear(WIDTH)])

    @hk.without_apply_rng
    @hk.transform
    def forward(xs):
        core = kinds[work.kind](work.hidden)
        hidden, _ = hk.dynamic_unroll(core, xs, core.initial_state(xs.shape[1]))
        return hk.Linear(WIDTH)(hidden)

    step, params, start = interop.from_haiku(make, jax.random.key(0), input_size=WIDTH)

    def loss(params, xs, targets):
        return jnp.mean(squared_error(forward.apply(params, xs), targets))

    expected = by_estimator(step, params, start((work.examples,)), work)
    return Contestant(differentiated(loss, params, work, sharded), expected)


def equinox(work: Work, sharded: bool = False) -> Contestant | None:
    """A scan over its cell, vmapped over the batch; it has no simple RNN cell."""
    import equinox as eqx

    if work.kind == "rnn":
        return None
    keys = jax.random.split(jax.random.key(0), 2)
    kind = {"gru": eqx.nn.GRUCell, "lstm": eqx.nn.LSTMCell}[work.kind]

    class Model(eqx.Module):
        cell: eqx.Module
        head: eqx.nn.Linear

        def __call__(self, carry, x):
            carry = self.cell(x, carry)
            return carry, self.head(carry[0] if work.kind == "lstm" else carry)

    model = Model(
        kind(WIDTH, work.hidden, key=keys[0]), eqx.nn.Linear(work.hidden, WIDTH, key=keys[1])
    )
    zeros = jnp.zeros(work.hidden)
    start = (zeros, zeros) if work.kind == "lstm" else zeros
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, xs, targets):
        live = eqx.combine(params, static)
        ys = jax.vmap(lambda xs: jax.lax.scan(lambda carry, x: live(carry, x), start, xs)[1], 1, 1)(
            xs
        )
        return jnp.mean(squared_error(ys, targets))

    step, _, first = interop.from_equinox(model, initial_carry=start)
    expected = by_estimator(step, params, first((work.examples,)), work)
    return Contestant(differentiated(loss, params, work, sharded), expected)


def cudnn(work: Work, sharded: bool = False) -> Contestant | None:
    """cuDNN's LSTM as JAX calls it, on a GPU alone; its parameters are one flat array."""
    from jax.experimental import rnn

    if sharded or work.kind != "lstm" or jax.default_backend() != "gpu":
        return None
    layer = {
        "input_size": WIDTH,
        "hidden_size": work.hidden,
        "num_layers": 1,
        "bidirectional": False,
    }
    cell, given = our_cell(work)
    params = {
        "w_y": given["w_y"],
        "b_y": given["b_y"],
        "flat": rnn.init_lstm_weight(jax.random.key(0), **layer),
    }

    def loss(params, xs, targets):
        zeros, lengths = (
            jnp.zeros((1, xs.shape[1], work.hidden)),
            jnp.full(xs.shape[1], xs.shape[0], jnp.int32),
        )
        precision = jax.config.jax_default_matmul_precision
        hs, _, _ = rnn.lstm(
            xs.swapaxes(0, 1),
            zeros,
            zeros,
            params["flat"],
            lengths,
            dropout=0.0,
            precision=precision,
            **layer,
        )
        return jnp.mean(squared_error(hs.swapaxes(0, 1) @ params["w_y"] + params["b_y"], targets))

    def step(params, carry, x):
        w_x, w_h, b_x, b_h = (
            arrays[0] for arrays in rnn.unpack_lstm_weights(params["flat"], **layer)
        )
        return cell.step({**params, "w_x": w_x.T, "w_h": w_h.T, "b": b_x + b_h}, carry, x)

    expected = by_estimator(step, params, cell.initial_carry((work.examples,)), work)
    return Contestant(differentiated(loss, params, work, False), expected)


def torch(work: Work, sharded: bool = False) -> Contestant | None:
    """PyTorch with as many threads as there are cores; our parameters, so that ours must have its
    gradients.
    """
    import os

    import torch

    if sharded:
        return None
    torch.set_num_threads(os.cpu_count() or 1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = (
        False  # float32 is float32
    )
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    layer = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[work.kind](
        WIDTH, work.hidden
    ).to(device)
    head = torch.nn.Linear(work.hidden, WIDTH).to(device)
    _, params = our_cell(work)
    given = {k: torch.tensor(np.asarray(v)) for k, v in params.items()}
    with torch.no_grad():
        layer.weight_ih_l0.copy_(given["w_x"].T)
        layer.weight_hh_l0.copy_(given["w_h"].T)
        layer.bias_ih_l0.copy_(given["b"])
        layer.bias_hh_l0.copy_(given.get("b_h", torch.zeros_like(given["b"])))
        head.weight.copy_(given["w_y"].T)
        head.bias.copy_(given["b_y"])
    xs, targets = (torch.tensor(np.asarray(a), device=device) for a in data(work))
    names = ["w_x", "w_h", "b", *(["b_h"] if "b_h" in params else []), "w_y", "b_y"]
    leaves = [layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0]
    leaves += [*([layer.bias_hh_l0] if "b_h" in params else []), head.weight, head.bias]

    def run():
        layer.zero_grad()
        head.zero_grad()
        loss = torch.nn.functional.mse_loss(head(layer(xs)[0]), targets)
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.item(), dict(zip(names, [leaf.grad for leaf in leaves], strict=True))

    def as_ours():
        loss, grads = run()
        return loss, {name: jnp.asarray(g.cpu().numpy().T) for name, g in grads.items()}

    return Contestant(run, ours(work).run, as_ours)


OPPONENTS = {
    "scan": scan,
    "nnx": nnx,
    "linen": linen,
    "haiku": haiku,
    "equinox": equinox,
    "torch": torch,
    "cudnn": cudnn,
}
