"""Every piece of advice is given where it is due, and following it improves the number that triggered it."""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from problems import in_one_line, one_update, usual

from jbptt import Batch, cells, clipping, diagnose, full_bptt, measure_cost, truncated_bptt, truncation, unroll
from jbptt.diagnosis.advice import Advice, advise

NUM_STEPS, EXAMPLES, INPUT, HIDDEN = 64, 8, 3, 6
RNN, GRU, LSTM = (cell(INPUT, HIDDEN) for cell in (cells.rnn, cells.gru, cells.lstm))
RELU, LEAKY = (cells.rnn(INPUT, HIDDEN, activation=activation) for activation in (jax.nn.relu, jax.nn.leaky_relu))


def loss(y, target):
    return jnp.sum((y - target) ** 2, axis=-1)


look = jax.jit(functools.partial(diagnose, measure=False), static_argnums=(0, 1))


def draw(cell=RNN, *, radius=1.0, inputs=1.0, seed=3):
    """Parameters with an orthogonal recurrent matrix of that spectral radius, a carry and a batch."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(cell.init, jax.random.key(0))
    params = jax.tree.map(lambda s: 0.3 * rng.normal(size=s.shape), shapes)
    squares = [np.linalg.qr(rng.normal(size=(HIDDEN, HIDDEN)))[0] for _ in range(shapes["w_h"].shape[1] // HIDDEN)]
    params |= {"w_h": radius * np.concatenate(squares, axis=1), "b": np.zeros(shapes["b"].shape)}
    xs = inputs * rng.normal(size=(NUM_STEPS, EXAMPLES, INPUT))
    batch = Batch(jnp.asarray(xs), jnp.asarray(rng.normal(size=(NUM_STEPS, EXAMPLES, HIDDEN))))
    return jax.tree.map(jnp.asarray, params), cell.initial_carry((EXAMPLES,)), batch


def given(found, topic):
    """The one piece of advice on a topic."""
    (advice,) = [advice for advice in found.advice if advice.topic == topic]
    return advice


def topics(found):
    return {advice.topic for advice in found.advice}


def number_in(remedy):
    return float(re.findall(r"[-+0-9.e]*\d", remedy)[0])


@functools.cache
def vanishing():
    problem = draw(radius=0.1)
    return *problem, look(RNN.step, loss, *problem)


@functools.cache
def exploding():
    """Inputs so small that tanh stays linear."""
    problem = draw(radius=1.3, inputs=1e-9)
    return *problem, look(RNN.step, loss, *problem)


def open_gates(cell, bias):
    """Fresh parameters whose gates keep the state: the lstm's forget gate, the gru's update gate."""
    params = cell.init(jax.random.key(1))
    return {**params, "b": params["b"].at[HIDDEN : 2 * HIDDEN].set(bias)}


def healthy(name):
    if name == "orthogonal rnn":
        return RNN, draw(inputs=0.05)
    params, carry, batch = draw(LSTM, inputs=0.3)
    return LSTM, ({**params, "b": open_gates(LSTM, 5.0)["b"], "w_h": 0.1 * params["w_h"]}, carry, batch)


@pytest.mark.more("test_recurrent_initialisation")
@pytest.mark.parametrize("name", usual(["orthogonal rnn"], ["orthogonal rnn", "lstm"]))
def test_a_healthy_gradient_gets_no_advice(name):
    cell, problem = healthy(name)
    found = look(cell.step, loss, *problem)
    assert found.verdict == "stable" and abs(float(found.exponent)) < 0.03
    assert found.advice == () and "advice" not in str(found)


def test_which_topics_go_with_which_fault():
    assert topics(vanishing()[-1]) == {"window", "gated cell"}
    assert topics(exploding()[-1]) == {"clipping", "regularisation"}


def test_window():
    """A quarter of the steps leaves 1 % of error; it takes less memory than full BPTT."""
    params, carry, batch, found = vanishing()
    advice = given(found, "window")
    window = int(number_in(advice.remedy))
    assert advice.remedy == f"truncated_bptt(window={window})"
    assert advice.value == window / NUM_STEPS <= advice.threshold == 0.25
    estimators = {"full": full_bptt(RNN.step, loss), "window": truncated_bptt(RNN.step, loss, window=window)}
    run = jax.jit(lambda: [ravel_pytree(one_update(e, params, carry, batch).grads)[0] for e in estimators.values()])
    exact, estimate = run()
    assert jnp.linalg.norm(estimate - exact) <= 0.01 * jnp.linalg.norm(exact)
    full, cut = measure_cost(estimators, params, carry, batch, num_repeats=1).temporary_bytes
    assert cut < full


def part_gradients(params, carry, batch):
    """The gradient of each part's mean loss, by one-hot weights."""
    gradient = lambda w: one_update(full_bptt(RNN.step, loss), params, carry, batch._replace(weights=w)).grads
    each = jnp.eye(EXAMPLES).reshape(EXAMPLES, 1, EXAMPLES)
    return jax.vmap(gradient)(jnp.broadcast_to(each, (EXAMPLES, NUM_STEPS, EXAMPLES)))


def norms_of(gradients):
    return np.linalg.norm(jax.vmap(lambda tree: ravel_pytree(tree)[0])(gradients), axis=1)


@pytest.mark.parametrize("fault", ["one heavy example", "exploding"])
def test_clipping(fault):
    params, carry, batch = draw(radius=0.8) if fault == "one heavy example" else exploding()[:3]
    if fault == "one heavy example":
        batch = batch._replace(targets=batch.targets.at[:, 2].multiply(300.0))
    found = look(RNN.step, loss, params, carry, batch)
    advice = given(found, "clipping")
    gradients = jax.jit(part_gradients)(params, carry, batch)
    norms = norms_of(gradients)
    np.testing.assert_allclose(found.part_norms, norms, rtol=1e-10)
    np.testing.assert_allclose(found.norm_quantiles, np.quantile(norms, [0.5, 0.9, 1]), rtol=1e-10)
    np.testing.assert_allclose(advice.value, norms.max() / np.median(norms), rtol=1e-10)
    assert advice.value > advice.threshold == (10 if fault == "one heavy example" else 1.5)
    clip = clipping.clip_by_global_norm(number_in(advice.remedy))
    clipped = norms_of(jax.vmap(lambda g: clip.update(g, clip.init(g))[0])(gradients))
    after = clipped.max() / np.median(clipped)
    assert after - 1 < (advice.value - 1) / 2  # alike would be 1


@pytest.mark.more("test_recurrent_initialisation")
@pytest.mark.parametrize("cell", [GRU, LSTM], ids=["gru", "lstm"])
def test_gated_cell(cell):
    *_, batch, found = vanishing()
    advice = given(found, "gated cell")
    assert advice.value == float(found.half_life) / NUM_STEPS < advice.threshold
    better = look(cell.step, loss, open_gates(cell, 3.0), cell.initial_carry((EXAMPLES,)), batch)
    assert better.half_life / NUM_STEPS > 2 * advice.value


@pytest.mark.more("test_activation_of_saturated_units")
def test_activation_of_dead_units():
    params, carry, batch = draw()
    params["b"] = params["b"].at[:3].set(-50.0)
    problem = dict(params), carry, batch
    found = look(RELU.step, loss, *problem)
    advice = given(found, "activation")
    assert advice.value == 0.5 > advice.threshold and advice.remedy == "leaky_relu, or larger biases"
    params["b"] = params["b"].at[:3].set(1.0)
    for better in (look(LEAKY.step, loss, *problem), look(RELU.step, loss, params, carry, batch)):
        assert float(better.dead) == 0 and "activation" not in topics(better)


@pytest.mark.more("test_where_all_units_are_saturated")
def test_where_all_units_are_dead():
    params, carry, batch = draw()
    params["b"] = params["b"] - 50.0
    found = look(RELU.step, loss, params, carry, batch)
    assert found.verdict == "vanishing" and float(found.dead) == 1
    assert np.isneginf(found.exponent) and float(found.exponent_spread) == 0
    assert f"\nGradient over {NUM_STEPS} steps: no gradient path\n" in str(found) and "vanish" not in str(found)
    assert topics(found) == {"activation"}


def test_where_all_units_are_saturated():
    params, carry, batch = draw()
    params["b"] = params["b"] + 7.0
    found = look(RNN.step, loss, params, carry, batch)
    assert found.verdict == "vanishing" and float(found.saturated) == 1 and float(found.exponent) < -5
    assert topics(found) == {"window", "activation", "gated cell"}  # it is no matrix's doing


def test_activation_of_saturated_units():
    params, carry, batch = draw(inputs=0.1)
    params["b"] = params["b"].at[:4].set(5.0)
    found = look(RNN.step, loss, params, carry, batch)
    advice = given(found, "activation")
    np.testing.assert_allclose(advice.value, 4 / 6)
    assert "smaller inputs and weights" in advice.remedy
    better = look(RNN.step, loss, jax.tree.map(lambda a: a / 5, params), carry, batch)
    assert float(better.saturated) == 0


@pytest.mark.parametrize("problem_fn", [vanishing, exploding])
def test_recurrent_initialisation(problem_fn):
    """Given where it was tried and helped; following it does what the trial says."""
    params, carry, batch, untried = problem_fn()
    assert untried.trials == () and "recurrent initialisation" not in topics(untried)
    found = diagnose(RNN.step, loss, params, carry, batch, num_repeats=1)
    advice = given(found, "recurrent initialisation")
    np.testing.assert_allclose(advice.value, abs(float(found.exponent)) * NUM_STEPS)
    scale = np.exp(-float(found.exponent))
    remedies = [f"params['w_h'] × {scale:.3g}", "params['w_h'] orthogonal"]
    assert [trial.remedy for trial in found.trials] == remedies
    left, _, right = np.linalg.svd(params["w_h"])
    for trial, w_h in zip(found.trials, (params["w_h"] * scale, left @ right), strict=True):
        better = look(RNN.step, loss, {**params, "w_h": w_h}, carry, batch)
        assert trial.verdict == better.verdict
        np.testing.assert_allclose([trial.half_life, trial.exponent], [better.half_life, better.exponent], atol=1e-9)
        assert abs(float(better.exponent)) * NUM_STEPS < advice.value / 2
    best = min(found.trials, key=lambda trial: abs(trial.exponent))
    assert advice.remedy.startswith(f"{best.remedy} (tried: ")
    worse = tuple(trial._replace(exponent=float(found.exponent)) for trial in found.trials)
    assert "recurrent initialisation" not in topics(replace(found, trials=worse))
    trained = replace(found, constant_loss=2 * found.loss)
    assert "recurrent initialisation" not in topics(trained)  # it would undo what was learnt


def test_regularisation():
    """Weight on the largest singular value, a few steps of descent: the exponent falls."""
    params, carry, batch, found = exploding()
    advice = given(found, "regularisation")
    assert advice.value == float(found.exponent) > advice.threshold == 0

    def penalised(params):
        return 0.1 * jnp.linalg.norm(params["w_h"], 2) ** 2

    clip = clipping.clip_by_global_norm(1.0)

    @jax.jit
    def descend(params):
        def body(params, _):
            grads = one_update(full_bptt(RNN.step, loss), params, carry, batch).grads
            grads, _ = clip.update(grads, clip.init(grads))
            updates = jax.tree.map(lambda g, p: -0.1 * (g + p), grads, jax.grad(penalised)(params))
            return optax.apply_updates(params, updates), None

        return jax.lax.scan(body, params, None, length=30)[0]

    better = look(RNN.step, loss, descend(params), carry, batch)
    assert float(better.exponent) < advice.value - 0.05


@pytest.mark.more("test_a_piece_of_advice_reads_as_a_sentence")
def test_learning_rate():
    params, carry, batch = draw(inputs=0.05)
    rate = 3.0
    found = look(RNN.step, loss, params, carry, batch, learning_rate=rate)
    advice = given(found, "learning rate")
    np.testing.assert_allclose(advice.value, rate * float(found.curvature))
    assert advice.value > advice.threshold == 2
    assert "no learning rate above" in str(found)

    @jax.jit
    def loss_after(rate):
        grads = one_update(full_bptt(RNN.step, loss), params, carry, batch).grads
        moved = jax.tree.map(lambda p, g: p - rate * g, params, grads)
        return one_update(full_bptt(RNN.step, loss), moved, carry, batch).loss

    start, too_far, better = loss_after(0.0), loss_after(rate), loss_after(number_in(advice.remedy))
    assert better < start < too_far
    calm = look(RNN.step, loss, params, carry, batch, learning_rate=number_in(advice.remedy))
    assert "learning rate" not in topics(calm)
    for bad in (0.0, -1.0, "fast"):
        with pytest.raises(ValueError, match="learning_rate must be a finite number > 0"):
            diagnose(RNN.step, loss, params, carry, batch, learning_rate=bad)


@pytest.mark.more("test_a_piece_of_advice_reads_as_a_sentence")
def test_curvature():
    params, carry, batch = draw(inputs=0.05)
    found = look(RNN.step, loss, params, carry, batch, learning_rate=3.0)
    flat, back = ravel_pytree(params)
    mean = lambda flat: jnp.mean(loss(unroll(RNN.step, back(flat), carry, batch.xs)[1], batch.targets))
    engine = lambda flat: ravel_pytree(one_update(full_bptt(RNN.step, loss), back(flat), carry, batch).grads)[0]

    @jax.jit
    def curvatures():
        """Forward over reverse and reverse over reverse, through the engine and `unroll`, and the Hessian."""
        g = engine(flat)
        forward = [jax.jvp(gradient, (flat,), (g,))[1] @ g for gradient in (engine, jax.grad(mean))]
        reverse = [jax.grad(lambda p, f=gradient: f(p) @ g)(flat) @ g for gradient in (engine, jax.grad(mean))]
        return jnp.stack([*forward, *reverse, g @ jax.hessian(mean)(flat) @ g]) / (g @ g)

    np.testing.assert_allclose(curvatures(), float(found.curvature), rtol=1e-9)


def test_a_diagnosis_that_is_not_finite_is_explained_by_its_exponent_alone():
    params, carry, batch = draw(radius=1e12, inputs=0.0)  # the state stays zero, so the way forward is finite
    found = diagnose(RNN.step, loss, params, carry, batch, num_repeats=1)
    assert found.verdict == "non-finite" and topics(found) == {"recurrent initialisation"}
    assert "non-finite → stable" in given(found, "recurrent initialisation").remedy
    params["b"] = params["b"].at[0].set(jnp.nan)
    assert look(RNN.step, loss, params, carry, batch).advice == ()


def test_a_target_that_is_not_a_number_gets_no_advice():
    """What is given explains itself, and a gradient that vanishes does not."""
    params, carry, batch = vanishing()[:3]
    found = look(RNN.step, loss, params, carry, batch._replace(targets=batch.targets.at[5, 0, 0].set(jnp.nan)))
    assert found.verdict == "non-finite" and float(found.exponent) < -1 and found.advice == ()


def test_without_a_gradient_only_what_explains_that():
    params, carry, batch = jax.tree.map(jnp.zeros_like, draw())
    found = look(RNN.step, loss, params, carry, batch)
    assert float(found.gradient_norm) == 0
    assert advise(found) == found.advice == ()  # all units are zero, which is what they should be
    page = str(found)
    assert f"\nGradient over {NUM_STEPS} steps: zero loss\n" in page and "no gradient path" not in page


def test_a_piece_of_advice_reads_as_a_sentence():
    advice = given(vanishing()[-1], "window")
    assert isinstance(advice, Advice)
    assert str(advice) == f"window: 1% block window / steps {advice.value:.3g} ≤ 0.25: {advice.remedy}"
    for found in (vanishing()[-1], exploding()[-1]):
        printed = in_one_line(str(found).partition("  advice\n")[2])
        assert printed == in_one_line(" ".join(map(str, found.advice)))
        for advice in found.advice:
            holds = {"<": advice.value < advice.threshold, "≤": advice.value <= advice.threshold}
            assert holds.get(advice.sign, advice.value > advice.threshold), advice
    for found in (vanishing()[-1], exploding()[-1]):
        assert max(map(len, str(found).splitlines())) <= 100


@pytest.mark.more("test_recurrent_initialisation")
def test_cuts_and_resets_are_not_the_cells_fault():
    """An orthogonal network keeps its state; what the user cuts, and what resets wipe out, needs no gates."""
    cell = cells.linear(INPUT, HIDDEN)
    params, carry, batch = draw(cell)
    found = look(cell.step, loss, params, carry, batch, gates=truncation.fixed(NUM_STEPS, 4))
    assert found.verdict == "vanishing" and float(found.half_life) < NUM_STEPS / 4 and topics(found) == {"window"}
    resets = jnp.asarray(np.random.default_rng(1).random((NUM_STEPS, EXAMPLES)) < 0.3)
    step = cells.with_reset(cell.step, cell.initial_carry)
    found = look(step, loss, params, carry, batch._replace(xs=(batch.xs, resets)))
    assert found.verdict == "vanishing" and float(found.half_life) < NUM_STEPS / 4 and topics(found) <= {"window"}


@pytest.mark.more("test_recurrent_initialisation")
def test_padding_is_no_part_of_the_sequence():
    """Eight steps and 56 of padding get the advice that the eight get."""
    params, carry, batch = draw(radius=0.9, inputs=0.1)
    short = jax.tree.map(lambda a: a[:8], batch)
    alone = look(RNN.step, loss, params, carry, short)
    mask = np.zeros((NUM_STEPS, EXAMPLES), bool)
    for steps in (slice(0, 8), slice(-8, None)):
        mask[:] = False
        mask[steps] = True
        padded = jax.tree.map(lambda a, steps=steps: jnp.zeros_like(a).at[steps].set(a[:8]), batch)
        found = look(RNN.step, loss, params, carry, padded._replace(mask=jnp.asarray(mask)))
        assert (int(found.num_used_steps), int(alone.num_used_steps)) == (8, 8)
        assert topics(found) == topics(alone) == set()


@pytest.mark.more("test_recurrent_initialisation")
def test_the_lstm_gets_no_advice_about_one_matrix():
    params, carry, batch = draw(LSTM, radius=0.1)
    found = look(LSTM.step, loss, params, carry, batch)
    assert float(found.exponent) * NUM_STEPS < -np.log(10) and "recurrent initialisation" not in topics(found)
