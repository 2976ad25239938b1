"""The remedies for vanishing and exploding gradients side by side, as one batched experiment."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbptt import cells, validation
from jbptt.experiments import tasks
from jbptt.experiments.examinations import examine
from jbptt.experiments.outcomes import Measures, Remedies
from jbptt.experiments.training import train
from jbptt.experiments.treatments import (
    DOSES,
    FAMILIES,
    NOTHING,
    PATIENTS,
    PENALTIES,
    REMEDIES,
    RNN_REMEDIES,
    Doses,
    Treatment,
    cell_of,
    check_doses,
    optimizer_of,
    prescribe,
    treated_estimator,
)
from jbptt.types import Batch, Params


class Sizes(NamedTuple):
    """What shapes the programs; static.

    `num_exponents` None: no penalties; `num_draws` 0: exact gradients.
    """

    num_steps: int
    hidden_size: int
    batch_size: int
    num_heldout: int
    num_updates: int
    num_draws: int
    num_exponents: int | None


class Run(NamedTuple):
    """A patient, a remedy and a seed.

    Attributes:
      radius: of the patient's recurrent matrix.
      treatment: the remedy in numbers.
      seed: which row of the data.
      key: the seed's.
    """

    radius: jax.Array
    treatment: Treatment
    seed: jax.Array
    key: jax.Array


class Data(NamedTuple):
    """What a seed's runs read: `batches` `[seed, num_updates, T, …]`, `heldout` `[seed, T, …]`."""

    batches: Batch
    heldout: Batch


def compare_remedies(
    key: jax.Array,
    *,
    remedies: Sequence[str] = REMEDIES,
    num_updates: int = 100,
    num_seeds: int = 4,
    num_steps: int = 20,
    hidden_size: int = 32,
    batch_size: int = 16,
    num_heldout: int = 256,
    num_draws: int = 8,
    num_exponents: int | None = None,
    radii: Any = (0.5, 1.5),
    doses: Doses = DOSES,
) -> Remedies:
    """Applies each remedy alone to each of `PATIENTS`; measures before and after a short training.

    The patients are tanh networks, `h ← tanh(x w_x + h w_h + b)`, whose `w_h` is the same random
    orthogonal matrix times a radius: every eigenvalue has that size, so that the radius alone
    decides whether gradients vanish or explode. They are to say after the last step what the
    first input was (`tasks.recall`); without any memory the best prediction is the mean, whose loss
    is `constant_loss`. Each sequence starts from a carry of zeros. Every run
    makes as many updates of plain gradient descent, on the same batches as the other runs of its
    seed and from the same random numbers.

    "orthogonal init" and "identity init" replace `w_h`, and so are the same for both patients; gru
    and lstm have a matrix of the patient's radius for every gate.

    Pure; jit- and vmap-able. All remedies of the tanh network are one compiled program with the
    remedies as data; gru and lstm are one each, and left out where not asked for. Runs go one after
    another.

    Args:
      key: everything random derives from it.
      remedies: names from `REMEDIES`, the first of them, "nothing", included; any order.
      num_updates: of each run.
      num_seeds: runs of each patient and remedy.
      num_steps: T.
      hidden_size: H.
      batch_size: examples per update, and examples that gradients and exponents are measured on.
      num_heldout: examples that the loss is measured on, at least `batch_size`.
      num_draws: draws of the gates that the error of randomized truncation is averaged over.
      num_exponents: how many leading exponents gradient flossing penalises; None: a quarter of H.
      radii: spectral radius of each patient, two numbers > 0; may be traced.
      doses: how much of each remedy.

    Raises:
      ValueError: an unknown remedy, none given or "nothing" missing; a size, radius or dose out of
        range.
    """
    remedies = _check_remedies(remedies)
    sizes = _check_sizes(
        num_steps, hidden_size, batch_size, num_heldout, num_updates, num_draws, num_exponents
    )
    if not set(PENALTIES) & set(remedies):
        sizes = sizes._replace(num_exponents=None)
    num_seeds = validation.check_positive_integer("num_seeds", num_seeds)
    radii = _check_radii(radii)
    check_doses(doses)
    runs, data = prepare(sizes, num_seeds, remedies, key, radii, doses)
    found = [run_family(family, sizes, runs[family], data) for family in FAMILIES if family in runs]
    before, after = (gather(num_seeds, each) for each in zip(*found, strict=True))
    return Remedies(
        before,
        after,
        constant_losses(data.heldout),
        radii,
        PATIENTS,
        remedies,
        sizes.num_updates,
        sizes.num_steps,
    )


def _check_remedies(remedies: Sequence[str]) -> tuple[str, ...]:
    """The chosen ones, in the order of `REMEDIES`."""
    chosen = {remedies} if isinstance(remedies, str) else set(remedies)
    if unknown := chosen - set(REMEDIES):
        raise ValueError(
            f"remedies must be of {', '.join(REMEDIES)}; got {', '.join(sorted(map(str, unknown)))}"
        )
    if NOTHING not in chosen:
        raise ValueError(
            f"remedies must include {NOTHING!r}, which the others are measured against, got "
            f"{tuple(remedies)!r}"
        )
    return tuple(name for name in REMEDIES if name in chosen)


def _check_sizes(
    num_steps, hidden_size, batch_size, num_heldout, num_updates, num_draws, num_exponents
) -> Sizes:
    """The arguments of `compare_remedies` that are sizes, each checked."""
    check = validation.check_positive_integer
    num_steps = check("num_steps", num_steps, smallest=2)
    hidden_size, batch_size = check("hidden_size", hidden_size), check("batch_size", batch_size)
    num_heldout = check("num_heldout", num_heldout, smallest=batch_size)
    num_updates, num_draws = check("num_updates", num_updates), check("num_draws", num_draws)
    num_exponents = (
        max(1, hidden_size // 4) if num_exponents is None else check("num_exponents", num_exponents)
    )
    if num_exponents > hidden_size:
        raise ValueError(
            f"num_exponents must be <= hidden_size = {hidden_size}, got {num_exponents}; the "
            "network has no more"
        )
    return Sizes(
        num_steps, hidden_size, batch_size, num_heldout, num_updates, num_draws, num_exponents
    )


def _check_radii(radii: Any) -> jax.Array:
    try:
        found = jnp.asarray(radii, float)
    except (TypeError, ValueError):
        found = None
    if found is None or found.shape != (len(PATIENTS),):
        raise ValueError(
            f"radii must be {len(PATIENTS)} numbers, one for each of {', '.join(PATIENTS)}, got "
            f"{radii!r}; pass (0.5, 1.5), say"
        )
    for name, radius in zip(PATIENTS, found, strict=True):
        validation.check_above(f"radii ({name})", radius, 0, "there would be no recurrence")
    return found


@partial(jax.jit, static_argnums=(0, 1, 2))
def prepare(
    sizes: Sizes,
    num_seeds: int,
    remedies: tuple[str, ...],
    key: jax.Array,
    radii: jax.Array,
    doses: Doses,
) -> tuple[dict[str, Run], Data]:
    """All runs, by the kind of their cell, and their data."""
    keys = jax.random.split(key, num_seeds)
    names = {"rnn": tuple(name for name in RNN_REMEDIES if name in remedies)}
    names |= {family: (NOTHING,) for family in FAMILIES if family in remedies}
    runs = {
        family: cross(radii, prescribe(doses, sizes.num_steps, of), keys)
        for family, of in names.items()
    }
    return runs, jax.lax.map(partial(draw, sizes), keys)


def draw(sizes: Sizes, key: jax.Array) -> Data:
    """The data of one seed, drawn at once: compiling a random draw takes longer than drawing."""
    num_trained = sizes.num_updates * sizes.batch_size
    key = jax.random.fold_in(key, 0)
    drawn = tasks.recall(key, num_steps=sizes.num_steps, batch_size=num_trained + sizes.num_heldout)

    def batches(a):  # [T, N · B, …] -> [N, T, B, …]
        a = a[:, :num_trained].reshape(
            sizes.num_steps, sizes.num_updates, sizes.batch_size, *a.shape[2:]
        )
        return jnp.moveaxis(a, 1, 0)

    def heldout(a):
        return a[:, num_trained:]

    weights = jnp.zeros((sizes.num_updates, sizes.num_steps)).at[:, -1].set(1)
    return Data(
        Batch(batches(drawn.xs), batches(drawn.targets), weights=weights),
        Batch(heldout(drawn.xs), heldout(drawn.targets), weights=drawn.weights),
    )


@jax.jit
def constant_losses(heldout: Batch) -> jax.Array:
    """`[seed]`: the loss of the best prediction that reads nothing, the mean of the targets."""
    targets = heldout.targets[:, -1]
    mean = jnp.mean(targets, 1, keepdims=True)
    return jnp.mean(tasks.squared_error(jnp.broadcast_to(mean, targets.shape), targets), 1)


def cross(radii: jax.Array, table: Treatment, keys: jax.Array) -> Run:
    """Every patient, treatment and seed, leaves `[patient · remedy · seed]`, the last fastest."""
    patient, remedy, seed = (
        i.ravel() for i in np.indices((len(radii), len(table.start), len(keys)))
    )
    return Run(
        radii[patient],
        jax.tree.map(lambda a: a[remedy], table),
        jnp.asarray(seed),
        jnp.asarray(keys)[seed],
    )


@partial(jax.jit, static_argnums=0)
def gather(num_seeds: int, families: tuple[Measures, ...]) -> Measures:
    """All families' measures, leaves `[patient, remedy, seed]` from `[patient · remedy · seed]`."""
    shape = len(PATIENTS), -1, num_seeds
    return jax.tree.map(
        lambda *leaves: jnp.concatenate([a.reshape(shape) for a in leaves], axis=1), *families
    )


def run_family(family: str, sizes: Sizes, runs: Run, data: Data) -> tuple[Measures, Measures]:
    """What the runs of one kind of cell look like before and after training, leaves `[runs]`."""
    if family != "rnn":
        # Nothing is done to it but the cell.
        sizes = sizes._replace(num_exponents=None, num_draws=0)
    start = begin(family, sizes, runs)
    trained = train_runs(family, sizes, runs, start, data.batches)
    return examine_runs(family, sizes, runs, start, data.heldout), examine_runs(
        family, sizes, runs, trained, data.heldout
    )


def cell_for(family: str, sizes: Sizes, run: Run) -> cells.Cell:
    """The cell of a run, with its readout."""
    return cell_of(family, sizes.hidden_size, run.treatment, run.radius)


@partial(jax.jit, static_argnums=(0, 1))
def begin(family: str, sizes: Sizes, runs: Run) -> Params:
    """The parameters that each run starts from."""
    return jax.lax.map(lambda run: cell_for(family, sizes, run).init(run.key), runs)


@partial(jax.jit, static_argnums=(0, 1))
def train_runs(family: str, sizes: Sizes, runs: Run, params: Params, batches: Batch) -> Params:
    """The parameters after training, run after run: one CPU core's caches hold only one of them."""

    def one(args):
        run, params = args
        cell = cell_for(family, sizes, run)
        estimator = treated_estimator(cell, run.treatment, sizes.num_exponents)
        carry = cell.initial_carry((sizes.batch_size,))
        key = jax.random.fold_in(run.key, 1)
        own = jax.tree.map(lambda a: a[run.seed], batches)
        return train(estimator, optimizer_of(run.treatment), params, carry, own, key=key)[0]

    return jax.lax.map(one, (runs, params))


@partial(jax.jit, static_argnums=(0, 1))
def examine_runs(family: str, sizes: Sizes, runs: Run, params: Params, heldout: Batch) -> Measures:
    """The `Measures` of each run with these parameters."""

    def one(args):
        run, params = args
        return examine(
            cell_for(family, sizes, run),
            run.treatment,
            params,
            jax.tree.map(lambda a: a[run.seed], heldout),
            batch_size=sizes.batch_size,
            num_draws=sizes.num_draws,
            key=jax.random.fold_in(run.key, 2),
        )

    return jax.lax.map(one, (runs, params))
