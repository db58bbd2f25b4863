"""Trace files -> ``Rate``: what a link, a device or a peer's presence was over time, as somebody recorded it.

Law: the file formats of rates over time, and nothing else; ``matrices`` reads who-to-whom tables. A file is read whole
or refused with its name and line: a trace with a hole guessed over is not a measurement any more.

``.gz`` and ``.xz`` are opened transparently; ``archive.tar.xz::path/in/it`` names a member of a tar archive.
Looping, offset and scale are the ``Rate``'s: ``read(...).shifted(60).scaled(0.5)``.
"""

from __future__ import annotations

import gzip
import lzma
import math
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from dlion.net.wan import Rate

PACKET_BITS = 1500 * 8
"""One Mahimahi delivery opportunity."""
STEP_S = 0.1
MEMBER = "::"
UNREADABLE = (OSError, EOFError, lzma.LZMAError, tarfile.TarError, zlib.error)

TIME_UNITS: Mapping[str, float] = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0, "h": 3600.0}
RATE_UNITS: Mapping[str, float] = {
    "bit/s": 1.0,
    "kbit/s": 1e3,
    "Mbit/s": 1e6,
    "Gbit/s": 1e9,
    "B/s": 8.0,
    "kB/s": 8e3,
    "MB/s": 8e6,
}
Format = Literal["mahimahi", "s-mbit", "ms-kbit"]
FORMATS: tuple[Format, ...] = ("mahimahi", "s-mbit", "ms-kbit")


FETCH = "fetch it again, or let its name end as it is packed"
MEND = "mend this line, or name the format that the file really has"
ANOTHER = "give another file, or name the format that it really has: docs/traces.md tells which are read"


class TraceError(Exception):
    """A trace file is refused: which one, which line (0: the file as a whole), why, and what to do about it."""

    def __init__(self, path: str, line: int, what: str, advice: str = "") -> None:
        self.path, self.line, self.what = path, line, what
        self.advice = advice or (MEND if line else ANOTHER)
        super().__init__(path, line, what, advice)

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what}" if self.line else f"{self.path}: {self.what}"


class NoTraceError(TraceError):
    """There is no such file, or none that may be read."""

    exit_code: ClassVar[int] = 74


def text(path: str | Path) -> str:
    """The decompressed text of a file or of a tar archive's member; TraceError when there is none."""
    name, _, member = str(path).partition(MEMBER)
    try:
        if member:
            with tarfile.open(name) as archive:
                file = archive.extractfile(member)
                raw = file.read() if file is not None else b""
        else:
            raw = Path(name).read_bytes()
            raw = {".gz": gzip.decompress, ".xz": lzma.decompress}.get(Path(name).suffix, bytes)(raw)
        return raw.decode()
    except KeyError:
        raise TraceError(name, 0, f"no file {member!r} in it", f"dlion trace show {name} names all") from None
    except UnicodeDecodeError as error:
        raise TraceError(str(path), 0, f"not text: {error.reason} at byte {error.start}", FETCH) from None
    except UNREADABLE as error:
        raise _unreadable(str(path), error) from error


def members(path: str | Path) -> list[str]:
    """``path::member`` of every file in a tar archive, in name order."""
    try:
        with tarfile.open(path) as archive:
            return [f"{path}{MEMBER}{name}" for name in sorted(m.name for m in archive.getmembers() if m.isfile())]
    except UNREADABLE as error:
        raise _unreadable(str(path), error) from error


def _unreadable(path: str, error: Exception) -> TraceError:
    if isinstance(error, OSError) and error.strerror is not None:  # a damaged gzip file is an OSError without
        return NoTraceError(path, 0, f"cannot be read: {error.strerror}", "name a file that this user may read")
    why = str(error).partition("\n")[0].rstrip(":")
    return TraceError(path, 0, f"cannot be unpacked: {why}", FETCH)


def rows(path: str | Path, separator: str | None = None) -> Iterator[tuple[int, list[str]]]:
    """(line number, stripped fields) of every line that is neither empty nor begins with #."""
    for number, line in enumerate(text(path).splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, [part.strip() for part in line.split(separator)]


def read(path: str | Path, form: Format, *, loop: bool = True, step_s: float = STEP_S) -> Rate:
    """A bandwidth in bits per second from one of ``FORMATS``; ``step_s`` is the bin width of Mahimahi's packets."""
    match form:
        case "mahimahi":
            return mahimahi(path, step_s=step_s, loop=loop)
        case "s-mbit":
            return timed(path, "s", "Mbit/s", loop=loop)
        case "ms-kbit":
            return timed(path, "ms", "kbit/s", loop=loop)


def mahimahi(path: str | Path, *, step_s: float = STEP_S, loop: bool = True) -> Rate:
    """Each line a millisecond at which one 1500-byte packet may leave (Winstein et al., NSDI 2013), in bits/s.

    Packets are counted in steps of ``step_s`` (the last one takes the remainder), so every byte of the trace is kept.
    As in Mahimahi the period is the last time stamp.
    """
    stamps: list[int] = []
    last = 0
    for number, line in enumerate(text(path).splitlines(), 1):  # a million lines: no call per line but these two
        if line.isdecimal() and (stamp := int(line)) >= last:
            stamps.append(last := stamp)
        elif (field := line.strip()) and not field.startswith("#"):
            found = f"time goes back from {last} to {field} ms" if field.isdecimal() else f"found {field!r}"
            raise TraceError(str(path), number, f"expected whole milliseconds that do not decrease; {found}")
    if not stamps or stamps[-1] == 0:
        raise TraceError(str(path), 0, "no packet later than 0 ms")
    period = stamps[-1] / 1000
    count = max(1, round(period / step_s))
    edges = np.append(np.arange(count) * step_s, period)
    packets, _ = np.histogram(stamps, np.append(np.arange(count) * (step_s * 1000), stamps[-1]))
    values = packets * PACKET_BITS / np.diff(edges)
    if loop:
        return Rate.steps(edges[:-1], values, loop=True, period_s=period)
    return Rate.steps(edges, np.append(values, 0.0), loop=False)


def timed(path: str | Path, time_unit: str, rate_unit: str, *, loop: bool = True) -> Rate:
    """Lines of "time rate" in the units given, separated by blanks or a comma; bits per second."""
    scale_s, scale_bps = _unit(path, time_unit, TIME_UNITS), _unit(path, rate_unit, RATE_UNITS)
    points: list[tuple[float, float]] = []
    for number, fields in rows(path):
        parts = fields[0].split(",") if len(fields) == 1 else [field.rstrip(",") for field in fields]
        if len(parts) != 2:
            raise TraceError(str(path), number, f"expected a time and a rate, found {' '.join(fields)!r}")
        _append(
            points, str(path), number, number_of(path, number, parts[0]) * scale_s, number_of(path, number, parts[1])
        )
    return _rate(path, points, scale_bps, loop)


@dataclass(frozen=True)
class Columns:
    """Which columns of a CSV file are what, and in which unit."""

    time: str
    bandwidth: str
    delay: str | None = None
    time_unit: str = "s"
    bandwidth_unit: str = "Mbit/s"
    delay_unit: str = "ms"


@dataclass(frozen=True)
class Recorded:
    """A link over time: bits per second, and the one-way delay in seconds when the file has it."""

    bandwidth: Rate
    delay_s: Rate | None


def table(path: str | Path, columns: Columns, *, loop: bool = True) -> Recorded:
    """A CSV file whose first line names its columns."""
    lines = rows(path, ",")
    _, names = next(lines, (0, []))
    wanted = [c for c in (columns.time, columns.bandwidth, columns.delay) if c is not None]
    missing = [c for c in wanted if c not in names]
    if missing:
        what = f"no column {', '.join(map(repr, missing))}; there are {', '.join(names) or 'none'}"
        raise TraceError(str(path), 1, what, "say which is the time and which the value (--time, --column)")
    scale_s, scale_bps = _unit(path, columns.time_unit, TIME_UNITS), _unit(path, columns.bandwidth_unit, RATE_UNITS)
    series: list[list[tuple[float, float]]] = [[] for _ in wanted[1:]]
    for number, fields in lines:
        if len(fields) != len(names):
            raise TraceError(str(path), number, f"{len(fields)} fields, but {len(names)} columns")
        time, *values = (number_of(path, number, fields[names.index(c)]) for c in wanted)
        for points, value in zip(series, values, strict=True):
            _append(points, str(path), number, time * scale_s, value)
    bandwidth = _rate(path, series[0], scale_bps, loop)
    if columns.delay is None:
        return Recorded(bandwidth, None)
    return Recorded(bandwidth, _rate(path, series[1], _unit(path, columns.delay_unit, TIME_UNITS), loop))


def presence(path: str | Path) -> dict[str, Rate]:
    """Who is there when, from lines of "ms,add|remove,node" (Bamboo, NSDI 2023): node -> 1.0 while present, else 0.0.

    Nodes are in order of their first coming; a node is absent before that.
    """
    events: dict[str, list[tuple[float, float]]] = {}
    last = 0.0
    for number, fields in rows(path, ","):
        if len(fields) != 3 or fields[1] not in ("add", "remove") or not fields[2]:
            raise TraceError(str(path), number, f"expected ms,add|remove,node, found {','.join(fields)!r}")
        time, there = number_of(path, number, fields[0]) / 1000, float(fields[1] == "add")
        if time < last:
            raise TraceError(str(path), number, f"time goes back from {last:g} to {time:g} s")
        last = time
        changes = events.setdefault(fields[2], [(-1.0, 0.0)])
        if changes[-1][1] == there:
            raise TraceError(str(path), number, f"{fields[2]} is {'already' if there else 'not'} there")
        if changes[-1][0] == time:
            changes.pop()
        changes.append((time, there))
    if not events:
        raise TraceError(str(path), 0, "no events")
    return {node: _rate(path, changes, 1.0, loop=False) for node, changes in events.items()}


def live_count(path: str | Path) -> Rate:
    """How many nodes live, from lines of "date, time, count"; seconds since the earliest.

    Recorders of several zones wrote such files (Bamboo's do), so lines may be out of order: they are sorted, and of
    equal times the last line holds.
    """
    counts: dict[datetime, float] = {}
    for number, fields in rows(path, ","):
        try:
            day, time, count = fields
            counts[datetime.fromisoformat(f"{day} {time}")] = number_of(path, number, count)
        except ValueError:
            raise TraceError(str(path), number, f"expected date, time, count, found {', '.join(fields)!r}") from None
    first = min(counts, default=datetime.min)
    return _rate(path, [((at - first).total_seconds(), counts[at]) for at in sorted(counts)], 1.0, loop=False)


def _unit(path: str | Path, unit: str, known: Mapping[str, float]) -> float:
    if unit not in known:
        raise TraceError(str(path), 0, f"unknown unit {unit!r}, known are {', '.join(known)}")
    return known[unit]


def number_of(path: str | Path, line: int, field: str) -> float:
    try:
        value = float(field)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise TraceError(str(path), line, f"expected a finite number that is not negative, found {field!r}")
    return value


def _append(points: list[tuple[float, float]], path: str, line: int, time: float, value: float) -> None:
    if points and time <= points[-1][0]:
        raise TraceError(path, line, f"time does not increase: {time:g} s after {points[-1][0]:g} s")
    points.append((time, value))


def _rate(path: str | Path, points: list[tuple[float, float]], scale: float, loop: bool) -> Rate:
    if len(points) < (2 if loop else 1):
        raise TraceError(str(path), 0, f"{len(points)} points are too few")
    times, values = zip(*points, strict=True)
    rate = Rate.steps(times, [value * scale for value in values], loop=loop)
    return rate.shifted(times[0]) if loop else rate
