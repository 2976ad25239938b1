"""The experiments."""

from tests.mutants import Mutant

TRAINING = "jbptt/experiments/training.py"
TASKS = "jbptt/experiments/tasks.py"
TREATMENTS = "jbptt/experiments/treatments.py"
OUTCOMES = "jbptt/experiments/outcomes.py"

EXPERIMENTS = (
    # experiments
    Mutant(
        "training_resets_the_state",
        TRAINING,
        "estimate, state = estimator.update(params, state, batch)",
        "estimate, _ = estimator.update(params, state, batch)",
    ),
    Mutant(
        "training_follows_the_sum", TRAINING, "optimizer.update(estimate.grads,", "optimizer.update(estimate.grad_sum,"
    ),
    Mutant(
        "training_resets_the_optimizer",
        TRAINING,
        "updates, opt_state = optimizer.update",
        "updates, _ = optimizer.update",
    ),
    Mutant("evaluation_resets_the_carry", TRAINING, "carry, ys = scan_steps", "_, ys = scan_steps"),
    Mutant(
        "evaluation_averages_batches",
        TRAINING,
        "return weighted_mean(values.sum(), weights.sum())",
        "return weighted_mean(values, weights).mean()",
    ),
    Mutant(
        "text_rows_do_not_go_on",
        TASKS,
        "a.reshape(batch_size, num_batches, num_steps).transpose(1, 2, 0)",
        "a.reshape(num_batches, batch_size, num_steps).transpose(0, 2, 1)",
    ),
    Mutant(
        "cross_entropy_in_bits",
        TASKS,
        "integer_labels(logits, target)",
        "integer_labels(logits, target) / jnp.log(2.0)",
    ),
    Mutant("squared_error_without_half", TASKS, "optax.losses.l2_loss(y, target)", "jnp.square(y - target)"),
    # remedies
    Mutant(
        "penalty_forgets_the_weight",
        TREATMENTS,
        "weight = treatment.strength * estimate.weight_sum",
        "weight = treatment.strength",
    ),
    Mutant("spectral_penalty_takes_v_for_vh", TREATMENTS, "@ vh[0])", "@ vh[:, 0])"),
    Mutant(
        "leaky_relu_bends_upwards",
        TREATMENTS,
        "jax.nn.relu(a) - jnp.where(slope == 0",
        "jax.nn.relu(a) + jnp.where(slope == 0",
    ),
    Mutant(
        "remedies_carry_over_batches",
        TREATMENTS,
        "fresh = state._replace(carry=cell.initial_carry(batch.xs.shape[1:-1]))",
        "fresh = state",
    ),
    Mutant("spread_of_the_population", OUTCOMES, "difference.std(ddof=1)", "difference.std()"),
    Mutant("verdict_by_the_lower_bar", OUTCOMES, "bar = max(spread,", "bar = min(spread,"),
    Mutant(
        "mean_leaves_out_infinities",
        OUTCOMES,
        "values = values[~np.isnan(values)]",
        "values = values[np.isfinite(values)]",
    ),
    Mutant(
        "exponent_higher_for_further_from_0",
        OUTCOMES,
        "excess(np.abs(case.after.exponent), np.abs(case.nothing.exponent))",
        "excess(case.after.exponent, case.nothing.exponent)",
    ),
)
