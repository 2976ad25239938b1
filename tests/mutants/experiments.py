"""The experiments."""

from . import Mutant
from .rooms import CHUNKS, OUTCOMES, TASKS, TRAINING, TREATMENTS

EXPERIMENTS = (
    # experiments
    Mutant("training_resets_the_state", TRAINING, "_update", "estimate, state", "estimate, _"),
    Mutant("training_follows_the_sum", TRAINING, "_update", "grads, opt_state", "grad_sum, opt_state"),
    Mutant("training_resets_the_optimizer", TRAINING, "_update", "updates, opt_state", "updates, _"),
    Mutant(
        "skipped_updates_move_the_carry",
        TRAINING,
        "_update",
        "_without_start(running), running.opt_state",
        "state, running.opt_state",
    ),
    Mutant(
        "skipped_updates_move_the_optimizer",
        TRAINING,
        "_update",
        "_without_start(running), running.opt_state",
        "_without_start(running), opt_state",
    ),
    Mutant("stopped_runs_go_on", TRAINING, "_update", "~applied if", "~finite if"),
    Mutant("only_losses_are_asked", TRAINING, "_update", "(estimate.loss, estimate.grads)", "estimate.loss"),
    Mutant(
        "only_largest_entries_are_asked",
        TRAINING,
        "_all_finite",
        "jnp.isfinite(leaf).all()",
        "jnp.isfinite(jnp.max(jnp.abs(leaf)))",
    ),
    Mutant("evaluations_counted_from_zero", TRAINING, "train", "1 + counts", "counts"),
    Mutant("training_counts_from_zero", TRAINING, "train", "jnp.asarray(num_done, int) +", ""),
    Mutant("updates_left_over_are_not_made", TRAINING, "_scan_in_groups", "if num_left", "if False"),
    Mutant(
        "evaluations_see_the_first_carry",
        TRAINING,
        "_scan_in_groups.group",
        "running, seen = _scan(update, running, batches)",
        "before = running\nrunning, seen = _scan(update, running, batches)\n"
        "running, before = running, running._replace(state=before.state)\n"
        "return running, (seen, eval_fn(before.params, before.state.carry))",
    ),
    Mutant(
        "chunks_keep_the_first_states",
        CHUNKS,
        "_loop",
        "chunk.checkpoint | {'key': None}",
        "running | {'params': params}",
    ),
    Mutant("chunks_count_from_zero", CHUNKS, "_loop", "num_done +=", "num_done ="),
    Mutant("last_chunk_is_dropped", CHUNKS, "_cut", "range(0, number, every)", "range(0, number + 1 - every, every)"),
    Mutant("checkpoints_forget_a_stop", CHUNKS, "Chunk.checkpoint", "self.history.stopped", "np.asarray(False)"),
    Mutant(
        "streams_are_read_ahead", CHUNKS, "_collected", "iter(next_piece, None)", "iter(list(iter(next_piece, None)))"
    ),
    Mutant(
        "weak_types_of_the_first_chunk",
        CHUNKS,
        "_typed",
        "jnp.asarray(leaf, jnp.result_type(leaf))",
        "jnp.asarray(leaf)",
    ),
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
