"""What the page of a diagnosis decides and says, for the numbers beside it."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from problems import in_one_line, usual

from jbptt import Batch, cells, diagnose, lag_profile, step_jacobians, tasks, truncation_curve
from jbptt.analysis.costs import Cost
from jbptt.analysis.lags import linearise
from jbptt.diagnosis import dynamics, page
from jbptt.problem import problem_of

NUM_STEPS = 16


@functools.cache
def found():
    return diagnose(*problems.make("tanh", NUM_STEPS), measure=False)


def with_blocks(rough, fine, **changes):
    base = replace(found(), constant_loss=10 * found().loss)
    return replace(base, windows=base.windows._replace(block=np.array([rough, fine]), **changes))


COST = Cost(
    ("full", "block 2", "block 8"),
    np.array([[1.0, 2, 1, 1], [2, 4.2, 2.2, 2.3], [0.9, 2.2, 0.9, 1.1]]),
    np.array([100, 10, 50]),
    np.array([8, 8, 8]),
)


def test_the_decision_names_the_block_that_does():
    """By the windows that keep 1 % and 10 %; with what they cost where it was measured."""
    both = with_blocks(2, 8).decision
    assert both.startswith("Blocks of 8 steps are as good as full BPTT: they keep the gradient within 1 %.")
    assert both.endswith("Blocks of 2 keep it within 10 %.")
    assert "10 %" not in with_blocks(6, 8).decision
    measured = replace(with_blocks(2, 8), cost=COST).decision
    assert "1 %, at 0.50 times the memory and the same time." in measured
    assert "10 %, at 0.10 times the memory and 2.08 to 2.23 times the time." in measured
    assert with_blocks(8, 16).decision == (
        "Train with full BPTT, or with blocks of 8 steps where memory is short: they keep the gradient within 10 %."
    )
    tried = dict(blocks_upper_error=np.array([np.nan, 0.5, np.nan, 0.123, 0.1, 0]))  # of 1, 2, 4, 8, 12, 16
    words = "Train with full BPTT: no block of at most half the 16 steps keeps the gradient within 10 %"
    assert with_blocks(12, 16, **tried).decision == f"{words} (8 steps: 12 %)."
    for few in ([np.nan, np.nan, 0.1, 0], [np.nan, 0.046, 0.04, 0]):
        tried["blocks_upper_error"] = np.array([np.nan, np.nan, *few])  # good enough here, and refused for want of cuts
        assert with_blocks(12, 16, **tried).decision.startswith("Train with full BPTT: so few blocks are cut")
    for one_part, why in ((True, "one part of it carries nearly all"), (False, "its parts cancel to rounding")):
        untold = with_blocks(0, 0, told=np.array(False), one_part=np.array(one_part))
        assert untold.decision.startswith(f"This batch cannot tell which window will do: {why}")
    growing = with_blocks(12, 16)
    growing = replace(growing, decay=growing.decay._replace(verdict_index=np.array(2)))
    assert growing.decision.endswith("%). The gradient grows on its way back: clip it.")


def test_an_untrained_model_is_called_so():
    for constant, loss, untrained in ((1.0, 1.2, True), (1.0, 0.96, True), (1.0, 0.9, False), (-1.0, -1.1, False)):
        one = replace(with_blocks(2, 8), constant_loss=np.array(constant), loss=np.array(loss))
        assert ("than a constant, as untrained ones do" in one.decision) == untrained
        assert ("worse than a constant" in one.decision) == (loss == 1.2)
    assert "no better" not in replace(with_blocks(2, 8), constant_loss=np.array(np.nan)).decision


@pytest.mark.more("test_learning_study::test_the_best_constant")
def test_the_loss_of_a_constant_prediction():
    """Every prediction replaced by the mean of those that count; NaN where it is no number."""
    step, loss, params, carry, batch = problems.make("tanh", 6)
    mask, weights = np.ones((6, problems.EXAMPLES), bool), np.linspace(0, 1, 6)
    mask[2:, 1] = False
    xs = np.where(mask[..., None], batch.xs, np.nan)
    one = diagnose(step, loss, params, carry, batch._replace(xs=xs, mask=mask, weights=weights), measure=False)
    w = mask * weights[:, None]
    ys = np.asarray(jax.lax.scan(lambda c, x: step(params, c, x), carry, batch.xs)[1])
    mean = np.mean(ys[w > 0], axis=0)
    losses = np.array(
        [loss(jnp.broadcast_to(mean, y.shape), target) for y, target in zip(ys, batch.targets, strict=True)]
    )
    np.testing.assert_allclose(one.constant_loss, np.sum(w * losses) / np.sum(w), rtol=1e-12)
    both = lambda params, carry, x: (carry := step(params, carry, x)[0], (carry, jnp.argmax(carry, -1)))
    of_first = lambda y, target: loss(y[0], target)
    assert np.isnan(diagnose(both, of_first, params, carry, batch, measure=False).constant_loss)


def test_explain_says_what_each_line_means():
    one = replace(with_blocks(2, 8), cost=COST)
    short, long = str(one).splitlines(), one.explain().splitlines()
    assert max(map(len, short + long)) <= page.WIDTH
    assert [line for line in long if line in short] == short
    labels = [line[2:12].strip() for line in short if line.startswith("  ") and line[2] != " "]
    assert {"loss", "sources", "decay", "arrives", "state"} <= set(labels)
    for label in ("loss", "sources", "decay", "arrives", "state"):
        (at,) = (i for i, line in enumerate(long) if line[2:12].strip() == label)
        assert any(line.startswith(" " * 14) for line in long[at + 1 : at + 3]), label


def test_the_sources_are_the_windows_of_the_curve():
    one = found()
    errors = np.asarray(one.curve.relative_error)
    first = lambda level: next(w for w in range(1, 17) if np.all(errors[w - 1 :][~np.isnan(errors[w - 1 :])] <= level))
    assert f"90 % from the last {first(0.1)}, 99 % from the last {first(0.01)}" in in_one_line(one)
    all_needed = replace(one, windows=one.windows._replace(sources=np.array([16, 16, 16])))
    assert "only all steps together give half of this batch's gradient" in in_one_line(all_needed)


def test_leaves_that_forget_at_different_paces_are_named():
    def step(params, carry, x):
        slow, fast = 0.99 * carry["slow"] + params * x, 0.5 * carry["fast"] + params * x
        return {"slow": slow, "fast": fast}, 1e-3 * slow + fast

    xs, targets = np.random.default_rng(0).normal(size=(2, 100, 4))
    carry = {"slow": jnp.zeros(4), "fast": jnp.zeros(4)}
    loss = lambda y, target: (y - target) ** 2
    one = diagnose(step, loss, jnp.asarray(1.0), carry, Batch(xs, targets), measure=False)
    words = "half-life of carry['fast'] 1 steps, of carry['slow'] 69 steps; at the last lag nearly all that arrives is "
    words += "carry['slow']'s"
    assert words in in_one_line(one), str(one)


def test_examples_of_two_kinds_are_told_apart():
    step = lambda params, h, x: ((h_ := x[0] * h + params * x[1]), h_)
    kept = jnp.broadcast_to(jnp.where(jnp.arange(8) < 4, 0.5, 1.0), (50, 8))
    xs, targets = np.random.default_rng(0).normal(size=(2, 50, 8))
    batch, loss = Batch((kept, xs), targets), lambda y, target: (y - target) ** 2
    one = diagnose(step, loss, jnp.asarray(1.0), jnp.zeros(8), batch, measure=False)
    lag = int(one.num_lags) - 1
    assert f"they differ: {lag} steps back arrives less than a tenth in 4 of 8, most of it in 4 of 8" in in_one_line(
        one
    )
    same = diagnose(step, loss, jnp.asarray(1.0), jnp.zeros(8), Batch((0.5 + 0 * kept, xs), targets), measure=False)
    assert "they differ" not in str(same)


SQUARES = lambda y, target: (y - target) ** 2


def scalar(step, carry, num_steps=60, **batch):
    xs, targets = np.random.default_rng(0).normal(size=(2, num_steps, 8))
    return diagnose(step, SQUARES, jnp.asarray(1.0), carry, Batch(xs, targets, **batch), measure=False)


@pytest.mark.more("test_leaves_that_forget_at_different_paces_are_named")
def test_leaves_of_one_pace_are_not_told_apart():
    def integrators(params, carry, x):
        a, b = carry["a"] + params * x, carry["b"] + params * x
        return {"a": a, "b": b}, a + b

    assert "leaves" not in str(scalar(integrators, {"a": jnp.zeros(8), "b": jnp.zeros(8)}))


@pytest.mark.more("test_examples_of_two_kinds_are_told_apart")
def test_padding_is_no_kind_of_example():
    """Of an integrator all arrives, however short a sequence is."""
    mask = np.arange(60)[:, None] < np.array([60, 60, 60, 10, 10, 10, 10, 10])
    one = scalar(lambda params, h, x: ((h_ := h + params * x), h_), jnp.zeros(8), mask=jnp.asarray(mask))
    assert "they differ" not in str(one)
    assert np.isnan(one.flow.by_example[20, 3]) and float(one.flow.by_example[20, 0]) == 1


@pytest.mark.more("test_examples_of_two_kinds_are_told_apart")
def test_one_example_that_carries_all_is_called_so():
    weights = np.broadcast_to(np.where(np.arange(8) == 0, 1.0, 1e-4), (60, 8))
    one = scalar(lambda params, h, x: ((h_ := 0.5 * h + params * x), h_), jnp.zeros(8), weights=weights)
    assert not one.windows.told and "one part of it carries nearly all" in in_one_line(one)


@pytest.mark.more("test_recurrent_matrices_are_those_that_the_carry_meets")
def test_a_clock_beside_the_state_does_not_count():
    """What flows back through it reaches no parameter: neither the exponent nor the leaves speak of it."""
    cell = cells.with_linear_readout(cells.rnn(3, 8), 2)

    def step(params, carry, x):
        clock, h = carry
        h, y = cell.step(params, h, x)
        return (clock + 1, h), y + clock[:, None]

    params = {**cell.init(jax.random.key(0)), "w_h": 0.3 * jnp.eye(8)}
    xs, targets = (np.random.default_rng(0).normal(size=(40, 4, n)) for n in (3, 2))
    carry = jnp.zeros(4), cell.initial_carry((4,))
    one = diagnose(step, tasks.squared_error, params, carry, Batch(xs, targets), measure=False)
    assert float(one.exponent) < -1 and float(one.dynamics.own_path) > 0.5  # of 0.3 times the identity
    assert np.all(np.isnan(one.flow.leaf_arrives[:, 0])) and "leaves" not in str(one)


def two_layers(params, carry, x):
    a = jnp.tanh(x @ params[0]["w_x"] + carry[0] @ params[0]["w_h"])
    b = jnp.tanh(a @ params[1]["w_x"] + carry[1] @ params[1]["w_h"])
    return (a, b), b


RECURRENT = {
    "two layers": ("params[0]['w_h']", "params[1]['w_h']"),
    "rnn": ("params['w_h']",),
    "gru": (),
}


@pytest.mark.parametrize("name", usual(["two layers"], RECURRENT))
def test_recurrent_matrices_are_those_that_the_carry_meets(name):
    """Not a layer's input matrix, as square as it may be."""
    if name == "two layers":
        draw = lambda seed: {"w_x": jnp.eye(6), "w_h": 0.5 * jnp.eye(6) + seed * 1e-3}
        step, params, carry = two_layers, [draw(0), draw(1)], (jnp.zeros((4, 6)),) * 2
    else:
        cell = getattr(cells, name)(6, 6)
        step, params, carry = cell.step, cell.init(jax.random.key(0)), jnp.zeros((4, 6))
    xs, targets = np.random.default_rng(0).normal(size=(2, 10, 4, 6))
    one = diagnose(step, tasks.squared_error, params, carry, Batch(xs, targets), measure=False)
    assert one.recurrent_weights == RECURRENT[name]


@pytest.mark.more("test_learning_study::test_the_best_constant")
def test_the_mean_of_many_predictions_in_half_precision():
    """More of them than float16 can count to."""
    step = lambda w, h, x: (h, w + x)
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(80, 1000)) * 0.1, jnp.float16)
    batch = Batch(xs, jnp.full((80, 1000), 0.5, jnp.float16))
    one = diagnose(step, SQUARES, jnp.asarray(0.5, jnp.float16), jnp.zeros(1000, jnp.float16), batch, measure=False)
    assert float(one.constant_loss) < 1e-3 < float(one.loss)


@pytest.mark.parametrize("name", ["rnn", "gru", "lstm"])
def test_own_path_is_the_diagonal_of_the_jacobians(name):
    """Against every Jacobian; units of an rnn mix, those of gated cells keep themselves."""
    cell = getattr(cells, name)(3, 16)
    params, carry = cell.init(jax.random.key(0)), cell.initial_carry((32,))
    xs = jax.random.normal(jax.random.key(1), (60, 32, 3))
    batch = Batch(xs, jnp.zeros((60, 32, 16)))
    problem = problem_of(cell.step, tasks.squared_error, params, carry, batch)
    share = float(jax.jit(lambda: dynamics.own_path(linearise(problem), [True] * (1 + (name == "lstm"))))())
    each = jax.vmap(step_jacobians, (None, None, 0, 1))
    jacobians = np.asarray(each(cell.step, params, carry, xs)).reshape(-1, *2 * [16 * (1 + (name == "lstm"))])
    own, squares = np.diagonal(jacobians.mean(0)) ** 2, (jacobians**2).mean(0).sum(0)
    leaves = [slice(0, 16), slice(16, 32)][: 1 + (name == "lstm")]
    wanted = max(own[leaf].sum() / squares[leaf].sum() for leaf in leaves)
    np.testing.assert_allclose(share, wanted, atol=0.03)
    assert (share > 0.5) == (name != "rnn")


def test_a_diagnosis_as_a_dataset():
    pytest.importorskip("xarray")
    one = replace(with_blocks(2, 8), cost=COST)
    data = one.to_xarray()
    assert int(data.sources.sel(share=0.9)) == int(one.windows.sources[1])
    assert data.block.values.tolist() == [1, 2, 4, 8, 12, 16] and data.blocks_upper_error.dims == ("block",)
    assert int(data.block_window.sel(error=0.01)) == 8 and data.attrs["verdict"] == one.verdict
    np.testing.assert_array_equal(data.arrives, one.flow.arrives)
    np.testing.assert_array_equal(data.relative_error.sel(window=3), one.curve.relative_error[2])
    assert float(data.half_life) == float(one.half_life) and float(data.exponent_error) == float(one.dynamics.error)
    assert data.seconds.sel(estimator="block 8").values.tolist() == COST.seconds[2].tolist()
    assert data.arrives_by_example.dims == ("lag", "example_0") and data.leaf_arrives.dims == ("lag", "leaf")
    many = jax.tree.map(lambda a: jnp.stack([a, a]), replace(one, cost=None)).to_xarray()
    assert many.arrives.dims == ("axis_0", "lag") and many.loss.dims == ("axis_0",)
    np.testing.assert_array_equal(many.isel(axis_0=1).arrives, data.arrives)


def test_lags_and_windows_as_datasets():
    pytest.importorskip("xarray")
    problem = problems.make("tanh", 6)
    profile = jax.jit(lambda: lag_profile(*problem, max_lag=4, per_leaf=True))()
    data = profile.to_xarray()
    np.testing.assert_array_equal(data["grad_norms['w_h']"].sel(lag=2), profile.grad_norms["w_h"][2])
    assert data["cotangent_norms[0]"].dims == ("lag",)
    curve = jax.jit(lambda: truncation_curve(*problem, max_window=4))()
    data = curve.to_xarray()
    assert float(data.cosine.sel(window=3)) == float(curve.cosine[2]) and data.window.values.tolist() == [1, 2, 3, 4]
