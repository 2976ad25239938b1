"""Where NaN and infinity begin, planted everywhere they can begin."""

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from problems import EXAMPLES

from jbptt import Batch, cells, find_nonfinite, full_bptt, truncation

T = 6
BAD = [np.nan, np.inf, -np.inf]
LSTM = problems.make("lstm+readout", T)
find = jax.jit(find_nonfinite, static_argnums=(0, 1))


def looked(problem, **options):
    found = find(*problem, **options)
    return found.phase, int(found.step), found.leaf


def plant(array, index, value):
    return jnp.asarray(array).at[index].set(value)


def test_nothing_to_find():
    found = find(*LSTM)
    assert (found.phase, found.leaf, bool(found.found)) == ("", "", False)
    assert "everything is finite" in str(found)


@pytest.mark.parametrize("bad", problems.usual(BAD[:1], BAD))
def test_planted_in_what_is_given(bad):
    batch, params = LSTM.batch, LSTM.params
    where = {"xs": plant(batch.xs, (4, 1, 0), bad), "targets": plant(batch.targets, (3, 0, 1), bad)}
    assert looked(LSTM._replace(batch=batch._replace(xs=where["xs"]))) == ("given", 4, "xs")
    assert looked(LSTM._replace(batch=batch._replace(targets=where["targets"]))) == ("given", 3, "targets")
    broken = {**params, "w_y": plant(params["w_y"], (0, 0), bad)}
    assert looked(LSTM._replace(params=broken)) == ("given", 0, "params['w_y']")
    h, c = LSTM.carry
    assert looked(LSTM._replace(carry=(h, plant(c, (2, 1), bad)))) == ("given", 0, "carry[1]")


@pytest.mark.parametrize("bad", problems.usual(BAD[:1], BAD))
def test_planted_in_weights_and_gates(bad):
    """As given; a weight under the mask counts for nothing."""
    weights = plant(np.ones((T, EXAMPLES)), (2, 1), bad)
    assert looked(LSTM._replace(batch=LSTM.batch._replace(weights=weights))) == ("given", 2, "weights")
    mask = plant(np.ones((T, EXAMPLES), bool), (2, 1), False)
    assert looked(LSTM._replace(batch=LSTM.batch._replace(weights=weights, mask=mask))) == ("", 0, "")
    assert looked(LSTM, gates=plant(np.ones(T), 3, bad)) == ("given", 3, "gates")


@pytest.mark.parametrize("bad", problems.usual(BAD[:1], BAD, full=BAD[1:]))
@pytest.mark.parametrize("gate", problems.usual([1], range(4)), ids="ifgo")
def test_one_gate_of_an_lstm_breaks_at_a_step(gate, bad):
    """From finite numbers: the third input opens a trap in one gate. The cell state shows it first, or only h."""
    cell = problems.CELLS["lstm"]
    columns = slice(gate * problems.HIDDEN, (gate + 1) * problems.HIDDEN)

    def step(params, carry, x):
        bias = params["b"].at[columns].add(jnp.where(jnp.all(x == 7.0), bad, 0.0))
        return cell.step({**params, "b": bias}, carry, x)

    problem = problems.make("lstm", T)
    problem = problem._replace(step=step, batch=problem.batch._replace(xs=plant(problem.batch.xs, 2, 7.0)))
    found = find(*problem)
    saturates = np.isinf(bad)  # a sigmoid of ±inf is 0 or 1: finite forward, and 0·inf nowhere on the way back
    if saturates:
        assert bool(found.found) == (not np.all(np.isfinite(full_gradient(problem))))
    else:
        assert (found.phase, int(found.step), found.leaf) == ("forward", 2, "carry[0]")


def full_gradient(problem):
    estimator = full_bptt(problem.step, problem.loss)
    grads = problems.one_update(estimator, problem.params, problem.carry, problem.batch).grads
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])


def growing(w, h, x):
    """Forward it stays at 1; on the way back its slope is w."""
    h = 1.0 + w * (h - 1.0) * x
    return h, h


def test_overflow_that_only_the_backward_pass_has():
    args = (growing, lambda y, target: y, jnp.float32(1e10), jnp.float32(1.0), Batch(jnp.ones(T, jnp.float32)))
    found = find(*args)
    # λ of carries[t] is 1e10^(T−t), beyond float32 after four steps back.
    assert (found.phase, int(found.step), found.leaf) == ("backward", 2, "the adjoint of carry")
    # Blocks of 4 overflow at their last crossing, which is the one that is cut.
    for window, phase in ((3, 0), (4, 2)):
        cut = find(*args, gates=truncation.fixed(T, window, phase=phase))
        assert not bool(cut.found)
    assert "on the way back at step 2" in str(found)


def test_a_gradient_of_the_parameters_alone():
    """∂ sqrt(w)/∂w at 0, used at step 3 only."""

    def step(w, h, x):
        h = 0.5 * h + jnp.where(x > 0, jnp.sqrt(w), 0.0 * w)
        return h, h

    xs = jnp.array([0.0, 0, 0, 1, 0, 0])
    args = (step, lambda y, target: y, jnp.zeros(()), jnp.zeros(()), Batch(xs))
    found = find(*args)
    # `where` lets 0·inf through in every step: the last one is met first on the way back.
    assert (found.phase, int(found.step), found.leaf) == ("backward", T - 1, "the gradient of params")


@pytest.mark.more("test_planted_in_weights_and_gates")
def test_loss_and_output():
    def step(w, h, x):
        return w * h + x, jnp.log(h - x)

    args = (jnp.array(0.5), jnp.array(10.0), Batch(jnp.array([1.0, 1.0, 50.0, 1.0])))
    assert looked((step, lambda y, target: y, *args)) == ("forward", 2, "y")
    assert looked((lambda w, h, x: (w * h + x, h - x), lambda y, target: jnp.log(y), *args)) == ("forward", 2, "loss")


def test_padding_and_losses_that_do_not_count_are_not_looked_at():
    mask = np.ones((T, EXAMPLES), bool)
    mask[2:4, 1] = False
    weights = np.ones(T)
    weights[5] = 0
    xs, targets = plant(LSTM.batch.xs, (slice(2, 4), 1), np.nan), plant(LSTM.batch.targets, 5, np.inf)
    targets = plant(targets, (slice(2, 4), 1), np.nan)
    clean = LSTM._replace(batch=Batch(xs, targets, jnp.asarray(mask), jnp.asarray(weights)))
    assert looked(clean) == ("", 0, "")
    broken = clean._replace(batch=clean.batch._replace(xs=plant(xs, (3, 0, 0), np.nan)))
    assert looked(broken) == ("given", 3, "xs")


def test_under_vmap_every_run_has_its_own_place():
    xs = jnp.stack([LSTM.batch.xs, plant(LSTM.batch.xs, (1, 0, 0), np.nan), plant(LSTM.batch.xs, (5, 2, 1), np.inf)])
    run = lambda xs: find_nonfinite(*LSTM[:4], LSTM.batch._replace(xs=xs))
    found = jax.jit(jax.vmap(run))(xs)
    np.testing.assert_array_equal(found.found, [False, True, True])
    np.testing.assert_array_equal(found.step, [0, 1, 5])
    assert {found.leaves[int(i)] for i in found.leaf_index[1:]} == {"xs"}
    assert "NonFinite" in str(found)


# NaN and infinities that are meant.


def absorbed(found):
    return [name for name, flag in zip(found.leaves, found.absorbed, strict=True) if flag]


def forward_algorithm(params, alpha, x):
    """In log space: log 0 in the transitions. The scale's derivative is not finite where q is 0."""
    alpha = jax.nn.logsumexp(alpha[:, None] + params["log_a"], axis=0) + x["ll"]
    total = jax.nn.logsumexp(alpha)
    return alpha - total, total + params["scale"] * jnp.sqrt(x["q"] * params["scale"])


def test_transitions_of_log_zero():
    """−inf in the parameters and in the carry at the start, of which every later one is finite."""
    log_a = jnp.log(jnp.array([[0.8, 0.2, 0.0], [0.0, 0.8, 0.2], [0.2, 0.0, 0.8]]))
    params, carry = {"log_a": log_a, "scale": jnp.array(1.0)}, jnp.array([0.0, -jnp.inf, 0.0])
    ll = jnp.asarray(np.random.default_rng(0).normal(size=(12, 3)))
    ones = jnp.ones(12)

    def run(q, ll, log_a):
        batch = Batch({"ll": ll, "q": q})
        return find_nonfinite(forward_algorithm, lambda y, _: -y, {**params, "log_a": log_a}, carry, batch)

    cases = {
        "healthy": (ones, ll, log_a),
        "slope of a root": (plant(ones, 7, 0.0), ll, log_a),
        "nan": (ones, plant(ll, (5, 1), np.nan), log_a),
        "impossible": (ones, plant(ll, 4, -np.inf), log_a),
        "no way on": (ones, ll, jnp.full((3, 3), -jnp.inf)),
        "negative": (plant(ones, 9, -1.0), ll, log_a),
    }
    found = jax.jit(jax.vmap(run))(*map(jnp.stack, zip(*cases.values(), strict=True)))
    found = dict(zip(cases, (jax.tree.map(lambda a, i=i: a[i], found) for i in range(len(cases))), strict=True))
    meant = ["params['log_a']", "carry"]
    assert not bool(found["healthy"].found) and absorbed(found["healthy"]) == meant
    assert "finite; not finite, but absorbed: params['log_a'], carry" in str(found["healthy"])
    places = {name: (one.phase, int(one.step), one.leaf) for name, one in found.items() if name != "healthy"}
    assert places == {
        "slope of a root": ("backward", 7, "the gradient of params['scale']"),
        "nan": ("given", 5, "xs['ll']"),
        "impossible": ("given", 4, "xs['ll']"),
        "no way on": ("given", 0, "params['log_a']"),
        "negative": ("forward", 9, "y"),
    }
    for name in ("slope of a root", "nan", "impossible", "negative"):
        assert absorbed(found[name]) == meant, name
    assert absorbed(found["no way on"]) == []
    assert str(found["nan"]).endswith("(not finite before it, but absorbed: params['log_a'], carry)")


def softmax_so_far(w, state, x):
    """Attention over all steps so far, whose largest score starts at −inf; a mask of −inf is added to the scores."""
    largest, total, mean = state
    score = w * x["score"] + x["mask"]
    new = jnp.maximum(largest, score)
    old, own = jnp.exp(largest - new), jnp.exp(score - new)
    weight = total * old + own
    mean = (mean * total * old + x["value"] * own) / weight
    return (new, weight, mean), mean


@pytest.mark.more("test_transitions_of_log_zero")
def test_a_largest_score_that_starts_at_minus_infinity():
    """Finite from the first step on; hidden steps are at −inf; a value of 1e200 overflows in the loss."""
    rng = np.random.default_rng(1)
    xs = {"score": rng.normal(size=T), "value": rng.normal(size=T), "mask": np.array([0, 0, -np.inf, 0, -np.inf, 0])}
    xs, start = jax.tree.map(jnp.asarray, xs), (jnp.array(-jnp.inf), jnp.zeros(()), jnp.zeros(()))

    def looked_at(**changes):
        batch = Batch({**xs, **changes})
        return find(softmax_so_far, lambda y, _: y**2, jnp.array(0.5), start, batch)

    healthy = looked_at()
    assert not bool(healthy.found) and absorbed(healthy) == ["carry[0]", "xs['mask']"]
    broken = looked_at(value=plant(xs["value"], 3, np.nan))
    assert (broken.phase, int(broken.step), broken.leaf) == ("given", 3, "xs['value']")
    assert absorbed(broken) == ["carry[0]", "xs['mask']"]
    hidden = looked_at(mask=plant(xs["mask"], 0, -np.inf))  # nothing is seen: 0 / 0
    assert (hidden.phase, int(hidden.step), hidden.leaf) == ("given", 0, "xs['mask']")
    large = looked_at(value=plant(xs["value"], 3, 1e200))
    assert (large.phase, int(large.step), large.leaf) == ("forward", 3, "loss")


@pytest.mark.more("test_padding_and_losses_that_do_not_count_are_not_looked_at")
def test_what_no_loss_reads_is_not_named():
    """A carry and an output that are NaN at step 2, for themselves, and an infinity that comes out beside them."""

    def step(w, state, x):
        h, watched = state
        h = jnp.where(x == 1, jnp.inf, w * h + x)
        return (jnp.where(x > 0, jnp.nan, watched), h), (jnp.where(x > 0, jnp.nan, h), h)

    def reordered(w, state, x):
        (watched, h), y = step(w, state, x)
        return (h, watched), y

    start = jnp.zeros(()), jnp.zeros(())
    loss = lambda y, _: y[1]
    quiet = find(reordered, loss, jnp.array(0.5), start, Batch(jnp.array([0.0, 0, 2, 0, 0])))
    assert not bool(quiet.found) and absorbed(quiet) == ["carry[1]", "y[0]"]
    assert "absorbed: carry[1], y[0]" in str(quiet)

    def beside(w, state, x):
        """The watched leaf stands first."""
        watched, h = state
        return step(w, (h, watched), x)

    for last in (1.0, 0.0):
        found = find(beside, loss, jnp.array(0.5), start, Batch(jnp.array([0.0, 2, 0, 1, last])))
        assert (found.phase, int(found.step), found.leaf) == ("forward", 3, "carry[1]")
        assert absorbed(found) == ["carry[0]", "y[0]"]
    last = find(beside, loss, jnp.array(0.5), start, Batch(jnp.array([0.0, 2, 0, 1])))
    assert (last.phase, int(last.step), last.leaf) == ("forward", 3, "y[1]")  # no loss reads the last carry


def test_losses_whose_mean_alone_is_not_finite():
    batch = Batch(jnp.full(4, 3e38, jnp.float32))
    found = find(lambda w, h, x: (h, x + w), lambda y, _: y, jnp.float32(0), jnp.zeros((), jnp.float32), batch)
    assert (found.phase, int(found.step), found.leaf) == ("forward", 3, "loss")


def test_an_infinity_of_thousands_of_entries():
    """As many as XLA's reductions change at: the right leaf among large ones."""
    params = {"mask": jnp.full(4096, -jnp.inf).at[0].set(0.0), "w": jnp.ones(4096)}

    def step(params, h, x):
        h = 0.5 * h + x * jnp.sum(jax.nn.softmax(params["mask"]) * params["w"])
        return h, h

    batch = Batch(jnp.ones(3))
    assert not bool(find(step, lambda y, _: y, params, jnp.zeros(()), batch).found)
    params["w"] = params["w"].at[7].set(jnp.nan)
    found = find(step, lambda y, _: y, params, jnp.zeros(()), batch)
    assert (found.phase, found.leaf, absorbed(found)) == ("given", "params['w']", ["params['mask']"])


# Traps of `where`: the branch that is not taken must not poison the gradient.


@pytest.mark.parametrize("name", problems.usual(["log_softmax"], ["norm", "log_softmax", "gate"]))
def test_double_where_traps(name):
    if name == "norm":
        from jbptt.norms import norm

        assert np.all(np.isfinite(jax.grad(lambda v: norm({"a": v}))(jnp.zeros(3))))
    elif name == "log_softmax":  # an output that is −inf for a character that never occurs
        loss = lambda y, target: -jnp.sum(jnp.where(target, jax.nn.log_softmax(y), 0.0))
        target = jnp.array([True, False, False])
        slope = jax.grad(loss)(jnp.array([1.0, 2.0, -jnp.inf]), target)
        step = lambda w, h, x: (h, w + jnp.array([0.0, 0.0, -jnp.inf]) + h)
        found = find(step, loss, jnp.array([1.0, 2.0, 3.0]), jnp.zeros(3), Batch(jnp.ones(2), jnp.stack([target] * 2)))
        assert np.all(np.isfinite(slope)) and not bool(found.found)
        assert list(np.array(found.leaves)[found.absorbed]) == ["y"]  # the −inf is told apart
    else:
        batch = Batch(jnp.ones(T, jnp.float32))
        estimator = full_bptt(growing, lambda y, target: y)
        assert not np.all(np.isfinite(problems.one_update(estimator, jnp.float32(1e10), jnp.float32(1.5), batch).grads))
        gates = jnp.zeros(T)
        found = find(growing, lambda y, target: y, jnp.float32(1e38), jnp.float32(1.0), batch, gates=gates)
        assert not bool(found.found)


@pytest.mark.more("test_nothing_to_find")
def test_every_cell_of_the_box_is_finite_at_zero():
    for cell in (cells.rnn(2, 3), cells.gru(2, 3), cells.lstm(2, 3)):
        params = jax.tree.map(jnp.zeros_like, cell.init(jax.random.key(0)))
        batch = Batch(jnp.zeros((3, 2)), jnp.zeros((3, 3)))
        assert not bool(find(cell.step, problems.squared_error, params, cell.initial_carry(), batch).found)
