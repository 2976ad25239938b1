"""One picture for each result: on the axes given, with what the result says in it."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

import jbptt
from jbptt import plots, powers, truncation
from jbptt.experiments.outcomes import Measures


@pytest.fixture(scope="module")
def results():
    """Every result of one small lstm, and of a matrix."""
    step, loss, params, carry, batch = problems.make("lstm", 8)
    common = step, loss, params, carry, batch

    @jax.jit
    def run():
        one = jax.tree.map(lambda a: a[0], carry)
        xs = batch.xs[:, 0]
        return {
            "coverage": truncation.coverage(truncation.fixed(8, 3)),
            "gradient_flow": jbptt.gradient_flow(*common),
            "adjoints": jbptt.adjoints(*common),
            "lag_profile": jbptt.lag_profile(*common, max_lag=8),
            "truncation_curve": jbptt.truncation_curve(*common, max_window=8),
            "gradient_sources": jbptt.analysis.gradient_sources(*common),
            "jacobian_products": jbptt.jacobian_products(step, params, one, xs, spans=(1, 2, 4)),
            "gate_paths": jbptt.analysis.gate_paths(params, one, xs),
            "lyapunov_spectrum": jbptt.lyapunov_spectrum(step, params, one, xs),
        }

    matrix = np.diag([1.0, 0.5])
    cost = jbptt.Cost(
        ("full", "block 2"), np.array([[1e-3, 2e-3], [3e-3, 4e-3]]), np.array([2.0**20, 2.0**19]), np.zeros(2)
    )
    more = {"alignment": powers.alignment(matrix, np.ones(2), 9), "eigenvalues": powers.eigenvalues(matrix, 3)}
    return {**jax.device_get(run()), **more, "cost": cost}


NAMES = [
    "coverage",
    "gradient_flow",
    "adjoints",
    "lag_profile",
    "truncation_curve",
    "gradient_sources",
    "jacobian_products",
    "gate_paths",
    "lyapunov_spectrum",
    "alignment",
    "eigenvalues",
    "cost",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_of_every_result(results, name):
    draw, ax = getattr(plots, f"plot_{name}"), Figure().subplots()
    assert draw(results[name], ax=ax) is ax and (ax.has_data() or ax.images)
    assert ax.get_xlabel() and (ax.get_ylabel() or name == "cost")
    draw(results[name]).figure.draw_without_rendering()  # on a figure of its own, labels and all


def test_every_plot_is_tried():
    found = {name.removeprefix("plot_") for name in dir(plots) if name.startswith("plot_")}
    elsewhere = {"learning_study", "learning_curves"}  # test_learning_study.py
    assert found == {
        *NAMES,
        "diagnosis",
        "remedies",
        "comparison",
        "agreement",
        "schedule",
        "history",
        "sweep",
        *elsewhere,
    }


def test_the_lines_are_the_numbers(results):
    ax = plots.plot_lag_profile(results["lag_profile"])
    np.testing.assert_array_equal(ax.get_lines()[0].get_ydata(), results["lag_profile"].cotangent_norms)
    np.testing.assert_array_equal(ax.get_lines()[1].get_ydata(), results["lag_profile"].grad_norms)
    assert ax.get_yscale() == "log"
    heights = [bar.get_height() for bar in plots.plot_gradient_sources(results["gradient_sources"]).patches]
    np.testing.assert_allclose(sum(heights), 1)
    labels = [text.get_text() for text in plots.plot_gate_paths(results["gate_paths"]).get_legend().get_texts()]
    assert labels == ["cell", "input", "forget", "candidate", "output"]
    curve = results["truncation_curve"]
    sliding, blocks = plots.plot_truncation_curve(curve).get_lines()[2:4]
    np.testing.assert_array_equal(sliding.get_ydata()[:7], curve.relative_error[:7])
    np.testing.assert_array_equal(blocks.get_ydata()[:7], curve.block_relative_error[:7])


def test_leaf_by_leaf_every_leaf_has_its_line():
    step, loss, params, carry, batch = problems.make("lstm", 4)
    profile = jax.jit(lambda: jbptt.lag_profile(step, loss, params, carry, batch, max_lag=4, per_leaf=True))()
    labels = [text.get_text() for text in plots.plot_lag_profile(profile).get_legend().get_texts()]
    assert labels == ["carry[0]", "carry[1]", *(f"params['{name}']" for name in sorted(params))]


def test_what_no_log_axis_shows_is_left_out():
    zero = jbptt.LagProfile(jnp.array([1.0, 0.0, jnp.nan]), jnp.zeros(3))
    plots.plot_lag_profile(zero).figure.draw_without_rendering()
    plots.plot_gradient_flow(np.zeros((3, 3))).figure.draw_without_rendering()
    spectrum = jbptt.LyapunovSpectrum(jnp.array([0.1, -jnp.inf]), jnp.array([0.01, 0.0]), jnp.zeros((1, 2)))
    assert plots.plot_lyapunov_spectrum(spectrum).get_title() == "1 of 2 exponents are not finite"


def test_a_diagnosis_has_rings_at_its_windows():
    curve = jbptt.TruncationCurve(jnp.arange(1, 5), *(jnp.array([0.5, 0.09, 0.02, 0.005]) for _ in range(4)))
    windows = {"sliding_window": np.array([2, 0]), "block_window": np.array([3, 9])}
    found = SimpleNamespace(
        curve=curve,
        block_error=np.array([0.07, 0.002]),
        verdict="vanishing",
        num_steps=9,
        flow=SimpleNamespace(num_lags=4),
        **windows,
    )
    ax = plots.plot_diagnosis(found)
    rings = [(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.get_lines() if line.get_marker() == "o"]
    assert rings == [(2, pytest.approx(0.09)), (3, 0.07), (9, 0.002)]  # of blocks: the error of those very blocks
    assert "vanishing over 9 steps" in ax.get_title()
    found.flow.num_lags = 1
    assert "not measured (one lag) over 9 steps" in plots.plot_diagnosis(found).get_title()


def test_remedies_are_dots_before_and_after():
    before, after = np.full((2, 3, 2), 2.0), np.array([[[1.0, 3.0], [1.0, np.inf], [np.nan, np.nan]], 3 * [[0.5, 0.7]]])
    names = ("nothing", "clipping", "relu")
    stage = lambda values: Measures(*(values + i for i in range(5)))
    stages = stage(before), stage(after)
    sizes = {"num_updates": 4, "num_steps": 5}
    found = jbptt.experiments.Remedies(*stages, jnp.array([0.4, 0.6]), jnp.ones(2), ("a", "b"), names, **sizes)
    for i, measure in enumerate(("loss", "adjoint_ratio", "exponent", "gradient_error")):
        ax = plots.plot_remedies(found, measure=measure)
        dots = [line.get_xdata() for line in ax.get_lines() if line.get_marker() == "o"]
        wanted = [[2, 2, 2], [2, 1, np.nan], [2, 2, 2], [0.6, 0.6, 0.6]]
        np.testing.assert_allclose(dots, np.array(wanted) + i)
        assert [label.get_text() for label in ax.get_yticklabels()] == list(names) and ax.yaxis_inverted()
        ax.figure.draw_without_rendering()
    with pytest.raises(ValueError, match="measure must be one of adjoint_ratio, exponent, gradient_error, loss"):
        plots.plot_remedies(found, measure="time")


def test_a_comparison_has_bias_and_spread():
    found = jbptt.Comparison(*(jnp.array([0.1 * i, 0.5]) for i in range(1, 6)), jnp.eye(2), ("a", "b"), num_samples=4)
    ax = plots.plot_comparison(found)
    bias, spread = (line for line in ax.get_lines() if line.get_marker() in ("o", "s"))
    np.testing.assert_allclose(bias.get_xdata(), [0.1, 0.5], rtol=1e-6)
    np.testing.assert_allclose(spread.get_xdata(), np.sqrt([0.3, 0.5]), rtol=1e-6)
    (bars,) = (line.get_segments() for line in ax.collections)
    np.testing.assert_allclose([np.ptp(segment[:, 0]) for segment in bars], [0.8, 2.0], rtol=1e-6)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    ax.figure.draw_without_rendering()


def test_agreement_is_every_pair():
    pairs = jnp.array([[1.0, -0.25, jnp.nan], [-0.25, 1.0, 0.5], [jnp.nan, 0.5, 1.0]])
    found = jbptt.Comparison(*(jnp.ones(3) for _ in range(5)), pairs, ("a", "b", "c"), num_samples=4)
    ax = plots.plot_agreement(found)
    assert [text.get_text() for text in ax.texts] == [
        "1.00",
        "-0.25",
        "–",
        "-0.25",
        "1.00",
        "0.50",
        "–",
        "0.50",
        "1.00",
    ]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b", "c"] and ax.yaxis_inverted()
    (image,) = ax.images
    assert image.get_clim() == (-0.25, 1.0)
    ax.figure.draw_without_rendering()


def test_a_history_shows_what_broke_and_what_was_evaluated():
    numbers = jnp.array([[4.0, 3.0, jnp.nan, 1.0], [1.0, 0.0, 0.0, 0.5]])
    whole, applied = jnp.isfinite(numbers[0]), jnp.isfinite(numbers[0])
    evals = {"held out": jnp.array([2.0, 1.5]), "profile": jnp.ones((2, 3)), "norm": jnp.array([jnp.nan, 0.7])}
    found = jbptt.History(*numbers, {}, None, None, whole, applied, jnp.arange(4), evals, jnp.array([2, 4]))
    ax = plots.plot_history(found, ax=(given := Figure().subplots()))
    assert ax is given and ax.get_xlabel() == "updates" and ax.get_yscale() == "log"
    lines = {line.get_label(): np.asarray(line.get_xydata()).T.tolist() for line in ax.get_lines()}
    assert lines["loss, before the update"][1][:2] == [4, 3] and lines["loss, before the update"][0] == [0, 1, 2, 3]
    assert np.isnan(lines["gradient norm"][1][2]) and lines["gradient norm"][1][3] == 0.5
    assert lines["evaluation ['held out']"] == [[2, 4], [2.0, 1.5]] and lines["not finite"][0] == [2]
    assert len(lines) == 5  # of the profile there is none
    ax.figure.draw_without_rendering()
    plain = found._replace(loss=-found.loss, finite=applied | True, evals=None, eval_updates=None)
    ax = plots.plot_history(plain)
    assert ax.get_yscale() == "linear" and len(ax.get_lines()) == 2
    ax.figure.draw_without_rendering()
    with pytest.raises(ValueError, match=r"history must be that of one run, got losses of shape \(2, 4\); pass"):
        plots.plot_history(jax.tree.map(lambda a: jnp.stack([a, a]), found))


def swept(axes, *, run=False, **outputs):
    """What `sweep` returns of these axes and arrays; further axes of an array are called `step`."""
    xarray = pytest.importorskip("xarray")
    dims = ("run",) if run else tuple(axes)
    variables = {name: ((*dims, *["step"] * (a.ndim - len(dims))), a) for name, a in outputs.items()}
    coords = {name: ("run" if run else name, np.asarray(values)) for name, values in axes.items()}
    finite = np.all([np.isfinite(a).reshape(*a.shape[: len(dims)], -1).all(-1) for a in outputs.values()], axis=0)
    return xarray.Dataset(variables, coords | {"finite": (dims, finite)})


RATES = [0.1, 0.001, 0.01]


def test_the_lines_of_a_sweep_are_medians_and_its_bands_quartiles():
    score, loss = np.random.default_rng(0).uniform(1, 2, (2, 3, 2, 5))
    loss[0, 1, 3] = np.nan
    found = swept({"rate": RATES, "window": [4, 16], "seed": range(5)}, score=score, loss=loss)
    ax = Figure().subplots()
    assert plots.plot_sweep(found, ax=ax) is ax
    assert ax.get_xlabel() == "rate" and ax.get_ylabel() == "loss"  # before the score
    assert ax.get_xscale() == "log" and ax.get_yscale() == "linear" and list(ax.get_xticks()) == sorted(RATES)
    assert ax.get_title() == "median and quartiles over seed\n1 of 30 runs not finite, left out"
    legend = ax.get_legend()
    assert legend.get_title().get_text() == "window" and [t.get_text() for t in legend.get_texts()] == ["4", "16"]
    for j, (line, band) in enumerate(zip(ax.get_lines(), ax.collections, strict=True)):
        low, median, high = np.nanquantile(loss[[1, 2, 0], j], [0.25, 0.5, 0.75], axis=-1)
        np.testing.assert_array_equal(line.get_xdata(), sorted(RATES))
        np.testing.assert_allclose(line.get_ydata(), median)
        corners = band.get_paths()[0].vertices
        for x, *edges in zip(sorted(RATES), low, high, strict=True):
            at = corners[corners[:, 0] == x, 1]
            np.testing.assert_allclose([at.min(), at.max()], edges)
    ax = plots.plot_sweep(found.sel(rate=0.1), "score", x="seed")
    np.testing.assert_allclose([line.get_ydata() for line in ax.get_lines()], score[0])
    assert "median" not in ax.get_title() and len(ax.collections) == 0  # one run each


def test_the_lines_of_a_history_go_along_its_own_axis():
    loss = np.random.default_rng(0).uniform(1, 2, (2, 3, 7))
    loss[1, 0, 4] = np.inf  # all of this run is left out
    found = swept({"cell": ["gru", "lstm"], "seed": range(3)}, loss=loss)
    ax = plots.plot_sweep(found)
    assert ax.get_xlabel() == "step" and ax.get_legend().get_title().get_text() == "cell"
    first, second = ax.get_lines()
    np.testing.assert_allclose(first.get_ydata(), np.median(loss[0], 0))
    np.testing.assert_allclose(second.get_ydata(), np.median(loss[1, 1:], 0))
    np.testing.assert_array_equal(first.get_xdata(), range(7))
    again = plots.plot_sweep(found.transpose("step", "seed", "cell")).get_lines()
    np.testing.assert_array_equal([line.get_ydata() for line in again], [first.get_ydata(), second.get_ydata()])
    (alone,) = plots.plot_sweep(found.sel(cell="gru", seed=1)).get_lines()
    np.testing.assert_array_equal(alone.get_ydata(), loss[0, 1])
    ax = plots.plot_sweep(found, x="cell")  # the last entries, at equal distances
    np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), [np.median(loss[0, :, 6]), np.median(loss[1, 1:, 6])])
    assert ax.get_ylabel() == "loss (last entry, step 6)"
    assert [(t.get_position()[0], t.get_text()) for t in ax.get_xticklabels()] == [(0, "gru"), (1, "lstm")]


def test_plain_points_of_a_sweep_are_dots():
    rate, loss = np.array([0.1, 0.5, 0.2, 0.3]), np.array([1.0, 2.0, np.nan, 90.0])
    found = swept({"rate": rate, "window": [4, 4, 8, 8], "seed": range(4)}, run=True, loss=loss)
    found = found.assign_coords(finished=("run", [True, False, True, True]))
    ax = plots.plot_sweep(found)
    dots = {t.get_label(): (list(t.get_xdata()), list(t.get_ydata()), t.get_linestyle()) for t in ax.get_lines()}
    assert plots.plot_sweep(found, x="seed").get_xlabel() == "seed"
    assert dots == {"4": ([0.1], [1.0], "None"), "8": ([0.3], [90.0], "None")} and ax.get_yscale() == "log"
    assert ax.get_title() == "one dot for each run\n1 of 4 runs not finite, left out; 1 of 4 not finished"


def test_of_many_lines_of_a_sweep_eight_are_drawn():
    found = swept({"rate": [1, 2], "window": range(20)}, error=np.arange(40.0).reshape(2, 20))
    ax = plots.plot_sweep(found)
    assert [line.get_ydata()[0] for line in ax.get_lines()] == [0, 3, 5, 8, 11, 14, 16, 19]
    assert ax.get_legend().get_title().get_text() == "window\n(8 of 20 values)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variable": "los"}, "variable must be one of loss, got 'los'"),
        ({"x": "wide"}, "x must be one of rate, got 'wide'"),
        ({"dataset": {}}, "dataset must be what jbptt.sweep or load_sweep returns"),
    ],
)
def test_what_is_no_sweep_is_not_drawn(options, message):
    options = {"dataset": swept({"rate": RATES}, loss=np.ones(3))} | options
    with pytest.raises(ValueError, match=message):
        plots.plot_sweep(**options)
