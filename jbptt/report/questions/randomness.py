"""The price of randomness: random cuts with and without weights, beside fixed ones."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbptt.analysis.comparison import PER_ESTIMATOR, compare
from jbptt.analysis.costs import measure_cost
from jbptt.analysis.lags import LagProfile
from jbptt.analysis.window_lengths import optimize_schedule
from jbptt.estimators import full_bptt, randomized_bptt, truncated_bptt
from jbptt.experiments import tasks
from jbptt.report.axes import (
    numbers,
)
from jbptt.report.one_question import Question
from jbptt.report.plots import plot_comparison
from jbptt.report.tables import (
    Table,
    format_number,
    format_seconds,
)
from jbptt.report.text_models import Trained
from jbptt.report.themes import LIGHT, Theme
from jbptt.report.work import Effort, Progress
from jbptt.types import Estimator, Loss, Step


def plain_cuts(step: Step, loss: Loss, keep_prob: float, num_steps: int) -> dict[str, Estimator]:
    """Full BPTT, blocks, and cuts of constant probability, by what they are; of the same mean
    length.
    """
    window = max(1, min(num_steps, round(1 / (1 - keep_prob)))) if keep_prob < 1 else num_steps
    return {
        "full": full_bptt(step, loss),
        f"blocks of {window}": truncated_bptt(step, loss, window=window, streams=False),
        f"π = {keep_prob:g}": randomized_bptt(step, loss, keep_prob=keep_prob),
        f"π = {keep_prob:g}, no 1/π": randomized_bptt(
            step, loss, keep_prob=keep_prob, reweight=False
        ),
    }


def fitted_cuts(
    step: Step, loss: Loss, keep_prob: float, grad_norms: np.ndarray
) -> dict[str, Estimator]:
    """Lengths that depend on the lag, where the mean is longer than a step and shorter than the
    batch.
    """
    num_steps, length = len(grad_norms), 1 / (1 - keep_prob) if keep_prob < 1 else np.inf
    if not 1 < length < num_steps:
        return {}
    found = {f"artbp {length:.3g}": randomized_bptt(step, loss, mean_length=length)}
    # The same mean as constant π cut off by the end of the batch.
    mean = (1 - keep_prob**num_steps) / (1 - keep_prob)
    if num_steps >= 3 and mean > 1 and np.all(np.isfinite(grad_norms)):
        best = optimize_schedule(LagProfile(cotangent_norms=None, grad_norms=grad_norms), mean)
        found["fitted lengths"] = randomized_bptt(
            step, loss, length_probs=jnp.asarray(best.length_probs)
        )
    return found


def measure(
    trained: Trained,
    grad_norms: np.ndarray,
    keep_prob: float,
    effort: Effort,
    progress: Progress,
    device: Any,
) -> dict[str, Any]:
    """Bias, spread and direction of each way to cut, on one held-out batch of the trained model."""
    name = trained.model.name
    progress(f"{name}: the price of randomness")
    problem = trained.model.cell.step, tasks.cross_entropy, keep_prob
    estimators = plain_cuts(*problem, len(grad_norms)) | fitted_cuts(*problem, grad_norms)
    look = jax.jit(partial(compare, estimators, reference="full", num_samples=effort.num_draws))
    where = jax.device_put((trained.params, trained.carry, trained.batch), device)
    found = jax.device_get(look(*where, key=jax.device_put(jax.random.key(1), device)))
    progress(f"{name}: drawn {effort.num_draws} times", 3)
    return {
        "cell": name,
        "keep_prob": keep_prob,
        "num_samples": found.num_samples,
        "names": found.names,
        **{field: getattr(found, field) for field in PER_ESTIMATOR},
    }


def time_them(
    trained: Trained, price: dict[str, Any], keep_prob: float, effort: Effort, progress: Progress
):
    """Adds the time of one update of the first three: full, blocks, random cuts."""
    progress(f"{trained.model.name}: time of random cuts")
    found = plain_cuts(
        trained.model.cell.step, tasks.cross_entropy, keep_prob, len(trained.batch.xs)
    )
    first = {name: found[name] for name in price["names"][:3]}
    where = jax.device_put((trained.params, trained.carry, trained.batch), jax.devices()[0])
    cost = measure_cost(first, *where, num_repeats=effort.num_repeats)
    progress(f"{trained.model.name}: timed", 1)
    missing = [None] * (len(price["names"]) - 3)
    return price | {"seconds": [*cost.median_seconds, *missing]}


def draw(price: dict[str, Any], *, ax: Any = None, theme: Theme = LIGHT) -> Any:
    """Bias and standard deviation of each way to cut."""
    return plot_comparison(SimpleNamespace(**price), ax=ax, theme=theme)


def _row(price: dict[str, Any], i: int) -> dict[str, float]:
    return {field: float(numbers(price[field])[i]) for field in PER_ESTIMATOR}


def say(price: dict[str, Any]) -> str:
    """What the draws say about bias, and what they cost in spread and time."""
    blocks, kept, bare = (_row(price, i) for i in (1, 2, 3))
    if not np.all(np.isfinite([*blocks.values(), *kept.values(), *bare.values()])):
        return (
            f"The gradient of the {price['cell']} is not finite or zero, so that nothing can be "
            "said of random cuts."
        )
    names, draws = price["names"], price["num_samples"]
    bias, error = kept["relative_bias"], kept["relative_bias_error"]
    seen = f"within two standard errors of {_percent(error)}"
    if bias > 2 * error:
        seen = (
            f"more than two standard errors of {_percent(error)}, as happens where few draws miss "
            "rare large weights"
        )
    spread, bare_spread = np.sqrt(kept["variance"]), np.sqrt(bare["variance"])
    off = {names[1]: blocks["relative_bias"], names[2]: float(spread)}
    closer, further = sorted(off, key=lambda name: off[name])
    close = (
        "as far from the exact one as"
        if off[closer] == off[further]
        else "closer to the exact one than"
    )
    seconds = numbers(price["seconds"])
    time = ""
    if np.all(np.isfinite(seconds[:3])):
        time = (
            f" An update takes {seconds[2] / seconds[0]:.2f} times as long as full BPTT, whose "
            "gradient is exact."
        )
    blocks_name, kept_name = names[1:3]
    return (
        f"The mean of {draws} draws with {kept_name} misses the gradient of the trained "
        f"{price['cell']} by {_percent(bias)} of its norm, which is {seen}. One draw scatters by "
        f"{_percent(spread)} around that mean. Without 1/π the mean misses the gradient by "
        f"{_percent(bare['relative_bias'])}, and one draw scatters by {_percent(bare_spread)}. "
        f"{blocks_name.capitalize()} are off by {_percent(blocks['relative_bias'])}, the same way "
        f"every time: in the root mean square a gradient with {closer} is {close} one with "
        f"{further} ({_percent(off[closer])} against {_percent(off[further])}).{time}"
    )


def _percent(share: float) -> str:
    return f"{format_number(100 * share)} %"


def table(price: dict[str, Any]) -> Table:
    """One row for each way to cut."""
    rows = []
    for i, name in enumerate(price["names"]):
        row = _row(price, i)
        bias = (
            f"{format_number(row['relative_bias'])} ± {format_number(row['relative_bias_error'])}"
        )
        spread = format_number(float(np.sqrt(row["variance"])))
        seconds = price["seconds"][i]
        time = "not timed" if seconds is None else format_seconds(seconds)
        rows.append(
            (
                name,
                bias,
                spread,
                format_number(row["cosine"]),
                format_number(row["norm_ratio"]),
                time,
            )
        )
    columns = (
        "gradient",
        "relative bias ± s.e.",
        "std / norm",
        "mean cosine",
        "mean norm ratio",
        "time of an update",
    )
    return Table("The price of randomness", columns, rows)


def alt(price: dict[str, Any]) -> str:
    """What stands in the picture."""
    return f"Dot plot of relative bias and standard deviation for {', '.join(price['names'])}."


QUESTION = Question(
    "randomness",
    "What is the price of randomness?",
    "Ways to cut the gradient of one held-out batch, windows of the same mean length. Filled: "
    "how far the mean over all draws is from the exact gradient, with two standard errors; "
    "without bias it is about one of them, never 0. Hollow: how far one draw scatters around "
    "that mean. Fitted lengths: windows of least predicted variance, given how this gradient "
    "falls with the lag.",
    0.8,
    draw,
    say,
    table,
    alt,
)
