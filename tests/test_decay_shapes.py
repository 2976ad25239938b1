"""Shapes of decays that are known, of three lengths and more."""

import numpy as np
import pytest

from jbptt.diagnosis.decay_shapes import shape_of

LAGS = np.arange(100)
ALL = np.ones(100)


@pytest.mark.parametrize("half_life", [0.5, 3, 30, 300])
def test_one_exponential(half_life):
    noise = 1 + 0.03 * np.random.default_rng(0).normal(size=100)
    arrives = 0.5 ** (LAGS / half_life) * np.where(LAGS, noise, 1)
    found = shape_of(arrives, ALL)
    assert found.kind == "one exponential" and f"it halves every {found.half_lives[0]:.3g} steps" in found.words
    np.testing.assert_allclose(found.half_lives[0], half_life, rtol=0.1)


@pytest.mark.parametrize(("share", "short", "long"), [(0.05, 1, 1000), (0.05, 2, 40), (0.3, 3, 60), (0.02, 1, 20)])
def test_two_time_scales(share, short, long):
    arrives = (1 - share) * 0.5 ** (LAGS / short) + share * 0.5 ** (LAGS / long)
    found = shape_of(arrives, ALL)
    assert found.kind == "two time scales" and "two time scales" in found.words
    np.testing.assert_allclose(found.half_lives[0], short, rtol=0.1)
    assert abs(found.half_lives[1] / long - 1) < 0.1 or long == 1000


@pytest.mark.parametrize("length", [7, 20, 50])
def test_plateaus_and_writes(length):
    """A delay line; and a memory that is overwritten every so many steps, so that fewer losses reach back."""
    alive = (length > LAGS).astype(float)
    assert shape_of(alive, alive) == ("plateau", f"undiminished over {length} steps, then nothing", ())
    alive = np.maximum(1 - LAGS / length, 0)
    found = shape_of(alive, alive)
    assert found.kind == "writes" and f"half of the losses {length // 2 + 1} steps" in found.words


@pytest.mark.parametrize(
    ("arrives", "kind"),
    [
        (np.ones(100), "constant"),
        (1.05**LAGS, "growth"),
        (np.exp(2 * np.sin(LAGS)) / np.exp(0), "swing"),
        (np.exp(-LAGS / 30) * (1 + 2 * (LAGS > 50)), "none of these"),
        (np.ones(3), "too few lags"),
        (np.full(100, np.nan), "too few lags"),
        (np.zeros(100), "too few lags"),
    ],
)
def test_other_shapes(arrives, kind):
    assert shape_of(arrives, np.ones(len(arrives))).kind == kind
