"""Where a run's time went: what each peer did with it, and which links were full.

Law: pure, from a ``Run`` to figures. What would change them is found by replaying, not here.
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np

from dlion.observe.read import PeerLog, Run
from dlion.observe.runlog import Step
from dlion.observe.sidebyside import link_bytes
from dlion.observe.summary import stalled_share


class PeerTime(TypedDict):
    """Shares of the time from a peer's first step (its wait included) to its last; seconds."""

    compute: float
    pace: float
    strategy: float
    room: float
    between: float
    """The rest, between steps: taking a snapshot, and applying or encoding where that held a step up."""
    step_s: float
    """Median duration of a step."""
    samples_per_s: float
    steps: int


class LinkUse(TypedDict):
    """One directed link; bits per second, bytes."""

    full: float
    """Share of the time in which more was to be sent than its window had room for."""
    rate_bps: float
    """What it delivered while it was full; 0: it never was."""
    bytes: float
    """Of messages."""
    wan: bool


def peer_times(run: Run) -> dict[str, PeerTime]:
    """By peer; one without a step is left out."""
    return {peer: _times(log) for peer, log in run.peers.items() if log[Step]["t"].size}


def _times(log: PeerLog) -> PeerTime:
    steps = log[Step]
    first_s = float(steps["seconds"][0] + sum(steps[f"waited.{why}"][0] for why in ("pace", "strategy", "room")))
    whole_s = float(steps["t"][-1] - steps["t"][0]) + first_s
    computed_s = float(steps["seconds"].sum())
    waited = stalled_share(log)
    compute = computed_s / whole_s if whole_s else 0.0
    return {
        "compute": compute,
        "pace": waited["pace"],
        "strategy": waited["strategy"],
        "room": waited["room"],
        "between": max(0.0, 1.0 - compute - sum(waited.values())),
        "step_s": float(np.median(steps["seconds"])),
        "samples_per_s": float(steps["samples"].sum()) / computed_s if computed_s else 0.0,
        "steps": int(steps["t"].size),
    }


def link_uses(run: Run) -> dict[tuple[str, str], LinkUse]:
    """By (source, target), the fullest first."""
    sent = link_bytes(run)
    found: dict[tuple[str, str], LinkUse] = {}
    for peer, log in run.peers.items():
        for to, rows in log.links().items():
            shown_s = float(rows["shown_s"].max(initial=0.0))
            other = run.peers.get(to)
            found[peer, to] = {
                "full": float(rows["saturated"].mean()),
                "rate_bps": float(rows["shown_bytes"].max(initial=0)) * 8 / shown_s if shown_s else 0.0,
                "bytes": sent.get(f"{peer}>{to}", 0.0),
                "wan": other is None or other.header.cloud != log.header.cloud,
            }
    return dict(sorted(found.items(), key=lambda item: (-item[1]["full"], item[0])))


def hindmost(times: dict[str, PeerTime]) -> str | None:
    """The peer that the others wait for, if anybody waits: it computes most of its time; of equals, the slowest."""
    return max(times, key=lambda peer: (round(times[peer]["compute"], 2), -times[peer]["samples_per_s"]), default=None)
