"""The border: a ValueError that names the argument, what it got, and what to do, before anything is compiled."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest

from jbptt import (
    Batch,
    Plan,
    cells,
    diagnose,
    full_bptt,
    gated_bptt,
    randomized_bptt,
    truncated_bptt,
    truncation,
    unroll,
)

STEP, LOSS, PARAMS, CARRY, BATCH = problems.make("lstm", 4)
KEY = jax.random.key(0)
NUM_STEPS, NUM_EXAMPLES = 4, problems.EXAMPLES
COMPILES = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **_: COMPILES.append(event) if "backend_compile" in event else None
)


def refused(function, *fragments):
    """`function` raises a ValueError with every fragment in its message, and compiles nothing."""
    COMPILES.clear()
    with pytest.raises(ValueError) as caught:
        function()
    for fragment in fragments:
        assert fragment in str(caught.value), str(caught.value)
    assert not COMPILES


ESTIMATORS = [
    full_bptt(STEP, LOSS),
    truncated_bptt(STEP, LOSS, window=2),
    truncated_bptt(STEP, LOSS, window=2, stride=1),
    gated_bptt(STEP, LOSS, gates_fn=lambda key, num_steps: np.ones(num_steps)),
    randomized_bptt(STEP, LOSS, keep_prob=0.5),
]
STATES = [estimator.init(PARAMS, CARRY, BATCH, KEY) for estimator in ESTIMATORS]


def refused_everywhere(*fragments, params=PARAMS, batch=BATCH):
    """By every estimator, both at init and at update."""
    for estimator, state in zip(ESTIMATORS, STATES, strict=True):
        refused(lambda e=estimator: e.init(params, CARRY, batch, KEY), *fragments)
        refused(lambda e=estimator, s=state: e.update(params, s, batch), *fragments)


def test_the_listener_hears_compilations():
    COMPILES.clear()
    jax.jit(lambda x: x * 3.25 + 1)(np.ones(7))
    assert COMPILES


def empty():
    return jax.tree.map(lambda a: np.asarray(a)[:0], BATCH)


def test_no_steps():
    refused_everywhere("T must be >= 1", "got 0", batch=empty())
    refused(lambda: unroll(STEP, PARAMS, CARRY, empty().xs), "T must be >= 1", "got 0")
    refused(lambda: unroll(STEP, PARAMS, CARRY, None, length=0), "got 0")
    refused(lambda: unroll(STEP, PARAMS, CARRY, None), "length=")


def test_no_examples():
    nobody = jax.tree.map(lambda a: np.asarray(a)[:, :0], BATCH)
    carry = jax.tree.map(lambda a: np.asarray(a)[:0], CARRY)
    for estimator in ESTIMATORS:
        refused(lambda e=estimator: e.init(PARAMS, carry, nobody, KEY), "batch has no examples", "(0,)", "at least one")
    refused(lambda: diagnose(STEP, LOSS, PARAMS, carry, nobody), "batch has no examples", "(0,)")


@pytest.mark.parametrize("value", [0, -1, 2.5, 2.0, True, "3", None, np.float32(2)])
def test_counts_must_be_positive_integers(value):
    if value is not None:  # None means: as the window, or a default
        refused(lambda: truncated_bptt(STEP, LOSS, window=4, stride=value), "stride", "got", str(value))
        refused(lambda: Plan(segment=value), "segment", "got", str(value))
        refused(lambda: unroll(STEP, PARAMS, CARRY, BATCH.xs, segment=value), "segment", "got", str(value))
    refused(lambda: truncated_bptt(STEP, LOSS, window=value), "window", "got", str(value))
    refused(lambda: truncation.fixed(5, value), "window", str(value))
    refused(lambda: truncation.full(value), "num_steps", str(value))
    refused(lambda: truncation.window_coverage(5, value, 1), "window", str(value))
    refused(lambda: cells.gru(value, 3).init(KEY), "input_size", str(value))


def test_stride_within_window():
    refused(lambda: truncated_bptt(STEP, LOSS, window=4, stride=5), "stride", "stride=5", "window=4")
    refused(lambda: truncation.window_coverage(9, 4, 5), "stride=5", "window=4")


def test_traced_window_points_to_gates():
    refused(lambda: jax.eval_shape(lambda w: truncated_bptt(STEP, LOSS, window=w), 4), "window", "traced", "gates")


@pytest.mark.parametrize("value", [0, -1, 1.5, float("nan"), [0.5, 0.0, 0.5, 0.5]])
def test_keep_prob_range(value):
    refused(lambda: randomized_bptt(STEP, LOSS, keep_prob=value), "keep_prob", "(0, 1]", str(value))
    refused(lambda: truncation.randomized(KEY, 4, value), "keep_prob", "(0, 1]", str(value))


@pytest.mark.parametrize("value", [1, 0, -3.0, float("nan"), float("inf")])
def test_mean_length_range(value):
    refused(lambda: randomized_bptt(STEP, LOSS, mean_length=value), "mean_length", "> 1", str(value))
    refused(lambda: truncation.artbp(KEY, 4, value), "mean_length", "> 1", str(value))
    refused(lambda: truncation.artbp(KEY, 4, 3.0, alpha=2.0), "alpha", "> 2")


def test_one_way_to_draw_and_a_key():
    refused(lambda: randomized_bptt(STEP, LOSS), "keep_prob", "mean_length", "exactly one")
    refused(lambda: randomized_bptt(STEP, LOSS, keep_prob=0.5, mean_length=3.0), "exactly one")
    refused(lambda: randomized_bptt(STEP, LOSS, keep_prob=0.5).init(PARAMS, CARRY, BATCH), "key")
    refused(lambda: truncation.randomized(KEY, 4, np.full(3, 0.5)), "keep_prob", "(3,)", "4")


@pytest.mark.parametrize("field", ["xs", "targets", "mask", "weights"])
def test_leaves_that_disagree_on_time(field):
    values = {"mask": np.ones(3, bool), "weights": np.ones(3)}
    short = values[field] if field in values else np.asarray(getattr(BATCH, field))[:3]
    refused_everywhere("T", field, "3", "4", batch=BATCH._replace(**{field: short}))


def test_leaves_without_time():
    refused_everywhere("weights", "scalar", batch=BATCH._replace(weights=1.0))
    refused_everywhere("Batch", "tuple", batch=(BATCH.xs, BATCH.targets))


def test_gates_that_do_not_fit():
    for gates in (np.ones(3), np.ones((NUM_STEPS, NUM_EXAMPLES + 1)), np.ones(NUM_STEPS, complex)):
        refused(lambda g=gates: unroll(STEP, PARAMS, CARRY, BATCH.xs, gates=g), "gates")
        estimator = gated_bptt(STEP, LOSS, gates_fn=lambda key, t, g=gates: g)
        refused(lambda e=estimator: e.init(PARAMS, CARRY, BATCH), "gates")


DRIFTS = {
    "shape": (lambda h, c: (h, c[:, :2]), "carry[1]", "[3, 3]", "[3, 2]"),
    "dtype": (lambda h, c: (h.astype(jnp.float32), c), "carry[0]", "float64", "float32"),
    "structure": (lambda h, c: {"h": h, "c": c}, "structure"),
}


@pytest.mark.parametrize("kind", DRIFTS)
def test_carries_that_drift(kind):
    drift, *fragments = DRIFTS[kind]

    def step(params, carry, x):
        carry, y = STEP(params, carry, x)
        return drift(*carry), y

    refused(lambda: unroll(step, PARAMS, CARRY, BATCH.xs), *fragments)
    for make in (full_bptt, functools.partial(truncated_bptt, window=2)):
        refused(lambda m=make: m(step, LOSS).init(PARAMS, CARRY, BATCH), *fragments)


def test_a_step_that_returns_something_else():
    refused(lambda: unroll(lambda params, carry, x: carry[0], PARAMS, CARRY, BATCH.xs), "step", "(carry, y)")


@pytest.mark.parametrize("leaf", [np.arange(3), 3, "tanh", None.__class__])
def test_parameters_that_cannot_be_trained(leaf):
    refused_everywhere("params['extra']", "floating", params={**PARAMS, "extra": leaf})


def test_masks():
    refused_everywhere("mask", "bool", "float64", batch=BATCH._replace(mask=np.ones(NUM_STEPS)))
    refused(lambda: unroll(STEP, PARAMS, CARRY, BATCH.xs, mask=np.ones(NUM_STEPS)), "mask", "bool", "float64")
    for field, array in (("mask", np.ones((NUM_STEPS, 2), bool)), ("weights", np.ones((NUM_STEPS, 2)))):
        refused_everywhere(field, "(4, 2)", "(4, 3)", batch=BATCH._replace(**{field: array}))
    refused(lambda: unroll(STEP, PARAMS, CARRY, BATCH.xs, mask=np.ones((NUM_STEPS, 2), bool)), "mask", "batch shape")


def test_losses():
    for loss in (lambda y, target: jnp.zeros((), int), lambda y, target: {"a": 1.0}):
        refused(lambda f=loss: full_bptt(STEP, f).init(PARAMS, CARRY, BATCH), "loss")
    aux = lambda y, target: (problems.squared_error(y, target), {"hits": jnp.zeros(5)})
    refused(lambda: full_bptt(STEP, aux).init(PARAMS, CARRY, BATCH), "aux['hits']", "(5,)", "(3,)")


# A path from the parameters to the loss


def warned(step, params, carry):
    """What is said about gradients that are zero by construction."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        full_bptt(step, lambda y, target: y).init(params, carry, Batch(jnp.ones(3)))
    return [str(warning.message) for warning in found if "exactly zero" in str(warning.message)]


def test_a_parameter_that_no_step_reads_is_named():
    """What is read but stopped on its way is meant so; what is not read at all is a slip, or a learned start."""
    step = lambda params, h, x: (params["used"] * h + x + jax.lax.stop_gradient(params["fixed"]), h)
    (message,) = warned(step, {"start": 1.0, "used": 0.5, "fixed": 1.0}, jnp.zeros(()))
    assert message.startswith("no step reads params['start']: the gradient in it is exactly zero")
    assert not warned(step, {"used": 0.5, "fixed": 1.0}, jnp.zeros(()))


def test_every_result_of_a_compiled_step_may_depend_on_everything():
    """The parameter's cotangent is the second result of one call, whose first is the carry's."""
    inner = jax.jit(lambda h, w, x: w * h + x)
    assert not warned(lambda w, h, x: (inner(h, w, x), h), 0.5, jnp.zeros(()))
