"""How fast a link delivers, and how far away its other end is, from acknowledgements alone.

Law: arithmetic on times and byte counts passed in; no clock. Rates are bytes per second.

The idea of delivery-rate samples, of the windowed maximum and of application-limited samples is that of BBR (Cardwell,
Cheng, Gunn, Yeganeh, Jacobson: "BBR: Congestion-Based Congestion Control", ACM Queue 14(5), 2016). Differences: there
is no gain cycle. What may be in flight is rate * (distance + queue_s): the standing queue of ``queue_s`` makes every
sample an upward probe, and a rise of the link's rate drains that queue and shows in the next samples. Pacing only
spreads what a window that opens at once would send as a clump.

Who speaks in bursts and is silent between them is measured by trains: chunks that arrive one behind the other on a link
that never ran dry (packet pairs and trains: Dovrolis, Ramanathan, Moore: "Packet-Dispersion Techniques and a
Capacity-Estimation Methodology", IEEE/ACM ToN 12(6), 2004). A train counts from when its first byte could have arrived,
not from its first arrival, so a receiver that was late cannot make it look fast; and no more than the spacing of its
arrivals shows, so others' queues cannot either. That is a lower bound, whatever was sent. The spacing alone may keep
the estimate where it is, and lowers it.

Our own queue is told from distance by one-way times: acknowledgements carry the receiver's clock, and the least of
(arrival there - departure here) has no queue in it, whatever the two clocks show. Round trips alone would take the
queue of the opposite direction for distance, and two busy directions would talk each other up without end. The least
is measured anew by letting just our queue run dry while the link stays busy (routes change, clocks drift). A queue much
longer than we meant to build says that the rate has dropped: then only the newest samples count.
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

LEAST_MEMORY_S = 10.0
RATE_MEMORY_S_MIN, RATE_MEMORY_S_MAX, RATE_MEMORY_RTTS = 1.0, 10.0, 10.0
INTERVAL_S_MIN = 1e-6
SAMPLE_S_MIN = 1e-3
"""A sample of less counts as one of so long: not every loop's clock tells less, and nothing would ever take it back."""
TRAIN_S_MIN, TRAIN_S_PROOF, TRAIN_S_MAX = 0.005, 0.010, 1.0
"""A shorter train counts as if it took so long; a shorter one proves no upper bound; of longer ones, flights tell."""
PACE_GAIN, PACE_S, PACE_BYTES = 1.5, 0.040, 64 * 1024
"""A burst that goes on after its first acknowledgement leaves at so many times the rate, so much of it at once."""
CLOCK_TICKS = 1 << 32
"""The receiver's clock in microseconds wraps here (after 71 minutes)."""


class Flight(NamedTuple):
    """What was known when a chunk left; its acknowledgement turns this into one sample."""

    sent_at: float
    first_sent_at: float
    delivered_bytes: int
    delivered_at: float | None
    """Receiver's clock; None when nothing was in flight, so that the link's silence before is not counted."""
    limited: bool
    burst: int
    """Chunks of the same burst left while more stood waiting."""
    place: int
    """Bytes before the first chunk that left in the same instant."""
    end: int
    """Bytes up to the end of this chunk."""


class Arrival:
    """What the acknowledgements of all streams say of one arrival."""

    __slots__ = ("flight", "held_s", "nbytes", "newest")

    def __init__(self, held_s: float) -> None:
        self.held_s = held_s
        """How long the peer then held the acknowledgement."""
        self.nbytes = 0
        self.flight: Flight | None = None
        """The newest chunk wholly covered."""
        self.newest: Flight | None = None
        """The chunk that arrived then, perhaps only in part: of the newest byte."""

    def add(self, nbytes: int, flight: Flight | None, newest: Flight | None) -> None:
        self.nbytes += nbytes
        self.flight = _later(self.flight, flight)
        self.newest = _later(self.newest, newest)


def _later(a: Flight | None, b: Flight | None) -> Flight | None:
    return a if b is None or (a is not None and a.sent_at > b.sent_at) else b


class RateEstimator:
    """Delivery rate (bytes per second) and round-trip times (seconds) of one direction of one session."""

    def __init__(self, queue_s: float, now: float) -> None:
        self.queue_s = queue_s
        self.rate = 0.0
        """Bytes per second; 0.0 before the first sample."""
        self.proven = False
        """True once a sample was limited by the link and not by what there was to send."""
        self.shown_bytes, self.shown_s = 0, 0.0
        """Totals of what was delivered while more stood waiting, and how long that took: the link's own rate."""
        self._busy = False
        self._best: deque[tuple[float, float]] = deque()
        self._delivered_bytes = 0
        self.restart(now)

    def restart(self, now: float) -> None:
        """A new link: nothing is in flight, and its distance may be another."""
        self.distance_s = 0.0
        """Round-trip time less our own queue; 0.0 before the first sample."""
        self.rtt_s = 0.0
        """Smoothed round-trip time; 0.0 before the first sample."""
        self._first_sent_at = self._acked_at = now
        self._delivered_at: float | None = None
        self._limited_until = self._first_end = self._probe_end = 0
        self._starving = self._paused = True
        self.pace_at = now
        """Only then may another chunk leave, if it can wait."""
        self._burst = 0
        self._sent_at, self._place = -1.0, 0
        self._train: Flight | None = None
        """The first chunk known to have arrived of those that came one behind the other."""
        self._train_at, self._train_bytes = 0.0, 0
        self._least_s: float | None = None
        """Least one-way time, the unknown difference of the clocks included."""
        self._least_bytes = math.inf
        """At least what the link carried for us in that time."""
        self._least_at = now
        self._probe_until = 0.0
        self._probe_least_s = 0.0
        self._clock_ticks = 0
        self._clock_s = 0.0

    def sent(self, now: float, in_flight_bytes: int, nbytes: int) -> Flight:
        """A chunk of ``nbytes`` leaves while ``in_flight_bytes`` are unacknowledged before it."""
        place = self._delivered_bytes + in_flight_bytes
        if self._paused and in_flight_bytes < self.rate * self.distance_s:  # the link may have run dry meanwhile
            self._limited_until = max(self._limited_until, place)
        if self._paused or not in_flight_bytes or now > self._sent_at:
            self._sent_at, self._place = now, place
            self._burst += self._paused or not in_flight_bytes
            self._paused = False
        if not in_flight_bytes:
            self._first_sent_at, self._first_end, self._delivered_at = now, 0, None
            if now - self._acked_at > LEAST_MEMORY_S:
                self._least_s, self._probe_until = None, 0.0
            if self._starving:  # a new burst: what leaves before its first acknowledgement cannot fill the link
                self._limited_until = self._delivered_bytes + 1
        done, early = self._delivered_bytes, self._delivered_bytes < self._limited_until
        if self.rate and not early:
            at_once_s = max(PACE_S, PACE_BYTES / (PACE_GAIN * self.rate))
            self.pace_at = max(self.pace_at, now - at_once_s) + nbytes / (PACE_GAIN * self.rate)
        end = place + nbytes
        if self._probe_until:
            self._probe_end = end
        # Before that we were silent, or held back by a probe's narrow window, and a sample would count it.
        held_back = self._first_end <= max(self._limited_until, self._probe_end)
        limited = early or held_back or self._delivered_at is None
        return Flight(now, self._first_sent_at, done, self._delivered_at, limited, self._burst, self._place, end)

    def starved(self, in_flight_bytes: int) -> None:
        """The window has room but nothing is left to send: what is in flight now proves no upper bound."""
        self._starving = self._paused = True
        self._limited_until = self._delivered_bytes + in_flight_bytes

    def filled(self, more: bool) -> None:
        """The window is full; ``more`` waits, or it was just enough."""
        self._starving, self._paused = False, not more

    def acked(self, now: float, arrival: Arrival, arrived_ticks: int) -> None:
        """More is acknowledged; its newest byte arrived at ``arrived_ticks`` of the peer's clock (microseconds,
        wrapping)."""
        nbytes, flight, newest, held_s = arrival.nbytes, arrival.flight, arrival.newest, arrival.held_s
        self._delivered_bytes += nbytes
        self._acked_at = now
        before, arrived_at = self._delivered_at, self._unwrap(arrived_ticks)
        self._delivered_at = arrived_at
        if flight is None or newest is None:
            return
        # What arrived then is of ``newest``; ``flight`` may have been there long before, and its word held back.
        rtt_s = max(now - held_s - newest.sent_at, INTERVAL_S_MIN)
        queued_s = self._queued(now, arrived_at - newest.sent_at)
        since_s = 0.0 if before is None else arrived_at - before
        if since_s > 0.0 or before is None:  # else it arrived with the one before
            self._busy = 0.0 < since_s <= queued_s
        if self._delivered_bytes == flight.end:  # else it arrived before the newest bytes, and was under way for less
            idle = since_s > queued_s + self._least_bytes / max(self.rate, 1.0)
            self._least_bytes = min(self._least_bytes, nbytes if idle else flight.end - flight.delivered_bytes)
        if self._busy:  # this chunk waited all the while
            self.shown_bytes += nbytes
            self.shown_s += max(since_s, 0.0)
        self.rtt_s += (rtt_s - self.rtt_s) / (8 if self.rtt_s else 1)
        base_s = max(rtt_s - queued_s, INTERVAL_S_MIN)
        # Slow up, fast down: what rises and falls here is the opposite direction's queue, and too high floods ours.
        self.distance_s += (base_s - self.distance_s) / (8 if 0.0 < self.distance_s < base_s else 1)
        if flight.delivered_at is None:
            interval_s = now - held_s - flight.first_sent_at
        else:
            interval_s = max(arrived_at - flight.delivered_at, flight.sent_at - flight.first_sent_at)
        self._first_sent_at, self._first_end = flight.sent_at, flight.end
        delivered_bytes = self._delivered_bytes - flight.delivered_bytes
        limited = flight.limited or flight.burst != newest.burst
        self._rate_sample(now, delivered_bytes / max(interval_s, SAMPLE_S_MIN), limited)
        self._train_sample(now, arrived_at, newest)
        if queued_s > 3 * self.queue_s and len(self._best) > 1:
            self._forget(min(self._best[-1][0], now - rtt_s))
            self.rate = self._best[0][1]

    def pinged(self, rtt_s: float) -> None:
        """A PING came back after ``rtt_s``: good enough until chunks have been acknowledged."""
        if self._least_s is None:
            self.distance_s = self.rtt_s = max(rtt_s, INTERVAL_S_MIN)

    def _unwrap(self, ticks: int) -> float:
        """Seconds of the receiver's clock, from its wrapping microseconds."""
        if self._least_s is None:
            self._clock_s = 0.0
        else:
            step = (ticks - self._clock_ticks) % CLOCK_TICKS
            self._clock_s += (step if step < CLOCK_TICKS // 2 else step - CLOCK_TICKS) * 1e-6
        self._clock_ticks = ticks
        return self._clock_s

    def _queued(self, now: float, one_way_s: float) -> float:
        """How long a chunk waited in our own queue, from its one-way time."""
        least_s = self._least_s
        if least_s is None or one_way_s <= least_s:
            if one_way_s != least_s:
                self._least_bytes = math.inf
            self._least_s, self._least_at, self._probe_until = one_way_s, now, 0.0
            return 0.0
        queued_s = one_way_s - least_s
        if self._probe_until:
            self._probe_least_s = min(self._probe_least_s, one_way_s)
            if now >= self._probe_until or queued_s <= self.queue_s / 16:
                self._least_s, self._least_at, self._probe_until = self._probe_least_s, now, 0.0
                self._least_bytes = math.inf
                return one_way_s - self._probe_least_s
        elif now - self._least_at > LEAST_MEMORY_S:
            self._probe_until = now + 2 * (self.rtt_s + self.queue_s)
            self._probe_least_s = one_way_s
        return queued_s

    def _train_sample(self, now: float, arrived_at: float, flight: Flight) -> None:
        """What the chunks show that arrived one behind the other, up to this one."""
        train, delivered_bytes = self._train, self._delivered_bytes
        if train is None or train.burst != flight.burst or not self._busy:
            train = self._train = flight
            self._train_at, self._train_bytes = arrived_at, delivered_bytes
        assert self._least_s is not None
        took_s, since_s = arrived_at - train.sent_at - self._least_s, arrived_at - self._train_at
        if took_s > TRAIN_S_MAX or since_s <= 0.0:
            return
        least = (delivered_bytes - train.place - self._least_bytes) / max(took_s, TRAIN_S_MIN)
        most = (delivered_bytes - self._train_bytes) / since_s
        least = min(least, most)
        if least > self.rate:
            self._rate_sample(now, least, True)
        elif since_s >= TRAIN_S_PROOF:
            self._rate_sample(now, max(least, min(most, self.rate)), False)

    def _rate_sample(self, now: float, rate: float, limited: bool) -> None:
        before = self.rate
        if limited:
            if rate <= before:
                return
        else:
            self.proven = True
            memory_s = min(max(RATE_MEMORY_RTTS * self.distance_s, RATE_MEMORY_S_MIN), RATE_MEMORY_S_MAX)
            self._forget(now - memory_s)
        best = self._best
        while best and best[-1][1] <= rate:
            best.pop()
        best.append((now, rate))
        self.rate = best[0][1]
        if self.rate > before and self.pace_at > now:  # of a first small message's rate the pause may last for minutes
            self.pace_at = now + (self.pace_at - now) * before / self.rate

    def _forget(self, before: float) -> None:
        best = self._best
        while best and best[0][0] < before:
            best.popleft()

    def window_bytes(self) -> float:
        """What may be in flight to use the whole link and build no queue longer than ``queue_s``."""
        return self.rate * (self.distance_s + (0.0 if self._probe_until else self.queue_s))
