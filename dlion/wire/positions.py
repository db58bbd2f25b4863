"""Ascending positions <-> Elias-Fano bytes.

Law: arrays and bytes only. The lengths are those of ``blocks.index_bytes``; nothing about them is on the wire.

A position is cut in two: its ``low`` lower bits are packed as they are; of the rest, the n-th position sets bit
(rest + n) of a bitmap. Where that would be longer than a plain bitmap of the range, it is the plain bitmap.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dlion.blocks import low_bits

Bytes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.uint32]


def write(indices: Indices, size: int) -> tuple[Bytes, ...]:
    """Byte arrays that follow each other on the wire; ``index_bytes(len(indices), size)`` bytes in all."""
    count = len(indices)
    if count == 0:
        return ()
    low = low_bits(count, size)
    if low == 0:
        bitmap = np.zeros(size, dtype=np.bool_)
        bitmap[indices] = True
        return (np.packbits(bitmap),)
    bitmap = np.zeros(count + ((size - 1) >> low) + 1, dtype=np.bool_)
    bitmap[(indices >> np.uint32(low)) + np.arange(count, dtype=np.uint32)] = True
    return _write_low(indices, low), np.packbits(bitmap)


def read(data: Bytes, count: int, size: int) -> Indices:
    """Inverse of ``write``; ``data`` has ``index_bytes(count, size)`` bytes. ValueError unless strictly ascending
    and below ``size``, with as many as were announced."""
    if count == 0:
        return np.empty(0, dtype=np.uint32)
    low = low_bits(count, size)
    packed = (count * low + 7) // 8
    places = np.flatnonzero(np.unpackbits(data[packed:]).view(np.bool_)).astype(np.uint32)
    if len(places) != count:
        raise ValueError(f"{len(places)} positions where {count} were announced")
    if low == 0:
        indices = places
    else:
        places -= np.arange(count, dtype=np.uint32)
        places <<= np.uint32(low)
        places |= _read_low(data[:packed], count, low)
        indices = places
        if not (indices[1:] > indices[:-1]).all():
            raise ValueError("positions are not strictly ascending")
    if indices[-1] >= size:
        raise ValueError(f"position {indices[-1]} in a range of {size}")
    return indices


def _width(low: int) -> int:
    """Bytes that hold ``low`` bits: 1, 2 or 4."""
    return 1 if low <= 8 else 2 if low <= 16 else 4


def _write_low(indices: Indices, low: int) -> Bytes:
    width = _width(low)
    lower = (indices & np.uint32((1 << low) - 1)).astype(f">u{width}")
    bits = np.unpackbits(lower.view(np.uint8).reshape(-1, width), axis=1)
    return np.packbits(bits[:, 8 * width - low :])


def _read_low(data: Bytes, count: int, low: int) -> Indices:
    width = _width(low)
    bits = np.zeros((count, 8 * width), dtype=np.uint8)
    bits[:, 8 * width - low :] = np.unpackbits(data, count=count * low).reshape(count, low)
    return np.packbits(bits, axis=1).view(f">u{width}").reshape(count).astype(np.uint32)
