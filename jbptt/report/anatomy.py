"""What the backward pass of the study's models looks like inside, with exercises of Dive into Deep
Learning.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbptt import clipping
from jbptt.analysis.flow import gradient_flow
from jbptt.analysis.jacobian_spans import jacobian_products
from jbptt.analysis.lags import lag_profile
from jbptt.analysis.linalg import powers
from jbptt.analysis.lyapunov import lyapunov_spectrum
from jbptt.arrays import weighted_mean
from jbptt.experiments import tasks
from jbptt.experiments.outcomes import Remedies
from jbptt.experiments.remedies import compare_remedies
from jbptt.norms import norm
from jbptt.problem import problem_of
from jbptt.report.measurements import Effort, Model, Progress, Trained, one_at_a_time
from jbptt.segments import back_through
from jbptt.types import Batch

RADII = (0.5, 0.9, 1.0, 1.1, 1.5)
MAX_NORM = 1.0
SPANS = (1, 4, 16)


def digits(array: Any, number: int = 5) -> Any:
    """Rounded to so many significant digits: a heat map is no table of logarithms."""
    with np.errstate(divide="ignore", invalid="ignore"):
        array = np.asarray(array, float)
        scale = 10.0 ** (number - 1 - np.floor(np.log10(np.abs(array))))
        return np.where(np.isfinite(scale), np.round(array * scale) / scale, array)


def flow(trained: Trained, progress: Progress, device: Any) -> dict[str, Any]:
    """F[t, s] of the trained model on one held-out batch."""
    progress(f"{trained.model.name}: every loss against every step")
    look = jax.jit(partial(gradient_flow, trained.model.cell.step, tasks.cross_entropy))
    matrix = look(*jax.device_put((trained.params, trained.carry, trained.batch), device))
    found = {"cell": trained.model.name, "matrix": digits(jax.device_get(matrix))}
    progress(f"{trained.model.name}: every loss seen", 1)
    return found


def spectra(
    trained: Trained, heldout: Batch, effort: Effort, progress: Progress, device: Any
) -> list[dict[str, Any]]:
    """Singular values of products of Jacobians and Lyapunov exponents, before and after
    training.
    """
    model = trained.model
    progress(f"{model.name}: spectra")
    xs = np.asarray(heldout.xs)[:, :, 0].reshape(-1)  # the first stream, batch after batch
    xs = np.resize(xs, effort.spectrum_steps)
    size = sum(leaf.size for leaf in jax.tree.leaves(model.cell.initial_carry()))

    def look(params, carry, xs):
        found = lyapunov_spectrum(
            model.cell.step,
            params,
            carry,
            xs,
            num_exponents=min(effort.num_exponents, size),
            num_discarded=effort.spectrum_steps // 4,
            qr_every=4,
        )
        return found, jacobian_products(
            model.cell.step, params, carry, xs[: max(SPANS)], spans=SPANS
        )

    def inputs(params, carry):
        return jax.device_put((params, jax.tree.map(lambda leaf: leaf[0], carry), xs), device)

    compiled = jax.jit(look).lower(*inputs(trained.params, trained.carry)).compile()

    def one(stage, params, carry):
        with one_at_a_time:
            found, products = jax.device_get(compiled(*inputs(params, carry)))
        return {
            "cell": model.name,
            "stage": stage,
            "num_steps": effort.spectrum_steps - effort.spectrum_steps // 4,
            "exponents": found.exponents,
            "standard_errors": found.standard_errors,
            "spans": SPANS,
            "log_singular_values": digits(products.log_singular_values),
        }

    found = [
        one("before", model.seeds[0], model.carry),
        one("after", trained.params, trained.carry),
    ]
    progress(f"{model.name}: spectra measured", 2)
    return found


def growth(model: Model, batch: Batch, progress: Progress) -> dict[str, Any]:
    """Tanh networks whose recurrent matrices differ in spectral radius: norms by lag, and of
    gradients, clipped too.
    """
    progress("vanishing and exploding")
    step, loss, num_steps = model.cell.step, tasks.cross_entropy, batch.xs.shape[0]
    lengths = [2**k for k in range(1, num_steps.bit_length()) if 2**k <= num_steps]
    clip = clipping.clip_by_global_norm(MAX_NORM)
    matrix = jax.random.normal(jax.random.key(0), jnp.shape(model.seeds[0]["w_h"]))
    matrix = matrix / np.max(np.abs(np.linalg.eigvals(np.asarray(matrix))))

    def of_radius(radius):
        # Little input leaves the network near its linear regime, where the radius is what decides.
        params = {**model.seeds[0], "w_h": radius * matrix, "w_x": 0.01 * model.seeds[0]["w_x"]}
        profile = lag_profile(step, loss, params, model.carry, batch, max_lag=num_steps)

        def of_length(length):
            last = jnp.arange(num_steps) == length - 1
            weighted = batch._replace(weights=last.astype(jnp.float32))
            sums = back_through(problem_of(step, loss, params, model.carry, weighted)).sums
            grads = jax.tree.map(lambda g: weighted_mean(g, sums.weight), sums.grad)
            return norm(grads), norm(clip.update(grads, clip.init(grads))[0])

        return profile.cotangent_norms, *jax.lax.map(of_length, jnp.array(lengths))

    norms, raw, clipped = jax.device_get(jax.jit(partial(jax.lax.map, of_radius))(jnp.array(RADII)))
    progress("vanished and exploded", 1)
    return {
        "radii": RADII,
        "lags": list(range(num_steps)),
        "norms": digits(norms),
        "lengths": lengths,
        "gradient_norms": raw,
        "clipped_norms": clipped,
        "max_norm": MAX_NORM,
    }


def exercises(seed: int, progress: Progress) -> dict[str, Any]:
    """The two exercises: eigenvalues of a power, and vectors that turn to one direction, or do
    not.
    """
    progress("powers of a matrix")
    rng = np.random.default_rng(seed)
    size, power, num_steps = 8, 3, 40
    general = rng.normal(size=(size, size)) / np.sqrt(size)
    symmetric = (general + general.T) / 2
    x = rng.normal(size=size)
    # The same vectors with eigenvalues that the exercise needs not to tie: real, of different
    # sizes.
    basis = rng.normal(size=(size, size))
    spread = (
        basis @ np.diag(0.95 ** np.arange(size) * (-1.0) ** np.arange(size)) @ np.linalg.inv(basis)
    )
    angle = np.array([[0.6, -0.8], [0.8, 0.6]])
    examples = {
        "symmetric": (symmetric, x),
        "general": (spread, x),
        "equal sizes, λ₁ = −λ₂": (np.diag([1.0, -1.0, 0.5]), x[:3]),
        "a complex pair": (0.98 * angle, x[:2]),
        "x ⊥ v₁": (np.diag([1.0, 0.8, 0.5]), np.array([0.0, 1.0, 1.0])),
        "defective": (np.array([[0.9, 1.0], [0.0, 0.9]]), np.array([0.3, 1.0])),
    }
    alignments = []
    for name, (matrix, start) in examples.items():
        with jax.enable_x64(True):
            found = jax.device_get(powers.alignment(matrix, start, num_steps))
        alignments.append(
            {
                "name": name,
                "case": found.case,
                "misalignment": digits(found.misalignment),
                "rate": float(found.rate),
                "predicted_rate": float(found.predicted_rate),
                "sentence": str(found),
            }
        )
    progress("powers taken", 1)
    with jax.enable_x64(True):
        values, raised = (np.asarray(powers.eigenvalues(general, k)) for k in (1, power))
    of_power = np.linalg.eigvals(np.linalg.matrix_power(general, power))
    difference = max(np.min(np.abs(of_power - value)) for value in raised) / np.max(np.abs(raised))
    return {
        "size": size,
        "power": power,
        "eigenvalues": _complex(values),
        "eigenvalues_of_power": _complex(of_power),
        "largest_difference": float(difference),
        "alignments": alignments,
    }


def _complex(values: np.ndarray) -> list[list[float]]:
    """Pairs of real and imaginary part."""
    return [[float(value.real), float(value.imag)] for value in np.asarray(values, complex)]


def remedies(seed: int, progress: Progress) -> dict[str, Any]:
    """What each of the usual remedies does to a vanishing and to an exploding network."""
    progress("remedies")
    with one_at_a_time:
        found: Remedies = jax.device_get(compare_remedies(jax.random.key(seed)))
    progress("remedies compared", 8)
    return {
        "patients": found.patients,
        "remedies": found.remedies,
        "radii": found.radii,
        "num_updates": found.num_updates,
        "num_steps": found.num_steps,
        "before": found.before._asdict(),
        "after": found.after._asdict(),
        "diverged": found.diverged,
    }
