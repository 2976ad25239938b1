"""Derivatives by complex step: f'(w) = Im f(w + i h) / h with h = 1e-30 (Squire & Trapp, 1998), in NumPy.

No difference is taken, so nothing cancels, and what is cut off is of order h²: exact to rounding. The imaginary part
is the derivative of everything; to freeze a carry at a cut is to drop the carry's imaginary part there, and a gate
multiplies it.
"""

import numpy as np

from oracles.by_hand import CELLS

STEP = 1e-30


def one_entry_each(params):
    """Parameters with a leading axis of all P entries, each `w + i h` in one of them."""
    count, start, moved = sum(a.size for a in params.values()), 0, {}
    for key, a in params.items():
        entries = np.zeros((count, a.size), complex)
        entries[start + np.arange(a.size), np.arange(a.size)] = 1j * STEP
        moved[key] = np.asarray(a) + entries.reshape(count, *a.shape)
        start += a.size
    return moved


def gradient(name, params, carry, xs, targets, mask, weights, runs):
    """`Σ w ‖h − target‖²` over the losses that count and its gradient, of one draw.

    carry: a tuple of `[*batch, H]`; mask and weights `[T, *batch]`. runs: pairs (gates `[T]` or `[T, *batch]`, which
    losses count `[T]`), one for every backward pass whose gradients add up.
    """
    num_steps, cell = len(xs), CELLS[name]
    entries = one_entry_each(params)
    moved = {key: a if a.ndim == 3 else a[:, None] for key, a in entries.items()}
    xs, targets = (a.reshape(num_steps, -1, a.shape[-1]) for a in (xs, targets))
    mask, weights = (a.reshape(num_steps, -1) for a in (mask, weights))
    total = np.zeros(len(moved["b"]), complex)
    for gates, counted in runs:
        gates = np.reshape(gates, (num_steps, -1, 1))
        state = tuple(c.reshape(-1, c.shape[-1]) for c in carry)
        for t in range(num_steps):
            state = tuple(s.real + 1j * gates[t] * s.imag for s in state)
            after, _ = cell.forward(moved, state, xs[t])
            state = tuple(np.where(mask[t][:, None], a, s) for a, s in zip(after, state, strict=True))
            if counted[t]:
                losses = np.sum((after[0] - targets[t]) ** 2, -1)
                total += np.sum(np.where(mask[t], weights[t] * losses, 0), -1)
    slopes, grad = total.imag / STEP, {}
    for key, a in params.items():
        grad[key], slopes = slopes[: a.size].reshape(a.shape), slopes[a.size :]
    return total.real[0], grad
