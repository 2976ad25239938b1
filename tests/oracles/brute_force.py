"""The gradient as a sum over pairs (loss step t, source step i), from explicit per-step Jacobians."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


def per_example(array, batch_shape, num_steps, default):
    """Masks and weights as `[T, *batch]`, aligned on the left."""
    array = np.asarray(default if array is None else array)
    array = array.reshape(array.shape + (1,) * (1 + len(batch_shape) - array.ndim))
    return np.broadcast_to(array, (num_steps, *batch_shape))


def hold(mask, new, old):
    """`new` where the mask holds, along leading axes."""
    return jax.tree.map(lambda n, o: jnp.where(mask.reshape(mask.shape + (1,) * (n.ndim - mask.ndim)), n, o), new, old)


@partial(jax.jit, static_argnums=(0, 1))
def linearise(step, loss, params, carry, x, target, mask, weight):
    """One step: the carry after it, its weighted loss, and the Jacobians of both by (params, carry)."""
    flat_params, to_params = ravel_pytree(params)
    flat_carry, to_carry = ravel_pytree(carry)

    def run(flat_params, flat_carry):
        after, y = step(to_params(flat_params), to_carry(flat_carry), x)
        losses = jnp.where(mask, loss(y, target), 0.0)
        return ravel_pytree(hold(mask, after, to_carry(flat_carry)))[0], jnp.sum(weight * losses)

    after, value = run(flat_params, flat_carry)
    return to_carry(after), value, jax.jacrev(run, argnums=(0, 1))(flat_params, flat_carry)


def pair_gradients(step, loss, params, carry, batch, batch_shape):
    """`G [T, T, P]`, the losses `[T]`, and the carry after the last step.

    G[t, i] = w_t ∂ℓ_t/∂carry_t · J_{t−1} … J_{i+1} · ∂carry_{i+1}/∂params for i < t, and G[t, t] is what
    step t contributes by itself. Padding must hold finite numbers.
    """
    num_steps = len(jax.tree.leaves(batch)[0])
    masks = per_example(batch.mask, batch_shape, num_steps, True)
    weights = per_example(batch.weights, batch_shape, num_steps, 1.0) * masks
    jacobians, sources, loss_carry, loss_params, losses = [], [], [], [], []
    for t in range(num_steps):
        x, target = jax.tree.map(lambda a, t=t: a[t], (batch.xs, batch.targets))
        carry, value, ((by_params, by_carry), (l_params, l_carry)) = linearise(
            step, loss, params, carry, x, target, masks[t], weights[t]
        )
        for store, item in (
            (jacobians, by_carry),
            (sources, by_params),
            (loss_carry, l_carry),
            (loss_params, l_params),
            (losses, value),
        ):
            store.append(np.asarray(item))
    pairs = np.zeros((num_steps, num_steps, sources[0].shape[1]))
    for t in range(num_steps):
        pairs[t, t] = loss_params[t]
        row = loss_carry[t]
        for i in range(t - 1, -1, -1):
            pairs[t, i] = row @ sources[i]
            row = row @ jacobians[i]
    return pairs, np.array(losses), carry


def covered(pairs, coverage, params):
    """Σ_t Σ_{i≤t} C[t, i] G[t, i], shaped like the parameters."""
    coverage = np.asarray(coverage)
    total = np.zeros(pairs.shape[-1])
    for t in range(len(coverage)):
        for i in range(t + 1):
            total += coverage[t, i] * pairs[t, i]
    return ravel_pytree(params)[1](total)
