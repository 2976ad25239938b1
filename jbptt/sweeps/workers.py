"""What a worker does: it takes a function once, and computes many chunks of its runs."""

import contextlib
import hashlib
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jbptt.sweeps.programs import number_settings

MOST_FUNCTIONS = 8
_FUNCTIONS: OrderedDict[str, Callable] = OrderedDict()


def packed(run_fn: Callable) -> bytes:
    """The function as bytes, what it closes over included.

    Raises:
      ValueError: it cannot be pickled.
    """
    import cloudpickle

    try:
        return cloudpickle.dumps(run_fn)
    except Exception as error:  # whatever __reduce__ of the user's objects raises
        raise ValueError(
            f"run_fn must be picklable for an executor, got {run_fn!r}: {error}; make what cannot "
            "be pickled (files, locks, generators, keys of JAX) inside run_fn"
        ) from error


def in_worker(function: bytes, settings: dict[str, Any], work: Callable, *arguments: Any) -> Any:
    """`work(run_fn, *arguments)` under these settings; programs stay compiled for the next
    call.
    """
    digest = hashlib.sha256(function).hexdigest()
    run_fn = _FUNCTIONS.pop(digest, None) or pickle.loads(function)
    _FUNCTIONS[digest] = run_fn
    while len(_FUNCTIONS) > MOST_FUNCTIONS:
        _FUNCTIONS.popitem(last=False)
    with _configured(settings):
        return work(run_fn, *arguments)


@contextlib.contextmanager
def _configured(settings: dict[str, Any]) -> Iterator[None]:
    """These settings of JAX for a while, in this thread alone where JAX can do that."""
    before = number_settings()
    with contextlib.ExitStack() as stack:
        for name, value in settings.items():
            if value == before[name]:
                continue
            local = getattr(jax, name.removeprefix("jax_"), None)
            if local is not None:
                stack.enter_context(local(value))
                continue
            jax.config.update(name, value)
            stack.callback(jax.config.update, name, before[name])
        yield
