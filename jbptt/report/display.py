"""What the terminal shows at the end of a study: its numbers."""

from pathlib import Path
from typing import Any

from jbptt.report.tables import Table, learning_table, summary_table


def print_summary(data: dict[str, Any], target: Path) -> None:
    """The numbers that matter most, and where the report is."""
    from rich.console import Console

    console = Console()
    for table in (summary_table(data), learning_table(data["learning"])):
        shown, width = _rich_table(table)
        console.print(shown, width=max(console.width, width), crop=False)
    print(f"Report: {target / 'report.html'}")


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
