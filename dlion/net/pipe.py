"""A pipe: two links in memory, each the other's end. The simulation's network, beneath ``Shaped``.

Law: bytes in order, no time, no loss. What is written reaches the other receiver inside ``write`` when that is safe,
and by ``call_soon`` when it is not: before the receiver is attached, behind bytes that wait, or inside a delivery.
"""

from __future__ import annotations

import asyncio
from collections import deque

from dlion.net.link import Link, Receiver, feed

BACKLOG_BYTES_MAX = 256 * 1024


class _Busy:
    """Shared by both ends: a delivery is going on."""

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now = False


class _End:
    """One end of a pipe; a Link."""

    def __init__(self, loop: asyncio.AbstractEventLoop, busy: _Busy) -> None:
        self._loop = loop
        self._busy = busy
        self._receiver: Receiver | None = None
        self._other: _End = self
        self._waiting: deque[bytes | bytearray | memoryview] = deque()
        """Written here, not yet delivered there."""
        self._backlog_bytes = 0
        self._refused = False
        self._scheduled = False
        self._closing = ""
        """Why no more is taken; what waits is still delivered."""
        self._lost = ""
        """Why this end is gone."""

    @property
    def backlog_bytes(self) -> int:
        return self._backlog_bytes

    @property
    def congested(self) -> bool:
        if self._backlog_bytes > BACKLOG_BYTES_MAX:
            self._refused = True
            return True
        return False

    def attach(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._other._schedule()
        if self._lost:
            self._loop.call_soon(receiver.link_lost, self._lost)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing or self._lost:
            return
        other, busy = self._other, self._busy
        if busy.now or self._waiting or other._receiver is None:
            self._waiting.append(data)
            self._backlog_bytes += memoryview(data).nbytes
            self._schedule()
            return
        busy.now = True
        try:
            feed(other._receiver, data)
        finally:
            busy.now = False

    def close(self) -> None:
        self._end("closed")

    def abort(self) -> None:
        self._waiting.clear()
        self._backlog_bytes = 0
        self._end("aborted")

    def _end(self, reason: str) -> None:
        if not self._closing:
            self._closing = reason
            self._schedule()

    def _schedule(self) -> None:
        if (self._waiting or self._closing) and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        """Deliver what waits; then end, if that was asked for."""
        self._scheduled = False
        other, busy = self._other, self._busy
        if self._lost or (other._receiver is None and not (self._closing and not self._waiting)):
            return
        busy.now = True
        try:
            while self._waiting and other._receiver is not None and not self._lost:
                data = self._waiting.popleft()
                self._backlog_bytes -= memoryview(data).nbytes
                feed(other._receiver, data)
        finally:
            busy.now = False
        if self._closing:
            self._lose(self._closing)
            other._lose(f"{self._closing} by the other end")
        elif self._refused and not self._lost and self._receiver is not None:
            self._refused = False
            self._receiver.link_writable()

    def _lose(self, reason: str) -> None:
        if self._lost:
            return
        self._lost = reason
        self._waiting.clear()
        self._backlog_bytes = 0
        if self._receiver is not None:
            self._receiver.link_lost(reason)


def pipe(loop: asyncio.AbstractEventLoop | None = None) -> tuple[Link, Link]:
    """Two joined links on ``loop`` (the running one by default)."""
    loop = loop or asyncio.get_running_loop()
    busy = _Busy()
    a, b = _End(loop, busy), _End(loop, busy)
    a._other, b._other = b, a
    return a, b
