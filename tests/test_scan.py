"""`jbptt.scan` against `lax.scan`: values, gradients in all that moves, under every transformation."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from problems import usual

import jbptt
from jbptt import engine, scan, unroll
from jbptt.arrays import align_leading

T, B, H, D = 7, 3, 4, 2
SEGMENTS = usual([3], [None, 1, 3, 7], full=[1, 7])


def draw(number, *shape):
    return jnp.asarray(np.random.default_rng(number).normal(size=shape))


ARGUMENTS = {
    "w": draw(0, H, H) / 2,
    "u": draw(1, D, H),
    "table": draw(2, 5, H),
    "h0": draw(3, B, H),
    "xs": draw(4, T, B, D),
}
TOKENS = jnp.asarray(np.random.default_rng(5).integers(0, 5, size=(T, B)))


def plain(p, carry, x):
    h = jnp.tanh(carry["h"] @ p["w"] + x @ p["u"])
    return {"h": h, "n": carry["n"] + 1}, (h, carry["n"])


def shared(p, carry, x):
    """Several products with one weight, one of them transposed, a look-up, and other uses of the same weight."""
    h = jnp.tanh(carry["h"] @ p["w"] + (x @ p["u"]) @ p["w"].T) + p["table"][carry["n"] % 5] * p["w"][0]
    return {"h": h, "n": carry["n"] + 1}, (h @ p["w"], carry["n"])


def inner(p, carry, x):
    """A scan, a cond and a checkpoint inside."""
    h, _ = lax.scan(lambda h, _: (jnp.sin(h @ p["w"]), None), carry["h"], length=2)
    h = lax.cond(carry["n"] % 2 == 0, lambda h: h * p["w"][1], lambda h: h + x @ p["u"], h)
    return {"h": jax.checkpoint(jnp.tanh)(h + x @ p["u"]), "n": carry["n"] + 1}, (h, carry["n"])


@jax.custom_vjp
def halved(h):
    return h


halved.defvjp(lambda h: (h, None), lambda _, bar: (bar / 2,))


def custom(p, carry, x):
    h = halved(jax.nn.relu(carry["h"] @ p["w"] + x @ p["u"]))
    return {"h": h, "n": carry["n"] + 1}, (h, carry["n"])


STEPS = {step.__name__: step for step in (plain, shared, inner, custom)}


def loss_of(scanned, step, p):
    """Attention over the outputs, a loss on the last carry, and a weight that is used outside the loop too."""
    carry, (ys, counts) = scanned(partial(step, p), {"h": p["h0"], "n": jnp.array(0)}, p["xs"])
    attention = jax.nn.softmax(jnp.einsum("tbh,bh->tb", ys, carry["h"]), axis=0)
    return jnp.sum(attention[..., None] * (ys @ p["w"])) + jnp.sum(carry["h"] ** 2) + counts[-1]


def assert_same(found, wanted, tolerance=1e-12):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), found, wanted)


@pytest.mark.parametrize("reverse", usual([True], [False, True]))
@pytest.mark.parametrize("segment", SEGMENTS)
@pytest.mark.parametrize("name", usual(["plain"], STEPS))
def test_value_and_gradient(name, segment, reverse):
    def run(scanned, **options):
        scanned = partial(scanned, reverse=reverse, **options)
        return jax.jit(jax.value_and_grad(lambda p: loss_of(scanned, STEPS[name], p)))(ARGUMENTS)

    assert_same(run(scan, segment=segment), run(lax.scan))


@pytest.mark.parametrize("reverse", usual([False], [False, True]))
@pytest.mark.parametrize("name", usual(["plain"], STEPS))
def test_values_are_those_of_the_scan_bit_for_bit(name, reverse):
    carry = {"h": ARGUMENTS["h0"], "n": jnp.array(0)}
    found, wanted = (
        jax.jit(partial(s, partial(STEPS[name], ARGUMENTS), reverse=reverse))(carry, ARGUMENTS["xs"])
        for s in (scan, lax.scan)
    )
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    assert jax.tree.map(jax.typeof, found) == jax.tree.map(jax.typeof, wanted)


@pytest.mark.parametrize("segment", SEGMENTS)
@pytest.mark.parametrize("per_example", usual([True], [False, True]))
def test_gates_and_mask_are_those_of_unroll(per_example, segment):
    gates = jnp.array([1.0, 0.5, 0.0, 2.0, 1.0, 0.0, -1.0])
    mask = jnp.array([True, True, False, True, False, True, True])
    if per_example:
        gates, mask = gates[:, None] * jnp.array([1.0, 0.0, 0.3]), mask[:, None] & (draw(6, T, B) < 1)
    p = {**ARGUMENTS, "xs": jnp.where(align_leading(mask, 3), ARGUMENTS["xs"], jnp.nan)}

    def run(scanned):
        return jax.jit(jax.value_and_grad(lambda p: loss_of(scanned, plain, p)))(p)

    def unrolled(f, init, xs):
        return unroll(lambda _, carry, x: f(carry, x), (), init, xs, gates=gates, mask=mask)

    found, wanted = run(partial(scan, gates=gates, mask=mask, segment=segment)), run(unrolled)
    assert_same(found, wanted)
    assert np.isfinite(found[1]["xs"]).all()


def test_gates_backwards_in_time():
    gates, flipped = jnp.linspace(0, 1.5, T), jax.tree.map(jnp.flip, jnp.linspace(0, 1.5, T))

    def loss(p, scanned):
        return loss_of(scanned, plain, p)

    def by_hand(f, init, xs):
        carry, ys = unroll(lambda _, carry, x: f(carry, x), (), init, jnp.flip(xs, 0), gates=flipped)
        return carry, jax.tree.map(lambda a: jnp.flip(a, 0), ys)

    assert_same(*(jax.grad(loss)(ARGUMENTS, s) for s in (partial(scan, gates=gates, reverse=True), by_hand)))


def test_a_window_is_a_gate_every_so_many_steps():
    gates = jnp.arange(T) % 3 != 0

    def cut(f, init, xs):
        carry, ys = init, []
        for t in range(T):
            carry = jax.tree.map(lax.stop_gradient, carry) if t % 3 == 0 else carry
            carry, y = f(carry, xs[t])
            ys.append(y)
        return carry, jax.tree.map(lambda *a: jnp.stack(a), *ys)

    assert_same(*(jax.grad(lambda p, s=s: loss_of(s, plain, p))(ARGUMENTS) for s in (partial(scan, gates=gates), cut)))


@pytest.mark.more("test_the_second_derivative_of_a_gated_gradient_is_that_of_its_numbers")
@pytest.mark.parametrize("segment", [None, 2])
def test_second_derivatives(segment):
    direction = jax.tree.map(jnp.cos, ARGUMENTS)

    def curvature(scanned, order, step):
        gradient = jax.grad(lambda p: loss_of(scanned, step, p))
        along = lambda p: sum(map(jnp.vdot, jax.tree.leaves(gradient(p)), jax.tree.leaves(direction)))
        if order == "reverse":
            return jax.jit(jax.grad(along))(ARGUMENTS)
        return jax.jit(lambda p: jax.jvp(gradient, (p,), (direction,))[1])(ARGUMENTS)

    for step in (plain, shared):
        wanted = curvature(lax.scan, "reverse", step)
        for order in ("reverse", "forward"):
            assert_same(curvature(partial(scan, segment=segment), order, step), wanted, 1e-11)


def test_the_second_derivative_of_a_gated_gradient_is_that_of_its_numbers():
    gates = jnp.array([1.0, 0.5, 0.0, 1.0, 0.3, 1.0, 1.0])

    def gradient(w):
        return jax.grad(lambda p: loss_of(partial(scan, gates=gates), plain, p))({**ARGUMENTS, "w": w})["w"]

    direction, gap = jnp.cos(ARGUMENTS["w"]), 1e-3
    found = jax.jvp(gradient, (ARGUMENTS["w"],), (direction,))[1]
    at = [gradient(ARGUMENTS["w"] + k * gap * direction) for k in (-2, -1, 1, 2)]
    assert_same(found, (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * gap), 1e-8)


def test_forward_mode_alone_is_refused():
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda p: loss_of(scan, plain, p), (ARGUMENTS,), (ARGUMENTS,))


@pytest.mark.parametrize("segment", usual([3], [None, 3]))
def test_under_vmap_of_parameters_carries_and_inputs(segment):
    def gradient(scanned, which):
        own = {name: jnp.stack([a, jnp.cos(a)]) if name in which else a for name, a in ARGUMENTS.items()}
        axes = ({name: 0 if name in which else None for name in own},)
        return jax.jit(jax.vmap(jax.grad(lambda p: loss_of(scanned, shared, p)), in_axes=axes))(own)

    for which in (("w",), ("h0",), ("xs", "u"), tuple(ARGUMENTS)):
        assert_same(gradient(partial(scan, segment=segment), which), gradient(lax.scan, which))


@pytest.mark.parametrize("segment", usual([3], [None, 3]))
def test_inside_a_scan_a_checkpoint_and_a_cond(segment):
    def gradient(scanned):
        def outer(h, _):
            (h, _), ys = scanned(lambda c, x: ((jnp.tanh(c[0] @ w + x @ p["u"]), c[1]), c[0]), (h, 0), p["xs"])
            return h, jnp.sum(ys)

        def loss(arguments):
            nonlocal p, w
            p, w = arguments, arguments["w"]
            h, sums = lax.scan(jax.checkpoint(outer), p["h0"], length=2)
            return jnp.sum(h) + lax.cond(sums[0] > 0, lambda: outer(h, None)[1], lambda: 0.0) + sums.sum()

        p = w = None
        return jax.jit(jax.grad(loss))(ARGUMENTS)

    assert_same(gradient(partial(scan, segment=segment)), gradient(lax.scan))


def test_one_step_no_inputs_and_none():
    w = ARGUMENTS["w"]

    def loss(scanned, length):
        def gradient(w):
            h, nothing = scanned(lambda h, _: (jnp.tanh(h @ w), None), ARGUMENTS["h0"], None, length)
            assert nothing is None
            return jnp.sum(h**2)

        return jax.value_and_grad(gradient)(w)

    for length in (0, 1, 5):
        assert_same(loss(scan, length), loss(lax.scan, length))


def test_keys_and_integers_in_the_carry_and_among_what_is_closed_over():
    def loss(scanned, w, key):
        def f(carry, token):
            h, key = carry
            key, own = jax.random.split(key)
            h = jnp.tanh(h @ w + w[TOKENS[0, token % B] % H]) * jax.random.bernoulli(own, 0.7, h.shape)
            return (h, key), h + jax.random.normal(jax.random.fold_in(fixed, token), h.shape)

        (h, _), ys = scanned(f, (ARGUMENTS["h0"], key), jnp.arange(T))
        return jnp.sum(h) + jnp.sum(ys**2)

    fixed = jax.random.key(5)
    for run in (jax.jit, lambda function: function):
        gradients = (run(jax.value_and_grad(partial(loss, s))) for s in (scan, lax.scan))
        assert_same(*(gradient(ARGUMENTS["w"], jax.random.key(3)) for gradient in gradients))


def test_a_weakly_typed_carry_is_promoted_and_a_wrong_one_refused_as_by_lax():
    found, wanted = (s(lambda c, x: (c * x, c), 1, jnp.arange(3.0)) for s in (scan, lax.scan))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    with pytest.raises(TypeError, match="carry"):
        scan(lambda c, x: (c[None], c), jnp.ones(2), jnp.ones(3))
    with pytest.raises(ValueError, match="disagree on T"):
        scan(lambda c, x: (c, c), 0.0, {"a": jnp.ones(3), "b": jnp.ones(2)})
    with pytest.raises(ValueError, match="segment"):
        scan(lambda c, x: (c, c), 0.0, jnp.ones(3), segment=0)
    with pytest.raises(ValueError, match="gates"):
        scan(lambda c, x: (c, c), jnp.ones(2), jnp.ones(3), gates=jnp.ones((3, 5)))


def test_what_no_loss_reads_has_no_cotangent():
    """A norm at 0 that is watched, in the outputs and in the carry, and a metric: as in lax.scan, no NaN."""

    def loss(scanned, w):
        def f(carry, x):
            h = jnp.tanh(carry["h"] * w + x)
            return {"h": h, "watched": jnp.sqrt(0 * h)}, {"y": h, "norm": jnp.linalg.norm(0 * h)}

        _, ys = scanned(f, {"h": jnp.ones(2), "watched": jnp.zeros(2)}, jnp.ones((5, 2)))
        return jnp.max(ys["y"])

    for segment in (None, 2):
        found, wanted = (jax.grad(partial(loss, s))(0.5) for s in (partial(scan, segment=segment), lax.scan))
        assert np.isfinite(found)
        assert_same(found, wanted)


def test_weight_gradients_add_up_in_float32():
    """256 equal contributions of a half-precision weight: bfloat16 alone would stop adding at 2^8."""
    w, xs = jnp.ones((1, 1), jnp.bfloat16), jnp.ones((1024, 1, 1), jnp.bfloat16)

    def loss(w):
        _, ys = scan(lambda h, x: (h, x @ w), jnp.zeros((), jnp.bfloat16), xs)
        return jnp.sum(ys.astype(jnp.float32))

    assert float(jax.grad(loss)(w)[0, 0]) == 1024


def test_a_mutable_array_from_outside():
    ref = jax.new_ref(jnp.zeros(()))

    def f(h, x):
        ref[...] += 1
        return h + x, h

    scan(f, 0.0, jnp.arange(3.0))
    assert float(ref[...]) == 3
    with pytest.raises(ValueError, match="mutable array"):
        scan(f, 0.0, jnp.arange(3.0), gates=jnp.ones(3))


def test_no_leaked_tracers_and_nothing_recompiled():
    gradient = jax.jit(jax.grad(lambda p: loss_of(partial(scan, segment=3), shared, p)))
    with jax.checking_leaks(), warnings.catch_warnings(action="error"):
        first = gradient(ARGUMENTS)
    again = gradient(jax.tree.map(lambda a: a + 0, ARGUMENTS))
    assert_same(first, again)
    assert gradient._cache_size() == 1


@pytest.mark.parametrize("segment", usual([3], [None, 3]))
@pytest.mark.parametrize("check_vma", usual([True], [False, True]))
def test_in_a_shard_map(check_vma, segment):
    from jax.sharding import AxisType
    from jax.sharding import PartitionSpec as P

    mesh = jax.make_mesh((1,), ("batch",), axis_types=(AxisType.Auto,))
    specs = {"w": P(), "u": P(), "table": P(), "h0": P("batch"), "xs": P(None, "batch")}

    def gradient(scanned):
        def own(p):
            return jax.grad(lambda p: loss_of(scanned, shared, p))(p)

        return jax.jit(jax.shard_map(own, mesh=mesh, in_specs=(specs,), out_specs=specs, check_vma=check_vma))(
            ARGUMENTS
        )

    assert_same(gradient(partial(scan, segment=segment)), gradient(lax.scan))


@pytest.mark.parametrize("segment", usual([2], [None, 2]))
@pytest.mark.parametrize("reads", usual(["one of the ys"], ["the carry", "one of the ys", "one leaf of the carry"]))
def test_unread_leaves_where_devices_differ(reads, segment):
    """What stands for a cotangent that is zero is placed as the others are: no plain engine, no TypeError."""
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    def loss(scanned, w, h, xs):
        def f(carry, x):
            return (jnp.tanh(carry[0] @ w + x), carry[1] * carry[0] + x), (jnp.sin(carry[0]), carry[1])

        carry, ys = scanned(f, (h, h), xs)
        return {"the carry": carry[0] + carry[1], "one of the ys": ys[0], "one leaf of the carry": carry[0]}[
            reads
        ].sum()

    given = ARGUMENTS["w"], ARGUMENTS["h0"], draw(6, T, B, H)
    specs = P(), P("batch"), P(None, "batch")
    wanted = jax.grad(partial(loss, lax.scan), argnums=(0, 1, 2))(*given)

    def gradient(*given):
        return jax.grad(partial(loss, partial(scan, segment=segment)), argnums=(0, 1, 2))(*given)

    mesh = jax.make_mesh((1,), ("batch",), axis_types=(AxisType.Auto,))
    assert_same(jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=specs))(*given), wanted)
    with jax.set_mesh(jax.make_mesh((1,), ("batch",), axis_types=(AxisType.Explicit,))) as explicit:
        placed = [
            jax.device_put(a, NamedSharding(jax.sharding.get_mesh(), s)) for a, s in zip(given, specs, strict=True)
        ]
        del explicit
        assert_same(jax.device_get(jax.jit(gradient)(*placed)), jax.device_get(wanted))


def test_nothing_leaks_where_jax_traces_for_itself():
    def last(w):
        return scan(lambda c, x: (c * w + x, c), 0.0, jnp.ones(3))[0]

    with jax.checking_leaks():
        for function in (jax.checkpoint(last), jax.jit(last), lambda w: lax.cond(w > 0, last, lambda w: w, w)):
            assert_same(jax.grad(function)(2.0), 5.0)  # w² + w + 1


def test_any_number_of_examples():
    """A symbolic batch is cut like any other; a symbolic T is left to lax.scan."""

    def gradient(w, h, xs):
        return jax.grad(lambda w: jnp.sum(scan(lambda c, x: (jnp.tanh(c @ w + x), c), h, xs)[0]))(w)

    shapes = jax.export.symbolic_args_specs(
        (ARGUMENTS["w"], ARGUMENTS["h0"], draw(6, T, B, H)), ("4,4", "b,4", "7,b,4")
    )
    exported = jax.export.export(jax.jit(gradient))(*shapes)
    given = ARGUMENTS["w"], ARGUMENTS["h0"], draw(6, T, B, H)
    assert_same(exported.call(*given), gradient(*given))
    shapes = jax.export.symbolic_args_specs(given, ("4,4", "b,4", "t,b,4"))
    assert_same(jax.export.export(jax.jit(gradient))(*shapes).call(*given), gradient(*given))


def test_slips_are_answered():
    with pytest.raises(TypeError, match="scan body output must be a pair"):
        scan(lambda c, x: c, jnp.ones(2), jnp.ones(3))
    with pytest.raises(ValueError, match="length"):
        scan(lambda c, x: (c, x), jnp.ones(2))
    with pytest.raises(ValueError, match="disagree on T"):
        scan(lambda c, x: (c, x), jnp.ones(2), jnp.ones((0, 2)), gates=jnp.ones(3))


def test_it_is_public():
    assert jbptt.scan is scan


@pytest.mark.filterwarnings("ignore:the plain engine runs")
@pytest.mark.parametrize("engine_is_fast", [True, False])
def test_a_length_of_numpy_and_one_known_from_the_mask_alone(engine_is_fast, monkeypatch):
    """Gates and mask count, whatever says how many steps there are; the carry is promoted as in lax.scan."""
    if not engine_is_fast:
        monkeypatch.setattr(engine, "fast", None)
    mask = jnp.array([True, False, False])
    for length in (3, np.int64(3), None):
        carry, ys = jbptt.scan(lambda c, _: (c * 2.0, c), jnp.array(1.0), None, length, mask=mask)
        assert float(carry) == 2 and ys.tolist() == [1, 0, 0]
    gated = jax.grad(lambda h: jbptt.scan(lambda c, _: (c * 2.0, c), h, None, np.int64(3), gates=jnp.zeros(3))[0])
    assert float(gated(1.0)) == 0
    assert float(jbptt.scan(lambda c, _: (c * 1.5, c), 1, mask=mask)[0]) == 1.5


def test_gates_and_mask_need_a_known_length():
    f = lambda c, x: (c + x, c)
    (symbolic,) = jax.export.symbolic_shape("T")
    shapes = (jax.ShapeDtypeStruct((symbolic,), float),)
    for options in ({"mask": jnp.ones(4, bool)}, {"gates": jnp.ones(4)}, {"segment": 2}):
        with pytest.raises(ValueError, match="length must be an integer that is known while tracing"):
            jax.export.export(jax.jit(lambda xs, o=options: jbptt.scan(f, 0.0, xs, **o)))(*shapes)
    with pytest.raises(ValueError, match=r"length must be an integer that is known while tracing.*got 3\.0"):
        jbptt.scan(f, 0.0, jnp.ones(3), 3.0, mask=jnp.ones(3, bool))
