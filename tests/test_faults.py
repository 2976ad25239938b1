"""What a user gets for what is wrong. `python tests/test_faults.py` prints the table from the tests themselves."""

import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import usual

from jbptt import (
    Batch,
    cells,
    diagnose,
    full_bptt,
    gated_bptt,
    randomized_bptt,
    tasks,
    train,
    truncated_bptt,
    truncation,
    unroll,
    validation,
)
from jbptt.clipping import clip_by_global_norm

T, B, H = 6, 3, 2
CELL = cells.rnn(2, H, dtype=jnp.float32)
PARAMS = {
    "w_x": 0.5 * jnp.ones((2, H), jnp.float32),
    "w_h": 0.4 * jnp.eye(H, dtype=jnp.float32),
    "b": jnp.zeros(H, jnp.float32),
}
CARRY = jnp.zeros((B, H), jnp.float32)
XS = jnp.asarray(np.random.default_rng(0).normal(size=(T, B, 2)), jnp.float32)
BATCH = Batch(XS, jnp.ones((T, B, H), jnp.float32))


def update(make: Callable = full_bptt, params: Any = PARAMS, carry: Any = CARRY, step: Any = CELL.step, **batch: Any):
    """One update with something changed."""
    estimator = make(step, tasks.squared_error)
    batch = BATCH._replace(**batch)
    return estimator.update(params, estimator.init(params, carry, batch, jax.random.key(0)), batch)[0]


class Fault(NamedTuple):
    """A wrong call.

    Attributes:
      name: what is wrong.
      call: what the user writes.
      words: what the error says; None: no error, see `check`.
      check: what must hold for the result.
      meaning: what the user gets, where it is no error.
      warning: what a UserWarning says beside it.
      error: the error's type.
    """

    name: str
    call: Callable[[], Any]
    words: str | None = None
    check: Callable[[Any], bool] | None = None
    meaning: str = ""
    warning: str | None = None
    error: type[Exception] = ValueError


def finite(estimate: Any) -> bool:
    return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((estimate.grads, estimate.loss)))


def same(one: Any, two: Any, rtol: float = 1e-5) -> bool:
    pairs = zip(jax.tree.leaves(one.grads), jax.tree.leaves(two.grads), strict=True)
    return all(np.allclose(a, b, rtol=rtol, atol=1e-7) for a, b in pairs)


def zero(estimate: Any) -> bool:
    return all(bool(jnp.all(leaf == 0)) for leaf in jax.tree.leaves((estimate.grads, estimate.loss)))


def drifting(change: Callable) -> Callable:
    """A step whose new carry is changed."""

    def step(params, h, x):
        h, y = CELL.step(params, h, x)
        return change(h), y

    return step


def with_nan(array: Any, *index: Any) -> Any:
    return jnp.asarray(array).at[index].set(jnp.nan)


MASK = np.ones((T, B), bool)
MASK[4:, 1] = False
ROW = np.ones((T, B), bool)
ROW[:, 2] = False

FAULTS = [
    Fault("T = 0", lambda: update(xs=XS[:0], targets=BATCH.targets[:0]), "T must be >= 1, got 0"),
    Fault("window 0", lambda: update(partial(truncated_bptt, window=0)), "window must be an integer >= 1, got 0"),
    Fault("window −1", lambda: update(partial(truncated_bptt, window=-1)), "window must be an integer >= 1, got -1"),
    Fault("window 2.5", lambda: update(partial(truncated_bptt, window=2.5)), "window must be an integer >= 1, got 2.5"),
    Fault(
        "stride and window swapped", lambda: update(partial(truncated_bptt, window=2, stride=4)), "stride must be <="
    ),
    Fault(
        "window > T",
        lambda: update(partial(truncated_bptt, window=50)),
        None,
        lambda e: same(e, update()) and int(e.info["reach"]) == T,
        'the exact gradient of a first update, info["reach"] = T; the window goes on into the next',
    ),
    Fault(
        "T mod window ≠ 0",
        lambda: update(partial(truncated_bptt, window=4)),
        None,
        lambda e: float(e.weight_sum) == T * B,
        "every loss counts, the ragged rest too",
    ),
    Fault("xs and targets disagree on T", lambda: update(targets=BATCH.targets[:4]), "leaves disagree on T"),
    Fault("mask of another T", lambda: update(mask=jnp.ones(T + 1, bool)), "leaves disagree on T"),
    Fault("carry changes its shape", lambda: update(step=drifting(lambda h: h[:1])), "step changes carry"),
    Fault(
        "carry changes its dtype", lambda: update(step=drifting(lambda h: h.astype(jnp.float16))), "step changes carry"
    ),
    Fault("carry changes its structure", lambda: update(step=drifting(lambda h: (h,))), "structure of the carry"),
    Fault(
        "carry of a weak type",
        lambda: unroll(lambda w, h, x: (w * h + x,) * 2, 0.5, 0.0, jnp.ones(3, jnp.bfloat16)),
        "step changes carry",
    ),
    Fault(
        "integer parameters", lambda: update(params={**PARAMS, "b": jnp.zeros(H, int)}), "wanted a floating-point array"
    ),
    Fault(
        "boolean parameters", lambda: update(params={**PARAMS, "b": np.zeros(H, bool)}), "wanted a floating-point array"
    ),
    Fault("float0 leaves", lambda: update(params={**PARAMS, "b": np.zeros(H, jax.dtypes.float0)}), "wanted a floating"),
    Fault("mask of the wrong rank", lambda: update(mask=jnp.ones((T, B, 1), bool)), "mask has shape (6, 3, 1)"),
    Fault("mask aligned on the wrong axis", lambda: update(mask=jnp.ones((T, T), bool)), "mask has shape (6, 6)"),
    Fault("weights of the wrong rank", lambda: update(weights=jnp.ones((T, B, H))), "weights has shape (6, 3, 2)"),
    Fault("a mask of 0 and 1", lambda: update(mask=jnp.ones((T, B))), "mask must be bool"),
    Fault(
        "a batch of another shape in the middle of a stream",
        lambda: update_twice(partial(truncated_bptt, window=4), Batch(XS[:, :2], BATCH.targets[:, :2])),
        "the state's history does not fit the batch",
    ),
    Fault(
        "a loss that averages over examples beside a mask of them",
        lambda: with_loss(lambda y, target: jnp.mean((y - target) ** 2), mask=MASK),
        "mask has shape (6, 3), wanted [T] or [T, *batch] = (6,)",
    ),
    Fault(
        "float64 input with x64 off",
        lambda: without_x64(Batch(np.asarray(XS, np.float64), BATCH.targets)),
        None,
        lambda e: same(e, update()) and e.loss.dtype == jnp.float32,
        "the gradient in float32",
        "is float64, which is computed in single precision while x64 is off",
    ),
    Fault(
        "4096 gradients of 1 in bfloat16, whose sum would stop at 256",
        lambda: sum_of_ones(4096),
        None,
        lambda e: float(e.grad_sum) == float(e.loss_sum) == 4096,
        "4096: sums are held in float32",
    ),
    Fault(
        "NaN at one input element",
        lambda: update(xs=with_nan(XS, 2, 1, 0)),
        None,
        lambda e: not finite(e),
        "a NaN gradient; find_nonfinite names step and leaf",
    ),
    Fault(
        "NaN in masked padding",
        lambda: update(xs=with_nan(XS, slice(4, None), 1), mask=MASK),
        None,
        lambda e: finite(e) and same(e, update(mask=MASK)),
        "no effect",
    ),
    Fault("a row that is all padding", lambda: update(mask=ROW), None, finite, "the other rows' gradient"),
    Fault("a batch that is all padding", lambda: update(mask=np.zeros(T, bool)), None, zero, "loss 0, gradient 0"),
    Fault("weights that sum to zero", lambda: update(weights=jnp.zeros(T)), None, zero, "loss 0, gradient 0"),
    Fault(
        "negative weights",
        lambda: update(weights=-jnp.ones(T)),
        None,
        lambda e: same(e, update()),
        "a weighted mean like any other: all −1 is all 1",
    ),
    Fault("padding between real steps", lambda: update(mask=np.arange(T) != 3), None, finite, "the carry is held"),
    Fault("keep_prob 0", lambda: update(partial(randomized_bptt, keep_prob=0.0)), "keep_prob must lie in (0, 1]"),
    Fault("keep_prob 1.5", lambda: update(partial(randomized_bptt, keep_prob=1.5)), "keep_prob must lie in (0, 1]"),
    Fault("keep_prob NaN", lambda: update(partial(randomized_bptt, keep_prob=np.nan)), "keep_prob must lie in (0, 1]"),
    Fault(
        "mean_length 1",
        lambda: update(partial(randomized_bptt, mean_length=1.0)),
        "mean_length must be a finite number > 1",
    ),
    Fault(
        "keep_prob and mean_length",
        lambda: update(partial(randomized_bptt, keep_prob=0.5, mean_length=4.0)),
        "exactly one",
    ),
    Fault(
        "no key for a random estimator",
        lambda: randomized_bptt(CELL.step, tasks.squared_error, keep_prob=0.5).init(PARAMS, CARRY, BATCH),
        "needs a key",
    ),
    Fault("max_norm 0", lambda: clip_by_global_norm(0.0), "max_norm must be a finite number > 0"),
    Fault("max_norm NaN", lambda: clip_by_global_norm(np.nan), "max_norm must be a finite number > 0"),
    Fault(
        "a norm that overflows",
        lambda: clip(jnp.array([3e38, -3e38], jnp.float32)),
        None,
        lambda out: np.allclose(np.abs(out[0]), 0.5**0.5) and bool(out[1].finite),
        "clipped like any other",
    ),
    Fault(
        "a norm of zero",
        lambda: clip(jnp.zeros(2)),
        None,
        lambda out: bool(jnp.all(out[0] == 0)) and bool(out[1].finite),
        "zero, no NaN",
    ),
    Fault(
        "a norm whose squares underflow",
        lambda: clip(jnp.array([3e-30, -4e-30], jnp.float32)),
        None,
        lambda out: np.array_equal(out[0], np.float32([3e-30, -4e-30])) and np.isclose(out[1].norm, 5e-30, atol=0),
        "unchanged, and the right norm",
    ),
    Fault(
        "an adjoint that underflows on its way back",
        lambda: diagnosis_of(1e-15),
        None,
        lambda found: int(found.num_lags) == 2 and not bool(found.underflow) and found.verdict == "vanishing",
        "zeros beyond; diagnose says vanishing, and measures no lag at which nothing is left of the gradient",
    ),
    Fault("seed 2³²", lambda: validation.check_seed(2**32), "seed must be an integer in [0, 2**32)"),
    Fault("a leaked tracer", lambda: leak(), "leaked", error=jax.errors.UnexpectedTracerError),
    Fault(
        "a Python side effect in a step",
        lambda: [count_traces(num_steps) for num_steps in (3, T)],
        None,
        lambda counts: counts[0] == counts[1] > 0,
        "it happens where the step is traced, not once a step",
    ),
    Fault(
        "a target out of range",
        lambda: tasks.cross_entropy(jnp.zeros((2, 5)), jnp.array([4, 5])),
        None,
        lambda out: np.array_equal(np.isnan(out), [False, True]),
        "a NaN loss, never the nearest class",
    ),
    Fault(
        "a negative target",
        lambda: tasks.cross_entropy(jnp.zeros((1, 5)), jnp.array([-1])),
        None,
        lambda out: bool(jnp.isnan(out[0])),
        "a NaN loss, never the last class",
    ),
    Fault(
        "a token out of range",
        lambda: tasks.on_tokens(CELL, 2).step(PARAMS, CARRY, jnp.array([0, 1, 2]))[1],
        None,
        lambda y: np.array_equal(np.isnan(y).any(-1), [False, False, True]),
        "a NaN output",
    ),
    Fault(
        "a boolean loss",
        lambda: with_loss(lambda y, target: jnp.sum(y, -1) > 0),
        "loss must return a real floating",
    ),
    Fault(
        "batch first",
        lambda: update(xs=jnp.swapaxes(XS, 0, 1), targets=jnp.swapaxes(BATCH.targets, 0, 1)),
        "time must come first: xs [3, 6, 2] hands the step x [6, 2] for a carry float32[3, 2]",
    ),
    Fault(
        "batch first, one example: the carry would grow",
        lambda: update(xs=XS[None, :, 0], targets=BATCH.targets[None, :, 0], carry=CARRY[:1]),
        "time must come first: xs [1, 6, 2]",
    ),
    Fault(
        "x before the carry",
        lambda: update(step=lambda p, x, h: CELL.step(p, h, x), params=WIDE, xs=jnp.ones((T, B, 5))),
        "step must take (params, carry, x) and return (carry, y): with x before the carry it runs",
    ),
    Fault("tensors of another library", lambda: update(xs=Tensor()), "xs is a test_faults.Tensor, wanted an array"),
    Fault("a table", lambda: update(targets={"a": Tensor()}), "targets['a'] is a test_faults.Tensor, wanted an array"),
    Fault("a carry of strings", lambda: update(carry="zeros"), "carry is a str, wanted an array"),
    Fault(
        "sequences of several lengths",
        lambda: update(xs=np.array([np.ones(3), np.ones(2)], object)),
        "xs is a NumPy array of dtype object, wanted an array; pass numbers; pad",
    ),
    Fault(
        "a loss that is not summed over features",
        lambda: with_loss(lambda y, target: (y - target) ** 2),
        None,
        finite,
        "each unit counts as an example",
        "the loss has shape (3, 2), and its axis 1, of size 2, is one that params fix: features, not examples; a loss "
        "returns one number per example",
    ),
    Fault(
        "a loss that averages over examples",
        lambda: with_loss(lambda y, target: jnp.mean((y - target) ** 2)),
        None,
        finite,
        "the whole batch is one example to masks and analyses",
        "the loss has shape (), but the carry's first axis",
    ),
    Fault(
        "a loss with an axis too many",
        lambda: with_loss(lambda y, target: tasks.squared_error(y, target)[:, None]),
        None,
        lambda e: same(e, update()),
        "the gradient; analyses refuse the carry",
        "the loss has shape (3, 1), but no leaf of the carry begins with (3, 1)",
    ),
    Fault(
        "weights of both signs that cancel",
        lambda: update(weights=np.array([1, -1, 1, -1, 1, -1.0001])),
        None,
        lambda e: np.abs(e.loss) > 1e3 * np.abs(e.loss_sum),
        "a mean that is divided by nearly 0; divide grad_sum by a number of your own",
        "weights of both signs nearly cancel",
    ),
    Fault(
        "layers before examples, as many, beside a mask of the examples",
        lambda: update(step=stacked_layers, carry=jnp.zeros((B, B, H)), mask=MASK),
        "carry has shape (3, 3, 2), wanted the batch axis first, because the mask is per example, but its axis 1 holds",
    ),
    Fault("step returns only y", lambda: update(step=lambda p, h, x: h), "step must return (carry, y)"),
    Fault(
        "a tuple instead of a Batch",
        lambda: full_bptt(CELL.step, tasks.squared_error).init(PARAMS, CARRY, (XS, XS)),
        "batch must be a jbptt.Batch",
    ),
    Fault(
        "gates of another length",
        lambda: update(partial(gated_bptt, gates_fn=lambda key, n: jnp.ones(n - 1))),
        "gates disagree on T",
    ),
    Fault(
        "gates as a list",
        lambda: update(partial(gated_bptt, gates_fn=lambda key, n: [1.0] * n)),
        "gates must be an array",
    ),
    Fault("half a step for T", lambda: truncation.fixed(2.5, 1), "num_steps must be an integer"),
    Fault(
        "a loss that ignores y",
        lambda: with_loss(lambda y, target: jnp.sum(target, -1)),
        None,
        lambda e: without_gradient(e),
        "a gradient that is exactly 0",
        "the gradient is exactly zero: the loss does not depend on y",
    ),
    Fault(
        "a step without a gradient path",
        lambda: update(step=lambda p, h, x: CELL.step(jax.lax.stop_gradient(p), h, x)),
        None,
        lambda e: without_gradient(e),
        "a gradient that is exactly 0",
        "the gradient is exactly zero: no path leads from params to the loss",
    ),
    Fault(
        "a parameter that only a later loss reads",
        lambda: update(
            step=lambda p, carry, x: ((CELL.step(p, carry[0], x)[0], carry[0]), carry[1]), carry=(CARRY, CARRY)
        ),
        None,
        lambda e: finite(e) and not without_gradient(e),
        "its gradient, two steps back; no warning",
    ),
]


WIDE = {**PARAMS, "w_x": jnp.ones((5, H), jnp.float32)}


class Tensor:
    """What other libraries have in place of arrays."""

    shape, ndim = (T, B, 2), 3


def stacked_layers(params: Any, carry: Any, x: Any) -> Any:
    """Three layers, the first axis of the carry `[layers, B, H]`."""
    new = []
    for h in carry:
        h, x = CELL.step(params, h, x)
        new.append(h)
    return jnp.stack(new), x


def without_gradient(estimate: Any) -> bool:
    return all(bool(jnp.all(leaf == 0)) for leaf in jax.tree.leaves(estimate.grads))


def clip(grads: Any) -> Any:
    transformation = clip_by_global_norm(1.0)
    return transformation.update(grads, transformation.init(grads))


def with_loss(loss: Callable, **batch: Any) -> Any:
    estimator, changed = full_bptt(CELL.step, loss), BATCH._replace(**batch)
    return estimator.update(PARAMS, estimator.init(PARAMS, CARRY, changed), changed)[0]


def update_twice(make: Callable, later: Batch) -> Any:
    """A second update with a batch of its own."""
    estimator = make(CELL.step, tasks.squared_error)
    _, state = estimator.update(PARAMS, estimator.init(PARAMS, CARRY, BATCH), BATCH)
    return estimator.update(PARAMS, state._replace(carry=CARRY[: later.xs.shape[1]]), later)


def without_x64(batch: Batch) -> Any:
    with jax.enable_x64(False):
        return update(xs=batch.xs, targets=batch.targets)


def sum_of_ones(num_steps: int) -> Any:
    estimator = full_bptt(lambda w, h, x: (h, w * x), lambda y, target: y)
    one, carry = jnp.ones((), jnp.bfloat16), jnp.zeros((), jnp.bfloat16)
    batch = Batch(jnp.ones(num_steps, jnp.bfloat16))
    return estimator.update(one, estimator.init(one, carry, batch), batch)[0]


def diagnosis_of(weight: float) -> Any:
    """The diagnosis of a linear network whose Jacobian is `weight`."""
    params = {**PARAMS, "w_h": weight * jnp.eye(H, dtype=jnp.float32)}
    return diagnose(CELL.step, tasks.squared_error, params, CARRY, BATCH, measure=False)


def leak() -> None:
    kept: list[Any] = []

    def step(params, h, x):
        kept.append(h)
        return CELL.step(params, h, x + (kept[0] if len(kept) > 3 else 0))

    for _ in range(3):
        update(step=step)


def count_traces(num_steps: int) -> int:
    """How often a step that counts its calls counts."""
    calls = []

    def step(params, h, x):
        calls.append(x)
        return CELL.step(params, h, x)

    update(step=step, xs=XS[:num_steps], targets=BATCH.targets[:num_steps])
    return len(calls)


# What needs a diagnosis, thousands of steps or several programs, and stands in other files of the usual run too.
LONG = {
    "an adjoint that underflows on its way back",
    "T mod window ≠ 0",
    "4096 gradients of 1 in bfloat16, whose sum would stop at 256",
    "weights that sum to zero",
    "a Python side effect in a step",
    "a loss that averages over examples",
    "a loss with an axis too many",
}
assert {fault.name for fault in FAULTS} >= LONG
USUAL = [fault for fault in FAULTS if fault.name not in LONG]


@pytest.mark.parametrize("fault", usual(USUAL, FAULTS), ids=lambda fault: fault.name)
def test_fault(fault):
    if fault.words is None:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert fault.check(fault.call())
        words = [str(one.message) for one in seen]
        assert bool(words) == bool(fault.warning)
        assert all(fault.warning in word for word in words)
        return
    with pytest.raises(fault.error, match=re.escape(fault.words)):
        fault.call()


def test_nothing_is_said_of_float32_with_x64_off():
    with warnings.catch_warnings(), jax.enable_x64(False):
        warnings.simplefilter("error")
        full_bptt(CELL.step, tasks.squared_error).init(PARAMS, CARRY, BATCH)


def test_train_takes_these_checks_over():
    import optax

    stacked = jax.tree.map(lambda a: a[None], BATCH._replace(mask=jnp.ones((T, B, 1), bool)))
    with pytest.raises(ValueError, match="mask has shape"):
        train(full_bptt(CELL.step, tasks.squared_error), optax.sgd(0.1), PARAMS, CARRY, stacked)


if __name__ == "__main__":
    for fault in FAULTS:
        try:
            with warnings.catch_warnings(action="ignore"):
                fault.call()
            outcome = fault.meaning + (f" and a UserWarning: {fault.warning}" if fault.warning else "")
        except fault.error as error:
            outcome = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        print(f"| {fault.name} | {outcome} |")
