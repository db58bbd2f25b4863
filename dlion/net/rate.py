"""How fast a link delivers, and how far away its other end is, from acknowledgements alone.

Law: arithmetic on times and byte counts passed in; no clock. Rates are bytes per second.

The idea of delivery-rate samples, of the windowed maximum and of application-limited samples is that of BBR (Cardwell,
Cheng, Gunn, Yeganeh, Jacobson: "BBR: Congestion-Based Congestion Control", ACM Queue 14(5), 2016). Differences: there
is no pacing and no gain cycle. What may be in flight is rate * (rtt_min + queue_s): the standing queue of ``queue_s``
makes every sample an upward probe, and a rise of the link's rate drains that queue and shows in the next samples. The
minimum of the round-trip time is measured anew by letting just that queue run dry while the link stays busy. A queue
much longer than we meant to build says that the rate has dropped: then only the newest samples count.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

RTT_MEMORY_S = 10.0
RATE_MEMORY_S_MIN, RATE_MEMORY_S_MAX, RATE_MEMORY_RTTS = 1.0, 10.0, 10.0
INTERVAL_S_MIN = 1e-6


class Flight(NamedTuple):
    """What was known when a chunk left; its acknowledgement turns this into one sample."""

    sent_at: float
    delivered_bytes: int
    delivered_at: float
    first_sent_at: float
    limited: bool


class RateEstimator:
    """Delivery rate (bytes per second) and round-trip times (seconds) of one direction of one session."""

    def __init__(self, queue_s: float, now: float) -> None:
        self.queue_s = queue_s
        self.rate = 0.0
        """Bytes per second; 0.0 before the first sample."""
        self.rtt_min_s = 0.0
        self.rtt_s = 0.0
        """Smoothed round-trip time; 0.0 before the first sample."""
        self.proven = False
        """True once a sample was limited by the link and not by what there was to send."""
        self._best: deque[tuple[float, float]] = deque()
        self._delivered_bytes = 0
        self.restart(now)

    def restart(self, now: float) -> None:
        """A new link: nothing is in flight, and its distance may be another."""
        self._delivered_at = self._first_sent_at = now
        self._limited_until = 0
        self._starving = True
        self._rtt_min_at = now
        self._probe_until = 0.0
        self._probe_rtt_s = 0.0
        self.rtt_min_s = self.rtt_s = 0.0

    def sent(self, now: float, in_flight_bytes: int) -> Flight:
        """A chunk leaves while ``in_flight_bytes`` are unacknowledged before it."""
        if not in_flight_bytes:
            self._delivered_at = self._first_sent_at = now
            if self._starving:  # a new burst: what leaves before its first acknowledgement cannot fill the link
                self._limited_until = self._delivered_bytes + 1
        limited = self._delivered_bytes < self._limited_until or self._probe_until > 0.0
        return Flight(now, self._delivered_bytes, self._delivered_at, self._first_sent_at, limited)

    def starved(self, in_flight_bytes: int) -> None:
        """The window has room but nothing is left to send: what is in flight now proves no upper bound."""
        self._starving = True
        self._limited_until = self._delivered_bytes + in_flight_bytes

    def filled(self) -> None:
        """There was more to send than the window had room for."""
        self._starving = False

    def acked(self, now: float, nbytes: int, flight: Flight | None, held_s: float) -> None:
        """``nbytes`` more are acknowledged; ``flight`` is the newest chunk wholly covered, if any.

        The peer held the acknowledgement for ``held_s``: by that much the bytes arrived earlier than now says.
        """
        self._delivered_bytes += nbytes
        arrived_at = max(self._delivered_at, now - held_s)
        self._delivered_at = arrived_at
        if flight is None:
            return
        self._first_sent_at = flight.sent_at
        self.rtt_sample(now, arrived_at - flight.sent_at)
        interval_s = max(arrived_at - flight.delivered_at, flight.sent_at - flight.first_sent_at, INTERVAL_S_MIN)
        self._rate_sample(now, (self._delivered_bytes - flight.delivered_bytes) / interval_s, flight.limited)

    def _rate_sample(self, now: float, rate: float, limited: bool) -> None:
        if limited:
            if rate <= self.rate:
                return
        else:
            self.proven = True
            memory_s = min(max(RATE_MEMORY_RTTS * self.rtt_min_s, RATE_MEMORY_S_MIN), RATE_MEMORY_S_MAX)
            self._forget(now - memory_s)
        best = self._best
        while best and best[-1][1] <= rate:
            best.pop()
        best.append((now, rate))
        self.rate = best[0][1]

    def _forget(self, before: float) -> None:
        best = self._best
        while best and best[0][0] < before:
            best.popleft()

    def rtt_sample(self, now: float, rtt_s: float) -> None:
        """One measured round trip, the peer's holding time already taken off."""
        rtt_s = max(rtt_s, INTERVAL_S_MIN)
        self.rtt_s = rtt_s if not self.rtt_s else self.rtt_s + (rtt_s - self.rtt_s) / 8
        if self._probe_until:
            self._probe_rtt_s = min(self._probe_rtt_s, rtt_s)
            if now >= self._probe_until or rtt_s <= self.rtt_min_s * 1.25:
                self.rtt_min_s, self._rtt_min_at, self._probe_until = self._probe_rtt_s, now, 0.0
        elif not self.rtt_min_s or rtt_s <= self.rtt_min_s:
            self.rtt_min_s, self._rtt_min_at = rtt_s, now
        elif now - self._rtt_min_at > RTT_MEMORY_S:
            self._probe_until = now + 2 * (rtt_s + self.queue_s)
            self._probe_rtt_s = rtt_s
        if rtt_s > self.rtt_min_s + 3 * self.queue_s and len(self._best) > 1:
            newest = self._best[-1][0]
            self._forget(min(newest, now - rtt_s))
            self.rate = self._best[0][1]

    def window_bytes(self) -> float:
        """What may be in flight to use the whole link and build no queue longer than ``queue_s``."""
        return self.rate * (self.rtt_min_s + (0.0 if self._probe_until else self.queue_s))
