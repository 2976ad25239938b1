"""How many milliseconds back does the gradient of a rate network reach, for a gain below 1 and one above?

    τ dr/dt = −r + tanh(J r + B u),     J_ij ~ N(0, g²/N)

One Euler step of `DT` milliseconds is one recurrent step, so what jbptt counts in steps is `DT` times as many
milliseconds, and an exponent per step is 1000 / DT as much per second. The network is told to give back the input
of 20 ms ago; it is looked at as it is drawn, before any learning, where the gain alone decides.

    python examples/rate_network.py [--out rate_network.svg] [--short]
    jbptt report examples/rate_network.py:problem           (with which window should it train?)
"""

import argparse
import math

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

import jbptt
from jbptt import plots

TAU, DT = 10.0, 1.0  # milliseconds
DELAY = 20  # steps
SHORT = {"num_units": 30, "num_steps": 60, "num_long": 400}


def step(params, r, u):
    """One Euler step, and the readout of the new rates."""
    r = r + DT / TAU * (-r + jnp.tanh(r @ params["j"] + u @ params["b"]))
    return r, r @ params["w"]


def draw_network(key, num_units, gain):
    """Weights of a random network with one input and one readout."""
    key_j, key_b, key_w = jax.random.split(key, 3)
    return {
        "j": gain * jax.random.normal(key_j, (num_units, num_units)) / math.sqrt(num_units),
        "b": jax.random.normal(key_b, (1, num_units)),
        "w": jax.random.normal(key_w, (num_units, 1)) / num_units,
    }


def draw_batch(key, num_steps):
    """Inputs, and the same DELAY steps late."""
    inputs = 0.2 * jax.random.normal(key, (num_steps, 8, 1))
    late = jnp.concatenate([jnp.zeros((DELAY, 8, 1)), inputs[:-DELAY]])
    return jbptt.Batch(inputs, late, weights=(jnp.arange(num_steps) >= DELAY).astype(jnp.float32))


def problem(*, num_units=50, num_steps=100, num_updates=400, gain=1.2):
    """The network as `jbptt report` and `jbptt compare` take it: every seed a network, every update new noise."""
    return {
        "step": step,
        "loss": jbptt.tasks.squared_error,
        "params": lambda key: draw_network(key, num_units, gain),
        "carry": jnp.zeros((8, num_units)),
        "batches": lambda key: draw_batch(key, num_steps),
        "windows": (8, 25, 50),
        "num_updates": num_updates,
    }


def exponent_per_second(params, rates, inputs):
    """The leading Lyapunov exponent of one driven network, 1/s, and its standard error."""
    options = {"num_exponents": 1, "num_discarded": len(inputs) // 4, "qr_every": 5}
    spectrum = jbptt.lyapunov_spectrum(step, params, rates, inputs, **options)
    return 1000 / DT * float(spectrum.exponents[0]), 1000 / DT * float(spectrum.standard_errors[0])


def decide(found):
    """What follows for training, in milliseconds."""
    window, error = int(found.block_window[1]), float(found.block_error[1])
    if 0 < window < found.num_steps:
        return f"blocks of {window * DT:g} ms ({window} steps): {error:.2%} of gradient error on this batch"
    reason = f"no block shorter than these {found.num_steps * DT:g} ms was found that leaves under 1 % of error"
    clip = f", clip at a norm of about {float(found.norm_quantiles[0]):.2g}" if found.verdict == "exploding" else ""
    return f"full BPTT{clip}: {reason}"


def main(out="rate_network.svg", *, num_units=100, num_steps=400, num_long=6000, gains=(0.8, 3.0)):
    """Diagnoses one network for each gain, and draws its gradient by lag."""
    key_weights, key_start, key_u, key_long = jax.random.split(jax.random.key(0), 4)
    batch = draw_batch(key_u, num_steps)
    rates = 0.5 * jax.random.normal(key_start, (8, num_units))
    drive = 0.2 * jax.random.normal(key_long, (num_long, 1))

    axes = Figure(figsize=(10, 4.6), layout="constrained").subplots(1, len(gains), sharey=True)
    for gain, ax in zip(gains, axes, strict=True):
        params = draw_network(key_weights, num_units, gain)
        exponent, error = exponent_per_second(params, rates[0], drive)
        found = jbptt.diagnose(step, jbptt.tasks.squared_error, params, rates, batch, measure=False)
        half_life = float(found.half_life) * DT
        halves = f"halves in {half_life:.3g} ms" if math.isfinite(half_life) else "does not halve"
        print(f"gain {gain:g}\n{found}")
        print(f"  in time: the gradient {halves}; at least 1 % is left up to a lag of {(found.reach - 1) * DT:g} ms;")
        print(f"  leading Lyapunov exponent {exponent:+.2f} ± {error:.2f} per second, over {num_long * DT / 1000:g} s")
        print(f"  decision: {decide(found)}\n")

        plots.plot_lag_profile(found.profile, ax=ax)
        ax.set_title(f"gain {gain:g}: {found.verdict}, λ₁ = {exponent:+.1f} / s")
        ax.set_xlabel("lag (steps)")
        ax.secondary_xaxis("top", functions=(lambda k: k * DT, lambda ms: ms / DT)).set_xlabel("lag (ms)")
    axes[0].figure.savefig(out)
    print(f"picture: {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="rate_network.svg", help="the picture, .svg or .png")
    parser.add_argument("--short", action="store_true", help="a small network for a short time")
    options = parser.parse_args()
    main(options.out, **(SHORT if options.short else {}))
