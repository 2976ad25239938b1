"""Gradients in 50 decimal digits (mpmath): central differences of the loss whose carries at the cuts are frozen.

With h = 1e-16 the difference is off by about h² = 1e-32 and by rounding 1e-50 / h = 1e-34: thirty digits are right,
so that what a float64 gradient differs from it is the float64 gradient's own error.
"""

import mpmath
import numpy as np

DIGITS, WIDTH = 50, "1e-16"


def affine(p, x, h):
    """x W_x + h W_h + b of one example, a list."""
    return [
        mpmath.fdot(x, [row[j] for row in p["w_x"]]) + mpmath.fdot(h, [row[j] for row in p["w_h"]]) + p["b"][j]
        for j in range(len(p["b"]))
    ]


def sigmoid(a):
    return 1 / (1 + mpmath.exp(-a))


def tanh(p, carry, x):
    (h,) = carry
    return ([mpmath.tanh(a) for a in affine(p, x, h)],)


def lstm(p, carry, x):
    (h, c), size = carry, len(carry[0])
    a = affine(p, x, h)
    i, f, g, o = (a[k * size : (k + 1) * size] for k in range(4))
    c = [sigmoid(f[j]) * c[j] + sigmoid(i[j]) * mpmath.tanh(g[j]) for j in range(size)]
    return [sigmoid(o[j]) * mpmath.tanh(c[j]) for j in range(size)], c


CELLS = {"tanh": tanh, "lstm": lstm}


def exact(array):
    """Nested lists of mpf: every float64 is one exactly."""
    return mpmath.mpf(float(array)) if np.ndim(array) == 0 else [exact(a) for a in array]


def losses_of(name, params, carry, xs, targets, mask, weights, steps):
    """The weighted losses of some steps of one example, from the carry that enters the first, and the carries."""
    total, carries = mpmath.mpf(0), []
    for t in steps:
        carries.append(carry)
        if mask[t]:
            carry = CELLS[name](params, carry, xs[t])
            total += weights[t] * mpmath.fsum((h - y) ** 2 for h, y in zip(carry[0], targets[t], strict=True))
    return total, carries


def gradient(name, params, carry, xs, targets, mask, weights, windows, width=WIDTH):
    """`Σ w ‖h − target‖²` and its gradient, leaves as lists of mpf, flat.

    carry: a tuple of `[B, H]`; xs, targets `[T, B, ...]`; mask and weights `[T, B]`. windows: pairs (the steps whose
    losses count, the step whose carry is frozen), one for every backward pass whose gradients add up.
    """
    with mpmath.workdps(DIGITS):
        p, half = {key: exact(a) for key, a in params.items()}, mpmath.mpf(width)
        carry, xs, targets, weights = (exact(a) for a in (carry, xs, targets, weights))
        examples, windows = range(len(xs[0])), list(windows)
        of = lambda b: ([a[b] for a in xs], [a[b] for a in targets], np.asarray(mask)[:, b], [a[b] for a in weights])
        whole = [losses_of(name, p, tuple(c[b] for c in carry), *of(b), range(len(xs))) for b in examples]

        def frozen_loss(p):
            value = mpmath.mpf(0)
            for losses, cut in windows:
                for b in examples:
                    arrays = of(b)
                    counted = [w if t in losses else mpmath.mpf(0) for t, w in enumerate(arrays[3])]
                    value += losses_of(name, p, whole[b][1][cut], *arrays[:3], counted, range(cut, max(losses) + 1))[0]
            return value

        def slope(row, j):
            kept, values = row[j], []
            for move in (half, -half):
                row[j] = kept + move
                values.append(frozen_loss(p))
            row[j] = kept
            return (values[0] - values[1]) / (2 * half)

        grad = {}
        for key, value in p.items():
            rows = value if isinstance(value[0], list) else [value]
            grad[key] = [slope(row, j) for row in rows for j in range(len(row))]
        return mpmath.fsum(value for value, _ in whole), grad
