"""A user's own model, found by `MODULE:FUNCTION` on the command line."""

import importlib
import importlib.util
import sys
import sysconfig
import traceback
import uuid
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax

from jbptt.experiments.training import check_batches
from jbptt.learning.one_batch import divided, words_of
from jbptt.learning.trainings import draws_starts
from jbptt.problem import check_problem

_PACKAGE = Path(__file__).parents[1]
RESULT = ("step", "loss", "params", "carry", "batch")
NEEDED = ("step", "loss", "params", "carry", "batches")
OPTIONAL = (
    "heldout",
    "stream",
    "windows",
    "sliding",
    "keep_probs",
    "estimators",
    "learning_rates",
    "extend",
    "seeds",
    "num_updates",
    "num_evals",
    "optimizer",
    "version",
)


class UserModel(NamedTuple):
    """What a user's function returned.

    Attributes:
      problem: step, loss, params, carry and one batch: what is asked of a gradient.
      study: arguments of `learning_study` by name.
      data: what is read, where that is one batch; "" where the study says it.
    """

    problem: tuple[Any, ...]
    study: dict[str, Any]
    data: str = ""


def load_problem(target: str) -> tuple[Any, ...]:
    """`(step, loss, params, carry, batch)` of a user's function; what `load_model` raises."""
    result = _result(target)
    return _one_batch(result) if isinstance(result, dict) else result


def load_model(target: str) -> UserModel:
    """Calls FUNCTION of MODULE (dotted, or the path of a file).

    It returns `(step, loss, params, carry, batch)`, whose examples are then divided into those to
    train on and those held out, or a dict with the arguments of `learning_study`.

    Raises:
      ValueError: a target of another form, a module or function that is not there, a function that
        fails or returns something else, a batch that cannot be divided; says which, with the place
        in the user's file.
    """
    result = _result(target)
    if isinstance(result, dict):
        return UserModel(_one_batch(result), result)
    step, loss, params, carry, batch = result
    common = {"step": step, "loss": loss, "params": params, "carry": carry}
    common |= divided(step, loss, params, carry, batch)
    num_steps, (size, *_), *_ = check_problem(step, loss, params, carry, batch)
    return UserModel(result, common, words_of(num_steps, size))


def source_of(target: str) -> bytes:
    """The text of the file that holds the function; of a module that is no file, its name."""
    name = target.rpartition(":")[0]
    if not name.endswith(".py"):
        spec = importlib.util.find_spec(name)
        name = (spec and spec.origin) or name
    return Path(name).read_bytes() if Path(name).is_file() else name.encode()


def _one_batch(result: dict[str, Any]) -> tuple[Any, ...]:
    """One problem of what is to be trained: the first parameters, the first batch."""
    key = jax.random.key(0)
    params, batches = result["params"], result["batches"]
    params = params(key) if draws_starts(params) else params
    if not callable(batches):
        check_batches(batches)
    batch = batches(key) if callable(batches) else jax.tree.map(lambda a: a[0], batches)
    return result["step"], result["loss"], params, result["carry"], batch


def _result(target: str) -> Any:
    """What the function returns: a tuple of five, or a dict of arguments."""
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
    if isinstance(result, dict):
        missing = [name for name in NEEDED if name not in result]
        unknown = sorted(set(result) - {*NEEDED, *OPTIONAL})
        if missing or unknown:
            said = f"lacks {', '.join(missing)}" if missing else f"holds {', '.join(unknown)}"
            raise ValueError(
                f"{target} returned a dict that {said}; wanted {', '.join(NEEDED)}, and if you "
                f"like {', '.join(OPTIONAL)}, as jbptt.learning_study takes them"
            )
        # A generator could be read once alone.
        lists = {"windows", "sliding", "keep_probs", "learning_rates"}
        return {
            name: tuple(value) if name in lists and isinstance(value, Iterable) else value
            for name, value in result.items()
        }
    if not isinstance(result, tuple) or len(result) != len(RESULT):
        size = f" of {len(result)} entries" if isinstance(result, tuple) else ""
        raise ValueError(
            f"{target} must return a tuple ({', '.join(RESULT)}), got {type(result).__name__}"
            f"{size}; end it with return {', '.join(RESULT)}, or return a dict of "
            f"{', '.join(NEEDED)}"
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
