"""Float64 everywhere, and no compiled program outlives its module."""

import jax
import pytest

jax.config.update("jax_enable_x64", True)


@pytest.fixture(autouse=True, scope="module")
def fresh_caches():
    """Hundreds of live programs exhaust the process's memory maps."""
    yield
    jax.clear_caches()
