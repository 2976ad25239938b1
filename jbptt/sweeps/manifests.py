"""What a store says of its sweep, and whether a later call asks for the same."""

import json
import warnings
from hashlib import sha256
from typing import Any

import jax
import numpy as np

from jbptt.sweeps.points import Runs
from jbptt.sweeps.programs import Job, number_settings
from jbptt.sweeps.results import Results

FORMAT = 1
MOST_VALUES = 256
"""Of a coordinate, in the manifest, of which each commit has a copy."""
CHANGED = ("refuse", "keep", "restart")


def manifest_of(runs: Runs, results: Results, job: Job, version: Any) -> dict[str, Any]:
    """What a store says of its sweep; what must be the same in a later call stands in `sweep`."""
    return {
        "format": FORMAT,
        "sweep": {
            "dims": runs.dims,
            "points": {
                name: {"dims": list(dims), **_values(np.asarray(values))}
                for name, (dims, values) in runs.coords.items()
            },
            "static": sorted(runs.combinations[0].settings),
            "key": [list(job.key[0]), job.key[1]],
            "outputs": {
                name: {
                    "dims": list(results.dims[name]),
                    "shape": list(values.shape[1:]),
                    "dtype": values.dtype.name,
                }
                for name, values in results.arrays.items()
            },
        },
        "version": version,
        "numbers": number_settings(),
        "made_with": made_with(),
    }


def _values(values: np.ndarray) -> dict[str, Any]:
    """The values themselves, or of many numbers what tells them from others."""
    dtype = {"dtype": values.dtype.str}
    if values.size <= MOST_VALUES or values.dtype.kind == "U":
        return dtype | {"values": values.tolist()}
    return dtype | {"shape": list(values.shape), "sha256": sha256(values.tobytes()).hexdigest()}


def made_with() -> dict[str, str]:
    """The packages and the device that numbers come from, beside the settings."""
    from importlib.metadata import version

    from jbptt import __version__

    device = jax.devices()[0]
    return {
        "jbptt": __version__,
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "device": f"{device.platform} {device.device_kind}",
    }


def check_same(before: dict, now: dict, words: str, changed: str) -> None:
    """Refuses another sweep, and what was changed unless that is to be kept; warns of the rest."""
    now = json.loads(json.dumps(now))
    if lines := _differences(before["sweep"], now["sweep"]):
        raise ValueError(
            f"{words} is of another sweep: {'; '.join(lines)}. Name another store, or pass "
            'changed="restart" to begin anew (what it held stays in its history)'
        )
    lines = [
        line
        for name in ("version", "numbers")
        for line in _differences({name: before[name]}, {name: now[name]})
    ]
    if lines and changed == "refuse":
        raise ValueError(
            f'{words} was made with other settings: {"; ".join(lines)}. Pass changed="keep" to '
            'go on with what it holds, changed="restart" to begin anew, or name another store'
        )
    if lines := _differences(before["made_with"], now["made_with"]):
        warnings.warn(
            f"{words} was begun elsewhere: {'; '.join(lines)}. What is computed now may be rounded "
            "otherwise",
            stacklevel=3,
        )


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """What differs, line by line, at most five."""
    lines: list[str] = []
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            if before.get(key) != now.get(key) or (key in before) != (key in now):
                own = f"{name}.{key}" if name else key
                lines += _differences(before.get(key), now.get(key), own)
        if not lines and list(before) != list(now):
            lines.append(f"{name} in the order {list(now)}, before {list(before)}")
    elif before != now:
        lines.append(f"{name} is {_short(now)}, was {_short(before)}")
    return lines[:5]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:40]} … {text[-15:]}"
