"""A sweep's results in an Icechunk repository: one atomic commit for each chunk of runs.

Below the root stands a group for each combination of static settings; in it an array for each
output, `[runs, ...]`, one Zarr chunk for each chunk of runs, with a checksum. The root's attribute
`jbptt` holds the manifest as JSON. Nothing in a store is executed.
"""

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jbptt.sweeps.chunks import Chunk, chunks_of
from jbptt.sweeps.manifests import FORMAT, check_same, made_with
from jbptt.sweeps.points import Combination, numbered
from jbptt.sweeps.results import Results
from jbptt.sweeps.run_plans import RunPlan

LOCK = "jbptt.lock"
BRANCH = "main"


class Store:
    """An open repository, this process its only writer on a local path."""

    def __init__(self, repository: Any, words: str, manifest: dict[str, Any]):
        self.repository, self.words, self.manifest = repository, words, manifest
        self.plans: dict[int, RunPlan] = {}  # by combination, of those that were begun

    def unfinished(self, results: Results) -> list[Chunk]:
        """Reads what is finished into `results`; the chunks that are left, or damaged.

        Damaged ones are named in a warning, and taken out of the store.
        """
        left, damaged, self.plans = _read(self.repository, self.words, results)
        if damaged:
            self._forget(damaged, list(results.arrays))
        return left

    def plan(self, number: int, plan: RunPlan, results: Results) -> None:
        """Keeps the plan of a combination, and makes room for its runs."""
        from zarr.codecs import Crc32cCodec, ZstdCodec

        combination, name = results.runs.combinations[number], group_name(number)
        length = len(combination.indices)

        def array(group, of, values, dims, chunk):
            return group.create_array(
                of,
                shape=(length, *values.shape[1:]),
                chunks=(min(chunk, length), *(max(size, 1) for size in values.shape[1:])),
                dtype=values.dtype,
                compressors=[ZstdCodec(level=1), Crc32cCodec()],
                dimension_names=("run", *dims),
            )

        with self._commit(f"plan of {name}: {plan}") as root:
            said = {"plan": plan._asdict(), "static": combination.settings}
            attributes = {of: json.dumps(value) for of, value in said.items()}
            group = root.create_group(name, attributes=attributes)
            for of, values in results.arrays.items():
                array(group, of, values, results.dims[of], plan.chunk)
            array(group, "finished", results.finished, (), plan.chunk)
            array(group, "run", combination.indices, (), length)[:] = combination.indices
            for of, values in results.runs.columns.items():
                own = values[combination.indices]
                dims = [f"{of}_{i}" for i in range(own.ndim - 1)]
                array(group, of, own, dims, length)[:] = own

    def write(self, chunk: Chunk, outputs: Mapping[str, np.ndarray], width: int) -> None:
        """Keeps the outputs of a chunk, all or nothing."""
        name, own = group_name(chunk.number), slice(chunk.start, chunk.stop)
        what = f"{name}: runs {chunk.start} to {chunk.stop - 1}"
        with self._commit(what, {"width": width, **made_with()}) as root:
            for of, values in outputs.items():
                root[name][of][own] = values
            root[name]["finished"][own] = True

    def _forget(self, damaged: list[Chunk], outputs: list[str]) -> None:
        """Takes these chunks away, since Zarr reads a chunk at the edge before it writes to it."""
        from zarr.core.sync import sync

        with self._commit(f"{len(damaged)} damaged chunks taken away") as root:
            for chunk in damaged:
                assert chunk.plan is not None
                name, row = group_name(chunk.number), chunk.start // chunk.plan.chunk
                for of in (*outputs, "finished"):
                    place = "/".join(map(str, ["c", row, *[0] * (root[name][of].ndim - 1)]))
                    sync(root.store.delete(f"{name}/{of}/{place}"))

    def begin(self) -> None:
        """An empty sweep; what the repository held before stays in its history."""
        with self._commit("a sweep begins", mode="w") as root:
            root.attrs["jbptt"] = json.dumps(self.manifest)

    @contextlib.contextmanager
    def _commit(
        self, words: str, metadata: dict[str, Any] | None = None, mode: Literal["a", "w"] = "a"
    ) -> Iterator[Any]:
        """The root group, to be written to; all of it is kept at the end, or nothing.

        Raises:
          OSError: it could not be written.
        """
        import zarr
        from icechunk import IcechunkError

        try:
            session = self.repository.writable_session(BRANCH)
            yield zarr.open_group(session.store, mode=mode)
            session.commit(words, metadata=metadata)
        except (IcechunkError, OSError) as error:
            raise OSError(
                f"{self.words} could not be written: {_first_line(error)}; what was kept before is "
                "in it, and the same call goes on from there"
            ) from error


def loaded(store: Any) -> Any:
    """The dataset of a store; what is missing or damaged is not finished in it."""
    words = _words(store)
    if isinstance(store, str | Path) and not Path(store).is_dir():
        raise ValueError(f"{words} is no folder; name that of a sweep")
    repository = _repository(store, words, make=False)
    manifest = read_manifest(repository, words)
    if manifest is None:
        raise ValueError(f"{words} is empty; name that of a sweep")
    what = manifest["sweep"]
    coords = {
        name: (tuple(of["dims"]), np.asarray(of["values"], of["dtype"]))
        for name, of in what["points"].items()
    }
    outputs = what["outputs"]
    runs = numbered(what["dims"], coords, set(what["static"]))
    shapes = {n: jax.ShapeDtypeStruct(of["shape"], of["dtype"]) for n, of in outputs.items()}
    results = Results(runs, shapes, {name: tuple(of["dims"]) for name, of in outputs.items()})
    plans = _read(repository, words, results)[2]
    return results.dataset(plans)


def _read(
    repository: Any, words: str, results: Results
) -> tuple[list[Chunk], list[Chunk], dict[int, RunPlan]]:
    """Reads what is finished into `results`; what chunks are left, which are damaged, the plans.

    A damaged one is named in a warning.
    """
    import zarr

    runs, left, damaged, plans = results.runs, [], [], {}
    root = zarr.open_group(repository.readonly_session(BRANCH).store, mode="r")
    for number, combination in enumerate(runs.combinations):
        length = len(combination.indices)
        if (name := group_name(number)) not in root:
            left.append(Chunk(number, 0, length))
            continue
        group: Any = root[name]
        plan = plans[number] = RunPlan(**json.loads(str(group.attrs["plan"])))
        for chunk in chunks_of(number, length, plan):
            own = slice(chunk.start, chunk.stop)
            try:
                if np.asarray(group["finished"][own]).all():
                    outputs = {of: group[of][own] for of in results.arrays}
                    results.put(combination.indices[own], outputs)
                    continue
            except Exception as error:  # of Zarr, its codecs or Icechunk: no class in common
                damaged.append(chunk)
                warnings.warn(
                    f"{words}: runs {chunk.start} to {chunk.stop - 1}{_of(combination)} are "
                    f"damaged ({_first_line(error)})",
                    stacklevel=2,
                )
            left.append(chunk)
    return left, damaged, plans


def group_name(number: int) -> str:
    """Of a combination of static settings."""
    return f"runs-{number:04d}"


def _of(combination: Combination) -> str:
    return f" of {combination}" if combination.settings else ""


def _first_line(error: Exception) -> str:
    """What happened, without the places in Icechunk where it did."""
    lines = [line.strip(" x").strip() for line in str(error).splitlines()]
    return next(filter(None, lines), type(error).__name__)


@contextlib.contextmanager
def opened(store: Any, manifest: dict[str, Any], changed: str) -> Iterator[Store]:
    """The store of this sweep, new or to go on with; on a local path nobody else writes meanwhile.

    Raises:
      ValueError: it holds something else, another sweep, or one with other settings; another
        process writes to it; it was written by a newer version.
      OSError: it cannot be written.
    """
    words = _words(store)
    with contextlib.ExitStack() as stack:
        if isinstance(store, str | Path):
            path = Path(store).absolute()
            stack.enter_context(_locked(path, words))
            if not path.exists() or not any(path.iterdir()):
                _make_folder(path, words, manifest)
                yield Store(_repository(path, words), words, manifest)
                return
        kept = Store(_repository(store, words), words, manifest)
        before = read_manifest(kept.repository, words)
        if before is None or changed == "restart":
            kept.begin()
        else:
            check_same(before, manifest, words, changed)
        yield kept


def _make_folder(path: Path, words: str, manifest: dict[str, Any]) -> None:
    """A repository with a manifest in it, beside its place and then moved there: never half."""
    beside = path.with_name(path.name + ".new")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        Store(_repository(beside, words), words, manifest).begin()
        if path.exists():
            path.rmdir()
        beside.rename(path)
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)
        raise


@contextlib.contextmanager
def _locked(path: Path, words: str) -> Iterator[None]:
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


def _repository(store: Any, words: str, make: bool = True) -> Any:
    """The Icechunk repository; a new one where there is none."""
    import icechunk

    config = icechunk.RepositoryConfig.default()
    config.inline_chunk_threshold_bytes = 0  # a file for each chunk, so that one is lost alone
    try:
        if isinstance(store, str | Path):
            icechunk.set_logs_filter("error")  # it warns of two writers, who are refused here
            store = icechunk.local_filesystem_storage(str(store))
            icechunk.set_logs_filter(None)
        if icechunk.Repository.exists(store):
            return icechunk.Repository.open(store, config=config)
        if make:
            return icechunk.Repository.create(store, config=config)
    except icechunk.IcechunkError as error:
        raise OSError(f"{words} cannot be opened: {_first_line(error)}") from error
    raise ValueError(f"{words} is no Icechunk repository; name that of a sweep")


def read_manifest(repository: Any, words: str) -> dict[str, Any] | None:
    """What a store says of its sweep; None where nothing was ever written.

    Raises:
      ValueError: it is no sweep's, damaged, or of a newer version.
    """
    import zarr

    if len(list(repository.ancestry(branch=BRANCH))) == 1:
        return None
    try:
        root = zarr.open_group(repository.readonly_session(BRANCH).store, mode="r")
        manifest = json.loads(str(root.attrs["jbptt"]))
        number = manifest["format"]
    except Exception as error:
        raise ValueError(
            f"{words} is no sweep's, or its manifest is damaged ({_first_line(error)}); name "
            "another"
        ) from error
    if not isinstance(number, int) or number > FORMAT:
        raise ValueError(
            f"{words} was written in format {number}, and this jbptt reads up to {FORMAT}; "
            "install a newer one"
        )
    return manifest


def _words(store: Any) -> str:
    return f"store {store}" if isinstance(store, str | Path) else "store"
