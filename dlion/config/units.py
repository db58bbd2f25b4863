"""What people write for seconds, bits per second and bytes, as numbers.

Law: text in, number out. ``90``, ``"90s"``, ``"5m"``, ``"0.2ms"``; ``5e6``, ``"50Mbit"``; ``4096``, ``"64MiB"``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated

from msgspec import Meta

_NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([a-zA-Z/]*)\s*\Z")

_SECONDS: Mapping[str, float] = {
    "": 1.0,
    "us": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "min": 60.0,
    "h": 3600.0,
    "d": 86400.0,
}
_BITS: Mapping[str, float] = {"": 1.0, "bit": 1.0, "kbit": 1e3, "Mbit": 1e6, "Gbit": 1e9, "Tbit": 1e12}
_BITS_PER_S: Mapping[str, float] = {**_BITS, **{f"{unit}/s": factor for unit, factor in _BITS.items() if unit}}
_BYTES = {"": 1.0, "B": 1.0} | {
    f"{prefix}{suffix}": base ** (power + 1)
    for power, prefix in enumerate("kMGT")
    for suffix, base in (("B", 1000.0), ("iB", 1024.0))
}
_BYTES["KiB"] = 1024.0


def _scaled(raw: object, factors: Mapping[str, float]) -> float:
    if isinstance(raw, int | float) and not isinstance(raw, bool):
        return float(raw)
    match = _NUMBER.match(raw) if isinstance(raw, str) else None
    if match is None or match[2] not in factors:
        raise ValueError(raw)
    return float(match[1]) * factors[match[2]]


def seconds(raw: object) -> float:
    """Seconds; ValueError when ``raw`` is no duration."""
    return _scaled(raw, _SECONDS)


def bits_per_s(raw: object) -> float:
    """Bits per second; ValueError when ``raw`` is no rate."""
    return _scaled(raw, _BITS_PER_S)


def size_bytes(raw: object) -> int:
    """Bytes; ValueError when ``raw`` is no size or not a whole number of bytes."""
    size = _scaled(raw, _BYTES)
    if size != int(size):
        raise ValueError(raw)
    return int(size)


def number(raw: object) -> float:
    """A plain number; ValueError for anything else."""
    return _scaled(raw, {"": 1.0})


UNITS: Mapping[str, tuple[Callable[[object], float], str]] = {
    "seconds": (seconds, 'a duration like 90, "90s", "5m" or "0.2ms"'),
    "bits_per_s": (bits_per_s, 'a rate like "50Mbit", "1Gbit" or 5e6 (bits per second)'),
    "bytes": (size_bytes, 'a size like 4096, "64kB" or "64MiB"'),
    "number": (number, "a number"),
}
"""Unit -> its parser and the words for what it takes."""

Seconds = Annotated[float, Meta(ge=0, extra={"unit": "seconds"})]
PositiveSeconds = Annotated[float, Meta(gt=0, extra={"unit": "seconds"})]
Bytes = Annotated[int, Meta(gt=0, extra={"unit": "bytes"})]
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
