"""Reads gradients: how far they reach, and what each truncation leaves of them.

The analyses that most users want are at the top, `jbptt.lag_profile` and so on; the others are
here.
"""

from typing import TYPE_CHECKING

from jbptt import lazy

if TYPE_CHECKING:
    from jbptt.analysis.alignment import AdjointAlignment, adjoint_alignment
    from jbptt.analysis.flow import GradientSources, gradient_sources
    from jbptt.analysis.gate_jacobians import GatePaths, gate_paths
    from jbptt.analysis.window_lengths import Schedule, optimize_schedule

# Lazy: one analysis does not wait for what the others need.
__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "alignment": "AdjointAlignment adjoint_alignment",
        "flow": "GradientSources gradient_sources",
        "gate_jacobians": "GatePaths gate_paths",
        "window_lengths": "Schedule optimize_schedule",
    },
)
