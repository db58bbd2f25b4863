"""Common ground of the strategies that know what each neighbour has told them: what a peer leaves when it dies, and
what a newcomer must be given so that it can take part in that.

Law: for every neighbour one array, the sum of all that it told us; one more for who came again, of what its former
lives had told, once that is settled. So the replica is: start + own steps + what each has told in all its lives. Of a
death that nobody came back from, the first of those who heard it tells the rest in the drain what it had heard in all;
of one that is followed by a new life, the newcomer's sponsor does, at once. Whoever is told has heard of the dead what
the teller had. An estate is of all lives together, so that the last one told makes good whatever part of an earlier one
was lost with its teller.

Where the settings promise no ``consensus`` (what is not said is dropped, or weights are merged), a replica is no such
sum: nothing is remembered, the dead leave nothing, and a newcomer simply begins as its sponsor is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from dlion.blocks import dense
from dlion.exchange.base import Action, Add, Context, Send, Speech
from dlion.exchange.totals import Totals
from dlion.messages import Message, PeerId, Scalar
from dlion.tensors import Flat

FORMER, TOTAL = "former", "total"


class Estates(Totals):
    """Base: remembers what it heard of whom, and settles what the dead had told only some."""

    speaks: ClassVar[Speech] = {**Totals.speaks, "estate": {"cloud": str, "of": str, "life": int}}
    handed_on: ClassVar[tuple[str, ...]] = (*Totals.handed_on, "estate")
    consensus = True

    def __init__(self) -> None:
        super().__init__()
        self._heard: dict[PeerId, Flat] = {}
        """All that each neighbour has told us in its present life."""
        self._met: dict[PeerId, str] = {}
        """Who ever was a neighbour, and its micro-cloud."""
        self._settled: set[PeerId] = set()
        """The dead of whose estate we have told."""
        self._wills: dict[PeerId, Message] = {}
        """Estates told to us, until we too know that their owner is dead."""
        self._lives: dict[PeerId, int] = {}
        """Of those who came again: their present life."""
        self._former: dict[PeerId, Flat] = {}
        """What the settled lives of each peer had told in all."""

    def on_message(self, origin: PeerId, message: Message, ctx: Context) -> Iterable[Action]:
        if message.kind == "estate":
            self._wills[PeerId(str(message.fields["of"]))] = message
            return
        yield from super().on_message(origin, message, ctx)
        if self.consensus and message.kind in self.additive and not self.totalled(message, ctx):
            self._listen(message)

    def on_members(self, ctx: Context) -> Iterable[Action]:
        if self.consensus:
            self._met.update((peer, link.cloud) for peer, link in ctx.links.items())
        return super().on_members(ctx)

    def drain(self, ctx: Context) -> Iterable[Action]:
        yield from self.settle(ctx)
        yield from super().drain(ctx)

    def _listen(self, message: Message) -> None:
        """Remember what was told."""
        if message.hop not in self._heard:
            self._heard[message.hop] = np.zeros(self._size, dtype=np.float32)
        for block in message.blocks:
            block.add_to(self._heard[message.hop])

    def state(self) -> dict[str, Any]:
        return {**super().state(), "heard": self._heard, "lives": dict(self._lives), FORMER: self._former}

    def restore(self, state: Mapping[str, Any], ctx: Context) -> None:
        super().restore(state, ctx)
        self._heard = {peer: np.array(flat, dtype=np.float32) for peer, flat in state["heard"].items()}
        self._lives = dict(state["lives"])
        self._former = {peer: np.array(flat, dtype=np.float32) for peer, flat in state[FORMER].items()}

    # -- those who do not come back ------------------------------------------------------------------------------

    def settle(self, ctx: Context) -> Iterator[Action]:
        """The first of those who heard a dead peer says what it heard. Over bridges only its micro-cloud had heard it
        speak for itself."""
        told = [p for p in ctx.routes.onward(None, ctx.cloud) if p in ctx.links]
        everybody = ctx.routes.mesh and len(told) == len(ctx.members) - 1
        able = ctx.members.keys() | ctx.former.keys()  # who leaves may still speak
        for dead in sorted(self._met.keys() - able - self._settled):
            if not everybody and self._met[dead] != ctx.cloud:
                continue
            heirs = [p for p in told if everybody or ctx.links[p].lan]
            if ctx.me < min(heirs, default=ctx.me):
                self._settled.add(dead)
                held = self.estate(dead)
                estate = dense(np.zeros(self._size, dtype=np.float32) if held is None else held)
                fields: dict[str, Scalar] = {"cloud": ctx.cloud, "of": dead, "life": self._lives.get(dead, 0)}
                message = Message("estate", ctx.step, 0, fields, (estate,))
                yield Send(tuple(heirs), message)
        for dead in sorted(self._wills.keys() - able):
            message = self._wills.pop(dead)
            if int(message.fields["life"]) >= self._lives.get(dead, 0):  # else it is of a life that is settled
                yield from self._accept(dead, ctx, message)

    def _accept(self, dead: PeerId, ctx: Context, message: Message) -> Iterator[Action]:
        """From now on we have heard of the dead what the teller had."""
        estate = np.zeros(self._size, dtype=np.float32)
        for block in message.blocks:
            block.add_to(estate)
        held = self.estate(dead)
        missed = estate if held is None else estate - held
        self._former[dead] = estate
        self._heard.pop(dead, None)
        yield Add(missed, message=message)
        yield from self.spread(dense(missed), (), ctx, message)

    # -- those who do --------------------------------------------------------------------------------------------

    def estate(self, peer: PeerId) -> Flat | None:
        heard, former = self._heard.get(peer), self._former.get(peer)
        return heard if former is None else former if heard is None else former + heard

    def introduce(
        self, peer: PeerId, sponsor: PeerId | None, life: int, ctx: Context, message: Message | None = None
    ) -> Iterable[Action]:
        yield from super().introduce(peer, sponsor, life, ctx, message)
        estate = self.estate(peer)
        if message is not None and (message.blocks or estate is not None):
            yield from self._accept(peer, ctx, message)
        elif estate is not None:
            self._former[peer] = estate
        self._heard.pop(peer, None)
        self._wills.pop(peer, None)
        self._settled.discard(peer)
        self._lives[peer] = life
        if self.consensus:
            self._met.setdefault(peer, ctx.cloud if message is None else str(message.fields["cloud"]))

    def bequeath(self, peer: PeerId, ctx: Context) -> dict[str, Flat]:
        """What we heard of each common neighbour, what former lives told, and the rest: the start and what we told."""
        beyond = set(ctx.routes.onward(peer, ctx.cloud))
        rest = self.view(ctx.weights) - self.unsaid()
        held = {f"{FORMER}\n{other}": told.copy() for other, told in self._former.items()}
        held.update((f"{TOTAL}\n{cloud}", total.copy()) for cloud, total in self.totals.items())
        for other in sorted(set(self._met) | set(self._heard)):
            if other in beyond or other == peer:
                continue
            name = f"{self._met.get(other, '')}\n{other}\n{self._lives.get(other, 0)}"
            heard = self._heard.get(other)
            held[name] = np.zeros(self._size, dtype=np.float32) if heard is None else heard.copy()
        for flat in held.values():
            rest -= flat
        return {**held, "": rest}

    def inherit(self, sponsor: PeerId, bequest: Mapping[str, Flat], ctx: Context) -> None:
        if "" not in bequest:
            raise ValueError("it holds no weights")
        if not self.consensus:
            return
        self._heard = {sponsor: bequest[""] - ctx.weights}
        self._former, self.totals = {}, {}
        if self._start is not None:  # it may have begun with a checkpoint's
            self._start = ctx.weights.copy()
        for name in bequest.keys() - {""}:
            of, peer, *rest = name.split("\n")
            if not rest:
                (self._former if of == FORMER else self.totals)[PeerId(peer)] = bequest[name]
                continue
            cloud, (life,) = of, rest
            self._heard[PeerId(peer)] = bequest[name]
            self._met[PeerId(peer)] = cloud
            self._lives[PeerId(peer)] = int(life)
