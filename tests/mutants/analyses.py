"""The analyses."""

from tests.mutants import Mutant

ARRAYS = "jbptt/arrays.py"
DEPENDENCE = "jbptt/engine/dependence.py"
ADVICE = "jbptt/analysis/advice.py"
ALIGNMENT = "jbptt/analysis/alignment.py"
BLOCKS = "jbptt/analysis/blocks.py"
COMPARISON = "jbptt/analysis/comparison.py"
WINDOW_LENGTHS = "jbptt/analysis/window_lengths.py"
BIAS_BOUND = "jbptt/bias_bound.py"
DIAGNOSIS = "jbptt/analysis/diagnosis.py"
DOMINANT = "jbptt/analysis/linalg/dominant_eigenvector.py"
EVIDENCE = "jbptt/analysis/evidence.py"
FLOW = "jbptt/analysis/flow.py"
GATE_JACOBIANS = "jbptt/analysis/gate_jacobians.py"
SCALED_SVD = "jbptt/analysis/linalg/scaled_svd.py"
JACOBIANS = "jbptt/analysis/jacobians.py"
LAGS = "jbptt/analysis/lags.py"
LYAPUNOV = "jbptt/analysis/lyapunov.py"
NONFINITE = "jbptt/analysis/nonfinite.py"
CULPRITS = "jbptt/analysis/culprits.py"
POWERS = "jbptt/analysis/linalg/powers.py"
JACOBIAN_SPANS = "jbptt/analysis/jacobian_spans.py"
STUCK = "jbptt/analysis/stuck.py"

ANALYSES = (
    # analysis
    Mutant("adjoints_of_the_sum", FLOW, "weighted_mean(bar, sums.weight).astype(bar.dtype)", "bar"),
    Mutant(
        "adjoints_without_gates",
        FLOW,
        "steps = entering, inputs, gates, outputs_bar",
        "steps = entering, inputs, None, outputs_bar",
    ),
    Mutant(
        "adjoints_ignore_the_mask", FLOW, "steps = entering, inputs, gates", "steps = entering, (batch.xs, None), gates"
    ),
    Mutant("flow_is_weighted", FLOW, "(batch._replace(weights=None), gates)", "(batch, gates)"),
    Mutant("flow_is_no_root_mean_square", FLOW, "/ jnp.sqrt(jnp.maximum(counted, 1))", "/ jnp.maximum(counted, 1)"),
    Mutant("flow_counts_the_source_examples", FLOW, "jnp.maximum(counted, 1)", "jnp.maximum(counted.T, 1)"),
    Mutant(
        "flow_reads_the_carry_emitted",
        FLOW,
        "reverse=True)\n        rows",
        "reverse=True)\n        row = jax.tree.map(lambda a: jnp.roll(a, -1, 0), row)\n        rows",
    ),
    Mutant(
        "flow_without_gates",
        FLOW,
        "(batch.xs, batch.mask), gates, outputs_bar",
        "(batch.xs, batch.mask), None, outputs_bar",
    ),
    Mutant("flow_loss_one_place_off", FLOW, "a.at[place].set(c)", "a.at[place - 1].set(c)"),
    Mutant(
        "flow_stage_mixes_up_its_losses", FLOW, "zip(new, cotangents, strict=True)", "zip(cotangents, new, strict=True)"
    ),
    Mutant(
        "sources_read_the_carry_received", FLOW, "c[1:] for c in carry_cotangents", "c[:-1] for c in carry_cotangents"
    ),
    Mutant("sources_forget_the_weight", FLOW, "c * exact.weight.astype(c.dtype)", "c"),
    Mutant(
        "sources_of_the_ungated_gradient",
        FLOW,
        "gradient_sums(step, loss, params, carry, batch, gates)",
        "gradient_sums(step, loss, params, carry, batch)",
    ),
    Mutant("lag_gate_one_step_off", LAGS, "times_gate(c, gates)", "times_gate(c, jnp.roll(gates, -1, axis=0))"),
    Mutant("lag_gate_open_at_the_start", LAGS, "times_gate(c, gates)", "times_gate(c, gates.at[0].set(1))"),
    Mutant(
        "lags_wrap_around_the_end",
        LAGS,
        "jnp.concatenate([c[1:], jnp.zeros_like(c[:1])])",
        "jnp.roll(c, -1, axis=0)",
    ),
    Mutant(
        "lags_go_forward",
        LAGS,
        "jnp.concatenate([c[1:], jnp.zeros_like(c[:1])])",
        "jnp.concatenate([jnp.zeros_like(c[:1]), c[:-1]])",
    ),
    Mutant(
        "losses_enter_at_every_lag",
        LAGS,
        "return (one_on, *jax.tree.map(jnp.zeros_like, (outputs_bar, readout_grad)), state), row",
        "return (one_on, outputs_bar, readout_grad, state), row",
    ),
    Mutant(
        "profile_one_lag_off",
        LAGS,
        "read(state, lag, cotangents, grad)\n        one_on",
        "read(state, lag, one_on, grad)\n        one_on",
    ),
    Mutant(
        "curve_without_readout_gradient",
        LAGS,
        "problem.pull(one_on, outputs_bar, readout_grad)",
        "problem.pull(one_on, outputs_bar, None)",
    ),
    Mutant(
        "profile_weighs_by_the_source",
        LAGS,
        "jnp.where(valid, jnp.roll(weights, -lag, axis=0), 0)",
        "jnp.where(valid, weights, 0)",
    ),
    Mutant(
        "profile_counts_pairs_past_the_end",
        LAGS,
        "jnp.where(valid, jnp.roll(weights, -lag, axis=0), 0)",
        "jnp.roll(weights, -lag, axis=0)",
    ),
    Mutant("profile_of_the_gradient_sum", LAGS, "partial(weighted_mean, weight=total)", "lambda total: total"),
    Mutant(
        "curve_blocks_without_one_over_n", LAGS, "jnp.stack([s, b / (lag + 1).astype(b.dtype)])", "jnp.stack([s, b])"
    ),
    Mutant("diagnosis_forgets_the_gates", DIAGNOSIS, "jnp.where(cuts == 0, 0, gates)", "cuts"),
    Mutant("diagnosis_keeps_what_half_keeps", BLOCKS, "(error <= levels) & (half > levels)", "(error <= levels)"),
    Mutant(
        "diagnosis_takes_a_window_twice_too_small",
        BLOCKS,
        "return jnp.array(windows)[first], error",
        "return jnp.array(windows)[first] // 2, error",
    ),
    Mutant("diagnosis_half_life_in_e_folds", EVIDENCE, "math.log(2) / jnp.where(rates", "1.0 / jnp.where(rates"),
    Mutant("diagnosis_verdict_per_step", EVIDENCE, "rate * span, -jnp.inf", "rate, -jnp.inf"),
    Mutant(
        "diagnosis_norm_of_the_sum", BLOCKS, "weighted_mean(norm(sums.grad), jnp.abs(sums.weight))", "norm(sums.grad)"
    ),
    # jacobians
    Mutant("jacobian_transposed", JACOBIANS, "dtype=flat.dtype))[0]", "dtype=flat.dtype))[0].T"),
    Mutant(
        "jacobian_in_reverse_mode_transposed",
        JACOBIANS,
        "jax.jacrev(lambda flat: run(flat)[0])(flat)",
        "jax.jacrev(lambda flat: run(flat)[0])(flat).T",
    ),
    Mutant(
        "jacobian_of_a_masked_step",
        JACOBIANS,
        "step_jacobian(held(core), params, c, x))",
        "step_jacobian(core, params, c, x[0]))",
    ),
    Mutant(
        "jacobian_hides_a_state_that_is_not_finite",
        JACOBIANS,
        "jnp.where(jnp.isfinite(new).all(), pushed, jnp.nan)",
        "pushed",
    ),
    Mutant(
        "product_hides_a_jacobian_that_is_not_finite",
        SCALED_SVD,
        "Graded(jnp.where(finite, rows, jnp.nan), exponents)",
        "Graded(rows, exponents)",
    ),
    Mutant("jacobian_swaps_real_and_imaginary", ARRAYS, "(a.real, a.imag) if", "(a.imag, a.real) if"),
    # graded matrices and products
    Mutant(
        "singular_values_in_bits",
        SCALED_SVD,
        "matrix.exponents.astype(lengths.dtype) * math.log(2) + jnp.log(lengths)",
        "matrix.exponents.astype(lengths.dtype) + jnp.log2(lengths)",
    ),
    Mutant("qr_of_small_rows_first", SCALED_SVD, "jnp.argsort(-heights)", "jnp.argsort(heights)"),
    Mutant(
        "graded_exponents_on_the_wrong_axis",
        SCALED_SVD,
        "exponent + matrix.exponents)",
        "exponent + matrix.exponents[:, None])",
    ),
    Mutant(
        "push_forgets_the_first_basis",
        SCALED_SVD,
        "return matrix_product(basis, q), Graded(",
        "return q, Graded(",
    ),
    Mutant(
        "product_multiplied_from_the_right",  # the product of the transposes has the singular values of that
        JACOBIAN_SPANS,
        "push(jacobian, frame, matrix)",
        "push(jacobian.T, frame, matrix)",
    ),
    Mutant(
        "product_of_one_factor_fewer",
        JACOBIAN_SPANS,
        "        frame, matrix = push(jacobian, frame, matrix)\n"
        "        kept = jax.tree.map(lambda all, new: all.at[jnp.asarray(slots)[k]].set("
        'new, mode="drop"), kept, matrix)\n',
        "        kept = jax.tree.map(lambda all, new: all.at[jnp.asarray(slots)[k]].set("
        'new, mode="drop"), kept, matrix)\n'
        "        frame, matrix = push(jacobian, frame, matrix)\n",
    ),
    Mutant(
        "products_sorted_by_span",
        JACOBIAN_SPANS,
        "jax.vmap(log_singular_values)(kept)[inverse]",
        "jax.vmap(log_singular_values)(kept)[np.sort(inverse)]",
    ),
    Mutant(
        "condition_of_a_zero_product_is_nan",
        JACOBIAN_SPANS,
        "return jnp.where(singular, jnp.inf, self.log_norms - jnp.where(singular, 0, smallest))",
        "return self.log_norms - smallest",
    ),
    # gate paths
    Mutant("gru_paths_past_the_reset_gate", GATE_JACOBIANS, 'bias = "b_h" if kind == "gru" else "b"', 'bias = "b"'),
    Mutant(
        "straight_path_through_the_gates_too",
        GATE_JACOBIANS,
        "-jnp.ones((1, len(names) - 1))",
        "jnp.zeros((1, len(names) - 1))",
    ),
    Mutant(
        "gate_shares_over_time",
        GATE_JACOBIANS,
        "jnp.sum(norms, axis=1, keepdims=True)",
        "jnp.sum(norms, axis=0, keepdims=True)",
    ),
    # alignment of adjoints
    Mutant(
        "misalignment_from_the_cosine",
        ALIGNMENT,
        "return jnp.abs(along), norm(across, num_leading)",
        "return jnp.abs(along), jnp.sqrt(jnp.maximum(0, 1 - along**2))",
    ),
    Mutant(
        "alignment_weighs_by_the_source",
        ALIGNMENT,
        "jnp.where(alive & counted, jnp.roll(weights, -lag, axis=0), 0)",
        "jnp.where(alive & counted, weights, 0)",
    ),
    Mutant(
        "alignment_across_closed_gates",
        ALIGNMENT,
        "return cotangents if gates is None else [times_gate(c, jnp.asarray(gates)) for c in cotangents]",
        "return cotangents",
    ),
    # Lyapunov exponents
    Mutant("lyapunov_forgets_the_scale_of_the_frame", LYAPUNOV, "(growth + shift, largest", "(growth, largest"),
    Mutant("lyapunov_forgets_the_scale_of_the_largest", LYAPUNOV, "largest + shift)", "largest)"),
    Mutant(
        "lyapunov_deviation_for_error",
        LYAPUNOV,
        "* math.sqrt(num_batches / (num_batches - 1))",
        "* num_batches / math.sqrt(num_batches - 1)",
    ),
    Mutant(
        "lyapunov_starts_over_at_the_kept",
        LYAPUNOV,
        "_evolve(step, params, state, late, num_kept, qr_every)",
        "_evolve(step, params, (carry, frame), late, num_kept, qr_every)",
    ),
    Mutant(
        "lyapunov_short_interval_counts_as_whole",
        LYAPUNOV,
        "np.diff([*range(0, num_kept, qr_every), num_kept])",
        "np.full(-(-num_kept // qr_every), qr_every)",
    ),
    Mutant(
        "qr_derivative_of_square_matrices_only",
        LYAPUNOV,
        "(q @ (turn - inner) + ratio, (inner - turn) @ r)",
        "(q @ turn, (inner - turn) @ r)",
    ),
    # powers of a matrix
    Mutant("defective_only_where_the_largest_is", DOMINANT, "defective = jnp.any(split)", "defective = split[0]"),
    Mutant("rounding_of_powers_grows_with_n", DOMINANT, "20 * math.sqrt(size) * eps", "100 * size * eps"),
    Mutant(
        "doubts_of_the_whole_matrix",
        DOMINANT,
        "jnp.sum(jnp.abs(spectrum.left).T * reached, axis=0)",
        "norm(matrix) / spectrum.sharpness",
    ),
    Mutant(
        "left_eigenvectors_are_the_right_ones",
        DOMINANT,
        "left = vectors.T if symmetric else jnp.linalg.inv(vectors)",
        "left = vectors.T",
    ),
    Mutant("complex_angle_without_conjugate", POWERS, "jnp.vdot(direction, y)", "jnp.dot(direction, y)"),
    Mutant(
        "powers_angle_one_step_late",
        POWERS,
        "        return normalised(matrix @ y), _angle(y, direction)",
        "        y = normalised(matrix @ y)\n        return y, _angle(y, direction)",
    ),
    # evidence and advice
    Mutant(
        "slope_error_of_one_parameter",
        BIAS_BOUND,
        "jnp.maximum(count - 2, 1) * spread",
        "jnp.maximum(count - 1, 1) * spread",
    ),
    Mutant(
        "exponent_skips_the_wrong_quarter",
        EVIDENCE,
        "counted = mask & (number <= number[-1] - number[-1] // 4)",
        "counted = mask & (number > number[-1] // 4)",
    ),
    Mutant(
        "bound_by_the_first_lags",
        BIAS_BOUND,
        "rate = tail_rate(norms, num_lags)",
        "rate = jnp.log(norms[1] / norms[0])",
    ),
    Mutant("jump_counts_as_decay", EVIDENCE, "(num_lags > 2), 1, 0)", "(num_lags > 2), 0, 0)"),
    Mutant("full_bptt_is_a_window_like_others", BLOCKS, ", jnp.inf).at[:, -1].set(jnp.inf)", ", jnp.inf)"),
    Mutant("what_is_zero_is_dead", STUCK, "(a == 0) & (b == 0) for", "(a == a) | (b == 0) for"),
    Mutant("bound_sum_one_lag_short", BIAS_BOUND, "lag >= lag[:, None], phi", "lag > lag[:, None], phi"),
    Mutant(
        "curvature_along_no_unit_vector",
        EVIDENCE,
        "along = unit(direction, largest) / jnp.where(ratio == 0, 1, ratio)",
        "along = unit(direction, largest)",
    ),
    Mutant("advice_of_the_coarse_window", ADVICE, "int(found.block_window[-1])", "int(found.block_window[0])"),
    Mutant(
        "advice_clips_at_the_largest_norm",
        ADVICE,
        "clip_by_global_norm({median:.3g})",
        "clip_by_global_norm({largest:.3g})",
    ),
    Mutant("advice_scales_weights_the_wrong_way", ADVICE, "math.exp(-exponent)", "math.exp(exponent)"),
    # the first number that is not finite
    Mutant("nonfinite_goes_back_forwards", NONFINITE, "back[::-1].reshape(-1)", "back.reshape(-1)"),
    Mutant(
        "nonfinite_counts_padding",
        NONFINITE,
        "xs, ys = (tree if batch.mask is None else per_step(batch.mask, tree) for tree in (xs, ys))",
        "",
    ),
    Mutant(
        "nonfinite_reads_the_carry_received",
        NONFINITE,
        "after = jax.tree.map(lambda a: a[1:], path.carries)",
        "after = jax.tree.map(lambda a: a[:-1], path.carries)",
    ),
    Mutant(
        "nonfinite_ignores_the_gates",
        NONFINITE,
        "    if gate is not None:\n        adjoint = [times_gate(a, gate) for a in adjoint]\n",
        "",
    ),
    Mutant(
        "nonfinite_names_what_is_absorbed", CULPRITS, "helps = ~looked.broken[state.outcome]", "helps = jnp.array(True)"
    ),
    Mutant(
        "nonfinite_names_what_no_loss_reads",
        CULPRITS,
        "guilty = jnp.any(looked.broken & ~state.after)",
        "guilty = jnp.array(True)",
    ),
    # what depends on what
    Mutant(
        "path_over_one_carry_only",
        DEPENDENCE,
        "    while (more := {i for i, found in enumerate(to_carries) if found & reached} | reached) != reached:\n",
        "    if (more := {i for i, found in enumerate(to_carries) if found & reached} | reached) != reached:\n",
    ),
    Mutant(
        "dependence_of_the_first_output_only",
        DEPENDENCE,
        "known.update(zip(equation.outvars, _through(equation, given), strict=True))",
        "known.update(zip(equation.outvars[:1], _through(equation, given), strict=False))",
    ),
    Mutant("path_to_every_parameter", DEPENDENCE, '"" if any(params_read)', '"" if all(params_read)'),
    # comparison and window lengths
    Mutant("comparison_spread_of_the_population", COMPARISON, "squares / (count - 1)", "squares / count"),
    Mutant("comparison_error_of_one_sample", COMPARISON, "jnp.sqrt(variance / count)", "jnp.sqrt(variance)"),
    Mutant("comparison_counts_the_future", COMPARISON, "(num_steps * (num_steps + 1) / 2)", "num_steps**2"),
    Mutant("comparison_draws_one_key", COMPARISON, "jax.random.fold_in(key, i)", "jax.random.fold_in(key, 0 * i)"),
    Mutant(
        "comparison_squares_around_the_old_mean",
        COMPARISON,
        "after = jax.tree.map(jnp.subtract, scaled, mean)",
        "after = before",
    ),
    Mutant(
        "schedule_counts_windows_one_step_late",
        WINDOW_LENGTHS,
        "num_steps - 1 - k - a, 0)]",
        "num_steps - 2 - k - a, 0)]",
    ),
    Mutant("schedule_weight_instead_of_its_square", WINDOW_LENGTHS, "2 * log_survival[a] -", "log_survival[a] -"),
    Mutant("schedule_scale_without_derivative", WINDOW_LENGTHS, "root - excess(root) / slope", "root"),
)
