"""clip_cotangent against a Python loop of VJPs that clips, in NumPy, what crosses from step to step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import assert_close, assert_same_bits, make, one_update, usual, usual_rows

from jbptt import (
    Plan,
    adjoints,
    full_bptt,
    gradient_flow,
    jacobian_products,
    lag_profile,
    lyapunov_spectrum,
    step_jacobians,
    train,
    truncated_bptt,
    unroll,
)
from jbptt.clipping import clip_cotangent
from jbptt.clipping.cotangents import clips_cotangents

T = 9


def scaled(leaves, max_norm, num_leading=0):
    """λ · min(1, max_norm / ‖λ‖) over all but the leading axes of all leaves."""
    leaves = [np.asarray(leaf) for leaf in leaves]
    rest = [tuple(range(num_leading, leaf.ndim)) for leaf in leaves]
    norm = np.sqrt(sum(np.sum(np.abs(leaf) ** 2, axis=axes) for leaf, axes in zip(leaves, rest, strict=True)))
    factor = np.minimum(1, max_norm / np.where(norm == 0, 1, norm))
    return [leaf * factor.reshape(factor.shape + (1,) * (leaf.ndim - num_leading)) for leaf in leaves]


CLIPS = {
    "whole": ({"max_norm": 0.7}, functools.partial(scaled, max_norm=0.7)),
    "by example": ({"max_norm": 0.4, "num_leading": 1}, functools.partial(scaled, max_norm=0.4, num_leading=1)),
    "by value": ({"max_value": 0.2}, lambda leaves: [np.clip(leaf, -0.2, 0.2) for leaf in leaves]),
}


def with_clip(step, **options):
    return lambda params, carry, x: step(params, clip_cotangent(carry, **options), x)


@functools.cache
def compiled(step, loss):
    """The step, the derivative of the sum of one step's losses, and the step's VJP."""
    run = lambda params, carry, x: step(params, carry, x)
    y_bar = lambda y, target: jax.grad(lambda y: jnp.sum(loss(y, target)))(y)
    pull = lambda params, carry, x, bars: jax.vjp(lambda w, c: step(w, c, x), params, carry)[1](bars)
    return jax.jit(run), jax.jit(y_bar), jax.jit(pull)


def by_hand(problem, clip, injected=range(T), cut=lambda t: False):
    """(gradient, adjoints) of the sum of the losses `injected`, clipped where a carry enters a step."""
    step, y_bar, pull = compiled(problem.step, problem.loss)
    params, carry, (xs, targets, *_) = problem[2:]
    carries, outputs = [], []
    for x in xs:
        carries.append(carry)
        carry, y = step(params, carry, x)
        outputs.append(y)
    crossing, grad, seen = jax.tree.map(np.zeros_like, carry), jax.tree.map(np.zeros_like, params), []
    for t in reversed(range(T)):
        own = y_bar(outputs[t], targets[t]) * (t in injected)
        more, crossing = pull(params, carries[t], xs[t], (crossing, own))
        grad = jax.tree.map(np.add, grad, more)
        leaves, structure = jax.tree.flatten(crossing)
        crossing = structure.unflatten(clip(leaves))
        seen.append(crossing)
        if cut(t):
            crossing = jax.tree.map(np.zeros_like, crossing)
    return grad, seen[::-1]


def weight_sum(problem):
    return T * problem.batch.targets.shape[1]


def means(tree, problem):
    return jax.tree.map(lambda a: a / weight_sum(problem), tree)


def gradients(estimators, problem):
    """Of a first update of each, compiled together."""
    run = lambda estimator, *arguments: one_update(estimator, *arguments).grads
    return jax.jit(lambda *arguments: [run(estimator, *arguments) for estimator in estimators])(*problem[2:])


def unclipped(leaves):
    return leaves


@pytest.mark.parametrize(
    ("cell", "which"), usual_rows([("lstm", "by example")], [("tanh", "by value"), ("lstm", "by example")])
)
def test_estimators_clip_at_every_step(cell, which):
    """Full, in segments, in blocks; and the clipping matters."""
    problem, (options, clip) = make(cell, T), CLIPS[which]
    step = with_clip(problem.step, **options)
    full, blocks = by_hand(problem, clip)[0], by_hand(problem, clip, cut=lambda t: t % 4 == 0)[0]
    estimators = [
        full_bptt(step, problem.loss),
        full_bptt(step, problem.loss, plan=Plan(4)),
        truncated_bptt(step, problem.loss, window=4),
    ]
    found = gradients(estimators, problem)
    for grads, wanted in zip(found, (full, full, blocks), strict=True):
        assert_close(grads, means(wanted, problem))
    plain = means(by_hand(problem, unclipped)[0], problem)
    assert max(np.max(np.abs(a - b)) for a, b in zip(*map(jax.tree.leaves, (found[0], plain)), strict=True)) > 0.01


def test_windows_that_overlap_clip_each_chunk_by_itself():
    problem, (options, clip) = make("lstm", T), CLIPS["by example"]
    estimator = truncated_bptt(with_clip(problem.step, **options), problem.loss, window=5, stride=2)
    ends = range(1, T + 1, 2)
    chunks = [by_hand(problem, clip, {e - 1, e}, lambda t, e=e: t == e - 4)[0] for e in ends]
    total = jax.tree.map(lambda *parts: sum(parts), *chunks)
    assert_close(gradients([estimator], problem)[0], means(total, problem))


UNROLLED = [("whole", 4), ("by example", None), ("by value", 4)]


@pytest.mark.parametrize(("which", "segment"), usual_rows(UNROLLED[:1], UNROLLED))
def test_differentiated_through_unroll(which, segment):
    """Under jit, scan and checkpoint, with a gate that cuts."""
    problem, (options, clip) = make("lstm", T), CLIPS[which]
    step = with_clip(problem.step, **options)
    gates = jnp.arange(T) % 3 != 0

    @jax.jit
    def gradient(params):
        def total(params):
            _, ys = unroll(step, params, problem.carry, problem.batch.xs, gates=gates, segment=segment)
            return jnp.sum(problem.loss(ys, problem.batch.targets))

        return jax.grad(total)(params)

    assert_close(gradient(problem.params), by_hand(problem, clip, cut=lambda t: t % 3 == 0)[0])


def test_by_example_is_vmap_over_examples():
    problem = make("lstm", T)

    def gradient(params, carry, xs, targets, num_leading):
        step = with_clip(problem.step, max_norm=0.4, num_leading=num_leading)
        total = lambda params: jnp.sum(problem.loss(unroll(step, params, carry, xs)[1], targets))
        return jax.grad(total)(params)

    arguments = (problem.carry, problem.batch.xs, problem.batch.targets)
    together = jax.jit(lambda *a: gradient(problem.params, *a, 1))(*arguments)
    each = jax.jit(jax.vmap(lambda *a: gradient(problem.params, *a, 0), (0, 1, 1)))(*arguments)
    assert_close(together, jax.tree.map(lambda a: a.sum(0), each))


def test_in_a_training_run():
    """The cotangents are clipped, then the gradient; both come through scan and jit."""
    problem, (options, clip) = make("tanh", T), CLIPS["by example"]
    estimator = full_bptt(with_clip(problem.step, **options), problem.loss)
    batches = jax.tree.map(lambda a: a[None], problem.batch)
    params, _ = jax.jit(lambda p: train(estimator, optax.sgd(0.1), p, problem.carry, batches))(problem.params)
    grads = means(by_hand(problem, clip)[0], problem)
    assert_close(params, jax.tree.map(lambda w, g: w - 0.1 * g, problem.params, grads))


# ---- values and cotangents, entry by entry ----


def test_values_pass_bit_for_bit():
    odd = [0.0, -0.0, np.inf, -np.inf, np.nan]
    kinds = ("float16", "bfloat16", "float32", "float64", "complex64")
    tree = {kind: jnp.array([*odd, jnp.finfo(kind).smallest_subnormal], kind) for kind in kinds}
    tree |= {"i": jnp.arange(3), "b": jnp.array(True), "key": jax.random.key(3)}
    for options in ({"max_norm": 1.0}, {"max_norm": 1.0, "num_leading": 0}, {"max_value": 1.0}):
        assert_same_bits(clip_cotangent(tree, **options), tree)
        assert_same_bits(jax.jit(functools.partial(clip_cotangent, **options))(tree), tree)
        floats = {kind: tree[kind] for kind in kinds}
        assert_same_bits(jax.vjp(functools.partial(clip_cotangent, **options), floats)[0], floats)
    nothing = np.zeros(2, jax.dtypes.float0)
    assert clip_cotangent((nothing, 3), 1.0)[0] is nothing
    assert clip_cotangent({}, 1.0) == {}


def test_integers_and_keys_pass_a_differentiated_scan():
    def run(h, key):
        def body(carry, _):
            h, n, key = clip_cotangent(carry, 1.0)
            key, now = jax.random.split(key)
            return (3 * h + 0 * jax.random.uniform(now), n + 1, key), n

        return jax.lax.scan(body, (h, 0, key), length=4)[0][0]

    assert float(jax.grad(run)(1.0, jax.random.key(0))) == 1.0


def pulled(cotangent, **options):
    """What is left of a cotangent that crosses."""
    value = jax.tree.map(jnp.zeros_like, cotangent)
    return jax.jit(lambda c: jax.vjp(functools.partial(clip_cotangent, **options), value)[1](c)[0])(cotangent)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64"])
def test_norms_that_overflow_and_underflow(dtype):
    kind = jnp.finfo(dtype)
    large, small = float(kind.max) / 5, float(kind.smallest_normal) * 8
    for size in (large, small):
        # 3 s and 4 s have the norm 5 s, whose square is beyond the dtype; half of it may pass
        found = pulled({"a": jnp.array([3 * size], dtype), "b": jnp.array(-4 * size, dtype)}, max_norm=2.5 * size)
        np.testing.assert_allclose(np.asarray(found["a"], complex) / size, 1.5, rtol=4 * float(kind.eps))
        np.testing.assert_allclose(np.asarray(found["b"], complex) / size, -2, rtol=4 * float(kind.eps))
        assert found["a"].dtype == jnp.dtype(dtype)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"max_value": 1.0}, {"max_norm": 1.0, "num_leading": 1}])
def test_zero_and_denormal_cotangents_pass(options):
    cotangent = {"a": jnp.zeros((3, 2)), "b": jnp.array([-0.0, 1e-310, 0.0])}
    assert_same_bits(pulled(cotangent, **options), cotangent)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible(bad):
    cotangent = {"a": jnp.array([[3.0, bad], [3.0, 4.0]]), "b": jnp.array([[5.0], [0.0]])}
    assert_same_bits(pulled(cotangent, max_norm=1.0), cotangent)
    by_example = pulled(cotangent, max_norm=1.0, num_leading=1)
    np.testing.assert_allclose(by_example["a"], [[3, bad], [0.6, 0.8]], rtol=1e-15)
    np.testing.assert_array_equal(by_example["b"], [[5], [0]])
    by_value = pulled(cotangent, max_value=3.5)
    np.testing.assert_array_equal(by_value["a"], [[3, bad], [3, 3.5]])
    np.testing.assert_array_equal(by_value["b"], [[3.5], [0]])


def test_complex_cotangents_keep_their_phase():
    found = pulled(jnp.array([3 + 4j, 0.3j]), max_value=1.0)
    np.testing.assert_allclose(found, [0.6 + 0.8j, 0.3j], rtol=1e-15)


# ---- what it is not ----


def test_the_bound_may_be_traced_and_is_not_differentiated():
    slope = jax.jit(jax.grad(lambda h, bound: 5 * clip_cotangent(h, bound), argnums=(0, 1)))
    assert [slope(1.0, bound) for bound in (2.0, 9.0)] == [(2.0, 0.0), (5.0, 0.0)]
    assert jax.vmap(slope, (None, 0))(1.0, jnp.array([2.0, 9.0]))[0].tolist() == [2.0, 5.0]


def test_forward_mode_is_refused_by_name():
    clipped = lambda h: 5 * clip_cotangent(h, 2.0)
    calls = [
        lambda: jax.jvp(clipped, (1.0,), (1.0,)),
        lambda: jax.jacfwd(clipped)(1.0),
        lambda: jax.linearize(clipped, 1.0)[1](1.0),
        lambda: jax.jvp(lambda h: jax.lax.scan(lambda c, _: (clipped(c), None), h, length=2)[0], (1.0,), (1.0,)),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"forward-mode autodiff.*custom_vjp"):
            call()


@pytest.mark.more("test_differentiated_through_unroll")
def test_second_derivatives_are_those_of_the_clipped_gradient():
    def total(h):
        def body(h, _):
            h = clip_cotangent(h, 0.5)
            return jnp.stack([jnp.sin(h[0]) * h[1], 2 * h[1] - h[0] ** 2]), h

        last, hs = jax.lax.scan(body, h, length=3)
        return jnp.sum(last**2) + jnp.sum(hs**3)

    gradient, at, eps = jax.jit(jax.grad(total)), jnp.array([0.3, 0.7]), 1e-5
    assert np.linalg.norm(gradient(at)) == pytest.approx(0.5)  # clipped
    columns = [(gradient(at + eps * e) - gradient(at - eps * e)) / (2 * eps) for e in jnp.eye(2)]
    assert np.linalg.norm(columns[0]) > 0.1
    for second in (jax.jit(jax.jacrev(gradient)), jax.jit(jax.jacfwd(gradient))):
        np.testing.assert_allclose(second(at), np.stack(columns, 1), rtol=1e-7, atol=1e-9)


def test_losses_do_not_add_up():
    slope = jax.grad(lambda h, a: a * clip_cotangent(h, 1.0))
    assert (slope(0.0, 2.0), slope(0.0, 3.0), slope(0.0, 2.0 + 3.0)) == (1.0, 1.0, 1.0)


def test_adjoints_are_clipped_as_those_of_the_mean():
    problem, (_, clip) = make("lstm", T), CLIPS["whole"]
    step = with_clip(problem.step, max_norm=0.7 / weight_sum(problem))
    found = adjoints(step, *problem[1:])
    for t, wanted in enumerate(by_hand(problem, clip)[1]):
        assert_close(jax.tree.map(lambda a, t=t: a[t], found.cotangents), means(wanted, problem))


def test_analyses_by_lag_clip_the_adjoint_of_each_loss():
    problem, (options, clip) = make("tanh", T), CLIPS["by example"]
    arguments = (with_clip(problem.step, **options), *problem[1:])
    alone = np.stack([by_hand(problem, clip, {t})[1] for t in range(T)])  # [t, s, example, H]
    norms = np.linalg.norm(alone, axis=-1)
    assert norms.max() <= 0.4 * (1 + 1e-12) and (norms > 0.39).any() and (norms[norms > 0] < 0.39).any()
    np.testing.assert_allclose(gradient_flow(*arguments), np.sqrt(np.mean(norms**2, -1)), rtol=1e-10, atol=1e-15)
    profile = lag_profile(*arguments, max_lag=4)
    wanted = [np.mean(np.diagonal(norms, -lag)) for lag in range(4)]
    np.testing.assert_allclose(profile.cotangent_norms, wanted, rtol=1e-10)


@pytest.mark.parametrize("inner", usual([jax.jit], [lambda step: step, jax.jit, jax.checkpoint]))
@pytest.mark.parametrize(
    "analysis",
    [step_jacobians, functools.partial(jacobian_products, spans=[2]), jax.jit(lyapunov_spectrum, static_argnums=0)],
)
def test_analyses_of_jacobians_refuse_clipped_rows(analysis, inner):
    problem = make("tanh", T)
    clipped = inner(with_clip(problem.step, max_norm=0.4))
    with pytest.raises(ValueError, match=r"step clips cotangents.*pass the step without it"):
        analysis(clipped, problem.params, problem.carry[0], problem.batch.xs[:, 0])


LOOPS = {
    "scan": lambda f: lambda h: jax.lax.scan(lambda c, _: (f(c), None), h, length=2)[0],
    "while": lambda f: lambda h: jax.lax.fori_loop(0, 2, lambda _, c: f(c), h),
    "cond": lambda f: lambda h: jax.lax.cond(h > 0, f, jnp.sin, h),
    "vmap": lambda f: lambda h: jnp.sum(jax.vmap(f)(h * jnp.ones(3))),
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
}


@pytest.mark.parametrize("inside", LOOPS.values(), ids=LOOPS)
def test_clipping_is_found_in_the_program_itself(inside, monkeypatch):
    """At any depth, not in how the program is printed; an identity with a rule of its own is none."""
    identity = jax.custom_vjp(lambda h: h)
    identity.defvjp(lambda h: (h, None), lambda _, bar: (2 * bar,))
    monkeypatch.setattr(type(jax.make_jaxpr(jnp.sin)(1.0)), "__str__", lambda program: "printed otherwise")
    assert clips_cotangents(inside(lambda h: 2 * clip_cotangent(h, 1.0)), 1.0)
    assert clips_cotangents(inside(lambda h: 2 * clip_cotangent(h, max_value=1.0)), 1.0)
    assert not clips_cotangents(inside(lambda h: 2 * identity(h)), 1.0)


# ---- the border ----


@pytest.mark.parametrize("name", ["max_norm", "max_value"])
@pytest.mark.parametrize("value", [0, -1.0, np.nan, np.inf, "1", True])
def test_bad_bounds(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a finite number > 0, got"):
        clip_cotangent(jnp.zeros(2), **{name: value})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "exactly one of max_norm and max_value must be given"),
        ({"max_norm": 1.0, "max_value": 1.0}, "exactly one of max_norm and max_value must be given"),
        ({"max_norm": 1.0, "num_leading": -1}, "num_leading must be an integer >= 0, got -1"),
        ({"max_norm": 1.0, "num_leading": 1.5}, "num_leading must be an integer >= 0, got 1.5"),
        ({"max_norm": 1.0, "num_leading": 2}, r"num_leading must be at most .* got 2 for tree\['v'\] of shape \(3,\)"),
        ({"max_norm": 1.0, "num_leading": 1}, r"tree\['w'\] has shape \(4, 2\), wanted it to begin with .* \(3,\)"),
        ({"max_value": 1.0, "num_leading": 1}, "num_leading must be 0 with max_value, got 1"),
    ],
)
def test_bad_options(options, words):
    tree = {"n": jnp.zeros((), int), "v": jnp.zeros(3), "w": jnp.zeros((4, 2))}
    with pytest.raises(ValueError, match=words):
        clip_cotangent(tree, **options)
