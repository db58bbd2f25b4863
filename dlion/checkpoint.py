"""Checkpoints on disk: written so that what looks like a checkpoint is one, and read so that what is not is named.

Law: owns one directory of checkpoint folders. Knows arrays, byte strings and JSON; knows no node, no strategy, no
clock. Never pickles. A folder is written under a temporary name, every file in it is flushed to the disk, and only
then does it get its real name; so a crash at any instant leaves the earlier checkpoints and at most a leftover whose
name begins with a dot, which the next write sweeps away.

    checkpoint-00000007/
      model.safetensors    the weights, one tensor per name of the layout: what ``export`` hands out
      state.safetensors    every other array (optimizer, residuals, generator states, ...)
      blobs.safetensors    byte strings (unacknowledged messages), as arrays of uint8
      manifest.json        format, meta, and size and SHA-256 of the three; its last member is its own SHA-256
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from dlion import tensorfile
from dlion.tensors import Layout, Tensors

FORMAT = 1
MANIFEST = "manifest.json"
MODEL, STATE, BLOBS = "model.safetensors", "state.safetensors", "blobs.safetensors"
MANIFEST_BYTES_MAX = 16 << 20
SPOOLED_BYTES_MIN = 1 << 20
_PREFIX, _PARTIAL = "checkpoint-", ".partial-"

Array = npt.NDArray[np.generic]


class CheckpointFailed(Exception):  # noqa: N818 - the name says what happened, as in "the checkpoint failed"
    """A checkpoint could not be written (disk full, not permitted). The earlier ones stand; training can go on."""

    exit_code: ClassVar[int] = 73


class Damaged(Exception):  # noqa: N818
    """What lies at ``path`` cannot be used as the checkpoint asked for; ``why``: truncated, altered, another model."""

    exit_code: ClassVar[int] = 65

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"checkpoint {path}: {why}")
        self.path = path
        self.why = why


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """All that a peer needs to go on from a moment.

    ``meta`` is JSON (step, incarnation, peer, run, config hash, cursors, ...; no NaN); ``model`` is added to it on
    writing: the digest of the layout. ``arrays`` are NumPy arrays of any plain number type and shape, ``blobs`` byte
    strings or memoryviews. Whoever hands these to ``CheckpointStore.write`` guarantees that none of them changes
    until it returns: copies, or buffers that nobody writes meanwhile. It may then be called in any thread.
    """

    meta: Mapping[str, Any]
    weights: Tensors
    arrays: Mapping[str, Array] = field(default_factory=dict)
    blobs: Mapping[str, bytes | memoryview] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A checkpoint folder as listed: its meta and size, or why its manifest cannot be read."""

    path: Path
    meta: Mapping[str, Any] = field(default_factory=dict)
    nbytes: int = 0
    damage: str = ""


@dataclass(frozen=True, eq=False)
class Found:
    """The newest usable checkpoint, if any, and those that were passed over on the way to it, newest first."""

    checkpoint: Checkpoint | None
    path: Path | None
    passed_over: tuple[Damaged, ...]


class CheckpointStore:
    """The last ``keep`` checkpoints in ``directory`` (created on the first write). One writer at a time."""

    def __init__(self, directory: str | Path, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"checkpoints to keep: expected at least 1, got {keep}")
        self.directory = Path(directory)
        self.keep = keep

    def paths(self) -> list[Path]:
        """Checkpoint folders, oldest first, whatever is in them."""
        if not self.directory.is_dir():
            return []
        numbered = sorted((_number(path), path) for path in self.directory.iterdir())
        return [path for number, path in numbered if number >= 0]

    def write(self, state: Checkpoint) -> Path:
        """Make ``state`` durable and return its folder; at most one tensor is copied at a time.

        Raises CheckpointFailed when the disk refuses; nothing is left then that could be taken for a checkpoint.
        """
        meta = dict(state.meta) | {"model": state.weights.layout.digest}
        json.dumps(
            meta, allow_nan=False
        )  # a meta that is not JSON is the caller's bug: say so before touching the disk
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in self.directory.glob(_PARTIAL + "*"):
                shutil.rmtree(leftover)
            last = max((_number(path) for path in self.paths()), default=-1)
            final = self.directory / f"{_PREFIX}{last + 1:08d}"
            partial = self.directory / f"{_PARTIAL}{final.name}"
            with self._undone_on_error(partial, final):
                partial.mkdir()
                _fill(partial, state, meta)
                partial.rename(final)
                _sync(self.directory)
        except OSError as error:
            raise CheckpointFailed(
                f"cannot write a checkpoint into {self.directory}: {error.strerror or error}; "
                "the earlier ones are untouched; free some space or choose another directory"
            ) from error
        for old in self.paths()[: -self.keep]:
            with suppress(OSError):  # the new one is safe, which is what was asked; the next write tries again
                self._discard(old)
        return final

    def spool(self, array: Array) -> Array:
        """A copy of ``array`` in a file without a name, where the system can drop it from memory whenever it likes: so
        a checkpoint that waits for the disk takes none of ours. Small ones, and all where the disk refuses (``write``
        will say so), are copied in memory."""
        if array.nbytes < SPOOLED_BYTES_MIN:
            return array.copy()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory, buffering=0) as file:
                tensorfile.put(file.fileno(), array)
                return np.memmap(file, array.dtype, "r", shape=array.shape)
        except OSError:
            return array.copy()

    def latest(self, expect: Mapping[str, Any] | None = None) -> Found:
        """The newest checkpoint that is whole and whose meta agrees with ``expect`` (``model``, ``run``, ...)."""
        passed_over: list[Damaged] = []
        for path in reversed(self.paths()):
            try:
                return Found(load(path, expect), path, tuple(passed_over))
            except Damaged as damage:
                passed_over.append(damage)
        return Found(None, None, tuple(passed_over))

    def entries(self) -> list[Entry]:
        """All folders, oldest first; reads manifests only, so a flaw in the big files shows in ``verify``."""
        return [_entry(path) for path in self.paths()]

    def verify(self) -> dict[Path, Damaged | None]:
        """Every folder, oldest first, read in full and held against its hashes."""
        return {path: _flaw(path) for path in self.paths()}

    def export(self, target: str | Path, source: Path | None = None) -> Path:
        """Write the weights of ``source`` (default: the newest whole checkpoint) to ``target`` as plain safetensors.

        Raises Damaged when there is nothing whole to export, CheckpointFailed when ``target`` cannot be written.
        """
        if source is None:
            whole = [path for path, flaw in self.verify().items() if flaw is None]
            if not whole:
                raise Damaged(self.directory, "no whole checkpoint here")
            source = whole[-1]
        verify(source)
        target = Path(target)
        partial = target.with_name(f".export-{target.name}")
        try:
            shutil.copyfile(source / MODEL, partial)
            _sync(partial)
            partial.replace(target)
            _sync(target.parent)
        except OSError as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise CheckpointFailed(f"cannot export to {target}: {error.strerror or error}") from error
        return target

    @contextmanager
    def _undone_on_error(self, partial: Path, final: Path) -> Iterator[None]:
        """On any error both names are gone: what the disk refused to flush may be whole in memory only."""
        try:
            yield
        except BaseException:
            with suppress(OSError):
                self._discard(final)
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _discard(self, path: Path) -> None:
        """Take the name away first, so that a folder half deleted never looks like a damaged checkpoint."""
        if path.exists():
            doomed = self.directory / f"{_PARTIAL}old-{path.name}"
            path.rename(doomed)
            shutil.rmtree(doomed)


def verify(path: Path, expect: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Hold every file of the folder against the manifest, which is returned; raises Damaged, saying what is wrong."""
    manifest = _manifest(path)
    meta = manifest["meta"]
    for key, wanted in (expect or {}).items():
        if meta.get(key) != wanted:
            raise Damaged(path, f"wrong {key}: has {meta.get(key)!r}, expected {wanted!r}")
    for name, recorded in manifest["files"].items():
        try:
            size, digest = tensorfile.digest(path / name)
        except OSError as error:
            raise Damaged(path, f"{name}: cannot be read ({error.strerror})") from error
        if size != recorded["bytes"]:
            kind = "truncated" if size < recorded["bytes"] else "longer than written"
            raise Damaged(path, f"{name}: {kind}, {size} of {recorded['bytes']} bytes")
        if digest != recorded["sha256"]:
            raise Damaged(path, f"{name}: altered, its hash is not the one written down")
    return manifest


def load(path: Path, expect: Mapping[str, Any] | None = None) -> Checkpoint:
    """Verify and read one checkpoint folder. Raises Damaged."""
    manifest = verify(path, expect)
    try:
        layout = Layout(tuple(manifest["names"]), tuple(tuple(shape) for shape in manifest["shapes"]))
        weights = Tensors(layout, tensorfile.read_flat(path / MODEL, layout.size))
        arrays = tensorfile.read(path / STATE)
        blobs = {name: array.tobytes() for name, array in tensorfile.read(path / BLOBS).items()}
    except (OSError, ValueError, KeyError) as error:
        raise Damaged(path, f"whole, yet cannot be read: {error}") from error
    return Checkpoint(manifest["meta"], weights, arrays, blobs)


def _fill(folder: Path, state: Checkpoint, meta: Mapping[str, Any]) -> None:
    blobs = {name: np.frombuffer(blob, dtype=np.uint8) for name, blob in state.blobs.items()}
    contents: dict[str, Mapping[str, Array]] = {MODEL: state.weights.views, STATE: state.arrays, BLOBS: blobs}
    files = {}
    for name, arrays in contents.items():
        size, digest = tensorfile.write(folder / name, arrays)
        files[name] = {"bytes": size, "sha256": digest}
    layout = state.weights.layout
    body = {"format": FORMAT, "meta": meta, "names": layout.names, "shapes": layout.shapes, "files": files}
    with (folder / MANIFEST).open("xb") as file:
        file.write(_sealed(body))
        file.flush()
        os.fsync(file.fileno())
    _sync(folder)


def _sealed(body: Mapping[str, Any]) -> bytes:
    """``body`` as JSON with its own hash as last member. One body has one such text, so any altered byte shows."""
    text = json.dumps(body, allow_nan=False, indent=1)
    return json.dumps({**body, "sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=1).encode()


def _manifest(path: Path) -> dict[str, Any]:
    try:
        with (path / MANIFEST).open("rb") as file:
            raw = file.read(MANIFEST_BYTES_MAX)
        body = json.loads(raw)
    except OSError as error:
        raise Damaged(path, f"{MANIFEST}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise Damaged(path, f"{MANIFEST}: truncated or altered, not JSON ({error})") from error
    if not isinstance(body, dict) or body.pop("sha256", None) is None:
        raise Damaged(path, f"{MANIFEST}: altered, its hash is missing")
    try:
        intact = _sealed(body) == raw
    except ValueError:  # a number became NaN
        intact = False
    if not intact:
        raise Damaged(path, f"{MANIFEST}: altered, its hash is not the one written down")
    if body["format"] != FORMAT:
        raise Damaged(path, f"format {body['format']} is not known here, only {FORMAT}: use the version that wrote it")
    return body


def _entry(path: Path) -> Entry:
    try:
        manifest = _manifest(path)
    except Damaged as damage:
        return Entry(path, damage=damage.why)
    return Entry(path, manifest["meta"], sum(file["bytes"] for file in manifest["files"].values()))


def _flaw(path: Path) -> Damaged | None:
    try:
        verify(path)
    except Damaged as damage:
        return damage
    return None


def _number(path: Path) -> int:
    digits = path.name.removeprefix(_PREFIX)
    return int(digits) if path.name.startswith(_PREFIX) and digits.isdecimal() and path.is_dir() else -1


def _sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
