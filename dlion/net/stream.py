"""A link over an asyncio transport: TCP, TLS or a Unix socket, on asyncio's own loop or uvloop.

Law: the only room that touches a transport's buffers and a socket's options. It moves bytes and knows nothing of what
they say, nor how the connection came to be.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from contextlib import suppress

from dlion.net.link import LinkError, Receiver, feed

WRITE_BYTES_MAX = 64 * 1024
"""One call of ``transport.write``: what the kernel does not take of it, the transport may copy (and move) again."""
BUFFER_BYTES_MAX = 64 * 1024
"""In the transport, in user space."""
UNSENT_BYTES_MAX = 256 * 1024
"""In the kernel and not yet sent: a queue in which nothing can overtake any more."""


class StreamLink(asyncio.BufferedProtocol):
    """A ``Link`` that takes ``transport`` over from the protocol it had. Reading starts when a receiver is attached.

    ``early`` are bytes that the former protocol had already read: the receiver gets them first. ``lost`` is done when
    the connection has ended.
    """

    def __init__(self, transport: asyncio.Transport, early: bytes = b"", name: str = "") -> None:
        self.name = name
        """What the peer calls itself: not proven by anything, good for choosing an emulated route, not for trust."""
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[None] = self._loop.create_future()
        self._transport = transport
        self._early = early
        self._reason = ""
        self._queue: deque[memoryview] = deque()
        self._queued_bytes = 0
        self._paused = self._closing = self._begun = False
        self._receiver: Receiver | None = None
        transport.pause_reading()
        transport.set_protocol(self)
        transport.set_write_buffer_limits(high=BUFFER_BYTES_MAX, low=BUFFER_BYTES_MAX // 4)
        _tune(transport)

    # -- Link ---------------------------------------------------------------------------------------------------

    @property
    def backlog_bytes(self) -> int:
        return self._queued_bytes + self._transport.get_write_buffer_size()

    @property
    def congested(self) -> bool:
        return self._paused

    def attach(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self.get_buffer = receiver.get_buffer  # type: ignore[method-assign]  # one call less per read
        self.buffer_updated = receiver.buffer_updated  # type: ignore[method-assign]
        self._loop.call_soon(self._begin, receiver)

    def _begin(self, receiver: Receiver) -> None:
        self._begun = True
        feed(receiver, self._early)
        self._early = b""
        if self.lost.done():
            receiver.link_lost(self._reason)
            return
        self._transport.set_protocol(self)  # some loops look the two methods up here, once
        self._transport.resume_reading()

    def pause_reading(self) -> None:
        """Let the other end's bytes wait in the kernel, and so hold the other end back."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        if not self.lost.done():
            self._transport.resume_reading()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing or self.lost.done():
            return
        view = memoryview(data).cast("B")
        if self._queue or self._paused:
            self._queue.append(view)
            self._queued_bytes += view.nbytes
        else:
            self._push(view)

    def close(self) -> None:
        self._closing = True
        if not self._queue:
            self._transport.close()

    def abort(self) -> None:
        self._closing = True
        self._transport.abort()

    def _push(self, view: memoryview) -> None:
        """Give the transport as much as it takes; the rest waits at the head of the queue."""
        while view.nbytes:
            if self._paused:
                self._queue.appendleft(view)
                self._queued_bytes += view.nbytes
                return
            self._transport.write(view[:WRITE_BYTES_MAX])
            view = view[WRITE_BYTES_MAX:]

    # -- the transport's calls ----------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        while self._queue and not self._paused:
            view = self._queue.popleft()
            self._queued_bytes -= view.nbytes
            self._push(view)
        if self._paused:
            return
        if self._closing:
            self._transport.close()
        elif self._receiver is not None:
            self._receiver.link_writable()

    def get_buffer(self, size_hint: int) -> memoryview:
        raise LinkError("bytes arrived before a receiver was attached")

    def buffer_updated(self, nbytes: int) -> None:
        raise LinkError("bytes arrived before a receiver was attached")

    def connection_lost(self, exc: Exception | None) -> None:
        self._reason = str(exc) or type(exc).__name__ if exc else "closed here" if self._closing else "closed by peer"
        self._queue.clear()
        self._queued_bytes = 0
        self.lost.set_result(None)
        if self._receiver is not None and self._begun:
            self._receiver.link_lost(self._reason)


def _tune(transport: asyncio.Transport) -> None:
    """No delay for small writes, and a small hidden queue where the system can bound it."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        with suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES_MAX)
