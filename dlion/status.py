"""A node's status as plain values: what the admin application, the metrics and the live table read.

Law: reads a node, changes nothing but the marks of its own last look, from which the largest staleness is counted.
Cheap enough for every second.
"""

from __future__ import annotations

from typing import Protocol

from dlion.node import Node
from dlion.observe.status import LinkStatus, PeerStatus, State


class Keeping(Protocol):
    """Who writes checkpoints; ``trouble``: why the last one could not be written."""

    trouble: str


class StatusReader:
    """Call it whenever a status is wanted; rates are over the time since its last call."""

    def __init__(self, node: Node, keeping: Keeping | None = None) -> None:
        self._node = node
        self._keeping = keeping
        self.accuracy: float | None = None
        """Of the last evaluation; set by whoever has it measured."""
        self._marks: dict[str, tuple[int, int, int]] = {}
        self._at = 0.0
        self._links: dict[str, LinkStatus] = {}
        self._staleness_max = 0

    def __call__(self) -> PeerStatus:
        node, meter = self._node, self._node.meter
        state: State = node.state
        elapsed_s = max(node.now, 1e-9)
        roster = node.membership.roster
        return {
            "peer": node.me,
            "cloud": node.ctx.cloud,
            "state": state,
            "step": node.step,
            "samples": meter.samples,
            "loss": meter.loss,
            "accuracy": self.accuracy,
            "batch": node.ctx.batch,
            "samples_per_s": meter.samples_per_s,
            "step_s": meter.step_s,
            "stall_share": min(1.0, meter.waited_s / elapsed_s),
            "exchange_cpu_s": node.seams.compute.exchange_s,
            "links": self._read_links(),
            "staleness_max": self._staleness_max,
            "members": {"live": len(roster.live), "total": len(roster.records)},
            "ready": state == "training",
            "reasons": [*([] if state == "training" else [self._why()]), *self._trouble()],
            "loop_lag_s": meter.lag_p99_s,
            "refused": {peer: dict(reasons) for peer, reasons in meter.refusals.items()},
        }

    def _why(self) -> str:
        ended = self._node.ended
        return f"state is {self._node.state}{ended and f': {ended}'}"

    def _trouble(self) -> list[str]:
        """What does not keep the peer from training, but somebody should mend."""
        return [self._keeping.trouble] if self._keeping is not None and self._keeping.trouble else []

    def _read_links(self) -> dict[str, LinkStatus]:
        """Over at least half a second; a second reader in the same second sees the first one's figures."""
        node = self._node
        passed_s = node.now - self._at
        if self._links and 0 <= passed_s < 0.5:
            return self._links
        links: dict[str, LinkStatus] = {}
        for peer, connection in node.neighbours.connections.items():
            meter = node.meter.link(peer)
            before = self._marks.get(peer, (0, 0, 0))
            self._marks[peer] = acked, entries, messages = connection.session.acked_bytes, meter.entries, meter.messages
            said = messages - before[2]
            links[peer] = {
                "up": connection.connected,
                "lan": node.topology.lan(node.me, peer),
                "rate_bps": connection.rate_bps,
                "used_bps": 8 * (acked - before[0]) / passed_s if passed_s > 0 else 0.0,
                "available_bps": node.journal.available_bps(peer),
                "rtt_s": connection.rtt_s,
                "sent_bytes": meter.sent_bytes,
                "received_bytes": meter.received_bytes,
                "share_sent": (entries - before[1]) / (said * node.ctx.layout.size) if said else 0.0,
                "sent_bytes_by_kind": dict(meter.by_kind),
            }
        self._at, self._links = node.now, links
        self._staleness_max, node.replica.staleness_max = node.replica.staleness_max, 0
        return links
