"""Gradients that run forward: what is read off a program, what is kept, and how it moves on."""

from . import Mutant
from .rooms import CHECKS, EMITTED, ENTRIES, FORWARD, INFLUENCE, LAYOUT, RANK_ONE, SPARSE, STRUCTURE

ONLINE = (
    Mutant("results_of_a_product_read_one_row", ENTRIES, "_product", "sets.folded(numbers, sums)", "numbers"),
    Mutant("a_loop_is_read_once", ENTRIES, "_through_scan", "carry = grown", "break"),
    Mutant("one_branch_is_read", ENTRIES, "_through", "params['branches']", "params['branches'][:1]"),
    Mutant("what_is_unknown_reads_nothing", ENTRIES, "_all_of_all", "bits |= sets.bits[number]", "bits = 0"),
    Mutant("a_choice_reads_its_first_case", ENTRIES, "_select", "*full[1:]", "full[1]"),
    Mutant("a_row_reads_one_row", ENTRIES, "_from_anywhere", "sets.folded(numbers, cut)", "numbers[:1]"),
    Mutant("outputs_read_past_the_carry", EMITTED, "outputs_of", "variable in made", "False"),
    Mutant("cut_where_no_step_reads", EMITTED, "outputs_of", "cut_at[place]", "True"),
    Mutant("a_root_of_zero_is_taken", RANK_ONE, "_balance", "jnp.where(both, squares[1], 1)", "squares[1]"),
    Mutant("one_step_too_many", STRUCTURE, "InfluenceStructure.after", "range(order - 1)", "range(order)"),
    Mutant("padding_is_structure", STRUCTURE, "_measured", "_replace(mask=None)", "_replace()"),
    Mutant("padding_is_no_structure", STRUCTURE, "_measured", "received | np.eye(size, dtype=bool)", "received"),
    Mutant(
        "colours_mix_what_is_asked",
        LAYOUT,
        "_colours",
        "not others_read & own_asked and (not others_asked & own_reads)",
        "not others_asked & own_asked",
    ),
    Mutant("the_program_may_be_any", CHECKS, "problem_to_start", "prod(problem.batch_shape) > 1", "False"),
    Mutant("the_entering_carry_takes_no_room", CHECKS, "check_memory", "of_one + structure", "of_one + 0 * structure"),
    Mutant("jacobians_are_transposed", INFLUENCE, "onward", "jacobian[0].T", "jacobian[0]"),
    Mutant("jacobians_are_transposed_in_groups", INFLUENCE, "onward", "'obis,bts->obit'", "'obis,bst->obit'"),
    Mutant("what_enters_enters_everywhere", INFLUENCE, "entering", "not enters.all()", "False"),
    Mutant(
        "dense_in_front_of_what_it_misses", INFLUENCE, "jacobian", "np.arange(layout.size)", "np.arange(rows.shape[1])"
    ),
    Mutant("colours_are_not_told_apart", INFLUENCE, "jacobian", "entries if reads.all()", "entries if True"),
    Mutant("padding_leaks", SPARSE, "_leaking", "leaks if mask is None else jnp.where(mask, leaks, 1)", "leaks"),
    Mutant(
        "influence_is_forgotten",
        SPARSE,
        "_influenced.update",
        "(state.influence, own)",
        "([0 * a for a in state.influence], own)",
    ),
    Mutant(
        "influence_is_of_the_step_before",
        FORWARD,
        "_on_one_device.one",
        "said.append(say(carried,",
        "said.append(say(state[1],",
    ),
    Mutant(
        "the_carry_received_says_nothing",
        FORWARD,
        "_on_one_device.one",
        "if reads_received else []",
        "if False else []",
    ),
    Mutant("complex_gradients_are_not_turned", FORWARD, "add_real", "a + jnp.conj(b)", "a + b"),
    Mutant("complex_cotangents_are_not_turned", FORWARD, "_on_one_device.vectors", "jnp.conj(bar)", "bar"),
    Mutant(
        "one_noise_for_all_steps",
        RANK_ONE,
        "_draw",
        "jax.random.fold_in(jax.random.fold_in(key, purpose), number)",
        "jax.random.fold_in(key, purpose)",
    ),
    Mutant(
        "noise_of_steps_begins_anew",
        RANK_ONE,
        "uoro.update",
        "state.number + problem.num_steps",
        "0 * state.number + problem.num_steps",
    ),
    Mutant(
        "one_noise_for_all_examples",
        RANK_ONE,
        "uoro.update",
        "jax.random.split(state.key, problem.batch_shape)",
        "jax.vmap(lambda _: state.key)(jnp.zeros(problem.batch_shape))",
    ),
    Mutant("the_cross_term_is_dropped", RANK_ONE, "_carry_on", "old * moved + new * noise", "new * noise"),
    Mutant("factors_do_not_cancel", RANK_ONE, "_carry_on", "_over(now, old)", "now"),
)
