"""What the league's rows say of each other: times to targets, ratios on the same seeds and how sure they are.

Law: rows in, numbers out; no page, no simulation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dlion.observe.summary import Curve, time_to

Rows = list[dict[str, Any]]
TARGETS = (0.80, 0.85, 0.88)
ORACLE, OURS = "oracle", "pride"
ORACLE_SHARE = 0.6
"""The added target is what the oracle reaches in this share of the horizon."""
STUDENT = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Two-sided 95 % quantiles of Student's t, by how many seeds there are."""


def smooth(row: Mapping[str, Any]) -> Curve:
    times, mean = np.array(row["times"]), np.array(row["mean"])
    soft = mean.copy()
    if mean.size >= 3:
        soft[1:-1] = (mean[:-2] + mean[1:-1] + mean[2:]) / 3.0
    return times, soft


def median(values: Sequence[float | None]) -> float | None:
    """None (never) counts as later than anything."""
    found = float(np.median([np.inf if v is None else v for v in values]))
    return None if found == np.inf else found


def reached(rows: Rows, target: float) -> float | None:
    return median([time_to(smooth(row), target) for row in rows])


def bytes_to(row: Mapping[str, Any], target: float) -> float | None:
    at = time_to(smooth(row), target)
    return None if at is None else float(np.interp(at, row["times"], row["wan_bytes"]))


def beside(rows: Rows) -> float | None:
    """By how many points the training replica is better than the deployable view, on the first peer, in the second
    half of the horizon; None where they are one."""
    found = [np.subtract(row["replica"], row["first"]) for row in rows if row["replica"]]
    return 100 * float(np.mean([gap[len(gap) // 2 : -1].mean() for gap in found])) if found else None


def by_strategy(rows: Rows) -> dict[str, Rows]:
    found: dict[str, Rows] = {}
    for row in rows:
        found.setdefault(row["spec"]["strategy"], []).append(row)
    return found


def targets_of(groups: Mapping[str, Rows]) -> tuple[float, ...]:
    """The fixed ones, and what the oracle reaches in 60 % of the horizon."""
    if ORACLE not in groups:
        return TARGETS
    curves = [smooth(row) for row in groups[ORACLE]]
    until_s = groups[ORACLE][0]["spec"]["until_s"]
    limit = float(np.median([np.interp(ORACLE_SHARE * until_s, *curve) for curve in curves]))
    return tuple(sorted({*TARGETS, np.floor(limit * 1000) / 1000}))


def ratios(ours: Rows, theirs: Rows, target: float) -> tuple[list[float], bool]:
    """Their time over ours on each seed that both ran, and whether they always arrived. Who does not arrive is given
    the horizon; seeds on which we do not arrive either are left out."""
    found, arrived = [], True
    mine = {row["spec"]["seed"]: time_to(smooth(row), target) for row in ours}
    for row in theirs:
        at, own = time_to(smooth(row), target), mine.get(row["spec"]["seed"])
        if own is not None:
            found.append((float(row["spec"]["until_s"]) if at is None else at) / own)
            arrived = arrived and at is not None
    return found, arrived


def main_target(groups: Mapping[str, Rows]) -> float:
    """The oracle's, where it ran."""
    return next((t for t in targets_of(groups) if t not in TARGETS), TARGETS[0])


def half_width(found: Sequence[float]) -> float | None:
    """Of the 95 % interval of the mean over paired seeds; None with fewer than three."""
    if len(found) not in STUDENT:
        return None
    return STUDENT[len(found)] * float(np.std(found, ddof=1)) / float(len(found) ** 0.5)


def interval(found: Sequence[float]) -> tuple[float, float] | None:
    """The same of the ratios' geometric mean."""
    logs = np.log(found)
    half = half_width(logs.tolist())
    return None if half is None else (float(np.exp(logs.mean() - half)), float(np.exp(logs.mean() + half)))
