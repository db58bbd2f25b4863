"""Passing links on: two peers that cannot reach each other talk through a third that reaches both.

Law: knows links and greetings; understands no byte of what it carries, and keeps nothing. Whoever asks names the peer
that it wants; we dial that peer as we would for ourselves, or hold the link for a moment, in case that peer asks the
same of us: then neither of them need be reachable.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from dlion.identity import NAME_SHOWN
from dlion.messages import PeerId
from dlion.net.greeting import Greeting
from dlion.net.link import Dialer, Link, LinkError

PASSAGES_MAX = 64
"""Links passed on, or on which somebody waits for a way, at a time."""
BACKLOG_BYTES_MAX = 32 << 20
"""What may wait here for the slower side. Sessions do not fill what they cannot empty; who does is cut off."""
READ_BYTES_MAX = 64 * 1024
REACH_S = 5.0
HOLD_S = 4.0
Ends = tuple[PeerId, PeerId]
"""Who asks, and for whom."""


class Passages:
    """Links that this peer passes on. True while there is one."""

    def __init__(self, dialer: Dialer, known: Iterable[PeerId]) -> None:
        self._dialer = dialer
        self._known = frozenset(known)
        self._held: dict[Ends, asyncio.Future[tuple[Greeting, bytes]]] = {}
        self._open: set[_Passage] = set()
        self._asking = 0
        """Links whose other end is dialled or waited for."""

    def __bool__(self) -> bool:
        return bool(self._open)

    async def carry(self, near: Greeting, hello: bytes, ends: Ends) -> str:
        """Join ``near``, whose first words were ``hello``, with a link to the peer it asks for. Why not (empty: done):
        that peer can neither be reached nor asks for the other within HOLD_S, or somebody here is a stranger."""
        asker, target = ends
        if not {asker, target} <= self._known:
            return f"no way from {asker[:NAME_SHOWN]!r} to {target[:NAME_SHOWN]!r}: not both are in the topology"
        if len(self._open) + self._asking >= PASSAGES_MAX:
            return f"no way to {target}: {PASSAGES_MAX} links are passed on already"
        if (partner := self._held.pop((target, asker), None)) is not None:
            partner.set_result((near, hello))
            return ""
        self._asking += 1
        try:
            far = await self._dial(target) or await self._meet(near, ends)
        finally:
            self._asking -= 1
        if far is None:
            return f"no way to {target}"
        far.say(hello)
        self._open.add(_Passage(near, far, self._open.discard))
        return ""

    async def _dial(self, target: PeerId) -> Greeting | None:
        try:
            async with asyncio.timeout(REACH_S):
                return Greeting(await self._dialer.dial(target))
        except (LinkError, TimeoutError):
            return None

    async def _meet(self, near: Greeting, ends: Ends) -> Greeting | None:
        """The link of the other, should it ask for this one: its first words are the answer to ``near``."""
        meeting: asyncio.Future[tuple[Greeting, bytes]] = asyncio.get_running_loop().create_future()
        self._held[ends] = meeting
        try:
            await asyncio.wait([meeting], timeout=HOLD_S)
        finally:
            if self._held.get(ends) is meeting:
                del self._held[ends]
        if not meeting.done():
            return None
        far, answer = meeting.result()
        near.say(answer)
        return far

    def close(self) -> None:
        for passage in tuple(self._open):
            passage.close()


class _Passage:
    """Two links, each the way on for what the other brings."""

    def __init__(self, near: Greeting, far: Greeting, over: Callable[[_Passage], None]) -> None:
        self._links = near.link, far.link
        self._over = over
        near.hand_over(_Half(self, far.link))
        far.hand_over(_Half(self, near.link))

    def close(self) -> None:
        """Deliver what came, then end both."""
        self._over(self)
        for link in self._links:
            link.close()

    def abort(self) -> None:
        self._over(self)
        for link in self._links:
            link.abort()


class _Half:
    """Receiver of one of the two links."""

    def __init__(self, passage: _Passage, onward: Link) -> None:
        self._passage, self._onward = passage, onward
        self._buffer = memoryview(bytearray(READ_BYTES_MAX))

    def get_buffer(self, size_hint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._onward.write(bytes(self._buffer[:nbytes]))
        if self._onward.backlog_bytes > BACKLOG_BYTES_MAX:
            self._passage.abort()

    def link_writable(self) -> None:
        """Nothing was withheld."""

    def link_lost(self, reason: str) -> None:
        self._passage.close()
