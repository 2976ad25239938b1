"""What an experiment with remedies found, and the words for it, each computed from the numbers."""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbptt.datasets import dataset, variables

MEANINGFUL_LOSS = 0.01
"""A difference in loss below 1 % of the loss is none, however small the spread."""

MEANINGFUL_EXPONENT = 0.01
"""In nats per step: the adjoints change by less than 1 % per step."""

MEANINGFUL_DECADES = 0.5
"""In powers of ten, for the adjoints over the whole sequence."""

MEANINGFUL_ERROR = 1e-4
"""Of the gradient: what float32 leaves of an exact one is less."""

WIDTH = 110


class Measures(NamedTuple):
    """What one run looks like at one time; in `Remedies` `[patient, remedy, seed]` each.

    Attributes:
      loss: mean over the held-out batch.
      adjoint_ratio: `log10(‖∂L/∂carries[0]‖ / ‖∂L/∂carries[T−1]‖)`, norms averaged over examples:
        the far end against lag 0, through the gates that training uses (of randomized ones their
        mean, 1). −inf where nothing arrives, NaN where nothing starts.
      exponent: leading Lyapunov exponent in nats per step, mean over examples.
      gradient_error: `‖ĝ − g‖ / ‖g‖` of the loss's gradient as an update uses it (gated, clipped)
        against the exact one; root mean square over draws of the gates. What a penalty adds is
        exact and not counted.
      gradient_cosine: between the two, mean over draws; 1 where the direction is kept.
    """

    loss: Any
    adjoint_ratio: Any
    exponent: Any
    gradient_error: Any
    gradient_cosine: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Remedies:
    """What each remedy does to each patient; `str()` is a table, and where remedies fail or harm.

    Attributes:
      before: `Measures` before training, leaves `[patient, remedy, seed]`.
      after: `Measures` after it. The seeds are paired: a seed means the same data, and the same
        random numbers behind the start, for every patient and remedy.
      constant_loss: `[seed]`, held-out loss of predicting the mean: what takes no memory.
      radii: `[patient]`, spectral radius of the recurrent matrix before anything is done.
      patients: their names.
      remedies: their names; the first is no remedy at all.
      num_updates: how long each run trained.
      num_steps: T.
    """

    before: Measures
    after: Measures
    constant_loss: jax.Array
    radii: jax.Array
    patients: tuple[str, ...] = field(metadata={"static": True})
    remedies: tuple[str, ...] = field(metadata={"static": True})
    num_updates: int = field(metadata={"static": True})
    num_steps: int = field(metadata={"static": True})

    @property
    def diverged(self) -> jax.Array:
        """`[patient, remedy]`, the share of runs whose held-out loss ended as NaN or inf."""
        return 1 - jnp.isfinite(self.after.loss).mean(axis=-1)

    def to_xarray(self) -> Any:
        """An `xarray.Dataset` over `time`, `patient`, `remedy` and `seed`; needs xarray."""
        dims = "time", "patient", "remedy", "seed"
        found = [
            variables(name, np.stack([getattr(m, name) for m in (self.before, self.after)]), *dims)
            for name in Measures._fields
        ]
        coords = {
            "time": ["before", "after"],
            "patient": list(self.patients),
            "radius": ("patient", np.asarray(self.radii)),
            "remedy": list(self.remedies),
            "constant_loss": ("seed", np.asarray(self.constant_loss)),
        }
        attrs = {"num_updates": self.num_updates, "num_steps": self.num_steps}
        return dataset(*found, coords=coords, attrs=attrs)

    def __str__(self) -> str:
        return "\n\n".join(_block(self, p) for p in range(len(self.patients)))


class Case(NamedTuple):
    """A remedy on a patient beside none: leaves `[seed]`; NaN after training that diverged."""

    before: Measures
    after: Measures
    nothing: Measures
    is_nothing: bool = False

    @property
    def num_runs(self) -> int:
        """How many seeds there are."""
        return len(self.after.loss)

    @property
    def num_diverged(self) -> int:
        """How many of the runs ended with a loss that is not finite."""
        return int(np.sum(np.isnan(self.after.loss)))


def case_of(remedies: Remedies, patient: int, remedy: int) -> Case:
    """The numbers of one row of the table."""

    def pick(measures, remedy):
        return Measures(*(np.asarray(a, float)[patient, remedy] for a in measures))

    def ended(measures):
        return Measures(*(np.where(np.isfinite(measures.loss), a, np.nan) for a in measures))

    after, nothing = (ended(pick(remedies.after, r)) for r in (remedy, 0))
    return Case(pick(remedies.before, remedy), after, nothing, is_nothing=remedy == 0)


def excess(values: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of `values − reference` over seeds where both are finite.

    NaN where there is none; a single seed has no spread, 0.
    """
    both = np.isfinite(values) & np.isfinite(reference)
    difference = values[both] - reference[both]
    if difference.size == 0:
        return np.nan, np.nan
    return float(difference.mean()), float(difference.std(ddof=1)) if difference.size > 1 else 0.0


def _mean(values: np.ndarray) -> float:
    """Over the seeds that are numbers; −inf if one of them is."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else np.nan


def _plus_minus(mean: float, spread: float) -> str:
    return f"{mean:.2g} ± {spread if spread > 1e-3 * abs(mean) else 0:.1g} over the seeds"


def verdict(case: Case) -> str:
    """The loss after training against that with no remedy: better, worse, same, or diverged.

    Fewer diverged runs than with no remedy are better, more are worse, whatever the others lost.
    Else a difference counts if its mean over the seeds exceeds their spread, and 1 % of the loss
    with no remedy.
    """
    number, of_nothing = case.num_diverged, int(np.sum(np.isnan(case.nothing.loss)))
    if number != of_nothing:
        return f"{'better' if number < of_nothing else 'worse'}, {number}/{case.num_runs} div."
    if number:
        return f"diverged {number}/{case.num_runs}"
    mean, spread = excess(case.after.loss, case.nothing.loss)
    bar = max(spread, MEANINGFUL_LOSS * _mean(case.nothing.loss))
    return (
        "worse" if mean > bar else "better" if mean < -bar else "same" if abs(mean) <= bar else "-"
    )


def remarks(case: Case) -> list[str]:
    """Where a remedy fails or makes things worse; empty if it does neither."""
    if (
        not case.is_nothing
        and case.num_diverged < case.num_runs
        and np.array_equal(case.after, case.nothing, equal_nan=True)
    ):
        return ["has no effect: the same result as with no remedy", *_of_gradient(case)]
    return [*_of_training(case), *_of_balance(case), *_of_gradient(case)]


def _of_training(case: Case):
    if case.num_diverged:
        yield f"diverged in {case.num_diverged} of {case.num_runs} runs"
    mean, spread = excess(case.after.loss, case.nothing.loss)
    if verdict(case) == "worse":
        yield f"loss worse than with nothing by {_plus_minus(mean, spread)}"
    mean, spread = excess(case.after.loss, case.before.loss)
    if mean > max(spread, MEANINGFUL_LOSS * _mean(case.before.loss)):
        yield f"training raised the loss by {_plus_minus(mean, spread)}"


def _of_balance(case: Case):
    mean, spread = excess(np.abs(case.after.exponent), np.abs(case.nothing.exponent))
    if mean > max(spread, MEANINGFUL_EXPONENT):
        yield f"exponent further from 0 than with nothing by {mean:.2f}"
    num_cut = int(np.sum(case.after.adjoint_ratio == -np.inf))
    if num_cut:
        yield f"no gradient reaches step 0 in {num_cut} of {case.num_runs} runs"
    mean, spread = excess(np.abs(case.after.adjoint_ratio), np.abs(case.nothing.adjoint_ratio))
    if mean > max(spread, MEANINGFUL_DECADES):
        yield f"adjoints 10^{mean:.1f} times further from even than with nothing"


def _of_gradient(case: Case):
    sizes, rescaled = [], True
    for when, measures in {"before": case.before, "after": case.after}.items():
        error, cosine = _mean(measures.gradient_error), _mean(measures.gradient_cosine)
        if error > MEANINGFUL_ERROR:
            sizes.append(f"{_format_error(error)} {when}")
            # The angle, in radians.
            rescaled = rescaled and np.sqrt(2 * max(0.0, 1 - cosine)) < error / 10
    if sizes:
        what = "rescaled, its direction kept" if rescaled else "off"
        yield f"gradient {what}: error {' and '.join(sizes)} training"


def _block(remedies: Remedies, patient: int) -> str:
    cases = {name: case_of(remedies, patient, r) for r, name in enumerate(remedies.remedies)}
    num_runs = np.shape(remedies.after.loss)[-1]
    radius = float(remedies.radii[patient])
    title = (
        f"{remedies.patients[patient]} (spectral radius {radius:g}), T = {remedies.num_steps}, "
        f"seeds: {num_runs}, before -> after {remedies.num_updates} updates"
    )
    head = _columns(
        "", "adjoints, log10", "exponent", "gradient error", "held-out loss", "against nothing"
    )
    constant = f"{np.mean(np.asarray(remedies.constant_loss)):.3g}"
    mean = _columns("predicting the mean", "", "", "", constant, "")
    lines = [title, head, *(_row(name, case) for name, case in cases.items()), mean]
    said = {name: remarks(case) for name, case in cases.items()}
    if any(said.values()):
        lines.append("where a remedy fails or makes things worse:")
    for name, words in said.items():
        if words:
            text = f"{name}: {'; '.join(words)}"
            lines += textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def _columns(*texts: str) -> str:
    widths = -22, 16, 16, 17, 21, 18
    return "".join(
        f"{t:<{-w}}" if w < 0 else f"{t:>{w}}" for t, w in zip(texts, widths, strict=True)
    ).rstrip()


def _row(name: str, case: Case) -> str:
    def pair(field: str, form: Callable[[float], str]) -> str:
        means = (_mean(getattr(measures, field)) for measures in (case.before, case.after))
        return " -> ".join("-" if np.isnan(mean) else form(mean) for mean in means)

    return _columns(
        name,
        pair("adjoint_ratio", "{:.1f}".format),
        pair("exponent", "{:.2f}".format),
        pair("gradient_error", _format_error),
        pair("loss", "{:.3g}".format),
        "" if case.is_nothing and not case.num_diverged else verdict(case),
    )


def _format_error(error: float) -> str:
    """What is rounding is 0."""
    if error < MEANINGFUL_ERROR:
        return "0"
    return f"{error:.3g}" if error >= 10 else f"{error:.2f}" if error >= 0.01 else f"{error:.4f}"
