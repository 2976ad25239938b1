"""What a diagnosis found, as data."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from jbptt.analysis.costs import Cost
from jbptt.analysis.lags import LagProfile, TruncationCurve
from jbptt.analysis.nonfinite import NonFinite
from jbptt.diagnosis.advice import Advice, advise
from jbptt.diagnosis.as_dataset import diagnosis_dataset
from jbptt.diagnosis.decay import Decay
from jbptt.diagnosis.decision import decide
from jbptt.diagnosis.page import write_page
from jbptt.diagnosis.trials import Trial

VERDICTS = ("vanishing", "stable", "exploding", "non-finite")


class Flow(NamedTuple):
    """How much of each loss's adjoint arrives at a carry so many steps back.

    `arrives[k]` is the mean of `‖∂ℓ_t/∂carries[t−k]‖` over the mean of `‖∂ℓ_t/∂carries[t]‖` of the
    same losses, weighted as they count. So losses of different size, or at different steps, do not
    pass for growth or decay. Pairs whose step is masked do not count; nor do leaves of the carry on
    which no parameter has an influence, where there are others.

    Attributes:
      num_lags: lags measured; the entries beyond are NaN.
      arrives: `[K]`; `arrives[0]` is 1 without gates.
      leaf_arrives: `[K, leaves]`, the same of each inexact leaf of the carry alone; NaN for one
        that does not count.
      alive: `[K]`, the share of the losses whose adjoint is not exactly zero at that lag.
      by_example: `[K, *batch]`, `arrives` of each example; NaN where it has no pair.
    """

    num_lags: jax.Array
    arrives: jax.Array
    leaf_arrives: jax.Array
    alive: jax.Array
    by_example: jax.Array


class Windows(NamedTuple):
    """Windows that keep a gradient error of 10 % and of 1 %, `[2]` each.

    The errors that they rest on are those that 95 % of the batches stay below that are drawn from
    the parts of this one (`resampling`): groups of examples, and stretches of time where there are
    fewer than 16 examples.

    Attributes:
      sliding: from this window on, of those measured, the error is kept; 0: none, or no telling.
      block: the shortest window tried that keeps it, T where none does; 0: no telling.
      block_error: the error of those blocks on this batch.
      blocks_upper_error: of all `candidate_windows` of blocks: 95 % of the batches are below; NaN
        where one was not tried.
      upper_error: `[W]`, of the sliding windows in `curve.windows`: 95 % of the batches are below.
      told: whether this batch can tell: False where one part carries nearly all of the gradient,
        and where its parts cancel to rounding.
      one_part: whether it is the former.
      sources: `[3]`, the windows from which on sliding ones give 50, 90 and 99 % of the gradient on
        this batch; 0: none of those measured.
    """

    sliding: jax.Array
    block: jax.Array
    block_error: jax.Array
    blocks_upper_error: jax.Array
    upper_error: jax.Array
    told: jax.Array
    one_part: jax.Array
    sources: jax.Array


class Dynamics(NamedTuple):
    """The leading Lyapunov exponent (`Exponent`) and the loss's curvature; scalars.

    Attributes:
      exponent, spread, error, num_wiped: as in `Exponent`, in nats per step.
      own_path: share of the step's Jacobian on its diagonal, as `dynamics.own_path` says: near 1
        where units keep themselves (gates, leaks).
      curvature: of the loss along its gradient, `gᵀHg / gᵀg`; None without a learning rate.
      learning_rate: as given, or None.
    """

    exponent: jax.Array
    spread: jax.Array
    error: jax.Array
    num_wiped: jax.Array
    own_path: jax.Array
    curvature: jax.Array | None
    learning_rate: jax.Array | None


class Units(NamedTuple):
    """Shares of the carry's entries.

    Attributes:
      saturated: at ±1 at nearly every step and example.
      dead: exactly zero at every one, and so they stay when the step is nudged.
    """

    saturated: jax.Array
    dead: jax.Array


def _part(part: str, name: str) -> Any:
    """A property that reads one number of a part."""
    return property(lambda found: getattr(getattr(found, part), name), doc=f"`{part}.{name}`.")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found; `print` it. Arrays but for `cost`: it passes through jit and vmap.

    In parts; what is read most has short names too (`half_life` is `decay.half_life`).

    Attributes:
      decay: what is read off `flow`: verdict, half-life, reach (`Decay`).
      flow: how much of the losses' adjoints arrives at each lag.
      windows: the windows recommended, and what they rest on.
      dynamics: exponent and curvature.
      units: shares of stuck units.
      loss: weighted mean loss of the batch.
      constant_loss: what it would be if each prediction were the mean of all of them; NaN where a
        prediction has no mean.
      gradient_norm: of its exact gradient, without what a learned start of the carry adds.
      part_norms: `[≤ 16]`, the norm of the mean exact gradient of each group of examples, of each
        stretch of time where they cannot be divided; NaN without weight.
      nonfinite: the first number that is not finite, as `find_nonfinite` says.
      profile: the gradient by lag, `[K]`; NaN beyond the lags measured. `grad_norms` for lags below
        16. Its mean over pairs weighs them by |w|, which changes nothing where w ≥ 0.
      curve: the error by window on this batch: every window up to 16, then four to an octave;
        NaN beyond the lags measured, where less than 10⁻⁴ of the gradient is left. Blocks (averaged
        over their phase) up to 16.
      num_used_steps: the largest number of unmasked steps of an example up to its last loss that
        counts.
      num_steps: T.
      carry_names: of the inexact leaves of the carry.
      recurrent_weights: names of the square parameter matrices that mix the carry's units.
      unread: names of the parameters that no step looks at; a learned start of the carry is one.
      trials: remedies tried on the model itself, where they may help; without `measure`, none.
      cost: time and memory of full BPTT and of each recommended window; None if not measured.
    """

    decay: Decay
    flow: Flow
    windows: Windows
    dynamics: Dynamics
    units: Units
    loss: jax.Array
    constant_loss: jax.Array
    gradient_norm: jax.Array
    part_norms: jax.Array
    nonfinite: NonFinite
    profile: LagProfile
    curve: TruncationCurve
    num_used_steps: jax.Array
    num_steps: int = field(metadata={"static": True})
    carry_names: tuple[str, ...] = field(metadata={"static": True})
    recurrent_weights: tuple[str, ...] = field(metadata={"static": True})
    unread: tuple[str, ...] = field(default=(), metadata={"static": True})
    trials: tuple[Trial, ...] = field(default=(), metadata={"static": True})
    cost: Cost | None = field(default=None, metadata={"static": True})

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`; only outside of jit and vmap."""
        return VERDICTS[int(self.decay.verdict_index)]

    # What scripts read most, by short names.
    verdict_index = _part("decay", "verdict_index")
    rate = _part("decay", "rate")
    residual = _part("decay", "residual")
    half_life = _part("decay", "half_life")
    half_life_interval = _part("decay", "half_life_interval")
    reach = _part("decay", "reach")
    zero_lag = _part("decay", "zero_lag")
    underflow = _part("decay", "underflow")
    num_lags = _part("flow", "num_lags")
    sliding_window = _part("windows", "sliding")
    block_window = _part("windows", "block")
    block_error = _part("windows", "block_error")
    exponent = _part("dynamics", "exponent")
    exponent_spread = _part("dynamics", "spread")
    curvature = _part("dynamics", "curvature")
    learning_rate = _part("dynamics", "learning_rate")
    saturated = _part("units", "saturated")
    dead = _part("units", "dead")

    @property
    def norm_quantiles(self) -> np.ndarray:
        """`[3]`: median, 90 % quantile and largest of the parts' norms; only outside of jit and
        vmap.
        """
        norms = np.asarray(self.part_norms)
        empty = np.isnan(norms).all(-1, keepdims=True)
        with np.errstate(invalid="ignore"):  # between two infinities
            quantiles = np.nanquantile(np.where(empty, 0, norms), (0.5, 0.9, 1.0), axis=-1)
        return np.where(empty, np.nan, np.moveaxis(quantiles, 0, -1))

    @property
    def decision(self) -> str:
        """With which window to train, in words; only outside of jit and vmap."""
        return decide(self)

    @property
    def advice(self) -> tuple[Advice, ...]:
        """What to change, each with the number that says so; only outside of jit and vmap."""
        return advise(self)

    def to_xarray(self) -> Any:
        """An `xarray.Dataset` over `lag`, `leaf`, `window`, `error` and `part`; needs xarray.

        Costs, if measured, over `estimator` and `repeat`. Under vmap what is found of each comes
        with axes in front.
        """
        return diagnosis_dataset(self)

    def explain(self) -> str:
        """The page, with what each line means and how it was found; not under jit and vmap."""
        return write_page(self, explain=True)

    def __str__(self) -> str:
        return write_page(self) if np.ndim(self.loss) == 0 else repr(self)
