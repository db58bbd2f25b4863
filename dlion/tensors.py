"""One flat float32 buffer and its layout: the form in which every model lives inside dlion.

Law: knows names, shapes and offsets, and plain arithmetic on flat buffers. Knows no file, no wire, no strategy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

Flat = npt.NDArray[np.float32]

CHUNK = 1 << 15
"""Elements handled at a time by blocked loops: 128 KiB of float32, which stays in a core's own cache."""


@dataclass(frozen=True)
class Layout:
    """Names and shapes of a model's tensors, in the order in which they lie in the flat buffer."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.shapes):
            raise ValueError(f"layout: {len(self.names)} names but {len(self.shapes)} shapes")
        if len(set(self.names)) != len(self.names):
            raise ValueError("layout: tensor names must differ from each other")

    @classmethod
    def of(cls, arrays: Mapping[str, npt.NDArray[np.generic]]) -> Layout:
        return cls(tuple(arrays), tuple(tuple(a.shape) for a in arrays.values()))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Start of each tensor in the flat buffer, and one more entry: the end of the last."""
        ends = [0]
        for shape in self.shapes:
            ends.append(ends[-1] + prod(shape))
        return tuple(ends)

    @cached_property
    def size(self) -> int:
        """Number of float32 entries in the flat buffer."""
        return self.offsets[-1]

    @cached_property
    def digest(self) -> str:
        """Hash of names and shapes: two peers may exchange only when theirs are equal."""
        text = repr((self.names, self.shapes)).encode()
        return hashlib.blake2b(text, digest_size=16).hexdigest()

    def views(self, flat: Flat) -> dict[str, Flat]:
        """Each tensor as a view (no copy) of ``flat``, a float32 array of ``size`` entries."""
        pieces = zip(self.names, self.shapes, self.offsets, self.offsets[1:], strict=False)
        return {name: flat[start:stop].reshape(shape) for name, shape, start, stop in pieces}

    def pack(self, arrays: Mapping[str, npt.NDArray[np.generic]]) -> Flat:
        """A new flat buffer holding ``arrays``; raises ValueError when a name or a shape does not fit."""
        if tuple(arrays) != self.names:
            raise ValueError(f"expected tensors {self.names}, got {tuple(arrays)}")
        flat = np.empty(self.size, dtype=np.float32)
        for name, view in self.views(flat).items():
            if arrays[name].shape != view.shape:
                raise ValueError(f"tensor {name!r}: expected shape {view.shape}, got {arrays[name].shape}")
            view[...] = arrays[name]
        return flat


@dataclass(frozen=True)
class Tensors:
    """A flat buffer together with its layout."""

    layout: Layout
    flat: Flat = field(repr=False)

    def __post_init__(self) -> None:
        if self.flat.dtype != np.float32 or self.flat.shape != (self.layout.size,):
            raise ValueError(
                f"expected float32 of shape ({self.layout.size},), got {self.flat.dtype} of shape {self.flat.shape}"
            )

    @classmethod
    def of(cls, arrays: Mapping[str, npt.NDArray[np.generic]]) -> Tensors:
        layout = Layout.of(arrays)
        return cls(layout, layout.pack(arrays))

    @cached_property
    def views(self) -> dict[str, Flat]:
        return self.layout.views(self.flat)

    def copy(self) -> Tensors:
        return Tensors(self.layout, self.flat.copy())


def add_scaled(target: Flat, source: Flat, scale: float = 1.0) -> None:
    """target += scale * source, in cache-sized pieces so that no model-sized temporary is made."""
    if scale == 1.0:
        np.add(target, source, out=target)
        return
    if scale == -1.0:
        np.subtract(target, source, out=target)
        return
    factor = np.float32(scale)
    if target.size <= CHUNK:
        target += source * factor
        return
    scratch = np.empty(CHUNK, dtype=np.float32)
    for start in range(0, target.size, CHUNK):
        piece = target[start : start + CHUNK]
        np.multiply(source[start : start + CHUNK], factor, out=scratch[: piece.size])
        np.add(piece, scratch[: piece.size], out=piece)


def norm(flat: Flat) -> float:
    """Euclidean norm."""
    return float(np.sqrt(np.dot(flat, flat)))


def disagreement(replicas: Mapping[Any, Flat]) -> float:
    """Largest distance of a replica from the mean of all, relative to the norm of that mean (0 for one replica)."""
    if len(replicas) < 2:
        return 0.0
    mean = np.mean([r.astype(np.float64) for r in replicas.values()], axis=0)
    scale = float(np.linalg.norm(mean)) or 1.0
    return max(float(np.linalg.norm(r - mean)) for r in replicas.values()) / scale


def sketch(flat: Flat) -> str:
    """15 hexadecimal digits that are equal for arrays equal to rounding, and differ (nearly always) for others.

    Of up to 4096 entries: the norm to a hundredth, and four projections on fixed random signs to as much of the norm.
    """
    sample = flat[:: max(1, flat.size // 4096)].astype(np.float64)
    scale = float(np.linalg.norm(sample)) or 1.0
    signs = np.random.default_rng(0).choice((-1.0, 1.0), (4, sample.size))
    found = np.round([np.log(scale), *(signs @ sample / scale)], 2) + 0.0
    return hashlib.blake2b(found.tobytes(), digest_size=8).hexdigest()[:15]


def held_bytes(root: object) -> int:
    """Bytes of the memory that arrays within ``root`` keep alive, through containers and attributes, each once."""
    found: dict[int, int] = {}
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, (str, bytes, bytearray, type)):
            continue
        seen.add(id(each))
        if isinstance(each, (np.ndarray, memoryview)):
            owner, nbytes = _owner(each)
            found[id(owner)] = nbytes
        elif isinstance(each, Mapping):
            waiting.extend(each.values())
        elif isinstance(each, Collection):
            waiting.extend(each)
        else:
            waiting.extend(getattr(each, "__dict__", {}).values())
            waiting.extend(getattr(each, name) for name in getattr(each, "__struct_fields__", ()))
    return sum(found.values())


def _owner(view: object) -> tuple[object, int]:
    """Whose memory it is, and how much that is in all."""
    nbytes = 0
    while isinstance(view, (np.ndarray, memoryview)):
        inner, nbytes = view.base if isinstance(view, np.ndarray) else view.obj, view.nbytes
        if inner is None:
            break
        view = inner
    return view, len(view) if isinstance(view, (bytes, bytearray)) else nbytes
