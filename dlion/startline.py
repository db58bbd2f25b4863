"""How a run begins: wait for the neighbours, at most so long; then who is missing counts as dead, and others take its
place as bridges.

Law: on the loop; knows sessions and the roster. Everybody gives up on the same peers at about the same time, so the
new bridges are there, if they can be, before the first step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from dlion.membership import Membership
from dlion.mesh.roster import State
from dlion.messages import PeerId
from dlion.neighbours import Neighbours
from dlion.porch import DIAL_S, Alone, Porch, Unwanted


class StartLine:
    """``turn`` notes changes of the roster."""

    def __init__(
        self,
        membership: Membership,
        neighbours: Neighbours,
        porch: Porch,
        turn: Callable[..., None],
        start_wait_s: float,
        begin_at_s: float,
    ) -> None:
        self._membership, self._neighbours, self._porch, self._turn = membership, neighbours, porch, turn
        self._start_wait_s, self._begin_at_s = start_wait_s, begin_at_s
        self._missing: list[PeerId] = []
        self.refusers: dict[PeerId, str] = {}
        """Who would not talk to us, and why."""

    async def gather(self, stopping: Callable[[], bool], change: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Wait for all neighbours, at most ``start_wait_s``, or until one says that the run is under way; from then on
        newcomers need a sponsor. Who was there and fell silent is not waited for.

        Raises Alone when there should be neighbours and none was ever there, Unwanted when all refused us.
        """
        roster, neighbours, loop = self._membership.roster, self._neighbours, asyncio.get_running_loop()
        neighbours.want(self._membership.neighbours)
        patience_s = self._start_wait_s
        while missing := await self._wait(patience_s, stopping, change):
            self._missing += missing
            neighbours.door.begin(loop.time() + 2 * self._start_wait_s)
            self._turn(*roster.miss(missing, loop.time()))  # which makes others our neighbours
            patience_s = DIAL_S
        silent = frozenset(p for p, state in roster.states.items() if state is State.SILENT)
        self._membership.lost = frozenset() if self._porch.under_way else silent - {*self._missing}
        if self._porch.under_way:
            return  # who comes late tells nobody who is there
        if self._missing and not neighbours.connections and not stopping():
            raise self._alone()
        neighbours.door.begin(loop.time() + 2 * self._start_wait_s)
        self._turn(*roster.presume(loop.time()))
        if (early_s := self._begin_at_s - loop.time()) > 0:
            await asyncio.sleep(early_s)

    async def _wait(
        self, patience_s: float, stopping: Callable[[], bool], change: Callable[[], Coroutine[Any, Any, None]]
    ) -> list[PeerId]:
        """Returns who is missing when patience is over."""
        try:
            async with asyncio.timeout(patience_s):
                while not (stopping() or self._porch.under_way or not self._awaited()):
                    await change()
        except TimeoutError:
            return self._awaited()
        return []

    def _awaited(self) -> list[PeerId]:
        states, connected = self._membership.roster.states, self._neighbours.connected
        return [
            p
            for p in self._membership.neighbours
            if not (connected(p) or states[p] is State.SILENT or p in self._missing)
        ]

    def _alone(self) -> Alone:
        tried = ", ".join(self._missing) + "".join([f"; refused: {why}" for why in self.refusers.values()][-1:])
        kind = Unwanted if self.refusers.keys() >= {*self._missing} else Alone
        me, waited = self._membership.me, f"within {self._start_wait_s:g} s"
        return kind(f"{me}: no peer reachable {waited}, tried {tried}")
