"""The lowest versions that pyproject.toml declares: `.ci/run` tests them; here, that page and code say the same."""

import ast
import importlib
import re
import sys
import tomllib
from pathlib import Path

import jax
import pytest

import jbptt
from jbptt import types

PAGE = Path(__file__).parent.parent
PROJECT = tomllib.loads((PAGE / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
SOURCES = [*sorted(Path(jbptt.__file__).parent.rglob("*.py")), *sorted((PAGE / "tests").glob("*.py"))]
PACKAGES = {
    "jax",
    "optax",
    "chex",
    "numpy",
    "flax",
    "haiku",
    "equinox",
    "xarray",
    "tyro",
    "rich",
    "matplotlib",
    "jinja2",
}


def floors(requirements):
    """Package and lowest version of each requirement; those of this package itself are other extras."""
    return dict(line.split(">=") for line in requirements if not line.startswith("jbptt["))


@pytest.mark.parametrize("extra", [None, *EXTRAS])
def test_every_requirement_is_a_floor_and_nothing_else(extra):
    for line in EXTRAS.get(extra, PROJECT["dependencies"]):
        assert re.fullmatch(r"jbptt\[[a-z,]+\]|[a-z0-9-]+(\[cuda13\])?>=[0-9.]+", line), line


def test_jax_has_one_floor():
    core = floors(PROJECT["dependencies"])
    assert core["jax"] == core["jaxlib"] == floors(EXTRAS["cuda"])["jax[cuda13]"]
    assert core["jax"] == ".".join(map(str, types.OLDEST_JAX))


@pytest.mark.parametrize(
    ("page", "requirements"),
    [("README.md", PROJECT["dependencies"]), ("docs/interop.md", EXTRAS["interop"])],
    ids=["core", "interop"],
)
def test_pages_say_the_floors(page, requirements):
    words = (PAGE / page).read_text()
    for package, version in floors(requirements).items():
        assert f"{package} ≥ {version}" in words, f"{page} does not say {package} ≥ {version}"
    assert f"Python {PROJECT['requires-python'].replace('>=', '≥ ')}" in (PAGE / "README.md").read_text()


def names_from_packages():
    """Every `from package import name` of the package and its tests, also inside functions."""
    nodes = (node for path in SOURCES for node in ast.walk(ast.parse(path.read_text())))
    found = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in PACKAGES]
    return sorted({(node.module, alias.name) for node in found for alias in node.names})


def test_every_name_that_is_imported_exists():
    """Names are imported late, so that `import jbptt` works where they are missing."""
    missing = []
    for module, name in names_from_packages():
        home = importlib.import_module(module)
        if not hasattr(home, name):
            try:
                importlib.import_module(f"{module}.{name}")
            except ImportError:
                missing.append(f"{module}.{name}")
    assert missing == []
    assert ("jax.extend.core", "Jaxpr") in names_from_packages()


def test_an_older_jax_is_refused_in_words(monkeypatch):
    monkeypatch.setattr(jax, "__version__", "0.9.2")
    monkeypatch.setattr(jax, "__version_info__", (0, 9, 2))
    monkeypatch.delitem(sys.modules, "jbptt.types")
    with pytest.raises(ImportError, match=r"jbptt needs jax ≥ 0\.10\.0, found 0\.9\.2: pip install -U jax jaxlib"):
        importlib.import_module("jbptt.types")
