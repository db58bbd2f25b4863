"""``gaia``: say a parameter only when its gathered change is significant relative to its value.

Source: Hsieh et al., "Gaia: Geo-Distributed Machine Learning Approaching LAN Speeds", NSDI 2017. Updates (learning
rate and momentum applied) gather; an entry is said when |gathered / w| > threshold or w = 0, and then starts anew;
dense when sparse would be larger. The threshold falls as initial / √t. *Selective barrier*: when significant updates
outrun a link, it is first told that they exist, and its peer does not start a step before they are there. *Mirror
clock*: nobody runs ahead of the slowest by more than a bound, here the ``bounded`` pace.

Differences from the paper. Every peer is a data centre of its own; inside a micro-cloud the same filter holds. The
barrier names a step instead of indexes: a step reads every parameter, so waiting for some is waiting for all. Weighed
by batch share. What stays insignificant is said, exactly, in the drain. t counts steps; initial threshold 1 % (ours).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from dlion.blocks import Block, Encoding, block_bytes, dense, sparse
from dlion.exchange.base import Action, Add, Context, Send, Speech, Update
from dlion.exchange.estates import Estates
from dlion.messages import Message, PeerId, Span, Stream
from dlion.selection import nonzero
from dlion.tensors import CHUNK, Flat


class Gaia(Estates):
    """``threshold``: initial significance, relative (0: everything is significant); ``barrier``: the selective one."""

    name = "gaia"
    pace = "bounded"
    paces = ("bounded", "free", "lockstep", "backup")
    speaks: ClassVar[Speech] = {**Estates.speaks, "barrier": {"cloud": str}}

    def __init__(self, *, threshold: float = 0.01, barrier: bool = True) -> None:
        super().__init__()
        if threshold < 0:
            raise ValueError(f"gaia: threshold must be 0 or more, got {threshold}")
        self.threshold = threshold
        self.barrier = barrier
        self._gathered: Flat | None = None
        """Own steps that are not said yet; None: all is said."""
        self._awaited: dict[PeerId, int] = {}
        """Steps of neighbours whose significant updates are announced and not here yet."""

    def after_step(self, update: Update, ctx: Context) -> Iterable[Action]:
        values = update.values
        values *= np.float32(ctx.share)
        self._last[ctx.me] = update.step
        coverage = (Span(ctx.me, update.step, update.step),)
        yield Add(values, coverage=coverage)
        block = self._significant(values, ctx.weights, self.threshold / (update.step + 1) ** 0.5)
        behind = tuple(p for p in ctx.routes.onward(None, ctx.cloud) if self._behind(p, ctx))
        if behind and block.count and self.barrier:
            fields = {"cloud": ctx.cloud}
            yield Send(behind, Message("barrier", update.step, fields=fields, stream=Stream.CONTROL))
        yield from self.spread(block, coverage, ctx)

    def on_message(self, origin: PeerId, message: Message, ctx: Context) -> Iterable[Action]:
        if message.kind == "barrier":
            if message.step > self._last.get(origin, -1):
                self._awaited[origin] = max(message.step, self._awaited.get(origin, -1))
            return
        yield from super().on_message(origin, message, ctx)
        self._awaited = {p: step for p, step in self._awaited.items() if step > self._last.get(p, -1)}

    def on_members(self, ctx: Context) -> Iterable[Action]:
        self._awaited = {p: step for p, step in self._awaited.items() if p in ctx.links}
        return super().on_members(ctx)

    def introduce(
        self, peer: PeerId, sponsor: PeerId | None, life: int, ctx: Context, message: Message | None = None
    ) -> Iterable[Action]:
        self._awaited.pop(peer, None)
        return super().introduce(peer, sponsor, life, ctx, message)

    def ready(self, step: int, ctx: Context) -> bool:
        return not self._awaited

    def drain(self, ctx: Context) -> Iterable[Action]:
        rest, self._gathered = self._gathered, None
        if rest is not None and rest.any():
            yield from self.spread(rest, (), ctx)
        yield from super().drain(ctx)

    def owes(self, ctx: Context) -> bool:
        return (self._gathered is not None and bool(self._gathered.any())) or super().owes(ctx)

    def unsaid(self) -> Flat:
        return super().unsaid() if self._gathered is None else self._gathered

    def state(self) -> dict[str, Any]:
        return {**super().state(), "gathered": self._gathered, "awaited": dict(self._awaited)}

    def restore(self, state: Mapping[str, Any], ctx: Context) -> None:
        super().restore(state, ctx)
        held = state["gathered"]
        self._gathered = None if held is None else np.array(held, dtype=np.float32)
        self._awaited = dict(state["awaited"])

    def _behind(self, peer: PeerId, ctx: Context) -> bool:
        return peer in ctx.links and ctx.links[peer].writable_bytes <= 0

    def _significant(self, values: Flat, weights: Flat, threshold: float) -> Block:
        """Gather ``values``, and take out what has changed by more than ``threshold`` of its value. If that is nearly
        all, the array itself is said: nothing is copied, and nothing kept."""
        gathered = values
        if self._gathered is not None:
            gathered = self._gathered
            gathered += values
        size = gathered.size
        significant = np.empty(size, dtype=np.bool_)
        for lo in range(0, size, CHUNK):
            bound = np.abs(weights[lo : lo + CHUNK])
            bound *= np.float32(threshold)
            np.greater(np.abs(gathered[lo : lo + CHUNK]), bound, out=significant[lo : lo + CHUNK])
        count = int(np.count_nonzero(significant))
        if block_bytes(Encoding.F32, size) <= block_bytes(Encoding.F32, size, count):
            self._gathered = None
            return dense(gathered, copy=False)
        if gathered is values:
            gathered = values.copy()  # what was added may be held back, and must not change
        self._gathered = gathered
        block = sparse(gathered, nonzero(significant, count), Encoding.F32, scanned=size)
        block.add_to(gathered, -1.0)
        return block
