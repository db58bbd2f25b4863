"""What a running peer says about itself: the one shape that the admin application, the metrics and the live table read.

Law: types only. The node fills them in; whoever shows them changes nothing. Plain JSON values throughout.
"""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

State = Literal["starting", "joining", "training", "waiting", "draining", "stopped"]


class LinkStatus(TypedDict):
    """One link to a neighbour. Bits per second for rates; byte counts are totals since the peer's start."""

    up: bool
    lan: NotRequired[bool]
    rate_bps: float
    """Measured delivery rate."""
    used_bps: float
    """Sent over the last interval."""
    available_bps: float | None
    """What the topology gives now; None: it does not say."""
    rtt_s: float
    sent_bytes: int
    received_bytes: int
    share_sent: float
    """Entries sent / entries of the model, over the last interval; 1: everything."""
    sent_bytes_by_kind: NotRequired[dict[str, int]]


class MembersStatus(TypedDict):
    live: int
    total: int


class PeerStatus(TypedDict):
    """One peer. Times in seconds, sizes in bytes, shares from 0 to 1."""

    peer: str
    cloud: str
    state: State
    step: int
    samples: NotRequired[int]
    loss: float | None
    """Smoothed; None before the first step."""
    accuracy: float | None
    """Of the last evaluation; None: there was none."""
    batch: int
    samples_per_s: float
    step_s: NotRequired[float]
    stall_share: float
    """Time waited for others / time since training began."""
    staleness_max: int
    """Largest gap, in steps, of an update applied in the last interval."""
    links: dict[str, LinkStatus]
    members: MembersStatus
    ready: NotRequired[bool]
    reasons: NotRequired[list[str]]
    """Why the peer is not ready, or what else somebody should mend."""
    loop_lag_s: NotRequired[float]
    exchange_cpu_s: NotRequired[float]
    """Processor time of the exchange lane so far."""
    refused: NotRequired[dict[str, dict[str, int]]]
    """Refused messages by peer and reason."""
