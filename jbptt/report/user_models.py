"""A user's own model, found by `MODULE:FUNCTION` on the command line."""

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

RESULT = ("step", "loss", "params", "carry", "batch")


def load_problem(target: str) -> tuple[Any, ...]:
    """Calls FUNCTION of MODULE (dotted, or the path of a file) and returns `(step, loss, params, carry, batch)`.

    The current folder is searched first, as `python` does with a script's.

    Raises:
      ValueError: a target of another form, a module or function that is not there, a function that fails or
        returns something else; says which, with the place in the user's file.
    """
    name, separator, function_name = target.rpartition(":")
    if not separator or not name or not function_name.isidentifier():
        raise ValueError(
            f"the model must be MODULE:FUNCTION or FILE.py:FUNCTION, got {target!r}; wanted, say, my_model.py:problem"
        )
    function = getattr(_load_module(name), function_name, None)
    if not callable(function):
        raise ValueError(f"{name} has no function {function_name!r}; define def {function_name}(): ...")
    try:
        result = function()
    except Exception as error:
        raise ValueError(f"{target} failed: {_where(error)}") from error
    if not isinstance(result, tuple) or len(result) != len(RESULT):
        size = f" of {len(result)} entries" if isinstance(result, tuple) else ""
        raise ValueError(
            f"{target} must return a tuple ({', '.join(RESULT)}), got {type(result).__name__}{size}; end it with "
            f"return {', '.join(RESULT)}"
        )
    return result


def _load_module(name: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))
    try:
        path = Path(name)
        if path.suffix != ".py":
            return importlib.import_module(name)
        sys.path.insert(0, str(path.resolve().parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if not path.is_file() or spec is None or spec.loader is None:
            raise ValueError(f"{name} is not a file; name a Python file, or a module as package.module:function")
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module  # dataclasses and pickles look their module up
        spec.loader.exec_module(module)
        return module
    except ModuleNotFoundError as error:
        raise ValueError(f"no module {error.name!r}, needed for {name}; run it from the folder of your file") from error
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{name} cannot be imported: {_where(error)}") from error


def _where(error: BaseException) -> str:
    """What happened, and the innermost line that is known."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error}"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"
