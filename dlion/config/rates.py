"""A rate as written in a topology file -> ``net.wan.Rate``: a constant, steps over time, or a trace file.

Law: three forms, one result. ``"50Mbit"``; ``{ steps = [[0, "50Mbit"], ["60s", "20Mbit"]], loop = "2m" }``;
``{ trace = "lte.down.xz", format = "mahimahi" }``, its path relative to the topology file. Formats: ``net.traces``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from dlion.config.errors import ConfigError, one_of
from dlion.config.job import Table
from dlion.config.reader import Reader, join, show
from dlion.config.units import UNITS, PositiveSeconds, Seconds
from dlion.net import traces
from dlion.net.wan import Rate


class StepsTable(Table, frozen=True):
    steps: list[list[Any]]
    loop: PositiveSeconds | None = None
    """Period after which the steps begin again; absent: the last one holds for ever."""
    offset_s: Seconds = 0.0
    scale: Annotated[float, Meta(gt=0)] = 1.0


class TraceTable(Table, frozen=True):
    trace: str
    """A file beside the topology; ``.gz``, ``.xz`` and ``archive.tar.xz::member`` are opened too."""
    format: Literal["mahimahi", "s-mbit", "ms-kbit", "csv", "churn"]
    time: str = "time"
    """csv: the column of the time, and its unit; the column of the rate, and its unit."""
    time_unit: str = "s"
    column: str = ""
    unit: str = ""
    node: str = ""
    """churn: whose presence."""
    step_s: PositiveSeconds = traces.STEP_S
    """mahimahi: packets are counted in steps this wide."""
    loop: bool | None = None
    """Begin again after the end; default true (churn: never)."""
    offset_s: Seconds = 0.0
    """How far into the trace the run begins."""
    scale: Annotated[float, Meta(gt=0)] = 1.0
    resample_s: PositiveSeconds | None = None
    """Means over steps this wide in place of the trace's own."""


FITS: Mapping[str, str] = {"mahimahi": "bits_per_s", "s-mbit": "bits_per_s", "ms-kbit": "bits_per_s", "churn": "number"}
"""Format -> the unit of what it holds; csv says so itself."""
CSV_UNITS: Mapping[str, Mapping[str, float]] = {
    "bits_per_s": traces.RATE_UNITS,
    "seconds": traces.TIME_UNITS,
    "number": {"": 1.0},
}


class Rates:
    """Reads the rates of one file; ``digests`` holds the sha256 of every trace that was read, by its name there."""

    def __init__(self, reader: Reader, directory: Path = Path()) -> None:
        self._reader = reader
        self._directory = directory
        self._parsed: dict[TraceTable, Rate] = {}
        self.digests: dict[str, str] = {}

    def read(self, raw: object, unit: str, key: str) -> Rate:
        """``raw`` in ``unit`` (``bits_per_s``, ``seconds`` or ``number``)."""
        if not isinstance(raw, dict):
            return Rate.constant(self._value(raw, unit, key))
        return self._trace(raw, unit, key) if "trace" in raw else self._steps(raw, unit, key)

    def _value(self, raw: object, unit: str, key: str) -> float:
        parse, words = UNITS[unit]
        try:
            value = parse(raw)
        except (ValueError, OverflowError):
            raise self._reader.error(key, f"found {show(raw)}", words) from None
        if not 0 <= value < float("inf"):
            raise self._reader.error(key, f"found {show(raw)}", f"{words}, finite and not negative")
        return value

    def _steps(self, raw: dict[str, Any], unit: str, key: str) -> Rate:
        table = self._reader.struct(raw, StepsTable, key)
        times, values = [], []
        for i, pair in enumerate(table.steps):
            here = f"{join(key, 'steps')}[{i}]"
            if len(pair) != 2:
                raise self._reader.error(here, f"found {show(pair)}", "a pair [time, value]")
            times.append(self._value(pair[0], "seconds", f"{here}[0]"))
            values.append(self._value(pair[1], unit, f"{here}[1]") * table.scale)
        if not times or times[0] != 0:
            raise self._reader.error(join(key, "steps"), f"found {show(table.steps)}", "a first step at time 0")
        try:
            return Rate.steps(times, values, loop=table.loop is not None, period_s=table.loop, offset_s=table.offset_s)
        except ValueError as error:
            raise self._reader.error(key, str(error), "times that increase, and a loop beyond the last one") from None

    def _trace(self, raw: dict[str, Any], unit: str, key: str) -> Rate:
        table = self._reader.struct(raw, TraceTable, key)
        if table not in self._parsed:
            self._check(table, unit, key)
            try:
                self._parsed[table] = self._parse(table, unit, key)
            except traces.TraceError as error:
                raise self._reader.error(join(key, "trace"), str(error)) from error
        return self._parsed[table]

    def _check(self, table: TraceTable, unit: str, key: str) -> None:
        form = table.format
        if FITS.get(form, unit) != unit:
            fitting = [name for name, holds in FITS.items() if holds == unit]
            raise self._reader.error(join(key, "format"), f'found "{form}"', one_of([*fitting, "csv"]))
        if form == "csv" and table.unit not in CSV_UNITS[unit]:
            raise self._reader.error(join(key, "unit"), f'found "{table.unit}"', one_of(CSV_UNITS[unit]))
        for name, of in (("column", "csv"), ("node", "churn")):
            if (form == of) != bool(getattr(table, name)):
                raise self._misplaced(table, name, of, key)
        if form == "churn" and (table.loop or table.resample_s or table.scale != 1):
            raise self._reader.error(key, "found loop, scale or resample", "none of them for churn")

    def _misplaced(self, table: TraceTable, name: str, of: str, key: str) -> ConfigError:
        if table.format == of:
            return self._reader.error(join(key, name), "missing", f"a {name} of the {of} file")
        return self._reader.error(join(key, name), f'found it with format "{table.format}"', f"only for {of}")

    def _parse(self, table: TraceTable, unit: str, key: str) -> Rate:
        path = f"{self._directory}/{table.trace}" if not Path(table.trace).is_absolute() else table.trace
        self.digests[table.trace] = hashlib.sha256(traces.text(path).encode()).hexdigest()
        loop = table.loop is not False
        if table.format == "churn":
            return self._presence(table, path, key)
        if table.format == "csv":
            columns = traces.Columns(table.time, table.column, time_unit=table.time_unit, bandwidth_unit="bit/s")
            rate = traces.table(path, columns, loop=loop).bandwidth.scaled(CSV_UNITS[unit][table.unit])
        else:
            rate = traces.read(path, table.format, loop=loop, step_s=table.step_s)
        if table.resample_s is not None:
            rate = rate.resampled(table.resample_s)
        return rate.scaled(table.scale).shifted(table.offset_s)

    def _presence(self, table: TraceTable, path: str, key: str) -> Rate:
        nodes = traces.presence(path)
        if table.node not in nodes:
            known = ", ".join([*nodes][:8]) + (f" and {len(nodes) - 8} more" if len(nodes) > 8 else "")
            raise self._reader.error(join(key, "node"), f'found "{table.node}"', f"one of {known}")
        return nodes[table.node].shifted(table.offset_s)
