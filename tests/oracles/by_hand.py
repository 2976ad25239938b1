"""Recurrent networks in NumPy with derivatives written by hand: pair after pair, weighted by the coverage.

Many draws at once: inputs `[D, B, I]`, carries `[D, B, H]`, weights `[D, I, m·H]`, biases `[D, 1, m·H]`, with D
draws and B examples. Written with operators and a few methods, so that `rounding.Rounded` can run it too.
"""

import numpy as np


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def gates_of(a, number):
    width = a.shape[-1] // number
    return [a[..., k * width : (k + 1) * width] for k in range(number)]


def bias_grad(bar):
    return bar.sum(-2)


def affine(p, h, x, bar):
    return (bar @ p["w_h"].mT,), {"w_x": x.mT @ bar, "w_h": h.mT @ bar, "b": bias_grad(bar)}


class Linear:
    """h' = x W_x + h W_h + b."""

    def forward(self, p, carry, x):
        (h,) = carry
        return (x @ p["w_x"] + h @ p["w_h"] + p["b"],), ()

    def backward(self, p, carry, x, cache, bar):
        return affine(p, carry[0], x, bar[0])


class Tanh:
    """h' = tanh(x W_x + h W_h + b)."""

    def forward(self, p, carry, x):
        after = np.tanh(x @ p["w_x"] + carry[0] @ p["w_h"] + p["b"])
        return (after,), after

    def backward(self, p, carry, x, after, bar):
        return affine(p, carry[0], x, bar[0] * (1 - after * after))


class Gru:
    """r, z, n; the reset gate acts on what comes from the state, bias included."""

    def forward(self, p, carry, x):
        (h,) = carry
        (xr, xz, xn), (hr, hz, hn) = gates_of(x @ p["w_x"] + p["b"], 3), gates_of(h @ p["w_h"] + p["b_h"], 3)
        r, z = sigmoid(xr + hr), sigmoid(xz + hz)
        n = np.tanh(xn + r * hn)
        return ((1 - z) * n + z * h,), (r, z, n, hn)

    def backward(self, p, carry, x, cache, bar):
        (h,), (r, z, n, hn), (after,) = carry, cache, bar
        d_n = after * (1 - z) * (1 - n * n)
        d_r, d_z = d_n * hn * r * (1 - r), after * (h - n) * z * (1 - z)
        by_x = np.concatenate([d_r, d_z, d_n], -1)
        by_h = np.concatenate([d_r, d_z, d_n * r], -1)
        grad = {"w_x": x.mT @ by_x, "b": bias_grad(by_x), "w_h": h.mT @ by_h, "b_h": bias_grad(by_h)}
        return (by_h @ p["w_h"].mT + after * z,), grad


class Lstm:
    """i, f, g, o; carry (h, c)."""

    def forward(self, p, carry, x):
        h, c = carry
        i, f, g, o = gates_of(x @ p["w_x"] + h @ p["w_h"] + p["b"], 4)
        i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
        after = f * c + i * g
        return (o * np.tanh(after), after), (i, f, g, o, after)

    def backward(self, p, carry, x, cache, bar):
        (h, c), (i, f, g, o, after), (h_bar, c_bar) = carry, cache, bar
        squashed = np.tanh(after)
        c_bar = c_bar + h_bar * o * (1 - squashed * squashed)
        parts = (
            c_bar * g * i * (1 - i),
            c_bar * c * f * (1 - f),
            c_bar * i * (1 - g * g),
            h_bar * squashed * o * (1 - o),
        )
        (before,), grad = affine(p, h, x, np.concatenate(parts, -1))
        return (before, c_bar * f), grad


CELLS = {"linear": Linear(), "tanh": Tanh(), "gru": Gru(), "lstm": Lstm()}


def time_first(array, num_batch):
    """`[D, T, *batch, ...]` as `[T, D, B, ...]`."""
    array = np.asarray(array)
    return np.moveaxis(array.reshape(*array.shape[:2], -1, *array.shape[2 + num_batch :]), 1, 0)


def gradient(name, params, carry, xs, targets, mask, weights, coverage, exactly=lambda array: array, zero=0.0):
    """`Σ w ‖h − target‖²` `[D]` and `Σ_t Σ_i C[t, i] G[t, i]`, leaves `[D, ...]`.

    params: leaves `[D, ...]`; carry: a tuple of `[D, *batch, H]`; xs, targets `[D, T, *batch, ...]`; mask and weights
    `[D, T, *batch]`; coverage `[D, T, T, *batch]`. `exactly` wraps each input: a number known exactly.
    """
    cell, (num_draws, num_steps, *batch) = CELLS[name], mask.shape
    xs, targets, mask, weights = (time_first(a, len(batch)) for a in (xs, targets, mask, weights))
    coverage = np.moveaxis(coverage, 0, 2).reshape(num_steps, num_steps, num_draws, -1)
    params = {key: exactly(a if a.ndim == 3 else a[:, None]) for key, a in params.items()}
    states, caches, total = [tuple(exactly(c.reshape(num_draws, -1, c.shape[-1])) for c in carry)], [], zero
    for t in range(num_steps):
        after, cache = cell.forward(params, states[-1], exactly(xs[t]))
        states.append(tuple(np.where(mask[t][..., None], a, b) for a, b in zip(after, states[-1], strict=True)))
        caches.append(cache)
        off = after[0] - exactly(targets[t])
        total = total + np.where(mask[t], weights[t] * (off * off).sum(-1), 0.0).sum(-1)
    grad = {key: zero for key in params}
    for t in range(num_steps):
        slope = 2 * (states[t + 1][0] - exactly(targets[t])) * np.where(mask[t], weights[t], 0)[..., None]
        bar = (slope, *(0.0 * s for s in states[0][1:]))
        for i in range(t, -1, -1):
            here, step = mask[i][..., None], (params, states[i], exactly(xs[i]), caches[i])
            weighed = tuple(np.where(here, b * coverage[t, i][..., None], 0.0) for b in bar)
            own = cell.backward(*step, weighed)[1]
            grad = {key: grad[key] + own[key] for key in grad}
            before = cell.backward(*step, bar)[0]
            bar = tuple(np.where(here, a, b) for a, b in zip(before, bar, strict=True))
    return total, grad
