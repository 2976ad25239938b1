"""How estimators agree: the cosine between the mean estimates of every pair, on two tasks.

A gru of 16 units after 500 updates with full BPTT; 32 steps, 8 examples. On copy memory the answer
is 28 steps back.
"""

from functools import partial
from typing import Any

import jax
import optax

import jbptt
from jbptt.online.names import online_estimators
from jbptt.report.commands.compare import ComparisonSettings, make_setup

NUM_DRAWS = 1000


def estimators_of(step: Any, loss: Any) -> dict[str, Any]:
    """Those that go back, then those that run forward."""
    windows = partial(jbptt.truncated_bptt, step, loss, streams=False)
    return {
        "full": jbptt.full_bptt(step, loss),
        "blocks of 4": windows(window=4),
        "blocks of 16": windows(window=16),
        "sliding 4": windows(window=4, stride=1),
        "keep 0.75": jbptt.randomized_bptt(step, loss, keep_prob=0.75),
        **online_estimators(("rtrl", "snap-1", "rflo-0", "uoro"), step, loss),
    }


def compared(task: Any, num_updates: int, num_draws: int) -> Any:
    """The estimators on a batch that training has not seen."""
    settings = ComparisonSettings(
        task=task, cell="gru", hidden_size=16, num_steps=32, batch_size=8, num_updates=num_updates
    )
    setup = make_setup(settings)
    estimators = estimators_of(setup.cell.step, setup.loss)
    optimizer = optax.chain(jbptt.clipping.clip_by_global_norm(1.0), optax.adam(3e-3))
    carry = setup.cell.initial_carry((settings.batch_size,))
    run = jax.jit(partial(jbptt.train, estimators["full"], optimizer))
    params, _ = run(jax.jit(setup.cell.init)(jax.random.key(0)), carry, setup.train)
    look = jax.jit(partial(jbptt.compare, estimators, reference="full", num_samples=num_draws))
    return jax.device_get(look(params, carry, setup.heldout, key=jax.random.key(1)))


def run(quick: bool) -> tuple[dict[str, Any], Any, str]:
    """Both tasks."""
    import matplotlib
    from matplotlib.figure import Figure

    num_updates, num_draws = (20, 20) if quick else (500, NUM_DRAWS)
    found = {task: compared(task, num_updates, num_draws) for task in ("text", "copy")}
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    figure = Figure(figsize=(13, 6.2), layout="constrained")
    for ax, (task, comparison) in zip(figure.subplots(1, 2), found.items(), strict=True):
        jbptt.plots.plot_agreement(comparison, ax=ax)
        ax.set_title(f"{task}: cosine between mean estimates")
    names = found["text"].names
    data = {
        task: {
            "alignment": comparison.alignment.tolist(),
            "relative_bias": comparison.relative_bias.tolist(),
            "relative_bias_error": comparison.relative_bias_error.tolist(),
            "variance": comparison.variance.tolist(),
        }
        for task, comparison in found.items()
    }
    page = "\n\n".join(
        f"{task}, {num_draws:,} draws of each that draws:\n\n```\n{comparison}\n```"
        for task, comparison in found.items()
    )
    return {"names": names, **data}, figure, page
