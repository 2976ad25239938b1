"""Estimators side by side: how far each is from the exact gradient."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jbptt import validation
from jbptt.analysis.costs import check_estimators
from jbptt.datasets import dataset, variables
from jbptt.engine import dependences
from jbptt.executables import run
from jbptt.norms import compared_with, in_units_of, inner, norm
from jbptt.types import Batch, Carry, Estimator, Params

PER_ESTIMATOR = ("relative_bias", "relative_bias_error", "variance", "cosine", "norm_ratio")
"""The fields of a `Comparison` that hold one number for each estimator."""

MOST_STEPS = 4096
"""Of a longer batch no coverage is computed: its matrix takes T² numbers."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Comparison:
    """How estimates ĝ of a gradient g are distributed, `[E]`, E estimators; `str()` is a table.

    Everything is relative to ‖g‖; where g is 0, biases and variances are 0 if the estimates are 0
    too, else inf.

    Attributes:
      relative_bias: `‖E ĝ − g‖ / ‖g‖`, E the mean over the samples. For an unbiased estimator it is
        about the standard error below, not 0; more where the variance comes from large weights so
        rare that the samples may have missed them.
      relative_bias_error: its standard error, `√(variance / num_samples)`; too small where the
        samples missed such weights. 0 for estimators that draw nothing.
      variance: `E‖ĝ − E ĝ‖² / ‖g‖²`, of one estimate; 0 for estimators that draw nothing.
      cosine: between ĝ and g, mean over the samples.
      norm_ratio: `‖ĝ‖ / ‖g‖`, mean over the samples.
      alignment: `[E, E]`, cosine between the mean estimates of every pair.
      names: the estimators, in order.
      num_samples: of estimators that draw; the others are run once.
      coverage: the mean of the declared `E C[t, i]` over all pairs i ≤ t: 1 for an unbiased
        estimator, whose `relative_bias` is then chance alone. NaN where no coverage is declared, or
        none without a key, and for more than 4096 steps, as the matrix takes T² numbers.
    """

    relative_bias: jax.Array
    relative_bias_error: jax.Array
    variance: jax.Array
    cosine: jax.Array
    norm_ratio: jax.Array
    alignment: jax.Array
    names: tuple[str, ...] = field(metadata={"static": True})
    num_samples: int = field(metadata={"static": True})
    coverage: jax.Array | None = None

    @property
    def relative_std(self) -> jax.Array:
        """`[E]`, the square root of the variance."""
        return jnp.sqrt(self.variance)

    def __str__(self) -> str:
        if isinstance(self.variance, Tracer) or np.ndim(self.variance) != 1:
            return repr(self)
        width = max(len(name) for name in (*self.names, "estimator"))
        lines = [f"{'estimator':<{width}}  relative bias ± s.e.   std / ‖g‖    cosine  norm ratio"]
        columns = (
            self.relative_bias,
            self.relative_bias_error,
            self.relative_std,
            self.cosine,
            self.norm_ratio,
        )
        for name, *row in zip(self.names, *map(np.asarray, columns), strict=True):
            bias, error, std, cosine, ratio = map(float, row)
            biased = f"{bias:9.3g} ± {error:<9.2g}"
            lines.append(f"{name:<{width}}  {biased} {std:10.3g} {cosine:9.4f} {ratio:11.4g}")
        if len(self.names) > 1:
            lines += ["", "cosine between the mean estimates", *self._pairs(width)]
        return "\n".join(lines)

    def _pairs(self, width: int):
        marks = [f"({i})" for i in range(1, len(self.names) + 1)]
        yield " " * (width + 5) + "".join(f"{mark:>8}" for mark in marks)
        for mark, name, row in zip(marks, self.names, np.asarray(self.alignment), strict=True):
            yield f"{mark:>4} {name:<{width}}" + "".join(f"{float(cosine):8.3f}" for cosine in row)

    def to_xarray(self) -> Any:
        """An `xarray.Dataset` over `estimator` (and `other`, for the pairs); needs xarray."""
        fields = PER_ESTIMATOR if self.coverage is None else (*PER_ESTIMATOR, "coverage")
        found = [variables(name, getattr(self, name), "estimator") for name in fields]
        found.append(variables("alignment", self.alignment, "estimator", "other"))
        coords = {"estimator": list(self.names), "other": list(self.names)}
        return dataset(*found, coords=coords, attrs={"num_samples": self.num_samples})


def compare(
    estimators: dict[str, Estimator],
    params: Params,
    carry: Carry,
    batch: Batch,
    *,
    reference: Estimator | str | Params,
    key: jax.Array,
    num_samples: int = 100,
) -> Comparison:
    """Bias, variance and direction of gradient estimators against the exact gradient, on one batch.

    Each estimator makes one update from a fresh state; one that draws makes `num_samples`, sample i
    with the key `fold_in(key, i)` for all estimators. From a fresh state `adaptive_bptt` takes its
    longest window: pass one whose init returns a state that has seen some updates.

    Pure: works under jit and vmap. Time: `num_samples` updates of each estimator that draws.
    Memory: one update and two gradients for each estimator.

    Args:
      estimators: by name.
      params: the parameters.
      carry: the initial carry, or a function of the parameters that gives it.
      batch: arrays.
      reference: g: an estimator that draws nothing (`full_bptt(step, loss)`), the name of one in
        `estimators`, or a gradient shaped like the parameters.
      key: a PRNG key.
      num_samples: draws of each estimator that draws, ≥ 2.

    Raises:
      ValueError: num_samples < 2, no estimators, a reference that is none of these or draws; what
        the estimators raise.
    """
    num_samples = validation.check_positive_integer("num_samples", num_samples, smallest=2)
    check_estimators(estimators)
    reference = _check_reference(estimators, params, reference)
    used = [*estimators.values(), *([reference] if isinstance(reference, Estimator) else [])]
    for estimator in used:  # as they are given: a program sees neither float64 nor what is no array
        jax.eval_shape(lambda key, e=estimator: e.init(params, carry, batch, key=key), key)
    gradient = None if isinstance(reference, Estimator) else reference
    functions = tuple(
        function for e in used for function in (e.init, e.update, e.coverage or _undeclared)
    )
    if callable(carry):
        # A program may keep arrays alive, but no function.
        functions, carry = (*functions, carry), None
    return run(
        _compare, functions, (tuple(estimators), num_samples), params, carry, batch, gradient, key
    )


def _compare(*given) -> Comparison:
    """`compare` behind the checks.

    Takes init, update and coverage of each estimator, and of the reference where it is one; then
    the carry where that is a function; then the names and all that `compare` was given.
    """
    *functions, names, num_samples, params, carry, batch, gradient, key = given
    num_functions = len(Estimator._fields)
    carry = functions.pop() if len(functions) % num_functions else carry
    parts = (functions[n::num_functions] for n in range(num_functions))
    estimators = [Estimator(*functions) for functions in zip(*parts, strict=True)]
    exact = (
        _exact_gradient(estimators.pop(), params, carry, batch, key)
        if gradient is None
        else gradient
    )
    in_units, compare_fn = in_units_of(exact), compared_with(exact)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num_samples))
    means, rows = [], []
    for estimator in estimators:
        sample = _sampler(estimator, params, carry, batch)
        own_keys = keys if _reads_its_key(sample, key) else keys[:1]
        mean, *row = _moments(sample, own_keys, exact, in_units, compare_fn)
        means.append(mean)
        rows.append(row)
    bias, error, variance, cosine, ratio = (jnp.stack(column) for column in zip(*rows, strict=True))
    alignment = jnp.stack([jnp.stack([compared_with(a)(b)[1] for b in means]) for a in means])
    num_steps = validation.count_steps(batch._asdict())
    covered = jnp.stack([_covered(estimator, num_steps) for estimator in estimators])
    return Comparison(bias, error, variance, cosine, ratio, alignment, names, num_samples, covered)


def _undeclared(num_steps: int, key: jax.Array | None = None) -> jax.Array:
    """The coverage of an estimator without one; a function, as programs are found by functions."""
    del key
    return jnp.full((num_steps, num_steps), jnp.nan)


def _covered(estimator: Estimator, num_steps: int) -> jax.Array:
    """The mean weight of a pair, and of all draws; NaN where it is not known."""
    if estimator.coverage is None or num_steps > MOST_STEPS:
        return jnp.array(jnp.nan)
    try:
        weights = jnp.asarray(estimator.coverage(num_steps), float)
    except ValueError:  # it draws, and knows no mean over its draws
        return jnp.array(jnp.nan)
    return jnp.mean(jnp.sum(weights, (0, 1))) / (num_steps * (num_steps + 1) / 2)


def _sampler(estimator: Estimator, params: Params, carry: Carry, batch: Batch) -> Callable:
    """`key -> gradient` of a first update."""

    def sample(key):
        return estimator.update(params, estimator.init(params, carry, batch, key=key), batch)[
            0
        ].grads

    return sample


def _reads_its_key(sample: Callable, key: jax.Array) -> bool:
    """Whether the gradient may depend on the key."""
    return any(dependences(sample, key))


def _exact_gradient(reference, params, carry, batch, key):
    sample = _sampler(reference, params, carry, batch)
    if _reads_its_key(sample, key):
        raise ValueError(
            "reference must draw nothing, got an estimator whose gradient depends on its key; pass "
            "full_bptt(step, loss), or a mean gradient of your own"
        )
    return sample(key)


def _check_reference(estimators, params, reference):
    """The estimator or the gradient that is meant."""
    if isinstance(reference, str):
        if reference not in estimators:
            raise ValueError(
                f"reference must name one of the estimators, {', '.join(estimators)}, got "
                f"{reference!r}"
            )
        reference = estimators[reference]
    if isinstance(reference, Estimator):
        return reference
    wanted, got = (jax.tree.map(jnp.shape, tree) for tree in (params, reference))
    if wanted != got:
        raise ValueError(
            "reference must be an estimator, the name of one, or a gradient shaped like params, "
            f"{wanted}; got {got}"
        )
    return reference


def _moments(sample, keys, exact, in_units, compare_fn):
    """Mean estimate over ‖g‖, bias, its error, variance, cosine, norm ratio (Welford, 1962)."""

    def body(state, inputs):
        mean, squares, cosine, ratio = state
        number, key = inputs
        grads = sample(key)
        scaled = in_units(grads)
        before = jax.tree.map(jnp.subtract, scaled, mean)
        mean = jax.tree.map(lambda m, d: m + d / number, mean, before)
        after = jax.tree.map(jnp.subtract, scaled, mean)
        squares += inner(before, after)
        return (mean, squares, cosine + compare_fn(grads)[1], ratio + norm(scaled)), None

    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype),
        jax.eval_shape(lambda k: in_units(sample(k)), keys[0]),
    )
    zero = jnp.zeros((), norm(zeros).dtype)
    count = len(keys)
    numbers = jnp.arange(1, count + 1).astype(zero.dtype)
    (mean, squares, cosine, ratio), _ = jax.lax.scan(
        body, (zeros, zero, zero, zero), (numbers, keys)
    )
    variance = squares / (count - 1) if count > 1 else zero
    bias = norm(jax.tree.map(jnp.subtract, mean, in_units(exact)))
    # Without a gradient to compare with, 0 stays 0 and everything else is infinitely far off.
    absent = norm(exact) == 0
    bias, variance, ratio = (
        jnp.where(absent & (v != 0), jnp.inf, v) for v in (bias, variance, ratio / count)
    )
    return mean, bias, jnp.sqrt(variance / count), variance, cosine / count, ratio
