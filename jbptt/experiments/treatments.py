"""The remedies for vanishing and exploding gradients as data: what is done to one run, in numbers.

    g = gated BPTT (window, keep_prob) + strength · ∂penalty/∂w
    w ← w − learning_rate · (clip(g, max_norm) + weight_decay · w)

Window T, keep_prob 1, max_norm inf, weight_decay 0 and strength 0 change nothing, so that one
compiled program runs every remedy of the tanh network.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.core import Tracer

from jbptt import cells, truncation, validation
from jbptt.analysis.lyapunov import lyapunov_spectrum
from jbptt.clipping import clip_by_global_norm
from jbptt.estimators import gated_bptt
from jbptt.experiments import tasks
from jbptt.types import Batch, Carry, Estimator, Params, Step

FAMILIES = ("rnn", "gru", "lstm")
PATIENTS = ("vanishing", "exploding")
NOTHING = "nothing"
RNN_REMEDIES = (
    NOTHING,
    "fixed truncation",
    "randomized truncation",
    "clipping",
    "smaller learning rate",
    "weight decay",
    "spectral penalty",
    "gradient flossing",
    "orthogonal init",
    "identity init",
    "relu",
    "leaky relu",
)
REMEDIES = (*RNN_REMEDIES, *FAMILIES[1:])

PENALTIES = ("spectral penalty", "gradient flossing")
"""What needs a program with penalties in it."""

PATIENT, ORTHOGONAL, IDENTITY = range(3)
"""Where the recurrent matrix starts."""

UNREGULARISED, SPECTRAL, LYAPUNOV = range(3)
"""What the penalty is on."""


class Doses(NamedTuple):
    """How much of each remedy; all may be traced.

    Attributes:
      learning_rate: of plain gradient descent, everywhere but under "smaller learning rate".
      smaller_learning_rate: of that one.
      window: steps per block, "fixed truncation".
      keep_prob: probability that a crossing is kept, "randomized truncation".
      max_norm: of "clipping".
      weight_decay: `w ← w − learning_rate · weight_decay · w`, all parameters.
      spectral: strength of `½ σ₁(w_h)²` (Yoshida & Miyato, 2017). σ₁ is pushed one singular vector
        at a time: a matrix with H equal singular values shrinks H times as slowly as by weight
        decay.
      lyapunov: strength of the mean of `λ_i²` over the leading exponents of one example (Engelken,
        2023). Deep in chaos (at H = 32 and T = 50 from radius 2 on) this penalty's own gradient
        explodes.
      negative_slope: of "leaky relu".
    """

    learning_rate: jax.typing.ArrayLike = 0.05
    smaller_learning_rate: jax.typing.ArrayLike = 0.005
    window: jax.typing.ArrayLike = 10
    keep_prob: jax.typing.ArrayLike = 0.9
    max_norm: jax.typing.ArrayLike = 1.0
    weight_decay: jax.typing.ArrayLike = 0.1
    spectral: jax.typing.ArrayLike = 3.0
    lyapunov: jax.typing.ArrayLike = 1.0
    negative_slope: jax.typing.ArrayLike = 0.01


DOSES = Doses()


class Treatment(NamedTuple):
    """What is done to one run: scalar arrays, or `[R]` of each.

    Attributes:
      start: `PATIENT` (a random orthogonal matrix times the radius), `ORTHOGONAL` (the same times
        1) or `IDENTITY`.
      rectified: whether the activation is a (leaky) ReLU instead of tanh.
      negative_slope: of that ReLU.
      window: steps per block of fixed truncation; T or more: none.
      keep_prob: of randomized truncation; 1: none.
      max_norm: of clipping; inf: none.
      learning_rate: of plain gradient descent.
      weight_decay: decoupled; 0: none.
      regulariser: `UNREGULARISED`, `SPECTRAL` or `LYAPUNOV`.
      strength: of that penalty.
    """

    start: Any
    rectified: Any
    negative_slope: Any
    window: Any
    keep_prob: Any
    max_norm: Any
    learning_rate: Any
    weight_decay: Any
    regulariser: Any
    strength: Any

    def gates(self, key: Any, num_steps: int) -> jax.Array:
        """A draw of the gates, `[num_steps]`; `key` is read even where nothing is random."""
        return cuts(key, num_steps, self.window, self.keep_prob)


def cuts(
    key: Any, num_steps: int, window: jax.typing.ArrayLike, keep_prob: jax.typing.ArrayLike
) -> jax.Array:
    """Gates `[num_steps]` of blocks and random cuts at once; window T and keep_prob 1: none."""
    return truncation.fixed(num_steps, window) * truncation.randomized(key, num_steps, keep_prob)


def check_doses(doses: Doses) -> None:
    """A ValueError unless every dose is in range; traced values are trusted."""
    if not isinstance(doses.window, Tracer):
        validation.check_positive_integer("doses.window", doses.window)
    validation.check_probability("doses.keep_prob", doses.keep_prob)
    if jnp.ndim(doses.keep_prob):
        raise ValueError(
            f"doses.keep_prob must be a scalar, got shape {jnp.shape(doses.keep_prob)}; one "
            "probability for all steps"
        )
    for name in ("learning_rate", "smaller_learning_rate", "max_norm"):
        validation.check_above(f"doses.{name}", getattr(doses, name), 0, "nothing would be learnt")
    for name in ("weight_decay", "spectral", "lyapunov", "negative_slope"):
        value = getattr(doses, name)
        if not isinstance(value, Tracer) and not _is_finite_and_positive_or_0(value):
            raise ValueError(
                f"doses.{name} must be a finite number >= 0, got {value!r}; 0 leaves the remedy out"
            )


def _is_finite_and_positive_or_0(value: Any) -> bool:
    try:
        return 0 <= float(value) < math.inf
    except (TypeError, ValueError):
        return False


def prescribe(doses: Doses, num_steps: int, names: Sequence[str] = RNN_REMEDIES) -> Treatment:
    """A treatment for each of the names, which are of `RNN_REMEDIES`; leaves `[R]`."""
    nothing = {
        "start": PATIENT,
        "rectified": False,
        "negative_slope": 0.0,
        "window": num_steps,
        "keep_prob": 1.0,
        "max_norm": math.inf,
        "learning_rate": doses.learning_rate,
        "weight_decay": 0.0,
        "regulariser": UNREGULARISED,
        "strength": 0.0,
    }
    changed = {
        NOTHING: {},
        "fixed truncation": {"window": doses.window},
        "randomized truncation": {"keep_prob": doses.keep_prob},
        "clipping": {"max_norm": doses.max_norm},
        "smaller learning rate": {"learning_rate": doses.smaller_learning_rate},
        "weight decay": {"weight_decay": doses.weight_decay},
        "spectral penalty": {"regulariser": SPECTRAL, "strength": doses.spectral},
        "gradient flossing": {"regulariser": LYAPUNOV, "strength": doses.lyapunov},
        "orthogonal init": {"start": ORTHOGONAL},
        "identity init": {"start": IDENTITY},
        "relu": {"rectified": True},
        "leaky relu": {"rectified": True, "negative_slope": doses.negative_slope},
    }
    rows = [{**nothing, **changed[name]} for name in names]
    return Treatment(
        **{entry: jnp.stack([jnp.asarray(row[entry]) for row in rows]) for entry in nothing}
    )


def cell_of(
    family: str, hidden_size: int, treatment: Treatment, radius: jax.typing.ArrayLike
) -> cells.Cell:
    """The treated cell with a linear readout of one number.

    Its recurrent matrix, or the matrix of each gate, starts as a random orthogonal matrix times the
    radius.
    """

    def recurrent_init(key, shape, dtype=jnp.float32):
        scale = jnp.where(treatment.start == PATIENT, radius, 1.0).astype(dtype)
        drawn = scale * cells.orthogonal()(key, shape, dtype)
        return jnp.where(treatment.start == IDENTITY, jnp.eye(*shape, dtype=dtype), drawn)

    def activation(a):
        slope = treatment.negative_slope
        # At −∞ a ReLU is 0.
        leaky = jax.nn.relu(a) - jnp.where(slope == 0, 0, slope * jax.nn.relu(-a))
        return jnp.where(treatment.rectified, leaky, jnp.tanh(a))

    build = {"gru": cells.gru, "lstm": cells.lstm}
    if family in build:
        cell = build[family](1, hidden_size, recurrent_init=recurrent_init)
    else:
        cell = cells.rnn(1, hidden_size, activation=activation, recurrent_init=recurrent_init)
    return cells.with_linear_readout(cell, 1)


def spectral_penalty(params: Params) -> jax.Array:
    """`½ σ₁(w_h)²`, its singular vectors held: equal singular values give a subgradient."""
    u, _, vh = jnp.linalg.svd(lax.stop_gradient(params["w_h"]))
    return jnp.square(u[:, 0] @ params["w_h"] @ vh[0]) / 2


def lyapunov_penalty(
    step: Step, params: Params, carry: Carry, xs: jax.Array, num_exponents: int
) -> jax.Array:
    """The mean of `λ_i²` over an example's leading exponents; −∞ has no gradient, counts as 0."""
    exponents = lyapunov_spectrum(step, params, carry, xs, num_exponents=num_exponents).exponents
    return jnp.mean(jnp.square(jnp.where(jnp.isfinite(exponents), exponents, 0)))


def treated_estimator(
    cell: cells.Cell,
    treatment: Treatment,
    num_exponents: int | None,
    gates_fn: Callable | None = None,
) -> Estimator:
    """The gradient of a treated run: gated, with its penalty, each batch from a carry of zeros.

    Args:
      cell: with its readout.
      treatment: of one run.
      num_exponents: of the Lyapunov penalty; None leaves penalties out of the program.
      gates_fn: other gates than the treatment's.
    """

    plain = gated_bptt(cell.step, tasks.squared_error, gates_fn=gates_fn or treatment.gates)

    def penalty_grads(params, batch, num_exponents):
        def of_exponents(params):
            return lyapunov_penalty(
                cell.step, params, cell.initial_carry(), batch.xs[:, 0], num_exponents
            )

        # The gradients are taken in the branches: a branch not taken must not leave 0 · inf behind.
        branches = [
            lambda p: jax.tree.map(jnp.zeros_like, p),
            jax.grad(spectral_penalty),
            jax.grad(of_exponents),
        ]
        return lax.switch(treatment.regulariser, branches, params)

    def update(params: Params, state, batch: Batch):
        fresh = state._replace(carry=cell.initial_carry(batch.xs.shape[1:-1]))
        estimate, state = plain.update(params, fresh, batch)
        if num_exponents is None:
            return estimate, state
        weight = treatment.strength * estimate.weight_sum
        grads = jax.tree.map(
            lambda g, p: g + weight * p,
            estimate.grad_sum,
            penalty_grads(params, batch, num_exponents),
        )
        return replace(estimate, grad_sum=grads), state

    return plain._replace(update=update)


def optimizer_of(treatment: Treatment) -> optax.GradientTransformation:
    """Clipping, weight decay and plain gradient descent."""
    return optax.chain(
        clip_by_global_norm(treatment.max_norm),
        optax.add_decayed_weights(treatment.weight_decay),
        optax.sgd(treatment.learning_rate),
    )
