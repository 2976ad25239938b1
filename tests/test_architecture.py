"""The house: imports go downward only, names are what they seem, and importing costs nothing optional."""

import ast
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
from problems import usual

import jbptt

ROOT = Path(jbptt.__file__).parent  # what is tested may be an installed copy, without the pages beside it
PAGE = Path(__file__).parent.parent / "CONTRIBUTING.md"
CORE = [
    "lazy",
    "arrays",
    "types",
    "datasets",
    "progress",
    "memory",
    "norms",
    "engine.primitives",
    "engine.dependence",
    "engine.entries",
    "engine.facts",
    "engine.jaxprs",
    "engine.emitted",
    "engine.small_products",
    "engine.weight_uses",
    "engine.splitting",
    "engine.weight_products",
    "engine.loop_programs",
    "engine.stacks",
    "engine.forward_backward",
    "engine.cutting",
    "engine.fast",
    "engine.plain",
    "engine",
    "slips",
    "starts",
    "batch_axes",
    "validation",
    "cells",
    "recurrence",
    "executables",
    "truncation",
    "losses",
    "problem",
    "segments",
    "scan_vjp",
    "scanning",
    "past_steps",
    "windows",
    "plans",
    "estimators",
    "bias_bound",
    "adaptive",
    "clipping.cotangents",
    "clipping.transformations",
    "clipping",
    "brute_force",
    "probes",
    "testing",
]
# Interop is a wing of the core, a room a library.
FLOORS = ["core", "interop", "online", "analysis", "diagnosis", "experiments", "sweeps", "learning", "report"]
OPTIONAL = {"matplotlib", "rich", "tyro", "jinja2", "torch", "xarray", "flax", "haiku", "equinox"}
OPTIONAL |= {"zarr", "icechunk", "dask", "distributed"}
INTEROP = {"interop.nnx": "flax", "interop.linen": "flax", "interop.haiku": "haiku", "interop.equinox": "equinox"}
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}
DOORS = {"__init__", "__main__"}  # what only opens the house to its users
for wing in ("engine", "clipping"):  # by its door all others use it
    FILES[wing] = FILES.pop(f"{wing}.__init__")
MODULES = {name: path for name, path in FILES.items() if name.split(".")[-1] not in DOORS}


def floor(name):
    return 0 if name in CORE else FLOORS.index(name.split(".")[0])


def imports(path):
    """The names that a file imports, `package.name` for each `from package import name`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def neighbours(name):
    """The modules of the package that a module imports."""
    for imported in imports(MODULES[name]):
        parts = imported.split(".")
        if parts[0] == "jbptt" and imported != "jbptt.__version__":
            candidates = [".".join(parts[1:n]) for n in range(len(parts), 1, -1)]
            found = [candidate for candidate in candidates if candidate in MODULES]
            assert found, f"{name} imports {imported}, which comes from no module below it"
            yield found[0]


def public_functions(path):
    return [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]


def test_every_module_of_the_core_has_its_place():
    assert {name for name in MODULES if name.split(".")[0] not in FLOORS} == set(CORE)


def test_one_door_to_the_engine():
    """Nothing else reads programs, and nobody looks behind the door."""
    for name, path in MODULES.items():
        if name.split(".")[0] != "engine":
            used = [imported for imported in imports(path) if imported.startswith(("jbptt.engine.", "jax.extend"))]
            assert not [one for one in used if one.removeprefix("jbptt.") in MODULES or "jax.extend" in one], name
            assert all(neighbour == "engine" for neighbour in neighbours(name) if neighbour.startswith("engine")), name


def test_the_map_for_contributors_shows_every_room():
    """In CONTRIBUTING.md, one row for each floor; the core's in its order."""
    rows = re.findall(r"^\| (\w+) \| (`.*) \|$", PAGE.read_text(), re.MULTILINE)
    shown = {name: re.findall(r"`([\w.]+)`", rooms) for name, rooms in rows}
    wanted = {name: sorted(room[len(name) + 1 :] for room in MODULES if room.startswith(f"{name}.")) for name in FLOORS}
    assert shown.pop("core") == CORE
    assert {name: sorted(rooms) for name, rooms in shown.items()} == {name: wanted[name] for name in FLOORS[1:]}


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_downward(name):
    for other in neighbours(name):
        assert floor(other) <= floor(name), f"{name} imports {other}, which is upstairs"
        if floor(name) == floor(other) == 0:
            assert CORE.index(other) < CORE.index(name), f"{name} imports {other}, which is a later room"


def test_linear_algebra_knows_nothing_of_gradients():
    """The wing `analysis.linalg` stands on the core and on itself."""
    wing = [name for name in MODULES if name.startswith("analysis.linalg.")]
    assert len(wing) >= 3
    for name in wing:
        assert {other for other in neighbours(name) if floor(other) > 0} <= {*wing}, name


def test_no_circles():
    tuple(TopologicalSorter({name: set(neighbours(name)) for name in MODULES}).static_order())


REEXPORTED = {"testing"}  # rooms that show their users what lives in others, as `x as x`


def test_names_are_imported_from_where_they_live():
    """Not through a room that happens to import them too."""
    homes = {name: {*_bound(path)} for name, path in MODULES.items()}
    for path in [*MODULES.values(), *Path(__file__).parent.rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            home = module.removeprefix("jbptt.")
            if home != module and home in homes and home not in REEXPORTED | {"engine", "clipping"}:
                astray = [a.name for a in node.names if a.name not in homes[home] and f"{home}.{a.name}" not in homes]
                assert not astray, f"{path.name} imports {astray} through {home}"


def _bound(path):
    """The names that a module itself defines."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            yield from (part.id for part in ast.walk(node) if isinstance(part, ast.Name))


@pytest.mark.parametrize("name", MODULES)
def test_no_module_is_named_like_its_function(name):
    assert name.split(".")[-1] not in {node.name for node in public_functions(MODULES[name])}


@pytest.mark.parametrize("name", MODULES)
def test_public_functions_explain_themselves(name):
    for node in ast.parse(MODULES[name].read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name}.{node.name} has no docstring"
    assert ast.get_docstring(ast.parse(MODULES[name].read_text())), f"{name} has no docstring"


def test_many_parameters_have_a_reason():
    """Of more than six the docstring lists them under `Args:`, or says a word on its arguments; not in the report."""
    for name in MODULES:
        for node in ast.walk(ast.parse(MODULES[name].read_text())) if FLOORS[floor(name)] != "report" else ():
            if isinstance(node, ast.FunctionDef):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                reason = re.search(r"Args:|arguments", ast.get_docstring(node) or "")
                assert len(given) <= 6 or reason, f"{name}.{node.name} has {len(given)} parameters, and no reason"


def test_modules_stay_small():
    sizes = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    sizes.pop("report.plots")  # a function for each picture
    assert {name: size for name, size in sizes.items() if size > 400} == {}


LAZY = ("jbptt", "jbptt.analysis", "jbptt.clipping", "jbptt.experiments")  # import a name when asked for it


@pytest.mark.parametrize("package", LAZY)
def test_a_lazy_package_keeps_what_it_tells_type_checkers(package):
    """The same names, from the same modules; nothing else, and words for what is not there."""
    door = importlib.import_module(package)
    told = {
        alias.name: node.module
        for node in ast.walk(ast.parse(Path(door.__file__).read_text()))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("jbptt")
        for alias in node.names
        if alias.name != "lazy"
    }
    assert sorted(told) == door.__all__ == dir(door)
    for name, home in told.items():
        value = getattr(door, name)
        if inspect.ismodule(value):
            assert value.__name__ == f"{home}.{name}"
        else:
            assert value is getattr(importlib.import_module(home), name), name
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'full_bttp'"):
        _ = door.full_bttp


CONTRACT = """
analysis cells clipping experiments interop plots powers tasks testing truncation
Batch Carry Estimate Estimator Loss Params Step
scan unroll full_bptt truncated_bptt gated_bptt randomized_bptt adaptive_bptt Plan choose_plan
rtrl snap rflo uoro influence_structure InfluenceStructure
adjoints gradient_flow lag_profile truncation_curve diagnose find_nonfinite compare measure_cost
step_jacobians jacobian_products lyapunov_spectrum train train_in_chunks grid sweep load_sweep
learning_study LearningStudy
Adjoints LagProfile TruncationCurve Diagnosis NonFinite Comparison Cost JacobianProducts LyapunovSpectrum History
TrainingChunk SweepStopped
"""


def test_public_names():
    """The contract of names, its result types and public modules, and no more."""
    assert jbptt.__all__ == sorted(CONTRACT.split())
    assert jbptt.__version__ == importlib.metadata.version("jbptt")


def test_lazy_packages_wait_for_nothing():
    """Whoever trains does not load the remedies, who clips inside a step not optax; a star takes all."""
    result = in_a_fresh_process(
        "import sys, jbptt\njbptt.clipping.clip_cotangent; assert 'optax' not in sys.modules\n"
        "jbptt.train; assert 'jbptt.experiments.remedies' not in sys.modules\n"
        "from jbptt.experiments import *; compare_remedies, Remedies\n"
        "jbptt.analysis.gate_paths; assert 'jbptt.analysis.window_lengths' not in sys.modules\n"
        "for door in (jbptt.analysis, jbptt.experiments):\n"
        "    assert not {*dir(door)} & {*dir(jbptt)}, 'an alias at the top'\n"
    )
    assert result.returncode == 0, result.stderr


def test_what_was_not_imported_is_no_attribute():
    """Neither the modules behind the public names nor what the package itself imports."""
    result = in_a_fresh_process(
        "import jbptt\nfor name in ('recurrence', 'gate_paths', 'types', 'report', 'estimators'):\n"
        "    try: getattr(jbptt, name)\n    except AttributeError: continue\n    raise SystemExit(name)\n"
        "from jbptt import *; from jbptt import validation; cells.rnn, full_bptt, validation"
    )
    assert result.returncode == 0, result.stderr


def in_a_fresh_process(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_importing_needs_nothing_optional_and_changes_nothing():
    result = in_a_fresh_process(
        "import sys, jax; before = dict(jax.config.values); import jbptt\n"
        "for name in dir(jbptt): getattr(jbptt, name)\n"
        "assert dict(jax.config.values) == before\n"
        "assert not jax._src.xla_bridge._backends, 'a backend was started'\n"
        f"print(sorted({OPTIONAL!r} & {{name.split('.')[0] for name in sys.modules}}))"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_optional_packages_are_imported_where_they_are_used():
    for name, path in MODULES.items():
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        for node in top:
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not OPTIONAL & {module.split(".")[0] for module in modules}, f"{name} imports {modules} at the top"


@pytest.mark.parametrize("storey", usual(["core"], FLOORS))
def test_doctests(storey):
    """In single precision, as a user's first session has it."""
    absent = {room for room, package in INTEROP.items() if importlib.util.find_spec(package) is None}
    rooms = [name for name in MODULES if FLOORS[floor(name)] == storey and name not in absent]
    names = [f"jbptt.{name}" for name in rooms]
    result = in_a_fresh_process(
        "import doctest, importlib\n"
        f"results = [doctest.testmod(importlib.import_module(name)) for name in {names!r}]\n"
        "print(sum(r.attempted for r in results)); raise SystemExit(sum(r.failed for r in results))"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(result.stdout.split()[-1]) >= {"core": 5, "analysis": 5}.get(storey, 0)


def test_every_module_can_be_imported():
    for info in pkgutil.walk_packages([str(ROOT)], "jbptt."):
        if not info.name.endswith("__main__"):
            importlib.import_module(info.name)


def test_what_the_usual_run_leaves_out_has_a_case_there():
    """A function's only case is never `more`, and whoever names another names one of the usual run."""

    def item(name, *stand_in, more=True):
        markers = [SimpleNamespace(args=()), SimpleNamespace(args=stand_in)] if more else []  # of the case, of all
        return SimpleNamespace(
            path=Path("test_here.py"),
            originalname=name,
            nodeid=name,
            get_closest_marker=lambda _: markers[0] if markers else None,
            iter_markers=lambda _: iter(markers),
        )

    usual_one, check = item("test_a", more=False), conftest.check_that_every_promise_is_touched
    check([usual_one, item("test_a"), item("test_b", "test_a"), item("test_b", "test_here::test_a")])
    check([usual_one, item("test_b", "test_there::test_a")])  # of files that are not asked for nothing is known
    for left_out in (item("test_b"), item("test_b", "test_c"), item("test_b", "test_here::test_c")):
        with pytest.raises(pytest.UsageError, match="test_b is not in the usual run, and no case of"):
            check([usual_one, left_out])
