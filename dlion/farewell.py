"""How a peer ends: flush what is owed, say so, wait until it was heard.

Law: synchronous bookkeeping of who said a last word; the node sends and waits. A last word (``~done``) travels like
its origin's updates, behind them, over the same routes, so whoever has it has all that came before it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from dlion.messages import Message, PeerId

DONE_FIELDS: Mapping[str, type] = {"peer": str, "leaving": bool}
"""``peer``: the name, or several with spaces between them."""
NAMES_CHARS_MAX = 4000
"""In one message: what a field may hold."""


def names_of(message: Message) -> list[PeerId]:
    """Whose last word a ``~done`` is."""
    return [PeerId(name) for name in str(message.fields["peer"]).split(" ")]


class Farewell:
    """Last words heard and to be passed on. ``tell(to, message)`` sends; ``onward(came_from, origin)`` routes."""

    def __init__(
        self,
        me: PeerId,
        tell: Callable[[tuple[PeerId, ...], Message], None],
        onward: Callable[[PeerId | None, PeerId], tuple[PeerId, ...]],
    ) -> None:
        self._me, self._tell, self._onward = me, tell, onward
        self._done: dict[PeerId, bool] = {}
        self._byes: set[PeerId] = set()
        self._untold: list[tuple[PeerId, PeerId | None]] = []

    def say(self, leaving: bool) -> None:
        """Our own last word."""
        self._done[self._me] = leaving
        self._untold.append((self._me, None))

    def hear(self, message: Message) -> list[tuple[PeerId, bool]]:
        """Last words: (who, does it leave) of those that are news. A leaver's neighbour says bye: on that link nothing
        more will come."""
        leaving = bool(message.fields["leaving"])
        news = [peer for peer in names_of(message) if peer not in self._done]
        for peer in news:
            self._done[peer] = leaving
            self._untold.append((peer, message.hop))
            if leaving and message.hop == peer:
                self._tell((peer,), Message("~bye"))
        return [(peer, leaving) for peer in news]

    def bye(self, peer: PeerId) -> None:
        """``peer`` says nothing more on its link to us."""
        self._byes.add(peer)

    def pass_on(self) -> None:
        """Carry last words on. Call only while nothing is owed that they must stay behind."""
        together: dict[tuple[tuple[PeerId, ...], bool], list[PeerId]] = {}
        untold, self._untold = self._untold, []
        for peer, came_from in untold:
            if to := self._onward(came_from, peer):
                together.setdefault((to, self._done[peer]), []).append(peer)
        for (to, leaving), peers in together.items():
            count = NAMES_CHARS_MAX // (max(map(len, peers)) + 1)
            for start in range(0, len(peers), count):
                names = " ".join(peers[start : start + count])
                self._tell(to, Message("~done", fields={"peer": names, "leaving": leaving}))

    def complete(self, near: Iterable[PeerId], living: Collection[PeerId], leaving: bool) -> bool:
        """Has everything that we must wait for been said? A leaver waits for its neighbours' byes; when everybody
        finishes, for everybody's last word."""
        if self._untold:
            return False
        if leaving:
            return all(peer in self._byes or peer in self._done for peer in near)
        return len(self._done) >= len(living) and all(peer in self._done for peer in living if peer != self._me)

    def forget(self, peer: PeerId) -> None:
        """``peer`` is there again, in another life."""
        self._done.pop(peer, None)
        self._byes.discard(peer)

    def finished(self, peer: PeerId) -> bool:
        return peer in self._done
