"""How a peer ends: flush what is owed, say so, wait until it was heard.

Law: synchronous bookkeeping of who said a last word; the node sends and waits. A last word (``~done``) travels like
its origin's updates, behind them, over the same routes, so whoever has it has all that came before it.

Who leaves the others to go on is a bridge, maybe, until nobody needs it. Whoever hears that it leaves plans without it
at once; what was said before goes on by the plan of before. So its last word goes out from neighbour to neighbour, and
goodbyes (``~bye``) come back the same way: each says it when those to whom it passed the word on have said it, it owes
nothing that goes by an older plan, and all that it had said by then has arrived. (Waves of this kind: Dijkstra &
Scholten, 1980; Segall, 1983.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dlion.membership import MET, Membership
from dlion.mesh.roster import LIVING, State
from dlion.messages import Message, PeerId, Scalar, Stream
from dlion.net.connection import Connection

DONE_FIELDS: Mapping[str, type] = {"peer": str, "leaving": bool, "plan?": str, "missed?": bool}
"""``peer``: the name, or several with spaces between them. ``plan``: by whose routes it goes on. ``missed``: they found
somebody silent during the run."""
BYE_FIELDS: Mapping[str, type] = {"peer": str}
"""``peer``: to whom this is a goodbye."""
NAMES_CHARS_MAX = 4000
"""In one message: what a field may hold."""


def names_of(message: Message) -> list[PeerId]:
    """Whose last word a ``~done`` is."""
    return [PeerId(name) for name in str(message.fields["peer"]).split(" ")]


def _texts(peers: list[PeerId]) -> list[str]:
    """Names as messages hold them."""
    count = NAMES_CHARS_MAX // (max(map(len, peers), default=0) + 1)
    return [" ".join(peers[start : start + count]) for start in range(0, len(peers), count)]


@dataclass
class Word:
    """A last word on its way through us."""

    peer: PeerId
    came_from: PeerId | None
    plan: str
    leaving: bool
    missed: bool = False
    to: set[PeerId] | None = None
    """Who was not told yet; None: the word did not go out yet."""
    awaited: set[PeerId] = field(default_factory=set)
    """Whose goodbye has not come back."""
    said: dict[PeerId, int] | None = None
    """How many messages each link had taken when nothing more was owed that goes by a plan of before."""
    over: bool = False
    """We said our goodbye, or need not."""


class Farewell:
    """Last words heard and to be passed on. ``tell(to, message)`` sends to those of whom there are ``connections``."""

    def __init__(
        self,
        membership: Membership,
        connections: Mapping[PeerId, Connection],
        tell: Callable[[tuple[PeerId, ...], Message], None],
    ) -> None:
        self._membership, self._connections, self._tell = membership, connections, tell
        self._words: dict[PeerId, Word] = {}
        self._open: list[Word] = []
        """Of these, those with which we have not done."""
        self._reached: set[PeerId] = set()
        """Neighbours that lived when words were last passed on; and the roster's version."""
        self._version = -1

    def say(self, leaving: bool) -> None:
        """Our own last word."""
        membership = self._membership
        states = membership.roster.states  # who stays waits for our word: if it is silent before that, it died
        died = any(not word.leaving and states[peer] is State.SILENT for peer, word in self._words.items())
        missed = died or membership.roster.missed_at > -math.inf
        self._add(Word(membership.me, None, membership.plan_name, leaving, missed, over=True))

    def _add(self, word: Word) -> None:
        self._words[word.peer] = word
        self._open.append(word)

    def hear(self, message: Message) -> list[tuple[PeerId, bool]]:
        """Last words: (who, does it leave) of those that are news."""
        leaving, plan = bool(message.fields["leaving"]), str(message.fields.get("plan", ""))
        missed = bool(message.fields.get("missed", False))
        said = {*self._words, self._membership.me}  # our own is for us to say
        news = [peer for peer in names_of(message) if peer not in said]
        for peer in news:
            self._add(Word(peer, message.hop, plan, leaving, missed, over=not leaving))
        for peer in names_of(message) if leaving else ():
            if peer not in news:  # it came over two ways: this one is none to wait for
                self._tell((message.hop,), Message("~bye", fields={"peer": peer}))
        return [(peer, leaving) for peer in news]

    def bye(self, message: Message) -> None:
        """Behind a neighbour of ours nobody needs that leaver any more."""
        if (word := self._words.get(PeerId(str(message.fields["peer"])))) is not None:
            word.awaited.discard(message.hop)

    def _awaits(self, peer: PeerId) -> bool:
        """May ``peer`` still say something to us?"""
        state, connection = self._membership.roster.states[peer], self._connections.get(peer)
        return state in LIVING or (state is State.LEFT and connection is not None and connection.connected)

    @property
    def parting(self) -> bool:
        """Somebody leaves, and others may still need it."""
        states = self._membership.roster.states
        return any(c.connected and states[p] is State.LEFT for p, c in self._connections.items())

    @property
    def listeners(self) -> list[Connection]:
        """To those who must have heard us before we end."""
        states, near = self._membership.roster.states, self._membership.neighbours
        return [
            connection
            for peer, connection in self._connections.items()
            if states[peer] in MET and (connection.connected or (peer in near and peer not in self._words))
        ]

    def pass_on(self, owes: bool) -> None:
        """Carry last words on: those of who leaves at once, others only while nothing is owed (``owes``) that they must
        stay behind. Those with whom there is no session yet are told when there is."""
        if not owes:
            self._say_again()
        if not self._open:
            return
        together: dict[tuple[tuple[PeerId, ...], bool, str, bool], list[PeerId]] = {}
        for word in self._open:
            if word.to is None and (word.leaving or not owes):
                word.to = set(self._membership.onward(word.came_from, word.peer, word.plan))
                word.awaited = set(word.to) if word.leaving else set()
            if word.to:
                now = tuple(sorted(word.to & self._connections.keys()))
                hopeless = {p for p in word.to if p not in now and not self._awaits(p)}
                word.to -= hopeless.union(now)
                word.awaited -= hopeless
                if now:
                    together.setdefault((now, word.leaving, word.plan, word.missed), []).append(word.peer)
        for (to, leaving, plan, missed), peers in together.items():
            more: dict[str, Scalar] = {**({"plan": plan} if plan else {}), **({"missed": True} if missed else {})}
            for names in _texts(peers):
                self._tell(to, Message("~done", fields={"peer": names, "leaving": leaving, **more}))

    def _say_again(self) -> None:
        """A bridge moved, or its other end is heard again: what the old end was told, or nobody, it is told now; and to
        all, what a peer had told us that is silent now."""
        membership, states = self._membership, self._membership.roster.states
        reached = {p for p in membership.neighbours if states[p] in LIVING and p in self._connections}
        fresh, self._reached = reached - self._reached, reached
        if not fresh and self._version == membership.roster.version:
            return
        self._version = membership.roster.version
        for word in self._words.values():
            if word.to is None or word.leaving:
                continue
            lost = word.came_from is not None and states[word.came_from] is State.SILENT
            word.came_from = None if lost else word.came_from
            onward = {*membership.onward(word.came_from, word.peer, word.plan)} - {word.peer}
            if again := onward if lost else onward & fresh:
                word.to |= again
                self._open = [*(w for w in self._open if w is not word), word]

    def answer(self, lags: bool) -> None:
        """Say goodbye to leavers that nobody behind us needs any more. ``lags``: we still owe what goes by an older
        plan."""
        if not self._open:
            return
        for word in self._open:
            if word.over or lags or not self._answered(word):
                continue
            if word.said is None:
                links = self._connections.items()
                word.said = {p: link.session.sent(Stream.UPDATE) for p, link in links if link.connected}
            if not [p for p, count in word.said.items() if not self._has(p, count)]:
                word.over = True
                assert word.came_from is not None
                self._tell((word.came_from,), Message("~bye", fields={"peer": word.peer}))
        self._open = [word for word in self._open if not word.over or word.to is None or word.to]

    def _has(self, peer: PeerId, count: int) -> bool:
        """Does ``peer`` have the first ``count`` messages we sent it? If not, let it say so when it does."""
        link = self._connections.get(peer)
        if link is None or not link.connected or link.session.acked(Stream.UPDATE) >= count:
            return True
        link.ask()
        return False

    def _answered(self, word: Word) -> bool:
        return word.to is not None and not word.to and not any(self._awaits(p) for p in word.awaited)

    def complete(self, leaving: bool) -> bool:
        """Has everything that we must wait for been said? A leaver waits for its neighbours' goodbyes; when everybody
        finishes, for everybody's last word."""
        words, membership = self._words, self._membership
        if self._open:
            return False
        if leaving:
            return self._answered(words[membership.me])
        return all(peer in words for peer in membership.roster.live)

    @property
    def staying(self) -> dict[PeerId, bool]:
        """Who said a last word and stays until all have, and did it find anybody silent."""
        return {peer: word.missed for peer, word in self._words.items() if not word.leaving}

    def left(self) -> list[Message]:
        """Last words of those who have left, for who comes later."""
        gone = [peer for peer, word in self._words.items() if word.leaving and peer != self._membership.me]
        return [Message("~done", fields={"peer": n, "leaving": True}, stream=Stream.CONTROL) for n in _texts(gone)]

    def forget(self, peer: PeerId) -> None:
        """``peer`` is there again, in another life."""
        self._words.pop(peer, None)
        self._open = [word for word in self._open if word.peer != peer]
