"""A sweep's results in an Icechunk repository: one atomic commit for each chunk of runs.

Below the root stands a group for each combination of static settings; in it an array for each
output, `[runs, ...]`, one Zarr chunk for each chunk of runs, with a checksum. The root's attribute
`jbptt` holds the manifest as JSON. Nothing in a store is executed.
"""

import contextlib
import glob
import json
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple
from uuid import uuid4

import jax
import numpy as np

from jbptt.sweeps.chunks import Chunk, chunks_of
from jbptt.sweeps.manifests import check_same
from jbptt.sweeps.points import Combination, Runs, numbered
from jbptt.sweeps.repositories import (
    BRANCH,
    first_line,
    locked,
    named,
    read_manifest,
    reading,
    repository_of,
)
from jbptt.sweeps.results import Results
from jbptt.sweeps.run_plans import RunPlan

POINTS = "points"
DAMAGE = ("checksum", "chunks/", "buffer", "Zstd", "Blosc")
"""What errors say where a chunk's file is not what was written."""


class Store:
    """An open repository, this process its only writer on a local path."""

    def __init__(self, repository: Any, words: str, manifest: dict[str, Any]):
        self.repository, self.words, self.manifest = repository, words, manifest
        self.plans: dict[int, RunPlan] = {}  # by combination, of those that were begun
        self.widths: dict[int, set[int]] = {}

    def unfinished(self, results: Results) -> list[Chunk]:
        """Reads what is finished into `results`; the chunks that are left, or damaged.

        Damaged ones are named in a warning, and taken out of the store.
        """
        left, damaged, self.plans, self.widths = _read(self.repository, self.words, results)
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
            said = {"plan": plan._asdict(), "widths": [], "static": combination.settings}
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
        with self._commit(what, {"width": width, **self.manifest["made_with"]}) as root:
            for of, values in outputs.items():
                root[name][of][own] = values
            root[name]["finished"][own] = True
            if width not in (widths := self.widths.setdefault(chunk.number, set())):
                widths.add(width)
                root[name].attrs["widths"] = json.dumps(sorted(widths))

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

    def begin(self, runs: Runs) -> None:
        """An empty sweep; what the repository held before stays in its history."""
        with self._commit("a sweep begins", mode="w") as root:
            root.attrs["jbptt"] = json.dumps(self.manifest)
            group = root.create_group(POINTS)
            for name, of in self.manifest["sweep"]["points"].items():
                if "values" not in of:  # as every commit has a copy of the manifest
                    group.create_array(name, data=runs.coords[name][1])

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
                f"{self.words} could not be written: {first_line(error)}; what was kept before is "
                "in it, and the same call goes on from there"
            ) from error


def loaded(store: Any) -> Any:
    """The dataset of a store; what is missing or damaged is not finished in it."""
    import zarr

    place, words = named(store)
    if isinstance(place, Path) and not place.is_dir():
        raise ValueError(f"{words} is no folder; name that of a sweep")
    repository = repository_of(place, words, make=False)
    manifest = read_manifest(repository, words)
    if manifest is None:
        raise ValueError(f"{words} is empty; name that of a sweep")
    what = manifest["sweep"]
    with reading(words):
        root: Any = zarr.open_group(repository.readonly_session(BRANCH).store, mode="r")
        coords = {
            name: (
                tuple(of["dims"]),
                np.asarray(of["values"] if "values" in of else root[POINTS][name][:], of["dtype"]),
            )
            for name, of in what["points"].items()
        }
    outputs = what["outputs"]
    runs = numbered(what["dims"], coords, set(what["static"]))
    shapes = {n: jax.ShapeDtypeStruct(of["shape"], of["dtype"]) for n, of in outputs.items()}
    results = Results(runs, shapes, {name: tuple(of["dims"]) for name, of in outputs.items()})
    found = _read(repository, words, results)
    return results.dataset(found.plans, found.widths)


class _Read(NamedTuple):
    """What a store holds beside results: chunks left to compute, the damaged ones of them, and by
    combination the plans and the widths that were used.
    """

    left: list[Chunk]
    damaged: list[Chunk]
    plans: dict[int, RunPlan]
    widths: dict[int, set[int]]


def _read(repository: Any, words: str, results: Results) -> _Read:
    """Reads what is finished into `results`; a damaged chunk is named in a warning.

    Raises:
      OSError: something cannot be read, but not because a chunk is damaged.
    """
    import zarr

    runs, found = results.runs, _Read([], [], {}, {})
    with reading(words):
        root: Any = zarr.open_group(repository.readonly_session(BRANCH).store, mode="r")
        names = set(root.group_keys())
    for number, combination in enumerate(runs.combinations):
        length = len(combination.indices)
        if (name := group_name(number)) not in names:
            found.left.append(Chunk(number, 0, length))
            continue
        with reading(words):
            group = root[name]
        plan = found.plans[number] = RunPlan(**json.loads(str(group.attrs["plan"])))
        found.widths[number] = set(json.loads(str(group.attrs["widths"])))
        whole = Chunk(number, 0, length, plan)
        chunks = chunks_of(number, length, plan)
        try:
            # At once: chunk by chunk Zarr looks up each by itself.
            finished = _outputs(group, whole, ["finished"], words)["finished"]
            outputs = _outputs(group, whole, results.arrays, words)
        except _Damaged:
            finished, outputs = None, {}
        for chunk in chunks:
            own = slice(chunk.start, chunk.stop)
            try:
                if finished is None:
                    done = _outputs(group, chunk, ["finished"], words)["finished"].all()
                    pieces = _outputs(group, chunk, results.arrays, words) if done else {}
                else:
                    done = finished[own].all()
                    pieces = {of: values[own] for of, values in outputs.items()}
            except _Damaged as error:
                found.damaged.append(chunk)
                warnings.warn(
                    f"{words}: runs {chunk.start} to {chunk.stop - 1}{_of(combination)} are "
                    f"damaged ({error})",
                    stacklevel=2,
                )
                done, pieces = False, {}
            if done:
                results.put(combination.indices[own], pieces)
            else:
                found.left.append(chunk)
    return found


class _Damaged(Exception):
    """A chunk's file is not what was written."""


def _outputs(group: Any, chunk: Chunk, names: Iterable[str], words: str) -> dict[str, np.ndarray]:
    """Arrays of a group by name, of the runs of a chunk.

    Raises:
      _Damaged: a file is shorter, other than its checksum says, or gone.
      OSError: anything else.
    """
    own = slice(chunk.start, chunk.stop)
    try:
        return {name: np.asarray(group[name][own]) for name in names}
    except Exception as error:  # of Zarr, its codecs or Icechunk: no class in common
        text = first_line(error)
        if any(word in str(error) for word in DAMAGE):
            raise _Damaged(text) from error
        raise OSError(f"{words} cannot be read: {text}; try again") from error


def group_name(number: int) -> str:
    """Of a combination of static settings."""
    return f"runs-{number:04d}"


def _of(combination: Combination) -> str:
    return f" of {combination}" if combination.settings else ""


@contextlib.contextmanager
def opened(store: Any, manifest: dict[str, Any], runs: Runs, changed: str) -> Iterator[Store]:
    """The store of this sweep, new or to go on with; on a local path nobody else writes meanwhile.

    Raises:
      ValueError: it holds something else, another sweep, or one with other settings; another
        process writes to it; it was written by a newer version.
      OSError: it cannot be written.
    """
    place, words = named(store)
    with contextlib.ExitStack() as stack:
        if isinstance(place, Path):
            stack.enter_context(locked(place, words))
            if not place.exists() or not any(place.iterdir()):
                _make_folder(place, words, manifest, runs)
                yield Store(repository_of(place, words), words, manifest)
                return
        kept = Store(repository_of(place, words), words, manifest)
        before = read_manifest(kept.repository, words)
        if before is None or changed == "restart":
            kept.begin(runs)
        else:
            check_same(before, manifest, words, changed)
        yield kept


def _make_folder(path: Path, words: str, manifest: dict[str, Any], runs: Runs) -> None:
    """A repository with a manifest in it, made beside its place and then moved there: never half.

    What a killed process left of it is swept away, by a name that is nobody else's.
    """
    prefix = f".{path.name}.jbptt-"
    for left in path.parent.glob(f"{glob.escape(prefix)}*"):
        shutil.rmtree(left, ignore_errors=True)
    beside = path.parent / f"{prefix}{uuid4().hex}"
    try:
        Store(repository_of(beside, words), words, manifest).begin(runs)
        if path.exists():
            path.rmdir()
        beside.rename(path)
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)
        raise
