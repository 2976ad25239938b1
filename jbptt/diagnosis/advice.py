"""What a diagnosis advises, each piece with the number that triggers it and the limit it passes."""

import math
from typing import Any, NamedTuple

TOLERANCES = (0.1, 0.01)  # the gradient errors that windows are recommended for
CHANGE = (
    10.0  # the factor over the measured lags from which on a gradient is said to vanish or explode
)
WASTED = 0.25  # full BPTT wastes where a window of this part of T leaves 1 % of error
SHORT = 0.25  # a half-life of less than this part of T is short
HEAVY = 10.0  # a largest norm of this many medians makes single updates decide
UNEVEN = 1.5  # and of this many where the gradient explodes
# An exponent that scatters over examples by less than this part of it is that of one matrix.
EVEN = 0.1
SAME = 0.01  # weights scaled by less than this are the same
STUCK = 0.25  # this share of dead or saturated units is too much
STABLE_CURVATURE = 2.0  # gradient descent overshoots where learning rate · curvature is larger


class Advice(NamedTuple):
    """One thing to change.

    Attributes:
      topic: `window`, `clipping`, `gated cell`, `activation`, `recurrent initialisation`,
        `regularisation` or `learning rate`.
      evidence: what was measured.
      value: the number measured.
      sign: how it compares with the threshold, `<`, `≤` or `>`: the rule by which the advice is
        given.
      threshold: what the number passes.
      remedy: what to do.
    """

    topic: str
    evidence: str
    value: float
    sign: str
    threshold: float
    remedy: str

    def __str__(self) -> str:
        compared = f"{self.value:.3g} {self.sign} {self.threshold:.3g}"
        return f"{self.topic}: {self.evidence} {compared}: {self.remedy}"


def advise(found: Any) -> tuple[Advice, ...]:
    """The advice that the evidence of one `Diagnosis` supports; empty for a healthy gradient.

    With no gradient, and where something is not finite, only what explains that.
    """
    rules = [
        _window,
        _clipping,
        _gated_cell,
        _activation,
        _recurrent_initialisation,
        _regularisation,
        _rate,
    ]
    if found.verdict == "non-finite":
        rules = (
            [_recurrent_initialisation]
            if found.nonfinite.phase != "given" and found.exponent > 0
            else []
        )
    elif found.gradient_norm == 0:
        rules = [_activation]
    return tuple(advice for rule in rules if (advice := rule(found)) is not None)


def _num_steps(found: Any) -> int:
    """Steps that lead to a loss: padding is no part of a sequence."""
    return max(1, int(found.num_used_steps))


def _window(found: Any) -> Advice | None:
    """Full BPTT goes back further than the gradient."""
    window = int(found.block_window[-1])
    share = window / _num_steps(found)
    if not 0 < share <= WASTED:
        return None
    return Advice(
        "window", "1% block window / steps", share, "≤", WASTED, f"truncated_bptt(window={window})"
    )


def _clipping(found: Any) -> Advice | None:
    """A few parts of the batch decide the update, or the gradient explodes (Pascanu et al.,
    2013).
    """
    median, _, largest = (float(q) for q in found.norm_quantiles)
    if not median > 0:
        return None
    ratio, limit = largest / median, UNEVEN if found.verdict == "exploding" else HEAVY
    if ratio <= limit:
        return None
    return Advice(
        "clipping",
        "largest / median norm of parts",
        ratio,
        ">",
        limit,
        f"clip_by_global_norm({median:.3g})",
    )


def _gated_cell(found: Any) -> Advice | None:
    """The gradient vanishes well before the beginning of the sequence (Hochreiter & Schmidhuber,
    1997).

    By the model's own doing: its state shrinks, and neither gates nor resets have cut the gradient.
    """
    share = float(found.half_life) / _num_steps(found)
    if found.verdict != "vanishing" or share >= SHORT or not found.profile.cotangent_norms[0] > 0:
        return None
    shrinks = -math.inf < found.exponent * _num_steps(found) <= -math.log(CHANGE)
    if not shrinks or (found.decay.zero_lag >= 0 and not found.decay.underflow):
        return None
    remedy = "gru, or lstm with a larger forget_bias"
    return Advice("gated cell", "half-life / steps", share, "<", SHORT, remedy)


def _activation(found: Any) -> Advice | None:
    """Units that pass no gradient: dead (exactly zero) or saturated (at ±1)."""
    dead, saturated = float(found.units.dead), float(found.units.saturated)
    if max(dead, saturated) <= STUCK:
        return None
    if dead >= saturated:
        return Advice(
            "activation",
            "share of the carry always 0",
            dead,
            ">",
            STUCK,
            "leaky_relu, or larger biases",
        )
    remedy = "smaller inputs and weights, or leaky_relu"
    return Advice("activation", "share of the carry at ±1", saturated, ">", STUCK, remedy)


def _recurrent_initialisation(found: Any) -> Advice | None:
    """The state shrinks or grows by a factor of ten over the sequence, whatever the loss (Saxe et
    al., 2014).

    Only where one matrix may be what does it: no second leaf in the carry (lstm), no stuck units
    (their derivative does it), nearly the same exponent for all examples. A gru may pass: the words
    name the rnn.
    """
    exponent = float(found.exponent)
    value = abs(exponent) * _num_steps(found)
    if not (math.log(CHANGE) < value < math.inf) or found.num_carry_leaves != 1:
        return None
    if max(float(found.units.dead), float(found.units.saturated)) > STUCK or not (
        max(float(found.dynamics.spread), float(found.dynamics.error)) <= EVEN * abs(exponent)
    ):
        return None
    factor = math.exp(-exponent)
    if abs(factor - 1) < SAME:
        return None
    remedy = f"near-linear rnn: orthogonal(), or w_h × {factor:.3g}"
    return Advice("recurrent initialisation", "|λ₁| · steps", value, ">", math.log(CHANGE), remedy)


def _regularisation(found: Any) -> Advice | None:
    """Exploding because nearby states part exponentially fast."""
    exponent = float(found.exponent)
    if found.verdict != "exploding" or not exponent > 0:
        return None
    return Advice(
        "regularisation",
        "λ₁",
        exponent,
        ">",
        0.0,
        "penalise the spectral norm of recurrent weights",
    )


def _rate(found: Any) -> Advice | None:
    """A step of gradient descent overshoots the minimum along the gradient by more than it
    gains.
    """
    if found.dynamics.learning_rate is None:
        return None
    curvature = float(found.dynamics.curvature)
    value = float(found.dynamics.learning_rate) * curvature
    if not value > STABLE_CURVATURE:
        return None
    remedy = f"learning rate of {1 / curvature:.3g}, {STABLE_CURVATURE / curvature:.3g} at most"
    return Advice(
        "learning rate", "learning rate · curvature", value, ">", STABLE_CURVATURE, remedy
    )
