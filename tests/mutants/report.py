"""The report, and the results of a sweep."""

from . import Mutant
from .rooms import RUN_TABLES, SWEEP_PAGES, SWEEP_PICTURES

REPORT = (
    # results of a sweep
    Mutant(
        "medians_take_runs_not_finite",
        RUN_TABLES,
        "grouped",
        "output.good[i]",
        "table.finished[i]",
    ),
    Mutant("quartiles_up_to_the_largest", RUN_TABLES, "grouped", "0.75", "1.0"),
    Mutant("last_entry_is_the_first", RUN_TABLES, "last", "self.values[:, -1]", "self.values[:, 0]"),
    Mutant("unfinished_runs_are_not_finite", RUN_TABLES, "num_not_finite", "- self.num_unfinished", ""),
    Mutant(
        "a_run_is_finite_by_its_last_entry",
        RUN_TABLES,
        "run_table",
        ".reshape(len(values), -1).all(1)",
        ".reshape(len(values), -1)[:, -1]",
    ),
    Mutant("runs_take_each_others_numbers", RUN_TABLES, "_by_run", "array.transpose(*of_runs, ...)", "array"),
    Mutant("median_is_best_where_largest", SWEEP_PAGES, "_smallest", "min(compared", "max(compared"),
    Mutant(
        "no_different_by_the_medians",
        SWEEP_PAGES,
        "_smallest",
        "rows[i]['quartiles'][0] <= highest",
        "rows[i]['median'] <= highest",
    ),
    Mutant(
        "no_different_from_the_best_median",
        SWEEP_PAGES,
        "_smallest",
        "rows[best]['quartiles'][1]",
        "rows[best]['median']",
    ),
    Mutant("rows_of_one_run_are_compared", SWEEP_PAGES, "_smallest", "['num_used'] >= FEW", "['num_used'] >= 1"),
    Mutant("runs_not_computed_are_written", SWEEP_PAGES, "csv_of", "values[i] if done else ''", "values[i]"),
    Mutant(
        "out_may_lie_in_the_store",
        SWEEP_PAGES,
        "page_of_store",
        "out.resolve().is_relative_to(store.resolve())",
        "False",
    ),
    Mutant("bands_from_the_median", SWEEP_PICTURES, "plot_sweep", "fill_between(at, low", "fill_between(at, median"),
    Mutant(
        "lines_in_the_order_of_the_axis",
        SWEEP_PICTURES,
        "plot_sweep",
        "of_line.sort(key=lambda group: where[group.at[own]])",
        "pass",
    ),
    Mutant("dots_of_runs_not_finished", SWEEP_PICTURES, "plot_sweep", "output.good &", ""),
    Mutant("every_scale_is_logarithmic", SWEEP_PICTURES, "_is_wide", "WIDE *", ""),
)
