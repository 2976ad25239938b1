"""The same workload as `pytest-benchmark` cases:
`pip install pytest-benchmark; pytest benchmarks`.
"""

import jax
import pytest

from benchmarks.speed import KINDS
from benchmarks.work import OPPONENTS, Work, ours

pytest.importorskip("pytest_benchmark")


@pytest.mark.parametrize("name", ["jbptt", *OPPONENTS])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 128, 32), (32, 128, 64)], ids=str)
def test_full_gradient(benchmark, shape, kind, name):
    make = {"jbptt": ours, **OPPONENTS}[name]
    try:
        contestant = make(Work(kind, *shape))
    except ImportError:
        pytest.skip(f"{name} is not installed")
    if contestant is None:
        pytest.skip(f"{name} has no {kind}")
    assert contestant.disagreement() < 1e-4
    benchmark(lambda: jax.block_until_ready(contestant.run()))
