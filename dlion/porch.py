"""Coming into a run under way, on the loop: whom we ask to show us in, whom we show in, who is introduced to us.

Law: knows sessions and the roster; weights it hands to the lane unread. What is copied, owed and passed on is the
lane's (``newcomers``); here is who may be talked to meanwhile, and from when on somebody counts: a newcomer, when it
begins and is heard.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Mapping
from typing import ClassVar

from msgspec.structs import replace

from dlion.farewell import Farewell
from dlion.identity import UNDER_WAY
from dlion.items import Enter, Entered, Item, MembersChanged, Renewed, Writable
from dlion.membership import Membership
from dlion.mesh.roster import LIVING, Change, Record, news_texts
from dlion.messages import Message, PeerId, Stream
from dlion.neighbours import Neighbours
from dlion.net.link import LinkError
from dlion.newcomers import ALL, ASK, JOIN, READY
from dlion.tensors import Flat

DIAL_S = 5.0
"""How long to try to reach a possible sponsor."""
LATE_S = 5.0
"""Nobody comes in so shortly before the end."""
GATHER_S = 2.0
"""How long to wait for a peer of our own micro-cloud to say that it could show us in."""


class Alone(LinkError):  # noqa: N818 - what happened to the user
    """None of the peers of the topology could be reached."""


class Unwanted(Alone):
    """All of them refused us."""

    exit_code: ClassVar[int] = 77


class NotShownIn(LinkError):  # noqa: N818 - what happened to the user
    """The run is under way, and nobody could show us in, or our sponsor fell silent too early."""

    exit_code: ClassVar[int] = 77


class Porch:
    """``tell`` says one of the node's own kinds, ``turn`` notes a change of the roster, ``put`` hands the lane an item,
    ``afresh`` forgets what was heard before."""

    def __init__(
        self,
        membership: Membership,
        neighbours: Neighbours,
        farewell: Farewell,
        tell: Callable[[tuple[PeerId, ...], Message], None],
        turn: Callable[[Change | None], None],
        put: Callable[[Item], None],
        *,
        afresh: Callable[[], None],
    ) -> None:
        self._membership, self._roster, self._neighbours = membership, membership.roster, neighbours
        self._farewell, self._tell, self._turn, self._put, self._afresh = farewell, tell, turn, put, afresh
        self.refusal: Callable[[], str] = lambda: ""
        """Why our lane can show nobody in (empty: it can)."""
        self.open_until = -math.inf
        """Loop time until which we may be somebody's sponsor."""
        self.under_way: set[PeerId] = set()
        """Who said that the run goes on already, without us."""
        self.entered: Entered | None = None
        """What the lane says of our coming."""
        self._lost = ""
        """Why our sponsor is lost to us."""
        self._asked = False
        self._sponsor: PeerId | None = None
        self._copied: set[PeerId] = set()
        """Guests for whom our replica was copied."""
        self._unheld: dict[PeerId, list[Message]] = {}
        """Who comes into the run, for those to whom no link was ever made."""
        door = neighbours.door
        door.life_of, door.near, door.unmet = membership.life_of, membership.near, membership.unmet
        door.sponsors = self._objection

    def progress(self, applied: Mapping[PeerId, int]) -> dict[PeerId, int]:
        """Last step heard of each living peer; who is new here is not waited for until it was heard."""
        late, me = self._neighbours.door.admitted, self._roster.me.peer
        heard = (p for p in self._roster.live if p in applied or not (p in late or self._sponsor))
        return {p: applied.get(p, -1) for p in heard if p != me}

    # -- our own way in -----------------------------------------------------------------------------------------

    async def enter(
        self,
        start: Flat,
        patience_s: float,
        stopping: Callable[[], bool],
        change: Callable[[], Coroutine[None, None, None]],
    ) -> Entered:
        """Ask one possible sponsor after the other; returns where the run is that we are in now.

        ``start``: the weights that everybody began with; ``patience_s``: how long a sponsor may say nothing. Raises
        NotShownIn.
        """
        cloud_of, me = self._membership.topology.cloud_of, self._roster.me.peer
        try:
            async with asyncio.timeout(GATHER_S):
                while not (stopping() or any(cloud_of(p) == cloud_of(me) for p in self.under_way)):
                    await change()
        except TimeoutError:
            pass
        failures: dict[PeerId, str] = {}
        while (
            not stopping() and (sponsor := next((p for p in self._sponsors() if p not in failures), None)) is not None
        ):
            self._ask(sponsor, start)
            try:
                async with asyncio.timeout(DIAL_S):
                    while not (self._asked or self._lost or stopping()):
                        await change()
                while not (self.entered or self._lost or stopping()):
                    async with asyncio.timeout(patience_s):
                        await change()
            except TimeoutError:
                self._lost = "it did not answer"
            if (entered := self.entered) is not None and not entered.fault:
                self._come_in(sponsor, entered.t)
                return entered
            failures[sponsor] = self._lost or (entered.fault if entered is not None else "we were stopped")
        why = "; ".join(f"{peer}: {why}" for peer, why in failures.items())
        raise NotShownIn(f"{me}: the run is under way already, and nobody could show it in: {why or 'nobody is near'}")

    def _sponsors(self) -> list[PeerId]:
        """Whom to ask, best first: of our own micro-cloud; elsewhere only in a mesh."""
        cloud, me = self._membership.topology.cloud_of, self._roster.me.peer
        near = [p for p in self._membership.topology.peers if p != me and self._membership.near(p)]
        return sorted(near, key=lambda p: (p not in self.under_way, cloud(p) != cloud(me), p))

    def _ask(self, sponsor: PeerId, start: Flat) -> None:
        """Begin a new life, and ask ``sponsor`` to show us in."""
        self._lost, self.entered, self._asked = "", None, False
        self._afresh()
        self._neighbours.ask(sponsor)
        life = self._neighbours.identity.incarnation
        self._roster.come(life)
        self._membership.changed()  # or what we hear at first, we would pass on as the bridge that we were to be
        self._put(Enter(sponsor, life, start))

    def _say_ask(self, sponsor: PeerId, at: int) -> None:
        fields = {"at": at, "life": self._neighbours.identity.incarnation}
        self._tell((sponsor,), Message(ASK, fields=fields, stream=Stream.CONTROL))

    def _come_in(self, sponsor: PeerId, now_s: float) -> None:
        """We are who our sponsor was; whoever it counts, counts. ``now_s``: of the run."""
        self._sponsor = sponsor
        self._roster.speak(since_s=max(now_s, 1e-3))
        self._membership.changed()
        self._neighbours.shown_in()
        now = asyncio.get_running_loop().time()
        self._turn(self._roster.alive(sponsor, self._membership.life_of(sponsor), now))
        missing = [p for p, state in self._roster.states.items() if state not in LIVING and p != self._roster.me.peer]
        for turn in (*self._roster.miss(missing, now), *self._roster.presume(now)):
            self._turn(turn)
        self._say_ask(sponsor, ALL)
        self._neighbours.want(self._membership.neighbours)
        self._put(MembersChanged())

    def check(self, unsure: bool) -> None:
        """Raises NotShownIn when our sponsor is gone and we still needed it."""
        if unsure and self._sponsor is not None and self._roster.states[self._sponsor] not in LIVING:
            me = self._roster.me.peer
            raise NotShownIn(f"{me}: {self._sponsor}, which showed it into the run, fell silent too early")

    # -- what happens at the door --------------------------------------------------------------------------------

    def up(self, peer: PeerId, incarnation: int) -> bool:
        """A link was made. True: it is not one between two that are in the run."""
        if peer in self._neighbours.guests:
            self._roster.guests.add(peer)
            self._introduce(peer, incarnation)
            return True
        if self._neighbours.door.sponsor is not None:
            if not self._asked:
                self._asked = True
                self._say_ask(peer, 0)
            return True
        self._roster.guests.discard(peer)
        for message in self._unheld.pop(peer, ()):
            self._tell((peer,), message)
        return False

    def down(self, peer: PeerId, patience_s: float) -> None:
        """A link was lost."""
        if peer == self._neighbours.door.sponsor:
            life = self._neighbours.identity.incarnation
            asyncio.get_running_loop().call_later(patience_s, self._miss, peer, life)

    def _miss(self, sponsor: PeerId, life: int) -> None:
        """The link to our sponsor was lost a while ago, in that life of ours."""
        neighbours = self._neighbours
        asked = (neighbours.door.sponsor, neighbours.identity.incarnation) == (sponsor, life)
        if asked and not neighbours.connected(sponsor):
            self._lost = "the link to it was lost"
            self._put(MembersChanged())

    def refused(self, peer: PeerId, reason: str, *, begun: bool) -> None:
        """``peer`` will not talk to us, or we not to it."""
        if peer == self._neighbours.door.sponsor:
            self._lost = reason
        elif reason.startswith(f"{peer} {UNDER_WAY}") and not begun:  # of itself: that we began, we know
            if self._membership.near(peer):
                self.under_way.add(peer)
            else:
                asyncio.get_running_loop().call_later(GATHER_S, self._overhear, peer)

    def _overhear(self, peer: PeerId) -> None:
        """Beyond a bridge that is missing they began without us; are we late? One of our own micro-cloud that talks to
        us knows better."""
        topology, me = self._membership.topology, self._roster.me.peer
        if not any(self._neighbours.connected(p) for p in topology.clouds[topology.cloud_of(me)]):
            self.under_way.add(peer)
            self._put(MembersChanged())

    def notice(self, message: Message) -> None:
        """The lane has dealt with a message of the newcomers' kinds."""
        if message.kind == READY:
            self._say_ask(message.hop, 1)
        elif message.kind == JOIN and self._membership.near(peer := PeerId(str(message.fields["peer"]))):
            self._introduce(peer, int(message.fields["life"]))
        elif message.kind == ASK and message.hop in self._neighbours.guests:
            if message.fields["at"] == 0:
                self._show_around(message.hop)
            elif message.fields["at"] == ALL:
                self._show_in(message.hop)

    def hold(self, peer: PeerId, message: Message) -> None:
        """There was no session with ``peer`` to take this."""
        if message.kind == JOIN:
            self._unheld.setdefault(peer, []).append(message)

    def believes(self, record: Record, teller: PeerId) -> bool:
        """Is it for ``teller`` to say that this is how ``record.peer`` lives now?"""
        peer, known = record.peer, self._roster.records.get(record.peer)
        if known is None or peer in (teller, self._roster.me.peer) or not record.incarnation > known.incarnation > 0:
            return True
        if self._membership.near(peer):
            return False  # its sponsor says so
        self._farewell.forget(peer)
        self._put(Renewed(peer))
        return True

    # -- others' way in ------------------------------------------------------------------------------------------

    def _objection(self, peer: PeerId) -> str:
        """Why we do not show ``peer`` in."""
        me = self._roster.me.peer
        if not self._membership.near(peer):
            return f"{me} is in another micro-cloud than {peer}: only one of its own can show it in"
        is_open = asyncio.get_running_loop().time() < self.open_until
        why = self.refusal() if is_open else "it is not training, or about to end"
        return f"{me} cannot show {peer} in: {why}" if why else ""

    def _introduce(self, peer: PeerId, incarnation: int) -> None:
        """``peer`` begins a new life."""
        if incarnation > self._roster.records[peer].incarnation:
            self._copied.discard(peer)
            self._neighbours.introduce(peer, incarnation)
            self._farewell.forget(peer)
            self._unheld.pop(peer, None)
            self._turn(self._roster.introduce(peer, incarnation))

    def _show_around(self, guest: PeerId) -> None:
        """Our guest has been copied for: tell it whom we knew then."""
        unknown = {guest, *(self._roster.guests - self._copied)}
        self._copied.add(guest)
        states = self._roster.states
        known = [
            replace(r, silent=states[p] not in LIVING) for p, r in self._roster.records.items() if p not in unknown
        ]
        for text in news_texts(known):
            self._tell((guest,), Message("~status", fields={"news": text}, stream=Stream.CONTROL))
        for message in self._farewell.left():
            self._tell((guest,), message)
        self._tell((guest,), Message(READY, stream=Stream.CONTROL))

    def _show_in(self, guest: PeerId) -> None:
        """Our guest has all that it needs to begin."""
        self._neighbours.guests.discard(guest)
        self._roster.guests.discard(guest)
        life, now = self._membership.life_of(guest), asyncio.get_running_loop().time()
        self._turn(self._roster.alive(guest, life, now))
        self._put(Writable(guest))
