"""Runs models: tasks, training, and the remedies for vanishing and exploding gradients side by side."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jbptt.experiments.remedies import Remedies, compare_remedies

__all__ = ["Remedies", "compare_remedies"]


def __getattr__(name: str) -> Any:
    # When first asked for, so that whoever trains does not wait for what the remedies need.
    if name not in __all__:
        raise AttributeError(f"module 'jbptt.experiments' has no attribute {name!r}")
    from jbptt.experiments import remedies

    return getattr(remedies, name)


def __dir__() -> list[str]:
    return __all__
