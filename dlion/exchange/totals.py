"""What each other micro-cloud has told in all, so that what a bridge took along is made good while the run goes on.

A bridge that dies, or is cut off, takes along what it had heard and not passed on, and what it was told until its
silence was noticed. Replicas beyond it then lack that, for good: sums of updates never forget. So some time after
somebody fell silent, or is heard again, each bridge says once, piece by piece between its words, what its micro-cloud
has told *in all*. Whoever hears a piece adds what it lacks of that, and passes the piece on to its mates. Nobody needs
to know what was lost, and what was heard twice is taken back.

Law: where words go over bridges, one array for each other micro-cloud, the sum of all that came from its side. So the
replica = the start + what our own micro-cloud has told + these totals, and a total can be said by whoever has heard all
its mates. A piece holds what its link was owed there, so nothing is owed there any more; what is said after it on that
link comes on top. (Not along a tree, nor among more than ``CLOUDS_MAX`` micro-clouds, whose totals nobody could keep.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from dlion.blocks import Block, dense
from dlion.exchange.base import Action, Add, Context, Send, Speech
from dlion.exchange.spread import Account, Spread
from dlion.messages import Message, PeerId
from dlion.tensors import Flat

CLOUDS_MAX = 4
"""Micro-clouds of which totals are kept."""
PIECES_MAX = 16
"""In how many pieces a total is said, at most."""


class Totals(Spread):
    """Base: remembers the sum of what came over bridges, and says its own micro-cloud's when somebody was away."""

    speaks: ClassVar[Speech] = {**Spread.speaks, "total": {"cloud": str}}
    blocks: ClassVar[Mapping[str, int]] = {"total": 1}

    def __init__(self) -> None:
        super().__init__()
        self.totals: dict[str, Flat] = {}
        """By micro-cloud, other than ours."""
        self._start: Flat | None = None
        self._seen: set[PeerId] = set()
        """Who ever lived."""
        self._away = False
        """Somebody was silent, or is back, and our total has not been said since."""
        self._telling: dict[PeerId, int] = {}
        """The bridges that are being told it, and the entry at which each goes on."""

    def unsaid(self) -> Flat:
        """Own steps that are in the replica and will be told later, to all alike."""
        return np.zeros(self._size, dtype=np.float32)

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._size = ctx.layout.size
        if self._adds_up(ctx):
            self._start = ctx.weights.copy()

    def _adds_up(self, ctx: Context) -> bool:
        """Are totals kept?"""
        return self.last_view and self.sums and not ctx.routes.mesh and ctx.routes.clouds <= CLOUDS_MAX

    def totalled(self, message: Message, ctx: Context) -> bool:
        """Does what it holds belong to a total?"""
        return message.fields["cloud"] != ctx.cloud and self._adds_up(ctx)

    def on_members(self, ctx: Context) -> Iterable[Action]:
        living = ctx.members.keys()
        lost, back = self._living - living, (living - self._living) & self._seen
        left = ctx.routes.name != self._plan  # which takes nothing along
        if self._last and (back or (lost and not left)):
            self._away = True
        self._seen |= living
        return super().on_members(ctx)

    def on_message(self, origin: PeerId, message: Message, ctx: Context) -> Iterable[Action]:
        if message.kind in self.additive and self.totalled(message, ctx):
            for block in message.blocks:
                block.add_to(self._total_of(message))
        if message.kind != "total":
            yield from super().on_message(origin, message, ctx)
        elif self.totalled(message, ctx):
            yield from self._make_good(message, ctx)

    def _make_good(self, message: Message, ctx: Context) -> Iterator[Action]:
        """A piece of another micro-cloud's total."""
        block, total = message.blocks[0], self._total_of(message)
        here, said = slice(block.start, block.start + block.size), np.zeros_like(total)
        block.add_to(said)
        missed = said[here] - total[here]
        total[here] = said[here]
        yield Add(dense(missed, start=block.start), message=message)
        cloud = str(message.fields["cloud"])
        for peer in ctx.routes.onward(message.hop, cloud):
            if peer in ctx.links and ctx.links[peer].cloud == ctx.cloud:
                yield Send((peer,), message)
                self._strike((peer, cloud), here)

    def _total_of(self, message: Message) -> Flat:
        """All that came from the side of whoever says this."""
        cloud = str(message.fields["cloud"])
        if cloud not in self.totals:
            self.totals[cloud] = np.zeros(self._size, dtype=np.float32)
        return self.totals[cloud]

    def _tell(self, accounts: Iterable[Account], ctx: Context, *, everything: bool = False) -> Iterator[Action]:
        if (self._away or self._telling) and not everything:
            yield from self._tell_total(ctx)
        yield from super()._tell(accounts, ctx, everything=everything)

    def _tell_total(self, ctx: Context) -> Iterator[Action]:
        """The next piece to each bridge that can take something, once all have agreed on who lives."""
        if self._elder or ctx.now < self._calm_at or ctx.routes.tree or not self._adds_up(ctx):
            return
        told = ctx.routes.onward(None, ctx.cloud)
        if self._away:
            self._away = False
            clouds = {p: (ctx.links.get(p) or ctx.silent[p]).cloud for p in told if p in ctx.links or p in ctx.silent}
            self._telling = {p: 0 for p, cloud in clouds.items() if p in ctx.links and cloud != ctx.cloud}
            for (peer, cloud), owed in self.owed.items():  # what is left there is part of a total
                if peer not in told or (peer in ctx.links and cloud not in {ctx.cloud, *clouds.values()}):
                    owed.clear()
        for peer, at in list(self._telling.items()):
            link = ctx.links.get(peer)
            if link is None or peer not in told:
                del self._telling[peer]
            elif link.writable_bytes > 0:
                size = max(-(-self._size // PIECES_MAX), self.budget_bytes(link, ctx) // 8)  # half of it is for words
                here = slice(at, min(at + size, self._size))
                blocks = (self._ours(here, ctx),)
                yield Send((peer,), Message("total", ctx.step, fields={"cloud": ctx.cloud}, blocks=blocks))
                self._strike((peer, ctx.cloud), here)
                self._telling[peer] = here.stop
                if here.stop == self._size:
                    del self._telling[peer]

    def _strike(self, account: Account, here: slice) -> None:
        """What was owed there is part of what was said."""
        if account in self.owed:
            self.owed[account].strike(here)

    def _ours(self, here: slice, ctx: Context) -> Block:
        """A piece of what our own micro-cloud has told."""
        assert self._start is not None
        ours = self.view(ctx.weights)[here] - self.unsaid()[here] - self._start[here]
        for total in self.totals.values():
            ours -= total[here]
        return dense(ours, start=here.start)

    def state(self) -> dict[str, Any]:
        start = {} if self._start is None else {"start": self._start}
        return {**super().state(), **start, "totals": self.totals, "away": self._away or bool(self._telling)}

    def restore(self, state: Mapping[str, Any], ctx: Context) -> None:
        super().restore(state, ctx)
        self.totals = {cloud: np.array(flat, dtype=np.float32) for cloud, flat in state["totals"].items()}
        self._away = state["away"]
        if "start" in state:
            self._start = np.array(state["start"], dtype=np.float32)
