"""Compressed pieces of a flat buffer: selection and quantisation.

Law: pure NumPy on arrays; no wire format, no time. A Block knows what its receiver will add (``values``) and the most
bytes it can take; residuals subtract ``Block.values``, never the raw numbers.

Positions are priced as Elias-Fano codes (``index_bytes``), whose size is known before they are encoded: that is why a
budget can be met without a guess. ``wire`` writes them so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import IntEnum

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from dlion.selection import Positions, Spectrum, nonzero
from dlion.tensors import CHUNK, Flat, Layout, add_scaled

GROUP = 256
"""Entries that share one scale in the integer encodings."""
HEADER_BYTES_MAX = 40
"""What a block's header and its padding can take beyond its body."""
F16_MAX = 65504.0
STEP_MIN = 1e-30
"""Scales below this are so near the smallest floats that a code rounds beyond its range."""
SCALE_MAX = float(np.finfo(np.float32).max) / 128
"""No larger scale is written or accepted: code * scale then stays finite."""


class Encoding(IntEnum):
    F32 = 0
    F16 = 1
    I8 = 2
    I4 = 3


_TOP_CODE: Mapping[Encoding, int] = {Encoding.I8: 127, Encoding.I4: 7}


def value_bytes(encoding: Encoding, count: int) -> int:
    """Bytes of ``count`` values: the scales, then the codes."""
    if encoding is Encoding.F32:
        return 4 * count
    if encoding is Encoding.F16:
        return 2 * count
    codes = count if encoding is Encoding.I8 else (count + 1) // 2
    return codes + 4 * -(-count // GROUP)


def low_bits(count: int, size: int) -> int:
    """Low bits per position in the Elias-Fano code of ``count`` positions below ``size``; 0 stands for a bitmap."""
    if count == 0:
        return 0
    low = (size // count).bit_length() - 1
    return low if low > 0 and count * (low + 1) + ((size - 1) >> low) + 1 < size else 0


def low_planes(count: int, low: int) -> tuple[int, int]:
    """How the low bits lie: (byte columns of ``count`` bytes, bit planes of ceil(count / 8) bytes)."""
    columns, planes = low >> 3, low & 7
    return (columns + 1, 0) if planes * ((count + 7) >> 3) > count else (columns, planes)


def index_bytes(count: int, size: int) -> int:
    """Bytes of ``count`` strictly ascending positions below ``size``: within 1.12 of the entropy from 0.1 % to 10 %."""
    if count == 0:
        return 0
    low = low_bits(count, size)
    if low == 0:
        return (size + 7) >> 3
    columns, planes = low_planes(count, low)
    return columns * count + planes * ((count + 7) >> 3) + ((count + ((size - 1) >> low) + 8) >> 3)


def block_bytes(encoding: Encoding, size: int, count: int | None = None) -> int:
    """The most bytes of a block over ``size`` entries: dense, or sparse with ``count`` of them."""
    if count is None:
        return HEADER_BYTES_MAX + value_bytes(encoding, size)
    return HEADER_BYTES_MAX + value_bytes(encoding, count) + index_bytes(count, size)


class Block(Struct, frozen=True, eq=False, dict=True):
    """Entries of the range [start, start + size) of a flat buffer, all of them or those at ``indices``.

    Beside its fields it keeps what is made of it once: its ``values``, and of one that was heard its bytes (``wire``).
    """

    start: int
    size: int
    encoding: Encoding
    codes: npt.NDArray[np.generic]
    """F32, F16: the numbers; I8: int8; I4: uint8, two codes each (+8, the lower nibble first)."""
    scales: Flat | None
    """One for each ``GROUP`` entries in the integer encodings, else None."""
    indices: npt.NDArray[np.uint32] | None
    """Strictly ascending, relative to ``start``; None: dense."""
    scanned: int = 0
    """Entries looked at to make this block (the simulation's cost model)."""

    @property
    def count(self) -> int:
        return self.size if self.indices is None else len(self.indices)

    @property
    def values(self) -> Flat:
        """What the receiver will add, float32, ``count`` long; the same bits on both sides. Read only."""
        kept = vars(self)
        if (values := kept.get("values")) is None:
            values = kept["values"] = self._decoded()
        return values

    def _decoded(self) -> Flat:
        if self.encoding is Encoding.F32:
            return self.codes  # type: ignore[return-value]
        if self.scales is None:
            return self.codes.astype(np.float32)
        codes = self.codes if self.encoding is Encoding.I8 else _unpack_nibbles(self.codes, self.count)
        values = codes.astype(np.float32)
        whole = len(values) // GROUP
        if whole:
            rows = values[: whole * GROUP].reshape(whole, GROUP)
            np.multiply(rows, self.scales[:whole, None], out=rows)
        if whole < len(self.scales):
            values[whole * GROUP :] *= self.scales[whole]
        return values

    @property
    def nbytes_max(self) -> int:
        """The most bytes this block can add to an encoded message, its header included."""
        return block_bytes(self.encoding, self.size, None if self.indices is None else len(self.indices))

    def add_to(self, flat: Flat, scale: float = 1.0) -> None:
        """flat[range] += scale * values."""
        target = flat[self.start : self.start + self.size]
        if self.indices is None:
            add_scaled(target, self.values, scale)
        else:
            values = vars(self).get("values")
            values = self._decoded() if values is None else values  # not kept: a sparse block is seldom added twice
            for lo in range(0, self.count, CHUNK):
                places = self.indices[lo : lo + CHUNK].astype(np.intp)  # what NumPy would convert to, twice and slowly
                added = target[places]
                piece = values[lo : lo + CHUNK]
                added += piece if scale == 1.0 else piece * np.float32(scale)
                target[places] = added


def dense(array: Flat, encoding: Encoding = Encoding.F32, *, start: int = 0, copy: bool = True) -> Block:
    """All of ``array`` (1-d float32). ``copy`` False: it will not change. Raises ValueError when an entry is NaN or
    infinite."""
    codes, scales = _quantise(array, encoding)
    own = codes.copy() if copy and codes is array else codes
    return Block(start, array.size, encoding, own, scales, None, array.size)


def sparse(
    array: Flat, indices: npt.NDArray[np.integer], encoding: Encoding = Encoding.I8, *, start: int = 0, scanned: int = 0
) -> Block:
    """``array[indices]`` of the range ``array``; indices strictly ascending. Raises ValueError as ``dense`` does."""
    chosen = np.empty(len(indices), dtype=np.float32)
    for lo in range(0, len(indices), CHUNK):
        chosen[lo : lo + CHUNK] = array[indices[lo : lo + CHUNK].astype(np.intp, copy=False)]
    codes, scales = _quantise(chosen, encoding)
    places = indices.astype(np.uint32, copy=False)
    return Block(start, array.size, encoding, codes, scales, places, scanned or len(indices))


def compress(
    array: Flat,
    budget_bytes: int,
    *,
    encoding: Encoding = Encoding.I8,
    start: int = 0,
    scales: Flat | None = None,
    spectrum: Spectrum | None = None,
) -> Block | None:
    """The largest entries of ``array`` that fit ``budget_bytes``; everything, when that fits.

    ``scales`` (same shape) multiplies the magnitudes that are compared, not what is sent. Pass one ``spectrum`` of the
    array to several calls, the largest budget first, and it is scanned once. None: not even one entry fits, or all
    are zero. Raises ValueError when an entry is NaN or infinite.
    """
    count = entries_within(budget_bytes, array.size, encoding)
    if count == array.size:
        return _everything(array, encoding, start)
    spectrum = spectrum or Spectrum(array, weights=scales)
    before = spectrum.scanned
    positions, _ = spectrum.top(count)
    return _chosen(array, positions, encoding, start, spectrum.scanned - before)


def max_n(
    array: Flat,
    layout: Layout,
    budget_bytes: int,
    *,
    n_min: float = 0.85,
    n_fixed: float | None = None,
    encoding: Encoding = Encoding.F32,
    spectrum: Spectrum | None = None,
) -> tuple[Block | None, float]:
    """DLion's Max N (Hong & Chandra, HPDC 2021): of each tensor the entries with |g| >= (1 - N/100) * max|g|.

    N (0 to 100) is the largest that fits ``budget_bytes``, but never below ``n_min``: that floor on what is worth
    saying may exceed the budget. ``n_fixed`` asks for just that N whatever it costs. Returns the block (None when all
    is zero) and the N used. ``spectrum``: as for ``compress``, made with the layout. Raises ValueError likewise.
    """
    count = entries_within(budget_bytes, array.size, encoding) if n_fixed is None else 0
    if count == array.size:
        return _everything(array, encoding, 0), 100.0
    spectrum = spectrum or Spectrum(array, layout)
    before = spectrum.scanned
    positions, keys = spectrum.top(count)
    n_used = 0.0
    if len(keys):
        n_used = 100.0 if len(keys) < count else 100.0 * (1.0 - float(keys.min()))
    floor = n_min if n_fixed is None else n_fixed
    if n_used < floor:
        n_used = floor
        positions, _ = spectrum.at_least(1.0 - floor / 100.0)
    return _chosen(array, positions, encoding, 0, spectrum.scanned - before), n_used


def entries_within(budget_bytes: int, size: int, encoding: Encoding) -> int:
    """How many of ``size`` entries fit ``budget_bytes``: ``size`` when a dense block does, else sparse ones."""
    if block_bytes(encoding, size) <= budget_bytes:
        return size
    fits, too_many = 0, size
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if block_bytes(encoding, size, middle) <= budget_bytes:
            fits = middle
        else:
            too_many = middle
    return fits


def _everything(array: Flat, encoding: Encoding, start: int) -> Block | None:
    """All that is not zero: as positions where zeros are many, else dense."""
    count = int(np.count_nonzero(array))
    if count == 0:
        return None
    if block_bytes(encoding, array.size) <= block_bytes(encoding, array.size, count):
        return dense(array, encoding, start=start)
    return sparse(array, nonzero(array, count), encoding, start=start, scanned=array.size)


def _chosen(array: Flat, positions: Positions, encoding: Encoding, start: int, scanned: int) -> Block | None:
    """Dense when that is no larger: the same entries, and more."""
    if len(positions) == 0:
        return None
    if block_bytes(encoding, array.size) <= block_bytes(encoding, array.size, len(positions)):
        return dense(array, encoding, start=start)
    return sparse(array, positions, encoding, start=start, scanned=scanned)


def _quantise(values: Flat, encoding: Encoding) -> tuple[npt.NDArray[np.generic], Flat | None]:
    if encoding is Encoding.I8 or encoding is Encoding.I4:
        codes, scales = _to_integers(values, _TOP_CODE[encoding])
        return (codes if encoding is Encoding.I8 else _pack_nibbles(codes)), scales
    if not all_finite(values):
        raise ValueError("an entry is NaN or infinite")
    if encoding is Encoding.F32:
        return values, None
    return np.clip(values, -F16_MAX, F16_MAX).astype(np.float16), None


def _to_integers(values: Flat, top: int) -> tuple[npt.NDArray[np.int8], Flat]:
    """Codes in [-top, top] and one scale (largest magnitude / top) per group; a group of zeros has scale 0."""
    count = len(values)
    groups = -(-count // GROUP)
    codes = np.empty(count, dtype=np.int8)
    scales = np.empty(groups, dtype=np.float32)
    scratch, sizes = np.zeros((2, min(CHUNK, groups * GROUP)), dtype=np.float32)
    for lo in range(0, count, CHUNK):
        piece = values[lo : lo + CHUNK]
        first, here = lo // GROUP, -(-len(piece) // GROUP)
        padded = scratch[: here * GROUP]
        padded[: len(piece)] = piece
        padded[len(piece) :] = 0
        rows = padded.reshape(here, GROUP)
        np.abs(padded, out=sizes[: padded.size])  # bits of floats >= 0 order as integers do, and NaN is the largest
        peaks = sizes[: padded.size].view(np.uint32).reshape(rows.shape).max(axis=1).view(np.float32)
        if not np.isfinite(peaks).all():
            raise ValueError("an entry is NaN or infinite")
        steps = np.minimum(peaks / np.float32(top), np.float32(SCALE_MAX))
        scales[first : first + here] = steps
        steps[steps == 0] = 1
        rows /= steps[:, None]
        np.rint(rows, out=rows)
        if steps.min() < STEP_MIN or steps.max() >= SCALE_MAX:  # else rounding cannot exceed the top code
            np.clip(rows, -top, top, out=rows)
        codes[lo : lo + len(piece)] = padded[: len(piece)]
    return codes, scales


def _pack_nibbles(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    raised = np.zeros(len(codes) + len(codes) % 2, dtype=np.int8)
    np.add(codes, 8, out=raised[: len(codes)])
    pairs = raised.view("<u2")
    packed: npt.NDArray[np.uint8] = (pairs | pairs >> 4).astype(np.uint8)
    return packed


def _unpack_nibbles(packed: npt.NDArray[np.generic], count: int) -> npt.NDArray[np.int8]:
    pairs = packed.view(np.uint8).astype("<u2")
    pairs |= pairs << 4
    pairs &= 0x0F0F
    codes = pairs.view(np.int8)
    codes -= 8
    return codes[:count]


def all_finite(values: Flat) -> bool:
    """No NaN and no infinity. One pass without a temporary; only a sum that overflows needs a closer look."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares = float(np.dot(values, values))
    return math.isfinite(squares) or bool(np.isfinite(values).all())
