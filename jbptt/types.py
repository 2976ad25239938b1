"""The nouns: what a step, a loss, a batch, an estimate and an estimator are."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import export

from jbptt.arrays import align_leading, weighted_mean

OLDEST_JAX = (0, 10, 0)
# Here, since whatever computes a gradient imports this module.
if jax.__version_info__ < OLDEST_JAX:
    wanted = ".".join(map(str, OLDEST_JAX))
    raise ImportError(
        f"jbptt needs jax ≥ {wanted}, found {jax.__version__}: pip install -U jax jaxlib"
    )

PyTree = Any
Params = Any
Carry = Any
Step = Callable[[Params, Carry, PyTree], tuple[Carry, PyTree]]
Loss = Callable[[PyTree, PyTree], Any]


Kind = TypeVar("Kind", bound=type)


def exported(kind: Kind) -> Kind:
    """Lets `jax.export` serialize a NamedTuple, or a dataclass of arrays alone."""
    name = f"jbptt.{kind.__name__}"
    if issubclass(kind, tuple):
        export.register_namedtuple_serialization(kind, serialized_name=name)
        return kind
    nothing = {"serialize_auxdata": lambda _: b"", "deserialize_auxdata": lambda _: ()}
    export.register_pytree_node_serialization(kind, serialized_name=name, **nothing)
    return kind


@exported
class Batch(NamedTuple):
    """What one gradient is computed on. Time is the leading axis, T, of every leaf.

    Attributes:
      xs: inputs, leaves `[T, ...]`.
      targets: what the loss compares with, leaves `[T, ...]`, or None.
      mask: bool, `[T]` or `[T, *batch]`; False marks padding. A masked step is still a step: it
        counts for windows, strides, lags and gates, holds the carry (identity Jacobian), has no
        source and no loss and gives `ys = 0`. Whatever stands there (NaN too) is replaced by
        zeros before use and has no effect on a value or a gradient.
      weights: real, `[T]` or `[T, *batch]`; how much each step's loss counts. A total
        `Σ mask·weights` of 0 gives loss 0 and zero gradients.
    """

    xs: PyTree
    targets: PyTree = None
    mask: jax.Array | None = None
    weights: jax.Array | None = None


@exported
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Estimate:
    """The gradient of one batch, held as sums: `a + b` is the estimate of both batches together.

    Attributes:
      loss_sum: `Σ w_t ℓ_t`, a scalar, float32 at least.
      grad_sum: its (estimated) gradient, shaped like the parameters, float32 at least.
      weight_sum: `Σ w_t` over steps and examples, a scalar.
      info: diagnostics that the next update does not need. `info["aux"]` holds the weighted means
        of what the loss returned beside its value. The other entries describe one update: of every
        estimator `info["carry_grads"]`, the gradient of the mean loss in the carry that entered.
    """

    loss_sum: jax.Array
    grad_sum: Params
    weight_sum: jax.Array
    info: dict[str, Any]

    @property
    def loss(self) -> jax.Array:
        """The weighted mean loss; right under `vmap` and `scan` too."""
        return weighted_mean(self.loss_sum, self.weight_sum)

    @property
    def grads(self) -> Params:
        """The gradient of the weighted mean loss; right under `vmap` and `scan` too."""
        return jax.tree.map(lambda g: weighted_mean(g, self.weight_sum), self.grad_sum)

    def __add__(self, other: "Estimate") -> "Estimate":
        """Sums add; the aux means combine by weight; entries of one update are dropped."""
        weight_sum = self.weight_sum + other.weight_sum

        def combine(a, b):
            return weighted_mean(
                a * align_leading(self.weight_sum, jnp.ndim(a))
                + b * align_leading(other.weight_sum, jnp.ndim(b)),
                weight_sum,
            )

        info = {}
        if "aux" in self.info and "aux" in other.info:
            info["aux"] = jax.tree.map(combine, self.info["aux"], other.info["aux"])
        return Estimate(
            loss_sum=self.loss_sum + other.loss_sum,
            grad_sum=jax.tree.map(jnp.add, self.grad_sum, other.grad_sum),
            weight_sum=weight_sum,
            info=info,
        )


class Estimator(NamedTuple):
    """One way of estimating the gradient: two pure functions, and what they estimate.

        E ĝ = Σ_t Σ_{i≤t} C[t, i] · G[t, i]

    with G[t, i] the part of loss t's gradient that enters at step i.

    >>> from jbptt import truncated_bptt
    >>> sliding = truncated_bptt(None, None, window=2, stride=1)  # neither step nor loss matters
    >>> print(sliding.coverage(3))
    [[1. 0. 0.]
     [1. 1. 0.]
     [0. 1. 1.]]

    Attributes:
      init: `(params, carry, batch, key=None) -> state`. Of `batch` (arrays or
        `jax.ShapeDtypeStruct`s) only shapes and dtypes are read. `carry` may be a function of the
        parameters: the gradient of the first update then counts the path through it. Every state
        has `.carry`, the live carry (before the first update the function, if it was one).
      update: `(params, state, batch) -> (Estimate, state)`; jit-, vmap- and scan-able. T may differ
        between calls (one compilation per T).
      coverage: `(num_steps, key=None) -> C`, `[T, T]` (`[T, T, *batch]` where examples have gates
        of their own): how much of loss t's gradient by source i one update of T = num_steps steps
        counts, 0 for i > t. Of the first update after `init`; later ones that stream also count
        pairs with steps of earlier updates. Where the estimator draws: of the draw that this update
        makes after `init(..., key=key)`, and without a key the mean over all draws. Memory O(T²).
        None: not declared.
    """

    init: Callable[..., Any]
    update: Callable[[Params, Any, Batch], tuple[Estimate, Any]]
    coverage: Callable[..., jax.Array] | None = None
