"""Which axes hold examples: what is said of losses that are none, of carries with other axes first, and what is not."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import assert_close

from jbptt import Batch, batch_axes, cells, full_bptt, gated_bptt, lag_profile, slips, unroll

RNG = np.random.default_rng(0)
B, F, H = 5, 3, 4
PARAMS = {"x": RNG.normal(size=(F, H)), "h": RNG.normal(size=(H, H)) / 3}


def rnn(params, h, x):
    h = jnp.tanh(x @ params["x"] + h @ params["h"])
    return h, h


def elementwise(params, h, x):
    h = jnp.tanh(params * h + x)
    return h, h


def fast_weights(params, memory, x):
    key = jnp.tanh(x @ params)
    memory = 0.9 * memory + jnp.outer(key, key)
    return memory, memory @ key


def mixed(params, h, x):
    """Rows that are no examples: each sees the one before."""
    return rnn(params, h + jnp.roll(h, 1, axis=0), x)


def counted(params, carry, x):
    h, y = rnn(params, carry[0], x)
    return (h, carry[1] + 1), y


def summed(y, target):
    return jnp.sum((y - target) ** 2, axis=-1)


def not_summed(y, target):
    return (y - target) ** 2


def pooled(y, target):
    return jnp.mean((y - target) ** 2)


def said(step, loss, params, carry, x, target):
    one = batch_axes.OneStep(step, loss, params, carry, x, target)
    value = jax.eval_shape(loss, jax.eval_shape(step, params, carry, x)[1], target)
    return batch_axes.doubts_about_loss(one, value.shape)


context = RNG.normal(size=(H, H))
side_by_side = {name: np.stack([leaf] * B) for name, leaf in PARAMS.items()}
LEGITIMATE = {
    "one example": (rnn, pooled, PARAMS, (H,), (F,), (H,)),
    "a batch": (rnn, summed, PARAMS, (B, H), (B, F), (B, H)),
    "as many examples as units": (rnn, summed, PARAMS, (H, H), (H, F), (H, H)),
    "two batch axes": (rnn, summed, PARAMS, (2, 2, H), (2, 2, F), (2, 2, H)),
    "two batch axes as long as the units": (rnn, summed, PARAMS, (H, H, H), (H, H, F), (H, H, H)),
    "a number for each unit's loss, scalar parameter": (elementwise, not_summed, 0.5, (B,), (B,), (B,)),
    "a matrix of such": (elementwise, not_summed, 0.5, (B, H), (B, H), (B, H)),
    "a matrix of such, one loss": (elementwise, pooled, 0.5, (B, H), (B, H), (B, H)),
    "units without couplings": (elementwise, not_summed, np.ones(H), (B, H), (B, H), (B, H)),
    "fast weights": (fast_weights, pooled, PARAMS["x"], (H, H), (F,), (H,)),
    "fast weights, inputs as wide": (fast_weights, pooled, PARAMS["h"], (H, H), (H,), (H,)),
    "models side by side": (jax.vmap(rnn), summed, side_by_side, (B, H), (B, F), (B, H)),
    "what each example closes over": (
        lambda p, h, x: rnn(p, h + context, x),
        summed,
        PARAMS,
        (H, H),
        (H, F),
        (H, H),
    ),
    "rows that mix, one loss": (mixed, pooled, PARAMS, (B, H), (B, F), (B, H)),
}
NO_LOSSES = {
    "features of a batch": ((rnn, not_summed, PARAMS, (B, H), (B, F), (B, H)), "its axis 1, of size 4, is one that"),
    "features, as many examples": ((rnn, not_summed, PARAMS, (H, H), (H, F), (H, H)), "its axis 1, of size 4"),
    "features of one example": ((rnn, not_summed, PARAMS, (H,), (F,), (H,)), "its axis 0, of size 4"),
    "a mean over examples": ((rnn, pooled, PARAMS, (B, H), (B, F), (B, H)), "the loss has shape (), but the carry's"),
    "a mean over axis 0": (
        (rnn, lambda y, t: jnp.mean((y - t) ** 2, 0), PARAMS, (B, H), (B, F), (B, H)),
        "the loss has shape (4,), but the carry's first axis",
    ),
}


@pytest.mark.parametrize("name", LEGITIMATE)
def test_nothing_is_said_of_what_is_meant(name):
    step, loss, params, *shapes = LEGITIMATE[name]
    assert said(step, loss, params, *map(np.zeros, shapes)) == ""


@pytest.mark.parametrize("name", NO_LOSSES)
def test_losses_that_are_none(name):
    (step, loss, params, *shapes), words = NO_LOSSES[name]
    found = said(step, loss, params, *map(np.zeros, shapes))
    assert words in found and "a loss returns one number per example" in found


def test_a_counter_in_the_carry_changes_nothing():
    given = (np.zeros((B, H)), 0), np.zeros((B, F)), np.zeros((B, H))
    assert said(counted, summed, PARAMS, *given) == ""
    assert "the carry's first axis" in said(counted, pooled, PARAMS, *given)


@pytest.mark.parametrize("size, words", [(2, "no leaf of the carry begins with (5, 2)"), (H, "its axis 1, of size 4")])
def test_outputs_that_are_not_summed(size, words):
    lstm = cells.with_linear_readout(cells.lstm(F, H), size)
    given = lstm.init(jax.random.key(0)), lstm.initial_carry((B,)), np.zeros((B, F)), np.zeros((B, size))
    assert words in said(lstm.step, not_summed, *given)


def test_who_weighs_every_unit_means_it():
    batch = Batch(np.zeros((2, B, F)), np.zeros((2, B, H)), weights=np.ones((2, B, H)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full_bptt(rnn, not_summed).init(PARAMS, np.zeros((B, H)), batch)


def test_a_warning_stands_at_the_users_line_whatever_found_it():
    batch = Batch(np.zeros((2, B, F)), np.zeros((2, B, H)))
    with pytest.warns(UserWarning, match="features, not examples") as seen:
        lag_profile(rnn, not_summed, PARAMS, np.zeros((B, H)), batch, max_lag=1)
    assert {warning.filename for warning in seen} == {__file__}


# Examples on another axis of the carry than the first


LAYERS, T = 3, 4
W = RNG.normal(size=(LAYERS, H, H)) / 2


def layers_first(w, carry, x):
    new = []
    for i in range(LAYERS):
        x = jnp.tanh(x + carry[i] @ w[i])
        new.append(x)
    return jnp.stack(new), x


def batch_first(w, carry, x):
    carry, y = layers_first(w, jnp.swapaxes(carry, 0, 1), x)
    return jnp.swapaxes(carry, 0, 1), y


def layered(examples, **batch):
    carry = np.zeros((LAYERS, examples, H))
    return carry, Batch(RNG.normal(size=(T, examples, H)), np.zeros((T, examples, H)), **batch)


def test_layers_first_as_many_as_examples():
    mask = np.arange(T)[:, None] < np.array([4, 3, 2])
    carry, batch = layered(LAYERS, mask=mask)
    plain = batch._replace(mask=None)
    words = r"carry has shape \(3, 3, 4\), wanted the batch axis first.*its axis 1 holds.*jnp.moveaxis\(leaf, 1, 0\)"
    gated = gated_bptt(layers_first, summed, gates_fn=lambda key, num_steps: jnp.ones((num_steps, LAYERS)))
    for call in (
        lambda: full_bptt(layers_first, summed).init(W, carry, batch),
        lambda: unroll(layers_first, W, carry, batch.xs, mask=mask),
        lambda: unroll(layers_first, W, carry, batch.xs, gates=np.ones((T, LAYERS))),
        lambda: gated.init(W, carry, plain),
        lambda: lag_profile(layers_first, summed, W, carry, plain, max_lag=2),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for allowed in (plain, batch._replace(mask=mask[:, 0])):  # nothing per example is asked of the carry
            full_bptt(layers_first, summed).init(W, carry, allowed)
        full_bptt(batch_first, summed).init(W, carry, batch)


def test_the_carry_moved_as_the_message_says_gives_the_masked_gradient():
    lengths = np.array([4, 3, 2])
    carry, batch = layered(LAYERS, mask=np.arange(T)[:, None] < lengths)
    estimator = full_bptt(batch_first, summed)
    estimate, _ = estimator.update(W, estimator.init(W, carry, batch), batch)

    def total(w):
        return sum(
            jnp.sum(jax.lax.scan(lambda c, x: layers_first(w, c, x), carry[:, i], batch.xs[: lengths[i], i])[1] ** 2)
            for i in range(LAYERS)
        )

    assert_close(estimate.grad_sum, jax.grad(total)(W))


def test_layers_first_of_another_number():
    carry, batch = layered(2, mask=np.ones((T, 2), bool))
    with pytest.raises(ValueError, match="the batch axis first"):
        full_bptt(layers_first, summed).init(W, carry, batch)


# Weights of both signs


@pytest.mark.parametrize(
    "weights, mask, is_said",
    [
        (np.array([1.0, -1.0]), None, True),
        (np.array([1.0, -0.5]), None, False),
        (np.array([1.0, -1.0]), np.array([True, False]), False),
        (np.array([1.0, 1.0, -1.0]), np.array([[True, True], [False, False], [True, True]]), True),
        (np.zeros(3), None, False),
        (-np.ones(70_000), None, False),
    ],
)
def test_weights_that_cancel(weights, mask, is_said):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        slips.warn_of_cancelling_weights(weights, mask)
        jax.jit(slips.warn_of_cancelling_weights)(weights, mask)  # traced weights are not looked at
    assert len(seen) == is_said
