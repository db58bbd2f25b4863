"""Connections over pipes and shaped pipes in virtual time: callbacks, timers, links that come and go."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from dlion import clock
from dlion.neighbours import LEAD
from dlion.net.chunks import DATA, HEADER, Bye, ProtocolError
from dlion.net.connection import HEARTBEAT_S, Connection
from dlion.net.greeting import EARLY_BYTES_MAX, HELLO_BYTES_MAX, Greeting, LeftError
from dlion.net.link import Link, LinkError, feed
from dlion.net.pipe import BACKLOG_BYTES_MAX, pipe
from dlion.net.session import Session, SessionLimits
from dlion.net.shaped import Bottleneck, Shaped
from dlion.net.wan import Rate

CONTROL, UPDATE, BULK = 0, 1, 2


def virtual(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run an async test in virtual time."""

    def run() -> None:
        clock.run(test())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


class Peer:
    """A connection that writes down what happens to it."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.heard: list[tuple[int, int, bytes]] = []
        self.heard_at: list[float] = []
        self.lost: list[str] = []
        self.writable = 0
        self.inside = False
        self.on_message: Callable[[], None] = lambda: None
        self.connection = Connection(
            Session(SessionLimits(), loop.time()),
            on_message=self._message,
            on_writable=self._writable,
            on_lost=self.lost.append,
        )

    def _message(self, stream: int, seq: int, body: memoryview) -> None:
        assert not self.inside, "callbacks are not re-entered"
        self.inside = True
        self.heard.append((stream, seq, bytes(body[:20])))
        self.heard_at.append(asyncio.get_running_loop().time())
        self.on_message()
        self.inside = False

    def _writable(self) -> None:
        assert not self.inside
        assert self.connection.writable_bytes > 0
        self.writable += 1

    def join(self, other: Peer, links: tuple[Link, Link] | None = None) -> None:
        here, there = links or pipe()
        mine, yours = self.connection.session.cursors(), other.connection.session.cursors()
        self.connection.attach(here, yours)
        other.connection.attach(there, mine)


def shaped(mbps: float, delay_s: float) -> tuple[Link, Link]:
    a, b = pipe()
    return tuple(Shaped(link, [Bottleneck(Rate.constant(mbps * 1e6))], delay_s) for link in (a, b))  # type: ignore


@virtual
async def test_messages_and_answers_flow_and_come_to_rest() -> None:
    """Answers sent from inside on_message do not nest; at rest only heartbeats are left."""
    a, b = Peer(), Peer()
    a.join(b)
    b.on_message = lambda: b.connection.send(UPDATE, b"answer") and None
    for _ in range(3):
        a.connection.send(UPDATE, b"ask")
    assert a.heard == b.heard == []
    await asyncio.sleep(0.1)
    assert b.heard == [(UPDATE, seq, b"ask") for seq in (1, 2, 3)]
    assert a.heard == [(UPDATE, seq, b"answer") for seq in (1, 2, 3)]
    a.connection.ask()
    b.connection.ask()
    await asyncio.sleep(0.1)
    assert a.connection.session.idle and b.connection.session.idle, "little is acknowledged when asked for"
    await asyncio.sleep(10.0)
    assert asyncio.get_running_loop().time() - a.connection.last_heard <= HEARTBEAT_S
    a.connection.close()
    b.connection.close()


@virtual
async def test_on_a_quiet_link_the_sooner_asks_for_signs_of_life_and_the_other_answers() -> None:
    a, b = Peer(), Peer()
    a.connection.heartbeat_s *= LEAD
    ends = shaped(1000, 0.0002)
    for peer, end in zip((a, b), ends, strict=True):
        peer.connection.attach(end, {})
    await asyncio.sleep(300)
    frames = sum(end.written_bytes for end in ends) / HEADER.size  # type: ignore[attr-defined]
    assert frames <= 2 * 300 / (LEAD * HEARTBEAT_S) + 6, "twice as many if both asked"
    assert not a.lost and not b.lost
    a.connection.close()
    b.connection.close()


@virtual
async def test_a_lost_link_loses_no_message() -> None:
    """Cut in the middle of a long message again and again; what is sent without a link waits for the next."""
    a, b = Peer(), Peer()
    sent = [(UPDATE, 1, b"long" * 5), (UPDATE, 2, b"next"), (CONTROL, 1, b"c")]
    a.connection.send(UPDATE, b"long" * 500_000)
    for cut in range(5):
        links = shaped(10, 0.02)
        a.join(b, links)
        await asyncio.sleep(0.4)
        if cut == 1:
            links[0].abort()
            await asyncio.sleep(0.1)
            assert not a.connection.connected
            assert a.connection.writable_bytes == 0
            a.connection.send(UPDATE, b"next")
            a.connection.send(CONTROL, b"c")
    a.join(b)
    await asyncio.sleep(1.0)
    assert sorted(b.heard) == sorted(sent)
    assert len(a.lost) == len(b.lost) == 1, "replaced links are not reported"
    a.connection.close()
    b.connection.close()


@virtual
async def test_close_leaves_nothing_behind() -> None:
    """No task, no live timer, no reference from the loop; the other end hears why."""
    a, b = Peer(), Peer()
    a.join(b)
    a.connection.send(UPDATE, b"x" * 100_000)
    await asyncio.sleep(0.001)
    a.connection.close(Bye.LEAVING)
    a.connection.close()
    await asyncio.sleep(5.0)
    assert a.lost == []
    assert b.lost == ["the peer said goodbye: leaving"]
    assert not b.connection.connected
    assert len(asyncio.all_tasks()) == 1
    gone = weakref.ref(a.connection)
    del a
    gc.collect()
    assert gone() is None


@virtual
async def test_broken_framing_closes_the_link_with_a_reason() -> None:
    a = Peer()
    here, there = pipe()
    raw = Ear()
    there.attach(raw)
    a.connection.attach(here, {})
    there.write(HEADER.pack(DATA, UPDATE, 0, 5, 0) + b"\1\0\0\0x" + HEADER.pack(77, 0, 0, 0, 0))
    await asyncio.sleep(0.1)
    assert a.heard == [(UPDATE, 1, b"x")]
    assert a.lost == ["unknown frame 77 on stream 0"]
    assert raw.data.endswith(a.connection.session.bye(Bye.PROTOCOL))
    assert raw.events == ["closed by the other end"]
    b = Peer()
    with pytest.raises(ProtocolError, match="cursor"):
        b.connection.attach(pipe()[0], {UPDATE: 5})
    assert not b.connection.connected


@virtual
async def test_on_writable_comes_when_a_full_window_opens_and_keeps_the_link_busy() -> None:
    """A sender that fills the window only when told to uses the link nearly as well as one that queues ahead."""
    a, b = Peer(), Peer()

    def fill() -> None:
        a.writable += 1
        while a.connection.writable_bytes:
            a.connection.send(UPDATE, bytes(min(20_000, a.connection.writable_bytes)))

    a.connection._on_writable = fill
    a.join(b, shaped(50, 0.015))
    fill()
    await asyncio.sleep(3.0)
    before, start = b.connection.session.cursors()[UPDATE], asyncio.get_running_loop().time()
    await asyncio.sleep(10.0)
    used = (b.connection.session.cursors()[UPDATE] - before) * 8 / 50e6 / 10.0
    assert used >= 0.94
    assert a.connection.rate_bps == pytest.approx(50e6, rel=0.05)
    assert 0.03 <= a.connection.rtt_s <= 0.06
    assert start > 0 and a.writable > 10
    a.connection.close()
    b.connection.close()


@virtual
async def test_a_window_that_is_nearly_full_counts_as_full() -> None:
    """Encoded, a message is often a little smaller than was reckoned: who leaves that little free is told, too, when
    there is room again. Else a link that was once slow would stay so: who speaks once a step never finds more."""
    a, b = Peer(), Peer()

    def speak() -> None:
        a.connection.send(UPDATE, bytes(int(0.9 * a.connection.writable_bytes)))

    a.connection._on_writable = speak
    a.join(b, shaped(50, 0.015))
    speak()
    await asyncio.sleep(3.0)
    before = b.connection.session.cursors()[UPDATE]
    await asyncio.sleep(10.0)
    assert (b.connection.session.cursors()[UPDATE] - before) * 8 / 50e6 / 10.0 >= 0.9
    a.connection.close()
    b.connection.close()


@virtual
async def test_control_overtakes_bulk_on_a_shaped_link() -> None:
    """5 Mbit/s, saturated: a control message needs the distance and at most 150 ms more."""
    a, b = Peer(), Peer()
    a.join(b, shaped(5, 0.1))
    a.connection.send(BULK, bytes(20_000_000))
    await asyncio.sleep(3.0)
    loop = asyncio.get_running_loop()
    for _ in range(20):
        sent_at = loop.time()
        a.connection.send(CONTROL, b"urgent")
        await asyncio.sleep(0.4)
        assert b.heard_at[-1] - sent_at <= 0.1 + 0.150
    assert len(b.heard) == 20
    a.connection.close()
    b.connection.close()


@virtual
async def test_greetings_cross_and_the_link_is_handed_over_with_early_bytes() -> None:
    """The acceptor speaks at once after its answer; the dialer hears it although it attaches much later."""
    a, b = Peer(), Peer()
    dialer, acceptor = (Greeting(link) for link in pipe())
    dialer.say(b"it is me")
    assert await acceptor.hear(1.0) == b"it is me"
    acceptor.say(b"come in")
    b.connection.attach(acceptor, {})
    for _ in range(3):
        b.connection.send(UPDATE, b"first" * 4_000)
    await asyncio.sleep(0.5)
    assert await dialer.hear(1.0) == b"come in"
    a.connection.attach(dialer, {})
    assert a.heard == []
    await asyncio.sleep(0.5)
    assert [seq for _, seq, _ in a.heard] == [1, 2, 3]
    b.connection.close()
    await asyncio.sleep(0.1)
    assert a.lost


@virtual
async def test_a_greeting_that_is_late_too_long_or_cut_short_is_a_link_error() -> None:
    greetings = [tuple(Greeting(link) for link in pipe()) for _ in range(4)]
    with pytest.raises(LinkError, match=r"no greeting within 0\.5 s"):
        await greetings[0][0].hear(0.5)
    feed(greetings[1][0], (HELLO_BYTES_MAX + 1).to_bytes(4, "little"))
    with pytest.raises(LinkError, match="16385 bytes"):
        await greetings[1][0].hear(0.5)
    greetings[2][1].link.write(b"\5\0\0\0hel")
    greetings[2][1].link.close()
    with pytest.raises(LeftError, match="closed by the other end"):
        await greetings[2][0].hear(0.5)
    with pytest.raises(LinkError, match="at most"):
        greetings[3][0].say(bytes(HELLO_BYTES_MAX + 1))
    greetings[3][1].link.write(b"\1\0\0\0h" + bytes(EARLY_BYTES_MAX))
    await asyncio.sleep(0.1)
    with pytest.raises(LinkError, match="behind the greeting") as flood:
        await greetings[3][0].hear(0.5)
    assert type(flood.value) is LinkError  # it was sent away, it did not leave


class Ear:
    """A bare receiver."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.place = bytearray(1000)
        self.events: list[str] = []
        self.on_data: Callable[[], None] = lambda: None

    def get_buffer(self, size_hint: int) -> memoryview:
        return memoryview(self.place)

    def buffer_updated(self, nbytes: int) -> None:
        self.data += self.place[:nbytes]
        self.on_data()

    def link_writable(self) -> None:
        self.events.append("writable")

    def link_lost(self, reason: str) -> None:
        self.events.append(reason)


@virtual
async def test_a_pipe_keeps_order_and_bounds_and_is_lost_once() -> None:
    a, b = pipe()
    here, there = Ear(), Ear()
    a.attach(here)
    a.write(b"early ")
    a.write(bytes(BACKLOG_BYTES_MAX))
    assert a.congested and a.backlog_bytes == BACKLOG_BYTES_MAX + 6
    b.attach(there)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert here.events == ["writable"] and not a.congested and a.backlog_bytes == 0
    assert there.data == b"early " + bytes(BACKLOG_BYTES_MAX)
    there.data.clear()
    there.on_data = lambda: b.write(b"<") if len(there.data) < 3 else None
    here.on_data = lambda: a.write(b">") if len(here.data) < 2 else None
    a.write(b"1")
    assert (there.data, here.data) == (b"1", b""), "an answer is not delivered inside the question"
    a.write(b"2")
    await asyncio.sleep(0.01)
    assert bytes(there.data).startswith(b"12") and bytes(here.data).startswith(b"<<")
    a.write(b"last")
    a.close()
    a.close()
    a.write(b"never")
    await asyncio.sleep(0.01)
    assert there.data.endswith(b"last")
    assert here.events == ["writable", "closed"] and there.events == ["closed by the other end"]


@virtual
async def test_an_aborted_pipe_drops_what_waits() -> None:
    a, b = pipe()
    there = Ear()
    a.attach(Ear())
    a.write(b"dropped")
    a.abort()
    b.attach(there)
    await asyncio.sleep(0.01)
    assert there.data == b"" and there.events == ["aborted by the other end"]
