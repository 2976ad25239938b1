"""The page of a learning study, in plain text of at most 100 columns: a decision, its evidence."""

import math
import textwrap
from typing import Any

import numpy as np

from jbptt.diagnosis.advice import TOLERANCES
from jbptt.learning.judging import STILL_FALLING
from jbptt.learning.verdicts import NOT_TOLD_APART, WORSE

WIDTH, INDENT = 100, 12
FORETOLD = TOLERANCES[0]
"""A gradient with at most this error was expected to learn as the exact one does."""
MANY = 1000


def write_page(study: Any) -> str:
    """The decision, the table of all ways, and what stands behind both."""
    paragraphs = [_filled(decision(study), "")]
    paragraphs += [_filled(f"{label:<{INDENT - 2}}{words}", "  ") for label, words in _facts(study)]
    paragraphs += ["", *table(study)]
    notes = [(label, words) for label, words in _notes(study) if words]
    if notes:
        paragraphs += ["", *(_filled(f"{label:<{INDENT - 2}}{w}", "  ") for label, w in notes)]
    return "\n".join(paragraphs)


def decision(study: Any) -> str:
    """With which way to train, and why; one to four sentences."""
    verdicts, _, _ = _parts(study)
    if not study.learned.any():
        return (
            "No answer: nothing was learned. No way's test loss is clearly below "
            f"{_known_without_inputs(study)}; try more updates, a larger model or other data."
        )
    choice = verdicts.choice
    seeds = f"{study.num_seeds} seeds"
    if verdicts.is_tie:
        begin = (
            "All ways learn equally well: they differ by less than 2 % of what training gains."
            if NOT_TOLD_APART not in verdicts.words
            else f"The ways do not differ by more than the noise of {seeds}: none is shown to be "
            "better."
        )
        words = [
            f"{begin} The cheapest is {study.ways[choice]}{_cost(study, choice)}.",
            *_beside(study, choice),
        ]
    else:
        words = [
            f"Train with {study.ways[choice]}{_cost(study, choice)}. {_why(study)}",
            *_beside(study, choice),
        ]
        worse = [study.ways[i] for i, word in enumerate(verdicts.words) if word == WORSE]
        best = study.ways[verdicts.best]
        words.append(f"Worse than {best}: {_listed(worse)}.")
        apart = [
            study.ways[i]
            for i, word in enumerate(verdicts.words)
            if word == NOT_TOLD_APART and i != choice
        ]
        if apart:
            words.append(f"Not told apart from it by {seeds}: {_listed(apart)}.")
    if verdicts.smallest != choice:
        least = verdicts.smallest
        words.append(f"Least memory: {study.ways[least]}{_cost(study, least)}.")
    return " ".join(words)


def _parts(study: Any) -> tuple[Any, Any, Any]:
    places, judged, verdicts = study.at_equal_data
    return verdicts, judged, places


def _known_without_inputs(study: Any) -> str:
    if np.isnan(study.constant_loss):
        return "the loss before training"
    return f"that of a constant prediction, {study.constant_loss:.4g}"


def _why(study: Any) -> str:
    verdicts, _, _ = _parts(study)
    if verdicts.choice == verdicts.best:
        return "It has the lowest test loss."
    best = study.ways[verdicts.best]
    apart = f"{_signed(float(verdicts.beside_best.mean[verdicts.choice]))} beside {best}"
    if verdicts.words[verdicts.choice] == NOT_TOLD_APART:
        return (
            f"It is the cheapest that is not shown to be worse than the best ({apart}), and is "
            "within one standard error of it, or so near that it does not matter."
        )
    return f"It is the cheapest that learns as well as the best ({apart})."


def _cost(study: Any, way: int) -> str:
    """` (0.8 × the time, 0.1 × the memory of full BPTT)`; nothing for full BPTT itself."""
    if way == 0:
        return ""
    time = study.seconds[way] / study.seconds[0]
    memory = study.temporary_bytes[way] / max(study.temporary_bytes[0], 1)
    share = "" if np.isnan(memory) else f", {memory:.2g} × the memory"
    return f" ({time:.2g} × the time{share} of full BPTT)"


def _beside(study: Any, way: int) -> list[str]:
    """The test losses of this way and of full BPTT, with the interval of their difference."""
    verdicts, judged, _ = _parts(study)
    if way == 0:
        return []
    own, full = judged.losses[way].mean(), judged.losses[0].mean()
    return [
        f"Its test loss is {own:.4g}, that of full BPTT {full:.4g}: difference "
        f"{_interval(verdicts.beside_full, way)}."
    ]


def beside_full(study: Any, way: int) -> str:
    """`+0.01 (−0.02 to +0.04)`."""
    beside = study.at_equal_data.verdicts.beside_full
    mean, low, high = (_signed(float(of[way])) for of in (beside.mean, beside.low, beside.high))
    return f"{mean} ({low} to {high})"


def _interval(beside: Any, way: int) -> str:
    return (
        f"{_signed(float(beside.mean[way]))}, 95 % interval {_signed(float(beside.low[way]))} to "
        f"{_signed(float(beside.high[way]))}"
    )


def _signed(value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{value:+.3g}".replace("-", "−") if value else "0"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _facts(study: Any) -> list[tuple[str, str]]:
    counts = [len(rates) for rates in study.curves.rates]
    few, most = min(counts), max(counts)
    rates = f"{few}" if few == most else f"{few} to {most}"
    known = f"{_known_without_inputs(study)}" if not np.isnan(study.constant_loss) else ""
    facts = [
        (
            "trained",
            f"{study.num_updates:,} updates, {study.num_seeds} seeds ({study.seeds_differ_in}), "
            f"{rates} learning rates for each way",
        ),
        ("data", study.data),
    ]
    if known:
        facts.append(("chance", f"the test loss of a constant prediction is {known.split()[-1]}"))
    return facts


def table(study: Any) -> list[str]:
    """What each way learned, and below it what its gradient is like and what it costs."""
    verdicts, judged, _ = _parts(study)
    beside = verdicts.beside_full
    width = max(len(name) for name in (*study.ways, "way"))
    rows = [
        f"  {'way':<{width}}{'rate':>8}{'test loss':>11}{'beside full BPTT':>19}"
        f"{'95 % interval':>24}   beside the best"
    ]
    for i, name in enumerate(study.ways):
        interval = f"{_signed(float(beside.low[i]))} to {_signed(float(beside.high[i]))}"
        apart = f"{_signed(float(beside.mean[i])):>19}{interval:>24}" if i else " " * 43
        rows.append(
            f"  {name:<{width}}{study.curves.rates[i][judged.rate[i]]:>8.3g}"
            f"{judged.losses[i].mean():>11.4g}{apart}   {verdicts.words[i]}"
        )
    errors = study.at_own_rate(study.errors_at_start), study.at_own_rate(study.errors_at_end)
    places, at_time, _ = study.at_equal_time
    rows += [
        "",
        f"  {'':<{width}}{'gradient error':>22}{'one update':>27}{'in equal time':>24}",
        f"  {'way':<{width}}{'before':>11}{'after':>11}{'time':>14}{'memory':>13}"
        f"{'updates':>11}{'test loss':>13}",
    ]
    for i, name in enumerate(study.ways):
        own = ("", "") if i == 0 else (share_words(float(error[i])) for error in errors)
        before, after = own
        rows.append(
            f"  {name:<{width}}{before:>11}{after:>11}{1e3 * study.seconds[i]:>11.2f} ms"
            f"{study.temporary_bytes[i] / 2**20:>9.3g} MiB{int(study.updates[places[i]]):>11,}"
            f"{at_time.losses[i].mean():>13.4g}"
        )
    return rows


def share_words(share: float) -> str:
    """`12 %`; from tenfold on `12 ×`."""
    if share >= 10:
        return f"{share:.2g} ×"
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"


def _notes(study: Any) -> list[tuple[str, str]]:
    return [
        ("budget", budget(study)),
        ("time", after_equal_time(study)),
        ("foretold", foretold(study)),
        ("rates", _unbracketed(study)),
        ("intervals", _intervals(study)),
    ]


def _intervals(study: Any) -> str:
    words = "over paired seeds, for all pairs of ways at once"
    if not study.margin:
        return words
    return (
        f"{words}; a difference of {study.margin:.2g} or less (2 % of what training gains) is of "
        "no interest"
    )


def budget(study: Any) -> str:
    """Whether training came to a plateau."""
    shares = study.still_falling
    moving = [i for i in np.flatnonzero(shares > STILL_FALLING) if study.learned[i]]
    if not study.learned.any():
        return ""
    if not moving:
        return (
            "at a plateau: over the last quarter of its updates no way gained more than "
            f"{share_words(STILL_FALLING)} of all that it gained"
        )
    named = [f"{study.ways[i]} {100 * shares[i]:.0f} %" for i in moving]
    return (
        f"no plateau: this holds for {study.num_updates:,} updates, not for longer training. Over "
        f"the last quarter came, of all that was gained: {_listed(named)}"
    )


def after_equal_time(study: Any) -> str:
    """The answer where all ways may compute equally long."""
    if not study.learned.any():
        return ""
    places, _, verdicts = study.at_equal_time
    seconds = study.num_updates * float(study.seconds.min())
    updates = study.updates[places]
    span = f"{int(updates.min()):,} to {int(updates.max()):,} updates"
    begin = f"in equal computing time ({seconds:.3g} s of updates here: {span})"
    choice = study.ways[verdicts.choice]
    if verdicts.is_tie:
        end = f"no way is shown to be better; the cheapest is {choice}"
    else:
        worse = [study.ways[i] for i, word in enumerate(verdicts.words) if word == WORSE]
        end = f"{choice}; worse than {study.ways[verdicts.best]}: {_listed(worse)}"
    return f"{begin}: {end}"


def foretold(study: Any) -> str:
    """What the error of the gradient before training said of each way, and what came of it."""
    if not study.learned.any() or len(study.ways) == 1:
        return ""
    beside = study.at_equal_data.verdicts.beside_full
    small = study.at_own_rate(study.errors_at_start) <= FORETOLD
    worse = (beside.low > 0) & (beside.mean > study.margin)
    outcomes = {"worse than full BPTT": worse, "not shown to be worse": ~worse}
    clauses = []
    for size, of_size in {"at most": small, "above": ~small}.items():
        groups = [
            f"{_listed(names)} ({outcome})"
            for outcome, which in outcomes.items()
            if (names := [study.ways[i] for i in np.flatnonzero(of_size & which) if i])
        ]
        if groups:
            clauses.append(f"{size} {share_words(FORETOLD)} for {_listed(groups)}")
    return f"the gradient's error before training was {'; '.join(clauses)}"


def _unbracketed(study: Any) -> str:
    if not study.unbracketed:
        return ""
    names = _listed(list(study.unbracketed))
    return f"the best one tried is the first or the last for {names}: a better one may lie beyond"


def _filled(words: str, indent: str) -> str:
    later = " " * INDENT if indent else ""
    return textwrap.fill(
        words,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    )
