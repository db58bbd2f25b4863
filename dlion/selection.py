"""Which entries of a large array matter most, found without sorting it.

Law: magnitudes in, ascending positions out. Knows no encoding, no budget, no block. The array is read in pieces that
stay in a core's cache; only a sample and the chosen entries are ever partitioned. Deterministic: equal magnitudes are
taken in the order in which they lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import numpy.typing as npt

from dlion.tensors import CHUNK, Flat, Layout

Positions = npt.NDArray[np.uint32]

SAMPLE_EVERY = 101
"""Stride of the sample: about 1 %; a prime, so that it seldom walks down one column of a matrix."""
SAMPLE_ALL_BELOW = 1 << 14
"""Arrays up to this size are their own sample: exact at once."""
TINY = np.float32(1.4e-45)
"""The least positive float32: ``key >= TINY`` means ``not zero``."""
_NONE: tuple[Positions, Flat] = np.empty(0, dtype=np.uint32), np.empty(0, dtype=np.float32)


def nonzero(array: npt.NDArray[np.generic], count: int) -> Positions:
    """Ascending positions of the ``count`` entries that are not zero. NumPy finds them as wider integers, hence in
    pieces, and among truths eight times faster than among numbers."""
    found = np.empty(count, dtype=np.uint32)
    at = 0
    for lo in range(0, len(array), CHUNK):
        here = np.flatnonzero(array[lo : lo + CHUNK].astype(np.bool_, copy=False))
        here += lo
        found[at : at + len(here)] = here
        at += len(here)
    return found


class Spectrum:
    """The magnitudes of one array, ready to be asked for its largest entries several times (once per link).

    The *key* of an entry is its magnitude, divided by the largest magnitude of its tensor when ``layout`` is given, or
    multiplied by ``weights`` (same shape as the array) when those are. Zeros are never chosen. What one question found
    is kept, so a later one for fewer entries reads only that: ask for the largest share first. The array must not
    change meanwhile. Raises ValueError when an entry is NaN or infinite.
    """

    def __init__(self, array: Flat, layout: Layout | None = None, weights: Flat | None = None) -> None:
        if layout is not None and layout.size != array.size:
            raise ValueError(f"layout has {layout.size} entries, the array {array.size}")
        if weights is not None and weights.shape != array.shape:
            raise ValueError(f"weights have shape {weights.shape}, the array {array.shape}")
        self.array = array
        self.weights = weights
        self.layout = layout
        self.scanned = 0
        """Entries read so far."""
        self._scratch: Flat = np.empty(min(CHUNK, array.size), dtype=np.float32)
        self._found: tuple[Positions, Flat] | None = None
        self._found_key = np.float32(np.inf)

    @cached_property
    def _pieces(self) -> list[tuple[int, int, np.float32]]:
        """(start, stop, unit) of every cache-sized piece; tensors of zeros only are left out."""
        if self.layout is None:
            size = self.array.size
            return [(lo, min(lo + CHUNK, size), np.float32(1)) for lo in range(0, size, CHUNK)]
        pieces: list[tuple[int, int, np.float32]] = []
        self.scanned += self.array.size
        for start, stop in zip(self.layout.offsets, self.layout.offsets[1:], strict=False):
            cuts = [(lo, min(lo + CHUNK, stop)) for lo in range(start, stop, CHUNK)]
            peak = max((self._peak(lo, hi) for lo, hi in cuts), default=0.0)
            if peak > 0.0:
                pieces.extend((lo, hi, np.float32(peak)) for lo, hi in cuts)
        return pieces

    def _peak(self, lo: int, hi: int) -> float:
        piece = self.array[lo:hi]
        peak = max(float(piece.max()), -float(piece.min()))
        _finite_or_raise(peak)
        return peak

    def _keys(self) -> Iterator[tuple[int, Flat]]:
        """(start, keys) piece by piece; the keys lie in a scratch that the next piece overwrites."""
        self.scanned += self.array.size
        for lo, hi, unit in self._pieces:
            keys = self._scratch[: hi - lo]
            np.abs(self.array[lo:hi], out=keys)
            if self.weights is not None:
                np.multiply(keys, self.weights[lo:hi], out=keys)
            elif unit != 1.0:
                np.divide(keys, unit, out=keys)
            yield lo, keys

    @cached_property
    def _sample(self) -> Flat:
        """Sorted keys of a strided sample (of everything, where the array is small)."""
        step = self._sample_step
        picked = []
        for lo, hi, unit in self._pieces:
            first = lo + -lo % step
            keys = np.abs(self.array[first:hi:step])
            if self.weights is not None:
                keys *= self.weights[first:hi:step]
            elif unit != 1.0:
                keys /= unit
            picked.append(keys)
        if not picked:
            return np.empty(0, dtype=np.float32)
        return np.sort(picked[0] if len(picked) == 1 else np.concatenate(picked))

    @property
    def _sample_step(self) -> int:
        return 1 if self.array.size <= SAMPLE_ALL_BELOW else SAMPLE_EVERY

    def at_least(self, key: float) -> tuple[Positions, Flat]:
        """Ascending positions of all non-zero entries whose key is ``key`` or more, and their keys."""
        threshold = np.maximum(np.float32(key), TINY)
        if self._found is not None and self._found_key <= threshold:
            positions, keys = self._found
            self.scanned += len(keys)
            keep = keys >= threshold
            return positions[keep], keys[keep]
        return self._collect(threshold, self.array.size) or _NONE

    def top(self, count: int) -> tuple[Positions, Flat]:
        """Ascending positions of the ``count`` largest entries (all that are not zero, if fewer), and their keys."""
        if count <= 0:
            return _NONE
        if self._found is not None and (len(self._found[0]) >= count or self._found_key <= TINY):
            self.scanned += len(self._found[0])
            return _trim(*self._found, count)
        expected = count / self._sample_step
        slack = 0.0 if self._sample_step == 1 else 4.0 + 4.0 * expected**0.5
        for rank in (expected + slack, 4.0 * (expected + slack)):
            threshold = self._sampled_key(rank)
            found = self._collect(threshold, 4 * count + 64 * SAMPLE_EVERY)
            if found is None:
                break
            if len(found[0]) >= count or threshold <= TINY:
                self._found, self._found_key = found, threshold
                return _trim(*found, count)
        return self._exact(count)

    def _sampled_key(self, rank: float) -> np.float32:
        place = len(self._sample) - int(rank)
        return np.maximum(self._sample[place], TINY) if 0 <= place < len(self._sample) else TINY

    def _collect(self, threshold: np.float32, count_max: int) -> tuple[Positions, Flat] | None:
        """All entries with key >= threshold; None as soon as they are more than ``count_max``."""
        positions: list[Positions] = []
        kept: list[Flat] = []
        total = 0
        mask = np.empty(len(self._scratch), dtype=np.bool_)
        for lo, keys in self._keys():
            chosen = mask[: len(keys)]
            np.less(keys, threshold, out=chosen)
            np.logical_not(chosen, out=chosen)  # so that NaN is among the chosen, and noticed
            here = chosen.nonzero()[0]
            if len(here) == 0:
                continue
            kept.append(keys[here])
            places = here.astype(np.uint32)
            places += np.uint32(lo)
            positions.append(places)
            total += len(here)
            if total > count_max:
                return None
        found = _joined(positions, kept)
        if len(found[1]):
            _finite_or_raise(float(found[1].max()))
        return found

    def _exact(self, count: int) -> tuple[Positions, Flat]:
        """Fallback when the sample misleads (ties, clusters): the exact key by two radix counts, then one scan."""
        threshold = self._kth_key(count)
        positions: list[Positions] = []
        kept: list[Flat] = []
        ties: list[Positions] = []
        ties_left = above = 0
        for lo, keys in self._keys():
            here = np.flatnonzero(keys > threshold)
            above += len(here)
            kept.append(keys[here])
            positions.append((here + lo).astype(np.uint32))
            if ties_left < count and threshold > 0:
                equal = np.flatnonzero(keys == threshold)[: count - ties_left]
                ties_left += len(equal)
                ties.append((equal + lo).astype(np.uint32))
        tied, _ = _joined(ties, [])
        tied = tied[: count - above]
        found, found_keys = _joined(positions, kept)
        merged = np.concatenate((found, tied))
        order = np.argsort(merged, kind="stable")
        return merged[order], np.concatenate((found_keys, np.full(len(tied), threshold)))[order]

    def _kth_key(self, count: int) -> np.float32:
        """The exact key of rank ``count``, 0 when the array is shorter: bits of floats >= 0 order as integers."""
        high = np.zeros(1 << 16, dtype=np.int64)
        for _, keys in self._keys():
            _finite_or_raise(float(keys.max()))
            high += np.bincount(keys.view(np.uint32) >> 16, minlength=1 << 16)
        from_top = np.cumsum(high[::-1])
        if from_top[-1] < count:
            return np.float32(0)
        bucket = (1 << 16) - 1 - int(np.searchsorted(from_top, count))
        wanted = count - (int(from_top[-1]) - int(np.cumsum(high)[bucket]))
        low = np.zeros(1 << 16, dtype=np.int64)
        for _, keys in self._keys():
            bits = keys.view(np.uint32)
            inside = bits[bits >> 16 == bucket]
            low += np.bincount(inside & 0xFFFF, minlength=1 << 16)
        rest = (1 << 16) - 1 - int(np.searchsorted(np.cumsum(low[::-1]), wanted))
        return np.uint32(bucket << 16 | rest).view(np.float32)


def _finite_or_raise(peak: float) -> None:
    if not peak < float("inf"):
        raise ValueError("an entry is NaN or infinite")


def _joined(positions: list[Positions], keys: list[Flat]) -> tuple[Positions, Flat]:
    if len(positions) == 1:
        return positions[0], keys[0] if keys else np.empty(0, dtype=np.float32)
    return (
        np.concatenate(positions) if positions else np.empty(0, dtype=np.uint32),
        np.concatenate(keys) if keys else np.empty(0, dtype=np.float32),
    )


def _trim(positions: Positions, keys: Flat, count: int) -> tuple[Positions, Flat]:
    """The ``count`` largest of what was found; ties are taken from the front."""
    surplus = len(positions) - count
    if surplus <= 0:
        return positions, keys
    threshold = np.partition(keys, surplus)[surplus]
    keep = keys > threshold
    keep[np.flatnonzero(keys == threshold)[: count - np.count_nonzero(keep)]] = True
    return positions[keep], keys[keep]
