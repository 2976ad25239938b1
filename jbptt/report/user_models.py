"""A user's own model, found by `MODULE:FUNCTION` on the command line."""

import importlib
import importlib.util
import sys
import sysconfig
import traceback
import uuid
from pathlib import Path
from types import ModuleType
from typing import Any

_PACKAGE = Path(__file__).parents[1]
RESULT = ("step", "loss", "params", "carry", "batch")


def load_problem(target: str) -> tuple[Any, ...]:
    """Calls FUNCTION of MODULE (dotted, or the path of a file) and returns
    `(step, loss, params, carry, batch)`.

    The current folder is searched first, as `python` does with a script's.

    Raises:
      ValueError: a target of another form, a module or function that is not there, a function that
        fails or returns something else; says which, with the place in the user's file.
    """
    name, separator, function_name = target.rpartition(":")
    if not separator or not name or not function_name.isidentifier():
        raise ValueError(
            f"the model must be MODULE:FUNCTION or FILE.py:FUNCTION, got {target!r}; wanted, say, "
            "my_model.py:problem"
        )
    function = getattr(_load_module(name), function_name, None)
    if not callable(function):
        raise ValueError(
            f"{name} has no function {function_name!r}; define def {function_name}(): ..."
        )
    try:
        result = function()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{target} failed: {describe(error)}") from error
    if not isinstance(result, tuple) or len(result) != len(RESULT):
        size = f" of {len(result)} entries" if isinstance(result, tuple) else ""
        raise ValueError(
            f"{target} must return a tuple ({', '.join(RESULT)}), got "
            f"{type(result).__name__}{size}; end it with return {', '.join(RESULT)}"
        )
    return result


def _load_module(name: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))
    path = Path(name)
    if path.suffix == ".py":
        if not path.is_file():
            raise ValueError(
                f"{name} is not a file; name a Python file, or a module as package.module:function"
            )
        sys.path.insert(0, str(path.resolve().parent))
    try:
        return _run_file(path) if path.suffix == ".py" else importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(_absent(error, name)) from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"{name} cannot be imported: {describe(error)}") from error


def _absent(error: ModuleNotFoundError, name: str) -> str:
    """Whether it is the user's module that is not found here, or something that it imports."""
    if f"{name}.".startswith(f"{error.name}."):
        return (
            f"no module {error.name!r}; run jbptt from the folder that holds it, or name the file "
            "as FILE.py:FUNCTION"
        )
    return (
        f"{name} imports {error.name!r}, which is not installed where this jbptt is "
        f"({sys.prefix}); install it there, or run jbptt from the folder that holds it if it is a "
        "module of yours"
    )


def _run_file(path: Path) -> ModuleType:
    """Under a name of its own: `queue.py` must not stand in for the standard library's."""
    name = f"_jbptt_model_{uuid.uuid4().hex}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up
    spec.loader.exec_module(module)
    return module


def describe(error: BaseException) -> str:
    """Type, message and the innermost line of the user's own files."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error}"
    places = traceback.extract_tb(error.__traceback__)
    place = next((place for place in reversed(places) if _is_users(place.filename)), places[-1])
    remedy = (
        f"; install it in {sys.prefix}, where this jbptt is"
        if isinstance(error, ModuleNotFoundError)
        else ""
    )
    return (
        f"{type(error).__name__}: {error} ({Path(place.filename).name}, line "
        f"{place.lineno}){remedy}"
    )


def is_own(error: BaseException) -> bool:
    """Whether jbptt itself raised this, whose message needs no place."""
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(_PACKAGE)


def _is_users(filename: str) -> bool:
    foreign = _PACKAGE, *(sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib"))
    return not filename.startswith("<") and not any(
        Path(filename).is_relative_to(folder) for folder in foreign
    )
