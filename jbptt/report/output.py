"""Files of a report: written beside their folder, then moved into it, all of them or none."""

import json
import os
import signal
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jbptt.report.contents import QUESTIONS, asked, draw_pictures, write_sentences

FILES = ("report.html", "report.json", *(f"{name}.svg" for name in QUESTIONS))


def check_target(target: Path, files: Iterable[str] = FILES) -> None:
    """A ValueError if these files could not be written into `target`; leaves nothing behind.

    Raises:
      ValueError: `target` or a folder above it is a file, or may not be written.
    """
    if str(target) in ("", "."):
        raise ValueError(f"out must name a folder, got {str(target)!r}; pass one like jbptt-report")
    target = _absolute(target)
    if target.exists() and not target.is_dir():
        raise ValueError(f"out must be a folder, got the file {target}; name another folder")
    for name in files:
        if (target / name).is_dir():
            raise ValueError(
                f"out must have room for the file {name}, but {target / name} is a folder; move it "
                "away"
            )
    ancestor = _existing(target)
    if not ancestor.is_dir():
        raise ValueError(
            f"out must be a folder, got {target}, but {ancestor} is a file; name another folder"
        )
    try:
        # Trying tells more than permission bits do: read-only file systems, quotas, the superuser.
        tempfile.TemporaryDirectory(dir=ancestor, prefix=".jbptt-").cleanup()
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(
            f"out must be writable, got {target}: {reason}; name another folder"
        ) from None


def write_report(data: dict[str, Any], target: Path) -> None:
    """Draws and writes every file of a report into `target`; adds `sentences` to `data`.

    Files of an earlier report are replaced one by one once all new ones are complete; others stay.

    Raises:
      OSError: nothing was written.
    """
    from jbptt.report.html import render_page
    from jbptt.report.themes import DARK, LIGHT, repaint

    data["sentences"] = write_sentences(data)
    light = draw_pictures(data, LIGHT)
    dark = {name: repaint(svg, LIGHT, DARK) for name, svg in light.items()}
    mapped = [name for name, section in asked(data).items() if section.has_colour_map]
    dark |= draw_pictures(data, DARK, mapped)
    texts = {f"{name}.svg": svg for name, svg in light.items()}
    texts["report.json"] = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    texts["report.html"] = render_page(data, light, dark)
    write_files(texts, target, FILES)


def write_files(texts: dict[str, str], target: Path, replaced: Iterable[str] = ()) -> None:
    """Writes files into `target`, all of them or none; those of `replaced` that are not written are
    removed.

    Raises:
      OSError: nothing was written.
    """
    target = _absolute(target)
    with _folder_beside(target) as folder:
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8", newline="\n")
        with _undisturbed():
            _move(folder, target, {*texts, *replaced})


def _move(folder: Path, target: Path, names: Iterable[str]) -> None:
    if target.exists():
        for name in names:
            if (folder / name).exists():
                os.replace(folder / name, target / name)
            else:  # of an earlier report that answered more
                (target / name).unlink(missing_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    os.rename(folder, target)


@contextmanager
def _folder_beside(target: Path) -> Iterator[Path]:
    """A folder on the file system of `target`, removed at the end unless it was moved."""
    existing = _existing(target)
    beside = existing.parent if existing == target else existing
    if existing == target and not (
        beside.stat().st_dev == target.stat().st_dev and os.access(beside, os.W_OK)
    ):
        beside = target
    with tempfile.TemporaryDirectory(
        dir=beside, prefix=".jbptt-", ignore_cleanup_errors=True
    ) as outer:
        # One level down, made with the permissions that folders usually get.
        folder = Path(outer) / "report"
        folder.mkdir()
        yield folder


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C waits for the few renames inside."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _absolute(target: Path) -> Path:
    """Links followed, so that a linked folder is filled and not replaced."""
    return Path(os.path.realpath(target))


def _existing(target: Path) -> Path:
    """`target`, or the nearest folder above it that exists."""
    return next(path for path in (target, *target.parents) if path.exists())


def json_text(data: dict[str, Any]) -> str:
    """Every number, as JSON; what is not finite becomes null."""
    return json.dumps(plain_numbers(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def plain_numbers(value: Any) -> Any:
    """Plain Python all the way down; numbers that are not finite become None."""
    if isinstance(value, dict):
        return {str(key): plain_numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_numbers(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return plain_numbers(np.asarray(value).tolist())
    return None if isinstance(value, float) and not np.isfinite(value) else value
