"""A run in one small object: what ``--json`` prints and what the report's table compares.

Law: pure; from a Run to plain JSON values. What the logs cannot know (hash, wall time, replicas) is passed in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NotRequired, TypedDict

import numpy as np
import numpy.typing as npt

from dlion.observe.read import Column, PeerLog, Run
from dlion.observe.runlog import Apply, Batch, End, Eval, Refuse, Send, Step

Curve = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
"""Times in seconds and values."""
TARGETS = (0.50, 0.60, 0.70, 0.80, 0.90, 0.93, 0.95)
REASONS = ("pace", "strategy", "room")
"""What can hold a step back, in the order in which it is shown."""


class Accuracy(TypedDict):
    mean: float | None
    worst: float | None
    per_peer: dict[str, float]


class Staleness(TypedDict):
    p50: float
    p90: float
    p99: float
    max: int


class BatchSizes(TypedDict):
    all: int | None
    per_peer: dict[str, int]


class Summary(TypedDict):
    """Sizes in bytes, times in seconds. None: not measured."""

    exchange: str
    job: str
    topology: str
    seed: int
    virtual_seconds: float
    drain_seconds: NotRequired[float]
    """Of them, those after training had ended; absent from files of an earlier version."""
    cut_short: NotRequired[list[str]]
    """Who stopped before all had what it owed them."""
    wall_seconds: float | None
    accuracy: Accuracy
    time_to: dict[str, float | None]
    wan_bytes: int
    lan_bytes: int
    steps: dict[str, int]
    stalled_share: dict[str, float]
    staleness: Staleness
    samples: int
    batch: BatchSizes
    refused: int
    replica_disagreement: float | None
    overrun: float
    void: bool
    log_sha256: str | None


def summarise(
    run: Run,
    *,
    wall_seconds: float | None = None,
    log_sha256: str | None = None,
    replica_disagreement: float | None = None,
    targets: Iterable[float] = TARGETS,
    until_s: float = 0.0,
) -> Summary:
    """The summary of ``run``. Accuracy is each peer's last, its mean and worst are those of the peers that ended (a
    killed one did not); ``time_to`` reads ``mean_accuracy``; training ends ``until_s``, or with a later step."""
    logs = run.peers
    last = {peer: float(evals[1][-1]) for peer, log in logs.items() if (evals := evaluations(log, "accuracy"))[1].size}
    ended = {peer: value for peer, value in last.items() if logs[peer][End]["t"].size} or last  # not the killed
    curve = mean_accuracy(run)
    wan, lan = sent_bytes(run)
    steps = {peer: course(log) for peer, log in logs.items()}
    trained_s = max(float(log[Step]["t"].max(initial=until_s)) for log in logs.values())
    batches = {peer: int(rows["samples"][-1]) for peer, rows in steps.items() if rows["samples"].size}
    return {
        "exchange": run.header.exchange,
        "job": run.header.job,
        "topology": run.header.topology,
        "seed": run.header.seed,
        "virtual_seconds": run.seconds,
        "drain_seconds": max(0.0, run.seconds - trained_s),
        "cut_short": [peer for peer, log in logs.items() if any("cut short" in why for why in log[End]["reason"])],
        "wall_seconds": wall_seconds,
        "accuracy": {
            "mean": float(np.mean(list(ended.values()))) if ended else None,
            "worst": min(ended.values(), default=None),
            "per_peer": last,
        },
        "time_to": {f"{target:.2f}": time_to(curve, target) for target in targets},
        "wan_bytes": wan,
        "lan_bytes": lan,
        "steps": {peer: rows["n"].size for peer, rows in steps.items()},
        "stalled_share": {peer: sum(stalled_share(log).values()) for peer, log in logs.items()},
        "staleness": staleness_quantiles(run),
        "samples": sum(int(rows["samples"].sum()) for rows in steps.values()),
        "batch": {"all": _global_batch(run), "per_peer": batches},
        "refused": sum(log[Refuse]["t"].size for log in logs.values()),
        "replica_disagreement": replica_disagreement,
        "overrun": max((float(o) for log in logs.values() for o in log[End]["overrun"]), default=0.0),
        "void": any(bool(v) for log in logs.values() for v in log[End]["void"]),
        "log_sha256": log_sha256,
    }


def evaluations(log: PeerLog, measure: str, which: str = "view") -> Curve:
    """One peer's held-out ``accuracy`` or ``loss`` over time, of the deployable view, in order of time."""
    rows = log[Eval]
    chosen = np.flatnonzero(rows["which"] == which)
    chosen = chosen[np.argsort(rows["t"][chosen], kind="stable")]
    return rows["t"][chosen], rows[measure][chosen]


def together(curves: list[Curve]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Curves of many peers on one even grid of times: (times, values of shape (peers, times)).

    The grid's spacing is the median distance of a peer's own points. Between its points a peer is interpolated, and
    held for a spacing and a half around them; further away (it came late, or died) it is NaN, unless all are. Peers
    without a point are left out.
    """
    held = [curve for curve in curves if curve[0].size]
    if not held:
        return np.empty(0), np.empty((0, 0))
    gaps = np.concatenate([np.diff(t) for t, _ in held])
    gaps = gaps[gaps > 0]
    spacing_s = float(np.median(gaps)) if gaps.size else np.inf
    first, last = min(t[0] for t, _ in held), max(t[-1] for t, _ in held)
    grid = np.linspace(first, last, 1 + round((last - first) / spacing_s))
    near_s = 1.5 * spacing_s
    there = np.array([(grid >= t[0] - near_s) & (grid <= t[-1] + near_s) for t, _ in held])
    values = np.array([np.interp(grid, t, values) for t, values in held])
    return grid, np.where(there | ~there.any(axis=0), values, np.nan)


def mean_accuracy(run: Run) -> Curve:
    """Mean of the deployable view's accuracy over the peers that are there: ``together``, then each point averaged
    with its two neighbours (the ends are left as they are)."""
    times, values = together([evaluations(log, "accuracy") for log in run.peers.values()])
    if not times.size:
        return times, times
    mean = np.nanmean(values, axis=0)
    smooth = mean.copy()
    if mean.size >= 3:
        smooth[1:-1] = (mean[:-2] + mean[1:-1] + mean[2:]) / 3.0
    return times, smooth


def time_to(curve: Curve, target: float) -> float | None:
    """When ``curve`` first reaches ``target``, interpolated between its points; None: it never does."""
    times, values = curve
    reached = np.flatnonzero(values >= target)
    if not reached.size:
        return None
    i = int(reached[0])
    if i == 0:
        return float(times[0])
    share = (target - values[i - 1]) / (values[i] - values[i - 1])
    return float(times[i - 1] + share * (times[i] - times[i - 1]))


def sent_bytes(run: Run) -> tuple[int, int]:
    """Bytes of all messages handed to links between micro-clouds, and inside them."""
    sends = [log[Send] for log in run.peers.values()]
    wan = sum(int(s["bytes"][s["wan"]].sum()) for s in sends)
    return wan, sum(int(s["bytes"].sum()) for s in sends) - wan


def course(log: PeerLog) -> Mapping[str, Column]:
    """The steps that led to where the peer is now: not those that it lost and did again from a checkpoint, nor those of
    a course that was given up."""
    steps = log[Step]
    if not steps["n"].size:
        return steps
    least_after = np.minimum.accumulate(steps["n"][::-1])[::-1][1:]
    stands = np.append(steps["n"][:-1] < least_after, True)
    return {name: column[stands] for name, column in steps.items()}


def stalled_share(log: PeerLog) -> dict[str, float]:
    """Time waited, by reason, as a share of the time from the start of the first step (its wait included) to the end
    of the last."""
    steps = course(log)
    if not steps["t"].size:
        return dict.fromkeys(REASONS, 0.0)
    waited = {reason: float(steps[f"waited.{reason}"].sum()) for reason in REASONS}
    before_first = steps["seconds"][0] + sum(steps[f"waited.{reason}"][0] for reason in REASONS)
    whole = float(steps["t"][-1] - steps["t"][0] + before_first)
    return {reason: seconds / whole if whole > 0 else 0.0 for reason, seconds in waited.items()}


def staleness(log: PeerLog, peer: str) -> npt.NDArray[np.int64]:
    """Steps by which each update heard from others lagged behind our own last step when it was applied (≥ 0)."""
    rows = log[Apply]
    heard = rows["origin"] != peer
    gaps: npt.NDArray[np.int64] = np.maximum(rows["mine"][heard] - 1 - rows["step"][heard], 0)
    return gaps


def staleness_quantiles(run: Run) -> Staleness:
    gaps = np.concatenate([staleness(log, peer) for peer, log in run.peers.items()])
    p50, p90, p99 = np.quantile(gaps, (0.5, 0.9, 0.99)).tolist() if gaps.size else (0.0, 0.0, 0.0)
    return {"p50": p50, "p90": p90, "p99": p99, "max": int(gaps.max()) if gaps.size else 0}


def _global_batch(run: Run) -> int | None:
    rows = [log[Batch] for log in run.peers.values() if log[Batch]["t"].size]
    if not rows:
        return None
    latest = max(rows, key=lambda r: float(r["t"][-1]))
    return int(latest["global_size"][-1])
