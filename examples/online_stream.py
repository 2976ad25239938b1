"""Can a network learn, from a stream that never ends, what mattered 500 steps ago, if it goes back no more than 100?

A cue of eight numbers arrives every 500 steps, and what the network says is judged just before the next: one of its
directions counts, and has to be found and kept. The units are linear and each feeds itself alone, so that
`jbptt.rtrl`, whose gradient runs forward with the stream, is exact in constant memory. Blocks of 100 steps never
hold cue and loss together.

    python examples/online_stream.py [--out online_stream.svg] [--short]
    jbptt report examples/online_stream.py:problem           (with which window should it train?)
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import jbptt

NUM_CUES, NUM_UNITS, BATCH_SIZE = 8, 4, 8
SHORT = {"num_steps": 8_000, "delay": 40, "block": 10}


def step(params, h, x):
    """Leaky units, each with a decay of its own, and a readout."""
    h = jax.nn.sigmoid(params["decay"]) * h + x @ params["w_x"]
    return h, h @ params["w_y"]


def loss(y, target):
    """Of one number."""
    return (y - target) ** 2


def draw_params(key, delay):
    """Units that forget within a fifth to three fifths of the delay, and no idea which cue counts."""
    decay = 1 - 1 / np.linspace(0.2 * delay, 0.6 * delay, NUM_UNITS)
    return {
        "decay": jnp.asarray(np.log(decay / (1 - decay)), jnp.float32),
        "w_x": 0.3 * jax.random.normal(key, (NUM_CUES, NUM_UNITS)),
        "w_y": jnp.ones(NUM_UNITS) / NUM_UNITS,
    }


def draw_stream(key, num_steps, delay):
    """Cues, and a target that keeps one direction of them for `delay` steps; judged before each new cue."""
    num_trials = num_steps // delay
    direction = jax.random.normal(jax.random.key(7), (NUM_CUES,))
    direction = direction / jnp.linalg.norm(direction)
    cues = jax.random.normal(key, (num_trials, BATCH_SIZE, NUM_CUES))
    xs = jnp.zeros((num_trials, delay, BATCH_SIZE, NUM_CUES)).at[:, 0].set(cues)
    xs = xs.reshape(num_trials * delay, BATCH_SIZE, NUM_CUES)
    keep = 1 - 1 / delay

    def trace(kept, x):
        kept = keep * kept + x @ direction
        return kept, 2 * kept

    _, targets = jax.lax.scan(trace, jnp.zeros(BATCH_SIZE), xs)
    judged = (jnp.arange(len(xs)) % delay == delay - 1).astype(jnp.float32)
    return jbptt.Batch(xs, targets, weights=judged)


def in_pieces(stream, length):
    """A stream as batches of `length` steps, `[N, length, …]`."""
    return jax.tree.map(lambda a: a.reshape(-1, length, *a.shape[1:]), stream)


def problem(*, delay=500, num_updates=400):
    """One trial a batch, as `jbptt report` and `jbptt compare` take it; every seed has its own cues."""
    return {
        "step": step,
        "loss": loss,
        "params": lambda key: draw_params(key, delay),
        "carry": jnp.zeros((BATCH_SIZE, NUM_UNITS)),
        "batches": lambda key: draw_stream(key, delay, delay),
        "windows": tuple(window for window in (delay // 5, delay // 2) if window > 1),
        "num_updates": num_updates,
    }


def learn(estimator, stream, length, delay):
    """The loss of each trial while the estimator learns from pieces of the stream, and the time constants found."""
    params, carry = draw_params(jax.random.key(1), delay), jnp.zeros((BATCH_SIZE, NUM_UNITS))
    batches = in_pieces(stream, length)
    run = jax.jit(lambda params, batches: jbptt.train(estimator, optax.adam(0.01), params, carry, batches))
    params, history = run(params, batches)
    judged = np.asarray(batches.weights.sum(1)) > 0
    return np.asarray(history.loss)[judged], -1 / np.log(jax.nn.sigmoid(params["decay"]))


def main(out="online_stream.svg", *, num_steps=100_000, delay=500, block=100):
    """Diagnoses one trial, learns from the stream in three ways, and draws their losses."""
    stream = draw_stream(jax.random.key(0), num_steps, delay)
    trial = jax.tree.map(lambda a: a[:delay], stream)
    start = draw_params(jax.random.key(1), delay), jnp.zeros((BATCH_SIZE, NUM_UNITS))
    print(jbptt.diagnose(step, loss, *start, trial, measure=False))
    print(jbptt.influence_structure(step, loss, *start, trial), "\n")

    ways = {
        f"RTRL, {block} steps an update": (jbptt.rtrl(step, loss), block),
        f"blocks of {block}": (jbptt.truncated_bptt(step, loss, window=block), block),
        f"full BPTT of each {delay} steps": (jbptt.full_bptt(step, loss), delay),
    }
    variance = float(jnp.var(stream.targets[delay - 1 :: delay]))
    ax, last = Figure(figsize=(7.6, 4.4), layout="constrained").subplots(), {}
    for name, (estimator, length) in ways.items():
        losses, times = learn(estimator, stream, length, delay)
        last[name] = losses[-len(losses) // 5 :].mean()
        smooth = np.convolve(losses, np.ones(5) / 5, mode="valid")
        ax.plot(delay * (4 + np.arange(len(smooth))), smooth, label=f"{name}: {last[name]:.2g} at the end")
        print(f"{name}: loss {last[name]:.4f} over the last fifth, time constants {np.sort(times).round()} steps")
    ax.axhline(variance, color="0.5", linestyle=":", label=f"without any memory: {variance:.2g}")
    ax.set(xlabel="steps of the stream", ylabel="loss (mean of 5 trials)", yscale="log")
    ax.legend(frameon=False, fontsize=9)
    ax.figure.savefig(out)
    best = min(last, key=last.get)
    print(f"decision: {best}; blocks of {block} end at {last[f'blocks of {block}'] / last[best]:.0f} times its loss")
    print(f"picture: {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="online_stream.svg", help="the picture, .svg or .png")
    parser.add_argument("--short", action="store_true", help="a short stream with a short delay")
    options = parser.parse_args()
    main(options.out, **(SHORT if options.short else {}))
