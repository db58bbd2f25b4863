"""Compressed pieces of a flat buffer: selection and quantisation.

Law: pure NumPy on arrays; no wire format, no time. A Block knows what its receiver will add (``values``) and the most
bytes it can take; residuals subtract ``Block.values``, never the raw numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from dlion.tensors import Flat

GROUP = 256
"""Entries that share one scale in the integer encodings."""


class Encoding(IntEnum):
    F32 = 0
    F16 = 1
    I8 = 2
    I4 = 3


@dataclass(frozen=True, eq=False)
class Block:
    """Entries of the range [start, start + size) of a flat buffer, all of them or those at ``indices``."""

    start: int
    size: int
    encoding: Encoding
    codes: npt.NDArray[np.generic]
    scales: Flat | None
    indices: npt.NDArray[np.uint32] | None
    """Strictly ascending, relative to ``start``; None: dense."""
    scanned: int = 0
    """Entries looked at to make this block (the simulation's cost model)."""

    @property
    def count(self) -> int:
        raise NotImplementedError

    @property
    def values(self) -> Flat:
        """What the receiver will add, float32, ``count`` long. Computed once."""
        raise NotImplementedError

    @property
    def nbytes_max(self) -> int:
        raise NotImplementedError

    def add_to(self, flat: Flat, scale: float = 1.0) -> None:
        """flat[range] += scale * values."""
        raise NotImplementedError


def dense(array: Flat, encoding: Encoding = Encoding.F32, *, start: int = 0) -> Block:
    raise NotImplementedError


def sparse(array: Flat, indices: npt.NDArray[np.uint32], encoding: Encoding = Encoding.I8, *, start: int = 0) -> Block:
    raise NotImplementedError


def compress(
    array: Flat, budget_bytes: int, *, encoding: Encoding = Encoding.I8, start: int = 0, scales: Flat | None = None
) -> Block | None:
    """The most useful part of ``array`` that fits ``budget_bytes``."""
    raise NotImplementedError
