"""What `jbptt results` prints of a sweep, and the files that it writes."""

import csv
import io
import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from jbptt.report import output as files
from jbptt.report.output import plain_numbers
from jbptt.report.run_tables import (
    REPEATS,
    Output,
    RunTable,
    axes_of,
    distinct,
    grouped,
    is_loss,
    run_table,
    text_of,
)
from jbptt.report.sweep_pictures import MOST_LINES, check_axis, plot_sweep
from jbptt.report.themes import LIGHT, style, to_svg
from jbptt.sweeps import stores

FILES = ("results.csv", "results.json", "results.svg")
NEEDED = ("xarray", "zarr", "icechunk")
MOST_ROWS = 30
MOST_OUTPUTS = 4
MOST_NAMED = 4
"""Rows that are no different from the best one are named up to so many."""
FEW = 4
"""Fewer runs have quartiles that say little."""


def page_of_store(
    store: Path, variable: str | None, x: str | None, out: Path | None, command: str
) -> tuple[str, list[str]]:
    """The page of a sweep that a store holds, and warnings; writes the files that were asked for.

    Raises:
      ValueError: no store, no finished run, an unknown variable or axis; nothing was written.
      OSError: the store cannot be read, or the files not be written.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ValueError(
            f"the results of a sweep need {', '.join(missing)}; install with pip install "
            "'jbptt[sweep]'"
        )
    if out is not None:
        files.check_target(out, FILES)
        if out.resolve().is_relative_to(store.resolve()):
            raise ValueError(f"out must not lie in the store, got {out}; name another folder")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        dataset = _loaded(store)
    damaged = [str(warning.message) for warning in seen if "are damaged" in str(warning.message)]
    table = run_table(dataset)
    if not table.finished.any():
        number = len(table.finished)
        raise ValueError(
            f"{damaged[0]}, and none of the {number:,} is left; call sweep again"
            if damaged
            else f"store {store} holds no finished run of {number:,} yet; wait for its first "
            "chunk, or call sweep again"
        )
    check_axis(table, table.output(variable), x)
    data = {"store": str(store), "command": command} | results_of(table, variable, x)
    if out is not None:
        import matplotlib

        with matplotlib.rc_context(style(LIGHT)):
            picture = to_svg(plot_sweep(dataset, variable, x=x).figure)
        numbers = json.dumps(plain_numbers(data), indent=1, ensure_ascii=False, allow_nan=False)
        texts = csv_of(table), numbers + "\n", picture
        files.write_files(dict(zip(FILES, texts, strict=True)), out)
    return page_of(data), damaged


def _loaded(store: Path) -> Any:
    from icechunk import IcechunkError

    try:
        return stores.loaded(store)
    except IcechunkError as error:
        lines = [line.strip(" x").strip() for line in str(error).splitlines()]  # its list of causes
        reason = next(filter(None, lines), type(error).__name__)
        raise OSError(f"store {store} cannot be read: {reason}; name another") from error


def results_of(table: RunTable, variable: str | None, x: str | None) -> dict[str, Any]:
    """What is printed, as data."""
    shown = [table.output(variable)] if variable is not None else list(table.outputs.values())
    left_out = dict(table.left_out) if variable is None else {}
    return {
        "num_runs": len(table.finished),
        "num_finished": int(table.finished.sum()),
        "num_not_finite": int((table.finished & ~table.finite).sum()),
        "plan": table.plan,
        "is_grid": table.is_grid,
        "axes": {
            name: distinct(table.columns[name])
            for name in table.axes
            if table.is_grid or name != "run"
        },
        "fixed": table.fixed,
        "outputs": [_summary(table, output, x) for output in shown],
        "not_shown": left_out,
    }


def _summary(table: RunTable, output: Output, x: str | None) -> dict[str, Any]:
    """Medians of one output for each combination of axes, and which one is best."""
    first, second = axes_of(table, x if x in table.axes else None, MOST_LINES)
    if not table.is_grid:
        kept = table.axes
    elif REPEATS in table.axes:
        kept = [name for name in table.axes if name != REPEATS]
    else:
        kept = [name for name in table.axes if name in (first, second)]
    counts = {name: len(distinct(table.columns[name])) for name in table.axes}
    groups = grouped(table, output, output.last, kept)
    rows = [
        {
            "at": group.at,
            "median": float(group.median),
            "quartiles": [float(group.low), float(group.high)],
            "num_runs": group.num_runs,
            "num_used": group.num_used,
            "num_not_finite": group.num_not_finite,
            "num_unfinished": group.num_unfinished,
        }
        for group in groups
    ]
    return {
        "name": output.name,
        "entry": output.entry,
        "axes": kept,
        "over": [name for name, count in counts.items() if count > 1 and name not in kept],
        "rows": rows,
        "all_equal": bool(output.good.sum() > 1)
        and len(set(output.last[output.good].tolist())) == 1,
        "smallest": _smallest(rows) if is_loss(output.name) else None,
    }


def _smallest(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of the smallest median, and others whose quartiles overlap with its.

    Rows of few finite runs are set aside where others have more. None in place of those that
    overlap where each row is one run.
    """
    enough = [i for i, row in enumerate(rows) if row["num_used"] >= FEW]
    compared = enough or [i for i, row in enumerate(rows) if row["num_used"]]
    if len(rows) < 2 or not compared:
        return None
    best = min(compared, key=lambda i: rows[i]["median"])
    highest = rows[best]["quartiles"][1]
    alike = [i for i in compared if i != best and rows[i]["quartiles"][0] <= highest]
    single = all(row["num_runs"] == 1 for row in rows)
    aside = [i for i, row in enumerate(rows) if row["num_used"] < FEW] if enough else []
    return {"row": best, "overlapping": None if single else alike, "not_compared": aside}


def page_of(data: dict[str, Any]) -> str:
    """The page, from what `results_of` found."""
    lines = [_counted(data)]
    width = max(map(len, [*data["axes"], *data["fixed"], ""]))
    for name, values in data["axes"].items():
        lines.append(f"  {name:<{width}}  {_short(values)}")
    for name, value in data["fixed"].items():
        lines.append(f"  {name:<{width}}  {text_of(value)} in all runs")
    if data["plan"]:
        plan = data["plan"].split("; ")
        lines += ["Computed " + "; ".join(plan[:3]) + _more(len(plan) - 3, "plans") + "."]
    outputs = data["outputs"]
    if data["is_grid"]:
        for output in outputs[:MOST_OUTPUTS]:
            lines += ["", *_grid_lines(output)]
    else:
        lines += ["", *_run_lines(outputs[:MOST_OUTPUTS])]
    further = [output["name"] for output in outputs[MOST_OUTPUTS:]]
    if further or data["not_shown"]:
        lines.append("")
    if further:
        lines.append(f"Further outputs, each shown by --variable: {', '.join(further)}.")
    for name, why in data["not_shown"].items():
        lines.append(f"Not shown: {name}, as {why}; jbptt.load_sweep reads it.")
    return "\n".join(lines)


def _counted(data: dict[str, Any]) -> str:
    number, finished = data["num_runs"], data["num_finished"]
    done = "all finished" if number == finished else f"{finished:,} finished so far"
    bad = data["num_not_finite"]
    said = f"{bad:,} of them not finite (some output is NaN or infinite)" if bad else "all finite"
    return f"{data['store']}: {number:,} run{'s' * (number != 1)}, {done}, {said}"


def _short(values: list[Any]) -> str:
    """At most eight values of an axis."""
    texts = [text_of(value) for value in values]
    if len(texts) <= 8:
        return ", ".join(texts)
    return f"{', '.join(texts[:5])}, … {texts[-1]} ({len(texts):,} values)"


def _more(number: int, what: str) -> str:
    return f"; {number:,} more {what}" if number > 0 else ""


def _title(output: dict[str, Any]) -> str:
    return output["name"] + (f" ({output['entry']})" if output["entry"] else "")


def _chosen(rows: list[dict[str, Any]], by_median: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows that are printed, and a line on those that are not."""
    if len(rows) <= MOST_ROWS:
        return rows, []
    what, left = f"these are the first {MOST_ROWS}", len(rows) - MOST_ROWS
    if by_median:
        what = f"these {MOST_ROWS} have the smallest values"
        rows = sorted(rows, key=lambda row: (not row["num_used"], row["median"]))
    return rows[:MOST_ROWS], [f"{left:,} more rows are left out; {what}."]


def _grid_lines(output: dict[str, Any]) -> list[str]:
    """The table of one output of a grid, and what holds for its numbers."""
    rows, axes = output["rows"], output["axes"]
    single = all(row["num_runs"] == 1 for row in rows)
    of = "one run each" if single else f"median and quartiles over {', '.join(output['over'])}"
    if output["all_equal"]:
        value = next(row["median"] for row in rows if row["num_used"])
        number = sum(row["num_used"] for row in rows)
        return [f"{_title(output)}: {value:.4g} in all {number:,} finite runs"]
    shown, left_out = _chosen(rows, output["smallest"] is not None)
    cells = [[*axes, output["name"]] if single else [*axes, "median", "quartiles", "runs"]]
    for row in shown:
        at = [text_of(row["at"][name]) for name in axes]
        median, (low, high) = f"{row['median']:.4g}", row["quartiles"]
        if not row["num_used"]:
            of_row = ["not finished" if row["num_unfinished"] else "not finite", ""]
        else:
            of_row = [median, f"{low:.4g} to {high:.4g}"]
        if not single:
            of_row.append(_used(row))
        cells.append([*at, *(of_row[:1] if single else of_row)])
    lines = [f"{_title(output)}: {of}", *_aligned(cells), *left_out]
    bad = sum(row["num_not_finite"] for row in rows)
    if bad:
        lines.append(f"{_runs(bad)} not finite here and left out{'' if single else ' of medians'}.")
    return [*lines, *_best(output, single)]


def _used(row: dict[str, Any]) -> str:
    if row["num_used"] == row["num_runs"]:
        return str(row["num_runs"])
    return f"{row['num_used']} of {row['num_runs']}"


def _runs(number: int) -> str:
    return "1 run is" if number == 1 else f"{number:,} runs are"


def _best(output: dict[str, Any], single: bool) -> list[str]:
    """The smallest median, and which others its quartiles do not tell apart from it."""
    found, rows = output["smallest"], output["rows"]
    if found is None:
        return []
    best = rows[found["row"]]
    where, value = _at(best), f"{best['median']:.4g}"
    if single:
        return [
            f"Smallest {output['name']}: {value} at {where}; one run each says nothing of the "
            "spread between runs."
        ]
    said = f"Smallest median: {value} at {where}"
    if lost := best["num_not_finite"]:
        said += f", where {lost} of {best['num_runs']} runs {'is' if lost == 1 else 'are'} left out"
    lines = [said + "."]
    if found["overlapping"]:
        named = _named(rows, found["overlapping"])
        lines.append(f"Quartiles overlap those of the smallest median: {named}.")
    elif len(rows) - len(found["not_compared"]) > 1:
        lines.append("No other quartiles overlap with its.")
    if aside := found["not_compared"]:
        lines.append(
            f"Not compared, with fewer than {FEW} finished and finite runs: {_named(rows, aside)}."
        )
    if best["num_used"] < FEW:
        lines.append(f"Fewer than {FEW} runs in each row: quartiles of so few say little.")
    return lines


def _named(rows: list[dict[str, Any]], which: list[int]) -> str:
    more = len(which) - MOST_NAMED
    said = " | ".join(_at(rows[i]) for i in which[:MOST_NAMED])
    return said + (f" and {more:,} more" if more > 0 else "")


def _at(row: dict[str, Any]) -> str:
    return ", ".join(f"{name}={text_of(value)}" for name, value in row["at"].items())


def _run_lines(outputs: list[dict[str, Any]]) -> list[str]:
    """The table of plain points, a row for each run, and the best of each loss."""
    axes, first = outputs[0]["axes"], outputs[0]
    numbered = [row | {"place": i} for i, row in enumerate(first["rows"])]
    shown, left_out = _chosen(numbered, first["smallest"] is not None)
    cells = [[*axes, *map(_title, outputs)]]
    for row in shown:
        values = [_value(output["rows"][row["place"]]) for output in outputs]
        cells.append([*(text_of(row["at"][name]) for name in axes), *values])
    best = [line for output in outputs for line in _best(output, single=True)]
    return [*_aligned(cells), *left_out, *best]


def _value(row: dict[str, Any]) -> str:
    if row["num_unfinished"]:
        return "not finished"
    return f"{row['median']:.4g}" if row["num_used"] else "not finite"


def _aligned(rows: list[list[str]]) -> list[str]:
    """Columns as wide as what stands in them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(f"{text:<{w}}" for text, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def csv_of(table: RunTable) -> str:
    """One line for each run: what it was of, whether it is finished and finite, its numbers.

    Of an output with an axis of its own the last entry stands there, as `loss[step=99]`. Outputs
    of a run that is not finished are empty.
    """
    columns: dict[str, np.ndarray] = {}
    for name, values in table.columns.items():
        if values.ndim == 1:
            columns[name] = values
        else:
            parts = values.reshape(len(values), -1).T
            columns |= {f"{name}[{i}]": part for i, part in enumerate(parts)}
    number = len(table.finished)
    columns |= {name: np.full(number, value) for name, value in table.fixed.items()}
    columns |= {"finished": table.finished, "finite": table.finished & table.finite}
    outputs = {}
    for output in table.outputs.values():
        entry = f"[{output.own}={text_of(output.places[-1])}]" if output.own else ""
        outputs[output.name + entry] = output.last
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, *outputs])
    for i in range(number):
        done = bool(table.finished[i])
        writer.writerow(
            [
                *(values[i] for values in columns.values()),
                *(values[i] if done else "" for values in outputs.values()),
            ]
        )
    return text.getvalue()
