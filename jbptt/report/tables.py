"""Numbers for people: units, and the tables that the page and the terminal show."""

from typing import Any, NamedTuple

WindowNumbers = dict[str, Any]  # one entry of data["windows"]["models"]
NOT_FINITE = "not finite"


class Table(NamedTuple):
    """A heading for each column, and rows of as many texts."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def format_seconds(seconds: float | None) -> str:
    """`0.00123` as `1.23 ms`."""
    if seconds is None:
        return NOT_FINITE
    scale, unit = next(
        (s, u) for s, u in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")) if seconds >= s or u == "µs"
    )
    return f"{format_number(seconds / scale)} {unit}"


def format_bytes(size: float | None) -> str:
    """`2048` as `2 KiB`."""
    if size is None:
        return "not known"
    units = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
    scale, unit = next((s, u) for s, u in units if size >= s or u == "B")
    return f"{format_number(size / scale)} {unit}"


def format_number(value: float | None) -> str:
    """Three significant digits, thousands with all of theirs."""
    if value is None:
        return NOT_FINITE
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.3g}"


def format_steps(number: float) -> str:
    """`16 steps`, `1 step`."""
    return f"{format_number(number)} step{'s' * (number != 1)}"


def format_half_life(curve: dict[str, Any]) -> str:
    """`2.5 steps`, or that the gradient does not halve."""
    if curve["verdict"] == "non-finite":
        return NOT_FINITE
    return "does not halve" if curve["half_life"] is None else format_steps(curve["half_life"])


def format_perplexity(strategy: dict[str, Any]) -> str:
    """`5.12 ± 0.08` of the last evaluation."""
    if strategy["final_mean"] is None:
        return NOT_FINITE
    spread = strategy["final_std"]
    return f"{strategy['final_mean']:.2f}" + ("" if spread is None else f" ± {spread:.2f}")


def full_cost(model: WindowNumbers) -> dict[str, Any] | None:
    """The measured cost of full BPTT; None if it was not measured."""
    return next((cost for cost in model["costs"] if cost["strategy"] == "full"), None)


def cost_near(model: WindowNumbers, strategy: str, window: int | None) -> dict[str, Any] | None:
    """The cost at `window`, or at the next larger window that was measured."""
    costs = [
        c
        for c in model["costs"]
        if c["strategy"] == strategy and window is not None and c["window"] >= window
    ]
    return min(costs, key=lambda cost: cost["window"], default=None)


def recommended_window(model: WindowNumbers, strategy: str, tolerance: str) -> int | None:
    """The smallest window within the tolerance; None where only full BPTT is."""
    window, full = model[strategy]["recommended"][tolerance], full_cost(model)
    return None if window is None or (full is not None and window >= full["window"]) else window


def format_window(model: WindowNumbers, strategy: str, tolerance: str) -> str:
    """The smallest window within the tolerance; `all 128` where only full BPTT is, `more than 64`
    if unmeasured.
    """
    window, full, last = (
        model[strategy]["recommended"][tolerance],
        full_cost(model),
        model["windows"][-1],
    )
    if window is None:
        return (
            "no number of" if full is not None and last >= full["window"] else f"more than {last}"
        )
    return f"all {window}" if full is not None and window >= full["window"] else f"{window}"


def coverage_table(coverage: dict[str, Any]) -> Table:
    """Pairs and weights of each strategy."""
    rows = []
    for name, matrix in coverage["matrices"].items():
        weights = [weight for row in matrix for weight in row if weight]
        share = coverage["pairs"][name] / max(1, coverage["pairs"]["full"])
        cells = (
            f"{coverage['pairs'][name]:,}",
            f"{100 * share:.0f} %",
            f"{max(weights, default=0):.3g}",
            f"{sum(weights):.4g}",
        )
        rows.append((name, *cells))
    return Table(
        "Pairs covered", ("strategy", "pairs", "share", "largest weight", "sum of weights"), rows
    )


def reach_table(reach: dict[str, Any]) -> Table:
    """Verdict, half-life and reach of each cell, before and after training."""
    columns = (
        "cell",
        "training",
        "verdict",
        "half-life",
        "reach (1 % of lag 0)",
        "norm at lag 0",
        "at the last lag",
    )
    rows = []
    for curve in reach["curves"]:
        far = (
            f"more than {reach['lags'][-1]} steps"
            if curve["reach"] is None
            else format_steps(curve["reach"])
        )
        ends = format_number(curve["norms"][0]), format_number(curve["norms"][-1])
        rows.append(
            (curve["cell"], curve["stage"], curve["verdict"], format_half_life(curve), far, *ends)
        )
    return Table("Gradient norm by lag", columns, rows)


def windows_table(windows: dict[str, Any]) -> Table:
    """The recommended windows and what they cost, beside full BPTT."""
    columns = (
        "cell",
        "strategy",
        "gradient error",
        "window",
        "time",
        "temporary memory",
        "measured at",
    )
    rows = []
    for model in windows["models"]:
        for strategy, name in (("sliding", "sliding"), ("block", "blocks")):
            for tolerance in model[strategy]["recommended"]:
                window = recommended_window(model, strategy, tolerance)
                measured = _time_memory_window(cost_near(model, strategy, window))
                chosen = format_window(model, strategy, tolerance).replace("no number of", "none")
                rows.append(
                    (model["cell"], name, f"≤ {100 * float(tolerance):g} %", chosen, *measured)
                )
        if full := full_cost(model):
            rows.append(
                (
                    model["cell"],
                    "full BPTT",
                    "0",
                    f"all {full['window']}",
                    *_time_memory_window(full),
                )
            )
    return Table("Windows and their cost", columns, rows)


def _time_memory_window(cost: dict[str, Any] | None) -> tuple[str, str, str]:
    if cost is None:
        return "–", "–", "–"
    spread = (
        "" if cost["seconds_spread"] is None else f" ± {format_seconds(cost['seconds_spread'])}"
    )
    return (
        format_seconds(cost["seconds"]) + spread,
        format_bytes(cost["temporary_bytes"]),
        format_steps(cost["window"]),
    )


def learning_table(learning: dict[str, Any]) -> Table:
    """Held-out perplexity of each strategy at the end."""
    columns = ("strategy", "details", "held-out perplexity", "best seed", "worst seed")
    rows = []
    for strategy in learning["strategies"]:
        final = [perplexity for perplexity in strategy["perplexity"][-1] if perplexity is not None]
        ends = (f"{min(final):.2f}", f"{max(final):.2f}") if final else (NOT_FINITE, NOT_FINITE)
        if len(final) < len(strategy["perplexity"][-1]):
            ends = (ends[0], NOT_FINITE)
        rows.append((strategy["name"], strategy["detail"], format_perplexity(strategy), *ends))
    return Table(f"After {learning['characters_read'][-1]:,} characters", columns, rows)


def summary_table(data: dict[str, Any]) -> Table:
    """One row per cell: how far its gradient reaches, and the windows for 10 % and 1 % error."""
    columns = ("cell", "gradient", "half-life", "sliding, 10 %", "1 %", "blocks, 10 %", "1 %")
    after = {curve["cell"]: curve for curve in data["reach"]["curves"] if curve["stage"] == "after"}
    rows = []
    for model in data["windows"]["models"]:
        curve = after[model["cell"]]
        windows = [
            format_window(model, strategy, tolerance).replace("no number of", "none")
            for strategy in ("sliding", "block")
            for tolerance in ("0.1", "0.01")
        ]
        rows.append((model["cell"], curve["verdict"], format_half_life(curve), *windows))
    return Table(
        "After training: half-life of the gradient, window (steps) for an error of", columns, rows
    )
