"""A diagnosis as numbers with names and axes."""

from typing import Any

import numpy as np

from jbptt.datasets import dataset, variables
from jbptt.diagnosis.advice import SHARES, TOLERANCES
from jbptt.diagnosis.block_windows import candidate_windows

SCALARS = ("loss", "constant_loss", "gradient_norm", "num_used_steps")


def diagnosis_dataset(found: Any) -> Any:
    """A `Diagnosis` as an `xarray.Dataset`; needs xarray."""
    found, coords, attrs = named_numbers(found)
    return dataset(found, coords=coords, attrs=attrs)


def named_numbers(found: Any) -> tuple[dict, dict, dict]:
    """The numbers of a `Diagnosis`, named as there, its cost among them: `(axes, array)` each.

    And the coordinates of the axes; verdict, decision and advice as attributes.
    """
    decay, flow, curve = (part._asdict() for part in (found.decay, found.flow, found.curve))
    dynamics = {name: of for name, of in found.dynamics._asdict().items() if of is not None}
    dynamics["exponent_spread"], dynamics["exponent_error"] = (
        dynamics.pop("spread"),
        dynamics.pop("error"),
    )
    interval = decay.pop("half_life_interval")
    by_example, leaf_arrives = flow.pop("by_example"), flow.pop("leaf_arrives")
    num_lags, windows = flow.pop("num_lags"), np.asarray(curve.pop("windows"))
    front = np.ndim(found.loss)
    examples = [f"example_{i}" for i in range(np.ndim(by_example) - front - 1)]
    scalars = (
        decay
        | dynamics
        | found.units._asdict()
        | {"num_lags": num_lags, "told": found.windows.told}
    )
    scalars |= {name: getattr(found, name) for name in SCALARS}
    by_lag = flow | found.profile._asdict()
    by_window = curve | {"upper_error": found.windows.upper_error}
    by_tolerance = {
        "sliding_window": found.windows.sliding,
        "block_window": found.windows.block,
        "block_error": found.windows.block_error,
    }
    sorts = (
        (scalars, ()),
        (by_lag, ("lag",)),
        (by_window, ("window",)),
        (by_tolerance, ("error",)),
    )
    variable = [variables(name, of, *dims) for group, dims in sorts for name, of in group.items()]
    variable += [
        variables("leaf_arrives", leaf_arrives, "lag", "leaf"),
        variables("arrives_by_example", by_example, "lag", *examples),
        variables("part_norms", found.part_norms, "part"),
        variables("half_life_interval", interval, "bound"),
    ]
    variable += [
        variables("blocks_upper_error", found.windows.blocks_upper_error, "block"),
        variables("sources", found.windows.sources, "share"),
    ]
    coords = {
        "lag": np.arange(np.shape(flow["arrives"])[-1]),
        "leaf": list(found.carry_names),
        "block": candidate_windows(found.num_steps),
        "share": list(SHARES),
        "window": windows.reshape(-1, windows.shape[-1])[0],
        "error": list(TOLERANCES),  # `tolerance` is a word of xarray's own
    }
    attrs = {"num_steps": found.num_steps}
    if front == 0:
        attrs |= {"verdict": found.verdict, "decision": found.decision}
        attrs["advice"] = [str(advice) for advice in found.advice]
    if found.cost is not None:
        variable += found.cost.variables
        coords["estimator"] = list(found.cost.names)
    return {name: pair for each in variable for name, pair in each.items()}, coords, attrs
