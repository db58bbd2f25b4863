"""Links over TCP or TLS: an HTTP/1.1 Upgrade, and after the 101 a plain binary stream.

Law: the only room that knows aiohttp for links. It makes connections and knows nothing of what is said over them.

The server side is an aiohttp application (one port, TLS, mountable under another application, passes proxies that
forward Upgrade). After the ``101`` the transport is taken away from aiohttp, which is told that its connection ended,
and given to a ``StreamLink``, whose bytes go straight into the receiver's buffers. So aiohttp no longer knows that
connection: the application closes it itself at shutdown.

As HTTP demands (RFC 9110, 7.8), the dialing side stays silent until it has the ``101``: aiohttp would read earlier
bytes as a next request. The accepting side may speak at once; what comes with the ``101`` is kept.
"""

from __future__ import annotations

import asyncio
import ssl as tls
from collections.abc import Awaitable, Callable, Mapping
from typing import cast

from aiohttp import web

from dlion.net.link import LinkError
from dlion.net.stream import StreamLink

PROTOCOL = "dlion/1"
NAME_HEADER = "Dlion-Name"
NAME_CHARS_MAX = 256
ANSWER_BYTES_MAX = 8192
CLOSE_S = 1.0
"""What links and requests get to end by themselves at shutdown."""
KEEPALIVE_S = 30.0
REQUEST_DEADLINE_S = 10.0
LINKS_MAX = 1024
BESIDE = "/cuts"
"""Where peers say something before there is a link between them."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


# -- accepting --------------------------------------------------------------------------------------------------


def peer_application(
    accept: Callable[[StreamLink], None], *, links_max: int = LINKS_MAX, answer: Callable[[bytes], bytes] | None = None
) -> web.Application:
    """An application with ``GET /link``; each upgraded link goes to ``accept``. Mountable under another application.
    ``answer`` is what ``POST`` to ``BESIDE`` gets; a ValueError that it raises is a 400.

    Anything that is no upgrade to ``dlion/1`` is answered 426, more than ``links_max`` live links 503. At shutdown
    links get one second to deliver what was written, then they are aborted.
    """
    links: set[StreamLink] = set()

    async def link(request: web.Request) -> web.StreamResponse:
        options = {option.strip().lower() for option in request.headers.get("Connection", "").split(",")}
        if "upgrade" not in options or request.headers.get("Upgrade", "").strip().lower() != PROTOCOL:
            text = f"this address speaks {PROTOCOL} after an HTTP/1.1 Upgrade\n"
            return web.Response(status=426, headers={"Upgrade": PROTOCOL, "Connection": "Upgrade"}, text=text)
        name = request.headers.get(NAME_HEADER, "")
        if request.can_read_body or len(name) > NAME_CHARS_MAX:
            return web.Response(status=400, text="a link request has no body and a short name\n")
        if len(links) >= links_max:
            return web.Response(status=503, text="too many links\n")
        if request.transport is None:
            return web.Response(status=400, text="gone\n")
        upgraded = _take_away(request, name)
        links.add(upgraded)
        upgraded.lost.add_done_callback(lambda _: links.discard(upgraded))
        try:
            accept(upgraded)
        except BaseException:
            upgraded.abort()
            raise
        return web.Response(status=101)  # for the access log; the connection it would go to has ended

    async def close_links(_: web.Application) -> None:
        waiting = list(links)
        for upgraded in waiting:
            upgraded.close()
        if waiting:
            await asyncio.wait([upgraded.lost for upgraded in waiting], timeout=CLOSE_S)
        for upgraded in list(links):
            upgraded.abort()
            await upgraded.lost

    async def beside(request: web.Request) -> web.StreamResponse:
        assert answer is not None
        try:
            return web.Response(body=answer(await request.read()))
        except ValueError:
            return web.Response(status=400, text="not understood\n")

    application = web.Application()
    application.router.add_get("/link", link)
    if answer is not None:
        application.router.add_post(BESIDE, beside)
    application.on_shutdown.append(close_links)
    return application


def _take_away(request: web.Request, name: str) -> StreamLink:
    """Answer 101, make the transport ours, and tell aiohttp that its connection ended."""
    transport, handler = cast(asyncio.Transport, request.transport), request.protocol
    head = f"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {PROTOCOL}\r\n\r\n"
    transport.write(head.encode())
    upgraded = StreamLink(transport, name=name)
    handler.transport = None  # or it would close it
    handler.connection_lost(None)
    return upgraded


class Site:
    """A served application: where it listens, and how to end it."""

    def __init__(self, runner: web.AppRunner, server: asyncio.Server) -> None:
        self._runner = runner
        self._server = server
        self.addresses: tuple[tuple[str, int], ...] = tuple(s.getsockname()[:2] for s in server.sockets)
        """(host, port) of each listening socket."""

    @property
    def port(self) -> int:
        return self.addresses[0][1]

    async def close(self) -> None:
        """Listen no more, run the application's shutdown (which closes links), end what is left.

        A connection that asyncio accepted, but that has no transport yet when its server closes, would be forgotten
        as it is (python/cpython#109564): nothing is accepted any more, then it gets one.
        """
        try:
            for listening in self._server.sockets:
                asyncio.get_running_loop().remove_reader(listening.fileno())
            for _ in range(2):
                await asyncio.sleep(0)
        finally:
            self._server.close()
        await self._runner.cleanup()
        await self._server.wait_closed()


async def serve(
    app: web.Application,
    host: str,
    port: int,
    ssl: tls.SSLContext | None = None,
    *,
    request_deadline_s: float = REQUEST_DEADLINE_S,
) -> Site:
    """Serve ``app`` alone on a port of its own; port 0 takes a free one.

    A connection whose first request is not complete ``request_deadline_s`` after it was accepted (with TLS: twice
    that, for the handshake has the same deadline) is cut: aiohttp itself would keep half a header for an hour.
    """
    waiting: dict[asyncio.BaseProtocol, asyncio.TimerHandle] = {}

    @web.middleware
    async def heard(request: web.Request, handler: Handler) -> web.StreamResponse:
        timer = waiting.pop(request.protocol, None)
        if timer is not None:
            timer.cancel()
        return await handler(request)

    def cut(protocol: web.RequestHandler) -> None:
        del waiting[protocol]
        if protocol.transport is not None:
            protocol.transport.abort()

    def accepted() -> asyncio.BaseProtocol:
        protocol = cast(web.Server, runner.server)()
        waiting[protocol] = loop.call_later(request_deadline_s * (1 if ssl is None else 2), cut, protocol)
        return protocol

    async def forget(_: web.Application) -> None:
        for timer in waiting.values():
            timer.cancel()
        waiting.clear()

    loop = asyncio.get_running_loop()
    app.middlewares.insert(0, heard)
    app.on_cleanup.append(forget)
    runner = web.AppRunner(app, access_log=None, keepalive_timeout=KEEPALIVE_S, shutdown_timeout=CLOSE_S)
    await runner.setup()
    handshake_s = None if ssl is None else request_deadline_s
    try:
        server = await loop.create_server(
            accepted, host, port, ssl=ssl, ssl_handshake_timeout=handshake_s, backlog=1024
        )
    except OSError:
        await runner.cleanup()
        raise
    return Site(runner, server)


# -- dialing ----------------------------------------------------------------------------------------------------


class UpgradeDialer:
    """Dials ``addresses[peer]``, each "host:port", or "host:port/mount" where the peer's application is mounted there.

    ``name`` is sent along, unproven. ``timeout_s`` covers name look-up, TCP, TLS and the answer.
    """

    def __init__(
        self,
        addresses: Mapping[str, str],
        ssl: tls.SSLContext | None = None,
        timeout_s: float = 10.0,
        *,
        name: str = "",
        path: str = "/link",
    ) -> None:
        self._addresses = addresses
        self._ssl = ssl
        self._timeout_s = timeout_s
        self._name = name
        self._path = path

    async def dial(self, peer: str) -> StreamLink:
        """A new link; LinkError names the peer, its address and what went wrong."""
        address = self._addresses.get(peer)
        if address is None:
            raise LinkError(f"{peer}: no address is known")
        place, _, mount = address.partition("/")
        host, _, port = place.rpartition(":")
        if not host or not port.isdecimal():
            raise LinkError(f"{peer}: {address!r} is not host:port")
        path = f"/{mount.strip('/')}{self._path}" if mount else self._path
        lines = [f"GET {path} HTTP/1.1", f"Host: {place}", "Connection: Upgrade", f"Upgrade: {PROTOCOL}"]
        if self._name:
            lines.append(f"{NAME_HEADER}: {self._name}")
        request = "\r\n".join([*lines, "", ""]).encode("ascii")
        answer = _Answer(request)
        try:
            async with asyncio.timeout(self._timeout_s):
                await asyncio.get_running_loop().create_connection(
                    lambda: answer, host.strip("[]"), int(port), ssl=self._ssl
                )
                await answer.link
            return answer.take()
        except TimeoutError:
            raise LinkError(f"{peer} at {address}: no answer within {self._timeout_s:g} s") from None
        except (OSError, LinkError) as error:
            raise LinkError(f"{peer} at {address}: {error}") from error
        finally:
            answer.give_up()


class _Answer(asyncio.BufferedProtocol):
    """Sends the request and reads the head of the answer, no further than ANSWER_BYTES_MAX."""

    def __init__(self, request: bytes) -> None:
        self.link: asyncio.Future[StreamLink] = asyncio.get_running_loop().create_future()
        self._request = request
        self._buffer = bytearray(ANSWER_BYTES_MAX)
        self._filled = 0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(self._buffer)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        end = self._buffer.find(b"\r\n\r\n", 0, self._filled)
        if end >= 0:
            self._judge(bytes(self._buffer[:end]).decode("latin-1"), bytes(self._buffer[end + 4 : self._filled]))
        elif self._filled == ANSWER_BYTES_MAX:
            self._refuse(f"the head of the answer is longer than {ANSWER_BYTES_MAX} bytes")

    def connection_lost(self, exc: Exception | None) -> None:
        self._refuse(f"closed before it answered{f': {exc}' if exc else ''}")

    def _judge(self, head: str, beyond: bytes) -> None:
        status, *lines = head.split("\r\n")
        fields = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        switched = status.split(" ")[:2] == ["HTTP/1.1", "101"] and fields.get("upgrade", "").lower() == PROTOCOL
        if not switched or self.link.done():
            self._refuse(f"no upgrade to {PROTOCOL}, the answer was {status[:80]!r}")
            return
        self.link.set_result(StreamLink(cast(asyncio.Transport, self._transport), beyond))

    def _refuse(self, why: str) -> None:
        if not self.link.done():
            self.link.set_exception(LinkError(why))
        self.give_up()

    def take(self) -> StreamLink:
        self._transport = None
        return self.link.result()

    def give_up(self) -> None:
        """Close the connection, unless its link was taken."""
        if not self.link.cancel() and not self.link.cancelled():
            self.link.exception()  # seen: nobody may be waiting for it any more
        if self._transport is not None:
            self._transport.abort()
