"""Models of other libraries."""

from tests.mutants import Mutant

CALLS = "jbptt/interop/calls.py"
NNX = "jbptt/interop/nnx.py"
LINEN = "jbptt/interop/linen.py"
HAIKU = "jbptt/interop/haiku.py"
EQUINOX = "jbptt/interop/equinox.py"

INTEROP = (
    Mutant(
        "interop_keeps_raw_keys",
        CALLS,
        "return jax.random.wrap_key_data(key)",
        "return key",
    ),
    Mutant("interop_takes_learned_starts", CALLS, "if any(dependences(", "if not any(dependences("),
    Mutant("interop_tokens_without_a_width", CALLS, "[0].shape or (1,))", "[0].shape)"),
    Mutant("interop_repeats_along_the_last_axis", CALLS, "(*batch_shape, *a.shape)", "(*a.shape, *batch_shape)"),
    Mutant(
        "nnx_shares_its_variables",
        NNX,
        "params, streams, constants = _copy(trees)",
        "params, streams, constants = trees",
    ),
    Mutant(
        "nnx_streams_stand_still", NNX, "graph_t, params_t, streams_t, constants_t", "graph_t, params_t, _, constants_t"
    ),
    Mutant("nnx_reseeds_nothing", NNX, "jax.random.split(k, a.shape) if calls.is_key(a) else a", "a"),
    Mutant("nnx_takes_every_change", NNX, "if changed or graph != graph_t:", "if changed and graph != graph_t:"),
    Mutant("linen_uses_one_key_twice", LINEN, "key_t, *used = jax.random", "_, *used = jax.random"),
    Mutant("linen_drops_its_constants", LINEN, '{**constants, "params": live}', '{"params": live}'),
    Mutant("linen_lets_state_stand_still", LINEN, 'DenyList("params")}', "False}"),
    Mutant("interop_refuses_what_is_only_shown", CALLS, "if i in read and path in written", "if path in written"),
    Mutant("haiku_drops_a_state_of_apply", HAIKU, "if kept:", "if not kept and state:"),
    Mutant("haiku_draws_the_same_each_step", HAIKU, "return (inner, key_t), y", "return (inner, carry[1]), y"),
    Mutant("haiku_swaps_its_pair", HAIKU, "    return carry, y\n", "    return y, carry\n"),
    Mutant("equinox_draws_with_what_it_hands_on", EQUINOX, "run(*args, key=used)", "run(*args, key=key_t)"),
    Mutant(
        "equinox_shares_a_key",
        EQUINOX,
        "jax.random.split(key if new is None else new, batch_shape)",
        "jnp.broadcast_to(key if new is None else new, batch_shape)",
    ),
    Mutant("equinox_keeps_its_own_parameters", EQUINOX, "eqx.combine(params, module)", "eqx.combine(module, params)"),
    Mutant("equinox_hands_on_the_cell_state", EQUINOX, "carry, carry[0] if", "carry, carry[1] if"),
)
