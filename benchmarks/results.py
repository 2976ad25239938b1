"""What a benchmark leaves behind: a JSON with all that explains the numbers, a picture, and a page
of tables.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

FOLDER = Path(__file__).parent / "results"
PACKAGES = ["jbptt", "jax", "jaxlib", "flax", "dm-haiku", "equinox", "torch", "numpy"]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit measured, with a + if files differ from it; None outside a repository."""
    here = Path(__file__).parent
    try:
        name = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=here,
            capture_output=True,
            check=True,
            text=True,
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain", "jbptt"],
            cwd=here.parent,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def circumstances() -> dict[str, Any]:
    """When, where and with what."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "device": jax.devices()[0].device_kind if jax.default_backend() != "cpu" else _processor(),
        "num_devices": jax.device_count(),
        "num_cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "matmul_precision": jax.config.jax_default_matmul_precision,
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
    }


def save(name: str, results: dict[str, Any], figure: Any, page: str, folder: Path) -> Path:
    """Writes NAME.json, NAME.svg and NAME.md; a file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    known = circumstances()
    measured = f"{known['date']}, commit {known['commit']}, {known['device']}"
    measured += f", {known['num_devices']} devices, jax {known['versions']['jax']}"
    heading = f"# {name}\n\n`python -m benchmarks {name}`, {measured}\n\n![{name}]({name}.svg)\n\n"
    for ending, text in {
        ".json": json.dumps({**known, **results}, indent=1),
        ".md": heading + page,
    }.items():
        draft = path.with_suffix(".part")
        draft.write_text(text + "\n")
        draft.replace(path.with_suffix(ending))
    figure.savefig(path.with_suffix(".svg"))
    return path
