"""A saturating session on a simple bottleneck in virtual time: the link is used, the queue stays short."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

import pytest

from dlion.net.rate import Arrival, Flight, RateEstimator
from dlion.net.session import NEVER, Session, SessionLimits

CONTROL, UPDATE, BULK = 0, 1, 2
MESSAGE = bytes(1 << 20)
SLICE_BYTES = 1448 * 8


class Bottleneck:
    """One direction of a path: a FIFO that serves ``rate`` bytes per second, then ``delay_s`` of distance."""

    def __init__(self, rate: float, delay_s: float) -> None:
        self.rate = rate
        self.delay_s = delay_s
        self.free_at = 0.0
        self.arrived_at = 0.0
        self.jitter_s = 0.0
        self.rng = random.Random(7)

    def arrivals(self, now: float, data: memoryview) -> list[tuple[float, memoryview]]:
        """When each slice of ``data``, written now, reaches the other end."""
        arrived = []
        for start in range(0, data.nbytes, SLICE_BYTES):
            part = data[start : start + SLICE_BYTES]
            self.free_at = max(self.free_at, now) + part.nbytes / self.rate
            late_s = self.rng.random() * self.jitter_s
            self.arrived_at = max(self.arrived_at, self.free_at + self.delay_s + late_s)
            arrived.append((self.arrived_at, part))
        return arrived


class World:
    """Two sessions and a path between them, driven by a heap of events."""

    def __init__(self, rate_mbps: float, rtt_s: float, limits: SessionLimits | None = None) -> None:
        limits = limits or SessionLimits()
        self.now = 0.0
        self.ends = [Session(limits, 0.0), Session(limits, 0.0)]
        self.paths = [Bottleneck(rate_mbps * 125_000, rtt_s / 2) for _ in range(2)]
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = 0
        self.messages: list[list[tuple[float, int, int]]] = [[], []]
        self.delivered_bytes = [0, 0]
        self.refill = [True, False]
        for end in self.ends:
            end.resume({}, 0.0)

    def at(self, when: float, what: Callable[[], None]) -> None:
        self.order += 1
        heapq.heappush(self.events, (when, self.order, what))

    def pump(self, index: int) -> None:
        end = self.ends[index]
        while self.refill[index] and end.queued_bytes < len(MESSAGE):
            end.send(UPDATE, MESSAGE, self.now)
        while buffers := end.outgoing(self.now):
            for when, part in self.paths[index].arrivals(self.now, memoryview(b"".join(buffers))):
                self.at(when, lambda part=part: self.arrive(1 - index, part))
        if end.ack_at != NEVER:
            self.at(end.ack_at, lambda: self.pump(index))

    def arrive(self, index: int, part: memoryview) -> None:
        end = self.ends[index]
        self.delivered_bytes[index] += part.nbytes
        while part.nbytes:
            place = end.get_buffer(-1)
            taken = min(place.nbytes, part.nbytes)
            place[:taken] = part[:taken]
            part = part[taken:]
            for message in end.buffer_updated(taken, self.now):
                self.messages[index].append((self.now, message.stream, message.seq))
        self.pump(index)

    @property
    def estimate_mbps(self) -> float:
        return self.ends[0].estimate.rate / 125_000

    def run(self, until: float) -> None:
        while self.events and self.events[0][0] <= until:
            self.now, _, what = heapq.heappop(self.events)
            what()
        self.now = until


@pytest.mark.parametrize("rtt_ms", [1, 30, 200])
@pytest.mark.parametrize("mbps", [5, 20, 50, 200])
def test_a_saturating_sender_uses_the_link_and_control_does_not_wait(mbps: int, rtt_ms: int) -> None:
    """After 3 s of finding out: >= 0.95 of the link for 12 s (a drain for the round-trip time included), and a control
    message now and then waits <= 150 ms beyond the round trip."""
    world = World(mbps, rtt_ms / 1000)
    world.pump(0)
    world.run(3.0)
    before, sent_at = world.delivered_bytes[1], {}
    for tick in range(60):
        seq = world.ends[0].send(CONTROL, b"how long?", world.now)
        sent_at[seq] = world.now
        world.pump(0)
        world.run(3.0 + (tick + 1) * 0.2)
    waits = [when - sent_at[seq] for when, stream, seq in world.messages[1] if stream == CONTROL]
    used = (world.delivered_bytes[1] - before) / 12.0 / (mbps * 125_000)
    assert len(waits) >= 58
    assert used >= 0.95
    assert max(waits) <= rtt_ms / 1000 + 0.150


@pytest.mark.parametrize("rtt_ms", [1, 30, 200])
@pytest.mark.parametrize(("first", "then"), [(50, 10), (20, 2), (200, 50)])
def test_a_drop_of_the_rate_is_followed(first: int, then: int, rtt_ms: int) -> None:
    """Within 2 s beyond the time in which what was in flight drains at the new rate, also where half is lost twice."""
    world = World(first, rtt_ms / 1000)
    world.pump(0)
    world.run(4.0)
    assert world.estimate_mbps == pytest.approx(first, rel=0.1)
    in_flight_s = world.ends[0].unacked_bytes / (then * 125_000)
    world.paths[0].rate = then * 125_000
    world.run(4.0 + in_flight_s + 2.0 + rtt_ms / 1000)
    assert world.estimate_mbps == pytest.approx(then, rel=0.1)
    world.run(world.now + 3.0)
    assert world.ends[0].unacked_bytes / (then * 125_000) <= rtt_ms / 1000 + 0.150
    before, start = world.delivered_bytes[1], world.now
    world.run(start + 5.0)
    assert (world.delivered_bytes[1] - before) / (then * 125_000) >= 0.95 * 5.0


@pytest.mark.parametrize("rtt_ms", [1, 30, 200])
@pytest.mark.parametrize("mbps", [(5, 5), (20, 5)])
def test_two_busy_directions_do_not_talk_each_other_into_long_queues(mbps: tuple[int, int], rtt_ms: int) -> None:
    """For half a minute: acknowledgements wait in the opposite queue, which must not count as distance for ever."""
    world = World(mbps[0], rtt_ms / 1000)
    world.paths[1].rate = mbps[1] * 125_000
    world.refill = [True, True]
    world.pump(0)
    world.pump(1)
    world.run(3.0)
    before = list(world.delivered_bytes)
    longest = [0.0, 0.0]
    for tick in range(270):
        world.run(3.0 + (tick + 1) * 0.1)
        longest = [max(old, path.free_at - world.now) for old, path in zip(longest, world.paths, strict=True)]
    used = [(world.delivered_bytes[1 - i] - before[1 - i]) / (mbps[i] * 125_000) / 27 for i in range(2)]
    assert min(used) >= 0.95
    assert max(longest) <= 0.150


@pytest.mark.parametrize("rtt_ms", [1, 30, 200])
def test_a_rise_of_the_rate_is_found(rtt_ms: int) -> None:
    """From 5 to 100 Mbit/s within 3 s: the standing queue is the probe."""
    world = World(5, rtt_ms / 1000)
    world.pump(0)
    world.run(4.0)
    world.paths[0].rate = 100 * 125_000
    world.run(7.0)
    assert world.estimate_mbps == pytest.approx(100, rel=0.1)


def test_having_little_to_say_does_not_lower_the_estimate() -> None:
    """Twenty seconds of small messages after three of full load; then the link is used at once."""
    world = World(50, 0.03)
    world.pump(0)
    world.run(3.0)
    world.refill[0] = False
    world.run(4.0)
    assert world.ends[0].idle
    found = world.estimate_mbps
    for tick in range(400):
        world.ends[0].send(UPDATE, bytes(2_000), world.now)
        world.pump(0)
        world.run(4.0 + (tick + 1) * 0.05)
    assert world.estimate_mbps >= found * 0.99
    world.refill[0] = True
    before = world.delivered_bytes[1]
    world.pump(0)
    for _ in range(10):
        world.run(world.now + 0.1)
        assert world.estimate_mbps >= found * 0.99
    assert (world.delivered_bytes[1] - before) / (50 * 125_000) >= 0.93


def test_small_messages_alone_claim_no_more_than_the_link_gives() -> None:
    world = World(20, 0.05)
    world.refill[0] = False
    for tick in range(200):
        world.ends[0].send(UPDATE, bytes(3_000), world.now)
        world.pump(0)
        world.run((tick + 1) * 0.02)
    assert 0.5 < world.estimate_mbps <= 20 * 1.05


def arrival(nbytes: int, flight: Flight) -> Arrival:
    """All of that chunk, acknowledged at once."""
    found = Arrival(held_s=0.0)
    found.add(nbytes, flight, flight)
    return found


def test_a_word_that_is_said_first_does_not_hold_up_what_follows() -> None:
    """Ninety bytes show a rate of a kilobyte per second. Who was paced by that is not, once more is known."""
    estimate = RateEstimator(queue_s=0.1, now=0.0)
    word, first = estimate.sent(0.0, 0, 90), estimate.sent(0.0, 90, 8192)
    estimate.acked(0.12, arrival(90, word), 60_000)
    assert 0 < estimate.rate < 1000
    estimate.sent(0.12, 8192, 8192)
    assert estimate.pace_at > 5.0
    estimate.acked(0.2, arrival(8192, first), 140_000)
    assert estimate.rate > 40_000 and estimate.pace_at < 0.4


@pytest.mark.parametrize("rtt_ms", [30, 200])
def test_jitter_neither_starves_nor_floods(rtt_ms: int) -> None:
    """Up to 10 ms of random extra delay per slice, in order, both ways."""
    world = World(50, rtt_ms / 1000)
    for path in world.paths:
        path.jitter_s = 0.010
    world.pump(0)
    world.run(3.0)
    before = world.delivered_bytes[1]
    world.run(16.0)
    assert (world.delivered_bytes[1] - before) / (50 * 125_000) >= 0.95 * 13
    assert world.ends[0].unacked_bytes / (50 * 125_000) <= rtt_ms / 1000 + 0.150


def test_a_memory_fast_link_is_not_throttled() -> None:
    """6 Gbit/s at 0.1 ms: most of it from the first tenth of a second on."""
    world = World(6_000, 0.0001)
    world.pump(0)
    world.run(0.1)
    before = world.delivered_bytes[1]
    world.run(0.2)
    assert (world.delivered_bytes[1] - before) / (6_000 * 125_000 * 0.1) >= 0.95
