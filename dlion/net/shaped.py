"""Shaped links: any link, slowed down to what the resources it crosses give, and delayed.

Law: knows time only as ``loop.time()`` and timers only as ``loop.call_at``, so the same lines replay a trace over a
real connection and in virtual time. Only the write direction is shaped: each direction by its own sender. Rates are
functions of ``loop.time()``; who replays a trace from "now" passes ``rate.shifted(-loop.time())``.

A link is a FIFO with one delivery timer, set on its head: timers with equal deadlines cannot reorder it. Departures
are fixed when bytes are written, from the previous departure while there is a backlog, so a timer that fires late
delays bytes but loses no rate.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dlion.net.link import Dialer, Link, LinkError, Receiver
from dlion.net.wan import Rate

BACKLOG_S_MAX = 0.040
"""Half of it must outlast a late event loop (20 ms); all of it plus one chunk is what a control message waits."""
BACKLOG_BYTES_MAX = 8 << 20
EARLY_TIMER_S = 0.001
"""Some loops count in milliseconds and fire early; the second try comes this much later instead of spinning."""


class Bottleneck:
    """What is booked of one resource. Links that cross it book in the order in which they write (FIFO)."""

    __slots__ = ("_bits", "_finish_s", "_since_s", "rate")

    def __init__(self, rate: Rate) -> None:
        self.rate = rate
        self._since_s = self._finish_s = -math.inf
        self._bits = 0

    @property
    def free_at_s(self) -> float:
        """When the last of what is booked will be through."""
        return self._finish_s

    def reserve(self, now_s: float, nbytes: int) -> float:
        """Book ``nbytes`` behind everything booked before; the time at which the last of them is through.

        Bits are summed, as integers, from the start of a busy period, so rounding never adds up. Infinity when the
        rate never gives that much.
        """
        if now_s >= self._finish_s:
            self._since_s, self._bits = now_s, 0
        self._bits += nbytes * 8
        self._finish_s = self.rate.finish(self._since_s, self._bits)
        return self._finish_s


class Shaped:
    """A ``Link`` that lets bytes leave at the rate of the slowest of ``crosses`` and arrive ``delay_s`` later.

    Each resource is booked on its own (cut-through): a slow path does not hold the egress it shares with others.
    ``delay_s`` may vary over time; bytes never overtake each other. While ``up`` is 0 the link is out: it is lost when
    an outage begins. ``congested`` above ``backlog_bytes_max`` bytes or ``backlog_s_max`` seconds that wait to leave,
    until both are below half.
    """

    def __init__(
        self,
        link: Link,
        crosses: Sequence[Bottleneck],
        delay_s: float | Rate = 0.0,
        *,
        up: Rate | None = None,
        backlog_bytes_max: int = BACKLOG_BYTES_MAX,
        backlog_s_max: float = BACKLOG_S_MAX,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._now = self._loop.time
        self._link = link
        self._crosses = tuple(crosses)
        self._delay = delay_s if isinstance(delay_s, Rate) else Rate.constant(delay_s)
        self._bytes_max, self._s_max = backlog_bytes_max, backlog_s_max
        self._waiting: deque[tuple[float, int]] = deque()  # (departure, bytes) of what has not left
        self._flying: deque[tuple[float, bytes | bytearray | memoryview]] = deque()  # (arrival, data), in order
        self._backlog = 0
        self._departure_s = self._arrival_s = 0.0
        self._busy_s = 0.0
        self._congested = self._held = self._closing = False
        self._armed = False  # somebody will look at the head of what flies: a timer, a delivery going on, ``_release``
        self._timer: asyncio.TimerHandle | None = None
        self._wake: asyncio.TimerHandle | None = None
        self._outage: asyncio.TimerHandle | None = None
        self._receiver: Receiver | None = None
        self._lost_because = ""
        self.written_bytes = 0
        self.delivered_bytes = 0
        if up is not None and math.isfinite(out_s := _next_outage(up, self._now())):
            self._outage = self._loop.call_at(out_s, self._out)

    # -- what was used of what there was ------------------------------------------------------------------------

    @property
    def busy_s(self) -> float:
        """Seconds so far in which something waited to leave."""
        return self._busy_s - max(0.0, min(self._departure_s - self._now(), self._busy_s))

    def capacity_bytes(self, t0: float, t1: float) -> float:
        """The most that this link alone could have carried from ``t0`` to ``t1``; infinity when nothing limits it."""
        return min((b.rate.integral(t0, t1) / 8 for b in self._crosses), default=math.inf)

    # -- Link ---------------------------------------------------------------------------------------------------

    @property
    def backlog_bytes(self) -> int:
        self._depart(self._now())
        return self._backlog + self._link.backlog_bytes

    @property
    def congested(self) -> bool:
        return self._congested or self._held

    def attach(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._link.attach(_Inbound(self, receiver))

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing:
            return
        now = self._now()
        nbytes = data.nbytes if isinstance(data, memoryview) else len(data)
        departure = free = self._departure_s if self._departure_s > now else now
        for bottleneck in self._crosses:
            if (through := bottleneck.reserve(now, nbytes)) > departure:
                departure = through
        self._departure_s = arrival = departure
        if departure < math.inf:
            self._busy_s += departure - free
            arrival += self._delay.at(departure)
        self._arrival_s = max(self._arrival_s, arrival)
        self.written_bytes += nbytes
        self._backlog += nbytes
        self._waiting.append((departure, nbytes))
        self._flying.append((self._arrival_s, data))
        if not self._armed:
            self._arm()
        self._depart(now)
        if not self._congested and (self._backlog > self._bytes_max or departure - now > self._s_max):
            self._congested = True
            self._watch()

    def close(self) -> None:
        self._closing = True
        if not self._flying:
            self._link.close()

    def abort(self) -> None:
        self._stop()
        self._link.abort()

    # -- time passes --------------------------------------------------------------------------------------------

    def _depart(self, now: float) -> None:
        """What has left no longer counts as backlog."""
        waiting = self._waiting
        while waiting and waiting[0][0] <= now:
            self._backlog -= waiting.popleft()[1]

    def _arm(self) -> None:
        self._armed = self._flying[0][0] < math.inf
        if self._armed:
            self._timer = self._loop.call_at(self._flying[0][0], self._deliver)

    def _deliver(self) -> None:
        now, flying, link = self._now(), self._flying, self._link
        if flying and flying[0][0] > now:
            self._timer = self._loop.call_at(max(flying[0][0], now + EARLY_TIMER_S), self._deliver)
            return
        while flying and flying[0][0] <= now:
            data = flying.popleft()[1]
            self.delivered_bytes += data.nbytes if isinstance(data, memoryview) else len(data)
            link.write(data)
            if link.congested:
                self._held = True
                return
        self._armed = False
        if flying:
            self._arm()
        elif self._closing:
            self._link.close()

    def _watch(self) -> None:
        """Set the timer for the moment at which the backlog will be below half of both bounds."""
        left, at = self._backlog, self._departure_s - self._s_max / 2
        for departure, nbytes in self._waiting:
            if left <= self._bytes_max // 2:
                break
            left -= nbytes
            at = max(at, departure)
        if at < math.inf:
            self._wake = self._loop.call_at(at, self._relieve)

    def _relieve(self) -> None:
        now = self._now()
        self._depart(now)
        # A hair of slack: the difference of two times is not exact, and a wake-up for nothing would repeat.
        if self._backlog > self._bytes_max // 2 or self._departure_s - now > self._s_max / 2 + 1e-9:
            self._watch()
            return
        self._congested, self._wake = False, None
        self._tell_writable()

    def _tell_writable(self) -> None:
        if self._receiver is not None and not self._closing and not self.congested:
            self._receiver.link_writable()

    def _release(self) -> None:
        """The link below takes more again."""
        if self._held:
            self._held = False
            self._deliver()
        self._tell_writable()

    def _out(self) -> None:
        self._lost_because = "the link is out (its trace says so)"
        self.abort()

    def _stop(self) -> None:
        self._closing = True
        self._flying.clear()
        self._waiting.clear()
        self._backlog = 0
        for timer in (self._timer, self._wake, self._outage):
            if timer is not None:
                timer.cancel()

    def _lost(self, reason: str) -> None:
        self._stop()
        if self._receiver is not None:
            self._receiver.link_lost(self._lost_because or reason)


class _Inbound:
    """Stands between the wrapped link and the receiver; the way in is the receiver's own, untouched."""

    def __init__(self, shaped: Shaped, receiver: Receiver) -> None:
        self.get_buffer = receiver.get_buffer
        self.buffer_updated = receiver.buffer_updated
        self.link_writable = shaped._release
        self.link_lost = shaped._lost


@dataclass(frozen=True)
class Route:
    """How bytes to one peer travel: built once per peer, so that its bottlenecks survive reconnections."""

    crosses: tuple[Bottleneck, ...] = ()
    delay_s: float | Rate = 0.0
    up: Rate | None = None

    def shape(self, link: Link) -> Shaped:
        return Shaped(link, self.crosses, self.delay_s, up=self.up)


class ShapedDialer:
    """A dialer whose links are shaped by ``routes`` (peers without one are not), and which knows outages."""

    def __init__(self, dialer: Dialer, routes: Mapping[str, Route]) -> None:
        self._dialer = dialer
        self._routes = routes

    async def dial(self, peer: str) -> Link:
        """As the dialer below, and LinkError while the link to ``peer`` is out."""
        route = self._routes.get(peer)
        if route is None:
            return await self._dialer.dial(peer)
        now = asyncio.get_running_loop().time
        if route.up is not None and route.up.at(now()) == 0:
            raise LinkError(f"{peer}: the link is out until {route.up.next_change(now()) - now():.3g} s from now")
        return route.shape(await self._dialer.dial(peer))


def _next_outage(up: Rate, now: float) -> float:
    """The first time from ``now`` on at which ``up`` is 0; infinity when it never is."""
    if 0.0 not in up.values:
        return math.inf
    t = now
    while math.isfinite(t) and up.at(t) != 0:
        t = up.next_change(t)
    return t
