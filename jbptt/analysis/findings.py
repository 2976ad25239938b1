"""What a diagnosis found, as data."""

from dataclasses import dataclass, field

import jax
import numpy as np

from jbptt.analysis.advice import Advice, advise
from jbptt.analysis.costs import Cost
from jbptt.analysis.lags import LagProfile, TruncationCurve
from jbptt.analysis.nonfinite import NonFinite
from jbptt.analysis.page import write_page

VERDICTS = ("vanishing", "stable", "exploding", "non-finite")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found; `print` it. Arrays but for `cost`, so that it passes through jit and
    vmap.

    Attributes:
      verdict_index: into `VERDICTS`; `.verdict` is the word.
      rate: fitted change of the log gradient norm per step back (nats per step), over the lags
        before 1 %.
      first_lag: where that fit begins: 1 where lag 1 is under 1 % of lag 0 already, else 0.
      rate_error: its standard error, from the fit's residuals; inf for a fit to two lags.
      residual: root mean square of the fit's residuals, in ln norm.
      half_life: `ln 2 / −rate` in steps; inf where the gradient does not shrink.
      half_life_interval: `[2]`, the half-lives of rate ∓ 2 standard errors.
      reach: number of lags up to the last whose norm is at least 1 % of lag 0's.
      num_lags: lags measured at which there are pairs of a loss and a carry.
      zero_lag: the first lag at which the gradient is exactly zero; −1: at none of those measured.
      underflow: whether it is zero there because it became smaller than its dtype can hold.
      sliding_window: `[2]`, the smallest window with at most 10 % and 1 % relative error; 0: none
        of those measured, or something is not finite.
      block_window: `[2]`, for blocks cut at multiples of the window: it keeps the error, its half
        does not, and of the windows tried below T of which that is true its error is the smallest;
        T where there is none; 0 where something is not finite.
      block_error: `[2]`, their relative errors; NaN where the window is 0.
      bias_bound: `[max_window]`, Aicher, Foti & Fox's bound on the error of sliding windows 1, 2, …
      bound_window: `[2]`, the windows it asks for, which may exceed T; 0: none, the later lags do
        not decay, or they are too few.
      loss: weighted mean loss of the batch.
      gradient_norm: of its exact gradient.
      part_norms: `[≤ 16]`, the norm of the exact gradient of each part of the batch; NaN without
        weight.
      exponent: leading Lyapunov exponent (nats per step), mean over examples; −∞ where the carry is
        wiped out.
      exponent_spread: its standard deviation over examples.
      saturated: share of the carry's entries that are at ±1 at nearly every step and example.
      dead: share of those that are exactly zero at every one, and stay so when the step is nudged.
      nonfinite: the first number that is not finite, as `find_nonfinite` says.
      profile: the gradient by lag; its mean over pairs weighs them by |w|, which changes nothing
        where w ≥ 0.
      curve: the error by window.
      num_used_steps: the largest number of unmasked steps of an example up to its last loss that
        counts.
      num_steps: T.
      num_carry_leaves: inexact leaves of the carry.
      unread: names of the parameters that no step looks at; a learned start of the carry is one.
      learning_rate: as given, or None.
      curvature: of the loss along its gradient, `gᵀHg / gᵀg`; None without a learning rate.
      cost: time and memory of full BPTT and of each recommended window; None if not measured.
    """

    verdict_index: jax.Array
    rate: jax.Array
    first_lag: jax.Array
    rate_error: jax.Array
    residual: jax.Array
    half_life: jax.Array
    half_life_interval: jax.Array
    reach: jax.Array
    num_lags: jax.Array
    zero_lag: jax.Array
    underflow: jax.Array
    sliding_window: jax.Array
    block_window: jax.Array
    block_error: jax.Array
    bias_bound: jax.Array
    bound_window: jax.Array
    loss: jax.Array
    gradient_norm: jax.Array
    part_norms: jax.Array
    exponent: jax.Array
    exponent_spread: jax.Array
    saturated: jax.Array
    dead: jax.Array
    nonfinite: NonFinite
    profile: LagProfile
    curve: TruncationCurve
    num_used_steps: jax.Array
    num_steps: int = field(metadata={"static": True})
    num_carry_leaves: int = field(metadata={"static": True})
    unread: tuple[str, ...] = field(default=(), metadata={"static": True})
    learning_rate: jax.Array | None = None
    curvature: jax.Array | None = None
    cost: Cost | None = field(default=None, metadata={"static": True})

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`; only outside of jit and vmap."""
        return VERDICTS[int(self.verdict_index)]

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
    def advice(self) -> tuple[Advice, ...]:
        """What to change, each with the number that says so; only outside of jit and vmap."""
        return advise(self)

    def __str__(self) -> str:
        return write_page(self) if np.ndim(self.verdict_index) == 0 else repr(self)
