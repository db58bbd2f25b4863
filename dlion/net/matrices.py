"""Tables of who to whom: throughput and latency between regions, and how fast devices are.

Law: file formats in, plain dictionaries of SI numbers out (bits per second, seconds, steps per second). Which of them
become a topology is not decided here. A bad line refuses the file, as in ``traces``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlion.net.traces import TraceError, number_of, rows, text

Pair = tuple[str, str]


@dataclass(frozen=True)
class Matrix:
    """A number per directed pair of names. Pairs that were not measured are absent, never guessed."""

    values: dict[Pair, float]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted({name for pair in self.values for name in pair}))

    def missing(self, names: Iterable[str]) -> list[Pair]:
        """Directed pairs of different ``names`` without a number."""
        wanted = list(names)
        return [(a, b) for a in wanted for b in wanted if a != b and (a, b) not in self.values]


def skyplane(path: str | Path, column: str, *, scale: float = 1.0, tiers: tuple[str, str] | None = None) -> Matrix:
    """One column of a Skyplane grid (src_region, dst_region and tiers, or src, dest) times ``scale``.

    ``tiers`` keeps the rows of one (source, destination) tier, and those that name none; without, a grid of several
    tiers is refused, for its rows would say different things about one pair. A pair measured several times gets the
    mean.
    """
    lines = rows(path, ",")
    _, names = next(lines, (0, []))
    source, target = ("src_region", "dst_region") if "src_region" in names else ("src", "dest")
    target_tier = "dst_tier" if "dst_tier" in names else "dest_tier"
    for wanted in (source, target, "src_tier", target_tier, column):
        if wanted not in names:
            what = f"no column {wanted!r}; there are {', '.join(names) or 'none'}"
            raise TraceError(str(path), 1, what, "give another file: docs/traces.md tells which are read")
    seen: dict[Pair, list[float]] = {}
    found: set[tuple[str, str]] = set()
    for number, fields in lines:
        if len(fields) != len(names):
            raise TraceError(str(path), number, f"{len(fields)} fields, but {len(names)} columns")
        row = dict(zip(names, fields, strict=True))
        found.add(tier := (row["src_tier"], row[target_tier]))
        if tiers is None or tier in (tiers, ("", "")):
            seen.setdefault((row[source], row[target]), []).append(number_of(path, number, row[column]) * scale)
    there = ", ".join("/".join(tier) for tier in sorted(found))
    if tiers is None and len(found) > 1:
        raise TraceError(str(path), 0, f"several tiers: {there}", "choose one with --tier")
    if not seen:
        what = f"nothing of tier {'/'.join(tiers)}; there are {there}" if tiers and found else "an empty grid"
        raise TraceError(str(path), 0, what)
    return Matrix({pair: sum(values) / len(values) for pair, values in seen.items()})


def throughput(path: str | Path, *, tiers: tuple[str, str] | None = None) -> Matrix:
    """Skyplane throughput grid: bits per second as received (its later files misspell the column)."""
    names = text(path).partition("\n")[0].split(",")
    return skyplane(
        path, "throughput_recieved" if "throughput_recieved" in names else "throughput_received", tiers=tiers
    )


def round_trips(path: str | Path, *, tiers: tuple[str, str] | None = None) -> Matrix:
    """Skyplane latency grid: mean round-trip seconds."""
    return skyplane(path, "avg_rtt", scale=1e-3, tiers=tiers)


def square(path: str | Path, *, scale: float = 1e-3) -> Matrix:
    """A square CSV matrix with names on both sides (row to column; blank: not measured) times ``scale``.

    The default turns the city-to-city milliseconds into round-trip seconds. The diagonal is left out.
    """
    lines = rows(path, ",")
    number, (_, *names) = next(lines, (0, [""]))
    if number and not names:
        raise TraceError(str(path), number, "expected the names of the columns by commas, found one field")
    values: dict[Pair, float] = {}
    for number, (source, *cells) in lines:
        if len(cells) != len(names) or source not in names:
            raise TraceError(str(path), number, f"row {source!r} of {len(cells)} cells in a matrix of {len(names)}")
        for target, cell in zip(names, cells, strict=True):
            if cell and target != source:
                values[source, target] = number_of(path, number, cell) * scale
    if not values:
        raise TraceError(str(path), 0, "an empty matrix")
    return Matrix(values)


@dataclass(frozen=True)
class Grid:
    """Bandwidth in bits per second and round trips in seconds between the same names."""

    bandwidth: Matrix
    round_trip_s: Matrix


def undirected(path: str | Path) -> Grid:
    """DT-FM's table (NeurIPS 2022): region_a, region_b, delay_ms, bandwidth_gbps; each line holds both ways.

    Its delays are round trips: over its 45 pairs they are 0.77 to 1.11, in the median 0.99, of those that Skyplane
    measured between the same regions.
    """
    lines = rows(path, ",")
    number, names = next(lines, (1, []))
    expected = ["region_a", "region_b", "delay_ms", "bandwidth_gbps"]
    if names != expected:
        raise TraceError(str(path), number, f"expected the columns {', '.join(expected)}, found {', '.join(names)}")
    bandwidth: dict[Pair, float] = {}
    trips: dict[Pair, float] = {}
    for number, fields in lines:
        if len(fields) != 4 or fields[0] == fields[1]:
            raise TraceError(str(path), number, f"expected two regions and two numbers, found {','.join(fields)!r}")
        a, b, *figures = fields
        trip_ms, gbps = (number_of(path, number, figure) for figure in figures)
        for pair in ((a, b), (b, a)):
            if pair in bandwidth:
                raise TraceError(str(path), number, f"{a} and {b} for the second time")
            trips[pair], bandwidth[pair] = trip_ms * 1e-3, gbps * 1e9
    return Grid(Matrix(bandwidth), Matrix(trips))


_JOB = re.compile(r"\('(?P<model>.+?)(?: \(batch size (?P<batch>\d+)\))?', (?P<workers>\d+)\)\Z")


@dataclass(frozen=True)
class Job:
    """What a device was timed with; ``batch`` 0: the model has no batch size."""

    model: str
    batch: int
    workers: int


def devices(path: str | Path) -> dict[str, dict[Job, float]]:
    """Gavel's tables (OSDI 2020): device -> job -> steps per second when it runs alone (0: it does not fit)."""
    try:
        tables: Any = json.loads(text(path))
    except json.JSONDecodeError as error:
        raise TraceError(str(path), error.lineno, error.msg) from None
    result: dict[str, dict[Job, float]] = {}
    try:
        for device, jobs in tables.items():
            for name, speeds in jobs.items():
                match = _JOB.match(name)
                if match is None:
                    raise TraceError(str(path), 0, f"{device}: {name!r} is no ('model (batch size n)', workers)")
                job = Job(match["model"], int(match["batch"] or 0), int(match["workers"]))
                result.setdefault(device, {})[job] = float(speeds["null"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TraceError(str(path), 0, f"not a table device -> job -> 'null' -> steps/s: {error!r}") from None
    return result
