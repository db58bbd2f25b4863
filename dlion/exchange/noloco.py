"""``noloco``: DiLoCo without a collective: every round, random pairs pull their slow weights together.

Source: Kolehmainen et al., "NoLoCo: No-all-reduce Low Communication Training Method for Large Models", 2025. φ: slow
weights; H inner steps give θ; Δ = θ - φ; with the pair's mean:
δ <- α δ + β mean(Δ) - γ (φ - mean(φ)), φ <- φ + δ, and θ starts again from φ. H = 50, outer 0.7 / 0.5.

Differences from the paper. The pairing follows from the round's number and the living members, so that nobody need
say it; a pair without a link sits the round out. A peer whose partner sees another pairing (somebody just died) is
told so and goes on alone. H is 20 (jobs here are short), γ = 0.7 (ours). A newcomer begins with its sponsor's φ and δ,
and goes to the latest round in which anybody waits for it. The mean of two is plain, whatever their batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from dlion.blocks import Block, dense
from dlion.exchange.base import Action, Add, Context, Exchange, LinkView, Speech, Update
from dlion.exchange.parts import Outbox
from dlion.messages import Message, PeerId, Span
from dlion.tensors import Flat, add_scaled

PIECE = 1 << 17
"""Entries added at a time."""


class NoLoCo(Exchange):
    """``momentum`` α, ``outer_learning_rate`` β, ``pull`` γ."""

    name = "noloco"
    pace = "free"
    paces = ("free",)
    newcomers = True
    speaks: ClassVar[Speech] = {"pair": {}, "alone": {}}
    blocks: ClassVar[Mapping[str, int]] = {"pair": 2}

    def __init__(
        self,
        *,
        local_steps: int = 20,
        outer_learning_rate: float = 0.7,
        momentum: float = 0.5,
        pull: float = 0.7,
    ) -> None:
        if local_steps < 1 or outer_learning_rate <= 0 or not 0 <= momentum < 1 or not 0 <= pull <= 1:
            raise ValueError(
                "noloco: expected local_steps >= 1, outer_learning_rate > 0, momentum in [0, 1), pull in [0, 1], "
                f"got {local_steps}, {outer_learning_rate}, {momentum}, {pull}"
            )
        self.local_steps, self.outer_learning_rate = local_steps, outer_learning_rate
        self.momentum, self.pull = momentum, pull
        self.round = 0
        self._steps = 0
        self._partner: PeerId | None = None
        """Whom we wait for."""
        self._heard: dict[tuple[int, PeerId], tuple[Block, Block] | None] = {}
        """(round, peer) -> its slow weights and Δ; None: it went on alone."""
        self._outbox = Outbox()
        self._late = False
        """We came into the run, and had no partner yet."""

    def setup(self, ctx: Context) -> None:
        self._slow = ctx.weights.copy()
        self._velocity = np.zeros_like(self._slow)
        self._mine = (dense(self._slow), dense(self._velocity))

    def partner(self, ctx: Context) -> PeerId | None:
        """Our partner in this round, if it is a neighbour: one pairing for all who see the same members."""
        members = sorted(ctx.members)
        order = [members[i] for i in np.random.default_rng([2025, self.round]).permutation(len(members))]
        place = order.index(ctx.me) ^ 1
        return order[place] if place < len(order) and order[place] in ctx.links else None

    def after_step(self, update: Update, ctx: Context) -> Iterable[Action]:
        yield Add(update.values, coverage=(Span(ctx.me, update.step, update.step),))
        self._steps += 1
        if self._steps < self.local_steps:
            return
        self._steps = 0
        if self._late:
            self.round = max([self.round, *(number for number, _ in self._heard)])
        self._mine = (dense(self._slow), dense(ctx.weights - self._slow, copy=False))
        self._partner = self.partner(ctx)
        if self._partner is not None:
            message = Message("pair", ctx.step, self.round, blocks=self._mine)
            yield from self._outbox.say([self._partner], message, ctx)
        for (number, peer), heard in list(self._heard.items()):
            if number <= self.round and peer != self._partner and heard is not None:
                yield from self._refuse(number, peer, ctx)
        self._heard = {k: v for k, v in self._heard.items() if k == (self.round, self._partner) or k[0] > self.round}
        yield from self._close(ctx)

    def on_message(self, origin: PeerId, message: Message, ctx: Context) -> Iterable[Action]:
        waiting = self._partner is not None
        if message.kind == "alone":
            self._heard[message.epoch, origin] = None
        elif message.epoch < self.round or (message.epoch == self.round and waiting and origin != self._partner):
            yield from self._refuse(message.epoch, origin, ctx)
            return
        else:
            self._heard[message.epoch, origin] = (message.blocks[0], message.blocks[1])
        if waiting:
            yield from self._close(ctx)

    def on_writable(self, link: LinkView, ctx: Context) -> Iterable[Action]:
        return self._outbox.flush(ctx, [link.peer])

    def on_members(self, ctx: Context) -> Iterable[Action]:
        """What was heard of one that is silent stays: if it comes back, it will not say that again."""
        self._outbox.forget(ctx)
        if self._partner is not None and self._partner not in ctx.links:
            self._heard[self.round, self._partner] = None
            yield from self._close(ctx)

    def ready(self, step: int, ctx: Context) -> bool:
        return self._partner is None

    def drain(self, ctx: Context) -> Iterable[Action]:
        """Nobody is left waiting: who still asks for a pair hears that we are done."""
        yield from self._outbox.flush(ctx)
        for (number, peer), heard in list(self._heard.items()):
            if heard is not None and (number, peer) != (self.round, self._partner):
                self._heard.pop((number, peer))
                yield from self._refuse(number, peer, ctx)

    def owes(self, ctx: Context) -> bool:
        return bool(self._outbox)

    def _refuse(self, number: int, peer: PeerId, ctx: Context) -> Iterator[Action]:
        yield from self._outbox.say([peer], Message("alone", ctx.step, number), ctx)

    def _close(self, ctx: Context) -> Iterator[Action]:
        """The outer step: with the partner's part if it is here, alone if there is no partner."""
        key = (self.round, self._partner) if self._partner is not None else None
        if key is not None and key not in self._heard:
            return
        theirs = self._heard.pop(key) if key is not None else None
        slow, delta = self._mine[0].values, self._mine[1].values
        self._velocity *= np.float32(self.momentum)
        part = self.outer_learning_rate
        if theirs is not None:
            self._late = False
            part /= 2
            theirs[0].add_to(self._velocity, 0.5 * self.pull)
            add_scaled(self._velocity, slow, -0.5 * self.pull)
            theirs[1].add_to(self._velocity, part)
        add_scaled(self._velocity, delta, part)
        self._slow += self._velocity
        self._partner = None
        self.round += 1
        for lo in range(0, self._slow.size, PIECE):
            change = self._slow[lo : lo + PIECE] - ctx.weights[lo : lo + PIECE]
            yield Add(dense(change, start=lo, copy=False))

    # -- newcomers -----------------------------------------------------------------------------------------------

    def introduce(
        self, peer: PeerId, sponsor: PeerId | None, life: int, ctx: Context, message: Message | None = None
    ) -> Iterable[Action]:
        self._heard = {key: heard for key, heard in self._heard.items() if key[1] != peer}
        if self._partner == peer:
            self._heard[self.round, peer] = None
            yield from self._close(ctx)

    def bequeath(self, peer: PeerId, ctx: Context) -> dict[str, Flat]:
        """δ and the rest of φ, and how far the round is."""
        return {"velocity": self._velocity.copy(), f"{self.round} {self._steps}": self._slow - self._velocity}

    def inherit(self, sponsor: PeerId, bequest: Mapping[str, Flat], ctx: Context) -> None:
        try:
            (name,) = bequest.keys() - {"velocity"}
            self._velocity = bequest["velocity"].copy()
            self._slow = bequest[name] + self._velocity
            self.round, self._steps = map(int, name.split(" "))
        except (ValueError, KeyError) as error:
            raise ValueError("it does not say of which round it is") from error
        self._partner, self._heard, self._late = None, {}, True

    # -- snapshots -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        talk = {"partner": self._partner, "heard": dict(self._heard), "outbox": self._outbox.state()}
        arrays = {"slow": self._slow, "velocity": self._velocity, "mine": self._mine}
        return {**arrays, **talk, "round": self.round, "steps": self._steps, "late": self._late}

    def restore(self, state: Mapping[str, Any], ctx: Context) -> None:
        self._slow = np.array(state["slow"], dtype=np.float32)
        self._velocity = np.array(state["velocity"], dtype=np.float32)
        self.round, self._steps, self._late = int(state["round"]), int(state["steps"]), bool(state["late"])
        self._partner, self._heard, self._mine = state["partner"], dict(state["heard"]), state["mine"]
        self._outbox.restore(state["outbox"])
