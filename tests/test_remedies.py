"""The experiment with remedies against plain training loops, closed forms and numbers made by hand."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from problems import assert_close, usual

from jbptt import cells, lag_profile, tasks, truncation, unroll
from jbptt.analysis.lyapunov import lyapunov_spectrum
from jbptt.experiments import outcomes, remedies
from jbptt.experiments.outcomes import Measures, Remedies
from jbptt.experiments.remedies import compare_remedies
from jbptt.experiments.treatments import (
    FAMILIES,
    PATIENTS,
    REMEDIES,
    RNN_REMEDIES,
    Doses,
    lyapunov_penalty,
    spectral_penalty,
)

OPTIMIZED = True

KEY = jax.random.key(7)
NUM_SEEDS, NUM_UPDATES, NUM_STEPS, HIDDEN, EXAMPLES, HELDOUT, DRAWS, EXPONENTS = 2, 4, 40, 24, 3, 5, 3, 6
OPTIONS = {
    "num_updates": NUM_UPDATES,
    "num_seeds": NUM_SEEDS,
    "num_steps": NUM_STEPS,
    "hidden_size": HIDDEN,
    "batch_size": EXAMPLES,
    "num_heldout": HELDOUT,
    "num_draws": DRAWS,
    "num_exponents": EXPONENTS,
}
SIZES = remedies.Sizes(NUM_STEPS, HIDDEN, EXAMPLES, HELDOUT, NUM_UPDATES, DRAWS, EXPONENTS)
RADII = 0.5, 1.2
DOSES = Doses(
    learning_rate=0.004,
    smaller_learning_rate=0.001,
    window=5,
    keep_prob=0.7,
    max_norm=0.3,
    weight_decay=0.2,
    spectral=0.5,
    lyapunov=0.4,
    negative_slope=0.1,
)
# The penalties decide, the data hardly count.
STRONG_RADII = 0.5, 1.75
STRONG = DOSES._replace(learning_rate=1e-4, weight_decay=100.0, spectral=1000.0, lyapunov=1500.0)


# The parts of `compare_remedies`, whose parameters it does not return; they share its compiled programs.


@functools.cache
def prepared():
    """The runs of each family, and the data."""
    return remedies.prepare(SIZES, NUM_SEEDS, REMEDIES, KEY, jnp.asarray(RADII), DOSES)


def sizes_of(family):
    return SIZES if family == "rnn" else SIZES._replace(num_exponents=None, num_draws=0)


@functools.cache
def start_of(family):
    return remedies.begin(family, sizes_of(family), prepared()[0][family])


@functools.cache
def trained(family):
    """Parameters before and after."""
    runs, data = prepared()
    start = start_of(family)
    return start, remedies.train_runs(family, sizes_of(family), runs[family], start, data.batches)


@functools.cache
def moderate():
    return compare_remedies(KEY, radii=RADII, doses=DOSES, **OPTIONS)


def quiet(params):
    """Without input, bias and readout the carry stays 0, and so do all gradients of the loss but the readout bias's."""
    return {**params, **{name: jnp.zeros_like(params[name]) for name in ("w_x", "b", "w_y")}}


def in_a_table(tree):
    return jax.tree.map(lambda a: np.asarray(a).reshape(2, len(RNN_REMEDIES), NUM_SEEDS, *a.shape[1:]), tree)


@functools.cache
def strong(prepare_fn):
    """The tanh networks trained for longer: parameters and measures before and after."""
    sizes = SIZES._replace(num_updates=40)
    runs, data = remedies.prepare(sizes, NUM_SEEDS, RNN_REMEDIES, KEY, jnp.asarray(STRONG_RADII), STRONG)
    start = prepare_fn(remedies.begin("rnn", SIZES, runs["rnn"]))
    after = remedies.train_runs("rnn", sizes, runs["rnn"], start, data.batches)
    return [in_a_table((p, remedies.examine_runs("rnn", SIZES, runs["rnn"], p, data.heldout))) for p in (start, after)]


def family_of(name):
    return name if name in FAMILIES else "rnn"


def one_run(patient, name, seed):
    """Parameters before and after, batches, held-out batch and key of a run, found by name."""
    runs, data = prepared()
    family = family_of(name)
    num_remedies = len(RNN_REMEDIES) if family == "rnn" else 1
    remedy = RNN_REMEDIES.index(name) if family == "rnn" else 0
    i = (PATIENTS.index(patient) * num_remedies + remedy) * NUM_SEEDS + seed
    start, after = jax.tree.map(lambda a: a[i], trained(family))
    batches, heldout = jax.tree.map(lambda a: a[seed], tuple(data))
    return start, after, batches, heldout, runs[family].key[i]


def plain_cell(name):
    cell = {
        "gru": cells.gru(2, HIDDEN),
        "lstm": cells.lstm(2, HIDDEN),
        "relu": cells.rnn(2, HIDDEN, activation=jax.nn.relu),
        "leaky relu": cells.rnn(2, HIDDEN, activation=partial(jax.nn.leaky_relu, negative_slope=0.1)),
    }.get(name, cells.rnn(2, HIDDEN))
    return cells.with_linear_readout(cell, 1)


@functools.cache
def plain_gradient(name):
    """`(params, batch, gates) -> (loss, gradient)` by `jax.grad` through `unroll`, the last output read."""
    cell = plain_cell(name)

    def loss(params, batch, gates):
        _, ys = unroll(cell.step, params, cell.initial_carry(batch.xs.shape[1:-1]), batch.xs, gates=gates)
        return jnp.mean(0.5 * jnp.square(ys[-1, :, 0] - batch.targets[-1, :, 0]))

    return jax.jit(jax.value_and_grad(loss))


# Their start and their cell are all that they change.
SAME_TRAINING = "orthogonal init", "identity init", "relu", "leaky relu", "gru", "lstm"


def same_cell(name):
    return name if name in ("gru", "lstm", "relu", "leaky relu") else "nothing"


def mean_square_exponent(params, xs):
    cell = plain_cell("nothing")
    found = lyapunov_spectrum(cell.step, params, cell.initial_carry(), xs, num_exponents=EXPONENTS)
    return jnp.mean(found.exponents**2)


PENALTIES = {
    "spectral penalty": jax.jit(jax.grad(lambda params, xs: 0.5 * spectral_penalty(params))),
    "gradient flossing": jax.jit(jax.grad(lambda params, xs: 0.4 * mean_square_exponent(params, xs))),
}


def gates_of(name, key):
    if name == "fixed truncation":
        return jnp.array([1.0, 1, 1, 1, 1, *[0, 1, 1, 1, 1] * 7])
    return truncation.randomized(key, NUM_STEPS, 0.7) if name == "randomized truncation" else jnp.ones(NUM_STEPS)


def optimizer_of(name):
    """As anyone would write it down for this remedy alone."""
    plain = optax.sgd(0.001 if name == "smaller learning rate" else 0.004)
    if name == "clipping":
        return optax.chain(optax.clip_by_global_norm(0.3), plain)
    return optax.chain(optax.add_decayed_weights(0.2), plain) if name == "weight decay" else plain


def plain_training(name, params, batches, key, fresh_gates=True):
    """One update after another, every sequence from zeros."""
    optimizer = optimizer_of(name)
    state = optimizer.init(params)
    for n in range(NUM_UPDATES):
        batch = jax.tree.map(lambda a, n=n: a[n], batches)
        if n == 0 or fresh_gates:
            key, fresh = jax.random.split(key)
        _, grads = plain_gradient(same_cell(name))(params, batch, gates_of(name, fresh))
        if name in PENALTIES:
            grads = jax.tree.map(jnp.add, grads, PENALTIES[name](params, batch.xs[:, 0]))
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.full
def test_flossing_leads_the_vanishing_patient_towards_zero():
    """Its leading exponent, in every run, against the run without a remedy."""
    exponent = np.abs(moderate().after.exponent[PATIENTS.index("vanishing")])
    assert np.all(exponent[REMEDIES.index("gradient flossing")] < exponent[REMEDIES.index("nothing")])


@pytest.mark.more("test_a_remedy_as_data_is_a_plain_training_loop")
@pytest.mark.parametrize("name", REMEDIES)
def test_losses_are_those_before_and_after(name):
    found = moderate()
    for patient, seed in (("vanishing", 0), ("exploding", 1)):
        start, after, _, heldout, _ = one_run(patient, name, seed)
        place = PATIENTS.index(patient), REMEDIES.index(name), seed
        for measures, params in ((found.before, start), (found.after, after)):
            loss, _ = plain_gradient(same_cell(name))(params, heldout, jnp.ones(NUM_STEPS))
            np.testing.assert_allclose(measures.loss[place], loss, rtol=1e-10)


@pytest.mark.parametrize("name", usual(["lstm"], REMEDIES))
def test_a_remedy_as_data_is_a_plain_training_loop(name):
    """One that has a program of its own in the usual run, and those that share one in CI."""
    for patient, seed in (("vanishing", 0), ("exploding", 1)):
        start, after, batches, _, key = one_run(patient, name, seed)
        wanted = plain_training(name, start, batches, jax.random.fold_in(key, 1))
        assert_close(after, wanted, rtol=1e-10)
        if name not in ("nothing", *SAME_TRAINING):
            assert np.abs(after["w_h"] - plain_training("nothing", start, batches, key)["w_h"]).max() > 1e-6


@pytest.mark.more("test_a_remedy_as_data_is_a_plain_training_loop")
def test_randomized_gates_are_new_in_every_update():
    """Training that keeps the gates of its first update ends elsewhere."""
    start, after, batches, _, key = one_run("exploding", "randomized truncation", 0)
    kept = plain_training("randomized truncation", start, batches, jax.random.fold_in(key, 1), fresh_gates=False)
    assert np.abs(after["w_h"] - kept["w_h"]).max() > 1e-6


@pytest.mark.more("test_a_remedy_as_data_is_a_plain_training_loop")
def test_the_patients_have_the_promised_radius_and_the_same_matrix():
    for family, num_gates in (("rnn", 1), ("gru", 3), ("lstm", 4)):
        start = start_of(family)["w_h"].reshape(2, -1, NUM_SEEDS, HIDDEN, num_gates, HIDDEN)
        for p, radius in enumerate(RADII):
            for seed in range(NUM_SEEDS):
                for gate in range(num_gates):
                    sizes = np.abs(np.linalg.eigvals(start[p, 0, seed, :, gate]))
                    np.testing.assert_allclose(sizes, radius, rtol=1e-10)
        np.testing.assert_allclose(start[0, 0] / RADII[0], start[1, 0] / RADII[1], rtol=1e-12)
        assert np.abs(start[:, :, 0] - start[:, :, 1])[:, 0].max() > 0.1
    matrices = start_of("rnn")["w_h"].reshape(2, len(RNN_REMEDIES), NUM_SEEDS, HIDDEN, HIDDEN)
    for r, name in enumerate(RNN_REMEDIES):
        for p, radius in enumerate(RADII):
            scale = {"orthogonal init": 1 / radius, "identity init": 0}.get(name, 1)
            wanted = scale * matrices[p, 0] + (name == "identity init") * np.eye(HIDDEN)
            np.testing.assert_allclose(matrices[p, r], wanted, atol=1e-14)


def test_seeds_share_all_data():
    """One array serves every patient and remedy of a seed; each example asks for its first input."""
    _, data = prepared()
    for xs, targets in ((data.batches.xs, data.batches.targets), (data.heldout.xs, data.heldout.targets)):
        xs, targets = np.asarray(xs), np.asarray(targets)
        np.testing.assert_array_equal(targets[..., -1, :, 0], xs[..., 0, :, 0])
    shapes = data.batches.xs.shape, data.heldout.xs.shape
    assert shapes == ((NUM_SEEDS, NUM_UPDATES, NUM_STEPS, EXAMPLES, 1), (NUM_SEEDS, NUM_STEPS, HELDOUT, 1))
    every = np.concatenate([np.ravel(xs[..., 0]) for xs in (data.batches.xs, data.heldout.xs)])
    assert len(set(every.tolist())) == every.size


@pytest.mark.more("test_a_remedy_as_data_is_a_plain_training_loop")
def test_the_loss_that_takes_no_memory():
    """The lowest of any constant: half the variance of the targets."""
    _, data = prepared()
    found, targets = remedies.constant_losses(data.heldout), np.asarray(data.heldout.targets)[:, -1, :, 0]
    np.testing.assert_allclose(found, np.var(targets, axis=1) / 2, rtol=1e-12)
    np.testing.assert_allclose(moderate().constant_loss, found, rtol=1e-12)


@pytest.mark.more("test_a_remedy_as_data_is_a_plain_training_loop")
def test_measures_of_a_quiet_network_in_closed_form():
    """`J = ρ Qᵀ` at every step: the exponent is ln ρ, and adjoints change by ρ per step."""
    runs, data = prepared()
    start = start_of("rnn")
    found = remedies.examine_runs("rnn", SIZES, runs["rnn"], {**quiet(start), "w_y": start["w_y"]}, data.heldout)
    found = in_a_table(found)
    for p, radius in enumerate(RADII):
        for name in ("nothing", "clipping", "weight decay", "gradient flossing", "randomized truncation"):
            r = RNN_REMEDIES.index(name)
            np.testing.assert_allclose(found.exponent[p, r], np.log(radius), rtol=1e-10)
            np.testing.assert_allclose(found.adjoint_ratio[p, r], (NUM_STEPS - 1) * np.log10(radius), rtol=1e-10)
        for name in ("orthogonal init", "identity init"):
            np.testing.assert_allclose(found.exponent[p, RNN_REMEDIES.index(name)], 0, atol=1e-10)
            np.testing.assert_allclose(found.adjoint_ratio[p, RNN_REMEDIES.index(name)], 0, atol=1e-10)
    np.testing.assert_array_equal(found.adjoint_ratio[:, RNN_REMEDIES.index("fixed truncation")], -np.inf)
    found = in_a_table(remedies.examine_runs("rnn", SIZES, runs["rnn"], quiet(start), data.heldout))
    assert np.all(np.isnan(found.adjoint_ratio[:, 0])), "no readout: no gradient starts"


@pytest.mark.parametrize("name", ["nothing", "fixed truncation", "leaky relu", "lstm"])
@pytest.mark.more("test_a_remedy_as_data_is_a_plain_training_loop")
def test_adjoint_ratio_is_the_lag_profile_from_end_to_end(name):
    """With one loss, at the last step, lag k is the carry that enters step T − 1 − k."""
    found = moderate()
    for seed in range(NUM_SEEDS):
        start, _, _, heldout, _ = one_run("exploding", name, seed)
        batch = heldout._replace(xs=heldout.xs[:, :EXAMPLES], targets=heldout.targets[:, :EXAMPLES])
        norms = profile_of(same_cell(name))(start, batch, gates_of(name, None)).cotangent_norms
        with np.errstate(divide="ignore"):
            wanted = np.log10(norms[-1] / norms[0])
        measured = found.before.adjoint_ratio[1, REMEDIES.index(name), seed]
        np.testing.assert_allclose(measured, wanted, rtol=1e-10)


@functools.cache
def profile_of(name):
    cell = plain_cell(name)
    carry = cell.initial_carry((EXAMPLES,))
    return jax.jit(
        lambda params, batch, gates: lag_profile(
            cell.step, tasks.squared_error, params, carry, batch, max_lag=NUM_STEPS, gates=gates
        )
    )


@pytest.mark.more("test_a_remedy_as_data_is_a_plain_training_loop")
def test_exponent_is_that_of_each_example():
    found = moderate()
    cell = plain_cell("nothing")

    @jax.jit
    def exponents(params, xs):
        def one(xs):
            return lyapunov_spectrum(
                cell.step, params, cell.initial_carry(), xs, num_exponents=1, num_discarded=8
            ).exponents[0]

        return jax.vmap(one, in_axes=1)(xs)

    for patient in PATIENTS:
        start, after, _, heldout, _ = one_run(patient, "nothing", 1)
        for measures, params in ((found.before, start), (found.after, after)):
            wanted = exponents(params, heldout.xs[:, :EXAMPLES])
            np.testing.assert_allclose(measures.exponent[PATIENTS.index(patient), 0, 1], np.mean(wanted), rtol=1e-10)


@pytest.mark.parametrize("name", ["fixed truncation", "randomized truncation", "clipping"])
@pytest.mark.more("test_a_remedy_as_data_is_a_plain_training_loop")
def test_gradient_error_is_that_of_the_gradient_in_use(name):
    found = moderate()
    for p, patient in enumerate(PATIENTS):
        start, _, _, heldout, key = one_run(patient, name, 0)
        batch = heldout._replace(xs=heldout.xs[:, :EXAMPLES], targets=heldout.targets[:, :EXAMPLES])

        def gradient(gates, start=start, batch=batch):
            return np.asarray(ravel_pytree(plain_gradient("nothing")(start, batch, gates)[1])[0])

        exact = gradient(jnp.ones(NUM_STEPS))
        size = np.linalg.norm(exact)
        errors, cosines = [], []
        for draw_key in jax.random.split(jax.random.fold_in(key, 2), DRAWS):
            used = gradient(gates_of(name, draw_key))
            if name == "clipping":
                assert size > DOSES.max_norm
                used = used * DOSES.max_norm / size
            errors.append(np.linalg.norm(used - exact) / size)
            cosines.append(used @ exact / np.linalg.norm(used) / size)
        place = p, REMEDIES.index(name), 0
        np.testing.assert_allclose(found.before.gradient_error[place], np.sqrt(np.mean(np.square(errors))), rtol=1e-10)
        np.testing.assert_allclose(found.before.gradient_cosine[place], np.mean(cosines), rtol=1e-10)


@pytest.mark.more("test_a_remedy_as_data_is_a_plain_training_loop")
def test_only_truncation_and_clipping_change_the_gradient():
    found = moderate()
    inexact = [REMEDIES.index(name) for name in ("fixed truncation", "randomized truncation", "clipping")]
    others = [r for r in range(len(REMEDIES)) if r not in inexact]
    assert np.all(found.before.gradient_error[:, inexact] > 1e-4)
    assert np.all(found.before.gradient_error[:, others] < 1e-12)
    np.testing.assert_allclose(found.before.gradient_cosine[:, others], 1, rtol=1e-12)


@pytest.mark.more("test_a_remedy_as_data_is_a_plain_training_loop")
def test_theory_of_the_patients():
    """Contraction and expansion as the radius has it, and initialisations in between."""
    before = strong(dict)[0][1]
    assert np.all(before.exponent[0, 0] < -0.5) and np.all(before.adjoint_ratio[0, 0] < -10)
    assert np.all(before.exponent[1, 0] > 0) and np.all(before.adjoint_ratio[1, 0] > 1)
    gated = moderate().before.exponent[0, REMEDIES.index("lstm")]
    for nearer in (
        before.exponent[0, RNN_REMEDIES.index("orthogonal init")],
        before.exponent[0, RNN_REMEDIES.index("identity init")],
        gated,
    ):
        assert np.all(np.abs(nearer) < np.abs(before.exponent[0, 0]) / 2)


def test_spectral_penalty_pushes_the_leading_singular_vectors():
    w_h = np.random.default_rng(0).normal(size=(HIDDEN, HIDDEN))
    grads = jax.grad(spectral_penalty)({"w_h": jnp.asarray(w_h), "b": jnp.ones(2)})
    values, vectors = np.linalg.eigh(w_h @ w_h.T)
    leading = np.outer(vectors[:, -1], vectors[:, -1]) @ w_h  # σ u vᵀ = u uᵀ W
    np.testing.assert_allclose(grads["w_h"], leading, rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(grads["b"], 0)
    np.testing.assert_allclose(spectral_penalty({"w_h": jnp.asarray(w_h)}), values[-1] / 2, rtol=1e-12)
    tied = jax.grad(spectral_penalty)({"w_h": 2 * jnp.eye(HIDDEN)})["w_h"]
    np.testing.assert_allclose(np.linalg.svd(tied)[1], [2] + (HIDDEN - 1) * [0], atol=1e-12)


def test_lyapunov_penalty_leaves_out_what_is_singular():
    """A quiet network with eigenvalues ½, ¼ and 0: (ln² ½ + ln² ¼) / 3, and no NaN in the gradient."""
    cell = cells.rnn(1, 3)
    params = {"w_x": jnp.zeros((1, 3)), "w_h": jnp.diag(jnp.array([0.5, 0.25, 0])), "b": jnp.zeros(3)}
    run = jax.jit(jax.value_and_grad(lambda p: lyapunov_penalty(cell.step, p, jnp.zeros(3), jnp.zeros((40, 1)), 3)))
    value, grads = run(params)
    # The frame starts at random and settles within a few steps of the 40.
    np.testing.assert_allclose(value, (np.log(0.5) ** 2 + np.log(0.25) ** 2) / 3, rtol=0.1)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    np.testing.assert_allclose(np.diag(grads["w_h"])[:2], 2 / 3 * np.log([0.5, 0.25]) / [0.5, 0.25], rtol=0.2)
    value, grads = run({**params, "w_h": jnp.zeros((3, 3))})
    assert value == 0 and all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(grads))


@pytest.mark.more("test_words_about_divergence")
def test_runs_that_diverge_are_counted():
    found = compare_remedies(KEY, radii=RADII, doses=DOSES._replace(learning_rate=1e60), **OPTIONS)
    spared = REMEDIES.index("smaller learning rate")
    others = [r for r in range(len(REMEDIES)) if r not in (spared, REMEDIES.index("clipping"))]
    np.testing.assert_array_equal(found.diverged[:, others], 1)
    np.testing.assert_array_equal(found.diverged[:, spared], 0)
    assert "diverged in 2 of 2 runs" in str(found) and "diverged 2/2" in str(found)
    assert np.all(np.isfinite(found.before.loss))


@pytest.mark.full
def test_vmap_changes_nothing_and_a_choice_only_leaves_out():
    whole = moderate()
    chosen = "clipping", "nothing", "fixed truncation"  # in any order
    run = partial(compare_remedies, remedies=chosen, radii=RADII, doses=DOSES, **OPTIONS)
    found = jax.vmap(run)(jnp.stack([jax.random.key(1), KEY]))
    assert found.remedies == ("nothing", "fixed truncation", "clipping") and found.patients == PATIENTS
    rows = jnp.array([REMEDIES.index(name) for name in found.remedies])
    wanted = jax.tree.map(lambda a: a[:, rows], (whole.before, whole.after))
    for actual, desired in zip(jax.tree.leaves((found.before, found.after)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(actual[1], desired, rtol=1e-8, atol=1e-12)
    assert not np.allclose(found.before.loss[0], found.before.loss[1])
    traced = jax.eval_shape(
        jax.jit(lambda key, radii, doses: run(key, radii=radii, doses=doses)), KEY, jnp.ones(2), DOSES
    )
    assert traced.after.loss.shape == (2, 3, NUM_SEEDS)


# Words


CALM = Measures(loss=0.5, adjoint_ratio=-1.0, exponent=-0.1, gradient_error=0.0, gradient_cosine=1.0)


def made(nothing_after=None, **rows):
    """One patient and three seeds; a row is (what differs before, what differs after); the seeds differ by 0.001."""

    def measures(change):
        row = CALM._replace(**(change or {}))
        jitter = Measures(0.001, 0.0, 0.0, 0.0, 0.0)
        return [np.asarray(a, float) + j * np.arange(3) for a, j in zip(row, jitter, strict=True)]

    rows = {"nothing": (None, nothing_after), **{name.replace("_", " "): row for name, row in rows.items()}}
    before, after = (
        Measures(*(np.stack(leaf)[None] for leaf in zip(*(measures(row[i]) for row in rows.values()), strict=True)))
        for i in (0, 1)
    )
    return Remedies(before, after, np.full(3, 0.4), np.array([0.5]), ("patient",), tuple(rows), 10, 20)


def words(found, name):
    case = outcomes.case_of(found, 0, found.remedies.index(name))
    return outcomes.verdict(case), outcomes.remarks(case)


def test_words_about_loss():
    found = made(
        worse=(None, {"loss": [0.6, 0.61, 0.62]}),
        better=(None, {"loss": 0.3}),
        same=(None, {"loss": 0.5004}),
        scattered=(None, {"loss": [0.2, 0.6, 0.9]}),
        shifted=(None, {"loss": [0.7, 0.2, 0.6]}),
        raised=({"loss": 0.1}, {"loss": 0.3}),
    )
    assert words(found, "worse")[0] == "worse"
    assert "loss worse than with nothing by 0.11 ± 0.01 over the seeds" in words(found, "worse")[1]
    assert words(found, "better") == ("better", [])
    assert words(found, "same") == ("same", [])
    assert words(found, "scattered")[0] == "same", "0.07 worse on average, but a spread of 0.35"
    assert words(found, "shifted") == ("same", [])
    assert words(found, "raised") == ("better", ["training raised the loss by 0.2 ± 0 over the seeds"])


def test_words_about_divergence():
    found = made(two=(None, {"loss": [np.nan, 0.5, np.inf]}), all=(None, {"loss": np.nan, "exponent": np.nan}))
    assert words(found, "two") == ("worse, 2/3 div.", ["diverged in 2 of 3 runs"])
    assert words(found, "all") == ("worse, 3/3 div.", ["diverged in 3 of 3 runs"])
    np.testing.assert_allclose(found.diverged, [[0, 2 / 3, 1]])
    nothing = made({"loss": np.nan}, fine=(None, None), one=(None, {"loss": [np.nan, 0.4, 0.4]}),
                   all=(None, {"loss": np.inf}))  # fmt: skip
    assert words(nothing, "nothing") == ("diverged 3/3", ["diverged in 3 of 3 runs"])
    assert words(nothing, "fine") == ("better, 0/3 div.", []), "no loss of nothing is left to compare with"
    assert words(nothing, "one") == ("better, 1/3 div.", ["diverged in 1 of 3 runs"])
    assert words(nothing, "all")[0] == "diverged 3/3"
    assert max(map(len, str(nothing).splitlines())) <= 110


def test_a_diverged_run_says_nothing_else():
    """What is left of it, an exponent or an error, is not averaged with the runs that ended."""
    left = {"loss": [0.5, np.nan, 0.5], "exponent": [-0.1, 9.0, -0.1], "gradient_error": [0.0, np.inf, 0.0]}
    found = made(left=(None, {**left, "adjoint_ratio": [-1.0, -np.inf, -1.0]}))
    assert words(found, "left")[1] == ["diverged in 1 of 3 runs"]
    row = next(line for line in str(found).splitlines() if line.startswith("left"))
    assert "-0.10 -> -0.10" in row and "inf" not in row


def test_words_about_balance():
    found = made(
        further=(None, {"exponent": 0.3}),
        nearer=(None, {"exponent": 0.05}),
        exploding=(None, {"adjoint_ratio": 3.0}),
        closer=(None, {"adjoint_ratio": 0.9}),
        cut=(None, {"adjoint_ratio": [-np.inf, -np.inf, -1.0]}),
    )
    assert words(found, "further")[1] == ["exponent further from 0 than with nothing by 0.20"]
    assert words(found, "nearer")[1] == [] and words(found, "closer")[1] == []
    assert words(found, "exploding")[1] == ["adjoints 10^2.0 times further from even than with nothing"]
    assert words(found, "cut")[1] == ["no gradient reaches step 0 in 2 of 3 runs"]


def test_words_about_the_gradient():
    off, scaled = {"gradient_error": 0.5, "gradient_cosine": 0.9}, {"gradient_error": 0.5, "gradient_cosine": 1 - 1e-8}
    found = made(off=(off, off), scaled=(scaled, None), both=(scaled, off), tiny=({"gradient_error": 1e-6}, None))
    found.after.loss[:] += 0.0001 * np.arange(5)[:, None]  # so that no row is as with no remedy
    assert words(found, "off")[1] == ["gradient off: error 0.50 before and 0.50 after training"]
    assert words(found, "scaled")[1] == ["gradient rescaled, its direction kept: error 0.50 before training"]
    assert words(found, "both")[1] == ["gradient off: error 0.50 before and 0.50 after training"]
    assert words(found, "tiny")[1] == []


def test_words_about_a_remedy_without_effect():
    assert words(made(idle=(None, None)), "idle") == ("same", ["has no effect: the same result as with no remedy"])
    assert words(made(idle=(None, None)), "nothing") == ("same", [])


def test_one_seed_has_no_spread():
    three = made(other=(None, {"loss": [0.6, 0.2, 0.2]}))
    one = jax.tree.map(lambda a: a[..., :1] if a.ndim == 3 else a, three)
    assert words(one, "other")[1] == ["loss worse than with nothing by 0.1 ± 0 over the seeds",
                                      "training raised the loss by 0.1 ± 0 over the seeds"]  # fmt: skip


def test_the_table():
    text = str(made(other_remedy=({"loss": 1e9, "adjoint_ratio": -np.inf}, {"loss": 1.2345, "exponent": -np.inf})))
    title, head, nothing, other, mean, where, remark = text.splitlines()
    assert mean.split() == ["predicting", "the", "mean", "0.4"] and len(mean) == head.index("held-out loss") + 13
    assert title == "patient (spectral radius 0.5), T = 20, seeds: 3, before -> after 10 updates"
    assert [part.strip() for part in head.split("  ") if part.strip()][-2:] == ["held-out loss", "against nothing"]
    assert " ".join(nothing.split()) == "nothing -1.0 -> -1.0 -0.10 -> -0.10 0 -> 0 0.501 -> 0.501"
    assert " ".join(other.split()) == "other remedy -inf -> -1.0 -0.10 -> -inf 0 -> 0 1e+09 -> 1.24 worse"
    assert where == "where a remedy fails or makes things worse:"
    assert remark == "  other remedy: loss worse than with nothing by 0.73 ± 0 over the seeds"
    assert "fails" not in str(made(better=(None, {"loss": 0.2})))


def test_remedies_as_a_dataset():
    pytest.importorskip("xarray")
    found = made(better=(None, {"loss": 0.2}))
    data = found.to_xarray()
    assert data.loss.dims == ("time", "patient", "remedy", "seed") and data.attrs["num_updates"] == 10
    np.testing.assert_array_equal(data.loss.sel(time="after", remedy="better"), found.after.loss[:, 1])
    assert data.radius.values.tolist() == np.asarray(found.radii).tolist()
    assert data.constant_loss.dims == ("seed",)


@pytest.mark.more("test_the_table")
def test_the_table_of_an_experiment():
    found = moderate()
    np.testing.assert_array_equal(found.radii, RADII)
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 110
    for p, patient in enumerate(PATIENTS):
        start = next(i for i, line in enumerate(lines) if line.startswith(patient))
        for r, name in enumerate(REMEDIES):
            line = lines[start + 2 + r]
            assert line.startswith(name + " ") and f" {found.before.exponent[p, r].mean():.2f} -> " in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remedies": ("nothing", "prayer")}, "remedies must be of nothing, .*lstm; got prayer"),
        ({"remedies": ("gru",)}, "remedies must include 'nothing'"),
        ({"remedies": "nothin"}, "got nothin"),
        ({"num_seeds": 0}, "num_seeds must be an integer >= 1, got 0"),
        ({"num_steps": 1}, "num_steps must be an integer >= 2, got 1"),
        ({"num_updates": 1.5}, "num_updates must be an integer"),
        ({"num_heldout": 4}, "num_heldout must be an integer >= 16, got 4"),
        ({"num_exponents": 33}, "num_exponents must be <= hidden_size = 32, got 33"),
        ({"radii": (0.5, -1.0)}, r"radii \(exploding\) must be a finite number > 0"),
        ({"radii": (0.5,)}, "radii must be 2 numbers"),
        ({"radii": "high"}, "radii must be 2 numbers"),
        ({"doses": Doses(window=0)}, "doses.window must be an integer >= 1, got 0"),
        ({"doses": Doses(keep_prob=0)}, r"doses.keep_prob must lie in \(0, 1\]"),
        ({"doses": Doses(keep_prob=np.full(10, 0.9))}, r"doses.keep_prob must be a scalar, got shape \(10,\)"),
        ({"doses": Doses(learning_rate=-1.0)}, "doses.learning_rate must be a finite number > 0"),
        ({"doses": Doses(max_norm=0)}, "doses.max_norm must be a finite number > 0"),
        ({"doses": Doses(lyapunov=-1)}, "doses.lyapunov must be a finite number >= 0, got -1"),
        ({"doses": Doses(spectral="much")}, "doses.spectral must be a finite number >= 0, got 'much'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        compare_remedies(KEY, **options)
