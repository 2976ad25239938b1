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


@pytest.mark.parametrize("bad", BAD)
def test_planted_in_what_is_given(bad):
    batch, params = LSTM.batch, LSTM.params
    where = {"xs": plant(batch.xs, (4, 1, 0), bad), "targets": plant(batch.targets, (3, 0, 1), bad)}
    assert looked(LSTM._replace(batch=batch._replace(xs=where["xs"]))) == ("given", 4, "xs")
    assert looked(LSTM._replace(batch=batch._replace(targets=where["targets"]))) == ("given", 3, "targets")
    broken = {**params, "w_y": plant(params["w_y"], (0, 0), bad)}
    assert looked(LSTM._replace(params=broken)) == ("given", 0, "params['w_y']")
    h, c = LSTM.carry
    assert looked(LSTM._replace(carry=(h, plant(c, (2, 1), bad)))) == ("given", 0, "carry[1]")


@pytest.mark.parametrize("bad", BAD)
def test_planted_in_weights_and_gates(bad):
    """As given; a weight under the mask counts for nothing."""
    weights = plant(np.ones((T, EXAMPLES)), (2, 1), bad)
    assert looked(LSTM._replace(batch=LSTM.batch._replace(weights=weights))) == ("given", 2, "weights")
    mask = plant(np.ones((T, EXAMPLES), bool), (2, 1), False)
    assert looked(LSTM._replace(batch=LSTM.batch._replace(weights=weights, mask=mask))) == ("", 0, "")
    assert looked(LSTM, gates=plant(np.ones(T), 3, bad)) == ("given", 3, "gates")


@pytest.mark.parametrize("bad", problems.usual(BAD[:1], BAD))
@pytest.mark.parametrize("gate", range(4), ids="ifgo")
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


# Traps of `where`: the branch that is not taken must not poison the gradient.


@pytest.mark.parametrize("name", ["norm", "log_softmax", "gate"])
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
        assert np.all(np.isfinite(slope)) == (found.phase != "backward")
        assert (found.phase, found.leaf) == ("forward", "y")  # the −inf itself is what is found
    else:
        batch = Batch(jnp.ones(T, jnp.float32))
        estimator = full_bptt(growing, lambda y, target: y)
        assert not np.all(np.isfinite(problems.one_update(estimator, jnp.float32(1e10), jnp.float32(1.5), batch).grads))
        gates = jnp.zeros(T)
        found = find(growing, lambda y, target: y, jnp.float32(1e38), jnp.float32(1.0), batch, gates=gates)
        assert not bool(found.found)


def test_every_cell_of_the_box_is_finite_at_zero():
    for cell in (cells.rnn(2, 3), cells.gru(2, 3), cells.lstm(2, 3)):
        params = jax.tree.map(jnp.zeros_like, cell.init(jax.random.key(0)))
        batch = Batch(jnp.zeros((3, 2)), jnp.zeros((3, 3)))
        assert not bool(find(cell.step, problems.squared_error, params, cell.initial_carry(), batch).found)
