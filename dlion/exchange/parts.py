"""Who has said what in the rounds that are open somewhere: the collective under ``rounds``.

Law: messages and who lives, no arithmetic. In a mesh everybody's *part* goes to everybody. Where micro-clouds are
joined by bridges it has two levels: parts go to the mates, the *spokesman* of each micro-cloud (the first by name that
lives) makes their *sum*, and only sums cross the bridges, so that a round costs a bridge the same however many mates
there are. A round counts the same messages on every peer, whoever dies: what a survivor holds of a dead peer it says
again, then that it has done so (``gone``), and a round closes only when that is known of all survivors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from dlion.exchange.base import Context, Send
from dlion.messages import Message, PeerId

Key = tuple[str, int, str, str]
"""Kind, round (of ``gone``: the life that ended), whose (of a sum: whose micro-cloud), about whom."""


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
        self._living: dict[PeerId, int] = {}
        """In which life: the next one for who came back after its ``gone`` was said, if only to us it was away."""
        self._beside: set[PeerId] = set()
        self._dead: dict[PeerId, int] = {}
        self.unseen: set[PeerId] = set()
        """Whose lives have ended, as others say, that we never saw; for the caller to look at and to empty."""
        self._lacking = PeerId("")
        """Whose word was missing when a round was last looked at: of very many, most likely still."""
        self.outbox = Outbox()

    def setup(self, ctx: Context) -> None:
        self._living = {peer: member.life for peer, member in ctx.members.items()}
        self._beside = set(ctx.routes.onward(None, ctx.cloud)) & set(ctx.links)

    def say(self, message: Message, ctx: Context) -> Iterator[Send]:
        """Tell everybody who must hear it something of our own."""
        self._known[_key(message)] = message
        yield from self.outbox.say(_reach(message, ctx.routes.onward(None, ctx.cloud), ctx), message, ctx)

    def hear(self, message: Message, number: int, ctx: Context) -> Iterator[Send]:
        """Keep what is new and pass it on; ``number`` is the round now open here."""
        key = _key(message)
        if key in self._known or (message.kind != "gone" and message.epoch < number - 1):
            return
        self._known[key] = message
        dead, life = PeerId(key[3]), key[1]
        if message.kind == "gone" and dead not in self._living and self._dead.get(dead, -1) < life:
            self.unseen.add(dead)  # it ended before we came, or before we met it: we hold nothing of it
            yield from self._say_gone(dead, life, ctx)
        onward = ctx.routes.onward(message.hop, str(message.fields["cloud"]))
        if message.origin not in ctx.members:
            onward = tuple(p for p in ctx.routes.onward(None, ctx.cloud) if p != message.hop)
        yield from self.outbox.say(_reach(message, onward, ctx), message, ctx)

    def begun(self, number: int) -> bool:
        """Has anybody said anything of this round?"""
        return any(key[0] in ("part", "sum") and key[1] == number for key in self._known)

    def complete(self, number: int, ctx: Context) -> bool:
        """Is here what every living member said, or its micro-cloud's sum, and all that survivors had of the dead?"""
        known, mesh, lacking = self._known, ctx.routes.mesh, ctx.members.get(self._lacking)
        for member in chain(() if lacking is None else (lacking,), ctx.members.values()):
            if (("part", number, member.peer, "") if mesh else ("sum", number, member.cloud, "")) not in known:
                self._lacking = member.peer
                return False
        return self._settled(ctx)

    def to_sum(self, number: int, ctx: Context) -> list[Message]:
        """The parts of our micro-cloud, in order of their origins, when it is for us to make their sum; else []."""
        if ctx.routes.mesh or ("sum", number, ctx.cloud, "") in self._known or ctx.me != spokesman(ctx):
            return []
        here = all(("part", number, peer, "") in self._known for peer in _mates(ctx))
        return self._of("part", number) if here and self._settled(ctx) else []

    def close(self, number: int, ctx: Context) -> list[Message]:
        """What the round's mean is made of, in an order that is everywhere the same; older rounds are forgotten."""
        counted = self._of("part" if ctx.routes.mesh else "sum", number)
        self.forget_before(number)
        return counted

    def forget_before(self, number: int) -> None:
        self._known = {key: m for key, m in self._known.items() if key[0] == "gone" or key[1] >= number}

    def on_members(self, ctx: Context) -> Iterator[Send]:
        """Reconcile with the other survivors what the dead have said, and bring new neighbours up to date."""
        self.outbox.forget(ctx)
        died = sorted(self._living.keys() - ctx.members.keys())
        back = {p: max(life + 1, ctx.members[p].life) for p, life in self._dead.items() if p in ctx.members}
        self._dead = {p: life for p, life in self._dead.items() if p not in back}
        self._known = {k: m for k, m in self._known.items() if k[1] >= back.get(PeerId(k[3]), 0)}
        lives = self._living
        self._living = {p: max(m.life, lives.get(p, 0), back.get(p, 0)) for p, m in ctx.members.items()}
        before, self._beside = self._beside, set(ctx.routes.onward(None, ctx.cloud)) & set(ctx.links)
        for message in list(self._known.values()):
            again = self._beside - before if message.origin not in died else self._beside
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
        for kind, life, peer, dead in self._known:
            if kind == "gone":
                said[peer, dead] = max(life, said.get((peer, dead), -1))
        return all(said.get((peer, dead), -1) >= life for dead, life in self._dead.items() for peer in ctx.members)

    def state(self) -> dict[str, Any]:
        peers = {"living": dict(self._living), "beside": set(self._beside), "dead": dict(self._dead)}
        return {"known": list(self._known.values()), "outbox": self.outbox.state(), **peers}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._known = {_key(message): message for message in state["known"]}
        self._living, self._beside, self._dead = dict(state["living"]), set(state["beside"]), dict(state["dead"])
        self.outbox.restore(state["outbox"])


def spokesman(ctx: Context) -> PeerId:
    """Who says the sums of our micro-cloud."""
    return min(_mates(ctx))


def _mates(ctx: Context) -> list[PeerId]:
    """The living of our micro-cloud, ourselves included."""
    return [peer for peer, member in ctx.members.items() if member.cloud == ctx.cloud]


def _key(message: Message) -> Key:
    whose = str(message.fields["cloud"]) if message.kind == "sum" else message.origin
    return message.kind, message.epoch, whose, str(message.fields.get("peer", ""))


def _reach(message: Message, peers: Iterable[PeerId], ctx: Context) -> tuple[PeerId, ...]:
    """Those of ``peers`` whom it concerns: a part under bridges, mates only."""
    mates_only = message.kind == "part" and not ctx.routes.mesh
    return tuple(p for p in peers if not mates_only or (p in ctx.links and ctx.links[p].cloud == ctx.cloud))
