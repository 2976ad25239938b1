"""Recurrent networks in NumPy with derivatives written by hand: pair after pair, weighted by the coverage."""

import numpy as np


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def gates_of(a, number):
    return np.split(a, number, axis=-1)


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
        return affine(p, carry[0], x, bar[0] * (1 - after**2))


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
        d_n = after * (1 - z) * (1 - n**2)
        d_r, d_z = d_n * hn * r * (1 - r), after * (h - n) * z * (1 - z)
        by_x = np.concatenate([d_r, d_z, d_n], -1)
        by_h = np.concatenate([d_r, d_z, d_n * r], -1)
        grad = {"w_x": outer(x, by_x), "b": outer(1, by_x), "w_h": outer(h, by_h), "b_h": outer(1, by_h)}
        return (by_h @ p["w_h"].T + after * z,), grad


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
        c_bar = c_bar + h_bar * o * (1 - squashed**2)
        parts = c_bar * g * i * (1 - i), c_bar * c * f * (1 - f), c_bar * i * (1 - g**2), h_bar * squashed * o * (1 - o)
        (before,), grad = affine(p, h, x, np.concatenate(parts, -1))
        return (before, c_bar * f), grad


CELLS = {"linear": Linear(), "tanh": Tanh(), "gru": Gru(), "lstm": Lstm()}


def outer(left, right):
    """Σ over examples of left ⊗ right; 1 stands for a bias."""
    right = right.reshape(-1, right.shape[-1])
    return right.sum(0) if np.ndim(left) == 0 else left.reshape(-1, left.shape[-1]).T @ right


def affine(p, h, x, bar):
    return (bar @ p["w_h"].T,), {"w_x": outer(x, bar), "w_h": outer(h, bar), "b": outer(1, bar)}


def gradient(name, params, carry, xs, targets, mask, weights, coverage):
    """Σ w ‖h − target‖² and Σ_t Σ_i C[t, i] G[t, i].

    carry: a tuple of `[*batch, H]`; mask and weights `[T, *batch]`; coverage `[T, T, *batch]`.
    """
    cell, num_steps, states, caches, total = CELLS[name], len(xs), [carry], [], 0.0
    for t in range(num_steps):
        after, cache = cell.forward(params, states[-1], xs[t])
        states.append(tuple(np.where(mask[t][..., None], a, b) for a, b in zip(after, states[-1], strict=True)))
        caches.append(cache)
        total += np.sum(np.where(mask[t], weights[t] * np.sum((after[0] - targets[t]) ** 2, -1), 0))
    grad = {key: np.zeros_like(value) for key, value in params.items()}
    for t in range(num_steps):
        slope = np.where(mask[t], weights[t], 0)[..., None] * 2 * (states[t + 1][0] - targets[t])
        bar = (slope, *(np.zeros_like(s) for s in carry[1:]))
        for i in range(t, -1, -1):
            here = mask[i][..., None]
            weighed = tuple(np.where(here, b * coverage[t, i][..., None], 0) for b in bar)
            own = cell.backward(params, states[i], xs[i], caches[i], weighed)[1]
            grad = {key: grad[key] + own[key] for key in grad}
            before = cell.backward(params, states[i], xs[i], caches[i], bar)[0]
            bar = tuple(np.where(here, a, b) for a, b in zip(before, bar, strict=True))
    return total, grad
