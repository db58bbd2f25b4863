"""The league table: strategies over the same links and machines, each over several seeds.

Law: pure, from finished cells to plain values; draws and runs nothing. A cell that failed is named, never averaged:
it takes part in no figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import msgspec
import numpy as np

from dlion.observe.summary import Summary


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One finished cell: a line of the results file."""

    key: str
    """Hash of all that the run depends on."""
    exchange: str
    seed: int
    until_s: float
    summary: Summary | None = None
    """None: it failed."""
    curve: list[tuple[float, float]] = []
    """Mean accuracy of the peers over time, as the report draws it."""
    error: str = ""


@dataclass(frozen=True)
class Spread:
    """A figure over seeds. ``median`` and ``high`` are None when that many seeds never got there."""

    median: float | None
    low: float | None
    high: float | None
    reached: int
    of: int


@dataclass(frozen=True)
class Row:
    """One strategy. Times in seconds, sizes in bytes, shares from 0 to 1."""

    exchange: str
    seeds: list[int]
    """Those that finished."""
    failed: dict[int, str]
    """Seed -> what went wrong."""
    time_to: dict[str, Spread]
    accuracy_at: dict[str, Spread]
    accuracy: Spread
    worst: Spread
    """Last accuracy of the worst peer."""
    wan_bytes: Spread
    lan_bytes: Spread
    stalled: Spread
    """Mean over peers."""
    disagreement: Spread
    log_sha256: dict[int, str | None]


def spread(values: Iterable[float | None]) -> Spread:
    """Median and range; None counts as later than any number."""
    held = [math.inf if v is None else float(v) for v in values]
    if not held:
        return Spread(None, None, None, 0, 0)
    reached = [v for v in held if v < math.inf]
    return Spread(_finite(median(held)), min(reached, default=None), _finite(max(held)), len(reached), len(held))


def league(outcomes: Sequence[Outcome], at_s: Sequence[float]) -> list[Row]:
    """A row per strategy, in the order in which they come; ``at_s``: when accuracy is compared."""
    names = dict.fromkeys(o.exchange for o in outcomes)
    return [
        _row(name, sorted((o for o in outcomes if o.exchange == name), key=lambda o: o.seed), at_s) for name in names
    ]


def _row(name: str, outcomes: Sequence[Outcome], at_s: Sequence[float]) -> Row:
    done = [(o, o.summary) for o in outcomes if o.summary is not None]
    targets = dict.fromkeys(target for _, s in done for target in s["time_to"])

    def over(figure: Callable[[Summary], float | None]) -> Spread:
        return spread(figure(s) for _, s in done)

    return Row(
        exchange=name,
        seeds=[o.seed for o, _ in done],
        failed={o.seed: o.error for o in outcomes if o.summary is None},
        time_to={t: spread(s["time_to"].get(t) for _, s in done) for t in targets},
        accuracy_at={f"{t:g}": spread(accuracy_at(o, t) for o, _ in done) for t in at_s},
        accuracy=over(lambda s: s["accuracy"]["mean"]),
        worst=over(lambda s: s["accuracy"]["worst"]),
        wan_bytes=over(lambda s: s["wan_bytes"]),
        lan_bytes=over(lambda s: s["lan_bytes"]),
        stalled=over(lambda s: float(np.mean([*s["stalled_share"].values()])) if s["stalled_share"] else None),
        disagreement=over(lambda s: s["replica_disagreement"]),
        log_sha256={o.seed: s["log_sha256"] for o, s in done},
    )


def accuracy_at(outcome: Outcome, t: float) -> float | None:
    """Interpolated; None before the first evaluation. After the last one that value holds."""
    if not outcome.curve or t < outcome.curve[0][0]:
        return None
    times, values = zip(*outcome.curve, strict=True)
    return float(np.interp(t, times, values))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Column:
    """One column of the table as shown."""

    title: str
    spreads: list[Spread]
    unit: str
    high_is_good: bool

    @property
    def best(self) -> float | None:
        """The best median, if the medians differ."""
        known = [s.median for s in self.spreads if s.median is not None]
        return (max if self.high_is_good else min)(known) if len(set(known)) > 1 else None


def table(rows: Sequence[Row]) -> list[Column]:
    """The league's columns; targets that nobody reached are left out."""
    targets = [t for t in dict.fromkeys(t for r in rows for t in r.time_to) if any(r.time_to[t].reached for r in rows)]
    times = list(dict.fromkeys(t for r in rows for t in r.accuracy_at))
    nothing = spread([])
    return [
        *(
            Column(f"to {100 * float(t):g} %", [r.time_to.get(t, nothing) for r in rows], "seconds", False)
            for t in targets
        ),
        *(Column(f"at {t} s", [r.accuracy_at[t] for r in rows], "share", True) for t in times),
        Column("worst peer", [r.worst for r in rows], "share", True),
        Column("WAN", [r.wan_bytes for r in rows], "bytes", False),
        Column("stalled", [r.stalled for r in rows], "share", False),
        Column("disagree", [r.disagreement for r in rows], "ratio", False),
    ]
