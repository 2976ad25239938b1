"""The page of a learning study, in plain text of at most 100 columns: a decision, its evidence."""

import math
from typing import Any

import numpy as np

from jbptt.diagnosis.advice import TOLERANCES
from jbptt.diagnosis.baseline import LEARNT
from jbptt.diagnosis.page import INDENT, filled
from jbptt.learning.judging import MARGIN, STILL_FALLING
from jbptt.learning.verdicts import AS_GOOD, BEST, NOT_FINITE, NOT_TOLD_APART, WORSE

FORETOLD = TOLERANCES[0]
"""A gradient with at most this error was expected to learn as the exact one does."""


def write_page(study: Any) -> str:
    """The decision, the table of all ways, and what stands behind both."""
    paragraphs = [filled(decision(study), "")]
    paragraphs += [filled(f"{label:<{INDENT - 2}}{words}", "  ") for label, words in _facts(study)]
    paragraphs += ["", *table(study)]
    notes = [(label, words) for label, words in _notes(study) if words]
    if notes:
        paragraphs += ["", *(filled(f"{label:<{INDENT - 2}}{w}", "  ") for label, w in notes)]
    return "\n".join(paragraphs)


def decision(study: Any) -> str:
    """With which way to train, and why; one to five sentences."""
    _, judged, verdicts = study.at_equal_data
    if not study.learned.any():
        return (
            f"No answer: nothing was learned. No way's test loss is {LEARNT:.0%} below "
            f"{_known_without_inputs(study)}; try more updates, a larger model or other data."
        ).replace("%", " %")
    if len(study.ways) == 1:
        return f"No answer: {study.ways[0]} was the only way to train, nothing was compared."
    choice = verdicts.choice
    taken = f"{study.ways[choice]}{_cost(study, choice)}"
    if verdicts.is_tie:
        words = [f"{_tie(study)} The cheapest is {taken}."]
    else:
        words = [f"Train with {taken}. {_why(study)}"]
    if choice:
        own, full = judged.losses[choice].mean(), judged.losses[0].mean()
        words.append(
            f"Its test loss is {own:.4g}, that of full BPTT {full:.4g}: difference "
            f"{beside_full(study, choice, ', 95 % interval ')}."
        )
    if worse := verdicts.named(WORSE):
        words.append(f"Shown to be worse than another way: {_names(study, worse)}.")
        if apart := [way for way in verdicts.named(NOT_TOLD_APART) if way != choice]:
            best = study.ways[verdicts.best]
            words.append(
                f"Not told apart from {best} by {study.num_seeds} seeds: {_names(study, apart)}."
            )
    if broken := verdicts.named(NOT_FINITE):
        words.append(f"Not finite: {_names(study, broken)}.")
    if verdicts.smallest != choice:
        least = verdicts.smallest
        words.append(f"Least memory: {study.ways[least]}{_cost(study, least)}.")
    return " ".join(words)


def _tie(study: Any) -> str:
    """That no way is worse than another, and in which sense."""
    words = {word for word in study.at_equal_data.verdicts.words if word != NOT_FINITE}
    share = share_words(MARGIN)
    if words <= {BEST, AS_GOOD}:
        return f"No way is worse than the best by more than {share} of what training gains."
    if NOT_TOLD_APART in words:
        return (
            f"No way is shown to be worse than another: the noise of {study.num_seeds} seeds is "
            "too large to tell."
        )
    return f"No way is shown to be worse than another by more than {share} of what training gains."


def _known_without_inputs(study: Any) -> str:
    if np.isnan(study.constant_loss):
        return "the loss before training"
    return f"that of a constant prediction, {study.constant_loss:.4g}"


def _why(study: Any) -> str:
    verdicts = study.at_equal_data.verdicts
    if verdicts.choice == verdicts.best:
        return "It has the lowest test loss."
    apart = _signed(float(verdicts.beside_best.mean[verdicts.choice]))
    return (
        f"It is the cheapest of those that are not shown to be worse and come near the lowest test "
        f"loss ({apart} beside {study.ways[verdicts.best]})."
    )


def _cost(study: Any, way: int) -> str:
    """` (0.8 × the time, 0.1 × the memory of full BPTT)`; nothing for full BPTT itself."""
    if way == 0:
        return ""
    time = study.seconds[way] / study.seconds[0]
    memory = study.temporary_bytes[way] / max(study.temporary_bytes[0], 1)
    share = "" if np.isnan(memory) else f", {memory:.2g} × the memory"
    return f" ({time:.2g} × the time{share} of full BPTT)"


def beside_full(study: Any, way: int, between: str = " ") -> str:
    """`+0.01 −0.02 to +0.04`, the difference to full BPTT and its interval."""
    beside = study.at_equal_data.verdicts.beside_full
    mean, low, high = (_signed(float(of[way])) for of in (beside.mean, beside.low, beside.high))
    return f"{mean}{between}{low} to {high}"


def _signed(value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{value:+.3g}".replace("-", "−") if value else "0"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _names(study: Any, ways: Any) -> str:
    return _listed([study.ways[way] for way in ways])


def _facts(study: Any) -> list[tuple[str, str]]:
    counts = [len(rates) for rates in study.curves.rates]
    few, most = min(counts), max(counts)
    rates = f"{few}" if few == most else f"{few} to {most}"
    facts = [
        (
            "trained",
            f"{study.num_updates:,} updates, {study.num_seeds} seeds ({study.seeds_differ_in}), "
            f"{rates} learning rate{'s' * (most > 1)} for each way",
        ),
        ("data", study.data),
    ]
    if not np.isnan(study.constant_loss):
        known = f"the test loss of the best constant prediction is {study.constant_loss:.4g}"
        facts.append(("chance", known))
    return facts


def table(study: Any) -> list[str]:
    """What each way learned, and below it what its gradient is like and what it costs."""
    _, judged, verdicts = study.at_equal_data
    width = max(len(name) for name in (*study.ways, "way"))
    rows = [
        f"  {'way':<{width}}{'rate':>10}{'test loss':>11}{'beside full BPTT':>18}"
        f"{'95 % interval':>23}   verdict"
    ]
    for i, name in enumerate(study.ways):
        mean, interval = beside_full(study, i, "\t").split("\t")
        apart = f"{mean:>18}{interval:>23}" if i else " " * 41
        rows.append(
            f"  {name:<{width}}{study.curves.rates[i][judged.rate[i]]:>10.3g}"
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
        before, after = ("", "") if i == 0 else (share_words(float(error[i])) for error in errors)
        size = study.temporary_bytes[i] / 2**20
        memory = "not known" if np.isnan(size) else f"{size:.3g} MiB"
        rows.append(
            f"  {name:<{width}}{before:>11}{after:>11}{1e3 * study.seconds[i]:>11.2f} ms"
            f"{memory:>13}{int(study.updates[places[i]]):>11,}{at_time.losses[i].mean():>13.4g}"
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


def _says_something(study: Any) -> bool:
    return len(study.ways) > 1 and bool(study.learned.any())


def _intervals(study: Any) -> str:
    if not _says_something(study):
        return ""
    return (
        "over paired seeds, for all pairs of ways at once; a difference of "
        f"{study.margin:.2g} or less ({share_words(MARGIN)} of what training gains) is of no "
        "interest"
    )


def budget(study: Any) -> str:
    """Whether training came to a plateau."""
    shares = study.still_falling
    if not study.learned.any():
        return ""
    if np.isnan(shares).all():
        return "too few evaluations to tell whether training came to a plateau"
    moving = np.flatnonzero(shares > STILL_FALLING)
    if not moving.size:
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
    """The ways where all of them may compute equally long."""
    if not _says_something(study):
        return ""
    places, _, verdicts = study.at_equal_time
    seconds = study.num_updates * float(study.seconds.min())
    updates = study.updates[places]
    span = f"{int(updates.min()):,} to {int(updates.max()):,} updates"
    begin = f"in equal computing time ({seconds:.3g} s of updates here: {span})"
    if verdicts.is_tie:
        return f"{begin} no way is shown to be worse than another"
    worse = _names(study, verdicts.named(WORSE))
    best = study.ways[verdicts.best]
    return f"{begin} {best} has the lowest test loss; shown to be worse than another way: {worse}"


def foretold(study: Any) -> str:
    """What the error of the gradient before training said of each way, and what came of it."""
    if not _says_something(study):
        return ""
    beside = study.at_equal_data.verdicts.beside_full
    errors = study.at_own_rate(study.errors_at_start)
    told = np.isfinite(errors) & np.isfinite(beside.mean)
    worse = (beside.low > 0) & (beside.mean > study.margin)
    outcomes = {"worse than full BPTT": worse, "not shown to be worse": ~worse}
    clauses = []
    for size, of_size in {"at most": errors <= FORETOLD, "above": errors > FORETOLD}.items():
        groups = [
            f"{_names(study, ways)} ({outcome})"
            for outcome, which in outcomes.items()
            if (ways := [i for i in np.flatnonzero(told & of_size & which) if i])
        ]
        if groups:
            clauses.append(f"{size} {share_words(FORETOLD)} for {_listed(groups)}")
    return f"the gradient's error before training was {'; '.join(clauses)}" if clauses else ""


def _unbracketed(study: Any) -> str:
    if not study.unbracketed:
        return ""
    names = _listed(list(study.unbracketed))
    return f"the best one tried is the first or the last for {names}: a better one may lie beyond"
