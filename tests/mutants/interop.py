"""Models of other libraries."""

from . import Mutant
from .rooms import CALLS, EQUINOX, HAIKU, LINEN, NNX

INTEROP = (
    Mutant("interop_keeps_raw_keys", CALLS, "typed_key", "jax.random.wrap_key_data(key)", "key"),
    Mutant(
        "interop_takes_learned_starts",
        CALLS,
        "unlearned",
        "any(dependences",
        "not any(dependences",
    ),
    Mutant(
        "interop_tokens_without_a_width",
        CALLS,
        "first_shape",
        "*(jax.tree.leaves(input_shapes(input_size))[0].shape or (1,))",
        "*jax.tree.leaves(input_shapes(input_size))[0].shape",
    ),
    Mutant(
        "interop_repeats_along_the_last_axis",
        CALLS,
        "carry_fn",
        "(*batch_shape, *a.shape)",
        "(*a.shape, *batch_shape)",
    ),
    Mutant("nnx_shares_its_variables", NNX, "from_nnx", "_copy(trees)", "trees"),
    Mutant("nnx_streams_stand_still", NNX, "from_nnx", "params_t, streams_t", "params_t, _"),
    Mutant("nnx_reseeds_nothing", NNX, "_reseeded", "calls.holds_keys(a)", "False"),
    Mutant(
        "nnx_takes_every_change",
        NNX,
        "_check_unchanged",
        "changed or graph != graph_t",
        "changed and graph != graph_t",
    ),
    Mutant("linen_uses_one_key_twice", LINEN, "from_linen", "key_t, *used", "_, *used"),
    Mutant(
        "linen_drops_its_constants",
        LINEN,
        "from_linen",
        "**constants, 'params': live",
        "'params': live",
    ),
    Mutant("linen_lets_state_stand_still", LINEN, "from_linen", "DenyList('params')", "False"),
    Mutant("interop_refuses_what_is_only_shown", CALLS, "frozen_state", "i in read and", ""),
    Mutant(
        "haiku_drops_a_state_of_apply",
        HAIKU,
        "from_haiku",
        "if kept:",
        "if not kept and state:",
    ),
    Mutant(
        "haiku_draws_the_same_each_step",
        HAIKU,
        "from_haiku",
        "(inner, key_t)",
        "(inner, carry[1])",
    ),
    Mutant("haiku_swaps_its_pair", HAIKU, "_core_step", "(carry, y)", "(y, carry)"),
    Mutant("equinox_draws_with_what_it_hands_on", EQUINOX, "from_equinox", "key=used", "key=key_t"),
    Mutant(
        "equinox_shares_a_key",
        EQUINOX,
        "from_equinox",
        "jax.random.split(key if new is None",
        "jnp.broadcast_to(key if new is None",
    ),
    Mutant(
        "equinox_keeps_its_own_parameters",
        EQUINOX,
        "to_equinox",
        "params, module",
        "module, params",
    ),
    Mutant("equinox_hands_on_the_cell_state", EQUINOX, "_call_cell", "carry[0]", "carry[1]"),
)
