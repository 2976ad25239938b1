"""What a diagnosis advises, each piece with the number that triggers it and the limit it passes."""

import math
from typing import Any, NamedTuple

from jbptt.diagnosis.baseline import is_trained

SHARES = (0.5, 0.9, 0.99)  # of the gradient, whose sources are told
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
KEEPS = 0.5  # units keep themselves where more than this of a step's Jacobian is on its diagonal
STUCK = 0.25  # this share of dead or saturated units is too much
STABLE_CURVATURE = 2.0  # gradient descent overshoots where learning rate · curvature is larger


def steps(number: int) -> str:
    """`1 step`, `2 steps`."""
    return f"{number} step{'s' * (number != 1)}"


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
    flows = float(found.profile.cotangent_norms[0]) > 0
    if not (0 < share <= WASTED and flows):
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
        f"clip_by_global_norm({min(median, float(found.gradient_norm)):.3g})",
    )


def _gated_cell(found: Any) -> Advice | None:
    """The gradient vanishes well before the beginning of the sequence (Hochreiter & Schmidhuber,
    1997).

    By the model's own doing: its state shrinks, and neither gates nor resets have cut the gradient.
    Only for a network whose units a trainable matrix mixes, and that do not keep themselves.
    """
    share = float(found.half_life) / _num_steps(found)
    if found.verdict != "vanishing" or share >= SHORT or not found.profile.cotangent_norms[0] > 0:
        return None
    shrinks = -math.inf < found.exponent * _num_steps(found) <= -math.log(CHANGE)
    if not shrinks or (found.decay.zero_lag >= 0 and not found.decay.underflow):
        return None
    if not mixes(found):
        return None
    remedy = (
        f"where more than {steps(int(found.reach))} of memory would help, gru, or lstm with a "
        "larger forget_bias"
    )
    return Advice("gated cell", "half-life / steps", share, "<", SHORT, remedy)


def mixes(found: Any) -> bool:
    """Whether it is a network whose units mix, by matrices that are trained: no gates, no leaks."""
    return bool(found.recurrent_weights) and float(found.dynamics.own_path) < KEEPS


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


def is_worth_trying(found: Any) -> bool:
    """Whether changing a recurrent matrix may mend it: the state shrinks or grows by a factor of
    ten over the sequence, by a matrix's doing (no stuck units, nearly alike for all examples), and
    nothing that was learnt is lost by it.
    """
    if is_trained(float(found.loss), float(found.constant_loss)):
        return False
    exponent = float(found.exponent)
    if not (math.log(CHANGE) < abs(exponent) * _num_steps(found) < math.inf) or not mixes(found):
        return False
    scatter = max(float(found.dynamics.spread), float(found.dynamics.error))
    stuck = max(float(found.units.dead), float(found.units.saturated))
    return stuck <= STUCK and scatter <= EVEN * abs(exponent)


def _recurrent_initialisation(found: Any) -> Advice | None:
    """A recurrent matrix scaled, or made orthogonal (Saxe et al., 2014), where that was tried on
    this model and helped: the exponent halved at least, half-lives of what vanished doubled.
    """
    if not is_worth_trying(found):
        return None
    exponent, vanishes = float(found.exponent), found.verdict == "vanishing"
    helped = [
        trial
        for trial in found.trials
        if abs(trial.exponent) <= abs(exponent) / 2
        and trial.verdict in ("vanishing", "stable")
        and (trial.half_life >= 2 * float(found.half_life) or not vanishes)
    ]
    if not helped:
        return None
    best = min(helped, key=lambda trial: abs(trial.exponent))
    halves = f"half-life {float(found.half_life):.3g} → {best.half_life:.3g} steps".replace(
        "inf", "∞"
    )
    effect = halves if vanishes else f"{found.verdict} → {best.verdict}"
    value = abs(exponent) * _num_steps(found)
    remedy = f"{best.remedy} (tried: {effect})"
    return Advice(
        "recurrent initialisation", "|exponent| · steps", value, ">", math.log(CHANGE), remedy
    )


def _regularisation(found: Any) -> Advice | None:
    """Exploding because nearby states part exponentially fast."""
    exponent = float(found.exponent)
    if found.verdict != "exploding" or not exponent > 0 or not found.recurrent_weights:
        return None
    remedy = f"penalise the spectral norm of {', '.join(found.recurrent_weights)}"
    return Advice("regularisation", "exponent", exponent, ">", 0.0, remedy)


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
