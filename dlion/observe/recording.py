"""What a run's logs tell about its links and machines: rates over time, delays, outages, compute speeds.

Law: pure, from a ``Run`` to rates; writes no file and invents nothing. A link that never had more to send than it
could carry has shown only a lower bound of its capacity, and is marked so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dlion.mesh.topology import LinkSpec, PeerSpec, Resource, Speed, Topology
from dlion.messages import PeerId
from dlion.net.wan import Rate
from dlion.observe.read import Column, PeerLog, Run
from dlion.observe.runlog import Step

Floats = npt.NDArray[np.float64]

SHOWN_S_MIN = 0.02
"""A link shows its rate in an interval in which more stood waiting for so long: for one chunk."""
SAME_SHARE = 0.1
"""Neighbouring seconds closer than this to their mean are one rate, their mean: acknowledgements come in lumps."""
SPEED_WINDOW_S = 5.0
"""A machine's speed is the mean over at least so long, and ``SPEED_STEPS_MIN`` steps."""
SPEED_STEPS_MIN = 4
BATCHES_DIFFER = 1.2
"""Largest / smallest batch from which a step's fixed cost can be told from its cost per sample."""


@dataclass(frozen=True)
class RecordedLink:
    """One directed link, as its sender saw it."""

    source: PeerId
    target: PeerId
    rate: Rate
    """Bits per second."""
    delay_s: float
    """Half of the least round trip seen: the two ways are not told apart."""
    up: Rate | None
    busy_s: float
    """Seconds in which its capacity showed. 0: never, and ``rate`` is the most that was seen."""

    @property
    def known(self) -> bool:
        return self.busy_s > 0


@dataclass(frozen=True)
class Recording:
    """Everything measured. A peer without a step has no speed."""

    clouds: Mapping[PeerId, str]
    speeds: Mapping[PeerId, Speed]
    links: Mapping[tuple[PeerId, PeerId], RecordedLink]
    unheard: tuple[str, ...]
    """Peers that others logged but whose own log is not here: their directions are unknown."""


def recorded(run: Run) -> Recording:
    """All links in both directions, as far as logs of both ends are there."""
    links = {}
    named = {PeerId(to) for log in run.peers.values() for to in log.links()}
    for source, log in run.peers.items():
        for target, rows in log.links().items():
            found = link(PeerId(source), PeerId(target), rows)
            if found is not None and target in run.peers:
                links[found.source, found.target] = found
    speeds = {PeerId(peer): fast for peer, log in run.peers.items() if (fast := speed(log)) is not None}
    clouds = {PeerId(peer): log.header.cloud or peer for peer, log in run.peers.items()}
    return Recording(clouds, speeds, links, tuple(sorted(named - run.peers.keys())))


def link(source: PeerId, target: PeerId, rows: Mapping[str, Column]) -> RecordedLink | None:
    """From the once-a-second ``Link`` events of one neighbour; None when nothing was ever delivered."""
    t = rows["t"].astype(np.float64)
    trips = rows["rtt_s"][rows["rtt_s"] > 0]
    if t.size < 2 or not trips.size or not rows["acked_bytes"].any():
        return None
    shown_s = np.maximum(np.diff(rows["shown_s"]), 0.0)
    shown = np.diff(rows["shown_bytes"]) * 8.0 / np.maximum(shown_s, 1e-6)
    busy = (shown_s >= SHOWN_S_MIN) & (shown > 0) & rows["up"][1:]
    if busy.any():
        rate = _held(t[:-1], np.where(busy, shown, np.nan))
    else:
        goodput = np.maximum(np.diff(rows["acked_bytes"]), 0) * 8.0 / np.maximum(np.diff(t), 1e-6)
        rate = Rate.constant(max(float(goodput.max()), float(rows["rate_bps"].max())))
    return RecordedLink(
        source, target, rate, float(trips.min()) / 2, _switch(t, rows["up"]), float(shown_s[busy].sum())
    )


def _held(starts: Floats, values: Floats) -> Rate:
    """Steps at ``starts``; where a value is unknown (nan) the last known one holds, before the first the first."""
    times: list[float] = []
    pieces: list[list[float]] = []
    for start, value in zip(starts.tolist(), values.tolist(), strict=True):
        if not np.isfinite(value):
            continue
        mean = float(np.mean(pieces[-1])) if pieces else 0.0
        if pieces and abs(value - mean) <= SAME_SHARE * mean:
            pieces[-1].append(value)
        else:
            times.append(start if pieces else 0.0)
            pieces.append([value])
    return Rate.steps(times, [float(np.mean(piece)) for piece in pieces], loop=False)


def _switch(t: Floats, up: Column) -> Rate | None:
    """1 while the link was up; None when it always was."""
    if up.all():
        return None
    changes = np.flatnonzero(np.diff(up.astype(np.int8), prepend=1 - int(up[0])))
    times = [0.0, *(float(t[i]) for i in changes if i)]
    return Rate.steps(times, [float(up[i]) for i in ([0, *changes[1:]])], loop=False)


def speed(log: PeerLog) -> Speed | None:
    """Samples per second over time, and the fixed cost of a step where batches of different sizes show it."""
    rows = log[Step]
    taken = rows["seconds"] > 0
    ends, seconds, samples = (rows[name][taken].astype(np.float64) for name in ("t", "seconds", "samples"))
    if not ends.size:
        return None
    windows = _windows(ends, seconds)
    overhead_s = _overhead([(samples[some], seconds[some]) for some in windows], float(seconds.min()))
    rates = [float(samples[some].sum() / (seconds[some] - overhead_s).sum()) for some in windows]
    times = [0.0, *(float(ends[some][-1]) for some in windows[:-1])]
    return Speed(_held(np.array(times), np.array(rates)), overhead_s)


def _windows(ends: Floats, seconds: Floats) -> list[slice]:
    """Steps taken together as one measurement of the speed; a rest too short for that belongs to nothing."""
    found: list[slice] = []
    first = 0
    for i in range(ends.size):
        enough = i - first + 1 >= SPEED_STEPS_MIN
        if enough and (i == ends.size - 1 or ends[i] - (ends[first] - seconds[first]) >= SPEED_WINDOW_S):
            found.append(slice(first, i + 1))
            first = i + 1
    return found or [slice(0, ends.size)]


def _overhead(windows: list[tuple[Floats, Floats]], least_s: float) -> float:
    """Least squares for seconds = overhead + samples / the window's own speed, so that a speed that changes is not
    taken for a cost per step; at least 0 and below every step; 0 where no window's batches differ."""
    telling = [(n, s) for n, s in windows if n.size >= SPEED_STEPS_MIN and n.max() >= BATCHES_DIFFER * n.min()]
    if not telling:
        return 0.0
    shares = [(n.sum() / (n @ n), n, s) for n, s in telling]
    overhead_s = sum(s.sum() - share * (n @ s) for share, n, s in shares) / sum(
        n.size - share * n.sum() for share, n, _ in shares
    )
    return float(np.clip(overhead_s, 0.0, 0.9 * least_s))


def topology(found: Recording, name: str, plan: Topology | None = None) -> Topology:
    """The recorded network. What ``plan`` states (a shaped link, a modelled speed) is taken from it instead: there the
    log can only say again, less exactly, what is written down."""
    peers, resources = {}, {}
    for peer, cloud in found.clouds.items():
        stated = plan.peers[peer] if plan is not None and peer in plan.peers else PeerSpec(peer, cloud)
        peers[peer] = stated if stated.speed else PeerSpec(peer, cloud, found.speeds.get(peer), stated.presence)
    links = {ends: plan.links[ends] for ends in plan.links} if plan is not None else {}
    for ends, seen in found.links.items():
        if ends in links and links[ends].resources:
            continue
        path = f"recorded:{seen.source}>{seen.target}"
        resources[path] = Resource(path, "path", seen.rate)
        links[ends] = LinkSpec(seen.source, seen.target, (path,), seen.delay_s, seen.up)
    talk = plan.talk if plan is not None else "auto"
    resources.update(plan.resources if plan is not None else {})
    return Topology(name, peers, dict(sorted(links.items())), resources, talk, about="as recorded")
