"""PyTorch's layers and autograd as an outside oracle, float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.shapes import HIDDEN as WIDTH
from oracles.shapes import INPUT as CHANNELS
from oracles.shapes import draw_values, one_draw, runs_of
from problems import assert_close, one_update
from test_generated import KEPT, NUM_SHAPES, assert_draws_agree, estimate_of, generate

from jbptt import Batch, cells, full_bptt, truncated_bptt, unroll

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

NUM_STEPS, EXAMPLES, INPUT, HIDDEN = 7, 4, 3, 5
LAYERS = {
    "tanh": (functools.partial(torch.nn.RNN, nonlinearity="tanh"), cells.rnn(INPUT, HIDDEN)),
    "relu": (functools.partial(torch.nn.RNN, nonlinearity="relu"), cells.rnn(INPUT, HIDDEN, activation=jax.nn.relu)),
    "gru": (torch.nn.GRU, cells.gru(INPUT, HIDDEN)),
    "lstm": (torch.nn.LSTM, cells.lstm(INPUT, HIDDEN)),
}


def numpy(tensor):
    return tensor.detach().numpy()


def problem(name):
    """The layer with weights from NumPy's generator, inputs, targets and the initial carry as tensors."""
    rng = np.random.default_rng(0)
    layer = LAYERS[name][0](INPUT, HIDDEN, dtype=torch.float64)
    tensor = lambda *shape: torch.tensor(rng.normal(size=shape) * 0.6, requires_grad=True)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(tensor(*weight.shape))
    carry = [tensor(1, EXAMPLES, HIDDEN) for _ in range(2 if name == "lstm" else 1)]
    return layer, tensor(NUM_STEPS, EXAMPLES, INPUT), tensor(NUM_STEPS, EXAMPLES, HIDDEN), carry


def run(layer, xs, carry):
    """Outputs and the carry, a list of tensors."""
    ys, last = layer(xs, tuple(carry) if len(carry) == 2 else carry[0])
    return ys, list(last) if isinstance(last, tuple) else [last]


def our_weights(layer, name, read=numpy):
    """The contract's mapping; b = bias_ih + bias_hh, except for the gru, which keeps both."""
    b, b_h = read(layer.bias_ih_l0), read(layer.bias_hh_l0)
    biases = {"b": b, "b_h": b_h} if name == "gru" else {"b": b + b_h}
    return {"w_x": read(layer.weight_ih_l0).T, "w_h": read(layer.weight_hh_l0).T, **biases}


def our_gradients(layer, name):
    """PyTorch gives both biases the whole gradient of their sum, so that one of them is ours."""
    grads = our_weights(layer, name, lambda tensor: numpy(tensor.grad))
    return grads if name == "gru" else {**grads, "b": numpy(layer.bias_ih_l0.grad)}


def our_carry(tensors):
    arrays = [numpy(tensor)[0] for tensor in tensors]
    return tuple(arrays) if len(arrays) == 2 else arrays[0]


@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients(name):
    layer, xs, targets, carry = problem(name)
    ys, last = run(layer, xs, carry)
    weights = torch.linspace(0.5, 1.5, NUM_STEPS, dtype=torch.float64)[:, None, None]
    loss_sum = (weights * (ys - targets) ** 2).sum()
    (loss_sum + sum((leaf**3).sum() for leaf in last)).backward()

    step, params, start = LAYERS[name][1].step, our_weights(layer, name), our_carry(carry)

    def total(params, carry, xs):
        last, ys = unroll(step, params, carry, xs)
        value = jnp.sum(weights.numpy() * (ys - numpy(targets)) ** 2)
        return value + sum(jnp.sum(leaf**3) for leaf in jax.tree.leaves(last)), (ys, last)

    grads, values = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(params, start, numpy(xs))
    assert_close(values, (numpy(ys), our_carry(last)))
    by_carry = our_carry([leaf.grad for leaf in carry])
    assert_close(grads, (our_gradients(layer, name), by_carry, numpy(xs.grad)))


def squared_error(y, target):
    return jnp.sum((y - target) ** 2, axis=-1)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("window", [1, 3, NUM_STEPS])
def test_truncation_by_detaching(name, window):
    """The textbook loop: backward after each window, then detach the state; the ragged tail included."""
    layer, xs, targets, carry = problem(name)
    start, total = our_carry(carry), 0.0
    for begin in range(0, NUM_STEPS, window):
        carry = [leaf.detach() for leaf in carry]
        ys, carry = run(layer, xs[begin : begin + window].detach(), carry)
        loss = ((ys - targets[begin : begin + window]) ** 2).sum() / (NUM_STEPS * EXAMPLES)
        loss.backward()
        total += loss.item()
    params, batch = our_weights(layer, name), Batch(numpy(xs), numpy(targets))
    estimator = truncated_bptt(LAYERS[name][1].step, squared_error, window=window)
    state = estimator.init(params, start, batch)
    estimate, state = jax.jit(estimator.update)(params, state, batch)
    expected = total, our_gradients(layer, name), our_carry(carry)
    assert_close((estimate.loss, estimate.grads, state.carry), expected)
    if window == NUM_STEPS:
        full = jax.jit(functools.partial(one_update, full_bptt(LAYERS[name][1].step, squared_error)))
        assert_close(full(params, start, batch).grads, expected[1])


class LinearCell(torch.nn.RNNCell):
    """PyTorch has no linear recurrence: its RNN cell without the tanh."""

    def forward(self, x, h):
        return x @ self.weight_ih.T + self.bias_ih + h @ self.weight_hh.T + self.bias_hh


TORCH_CELLS = {"linear": LinearCell, "tanh": torch.nn.RNNCell, "gru": torch.nn.GRUCell, "lstm": torch.nn.LSTMCell}


def gated(tensor, gate):
    """Detached where no example lets anything through, else with a hook on the gradient that flows back."""
    if torch.all(gate == 0):
        return tensor.detach()
    tensor = tensor.clone()
    if tensor.requires_grad:
        tensor.register_hook(lambda grad: torch.where(gate == 0, 0, gate * grad))
    return tensor


def by_autograd(shape, values):
    """Loss sum and gradient of one draw: PyTorch's cells in a loop, one backward pass for every window."""
    arrays = values.xs, values.targets, values.mask, values.weights
    xs, targets, mask, weights = (
        torch.tensor(np.reshape(a, (shape.num_steps, -1, *a.shape[1 + len(shape.batch_shape) :]))) for a in arrays
    )
    cell = TORCH_CELLS[shape.cell](CHANNELS, WIDTH, dtype=torch.float64)
    b_h = values.params.get("b_h", np.zeros_like(values.params["b"]))
    ours = values.params["w_x"].T, values.params["w_h"].T, values.params["b"], b_h
    for parameter, array in zip(cell.parameters(), ours, strict=True):  # weight_ih, weight_hh, bias_ih, bias_hh
        parameter.data = torch.tensor(np.ascontiguousarray(array))
        parameter.grad = torch.zeros_like(parameter.data)
    start = values.carry if isinstance(values.carry, tuple) else (values.carry,)
    total = 0.0
    for gates, counted in runs_of(shape, values.gates):
        gates = torch.tensor(np.reshape(gates, (shape.num_steps, -1, 1)))
        carry = [torch.tensor(leaf.reshape(-1, WIDTH)) for leaf in start]
        loss = torch.zeros((), dtype=torch.float64)
        for t in range(shape.num_steps):
            carry = [gated(leaf, gates[t]) for leaf in carry]
            after = cell(xs[t], carry[0] if len(carry) == 1 else tuple(carry))
            after = [after] if len(carry) == 1 else after
            carry = [torch.where(mask[t][:, None], new, old) for new, old in zip(after, carry, strict=True)]
            if counted[t]:
                loss = loss + torch.where(mask[t], weights[t] * ((after[0] - targets[t]) ** 2).sum(-1), 0).sum()
        loss.backward()
        total += loss.item()
    grads = {"w_x": cell.weight_ih.grad.T, "w_h": cell.weight_hh.grad.T, "b": cell.bias_ih.grad}
    return total, grads | ({"b_h": cell.bias_hh.grad} if shape.cell == "gru" else {})


def test_generated_shapes():
    """Every cell, mask, weight, gate, window, stride and split that the generator draws, four draws of values each."""

    def check(shape):
        values = draw_values(shape, 5, 4)
        found = jax.tree.map(np.asarray, estimate_of(shape)(values))
        rows = [by_autograd(shape, one_draw(values, d)) for d in range(4)]
        assert_draws_agree((found[0],), (np.stack([total for total, _ in rows]),))
        grads = {key: np.stack([grad[key].numpy() for _, grad in rows]) for key in found[1]}
        assert_draws_agree(found[1], grads)

    for shape in (KEPT[0], KEPT[1], KEPT[7]):
        check(shape._replace(transform="jit of vmap"))
    generate(check, NUM_SHAPES // 3, seed=5, transforms=("jit of vmap",))
