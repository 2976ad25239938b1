"""How much of the past does a GRU (Equinox) use to predict an EEG, and how long must its windows be?

The series is real: `eeg.dat`, 800 samples of four EEG channels, which Matplotlib ships for its gallery. It comes
without a source, a unit or a sampling rate, so it is standardised and time is counted in samples. The model predicts
the next sample of every channel; it is written for one example and trained in Equinox's way, and `from_equinox` makes
a step of it. Its loss on the last 200 samples is held against that of predicting no change; with 600 samples to learn
from it overfits after some 150 updates, a number chosen by looking at that very loss.

    python examples/equinox_series.py [--out equinox_series.svg] [--short]        (needs equinox)
    jbptt report examples/equinox_series.py:problem           (with which window should it train?)
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import cbook
from matplotlib.figure import Figure

import jbptt
from jbptt import interop, plots, tasks

NUM_ROWS = 4  # the 600 samples to train on, cut into rows that are read side by side
SHORT = {"hidden_size": 6, "num_updates": 3}


class Predictor(eqx.Module):
    """GRU and linear readout for one example."""

    cell: eqx.nn.GRUCell
    readout: eqx.nn.Linear

    def __init__(self, num_channels, hidden_size, *, key):
        key_cell, key_readout = jax.random.split(key)
        self.cell = eqx.nn.GRUCell(num_channels, hidden_size, key=key_cell)
        self.readout = eqx.nn.Linear(hidden_size, num_channels, key=key_readout)

    def __call__(self, h, x):
        """One sample."""
        h = self.cell(x, h)
        return h, self.readout(h)


def read_series():
    """`[800, 4]`, each channel with mean 0 and variance 1."""
    with cbook.get_sample_data("eeg.dat") as file:
        series = np.frombuffer(file.read()).reshape(800, 4)
    return jnp.asarray((series - series.mean(0)) / series.std(0), jnp.float32)


def as_batch(series, num_rows):
    """Inputs and the samples that follow them, `[T, num_rows, 4]`."""
    num_steps = (len(series) - 1) // num_rows

    def rows(part):
        return part[: num_steps * num_rows].reshape(num_rows, num_steps, -1).swapaxes(0, 1)

    return jbptt.Batch(rows(series[:-1]), rows(series[1:]))


def problem(*, hidden_size=16, num_steps=48, num_updates=200):
    """The predictor as `jbptt report` and `jbptt compare` take it: every update reads pieces drawn from the recording.

    The last 200 samples are held out: of the first half of them pieces choose learning rates, of the second they judge.
    """
    series = read_series()
    step, _, initial_carry = interop.from_equinox(Predictor(4, hidden_size, key=jax.random.key(0)))

    def pieces(part, starts):
        cut = jax.vmap(lambda start: jax.lax.dynamic_slice_in_dim(part, start, num_steps + 1), out_axes=1)(starts)
        return jbptt.Batch(cut[:-1], cut[1:])

    def draw_batch(key):
        return pieces(series[:600], jax.random.randint(key, (NUM_ROWS,), 0, 600 - num_steps))

    heldout = [pieces(part, jnp.arange(NUM_ROWS) * (99 - num_steps) // 3) for part in (series[600:700], series[700:])]
    return {
        "step": step,
        "loss": tasks.squared_error,
        "params": lambda key: interop.from_equinox(Predictor(4, hidden_size, key=key))[1],
        "carry": initial_carry((NUM_ROWS,)),
        "batches": draw_batch,
        "heldout": jax.tree.map(lambda *leaves: jnp.stack(leaves), *heldout),
        "windows": (2, 8),
        "num_updates": num_updates,
    }


@eqx.filter_jit
def train_step(model, optimizer, opt_state, batch):
    """One update on all rows, full BPTT: a scan for each row, vmapped."""

    def loss_fn(model):
        def predict(xs):
            return jax.lax.scan(lambda h, x: model(h, x), jnp.zeros(model.cell.hidden_size), xs)[1]

        ys = jax.vmap(predict, in_axes=1, out_axes=1)(batch.xs)
        return jnp.mean(tasks.squared_error(ys, batch.targets))

    loss, grads = eqx.filter_value_and_grad(loss_fn)(model)
    updates, opt_state = optimizer.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), opt_state, loss


def decide(found):
    """The window for longer recordings of this kind."""
    (block, _), (sliding, _) = found.block_window.tolist(), found.sliding_window.tolist()
    if 0 < block < found.num_steps:
        error = float(found.block_error[0])
        return f"truncated_bptt(window={block}): blocks of {block} samples leave {error:.1%} of gradient error here"
    words = f"full_bptt: no block shorter than {found.num_steps} samples keeps 10 %"
    return words + (f", sliding windows of {sliding} do" if sliding else "")


def main(out="equinox_series.svg", *, hidden_size=32, num_updates=150):
    """Diagnoses the predictor on its training rows before and after training, and draws what windows leave."""
    series = read_series()
    batch, heldout = as_batch(series[:600], NUM_ROWS), as_batch(series[600:], 1)
    model = Predictor(4, hidden_size, key=jax.random.key(0))
    step, params, initial_carry = interop.from_equinox(model)

    def diagnose(params):
        carry = initial_carry((NUM_ROWS,))
        return jbptt.diagnose(step, tasks.squared_error, params, carry, batch, measure=False)

    before = diagnose(params)
    optimizer = optax.adam(3e-3)
    opt_state = optimizer.init(params)
    for _ in range(num_updates):
        model, opt_state, _ = train_step(model, optimizer, opt_state, batch)
    params = eqx.filter(model, eqx.is_inexact_array)
    after = diagnose(params)

    axes = Figure(figsize=(10, 4.4), layout="constrained").subplots(1, 2, sharey=True)
    for name, found, ax in zip(("before training", f"after {num_updates} updates"), (before, after), axes, strict=True):
        print(f"{name}\n{found}\n")
        plots.plot_lag_profile(found.profile, ax=ax)
        ax.set_xlabel("lag (samples)")
        ax.set_title(f"{name}: {found.verdict}, half-life {float(found.half_life):.3g} samples")
    axes[0].figure.savefig(out)

    _, predicted = jbptt.unroll(step, params, initial_carry((1,)), heldout.xs)
    losses = [float(jnp.mean(tasks.squared_error(y, heldout.targets))) for y in (predicted, heldout.xs)]
    print(f"held-out loss {losses[0]:.3f}, of predicting no change {losses[1]:.3f}")
    print(f"decision: {decide(after)}")
    print(f"picture: {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="equinox_series.svg", help="the picture, .svg or .png")
    parser.add_argument("--short", action="store_true", help="a small model and a few updates")
    options = parser.parse_args()
    main(options.out, **(SHORT if options.short else {}))
