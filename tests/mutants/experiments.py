"""The experiments."""

from . import Mutant
from .rooms import OUTCOMES, TASKS, TRAINING, TREATMENTS

EXPERIMENTS = (
    # experiments
    Mutant("training_resets_the_state", TRAINING, "train", "estimate, state", "estimate, _"),
    Mutant(
        "training_follows_the_sum",
        TRAINING,
        "train",
        "grads, opt_state",
        "grad_sum, opt_state",
    ),
    Mutant("training_resets_the_optimizer", TRAINING, "train", "updates, opt_state", "updates, _"),
    Mutant("evaluation_resets_the_carry", TRAINING, "mean_loss", "carry, ys", "_, ys"),
    Mutant(
        "evaluation_averages_batches",
        TRAINING,
        "mean_loss",
        "weighted_mean(values.sum(), weights.sum())",
        "weighted_mean(values, weights).mean()",
    ),
    Mutant(
        "text_rows_do_not_go_on",
        TASKS,
        "_streams",
        "a.reshape(batch_size, num_batches, num_steps).transpose(1, 2, 0)",
        "a.reshape(num_batches, batch_size, num_steps).transpose(0, 2, 1)",
    ),
    Mutant(
        "cross_entropy_in_bits",
        TASKS,
        "cross_entropy",
        "(logits, target)",
        "(logits, target) / jnp.log(2.0)",
    ),
    Mutant(
        "squared_error_without_half",
        TASKS,
        "squared_error",
        "optax.losses.l2_loss(y, target)",
        "jnp.square(y - target)",
    ),
    # remedies
    Mutant(
        "penalty_forgets_the_weight",
        TREATMENTS,
        "treated_estimator",
        "treatment.strength * estimate.weight_sum",
        "treatment.strength",
    ),
    Mutant("spectral_penalty_takes_v_for_vh", TREATMENTS, "spectral_penalty", "vh[0]", "vh[:, 0]"),
    Mutant(
        "leaky_relu_bends_upwards",
        TREATMENTS,
        "cell_of",
        "jax.nn.relu(a) -",
        "jax.nn.relu(a) +",
    ),
    Mutant(
        "remedies_carry_over_batches",
        TREATMENTS,
        "treated_estimator",
        "state._replace(carry=cell.initial_carry(batch.xs.shape[1:-1]))",
        "state",
    ),
    Mutant("spread_of_the_population", OUTCOMES, "excess", "ddof=1", ""),
    Mutant("verdict_by_the_lower_bar", OUTCOMES, "verdict", "bar = max", "bar = min"),
    Mutant(
        "mean_leaves_out_infinities",
        OUTCOMES,
        "_mean",
        "~np.isnan(values)",
        "np.isfinite(values)",
    ),
    Mutant(
        "exponent_higher_for_further_from_0",
        OUTCOMES,
        "_of_balance",
        "excess(np.abs(case.after.exponent), np.abs(case.nothing.exponent))",
        "excess(case.after.exponent, case.nothing.exponent)",
    ),
)
