"""Gradients that run forward: against full BPTT, papers' formulas, loops by hand, and systems with answers."""

import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from jax import lax
from problems import assert_close, cut, usual

import jbptt
from jbptt import Batch, cells, engine, full_bptt, influence_structure, rflo, rtrl, snap, uoro
from jbptt.arrays import real_leaves, real_vector, split_inexact

KEY = jax.random.key(3)
T = 7


def draw(seed, *shape, scale=0.5):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape))


def square(y, target):
    return jnp.sum(jnp.abs(y - target) ** 2, -1)


def updated(estimator, params, carry, batch, key=None):
    return jax.jit(estimator.update)(params, estimator.init(params, carry, batch, key), batch)


def in_pieces(estimator, params, carry, batch, splits, key=None):
    """The sum of the estimates of several updates, and the last state."""
    total, state, update = None, None, jax.jit(estimator.update)
    for start, stop in itertools.pairwise((0, *splits)):
        piece = cut(batch, start, stop)
        state = estimator.init(params, carry, piece, key) if state is None else state
        estimate, state = update(params, state, piece)
        total = estimate if total is None else total + estimate
    return total, state


def diagonal():
    """Leaky integrators: every unit reads itself alone."""
    params = {"decay": draw(0, 3), "w": draw(1, 2, 3), "b": draw(2, 3), "out": draw(3, 3, 2)}

    def step(params, h, x):
        h = jax.nn.sigmoid(params["decay"]) * h + jnp.tanh(x @ params["w"] + params["b"])
        return h, h @ params["out"]

    return step, params, lambda shape: jnp.zeros((*shape, 3))


def lru():
    """Linear recurrent units with complex states and an input matrix that is complex too."""
    params = {
        "nu": draw(0, 3),
        "theta": draw(1, 3),
        "b": draw(2, 2, 3) + 1j * draw(3, 2, 3),
        "c": draw(4, 3, 2) + 1j * draw(5, 3, 2),
    }

    def step(params, h, x):
        decay = jnp.exp(-jnp.exp(params["nu"]) + 1j * params["theta"])
        h = decay * h + x @ params["b"]
        return h, (h @ params["c"]).real

    return step, params, lambda shape: jnp.zeros((*shape, 3), complex)


@jax.custom_jvp
def spike(v):
    return jnp.where(v > 0, 1.0, 0.0)


@spike.defjvp
def _spike_jvp(primals, tangents):
    (v,), (dv,) = primals, tangents
    return spike(v), dv / (1 + jnp.abs(v)) ** 2


def spiking():
    """Leaky integrate-and-fire units that reset themselves, with a surrogate derivative."""
    params = {"w": draw(1, 2, 3, scale=1.5), "leak": draw(2, 3), "out": draw(3, 3, 2)}

    def step(params, carry, x):
        v, s = carry
        v = jax.nn.sigmoid(params["leak"]) * v * (1 - s) + x @ params["w"]
        s = spike(v - 0.3)
        return (v, s), s @ params["out"]

    return step, params, lambda shape: (jnp.zeros((*shape, 3)), jnp.zeros((*shape, 3)))


def straight_through():
    """A network whose derivative is a custom_vjp's: nothing but a way back."""
    params = {"w": draw(1, 2, 3), "u": draw(2, 3, 3)}

    @jax.custom_vjp
    def rounded(a):
        return jnp.round(4 * a) / 4

    rounded.defvjp(lambda a: (rounded(a), a), lambda a, bar: (bar / (1 + a**2),))

    def step(params, h, x):
        h = rounded(x @ params["w"] + h @ params["u"])
        return h, h[..., :2]

    return step, params, lambda shape: jnp.zeros((*shape, 3))


def stacked():
    """A network on top of linear units: the lower layer influences the upper one, not the other way."""
    params = {"low": {"a": draw(0, 3), "w": draw(1, 2, 3)}, "up": {"w": draw(2, 3, 4), "u": draw(3, 4, 4)}}

    def step(params, carry, x):
        low, up = carry
        low = jnp.tanh(params["low"]["a"]) * low + x @ params["low"]["w"]
        up = jnp.tanh(low @ params["up"]["w"] + up @ params["up"]["u"])
        return (low, up), up[..., :2]

    return step, params, lambda shape: (jnp.zeros((*shape, 3)), jnp.zeros((*shape, 4)))


def with_embedding():
    """Tokens, a counter, a leaf that no gradient passes, and a loss that reads the carry received."""
    params = {"table": draw(0, 5, 2), "w": draw(1, 2, 3), "u": draw(2, 3, 3), "v": draw(3, 3, 2)}

    def step(params, carry, token):
        h, n = carry["h"], carry["n"]
        new = jnp.tanh(params["table"][token] @ params["w"] + h @ params["u"])
        return {"h": new, "n": n + 1}, h @ params["v"] + new[..., :2]

    return step, params, lambda shape: {"h": jnp.zeros((*shape, 3)), "n": jnp.zeros(shape, int)}


def masked_weights():
    """A network with a fixed pattern of connections, and a permuted state: a few units read a few."""
    pattern = np.array([[1, 0, 0, 1], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]], bool)
    places = np.nonzero(pattern)
    params = {"w": draw(1, 2, 4), "u": draw(2, len(places[0]))}

    def step(params, h, x):
        inputs = x @ params["w"]
        # Connection by connection, as a sparse product is.
        into = [[] for _ in range(4)]
        for k, (i, j) in enumerate(zip(*places, strict=True)):
            into[j].append(params["u"][k] * h[..., i])
        h = jnp.tanh(inputs + jnp.stack([sum(terms) for terms in into], -1))
        return h, h[..., :2]

    return step, params, lambda shape: jnp.zeros((*shape, 4))


def before_what_it_does_not_reach(place):
    """A network beside the input of the step before, which no parameter reaches, behind it or in front."""
    params = {"w": draw(1, 2, 3), "u": draw(2, 3, 3), "o": draw(3, 3, 2)}

    def step(params, carry, x):
        h, last = carry if place == "behind" else carry[::-1]
        h = jnp.tanh((x + last) @ params["w"] + h @ params["u"])
        return (h, x) if place == "behind" else (x, h), h @ params["o"]

    def start(shape):
        zeros = jnp.zeros((*shape, 3)), jnp.zeros((*shape, 2))
        return zeros if place == "behind" else zeros[::-1]

    return step, params, start


def odd(name):
    """Steps whose examples are independent, in operations of which little is known."""
    params = {"w": draw(1, 2, 4), "u": draw(2, 4, 4), "k": draw(3, 3)}

    def convolved(h, kernel):
        return lax.conv_general_dilated(h[:, None], kernel[None, None], (1,), "SAME")[:, 0]

    def step(params, h, x):
        inner = {
            "written": lambda: h.at[:, 0].set(x[:, 0]) @ params["u"],
            "convolved": lambda: convolved(h, params["k"]),
            "sorted": lambda: jnp.sort(h, -1) @ params["u"],
            "transformed": lambda: jnp.fft.rfft(h, axis=-1).real @ params["u"][:3],
            "solved": lambda: jnp.linalg.solve(3 * jnp.eye(4) + params["u"], h.T).T,
            "looked up": lambda: jnp.take_along_axis(h, jnp.argsort(x @ params["w"], -1), -1),
        }[name]()
        h = jnp.tanh(inner + x @ params["w"])
        return h, h[..., :2]

    return step, params, lambda shape: jnp.zeros((*shape, 4))


ODD = ("written", "convolved", "sorted", "transformed", "solved", "looked up")
SYSTEMS = {
    "diagonal": diagonal,
    "lru": lru,
    "spiking": spiking,
    "straight-through": straight_through,
    "stacked": stacked,
    "embedding": with_embedding,
    "sparse": masked_weights,
    "behind": functools.partial(before_what_it_does_not_reach, "behind"),
    "in front": functools.partial(before_what_it_does_not_reach, "in front"),
    **{name: functools.partial(odd, name) for name in ODD},
}
CELLS = {name: name for name in ("linear", "tanh", "relu", "gru", "lstm+readout", "gru+reset")}


@functools.cache
def system(name, batch_shape=(2,)):
    """Step, loss, parameters, carry and a padded, weighted batch."""
    if name in CELLS:
        step, loss, params, carry, batch = problems.make(name, T, examples=2)
        return step, loss, params, carry, batch
    step, params, carry_of = SYSTEMS[name]()
    rng = np.random.default_rng(9)
    shape = (T, *batch_shape)
    tokens = name == "embedding"
    xs = jnp.asarray(rng.integers(0, 5, shape)) if tokens else jnp.asarray(rng.normal(size=(*shape, 2)))
    mask = rng.random(shape) < 0.8
    batch = Batch(xs, jnp.asarray(rng.normal(size=(*shape, 2))), jnp.asarray(mask), jnp.asarray(rng.random(shape)))
    start = jax.tree.map(lambda a: a + jnp.asarray(0.3 * rng.normal(size=a.shape), a.dtype), carry_of(batch_shape))
    return step, square, params, start, batch


# RTRL is full BPTT.


@pytest.mark.parametrize("name", usual(["stacked"], [*SYSTEMS, *CELLS]))
def test_rtrl_is_full_bptt_over_the_stream(name):
    step, loss, params, carry, batch = system(name)
    wanted, _ = updated(full_bptt(step, loss), params, carry, batch)
    found, state = updated(rtrl(step, loss), params, carry, batch)
    assert_close(
        (found.loss, found.grads, found.info["carry_grads"]), (wanted.loss, wanted.grads, wanted.info["carry_grads"])
    )
    total, last = in_pieces(rtrl(step, loss), params, carry, batch, (3, 4, T))
    assert_close((total.loss, total.grads), (wanted.loss, wanted.grads))
    assert_close(last, state)


@pytest.mark.more("test_rtrl_is_full_bptt_over_the_stream")
@pytest.mark.parametrize("batch_shape", usual([(2, 2)], [(), (1,), (2, 2)]))
def test_any_batch_shape(batch_shape):
    step, loss, params, carry, batch = system("stacked", batch_shape)
    for estimator in (rtrl(step, loss), snap(step, loss, order=1), rflo(step, loss, leak=0.5), uoro(step, loss)):
        found, state = updated(estimator, params, carry, batch, KEY)
        if estimator.coverage is not None:
            wanted, _ = updated(full_bptt(step, loss), params, carry, batch)
            assert_close((found.grads, found.info["carry_grads"]), (wanted.grads, wanted.info["carry_grads"]))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.grads))
        assert jax.tree.map(jnp.shape, state.carry) == jax.tree.map(jnp.shape, carry)


def test_a_learned_start_counts_with_the_first_update():
    step, loss, params, carry, batch = system("gru")
    params = {**params, "start": draw(5, *carry.shape[1:])}

    def own(params, h, x):
        return step({k: v for k, v in params.items() if k != "start"}, h, x)

    def start(params):
        return jnp.broadcast_to(jnp.tanh(params["start"] + params["b"][:3]), carry.shape)

    wanted, _ = updated(full_bptt(own, loss), params, start, batch)
    found, _ = updated(rtrl(own, loss), params, start, batch)
    assert_close(found.grads, wanted.grads)


def by_hand(step, loss, all_params, carry, batch, onward):
    """A loop over one example: `onward(J, D, P)` moves the influence; parameters change with every update of one step.

    Gradients of ∂⁺ℓ/∂w + λ P in real numbers, one for each step.
    """
    found, influence = [], None
    for t, params in enumerate(all_params):
        p, of_p = real_vector(params)
        h, of_h = real_vector(carry)
        x, target = jax.tree.map(lambda a, t=t: a[t], (batch.xs, batch.targets))

        def emitted(p, h, x=x, of_p=of_p, of_h=of_h):
            return real_vector(step(of_p(p), of_h(h), x)[0])[0]

        def own_loss(p, h, x=x, target=target, of_p=of_p, of_h=of_h):
            return loss(step(of_p(p), of_h(h), x)[1], target)

        jacobian, entering = jax.jacrev(emitted, 1)(p, h), jax.jacrev(emitted)(p, h)
        influence = jnp.zeros_like(entering) if influence is None else influence
        # All of this step's loss is in what the step reads: parameters and the carry received.
        direct, back = jax.grad(own_loss, (0, 1))(p, h)
        found.append(direct + back @ influence)
        influence = onward(jacobian, entering, influence)
        carry = step(params, carry, x)[0]
    return found


def test_influence_stays_what_earlier_parameters_made_of_it():
    """Updates of one step, each with other parameters: against P ← J P + D with dense Jacobians of one example."""
    step, loss, params, carry, batch = system("stacked", ())
    batch = batch._replace(mask=None, weights=None)
    changing = [jax.tree.map(lambda a, s=s: a * (1 + 0.1 * s), params) for s in range(T)]
    wanted = by_hand(step, loss, changing, carry, batch, lambda j, d, p: j @ p + d)
    estimator = rtrl(step, loss)
    state, update = estimator.init(params, carry, cut(batch, 0, 1)), jax.jit(estimator.update)
    for t, own in enumerate(changing):
        estimate, state = update(own, state, cut(batch, t, t + 1))
        assert_close(real_vector(estimate.grads)[0], wanted[t])


# What approximates it.


@functools.cache
def network(leak=0.0, size=4):
    """`h ← leak · h + tanh(x w + h u + b)`, its loss on the emitted h; one example."""
    params = {"w": draw(0, 2, size), "u": draw(1, size, size), "b": draw(2, size), "out": draw(3, size, 2)}

    def step(params, h, x):
        h = leak * h + jnp.tanh(x @ params["w"] + h @ params["u"] + params["b"])
        return h, h @ params["out"]

    return step, params, Batch(draw(4, T, 2, scale=1.0), draw(5, T, 2))


def formula(leak, keep_jacobian):
    """Menick et al.'s SnAp-1 and Murray's RFLO of `network`, written out for its weights.

    Of u[i, j] alone unit j is influenced: m[i, j] ← a_j m[i, j] + φ'_j h_i, with a_j the diagonal of J or the leak.
    """
    _, params, batch = network(leak)
    w, u, b, out = (np.asarray(params[name]) for name in ("w", "u", "b", "out"))
    h = np.zeros(len(b))
    m = {"w": np.zeros_like(w), "u": np.zeros_like(u), "b": np.zeros_like(b)}
    grads = {name: np.zeros_like(np.asarray(leaf)) for name, leaf in params.items()}
    for x, target in zip(np.asarray(batch.xs), np.asarray(batch.targets), strict=True):
        slope = 1 - np.tanh(x @ w + h @ u + b) ** 2
        kept = leak + slope * np.diag(u) if keep_jacobian else leak
        entering = {"w": np.outer(x, slope), "u": np.outer(h, slope), "b": slope}
        m = {name: kept * m[name] + entering[name] for name in m}
        h = leak * h + np.tanh(x @ w + h @ u + b)
        error = 2 * (h @ out - target)
        grads["out"] += np.outer(h, error)
        for name in m:
            grads[name] += m[name] * (out @ error)
    return jax.tree.map(lambda g: g / T, grads)


@pytest.mark.parametrize("leak", [0.0, 0.7])
def test_snap_1_and_rflo_are_their_papers_formulas(leak):
    step, params, batch = network(leak)
    one = lambda estimator: updated(estimator, params, jnp.zeros(4), batch)[0].grads
    assert_close(one(snap(step, square, order=1)), formula(leak, keep_jacobian=True))
    assert_close(one(rflo(step, square, leak=leak)), formula(leak, keep_jacobian=False))


@pytest.mark.parametrize("order", usual([3], [1, 2, 3, 4]))
def test_snap_n_masks_by_what_n_steps_reach(order):
    """Against dense Jacobians and a mask from products of their patterns; the loss reads the emitted carry."""
    step, loss, params, carry, batch = system("sparse", ())
    batch = batch._replace(mask=None, weights=None)

    def late(params, both, x):  # the loss of h_t as one of the carry received, at step t + 1
        h, _ = both
        return (step(params, h, x)[0], h), h[..., :2]

    p, of_p = real_vector(params)
    jacobian = jax.jacrev(lambda h: step(params, h, batch.xs[0])[0])(carry) != 0
    entering = jax.jacrev(lambda p: step(of_p(p), carry, batch.xs[0])[0])(p) != 0
    mask = entering
    for _ in range(order - 1):
        mask = mask | (jacobian.astype(int) @ mask.astype(int) > 0)
    shifted = Batch(jnp.concatenate([batch.xs, batch.xs[:1]]), jnp.concatenate([batch.targets[:1], batch.targets]))
    wanted = by_hand(
        late,
        loss,
        [params] * (T + 1),
        (carry, carry),
        shifted,
        lambda j, d, p: jnp.where(jnp.tile(mask, (2, 1)), j @ p + d, 0),
    )
    found, _ = updated(snap(step, loss, order=order), params, carry, batch)
    assert_close(real_vector(found.grad_sum)[0], sum(wanted[1:]))
    exact, _ = updated(rtrl(step, loss), params, carry, batch)
    away = float(jnp.max(jnp.abs(real_vector(found.grads)[0] - real_vector(exact.grads)[0])))
    assert (away > 1e-4) == (order < 3), away  # the longest way takes two steps


@pytest.mark.parametrize("name", usual(["diagonal", "lru"], ["diagonal", "lru", "spiking"]))
def test_snap_1_is_exact_where_units_read_themselves_alone(name):
    step, loss, params, carry, batch = system(name)
    structure = influence_structure(step, loss, params, carry, batch)
    per_unit = 1 if name == "diagonal" else 2
    reals, _ = real_leaves(split_inexact({k: v for k, v in params.items() if k not in ("out", "c")})[0])
    assert structure.num_kept(None) == structure.num_kept(1) == per_unit * sum(leaf.size for leaf in reals)
    assert structure.is_elementwise == (name == "diagonal")
    wanted, _ = updated(full_bptt(step, loss), params, carry, batch)
    assert_close(updated(snap(step, loss, order=1), params, carry, batch)[0].grads, wanted.grads)


def recurrent(params, carry, x):
    """Of the leaves that are emitted a later step reads the first alone; the last has no finite derivative."""
    h, _, _ = carry
    now = params["w"] * h + x
    return (now, jnp.tanh(now * params["s"] + h), jnp.sqrt(jnp.sum((now - now) ** 2, -1))), now[..., :1]


def read_where_it_is_written(params, carry, x):
    carry, _ = recurrent(params, carry, x)
    return carry, carry[1]


def memoryless(params, carry, x):
    return recurrent(params, carry, x)[0], jnp.tanh(x * params["w"] * params["s"])


@pytest.mark.parametrize("step, size", [(recurrent, 3), (read_where_it_is_written, 3), (memoryless, 0)])
def test_influence_is_on_what_losses_read(step, size):
    """Of the carry's other leaves there is none: a derivative that is not finite there does no harm."""
    params = {"w": draw(0, 3), "s": draw(1, 3)}
    batch = Batch(draw(2, T, 2, 3))
    carry = draw(3, 2, 3), draw(4, 2, 3), jnp.ones(2)
    loss = lambda y, target: jnp.sum(y**2, -1)
    structure = influence_structure(step, loss, params, carry, batch)
    assert structure.size == size and f"losses read {size} numbers" in str(structure)
    wanted, _ = updated(full_bptt(step, loss), params, carry, batch)
    for estimator in (rtrl(step, loss), snap(step, loss, order=1)):
        found, _ = updated(estimator, params, carry, batch)
        assert_close(found.grads, wanted.grads)
        assert_close(found.info["carry_grads"], wanted.info["carry_grads"])
    for estimator in (rflo(step, loss, leak=params["w"].mean()), uoro(step, loss)):
        found, _ = updated(estimator, params, carry, batch, KEY)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((found.grads, found.info["carry_grads"])))
        if not size:
            assert_close(found.grads, wanted.grads)


def test_structure_of_a_stack():
    """The lower layer reaches both, the upper one itself; numbers of the readout reach nothing."""
    step, loss, params, carry, batch = system("stacked")
    structure = influence_structure(step, loss, params, carry, batch)
    low, up = (2 * 3 + 3), (3 * 4 + 4 * 4)
    assert structure.num_kept(None) == low * (1 + 4) + up * 4
    assert structure.num_kept(1) == low * (1 + 4) + up
    assert "\n  RTRL          157\n" in str(structure)


@pytest.mark.parametrize("padding", [False, True])
def test_a_structure_from_numbers(padding):
    """A diagonal matrix that is written out: the program reads all, the numbers say better; padding is no structure."""
    params = {"a": draw(0, 3), "w": draw(1, 2, 3)}

    def step(params, h, x):
        h = h @ jnp.diag(params["a"]) + x @ params["w"]
        return h, h[..., :2]

    _, loss, _, _, batch = system("diagonal")
    mask = jnp.ones((T, 2), bool).at[:4, 0].set(False) if padding else None
    batch = batch._replace(mask=mask, xs=batch.xs.at[:3].set(0))
    carry = jnp.zeros((2, 3))
    program = influence_structure(step, loss, params, carry, batch)
    numbers = influence_structure(step, loss, params, carry, batch, method="numbers")
    assert program.num_kept(None) == 27 and numbers.num_kept(None) == 9 and numbers.is_elementwise
    wanted, _ = updated(full_bptt(step, loss), params, carry, batch)
    for structure in (program, numbers):
        found, state = updated(rtrl(step, loss, structure=structure), params, carry, batch)
        assert_close(found.grads, wanted.grads)
        assert sum(leaf[0].size for leaf in state.influence) == structure.num_kept(None)


def test_padding_holds_what_no_unit_keeps_by_itself():
    """A delay line: nothing reads itself but where padding holds the carry, also by numbers."""
    params = {"w": draw(1, 2)}

    def step(params, h, x):
        h = jnp.concatenate([(x @ params["w"])[..., None], h[..., :-1]], -1)
        return h, h[..., 1:]

    _, loss, _, _, batch = system("diagonal")
    carry, batch = jnp.zeros((2, 3)), batch._replace(mask=jnp.ones((T, 2), bool).at[3:5, 1].set(False))
    wanted, _ = updated(full_bptt(step, loss), params, carry, batch)
    for method in ("program", "numbers"):
        structure = influence_structure(step, loss, params, carry, batch, method=method)
        assert_close(updated(rtrl(step, loss, structure=structure), params, carry, batch)[0].grads, wanted.grads)


def draws_of(estimator, params, carry, batch, num_draws, seed=0):
    """Gradients `[num_draws, P]`."""

    def one(key):
        estimate, _ = estimator.update(params, estimator.init(params, carry, batch, key), batch)
        return real_vector((estimate.grads, estimate.info["carry_grads"]))[0]

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(seed), num_draws))


@pytest.mark.parametrize("name", usual(["tanh"], ["tanh", "lru", "lstm+readout"]))
def test_uoro_is_right_on_average_and_its_mean_converges(name):
    """Five standard errors; and ‖mean of N − exact‖ over N = 1 … 1024 falls as N^(−1/2)."""
    step, loss, params, carry, batch = system(name)
    exact, _ = updated(full_bptt(step, loss), params, carry, batch)
    exact = real_vector((exact.grads, exact.info["carry_grads"]))[0]
    found = draws_of(uoro(step, loss), params, carry, batch, 2**15)
    error = found.std(0) / np.sqrt(len(found))
    moves = error > 1e-12 * (1 + abs(exact))
    np.testing.assert_allclose(found.mean(0)[~moves], exact[~moves], rtol=1e-9, atol=1e-12)
    assert np.all(abs(found.mean(0) - exact)[moves] < 5 * error[moves])
    assert slope(found, exact) == pytest.approx(-0.5, abs=0.1)


def slope(found, exact):
    """Of log ‖mean of N draws − exact‖ against log N, N = 1 … 1024, each averaged over what draws there are."""
    sizes = 2 ** np.arange(11)
    means = [found[: len(found) // n * n].reshape(-1, n, found.shape[1]).mean(1) for n in sizes]
    errors = [np.sqrt(np.mean(np.sum((mean - exact) ** 2, 1))) for mean in means]
    return np.polyfit(np.log(sizes), np.log(errors), 1)[0]


def test_uoro_without_its_cross_term_is_caught(monkeypatch):
    """A wrong variant, which drops what earlier steps left, J s̃ and w̃: the mean of more draws comes no closer."""
    from jbptt.online import rank_one

    step, loss, params, carry, batch = system("tanh")
    exact, _ = updated(full_bptt(step, loss), params, carry, batch)
    exact = real_vector((exact.grads, exact.info["carry_grads"]))[0]
    balance = rank_one._balance
    calls = itertools.count()
    # The first of a step's two factors belongs to J s̃ and w̃: dropped.
    monkeypatch.setattr(rank_one, "_balance", lambda *norms: (next(calls) % 2) * balance(*norms))
    found = draws_of(uoro(step, loss), params, carry, batch, 2**15)
    assert slope(found, exact) > -0.35


@pytest.mark.more("test_one_update_is_as_many_of_one_step")
def test_noise_is_that_of_the_step_in_its_stream():
    """A stream in pieces draws what the whole draws; another key draws something else."""
    step, loss, params, carry, batch = system("tanh")
    whole, state = updated(uoro(step, loss), params, carry, batch, KEY)
    total, last = in_pieces(uoro(step, loss), params, carry, batch, (2, 3, T), KEY)
    assert_close((total.grads, last.of_params, last.of_carry), (whole.grads, state.of_params, state.of_carry))
    other, _ = updated(uoro(step, loss), params, carry, batch, jax.random.key(4))
    assert float(jnp.max(jnp.abs(other.grads["w_h"] - whole.grads["w_h"]))) > 1e-3
    first, second = state.of_params[0]
    assert float(jnp.max(jnp.abs(first / second - first[0] / second[0]))) > 1e-6  # a draw for each example


# Forward only.


METHODS = {
    "rtrl": rtrl,
    "snap": functools.partial(snap, order=1),
    "rflo": functools.partial(rflo, leak=0.5),
    "uoro": uoro,
}


@pytest.mark.parametrize("name", usual(["uoro"], METHODS))
def test_memory_does_not_grow_with_the_steps(name):
    """T = 64 and 4096; nothing is read twice, and one update of T steps is T updates of one."""
    cell = cells.rnn(2, 8)
    params = cell.init(jax.random.key(0))
    estimator = METHODS[name](cell.step, square)

    def temporary(num_steps):
        batch = Batch(jnp.zeros((num_steps, 2, 2)), jnp.zeros((num_steps, 2, 8)))
        state = estimator.init(params, jnp.zeros((2, 8)), batch, KEY)
        return jax.jit(estimator.update).lower(params, state, batch).compile().memory_analysis().temp_size_in_bytes

    assert temporary(4096) <= temporary(64) + 1024


@pytest.mark.parametrize("name", usual(["snap"], METHODS))
def test_one_update_is_as_many_of_one_step(name):
    step, loss, params, carry, batch = system("tanh")
    estimator = METHODS[name](step, loss)
    whole, state = updated(estimator, params, carry, batch, KEY)
    total, last = in_pieces(estimator, params, carry, batch, range(1, T + 1), KEY)
    assert_close((total.loss, total.grads, last.carry), (whole.loss, whole.grads, state.carry))


@pytest.mark.parametrize("name", usual(["rflo"], METHODS))
def test_padding_leaves_no_trace(name):
    """NaN under the mask, for one example and for all; what follows is as without it."""
    step, loss, params, carry, batch = system("tanh")
    batch = Batch(*batch[:2])
    estimator = METHODS[name](step, loss)
    pad = Batch(jnp.full((2, *batch.xs.shape[1:]), jnp.nan), jnp.full((2, *batch.targets.shape[1:]), jnp.nan))
    padded = jax.tree.map(lambda a, b: jnp.concatenate([a[:4], b, a[4:]]), batch, pad)
    mask = jnp.asarray([True] * 4 + [False] * 2 + [True] * (T - 4))
    found, _ = updated(estimator, params, carry, padded._replace(mask=mask), KEY)
    if name == "uoro":  # its noise is that of the step: padding at the end alone leaves all others theirs
        padded = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), batch, pad)
        found, _ = updated(estimator, params, carry, padded._replace(mask=jnp.arange(T + 2) < T), KEY)
    wanted, _ = updated(estimator, params, carry, batch, KEY)
    assert_close((found.loss, found.grads), (wanted.loss, wanted.grads))


# A system whose answer is known.


@functools.cache
def balancing():
    """Influence balancing (Tallec & Ollivier, 2018): s_i ← (s_i + s_{i+1})/2 ± θ, plus for 10 units, minus behind.

    The loss is (s_1 − 1)²/2. A short window sees the near units alone, whose sign is the wrong one.
    """
    size, positive = 23, 10
    a = jnp.asarray(0.5 * (np.eye(size) + np.eye(size, k=1)))
    signs = jnp.asarray(np.where(np.arange(size) < positive, 1.0, -1.0))

    def step(theta, s, _):
        s = a @ s + theta * signs
        return s, s

    def loss(s, _):
        return 0.5 * (s[0] - 1) ** 2

    optimum = 1 / np.linalg.solve(np.eye(size) - np.asarray(a), np.asarray(signs))[0]  # the fixed point of s_1 is 1
    return step, loss, SimpleNamespace(size=size, optimum=optimum)


@pytest.mark.parametrize("name", usual(["rtrl"], ["rtrl", "uoro"]))
def test_influence_balancing(name):
    """The optimum is −1/6; windows of up to 10 steps see the wrong sign and run away from it."""
    step, loss, known = balancing()
    assert known.optimum == pytest.approx(-1 / 6)

    def train(estimator, num_updates):
        batch = Batch(jnp.zeros(1), None)
        state = estimator.init(jnp.asarray(0.0), jnp.zeros(known.size), batch, KEY)

        def body(state, t):
            theta, own = state
            estimate, own = estimator.update(theta, own, batch)
            return (theta - 1e-3 / jnp.sqrt(1 + t) * estimate.grads, own), None

        (theta, _), _ = lax.scan(body, (jnp.asarray(0.0), state), jnp.arange(num_updates))
        return float(theta)

    assert train(METHODS[name](step, loss), 100_000) == pytest.approx(-1 / 6, abs=1e-6)
    for window in (1, 10):
        assert train(jbptt.truncated_bptt(step, loss, window=window, stride=1), 20_000) > 0.5


# On the command line.


@pytest.mark.more("test_command_compare::test_tables_and_files_of_few")
def test_names_on_the_command_line():
    """They join the built-in models' estimators, and those of a user's own; what is none is refused by name."""
    from jbptt.online.names import check_online_names, online_estimators
    from jbptt.report.commands.compare import ComparisonSettings, check_comparison_settings, estimators_of
    from jbptt.report.commands.own_models import arguments_of

    step, loss, params, carry, batch = system("tanh")
    names = "rtrl", "snap-2", "rflo-0.5", "uoro"
    found = online_estimators(names, step, loss)
    assert tuple(found) == names == tuple(estimators_of(ComparisonSettings(online=names), step, loss))[-4:]
    wanted = rtrl(step, loss), snap(step, loss, order=2), rflo(step, loss, leak=0.5), uoro(step, loss)
    for (name, one), own in zip(found.items(), wanted, strict=True):
        assert_close(updated(one, params, carry, batch, KEY)[0].grads, updated(own, params, carry, batch, KEY)[0].grads)
        assert (name == "rtrl") == (one.coverage is not None)
    model = SimpleNamespace(problem=(step, loss, params, carry, batch), study={"estimators": {"mine": wanted[0]}})
    assert tuple(arguments_of(model, {"online": names, "seeds": None})["estimators"]) == ("mine", *names)
    assert arguments_of(model, {"online": ()}) == model.study
    for name in ("snap", "snap-0", "snap-x", "rflo", "rflo-nan", "RTRL", "uoro-1"):
        with pytest.raises(ValueError, match=f"online must be of rtrl, snap-N .*got '{name}'"):
            check_online_names([name])
    with pytest.raises(ValueError, match="online must be of"):
        check_comparison_settings(ComparisonSettings(online=("bptt",)))


def test_in_a_learning_study_each_batch_is_a_sequence_of_its_own():
    """RTRL then is full BPTT, batch after batch; UORO's noise goes on."""
    from jbptt.learning.ways import anew

    step, loss, params, carry, batch = system("tanh")
    for make in (rtrl, uoro):
        estimator, full = anew(make(step, loss), carry), anew(full_bptt(step, loss), carry)
        state, other = (one.init(params, None, batch, key=KEY) for one in (estimator, full))
        found = []
        for _ in range(2):
            estimate, state = jax.jit(estimator.update)(params, state, batch)
            wanted, other = jax.jit(full.update)(params, other, batch)
            found.append(estimate.grads)
            if make is rtrl:
                assert_close(estimate.grads, wanted.grads)
        if make is uoro:
            assert float(jnp.max(jnp.abs(found[0]["w_h"] - found[1]["w_h"]))) > 1e-3


# Large and usual.


def test_layouts_of_large_steps_take_no_time():
    """A dense network of 1000 units and 4096 complex diagonal ones: seconds, where loops over pairs took minutes."""
    from jbptt.online.layout import layout_of
    from jbptt.online.structure import InfluenceStructure

    size = 1000
    everything = (1 << size) - 1
    sets = [0, everything, *(1 << i for i in range(size))]
    dense = InfluenceStructure(size, sets, [np.tile(np.arange(2, size + 2), (size, 1))], np.ones(size, int))
    for order, kept in ((1, (size, size, 1, 1)), (None, (1, 1, size * size, size))):
        layout = layout_of(dense, order)
        assert layout.params[0].kept == kept
        assert layout.carry_colours.tolist() == list(range(size)) and set(layout.param_colours) == {0}
    units = 4096
    pairs = [0, *(1 << i | 1 << i + units for i in range(units))]
    complex_ones = InfluenceStructure(
        2 * units, pairs, [np.tile(np.arange(1, units + 1), (8, 1))] * 2, np.tile(np.arange(1, units + 1), 2)
    )
    layout = layout_of(complex_ones, None)
    assert [block.kept for block in layout.params] == [(8, units, 1, 2)] * 2
    assert set(layout.carry_colours) == set(layout.param_colours) == {0, 1}


# Bad input.


def refused(match, make, params=None, carry=None, batch=None, key=KEY, step=None):
    own_step, loss, own_params, own_carry, own_batch = system("tanh")
    with pytest.raises(ValueError, match=match):
        estimator = make(step or own_step, loss)
        estimator.init(
            own_params if params is None else params,
            own_carry if carry is None else carry,
            own_batch if batch is None else batch,
            key,
        )


def test_what_cannot_be_is_refused():
    refused("order must be", functools.partial(snap, order=0))
    refused("leak must be a number or a tree", functools.partial(rflo, leak=jnp.zeros(7)))
    refused("leak must be a number or a tree", functools.partial(rflo, leak={"h": 0.5}))
    for leak in (None, np.nan, "a"):
        refused("leak must be finite numbers", functools.partial(rflo, leak=leak))
    refused("carry holds no floating numbers", rtrl, carry=(), step=lambda params, _, x: ((), x @ params["w_x"]))
    refused("uoro needs a key", uoro, key=None)
    refused("plan must leave segment at None", functools.partial(rtrl, plan=jbptt.Plan(segment=2)))
    refused("structure must be what influence_structure returns", functools.partial(rtrl, structure="dense"))
    step, loss, params, carry, batch = system("stacked")
    other = influence_structure(step, loss, params, carry, batch)
    refused("structure is that of a carry of 7 numbers", functools.partial(snap, order=1, structure=other))
    with pytest.raises(ValueError, match="method must be one of program, numbers"):
        influence_structure(step, loss, params, carry, batch, method="guess")


def test_examples_are_told_apart_by_the_plain_engine(monkeypatch):
    monkeypatch.setattr(engine, "fast", None)
    step = lambda w, h, x: 2 * (jnp.tanh(w * (h - h.mean()) + x),)
    with pytest.raises(ValueError, match="of an example depends on the others"):
        rtrl(step, each_square).init(0.8, jnp.zeros(2), Batch(jnp.ones((3, 2)), jnp.zeros((3, 2))))


@pytest.mark.parametrize("what", ["carry", "inputs", "second axis", "number"])
def test_examples_that_depend_on_each_other_have_no_influence_of_their_own(what):
    own, loss, params, carry, batch = system("stacked", (1, 3) if what == "second axis" else (3,))

    def step(params, carry, x):
        low, up = carry
        if what == "carry":
            low = low - low.mean(0)
        if what == "inputs":
            x = x - x.mean(0)
        if what == "second axis":
            up = up - up.mean(1, keepdims=True)
        if what == "number":  # of the example
            low = low + params["low"]["a"][jnp.arange(low.shape[0])][:, None]
        return own(params, (low, up), x)

    with pytest.raises(ValueError, match="emits of an example depends on the others, or on which one it is"):
        rtrl(step, loss).init(params, carry, batch)


def each_square(y, target):
    return (y - target) ** 2


def test_an_example_in_padding_is_read_by_no_other():
    """What it would emit has no influence: refused with a mask for each example, exact with one for all."""

    def step(w, h, x):
        h = jnp.tanh(w * h + x)
        return h, h - h.mean()

    xs, targets = jax.random.normal(jax.random.key(0), (2, 3, 2))
    problem = step, each_square, 0.8, jnp.zeros(2)
    apart = Batch(xs, targets, mask=jnp.array([[True, True], [True, False], [True, True]]))
    with pytest.raises(ValueError, match="of an example depends on the others"):
        rtrl(step, each_square).init(0.8, jnp.zeros(2), apart)
    for mask in (None, jnp.array([True, False, True])):
        same_as_full(*problem, Batch(xs, targets, mask=mask))


def same_as_full(step, loss, params, carry, batch, **options):
    found, wanted = (
        jax.jit(lambda e=e: problems.one_update(e, params, carry, batch))()
        for e in (rtrl(step, loss, **options), full_bptt(step, loss))
    )
    assert_close(found.grads, wanted.grads, rtol=1e-10)


def test_examples_are_told_apart_where_the_step_closes_over_what_is_traced():
    def of_scale(make, scale):
        step = lambda w, h, x: 2 * (jnp.tanh(w * (h - h.mean()) + scale * x),)
        estimator, batch = make(step, each_square), Batch(jnp.ones((3, 2)), jnp.zeros((3, 2)))
        return estimator.update(0.8, estimator.init(0.8, jnp.zeros(2), batch), batch)[0].grads

    with pytest.raises(ValueError, match="of an example depends on the others"):
        jax.jit(functools.partial(of_scale, rtrl))(1.0)


def test_a_structure_of_a_batch_without_padding_serves_with_it():
    """A delay line, which feeds nothing to itself but where padding holds it."""

    def step(w, h, x):
        h = jnp.stack([w * x, h[0]])
        return h, h[1]

    batch, carry = Batch(jnp.arange(1.0, 5), jnp.zeros(4)), jnp.zeros(2)
    for method in ("program", "numbers"):
        found = influence_structure(step, each_square, 1.0, carry, batch, method=method)
        padded = batch._replace(mask=jnp.array([True, False, True, True]))
        same_as_full(step, each_square, 1.0, carry, padded, structure=found)


def written_out(params, h, x):
    """A complex matrix that is diagonal, and what it meets."""
    h = jnp.einsum("...i,ij->...j", h, jnp.diag(params["a"])) + x @ params["b"]
    return h, (h @ params["c"]).real


def reads_last(params, carry, x):
    """A carry of which no entry enters itself alone."""
    h, last = carry
    h = jnp.tanh((x + last) @ params["w"] + h @ params["u"])
    return (h, x), h


def test_structures_from_numbers_of_complex_leaves_and_of_what_feeds_others():
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    both = lambda seed, *shape: draw(seed, *shape) + 1j * draw(seed + 50, *shape)
    batch = Batch(draw(0, 6, 2, 3), draw(1, 6, 2, 4))
    params = {"a": 0.6 * jnp.exp(1j * draw(2, 5)), "b": both(3, 3, 5), "c": both(4, 5, 4)}
    real = {"w": draw(5, 3, 4), "u": draw(6, 4, 4)}
    for step, own, carry in (
        (written_out, params, jnp.zeros((2, 5), complex)),
        (reads_last, real, (jnp.zeros((2, 4)), jnp.zeros((2, 3)))),
    ):
        found = influence_structure(step, square, own, carry, batch, method="numbers")
        same_as_full(step, square, own, carry, batch, structure=found)


def test_a_state_of_another_kind_is_refused():
    step, loss, params, carry, batch = system("tanh")
    state = snap(step, loss, order=1).init(params, carry, batch)
    with pytest.raises(ValueError, match="the state's influence has shapes"):
        rtrl(step, loss).update(params, state, batch)
    of_noise = uoro(step, loss).init(params, carry, batch, KEY)
    with pytest.raises(ValueError, match=r"state must be the InfluenceState that init or .* got RankOneState"):
        rtrl(step, loss).update(params, of_noise, batch)
    with pytest.raises(ValueError, match=r"state must be the RankOneState that init or .* got InfluenceState"):
        uoro(step, loss).update(params, state, batch)


def test_an_influence_that_fits_nowhere_is_refused_before_anything_is_allocated():
    """One of 4 TiB, on shapes: the error has the size and what to take instead."""
    cell = cells.rnn(8, 2048, dtype=jnp.float32)
    shapes = jax.eval_shape(cell.init, jax.random.key(0))
    params = jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), shapes)
    batch = Batch(jnp.zeros((3, 16, 8), jnp.float32), jnp.zeros((3, 16, 2048), jnp.float32))
    carry = jnp.zeros((16, 2048), jnp.float32)
    with pytest.raises(ValueError, match=r"[\d,.e+]+ GiB in all.*take snap\(order=1\), or uoro"):
        rtrl(cell.step, square).init(params, carry, batch)


def test_the_influence_of_the_entering_carry_takes_memory_too(monkeypatch):
    """One parameter on 100 numbers that all read each other: little, but for what the carry itself becomes."""
    from jbptt.online import checks

    def step(p, h, x):
        h = jnp.tanh(p * jnp.cumsum(h, -1) + x)
        return h, h

    arguments = jnp.asarray(0.1), jnp.zeros((8, 100)), Batch(jnp.zeros((3, 8, 100)), jnp.zeros((3, 8, 100)))
    monkeypatch.setattr(checks, "usual_memory", lambda: 1e6)  # 100 · 8 numbers of P, 100 · 100 · 8 of M
    with pytest.raises(ValueError, match="GiB in all"):
        rtrl(step, square).init(*arguments)
    monkeypatch.setattr(checks, "usual_memory", lambda: 1e7)
    rtrl(step, square).init(*arguments)
