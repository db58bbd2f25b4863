"""The seam of the network: something that carries bytes, in order, to one other peer, until it breaks.

Law: protocols only. Real connections, memory pipes and shaped wrappers all look like this; a link knows no message.
"""

from __future__ import annotations

from typing import Protocol


class LinkError(Exception):
    """A link cannot be made or has failed; the text names the peer and the reason."""


class Receiver(Protocol):
    """What a link talks to. Mirrors asyncio.BufferedProtocol, so that bytes land where they belong without a copy."""

    def get_buffer(self, size_hint: int) -> memoryview:
        """A writable, non-empty place for the next bytes."""

    def buffer_updated(self, nbytes: int) -> None:
        """``nbytes`` were written to the last buffer."""

    def link_writable(self) -> None:
        """The link had refused to take more (``backlog_bytes`` above its limit) and now takes more again."""

    def link_lost(self, reason: str) -> None:
        """The link is gone. Called exactly once, also after ``close``; nothing else is called after it."""


class Link(Protocol):
    """One live connection. Not thread-safe: used on the event loop only."""

    @property
    def backlog_bytes(self) -> int:
        """Bytes accepted by ``write`` that have not left this host."""

    @property
    def congested(self) -> bool:
        """True while the backlog is above the link's bound: the owner should stop writing until ``link_writable``."""

    def attach(self, receiver: Receiver) -> None:
        """Give the link its receiver. Called once, before any byte is delivered."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Queue ``data``; never blocks. The caller may not change ``data`` afterwards."""

    def close(self) -> None:
        """Deliver what was written, then close."""

    def abort(self) -> None:
        """Close at once, dropping what was not delivered."""


class Dialer(Protocol):
    """Makes links to named peers."""

    async def dial(self, peer: str) -> Link:
        """A new link to ``peer``; raises LinkError when it cannot be reached."""


def feed(receiver: Receiver, data: bytes | bytearray | memoryview) -> None:
    """Hand ``data`` to a receiver through its own buffers (what a memory pipe and a test do)."""
    view = memoryview(data)
    while left := view.nbytes:
        place = receiver.get_buffer(left)
        if (room := place.nbytes) >= left:
            place[:left] = view
            receiver.buffer_updated(left)
            return
        place[:] = view[:room]
        receiver.buffer_updated(room)
        view = view[room:]
