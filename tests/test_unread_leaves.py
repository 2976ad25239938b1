"""What no loss reads has no cotangent, as in JAX: a derivative of it that is not finite does no harm."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import ESTIMATORS
from problems import assert_close, one_update, usual

from jbptt import (
    Batch,
    adjoints,
    cells,
    diagnose,
    find_nonfinite,
    gradient_flow,
    lag_profile,
    truncation_curve,
)
from jbptt.analysis import adjoint_alignment, gradient_sources

NUM_STEPS, EXAMPLES = 6, 2
XS = jnp.linspace(0.1, 1.0, NUM_STEPS * EXAMPLES * 2).reshape(NUM_STEPS, EXAMPLES, 2)
START = jnp.ones((EXAMPLES, 2))
PARAMS = {"w": jnp.asarray(0.5)}


def spread(h):
    """0, with a derivative that is not finite."""
    return jnp.sqrt(jnp.sum((h - h) ** 2, axis=-1))


def plain(p, h, x):
    h = jnp.tanh(p["w"] * h + x)
    return h, h


def watched_carry(p, carry, x):
    h, y = plain(p, carry[0], x)
    return (h, spread(h)), y


def watched_twice(p, carry, x):
    """One unread leaf feeds another."""
    h, y = plain(p, carry[0], x)
    return (h, spread(h), carry[1] + jnp.log(carry[2] * 0)), y


def watched_output(p, h, x):
    h, y = plain(p, h, x)
    return h, (y, spread(h))


def squared(y, target):
    return jnp.sum(y**2, -1)


def of_first(y, target):
    return jnp.sum(y[0] ** 2, -1)


def with_aux(y, target):
    return jnp.sum(y[0] ** 2, -1), y[1]


def stopped(y, target):
    return jnp.sum(y[0] ** 2, -1) + jax.lax.stop_gradient(y[1])


core_that_watches = cells.with_readout(plain, lambda p, h: (h, spread(h)))
PROBLEMS = {
    "leaf of the carry": (watched_carry, squared, (START, jnp.zeros(EXAMPLES))),
    "leaf that an unread leaf reads": (watched_twice, squared, (START, *[jnp.ones(EXAMPLES)] * 2)),
    "leaf of y": (watched_output, of_first, START),
    "leaf of y, aux of the loss": (watched_output, with_aux, START),
    "leaf of y that the loss stops": (watched_output, stopped, START),
    "compiled step": (jax.jit(watched_carry), squared, (START, jnp.zeros(EXAMPLES))),
    "compiled loss": (watched_output, jax.jit(of_first), START),
    "output of a readout": (core_that_watches, of_first, START),
    "inner loop": (
        lambda p, c, x: (jax.lax.scan(lambda c, _: watched_carry(p, c, x), c, length=1)[0], plain(p, c[0], x)[1]),
        squared,
        (START, jnp.zeros(EXAMPLES)),
    ),
}


@pytest.mark.parametrize("name", usual(["leaf of y, aux of the loss", "output of a readout"], PROBLEMS))
def test_estimators(name):
    """Every estimator gives what it gives for the step without the leaf."""
    step, loss, carry = PROBLEMS[name]
    batch, key = Batch(XS), jax.random.key(0)
    names = ["segments", "ragged blocks", "strides", "adaptive", "randomized"] if name == "leaf of y" else ["segments"]
    for way in names if name != "leaf of the carry" else ESTIMATORS:
        make = ESTIMATORS[way].make
        found = jax.jit(partial(one_update, make(step, loss)))(PARAMS, carry, batch, key)
        wanted = jax.jit(partial(one_update, make(plain, squared)))(PARAMS, START, batch, key)
        assert_close(found.grads, wanted.grads)


ANALYSES = {
    "curve": partial(truncation_curve, max_window=3),
    "flow": gradient_flow,
    "sources": gradient_sources,
}


@pytest.mark.more("test_estimators")
@pytest.mark.parametrize("name", usual(["output of a readout"], ["leaf of the carry", "output of a readout"]))
def test_analyses(name):
    step, loss, carry = PROBLEMS[name]
    for analyse in ANALYSES.values():
        found, wanted = analyse(step, loss, PARAMS, carry, Batch(XS)), analyse(plain, squared, PARAMS, START, Batch(XS))
        assert_close(found, wanted)
    assert np.all(np.isfinite(adjoint_alignment(step, loss, PARAMS, carry, Batch(XS), max_lag=2)[0]))
    found, wanted = (
        lag_profile(*args, PARAMS, start, Batch(XS), max_lag=3)
        for args, start in (((step, loss), carry), ((plain, squared), START))
    )
    assert_close(found, wanted)
    cotangents = jax.tree.leaves(adjoints(step, loss, PARAMS, carry, Batch(XS)).cotangents)
    assert_close(cotangents[0], adjoints(plain, squared, PARAMS, START, Batch(XS)).cotangents)
    assert not any(np.any(c) for c in cotangents[1:])
    assert not find_nonfinite(step, loss, PARAMS, carry, Batch(XS)).found
    assert diagnose(step, loss, PARAMS, carry, Batch(XS), measure=False).verdict != "non-finite"


def test_what_is_read_is_still_named():
    """The same leaf, read by the loss: the gradient is not finite, and the search says so."""
    loss = lambda y, target: jnp.sum(y[0] ** 2, -1) + y[1]
    assert find_nonfinite(watched_output, loss, PARAMS, START, Batch(XS)).found


def test_a_mutable_array_carries_what_is_written_into_it():
    """Read later in the same step: a path that no variable shows."""

    def step(p, h, x):
        kept = jax.new_ref(p["w"] * h)
        kept[...] = jnp.tanh(kept[...] + x)
        return kept[...], kept[...]

    found = one_update(ESTIMATORS["full"].make(step, squared), PARAMS, START, Batch(XS))
    assert_close(found.grads, one_update(ESTIMATORS["full"].make(plain, squared), PARAMS, START, Batch(XS)).grads)


@pytest.mark.more("test_what_is_read_is_still_named")
def test_the_page_names_parameters_that_no_step_reads():
    with pytest.warns(UserWarning, match=r"no step reads params\['start'\]"):
        page = str(diagnose(plain, squared, PARAMS | {"start": START[0]}, START, Batch(XS), measure=False))
    assert "params['start']: read by no step" in page
