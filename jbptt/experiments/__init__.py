"""Runs models: tasks, training, and the remedies for vanishing and exploding gradients."""

from typing import TYPE_CHECKING

from jbptt import lazy

if TYPE_CHECKING:
    from jbptt.experiments.outcomes import Remedies
    from jbptt.experiments.remedies import compare_remedies

# Lazy: whoever trains does not wait for what the remedies need.
__getattr__, __dir__, __all__ = lazy.attach(
    __name__, {"outcomes": "Remedies", "remedies": "compare_remedies"}
)
