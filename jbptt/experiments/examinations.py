"""What is measured of a run before and after training: loss, adjoints, exponent, gradient error."""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jbptt import cells, truncation
from jbptt.analysis.flow import adjoints
from jbptt.analysis.lyapunov import lyapunov_spectrum
from jbptt.clipping import clip_by_global_norm
from jbptt.experiments import tasks
from jbptt.experiments.outcomes import Measures
from jbptt.experiments.training import mean_loss
from jbptt.experiments.treatments import Treatment, treated_estimator
from jbptt.norms import compared_with, norm
from jbptt.types import Batch, Params


def examine(
    cell: cells.Cell,
    treatment: Treatment,
    params: Params,
    heldout: Batch,
    *,
    batch_size: int,
    num_draws: int,
    key: jax.Array,
) -> Measures:
    """The `Measures` of one run, scalars, with these parameters.

    Args:
      cell: with its readout.
      treatment: what is done to the gradient.
      params: the parameters.
      heldout: a batch; the loss is measured on all of it.
      batch_size: examples, the first ones, for gradients and exponents.
      num_draws: draws of the gates; 0 where the treatment is none: the gradient is exact.
      key: of the draws.
    """
    first = heldout._replace(xs=heldout.xs[:, :batch_size], targets=heldout.targets[:, :batch_size])
    loss = mean_loss(
        cell.step,
        tasks.squared_error,
        params,
        cell.initial_carry((heldout.xs.shape[1],)),
        jax.tree.map(lambda a: a[None], heldout),
    )
    error, cosine = jnp.zeros(()), jnp.ones(())
    if num_draws:
        error, cosine = gradient_error(
            cell, treatment, params, first, jax.random.split(key, num_draws)
        )
    return Measures(
        loss,
        adjoint_ratio(cell, treatment, params, first),
        exponent(cell, params, first),
        error,
        cosine,
    )


def adjoint_ratio(
    cell: cells.Cell, treatment: Treatment, params: Params, batch: Batch
) -> jax.Array:
    """`log10(‖∂L/∂carries[0]‖ / ‖∂L/∂carries[T−1]‖)`, mean norms over examples, mean gates."""
    num_steps, batch_size, _ = batch.xs.shape
    gates = truncation.fixed(num_steps, treatment.window)
    carry = cell.initial_carry((batch_size,))
    cotangents = adjoints(
        cell.step, tasks.squared_error, params, carry, batch, gates=gates
    ).cotangents
    logs = jnp.log10(jnp.mean(norm(cotangents, 2), axis=1))
    return logs[0] - logs[-2]  # the last carry is followed by no loss


def exponent(cell: cells.Cell, params: Params, batch: Batch) -> jax.Array:
    """The leading Lyapunov exponent, mean over examples; the first fifth settles its tangent."""

    def of_one(xs):
        found = lyapunov_spectrum(
            cell.step, params, cell.initial_carry(), xs, num_exponents=1, num_discarded=len(xs) // 5
        )
        return found.exponents[0]

    return jnp.mean(jax.vmap(of_one, in_axes=1)(batch.xs))


def gradient_error(
    cell: cells.Cell, treatment: Treatment, params: Params, batch: Batch, keys: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of the gated, clipped gradient: relative error (rms over draws) and mean cosine."""
    num_steps, batch_size, _ = batch.xs.shape

    def gradient(gates):
        estimator = treated_estimator(cell, treatment, None, gates_fn=lambda key, num_steps: gates)
        state = estimator.init(params, cell.initial_carry((batch_size,)), batch)
        return ravel_pytree(estimator.update(params, state, batch)[0].grads)[0]

    drawn = jax.vmap(lambda key: treatment.gates(key, num_steps))(keys)
    rows = jax.vmap(gradient)(jnp.concatenate([jnp.ones_like(drawn[:1]), drawn]))
    clip, compare = clip_by_global_norm(treatment.max_norm), compared_with(rows[0])
    error, cosine = jax.vmap(lambda row: compare(clip.update(row, clip.init(row))[0]))(rows[1:])
    return jnp.sqrt(jnp.mean(error**2)), jnp.mean(cosine)
