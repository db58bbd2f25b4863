"""The first words on a link, before anybody knows whose session it belongs to.

Law: one bounded blob each way, opaque here; then the link is handed over with every byte that came after the blob.
The dialer says first; the acceptor hears, then answers.
"""

from __future__ import annotations

import asyncio
import struct

from dlion.net.link import Link, LinkError, Receiver, feed

HELLO_BYTES_MAX = 16 * 1024
EARLY_BYTES_MAX = 4 << 20
"""What the other end may send behind its hello before we have handed the link over."""
_LENGTH = struct.Struct("<I")


class LeftError(LinkError):
    """Who was to greet went before it did."""


class Greeting:
    """Receiver of a fresh link until ``hand_over``."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self._loop = asyncio.get_running_loop()
        self._receiver: Receiver | None = None
        self._read = bytearray(HELLO_BYTES_MAX + _LENGTH.size)
        self._filled = 0
        self._failure = ""
        self._lost = self._left = False
        self._blob_end = 0
        self._waiter: asyncio.Future[None] | None = None
        self._early = False
        """Bytes that came before the hand-over still wait here."""
        link.attach(self)

    def say(self, blob: bytes) -> None:
        """Send our blob. Raises LinkError when it is too long."""
        if len(blob) > HELLO_BYTES_MAX:
            raise LinkError(f"a greeting of {len(blob)} bytes, at most {HELLO_BYTES_MAX} allowed")
        self.link.write(_LENGTH.pack(len(blob)) + blob)

    async def hear(self, timeout_s: float) -> bytes:
        """The other end's blob. Raises LinkError (and aborts the link) when it is late or too long, LeftError when
        the link is lost before."""
        if not self._blob_end and not self._failure:
            self._waiter = self._loop.create_future()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._waiter
            except TimeoutError:
                self._fail(f"no greeting within {timeout_s:g} s")
            finally:
                self._waiter = None
        if self._failure:
            self.link.abort()
            raise (LeftError if self._left else LinkError)(self._failure)
        return bytes(self._read[_LENGTH.size : self._blob_end])

    def hand_over(self, receiver: Receiver) -> None:
        """From now on ``receiver`` gets what the link brings, first what came behind the blob (soon, never inside)."""
        self._receiver = receiver
        self._early = True
        self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        if not self._early or self._receiver is None:
            return
        self._early = False
        early = memoryview(self._read)[self._blob_end : self._filled]
        self._read = bytearray()
        feed(self._receiver, early)
        if self._lost:
            self._receiver.link_lost(self._failure)

    def get_buffer(self, size_hint: int) -> memoryview:
        if self._receiver is not None and (not self._early or self._filled >= EARLY_BYTES_MAX):
            self._flush()
            return self._receiver.get_buffer(size_hint)
        if self._filled == len(self._read):
            self._read = self._read + bytes(len(self._read))
        return memoryview(self._read)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        if self._receiver is not None and not self._early:
            self._receiver.buffer_updated(nbytes)
            return
        self._filled += nbytes
        if self._filled > EARLY_BYTES_MAX and self._receiver is None:
            self._fail(f"more than {EARLY_BYTES_MAX} bytes behind the greeting")
            self.link.abort()
            self._filled = self._blob_end
        if not self._blob_end and self._filled >= _LENGTH.size and not self._failure:
            (length,) = _LENGTH.unpack_from(self._read)
            if length > HELLO_BYTES_MAX:
                self._fail(f"a greeting of {length} bytes, at most {HELLO_BYTES_MAX} allowed")
            elif self._filled >= _LENGTH.size + length:
                self._blob_end = _LENGTH.size + length
                self._wake()

    def link_writable(self) -> None:
        if self._receiver is not None:
            self._receiver.link_writable()

    def link_lost(self, reason: str) -> None:
        self._lost, self._left = True, not self._failure
        self._failure = self._failure or reason
        if self._receiver is not None and not self._early:
            self._receiver.link_lost(reason)
        self._wake()

    def _fail(self, reason: str) -> None:
        self._failure = self._failure or reason
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
