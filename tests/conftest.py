"""Float64 everywhere, quick compilation, no program outlives its module, the whole suite in two processes."""

import os
import subprocess
import sys
import zlib

import jax
import pytest

jax.config.update("jax_enable_x64", True)

FULL = os.environ.get("JBPTT_FULL") == "1"
USUAL = "not more"
MOST_MAPS = 4000  # of 65,530 by default
QUICK_CODE = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def _generate_code_quickly():
    """Two thirds of the time to compile. Tried in another process: an XLA without these flags ends the process."""
    given = os.environ.get("XLA_FLAGS", "")
    if FULL or QUICK_CODE in given:
        return
    environment = os.environ | {"XLA_FLAGS": f"{given} {QUICK_CODE}"}
    if subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"], env=environment, capture_output=True
    ).returncode:
        return
    os.environ.update(environment)  # before the first computation; other processes inherit it


_generate_code_quickly()


def pytest_addoption(parser):
    parser.addoption("--share", type=share, metavar="K/N", help="the K-th of N shares of what is marked `more`")


def share(words):
    """`"2/3"` as (2, 3)."""
    k, n = map(int, words.split("/"))
    if not 1 <= k <= n:
        raise ValueError
    return k, n


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Most of the time is compilation, on one core: `pytest` alone takes two where pytest-xdist is installed.

    It takes the usual run; a path, all that stands there.
    """
    if config.args_source != config.ArgsSource.TESTPATHS:
        return
    if not (config.option.markexpr or FULL):
        config.option.markexpr = USUAL
    if "PYTEST_XDIST_WORKER" in os.environ or not config.pluginmanager.hasplugin("xdist"):
        return
    if config.option.numprocesses is None:
        config.option.numprocesses, config.option.dist = 2, "worksteal"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Leaves `full` to `JBPTT_FULL=1 pytest` and what is `more` to other shares.

    Holds what the usual run owes to what it leaves out.
    """
    left_out = {item for item in items if not FULL and item.get_closest_marker("full")}
    if config.option.share:
        left_out |= {item for item in items if not in_share(item, *config.option.share)}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]
    if config.option.markexpr == USUAL:
        check_that_every_promise_is_touched(items)


def check_that_every_promise_is_touched(items):
    """A case that the usual run leaves out has another of its function there, or its mark names a function that is.

    Of files that are not asked for nothing is known.
    """
    usual = {name_of(item) for item in items if not item.get_closest_marker("more")}
    files = {name_of(item)[0] for item in items}
    for item in items:
        file, function = name_of(item)
        named = [marker.args[0] for marker in item.iter_markers("more") if marker.args]
        instead = file_and_function(*named or (function,), file)
        if instead[0] in files and instead not in usual:
            raise pytest.UsageError(f"{item.nodeid} is not in the usual run, and no case of {'::'.join(instead)} is")


def in_share(item, k, n):
    """All cases of a function are in one share: they have programs and set-up in common."""
    return not item.get_closest_marker("more") or zlib.crc32("::".join(name_of(item)).encode()) % n == k - 1


def name_of(item):
    """Its file and its function, without the case."""
    return item.path.stem, item.originalname


def file_and_function(name, file):
    """Of `function` in this file, or `file::function`."""
    return tuple(name.split("::")) if "::" in name else (file, name)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(request):
    """Programs that run once need no optimization: they compile in three quarters of the time.

    Optimized as users have them: all in the full run, and modules that say `OPTIMIZED = True`.
    """
    optimized = FULL or getattr(request.module, "OPTIMIZED", False)
    jax.config.update("jax_disable_most_optimizations", not optimized)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True, scope="module")
def few_live_programs(request):
    """Hundreds of live programs exhaust memory and the process's memory maps; small ones that many modules use stay."""
    yield
    if getattr(request.module, "OPTIMIZED", False) or not few_memory_maps():
        jax.clear_caches()


def few_memory_maps():
    """Some six modules' worth; unknown on other systems than Linux."""
    try:
        with open("/proc/self/maps", "rb") as maps:
            return sum(1 for _ in maps) < MOST_MAPS
    except OSError:
        return False
