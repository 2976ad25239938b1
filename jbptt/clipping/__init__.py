"""Clipping that neither overflows nor hides what it did: of gradients (optax), of adjoints.

Every state of a transformation is a NamedTuple whose name selects it in any optimizer's state:
`optax.tree.get(opt_state, "LeafNormState").norm`. A field alone,
`optax.tree.get(opt_state, "norm")`, is enough where one transformation has it (optax raises a
KeyError where several do, or a parameter has that name); of two states of one kind,
`optax.tree.get_all_with_path(opt_state, "GlobalNormState")` lists `(path, state)` in the chain's
order.
"""

from typing import TYPE_CHECKING

from jbptt import lazy

if TYPE_CHECKING:
    from jbptt.clipping.cotangents import clip_cotangent
    from jbptt.clipping.transformations import (
        GlobalNormState,
        GradientStatsState,
        LeafNormState,
        ValueState,
        clip_by_global_norm,
        clip_by_leaf_norm,
        clip_by_value,
        gradient_stats,
    )

# Lazy: whoever clips inside a step alone does not wait for optax.
__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "cotangents": "clip_cotangent",
        "transformations": "clip_by_global_norm clip_by_leaf_norm clip_by_value gradient_stats "
        "GlobalNormState GradientStatsState LeafNormState ValueState",
    },
)
