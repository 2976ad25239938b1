"""Float64 everywhere, quick compilation, no program outlives its module, the whole suite in two processes."""

import os
import subprocess
import sys

import jax
import pytest

jax.config.update("jax_enable_x64", True)

QUICK_CODE = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def _generate_code_quickly():
    """Two thirds of the time to compile. Tried in another process: an XLA without these flags ends the process."""
    given = os.environ.get("XLA_FLAGS", "")
    if os.environ.get("JBPTT_FULL") == "1" or QUICK_CODE in given:
        return
    environment = os.environ | {"XLA_FLAGS": f"{given} {QUICK_CODE}"}
    if subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"], env=environment, capture_output=True
    ).returncode:
        return
    os.environ.update(environment)  # before the first computation; other processes inherit it


_generate_code_quickly()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Most of the time is compilation, on one core: `pytest` alone takes two where pytest-xdist is installed."""
    whole = config.args_source == config.ArgsSource.TESTPATHS and "PYTEST_XDIST_WORKER" not in os.environ
    if whole and config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None:
        config.option.numprocesses, config.option.dist = 2, "worksteal"


def pytest_collection_modifyitems(config, items):
    """What is marked `full` repeats on more cases what is checked without it: `JBPTT_FULL=1 pytest` runs it too."""
    if os.environ.get("JBPTT_FULL") == "1":
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(request):
    """Programs that run once need no optimization: they compile in three quarters of the time.

    Optimized as users have them: all in the full run, and modules that say `OPTIMIZED = True`.
    """
    optimized = os.environ.get("JBPTT_FULL") == "1" or getattr(request.module, "OPTIMIZED", False)
    jax.config.update("jax_disable_most_optimizations", not optimized)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True, scope="module")
def fresh_caches():
    """Hundreds of live programs exhaust the process's memory maps."""
    yield
    jax.clear_caches()
