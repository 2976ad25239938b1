"""Icechunk repositories: opened or made, by one writer at a time, and what they say they hold."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jbptt.sweeps.manifests import FORMAT

BRANCH = "main"


@contextlib.contextmanager
def locked(path: Path, words: str) -> Iterator[None]:
    """Refuses a second writer, by a file beside the folder; a lock dies with its process."""
    from filelock import FileLock, Timeout

    if path.exists() and not path.is_dir():
        raise ValueError(f"{words} is a file; name a folder")
    if path.is_dir() and any(path.iterdir()) and not (path / "refs").is_dir():
        raise ValueError(f"{words} holds other files; name a new folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        place = path.with_name(path.name + ".lock")
        place.touch()  # where it cannot be, FileLock would say that another process holds it
        lock = FileLock(place, blocking=False)
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{words} is being written by another process; wait for it, or name another folder"
        ) from None
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{words} cannot be written: {reason}; name another folder") from None
    try:
        yield
    finally:
        lock.release()


def repository_of(store: Any, words: str, make: bool = True) -> Any:
    """The Icechunk repository; a new one where there is none."""
    import icechunk

    config = icechunk.RepositoryConfig.default()
    config.inline_chunk_threshold_bytes = 0  # a file for each chunk, so that one is lost alone
    try:
        if isinstance(store, Path):
            icechunk.set_logs_filter("error")  # it warns of two writers, who are refused here
            store = icechunk.local_filesystem_storage(str(store))
            icechunk.set_logs_filter(None)
        if icechunk.Repository.exists(store):
            return icechunk.Repository.open(store, config=config)
        if make:
            return icechunk.Repository.create(store, config=config)
    except icechunk.IcechunkError as error:
        raise OSError(f"{words} cannot be opened: {first_line(error)}") from error
    raise ValueError(f"{words} is no Icechunk repository; name that of a sweep")


def read_manifest(repository: Any, words: str) -> dict[str, Any] | None:
    """What a store says of its sweep; None where nothing was ever written.

    Raises:
      ValueError: it is no sweep's, damaged, or of a newer version.
    """
    import zarr

    with reading(words):
        if len(list(repository.ancestry(branch=BRANCH))) == 1:
            return None
        session = repository.readonly_session(BRANCH)
    try:
        root = zarr.open_group(session.store, mode="r")
        manifest = json.loads(str(root.attrs["jbptt"]))
        number = manifest["format"]
    except Exception as error:
        raise ValueError(
            f"{words} is no sweep's, or its manifest is damaged ({first_line(error)}); name another"
        ) from error
    if not isinstance(number, int) or number > FORMAT:
        raise ValueError(
            f"{words} was written in format {number}, and this jbptt reads up to {FORMAT}; "
            "install a newer one"
        )
    return manifest


def named(store: Any) -> tuple[Any, str]:
    """A whole path, or the storage itself; and what to call it.

    Raises:
      ValueError: it is neither.
    """
    import icechunk

    if isinstance(store, icechunk.Storage):
        return store, "store"
    if not isinstance(store, str | Path) or not str(store):
        raise ValueError(
            f"store must be a path or an icechunk.Storage, got {store!r}; name a folder"
        )
    return Path(store).expanduser().resolve(), f"store {store}"


def first_line(error: BaseException) -> str:
    """What happened, without the places in Icechunk where it did."""
    lines = [line.strip(" x").strip() for line in str(error).splitlines()]
    return next(filter(None, lines), type(error).__name__)


@contextlib.contextmanager
def reading(words: str) -> Iterator[None]:
    """Icechunk's errors as an OSError that says what cannot be read."""
    from icechunk import IcechunkError

    try:
        yield
    except IcechunkError as error:
        raise OSError(
            f"{words} cannot be read: {first_line(error)}; name another, or look with Icechunk for "
            "an earlier commit in its history"
        ) from error
