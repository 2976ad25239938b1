"""The shape of a decay in words: an exponential, or two, a plateau, writes, growth, a swing.

On the host, in NumPy, from what arrives at each lag as it was measured.
"""

from typing import NamedTuple

import numpy as np

FLOOR = 1e-3  # what arrives below this part of what was sent says nothing about the shape
CLOSE = 0.1  # root mean square of ln(measured / fitted) up to which a curve describes the decay
# In these means lag k counts as 1 / (k + 1): what is lost in the first steps is no detail.
APART = 4.0  # two half-lives closer than this are one
WHOLE = 0.9  # this part of what was sent counts as undiminished


class Shape(NamedTuple):
    """What the decay looks like.

    Attributes:
      kind: `too few lags`, `constant`, `one exponential`, `two time scales`, `plateau`, `writes`,
        `growth`, `swing` or `none of these`.
      words: the same with its numbers.
      half_lives: of the exponentials, in steps, the shorter one first.
    """

    kind: str
    words: str
    half_lives: tuple[float, ...] = ()


def shape_of(arrives: np.ndarray, alive: np.ndarray) -> Shape:
    """The first of the shapes that fits.

    Args:
      arrives: `[K]`, how much of the losses' adjoints arrives at each lag measured.
      alive: `[K]`, the share of losses whose adjoint is not exactly zero there.
    """
    arrives = np.asarray(arrives, float) / (arrives[0] or 1)
    if len(arrives) < 2 or not np.all(np.isfinite(arrives)):
        return Shape("too few lags", "")
    return _writes(arrives, np.asarray(alive, float)) or _smooth(arrives)


def _mean(squares: np.ndarray, lags: np.ndarray) -> np.ndarray:
    """Over lags, the last axis, each counted as 1 / (k + 1)."""
    return np.average(squares, axis=-1, weights=1 / (lags + 1))


def _writes(arrives: np.ndarray, alive: np.ndarray) -> Shape | None:
    """A plateau, or many of different lengths: of a loss all arrives, from some lag on nothing."""
    left = alive > 0.02
    if not np.any(alive < 0.5) or np.any(arrives[left] < WHOLE * alive[left]):
        return None
    if np.any(arrives[left] > alive[left] / WHOLE):
        return None
    length = int(np.argmax(alive < 0.5))
    if np.all(alive[:length] > 1 - 1e-6) and alive[length] < 1e-6:
        return Shape("plateau", f"undiminished over {length} steps, then nothing")
    return Shape(
        "writes", f"undiminished back to a cut or a write, for half of the losses {length} steps"
    )


def _smooth(arrives: np.ndarray) -> Shape:
    used = arrives > FLOOR
    lags, logs = np.flatnonzero(used), np.log(arrives[used])
    if len(lags) < 4:
        return Shape("too few lags", "")
    if np.ptp(logs) < CLOSE:
        return Shape("constant", "hardly any change over the lags measured")
    slope, offset = np.polyfit(lags, logs, 1, w=(lags + 1) ** -0.5)
    line = offset + slope * lags
    turns = np.sum(np.diff(np.sign(logs - line)) != 0)
    if np.sqrt(_mean((logs - line) ** 2, lags)) <= CLOSE:
        if slope > 0:
            return Shape("growth", f"it doubles every {np.log(2) / slope:.3g} steps")
        half = np.log(2) / -slope
        return Shape(
            "one exponential", f"one exponential, it halves every {half:.3g} steps", (half,)
        )
    rises = np.sum(np.diff(logs) > 1e-3)
    if turns >= 6 and rises >= 0.25 * len(lags):
        return Shape("swing", f"it swings by a factor of {np.exp(np.ptp(logs - line)):.3g}")
    return _two_exponentials(lags, logs) or Shape(
        "none of these", "described by no one exponential"
    )


def _two_exponentials(lags: np.ndarray, logs: np.ndarray) -> Shape | None:
    """Two exponentials, of parts along one direction, which add, or across, whose squares add."""
    fits = [(error / power, rates / power, parts ** (1 / power)) for power in (1, 2)
            for error, rates, parts in _fit_two(lags, power * logs)]  # fmt: skip
    if not fits:
        return None
    error, rates, parts = min(fits, key=lambda fit: fit[0])
    if error > CLOSE or rates.max() < APART * rates.min():
        return None
    order = np.argsort(-rates)
    short, long = np.log(2) / rates[order]
    share, most = parts[order][1] / parts.sum(), 20 * lags[-1]
    long_words = f"{long:.0f}" if long >= 100 else f"{long:.3g}"
    long_words = f"over {most:.0f}" if long > most else long_words
    words = f"half-lives {short:.3g} and {long_words} steps ({100 * share:.2g} % the longer)"
    return Shape("two time scales", f"two time scales, {words}", (float(short), float(long)))


def _fit_two(lags: np.ndarray, logs: np.ndarray) -> list[tuple]:
    """The best `a e^{−r k} + b e^{−s k}`, a, b > 0: least squares of ln, from two starts.

    Its root mean square error in ln, (r, s) and (a, b); nothing where the fit does not end.
    """
    from scipy.optimize import least_squares  # JAX brings it; only a page needs it

    weights = (lags + 1) ** -0.5
    late = len(lags) // 2
    slow = max((logs[late] - logs[-1]) / max(lags[-1] - lags[late], 1), 1e-4)
    share = np.exp(np.clip(logs[late] + slow * lags[late] - logs[0], -20, -1e-3))

    def residuals(of):
        (r, s), (a, b) = np.exp(of[:2]), of[2:]
        return weights * (np.logaddexp(a - r * lags, b - s * lags) - logs)

    fits = []
    for fast in (0.7, 0.1):
        start = [np.log(max(fast, 4 * slow)), np.log(slow), np.log1p(-share), np.log(share)]
        found = least_squares(residuals, start, bounds=(-40, 40), x_scale="jac")
        if found.success:
            error = float(np.sqrt(_mean((residuals(found.x) / weights) ** 2, lags)))
            fits.append((error, np.exp(found.x[:2]), np.exp(found.x[2:])))
    return [min(fits, key=lambda fit: fit[0])] if fits else []
