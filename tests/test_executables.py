"""Analyses compile one program for the same functions, settings and shapes, and keep nothing of dropped functions."""

import functools
import gc
import threading
import weakref
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import assert_close, squared_error, usual

import jbptt
from jbptt import Batch, cells, executables, powers
from jbptt.executables import WeakCache

COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: COMPILED.append(name) if "backend_compile" in name else None
)
T, EXAMPLES, SIZE = 6, 2, 3
CELL = cells.gru(SIZE, SIZE)
ESTIMATORS = {
    "full": jbptt.full_bptt(CELL.step, squared_error),
    "randomized": jbptt.randomized_bptt(CELL.step, squared_error, keep_prob=0.5),
}
KEY = jax.random.key(0)


def given(seed, num_steps=T):
    """Parameters, carry and batch of the cell, and carry and inputs of one example."""
    draw = np.random.default_rng(seed).normal
    params = jax.tree.map(lambda a: jnp.asarray(draw(size=a.shape)), jax.eval_shape(CELL.init, KEY))
    xs, targets = draw(size=(2, num_steps, EXAMPLES, SIZE))
    carry = draw(size=(EXAMPLES, SIZE))
    return params, *map(jnp.asarray, (carry, xs, targets, carry[0], xs[:, 0]))


def on_problems(analysis, **options):
    return lambda step, params, carry, xs, targets, *_: analysis(
        step, squared_error, params, carry, Batch(xs, targets), **options
    )


def on_systems(analysis, **options):
    return lambda step, params, carry, xs, targets, one, its: analysis(step, params, one, its, **options)


def on_matrices(analysis, *more):
    return lambda step, params, carry, xs, *_: analysis(np.asarray(params["w_h"])[:, :SIZE], *more)


ANALYSES = {
    "lag_profile": on_problems(jbptt.lag_profile, max_lag=3),
    "lag_profile by leaf": on_problems(jbptt.lag_profile, max_lag=3, per_leaf=True),
    "truncation_curve": on_problems(jbptt.truncation_curve, max_window=3),
    "gradient_flow": on_problems(jbptt.gradient_flow),
    "gradient_sources": on_problems(jbptt.analysis.gradient_sources),
    "adjoints": on_problems(jbptt.adjoints),
    "adjoint_alignment": on_problems(jbptt.analysis.adjoint_alignment, max_lag=2),
    "find_nonfinite": on_problems(jbptt.find_nonfinite),
    "diagnose": on_problems(jbptt.diagnose, measure=False),
    "step_jacobians": on_systems(jbptt.step_jacobians),
    "jacobian_products": on_systems(jbptt.jacobian_products, spans=(1, 3)),
    "lyapunov_spectrum": on_systems(jbptt.lyapunov_spectrum, qr_every=2),
    "gate_paths": lambda step, params, carry, xs, targets, one, its: jbptt.analysis.gate_paths(params, one, its),
    "compare": lambda step, params, carry, xs, targets, *_: jbptt.compare(
        ESTIMATORS, params, carry, Batch(xs, targets), reference="full", key=KEY, num_samples=2
    ),
}
ON_THE_HOST = {
    "measured diagnose": on_problems(jbptt.diagnose, num_repeats=1),
    "diagnose of several": lambda step, params, carry, xs, targets, *_: jbptt.diagnose(
        step, squared_error, params, carry, [Batch(xs, targets), Batch(targets, xs)], num_repeats=1
    ),
    "measure_cost": lambda step, params, carry, xs, targets, *_: jbptt.measure_cost(
        ESTIMATORS, params, carry, Batch(xs, targets), num_repeats=1
    ),
    "choose_plan": on_problems(jbptt.choose_plan, plans=(jbptt.Plan(2), jbptt.Plan(T)), num_repeats=1),
    "optimize_schedule": lambda step, params, carry, xs, *_: jbptt.analysis.optimize_schedule(
        jbptt.LagProfile(None, np.abs(np.asarray(xs)[:, 0, 0])), 2.5
    ),
    "eigenvalues": on_matrices(powers.eigenvalues, 2),
    "alignment": on_matrices(powers.alignment, np.ones(SIZE), 5),
}


def numbers_of(result):
    return [np.asarray(leaf) * 1 for leaf in jax.tree.leaves(result)]  # of flags, too


def compilations(function, *arguments):
    """What it returns, and how many programs were compiled on the way."""
    COMPILED.clear()
    result = jax.block_until_ready(function(*arguments))
    return result, len(COMPILED)


@pytest.mark.parametrize("name", usual(["lag_profile", "jacobian_products"], ANALYSES))
def test_one_program_serves_all_calls(name):
    """Of one shape; its numbers are those of each call's own data, as under jit."""
    run = functools.partial(ANALYSES[name], CELL.step)
    first, second = given(0), given(1)
    # To divide the examples, `diagnose` tries a step first: whether they see each other.
    assert compilations(run, *first)[1] == (2 if name == "diagnose" else 1)
    found, number = compilations(run, *second)
    assert number == 0
    assert_close(numbers_of(found), numbers_of(jax.jit(run)(*second)))


@pytest.mark.parametrize("name", usual(["choose_plan", "alignment"], ON_THE_HOST))
def test_a_second_call_on_the_host_compiles_nothing(name):
    run = functools.partial(ON_THE_HOST[name], CELL.step)
    first = given(0)
    second = [a * (1 + 1e-9) for a in first[1:]]  # for which the same windows are recommended
    run(*first)
    assert compilations(run, first[0], *second)[1] == 0


def plain(w):
    return lambda params, h, x: ((h := jnp.tanh(h @ w * params + x)), h)


@dataclass
class Unhashable:
    w: jax.Array

    def __call__(self, params, h, x):
        return plain(self.w)(params, h, x)


class Owner:
    def __init__(self, w):
        self.w = w

    def step(self, params, h, x):
        return plain(self.w)(params, h, x)


def with_a_rule_of_its_own(w):
    """Its derivative is a function of its own, which closes over w too."""

    @jax.custom_vjp
    def product(h):
        return h @ w

    product.defvjp(lambda h: (h @ w, None), lambda _, bar: (bar @ w.T,))
    return lambda params, h, x: ((h := jnp.tanh(product(h) * params + x)), h)


STEPS = {
    "function": plain,
    "compiled": lambda w: jax.jit(plain(w)),
    "partial": lambda w: functools.partial(lambda w, *given: plain(w)(*given), w),
    "method": lambda w: Owner(w).step,
    "readout": lambda w: cells.with_readout(plain(w), lambda params, h: h @ w),
    "own derivative": with_a_rule_of_its_own,
    "unhashable": Unhashable,
}
BATCH = Batch(*np.random.default_rng(0).normal(size=(2, 4, EXAMPLES, SIZE)))


def adjoints_of(step, loss=squared_error, batch=BATCH):
    return jbptt.adjoints(step, loss, jnp.ones(()), jnp.zeros((EXAMPLES, SIZE)), batch).cotangents


def matrix(seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(SIZE, SIZE)))


@pytest.mark.parametrize("kind", usual(["method"], STEPS))
def test_each_step_has_its_own_numbers_and_frees_its_arrays(kind):
    """What closes over another matrix is another step, also where the first one's place in memory is used again."""
    for seed in range(3):
        w = matrix(seed)
        step, alive = STEPS[kind](w), weakref.ref(w)
        assert_close(adjoints_of(step), jax.jit(lambda s=step: adjoints_of(s))())
        del step, w
        gc.collect()
        assert alive() is None


def test_a_dropped_loss_frees_its_arrays():
    w = matrix(1)
    loss, alive = (lambda y, target, w=w: squared_error(y @ w, target)), weakref.ref(w)
    adjoints_of(plain(matrix(0)), loss)
    del loss, w
    gc.collect()
    assert alive() is None


def test_a_method_is_the_same_whenever_it_is_looked_up():
    owner, step, readout = Owner(matrix(0)), plain(matrix(0)), lambda params, h: 2 * h
    assert owner.step is not owner.step
    for look_up in (lambda: owner.step, lambda: cells.with_readout(step, readout)):
        adjoints_of(look_up())
        assert compilations(adjoints_of, look_up())[1] == 0


@pytest.mark.more("test_a_dropped_loss_frees_its_arrays")
def test_measurements_keep_nothing_either():
    w = matrix(0)
    step, alive = plain(w), weakref.ref(w)
    problem = step, squared_error, jnp.ones(()), jnp.zeros((EXAMPLES, SIZE)), BATCH
    jbptt.choose_plan(*problem, plans=(jbptt.Plan(2),), num_repeats=1)
    jbptt.diagnose(*problem, num_repeats=1)
    del problem, step, w
    gc.collect()
    assert alive() is None


def test_another_shape_is_compiled_once_more():
    step = plain(matrix(0))
    shorter = jax.tree.map(lambda a: a[:3], BATCH)
    adjoints_of(step)
    found, number = compilations(adjoints_of, step, squared_error, shorter)
    assert number == 1
    assert compilations(adjoints_of, step)[1] == 0
    assert_close(found, jax.jit(lambda: adjoints_of(step, batch=shorter))())


@pytest.mark.more("test_what_was_traced_is_not_kept_either")
def test_what_a_step_closes_over_may_be_traced():
    """By one transformation after another, of which none leaves anything behind for the next."""
    owner = Owner(None)

    def size(w):
        owner.w = w
        return sum(jnp.sum(a**2) for a in jax.tree.leaves(adjoints_of(owner.step)))

    w = matrix(0)
    wanted = [jax.jit(lambda scale=scale: size(w * scale))() for scale in (1.0, 2.0)]
    for _ in range(2):
        assert_close(list(jax.vmap(size)(jnp.stack([w, 2 * w]))), wanted)
        slope = jax.grad(size)(w)
        assert_close(slope, jax.jit(jax.grad(size))(w))
    assert_close(size(2 * w), wanted[1])


def test_what_was_traced_is_not_kept_either():
    owner, w = Owner(None), matrix(0)

    def size(w):
        owner.w = w
        return sum(jnp.sum(a**2) for a in jax.tree.leaves(adjoints_of(owner.step)))

    jax.grad(size)(w)
    alive, owner.w, w = weakref.ref(w), None, None
    gc.collect()
    assert alive() is None


def test_steps_that_read_their_numbers():
    """Parameters of `step_jacobians` reach the step as they are: for an `if`, as a count, as a word."""

    def step(params, h, x):
        h = jnp.tanh(h * params["scale"]) if params["scale"] > 0 and params["kind"] == "tanh" else h
        for _ in range(params["times"]):
            h = h * params["scale"]
        return h, h

    carry, xs = jnp.ones(1), jnp.zeros((2, 1))
    for scale, times, kind in ((2.0, 2, "tanh"), (3.0, 2, "tanh"), (np.float64(-3.0), 1, "none"), (2.0, 0, "none")):
        given = {"scale": scale, "times": times, "kind": kind, "function": np.tanh}
        found = jbptt.step_jacobians(step, given, carry, xs)[0]
        assert_close(found, jax.jacobian(lambda h, g=given: step(g, h, None)[0])(carry))


def test_a_cache_forgets_what_was_not_asked_for_longest(monkeypatch):
    monkeypatch.setattr(executables, "MOST", 2)
    cache, made, functions = WeakCache(), [], [lambda i=i: i for i in range(3)]

    def find(i, settings=()):
        return cache.find((functions[i],), settings, lambda function: made.append(i) or [function()])

    assert [find(i) for i in (0, 1, 0, 2, 0)] == [[0], [1], [0], [2], [0]] and made == [0, 1, 2]
    find(1)  # was the third
    assert made == [0, 1, 2, 1]
    assert find(0, "other") is not find(0) and find(0) is find(0)
    made.clear()
    cache.forget(find(0))
    find(0)
    assert made == [0]
    with pytest.raises(TypeError, match="own"):
        cache.find((functions[0],), "fails", lambda function: (_ for _ in ()).throw(TypeError("its own")))


def test_threads_share_a_program():
    step, found = plain(matrix(0)), []
    threads = [threading.Thread(target=lambda: found.append(adjoints_of(step))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_close(found[1:], found[:1] * 2)
