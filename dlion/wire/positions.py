"""Ascending positions <-> Elias-Fano bytes.

Law: arrays and bytes only. The lengths are those of ``blocks.index_bytes``; nothing about them is on the wire.

A position is cut in two. Of its upper part, the n-th position sets bit (upper + n) of a bitmap. Its ``low_bits`` lower
bits lie in columns of whole bytes and planes of single bits, because NumPy packs planes twenty times faster than it
packs odd widths. Where all this would be longer than a plain bitmap of the range, it is the plain bitmap.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dlion.blocks import low_bits, low_planes
from dlion.selection import nonzero
from dlion.tensors import CHUNK

Bytes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.uint32]


def write(indices: Indices, size: int) -> list[Bytes]:
    """Byte arrays that follow each other on the wire; ``index_bytes(len(indices), size)`` bytes in all."""
    count = len(indices)
    if count == 0:
        return []
    low = low_bits(count, size)
    if low == 0:
        bitmap = np.zeros(size, dtype=np.bool_)
        bitmap[indices] = True
        return [np.packbits(bitmap)]
    columns, planes = low_planes(count, low)
    parts = [(indices >> np.uint32(8 * n)).astype(np.uint8) for n in range(columns)]
    if 8 * columns > low:
        parts[-1] &= np.uint8((1 << (low & 7)) - 1)
    rest = (indices >> np.uint32(8 * columns)).astype(np.uint8)
    parts += [np.packbits(rest & np.uint8(1 << n)) for n in range(planes)]
    bitmap = np.zeros(count + ((size - 1) >> low) + 1, dtype=np.bool_)
    for lo in range(0, count, CHUNK):
        upper = indices[lo : lo + CHUNK] >> np.uint32(low)
        bitmap[upper + np.arange(lo, lo + len(upper), dtype=np.uint32)] = True
    parts.append(np.packbits(bitmap))
    return parts


def read(data: Bytes, count: int, size: int) -> Indices:
    """Inverse of ``write``; ``data`` has ``index_bytes(count, size)`` bytes. ValueError unless there are as many as
    announced, strictly ascending and below ``size``."""
    if count == 0:
        return np.empty(0, dtype=np.uint32)
    low = low_bits(count, size)
    columns, planes = low_planes(count, low)
    at = columns * count + planes * ((count + 7) >> 3)
    bits = np.unpackbits(data[at:]).view(np.bool_)
    if (there := int(np.count_nonzero(bits))) != count:
        raise ValueError(f"{there} positions where {count} were announced")
    indices = nonzero(bits, count)
    if low:
        indices -= np.arange(count, dtype=np.uint32)
        indices <<= np.uint32(low)
        indices |= _read_low(data[:at], count, columns, planes)
        if not (indices[1:] > indices[:-1]).all():
            raise ValueError("positions are not strictly ascending")
    if indices[-1] >= size:
        raise ValueError(f"position {indices[-1]} in a range of {size}")
    return indices


def _read_low(data: Bytes, count: int, columns: int, planes: int) -> Indices:
    rest = np.zeros(count, dtype=np.uint8)
    at = columns * count
    for n in range(planes):
        bits = np.unpackbits(data[at : at + ((count + 7) >> 3)], count=count)
        bits <<= np.uint8(n)
        rest |= bits
        at += (count + 7) >> 3
    lower = rest.astype(np.uint32)
    lower <<= np.uint32(8 * columns)
    for n in range(columns):
        lower |= data[n * count : (n + 1) * count].astype(np.uint32) << np.uint32(8 * n)
    return lower
