"""PyTorch's layers and autograd as an outside oracle, float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import assert_close, one_update

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
