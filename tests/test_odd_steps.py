"""Steps that hold what the engine has no rule for: callbacks, refs, kernels, a mapping over devices.

Such an equation runs as it is. Inner jit, checkpoint, cond, scan, relu and sparse products are in
tests/test_weights.py. Run as a program it takes the mappings over all devices there are.
"""

import os
import subprocess
import sys
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback
from jax.experimental import pallas as pl
from jax.sharding import Mesh, PartitionSpec
from problems import assert_close, cut, one_update, squared_error, usual

from jbptt import Batch, Plan, cells, full_bptt, truncated_bptt

NUM_STEPS, WINDOW, EXAMPLES, HIDDEN = 7, 3, 2, 4
NUMBERS = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(NUMBERS.normal(size=shape) / 2)


PARAMS = {"w": draw(HIDDEN, HIDDEN), "b": draw(HIDDEN)}
CARRY = draw(EXAMPLES, HIDDEN)
BATCH = Batch(draw(NUM_STEPS, EXAMPLES, HIDDEN), draw(NUM_STEPS, EXAMPLES, HIDDEN))


def with_rule(product):
    """`h @ w` by `product(a, b)`, and its derivative by the same: JAX differentiates neither."""
    function = jax.custom_vjp(product)
    function.defvjp(
        lambda h, w: (product(h, w), (h, w)),
        lambda kept, bar: (product(bar, kept[1].T), product(kept[0].T, bar)),
    )
    return function


@jax.custom_jvp
def dense_forward(h, w):
    return h @ w


@dense_forward.defjvp
def _(primals, tangents):
    (h, w), (dh, dw) = primals, tangents
    return h @ w, dh @ w + h @ dw


def shape_of_product(a, b):
    return jax.ShapeDtypeStruct((a.shape[0], b.shape[1]), a.dtype)


def in_a_kernel(a, b):
    """`a @ b` in a Pallas kernel."""

    def kernel(a, b, out):
        out[...] = a[...] @ b[...]

    return pl.pallas_call(kernel, shape_of_product(a, b), interpret=True)(a, b)


def on_the_host(vmap_method, a, b):
    """`a @ b` in NumPy."""
    product = lambda a, b: np.asarray(a) @ np.asarray(b)
    return jax.pure_callback(product, shape_of_product(a, b), a, b, vmap_method=vmap_method)


def plain(product):
    """A tanh network whose recurrent product is `product(h, w)`."""

    def step(p, h, x):
        h = jnp.tanh(x + product(h, p["w"]) + p["b"])
        return h, h

    return step


def fori_loop(h, w):
    return jax.lax.fori_loop(0, 2, lambda i, h: jnp.sin(h @ w) + i, h)


def shard_map(check_vma):
    """Examples divided over the devices, the weight whole on each, and a sum over all devices."""
    mesh = Mesh(np.array(jax.devices()[:EXAMPLES]), ("d",))
    rows, whole = PartitionSpec("d"), PartitionSpec()

    def product(h, w):
        return h @ w + jax.lax.psum(jnp.sum(h, 0), "d")

    specs = {"in_specs": (rows, whole), "out_specs": rows}
    return jax.shard_map(product, mesh=mesh, check_vma=check_vma, **specs)


SEEN = []


def handed_back(number):
    SEEN.append(float(number))
    return np.asarray(number) / 2


def ordered_io_callback(h, w):
    """The host hands a factor back; JAX has no derivative of the call."""
    number = jax.lax.stop_gradient(h[0, 0])
    return h @ w * io_callback(handed_back, jax.ShapeDtypeStruct((), h.dtype), number, ordered=True)


def associative_scan(h, w):
    """A linear recurrence over the hidden units, in parallel."""
    combine = lambda one, other: (one[0] * other[0], other[0] * one[1] + other[1])
    return jax.lax.associative_scan(combine, (jnp.tanh(h @ w), h @ w), axis=1)[1]


def mutable_ref(h, w):
    """Buffers made of a weight and of a constant, written and read back: new ones in each step."""
    weight, total = jax.new_ref(w), jax.new_ref(jnp.zeros_like(h))
    weight[0] = jnp.sin(weight[1]) * h[0]
    total[...] += h @ weight[...]
    return total[...]


def barrier(h, w):
    h, w = jax.lax.optimization_barrier((h, w))
    return h @ w


def named(h, w):
    """Names, outside of a checkpoint and inside one whose policy keeps by name."""
    step = lambda h, w: checkpoint_name(jnp.sin(checkpoint_name(h @ w, "product")), "sine")
    policy = jax.checkpoint_policies.save_only_these_names("product")
    return step(jax.checkpoint(step, policy=policy)(h, w), w)


def convolution(h, w):
    """The hidden units as a line of cells, each seen by as many filters."""
    axes = {"dimension_numbers": ("NWC", "WIO", "NWC")}
    found = jax.lax.conv_general_dilated(h[..., None], w[:, None], (1,), "SAME", **axes)
    return jnp.sum(jnp.sin(found), axis=-1)


def of_the_weights_alone(h, w):
    """What the engine takes out of the loop."""
    made = jnp.tanh(with_rule(partial(on_the_host, None))(w, w))
    return h @ mutable_ref(shard_map(check_vma=True)(made, w), w)


STEPS = {
    "custom_vjp": plain(with_rule(jnp.matmul)),
    "custom_jvp": plain(dense_forward),
    "fori_loop": plain(fori_loop),
    "shard_map": plain(shard_map(check_vma=True)),
    "shard_map without check_vma": plain(shard_map(check_vma=False)),
    "pallas_call": plain(with_rule(in_a_kernel)),
    "pure_callback": plain(with_rule(partial(on_the_host, None))),
    "pure_callback under vmap": plain(with_rule(partial(on_the_host, "sequential"))),
    "ordered io_callback": plain(ordered_io_callback),
    "associative_scan": plain(associative_scan),
    "mutable ref": plain(mutable_ref),
    "convolution": plain(convolution),
    "checkpoint_name": plain(named),
    "optimization_barrier": plain(barrier),
    "the weights alone": plain(of_the_weights_alone),
}


class Way(NamedTuple):
    """An estimator, the first step that each loss reaches, and how many steps it is run on."""

    make: Any
    starts: list
    num_steps: int = NUM_STEPS


FIRST = [0] * NUM_STEPS
BLOCKS = [0, 0, 0, 3, 3, 3, 6]
WAYS = {
    "one segment": Way(full_bptt, FIRST),
    "segments": Way(partial(full_bptt, plan=Plan(WINDOW)), FIRST),
    "blocks": Way(partial(truncated_bptt, window=WINDOW), BLOCKS[:6], 6),
    "blocks with a rest": Way(partial(truncated_bptt, window=WINDOW), BLOCKS),
    "sliding": Way(partial(truncated_bptt, window=WINDOW, stride=1), [0, 0, 0, 1, 2, 3, 4]),
}
# One that divides examples, one with a rule of its own, the host, an array that changes, weights.
USUAL = {"ordered io_callback"}
SEEN_ELSEWHERE = {"custom_jvp", "fori_loop"}  # in tests/test_weights.py: relu, and an inner scan
# JAX has no rule for them under vmap, which puts the steps of overlapping windows side by side.
NEVER_SIDE_BY_SIDE = {
    "pure_callback": (NotImplementedError, r"vmap.*callback"),
    "ordered io_callback": (ValueError, "Cannot `vmap` ordered IO callback"),
}


def reference(step):
    """Loss and gradients of a plain loop, of any way: one program.

    No `lax.scan`, whose gradient is wrong where a step makes a ref of what all steps share.
    """

    @jax.jit
    def one(params, carry, weights, is_cut):
        """Losses by their weights; where there is a cut, the carry that enters is a constant."""

        def total(params, carry):
            ys = []
            for t, x in enumerate(BATCH.xs):
                carry = jnp.where(is_cut[t], jax.lax.stop_gradient(carry), carry)
                carry, y = step(params, carry, x)
                ys.append(y)
            return jnp.sum(weights[:, None] * squared_error(jnp.stack(ys), BATCH.targets))

        return jax.value_and_grad(total, (0, 1))(params, carry)

    def of(way):
        """One run for each first step, with the losses that reach back to it."""
        starts = np.array(way.starts + [NUM_STEPS] * (NUM_STEPS - way.num_steps))
        runs = []
        for start in sorted(set(way.starts)):
            weights = (starts == start) / (way.num_steps * EXAMPLES)
            is_cut = (np.arange(NUM_STEPS) == start) & (start > 0)
            value, (grads, carry_grads) = one(PARAMS, CARRY, weights, is_cut)
            runs.append((value, grads, carry_grads))
        return jax.tree.map(lambda *parts: sum(parts), *runs)

    return of


@pytest.mark.parametrize("name", usual(USUAL, STEPS, full=SEEN_ELSEWHERE))
def test_gradient_of_a_step_with(name):
    """In one segment, in several, in blocks with a rest and without; in overlapping windows."""
    step, wanted = STEPS[name], reference(STEPS[name])
    for kind, way in WAYS.items():
        if kind == "sliding" and name in NEVER_SIDE_BY_SIDE:
            continue  # see the next test
        update = jax.jit(partial(one_update, way.make(step, squared_error)))
        found = update(PARAMS, CARRY, cut(BATCH, 0, way.num_steps))
        assert_close((found.loss, found.grads, found.info["carry_grads"]), wanted(way))


@pytest.mark.parametrize("name", NEVER_SIDE_BY_SIDE)
def test_without_a_rule_under_vmap(name):
    """JAX's own error where the way is side by side or the user says so; else one after another."""
    error, words = NEVER_SIDE_BY_SIDE[name]
    step, blocks = STEPS[name], partial(truncated_bptt, STEPS[name], squared_error, window=2)
    core = lambda p, h, x: (h + x, h + x)
    with_readout = cells.with_readout(core, lambda p, y: step(p, y, y)[1])
    for estimator in (
        blocks(stride=1),
        blocks(plan=Plan(parallel_windows=2)),
        full_bptt(with_readout, squared_error),  # all readouts of a segment at once
    ):
        with pytest.raises(error, match=words):
            one_update(estimator, PARAMS, CARRY, cut(BATCH, 0, 6))

    # So many blocks of a single example go side by side where no one says and the step allows it.
    single = jax.tree.map(lambda a: jnp.resize(a, (32, 1, HIDDEN)), BATCH)
    run = lambda way: jax.jit(partial(one_update, way))(PARAMS, CARRY[:1], single)
    found, wanted = run(blocks()), run(blocks(plan=Plan(parallel_windows=1)))
    assert_close((found.loss, found.grads), (wanted.loss, wanted.grads))


@pytest.mark.parametrize(
    ("kind", "order"),
    [
        ("one segment", [0, 1, 2, 3, 4, 5, 6]),
        ("segments", [0, 1, 2, 3, 4, 5, 6, 3, 4, 5, 0, 1, 2]),
        ("blocks", [0, 1, 2, 3, 4, 5]),
    ],
)
def test_ordered_effects_keep_their_order(kind, order):
    """Once a step and in order; once more, in order again, where a segment is computed again."""
    way, step = WAYS[kind], STEPS["ordered io_callback"]
    _, carries = jax.lax.scan(lambda h, x: (step(PARAMS, h, x)[0], h), CARRY, BATCH.xs)
    jax.effects_barrier()
    SEEN.clear()
    update = jax.jit(partial(one_update, way.make(step, squared_error)))
    jax.block_until_ready(update(PARAMS, CARRY, cut(BATCH, 0, way.num_steps)))
    jax.effects_barrier()
    np.testing.assert_allclose(SEEN, carries[np.array(order), 0, 0], rtol=1e-12)


def on_all_devices():
    for name in ("shard_map", "shard_map without check_vma"):
        test_gradient_of_a_step_with(name)
    print(f"agree on {jax.device_count()} devices")


@pytest.mark.full
def test_examples_on_two_devices():
    """Devices are counted before JAX starts, so in another process."""
    same_package = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment = os.environ | same_package | {"JAX_NUM_CPU_DEVICES": "2", "JAX_ENABLE_X64": "1"}
    command = [sys.executable, __file__]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "agree on 2 devices" in process.stdout


if __name__ == "__main__":
    on_all_devices()
