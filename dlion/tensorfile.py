"""Safetensors files written and read a piece at a time: no second copy of a model in memory.

Law: knows the safetensors format (eight bytes of header length, a JSON header, raw little-endian data) and hashes;
knows nothing of what the arrays mean. The files are ordinary ones that every safetensors library loads. The
library's own writer is not used because it turns all tensors into byte strings before it writes the first.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dlion.tensors import Flat

PIECE_BYTES = 1 << 20
HEADER_BYTES_MAX = 100_000_000
"""The limit of the reference implementation."""

Array = npt.NDArray[np.generic]

_NAMES: Mapping[str, str] = {
    "f8": "F64",
    "f4": "F32",
    "f2": "F16",
    "i8": "I64",
    "i4": "I32",
    "i2": "I16",
    "i1": "I8",
    "u8": "U64",
    "u4": "U32",
    "u2": "U16",
    "u1": "U8",
    "b1": "BOOL",
}
_TYPES: Mapping[str, np.dtype[np.generic]] = {name: np.dtype(f"<{code}") for code, name in _NAMES.items()}


def write(path: Path, arrays: Mapping[str, Array]) -> tuple[int, str]:
    """Write a new file, flush it to the disk, and return its size in bytes and its SHA-256.

    Raises OSError from the disk, TypeError for an array whose type safetensors does not know.
    """
    header = _header(arrays)
    with path.open("xb", buffering=0) as file:
        sink = _Sink(file.fileno())
        sink.put(memoryview(len(header).to_bytes(8, "little") + header))
        for array in arrays.values():
            sink.put(_raw(array))  # bound to no name here: a copy made by _raw is gone before the next
        os.fsync(file.fileno())
    return sink.size, sink.hasher.hexdigest()


def read(path: Path) -> dict[str, Array]:
    """All tensors by name, in the order of the file; ValueError when it is not a safetensors file."""
    header, begin = _open_header(path)
    arrays: dict[str, Array] = {}
    for name, entry in header.items():
        dtype, shape = _TYPES[entry["dtype"]], entry["shape"]
        start = begin + entry["data_offsets"][0]
        arrays[name] = np.fromfile(path, dtype=dtype, count=prod(shape), offset=start).reshape(shape)
    return arrays


def read_flat(path: Path, size: int) -> Flat:
    """The data of a file whose tensors are all float32, as the one buffer of ``size`` entries they lie in."""
    header, begin = _open_header(path)
    if any(entry["dtype"] != "F32" for entry in header.values()):
        raise ValueError(f"{path.name}: expected nothing but F32")
    flat: Flat = np.fromfile(path, dtype="<f4", offset=begin)
    if flat.size != size:
        raise ValueError(f"{path.name}: expected {size} entries, found {flat.size}")
    return flat


def digest(path: Path) -> tuple[int, str]:
    """Size in bytes and SHA-256 of a file, read a piece at a time."""
    with path.open("rb") as file:
        hasher = hashlib.file_digest(file, "sha256")
        return file.tell(), hasher.hexdigest()


def put(descriptor: int, array: Array) -> None:
    """Write the bytes of ``array``, in C order as they lie in memory."""
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    while raw.nbytes:
        raw = raw[os.write(descriptor, raw[:PIECE_BYTES]) :]


def _header(arrays: Mapping[str, Array]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, array in arrays.items():
        code = array.dtype.str[1:]
        if name in entries:
            raise ValueError(f"array {name!r}: this name belongs to the format")
        if code not in _NAMES:
            raise TypeError(f"array {name!r}: type {array.dtype} cannot be saved; expected one of {sorted(_NAMES)}")
        entries[name] = {
            "dtype": _NAMES[code],
            "shape": array.shape,
            "data_offsets": (start, start + array.nbytes),
        }
        start += array.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _open_header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > HEADER_BYTES_MAX:
            raise ValueError(f"{path.name}: a header of {length} bytes is over the limit of {HEADER_BYTES_MAX}")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _raw(array: Array) -> memoryview:
    """The array's bytes, little-endian and in C order; a copy only if they do not lie so already."""
    plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return plain.reshape(-1).view(np.uint8).data


class _Sink:
    """Writes to a file, hashing on the way."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.hasher = hashlib.sha256()
        self.size = 0

    def put(self, raw: memoryview) -> None:
        """Write all of ``raw``: the kernel may take less at a time."""
        while raw.nbytes:
            taken = os.write(self.descriptor, raw[:PIECE_BYTES])
            self.hasher.update(raw[:taken])
            self.size += taken
            raw = raw[taken:]
