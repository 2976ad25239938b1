"""The page of a diagnosis, in plain text of at most 100 columns: a decision and its evidence."""

import math
import textwrap
from typing import Any, NamedTuple

import numpy as np

from jbptt.diagnosis import meanings
from jbptt.diagnosis.advice import SHARES, STUCK, TOLERANCES, steps
from jbptt.diagnosis.decay_shapes import shape_of
from jbptt.diagnosis.decision import decide, flows_back, time_ratios

NO_PATH = (
    "every gradient is exactly zero; the loss ignores y or has no weight, all units are dead, or "
    "the output depends on neither parameters nor carry"
)
PERFECT = "loss and gradient are exactly zero: a perfect fit, or every target is ignored"
BELOW = (
    "every gradient is exactly zero because the loss's derivative is smaller than its dtype can "
    "hold; scale the loss up, or compute in float32"
)
NO_CARRY = "no gradient flows back through the carry: every window is exact"
ONE_STEP = "one step: there is nothing to go back through, and nothing to truncate"
ONE_LAG = "not measured (one lag)"
CAPTION = (
    "sliding: each loss sees so many last steps. block: the sequence is cut into pieces",
    "error: ‖ĝ − g‖ / ‖g‖, kept on 95 % of the batches like this one (bootstrap over its parts)",
)
WIDTH, INDENT = 100, 12
UNLIKE = 4.0  # leaves whose half-lives differ by this factor are told apart
SOME = 0.1  # a kind of examples is named above this share of them
NEARLY_ALL = 0.8
SAME = 0.005


class Line(NamedTuple):
    """A line of the page.

    Attributes:
      label: a word.
      words: a sentence with its numbers.
      meaning: how it was found and how to read it, for `explain`.
    """

    label: str
    words: str
    meaning: str = ""


def write_page(found: Any, explain: bool = False) -> str:
    """The page of one `Diagnosis`: the decision, the evidence, windows and their cost, advice.

    Args:
      found: the diagnosis.
      explain: with what each line means and how it was found.
    """
    title, lines = _title_and_lines(found)
    paragraphs = [filled(decide(found), ""), filled(f"Gradient over {title}", "")]
    for line in lines:
        paragraphs.append(filled(f"{line.label:<{INDENT - 2}}{line.words}", "  "))
        if explain and line.meaning:
            paragraphs.append(_meaning(line.meaning))
    if _has_windows(found):
        paragraphs += ["", *_windows(found)]
        if explain:
            paragraphs.append(_meaning(meanings.WINDOWS))
    if found.advice:
        paragraphs += ["", "  advice", *(filled(str(one), "  ") for one in found.advice)]
    return "\n".join(paragraphs)


def verdict_words(found: Any) -> str:
    """The verdict, or that one lag gives none."""
    one = found.flow.num_lags == 1 < found.num_steps and found.verdict != "non-finite"
    return ONE_LAG if one else found.verdict


def _verdict_and_reach(found: Any) -> str:
    """The verdict, how far the gradient reaches and what ends it."""
    reach, lags = int(found.reach), int(found.num_lags)
    if found.verdict in ("non-finite", "exploding") or lags == 1:
        return verdict_words(found)
    if reach >= lags:
        return f"{found.verdict}, reaches all {lags} steps measured"
    ending = ""
    if found.decay.underflow:
        ending = ", where precision ends it"
    elif found.decay.zero_lag > 0:
        ending = ", where it is cut"
    elif float(found.saturated) > STUCK:
        ending = ", through saturated units"
    return f"{found.verdict}, reaches {steps(reach)} back{ending} (until 1 % is left)"


def _title_and_lines(found: Any) -> tuple[str, list[Line]]:
    lags = int(found.num_lags)
    span = steps(found.num_steps)
    norms = np.asarray(found.profile.cotangent_norms)[:lags]
    lines = [_loss(found)]
    if found.unread:
        names = ", ".join(found.unread)
        words = (
            f"{names}: read by no step. What a learned start adds to gradients is not counted here."
        )
        lines.append(Line("unread", words))
    title = _verdict_and_reach(found)
    if found.verdict == "non-finite":
        lines.append(Line("", "a loss, an adjoint or the gradient is NaN or infinite"))
        if found.nonfinite.found:
            lines.append(Line("", str(found.nonfinite)))
    elif not flows_back(found) and found.gradient_norm == 0:
        title, words = _no_gradient(found)
        lines.append(Line("", words))
    elif not flows_back(found):
        title = "no gradient path through the carry"
        lines.append(Line("", NO_CARRY))
    elif found.num_steps == 1:
        title = found.verdict
        lines.append(Line("", ONE_STEP))
    else:
        span += f", {lags} lags measured" if 1 < lags < found.num_steps else ""
        lines += [*_reach(found, norms), *_leaves(found), *_examples(found), *_dynamics(found)]
    return f"{span}: {title}", lines


def _loss(found: Any) -> Line:
    words = f"{float(found.loss):.4g}, gradient norm {float(found.gradient_norm):.3g}"
    if np.isfinite(found.constant_loss):
        words += f"; if it always predicted its mean: {float(found.constant_loss):.4g}"
    return Line("loss", words, meanings.LOSS)


def _no_gradient(found: Any) -> tuple[str, str]:
    """Title and words where not even lag 0 has a gradient."""
    if found.decay.underflow:
        return "vanished below precision", BELOW
    if found.loss == 0 and found.num_used_steps > 0:
        return "zero loss", PERFECT
    return "no gradient path", NO_PATH


def _reach(found: Any, norms: np.ndarray) -> list[Line]:
    """How far back the gradient comes from, and how it decays."""
    last = int(found.num_lags) - 1
    arrives = float(found.flow.arrives[last])
    left = f"{100 * arrives:.2g} % of" if arrives < 1 else f"{arrives:.3g} times"
    left = "all of" if abs(arrives - 1) < SAME else left
    lines = [
        Line("sources", _sources(found), meanings.SOURCES),
        Line("decay", _decay(found), meanings.DECAY),
        Line("arrives", f"{last} steps back: {left} what left the loss", meanings.ARRIVES),
    ]
    if found.decay.first_lag == 1:
        words = f"to {float(found.flow.arrives[1]):.3g} at lag 1; half-life from there on"
        lines.append(Line("jump", words, meanings.JUMP))
    zero = int(found.decay.zero_lag)
    if zero > 0:
        words = f"exactly zero from lag {zero} on"
        if found.decay.underflow:
            words = f"vanished below precision: {words} ({norms[zero - 1]:.2g} before)"
        else:
            words = f"{words}: no older step has influence"
        lines.append(Line("ends", words))
    return lines


def _sources(found: Any) -> str:
    """How many of the last steps half of the gradient comes from, and nearly all of it."""
    half, *most = (int(window) for window in found.windows.sources)
    if half == found.num_steps:
        return "only all steps together give half of this batch's gradient"
    largest = int(found.curve.windows[-1])
    few = f"the last {steps(half)}" if half else f"more than the last {steps(largest)}"
    few = "the last step" if half == 1 else few
    shares = [
        f"{100 * share:.0f} % from " + (f"the last {w}" if w else f"more than the last {largest}")
        for share, w in zip(SHARES[1:], most, strict=True)
    ]
    return f"half of this batch's gradient comes from {few}, {', '.join(shares)}"


def _decay(found: Any) -> str:
    """The half-life, and the shape of the decay where one fits."""
    lags, words = int(found.num_lags), f"half-life {_half_life(found)}"
    shape = shape_of(found.flow.arrives[:lags], found.flow.alive[:lags])
    if shape.kind == "one exponential":  # whose half-life is told already
        return f"{words}: one exponential"
    return f"{words}; {shape.words}" if shape.words else words


def _half_life(found: Any) -> str:
    lags, rate, half_life = int(found.num_lags), float(found.decay.rate), float(found.half_life)
    if lags == 1:
        return ONE_LAG
    if found.decay.zero_lag == 1:
        return "under one step"
    if math.isfinite(half_life):
        low, high = (float(h) for h in found.half_life_interval)
        beyond = f" (beyond the lags measured: {low:.3g} to {high:.3g})".replace("inf", "∞")
        number = f"{half_life:.3g}" if half_life < 1000 else f"{half_life:.0f}"
        return f"{number} steps" + (beyond if half_life > lags - 1 else "")
    if rate > 0:
        return f"none (it doubles every {math.log(2) / rate:.3g} steps back)"
    return "none (it does not shrink)"


def _leaves(found: Any) -> list[Line]:
    """Leaves of the carry that forget at different paces."""
    flow = np.asarray(found.flow.leaf_arrives, float)[: int(found.num_lags)]
    paces = {name: crossing(flow[:, i]) for i, name in enumerate(found.carry_names)}
    paces = {name: pace for name, pace in paces.items() if pace is not None}
    if len(paces) < 2:
        return []
    first, last = min(paces, key=paces.__getitem__), max(paces, key=paces.__getitem__)
    if not paces[first] < math.inf or paces[last] < UNLIKE * paces[first]:
        return []
    words = f"half-life of {first} {_steps(paces[first])}, of {last} {_steps(paces[last])}"
    squares = np.nan_to_num(flow[-1]) ** 2
    largest = int(np.argmax(squares))
    if squares[largest] > NEARLY_ALL * np.sum(squares) > 0:
        words += f"; at the last lag nearly all that arrives is {found.carry_names[largest]}'s"
    return [Line("leaves", words, meanings.LEAVES)]


def _examples(found: Any) -> list[Line]:
    """Kinds of examples, where there is more than one."""
    lag = int(found.num_lags) - 1
    each = np.asarray(found.flow.by_example, float)[lag].ravel()
    each = each[np.isfinite(each)]
    kinds = {
        "less than a tenth": np.sum(each <= 0.1),
        "most of it": np.sum((each > 0.5) & (each < 10)),
        "ten times as much": np.sum(each >= 10),
    }
    named = [f"{kind} in {n} of {len(each)}" for kind, n in kinds.items() if n > SOME * len(each)]
    if lag == 0 or len(named) < 2:
        return []
    words = f"they differ: {lag} steps back arrives {', '.join(named)}"
    return [Line("examples", words, meanings.EXAMPLES)]


def crossing(arrives: np.ndarray) -> float | None:
    """The lag from which on less than half of the first is left; ∞ if never, None without."""
    if not (np.isfinite(arrives).all() and arrives[0] > 0):
        return None
    last = int(np.flatnonzero(arrives > arrives[0] / 2)[-1])
    if last + 1 == len(arrives):
        return math.inf
    here, after = arrives[last], arrives[last + 1]
    between = math.log(2 * here / arrives[0]) / math.log(here / after) if after > 0 else 1.0
    return last + between


def _steps(half_life: float) -> str:
    return "beyond the lags measured" if half_life == math.inf else f"{half_life:.3g} steps"


def _dynamics(found: Any) -> list[Line]:
    """Exponent, norms of parts, curvature."""
    lines, exponent = [], float(found.exponent)
    if exponent == -math.inf:
        words = "wiped out on the way (a reset, dead units): exponent −∞"
        lines.append(Line("state", words, meanings.STATE))
    elif not math.isnan(exponent):
        wiped = int(found.dynamics.num_wiped)
        left_out = f"; {wiped} reset{'s' * (wiped > 1)} of an example left out" if wiped else ""
        words = (
            f"in the long run {math.exp(exponent):.3g} times as much flows back per step, whatever "
            f"the loss (exponent {exponent:+.3g} ± {float(found.dynamics.error):.2g}{left_out})"
        )
        lines.append(Line("state", words, meanings.STATE))
    median, _, largest = (float(q) for q in found.norm_quantiles)
    num_parts = int(np.sum(np.isfinite(found.part_norms)))
    if num_parts > 1:
        norms = f"gradient norms of {median:.3g} (median) to {largest:.3g} (largest)"
        lines.append(Line("parts", f"{num_parts} parts of the batch have {norms}", meanings.PARTS))
    if found.dynamics.curvature is not None:
        curvature = float(found.dynamics.curvature)
        words = f"{curvature:.3g} along the gradient: not a valley"
        if curvature > 0:
            highest = f"no learning rate above {2 / curvature:.3g} is stable"
            words = f"{curvature:.3g} along the gradient: {highest}"
        lines.append(Line("curvature", words, meanings.CURVATURE))
    return lines


def _has_windows(found: Any) -> bool:
    return found.verdict != "non-finite" and flows_back(found) and found.num_steps > 1


def _windows(found: Any) -> list[str]:
    """The table of windows with their costs."""
    heading, costs = f"  {'error at most':<18}{'steps':>6}", found.cost
    if costs is not None:
        heading += f"{'time':>13}{'memory':>12}{'beside full BPTT':>38}"
    rows = []
    for kind, windows in (("sliding", found.sliding_window), ("block", found.block_window)):
        for tolerance, window in zip(TOLERANCES, windows, strict=True):
            number = f"{int(window)}" if int(window) else f"> {int(found.curve.windows[-1])}"
            cells = _cells(costs, f"{kind} {int(window)}")
            if kind == "block" and window == found.num_steps:
                cells = "   (full BPTT)"
            rows.append(f"  {f'{tolerance:.0%} {kind}':<18}{number:>6}{cells}")
    if not found.windows.told:
        heading, rows = f"  {'':<18}{'steps':>6}" + heading[26:], []
    rows.append(f"  {'full BPTT':<18}{found.num_steps:>6}{_cells(costs, 'full')}")
    return [heading.rstrip(), *rows, *(f"  {line}" for line in CAPTION if found.windows.told)]


def _cells(costs: Any, name: str) -> str:
    if costs is None or name not in costs.names:
        return ""
    number, full = costs.names.index(name), costs.names.index("full")
    seconds, size = costs.median_seconds[number], costs.temporary_bytes[number]
    beside = ""
    if name != "full":
        low, high = time_ratios(costs, name)
        share = size / max(costs.temporary_bytes[full], 1)
        beside = f"{low:.3g} to {high:.3g} × time, {share:.2f} × memory"
    return f"{1e3 * seconds:>10.2f} ms{size / 2**20:>8.2f} MiB{beside:>38}".rstrip()


def filled(words: str, indent: str) -> str:
    """Words in lines of at most 100 columns, the later ones below the first one's words."""
    later = " " * INDENT if indent else ""
    return textwrap.fill(
        words,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _meaning(words: str) -> str:
    inset = " " * (INDENT + 2)
    return textwrap.fill(words, WIDTH, initial_indent=inset, subsequent_indent=inset)
