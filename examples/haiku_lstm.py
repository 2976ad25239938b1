"""What does an LSTM (Haiku) fail to learn when its windows are shorter than the task's memory?

The copy task: LENGTH symbols, a delay, then the symbols again, so each lies LENGTH + DELAY steps before the loss that
asks for it. jbptt says of the model as drawn which windows would keep its gradient. Then it is trained twice on the
same data, with full BPTT and with sliding windows of WINDOW steps, whose losses flow back to no symbol that they ask
for; what full BPTT has learned is diagnosed again.

    python examples/haiku_lstm.py [--out haiku_lstm.svg] [--short]        (needs dm-haiku)
    jbptt report examples/haiku_lstm.py:problem           (with which window should it train?)
"""

import argparse
import math

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import jbptt
from jbptt import interop, plots, tasks

LENGTH, DELAY, NUM_SYMBOLS, BATCH_SIZE = 3, 9, 4, 32
WINDOW = 8
SHORT = {"hidden_size": 8, "num_updates": 10}


def make_core(hidden_size):
    """LSTM and linear readout, as a Haiku core."""
    return hk.DeepRNN([hk.LSTM(hidden_size), hk.Linear(NUM_SYMBOLS)])


def draw_batch(key):
    """One batch of the copy task, T = 2·LENGTH + DELAY, and flags by which every sequence begins with no memory."""
    batch = tasks.copy(key, length=LENGTH, delay=DELAY, batch_size=BATCH_SIZE, num_symbols=NUM_SYMBOLS)
    starts = jnp.zeros(batch.targets.shape, bool).at[0].set(True)
    return batch._replace(xs=(batch.xs, starts))


def problem(*, hidden_size=32, num_updates=400):
    """The LSTM as `jbptt report` and `jbptt compare` take it: every seed a start, every update a new batch."""

    def convert(key):
        return interop.from_haiku(lambda: make_core(hidden_size), key, input_size=NUM_SYMBOLS + 2)

    step, _, initial_carry = convert(jax.random.key(0))
    return {
        "step": jbptt.cells.with_reset(step, initial_carry),
        "loss": tasks.cross_entropy,
        "params": lambda key: convert(key)[1],
        "carry": initial_carry((BATCH_SIZE,)),
        "batches": draw_batch,
        "windows": (4, 8),
        "sliding": (WINDOW, LENGTH + DELAY + 1),
        "num_updates": num_updates,
    }


def main(out="haiku_lstm.svg", *, hidden_size=64, num_updates=1500):
    """Diagnoses the LSTM, trains it in short windows and with full BPTT, and diagnoses it again."""
    key_params, key_batch, key_train = jax.random.split(jax.random.key(0), 3)
    step, params, initial_carry = interop.from_haiku(
        lambda: make_core(hidden_size), key_params, input_size=NUM_SYMBOLS + 2
    )
    step = jbptt.cells.with_reset(step, initial_carry)
    carry, loss, batch = initial_carry((BATCH_SIZE,)), tasks.cross_entropy, draw_batch(key_batch)

    def diagnose(params):
        return jbptt.diagnose(step, loss, params, carry, batch, measure=False)

    before = diagnose(params)
    print(f"as drawn\n{before}\n")

    batches = jax.vmap(draw_batch)(jax.random.split(key_train, num_updates))
    optimizer = optax.chain(jbptt.clipping.clip_by_global_norm(1.0), optax.adam(3e-3))
    estimators = {
        f"windows of {WINDOW}": jbptt.truncated_bptt(step, loss, window=WINDOW, stride=1),
        "full BPTT": jbptt.full_bptt(step, loss),
    }
    results = {
        name: jax.jit(lambda p, e=estimator: jbptt.train(e, optimizer, p, carry, batches))(params)
        for name, estimator in estimators.items()
    }
    after = diagnose(results["full BPTT"][0])
    print(f"after {num_updates} updates with full BPTT\n{after}\n")

    left, right = Figure(figsize=(10, 4.4), layout="constrained").subplots(1, 2)
    chance, tail = math.log(NUM_SYMBOLS), max(1, num_updates // 10)
    for (name, (_, history)), colour in zip(results.items(), ("#d55e00", "#0072b2"), strict=True):
        left.plot(history.loss, color=colour, label=name)
        print(f"{name}: loss {np.mean(history.loss[-tail:]):.3f} over the last {tail} updates (chance: {chance:.3f})")
    error, window = float(before.curve.relative_error[WINDOW - 1]), int(before.sliding_window[0])
    print(f"as drawn, sliding windows of {WINDOW} leave {error:.0%} of gradient error; to leave 10 % takes {window}")
    needed = max(window, LENGTH + DELAY + 1)
    print(f"decision: windows of {needed} steps at least (the symbol to repeat lies {LENGTH + DELAY} steps back)")
    left.axhline(chance, color="#5b6570", linestyle=":", label="chance")
    left.set(xlabel="update", ylabel="loss (nats)")
    left.legend(frameon=False, fontsize=9, ncols=3, loc="upper center")
    left.set_ylim(top=1.3 * left.get_ylim()[1])  # room for the legend
    left.set_title("training")
    plots.plot_diagnosis(before, ax=right)
    right.set_title("as drawn; rings: recommended windows")
    left.figure.savefig(out)
    print(f"picture: {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="haiku_lstm.svg", help="the picture, .svg or .png")
    parser.add_argument("--short", action="store_true", help="a small model and a few updates")
    options = parser.parse_args()
    main(options.out, **(SHORT if options.short else {}))
