"""How a peer comes into a run under way, late or again after it died, while all others go on.

It takes the place of a copy of its *sponsor*, a neighbour of all that it will be a neighbour of. Between two items of
its lane the sponsor copies its replica, owes the newcomer from then on what it does itself, and says JOIN to their
common neighbours. Each of them, on hearing that, owes the newcomer what it owes the sponsor at that moment, tells it
itself from then on, and answers JOINED. What it had said to the sponsor before and the copy did not hold yet is what
the sponsor hears of it until that answer: it goes on to the newcomer as it came. So every update reaches the newcomer
once, by one way: in the copy, passed on, or told directly. (The copy and what is passed on are the sponsor's part of a
consistent cut, ``dlion.cut``.) The newcomer's own steps are owed to everybody from its first.

The estate of its former lives goes with JOIN: what the sponsor had heard of it is what everybody has heard. JOINs of
two sponsors may overtake each other (the first one's link was slow, or it died): that of the later life counts.

Two that come at the same time, behind two sponsors. Where one sponsor knew of the other newcomer when it copied, that
one is asked like any neighbour. Where neither did, neither copy holds anything of the other newcomer, and each sponsor
merely tells its own that there is another (``asks`` is false).

Law: in the exchange lane; pure, no clock. The copy is asked for piece by piece, so that a large one fills no queue.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from msgspec.structs import replace

from dlion.blocks import Block, Encoding, dense
from dlion.exchange.base import Action, Context, Exchange, Send
from dlion.exchange.owed import exact
from dlion.items import Entered
from dlion.messages import Message, PeerId, Scalar, Stream
from dlion.tensors import Flat

ASK, READY, PIECE, WELCOME = "~ask", "~ready", "~piece", "~welcome"
JOIN, JOINED, WHOLE = "~join", "~joined", "~whole"
NEWCOMER_KINDS: Mapping[str, Mapping[str, type]] = {
    ASK: {"at": int, "life": int},
    READY: {},
    PIECE: {"of": str, "at": int, "count": int, "hash": str, "step": int, "t": float, "cut": int},
    JOIN: {"peer": str, "life": int, "cloud": str, "asks": bool},
    JOINED: {"peer": str, "life": int},
    WELCOME: {},
    WHOLE: {},
}
"""ASK the sponsor to copy itself; then, when it is READY and has told who is there, for piece 1, 2 and so on, and ALL
at the end. WELCOME goes before all that is owed or passed on, WHOLE behind all that had to be passed on."""
VIA = "~via"
"""Field of a message that is passed on: who said it."""
ALL = 1 << 40
"""Asked for at the end: nothing more."""
PIECE_ENTRIES = 1 << 18
KEEP_S = 600.0
"""A copy of which nothing was asked for so long is given up."""


@dataclass
class Guest:
    """Somebody whose sponsor we are."""

    life: int
    awaited: set[PeerId]
    """Who has not said yet that it tells the guest itself."""
    copy: dict[str, Flat]
    asked_at: float
    whole: bool = False

    def pieces(self) -> list[tuple[str, int]]:
        return [(of, at) for of, flat in self.copy.items() for at in range(0, flat.size, PIECE_ENTRIES)]


@dataclass
class Entry:
    """Our own way in."""

    sponsor: PeerId
    life: int
    size: int
    arrays_max: int
    arrays: dict[str, Flat] = field(default_factory=dict)
    taken: int = 0
    done: bool = False
    welcome: bool = False
    """What the sponsor says on UPDATE from now on is meant for this life of ours."""
    whole: bool = False

    def take(self, message: Message) -> str:
        """A piece of the copy; returns what is wrong with it, or nothing."""
        of, count = str(message.fields["of"]), int(message.fields["count"])
        pieces = -(-self.size // PIECE_ENTRIES)
        if self.done or message.hop != self.sponsor or int(message.fields["at"]) != self.taken + 1:
            return "a piece of a copy that was not asked for"
        if not self.taken < count <= self.arrays_max * pieces or len(message.blocks) != 1:
            return f"a copy of {count} pieces, {len(message.blocks)} in one message"
        block = message.blocks[0]
        start = self.taken % pieces * PIECE_ENTRIES
        size = min(PIECE_ENTRIES, self.size - start)
        if (block.start, block.size, block.encoding, block.indices) != (start, size, Encoding.F32, None):
            return f"piece {self.taken} of the copy has {block.size} entries at {block.start}, not {size} at {start}"
        if message.fields["hash"] != digest(block):
            return f"piece {self.taken} of the copy does not match its hash"
        if of not in self.arrays and start:
            return f"piece {self.taken} of the copy is of another array"
        block.add_to(self.arrays.setdefault(of, np.zeros(self.size, dtype=np.float32)))
        self.taken += 1
        self.done = self.taken == count
        return ""


def digest(block: Block) -> str:
    """Of a piece's values."""
    return hashlib.blake2b(np.ascontiguousarray(block.codes).tobytes(), digest_size=8).hexdigest()


class Newcomers:
    """What one replica knows of those who come, and of its own coming. Hooks return actions, as a strategy's do.

    ``forget(peer)``: its steps are counted anew. ``become(weights, step, cut)``: be that from now on.
    """

    def __init__(
        self,
        exchange: Exchange,
        ctx: Context,
        forget: Callable[[PeerId], None],
        become: Callable[[Flat, int, int], None],
        newest_cut: Callable[[], int],
    ) -> None:
        self._exchange, self._ctx = exchange, ctx
        self._forget, self._become, self._newest_cut = forget, become, newest_cut
        self._guests: dict[PeerId, Guest] = {}
        self._lives: dict[PeerId, int] = {}
        """The last life that we heard of, of each who came."""
        self.entry: Entry | None = None
        self.entered: Entered | None = None
        self.staged = False
        """Additions are held back until a step is complete."""

    @property
    def refusal(self) -> str:
        """Why we can show nobody in (empty: we can)."""
        if not self._exchange.newcomers or self.staged:
            return f"{self._exchange.name}{' in lockstep' * self.staged} takes nobody into a run under way"
        return "it has only just come itself" if self.unsure else ""

    @property
    def settling(self) -> bool:
        """Somebody is coming: no state is consistent that lacks what is under way to it."""
        return any(g.awaited & self._ctx.links.keys() for g in self._guests.values()) or self.unsure

    @property
    def unsure(self) -> bool:
        """We depend on our sponsor: what others told it before they told us may still be on the way."""
        return self.entry is not None and not self.entry.whole

    def enter(self, sponsor: PeerId, life: int, arrays_max: int) -> None:
        """Come in behind ``sponsor`` in this life of ours; an earlier attempt is given up."""
        self.entry, self.entered = Entry(sponsor, life, self._ctx.layout.size, arrays_max), None

    def unwrap(self, message: Message) -> Message:
        """What our sponsor passes on is heard as if from who said it."""
        via = message.fields.get(VIA)
        if type(via) is not str or self.entry is None or message.hop != self.entry.sponsor:
            return message
        fields = {name: value for name, value in message.fields.items() if name != VIA}
        return replace(message, fields=fields, hop=PeerId(via))

    def deaf(self, message: Message) -> bool:
        """Was it said to a former life of ours?"""
        early = self.entry is not None and not self.entry.welcome
        return early and message.stream == Stream.UPDATE and message.kind != WELCOME

    def pass_on(self, message: Message) -> Iterator[Action]:
        """What was said to us before its sender spoke to our guests itself."""
        if not self._guests or message.kind not in self._exchange.handed_on:
            return
        fields = {**message.fields, VIA: message.hop}
        for peer, guest in self._guests.items():
            if message.hop in guest.awaited:
                yield Send((peer,), replace(message, fields=fields, stream=Stream.UPDATE))

    def hear(self, message: Message) -> Iterator[Action]:
        """A message of our kinds. Raises ValueError, which says what is wrong with it."""
        match message.kind:
            case "~ask":
                yield from self._asked(message)
            case "~join":
                yield from self._joins(message)
            case "~joined":
                guest = self._guests.get(PeerId(str(message.fields["peer"])))
                if guest is not None and guest.life == message.fields["life"]:
                    guest.awaited.discard(message.hop)
                yield from self.look()
            case "~piece":
                yield from self._take(message)
            case _ if self.entry is None or message.hop != self.entry.sponsor:
                raise ValueError(f"{message.kind}: we did not ask")
            case "~welcome":
                self.entry.welcome = True
            case "~whole":
                self.entry.whole = True

    def look(self) -> Iterator[Action]:
        """Tell the guests who need us no more; forget copies that nobody asks for."""
        for peer, guest in self._guests.items():
            if not guest.whole and not guest.awaited & self._ctx.links.keys():
                guest.whole = True
                yield Send((peer,), Message(WHOLE))
            if self._ctx.now - guest.asked_at > KEEP_S:
                guest.copy = {}

    # -- as a sponsor -------------------------------------------------------------------------------------------

    def _asked(self, message: Message) -> Iterator[Action]:
        at, life, ctx, peer = int(message.fields["at"]), int(message.fields["life"]), self._ctx, message.hop
        if why := self.refusal:
            raise ValueError(f"{ASK}: {why}")
        if at == 0:
            yield from self._sponsor(peer, life)
            return
        guest = self._guests.get(peer)
        if guest is None or guest.life != life or at < 0:
            raise ValueError(f"{ASK}: {peer} is not our guest")
        pieces = guest.pieces()
        if at == ALL:
            guest.copy = {}
        if at > len(pieces):
            return
        guest.asked_at = ctx.now
        of, start = pieces[at - 1]
        block = dense(guest.copy[of][start : start + PIECE_ENTRIES], start=start)
        facts: dict[str, Scalar] = {"step": ctx.step, "t": ctx.now, "cut": self._newest_cut()}
        fields: dict[str, Scalar] = {"of": of, "at": at, "count": len(pieces), "hash": digest(block), **facts}
        yield Send((peer,), Message(PIECE, fields=fields, blocks=(block,), stream=Stream.BULK))

    def _sponsor(self, peer: PeerId, life: int) -> Iterator[Action]:
        ctx, exchange = self._ctx, self._exchange
        self._renew(peer, life)
        estate = exchange.estate(peer)
        yield from exchange.introduce(peer, ctx.me, life, ctx)
        near = {*ctx.links, *ctx.silent}
        common = near - {peer, *ctx.routes.onward(peer, ctx.cloud)}
        self._guests[peer] = Guest(life, set(common), exchange.bequeath(peer, ctx), ctx.now)
        yield Send((peer,), Message(WELCOME))
        fields: dict[str, Scalar] = {"peer": peer, "life": life, "cloud": ctx.cloud, "asks": True}
        blocks = () if estate is None else (exact(estate),)
        yield Send(tuple(sorted(common)), Message(JOIN, fields=fields, blocks=blocks))
        yield from self.look()

    # -- as a neighbour -----------------------------------------------------------------------------------------

    def _joins(self, message: Message) -> Iterator[Action]:
        peer, life, sponsor = PeerId(str(message.fields["peer"])), int(message.fields["life"]), message.hop
        if peer == self._ctx.me or len(message.blocks) > 1:
            raise ValueError(f"{JOIN}: not of another peer, or more than one estate")
        if life < self._lives.get(peer, 0):
            yield Send((sponsor,), Message(JOINED, fields={"peer": peer, "life": life}))
            return
        self._renew(peer, life)
        self._guests.pop(peer, None)
        asks = bool(message.fields["asks"])
        yield from self._exchange.introduce(peer, sponsor if asks else None, life, self._ctx, message)
        if not asks:
            return
        for other, guest in self._guests.items():
            if sponsor in guest.awaited:  # it did not know of our guest when it copied itself, nor did we of its
                yield Send((other,), replace(message, fields={**message.fields, "asks": False}, stream=Stream.UPDATE))
        yield Send((sponsor,), Message(JOINED, fields={"peer": peer, "life": life}))

    def _renew(self, peer: PeerId, life: int) -> None:
        """Nothing more can be said to the former life of ``peer``, nor be heard of it."""
        ctx = self._ctx
        self._lives[peer] = life
        if (link := ctx.links.pop(peer, None)) is not None:
            ctx.silent[peer] = link
        for guest in self._guests.values():
            guest.awaited.discard(peer)
        self._forget(peer)

    # -- as a newcomer ------------------------------------------------------------------------------------------

    def _take(self, message: Message) -> Iterator[Action]:
        entry = self.entry
        if entry is None:
            raise ValueError(f"{PIECE}: we did not ask")
        fault = entry.take(message)
        if not fault and entry.done:
            try:
                self._exchange.inherit(entry.sponsor, entry.arrays, self._ctx)
            except ValueError as error:
                fault = f"the copy is of no use: {error}"
        if fault:
            self.entered = Entered(fault=f"{message.hop}: {fault}")
            return
        if not entry.done:
            fields = {"at": entry.taken + 1, "life": entry.life}
            yield Send((entry.sponsor,), Message(ASK, fields=fields, stream=Stream.CONTROL))
        else:
            weights = np.asarray(sum(entry.arrays.values()), dtype=np.float32)
            entry.arrays = {}
            step = int(message.fields["step"])
            self._become(weights, step, int(message.fields["cut"]))
            self.entered = Entered(step, float(message.fields["t"]))
