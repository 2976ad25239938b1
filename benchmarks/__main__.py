"""The command line: `python -m benchmarks WHAT [--quick] [--device cpu|gpu] [--out FOLDER]`.

WHAT is speed, scan, memory, analysis, sweep, online, agreement or accuracy.
"""

import importlib
import os
from pathlib import Path
from typing import Annotated, Literal

import tyro


def main(
    what: Annotated[
        Literal["speed", "scan", "memory", "analysis", "sweep", "online", "agreement", "accuracy"],
        tyro.conf.Positional,
    ],
    /,
    quick: bool = False,
    device: Literal["cpu", "gpu"] = "cpu",
    out: Path | None = None,
) -> None:
    """Measures, checks, and writes NAME.json, NAME.svg and NAME.md.

    Args:
      what: the benchmark.
      quick: few and small cases, to see that it runs; its results go to `quick-NAME` and are not to
        be cited.
      device: where. On CPU every core becomes a device, so that ours and theirs can be divided over
        them.
      out: the folder; None: benchmarks/results.
    """
    if device == "gpu":
        os.environ.setdefault(
            "XLA_PYTHON_CLIENT_PREALLOCATE", "false"
        )  # PyTorch needs room beside JAX
    import jax

    jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda"}[device])
    if device == "cpu":
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    else:
        jax.config.update(
            "jax_default_matmul_precision", "highest"
        )  # float32, not TF32, for everyone
    from benchmarks import results

    measured, figure, page = importlib.import_module(f"benchmarks.{what}").run(quick)
    path = results.save(
        f"quick-{what}" if quick else what, measured, figure, page, out or results.FOLDER
    )
    print(page)
    print(path)


if __name__ == "__main__":
    tyro.cli(main)
