"""Sentences and tables of the report's second half, computed from its numbers as in `sentences` and
`tables`.
"""

import math
from typing import Any

import numpy as np

from jbptt.report.axes import numbers
from jbptt.report.sentences import join_words
from jbptt.report.tables import Table, format_number


def _mean(values: Any) -> float:
    """Over what is finite; NaN where nothing is."""
    found = numbers(values)
    found = found[np.isfinite(found)]
    return float(found.mean()) if found.size else math.nan


def _shown(value: float) -> str:
    return format_number(value if math.isfinite(value) else None)


def _by_lag(flow: dict[str, Any]) -> list[float]:
    """The mean of F over all pairs at each lag, those below the precision counted as 0."""
    matrix = np.nan_to_num(numbers(flow["matrix"]))
    return [float(np.diagonal(matrix, -lag).mean()) for lag in range(len(matrix))]


def describe_flow(flow: dict[str, Any]) -> str:
    """How the flow falls with the distance, and how much the losses differ among themselves."""
    matrix, means = numbers(flow["matrix"]), _by_lag(flow)
    if not np.isfinite(matrix).all() or not means[0]:
        return (
            f"The gradient flow of the {flow['cell']} is not finite or zero, so that nothing can "
            "be said of it."
        )
    lag = min(8, len(means) - 1)
    share = means[lag] / means[0]
    far = np.diagonal(matrix, -lag)
    spread = (
        f", between {_shown(float(far.min()))} and {_shown(float(far.max()))} from loss to loss"
        if lag
        else ""
    )
    return (
        f"In the trained {flow['cell']} a loss depends on the carry that enters its own step with "
        f"a norm of {_shown(means[0])} on average, and on that of {lag} steps before with "
        f"{_shown(means[lag])} ({100 * share:.2g} %){spread}."
    )


def flow_table(flow: dict[str, Any]) -> Table:
    """Mean, smallest and largest entry by lag."""
    matrix = numbers(flow["matrix"])
    lags = [lag for lag in (0, 1, 2, 4, 8, 16, 32, 64, 128, 256) if lag < len(matrix)]
    rows = []
    for lag in lags:
        found = np.diagonal(matrix, -lag)
        rows.append(
            (f"{lag}", _shown(_mean(found)), _shown(float(found.min())), _shown(float(found.max())))
        )
    return Table(
        "Gradient flow by lag", ("lag (steps)", "mean over losses", "smallest", "largest"), rows
    )


def _regime(leading: float, error: float) -> str:
    """What the sign of the leading exponent says, if it stands out from its error."""
    if not math.isfinite(leading):
        return "is not finite"
    if abs(leading) <= 2 * error:
        return "cannot be told from 0: gradients neither vanish nor explode"
    return (
        "is negative: gradients vanish in the long run"
        if leading < 0
        else "is positive: gradients explode"
    )


def _leading(model: dict[str, Any]) -> tuple[float, float]:
    exponent, error = model["exponents"][0], model["standard_errors"][0]
    return (math.nan if exponent is None else exponent), (0.0 if error is None else error)


def describe_spectra(spectra: dict[str, Any]) -> str:
    """The leading exponent of every cell before and after training, and what its sign says."""
    clauses = []
    models = {(model["cell"], model["stage"]): model for model in spectra["models"]}
    for cell in dict.fromkeys(cell for cell, _ in models):
        before, (after, error) = (
            _leading(models[cell, "before"])[0],
            _leading(models[cell, "after"]),
        )
        clauses.append(
            f"that of the {cell} goes from {_shown(before)} to {_shown(after)} ± {_shown(error)} "
            f"nats per step and {_regime(after, error)}"
        )
    return f"With training, the leading Lyapunov exponent moves: {'; '.join(clauses)}."


def spectra_table(spectra: dict[str, Any]) -> Table:
    """Leading exponents and the norm of each product."""
    spans = spectra["models"][0]["spans"]
    columns = ("cell", "training", "leading exponent", "number above 0")
    columns += tuple(f"ln norm over {span} step{'s' if span > 1 else ''}" for span in spans)
    rows = []
    for model in spectra["models"]:
        leading, error = _leading(model)
        positive = int(np.sum(numbers(model["exponents"]) > 0))
        norms = [_shown(float(numbers(values)[0])) for values in model["log_singular_values"]]
        above = f"{positive} of {len(model['exponents'])} measured"
        rows.append(
            (model["cell"], model["stage"], f"{_shown(leading)} ± {_shown(error)}", above, *norms)
        )
    return Table(
        "Leading Lyapunov exponent (nats per step) and norms of products of Jacobians",
        columns,
        rows,
    )


def _rates(growth: dict[str, Any]) -> list[float]:
    """The change of ln norm per step between lag 4 and lag 16, or what there is of it."""
    near = min(4, len(growth["lags"]) - 1)
    far = min(16, len(growth["lags"]) - 1)
    rates = []
    for norms in growth["norms"]:
        norms = numbers(norms)
        ends = norms[near], norms[far]
        known = far > near and min(ends) > 0 and math.isfinite(max(ends))
        rates.append(math.log(ends[1] / ends[0]) / (far - near) if known else math.nan)
    return rates


def describe_growth(growth: dict[str, Any]) -> str:
    """Which radii vanish and which explode, and what clipping leaves of the largest gradient."""
    rates = dict(zip(growth["radii"], _rates(growth), strict=True))
    known = {radius: rate for radius, rate in rates.items() if math.isfinite(rate)}
    words = []
    for verb, chosen in (
        ("shrinks", [r for r, rate in known.items() if rate < 0]),
        ("grows", [r for r, rate in known.items() if rate > 0]),
    ):
        if chosen:
            words.append(
                f"{verb} with the lag for a spectral radius of "
                f"{join_words([f'{r:g}' for r in chosen])}"
            )
    raw, clipped = numbers(growth["gradient_norms"]), numbers(growth["clipped_norms"])
    over = np.isfinite(raw) & (raw > growth["max_norm"])
    sentence = (
        f"Between lags 4 and 16 the norm {' and '.join(words)}."
        if words
        else "No norm is finite and positive."
    )
    if not over.any():
        return (
            f"{sentence} No gradient reaches the norm of {growth['max_norm']:g} at which clipping "
            "would begin."
        )
    return (
        f"{sentence} Gradients reach a norm of {_shown(float(raw[over].max()))}; clipping leaves a "
        f"norm of {_shown(float(clipped[over].max()))} at most and keeps the direction, so that it "
        "tames what explodes, while what has vanished stays as small as it was."
    )


def growth_table(growth: dict[str, Any]) -> Table:
    """Rate by lag beside ln of the radius, and the gradient over the longest sequence."""
    columns = (
        "spectral radius",
        "ln radius",
        "rate, lags 4 to 16 (nats per step)",
        "gradient norm",
        "clipped",
    )
    rows = []
    for radius, rate, raw, clipped in zip(
        growth["radii"],
        _rates(growth),
        growth["gradient_norms"],
        growth["clipped_norms"],
        strict=True,
    ):
        last = _shown(float(numbers(raw)[-1])), _shown(float(numbers(clipped)[-1]))
        rows.append((f"{radius:g}", f"{math.log(radius):.3g}", _shown(rate), *last))
    return Table(
        f"Tanh networks; gradients of one loss after {growth['lengths'][-1]} steps", columns, rows
    )


def describe_powers(exercises: dict[str, Any]) -> str:
    """Whether the eigenvalues are powers, and which of the examples turned to one direction at
    which rate.
    """
    aligned = [a for a in exercises["alignments"] if a["case"] == "aligns"]
    others = [a for a in exercises["alignments"] if a["case"] != "aligns"]
    rates = [
        f"{_shown(math.nan if a['rate'] is None else a['rate'])} nats per step in the {a['name']} "
        "example (ln |λ₂/λ₁| = "
        f"{_shown(math.nan if a['predicted_rate'] is None else a['predicted_rate'])})"
        for a in aligned
    ]
    sentence = (
        f"The eigenvalues of M^{exercises['power']} are those of M to the power of "
        f"{exercises['power']}, to {exercises['largest_difference']:.1g} of the largest."
    )
    if rates:
        sentence += f" The angle between M^k x and v₁ changes by {join_words(rates)}."
    if others:
        sentence += (
            f" No alignment at such a rate is to be expected in {len(others)} of the examples: "
            + join_words(
                [
                    f"{a['name']} ({a['case']})" if a["case"] not in a["name"] else a["name"]
                    for a in others
                ]
            )
        )
        sentence += "."
    return sentence


def powers_table(exercises: dict[str, Any]) -> Table:
    """Each example, what was measured, and what it means."""
    rows = []
    for a in exercises["alignments"]:
        rate, predicted = (
            math.nan if a[field] is None else a[field] for field in ("rate", "predicted_rate")
        )
        last = numbers(a["misalignment"])[-1]
        rows.append((a["name"], a["case"], _shown(rate), _shown(predicted), _shown(float(last))))
    columns = ("example", "case", "measured rate", "ln |λ₂/λ₁|", "sine after the last step")
    return Table("M^k x against the dominant eigenvector (nats per step)", columns, rows)


def describe_remedies(remedies: dict[str, Any]) -> str:
    """Which remedies end with a lower loss than no remedy by more than the seeds' spread, and which
    with a higher.
    """
    clauses = []
    for p, patient in enumerate(remedies["patients"]):
        losses = numbers(remedies["after"]["loss"])[p]
        base, base_spread = losses[0].mean(), losses[0].std(ddof=1) if losses.shape[1] > 1 else 0.0
        better, worse, lost = [], [], []
        for name, runs in zip(remedies["remedies"][1:], losses[1:], strict=True):
            if not np.isfinite(runs).all() or not math.isfinite(base):
                lost.append(name)
                continue
            spread = math.hypot(base_spread, runs.std(ddof=1) if len(runs) > 1 else 0.0)
            if abs(runs.mean() - base) > spread:
                (better if runs.mean() < base else worse).append(name)
        words = [f"lower with {join_words(better)}"] if better else []
        words += [f"higher with {join_words(worse)}"] if worse else []
        words += [f"not finite in some run with {join_words(lost)}"] if lost else []
        clauses.append(
            f"for the {patient} network it is {'; '.join(words) if words else 'the same with all'}"
        )
    return (
        f"After {remedies['num_updates']} updates the held-out loss differs from that of no remedy "
        f"by more than the seeds' spread as follows: {'; '.join(clauses)}."
    )


def remedies_table(remedies: dict[str, Any]) -> Table:
    """All four measures after training."""
    columns = (
        "network",
        "remedy",
        "log₁₀ adjoint ratio",
        "leading exponent",
        "gradient error",
        "loss before",
        "after",
    )
    columns += ("runs diverged",)
    rows = []
    for p, patient in enumerate(remedies["patients"]):
        for r, name in enumerate(remedies["remedies"]):
            after = [
                _shown(_mean(remedies["after"][field][p][r]))
                for field in ("adjoint_ratio", "exponent")
            ]
            error, before = (
                _shown(_mean(remedies["before"][field][p][r]))
                for field in ("gradient_error", "loss")
            )
            runs = numbers(remedies["after"]["loss"][p][r])
            lost = f"{int(np.sum(~np.isfinite(runs)))} of {len(runs)}"
            rows.append((patient, name, *after, error, before, _shown(_mean(runs)), lost))
    title = "Adjoint ratio and exponent after training; error of the gradient used, before it"
    return Table(title, columns, rows)
