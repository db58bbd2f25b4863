"""How long a drain may last: as long as something moves in the run.

A fixed bound is too short for a large model on a narrow link, and too long where everything stands still. So whoever
ends together with the others gives up when no update has moved for ``drain_s``, on its own links or, as those say who
drain too, on somebody else's. They count: whoever sees something move says one more than the most that it has heard
(``~still``), everybody passes on what is more, and nobody more than once in TELL_S. So a word comes to rest when
nothing moves, whatever the delays. A liar gains little: after DRAINS_MAX times ``drain_s`` it is over in any case.

Who leaves the others to go on has ``drain_s`` in all, and so has whoever is told to leave while it drains with them.

Law: on the loop; counts and times, no weights.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from typing import Any

from dlion.membership import Membership
from dlion.mesh.roster import LIVING
from dlion.messages import Message, PeerId, Stream
from dlion.net.connection import Connection

STILL_FIELDS: Mapping[str, type] = {"count": int}
COUNT_MAX = 1 << 53
DRAINS_MAX = 30
LOOK_S, TELL_S = 0.25, 1.0
"""How often a peer looks whether anything has moved, and says so, whatever its ``drain_s``."""
STILL_S = 3 * TELL_S
"""Nothing has moved anywhere, if we have heard of nothing for so long."""


class Patience:
    """``async with patience.while_moving(leaving)`` raises TimeoutError when it is over."""

    def __init__(
        self,
        membership: Membership,
        connections: Mapping[PeerId, Connection],
        tell: Callable[[tuple[PeerId, ...], Message], None],
        drain_s: float,
    ) -> None:
        self._membership, self._connections, self._tell = membership, connections, tell
        self._drain_s = drain_s
        self._count = 0
        self._telling: asyncio.TimerHandle | None = None
        self._looking: asyncio.TimerHandle | None = None
        self._moved_at = -math.inf
        self._moved_bytes: int | None = None
        self._end = math.inf
        self._timeout: asyncio.Timeout | None = None

    def hear(self, message: Message) -> None:
        """Something moves elsewhere."""
        if self._count < (count := int(message.fields["count"])) < COUNT_MAX:
            self._stir(count)

    def _stir(self, count: int) -> None:
        loop = asyncio.get_running_loop()
        self._count, self._moved_at = count, loop.time()
        if self._telling is None:
            self._telling = loop.call_later(TELL_S, self._say)

    def _say(self) -> None:
        states = self._membership.roster.states
        to = tuple(p for p, c in self._connections.items() if c.connected and states[p] in LIVING)
        self._telling = None
        self._tell(to, Message("~still", fields={"count": self._count}, stream=Stream.CONTROL))

    def while_moving(self, leaving: bool) -> Patience:
        self._end = min(self._end, asyncio.get_running_loop().time() + (1 if leaving else DRAINS_MAX) * self._drain_s)
        return self

    def hurry(self) -> None:
        """Whoever told us to end does not wait for ever."""
        self._end = min(self._end, asyncio.get_running_loop().time() + self._drain_s)
        self._set()

    @property
    def still(self) -> bool:
        """Has nothing moved lately? If somebody ended before that, others whose links are fuller would find it silent
        before they hear its last word."""
        calm_s = asyncio.get_running_loop().time() - self._moved_at
        return not self._connections or calm_s >= min(STILL_S, self._drain_s / 2)

    def renew(self) -> None:
        """What comes now has ``drain_s`` of its own to begin to move."""
        self._moved_at = asyncio.get_running_loop().time()
        self._set()

    def _set(self) -> None:
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(min(self._moved_at + self._drain_s, self._end))

    async def __aenter__(self) -> None:
        self._timeout = await asyncio.timeout(None).__aenter__()
        self.renew()
        self._look()

    async def __aexit__(self, *error: Any) -> None:
        timeout, self._timeout = self._timeout, None
        assert timeout is not None
        await timeout.__aexit__(*error)

    def close(self) -> None:
        for timer in (self._telling, self._looking):
            if timer is not None:
                timer.cancel()

    def _look(self) -> None:
        if self._timeout is None:
            return
        moved_bytes = sum(connection.session.moved_bytes for connection in self._connections.values())
        if self._moved_bytes not in (None, moved_bytes):
            self._stir(self._count + 1)
        self._moved_bytes = moved_bytes
        self._set()
        self._looking = asyncio.get_running_loop().call_later(LOOK_S, self._look)
