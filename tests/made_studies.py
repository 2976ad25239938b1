"""Learning studies with numbers made up, for sentences and pictures that must fit them."""

import numpy as np

from jbptt.learning.judging import Curves
from jbptt.learning.study_result import LearningStudy
from jbptt.learning.ways import FULL


def made_up(*means, noise=0.01, constant=2.0, seconds=None, falling=0.0, errors=None, seeds=5):
    """A study whose ways end at these means, for sentences that must fit its numbers."""
    numbers = np.random.default_rng(6)
    shared, ways, validation = numbers.normal(size=seeds) * noise, [], []
    for i, mean in enumerate(means):
        ways.append(FULL if i == 0 else f"blocks of {2**i}")
        own = numbers.normal(size=seeds) * noise
        ends = mean + shared + own - own.mean() - shared.mean()
        shape = np.array([1.0, 0.5, falling, falling / 2, 0.0])
        validation.append((ends[:, None] + shape * (2.5 - mean))[None])
    number = len(means)
    errors = [0.0] + [0.05] * (number - 1) if errors is None else errors
    by_seed = [np.full((1, seeds), error) for error in errors]
    return LearningStudy(
        tuple(ways), Curves([np.array([0.01])] * number, validation, validation), np.arange(5) * 10,
        np.ones(number) if seconds is None else np.array(seconds), np.arange(number, 0, -1.0) * 2**20,
        by_seed, by_seed, constant, 0.0, (), "data", "start and data",
    ).with_margin()  # fmt: skip
