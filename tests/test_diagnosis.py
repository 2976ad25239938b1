"""Verdicts on networks built to deserve them, and recommended windows against real gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from jax.flatten_util import ravel_pytree
from problems import one_update

from jbptt import Batch, cells, diagnose, full_bptt, gated_bptt, measure_cost, truncated_bptt, truncation, unroll
from jbptt.diagnosis import question

NUM_STEPS = 12
TOLERANCES = (0.1, 0.01)


def rotation(rng, size):
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


STEP = cells.linear(2, 4).step


def inner_product(y, target):
    return jnp.sum(y * target, axis=-1)


def linear_problem(scale, num_steps=NUM_STEPS):
    """`w_h = scale · Q` and a linear loss with unit slopes: `‖∂ℓ_t/∂carries[t−k]‖ = scale^{k+1}`, λ₁ = ln scale."""
    rng = np.random.default_rng(6)
    params = {"w_x": rng.normal(size=(2, 4)), "w_h": scale * rotation(rng, 4), "b": np.zeros(4)}
    slopes = rng.normal(size=(num_steps, 2, 4))
    batch = Batch(rng.normal(size=(num_steps, 2, 2)), slopes / np.linalg.norm(slopes, axis=-1, keepdims=True))
    return STEP, inner_product, params, jnp.ones((2, 4)), batch


compiled = jax.jit(diagnose, static_argnums=(0, 1), static_argnames=("measure", "max_window"))
unmeasured = functools.partial(compiled, measure=False)


@pytest.mark.parametrize(
    ("scale", "verdict"),
    [(0.5, "vanishing"), (0.75, "vanishing"), (0.85, "stable"), (1.0, "stable"), (1.2, "stable"), (1.5, "exploding")],
)
def test_verdict_and_half_life(scale, verdict):
    """A change by ten over 11 lags separates them: 10^(1/11) = 1.23."""
    found = unmeasured(*linear_problem(scale))
    assert found.verdict == verdict
    assert verdict in str(found)
    lags = np.arange(int(found.num_lags))
    assert len(lags) >= min(NUM_STEPS, np.log(0.01) / -abs(np.log(scale) or 1e-9))
    np.testing.assert_allclose(found.profile.cotangent_norms[: len(lags)], scale ** (lags + 1), rtol=1e-12)
    np.testing.assert_allclose(found.flow.arrives[: len(lags)], scale**lags, rtol=1e-12)
    assert np.all(np.isnan(found.flow.arrives[len(lags) :]))
    np.testing.assert_allclose(found.rate, np.log(scale), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose([found.exponent, found.exponent_spread], [np.log(scale), 0], rtol=1e-9, atol=1e-12)
    assert float(found.decay.rate_error) < 1e-9 and float(found.residual) < 1e-9
    assert (int(found.zero_lag), bool(found.underflow), bool(found.nonfinite.found)) == (-1, False, False)
    if scale < 1:
        np.testing.assert_allclose(found.half_life, np.log(2) / -np.log(scale), rtol=1e-9)
        assert f"half-life {np.log(2) / -np.log(scale):.3g} steps" in str(found)
    elif scale > 1:
        assert np.isinf(found.half_life)
        assert f"doubles every {np.log(2) / np.log(scale):.3g} steps back" in str(found)


@pytest.mark.parametrize("scale", [0.5, 0.1, 0.01])
def test_reach_is_the_last_lag_of_one_percent(scale):
    """0.5^6 > 1 % > 0.5^7: lags 0 … 6; and the half-life holds even where one lag is below 0.1 %."""
    found = unmeasured(*linear_problem(scale * (1 + 1e-9)))
    assert int(found.reach) == {0.5: 7, 0.1: 3, 0.01: 2}[scale]
    assert f"reaches {int(found.reach)} steps back" in str(found)
    np.testing.assert_allclose(found.half_life, -np.log(2) / np.log(scale), rtol=1e-6)


@pytest.mark.parametrize("where", ["params", "xs", "targets", "carry", "overflow"])
def test_non_finite(where):
    step, loss, params, carry, batch = linear_problem(0.5)
    if where == "params":
        params["w_h"][1, 2] = np.nan
    elif where in ("xs", "targets"):
        getattr(batch, where)[5, 1, 0] = np.inf
    elif where == "carry":
        carry = carry.at[0, 0].set(np.nan)
    else:
        params["w_h"] = params["w_h"] * 1e60
    found = unmeasured(step, loss, params, carry, batch)
    assert found.verdict == "non-finite"
    page = str(found)
    assert "non-finite" in page and "no window can be recommended" in page and "half-life" not in page
    leaf, phase, first = {
        "params": ("params['w_h']", "given", 0),
        "xs": ("xs", "given", 5),
        "targets": ("targets", "given", 5),
        "carry": ("carry", "given", 0),
        "overflow": ("carry", "forward", 5),
    }[where]
    assert (found.nonfinite.leaf, found.nonfinite.phase, int(found.nonfinite.step)) == (leaf, phase, first)
    assert f"first not finite: {leaf}, " in page and f"step {first}" in page


@pytest.mark.more("test_verdict_and_half_life")
def test_one_step():
    """Given as constants of the jitted function."""
    problem = problems.make("lstm", 1)
    found = jax.jit(lambda: diagnose(*problem, measure=False))()
    assert found.verdict == "stable"
    assert (int(found.reach), found.num_steps) == (1, 1)
    assert found.sliding_window.tolist() == found.block_window.tolist() == [1, 1]
    assert "\nGradient over 1 step: stable\n" in str(found) and "There is nothing to truncate" in str(found)


@pytest.mark.more("test_verdict_and_half_life")
def test_zero_gradient_and_no_weight():
    step, loss, params, carry, batch = linear_problem(0.5)
    found = unmeasured(step, loss, params, carry, batch._replace(weights=np.zeros(NUM_STEPS)))
    assert (float(found.loss), float(found.gradient_norm), int(found.reach)) == (0.0, 0.0, 0)
    assert found.verdict == "vanishing"  # a gradient of zero is not a healthy one
    assert found.sliding_window.tolist() == [1, 1]
    assert "\nGradient over 12 steps: no gradient path\n" in str(found)


def test_vmap_is_a_loop():
    step, loss, params, carry, batch = linear_problem(0.5)
    scales = jnp.array([0.6, 2.02, jnp.nan])  # at 2 the slope is 0 but for rounding
    scaled = lambda scale: {**params, "w_h": params["w_h"] * scale}
    run = lambda scale: diagnose(step, loss, scaled(scale), carry, batch, measure=False)
    together = jax.jit(jax.vmap(run))(scales)
    assert together.verdict_index.tolist() == [0, 1, 3]
    assert together.nonfinite.found.tolist() == [False, False, True]
    for i, scale in enumerate(scales):
        found = unmeasured(step, loss, scaled(scale), carry, batch)
        assert together.norm_quantiles[i].shape == found.norm_quantiles.shape == (3,)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(b[i], a, rtol=1e-9, atol=1e-12)
    assert str(together).startswith("Diagnosis(decay=Decay(verdict_index=Array([0, 1, 3]")  # many have no page


@pytest.mark.more("test_verdict_and_half_life")
def test_loss_and_gradient_are_the_exact_ones_and_max_window_limits_the_lags():
    step, loss, params, carry, batch = linear_problem(1.0)
    batch = batch._replace(weights=np.linspace(0, 2, NUM_STEPS))
    exact = jax.jit(functools.partial(one_update, full_bptt(step, loss)))(params, carry, batch)
    found = unmeasured(step, loss, params, carry, batch, max_window=1)
    np.testing.assert_allclose(found.loss, exact.loss, rtol=1e-12)
    np.testing.assert_allclose(found.gradient_norm, jnp.linalg.norm(ravel_pytree(exact.grads)[0]), rtol=1e-12)
    assert len(found.profile.grad_norms) == len(found.curve.windows) == 1
    assert found.sliding_window.tolist() == [0, 0]
    page = str(found)
    assert "> 1" in page and "half-life not measured (one lag)" in page
    assert "\nGradient over 12 steps: not measured (one lag)\n" in page and "stable" not in page
    whole = jax.eval_shape(functools.partial(unmeasured, step, loss, max_window=50), params, carry, batch)
    assert whole.curve.windows.shape == (NUM_STEPS,)


def test_where_only_full_bptt_will_do():
    found = unmeasured(*linear_problem(1.5))
    assert found.block_window.tolist() == [NUM_STEPS, NUM_STEPS]


def promised_problem(name, num_steps=40):
    """A network that forgets within its sequence, so that every promise can be kept and broken."""
    step, loss, params, carry, batch = problems.make(name, num_steps)
    weights = np.random.default_rng(9).random((num_steps, problems.EXAMPLES))
    return step, loss, params, carry, batch._replace(weights=weights)


@pytest.mark.more("test_several_batches::test_windows_hold_on_other_batches_of_the_size_of_one")
@pytest.mark.parametrize("name", problems.usual(["gru"], ["tanh", "gru", "lstm"], full=("tanh", "lstm")))
def test_recommended_windows_keep_their_promise(name):
    step, loss, params, carry, batch = promised_problem(name)
    num_steps = len(batch.xs)
    found = unmeasured(step, loss, params, carry, batch)

    def gradient(estimator):
        return ravel_pytree(one_update(estimator, params, carry, batch).grad_sum)[0]

    exact = jax.jit(lambda: gradient(full_bptt(step, loss)))()

    def error(estimate):
        return float(jnp.linalg.norm(estimate - exact) / jnp.linalg.norm(exact))

    def sliding(window):
        return error(jax.jit(lambda: gradient(truncated_bptt(step, loss, window=window, stride=1)))())

    @jax.jit
    def gated(window):  # one compilation for all windows; blocks are fixed gates
        return gradient(gated_bptt(step, loss, gates_fn=lambda key, num_steps: truncation.fixed(num_steps, window)))

    def blocks(window):
        return error(gated(window))

    checks = [(blocks, found.block_window), (sliding, found.sliding_window)]
    for error_at, windows in checks[: 2 if name == "tanh" else 1]:  # every window of a stride is a program of its own
        for tolerance, window in zip(TOLERANCES, windows.tolist(), strict=True):
            assert 2 <= window <= num_steps and error_at(window) <= tolerance
    np.testing.assert_allclose(found.block_error, [blocks(w) for w in found.block_window.tolist()], atol=1e-12)


@pytest.mark.more("test_docs::test_python_blocks_run")
def test_the_printed_page():
    step, loss, params, carry, batch = problems.make("tanh", 16)
    found = diagnose(step, loss, params, carry, batch, num_repeats=2)
    page = str(found)
    lines = page.splitlines()
    assert problems.in_one_line(page).startswith(found.decision)
    title = f"Gradient over 16 steps, {int(found.num_lags)} lags measured: {found.verdict}, reaches "
    assert any(line.startswith(title) for line in lines)
    assert f"half-life {float(found.half_life):.3g} steps" in page
    rows = {line[:20].strip(): line for line in lines}
    wanted = {f"{t:.0%} {kind}": w for kind in ("sliding", "block")
              for t, w in zip(TOLERANCES, getattr(found, f"{kind}_window").tolist(), strict=True)}  # fmt: skip
    names = {"full"}
    for label, window in {**wanted, "full BPTT": 16}.items():
        cells_of = rows[label][20:].split()
        assert cells_of[0] == str(window)
        if label.endswith("block") and window == 16:  # which is full BPTT and not measured twice
            assert cells_of[1:] == ["(full", "BPTT)"]
            continue
        assert "ms" in cells_of and "MiB" in cells_of and float(cells_of[1]) > 0
        if label != "full BPTT":
            assert "× time" in rows[label] and "× memory" in rows[label]
            names.add(f"{label.split()[1]} {window}")
    assert set(found.cost.names) == names
    unpriced = str(unmeasured(*linear_problem(0.5)))
    assert "error at most" in unpriced and not any(word in unpriced for word in (" ms", "MiB", "beside full"))


@pytest.mark.more("test_verdict_and_half_life")
def test_gates_are_any_array_but_no_list():
    """Every third crossing is cut, so that three steps are all that the gradient of an orthogonal network sees."""
    gates = [1.0, 1.0, 0.0] * (NUM_STEPS // 3)
    with pytest.raises(ValueError, match="gates must be an array, got a list"):
        diagnose(*linear_problem(1.0), gates=gates, measure=False)
    for array in (np.array(gates), jnp.array(gates, bool)):
        found = unmeasured(*linear_problem(1.0), gates=array)
        assert (int(found.zero_lag), found.sliding_window.tolist()) == (2, [3, 3])
        assert unmeasured(*linear_problem(1.0)).sliding_window.tolist() != [3, 3]


def test_measure_cost():
    step, loss, params, carry, batch = problems.make("tanh", 8)
    estimators = {"full": full_bptt(step, loss), "cut": truncated_bptt(step, loss, window=3, stride=1)}
    cost = measure_cost(estimators, params, carry, batch, num_repeats=3)
    assert cost.names == ("full", "cut")
    assert cost.seconds.shape == (2, 3) and np.all(cost.seconds > 0)
    assert cost.temporary_bytes.shape == (2,) and np.all(cost.temporary_bytes > 0)
    # The carry; and for windows of three two carries and inputs before it.
    assert cost.state_bytes[0] == 8 * carry.size < cost.state_bytes[1]
    assert cost.state_bytes[1] >= 8 * (carry.size + 2 * (carry.size + batch.xs[0].size))
    np.testing.assert_array_equal(cost.median_seconds, np.median(cost.seconds, axis=1))
    assert cost.spread_seconds.shape == (2,)
    assert [line.split()[0] for line in str(cost).splitlines()] == ["full", "cut"]
    seen = []

    def watched(params, carry, x):  # configuration contexts belong to a thread: the step is traced in this one
        seen.append(jax.config.jax_default_matmul_precision)
        return step(params, carry, x)

    with jax.default_matmul_precision("highest"):
        measure_cost({"full": full_bptt(watched, loss)}, params, carry, batch, num_repeats=1)
    assert set(seen) == {"highest"}
    for options, words in (({"num_repeats": 0}, "num_repeats"), ({}, "estimators must not be empty")):
        with pytest.raises(ValueError, match=words):
            measure_cost(estimators if options else {}, params, carry, batch, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_window": 0}, "max_window must be an integer >= 1, got 0"),
        ({"num_repeats": 0}, "num_repeats must be an integer >= 1, got 0"),
        ({"gates": np.ones(4)}, "disagree on T"),
    ],
)
def test_bad_options_are_refused_before_anything_is_compiled(monkeypatch, options, words):
    monkeypatch.setattr(question, "answer", lambda *args: pytest.fail("compiles"))
    with pytest.raises(ValueError, match=words):
        diagnose(*problems.make("linear", 3), **options)


def test_carries_without_the_batch_shape():
    step = lambda params, carry, x: (carry, carry + params["w"] * x)
    with pytest.raises(ValueError, match=r"carry has shape \(1,\), wanted it to begin with the batch shape \(3,\)"):
        diagnose(step, lambda y, target: y, {"w": jnp.ones(())}, jnp.ones(1), Batch(jnp.ones((2, 3))))


@pytest.mark.more("test_verdict_and_half_life")
def test_gates_are_diagnosed():
    """A cut before every step leaves lag 0 alone: a window of 1 is exact. A cut is no underflow."""
    found = unmeasured(*linear_problem(0.5), gates=jnp.eye(NUM_STEPS)[0])
    assert found.sliding_window.tolist() == found.block_window.tolist() == [1, 1]
    np.testing.assert_array_equal(found.profile.grad_norms[1:2], 0)
    assert (found.verdict, int(found.zero_lag), bool(found.underflow)) == ("vanishing", 1, False)
    assert "half-life under one step" in str(found) and "exactly zero from lag 1 on" in str(found)


SINGLE = functools.partial(jax.tree.map, lambda a: jnp.asarray(a, jnp.float32))


def at_rest(scale):
    """A linear system in single precision whose state stays zero: only what flows back grows or shrinks."""
    step, loss, params, carry, batch = STEP, inner_product, *SINGLE(linear_problem(scale, 60)[2:])
    return step, loss, params, 0 * carry, batch._replace(xs=0 * batch.xs)


@pytest.mark.more("test_evidence::test_exact_zeros")
def test_underflow_is_not_a_healthy_gradient():
    """In half precision, with losses that count little, adjoints are 0 after a few steps."""
    step, loss, *data = at_rest(0.5)
    params, carry, batch = jax.tree.map(lambda a: jnp.asarray(a, jnp.float16), data)
    found = unmeasured(step, loss, params, carry, batch._replace(weights=np.full(60, 1e-6, np.float32)))
    norms = np.asarray(found.flow.arrives)
    lag = int(found.zero_lag)
    assert lag == np.argmax(norms == 0) and norms[lag - 1] > 0
    assert 2 < lag < 8 and bool(found.underflow) and found.verdict == "vanishing"
    assert f"vanished below precision: exactly zero from lag {lag} on" in str(found)
    np.testing.assert_allclose(found.exponent, np.log(0.5), rtol=2e-2)  # goes on beyond precision


@pytest.mark.more("test_nonfinite::test_overflow_that_only_the_backward_pass_has")
def test_overflow_in_the_backward_pass_only():
    found = unmeasured(*at_rest(10.0))
    assert found.verdict == "non-finite" and found.nonfinite.phase == "backward"
    assert abs(int(found.nonfinite.step) - 20) <= 2  # 10^38 is 38 to 41 steps before the end
    assert "first not finite: the adjoint of carry, on the way back" in problems.in_one_line(found)
    np.testing.assert_allclose(found.exponent, np.log(10), rtol=1e-5)
    assert found.decision == "Mend what is not finite first: no window can be recommended."


@pytest.mark.more("test_nonfinite::test_planted_in_weights_and_gates")
def test_nan_in_one_leaf_of_the_carry():
    def step(params, carry, x):
        c = 0.5 * carry["c"] + jnp.sqrt(x)
        h = jnp.tanh(params["w"] * c + carry["h"])
        return {"c": c, "h": h}, h

    xs = np.ones((40, 2))
    xs[37, 1] = -1.0
    batch = Batch(jnp.asarray(xs), jnp.zeros((40, 2)))
    carry = {"c": jnp.zeros(2), "h": jnp.zeros(2)}
    found = diagnose(step, lambda y, target: (y - target) ** 2, {"w": jnp.ones(())}, carry, batch, measure=False)
    assert found.verdict == "non-finite"
    assert (found.nonfinite.leaf, found.nonfinite.phase, int(found.nonfinite.step)) == ("carry['c']", "forward", 37)
    assert "first not finite: carry['c'], on the way forward at step 37" in str(found)


@pytest.mark.filterwarnings("ignore:the gradient is exactly zero")
@pytest.mark.parametrize("where", problems.usual(["step"], ["loss", "step"]))
def test_without_a_path_nothing_is_said_to_decay(where):
    step, loss, params, carry, batch = linear_problem(0.5, 4)
    if where == "loss":
        loss = lambda y, target: jnp.sum(target, axis=-1)
    else:
        step, loss = lambda params, h, x: (STEP(params, h, x)[0], x), lambda y, target: jnp.sum(y, axis=-1)
    found = diagnose(step, loss, params, carry, batch, measure=False)
    assert str(found).splitlines()[:2] == [
        "There is no gradient to truncate.",
        "Gradient over 4 steps: no gradient path",
    ]
    assert "vanishing" not in str(found) and "half-life" not in str(found) and found.advice == ()


@pytest.mark.more("test_verdict_and_half_life")
def test_losses_that_end_early():
    """Lags without a pair of a loss and a carry are not measured."""
    step, loss, params, carry, batch = linear_problem(1.0)
    weights = np.where(np.arange(NUM_STEPS) < 6, np.linspace(1, 2, NUM_STEPS), 0)
    found = unmeasured(step, loss, params, carry, batch._replace(weights=weights))
    assert found.verdict == "stable" and int(found.zero_lag) == -1
    np.testing.assert_allclose(found.profile.cotangent_norms, np.where(np.arange(NUM_STEPS) < 6, 1, np.nan), atol=1e-12)
    page = str(found)
    assert "\nGradient over 12 steps, 6 lags measured: stable, reaches all 6 steps measured\n" in page
    assert "5 steps back: all of what left the loss" in page and int(found.num_lags) == 6


def test_a_sign_of_the_weights_changes_no_size():
    step, loss, params, carry, batch = linear_problem(0.75)
    weights = np.linspace(1, 2, NUM_STEPS)
    both = [unmeasured(step, loss, params, carry, batch._replace(weights=w)) for w in (weights, -weights)]
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    alternating = np.where(np.arange(NUM_STEPS) % 2, -1.0, 1.0) * weights
    mixed = unmeasured(step, loss, params, carry, batch._replace(weights=alternating))
    np.testing.assert_allclose(mixed.profile.cotangent_norms, 0.75 ** np.arange(1, NUM_STEPS + 1), rtol=1e-12)
    assert float(mixed.gradient_norm) > 0 and np.all(np.asarray(mixed.profile.grad_norms) > 0)
    assert mixed.verdict == "vanishing" and int(mixed.zero_lag) == -1 and np.all(mixed.norm_quantiles > 0)


@pytest.mark.more("test_without_a_path_nothing_is_said_to_decay")
def test_a_perfect_fit_is_no_missing_path():
    step, _, params, carry, batch = linear_problem(0.5)
    ys = unroll(step, params, carry, batch.xs)[1]
    found = unmeasured(step, problems.squared_error, params, carry, batch._replace(targets=ys))
    assert "\nGradient over 12 steps: zero loss\n  loss      0, gradient norm 0; " in str(found)
    assert "no gradient path" not in str(found)


@pytest.mark.more("test_evidence::test_exact_zeros")
def test_an_underflow_at_lag_0_is_called_so():
    """In half precision a loss of 1e-9 has no gradient, although all it depends on is there."""
    params, carry, batch = jax.tree.map(lambda a: jnp.asarray(a, jnp.float16), linear_problem(0.5)[2:])
    faint = lambda y, target: 1e-9 * jnp.sum(jnp.square(y.astype(jnp.float32) - target.astype(jnp.float32)), axis=-1)
    found = unmeasured(STEP, faint, params, carry, batch)
    assert (float(found.gradient_norm), int(found.zero_lag), bool(found.underflow)) == (0, 0, True)
    assert "\nGradient over 12 steps: vanished below precision\n" in str(found)
    assert float(found.loss) > 0 and "no gradient path" not in str(found)


@pytest.mark.more("test_verdict_and_half_life")
def test_a_jump_is_told_from_decay():
    """A readout that reads the last input 300 times as large as an orthogonal memory: the rest stays where it is."""
    step, loss, params, carry, batch = linear_problem(1.0)

    def jumping(params, carry, x):
        h, before = carry
        h = step(params, h, x)[0]
        return (h, x @ params["w_x"]), h + 300 * before

    found = unmeasured(jumping, loss, params, (carry, jnp.zeros((2, 4))), batch)
    page = str(found)
    assert (found.verdict, int(found.decay.first_lag), int(found.reach)) == ("stable", 1, NUM_STEPS)
    assert f"jump      to {float(found.flow.arrives[1]):.3g} at lag 1" in page and "reaches all" in page
    np.testing.assert_allclose(found.rate, 0, atol=1e-3)
    assert "jump" not in str(unmeasured(*linear_problem(0.5)))


def test_costs_are_not_measured_of_what_is_traced():
    """Closed over or given; under jit a constant is traced like everything else."""
    problem = linear_problem(0.5)
    step = lambda scale: lambda params, h, x: STEP({**params, "w_h": scale * params["w_h"]}, h, x)
    for run in (
        lambda scale: diagnose(*problem),
        lambda scale: diagnose(step(scale), *problem[1:]),
        lambda scale: diagnose(*problem[:2], {**problem[2], "w_h": scale * problem[2]["w_h"]}, *problem[3:]),
    ):
        with pytest.raises(ValueError, match="measure=True needs arrays, got traced values; pass measure=False"):
            jax.eval_shape(run, 1.0)


def test_a_second_call_compiles_nothing(caplog):
    """With the same functions and shapes; what a step that cannot be hashed says is the same."""
    step, loss, params, carry, batch = linear_problem(0.5, 4)
    run = functools.partial(diagnose, measure=False)

    def compiled(function):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level("WARNING"):
            found = function()
        return found, sum("Finished XLA compilation of jit(_read)" in record.message for record in caplog.records)

    first, number = compiled(lambda: run(step, loss, params, carry, batch))
    assert number == 1
    doubled = {**params, "w_h": 2 * params["w_h"]}
    second, number = compiled(lambda: run(step, loss, doubled, carry, batch))
    assert number == 0
    np.testing.assert_allclose([first.rate, second.rate], np.log([0.5, 1.0]), atol=1e-12)

    class Unhashable:
        __hash__ = None
        __call__ = staticmethod(step)

    np.testing.assert_allclose(run(Unhashable(), loss, params, carry, batch).rate, first.rate)
