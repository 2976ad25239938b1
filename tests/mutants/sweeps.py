"""Sweeps."""

from . import Mutant
from .rooms import CHUNKS, MANIFESTS, POINTS, PROGRAMS, REPOSITORIES, RESULTS, RUN_PLANS, STORES, SWEEPING, WORKERS

SWEEPS = (
    Mutant("points_run_the_first_axis_fastest", POINTS, "Points.__getitem__", "(i, shape)", "(i, shape, 'F')"),
    Mutant("two_kinds_of_values_are_one", POINTS, "column", "len(kinds) > 1", "len(kinds) > 2"),
    Mutant("points_may_be_there_twice", POINTS, "_of_points", "if row in rows", "if None in rows"),
    Mutant("large_integers_wrap", POINTS, "_check_data", "np.array_equal(", "np.size("),
    Mutant("runs_get_the_next_key", PROGRAMS, "one_run", "(key, index)", "(key, index + 1)"),
    Mutant("settings_may_change_shapes", PROGRAMS, "output_shapes", "_difference(found, outputs)", "None"),
    Mutant("slower_widths_are_taken", RUN_PLANS, "find_plan", "other.seconds >=", "other.seconds <"),
    Mutant("one_by_one_is_taken_when_slower", RUN_PLANS, "find_plan", "best = min(best,", "best = max(best,"),
    Mutant(
        "any_known_width_is_taken", RUN_PLANS, "find_plan.known_width", "seconds <= program_of", "True or program_of"
    ),
    Mutant(
        "one_call_of_a_known_width_counts",
        RUN_PLANS,
        "find_plan.known_width",
        "-(-share // width) * of_call",
        "of_call",
    ),
    Mutant("what_does_not_pay_is_tried", RUN_PLANS, "find_plan.pays", "WORTH * best.compiling", "0"),
    Mutant("chunks_hold_any_number_of_bytes", RUN_PLANS, "find_plan", "CHUNK_BYTES //", "10**12 //"),
    Mutant("memory_budget_is_not_read", RUN_PLANS, "_that_fits", "not needed > budget", "needed"),
    Mutant("every_error_halves", RUN_PLANS, "_half", "'RESOURCE_EXHAUSTED' not in str(error)", "False"),
    Mutant("what_fills_a_call_are_runs", RUN_PLANS, "compute", "[:own.stop - own.start]", "[:]"),
    Mutant("later_chunks_are_as_wide_as_before", CHUNKS, "_narrowed", "chunk.plan.width <= width", "True"),
    Mutant("lost_chunks_stay_lost", CHUNKS, "computed", "queue.appendleft(chunk)", "None"),
    Mutant("first_runs_stand_last", CHUNKS, "_joined", "[begun[name], outputs[name]]", "[outputs[name], begun[name]]"),
    Mutant("all_runs_are_finished_by_one", RESULTS, "Results.put", "finished[indices]", "finished[:]"),
    Mutant("one_output_makes_a_run_finite", RESULTS, "Results.dataset", "finite &=", "finite |="),
    Mutant("chunks_have_no_checksum", STORES, "Store.plan", "ZstdCodec(level=1), Crc32cCodec()", "ZstdCodec(level=1)"),
    Mutant(
        "chunks_stand_in_the_manifest",
        REPOSITORIES,
        "repository_of",
        "inline_chunk_threshold_bytes = 0",
        "inline_chunk_threshold_bytes = 4096",
    ),
    Mutant("damaged_chunks_stay", STORES, "Store.unfinished", "if damaged", "if not left"),
    Mutant("two_writers_at_a_time", REPOSITORIES, "locked", "lock.acquire()", "None"),
    Mutant("failed_reads_are_damage", STORES, "_outputs", "if any((word in str(error) for word in DAMAGE))", "if True"),
    Mutant("points_stand_in_every_commit", MANIFESTS, "_values", "values.size <= MOST_VALUES", "True"),
    Mutant("equal_settings_are_one_program", PROGRAMS, "_settings", "(name, type(value), value)", "(name, value)"),
    Mutant(
        "what_was_done_is_lost",
        CHUNKS,
        "computed",
        "if broken is not None and (not pending)",
        "if broken is not None",
    ),
    Mutant("other_settings_are_kept", MANIFESTS, "check_same", "changed == 'refuse'", "changed == 'restart'"),
    Mutant("settings_stay_at_home", WORKERS, "_configured", "value == before[name]", "True"),
    Mutant("functions_are_unpacked_each_time", WORKERS, "in_worker", "_FUNCTIONS[digest]", "_FUNCTIONS['']"),
    Mutant("one_chunk_for_all_workers", SWEEPING, "sweep", "1 if executor is None else", "1 if True else"),
)
