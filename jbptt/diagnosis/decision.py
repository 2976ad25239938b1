"""What a diagnosis decides: with which window to train, in one or two sentences."""

from typing import Any

import numpy as np

from jbptt.diagnosis.advice import TOLERANCES, steps
from jbptt.diagnosis.baseline import LEARNT, is_untrained
from jbptt.diagnosis.block_windows import candidate_windows

NO_FLOW = "Any window will do: no gradient flows back through the carry."
MEND_FIRST = "Mend what is not finite first: no window can be recommended."
NOTHING = "There is no gradient to truncate."
ONE_PART = "one part of it carries nearly all of the gradient; ask with several times as much"
CANCELS = "its parts cancel to rounding, as where training has converged"
TOO_FEW_CUTS = "so few blocks are cut in this batch that it cannot tell whether any would do"
ONE_STEP = "There is nothing to truncate: the sequence has one step."
EXPLODES = "The gradient grows on its way back: clip it."
UNTRAINED = (
    "The model predicts {better} a constant, as untrained ones do, and these often make short "
    "windows look good: ask again once its loss is below a constant's."
)


def decide(found: Any) -> str:
    """With which window to train, and what that saves, of one `Diagnosis`.

    It speaks of blocks, which save memory. Sliding windows take longer than the exact gradient.
    """
    if found.verdict == "non-finite":
        return MEND_FIRST
    if not flows_back(found):
        return NO_FLOW if float(found.gradient_norm) > 0 else NOTHING
    if found.num_steps == 1:
        return ONE_STEP
    if not found.windows.told:
        why = ONE_PART if found.windows.one_part else CANCELS
        return f"This batch cannot tell which window will do: {why}. Full BPTT is exact."
    if float(found.gradient_norm) == 0:
        return NOTHING
    words = [_blocks(found)]
    if found.verdict == "exploding":
        words.append(EXPLODES)
    loss, constant = float(found.loss), float(found.constant_loss)
    if is_untrained(loss, constant):
        worse = loss > constant + LEARNT * abs(constant)
        words.append(UNTRAINED.format(better="worse than" if worse else "no better than"))
    return " ".join(words)


def flows_back(found: Any) -> bool:
    """Whether an adjoint reaches the carry at any lag."""
    return bool(np.any(np.asarray(found.profile.cotangent_norms)[: int(found.num_lags)] > 0))


def _blocks(found: Any) -> str:
    half = found.num_steps / 2
    rough, fine = (int(window) for window in found.block_window)
    if 0 < fine <= half:
        words = (
            f"Blocks of {steps(fine)} are as good as full BPTT: they keep the gradient within "
            f"1 %{_savings(found, fine)}."
        )
        shorter = f" Blocks of {rough} keep it within 10 %{_savings(found, rough)}."
        return words + (shorter if 0 < rough <= fine / 2 else "")
    if 0 < rough <= half:
        return (
            f"Train with full BPTT, or with blocks of {steps(rough)} where memory is short: they "
            f"keep the gradient within 10 %{_savings(found, rough)}."
        )
    errors = zip(candidate_windows(found.num_steps), found.windows.blocks_upper_error, strict=True)
    errors = [(w, float(error)) for w, error in errors if w <= half and not np.isnan(error)]
    if not errors or errors[-1][1] <= TOLERANCES[0]:
        return f"Train with full BPTT: {TOO_FEW_CUTS}."
    window, error = errors[-1]
    return (
        f"Train with full BPTT: no block of at most half the {found.num_steps} steps keeps the "
        f"gradient within 10 % ({steps(window)}: {100 * error:.0f} %)."
    )


def _savings(found: Any, window: int) -> str:
    """`, at 0.55 times the memory and the same time`, as measured; nothing where it was not."""
    name = f"block {window}"
    if found.cost is None or name not in found.cost.names:
        return ""
    low, high = time_ratios(found.cost, name)
    size, whole = (found.cost.temporary_bytes[found.cost.names.index(n)] for n in (name, "full"))
    time = "the same time" if low <= 1 <= high else f"{low:.2f} to {high:.2f} times the time"
    return f", at {size / max(whole, 1):.2f} times the memory and {time}"


def time_ratios(cost: Any, name: str) -> tuple[float, float]:
    """The quartiles over repeats of an estimator's time beside that of full BPTT in the same
    repeat.
    """
    one, full = (cost.seconds[cost.names.index(n)] for n in (name, "full"))
    low, high = np.quantile(one / full, (0.25, 0.75))
    return float(low), float(high)
