"""A relay: TCP connections go through it and share rates that no single one of the processes at their ends could hold.

Law: forwards bytes and understands none. It is meant to run alone in a process, which the caller starts; it creates no
loop. Several connections, of several pairs of processes, cross the same bottlenecks here, so a resource that peers in
different processes share is enforced in one place. A full queue stops reading: senders see real backpressure.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dlion.net.link import Link
from dlion.net.shaped import Bottleneck, Route
from dlion.net.stream import StreamLink
from dlion.net.wan import Rate

READ_BYTES_MAX = 8 * 1024
"""What leaves and arrives as one piece: 13 ms at 5 Mbit/s."""
CONNECT_S = 10.0


@dataclass(frozen=True)
class Way:
    """One direction: the resources it crosses by name, the one-way delay, and when it is up."""

    crosses: tuple[str, ...] = ()
    delay_s: float | Rate = 0.0
    up: Rate | None = None


@dataclass(frozen=True)
class Lane:
    """Where to listen and to whom to connect on ("host:port"; port 0 takes a free one), and both ways between."""

    target: str
    forward: Way = Way()
    back: Way = Way()
    listen: str = "127.0.0.1:0"


class _Half:
    """Hears one side's link and writes what it hears to the other side's; both links are shaped where they write."""

    def __init__(self, heard: StreamLink, onward: Link) -> None:
        self._heard, self._onward = heard, onward
        self._buffer = memoryview(bytearray(READ_BYTES_MAX))
        self.partner: _Half | None = None

    def get_buffer(self, size_hint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._onward.write(bytes(self._buffer[:nbytes]))
        if self._onward.congested:
            self._heard.pause_reading()

    def link_writable(self) -> None:
        """The way back to the side we hear takes more: the partner may read again."""
        if self.partner is not None:
            self.partner._heard.resume_reading()

    def link_lost(self, reason: str) -> None:
        self._onward.close()


class _Door(asyncio.Protocol):
    def __init__(self, relay: Relay, lane: Lane) -> None:
        self._relay, self._lane = relay, lane

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._relay._join(StreamLink(transport), self._lane)


class Relay:
    """Running lanes. ``ports[i]`` is where lane i listens."""

    def __init__(self, resources: Mapping[str, Rate], start_s: float) -> None:
        self._start_s = start_s
        self._bottlenecks = {name: Bottleneck(rate.shifted(-start_s)) for name, rate in resources.items()}
        self._links: set[StreamLink] = set()
        self._joining: set[asyncio.Task[None]] = set()
        self._servers: list[asyncio.Server] = []
        self.ports: tuple[int, ...] = ()

    def _route(self, way: Way) -> Route:
        delay = way.delay_s.shifted(-self._start_s) if isinstance(way.delay_s, Rate) else way.delay_s
        up = way.up.shifted(-self._start_s) if way.up is not None else None
        return Route(tuple(self._bottlenecks[name] for name in way.crosses), delay, up)

    async def _listen(self, lane: Lane) -> None:
        for way in (lane.forward, lane.back):
            unknown = set(way.crosses) - set(self._bottlenecks)
            if unknown:
                raise ValueError(f"the lane to {lane.target} crosses unknown resources: {', '.join(sorted(unknown))}")
        host, port = _address(lane.listen)
        server = await asyncio.get_running_loop().create_server(lambda: _Door(self, lane), host, port)
        self._servers.append(server)
        self.ports += (server.sockets[0].getsockname()[1],)

    def _join(self, accepted: StreamLink, lane: Lane) -> None:
        self._keep(accepted)
        task = asyncio.get_running_loop().create_task(self._connect(accepted, lane))
        self._joining.add(task)
        task.add_done_callback(self._joining.discard)

    def _keep(self, link: StreamLink) -> None:
        self._links.add(link)
        link.lost.add_done_callback(lambda _: self._links.discard(link))

    async def _connect(self, accepted: StreamLink, lane: Lane) -> None:
        try:
            async with asyncio.timeout(CONNECT_S):
                transport, _ = await asyncio.get_running_loop().create_connection(
                    asyncio.Protocol, *_address(lane.target)
                )
        except OSError:  # a time-out is one too: whoever dialled sees the connection end
            accepted.abort()
            return
        connected = StreamLink(transport)
        self._keep(connected)
        onward, back = self._route(lane.forward).shape(connected), self._route(lane.back).shape(accepted)
        here, there = _Half(accepted, onward), _Half(connected, back)
        here.partner, there.partner = there, here
        back.attach(here)
        onward.attach(there)

    async def close(self) -> None:
        """Listen no more and cut every connection."""
        for server in self._servers:
            server.close()
        for task in list(self._joining):
            task.cancel()
        await asyncio.gather(*self._joining, return_exceptions=True)
        for link in list(self._links):
            link.abort()
            await link.lost
        for server in self._servers:
            await server.wait_closed()


async def relay(lanes: Sequence[Lane], resources: Mapping[str, Rate], start_s: float | None = None) -> Relay:
    """Start forwarding. Rates are in bits per second, of the seconds since ``start_s`` (loop time; default: now)."""
    now = asyncio.get_running_loop().time()
    running = Relay(resources, now if start_s is None else start_s)
    try:
        for lane in lanes:
            await running._listen(lane)
    except BaseException:
        await running.close()
        raise
    return running


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"{text!r} is not host:port")
    return host.strip("[]"), int(port)
