"""The peers this node talks to: dialling, greeting, refusing, resuming.

Law: knows links, sessions and hellos; nothing of weights or strategies. One Session per neighbour and incarnation
outlives its links; a lost link is dialled again with back-off for as long as the neighbour is wanted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dlion.messages import PROTOCOL_MAX, PROTOCOL_MIN, Hello, PeerId
from dlion.net.chunks import Bye, ProtocolError
from dlion.net.connection import Connection
from dlion.net.greeting import Greeting
from dlion.net.link import Dialer, Link, LinkError
from dlion.net.session import Session, SessionLimits
from dlion.wire.codec import Malformed, decode_hello, encode_hello


@dataclass(frozen=True)
class Identity:
    """Who this peer is in this life. ``incarnation`` grows with every start of the same peer."""

    run: str
    peer: PeerId
    incarnation: int
    job: str
    """Hash of the job: peers with another one are refused."""
    model: str
    """Layout digest."""
    role: str = "trainer"
    cut: str = ""
    """The checkpoint that this peer goes on from; peers that go on from another one are refused."""

    @property
    def capabilities(self) -> list[str]:
        return [CUT + self.cut] if self.cut else []


@dataclass(frozen=True)
class DialSettings:
    hello_timeout_s: float = 10.0
    backoff_min_s: float = 0.1
    backoff_max_s: float = 5.0
    quarantine_s: float = 30.0
    heartbeat_s: float = 3.0


CUT = "cut:"
CONNECTED = "already connected"
"""The refusal of the second of two simultaneous dials: no fault of anybody."""
NAME_SHOWN = 64
"""Characters of a stranger's words that are repeated."""


class Listener(Protocol):
    """What the node wants to know. Called on the loop."""

    def heard(self, peer: PeerId, stream: int, seq: int, body: bytes | memoryview) -> None: ...
    def writable(self, peer: PeerId) -> None: ...
    def up(self, peer: PeerId, incarnation: int) -> None: ...
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
        self.open_to_new = True
        """False once training runs: a peer that was not there at the start would bring other weights."""
        self.heard_of: Callable[[PeerId, int], bool] = lambda peer, incarnation: False
        """Do we know this incarnation from others? Then it is no newcomer, but a bridge that moved."""
        self._listener = listener
        self._dialer = dialer
        self._limits = limits
        self._settings = settings
        self._rng = rng
        self._wanted: dict[PeerId, asyncio.Task[None]] = {}
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
        if (task := self._wanted.pop(peer, None)) is not None:
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
        for task in self._wanted.values():
            task.cancel()
        self._wanted.clear()
        for connection in self.connections.values():
            connection.close()

    def accept(self, link: Link) -> None:
        """Door for incoming links."""
        if self._spawn is None:
            link.abort()
            return
        self._spawn(self._welcome(link))

    # -- greeting -----------------------------------------------------------------------------------------------

    def _hello(self, peer: PeerId, refusal: str = "") -> bytes:
        me, neighbour = self.identity, self._met.get(peer)
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
                capabilities=me.capabilities,
                refusal=refusal,
            )
        )

    def _objection(self, hello: Hello) -> str:
        """Why we will not talk to the sender of ``hello`` (empty: we will)."""
        me, peer = self.identity, PeerId(hello.peer)
        if hello.protocol_max < PROTOCOL_MIN or hello.protocol_min > PROTOCOL_MAX:
            theirs, ours = f"{hello.protocol_min}-{hello.protocol_max}", f"{PROTOCOL_MIN}-{PROTOCOL_MAX}"
            return f"protocol mismatch: {peer[:NAME_SHOWN]} speaks {theirs}, {me.peer} speaks {ours}"
        for what in ("run", "job", "model"):
            theirs, ours = getattr(hello, what), getattr(me, what)
            if theirs != ours:
                return f"{what} mismatch: {peer[:NAME_SHOWN]} has {theirs[:NAME_SHOWN]!r}, {me.peer} has {ours!r}"
        theirs = next((c.removeprefix(CUT)[:NAME_SHOWN] for c in hello.capabilities if c.startswith(CUT)), "")
        if theirs != me.cut:
            start = "starts afresh"
            return (
                f"checkpoint mismatch: {peer[:NAME_SHOWN]} {f'goes on from cut {theirs!r}' if theirs else start}, "
                f"{me.peer} {f'goes on from cut {me.cut!r}' if me.cut else start}: start all of them with the same "
                "--cut, or with --fresh"
            )
        if peer not in self.known or peer == me.peer:
            return f"unknown peer {peer[:NAME_SHOWN]!r}: {me.peer}'s topology does not name it as another"
        if self._quarantined.get(peer, 0.0) > asyncio.get_running_loop().time():
            return f"{peer} is quarantined by {me.peer} for repeated inadmissible messages"
        return self._objection_to_life(peer, hello.incarnation)

    def _objection_to_life(self, peer: PeerId, incarnation: int) -> str:
        """Peers that were not there at the start, or have been replaced since, are refused."""
        neighbour = self._met.get(peer)
        newcomer = neighbour is None or incarnation > neighbour.incarnation
        if newcomer and not self.open_to_new and not self.heard_of(peer, incarnation):
            return f"{self.identity.peer} is training already: late join and rejoin are not possible in this version"
        if neighbour is not None and incarnation < neighbour.incarnation:
            return f"{peer} was replaced: incarnation {incarnation} is older than {neighbour.incarnation}"
        return ""

    async def _welcome(self, link: Link) -> None:
        """Greet who has dialled us. What it does wrong ends its link, nothing else."""
        peer = PeerId("?")
        try:
            greeting = Greeting(link)
            hello = decode_hello(await greeting.hear(self._settings.hello_timeout_s))
            peer = PeerId(hello.peer)
            objection = self._objection(hello)
            if objection or self._keeps_existing(peer, hello.incarnation):
                if objection:
                    self._listener.refused(peer, objection)
                greeting.say(self._hello(peer, objection or CONNECTED))
                link.close()
                return
            self._resume(peer, hello, dialled_by=peer)
            greeting.say(self._hello(peer))
            self._adopt(peer, hello, greeting)
        except (LinkError, Malformed, ProtocolError) as error:
            self._listener.refused(peer, f"incoming link: {error}")
            link.abort()
        except BaseException:
            link.abort()
            raise

    def _keeps_existing(self, peer: PeerId, incarnation: int) -> bool:
        """Two simultaneous dials: the one started by the lower PeerId survives."""
        existing = self._met.get(peer)
        return (
            existing is not None
            and existing.connection.connected
            and existing.incarnation == incarnation
            and existing.dialled_by == self.identity.peer < peer
        )

    async def _dial(self, peer: PeerId) -> None:
        async with asyncio.timeout(self._settings.hello_timeout_s):
            link = await self._dialer.dial(peer)
        try:
            greeting = Greeting(link)
            greeting.say(self._hello(peer))
            hello = decode_hello(await greeting.hear(self._settings.hello_timeout_s))
            if hello.refusal == CONNECTED:
                raise LinkError(hello.refusal)
            objection = hello.refusal or self._objection(hello)
            if objection:
                raise Refused(objection)
            if hello.peer != peer:
                raise Refused(f"dialled {peer}, but {hello.peer[:NAME_SHOWN]!r} answered")
            self._resume(peer, hello, dialled_by=self.identity.peer)
            self._adopt(peer, hello, greeting)
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
            heartbeat_s=self._settings.heartbeat_s,
        )
        self.connections[peer] = connection
        self._met[peer] = Neighbour(hello.incarnation, connection, dialled_by)

    def _adopt(self, peer: PeerId, hello: Hello, greeting: Greeting) -> None:
        met = hello.of == self.identity.incarnation
        self.connections[peer].attach(greeting, hello.cursors if met else {})
        self._turned.setdefault(peer, asyncio.Event()).set()
        self._listener.up(peer, hello.incarnation)

    def _lost(self, peer: PeerId, reason: str) -> None:
        self._turned.setdefault(peer, asyncio.Event()).set()
        self._listener.down(peer, reason)

    async def _keep(self, peer: PeerId) -> None:
        """Dial ``peer`` whenever there is no link to it. The lower name dials first; the other gives it a moment."""
        s, turned = self._settings, self._turned[peer]
        pause = s.backoff_min_s
        patience = 0.0 if self.identity.peer < peer else 10 * s.backoff_min_s
        complained = ""
        while True:
            if self.connected(peer):
                turned.clear()
                pause, complained = s.backoff_min_s, ""
                await turned.wait()
                continue
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
            except (LinkError, Malformed, ProtocolError, TimeoutError) as error:
                if isinstance(error, Refused) and str(error) != complained:
                    complained = str(error)
                    self._listener.refused(peer, complained)
                patience = pause * float(self._rng.uniform(0.5, 1.5))
                pause = min(pause * 2, s.backoff_max_s)
