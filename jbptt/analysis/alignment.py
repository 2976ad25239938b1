"""How fast a network's adjoints turn into one direction: the second exercise, in a trained RNN."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jbptt import validation
from jbptt.analysis.jacobians import check_differentiable
from jbptt.arrays import align_leading, is_inexact, split_inexact, times_gate, widened
from jbptt.losses import loss_weights
from jbptt.norms import inner, norm, normalised, scaled_norm
from jbptt.problem import Problem, answer, problem_of
from jbptt.segments import pass_forward
from jbptt.types import Batch, Carry, Loss, Params, Step


class AdjointAlignment(NamedTuple):
    """How near `∂ℓ_{s+k}/∂carries[s]` is to v[s], to which all adjoints turn, by lag k.

    Attributes:
      cosine: weighted mean of |cos| of the angle between the two, `[max_lag]`, lags 0 … max_lag −
        1.
      misalignment: weighted mean of the sine of that angle, `[max_lag]`, accurate down to rounding.
      rate: by how much ln sine changes per lag, a scalar, natural logarithm, per step; negative
        where the adjoints align.
      directions: v[s], leaves `[T, *batch, ...]` like the carry's, norm 1 per example; zeros for
        leaves that are not inexact.
    """

    cosine: jax.Array
    misalignment: jax.Array
    rate: jax.Array
    directions: Carry


def random_directions(leaves: list, key: jax.Array, num_leading: int) -> list:
    """A random unit vector for each example, in the shapes of the leaves."""
    drawn = [
        jax.random.normal(k, leaf.shape, widened(leaf).dtype)
        for k, leaf in zip(jax.random.split(key, len(leaves)), leaves, strict=True)
    ]
    placed = [jnp.zeros_like(leaf, d.dtype) + d for d, leaf in zip(drawn, leaves, strict=True)]
    return normalised(placed, num_leading)


def check_max_lag(max_lag: Any, num_steps: int) -> int:
    """max_lag as an int with 2 ≤ max_lag ≤ T/2."""
    max_lag = validation.check_positive_integer("max_lag", max_lag, smallest=2)
    if 2 * max_lag > num_steps:
        raise ValueError(
            f"max_lag must be <= T/2 = {num_steps / 2:g}, got {max_lag}; v[s] needs 2·max_lag "
            "steps beyond s to converge: measure fewer lags, or pass a longer sequence"
        )
    return max_lag


def angle(vectors: list, directions: list, num_leading: int) -> tuple[jax.Array, jax.Array]:
    """|cos| and sine of the angle between unit vectors, by example; the sine accurate down to ε."""
    along = inner(directions, vectors, num_leading)
    across = [
        a - align_leading(along, a.ndim) * d for a, d in zip(vectors, directions, strict=True)
    ]
    return jnp.abs(along), norm(across, num_leading)


def far_directions(
    pull_one: Callable, start: list, steps: Any, live: jax.Array
) -> tuple[list, jax.Array]:
    """The directions v, leaves `[T, ...]`, and how far each has come, in live steps, `[T, *batch]`.

        v[s] = J_sᵀ v[s+1] / ‖J_sᵀ v[s+1]‖,   v[T] = start

    Where `J_sᵀ v[s+1]` is 0, v begins anew from `start`.
    """

    def body(state, inputs):
        direction, age = state
        step_s, live_s = inputs
        pulled = pull_one(step_s, direction)
        pulled, alive = normalised(pulled, live_s.ndim), scaled_norm(pulled, live_s.ndim)[0] != 0
        age = jnp.where(alive, age + live_s.astype(age.dtype), 0)
        direction = [
            jnp.where(align_leading(alive, p.ndim), p, s)
            for p, s in zip(pulled, start, strict=True)
        ]
        return (direction, age), (direction, age)

    ages = jnp.zeros_like(norm(start, live.ndim - 1), int)
    return lax.scan(body, (start, ages), (steps, live), reverse=True)[1]


class LagMeans(NamedTuple):
    """What `scan_angles` reads at each lag, `[max_lag]`.

    Means of |cos| and sine, and Σ w·fall and Σ w of pairs.
    """

    cosine: jax.Array
    sine: jax.Array
    fall: jax.Array
    fall_weight: jax.Array


def smallest_sine(eps: float) -> float:
    """Below this sine an adjoint counts as aligned: 1000 times rounding; in half precision √ε."""
    return min(1000 * eps, eps**0.5)


def scan_angles(
    pull_all: Callable,
    outputs_bar: list,
    directions: list,
    counted: jax.Array,
    weights: jax.Array,
    max_lag: int,
    eps: float,
) -> LagMeans:
    """The angles of all adjoints with the directions, lag by lag.

    As `lags.scan_lags`, but the adjoints are normalised on their way, so that they can go any way
    back. An adjoint's fall is how much ln sine has changed since its lag before, if the sine was
    not near rounding there.

    Args:
      pull_all: `(cotangents, outputs_bar) -> cotangents`, through all steps side by side.
      outputs_bar: what the losses send into the core's outputs, `[T, ...]`.
      directions: v, leaves `[T, *batch, ...]`.
      counted: where v has come far enough, `[T, *batch]`.
      weights: of the losses, |w|, `[T, *batch]`.
      max_lag: number of lags.
      eps: of the carry's dtype.
    """

    def body(state, lag):
        shifted, outputs_bar, before = state
        pulled = pull_all(shifted, outputs_bar)
        vectors, alive = normalised(pulled, weights.ndim), scaled_norm(pulled, weights.ndim)[0] != 0
        weight = jnp.where(alive & counted, jnp.roll(weights, -lag, axis=0), 0)
        cosine, sine = angle(vectors, directions, weights.ndim)

        def total(values, weight):
            return jnp.sum(jnp.where(weight == 0, 0, weight * values))

        size = jnp.sum(weight)
        size = jnp.where(size == 0, jnp.nan, size)
        followed = jnp.where((before >= smallest_sine(eps)) & (lag > 0), weight, 0)
        fall = total(jnp.log(jnp.maximum(sine, eps)) - jnp.log(jnp.maximum(before, eps)), followed)
        row = LagMeans(
            total(cosine, weight) / size, total(sine, weight) / size, fall, jnp.sum(followed)
        )
        shifted, before = (
            [jnp.concatenate([v[1:], jnp.zeros_like(v[:1])]) for v in a] for a in (vectors, [sine])
        )
        return (shifted, jax.tree.map(jnp.zeros_like, outputs_bar), before[0]), row

    start = (
        [jnp.zeros_like(d) for d in directions],
        outputs_bar,
        jnp.zeros_like(norm(directions, weights.ndim)),
    )
    return lax.scan(body, start, jnp.arange(max_lag))[1]


def fall_rate(means: LagMeans, eps: float) -> jax.Array:
    """The mean fall of ln sine per lag, in the second half of lags before the sine nears rounding.

    The first half is left to what dies out faster. −inf where fewer than two lags are above.
    """
    count = jnp.sum(jnp.cumprod(~(means.sine <= smallest_sine(eps))))  # NaN is not below it
    lags = jnp.arange(len(means.sine))
    used = lags > jnp.minimum(count // 2, len(lags) - 2)
    fall, weight = (jnp.sum(jnp.where(used, a, 0)) for a in (means.fall, means.fall_weight))
    return jnp.where(count < 2, -jnp.inf, fall / jnp.where(weight == 0, jnp.nan, weight))


def adjoint_alignment(
    step: Step,
    loss: Loss,
    params: Params,
    carry: Carry,
    batch: Batch,
    *,
    max_lag: int,
    key: jax.Array | None = None,
    gates: jax.Array | None = None,
) -> AdjointAlignment:
    """How fast adjoints forget which loss they came from and turn into one direction.

        V^k[s] = ∂ℓ_{s+k}/∂carries[s],    v[s] ∝ J_sᵀ J_{s+1}ᵀ … J_{T−1}ᵀ v[T],  v[T] random
        cosine[k] = mean |cos ∠(V^k[s], v[s])|,    misalignment[k] = mean sin ∠(V^k[s], v[s])

    As powers of a matrix turn every vector into the dominant eigenvector, so products of Jacobians
    turn every cotangent into one direction, per example and step. For a constant J it is the
    dominant left eigenvector, and `rate` is ln|λ₂/λ₁|; for a driven network it is the gap λ₂ − λ₁
    of its Lyapunov exponents. A rate near 0 (equal exponents, a complex pair): no single direction.

    Only those s count from which v has been pulled back through at least 2·max_lag steps, so that
    v's own misalignment is the square of the one that it measures: s + 2·max_lag ≤ T. Masked steps,
    which turn nothing, do not count as such steps, and where v itself dies (a reset of the carry)
    it starts anew. Adjoints that are exactly 0, and losses masked or of weight 0, have no direction
    and do not count; otherwise pairs are weighted by the size of their loss's weight. A gate scales
    an adjoint and turns it nowhere; a gate of 0 leaves the pairs across it out. Adjoints are
    normalised lag by lag: none under- or overflows.

    One forward pass, T step derivatives one after another, and max_lag rounds of T side by side;
    memory O(T) carries. jit- and vmap-able.

    Args:
      step: `(params, carry, x) -> (carry, y)`; every inexact carry leaf begins with the batch
        shape.
      loss: `(y, target) -> [*batch]`.
      params: the parameters.
      carry: what enters step 0, or a function of the parameters that gives it.
      batch: T ≥ 2·max_lag steps.
      max_lag: number of lags, ≥ 2.
      key: of v[T]; None: a fixed one.
      gates: `[T]` or `[T, *batch]`.

    Returns:
      An `AdjointAlignment`. Lags without any pair that counts are NaN. The rate is the weighted
      mean, over the second half of the lags before the misalignment comes near rounding (1000 ε),
      of the slope of each adjoint's own ln sine: misalignments of different losses scatter by
      factors, those of one do not. −inf where fewer than two lags are left (aligned at once), NaN
      where no adjoint can be followed.

    Raises:
      ValueError: max_lag < 2 or > T/2; no inexact carry leaf; carries without the batch shape; what
        `full_bptt` raises.
    """
    why = "the alignment is measured per example"
    problem = problem_of(step, loss, params, carry, batch, gates, per_example=why)
    check_differentiable(problem.carry)
    max_lag = check_max_lag(max_lag, problem.num_steps)
    return answer(_adjoint_alignment, problem, max_lag, given=(key,))


def _adjoint_alignment(problem: Problem, max_lag: int, key: jax.Array | None) -> AdjointAlignment:
    _, _, carries, _, outputs_bar = pass_forward(problem)
    like, _ = split_inexact(carries)

    def narrow(vectors):
        return [v.astype(leaf.dtype) for v, leaf in zip(vectors, like, strict=True)]

    def pull_one(step_s, direction):
        return problem.without_losses.pullback(*step_s)(narrow(direction), outputs_bar, None)[1]

    pull = problem.parallel_pullback(carries, problem.inputs, problem.num_steps)

    def pull_all(shifted, outputs_bar):
        cotangents = pull(narrow(shifted), outputs_bar, None)[1]
        return (
            cotangents
            if problem.gates is None
            else [times_gate(c, problem.gates) for c in cotangents]
        )

    num_leading, carry = len(problem.batch_shape), problem.carry
    start = random_directions(
        split_inexact(carry)[0], jax.random.key(0) if key is None else key, num_leading
    )
    weights = jnp.abs(problem.loss_weights())
    unmasked = loss_weights(problem.batch._replace(weights=None), weights) != 0
    directions, ages = far_directions(pull_one, start, (carries, problem.inputs), unmasked)
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in like)
    means = scan_angles(
        pull_all, outputs_bar, directions, ages >= 2 * max_lag, weights, max_lag, eps
    )
    filled = iter(directions)
    whole = jax.tree.map(lambda a: next(filled) if is_inexact(a) else jnp.zeros(a.shape), carries)
    return AdjointAlignment(means.cosine, means.sine, fall_rate(means, eps), whole)
