"""Names that a package imports when first asked for: a program waits for what it uses alone."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def attach(
    package: str, homes: Mapping[str, str], modules: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package, for its `__init__`.

    Type checkers read none of it: they need the same names as imports under `TYPE_CHECKING`.

    Args:
      package: its `__name__`.
      homes: which of its modules has which names, separated by spaces: `{"plans": "Plan"}`.
      modules: public modules by name, and where they are below the package.
    """
    home_of = {name: home for home, names in homes.items() for name in names.split()}
    modules = modules or {}
    public = sorted({*home_of, *modules})

    def __getattr__(name: str) -> Any:
        if name in home_of:
            value = getattr(importlib.import_module(f"{package}.{home_of[name]}"), name)
        elif name in modules:
            value = importlib.import_module(f"{package}.{modules[name]}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)
        return value

    return __getattr__, lambda: public, public
