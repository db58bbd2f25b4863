"""What one node counts while it runs: steps, losses, bytes, waiting, lateness. Read by the status and the run log.

Law: plain counters; no clock (times arrive as arguments), no strategy, no socket.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np

SMOOTH = 0.1
LAGS_MAX = 256
LOSSES = 20


@dataclass
class LinkMeter:
    """Totals of one neighbour since the start, and marks of the last look."""

    sent_bytes: int = 0
    received_bytes: int = 0
    entries: int = 0
    messages: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    marked_full_s: float = 0.0


class Meter:
    def __init__(self) -> None:
        self.samples = 0
        self.step_s = 0.0
        self.samples_per_s = 0.0
        self.waited_s = 0.0
        self.links: dict[str, LinkMeter] = {}
        self.refusals: dict[str, Counter[str]] = {}
        self._losses: deque[float] = deque(maxlen=LOSSES)
        self._lags: deque[float] = deque(maxlen=LAGS_MAX)

    @property
    def loss(self) -> float | None:
        """Mean loss of the last steps."""
        return sum(self._losses) / len(self._losses) if self._losses else None

    @property
    def lag_p99_s(self) -> float:
        return float(np.quantile(self._lags, 0.99)) if any(self._lags) else 0.0

    def step(self, loss: float, samples: int, seconds: float, waited_s: float) -> None:
        """One local step; ``waited_s`` is what it waited before it began."""
        self._losses.append(loss)
        self.samples += samples
        self.waited_s += waited_s
        whole = seconds + waited_s
        rate = samples / seconds if seconds > 0 else 0.0
        first = self.step_s == 0.0
        self.step_s = whole if first else self.step_s + SMOOTH * (whole - self.step_s)
        self.samples_per_s = rate if first else self.samples_per_s + SMOOTH * (rate - self.samples_per_s)

    def link(self, peer: str) -> LinkMeter:
        meter = self.links.get(peer)
        if meter is None:
            meter = self.links[peer] = LinkMeter()
        return meter

    def sent(self, peer: str, nbytes: int, entries: int, kind: str) -> None:
        meter = self.link(peer)
        meter.sent_bytes += nbytes
        meter.entries += entries
        meter.messages += 1
        meter.by_kind[kind] += nbytes

    def received(self, peer: str, nbytes: int) -> None:
        self.link(peer).received_bytes += nbytes

    def saturated(self, peer: str, full_s: float, interval_s: float) -> float:
        """Share of the last interval in which the link was full; ``full_s`` is its total so far."""
        meter = self.link(peer)
        share = (full_s - meter.marked_full_s) / interval_s
        meter.marked_full_s = full_s
        return min(1.0, max(0.0, share))

    def refused(self, peer: str, reason: str) -> None:
        self.refusals.setdefault(peer, Counter())[reason.partition(":")[0][:60]] += 1

    def lag(self, seconds: float) -> None:
        self._lags.append(seconds)
