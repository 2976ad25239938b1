"""One or two sentences of plain words for each picture, computed from its numbers.

Every clause depends on a comparison of the numbers it speaks of, so that none can be false on other
data.
"""

import math
from typing import Any

from jbptt.report.tables import (
    cost_near,
    format_half_life,
    format_number,
    format_perplexity,
    format_window,
    full_cost,
    recommended_window,
)

_VERBS = {
    "vanishing": "vanishes",
    "stable": "neither vanishes nor explodes",
    "exploding": "explodes",
    "non-finite": "is not finite",
}


def describe_coverage(coverage: dict[str, Any]) -> str:
    """How many pairs each strategy covers, and how much weight the random one puts on those it
    keeps.
    """
    pairs, total = coverage["pairs"], coverage["pairs"]["full"]
    largest = max(
        (weight for row in coverage["matrices"]["randomized"] for weight in row), default=0.0
    )
    if largest > 1.0005:
        weighting = (
            f" with weights of up to {format_number(largest)}, so that the mean over many draws is "
            "full coverage"
        )
    else:
        weighting = " with no weight above 1"
    return (
        f"Of the {total:,} pairs of a loss and an earlier or equal source among the first "
        f"{len(coverage['characters'])} characters, fixed truncation with a window of "
        f"{coverage['window']} covers {_part(pairs['fixed'], total)}, the same ones every time; "
        "this draw of randomized truncation covers "
        f"{_part(pairs['randomized'], total)},{weighting}."
    )


def describe_reach(reach: dict[str, Any]) -> str:
    """What the gradient of each cell does after training, and how training changed its
    half-life.
    """
    curves = {(curve["cell"], curve["stage"]): curve for curve in reach["curves"]}
    cells = list(dict.fromkeys(cell for cell, _ in curves))
    after = [curves[cell, "after"] for cell in cells if (cell, "after") in curves]
    groups: dict[str, list[str]] = {}
    for curve in after:
        groups.setdefault(curve["verdict"], []).append(
            f"the {curve['cell']}{_how_far(curve, reach['lags'][-1])}"
        )
    clauses = [f"{_VERBS[verdict]} in {join_words(names)}" for verdict, names in groups.items()]
    changes = [
        _change(cell, curves[cell, "before"], curves[cell, "after"])
        for cell in cells
        if {(cell, "before"), (cell, "after")} <= set(curves)
    ]
    sentence = (
        f"After training, the gradient {'; it '.join(clauses)}; percentages are of the norm at lag "
        "0."
    )
    return (
        f"{sentence} Half-life before and after training: {', '.join(changes)}."
        if changes
        else sentence
    )


def describe_windows(windows: dict[str, Any]) -> str:
    """The windows for 10 % and 1 % error, and the time and memory that blocks take beside full
    BPTT.
    """
    needs = [
        f"the {model['cell']} {verb}a sliding window of {_needs(model, 'sliding')} or blocks of "
        f"{_needs(model, 'block')} steps"
        for model, verb in zip(windows["models"], ("needs ", "", ""), strict=False)
    ]
    sentence = f"For at most 10 % (1 %) of gradient error, {join_words(needs)}."
    costs = [cost for model in windows["models"] if (cost := _block_cost(model))]
    if not costs:
        return sentence
    return (
        f"{sentence} At the measured block size next to that for 10 %, one gradient takes these "
        f"parts of the time and temporary memory of full BPTT: {join_words(costs)}."
    )


def describe_learning(learning: dict[str, Any]) -> str:
    """Held-out perplexity at the end, and which differences exceed the spread of the seeds."""
    full, *others = learning["strategies"]
    seeds = learning["num_seeds"]
    start = (
        f"After {learning['characters_read'][-1]:,} characters the {learning['cell']} has a "
        f"held-out perplexity of {format_perplexity(full)} with {full['name']} BPTT "
        f"({full['detail']}; "
        f"{'one seed' if seeds == 1 else f'mean ± standard deviation of {seeds} seeds'})"
    )
    compared = "; ".join(_compare(other, full, seeds) for other in others)
    return f"{start}. {_capital(compared)}." if compared else f"{start}."


def _compare(other: dict[str, Any], full: dict[str, Any], num_seeds: int) -> str:
    """Worse, better or indistinguishable: lower perplexity is better."""
    name = f"{other['name']} truncation ({format_perplexity(other)})"
    if other["final_mean"] is None or full["final_mean"] is None:
        return f"{name} cannot be compared, because a perplexity is not finite"
    difference = other["final_mean"] - full["final_mean"]
    word = "higher, so worse" if difference > 0 else "lower, so better"
    if num_seeds < 2 or full["final_std"] is None or other["final_std"] is None:
        gap = f"{format_number(abs(difference))} {word}" if difference else "equal"
        return f"{name} is {gap}, but one seed cannot tell whether that is chance"
    # The standard deviation of the difference of two single runs.
    spread = math.hypot(other["final_std"], full["final_std"])
    if abs(difference) <= spread:
        gap, bound = format_number(abs(difference)), format_number(spread)
        return (
            f"{name} is indistinguishable from it: the difference of {gap} is within the seeds' "
            f"spread of {bound}"
        )
    gap = f"{format_number(abs(difference))} {word}"
    return f"{name} is {gap}, by more than the seeds' spread of {format_number(spread)}"


def _part(count: int, total: int) -> str:
    return f"all {total:,}" if count == total else f"{count:,} ({100 * count / total:.0f} %)"


def _how_far(curve: dict[str, Any], last: int) -> str:
    """In brackets: the half-life, and the lag from which the norm is under 1 % of that at lag 0."""
    if curve["verdict"] == "non-finite":
        return ""
    half = "no halving" if curve["half_life"] is None else f"half-life {format_half_life(curve)}"
    if curve["reach"] is None:
        return f" ({half}; still at least 1 % at lag {last})"
    return f" ({half}; under 1 % from lag {curve['reach']} on)" if curve["reach"] else " (zero)"


def _change(cell: str, before: dict[str, Any], after: dict[str, Any]) -> str:
    """`rnn 1.4 steps → 2.4 steps (longer)`."""
    words = [format_half_life(curve) for curve in (before, after)]
    pair = f"{cell} {words[0]} → {words[1]}"
    if "non-finite" in (before["verdict"], after["verdict"]):
        return pair
    if words[0] == words[1]:
        return f"{pair} (unchanged)"
    lives = [
        math.inf if curve["half_life"] is None else curve["half_life"] for curve in (before, after)
    ]
    return f"{pair} ({'longer' if lives[1] > lives[0] else 'shorter'})"


def _needs(model: dict[str, Any], strategy: str) -> str:
    """`12 (30)`: the windows for 10 % and for 1 %."""
    return f"{format_window(model, strategy, '0.1')} ({format_window(model, strategy, '0.01')})"


def _block_cost(model: dict[str, Any]) -> str:
    """`0.5 and 0.1 with blocks of 16 (rnn)`: the measured block next to the one for 10 %; empty if
    there is none.
    """
    full, cost = (
        full_cost(model),
        cost_near(model, "block", recommended_window(model, "block", "0.1")),
    )
    if not full or not cost:
        return ""
    parts = []
    for field in ("seconds", "temporary_bytes"):
        known = cost[field] is not None and full[field]
        parts.append(f"{cost[field] / full[field]:.2g}" if known else "not known")
    return f"{parts[0]} and {parts[1]} with blocks of {cost['window']} ({model['cell']})"


def join_words(words: list[str]) -> str:
    """`a, b and c`."""
    words = [word for word in words if word]
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
