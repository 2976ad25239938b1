"""Options that a command's two kinds of models share or do not."""

from dataclasses import fields
from typing import Any


def check_belongs(settings: Any, names: tuple[str, ...], whose: str) -> None:
    """A ValueError where one of these options was given, which belong to models of another kind."""
    for field in fields(settings):
        if field.name in names and getattr(settings, field.name) != field.default:
            raise ValueError(
                f"{field.name} belongs to {whose}, got {getattr(settings, field.name)!r}; leave "
                f"--{field.name.replace('_', '-')} out"
            )
