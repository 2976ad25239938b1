"""Words that several questions use."""

from collections.abc import Iterable
from typing import Any


def join_words(words: list[str]) -> str:
    """`a, b and c`."""
    words = [word for word in words if word]
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def capital(text: str) -> str:
    """The first letter in upper case."""
    return text[:1].upper() + text[1:]


def cells_of(models: Iterable[dict[str, Any]]) -> str:
    """The cells of some models, each once."""
    return ", ".join(dict.fromkeys(model["cell"] for model in models))
