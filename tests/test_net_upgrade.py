"""Links over HTTP Upgrade: nothing is lost, on both loops, plain or TLS; limits hold; ends are clean."""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp
import pytest
import uvloop
from aiohttp import web

from dlion.net.link import Link, LinkError
from dlion.net.stream import StreamLink
from dlion.net.upgrade import Site, UpgradeDialer, peer_application, serve

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
HELLO = b"the accepting side may speak at once"


class Ear:
    """A receiver that keeps everything."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.heard = bytearray()
        self.lost: list[str] = []
        self.writable = 0
        self._buffer = bytearray(65536)
        self._changed = asyncio.Event()
        link.attach(self)

    def get_buffer(self, size_hint: int) -> memoryview:
        return memoryview(self._buffer)

    def buffer_updated(self, nbytes: int) -> None:
        assert not self.lost
        self.heard += self._buffer[:nbytes]
        self._changed.set()

    def link_writable(self) -> None:
        assert not self.lost
        self.writable += 1
        self._changed.set()

    def link_lost(self, reason: str) -> None:
        self.lost.append(reason)
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


class Peer:
    """An accepting side."""

    def __init__(self) -> None:
        self.ears: list[Ear] = []
        self.names: list[str] = []

    def accept(self, link: StreamLink) -> None:
        self.names.append(link.name)
        self.ears.append(Ear(link))
        link.write(HELLO)


@asynccontextmanager
async def serving(app: web.Application, tls: ssl.SSLContext | None = None, **options: Any) -> AsyncIterator[Site]:
    site = await serve(app, "127.0.0.1", 0, tls, **options)
    try:
        yield site
    finally:
        await site.close()


def dialer(port: int, tls: ssl.SSLContext | None = None, **options: Any) -> UpgradeDialer:
    return UpgradeDialer({"b": f"127.0.0.1:{port}"}, tls, **options)


@pytest.fixture(scope="module")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    trustme = pytest.importorskip("trustme", reason="TLS test certificates are made with trustme")
    authority = trustme.CA()
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.issue_cert("127.0.0.1").configure_cert(server)
    authority.configure_trust(client)
    return server, client


def on(loop: str, body: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=LOOPS[loop], debug=True) as runner:
        runner.run(body)


async def talk(server_tls: ssl.SSLContext | None, client_tls: ssl.SSLContext | None) -> None:
    peer, app = Peer(), web.Application()
    app.add_subapp("/deep/inside", peer_application(peer.accept))
    big = bytes(range(256)) * 12_000
    async with serving(app, server_tls) as site:
        link = await dialer(site.port, client_tls, name="a1", path="/deep/inside/link").dial("b")
        ear = Ear(link)
        link.write(b"small")
        link.write(memoryview(big))
        await ear.until(lambda: len(ear.heard) == len(HELLO))
        there = peer.ears[0]
        await there.until(lambda: len(there.heard) == 5 + len(big))
        assert there.heard == b"small" + big and ear.heard == HELLO and peer.names == ["a1"]
        there.link.write(big)
        there.link.close()
        await ear.until(lambda: bool(ear.lost))
        assert ear.heard == HELLO + big and len(ear.lost) == 1
        await there.until(lambda: bool(there.lost))
    assert len(there.lost) == len(ear.lost) == 1


@pytest.mark.parametrize("loop", LOOPS)
def test_bytes_pass_both_ways_and_close_delivers(loop: str) -> None:
    on(loop, talk(None, None))


@pytest.mark.parametrize("loop", LOOPS)
def test_the_same_under_tls(loop: str, contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    on(loop, talk(*contexts))


@pytest.mark.asyncio
async def test_other_requests_are_told_what_this_is() -> None:
    app = peer_application(Peer().accept, links_max=1)
    upgrade = {"Connection": "keep-alive, Upgrade", "Upgrade": "dlion/1"}
    async with serving(app) as site, aiohttp.ClientSession(f"http://127.0.0.1:{site.port}") as session:
        cases: list[tuple[dict[str, str], int]] = [
            ({}, 426),
            (upgrade | {"Upgrade": "websocket"}, 426),
            (upgrade | {"Connection": "close"}, 426),
            (upgrade | {"Dlion-Name": "x" * 1000}, 400),
        ]
        for headers, status in cases:
            async with session.get("/link", headers=headers) as response:
                assert response.status == status, headers
                assert status != 426 or response.headers["Upgrade"] == "dlion/1"
        link = await dialer(site.port).dial("b")
        with pytest.raises(LinkError, match=r"^b at 127.*: no upgrade to dlion/1, the answer was 'HTTP/1.1 503"):
            await dialer(site.port).dial("b")
        Ear(link).link.abort()


@asynccontextmanager
async def raw_server(answer: list[bytes], *, then_close: bool = True) -> AsyncIterator[int]:
    """Answers the first bytes it hears with these pieces, one at a time."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in answer:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if not then_close:
            await reader.read()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ([b"HTTP/1.1 200 OK\r\nUpgrade: dlion/1\r\n\r\n"], "200 OK"),
        ([b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"], "101 Switching"),
        ([b"SSH-2.0-x\r\n\r\n"], "SSH-2.0"),
        ([b"HTTP/1.1 101 Switching Protocols\r\nX: " + b"y" * 9000], "longer than 8192 bytes"),
        ([b"HTTP/1.1 10"], "closed before it answered"),
    ],
)
async def test_a_wrong_answer_is_an_error_that_names_the_peer(answer: list[bytes], why: str) -> None:
    async with raw_server(answer) as port:
        with pytest.raises(LinkError, match=rf"b at 127\.0\.0\.1:{port}: .*{why}"):
            await dialer(port).dial("b")


@pytest.mark.asyncio
async def test_no_answer_no_listener_and_no_address_are_errors() -> None:
    async with raw_server([b"HTTP/1.1 101"], then_close=False) as port:
        with pytest.raises(LinkError, match=r"no answer within 0\.1 s"):
            await dialer(port, timeout_s=0.1).dial("b")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(LinkError, match=rf"b at 127\.0\.0\.1:{port}"):
        await dialer(port).dial("b")
    with pytest.raises(LinkError, match="c: no address"):
        await dialer(1).dial("c")
    with pytest.raises(LinkError, match="'nonsense' is not host:port"):
        await UpgradeDialer({"b": "nonsense"}).dial("b")


@pytest.mark.asyncio
@pytest.mark.parametrize("cut", [1, 30, 70, 73, 74, 80])
async def test_bytes_that_come_with_the_101_are_kept_wherever_the_stream_is_cut(cut: int) -> None:
    """Also when the link is lost before anybody listens: first the bytes, then the end, once."""
    stream = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: dlion/1\r\nconnection: upgrade\r\n\r\nearly bird"
    async with raw_server([stream[:cut], stream[cut:]]) as port:
        link = await dialer(port).dial("b")
        ear = Ear(link)
        await ear.until(lambda: bool(ear.lost))
        assert ear.heard == b"early bird" and len(ear.lost) == 1


@pytest.mark.asyncio
async def test_a_link_lost_before_it_is_attached_says_so_once() -> None:
    peer = Peer()
    async with serving(peer_application(peer.accept)) as site:
        link = await dialer(site.port).dial("b")
        link.abort()
        await link.lost
        ear = Ear(link)
        await ear.until(lambda: bool(ear.lost))
        link.write(b"into the void")
        link.close()
    assert len(ear.lost) == 1


@pytest.mark.parametrize("loop", LOOPS)
def test_a_slow_reader_makes_the_link_congested_and_later_writable(loop: str) -> None:
    async def body() -> None:
        peer = Peer()
        async with serving(peer_application(peer.accept)) as site:
            link = await dialer(site.port).dial("b")
            ear = Ear(link)
            await ear.until(lambda: bool(ear.heard))
            there = peer.ears[0]
            assert isinstance(there.link, StreamLink)
            there.link.pause_reading()
            total = 0
            while not link.congested:
                link.write(bytes(1 << 20))
                total += 1 << 20
                assert total < 100 << 20
            backlog = link.backlog_bytes
            assert 0 < backlog <= (1 << 20) + (64 << 10)
            link.write(b"end")
            assert link.backlog_bytes == backlog + 3
            there.link.resume_reading()
            await there.until(lambda: len(there.heard) == total + 3)
            assert ear.writable == 1 and not link.congested and link.backlog_bytes == 0
            link.abort()
            await ear.until(lambda: bool(ear.lost))

    on(loop, body())


@pytest.mark.parametrize("request_part", [b"", b"GET /link HTTP/1.1\r\nHost: x\r\nConn"])
@pytest.mark.asyncio
async def test_half_a_request_is_cut_at_the_deadline(request_part: bytes) -> None:
    async with serving(peer_application(Peer().accept), request_deadline_s=0.15) as site:
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(request_part)
        start = asyncio.get_running_loop().time()
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        assert asyncio.get_running_loop().time() - start >= 0.1
        writer.close()
        link = await dialer(site.port).dial("b")  # and a whole one is not
        ear = Ear(link)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(link.lost), 0.3)
        assert ear.heard == HELLO and not ear.lost


@pytest.mark.parametrize("loop", LOOPS)
def test_shutdown_ends_every_link_also_one_whose_reader_sleeps(loop: str) -> None:
    async def body() -> None:
        peer = Peer()
        async with serving(peer_application(peer.accept)) as site:
            ears = [Ear(await dialer(site.port).dial("b")) for _ in range(2)]
            for ear in ears:
                await ear.until(lambda ear=ear: bool(ear.heard))  # type: ignore[misc]
            sleeper = ears[1].link
            assert isinstance(sleeper, StreamLink)
            sleeper.pause_reading()
            peer.ears[1].link.write(bytes(50 << 20))
            start = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - start < 4
        assert [len(ear.lost) for ear in peer.ears] == [1, 1]
        sleeper.resume_reading()
        for ear in ears:
            await ear.until(lambda ear=ear: bool(ear.lost))  # type: ignore[misc]

    on(loop, body())


@pytest.mark.parametrize("loop", LOOPS)
def test_who_connects_while_we_close_is_not_forgotten(loop: str, recwarn: pytest.WarningsRecorder) -> None:
    """Wherever the close comes between the kernel's accept and the transport (python/cpython#109564)."""

    async def body() -> None:
        for turns in range(8):
            site = await serve(peer_application(Peer().accept), "127.0.0.1", 0)
            with socket.create_connection(("127.0.0.1", site.port)) as late:
                for _ in range(turns):
                    await asyncio.sleep(0)
                await site.close()
                late.settimeout(5.0)
                with suppress(ConnectionResetError):
                    assert late.recv(1) == b""
            gc.collect()

    on(loop, body())
    assert not [str(warning.message) for warning in recwarn]
