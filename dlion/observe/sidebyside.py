"""Two runs beside each other: how far the second is from the first, figure by figure.

Law: pure, from two ``Run``s to plain values. Used for recorded against replayed, and for live against simulated.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict

from dlion.observe.read import Run
from dlion.observe.runlog import Send
from dlion.observe.summary import Staleness, course, mean_accuracy, staleness_quantiles, time_to


class Pair(TypedDict):
    """One figure of both runs; ``change``: second / first - 1, None where that says nothing."""

    first: float | None
    second: float | None
    change: float | None


class SideBySide(TypedDict):
    """Sizes in bytes, times in seconds."""

    steps: dict[str, Pair]
    """By peer."""
    link_bytes: dict[str, Pair]
    """Bytes of messages by directed link, as ``a1>b1``."""
    cloud_bytes: dict[str, Pair]
    """The same by directed pair of micro-clouds."""
    staleness: dict[str, Pair]
    time_to: dict[str, Pair]
    accuracy: Pair
    """Mean over peers, at the end."""


def side_by_side(first: Run, second: Run, targets: Iterable[float]) -> SideBySide:
    curves = mean_accuracy(first), mean_accuracy(second)
    stale = staleness_quantiles(first), staleness_quantiles(second)
    names: tuple[str, ...] = tuple(Staleness.__annotations__)
    last = [float(values[-1]) if values.size else None for _, values in curves]
    return {
        "steps": _pairs(_steps(first), _steps(second)),
        "link_bytes": _pairs(link_bytes(first), link_bytes(second)),
        "cloud_bytes": _pairs(cloud_bytes(first), cloud_bytes(second)),
        "staleness": {name: pair(*(float(s[name]) for s in stale)) for name in names},  # type: ignore[literal-required]
        "time_to": {f"{target:.2f}": pair(*(time_to(curve, target) for curve in curves)) for target in targets},
        "accuracy": pair(*last),
    }


def pair(first: float | None, second: float | None) -> Pair:
    change = second / first - 1 if first and second is not None else 0.0 if first == second else None
    return {"first": first, "second": second, "change": change}


def worst(pairs: dict[str, Pair]) -> float | None:
    """The largest change in size; None: some figure is there in one run only."""
    changes = [p["change"] for p in pairs.values()]
    known = [abs(c) for c in changes if c is not None]
    return None if len(known) < len(changes) else max(known, default=0.0)


def link_bytes(run: Run) -> dict[str, float]:
    found: dict[str, float] = {}
    for peer, log in run.peers.items():
        for to, count in zip(log[Send]["to"].tolist(), log[Send]["bytes"].tolist(), strict=True):
            found[f"{peer}>{to}"] = found.get(f"{peer}>{to}", 0.0) + count
    return found


def cloud_bytes(run: Run) -> dict[str, float]:
    clouds = {peer: log.header.cloud or peer for peer, log in run.peers.items()}
    found: dict[str, float] = {}
    for ends, count in link_bytes(run).items():
        key = ">".join(clouds.get(peer, peer) for peer in ends.split(">"))
        found[key] = found.get(key, 0.0) + count
    return found


def _steps(run: Run) -> dict[str, float]:
    return {peer: float(course(log)["n"].size) for peer, log in run.peers.items()}


def _pairs(first: dict[str, float], second: dict[str, float]) -> dict[str, Pair]:
    return {key: pair(first.get(key), second.get(key)) for key in sorted(first.keys() | second.keys())}
