"""What the terminal shows at the end of a study: its numbers."""

from pathlib import Path
from typing import Any

from jbptt.report.questions.learning import study_of
from jbptt.report.questions.window_costs import format_window
from jbptt.report.tables import Table, format_half_life


def print_summary(data: dict[str, Any], target: Path) -> None:
    """The numbers that matter most, and where the report is."""
    from rich.console import Console

    if "windows" in data:
        shown, width = _rich_table(summary_table(data))
        console = Console()
        console.print(shown, width=max(console.width, width), crop=False)
    print(study_of(data["learning"]))
    print(f"Report: {target / 'report.html'}")


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


def _rich_table(table: Table) -> tuple[Any, int]:
    """The table, and the width under which words would be cut; a terminal that is narrower breaks
    its lines.
    """
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(title=Text(table.title), title_justify="left", box=box.SIMPLE_HEAD)
    columns = zip(table.columns, *table.rows, strict=True)
    widths = [max(len(word) for text in column for word in text.split()) for column in columns]
    for heading, width in zip(table.columns, widths, strict=True):
        shown.add_column(Text(heading), min_width=width)
    for row in table.rows:
        shown.add_row(*map(Text, row))
    return shown, sum(widths) + 3 * len(widths) + 1
