"""The nouns: what a step, a loss, a batch, an estimate and an estimator are."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.flatten_util import ravel_pytree

OLDEST_JAX = (0, 10, 0)
if jax.__version_info__ < OLDEST_JAX:  # here, since every other module imports this one
    wanted = ".".join(map(str, OLDEST_JAX))
    raise ImportError(f"jbptt needs jax ≥ {wanted}, found {jax.__version__}: pip install -U jax jaxlib")

PyTree = Any
Params = Any
Carry = Any
Step = Callable[[Params, Carry, PyTree], tuple[Carry, PyTree]]
Loss = Callable[[PyTree, PyTree], Any]


Kind = TypeVar("Kind", bound=type)


def exported(kind: Kind) -> Kind:
    """Lets a NamedTuple, or a dataclass of arrays alone, be an argument or result of what `jax.export` serializes."""
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


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf is floating (or complex): what a gradient can flow through."""
    return jnp.issubdtype(jax.dtypes.result_type(leaf), jnp.inexact)


def real_vector(tree: PyTree) -> tuple[jax.Array, Callable[[jax.Array], PyTree]]:
    """All numbers of a tree of inexact leaves as one real vector, and the way back.

    A complex leaf gives its real parts, then its imaginary parts. JAX's gradient in it has the sign of the latter
    turned, `∂f/∂x − i ∂f/∂y`, so that `df = Re Σ g·dz`.
    """
    leaves, structure = jax.tree.flatten(tree)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    flat, back = ravel_pytree([(a.real, a.imag) if jnp.iscomplexobj(a) else (a,) for a in leaves])

    def rebuild(vector):
        return structure.unflatten([lax.complex(*parts) if len(parts) == 2 else parts[0] for parts in back(vector)])

    return flat, rebuild


def is_key(leaf: Any) -> bool:
    """Whether a leaf (or its shape) holds random keys."""
    return jnp.issubdtype(jax.dtypes.result_type(leaf), jax.dtypes.prng_key)


def float32_at_least(*dtypes: Any) -> Any:
    """The common dtype of these and float32, under `jax.numpy_dtype_promotion("strict")` too."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(jnp.float32, *dtypes)


def inexact_leaves(tree: PyTree) -> list:
    """The leaves that gradients flow through; arrays or shapes."""
    return [leaf for leaf in jax.tree.leaves(tree) if is_inexact(leaf)]


def split_inexact(tree: PyTree) -> tuple[list[jax.Array], Callable[[list[jax.Array]], PyTree]]:
    """The leaves that gradients flow through, and the way back to the whole tree."""
    leaves, structure = jax.tree.flatten(tree)
    inexact = [is_inexact(leaf) for leaf in leaves]

    def rebuild(parts):
        parts = iter(parts)
        return structure.unflatten([next(parts) if i else leaf for i, leaf in zip(inexact, leaves, strict=True)])

    return [jnp.asarray(leaf) for i, leaf in zip(inexact, leaves, strict=True) if i], rebuild


def align_leading(array: jax.Array, ndim: int) -> jax.Array:
    """Appends axes of size 1, so that `array` broadcasts along leading axes, never trailing ones."""
    return jnp.reshape(array, jnp.shape(array) + (1,) * (ndim - jnp.ndim(array)))


def weighted_mean(total: jax.Array, weight: jax.Array) -> jax.Array:
    """`total / weight` along leading axes; 0 where the weight is 0."""
    weight = align_leading(weight, jnp.ndim(total))
    safe = jnp.where(weight == 0, 1, weight)
    return jnp.where(weight == 0, jnp.zeros_like(total), total / safe)


@exported
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Estimate:
    """The gradient of one batch, held as sums: `a + b` is the estimate of both batches together.

    Attributes:
      loss_sum: `Σ w_t ℓ_t`, a scalar, float32 at least.
      grad_sum: its (estimated) gradient, shaped like the parameters, float32 at least.
      weight_sum: `Σ w_t` over steps and examples, a scalar.
      info: diagnostics that the next update does not need. `info["aux"]` holds the weighted means of
        what the loss returned beside its value; the other entries describe one update.
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
                a * align_leading(self.weight_sum, jnp.ndim(a)) + b * align_leading(other.weight_sum, jnp.ndim(b)),
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
    """One way of estimating the gradient: two pure functions.

    Attributes:
      init: `(params, carry, batch, key=None) -> state`. Of `batch` (arrays or
        `jax.ShapeDtypeStruct`s) only shapes and dtypes are read. `carry` may be a function of the
        parameters: the gradient of the first update then counts the path through it. Every state has
        `.carry`, the live carry (before the first update the function, if it was one).
      update: `(params, state, batch) -> (Estimate, state)`; jit-, vmap- and scan-able. T may differ
        between calls (one compilation per T).
    """

    init: Callable[..., Any]
    update: Callable[[Params, Any, Batch], tuple[Estimate, Any]]


def at_least_float32(array: jax.Array) -> jax.Array:
    """Sums are held in float32 at least: a long sum of bfloat16 loses all but its first digits."""
    return jnp.asarray(array, float32_at_least(jnp.result_type(array)))
