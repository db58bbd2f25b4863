"""What a trace is like: how long, how fast, how often it is out.

Law: pure, from a ``Rate`` to figures. Percentiles are over time, not over lines of the file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dlion.net.wan import Rate

Floats = npt.NDArray[np.float64]
PERCENTILES = (5, 25, 50, 75, 95)
OUTAGE_STEP_S = 1.0
OUTAGE_SHARE = 0.01
"""Out: a second (or a wider step of the trace) with less than this share of the mean. Recorders of cellular links keep
sending a packet now and then, so their outages are not quite zero."""


@dataclass(frozen=True)
class Facts:
    """In the rate's own unit; seconds."""

    duration_s: float
    """Of one period; of a rate that does not loop, to its last step."""
    steps: int
    mean: float
    low: float
    high: float
    percentiles: dict[str, float]
    outages: int
    outage_s: float
    """Together."""
    longest_outage_s: float


def facts(rate: Rate) -> Facts:
    """A rate that has one step only has no duration: its figures are that step's."""
    end = rate.period_s if rate.looped else rate.starts[-1]
    values = np.asarray(rate.values)
    widths = np.diff(rate.starts, append=end)
    if not end:
        values, widths = values[-1:], np.ones(1)
    out = _outages(rate) if end else []
    return Facts(
        duration_s=end,
        steps=len(rate.values),
        mean=rate.mean if end else rate.values[-1],
        low=float(values.min()),
        high=float(values.max()),
        percentiles={f"p{p}": _percentile(values, widths, p / 100) for p in PERCENTILES},
        outages=len(out),
        outage_s=sum(out),
        longest_outage_s=max(out, default=0.0),
    )


def _percentile(values: Floats, widths: Floats, share: float) -> float:
    """The least value that holds, or is undercut, for ``share`` of the time."""
    order = np.argsort(values, kind="stable")
    passed = np.cumsum(widths[order])
    return float(values[order][min(int(np.searchsorted(passed, share * passed[-1])), values.size - 1)])


def _outages(rate: Rate) -> list[float]:
    """Seconds of each unbroken outage."""
    end = rate.period_s if rate.looped else rate.starts[-1]
    if end / len(rate.starts) < OUTAGE_STEP_S:
        rate = rate.resampled(OUTAGE_STEP_S)
    found: list[float] = []
    was_out = False
    for start, next_start, value in zip(rate.starts, [*rate.starts[1:], end], rate.values, strict=True):
        out = value <= OUTAGE_SHARE * rate.mean
        if out and was_out:
            found[-1] += next_start - start
        elif out and next_start > start:
            found.append(next_start - start)
        was_out = out and bool(found)
    return found


def total(rates: Iterable[Rate]) -> Rate:
    """The sum, from time 0, of rates that do not loop: how many peers are there, say."""
    held = list(rates)
    times = sorted({max(rate.origin_s + start, 0.0) for rate in held for start in rate.starts})
    return Rate.steps(times, [sum(rate.at(t) for rate in held) for t in times], loop=False)
