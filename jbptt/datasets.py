"""Results as `xarray` datasets: one variable for each leaf, its axes named."""

from typing import Any

import jax
import numpy as np

from jbptt.types import PyTree


def variables(name: str, tree: PyTree, *dims: str) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """A variable for each leaf of a tree, `name['w']`, or `name` alone for an array.

    Further axes in front, as vmap makes them, are called `axis_0`, `axis_1` and so on.
    """
    found = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        array = np.asarray(leaf)
        front = tuple(f"axis_{i}" for i in range(array.ndim - len(dims)))
        found[name + jax.tree_util.keystr(path)] = ((*front, *dims), array)
    return found


def dataset(*of: dict, coords: dict | None = None, attrs: dict | None = None) -> Any:
    """An `xarray.Dataset` of these variables; needs xarray."""
    import xarray

    merged: dict = {}
    for each in of:
        merged |= each
    return xarray.Dataset(merged, coords, attrs)
