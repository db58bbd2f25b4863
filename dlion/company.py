"""The other peers around one node: hears them, tells them, notes who comes, falls silent, leaves or talks nonsense.

Law: on the loop; no weights, no strategy, no step. What is for the strategy is handed to the exchange lane unread.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from itertools import chain
from typing import Any

import numpy as np

from dlion.cut import MARK, MARK_FIELDS
from dlion.exchange.base import Context, LinkView
from dlion.farewell import BYE_FIELDS, DONE_FIELDS, Farewell
from dlion.gossip import Gossip
from dlion.identity import Identity
from dlion.items import Heard, Item, MembersChanged, Writable
from dlion.journal import Journal
from dlion.lastview import FINAL_KINDS, LastView, until
from dlion.membership import Membership
from dlion.mesh.roster import STATUS_FIELDS, Change, Record, State
from dlion.mesh.topology import Topology
from dlion.messages import Message, PeerId, Stream
from dlion.neighbours import Neighbours
from dlion.net.connection import Connection
from dlion.net.link import Dialer
from dlion.net.session import SessionLimits
from dlion.newcomers import NEWCOMER_KINDS
from dlion.patience import STILL_FIELDS, Patience
from dlion.porch import LATE_S, Porch
from dlion.seams import NodeSettings
from dlion.startline import StartLine
from dlion.wire.admit import Kinds
from dlion.wire.codec import encode

NODE_KINDS: Kinds = {
    "~status": STATUS_FIELDS,
    "~done": DONE_FIELDS,
    "~bye": BYE_FIELDS,
    "~still": STILL_FIELDS,
    "~refused": {"reason": str},
    MARK: MARK_FIELDS,
    **NEWCOMER_KINDS,
    **FINAL_KINDS,
}
"""What nodes say to each other beside their strategies."""
REASON_CHARS_MAX = 200
EXPECTED = ("presumed", "finished")
"""Why somebody's state changed that is not worth a line of the log, unless it is a neighbour."""
TOGETHER_S = 0.02
"""Last words of those who stay wait so long for others to be passed on with."""


class Company:
    """All other peers, as one node deals with them (a ``neighbours.Listener``).

    ``put`` hands the exchange lane something that happened, ``wake`` makes the node's waiting loops look again.
    """

    def __init__(
        self,
        identity: Identity,
        topology: Topology,
        settings: NodeSettings,
        dialer: Dialer,
        limits: SessionLimits,
        rng: np.random.Generator,
        journal: Journal,
    ) -> None:
        me = Record(identity.peer, identity.incarnation)
        self.membership = Membership(me, topology, settings.suspect_after_s, settings.status_every_s)
        self.neighbours = Neighbours(identity, topology.peers, self, dialer, limits, settings.dial, rng)
        self.neighbours.ways = self.membership.ways_to
        self.farewell = Farewell(self.membership, self.neighbours.connections, self.tell)
        self.last_view = LastView(self.membership, self.farewell)
        self.patience = Patience(self.membership, self.neighbours.connections, self.tell, settings.drain_s)
        self.owes = False
        """The strategy owes something that last words must not overtake."""
        self.lags = False
        """It owes what goes by an older plan than ours, or may."""
        self._me = identity.peer
        self._topology = topology
        self._settings = settings
        self._journal = journal
        self._refusals: dict[PeerId, int] = {}
        self._begun = False
        self._early: list[Heard] = []
        self._aging: asyncio.TimerHandle | None = None
        self._parting: asyncio.TimerHandle | None = None
        self._views: list[tuple[Connection, LinkView]] = []
        """The links that the strategy sees."""
        self._seen = -1
        """Version of the roster that the lane was last told of."""
        self.porch = Porch(
            self.membership,
            self.neighbours,
            self.farewell,
            self.tell,
            self._turn,
            self._hand_over,
            afresh=self._early.clear,
        )
        self.gossip = Gossip(
            self.membership,
            self.neighbours,
            self.tell,
            self._turn,
            self.porch.believes,
            self.refuse,
            settings.status_every_s,
        )
        self.start_line = StartLine(
            self.membership, self.neighbours, self.porch, self._turn, settings.start_wait_s, settings.begin_at_s
        )
        self._put: Callable[[Item], None]
        self._wake: Callable[[], None]

    # -- life ---------------------------------------------------------------------------------------------------

    def start(
        self,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        put: Callable[[Item], None],
        wake: Callable[[], None],
    ) -> None:
        self._put, self._wake = put, wake
        self.neighbours.start(spawn)

    def _hand_over(self, item: Item) -> None:
        self._put(item)

    def begin(self, end: float | None) -> None:
        """Training begins: what was said to us before, the lane may now hear, for all it passes on to are there.
        ``end``: when it will be over, loop time, if that is known."""
        self.porch.open_until = math.inf if end is None else end - LATE_S
        self._begun = True
        for item in self._early:
            self._put(item)
        self._early.clear()

    def rest(self) -> None:
        """Training is over: show nobody in."""
        self.porch.open_until = -math.inf

    def close(self) -> None:
        for timer in (self._aging, self._parting):
            if timer is not None:
                timer.cancel()
        self.gossip.close()
        self.patience.close()
        self.neighbours.close()

    def show(self, ctx: Context, lane_s: float) -> None:
        """The strategy's picture of members, links and its lane, brought up to date while that rests."""
        ctx.lane_s = lane_s
        connections = self.neighbours.connections
        anew = self.membership.show(ctx, connections, (p for p, c in connections.items() if c.connected))
        if anew:
            self._views = [(connections[p], view) for p, view in chain(ctx.links.items(), ctx.former.items())]
        for connection, view in self._views:
            if connection.moved or anew:
                connection.moved = False
                view.rate_bps, view.rtt_s = connection.rate_bps, connection.rtt_s
                view.writable_bytes = connection.writable_bytes

    def want_room(self) -> None:
        """Wherever the strategy saw a link as full, if by what it said itself, it is told when that can take more."""
        for connection in (c for c, view in self._views if view.writable_bytes <= 0):
            connection.want_room()

    # -- speaking -----------------------------------------------------------------------------------------------

    def say(self, to: tuple[PeerId, ...], body: bytes, message: Message, budgets: tuple[int, ...] = ()) -> None:
        """Hand an encoded message to sessions; never waits."""
        entries = sum([block.count for block in message.blocks])
        for peer, budget_bytes in zip(to, budgets or (0,) * len(to), strict=True):
            seq = self.neighbours.send(peer, message.stream, body)
            if not seq:
                self.porch.hold(peer, message)
            self._journal.sent(peer, seq, len(body), message.kind, entries, budget_bytes)

    def tell(self, to: tuple[PeerId, ...], message: Message) -> None:
        """Say one of the node's own kinds."""
        if not message.origin:
            message = Message(message.kind, fields=message.fields, stream=message.stream, origin=self._me)
        self.say(to, encode(message), message)

    def _pass_on_together(self) -> None:
        self._parting = None
        self.farewell.pass_on(self.owes)

    def see_off(self) -> None:
        """Those of who leaves overtake all, and goodbyes come back."""
        self.farewell.pass_on(True)
        self.farewell.answer(self.lags)

    async def take_leave(self, leaving: bool, occupied: Callable[[], bool]) -> None:
        """Say a last word, wait until it was heard (and, when all finish, until all said so), agree on a last view."""
        roster, loop = self.membership.roster, asyncio.get_running_loop()
        redialled_s = 0.0 if leaving or self._topology.talk == "mesh" else self._settings.lost_after_s

        def done() -> bool:  # with a bridge all beyond it seem silent, until another one is there
            return self.all_said(leaving) and not occupied() and loop.time() >= roster.missed_at + redialled_s

        def calm() -> bool:  # where somebody is missed, the last view is for those who lack a word
            return done() and (leaving or roster.missed_at > -math.inf or self.patience.still)

        self.farewell.say(leaving)
        await until(calm)
        if not leaving:
            self.patience.renew()
            await self.last_view.agree(self._put, done)

    def all_said(self, leaving: bool) -> bool:
        """Has everybody heard us, and (unless we leave the others to go on) said a last word?"""
        self.farewell.pass_on(self.owes)
        self.farewell.answer(self.lags)
        unheard = [connection for connection in self.farewell.listeners if not connection.session.heard]
        for connection in unheard:
            connection.ask()
        if self.neighbours.passages and not leaving:
            return False
        return not unheard and self.farewell.complete(leaving)

    # -- hearing (neighbours.Listener) --------------------------------------------------------------------------

    def heard(self, peer: PeerId, stream: int, seq: int, body: bytes | memoryview) -> None:
        self._journal.meter.received(peer, len(body))
        item = Heard(peer, stream, seq, body)
        coming = self.neighbours.door.sponsor is not None
        if self._begun or stream == Stream.CONTROL or (stream == Stream.BULK and coming):
            self._put(item)
        else:
            self._early.append(item)

    def writable(self, peer: PeerId) -> None:
        self._put(Writable(peer))

    def up(self, peer: PeerId, incarnation: int, via: PeerId | None) -> None:
        if via is not None:
            self._journal.member(peer, "detour", f"reached through {via}", incarnation)
        roster = self.membership.roster
        if self.porch.up(peer, incarnation):
            self._wake()
            return
        self._turn(roster.alive(peer, incarnation, asyncio.get_running_loop().time()))
        roster.version += 1
        self.gossip.begin_again()
        self._put(MembersChanged())
        self._put(Writable(peer))  # what it was owed meanwhile may go
        self._wake()

    def down(self, peer: PeerId, reason: str) -> None:
        loop, patience_s = asyncio.get_running_loop(), self._settings.lost_after_s
        self.porch.down(peer, patience_s)
        self.membership.roster.lost(peer, loop.time(), patience_s)
        if peer not in self.membership.neighbours:  # it was needed only for what goes by an older plan
            self.membership.roster.version += 1
            self._put(MembersChanged())
            self._wake()
        self._journal.member(peer, "link lost", reason)
        if self._aging is not None:
            self._aging.cancel()
        self._aging = loop.call_later(patience_s + 1e-3, self.age)

    def refused(self, peer: PeerId, reason: str) -> None:
        self._journal.refused(peer, reason)
        if peer in self._topology.peers:  # else a stranger claims to be called so
            self.start_line.refusers[peer] = reason[:REASON_CHARS_MAX]
            self.porch.refused(peer, reason, begun=self._begun)
            self._wake()

    def refuse(self, peer: PeerId, reason: str) -> None:
        """An inadmissible message: counted, attributed, told to its sender; too many quarantine the sender."""
        self._journal.refused(peer, reason)
        self._refusals[peer] = self._refusals.get(peer, 0) + 1
        if self._refusals[peer] < self._settings.refusals_max:
            fields = {"reason": reason[:REASON_CHARS_MAX]}
            self.tell((peer,), Message("~refused", fields=fields, stream=Stream.CONTROL))
        else:
            self._refusals[peer] = 0
            self.neighbours.quarantine(
                peer, f"{self._settings.refusals_max} inadmissible messages, last: {reason[:REASON_CHARS_MAX]}"
            )

    def notice(self, message: Message) -> None:
        """A message of the node's own kinds."""
        match message.kind:
            case "~status":
                self.gossip.hear(message, self._begun)
            case "~ask" | "~ready" | "~join":
                self.porch.notice(message)
            case "~done":
                self._turn(*(self.membership.roster.finished(*last) for last in self.farewell.hear(message)))
                if message.fields["leaving"]:
                    self.see_off()
                elif self._parting is None:
                    self._parting = asyncio.get_running_loop().call_later(TOGETHER_S, self._pass_on_together)
            case "~bye":
                self.farewell.bye(message)
            case "~still":
                self.patience.hear(message)
            case "~final":
                if why := self.last_view.hear(message):
                    self.refuse(message.hop, why)
            case "~refused":
                self._journal.refused(message.hop, f"it refused ours: {message.fields['reason']}")

    # -- who is there -------------------------------------------------------------------------------------------

    def age(self, lag_s: float = 0.0) -> None:
        """Give up links that are only half there, and count no longer who is silent. ``lag_s``: our own lateness."""
        now, patience_s = asyncio.get_running_loop().time(), self._settings.suspect_after_s
        roster = self.membership.roster
        if now - lag_s <= roster.look_at:
            return
        for peer, connection in list(self.neighbours.connections.items()):
            if not connection.connected:
                continue
            if now - connection.last_heard - lag_s > patience_s:
                connection.abort(f"nothing came for {patience_s:g} s")
            else:
                self._turn(roster.near(peer, connection.last_heard))
        self._turn(*roster.age(now, lag_s))

    def _turn(self, *found: Change | None) -> None:
        """Somebody's state may have changed."""
        changes = [change for change in found if change is not None]
        if not changes:
            return
        for change in changes:
            if change.why not in EXPECTED or change.peer in self.neighbours.connections:
                self._journal.member(change.peer, change.state, change.why, change.incarnation)
            if change.state is State.LEFT:
                self.neighbours.forget(change.peer)
        self.membership.changed()
        self.lags = True  # until the lane has looked
        if any(change.state is State.SILENT for change in changes):
            self.gossip.spread()
        if self.neighbours.door.sponsor is None:
            self.neighbours.want(self.membership.sought)
        if self._seen != self.membership.roster.version:
            self._seen = self.membership.roster.version
            self._put(MembersChanged())
        self._wake()
