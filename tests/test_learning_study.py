"""With which window to train: each piece against a slow one of its own, and every sentence against its numbers."""

import functools
import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from made_studies import made_up
from problems import CELLS, EXAMPLES, INPUT, OUTPUT, readout, squared_error, usual

import jbptt
from jbptt import Batch, cells, truncation
from jbptt.learning import studies
from jbptt.learning.constants import best_constant_loss
from jbptt.learning.intervals import differences
from jbptt.learning.judging import Curves, checkpoints, judge, places_at_equal_time, still_falling
from jbptt.learning.lessons import lessons_of
from jbptt.learning.rounds import Trained
from jbptt.learning.study_page import write_page
from jbptt.learning.trainings import Trainings, usual_optimizer
from jbptt.learning.verdicts import verdicts_of
from jbptt.learning.ways import FULL, GATES, default_windows, middle_window, ways_of

NUM_STEPS = 6
STEP = cells.with_readout(CELLS["tanh"].step, readout)


def start(key):
    """Parameters of a tanh network with its readout."""
    core, w_y = jax.random.split(key)
    params = CELLS["tanh"].init(core)
    return params | {"w_y": jax.random.normal(w_y, (3, OUTPUT)), "b_y": jnp.zeros(OUTPUT)}


@jax.jit
def batch_of(key):
    """White noise, with weights that differ."""
    x, y = jax.random.split(key)
    return Batch(
        jax.random.normal(x, (NUM_STEPS, EXAMPLES, INPUT)),
        jax.random.normal(y, (NUM_STEPS, EXAMPLES, OUTPUT)),
        weights=jnp.linspace(0.5, 1.5, NUM_STEPS),
    )


def scaled_batch(key):
    """The same with other targets."""
    batch = batch_of(key)
    return batch._replace(targets=5 * batch.targets)


@functools.partial(jax.jit, static_argnums=0)
def stacked(number, seed=0):
    return jax.vmap(batch_of)(jax.random.split(jax.random.key(seed), number))


CARRY = jnp.zeros((EXAMPLES, 3))


def trainings_of(batches, stream=False, num_updates=4, heldout=None, params=start):
    lessons = lessons_of(batches, heldout, stream, jax.random.key(5))
    ways = ways_of(STEP, squared_error, NUM_STEPS, windows=[2], sliding=[3], keep_probs=[0.5])
    return Trainings(
        STEP, squared_error, params, CARRY, lessons, ways, usual_optimizer, num_updates, 2, jax.random.key(3)
    )


COVERAGE = {
    FULL: truncation.full_coverage(NUM_STEPS),
    "blocks of 2": truncation.coverage(truncation.fixed(NUM_STEPS, 2)),
    "sliding 3": truncation.window_coverage(NUM_STEPS, 3, 1),
}


GRADIENT = jax.jit(
    lambda params, carry, batch, coverage: jbptt.testing.brute_force_gradient(
        STEP, squared_error, params, carry, batch, coverage=coverage
    )
)


@jax.jit
def summed(params, carry, batch):
    """The last carry, and the losses of a batch times their weights, summed."""
    after, ys = jbptt.unroll(STEP, params, carry, batch.xs)
    return after, (squared_error(ys, batch.targets) * batch.weights[:, None]).sum()


def by_hand(trainings, way, rate, seed):
    """The same training in a Python loop, its gradients by brute force from the coverage of the way."""
    key, data, _ = trainings.keys(seed)
    params, read = trainings.start(key), trainings.reader(seed, data)
    lessons, carry = trainings.lessons, CARRY
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    state = optimizer.init(params)
    losses = []

    def evaluate(params, live):
        for batches in (lessons.validation, lessons.test):
            entering, total, weight = (live if lessons.stream else CARRY), 0.0, 0.0
            for i in range(len(batches.xs)):
                batch = jax.tree.map(lambda a: a[i], batches)  # noqa: B023
                after, added = summed(params, entering, batch)
                total, weight = total + added, weight + EXAMPLES * batch.weights.sum()
                entering = after if lessons.stream else CARRY
            losses.append(float(total / weight))

    evaluate(params, CARRY)
    for number in range(trainings.num_updates):
        batch = read(number)
        grads = GRADIENT(params, carry, batch, COVERAGE[way])
        carry = summed(params, carry, batch)[0] if lessons.stream else CARRY
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        if number % 2 == 1:
            evaluate(params, carry)
    return np.reshape(losses, (-1, 2)).T, params


@pytest.mark.parametrize("stream", usual([True], [True, False]))
@pytest.mark.parametrize("i", usual([1], range(3)), ids=COVERAGE)
def test_a_training_is_a_loop_by_hand(stream, i):
    trainings = trainings_of(stacked(5), stream)
    way = trainings.ways[i]
    point = {"way": i, "learning_rate": 0.05, "seed": 1}
    found = jax.jit(lambda p: trainings.run(p | {"program": way.program}, jax.random.key(9)))(point)
    (validation, test), trained = by_hand(trainings, way.name, 0.05, 1)
    np.testing.assert_allclose(found["validation"], validation, rtol=1e-11)
    np.testing.assert_allclose(found["test"], test, rtol=1e-11)
    batch = trainings.reader(1, trainings.keys(1)[1])(0)
    for params, name in ((trainings.start(trainings.keys(1)[0]), "error_at_start"), (trained, "error_at_end")):
        exact, estimate = (
            jax.flatten_util.ravel_pytree(GRADIENT(params, CARRY, batch, coverage))[0]
            for coverage in (COVERAGE[FULL], COVERAGE[way.name])
        )
        wanted = np.linalg.norm(estimate - exact) / np.linalg.norm(exact)
        np.testing.assert_allclose(found[name], wanted, rtol=1e-9, atol=1e-12)


def test_random_cuts_are_unbiased_and_new_in_every_update():
    """Gates of the program are those of `randomized_bptt`: their mean is one, they are 0 or 2 at 0.5."""
    trainings = trainings_of(batch_of)
    way = [way.name for way in trainings.ways].index("random, keep 0.5")
    assert trainings.ways[way].program == GATES
    estimator = trainings._estimator({"program": GATES, "way": jnp.asarray(way)})
    params, batch = start(jax.random.key(0)), batch_of(jax.random.key(1))
    state = estimator.init(params, CARRY, batch, key=jax.random.key(2))

    def body(state, _):
        estimate, state = estimator.update(params, state, batch)
        return state, estimate.info["gates"][1:]

    _, gates = jax.lax.scan(body, state, length=400)
    assert {*np.unique(np.asarray(gates))} == {0.0, 2.0}
    assert abs(float(gates.mean()) - 1) < 5 / math.sqrt(gates.size)
    assert len(np.unique(np.asarray(gates), axis=0)) == 2 ** (NUM_STEPS - 1)


def test_what_a_state_learns_goes_on_where_batches_do_not():
    """A window that follows a bound is chosen from what earlier batches showed; the carry is not theirs."""
    from jbptt.learning.ways import anew

    key_x, key_y = jax.random.split(jax.random.key(0))
    xs, ys = jax.random.normal(key_x, (40, EXAMPLES, INPUT)), jax.random.normal(key_y, (40, EXAMPLES, OUTPUT))
    batch, params = Batch(xs, ys), start(jax.random.key(1))
    params["w_h"] = 0.3 * params["w_h"]
    adaptive = jbptt.adaptive_bptt(STEP, squared_error, tolerance=0.5, max_window=24)
    each = anew(adaptive, CARRY)
    _, outputs = jbptt.unroll(STEP, params, CARRY, xs)
    state, windows = each.init(params, CARRY, batch), []
    for _ in range(2):
        estimate, state = jax.jit(each.update)(params, state, batch)
        windows.append(int(estimate.info["window"]))
        np.testing.assert_allclose(estimate.loss, squared_error(outputs, ys).mean(), rtol=1e-12)
    assert windows[0] == 24 and windows[1] < 24


def test_seeds_are_paired():
    """Ways and rates share start and batches of a seed; another seed has others; the run's own key is not read."""
    trainings = trainings_of(stacked(5))

    run = jax.jit(lambda point, key: trainings.run(point | {"program": GATES}, jax.random.key(key)))

    def losses(way, rate, seed, key):
        return np.asarray(run({"way": way, "learning_rate": rate, "seed": seed}, key)["validation"])

    one = losses(0, 0.05, 1, 0)
    np.testing.assert_array_equal(one, losses(0, 0.05, 1, 7))
    assert losses(1, 0.05, 1, 0)[0] == one[0] and losses(1, 0.05, 1, 0)[1] != one[1]
    assert losses(0, 0.05, 2, 0)[0] != one[0]


def places(batches, read, number):
    """Which of the batches the first updates read."""
    xs = np.asarray(batches.xs)
    return [int(np.flatnonzero((xs == np.asarray(read(i).xs)).all((1, 2, 3)))[0]) for i in range(number)]


def test_every_batch_comes_before_any_comes_again():
    lessons = lessons_of(stacked(7), None, False, jax.random.key(0))
    order = places(lessons.train, lessons.reader(jax.random.key(1), 12, None), 12)
    assert sorted(order[:5]) == sorted(order[5:10]) == [0, 1, 2, 3, 4] and order[:5] != order[5:10]
    parts = [set(places(stacked(7), lambda i, of=of: jax.tree.map(lambda a: a[i], of), len(of.xs)))
             for of in (lessons.train, lessons.validation, lessons.test)]  # fmt: skip
    assert [len(part) for part in parts] == [5, 1, 1] and set.union(*parts) == {*range(7)}
    assert parts[0] != {*range(5)}  # drawn: they may be sorted


def test_a_stream_is_read_in_order_and_around():
    """From another batch for each seed; what is held out comes after it."""
    trainings = trainings_of(stacked(6), stream=True, num_updates=9)
    firsts = []
    for seed in range(4):
        order = places(trainings.lessons.train, trainings.reader(seed, jax.random.key(seed)), 9)
        assert order == [(order[0] + i) % 4 for i in range(9)]
        firsts.append(order[0])
    assert sorted(firsts) == [0, 1, 2, 3]
    np.testing.assert_array_equal(trainings.lessons.test.xs[0], stacked(6).xs[5])


def test_what_a_function_draws_is_new_and_never_what_is_held_out():
    lessons = lessons_of(batch_of, None, False, jax.random.key(0))
    read = lessons.reader(jax.random.key(1), 20, None)
    drawn = [float(read(i).xs[0, 0, 0]) for i in range(20)]
    with pytest.raises(ValueError, match="batches must draw another batch for another key"):
        lessons_of(lambda key: batch_of(jax.random.key(0)), None, False, jax.random.key(0))
    held = {*np.asarray(lessons.validation.xs)[:, 0, 0, 0].tolist(), *np.asarray(lessons.test.xs)[:, 0, 0, 0].tolist()}
    assert len({*drawn}) == 20 and len(held) == 16 and not held & {*drawn}


def test_intervals_are_students_and_hold_together():
    losses = np.random.default_rng(0).normal(size=(4, 5))
    found = differences(losses, 1)
    for way in range(4):
        apart = losses[way] - losses[1]
        if way == 1:
            assert found.low[way] == found.high[way] == 0
            continue
        low, high = scipy.stats.t.interval(1 - 0.05 / 6, 4, apart.mean(), scipy.stats.sem(apart))
        np.testing.assert_allclose([found.low[way], found.high[way]], [low, high], rtol=1e-12)
        np.testing.assert_allclose(found.error[way], scipy.stats.sem(apart))


def test_a_winner_among_equals_is_rare():
    """Studies of four equal ways whose seeds differ: in at most 5 % of 2000 a way is called worse."""
    numbers = np.random.default_rng(1)
    called = 0
    for _ in range(2000):
        losses = numbers.normal(size=5) + numbers.normal(size=(4, 5)) * np.array([1, 0.3, 2, 1])[:, None]
        called += not verdicts_of(losses, 0.0, np.ones(4), np.ones(4)).is_tie
    assert called <= 0.05 * 2000 + 3 * math.sqrt(0.05 * 0.95 * 2000)


@pytest.mark.parametrize("gap", [0.0, 0.5, 2.0])
def test_choosing_among_rates_calls_no_winner(gap):
    """Equal ways with a best rate and neighbours that are worse by `gap`: winners stay as rare as without a choice."""
    numbers = np.random.default_rng(2)
    called = 0
    for _ in range(600):
        truth = numbers.normal(size=(4, 3, 5)) + gap * np.array([1.0, 0.0, 1.0])[:, None]
        validation, test = (truth + 0.3 * numbers.normal(size=truth.shape) for _ in range(2))
        curves = Curves([np.arange(3.0)] * 4, list(validation[..., None]), list(test[..., None]))
        losses = judge(curves, np.zeros(4, int)).losses
        called += not verdicts_of(losses, 0.0, np.ones(4), np.ones(4)).is_tie
    assert called <= 0.05 * 600 + 3 * math.sqrt(0.05 * 0.95 * 600)


def test_checkpoints_and_judging_against_loops():
    numbers = np.random.default_rng(3)
    validation, test = numbers.normal(size=(2, 3, 4, 6))
    validation[0, 1, 3:] = np.nan  # diverged
    kept = checkpoints(Curves([np.arange(3.0)], [validation], [test]))
    for rate in range(3):
        for seed in range(4):
            best = 0
            for place in range(6):
                if validation[rate, seed, place] < validation[rate, seed, best]:
                    best = place
                assert kept.validation[0][rate, seed, place] == validation[rate, seed, best]
                assert kept.test[0][rate, seed, place] == test[rate, seed, best]
    judged = judge(kept, np.array([4]))
    means = [kept.validation[0][rate, :, 4].mean() for rate in range(3)]
    assert judged.rate[0] == int(np.argmin(means))
    np.testing.assert_array_equal(judged.losses[0], kept.test[0][judged.rate[0], :, 4])


def test_equal_time():
    """The fastest makes all of its updates, the others as many whole evaluations as fit."""
    assert places_at_equal_time(np.array([1.0, 2.0, 1.0, 3.0, 1e9]), 20).tolist() == [20, 10, 20, 6, 0]
    assert places_at_equal_time(np.array([1.0, 1.09, 1.2]), 20).tolist() == [20, 20, 16]  # 9 % is noise


def test_still_falling():
    falls = np.array([8.0, 4, 2, 1, 1])  # 7 in all, 0 in the last quarter
    slow = np.array([8.0, 7, 6, 5, 4])
    kept = Curves([np.ones(1)] * 3, [c[None, None] for c in (falls, slow, np.ones(5))], [])
    np.testing.assert_allclose(still_falling(kept, np.zeros(3, int)), [0, 0.25, 0])
    few = Curves([np.ones(1)], [falls[None, None, :4]], [])
    assert np.isnan(still_falling(few, np.zeros(1, int))).all()


def means_with(noise, *means, seeds=5):
    """Losses of these means over seeds that differ by the noise, the same seeds for all ways."""
    numbers = np.random.default_rng(4)
    each = numbers.normal(size=(len(means), seeds))
    each -= each.mean(1, keepdims=True)
    return np.array(means)[:, None] + noise * each + numbers.normal(size=seeds)


def test_verdicts():
    fast, small = np.array([1.0, 0.5, 2.0]), np.array([4.0, 3.0, 1.0])
    clear = verdicts_of(means_with(0.01, 1.0, 1.5, 1.001), 0.05, fast, small)
    assert clear.words == ("best", "worse", "as good") and not clear.is_tie
    assert (clear.choice, clear.smallest) == (0, 2)
    tie = verdicts_of(means_with(1.0, 1.0, 1.2, 1.1), 0.05, fast, small)
    assert tie.words == ("best", "not told apart", "not told apart") and tie.is_tie
    assert (tie.choice, tie.smallest) == (1, 2)  # within one standard error
    near = verdicts_of(means_with(2e-3, 1.0, 1.0499), 0.05, fast[:2], small[:2])
    assert near.words == ("best", "slightly worse") and near.is_tie
    noisy = np.array([[1.0] * 5, [0.6, 1.4, 0.5, 1.4, 1.05], [1.099, 1.101, 1.1, 1.1, 1.1]])
    other = verdicts_of(noisy, 0.02, np.array([2.0, 2.0, 1.0]), np.ones(3))
    assert (
        other.best == 1 and other.words[2] == "worse" and other.choice == 0
    )  # worse than full BPTT, not than the best
    small_but_sure = verdicts_of(means_with(1e-4, 1.0, 1.04, 1.5), 0.05, fast, small)
    assert small_but_sure.words == ("best", "as good", "worse") and small_but_sure.choice == 1
    same_time = verdicts_of(means_with(0.01, 1.0, 1.0, 1.0), 0.05, np.array([1.0, 1.05, 1.2]), small)
    assert same_time.choice == 1  # of the two that take as long the one with less memory
    equals = verdicts_of(means_with(0.01, 1.0, 0.999, 1.0), 0.05, np.array([1.05, 1.0, 1.02]), np.array([1.0, 0.99, 1]))
    assert (equals.best, equals.choice, equals.smallest) == (1, 0, 0)  # full BPTT, which is exact
    unknown = verdicts_of(means_with(0.01, 1.0, 1.0, 1.0), 0.05, np.array([1.0, 0.5, 0.5]), np.full(3, np.nan))
    assert (unknown.choice, unknown.smallest) == (1, 1)


def test_a_loss_that_is_not_finite_is_never_taken():
    losses = means_with(0.01, 1.0, 0.5, 1.2)
    losses[1, 2] = np.nan
    found = verdicts_of(losses, 0.02, np.array([2.0, 1.0, 2.0]), np.ones(3))
    assert found.words == ("best", "not finite", "worse") and found.choice == found.best == 0
    assert verdicts_of(losses * np.nan, 0.02, np.ones(3), np.ones(3)).words == ("not finite",) * 3


def test_a_way_that_fails_from_most_seeds_is_not_taken_for_being_cheap():
    """Four of five seeds of the best solve the task, none of the cheap way: no interval tells it from five seeds."""
    losses = np.array([[0.0, 0.0, 0.0, 0.0, 1.0], [1.0] * 5])
    found = verdicts_of(losses, 0.02, np.array([2.0, 1.0]), np.ones(2))
    assert found.words == ("best", "worse") or found.choice == 0


def test_the_best_constant():
    numbers = np.random.default_rng(5)
    targets = jnp.asarray(numbers.normal(size=(2, NUM_STEPS, EXAMPLES, OUTPUT)))
    weights = jnp.asarray(numbers.uniform(size=(2, NUM_STEPS)))
    mask = jnp.ones((2, NUM_STEPS, EXAMPLES), bool).at[0, 3:, 1].set(False)
    xs = jnp.zeros((2, NUM_STEPS, EXAMPLES, 1))
    y = jax.ShapeDtypeStruct((EXAMPLES, OUTPUT), targets.dtype)
    found = best_constant_loss(
        squared_error, y, (EXAMPLES,), Batch(xs, targets.at[0, 3:, 1].set(jnp.nan), mask, weights)
    )
    w = np.asarray(weights[..., None] * mask)
    mean = (w[..., None] * targets).sum((0, 1, 2)) / w.sum()
    wanted = (w * ((targets - mean) ** 2).sum(-1)).sum() / w.sum()
    np.testing.assert_allclose(found, wanted, rtol=1e-9)
    classes = jnp.asarray(numbers.integers(0, 4, size=(2, NUM_STEPS, EXAMPLES)))
    y = jax.ShapeDtypeStruct((EXAMPLES, 4), targets.dtype)
    found = best_constant_loss(jbptt.tasks.cross_entropy, y, (EXAMPLES,), Batch(xs, classes))
    shares = np.bincount(np.asarray(classes).ravel(), minlength=4) / classes.size
    np.testing.assert_allclose(found, -(shares * np.log(shares)).sum(), rtol=1e-9)
    whole = jax.ShapeDtypeStruct((EXAMPLES,), jnp.int32)
    assert math.isnan(best_constant_loss(lambda y, t: 0.0 * t[..., 0], whole, (EXAMPLES,), Batch(xs, targets)))


def trained_with(losses, rates=(0.1, 0.2, 0.4)):
    """One way with constant losses for each rate and seed."""
    trained = Trained(1)
    for rate, of_rate in zip(rates, losses, strict=True):
        both = np.repeat(np.asarray(of_rate, float)[:, None], 2, axis=1)
        trained.add(0, rate, {"validation": both, "test": both})
    return trained


@pytest.mark.parametrize(
    "losses, wanted",
    [
        ([[3, 4, 3], [1, 2, 1], [2, 3, 2]], []),
        ([[1, 2, 1], [2, 3, 2], [3, 3, 3]], [(0, 0.05)]),
        ([[3, 3, 3], [2, 3, 2], [1, 2, 1]], [(0, 0.8)]),
        ([[1, 2, 3], [3, 1, 2.5], [9, 9, 9]], []),  # the neighbour is as good
    ],
)
def test_rates_go_on_until_the_best_is_bracketed(losses, wanted):
    found = trained_with(losses).missing(2.0)
    assert [(way, pytest.approx(rate)) for way, rate in wanted] == found


def test_one_rate_gets_neighbours_on_both_sides():
    assert trained_with([[1.0, 2.0]], [0.1]).missing(2.0) == [(0, 0.05), (0, 0.2)]


def test_default_ways():
    assert default_windows(128) == (2, 8, 32) and default_windows(2) == ()
    assert middle_window((2, 8, 32), 128) == 8 and middle_window((), 1) is None
    names = [way.name for way in ways_of(STEP, squared_error, 128)]
    assert names == [FULL, "blocks of 2", "blocks of 8", "blocks of 32", "sliding 8", "random, keep 0.875"]


def small_study(**options):
    usual = {
        "windows": [2], "sliding": [], "keep_probs": [], "seeds": 2, "num_updates": 4, "num_evals": 2,
        "learning_rates": [0.01, 0.1], "extend": False, "progress": False,
    }  # fmt: skip
    return jbptt.learning_study(STEP, squared_error, start, CARRY, batch_of, **usual | options)


@pytest.fixture(scope="module")
def study():
    return small_study(sliding=[3], keep_probs=[0.5])


@pytest.mark.more("test_command_own::test_a_report_on_a_model_of_ones_own")
def test_a_study_from_end_to_end(study):
    assert study.ways == (FULL, "blocks of 2", "sliding 3", "random, keep 0.5")
    assert study.updates.tolist() == [0, 2, 4] and study.num_seeds == 2
    assert all(of.shape == (2, 2, 3) for of in (*study.curves.validation, *study.curves.test))
    assert (study.seconds > 0).all() and study.errors_at_start[0].max() == 0
    assert study.constant_loss > 0 and study.choice in study.ways
    table = study.to_xarray()
    np.testing.assert_array_equal(table.test.sel(way="sliding 3", learning_rate=0.1), study.curves.test[2][1])
    assert max(map(len, str(study).splitlines())) <= 100


@pytest.mark.more("test_command_own::test_a_report_on_a_model_of_ones_own")
def test_a_study_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Ctrl-C in the first round; the same call again computes what is missing, and decides by the same times."""
    options = {"store": tmp_path / "study", "width": 1, "chunk": 2}
    plain = small_study(width=1, chunk=2)
    asked, sweep = [], studies.sweep

    def once(*args, **more):
        if not asked:
            asked.append(1)
            from jbptt.sweeps import sweeping

            computed = sweeping.computed

            def stops(place, left):
                for i, event in enumerate(computed(place, left)):
                    if i == 3:
                        raise KeyboardInterrupt
                    yield event

            with monkeypatch.context() as patch:
                patch.setattr(sweeping, "computed", stops)
                return sweep(*args, **more)
        return sweep(*args, **more)

    monkeypatch.setattr(studies, "sweep", once)
    with pytest.raises(jbptt.SweepStopped):
        small_study(**options)
    first = json.loads((tmp_path / "study" / "costs.json").read_text())
    again = small_study(**options)
    for a, b in zip(plain.curves.test, again.curves.test, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(again.seconds, first["seconds"])
    with pytest.raises(ValueError, match=r"points|version|store"):
        small_study(**options | {"num_updates": 6})
    with pytest.raises(ValueError, match="version"):  # other data
        other = {"windows": [2], "sliding": [], "keep_probs": [], "seeds": 2, "num_updates": 4, "num_evals": 2}
        other |= {"learning_rates": [0.01, 0.1], "extend": False, "progress": False}
        jbptt.learning_study(STEP, squared_error, start, CARRY, scaled_batch, **other | options)


BAD = [
    ({"seeds": 1}, "seeds must be"),
    ({"num_updates": 0}, "num_updates must be"),
    ({"windows": 4}, "windows must be a list, got 4"),
    ({"estimators": [1]}, "estimators must be {name: estimator}"),
    ({"estimators": {"mine": print}}, "estimators must hold estimators"),
    ({"optimizer": optax.adam(1e-3)}, "optimizer must be a function of a learning rate"),
    ({"windows": [6]}, "windows must be shorter than the 6 steps of a batch, got 6"),
    ({"sliding": [9]}, "sliding must be shorter"),
    ({"keep_probs": [1.0]}, "keep_probs must"),
    ({"learning_rates": []}, "learning_rates must hold one rate at least"),
    ({"learning_rates": [0.0]}, "learning_rates must be"),
    ({"stream": True}, "stream=True needs batches in an order"),
    ({"key": 3}, "key must be one key"),
    ({"estimators": {FULL: jbptt.full_bptt(STEP, squared_error)}}, "must have names of their own"),
    ({"heldout": stacked(1)}, "number of batches in heldout must be"),
    (
        {"heldout": jax.tree.map(lambda a: a[:, :, :2] if a.ndim > 2 else a, stacked(4))},
        "heldout must hold batches like",
    ),
]


@pytest.mark.parametrize("options, words", BAD)
def test_bad_input(options, words):
    with pytest.raises(ValueError, match=words):
        small_study(**options)


def test_seeds_that_would_be_the_same_are_refused():
    params, one = start(jax.random.key(0)), stacked(1)
    common = STEP, squared_error, params, CARRY
    with pytest.raises(ValueError, match="seeds would be the same training"):
        jbptt.learning_study(*common, one, stacked(2, 1), progress=False)
    with pytest.raises(ValueError, match="5 seeds would be the same training in part: one start, and 4 batches"):
        jbptt.learning_study(*common, stacked(6), stream=True, progress=False)
    with pytest.raises(ValueError, match="loss is nan before training"):
        broken = jax.tree.map(lambda a: a * jnp.nan, params)
        jbptt.learning_study(STEP, squared_error, broken, CARRY, stacked(6), progress=False)
    with pytest.raises(ValueError, match="batches must be at least 4"):
        jbptt.learning_study(*common, stacked(3), progress=False)
    with pytest.raises(TypeError, match="unexpected argument 'sedes'"):
        small_study(sedes=3)


def page(study):
    return " ".join(write_page(study).split())


def test_the_page_says_what_the_numbers_say():
    worse = page(made_up(1.0, 1.5, 1.001))
    assert worse.startswith("Train with blocks of 4 (1 × the time, 0.33 × the memory of full BPTT). It is the cheapest")
    assert "come near the lowest test loss (+0.001 beside full BPTT)" in worse
    assert "Shown to be worse than another way: blocks of 2." in worse and "noise" not in worse
    wide = page(made_up(1.0, 1.5, 1.1, 1.09, noise=0.1))
    assert "Not told apart from full BPTT by 5 seeds: blocks of 4 and blocks of 8." in wide
    alone = page(made_up(1.0, 1.5, 1.4))
    assert "Not told apart" not in alone
    assert alone.startswith(
        "Train with full BPTT. It has the lowest test loss. Shown to be worse than another way: blocks of 2"
    )
    tie = page(made_up(1.0, 1.1, 1.05, noise=0.5))
    assert tie.startswith("No way is shown to be worse than another: the noise of 5 seeds is too large to tell.")
    assert "Train with" not in tie and "Shown to be" not in tie
    same = page(made_up(1.0, 1.001, 1.0005, noise=1e-4))
    assert same.startswith("No way is worse than the best by more than 2 % of what training gains. The cheapest is")
    sure = page(made_up(1.0, 1.0199, noise=1e-3))
    assert sure.startswith("No way is shown to be worse than another by more than 2 % of what training gains.")
    alone_of_all = page(made_up(1.0))
    assert alone_of_all.startswith("No answer: full BPTT was the only way to train, nothing was compared.")
    assert "intervals" not in alone_of_all and "equal computing time" not in alone_of_all
    broken = made_up(1.0, 1.001, 1.5)
    broken.curves.test[1][:] = np.nan
    text = page(broken)
    assert "Not finite: blocks of 2." in text and "blocks of 2 (not shown" not in text
    shorter = page(made_up(1.5, 1.0, 1.4))
    assert shorter.startswith(
        "Train with blocks of 2 (1 × the time, 0.67 × the memory of full BPTT). It has the lowest"
    )
    assert "Its test loss is 1, that of full BPTT 1.5: difference −0.5, 95 % interval −0.5" in shorter
    assert "Shown to be worse than another way: full BPTT and blocks of 4." in shorter


def test_nothing_learned_is_no_answer():
    nothing = page(made_up(2.0, 1.95, 1.98))
    assert nothing.startswith("No answer: nothing was learned. No way's test loss is 5 % below that of a constant")
    assert "constant prediction, 2;" in nothing and "plateau" not in nothing and "foretold" not in nothing
    unknown = page(made_up(2.45, 2.49, constant=np.nan))
    broken = made_up(1.0, 1.5)
    broken.curves.test[0][:], broken.curves.test[1][:] = np.nan, np.nan
    assert page(broken).startswith("No answer: nothing was learned.")
    assert "5 % below the loss before training" in unknown and "chance" not in unknown
    assert page(made_up(1.0, 1.95, constant=np.nan)).startswith("Train with full BPTT.")


def test_the_page_says_whether_training_came_to_a_plateau():
    assert "at a plateau: over the last quarter" in page(made_up(1.0, 1.2))
    moving = page(made_up(1.0, 1.2, falling=0.2))
    assert "no plateau: this holds for 40 updates, not for longer training" in moving
    assert "full BPTT 10 % and blocks of 2 10 %" in moving
    untaught = page(made_up(1.0, 1.99, falling=0.2))  # it has not learned, and still falls
    assert "no plateau" in untaught and "blocks of 2 10 %" in untaught


def test_the_page_says_what_equal_time_changes():
    """Full BPTT is twice as slow: when the blocks are done it stands where it was after half of its updates."""
    found = made_up(1.0, 1.2, seconds=[2.0, 1.0], falling=0.3)
    assert page(found).startswith("Train with full BPTT.")
    wanted = "20 to 40 updates) blocks of 2 has the lowest test loss; shown to be worse than another way: full BPTT"
    assert "in equal computing time (40 s of updates here: " in page(found) and wanted in page(found)


def test_the_page_says_what_gradient_errors_foretold():
    text = page(made_up(1.0, 1.001, 1.5, 1.0005, 1.6, errors=[0, 0.05, 0.05, 0.5, 0.5]))
    wanted = (
        "was at most 10 % for blocks of 4 (worse than full BPTT) and blocks of 2 (not shown to be worse); "
        "above 10 % for blocks of 16 (worse than full BPTT) and blocks of 8 (not shown to be worse)"
    )
    assert wanted in text


def test_rates_that_were_not_bracketed_are_named():
    found = replace(made_up(1.0, 1.5), unbracketed=("blocks of 2",))
    assert "the best one tried is the first or the last for blocks of 2" in page(found)
    assert "first or the last" not in page(made_up(1.0, 1.5))


def test_pictures_of_a_study():
    pytest.importorskip("matplotlib")
    from jbptt import plots

    found = made_up(1.0, 1.5, 1.001)
    ax = plots.plot_learning_study(found)
    assert [label.get_text() for label in ax.get_yticklabels()] == [FULL, "blocks of 2", "→ blocks of 4"]
    (points,) = (line for line in ax.get_lines() if line.get_label() == "a seed")
    np.testing.assert_allclose(np.sort(points.get_xdata()), np.sort(found.at_equal_data.judged.losses.ravel()))
    assert "a constant prediction" in {text.get_text() for text in ax.get_legend().get_texts()}
    nothing = plots.plot_learning_study(made_up(2.0, 1.95))
    assert not any("→" in label.get_text() for label in nothing.get_yticklabels())
    curves = plots.plot_learning_curves(found)
    assert [text.get_text() for text in curves.get_legend().get_texts()] == [
        "full BPTT, rate 0.01",
        "blocks of 2, rate 0.01",
        "blocks of 4, rate 0.01",
        "a constant prediction",
    ]
    np.testing.assert_allclose(curves.get_lines()[1].get_ydata()[-1], 1.5, atol=0.05)
