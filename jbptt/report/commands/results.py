"""`jbptt results`: what a store of a sweep holds."""

import sys
from pathlib import Path
from typing import Any

from jbptt.report import interruption, sweep_pages
from jbptt.report.commands.errors import UsageError


def run_results(store: Path, *, out: Path | None = None, **options: Any) -> int:
    """Prints what a store holds, and writes what was asked for. Raises: UsageError."""
    try:
        with interruption.unfinished(f"the results of {store} were not shown to the end"):
            page, warned = sweep_pages.page_of_store(Path(store), out=out, **options)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    for line in warned:
        print(f"jbptt: {line}", file=sys.stderr)
    print(page)
    return 0
