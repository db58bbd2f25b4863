"""Who has said what in the rounds that are open somewhere: the collective under ``rounds``.

Law: messages and who lives, no arithmetic. Within one micro-cloud everybody's *part* goes to everybody. Where there
are several it has two levels: parts go to the mates, and only their *sum* goes beyond. Under bridges the *spokesman* of
each micro-cloud (the first by name that lives) makes it, so that a round costs a bridge the same however many mates
there are. In a mesh everybody makes an equal *shard* of it and says that to one peer of each other micro-cloud, who
passes it on there: so all links between two micro-clouds together carry one model a round, each an equal part of it.

A round counts the same messages on every peer, whoever dies: what a survivor holds of a dead peer it says again, then
that it has done so (``gone``), and a round closes only when that is known of all survivors. A dead peer's shard that
nobody holds is made by the spokesman; if a part is lost that the shards of the dead count, all are made without it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, pairwise
from typing import Any, NamedTuple
from zlib import crc32

from dlion.exchange.base import Context, Send
from dlion.messages import Message, PeerId

Key = tuple[str, int, str, str, int]
"""Kind, round (of ``gone``: the life that ended), whose (of a sum: whose micro-cloud), about whom (of a sum: of which
parts), and of a sum its first entry."""


class Sum(NamedTuple):
    """What a peer knows of the sum of its micro-cloud's parts."""

    parts: list[Message]
    """In order of their origins."""
    which: int
    """Tells these parts from any other choice."""
    makers: list[PeerId]
    """Who says which of the equal shards."""
    shards: list[slice]
    """Those that are ours to say, and not said yet."""


class Outbox:
    """Messages in order per neighbour, each said when its link can take it. The rounds bound their number."""

    def __init__(self) -> None:
        self._waiting: dict[PeerId, deque[Message]] = {}

    def say(self, to: Iterable[PeerId], message: Message, ctx: Context) -> Iterator[Send]:
        now = []
        for peer in to:
            if (link := ctx.links.get(peer)) is None:
                continue
            if link.writable_bytes > 0 and not self._waiting.get(peer):
                now.append(peer)
            else:
                self._waiting.setdefault(peer, deque()).append(message)
        if now:
            yield Send(tuple(now), message)

    def flush(self, ctx: Context, peers: Iterable[PeerId] | None = None) -> Iterator[Send]:
        """Say what waits for ``peers`` (None: all), as far as their links take it."""
        for peer in list(self._waiting if peers is None else peers):
            queue = self._waiting.get(peer)
            while queue and (link := ctx.links.get(peer)) is not None and link.writable_bytes > 0:
                yield Send((peer,), queue.popleft())

    def forget(self, ctx: Context) -> None:
        self._waiting = {peer: queue for peer, queue in self._waiting.items() if peer in ctx.links}

    def __bool__(self) -> bool:
        return any(self._waiting.values())

    def state(self) -> dict[str, Any]:
        return {"waiting": {peer: list(queue) for peer, queue in self._waiting.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._waiting = {PeerId(peer): deque(queue) for peer, queue in state["waiting"].items()}


class Parts:
    """Parts and sums, passed on along the routes until everybody living has what the round needs.

    A neighbour that is new because a bridge moved hears everything again; what is known already is not passed on.
    """

    def __init__(self) -> None:
        self._known: dict[Key, Message] = {}
        self._summed: dict[tuple[int, str], Counter[int]] = {}
        """How many entries the sums of a round and micro-cloud cover that are known, by which parts they sum."""
        self._living: dict[PeerId, int] = {}
        """In which life: the next one for who came back after its ``gone`` was said, if only to us it was away."""
        self._beside: set[PeerId] = set()
        self._dead: dict[PeerId, int] = {}
        self.unseen: set[PeerId] = set()
        """Whose lives have ended, as others say, that we never saw; for the caller to look at and to empty."""
        self._lacking = PeerId("")
        """Whose word was missing when a round was last looked at: of very many, most likely still."""
        self._idle: tuple[int, int] | None = None
        """In which round, and from which entry on, there was nothing for us to sum; None: look again."""
        self.outbox = Outbox()

    def setup(self, ctx: Context) -> None:
        self._living = {peer: member.life for peer, member in ctx.members.items()}
        self._beside = set(ctx.routes.onward(None, ctx.cloud)) & set(ctx.links)

    def say(self, message: Message, ctx: Context) -> Iterator[Send]:
        """Tell everybody who must hear it something of our own."""
        self._keep(message)
        reach = _reach(message, ctx.routes.onward(None, ctx.cloud), ctx)
        if message.kind == "sum" and ctx.routes.mesh:
            reach = _one_beyond(reach, ctx)
        yield from self.outbox.say(reach, message, ctx)

    def _keep(self, message: Message) -> None:
        self._known[_key(message)] = message
        if message.kind != "sum":
            self._idle = None
        else:
            covered = self._summed.setdefault((message.epoch, whose(message)), Counter())
            covered[_of_which(message)] += message.blocks[0].size

    def hear(self, message: Message, number: int, ctx: Context) -> Iterator[Send]:
        """Keep what is new and pass it on; ``number`` is the round now open here."""
        key = _key(message)
        if key in self._known or (message.kind != "gone" and message.epoch < number - 1):
            return
        self._keep(message)
        dead, life = PeerId(key[3]), key[1]
        if message.kind == "gone" and dead not in self._living and self._dead.get(dead, -1) < life:
            self.unseen.add(dead)  # it ended before we came, or before we met it: we hold nothing of it
            yield from self._say_gone(dead, life, ctx)
        yield from self.outbox.say(_reach(message, _onward(message, ctx), ctx), message, ctx)

    def begun(self, number: int) -> bool:
        """Has anybody said anything of this round?"""
        return any(key[0] in ("part", "sum") and key[1] == number for key in self._known)

    def complete(self, number: int, size: int, ctx: Context) -> bool:
        """Is here what every living member said, or its micro-cloud's sum of ``size`` entries, and all that survivors
        had of the dead?"""
        flat, lacking = _flat(ctx), ctx.members.get(self._lacking)
        for member in chain(() if lacking is None else (lacking,), ctx.members.values()):
            if flat:
                here = ("part", number, member.peer, "", 0) in self._known
            else:
                here = self._whole(number, member.cloud, size) is not None
            if not here:
                self._lacking = member.peer
                return False
        return self._settled(ctx) and (flat or self._anchored(number, ctx))

    def _anchored(self, number: int, ctx: Context) -> bool:
        """Is every anchor here after which a sum of this round was made? In a mesh sums go other ways than anchors."""
        known = [m for m in self._known.values() if m.epoch == number]
        anchors = {m.origin for m in known if m.kind == "anchor"}
        after = {PeerId(str(m.fields["anchor"])) for m in known if m.kind == "sum"}
        return not anchors or anchors >= after & ctx.members.keys()

    def _whole(self, number: int, cloud: str, size: int) -> int | None:
        """Of which parts of that micro-cloud the whole sum is known: of one choice, whoever dies, for who has all parts
        makes no sum of fewer; who was silent begins a new era when it is back."""
        covered = self._summed.get((number, cloud), Counter())
        return next((of for of, entries in covered.items() if entries >= size), None)

    def to_sum(self, number: int, fragment: slice, ctx: Context) -> Sum | None:
        """The parts of our micro-cloud as soon as they are complete, and what of their sum we have to say now."""
        if self._idle == (number, fragment.start):
            return None
        work = self._work(number, fragment, ctx)
        if work is None or not work.shards:
            self._idle = number, fragment.start
        return work

    def _work(self, number: int, fragment: slice, ctx: Context) -> Sum | None:
        size = fragment.stop - fragment.start
        if _flat(ctx) or not sums_up(ctx) or self._whole(number, ctx.cloud, size) is not None:
            return None
        if not all(("part", number, peer, "", 0) in self._known for peer in _mates(ctx)) or not self._settled(ctx):
            return None
        parts = [part for part in self._of("part", number) if part.fields["cloud"] == ctx.cloud]
        which, makers = crc32(" ".join(part.origin for part in parts).encode()), [_spokesman(ctx)]
        if ctx.routes.mesh:
            makers = [part.origin if part.origin in ctx.members else makers[0] for part in parts]
        ends = [fragment.start + i * size // len(makers) for i in range(len(makers) + 1)]
        ours = [slice(*shard) for maker, shard in zip(makers, pairwise(ends), strict=True) if maker == ctx.me]
        key = "sum", number, ctx.cloud, str(which)
        missing = [s for s in ours if (s.start < s.stop or not size) and (*key, s.start) not in self._known]
        return Sum(parts, which, makers, missing)

    def close(self, number: int, size: int, ctx: Context) -> list[Message]:
        """What the round's mean is made of, in an order that is everywhere the same; older rounds are forgotten. Shards
        of a micro-cloud that died before it had said them all do not count."""
        counted = self._of("part" if _flat(ctx) else "sum", number)
        self.forget_before(number)
        return [m for m in counted if m.kind == "part" or _of_which(m) == self._whole(number, whose(m), size)]

    def forget_before(self, number: int) -> None:
        self._only({key: m for key, m in self._known.items() if key[0] == "gone" or key[1] >= number})

    def _only(self, known: Mapping[Key, Message]) -> None:
        self._known, self._summed = {}, {}
        for message in known.values():
            self._keep(message)

    def on_members(self, ctx: Context) -> Iterator[Send]:
        """Reconcile with the other survivors what the dead have said, and bring new neighbours up to date."""
        self._idle = None
        self.outbox.forget(ctx)
        died = sorted(self._living.keys() - ctx.members.keys())
        back = {p: max(life + 1, ctx.members[p].life) for p, life in self._dead.items() if p in ctx.members}
        self._dead = {p: life for p, life in self._dead.items() if p not in back}
        self._only({k: m for k, m in self._known.items() if k[0] != "gone" or k[1] >= back.get(PeerId(k[3]), 0)})
        lives = self._living
        self._living = {p: max(m.life, lives.get(p, 0), back.get(p, 0)) for p, m in ctx.members.items()}
        before, self._beside = self._beside, set(ctx.routes.onward(None, ctx.cloud)) & set(ctx.links)
        for message in list(self._known.values()):
            ours = message.kind == "sum" and message.origin == ctx.me and ctx.routes.mesh
            lost = message.origin in died or (ours and died)  # who was to pass it on may have been one of them
            again = self._beside if lost else self._beside - before
            yield from self.outbox.say(_reach(message, sorted(again - {message.origin}), ctx), message, ctx)
        for dead in died:  # others may know of its death before us, and of a life that we never saw
            told = (k[1] for k in self._known if k[0] == "gone" and k[3] == dead)
            yield from self._say_gone(dead, max((lives[dead], *told)), ctx)

    def renew(self, peer: PeerId) -> None:
        """``peer`` begins a new life, and has heard nothing in it."""
        self._beside.discard(peer)

    def _say_gone(self, dead: PeerId, life: int, ctx: Context) -> Iterator[Send]:
        """All that we hold of ``dead`` has been said again."""
        self._dead[dead] = life
        fields = {"cloud": ctx.cloud, "peer": dead}
        yield from self.say(Message("gone", epoch=life, fields=fields, origin=ctx.me), ctx)

    def _of(self, kind: str, number: int) -> list[Message]:
        return [self._known[key] for key in sorted(self._known) if key[:2] == (kind, number)]

    def _settled(self, ctx: Context) -> bool:
        if not self._dead:
            return True
        said: dict[tuple[str, str], int] = {}
        for kind, life, peer, dead, _ in self._known:
            if kind == "gone":
                said[peer, dead] = max(life, said.get((peer, dead), -1))
        return all(said.get((peer, dead), -1) >= life for dead, life in self._dead.items() for peer in ctx.members)

    def state(self) -> dict[str, Any]:
        peers = {"living": dict(self._living), "beside": set(self._beside), "dead": dict(self._dead)}
        return {"known": list(self._known.values()), "outbox": self.outbox.state(), **peers}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._only({_key(message): message for message in state["known"]})
        self._living, self._beside, self._dead = dict(state["living"]), set(state["beside"]), dict(state["dead"])
        self.outbox.restore(state["outbox"])


def whose(message: Message) -> str:
    """Whose word it is: a peer's, or of a sum a micro-cloud's."""
    return str(message.fields["cloud"]) if message.kind == "sum" else message.origin


def sums_up(ctx: Context) -> bool:
    """Do we make sums of our micro-cloud, or shards of them?"""
    return ctx.routes.mesh or ctx.me == _spokesman(ctx)


def _spokesman(ctx: Context) -> PeerId:
    """Who says the sums of our micro-cloud."""
    return min(_mates(ctx))


def _mates(ctx: Context) -> list[PeerId]:
    """The living of our micro-cloud, ourselves included."""
    return [peer for peer, member in ctx.members.items() if member.cloud == ctx.cloud]


def _key(message: Message) -> Key:
    if message.kind == "sum":
        return message.kind, message.epoch, whose(message), str(_of_which(message)), message.blocks[0].start
    return message.kind, message.epoch, whose(message), str(message.fields.get("peer", "")), 0


def _of_which(message: Message) -> int:
    return int(message.fields["parts"])


def _reach(message: Message, peers: Iterable[PeerId], ctx: Context) -> tuple[PeerId, ...]:
    """Those of ``peers`` whom it concerns: a part, where there are sums, mates only."""
    mates_only = message.kind == "part" and not _flat(ctx)
    return tuple(p for p in peers if not mates_only or (p in ctx.links and ctx.links[p].cloud == ctx.cloud))


def _onward(message: Message, ctx: Context) -> tuple[PeerId, ...]:
    """Who may have to hear from us what we have heard: of the dead everybody, of a mesh's sum from beyond our mates."""
    if message.origin not in ctx.members:
        return tuple(p for p in ctx.routes.onward(None, ctx.cloud) if p != message.hop)
    mates = _mates(ctx)
    if message.kind == "sum" and ctx.routes.mesh and message.fields["cloud"] != ctx.cloud and message.hop not in mates:
        return tuple(p for p in mates if p != ctx.me)
    return ctx.routes.onward(message.hop, str(message.fields["cloud"]))


def _one_beyond(peers: Iterable[PeerId], ctx: Context) -> tuple[PeerId, ...]:
    """Our mates among ``peers``, and one of each other micro-cloud: for each of us another, where there are enough."""
    rank = _mates(ctx).index(ctx.me)
    by_cloud: dict[str, list[PeerId]] = {}
    for peer in peers:
        if peer in ctx.links:
            by_cloud.setdefault(ctx.links[peer].cloud, []).append(peer)
    mates = by_cloud.pop(ctx.cloud, [])
    return (*mates, *(there[rank % len(there)] for there in by_cloud.values()))


def _flat(ctx: Context) -> bool:
    """Does everybody hear everybody's part?"""
    return ctx.routes.mesh and ctx.routes.clouds == 1
