"""Dependence entry by entry: never less than Jacobians show, and exactly that where a rule is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jbptt.engine import entry_dependence

RNG = np.random.default_rng(0)
M = jnp.asarray(RNG.normal(size=(4, 3)))
INDEX = jnp.asarray([2, 0, 3])


def vector(*shape):
    return jnp.asarray(RNG.normal(size=shape))


def inner_scan(v):
    """A carry that collects, and outputs that read it."""
    return lax.scan(lambda c, x: (c + x * v[0], c * x), v[1], v[2:])


def sliced_somewhere(v):
    return lax.dynamic_slice(v.reshape(2, 3), (jnp.argmax(M[0]) % 2, 0), (1, 3))


def written_somewhere(v):
    return lax.dynamic_update_slice(jnp.zeros((3, 2)), v[:2][None], (jnp.argmax(M[0]), 0)) + v[2]


# Of a vector of six numbers: exact rules.
EXACT = {
    "entry by entry": lambda v: jnp.tanh(v) * jnp.cos(v) + jnp.exp(-v) / (1 + v**2),
    "a product": lambda v: v[:4] @ M,
    "a product from the left": lambda v: M @ v[3:],
    "products side by side": lambda v: jnp.einsum("bi,bij->bj", v.reshape(2, 3), jnp.stack([M[:3], M[1:]])),
    "two free axes": lambda v: jnp.einsum("ab,cb->ac", v.reshape(3, 2), M[:, :2]),
    "both sides": lambda v: jnp.outer(v[:2], v[2:]),
    "moves": lambda v: jnp.flip(v.reshape(2, 3).T, 0)[1:, None],
    "a sum": lambda v: v.reshape(2, 3).sum(0),
    "a maximum": lambda v: v.reshape(3, 2).max(1),
    "a sum that keeps its axis": lambda v: v.reshape(2, 3).sum(0, keepdims=True),
    "joined and cut": lambda v: jnp.concatenate([v[4:], v[:2], v[2:4] * v[0]])[1:5:2],
    "stacked and unstacked": lambda v: jnp.stack([a * b for a, b in zip(v[:3], v[3:], strict=True)], 0),
    "padded": lambda v: lax.pad(v, 0.0, [(1, -2, 1)]),
    "repeated": lambda v: jnp.broadcast_to(v[:, None], (6, 2)),
    "inside a jit": lambda v: jax.jit(lambda v: v[:2] * v[2:4])(v),
    "checkpointed": lambda v: jax.checkpoint(lambda v: jnp.sin(v[:3]) @ M[:3])(v),
    "real and imaginary": lambda v: jnp.real((v[:3] + 1j * v[3:]) * (2 - 1j)),
    "nothing": lambda v: jnp.zeros(3) + jnp.arange(3) * lax.stop_gradient(M[0, 0]),
    "split": lambda v: jnp.split(v * 2, [1, 3])[1],
}
# More than there is, or as much.
WIDER = {
    "a table's row": lambda v: v.reshape(3, 2)[INDEX[:1] % 3],
    "both branches": lambda v: lax.cond(M[0, 0] > 0, lambda v: v[:3], lambda v: v[3:] * 2, v),
    "a choice": lambda v: jnp.where(M[:3, 0] > 0, v[:3], v[3:]),
    "sums so far": lambda v: jnp.cumsum(v),
    "an inner loop": inner_scan,
    "a slice from somewhere": sliced_somewhere,
    "written somewhere": written_somewhere,
    "added into a table": lambda v: jnp.zeros((4, 2)).at[INDEX].add(v.reshape(3, 2)),
    "gathered": lambda v: v[INDEX],
    "a loop until": lambda v: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * v[:2]), (0, v[2:4]))[1],
    "sorted": lambda v: jnp.sort(v),
    "solved": lambda v: jnp.linalg.solve(jnp.eye(2) * 3 + v[:4].reshape(2, 2), v[4:]),
    "a convolution": lambda v: jnp.convolve(v, M[0], mode="same"),
    "through a choice": lambda v: v[jnp.argmax(v)] * v[:2],
}


def pattern(function):
    """Which results depend on which entries, as bools `[results, 6]`."""
    sets, numbers = entry_dependence(function, jax.ShapeDtypeStruct((6,), float))
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(numbers)])
    return np.array([[sets[number] >> j & 1 for j in range(6)] for number in flat], bool)


def jacobian(function):
    """What is other than zero in the derivative at some of a few points."""

    def flat(v):
        return jnp.concatenate([jnp.ravel(leaf).astype(float) for leaf in jax.tree.leaves(function(v))])

    return np.any([np.asarray(jax.jacfwd(flat)(vector(6))) != 0 for _ in range(8)], axis=0)


@pytest.mark.parametrize("name", EXACT)
def test_what_is_known_is_exact(name):
    np.testing.assert_array_equal(pattern(EXACT[name]), jacobian(EXACT[name]))


@pytest.mark.parametrize("name", WIDER)
def test_nothing_is_left_out(name):
    assert np.all(pattern(WIDER[name]) >= jacobian(WIDER[name]))


def test_a_table_keeps_its_columns():
    """A row from an unknown place reads its own column of every row, and the derivative writes there alone."""
    gathered = pattern(lambda v: v.reshape(3, 2)[jnp.argmax(M[0])])
    np.testing.assert_array_equal(gathered, [[1, 0, 1, 0, 1, 0], [0, 1, 0, 1, 0, 1]])
    added = pattern(lambda v: jnp.zeros((4, 2)).at[INDEX].add(v.reshape(3, 2)))
    np.testing.assert_array_equal(added, np.tile([[1, 0, 1, 0, 1, 0], [0, 1, 0, 1, 0, 1]], (4, 1)))


def test_many_entries_in_short_time():
    """A network of 512 units, 263 thousand parameters: the sets are few, so that nothing of that size is kept twice."""
    w = jnp.zeros((512, 512))
    sets, numbers = entry_dependence(lambda bar, h: jnp.outer(h, bar), jax.ShapeDtypeStruct((512,), float), w[0])
    assert len(sets) == 513 and numbers.shape == (512, 512)
    assert all(sets[number] == 1 << j for j, number in enumerate(numbers[0]))
