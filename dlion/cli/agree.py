"""Peers that are each started again by themselves agree on the checkpoint that all of them go on from.

Law: before there is a node. Whoever has checkpoints asks its neighbours which ones they have, until it knows of all
peers; everybody answers for as long as its process listens. Both tell what they have heard of others, too, so that
peers without a link to each other, and those that can only dial, agree with the rest. What is told decides nothing but
which of our own checkpoints is used, and the greeting between nodes holds them against each other once more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from typing import Annotated

import aiohttp
import msgspec

from dlion.cli.build import Plan
from dlion.cli.errors import CONFIGURATION, Fault
from dlion.cli.keep import Start, expected
from dlion.cut import name_of
from dlion.messages import PeerId
from dlion.net.upgrade import BESIDE

ASK_EVERY_S = (0.1, 1.0)
"""Pause before the neighbours are asked again: the first, and the longest."""
ANSWER_S = 5.0
ANSWER_BYTES_MAX = 1 << 20
Numbers = Annotated[frozenset[Annotated[int, msgspec.Meta(ge=0)]], msgspec.Meta(max_length=256)]


class Told(msgspec.Struct):
    """What two peers tell each other: of which run, who speaks, and which cuts each peer that it knows of has."""

    run: str
    job: str
    peer: str
    cuts: dict[str, Numbers]
    training: bool = False
    """The run goes on already: what its peers once began with is of no consequence."""


class Agreement:
    """Which cuts each peer can go on from, as far as this one has heard; ``mine`` for itself."""

    def __init__(self, plan: Plan, me: PeerId, mine: Iterable[int]) -> None:
        facts = expected(plan)
        self._run, self._job, self._me = str(facts["run"]), str(facts["job"]), me
        self._peers = frozenset(plan.peers)
        self._known: dict[str, frozenset[int]] = {me: frozenset(mine)}
        self.training: Callable[[], bool] = lambda: False
        """Are we?"""
        self._under_way = False

    @property
    def complete(self) -> bool:
        return self._under_way or self._known.keys() == self._peers

    def told(self) -> bytes:
        return msgspec.json.encode(Told(self._run, self._job, self._me, self._known, self.training()))

    def answer(self, said: bytes) -> bytes:
        """What we know, to whoever says what it knows. Raises ValueError for what makes no sense."""
        self.hear(said)
        return self.told()

    def hear(self, said: bytes) -> None:
        """A peer's word counts for itself, and for others as long as nothing else is known. Of another run or job it
        is left to the greeting, which names both. Raises ValueError for what makes no sense."""
        told = msgspec.json.decode(said, type=Told)
        if (told.run, told.job) != (self._run, self._job):
            return
        self._under_way |= told.training
        for peer, cuts in told.cuts.items():
            if peer in self._peers and peer != self._me and (peer == told.peer or peer not in self._known):
                self._known[peer] = cuts

    def start(self) -> Start:
        """The newest cut that all have who are known; Fault when there is none. Where the run goes on already, our own
        newest: of it, only what the trainer was is used."""
        if self._under_way:
            return Start()
        if common := frozenset.intersection(*self._known.values()):
            return Start(name_of(max(common)))
        have = "; ".join(
            f"{peer} has {', '.join(map(name_of, sorted(cuts, reverse=True))) or 'none'}"
            for peer, cuts in sorted(self._known.items())
        )
        advice = "start all of them with --fresh, or bring back the missing directories"
        raise Fault(CONFIGURATION, "no checkpoint that all peers have", self._me, have, advice)

    async def ask(self, addresses: Collection[str], wait_s: float) -> None:
        """Until all peers are known, and were told of to those who cannot ask us; at most ``wait_s``: then those that
        are known are all there is."""
        pause_s, longest_s = ASK_EVERY_S
        timeout = aiohttp.ClientTimeout(total=ANSWER_S)
        async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as client:
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    complete = False
                    while not complete:
                        complete = self.complete  # when this round began
                        await asyncio.gather(*(self._ask(client, address) for address in addresses))
                        if not self.complete:
                            await asyncio.sleep(pause_s)
                            pause_s = min(2 * pause_s, longest_s)

    async def _ask(self, client: aiohttp.ClientSession, address: str) -> None:
        with suppress(aiohttp.ClientError, TimeoutError, ValueError):  # not there yet, or nothing that we understand
            async with client.post(f"http://{address.rstrip('/')}{BESIDE}", data=self.told()) as answer:
                if answer.status == 200:
                    self.hear(await answer.content.read(ANSWER_BYTES_MAX))


async def agreed(agreement: Agreement, addresses: Iterable[str], start: Start, *, has: bool, wait_s: float) -> Start:
    """How this peer begins: as it was told, afresh if it ``has`` nothing, else from what all have."""
    if start.fresh or start.cut or not has:
        return start
    await agreement.ask([address for address in addresses if address], wait_s)
    return agreement.start()
