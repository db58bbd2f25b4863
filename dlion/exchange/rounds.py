"""Common ground of the strategies that work in rounds: DiLoCo, local SGD, SparseLoCo.

Law: a round is one part from every living peer; its mean moves the common weights (the *anchor*), which every peer
keeps, bit by bit the same. Who dies leaves the round; nobody waits for the dead (``parts`` sees to that). Between
micro-clouds the mean is formed in two levels, and what the rounding of a micro-cloud's sum leaves goes into its next
one.

In the mean all parts count alike, as DiLoCo and its kin have it, also where batches are dealt by speed; who weighs
them says so (``weight``: local SGD, FedAvg).

A replica is anchor + what it moved since. When a round closes, the part it gave is taken back and the step of the
anchor is added instead, so local steps done meanwhile (overlap) stay.

Who was cut off and is heard again had rounds of its own meanwhile. Each side says its anchor, in a new *era* of rounds;
the one that is further becomes everybody's, and what a peer moved since its last part it moves from there. A newcomer
is met like that: it begins with its sponsor's anchor, and takes part from the era on that begins when it is seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from msgspec.structs import replace

from dlion.blocks import Block, Encoding, dense
from dlion.exchange.base import Action, Add, Context, Exchange, LinkView, Speech, Update
from dlion.exchange.owed import exact
from dlion.exchange.parts import Parts, sums_up, whose
from dlion.messages import Message, PeerId, Scalar, Span
from dlion.tensors import Flat, add_scaled

ENCODINGS: Mapping[int, Encoding] = {32: Encoding.F32, 16: Encoding.F16, 8: Encoding.I8, 4: Encoding.I4}
"""Bits per value -> encoding."""
ERA = 1 << 20
"""Rounds are counted on from here when two sides meet again; no side has had so many."""


class Outer:
    """The outer optimizer: SGD with Nesterov momentum on the mean of what the peers moved (a step, sign included).

    ``momentum`` 0 and ``learning_rate`` 1 are plain averaging, exactly.
    """

    def __init__(self, learning_rate: float, momentum: float) -> None:
        if learning_rate <= 0 or not 0 <= momentum < 1:
            raise ValueError(
                f"outer_learning_rate must be positive and outer_momentum in [0, 1), got {learning_rate}, {momentum}"
            )
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.velocity: Flat | None = None

    def step(self, mean: Flat, start: int, size: int) -> Flat:
        """How the anchor moves at ``start``, given the ``mean`` there (taken over); ``size``: entries of the model."""
        if self.momentum:
            if self.velocity is None:
                self.velocity = np.zeros(size, dtype=np.float32)
            velocity = self.velocity[start : start + mean.size]
            velocity *= np.float32(self.momentum)
            velocity += mean
            add_scaled(mean, velocity, self.momentum)
        if self.learning_rate != 1.0:
            mean *= np.float32(self.learning_rate)
        return mean


class Rounds(Exchange):
    """Base: rounds of ``local_steps`` steps, or of ``round_s`` seconds by the clock, so that fast peers do more.

    ``overlap``: train on while a round closes; else wait for it. Subclasses say how a part is made and weighed.
    """

    pace = "free"
    paces = ("free",)
    consensus = True
    speaks: ClassVar[Speech] = {
        "part": {"cloud": str, "weight": float},
        "sum": {"cloud": str, "weight": float, "parts": int, "anchor": str},
        "gone": {"cloud": str, "peer": str},
        "anchor": {"cloud": str},
    }
    blocks: ClassVar[Mapping[str, int]] = {"part": 1, "sum": 1, "anchor": 2}
    overlap: ClassVar[bool] = False
    newcomers = True
    keep_error = False
    """True: what a part leaves out stays moved and goes into later ones (error feedback); False: it is dropped."""

    def __init__(self, local_steps: int, round_s: float, outer: Outer) -> None:
        if local_steps < 1 or round_s < 0:
            raise ValueError(f"local_steps must be at least 1 and round_s 0 or more, got {local_steps} and {round_s}")
        self.local_steps = local_steps
        self.round_s = round_s
        self.outer = outer
        self.round = 0
        """The round now open."""
        self._steps = 0
        self._samples = 0
        self._unspoken: list[int] = []
        self._counted = (0, 0, list[int]())
        """Steps, samples and unspoken of what we gave to the open round."""
        self._given: Flat | None = None
        """What our part of the open round takes out of the replica when it closes; None: not given yet."""
        self._left: Flat | None = None
        """What the rounding of our micro-cloud's sums left out, where we made them, ..."""
        self._makers: list[PeerId] = []
        """... as long as their shards are these peers'."""
        self._met: set[PeerId] = set()
        self._missed: set[PeerId] = set()
        """Whom we knew and made a sum, or closed a round, without."""
        self._anchor_of = ""
        """Who said the anchor of this era first."""
        self._parts = Parts()
        self._draining = False

    # -- what a strategy decides ---------------------------------------------------------------------------------

    def part(self, moved: Flat, start: int, ctx: Context) -> Block:
        """What to say of ``moved``: local steps not yet given, in the round's fragment, which begins at ``start``."""
        return self.encode(moved, start)

    def encode(self, values: Flat, start: int) -> Block:
        """The form in which a part is said."""
        return dense(values, start=start)

    def sum(self, mean: Flat, start: int, parts: int) -> Block:
        """The form in which the mean of so many parts is said."""
        return self.encode(mean, start)

    def fragment(self, ctx: Context) -> slice:
        """The entries that the open round is about: here the whole model."""
        return slice(0, ctx.layout.size)

    def merge(self, step: Flat, given: Flat, moved: Flat) -> Flat:
        """How the replica moves in the fragment when the anchor does; ``moved`` since we gave our part. Both it and
        ``step`` may change."""
        step -= given
        return step

    def weight(self, ctx: Context) -> float:
        """How much our part counts in the mean."""
        return 1.0

    # -- hooks ---------------------------------------------------------------------------------------------------

    def setup(self, ctx: Context) -> None:
        self._anchor = ctx.weights.copy()
        self._moved = np.zeros_like(self._anchor)
        self._parts.setup(ctx)

    def after_step(self, update: Update, ctx: Context) -> Iterable[Action]:
        coverage = (Span(ctx.me, update.step, update.step),)
        yield Add(update.values, coverage=coverage)
        self._moved += update.values
        self._steps += 1
        self._samples += update.samples
        self._unspoken = [*self._unspoken[:1], update.step]
        if self._given is None and self._due(ctx):
            yield from self._give(ctx)

    def on_message(self, origin: PeerId, message: Message, ctx: Context) -> Iterable[Action]:
        yield from self._parts.hear(message, self.round, ctx)
        if message.kind == "anchor":
            yield from self._adopt(message, ctx)
        if late := self._missed & self._parts.unseen:  # others closed rounds with it, which we closed without
            yield from self._meet_again(late, ctx)
        self._parts.unseen.clear()
        yield from self._close(ctx)

    def on_writable(self, link: LinkView, ctx: Context) -> Iterable[Action]:
        return self._parts.outbox.flush(ctx, [link.peer])

    def on_members(self, ctx: Context) -> Iterable[Action]:
        yield from self._parts.on_members(ctx)
        self._met |= set(ctx.members)
        if not sums_up(ctx):
            self._left = None
        if back := self._missed & (ctx.members.keys() - ctx.silent.keys()):
            yield from self._meet_again(back, ctx)
        yield from self._close(ctx)

    def ready(self, step: int, ctx: Context) -> bool:
        return self.overlap or self._given is None

    def view(self, weights: Flat) -> Flat:
        return self._anchor

    def drain(self, ctx: Context) -> Iterable[Action]:
        """Give what was moved, exactly; and give nothing where others still need a part to close their round."""
        self._draining = True
        yield from self._parts.outbox.flush(ctx)
        while self._given is None and (self._holds() or self._parts.begun(self.round)):
            yield from self._give(ctx)

    def owes(self, ctx: Context) -> bool:
        waits = self._given is not None and len(ctx.members) > 1
        return waits or bool(self._parts.outbox) or self._holds()

    def _holds(self) -> bool:
        """Is there anything that no round has counted yet?"""
        return self._steps > 0 or self._left is not None or bool(self._moved.any())

    # -- the round -----------------------------------------------------------------------------------------------

    def _due(self, ctx: Context) -> bool:
        if self.round_s:
            return ctx.now >= (self.round % ERA + 1) * self.round_s
        return self._steps >= self.steps(ctx)

    def steps(self, ctx: Context) -> int:
        """Of ours, that make a round which is not by the clock."""
        return self.local_steps

    def _give(self, ctx: Context) -> Iterator[Action]:
        """Say our part of the open round to everybody."""
        fragment = self.fragment(ctx)
        moved = self._moved[fragment]
        part = self.part(moved, fragment.start, ctx) if not self._draining else exact(moved, start=fragment.start)
        if self.keep_error:
            given = np.zeros_like(moved)
            replace(part, start=0).add_to(given)
        else:
            given = moved.copy()
        moved -= given
        self._given = given
        weight = self.weight(ctx)
        coverage = (Span(ctx.me, self._unspoken[0], self._unspoken[-1]),) if self._unspoken else ()
        self._counted = (self._steps, self._samples, self._unspoken)
        self._unspoken, self._steps, self._samples = [], 0, 0
        fields: dict[str, Scalar] = {"cloud": ctx.cloud, "weight": weight}
        message = Message("part", ctx.step, self.round, fields, (part,), coverage, origin=ctx.me)
        yield from self._parts.say(message, ctx)
        yield from self._close(ctx)

    def _sum_up(self, ctx: Context) -> Iterator[Action]:
        """Say our shards of the sum of our micro-cloud's parts, as soon as those are complete."""
        work = self._parts.to_sum(self.round, self.fragment(ctx), ctx)
        if work is None:
            return
        if work.makers != self._makers:
            self._makers, self._left = work.makers, None
        if not work.shards:
            return
        self._missed |= self._met - set(ctx.members)  # their parts do not count, or their shards are said for them
        lone = len(work.parts) == 1 and self._left is None
        mean = None if lone else _mean(work.parts, ctx.layout.size)
        coverage = tuple(span for part in work.parts for span in part.coverage)
        fields: dict[str, Scalar] = {"cloud": ctx.cloud, "weight": _weight(work.parts)}
        fields |= {"parts": work.which, "anchor": self._anchor_of}
        for shard in work.shards:
            block = work.parts[0].blocks[0] if mean is None else self._shard(mean, shard, len(work.parts))
            message = Message("sum", ctx.step, self.round, fields, (block,), coverage, origin=ctx.me)
            yield from self._parts.say(message, ctx)

    def _shard(self, mean: Flat, shard: slice, parts: int) -> Block:
        """The ``mean`` of so many parts there, in the form in which it is said; what that leaves out is kept."""
        if self._left is None:
            self._left = np.zeros_like(mean)
        left = self._left[shard]
        left += mean[shard]
        block = exact(left, start=shard.start) if self._draining else self.sum(left, shard.start, parts)
        block.add_to(self._left, -1.0)
        if not self._left.any():
            self._left = None
        return block

    def _close(self, ctx: Context) -> Iterator[Action]:
        """When all parts are here: move the anchor, and the replica with it."""
        if self._given is None:
            return
        yield from self._sum_up(ctx)
        fragment = self.fragment(ctx)
        size = fragment.stop - fragment.start
        if not self._parts.complete(self.round, size, ctx):
            return
        self._missed |= self._met - set(ctx.members)
        mean = _mean(self._parts.close(self.round, size, ctx), ctx.layout.size)
        step = self.outer.step(mean[fragment], fragment.start, ctx.layout.size)
        self._anchor[fragment] += step
        given, self._given = self._given, None
        merge = Rounds.merge if self._draining else type(self).merge
        change = merge(self, step, given, self._moved[fragment])
        del given
        self.round += 1
        yield Add(dense(change, start=fragment.start, copy=False))
        if self._due(ctx) and self._steps:
            yield from self._give(ctx)

    # -- meeting again -------------------------------------------------------------------------------------------

    def _meet_again(self, back: set[PeerId], ctx: Context) -> Iterator[Action]:
        """Rounds were closed without some who are here now: tell everybody where we are."""
        self._missed -= back
        self._restart(self.round + ERA, ctx)
        self._anchor_of = ctx.me
        velocity = self.outer.velocity if self.outer.velocity is not None else np.zeros_like(self._anchor)
        blocks = exact(self._anchor), exact(velocity)
        message = Message("anchor", ctx.step, self.round, {"cloud": ctx.cloud}, blocks, origin=ctx.me)
        yield from self._parts.say(message, ctx)

    def _adopt(self, message: Message, ctx: Context) -> Iterator[Action]:
        """Another side is further than ours, or as far and first by name: go on from its anchor. It said so before its
        part of the round that is now open there, so nobody can have closed that round without having heard it."""
        if message.epoch < self.round or (message.epoch == self.round and message.origin >= self._anchor_of):
            return
        if message.epoch > self.round:  # else what we gave to this round is known, and counts
            self._restart(message.epoch, ctx)
            self._missed.clear()  # whoever comes next hears of this era from us, unless we close a round before
        self._anchor_of = message.origin
        theirs, velocity = np.zeros_like(self._anchor), np.zeros_like(self._anchor)
        message.blocks[0].add_to(theirs)
        message.blocks[1].add_to(velocity)
        change = theirs - self._anchor
        self._anchor = theirs
        self.outer.velocity = velocity if self.outer.momentum else None
        yield Add(change, message=message)

    def _restart(self, number: int, ctx: Context) -> None:
        """Open round ``number``; what was given to the one before is ours again, to be given with the next step."""
        if self._given is not None:
            self._moved[self.fragment(ctx)] += self._given
            steps, samples, unspoken = self._counted
            self._steps, self._samples = self._steps + steps, self._samples + samples
            self._unspoken = [*unspoken[:1], *self._unspoken[-1:]] if self._unspoken else unspoken
        self._given, self._left = None, None
        self.round = number
        self._parts.forget_before(number)

    def conclude(self, view: Flat, ctx: Context) -> Iterable[Add]:
        change = view - self._anchor
        self._anchor = view
        yield Add(change)

    # -- newcomers -----------------------------------------------------------------------------------------------

    def introduce(
        self, peer: PeerId, sponsor: PeerId | None, life: int, ctx: Context, message: Message | None = None
    ) -> Iterable[Action]:
        self._met.add(peer)
        self._missed.add(peer)
        self._parts.renew(peer)
        return ()

    def inherit(self, sponsor: PeerId, bequest: Mapping[str, Flat], ctx: Context) -> None:
        """Nothing is given to the rounds of this era: as if that had been done already."""
        if bequest.keys() != {""}:
            raise ValueError("it is not one anchor")
        self._anchor = bequest[""].copy()
        self._moved = np.zeros_like(self._anchor)
        self._given = np.zeros_like(self._moved[self.fragment(ctx)])
        self._counted = (self.steps(ctx), 0, [])  # nobody waits for a whole round of ours

    # -- snapshots -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        velocity = self.outer.velocity
        arrays = {"anchor": self._anchor, "moved": self._moved, "given": self._given, "velocity": velocity}
        counts = {"round": self.round, "steps": self._steps, "samples": self._samples, "unspoken": self._unspoken}
        counts |= {"counted": self._counted, "makers": list(self._makers)}
        others = {"met": set(self._met), "missed": set(self._missed), "anchor_of": self._anchor_of}
        flat = {k: v.copy() for k, v in {**arrays, "left": self._left}.items() if v is not None}
        return {**flat, **counts, **others, "parts": self._parts.state()}

    def restore(self, state: Mapping[str, Any], ctx: Context) -> None:
        flat = {k: np.array(v, dtype=np.float32) for k, v in state.items() if isinstance(v, np.ndarray)}
        self._anchor, self._moved = flat["anchor"], flat["moved"]
        self._given, self.outer.velocity, self._left = (flat.get(name) for name in ("given", "velocity", "left"))
        self.round, self._steps, self._samples = (int(state[name]) for name in ("round", "steps", "samples"))
        self._unspoken, self._counted, self._makers = list(state["unspoken"]), state["counted"], list(state["makers"])
        self._met, self._missed, self._anchor_of = set(state["met"]), set(state["missed"]), str(state["anchor_of"])
        self._parts.restore(state["parts"])


def _weight(messages: list[Message]) -> float:
    """Of them together; a micro-cloud's shards weigh as one."""
    return sum({whose(m): float(m.fields["weight"]) for m in messages}.values())


def _mean(messages: list[Message], size: int) -> Flat:
    """The weighted mean of what they say, over the whole model, summed in their order."""
    total = _weight(messages) or 1.0
    mean = np.zeros(size, dtype=np.float32)
    for message in messages:
        message.blocks[0].add_to(mean, float(message.fields["weight"]) / total)
    return mean
