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

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from dlion.blocks import Block, dense
from dlion.exchange.base import Action, Add, Context, Send, Speech
from dlion.exchange.spread import CALM_S, Account, Spread
from dlion.messages import Message, PeerId
from dlion.tensors import Flat

CLOUDS_MAX = 4
"""Micro-clouds of which totals are kept."""
PIECE_ENTRIES_MIN = 4096
"""Of a total, unless there are fewer."""


class Totals(Spread):
    """Base: remembers the sum of what came over bridges, and says its own micro-cloud's when somebody was away."""

    speaks: ClassVar[Speech] = {**Spread.speaks, "total": {"cloud": str}}
    blocks: ClassVar[Mapping[str, int]] = {"update": 1, "total": 1}

    def __init__(self) -> None:
        super().__init__()
        self.totals: dict[str, Flat] = {}
        """By micro-cloud, other than ours."""
        self._start: Flat | None = None
        self._there: dict[PeerId, int] = {}
        """Who was ever there, and in which life."""
        self._away = False
        """Somebody was silent, or is back, and our total has not been said since."""
        self._telling: dict[PeerId, int] = {}
        """The bridges that are being told it, and the entry at which each goes on."""
        self._words_next: set[PeerId] = set()
        """Those that were just told a piece."""
        self._piece_at = -CALM_S
        """When a piece was last said or heard."""

    def unsaid(self) -> Flat:
        """Own steps that are in the replica and will be told later, to all alike."""
        return np.zeros(self._size, dtype=np.float32)

    def part(self, weights: Flat, here: slice) -> Flat:
        """That part of the view."""
        return self.view(weights[here])

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
        """A loss and a return call for totals, but not who leaves, or begins a new life: those take nothing along. Any
        change does while totals are being said: not all know of it at once, and the ends of a bridge may be new."""
        lost = len(self._living - ctx.members.keys()) - (ctx.routes.name != self._plan)
        lives = {peer: member.life for peer, member in ctx.members.items()}
        back = any(self._there.get(peer) == lives[peer] for peer in lives.keys() - self._living)
        meanwhile = lives.keys() != self._living and ctx.now < self._piece_at + CALM_S
        self._away = self._away or (bool(self._last) and (back or lost > 0 or meanwhile))
        self._there.update(lives)
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
        """A piece of another micro-cloud's total. One from before the last change, when all waited, is told anew."""
        cloud = str(message.fields["cloud"])
        hop = ctx.links.get(message.hop)
        if hop is None or hop.cloud not in (ctx.cloud, cloud) or ctx.now < self._calm_at - CALM_S / 2:
            return
        self._piece_at = ctx.now
        block, total = message.blocks[0], self._total_of(message)
        here, said = slice(block.start, block.start + block.size), np.zeros_like(total)
        block.add_to(said)
        missed = said[here] - total[here]
        total[here] = said[here]
        yield Add(dense(missed, start=block.start), message=message)
        onward = ctx.routes.onward(message.hop, cloud)
        if mates := tuple(p for p in onward if p in ctx.links and ctx.links[p].cloud == ctx.cloud):
            yield Send(mates, message)
            self._strike([(peer, cloud) for peer in mates], here)

    def _total_of(self, message: Message) -> Flat:
        """All that came from the side of whoever says this."""
        cloud = str(message.fields["cloud"])
        if cloud not in self.totals:
            self.totals[cloud] = np.zeros(self._size, dtype=np.float32)
        return self.totals[cloud]

    def _tell(self, accounts: Iterable[Account], ctx: Context, *, everything: bool = False) -> Iterator[Action]:
        if (self._away or self._telling) and not everything:
            accounts = list(accounts)
            yield from self._tell_total({peer for peer, _ in accounts}, ctx)
        yield from super()._tell(accounts, ctx, everything=everything)

    def _tell_total(self, hear: Collection[PeerId], ctx: Context) -> Iterator[Action]:
        """The next piece to each bridge that can take something, once all have agreed on who lives; and then it is the
        turn of the words that it may ``hear``."""
        if self.lags(ctx) or ctx.now < self._calm_at or ctx.routes.tree or not self._adds_up(ctx):
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
            elif link.writable_bytes <= 0:
                continue
            elif peer in self._words_next:
                if peer in hear:
                    self._words_next.discard(peer)
            else:
                room_bytes = max(link.writable_bytes, self.budget_bytes(link, ctx))
                here = slice(at, min(at + max(room_bytes // 8, PIECE_ENTRIES_MIN), self._size))  # half of the room
                blocks = (self._ours(here, ctx),)
                yield Send((peer,), Message("total", ctx.step, fields={"cloud": ctx.cloud}, blocks=blocks))
                self._strike([(peer, ctx.cloud)], here)
                self._telling[peer], self._piece_at = here.stop, ctx.now
                self._words_next.add(peer)
                if here.stop == self._size:
                    del self._telling[peer]

    def _strike(self, accounts: Iterable[Account], here: slice) -> None:
        """What was owed there is part of what was said."""
        for account in accounts:
            if account in self.owed:
                self.owed[account].strike(here)

    def _ours(self, here: slice, ctx: Context) -> Block:
        """A piece of what our own micro-cloud has told."""
        assert self._start is not None
        ours = self.part(ctx.weights, here) - self.unsaid()[here] - self._start[here]
        for total in self.totals.values():
            ours -= total[here]
        return dense(ours, start=here.start)

    def state(self) -> dict[str, Any]:
        start = {} if self._start is None else {"start": self._start}
        mine = {"totals": self.totals, "away": self._away or bool(self._telling), "lived": dict(self._there)}
        return {**super().state(), **start, **mine}

    def restore(self, state: Mapping[str, Any], ctx: Context) -> None:
        super().restore(state, ctx)
        self.totals = {cloud: np.array(flat, dtype=np.float32) for cloud, flat in state["totals"].items()}
        self._there.update(state["lived"])
        self._away = state["away"] or not self._there.keys() <= ctx.members.keys()
        self._calm_at = ctx.now + CALM_S
        if "start" in state:
            self._start = np.array(state["start"], dtype=np.float32)
