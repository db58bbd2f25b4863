"""A rate as written in a topology file -> ``net.wan.Rate``: a constant, or steps over time.

Law: two forms, one result. ``"50Mbit"``; ``{ steps = [[0, "50Mbit"], ["60s", "20Mbit"]], loop = "2m" }``.
"""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from dlion.config.job import Table
from dlion.config.reader import Reader, join, show
from dlion.config.units import UNITS, PositiveSeconds, Seconds
from dlion.net.wan import Rate


class StepsTable(Table, frozen=True):
    steps: list[list[Any]]
    loop: PositiveSeconds | None = None
    """Period after which the steps begin again; absent: the last one holds for ever."""
    offset_s: Seconds = 0.0
    scale: Annotated[float, Meta(gt=0)] = 1.0


class Rates:
    """Reads the rates of one file."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def read(self, raw: object, unit: str, key: str) -> Rate:
        """``raw`` in ``unit`` (``bits_per_s`` or ``number``)."""
        if isinstance(raw, dict):
            return self._steps(raw, unit, key)
        return Rate.constant(self._value(raw, unit, key))

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
