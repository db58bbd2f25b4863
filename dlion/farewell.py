"""How a peer ends: flush what is owed, say so, wait until it was heard.

Law: synchronous bookkeeping of who said a last word; the node sends and waits. A last word (``~done``) travels like
its origin's updates, behind them, over the same routes, so whoever has it has all that came before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from dlion.messages import Message, PeerId

DONE_FIELDS: Mapping[str, type] = {"peer": str, "leaving": bool}


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
        self._untold: list[tuple[Message, PeerId | None]] = []

    def say(self, leaving: bool) -> None:
        """Our own last word."""
        self._done[self._me] = leaving
        self._untold.append((Message("~done", fields={"peer": self._me, "leaving": leaving}, origin=self._me), None))

    def hear(self, message: Message) -> tuple[PeerId, bool] | None:
        """Somebody's last word: (who, does it leave), or None if it is not news. A leaver's neighbour says bye: on
        that link nothing more will come."""
        peer, leaving = PeerId(str(message.fields["peer"])), bool(message.fields["leaving"])
        if peer in self._done:
            return None
        self._done[peer] = leaving
        self._untold.append((message, message.hop))
        if leaving and message.hop == peer:
            self._tell((peer,), Message("~bye"))
        return peer, leaving

    def bye(self, peer: PeerId) -> None:
        """``peer`` says nothing more on its link to us."""
        self._byes.add(peer)

    def pass_on(self) -> None:
        """Carry last words on. Call only while nothing is owed that they must stay behind."""
        while self._untold:
            message, came_from = self._untold.pop(0)
            if to := self._onward(came_from, PeerId(str(message.fields["peer"]))):
                self._tell(to, Message("~done", fields=message.fields, origin=message.origin))

    def complete(self, near: Iterable[PeerId], living: Iterable[PeerId], leaving: bool) -> bool:
        """Has everything that we must wait for been said? A leaver waits for its neighbours' byes; when everybody
        finishes, for everybody's last word."""
        if self._untold:
            return False
        if leaving:
            return all(peer in self._byes or peer in self._done for peer in near)
        return all(peer in self._done for peer in living if peer != self._me)

    def finished(self, peer: PeerId) -> bool:
        return peer in self._done
