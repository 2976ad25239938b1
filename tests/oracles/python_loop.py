"""Forward and backward as Python loops over steps, gates applied by hand; and a tanh network in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from oracles.brute_force import hold, per_example


def run_step(step, loss, params, carry, x, target, mask, weight):
    after, y = step(params, carry, x)
    return hold(mask, after, carry), jnp.sum(weight * jnp.where(mask, loss(y, target), 0.0))


forward_step = partial(jax.jit, static_argnums=(0, 1))(run_step)


@partial(jax.jit, static_argnums=(0, 1))
def backward_step(step, loss, params, carry, x, target, mask, weight, cotangent):
    _, pull = jax.vjp(lambda p, c: run_step(step, loss, p, c, x, target, mask, weight), params, carry)
    return pull((cotangent, 1.0))


def cross(gate, leaf):
    """A cotangent through a gate, `()` or `[*batch]`; 0 is a hard zero."""
    gate = np.reshape(gate, np.shape(gate) + (1,) * (np.ndim(leaf) - np.ndim(gate)))
    return np.where(gate == 0, 0.0, gate * np.asarray(leaf))


def gradient(step, loss, params, carry, batch, batch_shape, gates):
    """Loss sum, its gated gradient in the parameters and in the initial carry, and the last carry."""
    num_steps = len(jax.tree.leaves(batch)[0])
    masks = per_example(batch.mask, batch_shape, num_steps, True)
    weights = per_example(batch.weights, batch_shape, num_steps, 1.0) * masks
    inputs, total = [], 0.0
    for t in range(num_steps):
        x, target = jax.tree.map(lambda a, t=t: a[t], (batch.xs, batch.targets))
        inputs.append((carry, x, target, masks[t], weights[t]))
        carry, value = forward_step(step, loss, params, *inputs[-1])
        total += value
    cotangent = jax.tree.map(jnp.zeros_like, carry)
    grad = jax.tree.map(jnp.zeros_like, params)
    for t in reversed(range(num_steps)):
        by_params, by_carry = backward_step(step, loss, params, *inputs[t], cotangent)
        grad = jax.tree.map(jnp.add, grad, by_params)
        cotangent = jax.tree.map(partial(cross, gates[t]), by_carry)
    return total, grad, cotangent, carry


def tanh_rnn(params, h, xs, targets, gates):
    """Loss sum Σ‖h_t − target_t‖² and its gated gradient for the tanh network, derivatives by hand."""
    params = {name: np.asarray(value) for name, value in params.items()}
    hs = [np.asarray(h)]
    for x in xs:
        hs.append(np.tanh(x @ params["w_x"] + hs[-1] @ params["w_h"] + params["b"]))
    grad = {name: np.zeros_like(value) for name, value in params.items()}
    adjoint = np.zeros_like(hs[0])
    for t in reversed(range(len(xs))):
        delta = (adjoint + 2 * (hs[t + 1] - targets[t])) * (1 - hs[t + 1] ** 2)
        grad["w_x"] += xs[t].T @ delta
        grad["w_h"] += hs[t].T @ delta
        grad["b"] += delta.sum(0)
        adjoint = gates[t] * (delta @ params["w_h"].T)
    return sum(np.sum((h - y) ** 2) for h, y in zip(hs[1:], targets, strict=True)), grad
