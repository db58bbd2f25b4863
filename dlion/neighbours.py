"""The peers this node talks to: dialling, greeting, refusing, resuming.

Law: knows links, sessions and hellos; nothing of weights or strategies. One Session per neighbour and incarnation
outlives its links; a lost link is dialled again with back-off for as long as the neighbour is wanted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from dlion.door import Door
from dlion.identity import JOINING, NAME_SHOWN, TRAINING, Identity, cut_of, mismatch, other_cut
from dlion.messages import PROTOCOL_MAX, PROTOCOL_MIN, Hello, PeerId
from dlion.net.chunks import Bye, ProtocolError
from dlion.net.connection import Connection
from dlion.net.greeting import Greeting, LeftError
from dlion.net.link import Dialer, Link, LinkError
from dlion.net.session import Session, SessionLimits
from dlion.passages import Passages
from dlion.wire.codec import Malformed, decode_hello, encode_hello


@dataclass(frozen=True)
class DialSettings:
    hello_timeout_s: float = 10.0
    backoff_min_s: float = 0.1
    backoff_max_s: float = 5.0
    quarantine_s: float = 30.0
    heartbeat_s: float = 3.0
    detour_min_s: float = 1.0
    detour_max_s: float = 30.0
    """Others are asked for a way after the first of these; the direct one is tried again after so long, doubled."""


UNREACHED = LinkError, Malformed, ProtocolError, TimeoutError
LEAD = 0.9
"""The lower name asks for signs of life this much sooner: else both would ask, and both answer, at the same instant."""
CONNECTED = "already connected"
"""The refusal of the second of two simultaneous dials: no fault of anybody."""


class Listener(Protocol):
    """What the node wants to know. Called on the loop."""

    def heard(self, peer: PeerId, stream: int, seq: int, body: bytes | memoryview) -> None: ...
    def writable(self, peer: PeerId) -> None: ...
    def up(self, peer: PeerId, incarnation: int, via: PeerId | None) -> None: ...
    def down(self, peer: PeerId, reason: str) -> None: ...
    def refused(self, peer: PeerId, reason: str) -> None: ...


class Refused(LinkError):  # noqa: N818 - an answer, not a failure
    """The other side, or this one, will not talk; the text shows both values."""


@dataclass
class Neighbour:
    """One incarnation of a peer we have met."""

    incarnation: int
    connection: Connection
    dialled_by: PeerId
    via: PeerId | None = None
    """Who passes our link on, if we dialled it round."""


class Neighbours:
    """All sessions of one node. ``spawn`` starts a task in the node's task group."""

    def __init__(
        self,
        identity: Identity,
        known: Iterable[PeerId],
        listener: Listener,
        dialer: Dialer,
        limits: SessionLimits,
        settings: DialSettings,
        rng: np.random.Generator,
    ) -> None:
        self.identity = identity
        self.known = frozenset(known)
        self.connections: dict[PeerId, Connection] = {}
        """Of every peer met and not gone, connected now or not."""
        self._met: dict[PeerId, Neighbour] = {}
        self.door = Door()
        self.guests: set[PeerId] = set()
        """Who asked us to show it in, and is not in yet."""
        self.ways: Callable[[PeerId], Iterable[Sequence[PeerId]]] = lambda peer: ()
        """Who might pass us on to a peer that we cannot reach, in groups."""
        self.passages = Passages(dialer, self.known)
        self._cut = ""
        """The checkpoint that the last peer we greeted goes on from."""
        self._listener = listener
        self._dialer = dialer
        self._limits = limits
        self._settings = settings
        self._rng = rng
        self._wanted: dict[PeerId, asyncio.Task[None]] = {}
        self._going_round: dict[PeerId, asyncio.Task[None]] = {}
        self._turned: dict[PeerId, asyncio.Event] = {}
        self._quarantined: dict[PeerId, float] = {}
        self._gone: set[PeerId] = set()
        self._spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]] | None = None

    def start(self, spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]) -> None:
        self._spawn = spawn

    def want(self, peers: Iterable[PeerId]) -> None:
        """Keep a link to each of ``peers`` from now on (links to others are kept while they last)."""
        assert self._spawn is not None
        for peer in peers:
            if peer not in self._wanted and peer not in self._gone:
                self._turned.setdefault(peer, asyncio.Event())
                self._wanted[peer] = self._spawn(self._keep(peer))

    def ask(self, sponsor: PeerId) -> None:
        """Begin a new life: forget all links, and keep one to ``sponsor`` only, whom we ask to show us in."""
        self._let_go()
        for known in (self._wanted, self._met, self.connections, self._turned, self._quarantined):
            known.clear()
        self.identity = replace(self.identity, incarnation=self.identity.incarnation + 1, joining=True)
        self.door.sponsor = sponsor
        self.want([sponsor])

    def shown_in(self) -> None:
        """We are in the run: everybody may be talked to."""
        self.identity, self.door.sponsor = replace(self.identity, joining=False, late=True, cut=self._cut), None
        self.door.begin()

    def introduce(self, peer: PeerId, incarnation: int) -> None:
        """``peer`` has begun a new life; links to a former one are over."""
        self.door.admitted[peer] = incarnation
        self._gone.discard(peer)
        if (met := self._met.get(peer)) is not None and met.incarnation < incarnation:
            met.connection.close(Bye.REPLACED)
            del self._met[peer], self.connections[peer]
            self._turned.setdefault(peer, asyncio.Event()).set()

    def connected(self, peer: PeerId) -> bool:
        connection = self.connections.get(peer)
        return connection is not None and connection.connected

    def send(self, peer: PeerId, stream: int, body: bytes) -> int:
        """Hand ``body`` to the session with ``peer``; returns its number, 0 if there is no session to hold it."""
        connection = self.connections.get(peer)
        return 0 if connection is None else connection.send(stream, body)

    def forget(self, peer: PeerId) -> None:
        """``peer`` has left: dial it no more; it ends the link itself once it has heard all it waits for."""
        self._gone.add(peer)
        for task in (self._wanted.pop(peer, None), self._going_round.get(peer)):
            if task is not None:
                task.cancel()

    def quarantine(self, peer: PeerId, reason: str) -> None:
        """Close the link to ``peer`` and take no other for a while."""
        self._quarantined[peer] = asyncio.get_running_loop().time() + self._settings.quarantine_s
        if (connection := self.connections.get(peer)) is not None and connection.connected:
            connection.close(Bye.REFUSED)
            self._lost(peer, f"quarantined: {reason}")

    def close(self) -> None:
        """Say goodbye on all links; take and make no more."""
        self._spawn = None
        self.passages.close()
        self._let_go()

    def _let_go(self) -> None:
        for task in (*self._wanted.values(), *self._going_round.values()):
            task.cancel()
        self._wanted.clear()
        for connection in self.connections.values():
            connection.close()

    def accept(self, link: Link) -> None:
        """Door for incoming links."""
        if self._spawn is None:
            link.abort()
            return
        greeting = self._spawn(self._welcome(link))
        greeting.add_done_callback(lambda task: link.abort() if task.cancelled() else None)  # perhaps before it began

    # -- greeting -----------------------------------------------------------------------------------------------

    def _hello(self, peer: PeerId, refusal: str = "", to: str = "") -> bytes:
        me, neighbour = self.identity, self._met.get(peer)
        waits = self.door.waits_for(peer, asyncio.get_running_loop().time())
        life = self.door.life_of(peer) if neighbour is None else neighbour.incarnation
        return encode_hello(
            Hello(
                protocol_min=PROTOCOL_MIN,
                protocol_max=PROTOCOL_MAX,
                run=me.run,
                peer=me.peer,
                incarnation=me.incarnation,
                role=me.role,
                job=me.job,
                model=me.model,
                cursors={} if neighbour is None else neighbour.connection.session.cursors(),
                of=0 if neighbour is None else neighbour.incarnation,
                capabilities=me.capabilities + [f"{TRAINING}{life}"] * (not waits),
                to=to,
                refusal=refusal,
            )
        )

    def _objection(self, hello: Hello) -> str:
        """Why we will not talk to the sender of ``hello`` (empty: we will)."""
        me, peer, now = self.identity, PeerId(hello.peer), asyncio.get_running_loop().time()
        if why := mismatch(me, hello):
            return why
        if peer not in self.known or peer == me.peer:
            return f"unknown peer {peer[:NAME_SHOWN]!r}: {me.peer}'s topology does not name it as another"
        if self._quarantined.get(peer, 0.0) > now:
            return f"{peer} is quarantined by {me.peer} for repeated inadmissible messages"
        met = neighbour.incarnation if (neighbour := self._met.get(peer)) else 0
        return self.door.objection(me, hello, met, now) or other_cut(me, hello)

    async def _welcome(self, link: Link) -> None:
        """Greet who has dialled us. What it does wrong ends its link, nothing else."""
        peer = PeerId("?")
        try:
            greeting = Greeting(link)
            words = await greeting.hear(self._settings.hello_timeout_s)
            hello = decode_hello(words)
            peer = PeerId(hello.peer)
            if hello.to not in ("", self.identity.peer):
                ends = peer, PeerId(hello.to)
                if why := mismatch(self.identity, hello) or await self.passages.carry(greeting, words, ends):
                    greeting.say(self._hello(peer, why))
                    link.close()
                return
            objection = self._objection(hello)
            if objection or self._keeps_existing(peer, hello):
                if objection:
                    self._listener.refused(peer, objection)
                greeting.say(self._hello(peer, objection or CONNECTED))
                link.close()
                return
            self._resume(peer, hello, dialled_by=peer)
            greeting.say(self._hello(peer))
            self._adopt(peer, hello, greeting)
        except LeftError:  # as one does that stops while it dials
            link.abort()
        except (LinkError, Malformed, ProtocolError) as error:
            self._listener.refused(peer, f"incoming link: {error}")
            link.abort()
        except BaseException:
            link.abort()
            raise

    def _keeps_existing(self, peer: PeerId, hello: Hello) -> bool:
        """Two simultaneous dials: the one started by the lower PeerId survives. A way round is of no use to who had not
        met us when it asked for it, and has us now."""
        existing, me = self._met.get(peer), self.identity.peer
        if existing is None or not existing.connection.connected or existing.incarnation != hello.incarnation:
            return False
        return existing.dialled_by == me < peer or (bool(hello.to) and existing.via is None and not hello.of)

    async def _dial(self, peer: PeerId, via: PeerId | None = None) -> None:
        """A link to ``peer``, or to ``via`` for it; a direct one replaces one that goes round."""
        me = self.identity.peer
        async with asyncio.timeout(self._settings.hello_timeout_s):
            link = await self._dialer.dial(via or peer)
        try:
            if self.connected(peer):
                if via is not None or self._met[peer].via is None:
                    raise LinkError(CONNECTED)
                self.connections[peer].abort(f"back from the way through {self._met[peer].via}")
            greeting = Greeting(link)
            greeting.say(self._hello(peer, to=peer if via else ""))
            hello = decode_hello(await greeting.hear(self._settings.hello_timeout_s))
            late = self.connected(peer) and (via is not None or self._met[peer].dialled_by == peer < me)
            if late or hello.refusal == CONNECTED:
                raise LinkError(CONNECTED)
            objection = hello.refusal or self._objection(hello)
            if objection:
                raise LinkError(objection) if via else Refused(objection)
            if hello.peer != peer:
                raise Refused(f"dialled {peer}, but {hello.peer[:NAME_SHOWN]!r} answered")
            self._resume(peer, hello, dialled_by=me)
            self._adopt(peer, hello, greeting, via)
        except BaseException:
            link.abort()
            raise

    def _resume(self, peer: PeerId, hello: Hello, dialled_by: PeerId) -> None:
        """The session that ``hello`` speaks of: the one we have, or a new one for a new incarnation."""
        neighbour = self._met.get(peer)
        if neighbour is not None and neighbour.incarnation == hello.incarnation:
            neighbour.dialled_by = dialled_by
            return
        if neighbour is not None:
            neighbour.connection.close(Bye.REPLACED)
        listener, loop = self._listener, asyncio.get_running_loop()
        session = Session(self._limits, loop.time())
        connection = Connection(
            session,
            on_message=lambda stream, seq, body: listener.heard(peer, stream, seq, body),
            on_writable=lambda: listener.writable(peer),
            on_lost=lambda reason: self._lost(peer, reason),
            heartbeat_s=self._settings.heartbeat_s * (LEAD if self.identity.peer < peer else 1.0),
        )
        self.connections[peer] = connection
        self._met[peer] = Neighbour(hello.incarnation, connection, dialled_by)

    def _adopt(self, peer: PeerId, hello: Hello, greeting: Greeting, via: PeerId | None = None) -> None:
        self._met[peer].via = via
        met = hello.of == self.identity.incarnation
        (self.guests.add if JOINING in hello.capabilities else self.guests.discard)(peer)
        self._cut = cut_of(hello)
        self.connections[peer].attach(greeting, hello.cursors if met else {})
        self._turned.setdefault(peer, asyncio.Event()).set()
        self._listener.up(peer, hello.incarnation, via)

    def _lost(self, peer: PeerId, reason: str) -> None:
        self._turned.setdefault(peer, asyncio.Event()).set()
        self._listener.down(peer, reason)

    async def _keep(self, peer: PeerId) -> None:
        """Dial ``peer`` whenever there is no link to it. The lower name dials first; the other gives it a moment."""
        s, turned = self._settings, self._turned[peer]
        pause = s.backoff_min_s
        patience = 0.0 if self.identity.peer < peer or peer == self.door.sponsor else 10 * s.backoff_min_s
        complained, spell_s = "", s.detour_min_s
        while True:
            if self.connected(peer):
                turned.clear()
                pause, complained = s.backoff_min_s, ""
                with suppress(TimeoutError):
                    async with asyncio.timeout(spell_s if self._met[peer].via else None):
                        await turned.wait()
                    spell_s = s.detour_min_s
                    continue
                spell_s = min(spell_s * 2, s.detour_max_s)
                with suppress(*UNREACHED):
                    await self._dial(peer)
                continue
            if self._spawn is not None and ((going := self._going_round.get(peer)) is None or going.done()):
                self._going_round[peer] = self._spawn(self._go_round(peer))
            try:
                async with asyncio.timeout(patience):
                    turned.clear()
                    await turned.wait()
                continue
            except TimeoutError:
                pass
            try:
                await self._dial(peer)
                patience = 0.0
            except UNREACHED as error:
                if isinstance(error, Refused) and str(error) != complained:
                    complained = str(error)
                    self._listener.refused(peer, complained)
                patience = pause * float(self._rng.uniform(0.5, 1.5))
                pause = min(pause * 2, s.backoff_max_s)

    async def _go_round(self, peer: PeerId) -> None:
        """Ask others to pass us on to ``peer``, one of each group in turn, for as long as there is no link to it."""
        pause = self._settings.detour_min_s
        await asyncio.sleep(pause * (1 if self.identity.peer < peer else 2))
        while not self.connected(peer):
            for group in self.ways(peer):
                via = next((p for p in group if self.connected(p) and self._met[p].via is None), None)
                if via is not None and not self.connected(peer):
                    with suppress(*UNREACHED):
                        await self._dial(peer, via)
            await asyncio.sleep(pause)
            pause = min(pause * 2, self._settings.backoff_max_s)
