"""A sweep's store: what is kept, resumed, refused, damaged, killed."""

import functools
import json
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import killed_sweeps
import numpy as np
import pytest
from killed_sweeps import ask, walk
from problems import usual

from jbptt import grid, load_sweep, sweep
from jbptt.sweeps import programs, repositories

icechunk, zarr = pytest.importorskip("icechunk"), pytest.importorskip("zarr")
KEY, MOVED = jax.random.key(3), grid(size=[2, 3], rate=[0.1, 0.5], seed=range(10))


@functools.cache
def of_walk():
    return ask()


@pytest.fixture
def counted(monkeypatch):
    """The runs that are computed, in order; not those to compare with."""
    of_walk()
    real, done = programs.Program.start, []

    def call(self, key, indices, columns):
        done.extend(indices.tolist())
        return real(self, key, indices, columns)

    monkeypatch.setattr(programs.Program, "start", call)
    return done


def chunk_files(path):
    """The files of a store's chunks, by what they hold."""
    return sorted((Path(path) / "chunks").iterdir(), key=lambda file: file.stat().st_mtime_ns)


def test_a_store_holds_the_results_and_computes_nothing_twice(tmp_path, counted):
    path = tmp_path / "deep" / "store"
    wanted = of_walk()
    counted.clear()
    assert ask(store=path).identical(wanted)
    assert set(counted) == set(range(40))
    counted.clear()
    assert ask(store=str(path)).identical(wanted) and counted == []
    assert load_sweep(path).equals(wanted) and load_sweep(path).size.dtype == wanted.size.dtype
    # A stranger opens it without jbptt.
    import xarray

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        repository = icechunk.Repository.open(icechunk.local_filesystem_storage(str(path)))
    runs = xarray.open_zarr(repository.readonly_session("main").store, group="runs-0001", consolidated=False)
    assert runs.path.dims == ("run", "step") and json.loads(runs.attrs["static"]) == {"size": 3}
    np.testing.assert_array_equal(runs.path, wanted.path.sel(size=3).values.reshape(20, 4))
    np.testing.assert_array_equal(runs.rate, np.repeat([0.1, 0.4], 10))
    commits = [info.message for info in repository.ancestry(branch="main")]
    assert len(commits) == 2 + 2 * (1 + 4) and commits[0] == "runs-0001: runs 18 to 19"


def test_a_store_in_memory_and_with_plain_points(counted):
    storage = icechunk.in_memory_storage()
    points = {"rate": np.array([0.5, 0.25, 0.125]), "seed": np.arange(3), "size": [2, 3, 2]}
    ask = functools.partial(sweep, walk, points, key=KEY, static=["size"], store=storage, progress=False)
    found = ask()
    counted.clear()
    assert found.path.dims == ("run", "path_0") and ask().equals(found) and counted == []
    assert load_sweep(storage).equals(found)


def test_a_store_is_read_without_x64():
    storage, run = icechunk.in_memory_storage(), lambda point, key: {"rest": point["seed"] % 7}
    found = sweep(run, grid(seed=[2**40, 1]), key=KEY, store=storage, progress=False)
    with jax.enable_x64(False):
        assert load_sweep(storage).identical(found)


def interrupted(monkeypatch, path, at):
    real = programs.Program.start

    def stopped(self, key, indices, columns):
        if at in indices:
            raise KeyboardInterrupt
        return real(self, key, indices, columns)

    with monkeypatch.context() as patch:
        patch.setattr(programs.Program, "start", stopped)
        with pytest.raises(KeyboardInterrupt, match=r"\d+ of 40 runs are done; they are in store"):
            ask(store=path)


def test_what_was_interrupted_goes_on(tmp_path, monkeypatch, counted, capsys):
    path = tmp_path / "store"
    interrupted(monkeypatch, path, 27)
    half = load_sweep(path)
    done = half.finished.values.ravel()
    assert done.tolist() == [True] * 26 + [False] * 14  # the chunk of runs 26 to 31 was not kept
    assert np.isnan(half.path.values.reshape(40, 4)[26:]).all()
    counted.clear()
    found = ask(store=path, progress=True)
    assert found.identical(of_walk()) and sorted(set(counted)) == list(range(26, 40))
    assert "26 of 40 runs are done" in capsys.readouterr().err


def flip(file):
    """A bit in the middle, among numbers that cannot be compressed: only a checksum notices it."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "a flipped byte": flip,
    "a truncated chunk": lambda file: file.write_bytes(file.read_bytes()[:-3]),
    "an empty chunk": lambda file: file.write_bytes(b""),
    "a lost chunk": lambda file: file.unlink(),
}


@pytest.mark.parametrize("kind", usual(["a truncated chunk"], DAMAGE))
def test_a_damaged_chunk_alone_is_computed_again(tmp_path, kind, counted):
    """Each kind of damage to the file of each array, also of the last chunk, which is not full."""
    path, points = tmp_path / "store", grid(size=[2, 3], rate=[0.1, 0.4], seed=range(4))
    ask = functools.partial(sweep, walk, points, key=KEY, static="size", progress=False, width=3, chunk=6)
    wanted, files = ask(store=path), chunk_files(path)
    assert len(files) == 2 * (3 * 2 + 3)  # of two settings: two chunks of three arrays, and what differs
    for place in range(len(files)):
        copy = tmp_path / "copy"
        shutil.copytree(path, copy)
        DAMAGE[kind](copy / "chunks" / files[place].name)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert ("finished" in load_sweep(copy).coords) == bool(seen)
        counted.clear()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            found = ask(store=copy)
        assert found.identical(wanted)
        words = [str(warning.message) for warning in seen]
        if counted:
            assert len(words) == 1 and len(set(counted)) <= 6 and "are damaged (" in words[0], words
            numbers = words[0].split("runs ")[1].split(" of size")[0].split(" to ")
            offset = 8 * ("size=3" in words[0])
            assert sorted(set(counted)) == [i + offset for i in range(int(numbers[0]), int(numbers[1]) + 1)]
            counted.clear()
            assert ask(store=copy).identical(wanted) and not counted
        else:  # a column of the points, which nothing here reads
            assert not words
        shutil.rmtree(copy)


def changed(**options):
    return lambda path: ask(**{"store": path} | options)


OTHERS = {
    "another version": (changed(version="2"), 'version is "2", was null.*changed="keep"'),
    "another key": (changed(key=jax.random.key(4)), "of another sweep: key is"),
    "other points": (
        lambda path: sweep(
            walk, grid(size=[2, 3], rate=[0.1, 0.5], seed=range(10)), key=KEY, static="size", store=path
        ),
        r"points.rate.values is \[0.1, 0.5\], was \[0.1, 0.4\]",
    ),
    "other names of axes": (changed(dims={"path": "time"}), r'outputs.path.dims is \["time"\], was \["step"\]'),
    "another dtype": (
        lambda path: jax.enable_x64(False)(changed())(path),
        r'outputs.path.dtype is "float32", was "float64"',
    ),
    "other products": (
        lambda path: jax.default_matmul_precision("float32")(changed())(path),
        'jax_default_matmul_precision is "float32", was null',
    ),
    "another chunk": (changed(chunk=5), "chunk must be 6, as the store has it, got 5"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_sweep_is_refused(tmp_path, monkeypatch, name, counted):
    path = tmp_path / "store"
    interrupted(monkeypatch, path, 8)
    counted.clear()
    call, words = OTHERS[name]
    with pytest.raises(ValueError, match=words):
        call(path)
    assert not counted


def test_a_change_that_is_wanted(tmp_path, monkeypatch, counted):
    path = tmp_path / "store"
    interrupted(monkeypatch, path, 8)
    counted.clear()
    ask(store=path, version="2", changed="keep")
    assert 0 not in counted and 39 in counted
    counted.clear()
    ask(store=path, version="2", changed="restart")
    assert set(counted) == set(range(40))
    ask(store=path, version="2")  # it is that version's now
    other = sweep(walk, grid(size=[2], rate=[0.3], seed=[1]), key=KEY, store=path, static="size", changed="restart")
    assert other.path.shape == (1, 1, 1, 4) and load_sweep(path).equals(other)


def write_manifest(path, text):
    repository = repositories.repository_of(path, "store")
    session = repository.writable_session("main")
    zarr.open_group(session.store, mode="a").attrs["jbptt"] = text
    session.commit("edited")


def test_what_is_no_store(tmp_path):
    file, other, empty = tmp_path / "file", tmp_path / "other", tmp_path / "empty"
    file.write_text("x")
    other.mkdir()
    empty.mkdir()
    (other / "thesis.tex").write_text("x")
    for path, words in ((file, "is a file; name a folder"), (other, "holds other files")):
        with pytest.raises(ValueError, match=words):
            ask(store=path)
    assert (other / "thesis.tex").read_text() == "x" and not (tmp_path / "other.lock").exists()
    for path, words in ((file, "is no folder"), (other, "no Icechunk repository"), (tmp_path / "none", "is no folder")):
        with pytest.raises(ValueError, match=words):
            load_sweep(path)
    assert ask(store=empty).identical(of_walk())
    for text, words in (
        ('{"format": 2}', "written in format 2, and this jbptt reads up to 1; install a newer one"),
        ("{", "its manifest is damaged"),
        ("[]", "its manifest is damaged"),
    ):
        write_manifest(empty, text)
        for read in (load_sweep, lambda path: ask(store=path)):
            with pytest.raises(ValueError, match=words):
                read(empty)


def test_nothing_beside_a_store_is_touched(tmp_path):
    """Neither what is called like it, nor by another way to the same folder."""
    for name in ("store.new", "store.lock.d", ".store.jbptt"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("x")
    ask(store=tmp_path / "store")
    (tmp_path / "link").symlink_to(tmp_path / "store")
    assert len(list(tmp_path.glob("*/thesis.tex"))) == 3 and not list(tmp_path.glob(".store.jbptt-*"))
    with repositories.locked(tmp_path / "store", "store"), pytest.raises(ValueError, match="by another process"):
        ask(store=tmp_path / "link", changed="restart")


def test_paths_of_stores(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert ask(store="~/deep/../store/").identical(of_walk()) and (tmp_path / "store" / "refs").is_dir()
    assert load_sweep("store").equals(of_walk())
    for store in ("", 5):
        with pytest.raises(ValueError, match=r"store must be a path or an icechunk.Storage, got"):
            ask(store=store)


def test_a_read_that_fails_is_no_damage(tmp_path, monkeypatch, counted):
    """As of a network that is gone for a moment: nothing is thrown away."""
    path = tmp_path / "store"
    ask(store=path)
    counted.clear()
    with monkeypatch.context() as patch:

        def broken(self, *_):
            raise OSError("connection reset by peer")

        patch.setattr(zarr.Array, "__getitem__", broken)
        for read in (load_sweep, lambda path: ask(store=path)):
            with pytest.raises(OSError, match=r"cannot be read: connection reset by peer; try again"):
                read(path)
    assert ask(store=path).identical(of_walk()) and not counted


@pytest.mark.parametrize("kind", ["manifests", "snapshots"])
def test_damage_beyond_chunks_is_said(tmp_path, kind, counted):
    """What holds many chunks together: nothing is computed, nothing taken away, and a reader is told what to do."""
    path = tmp_path / "store"
    ask(store=path)
    counted.clear()
    newest = max((path / kind).iterdir(), key=lambda file: file.stat().st_mtime_ns)
    for damage in (lambda: newest.write_bytes(newest.read_bytes()[:-20]), newest.unlink):
        damage()
        for read in (load_sweep, lambda path: ask(store=path)):
            with pytest.raises(OSError, match=r"cannot be read: .*(history|try again)") as error:
                read(path)
            assert len(str(error.value).splitlines()) == 1
    assert not counted


def test_many_points_are_kept_once(tmp_path):
    """Not in every commit's copy of the manifest."""
    points = {"rate": np.arange(3000.0), "seed": np.arange(3000)}
    ask = functools.partial(sweep, lambda p, key: {"x": p["rate"] * 2}, points, key=KEY, progress=False, chunk=300)
    found = ask(store=tmp_path / "a", width=300)
    assert load_sweep(tmp_path / "a").equals(found)
    assert max(file.stat().st_size for file in (tmp_path / "a" / "snapshots").iterdir()) < 8000
    with pytest.raises(ValueError, match=r"points\.seed\.sha256 is"):
        sweep(ask.args[0], points | {"seed": np.arange(1, 3001)}, key=KEY, store=tmp_path / "a")


def test_the_widths_that_were_used_are_told(tmp_path, monkeypatch):
    path = tmp_path / "store"
    interrupted(monkeypatch, path, 8)
    found = ask(store=path, width=2)
    some = "3 side by side, in chunks of 6 (some of them 2 side by side)"
    assert found.plan == f"size=2: {some}; size=3: 2 side by side, in chunks of 6"
    assert load_sweep(path).plan == found.plan
    np.testing.assert_allclose(found.path, of_walk().path, rtol=1e-12)


def test_one_writer_at_a_time(tmp_path):
    path = tmp_path / "store"
    code = (
        "import sys, time; from pathlib import Path; from jbptt.sweeps import repositories\n"
        "with repositories.locked(Path(sys.argv[1]), 'store'):\n    print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match="is being written by another process"):
            ask(store=path)
        holder.kill()
    assert ask(store=path).identical(of_walk())  # a lock dies with its process


def in_another_process(function, *arguments):
    """A function of `killed_sweeps`, its arguments as text."""
    command = [sys.executable, killed_sweeps.__file__, function, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_a_store_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError, match=r"store /proc/store cannot be written: .*; name another folder"):
        ask(store="/proc/store")
    path = tmp_path / "store"
    ended = in_another_process("on_a_full_disk", path)
    assert ended.returncode == 0 and "what was kept before is in it" in ended.stdout, ended.stderr[-3000:]
    half = load_sweep(path)
    assert 0 < half.finished.sum() < 40 and ask(store=path).identical(of_walk())


@pytest.mark.parametrize("num_kills", usual([3], [3, 20], full=[200]))
def test_kills_lose_nothing(tmp_path, num_kills):
    """At random moments of a process that sweeps: each next one goes on, and the data are the same in the end."""
    seed = random.SystemRandom().randrange(2**32)
    ended = in_another_process("kill_at_random", tmp_path, num_kills, seed)
    print(ended.stdout)  # the seed, and in which phases the kills fell
    assert ended.returncode == 0 and f"{num_kills} kills" in ended.stdout, (ended.stdout, ended.stderr[-3000:])
