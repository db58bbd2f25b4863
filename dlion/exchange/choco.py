"""``choco``: gossip on compressed differences to public copies; converges under any compression.

Source: Koloskova, Stich & Jaggi, "Decentralized Stochastic Optimization and Gossip Algorithms with Compressed
Communication" (CHOCO-SGD), ICML 2019. Every peer keeps a public copy x̂ of itself and of each neighbour. Each step: the
own step; q = C(x - x̂_i) is said and added to x̂_i everywhere; then x += γ Σ_j w_ij (x̂_j - x̂_i), with w_ij = 1 / n.

Differences from the paper. Without a barrier: x̂_j is as new as what was heard. C is top-k with 8-bit values. A link
that is full is owed the sum of the q it misses. Our choices: density 5 %, plain equal weights, and γ = 0.1: what a peer
knows of the others is late by about 1 / density steps, so that with 0.5 replicas part until they diverge.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from dlion.blocks import Block, Encoding, block_bytes, compress
from dlion.exchange.base import Action, Add, Context, Exchange, LinkView, Send, Speech, Update
from dlion.exchange.owed import Owed, Piece
from dlion.messages import Message, PeerId, Span
from dlion.tensors import Flat, add_scaled


class Choco(Exchange):
    """``density``: part of the entries said per step; ``gossip``: γ, the step towards the neighbours."""

    name = "choco"
    pace = "free"
    paces = ("free", "bounded", "backup")
    newcomers = True
    speaks: ClassVar[Speech] = {"difference": {}}
    blocks: ClassVar[Mapping[str, int]] = {"difference": 1}

    def __init__(self, *, density: float = 0.05, gossip: float = 0.1) -> None:
        if not 0 < density <= 1 or not 0 < gossip <= 1:
            raise ValueError(f"choco: density and gossip must lie in (0, 1], got {density} and {gossip}")
        self.density, self.gossip = density, gossip
        self._public: dict[PeerId, Flat] = {}
        """How far the public copy of each neighbour, and our own, is from the initial weights."""
        self._owed: dict[PeerId, Owed] = {}
        self._last: dict[PeerId, int] = {}
        self._unheard: set[PeerId] = set()
        """Neighbours met under way, whose public copies are not here yet."""

    def setup(self, ctx: Context) -> None:
        self._start = ctx.weights.copy()
        self._work = np.empty_like(self._start)  # what is added from it is added at once: no pace of ours holds it back
        self._public[ctx.me] = np.zeros_like(self._start)
        self._greet(ctx)

    def after_step(self, update: Update, ctx: Context) -> Iterable[Action]:
        self._last[ctx.me] = update.step
        self._greet(ctx)
        yield Add(update.values, coverage=(Span(ctx.me, update.step, update.step),))
        mine = self._public[ctx.me]
        difference = np.subtract(ctx.weights, self._start, out=self._work)
        difference -= mine
        count = max(1, round(self.density * difference.size))
        block = compress(difference, block_bytes(Encoding.I8, difference.size, count))
        if block is not None:
            block.add_to(mine)
            piece = Piece(block, ctx.me, ctx.layout.size)
            coverage = tuple(Span(p, last, last) for p, last in sorted(self._last.items()))
            for peer in ctx.links:
                self._owed[peer].add(piece, coverage)
            yield from self._say(ctx)
        yield Add(self._towards_neighbours(ctx))

    def on_message(self, origin: PeerId, message: Message, ctx: Context) -> Iterable[Action]:
        for peer, _, last in message.coverage:
            self._last[peer] = max(last, self._last.get(peer, -1))
        if origin in self._public:
            self._unheard.discard(origin)
            message.blocks[0].add_to(self._public[origin])
        return ()

    def on_writable(self, link: LinkView, ctx: Context) -> Iterable[Action]:
        return self._say(ctx)

    def on_members(self, ctx: Context) -> Iterable[Action]:
        for known in (self._public, self._owed):
            for peer in [p for p in known if p not in ctx.links and p != ctx.me]:
                del known[peer]
        self._unheard &= ctx.links.keys()
        self._greet(ctx)
        return self._say(ctx)

    def _greet(self, ctx: Context) -> None:
        """A new neighbour knows only the initial weights: it is owed our whole public copy."""
        for peer in ctx.links:
            if peer not in self._public:
                if self._public[ctx.me].any():
                    self._unheard.add(peer)
                self._public[peer] = np.zeros_like(self._start)
                self._owed[peer] = Owed(ctx.layout.size)
                if self._public[ctx.me].any():
                    self._owed[peer].add(Piece(self._public[ctx.me].copy(), ctx.me, ctx.layout.size))

    def _say(self, ctx: Context) -> Iterator[Action]:
        """What each neighbour is owed, exactly, so that its copy of us is our own; the same to many is one Send."""
        sends: dict[tuple[int, tuple[Span, ...]], tuple[Block, list[PeerId]]] = {}
        for peer, link in ctx.links.items():
            if link.writable_bytes > 0 and self._owed[peer]:
                block = self._owed[peer].everything()
                sends.setdefault((id(block), self._owed[peer].said(block)), (block, []))[1].append(peer)
        for (_, coverage), (block, to) in sends.items():
            yield Send(tuple(to), Message("difference", ctx.step, blocks=(block,), coverage=coverage))

    def _towards_neighbours(self, ctx: Context) -> Flat:
        change = self._work
        change[:] = 0
        part = self.gossip / (len(ctx.links) + 1)
        heard = [peer for peer in ctx.links if peer not in self._unheard]
        for peer in heard:
            add_scaled(change, self._public[peer], part)
        add_scaled(change, self._public[ctx.me], -part * len(heard))
        return change

    def introduce(
        self, peer: PeerId, sponsor: PeerId | None, life: int, ctx: Context, message: Message | None = None
    ) -> Iterable[Action]:
        for known in (self._public, self._owed, self._last):
            known.pop(peer, None)
        return ()

    def inherit(self, sponsor: PeerId, bequest: Mapping[str, Flat], ctx: Context) -> None:
        """Our public copy is what we begin with, and every neighbour is owed it as a whole."""
        self._public = {ctx.me: bequest[""] - self._start}
        self._owed, self._last = {}, {}

    def state(self) -> dict[str, Any]:
        public = {f"public/{peer}": copy for peer, copy in self._public.items()}
        owed = {peer: owed.state() for peer, owed in self._owed.items()}
        return {"start": self._start, **public, "owed": owed, "last": dict(self._last), "unheard": set(self._unheard)}

    def restore(self, state: Mapping[str, Any], ctx: Context) -> None:
        self._start = np.array(state["start"], dtype=np.float32)
        for name, value in state.items():
            kind, _, peer = name.partition("/")
            if kind == "public":
                self._public[PeerId(peer)] = np.array(value, dtype=np.float32)
        self._owed = {PeerId(peer): Owed.of(ctx.layout.size, ctx.me, held) for peer, held in state["owed"].items()}
        self._last, self._unheard = dict(state["last"]), set(state["unheard"])
