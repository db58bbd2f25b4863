"""The last word of a run in which somebody fell silent: the first peer's view becomes everybody's.

A bridge that dies takes along what it had heard and not passed on, and what was told to it until its silence was
noticed; nobody knows what that was. While two ways are planned for a word, or none, it is added twice, or never. So
replicas may be apart when all that is owed has been said. Then, if anybody had been silent and words went over bridges,
whoever is first by name among those who said a last word says its whole view, exactly, and everybody takes it over and
passes it on along the usual routes. Nothing that is heard later is added.

All agree on who is first, and on whether it is needed, for both follow from the last words, which all have heard. One
that died between its last word and its view is waited for until the drain is over; then replicas stay as they are.

Law: on the loop; no weights. What is said and taken over is the lane's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from dlion.farewell import Farewell
from dlion.items import Barrier, Conclude, Item
from dlion.membership import Membership
from dlion.mesh.roster import State
from dlion.messages import Message, PeerId

FINAL = "~final"
FINAL_KINDS: Mapping[str, Mapping[str, type]] = {FINAL: {}}
LOOK_S = 0.02


async def until(done: Callable[[], bool]) -> None:
    """Look now and then, for acknowledgements wake nobody."""
    while not done():  # noqa: ASYNC110
        await asyncio.sleep(LOOK_S)


class LastView:
    """What the last words of one node's peers ask it to do in the end."""

    def __init__(self, membership: Membership, farewell: Farewell) -> None:
        self._membership, self._farewell = membership, farewell
        self.size = 0
        """Entries of a view; 0: the strategy cannot take one over."""
        self._heard: Message | None = None
        self._awaits = False

    @property
    def first(self) -> PeerId:
        """Whose view becomes everybody's."""
        return min(self._farewell.staying)

    @property
    def due(self) -> bool:
        """Was anybody silent who may have carried words, as far as those say who stay?"""
        staying, states = self._farewell.staying, self._membership.roster.states
        lost = any(state is State.SILENT and p not in staying for p, state in states.items())
        return bool(self.size) and self._membership.topology.talk != "mesh" and (lost or any(staying.values()))

    @property
    def lack(self) -> str:
        """What did not come when all had been said (empty: nothing)."""
        return f" (the last view of {self.first} did not come)" if self._awaits else ""

    def hear(self, message: Message) -> str:
        """Somebody's view; returns why it is not taken (empty: it may be). It may come before we know that all is said,
        but not before we have said all."""
        me = self._membership.me
        if not self.size or me not in self._farewell.staying:
            return f"{FINAL}: nobody waits for a last view"
        if message.origin == me or message.origin != self.first:
            return f"{FINAL}: {message.origin} is not the first"
        if [(block.start, block.size, block.indices) for block in message.blocks] != [(0, self.size, None)]:
            return f"{FINAL}: it is not a whole view"
        if self._heard is None or self._heard.origin != message.origin:  # it may come over two ways
            self._heard = message
        return ""

    def _ended_before_us(self) -> bool:
        """Is the first silent by now, and nothing of its view here? It had no reason to say one, or died."""
        return self._heard is None and self._membership.roster.states[self.first] is State.SILENT

    async def agree(self, put: Callable[[Item], None], all_said: Callable[[], bool]) -> None:
        """When all is said: say our view, or take over that of the first; then wait until it was heard."""
        if not self.due or self._ended_before_us():
            return
        first, me, self._awaits = self.first, self._membership.me, True

        def here() -> bool:
            return first == me or (self._heard is not None and self._heard.origin == first)

        await until(lambda: not self.due or (all_said() and here()))
        self._awaits = False
        if not self.due:  # who was lost has come, and had missed nobody
            return
        came_from = None if self._heard is None else self._heard.hop
        onward = self._membership.onward(came_from, first, self._membership.plan_name)
        put(Barrier(None))
        put(Conclude(self._heard, tuple(p for p in onward if p in self._membership.roster.live)))
        await until(all_said)
