"""News of who is there, on its way between neighbours: what a peer says of itself, and passes on of others.

Law: on the loop; records and texts. What they mean is the roster's, to whom they go the membership's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from dlion.membership import Membership
from dlion.mesh.roster import Change, Record, news_texts, records_of
from dlion.messages import Message, PeerId, Stream
from dlion.neighbours import Neighbours

CARRY_SHARE = 0.1
"""News of others waits for more of its kind this share of a beat at each hop, ..."""
CARRIED_BEATS_MAX = 20
"""... however rare beats are no longer than this many ``status_every_s``; that somebody is silent, of one."""


class Gossip:
    """One node's. ``tell(to, message)`` sends, ``turn(change)`` takes a change of somebody's state, ``believes(record,
    teller)`` is asked of each piece of news once training has begun, ``refuse(peer, reason)`` sends nonsense back."""

    def __init__(
        self,
        membership: Membership,
        neighbours: Neighbours,
        tell: Callable[[tuple[PeerId, ...], Message], None],
        turn: Callable[[Change], None],
        believes: Callable[[Record, PeerId], bool],
        refuse: Callable[[PeerId, str], None],
        period_s: float,
    ) -> None:
        self._membership, self._neighbours, self._period_s = membership, neighbours, period_s
        self._tell, self._turn, self._believes, self._refuse = tell, turn, believes, refuse
        self._carrying: asyncio.TimerHandle | None = None
        self._carry_at = 0.0
        self._spread = -1
        """All news up to this one are told to all neighbours."""

    def close(self) -> None:
        if self._carrying is not None:
            self._carrying.cancel()

    def beat(self, **own: int | float) -> None:
        """Tell each neighbour our own record, if it is time to, and those that it hears only through us; else they
        wait for more of their kind."""
        if self._neighbours.door.sponsor is not None:
            return
        if self._membership.roster.beat(asyncio.get_running_loop().time(), **own) or self._carrying is None:
            self.spread()

    def begin_again(self) -> None:
        """Somebody is there who may have been told nothing."""
        self._spread = -1

    def spread(self) -> None:
        """Tell all neighbours what they have not been told. What is told to several is encoded once."""
        if self._spread == self._membership.roster.changes:
            return
        self._spread = self._membership.roster.changes
        audiences: dict[tuple[int, ...], tuple[list[Record], list[PeerId]]] = {}
        for peer, connection in self._neighbours.connections.items():
            if connection.connected and (news := self._membership.news(peer)):
                audiences.setdefault(tuple(map(id, news)), (news, []))[1].append(peer)
        for records, peers in audiences.values():
            self._say(tuple(peers), records)

    def _say(self, to: tuple[PeerId, ...], records: Sequence[Record]) -> None:
        for text in news_texts(records):
            self._tell(to, Message("~status", fields={"news": text}, stream=Stream.CONTROL))

    def hear(self, message: Message, begun: bool) -> None:
        """What a neighbour has heard of others, and of itself. ``begun``: training has."""
        try:
            records = records_of(str(message.fields["news"]))
        except ValueError as error:
            self._refuse(message.hop, f"~status: {error}")
            return
        now, roster, neighbours = asyncio.get_running_loop().time(), self._membership.roster, self._neighbours
        for record in records:
            if begun and not self._believes(record, message.hop):
                continue
            if record.silent and neighbours.connected(record.peer):
                roster.spoke(record.peer, neighbours.connections[record.peer].last_heard)
            if (change := roster.hear(record, message.hop, now)) is not None:
                self._turn(change)
            if record.silent and roster.hears(record.peer, now):  # let it refute that
                self._say((record.peer,), [record])
        if self._membership.topology.talk != "mesh":
            self._carry_soon(urgent=any(record.silent for record in records))

    def _carry_soon(self, *, urgent: bool) -> None:
        beat_s = self._membership.roster.beat_s
        beat_s = self._period_s if urgent else min(beat_s, CARRIED_BEATS_MAX * self._period_s)
        loop = asyncio.get_running_loop()
        carry_at = loop.time() + CARRY_SHARE * beat_s
        if self._carrying is not None:
            if self._carry_at <= carry_at:  # a handle does not know it on every loop
                return
            self._carrying.cancel()
        self._carry_at = carry_at
        self._carrying = loop.call_at(carry_at, self._carry)

    def _carry(self) -> None:
        """Pass news on. Waiting for our own turn to speak would make far peers seem silent."""
        self._carrying = None
        self.spread()
