"""What is the memory of a diagonal state-space layer, and does jbptt measure what the eigenvalues say?

    h_t = λ ⊙ h_{t−1} + γ ⊙ (x_t B),   y_t = Re(h_t C),   λ = exp(−e^ν + iθ),   γ = √(1 − |λ|²)

(the Linear Recurrent Unit of Orvieto et al., 2023; S4D is of the same kind). Its Jacobian is diag(λ), whatever the
data: a mode's gradient halves every −ln 2 / ln |λ| steps, exactly. With all |λ| equal that is the half-life of the
layer, and a measurement can be held against it (each lag averages over the losses that have so many steps before
them: the third digit). With |λ| spread over a ring every mode has its own: the fast ones
are gone first, and what is left at long lags is the slowest. The layer is told to give back its input of DELAY
steps ago, once as drawn and once after training.

    python examples/diagonal_ssm.py [--out diagonal_ssm.svg] [--short]
    jbptt report examples/diagonal_ssm.py:problem           (with which window should it train?)
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import jbptt
from jbptt import plots

DELAY, NUM_EXAMPLES = 20, 16
SHORT = {"num_modes": 8, "num_steps": 48, "num_updates": 3}


def step(params, h, x):
    """One step of the layer: complex modes, a real output."""
    size = jnp.exp(-jnp.exp(params["nu"]))  # |λ|, always below 1
    b, c = (params[name][0] + 1j * params[name][1] for name in "bc")
    h = size * jnp.exp(1j * params["theta"]) * h + jnp.sqrt(1 - size**2) * (x @ b)
    return h, (h @ c).real


def draw_layer(key, sizes):
    """Parameters with the given |λ|, phases and weights at random; real numbers only, so that any optimizer fits."""
    key_theta, key_b, key_c = jax.random.split(key, 3)
    num_modes = len(sizes)
    return {
        "nu": jnp.log(-jnp.log(sizes)),
        "theta": jax.random.uniform(key_theta, (num_modes,), maxval=jnp.pi),
        "b": jax.random.normal(key_b, (2, 1, num_modes)),
        "c": jax.random.normal(key_c, (2, num_modes, 1)) / num_modes,
    }


def half_lives(params):
    """−ln 2 / ln |λ| of every mode, in steps, ascending."""
    return np.sort(np.log(2) / np.exp(np.asarray(params["nu"], float)))


def draw_batch(key, num_steps):
    """White noise, and the same DELAY steps late."""
    xs = jax.random.normal(key, (num_steps, NUM_EXAMPLES, 1))
    weights = (jnp.arange(num_steps) >= DELAY).astype(xs.dtype)  # before that there is nothing to give back
    return jbptt.Batch(xs, jnp.roll(xs, DELAY, axis=0), weights=weights)


def problem(*, num_modes=16, num_steps=64, num_updates=400):
    """The layer as `jbptt report` and `jbptt compare` take it: every seed a layer, every update new noise."""
    return {
        "step": step,
        "loss": jbptt.tasks.squared_error,
        "params": lambda key: draw_layer(key, jnp.linspace(0.6, 0.97, num_modes)),
        "carry": jnp.zeros((NUM_EXAMPLES, num_modes), complex),
        "batches": lambda key: draw_batch(key, num_steps),
        "windows": (4, 16, 32),
        "seeds": 10,
        "num_updates": num_updates,
    }


def decide(found):
    """How to train on from here."""
    block, sliding = int(found.block_window[1]), int(found.sliding_window[1])
    if 0 < block < found.num_steps:
        return f"truncated_bptt(window={block}): {float(found.block_error[1]):.2%} of gradient error on this batch"
    words = f"full_bptt: no block shorter than these {found.num_steps} steps was found that leaves under 1 % of error"
    return words + (f" (sliding windows of {sliding} do)" if 0 < sliding < found.num_steps else "")


def main(out="diagonal_ssm.svg", *, num_modes=32, num_steps=160, num_updates=1500):
    """Measures against the formula, then diagnoses one layer before and after training."""
    key, carry = jax.random.key(0), jnp.zeros((NUM_EXAMPLES, num_modes), complex)
    batch, loss = draw_batch(key, num_steps), jbptt.tasks.squared_error

    def diagnose(params):
        return jbptt.diagnose(step, loss, params, carry, batch, measure=False)

    print(f"{'|λ| of all modes':>18}{'half-life, exact':>20}{'measured':>12}")
    for size in (0.5, 0.8, 0.95):
        params = draw_layer(key, jnp.full(num_modes, size))
        print(f"{size:>18}{half_lives(params)[0]:>20.4g}{float(diagnose(params).half_life):>12.4g}")

    layer = draw_layer(key, jnp.linspace(0.6, 0.97, num_modes))
    stream = jax.vmap(draw_batch, in_axes=(0, None))(jax.random.split(key, num_updates), num_steps)
    estimator, optimizer = jbptt.full_bptt(step, loss), optax.adam(optax.cosine_decay_schedule(1e-2, num_updates))
    # The carry goes on from batch to batch: what is left of the noise before, as within a longer stream.
    trained, history = jax.jit(lambda p: jbptt.train(estimator, optimizer, p, carry, stream))(layer)

    axes = Figure(figsize=(10, 4.6), layout="constrained").subplots(1, 2, sharey=True)
    for name, params, ax in zip(("as drawn", "after training"), (layer, trained), axes, strict=True):
        found, exact = diagnose(params), half_lives(params)
        print(f"\n{name}\n{found}")
        fastest, median, slowest = np.quantile(exact, (0, 0.5, 1))
        print(f"  exact half-lives of the modes: {fastest:.3g} to {slowest:.3g} steps, median {median:.3g}")
        print(f"  decision: {decide(found)}")
        plots.plot_lag_profile(found.profile, ax=ax)
        norms = np.asarray(found.profile.cotangent_norms)
        alone = norms[0] * 0.5 ** (np.arange(len(norms)) / slowest)
        ax.plot(alone, color="#009e73", linestyle=":", label="if all were the slowest mode")
        ax.legend(frameon=False, fontsize=9)
        ax.set_xlabel("lag (steps)")
        ax.set_title(f"{name}: half-life {float(found.half_life):.3g} steps, slowest mode {slowest:.3g}", fontsize=10)
    axes[0].figure.savefig(out)
    first, last = float(history.loss[0]), float(history.loss[-1])
    print(f"\nloss {first:.3g} in the first update, {last:.3g} in update {num_updates}")
    print(f"picture: {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="diagonal_ssm.svg", help="the picture, .svg or .png")
    parser.add_argument("--short", action="store_true", help="few modes, steps and updates")
    options = parser.parse_args()
    main(options.out, **(SHORT if options.short else {}))
