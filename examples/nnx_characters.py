"""Does a character model (Flax nnx) look further back once it has learned, and in which windows should it train?

The model is written and trained as one writes and trains nnx models: modules, `nnx.value_and_grad`, `nnx.Optimizer`,
and truncated BPTT as usual, the carry handed from batch to batch. The text is the documentation of Python's language,
which is part of CPython. `from_nnx` makes a step of the model, and jbptt diagnoses the same held-out text before and
after training.

    python examples/nnx_characters.py [--out nnx_characters.svg] [--short]        (needs flax)
    jbptt report examples/nnx_characters.py:problem           (with which window should it train?)
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from matplotlib.figure import Figure

import jbptt
from jbptt import interop, plots, tasks

NUM_STEPS, BATCH_SIZE = 64, 32
SHORT = {"hidden_size": 8, "num_updates": 3, "num_diagnosed": 64}


class CharacterModel(nnx.Module):
    """Embedding, GRU, linear readout; one call is one character."""

    def __init__(self, vocabulary_size, hidden_size, *, rngs):
        self.embed = nnx.Embed(vocabulary_size, 16, rngs=rngs)
        self.cell = nnx.GRUCell(16, hidden_size, rngs=rngs)
        self.readout = nnx.Linear(hidden_size, vocabulary_size, rngs=rngs)

    def __call__(self, carry, token):
        """One character."""
        carry, h = self.cell(carry, self.embed(token))
        return carry, self.readout(h)


def problem(*, hidden_size=32, num_updates=300):
    """The model as `jbptt report` and `jbptt compare` take it: every seed a start, the text as one stream."""
    text = tasks.text(tasks.read_text(), num_steps=NUM_STEPS, batch_size=8)

    def convert(key):
        return interop.from_nnx(CharacterModel(len(text.vocabulary), hidden_size, rngs=nnx.Rngs(key)))

    step, _, initial_carry = convert(jax.random.key(0))
    return {
        "step": step,
        "loss": tasks.cross_entropy,
        "params": lambda key: convert(key)[1],
        "carry": initial_carry((8,)),
        "batches": text.train,
        "heldout": jax.tree.map(lambda a: a[:16], text.heldout),
        "stream": True,
        "windows": (4, 16),
        "num_updates": num_updates,
    }


@nnx.jit
def train_step(model, optimizer, carry, tokens, targets):
    """One update on one batch `[T, B]`: a plain scan over the model's own calls."""

    def loss_fn(model):
        scan = nnx.scan(lambda model, carry, token: model(carry, token), in_axes=(None, nnx.Carry, 0))
        last, logits = scan(model, carry, tokens)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets).mean(), last

    (loss, carry), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads)
    return loss, carry


def main(out="nnx_characters.svg", *, hidden_size=64, num_updates=400, num_diagnosed=128):
    """Diagnoses the model before and after training, and says which window to train in."""
    text = tasks.text(tasks.read_text(), num_steps=NUM_STEPS, batch_size=BATCH_SIZE)
    heldout = tasks.text(tasks.read_text(), num_steps=num_diagnosed, batch_size=BATCH_SIZE).heldout
    batch = jax.tree.map(lambda a: a[0], heldout)
    model = CharacterModel(len(text.vocabulary), hidden_size, rngs=nnx.Rngs(0))
    step, params, initial_carry = interop.from_nnx(model)

    def diagnose(params):
        return jbptt.diagnose(step, tasks.cross_entropy, params, initial_carry((BATCH_SIZE,)), batch, measure=False)

    before = diagnose(params)
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    carry, num_batches = initial_carry((BATCH_SIZE,)), len(text.train.xs)
    for n in range(num_updates):
        if n % num_batches == 0:
            carry = jnp.zeros_like(carry)  # the text begins again
        tokens, targets = text.train.xs[n % num_batches], text.train.targets[n % num_batches]
        _, carry = train_step(model, optimizer, carry, tokens, targets)
    after = diagnose(nnx.state(model, nnx.Param))

    axes = Figure(figsize=(10, 4.4), layout="constrained").subplots(1, 2, sharey=True)
    for name, found, ax in zip(("before training", f"after {num_updates} updates"), (before, after), axes, strict=True):
        print(f"{name}\n{found}\n")
        plots.plot_diagnosis(found, ax=ax)
        ax.set_title(f"{name}: {found.verdict}, loss {float(found.loss):.2f} nats")
    axes[0].figure.suptitle("rings: windows recommended for 10 % and 1 % of error", fontsize=9)
    axes[0].figure.savefig(out)

    print(f"reach (at least 1 % of the gradient): {before.reach} characters before training, {after.reach} after")
    window, error = int(after.block_window[0]), float(after.block_error[0])
    trained, carry = nnx.state(model, nnx.Param), initial_carry((BATCH_SIZE,))
    curve = jbptt.truncation_curve(step, tasks.cross_entropy, trained, carry, batch, max_window=NUM_STEPS)
    used = float(curve.block_relative_error[NUM_STEPS - 1])
    advice = "keep them" if used < 0.1 else "make them longer"
    print(f"blocks of {window} leave {error:.1%} of gradient error on this text")
    print(f"decision: those of {NUM_STEPS} leave {used:.1%}, averaged over where they are cut: {advice}")
    print(f"picture: {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="nnx_characters.svg", help="the picture, .svg or .png")
    parser.add_argument("--short", action="store_true", help="a small model and a few updates")
    options = parser.parse_args()
    main(options.out, **(SHORT if options.short else {}))
