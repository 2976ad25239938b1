"""The core: gradients."""

from tests.mutants import Mutant

DOOR = "jbptt/engine/__init__.py"
FAST = "jbptt/engine/fast.py"
SCAN_VJP = "jbptt/scan_vjp.py"
STACKS = "jbptt/engine/stacks.py"
SEGMENTS = "jbptt/segments.py"
ARRAYS = "jbptt/arrays.py"
JAXPRS = "jbptt/engine/jaxprs.py"
LOSSES = "jbptt/losses.py"
WEIGHT_USES = "jbptt/engine/weight_uses.py"
WEIGHT_PRODUCTS = "jbptt/engine/weight_products.py"
FORWARD_BACKWARD = "jbptt/engine/forward_backward.py"
DEPENDENCE = "jbptt/engine/dependence.py"
TYPES = "jbptt/types.py"
VALIDATION = "jbptt/validation.py"
CELLS = "jbptt/cells.py"
RECURRENCE = "jbptt/recurrence.py"
TRUNCATION = "jbptt/truncation.py"
DIVISION = "jbptt/division.py"
WINDOWS = "jbptt/windows.py"
STREAMS = "jbptt/streams.py"
ESTIMATORS = "jbptt/estimators.py"
ADAPTIVE = "jbptt/adaptive.py"
CLIPPING = "jbptt/clipping/transformations.py"
NORMS = "jbptt/norms.py"
COTANGENTS = "jbptt/clipping/cotangents.py"
EXECUTABLES = "jbptt/executables.py"

CORE = (
    Mutant(
        "backwards_in_time_the_first_carry_is_the_last",
        STACKS,
        "(t + 1, t == last) if",
        "(t + 1, t == 0) if",
    ),
    Mutant(
        "segments_backwards_in_time_begin_at_the_start",
        SCAN_VJP,
        "return jnp.concatenate([b, a] if self.reverse else [a, b])",
        "return jnp.concatenate([a, b])",
    ),
    Mutant(
        "cotangents_of_inputs_are_gated",
        FORWARD_BACKWARD,
        "inputs_bar_t = list(map(jnp.asarray, inputs_bar_t))",
        "inputs_bar_t = [(1 if gates is None else gate.mean()) * bar for bar in inputs_bar_t]",
    ),
    Mutant(
        "what_no_loss_reads_has_zeros",
        SCAN_VJP,
        "read = tuple(not isinstance(leaf, SymbolicZero) for leaf in leaves)",
        "read = tuple(True for leaf in leaves)",
    ),
    Mutant(
        "the_plain_engine_gates_the_outputs",
        "jbptt/engine/plain.py",
        "cotangents_t = [times_gate(c, gate_t) for c in cotangents_t]",
        "cotangents_t = cotangents_t",
    ),
    Mutant(
        "gradient_by_the_start_is_dropped",
        SEGMENTS,
        "g + own.astype(g.dtype), grad, start.pull(cotangents))",
        "g, grad, start.pull(cotangents))",
    ),
    Mutant(
        "what_a_start_reads_is_said_to_be_unread",
        "jbptt/slips.py",
        "if name not in in_start]",
        "if name]",
    ),
    Mutant(
        "every_pinned_size_is_a_feature",
        "jbptt/batch_axes.py",
        "if found and found[1] == (*batch",
        "if not found and (*batch",
    ),
    Mutant("means_are_one_example", "jbptt/batch_axes.py", "return not all(free) and", "return all(free) and"),
    Mutant(
        "layers_are_examples", "jbptt/batch_axes.py", "_replace(carry=carry).run()", "_replace(carry=carry) is None"
    ),
    Mutant("batch_first_is_not_seen", "jbptt/slips.py", "_without(a, 1), xs), 1)", "_without(a, 0), xs), 1)"),
    Mutant("weights_may_cancel", "jbptt/slips.py", "if total < SMALL * size:", "if total < 0 * size:"),
    # types: alignment, means, sums
    Mutant(
        "align_on_trailing_axes",
        ARRAYS,
        "jnp.shape(array) + (1,) * (ndim - jnp.ndim(array))",
        "(1,) * (ndim - jnp.ndim(array)) + jnp.shape(array)",
    ),
    Mutant(
        "zero_weight_divides",
        ARRAYS,
        "jnp.where(weight == 0, jnp.zeros_like(total), total / safe)",
        "total / weight",
    ),
    Mutant("sum_keeps_one_weight", TYPES, "self.weight_sum + other.weight_sum", "self.weight_sum"),
    Mutant(
        "sum_adds_mean_gradients",
        TYPES,
        "jax.tree.map(jnp.add, self.grad_sum, other.grad_sum)",
        "jax.tree.map(jnp.add, self.grads, other.grads)",
    ),
    Mutant(
        "sum_weighs_aux_wrongly",
        TYPES,
        "b * align_leading(other.weight_sum, jnp.ndim(b))",
        "b * align_leading(self.weight_sum, jnp.ndim(b))",
    ),
    Mutant("default_stride_slides", VALIDATION, "stride = window if stride is None", "stride = 1 if stride is None"),
    # cells
    Mutant(
        "rnn_transposes_weights",
        CELLS,
        'x @ params["w_x"] + h @ params["w_h"] + params["b"])\n        return h, h',
        'x @ params["w_x"] + h @ params["w_h"].T + params["b"])\n        return h, h',
    ),
    Mutant("gru_swaps_r_and_z", CELLS, "r, z = jax.nn.sigmoid", "z, r = jax.nn.sigmoid"),
    Mutant("gru_mixes_the_wrong_way", CELLS, "h = (1 - z) * n + z * h", "h = z * n + (1 - z) * h"),
    Mutant("gru_resets_the_input_too", CELLS, "jnp.tanh(n_x + r * n_h)", "jnp.tanh(r * (n_x + n_h))"),
    Mutant("lstm_swaps_g_and_o", CELLS, "i, f, g, o = jnp.split", "i, f, o, g = jnp.split"),
    Mutant("lstm_output_without_tanh", CELLS, "jax.nn.sigmoid(o) * jnp.tanh(c)", "jax.nn.sigmoid(o) * c"),
    Mutant("lstm_bias_on_the_input_gate", CELLS, ".at[hidden_size : 2 * hidden_size]", ".at[:hidden_size]"),
    Mutant("readout_without_bias", CELLS, 'return h @ params["w_y"] + params["b_y"]', 'return h @ params["w_y"]'),
    Mutant("nested_readout_runs_once", CELLS, "step.readout(params, readout(params, h))", "step.readout(params, h)"),
    Mutant(
        "reset_after_the_step",
        CELLS,
        "        return step(params, select_leading(~reset, carry, start), x)",
        "        carry, y = step(params, carry, x)\n        return select_leading(~reset, carry, start), y",
    ),
    # recurrence: gates, masks, segments
    Mutant(
        "gate_multiplies_without_select",
        ARRAYS,
        "return jnp.where(gate == 0, jnp.zeros_like(product), product)",
        "return product",
    ),
    Mutant("gate_rounded_to_the_carry", ARRAYS, ".astype(jnp.finfo(wide).dtype)", ".astype(cotangent.dtype)"),
    Mutant(
        "engine_gate_dropped",
        RECURRENCE,
        "return first_order_gate(value, gate), times_gate(tangents[0], gate)",
        "return first_order_gate(value, gate), tangents[0]",
    ),
    Mutant(
        "gate_of_first_order_at_a_zero_carry",
        RECURRENCE,
        "jnp.isfinite(size)) | zero",
        "jnp.isfinite(size))",
    ),
    Mutant("unroll_takes_the_gate_of_first_order", RECURRENCE, ", gate_fn=gate_cotangent)", ")"),
    Mutant(
        "gate_clipped_to_one",
        RECURRENCE,
        "gated = constant - times_gate(difference, jnp.where(finite, jnp.abs(gate), 1))",
        "gated = constant - times_gate(difference, jnp.where(finite, jnp.minimum(jnp.abs(gate), 1), 1))",
    ),
    Mutant(
        "gate_loses_its_sign",
        RECURRENCE,
        "difference = jnp.where(shape > 0, constant - value, value - constant)",
        "difference = constant - value",
    ),
    Mutant(
        "gate_makes_infinite_carries_nan",
        RECURRENCE,
        ".tiny) & jnp.isfinite(size)) | zero",
        ".tiny)) | zero",
    ),
    Mutant(
        "gate_flushes_denormal_carries",
        RECURRENCE,
        "(size >= jnp.finfo(size.dtype).tiny) & jnp.isfinite(size)",
        "jnp.isfinite(size)",
    ),
    Mutant(
        "gate_on_the_first_leaf_only",
        RECURRENCE,
        "    return jax.tree.map(lambda leaf: gate_fn(jnp.asarray(leaf), gate) if is_inexact(leaf) else leaf, carry)",
        "    leaves, structure = jax.tree.flatten(carry)\n"
        "    first = [is_inexact(leaf) for leaf in leaves].index(True)\n"
        "    leaves[first] = gate_fn(jnp.asarray(leaves[first]), gate)\n"
        "    return structure.unflatten(leaves)",
    ),
    Mutant(
        "gate_one_step_late",
        RECURRENCE,
        "        return step(params, gated(carry, gate, gate_fn), (x, mask))",
        "        carry_next, y_t = step(params, carry, (x, mask))\n"
        "        return gated(carry_next, gate, gate_fn), y_t",
    ),
    Mutant(
        "gate_open_where_a_scan_starts",
        RECURRENCE,
        "params), carry, (xs, gates, mask), length=length)",
        "params), carry, (xs, None if gates is None else jnp.asarray(gates).at[0].set(1), mask), length=length)",
    ),
    Mutant(
        "select_on_trailing_axes",
        ARRAYS,
        "return jnp.where(align_leading(mask, jnp.ndim(new)), new, old)",
        "return jnp.where(mask, new, old)",
    ),
    Mutant("shared_leaf_waits_for_all", ARRAYS, "jnp.where(jnp.any(mask), new", "jnp.where(jnp.all(mask), new"),
    Mutant(
        "masked_inputs_reach_the_step",
        RECURRENCE,
        "step(params, carry, zero_masked(mask, x))",
        "step(params, carry, x)",
    ),
    Mutant(
        "masked_step_moves_the_carry",
        RECURRENCE,
        "return select_leading(mask, new_carry, carry), y",
        "return new_carry, y",
    ),
    Mutant(
        "masked_outputs_stay",
        RECURRENCE,
        "return carry, ys if mask is None else jax.vmap(zero_masked)(mask, ys)",
        "return carry, ys",
    ),
    Mutant(
        "ragged_segment_without_gates",
        RECURRENCE,
        "run_through(carry, tail, length=rest)",
        "run_through(carry, (tail[0], None, tail[2]), length=rest)",
    ),
    Mutant(
        "segments_are_not_recomputed",
        RECURRENCE,
        "jax.checkpoint(partial(run_through, length=segment))",
        "partial(run_through, length=segment)",
    ),
    Mutant(
        "engine_keeps_every_state",
        RECURRENCE,
        "return num_steps if num_steps <= 512 else max(64, math.isqrt(num_steps))",
        "return num_steps",
    ),
    # truncation: schedules and coverage
    Mutant("fixed_cut_one_early", TRUNCATION, "((t + phase) % window == 0)", "((t + phase + 1) % window == 0)"),
    Mutant("fixed_phase_backwards", TRUNCATION, "((t + phase) % window == 0)", "((t - phase) % window == 0)"),
    Mutant("fixed_cuts_the_initial_carry", TRUNCATION, "% window == 0) & (t > 0), 0.0", "% window == 0), 0.0"),
    Mutant("randomized_forgets_its_weight", TRUNCATION, "1 / keep_prob if reweight else 1.0", "1.0"),
    Mutant(
        "randomized_draws_once_for_all_steps",
        TRUNCATION,
        "kept = jax.random.bernoulli(key, keep_prob)",
        "kept = jnp.broadcast_to(jax.random.bernoulli(key, keep_prob.mean()), keep_prob.shape)",
    ),
    Mutant(
        "artbp_hazard_one_step_on",
        TRUNCATION,
        "* mean_length + delta.astype(float))",
        "* mean_length + delta.astype(float) + 1)",
    ),
    Mutant(
        "artbp_counts_from_zero_after_a_cut", TRUNCATION, "jnp.where(cut, 1, delta + 1)", "jnp.where(cut, 0, delta + 1)"
    ),
    Mutant("artbp_never_starts_anew", TRUNCATION, "jnp.where(cut, 1, delta + 1), gate", "delta + 1, gate"),
    Mutant(
        "artbp_forgets_its_weight", TRUNCATION, "1 / jnp.where(hazard < 1, 1 - hazard, 1) if reweight else 1.0", "1.0"
    ),
    Mutant("length_hazard_one_step_late", TRUNCATION, "len(hazards)) - 1]", "len(hazards) - 1)]"),
    Mutant("length_hazard_is_the_plain_probability", TRUNCATION, "probs / xp.where(before > 0, before, 1)", "probs"),
    Mutant(
        "examples_share_their_draws",
        TRUNCATION,
        "kept = jax.random.bernoulli(key, keep_prob)",
        "kept = jax.random.bernoulli(key, keep_prob[..., :1] if keep_prob.ndim > 1 else keep_prob, keep_prob.shape)",
    ),
    Mutant(
        "coverage_counts_the_source_gate",
        TRUNCATION,
        "row = jnp.where(steps == t, 1.0, row)",
        "row = jnp.where(steps == t, gate, row)",
    ),
    Mutant("window_coverage_one_short", TRUNCATION, "* stride - window <= i)", "* stride - window < i)"),
    Mutant(
        "mean_coverage_forgets_where_windows_begin",
        TRUNCATION,
        "jnp.cumsum(lasting * beginning, axis=1)",
        "jnp.cumsum(lasting, axis=1)",
    ),
    Mutant(
        "mean_coverage_one_step_short",
        TRUNCATION,
        "1 - hazard_fn(jnp.arange(1, num_steps))",
        "1 - hazard_fn(jnp.arange(2, num_steps + 1))",
    ),
    Mutant(
        "mean_coverage_weighs_what_has_no_weights",
        TRUNCATION,
        "coverage(jnp.ones_like(keep_prob) if reweight else keep_prob)",
        "coverage(jnp.ones_like(keep_prob))",
    ),
    # adjoint: the engine
    Mutant(
        "sums_in_the_narrow_dtype",
        ARRAYS,
        "return jnp.asarray(array, widened_dtype(jnp.result_type(array)))",
        "return jnp.asarray(array)",
    ),
    Mutant(
        "weight_gradient_adds_up_narrow",
        JAXPRS,
        "    if name in REPEATS and any(is_wide):",
        "    if False:",
    ),
    Mutant(
        "readout_sees_the_whole_segment",
        DOOR,
        "jax.vmap(partial(step, params), axis_size=num_steps)(carries, inputs)",
        "step(params, carries, inputs)",
    ),
    Mutant(
        "weight_zero_leaks",
        LOSSES,
        "nonzero = None if batch.weights is None else jnp.asarray(batch.weights) != 0",
        "nonzero = None",
    ),
    Mutant(
        "masked_targets_and_outputs_leak",
        LOSSES,
        "loss(zero_masked(counted, y), zero_masked(counted, target))",
        "loss(y, target)",
    ),
    Mutant(
        "masked_outputs_reach_the_loss",
        LOSSES,
        "loss(zero_masked(counted, y), zero_masked(counted, target))",
        "loss(y, zero_masked(counted, target))",
    ),
    Mutant(
        "weights_on_trailing_axes",
        LOSSES,
        "align_leading(jnp.asarray(batch.weights), losses.ndim)",
        "jnp.asarray(batch.weights)",
    ),
    Mutant(
        "weight_sum_forgets_the_mask",
        LOSSES,
        "weights = jnp.where(align_leading(batch.mask, losses.ndim), weights, 0)",
        "pass",
    ),
    Mutant(
        "segment_hands_nothing_on",
        FAST,
        "loops.backward(stacks, cotangents, outputs_bar, gates,",
        "loops.backward(stacks, [0 * c for c in cotangents], outputs_bar, gates,",
    ),
    # the loops of a segment, and the weights that are taken out of them
    Mutant("weight_gradient_untransposed", WEIGHT_USES, ".transpose(back)", ".transpose(sorted(back))"),
    Mutant("weight_on_the_other_side", WEIGHT_USES, "first = 1 if product.side == 0", "first = 1 if product.side == 1"),
    Mutant(
        "weight_used_twice_counts_once",
        WEIGHT_PRODUCTS,
        "product.add_gradient(grads[home], whole, bar)",
        "product.add_gradient(self.first_sums(None)[home], whole, bar)",
    ),
    Mutant(
        "other_uses_are_forgotten",
        WEIGHT_PRODUCTS,
        "zip(program.names.others, others_bar, strict=True)",
        "zip(program.names.others, map(jnp.zeros_like, others_bar), strict=True)",
    ),
    Mutant("first_carry_is_the_second", STACKS, "return jnp.where(begins, first, earlier)", "return earlier"),
    Mutant(
        "operands_one_step_late",
        STACKS,
        "self.at(atom, jnp.asarray(start))",
        "self.at(atom, jnp.asarray(start) + 1)",
    ),
    Mutant(
        "chunks_go_back_in_order",
        FORWARD_BACKWARD,
        "lax.scan(add, (state, first), starts, reverse=not reverse)",
        "lax.scan(add, (state, first), starts, reverse=reverse)",
    ),
    Mutant(
        "steps_go_back_in_order",
        FORWARD_BACKWARD,
        "start + jnp.arange(length), reverse=not reverse",
        "start + jnp.arange(length), reverse=reverse",
    ),
    Mutant(
        "sums_of_the_last_step", FORWARD_BACKWARD, "else one + read(values, v) for one", "else read(values, v) for one"
    ),
    Mutant(
        "weights_turned_and_not_turned",
        FORWARD_BACKWARD,
        "turned[id(equation)] = known[name].T",
        "turned[id(equation)] = known[name]",
    ),
    Mutant("shards_are_not_added_up", DIVISION, "return lax.psum(sums, SHARDS), carry", "return sums, carry"),
    Mutant("shares_halve_what_all_share", DIVISION, "found += [name] if fits else []", "found += []"),
    Mutant("shares_draw_alike", DIVISION, "any(a[0] == b[0] and a != b for", "any(a[0] != b[0] and a == b for"),
    Mutant("shares_need_not_fit", DIVISION, "    if not fits:\n", "    if not fits and share.size < 1:\n"),
    Mutant(
        "segments_start_one_segment_late", SEGMENTS, "        return after, carry\n", "        return after, after\n"
    ),
    Mutant(
        "first_pass_ignores_the_mask",
        SEGMENTS,
        "carry, (batch.xs, batch.mask), batch_steps(batch))\n        return after",
        "carry, (batch.xs, None), batch_steps(batch))\n        return after",
    ),
    Mutant(
        "segments_go_back_in_order",
        SEGMENTS,
        "(jnp.arange(num_whole), starts), reverse=True)",
        "(jnp.arange(num_whole), starts))",
    ),
    Mutant(
        "last_segment_without_gates",
        SEGMENTS,
        "before_last, last, last_gates, None, sums)",
        "before_last, last, None, None, sums)",
    ),
    Mutant(
        "last_segment_is_not_counted",
        SEGMENTS,
        "state = passed.cotangents, passed.sums\n",
        "state = passed.cotangents, jax.tree.map(jnp.zeros_like, passed.sums)\n",
    ),
    # what is shared, unread, looked up, under way
    Mutant(
        "lookup_one_row_off",
        WEIGHT_USES,
        "places, offsets, left_out = operands[0], ",
        "places, offsets, left_out = operands[0] + 1, ",
    ),
    Mutant(
        "places_are_not_moved_inside", WEIGHT_USES, "lax.GatherScatterMode.CLIP", "lax.GatherScatterMode.FILL_OR_DROP"
    ),
    Mutant(
        "unread_carries_have_zeros",
        FORWARD_BACKWARD,
        "[*chosen(cotangents_t, live.carries), *outputs_bar_t]",
        "[*map(jnp.zeros_like, chosen(cotangents_t, live.carries)), *outputs_bar_t]",
    ),
    Mutant("everything_is_read", DEPENDENCE, "carries = tuple(i in reached for", "carries = tuple(True for"),
    Mutant(
        "windows_share_their_hold",
        STREAMS,
        "back_through(vmapped(parts), params, starts",
        "back_through(vmapped(parts._replace(loss=lambda y, t, _: parts.loss(y, t, None))), params, starts",
    ),
    Mutant(
        "anything_goes_side_by_side",
        STREAMS,
        "if most == 1 or not same_under_vmap(step, params, carry, x):",
        "if most == 1:",
    ),
    Mutant(
        "gate_after_the_derivative",
        FORWARD_BACKWARD,
        "cotangents_t = [times_gate(c, gate) for c in cotangents_t]",
        "cotangents_t = [times_gate(jax.lax.stop_gradient(c), gate) for c in cotangents_t]",
    ),
    Mutant(
        "carry_gradient_is_a_sum",
        SEGMENTS,
        "weighted_mean(widened(c), sums.weight) for c",
        "widened(c) for c",
    ),
    Mutant(
        "block_under_way_begins_anew",
        STREAMS,
        "reached = (i >= length - phase) & at.exists",
        "reached = (i > length) & at.exists",
    ),
    Mutant(
        "block_under_way_is_a_window", STREAMS, "reached = (i >= length - phase) & at.exists", "reached = at.exists"
    ),
    Mutant("blocks_ignore_their_phase", STREAMS, "((t + phase) % window != 0)", "(t % window != 0)"),
    Mutant(
        "carry_gradient_of_the_last_piece",
        STREAMS,
        "jnp.where(is_first, b, a) for a, b",
        "jnp.where(True, b, a) for a, b",
    ),
    # windows: overlapping backward passes
    Mutant("chunk_ends_one_late", WINDOWS, "jnp.arange(1, num_chunks + 1) - 1", "jnp.arange(1, num_chunks + 1)"),
    Mutant("chunk_phase_backwards", WINDOWS, "return num_history - phase +", "return num_history + phase +"),
    Mutant("ragged_chunk_dropped", WINDOWS, "-(-(num_steps + overhang) // stride)", "(num_steps + overhang) // stride"),
    Mutant("older_losses_injected_again", WINDOWS, "keep & (q < stride)", "keep"),
    Mutant("overlapping_chunks_overwrite", WINDOWS, "m.at[i].add(", "m.at[i].set("),
    Mutant(
        "window_one_step_too_long",
        WINDOWS,
        "fori_loop(0, window, body",
        "fori_loop(0, window + 1, body",
    ),
    Mutant(
        "window_one_step_too_short",
        WINDOWS,
        "fori_loop(0, window, body",
        "fori_loop(0, window - 1, body",
    ),
    Mutant(
        "window_reaches_before_the_start",
        WINDOWS,
        "jnp.concatenate([steps.exists, jnp.zeros(stride, bool)])",
        "jnp.concatenate([jnp.ones_like(steps.exists), jnp.zeros(stride, bool)])",
    ),
    Mutant(
        "history_linearised_one_step_off",
        WINDOWS,
        "at = jax.tree.map(lambda a: a[i], steps)",
        "at = jax.tree.map(lambda a: a[jnp.maximum(i - 1, 0)], steps)",
    ),
    Mutant(
        "empty_history_meets_the_step",
        WINDOWS,
        "steps, with_stand_ins(steps, num_history)",
        "steps, steps",
    ),
    Mutant(
        "history_forgets_the_mask",
        WINDOWS,
        "_whole_mask(batch.mask, shape), jnp.ones",
        "_whole_mask(None, shape), jnp.ones",
    ),
    Mutant(
        "sliding_loses_the_readout_gradient",
        WINDOWS,
        "pull(total, passed.outputs_bar, passed.sums.grad)",
        "pull(total, passed.outputs_bar, None)",
    ),
    # estimators: streams, keys, means
    Mutant(
        "full_resets_the_carry", ESTIMATORS, "cotangents), CarryState(carry)", "cotangents), CarryState(state.carry)"
    ),
    Mutant(
        "truncated_resets_the_carry",
        ESTIMATORS,
        "WindowState(streamed.carry, streamed.history, phase)",
        "WindowState(state.carry, streamed.history, phase)",
    ),
    Mutant(
        "block_resets_the_carry",
        STREAMS,
        "(passed.carry, carry, _first(first, is_first, passed.cotangents)",
        "(state[0], carry, _first(first, is_first, passed.cotangents)",
    ),
    Mutant(
        "unfinished_block_remembered_wrongly",
        STREAMS,
        "(passed.carry, carry, _first(",
        "(passed.carry, passed.carry, _first(",
    ),
    Mutant(
        "mean_of_block_means",
        STREAMS,
        "        return passed.sums, (passed.carry, carry, _first",
        "        mean = jax.tree.map(lambda a: a / jnp.maximum(passed.sums.weight, 1), passed.sums)\n"
        "        return mean, (passed.carry, carry, _first",
    ),
    Mutant(
        "ragged_tail_dropped",
        STREAMS,
        "return run(state, tail, total) if rest else (total, state)",
        "return total, state",
    ),
    Mutant("phase_stands_still", ESTIMATORS, "phase = (phase + num_steps) % stride", "phase = phase % stride"),
    Mutant(
        "phase_lost_after_a_ragged_update",
        ESTIMATORS,
        "phase = jnp.asarray(num_steps % stride)",
        "phase = jnp.zeros((), int)",
    ),
    Mutant(
        "history_too_short_for_the_phase",
        ESTIMATORS,
        "reach = window - stride if aligned else window - 1",
        "reach = window - stride",
    ),
    Mutant(
        "windows_side_by_side_start_alike",
        STREAMS,
        "params, starts, pieces, segment=window",
        "params, jax.tree.map(lambda a: jnp.broadcast_to(a[:1], a.shape), starts), pieces, segment=window",
    ),
    Mutant(
        "parallel_blocks_drop_the_rest",
        STREAMS,
        "(one, batch_part(batch, whole, num_steps), window)",
        "(one, batch_part(batch, num_steps - num_steps % window, num_steps), window)",
    ),
    Mutant(
        "history_never_moves_on",
        STREAMS,
        "(passed.carry, latest(passed.steps, length), first",
        "(passed.carry, history, first",
    ),
    Mutant(
        "key_reused_by_every_update",
        ESTIMATORS,
        "gates=gates), KeyState(carry, key)",
        "gates=gates), KeyState(carry, state.key)",
    ),
    Mutant(
        "coverage_of_another_draw", ESTIMATORS, "_, gates = draw(key, num_steps)", "gates = gates_fn(key, num_steps)"
    ),
    Mutant(
        "coverage_of_one_draw_for_the_mean",
        ESTIMATORS,
        "if key is None else gated.coverage(num_steps, key)",
        "if key is None else mean_fn(num_steps, value, reweight=reweight)",
    ),
    Mutant(
        "gates_never_reach_the_engine",
        ESTIMATORS,
        "start.carry, batch, gates, sizes[1], plan)",
        "start.carry, batch, None, sizes[1], plan)",
    ),
    Mutant(
        "aux_is_a_sum",
        SEGMENTS,
        "jax.tree.map(lambda a: weighted_mean(a, sums.weight), sums.aux)",
        "sums.aux",
    ),
    # clipping and norms
    Mutant(
        "the_largest_drops_nan",
        NORMS,
        "jnp.where(jnp.isnan(values).any(axis), jnp.nan, values.max(axis, **options))",
        "values.max(axis, **options)",
    ),
    Mutant(
        "clip_compares_the_largest_entry",
        NORMS,
        "(largest * jnp.maximum(ratio, 1) > max_norm)",
        "(largest > max_norm)",
    ),
    Mutant(
        "clip_scales_small_gradients_up",
        NORMS,
        "jnp.where(align_leading(clipped, leaf.ndim), short, wide).astype",
        "short.astype",
    ),
    Mutant(
        "clip_to_the_largest_entry",
        NORMS,
        "limit = max_norm / jnp.where(ratio == 0, 1, ratio)",
        "limit = max_norm + 0 * ratio",
    ),
    Mutant(
        "clip_gives_up_where_the_norm_overflows",
        NORMS,
        "usable = jnp.isfinite(largest)",
        "usable = jnp.isfinite(largest * ratio)",
    ),
    Mutant(
        "norm_squares_overflow",
        NORMS,
        "    return jnp.where(jnp.isinf(largest), largest, largest * ratio)",
        "    del largest, ratio\n"
        "    rest = [tuple(range(num_leading, jnp.ndim(a))) for a in jax.tree.leaves(tree)]\n"
        "    return jnp.sqrt(sum(jnp.sum(jnp.abs(a) ** 2, axis=r) for a, r in zip(jax.tree.leaves(tree), rest)))",
    ),
    Mutant("norm_has_no_gradient_at_zero", NORMS, "jnp.sqrt(jnp.where(total == 0, 1, total))", "jnp.sqrt(total)"),
    Mutant("cosine_of_no_unit_vector", NORMS, "jnp.zeros((), size.dtype)) / spread", "jnp.zeros((), size.dtype))"),
    Mutant(
        "leaf_norm_is_global",
        CLIPPING,
        "_to_norm(max_norm), is_leaf=None)",
        "_to_norm(max_norm))",
    ),
    Mutant(
        "skip_drops_the_broken_leaf_only",
        CLIPPING,
        "        return jax.tree.map(lambda u: jnp.where(finite, u, jnp.zeros_like(u)), updates)",
        "        return jax.tree.map(lambda u: jnp.where(jnp.isfinite(u).all(), u, jnp.zeros_like(u)), updates)",
    ),
    Mutant(
        "share_counts_what_is_not_finite", CLIPPING, "jnp.isfinite(size) & (size > max_value)", "~(size <= max_value)"
    ),
    Mutant(
        "direction_forgotten_after_nan",
        CLIPPING,
        "jnp.where(finite, new, old), now, state.direction)",
        "jnp.where(finite, new, 0 * old), now, state.direction)",
    ),
    Mutant(
        "cotangent_clipped_leaf_by_leaf",
        COTANGENTS,
        "return clip_to_norm(cotangents, bound, num_leading)[0], jnp",
        "return [clip_to_norm(leaf, bound, num_leading)[0] for leaf in cotangents], jnp",
    ),
    Mutant(
        "examples_share_a_cotangent_norm",
        COTANGENTS,
        "return clip_to_norm(cotangents, bound, num_leading)[0], jnp",
        "return clip_to_norm(cotangents, bound)[0], jnp",
    ),
    # adaptive
    Mutant(
        "probe_starts_one_step_early",
        ADAPTIVE,
        "last = len(means.weights), real.mask.shape[0] - 1",
        "last = len(means.weights), real.mask.shape[0] - 2",
    ),
    Mutant(
        "probe_of_an_ignored_target",
        ADAPTIVE,
        "weights = jnp.where(says_something(passed, weights), weights, 0)\n",
        "\n",
    ),
    Mutant("probe_injects_at_every_lag", ADAPTIVE, "jnp.where(lag == 0, y[i], 0)", "jnp.where(lag >= 0, y[i], 0)"),
    Mutant("probes_never_fade", ADAPTIVE, "smoothing * past + (1 - smoothing) * new", "past + new"),
    Mutant(
        "adaptive_ignores_its_window",
        ADAPTIVE,
        '{"window": state.window, "stride": 1}',
        '{"window": max_window, "stride": 1}',
    ),
    Mutant(
        "adaptive_without_bound_takes_one_step",
        ADAPTIVE,
        "(window <= longest), window, longest)",
        "(window <= longest), window, 1)",
    ),
    Mutant(
        "adaptive_keeps_what_is_not_finite", ADAPTIVE, "& jnp.isfinite(cotangent_norms) & jnp.isfinite(grad_norms)", ""
    ),
    Mutant(
        "programs_hold_what_they_are_made_of",
        EXECUTABLES,
        "        alive: Any = reference()",
        "        alive: Any = reference() and function",
    ),
    Mutant(
        "programs_forget_settings", EXECUTABLES, "(body, settings, structure, fixed), make)", "(body, structure), make)"
    ),
    Mutant(
        "programs_keep_what_was_traced",
        EXECUTABLES,
        "    if is_traced(result):\n        _PROGRAMS.forget(program)",
        "    if False:\n        _PROGRAMS.forget(program)",
    ),
)
