"""Checkpoints on disk: whatever happens to the writer or to the files, what is read back is whole or is named."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from dlion import checkpoint, tensorfile
from dlion.checkpoint import Checkpoint, CheckpointFailed, CheckpointStore, Damaged
from dlion.tensors import Layout, Tensors


def sample(step: int = 1, size: int = 6) -> Checkpoint:
    rng = np.random.default_rng(step)
    weights = Tensors.of({"layer.weight": rng.normal(size=(2, size)), "layer.bias": rng.normal(size=size)})
    arrays = {
        "residual/b": rng.normal(size=7).astype(np.float32),
        "moments": np.asfortranarray(rng.normal(size=(3, 5))),
        "cursor": np.array(9, dtype=np.int64),
        "empty": np.zeros((0, 4), dtype=np.uint32),
        "big-endian": np.arange(4, dtype=">f4"),
        "mask": np.array([True, False]),
    }
    meta = {"step": step, "peer": "a1", "cursors": {"b1": [3, 4]}, "rng": {"state": 2**127 - 1}, "note": "ö"}
    return Checkpoint(meta, weights, arrays, {"unacked/b1/4": b"\x00\xff", "nothing": b"", "view": memoryview(b"abc")})


def assert_same(found: Checkpoint, wanted: Checkpoint) -> None:
    assert found.meta == dict(wanted.meta) | {"model": wanted.weights.layout.digest}
    assert found.weights.layout == wanted.weights.layout
    np.testing.assert_array_equal(found.weights.flat, wanted.weights.flat)
    assert list(found.arrays) == list(wanted.arrays)
    for name, array in wanted.arrays.items():
        assert found.arrays[name].shape == array.shape
        assert found.arrays[name].dtype == array.dtype.newbyteorder("<")
        np.testing.assert_array_equal(found.arrays[name], array)
    assert found.blobs == {name: bytes(blob) for name, blob in wanted.blobs.items()}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "deep" / "er")
    path = store.write(sample(5))
    found = store.latest({"peer": "a1", "model": sample().weights.layout.digest})
    assert found.path == path and found.passed_over == ()
    assert found.checkpoint is not None
    assert_same(found.checkpoint, sample(5))
    assert found.checkpoint.weights.flat.flags.writeable
    (entry,) = store.entries()
    assert entry.meta["step"] == 5 and not entry.damage
    assert entry.nbytes == sum(f.stat().st_size for f in path.iterdir() if f.suffix == ".safetensors")


def test_an_empty_or_missing_directory_has_no_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "none")
    assert store.latest().checkpoint is None
    assert store.entries() == [] and store.verify() == {}
    with pytest.raises(Damaged, match="no whole checkpoint"):
        store.export(tmp_path / "x.safetensors")


def test_only_the_last_k_are_kept_and_numbers_go_on(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in range(4):
        store.write(sample(step))
    assert [entry.meta["step"] for entry in store.entries()] == [2, 3]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["checkpoint-00000002", "checkpoint-00000003"]
    with pytest.raises(ValueError, match="at least 1"):
        CheckpointStore(tmp_path, keep=0)


def test_every_file_is_loadable_by_safetensors_and_export_is_named_as_the_layout(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run")
    path = store.write(sample(3))
    state = load_file(path / "state.safetensors")
    np.testing.assert_array_equal(state["moments"], sample(3).arrays["moments"])
    model = load_file(store.export(tmp_path / "model.safetensors"))
    assert set(model) == {"layer.weight", "layer.bias"}
    for name, array in sample(3).weights.views.items():
        np.testing.assert_array_equal(model[name], array)


class Killed(BaseException):
    """The process is gone: nothing after this runs."""


def fail_at(patch: pytest.MonkeyPatch, name: str, nth: int, error: Callable[[], BaseException]) -> list[int]:
    """Make the ``nth`` call of ``os.name`` raise; returns the count of calls so far, in a list of one."""
    calls = [0]
    real = getattr(os, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == nth:
            raise error()
        return real(*args, **kwargs)

    patch.setattr(os, name, wrapped)
    return calls


def calls_of_a_write(directory: Path, name: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        calls = fail_at(patch, name, -1, Killed)
        CheckpointStore(directory).write(sample())
    return calls[0]


@pytest.mark.parametrize("name", ["write", "fsync", "rename"])
def test_killed_at_any_system_call_the_one_before_stands(tmp_path: Path, name: str) -> None:
    """No clean-up runs here, as after SIGKILL: the leftover must not be taken for a checkpoint, and goes later."""
    total = calls_of_a_write(tmp_path / "count", name)
    assert total >= 1
    for nth in range(1, total + 1):
        store = CheckpointStore(tmp_path / str(nth))
        store.write(sample(1))
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, name, nth, Killed)
            patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
            patch.setattr(CheckpointStore, "_discard", lambda self, path: None)
            with pytest.raises(Killed):
                store.write(sample(2))
        found = CheckpointStore(store.directory).latest()
        assert found.checkpoint is not None and found.passed_over == ()
        complete = name == "fsync" and nth == total  # the last flush makes the new *name* durable; all else is there
        assert_same(found.checkpoint, sample(2 if complete else 1))
        store.write(sample(3))
        assert not list(store.directory.glob(".partial*"))


@pytest.mark.parametrize("name", ["write", "fsync", "rename"])
def test_a_refusing_disk_fails_loudly_and_leaves_only_whole_checkpoints(tmp_path: Path, name: str) -> None:
    total = calls_of_a_write(tmp_path / "count", name)
    for nth in range(1, total + 1):
        store = CheckpointStore(tmp_path / str(nth))
        first = store.write(sample(1))
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, name, nth, lambda: OSError(errno.ENOSPC, "No space left on device"))
            with pytest.raises(CheckpointFailed, match="No space left"):
                store.write(sample(2))
        assert list(store.directory.iterdir()) == [first]
        store.write(sample(2))
        assert store.latest().checkpoint is not None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)], check=False, capture_output=True
    )
    if done.returncode:
        pytest.skip(f"tmpfs cannot be mounted here: {done.stderr.decode().strip()}")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_keeps_the_checkpoint_before(small_disk: Path) -> None:
    """A real ENOSPC of the kernel, not a simulated one."""
    store = CheckpointStore(small_disk, keep=5)
    with pytest.raises(CheckpointFailed, match="No space left"):
        for step in range(20):
            store.write(sample(step, size=5000))
    flaws = store.verify()
    assert len(flaws) >= 1 and not any(flaws.values())
    assert not list(small_disk.glob(".partial*"))


FILES = ["manifest.json", "model.safetensors", "state.safetensors", "blobs.safetensors"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(FILES))
def test_any_flipped_bit_is_named_and_the_one_before_used(tmp_path: Path, data: st.DataObject, name: str) -> None:
    store = CheckpointStore(tmp_path / "bits")
    if not store.paths():
        store.write(sample(1))
        store.write(sample(2))
    older, newer = store.paths()
    raw = (newer / name).read_bytes()
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    flipped = bytearray(raw)
    flipped[bit // 8] ^= 1 << bit % 8
    (newer / name).write_bytes(flipped)
    try:
        found = store.latest()
        assert found.path == older
        (damage,) = found.passed_over
        assert damage.path == newer and name in damage.why
        assert damage.exit_code == 65
    finally:
        (newer / name).write_bytes(raw)
    assert store.latest().path == newer


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_truncation_is_named(tmp_path: Path, name: str, share: float) -> None:
    store = CheckpointStore(tmp_path)
    older, newer = store.write(sample(1)), store.write(sample(2))
    raw = (newer / name).read_bytes()
    (newer / name).write_bytes(raw[: int(share * len(raw))])
    found = store.latest()
    assert found.path == older
    assert name in found.passed_over[0].why and "truncated" in found.passed_over[0].why
    flaws = store.verify()
    assert flaws[older] is None and flaws[newer] is not None
    assert store.export(tmp_path / "out.safetensors").read_bytes() == (older / "model.safetensors").read_bytes()
    with pytest.raises(Damaged, match="truncated"):
        store.export(tmp_path / "out.safetensors", newer)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    store = CheckpointStore(tmp_path)
    (store.write(sample()) / name).unlink()
    found = store.latest()
    assert found.checkpoint is None and name in found.passed_over[0].why
    assert bool(store.entries()[0].damage) == (name == "manifest.json")


def test_another_model_is_passed_over_with_both_values(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    older, _ = store.write(sample(1)), store.write(sample(2, size=8))
    mine, other = sample(1).weights.layout.digest, sample(2, size=8).weights.layout.digest
    found = store.latest({"model": mine})
    assert found.path == older
    assert mine in str(found.passed_over[0]) and other in str(found.passed_over[0])


def test_an_unknown_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    store.write(sample())
    monkeypatch.undo()
    assert "format 2" in store.latest().passed_over[0].why


@pytest.mark.parametrize("meta", [{"loss": float("nan")}, {"x": b"bytes"}, {"x": {1, 2}}])
def test_meta_that_is_not_json_is_the_callers_mistake(tmp_path: Path, meta: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        CheckpointStore(tmp_path).write(Checkpoint(meta, sample().weights))
    assert list(tmp_path.iterdir()) == []


def test_objects_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="cannot be saved"):
        CheckpointStore(tmp_path).write(Checkpoint({}, sample().weights, {"x": np.array([object()])}))
    with pytest.raises(ValueError, match="belongs to the format"):
        CheckpointStore(tmp_path).write(Checkpoint({}, sample().weights, {"__metadata__": np.zeros(1)}))
    assert list(tmp_path.iterdir()) == []


def test_writing_takes_no_more_memory_than_one_tensor(tmp_path: Path) -> None:
    """Contiguous arrays are written where they lie; a strided one is copied, alone."""
    layout = Layout(("a", "b", "c"), ((1 << 19,), (1 << 19,), (1 << 19,)))
    weights = Tensors(layout, np.zeros(layout.size, dtype=np.float32))
    strided = {"t": np.zeros((1 << 10, 1 << 9), dtype=np.float32).T, "u": np.zeros((1 << 9, 1 << 9)).T}
    state = Checkpoint({}, weights, strided)
    tensor_bytes = 4 << 19
    tracemalloc.start()
    try:
        CheckpointStore(tmp_path).write(state)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.1 * tensor_bytes


names = st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__")
dtypes = st.sampled_from(["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"])
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(described=st.dictionaries(names, st.tuples(dtypes, shapes), max_size=5))
def test_tensor_files_agree_with_the_reference_implementation(
    tmp_path: Path, described: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    rng = np.random.default_rng(0)
    arrays = {name: rng.integers(0, 2, size=shape).astype(dtype) for name, (dtype, shape) in described.items()}
    path = tmp_path / "x.safetensors"
    path.unlink(missing_ok=True)
    assert tensorfile.write(path, arrays) == tensorfile.digest(path)
    reference = load_file(path)
    mine = tensorfile.read(path)
    assert set(reference) == set(mine) == set(arrays)
    for name, array in arrays.items():
        for other in (reference[name], mine[name]):
            assert other.dtype == array.dtype and other.shape == array.shape
            np.testing.assert_array_equal(other, array)


def test_a_file_that_is_no_tensor_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="over the limit"):
        tensorfile.read(path)


def test_an_export_cut_short_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.write(sample(1))
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, "fsync", 1, Killed)
        with pytest.raises(Killed):
            store.export(tmp_path / "model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, "fsync", 1, lambda: OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(CheckpointFailed, match="cannot export"):
            store.export(tmp_path / "model.safetensors")
    store.write(sample(2))
    assert set(load_file(store.export(tmp_path / "model.safetensors"))) == {"layer.weight", "layer.bias"}
    assert len(store.paths()) == 2 and not list(tmp_path.glob(".*"))


def test_written_in_a_worker_thread_while_others_are_read(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.write(sample(0))
    with ThreadPoolExecutor(1) as worker:
        for step in range(1, 6):
            writing = worker.submit(store.write, sample(step))
            found = store.latest()
            assert found.checkpoint is not None and found.checkpoint.meta["step"] in (step - 1, step)
            writing.result()
