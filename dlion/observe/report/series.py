"""Numbers behind the figures, thinned to what a picture can show.

Law: NumPy in, NumPy out; no drawing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dlion.observe.read import Column, PeerLog, Run
from dlion.observe.runlog import Send, Step
from dlion.observe.summary import Curve, evaluations, together

Floats = npt.NDArray[np.float64]
POINTS_MAX = 400


@dataclass(frozen=True)
class Band:
    """A measure over time: the mean over peers and the worst peer."""

    t: Floats
    mean: Floats
    worst: Floats


@dataclass(frozen=True)
class LinkSeries:
    """One directed link over time. ``available_bps`` is the topology's rate, or the measured one where it says none."""

    t: Floats
    used_bps: Floats
    available_bps: Floats
    sent_bytes: int
    known: bool
    """False: the available rate is only the measured one."""

    @property
    def used_share(self) -> float:
        """Bits sent / bits that could have been sent, over the whole run."""
        could = float(self.available_bps.sum())
        return min(float(self.used_bps.sum()) / could, 1.0) if could > 0 else 0.0


def accuracy_band(run: Run) -> Band:
    times, values = together([evaluations(log, "accuracy") for log in run.peers.values()])
    return (
        Band(times, np.nanmean(values, axis=0), np.nanmin(values, axis=0)) if times.size else Band(times, times, times)
    )


def loss_band(run: Run) -> Band:
    """Training loss per peer, averaged over about 1 % of the run, so that batches' noise does not hide the course."""
    steps = (_in_time(log[Step]["t"], log[Step]["loss"]) for log in run.peers.values())
    curves = [thinned(t, loss, POINTS_MAX // 4) for t, loss in steps]
    times, values = together([(t, y) for t, y in curves if t.size])
    return (
        Band(times, np.nanmean(values, axis=0), np.nanmax(values, axis=0)) if times.size else Band(times, times, times)
    )


def _in_time(t: Column, *columns: Column) -> tuple[Column, ...]:
    """A later life goes on from an earlier time: what was done twice lies side by side."""
    order = np.argsort(t, kind="stable")
    return t[order], *(column[order] for column in columns)


def thinned(t: Column, y: Column, points: int = POINTS_MAX) -> Curve:
    """Means over at most ``points`` even pieces; values that are not finite are left out."""
    finite = np.isfinite(y)
    t, y = t[finite].astype(np.float64), y[finite].astype(np.float64)
    if t.size <= points:
        return t, y
    edges = np.linspace(0, t.size, points + 1).astype(np.int64)[:-1]
    counts = np.diff(np.append(edges, t.size))
    return np.add.reduceat(t, edges) / counts, np.add.reduceat(y, edges) / counts


def sent_over_time(run: Run, wan: bool) -> Curve:
    """Bytes handed to links since the start, of all peers, between (``wan``) or inside micro-clouds."""
    rows = [log[Send] for log in run.peers.values()]
    stamps = np.concatenate([r["t"][r["wan"] == wan] for r in rows])
    counts = np.concatenate([r["bytes"][r["wan"] == wan] for r in rows])
    order = np.argsort(stamps, kind="stable")
    total = np.cumsum(counts[order], dtype=np.float64)
    grid = np.linspace(0.0, run.seconds, POINTS_MAX // 2)
    seen = np.searchsorted(stamps[order], grid, side="right")
    return grid, np.concatenate([[0.0], total])[seen]


def batch_over_time(log: PeerLog) -> Curve:
    """Local batch size at each change: corners of a staircase."""
    t, samples = _in_time(log[Step]["t"], log[Step]["samples"])
    if not t.size:
        return np.empty(0), np.empty(0)
    keep = np.append(np.flatnonzero(np.diff(samples, prepend=-1)), t.size - 1)
    return t[keep], samples[keep].astype(np.float64)


def link_series(columns: Mapping[str, Column]) -> LinkSeries:
    """From the once-a-second ``Link`` events of one neighbour."""
    t = columns["t"]
    if t.size < 2:
        return LinkSeries(np.empty(0), np.empty(0), np.empty(0), int(columns["sent_bytes"].max(initial=0)), False)
    gaps, sent = np.diff(t), np.diff(columns["sent_bytes"])
    one_life = (gaps > 0) & (sent >= 0)  # a later life counts from 0, and perhaps from an earlier time
    used = sent[one_life] * 8.0 / gaps[one_life]
    stated = columns["available_bps"][1:][one_life]
    known = bool(np.isfinite(stated).all())
    available = stated if known else np.where(np.isfinite(stated), stated, columns["rate_bps"][1:][one_life])
    stamps, used, available = _in_time(t[1:][one_life], used, available)
    total = int(columns["sent_bytes"][0]) + int(np.where(sent >= 0, sent, columns["sent_bytes"][1:]).sum())
    times, used = thinned(stamps, used, 120)
    return LinkSeries(times, used, thinned(stamps, available, 120)[1], total, known)


def link_table(run: Run) -> dict[tuple[str, str], LinkSeries]:
    """Every directed link by (source, target), in peer order."""
    return {(peer, to): link_series(rows) for peer, log in run.peers.items() for to, rows in log.links().items()}


def same_cloud(run: Run, source: str, target: str) -> bool:
    logs = run.peers
    cloud = logs[source].header.cloud
    return bool(cloud) and target in logs and logs[target].header.cloud == cloud
