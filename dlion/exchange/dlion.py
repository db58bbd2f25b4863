"""``dlion``: weighted updates, a byte budget per link, the largest gradients first, and the weights of the best peer.

Source: Hong & Chandra, "DLion: Decentralized Distributed Deep Learning in Micro-Clouds", HPDC 2021, and "Decentralized
Distributed Deep Learning in Heterogeneous WAN Environments", HotCloud 2019. Its four questions are four small
policies here:

- *when*: as soon as there is news and the link takes it (flow control keeps that to about once per step), bounded
  staleness 5;
- *what*: ``Budget``: BW_ij / Iter_i bytes per message, filled with Max N per tensor, never below a minimum N;
- *whom*: the routes: in the paper everybody in the micro-cloud and one bridge per two micro-clouds, which says the sum
  of its own (``talk = "bridges"``); here everybody, where the topology does not say, for that is faster;
- *how*: ``Weighting`` of updates by batch size, and ``Transfer``: the best peer's weights every P steps.

Differences from the paper. Weighting ``global`` (n · LBS_k / GBS, unbiased and the same on all peers) is the default;
the paper's, as remembered, is ``ratio`` (LBS_k / LBS_j), whose replicas drift. Budgets follow the link's acknowledged
rate, and a full link is owed the sum of what it misses instead of delaying the step. Forwarded updates go on as they
are when they fit the budget. Our choices where the text was not at hand: minimum N 0.85, P 100, L 20, λ 0.75, S 5.
``residual = true`` (error feedback per link: what was not said stays owed) is ours; published DLion drops it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import numpy as np

from dlion.blocks import Block, dense, max_n, sparse
from dlion.exchange.base import Action, Add, Context, LinkView, Send, Speech, Update
from dlion.exchange.estates import Estates
from dlion.exchange.owed import Owed
from dlion.messages import Message, PeerId, Stream

ENVELOPE_BYTES = 64
"""What a message takes beyond its block."""
Weights = Literal["global", "ratio", "none"]
Transfers = Literal["best-to-all", "best-to-worst", "off"]


class DLion(Estates):
    """``transfer_every`` in steps; ``merge`` is λ; ``n_fixed``: send that N whatever it costs (0: fit the budget)."""

    name = "dlion"
    pace = "bounded"
    paces = ("bounded", "lockstep", "backup", "free")
    speaks: ClassVar[Speech] = {**Estates.speaks, "pull": {}, "weights": {}}

    def __init__(
        self,
        *,
        weighting: Weights = "global",
        residual: bool = False,
        n_min: float = 0.85,
        n_fixed: float = 0.0,
        transfer: Transfers = "best-to-all",
        transfer_every: int = 100,
        merge: float = 0.75,
    ) -> None:
        super().__init__()
        self.weighting = Weighting(weighting)
        self.budget = Budget(n_min, n_fixed)
        self.transfer = Transfer(transfer, transfer_every, merge)
        self.keep = residual
        self.consensus = residual and transfer == "off" and weighting != "ratio"

    def weigh(self, update: Update, ctx: Context) -> float:
        return self.weighting.told(ctx)

    def hear(self, ctx: Context) -> float:
        return self.weighting.heard(ctx)

    def say(self, owed: Owed, link: LinkView, ctx: Context) -> Block | None:
        return self.budget.choose(owed, link, ctx)

    def budget_bytes(self, link: LinkView, ctx: Context) -> int:
        return self.budget.bytes(link, ctx)

    def after_step(self, update: Update, ctx: Context) -> Iterable[Action]:
        yield from super().after_step(update, ctx)
        yield from self.transfer.ask(update.step, ctx)

    def on_message(self, origin: PeerId, message: Message, ctx: Context) -> Iterable[Action]:
        if message.kind in ("pull", "weights"):
            return self.transfer.hear(message, ctx)
        return super().on_message(origin, message, ctx)

    def on_members(self, ctx: Context) -> Iterable[Action]:
        self.transfer.forget(ctx)
        return super().on_members(ctx)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "asked": self.transfer.asked}

    def restore(self, state: Mapping[str, Any], ctx: Context) -> None:
        super().restore(state, ctx)
        self.transfer.asked = state["asked"]


class MaxN(DLion):
    """``maxn``: the paper's comparison ("Max10"): one N for all links, whatever they can carry, and no transfer."""

    name = "maxn"

    def __init__(self, *, n: float = 10.0, weighting: Weights = "global", residual: bool = False) -> None:
        super().__init__(n_fixed=n, weighting=weighting, residual=residual, transfer="off")


class Weighting:
    """How much an update counts. w_j += heard_j · Σ_k told_k · u_k with u_k the local step of peer k."""

    def __init__(self, rule: Weights) -> None:
        if rule not in ("global", "ratio", "none"):
            raise ValueError(f"dlion: weighting must be global, ratio or none, got {rule!r}")
        self.rule = rule

    def told(self, ctx: Context) -> float:
        """The sender's factor: (1/n) · n · LBS_k / GBS, (1/n) · LBS_k, or 1/n."""
        if self.rule == "global":
            return ctx.share
        return (max(ctx.batch, 1) if self.rule == "ratio" else 1) / max(len(ctx.members), 1)

    def heard(self, ctx: Context) -> float:
        """The receiver's factor: 1 / LBS_j for ``ratio``, else 1."""
        return 1.0 / max(ctx.batch, 1) if self.rule == "ratio" else 1.0


class Budget:
    """How much of what is owed a message may carry, and which part."""

    def __init__(self, n_min: float, n_fixed: float = 0.0) -> None:
        if not (0 < n_min <= 100 and 0 <= n_fixed <= 100):
            raise ValueError(f"dlion: n_min must lie in (0, 100], n_fixed in [0, 100], got {n_min} and {n_fixed}")
        self.n_min = n_min
        self.n_fixed = n_fixed or None

    def choose(self, owed: Owed, link: LinkView, ctx: Context) -> Block | None:
        """Everything when it fits BW_ij / Iter_i bytes, else Max N; None when nothing new is owed."""
        if not owed.fresh:
            return None
        budget_bytes = self.bytes(link, ctx) - ENVELOPE_BYTES
        if owed.only is not None and owed.only.block.nbytes_max <= budget_bytes and self.n_fixed is None:
            return owed.everything()
        spectrum = owed.spectrum(ctx.layout)
        block, _ = max_n(
            spectrum.array, ctx.layout, budget_bytes, n_min=self.n_min, n_fixed=self.n_fixed, spectrum=spectrum
        )
        return block or sparse(spectrum.array, np.empty(0, dtype=np.intp))

    def bytes(self, link: LinkView, ctx: Context) -> int:
        """BW_ij / Iter_i, or what the link takes now if that is more: a rate that is never exceeded is never found to
        be too low. 0 where N is fixed."""
        return 0 if self.n_fixed else max(int(link.rate_bps * ctx.step_s / 8), link.writable_bytes)


class Transfer:
    """Direct knowledge transfer: every P steps a peer pulls the best one's weights and merges them with its own."""

    def __init__(self, rule: Transfers, every: int, merge: float) -> None:
        if rule not in ("best-to-all", "best-to-worst", "off"):
            raise ValueError(f"dlion: transfer must be best-to-all, best-to-worst or off, got {rule!r}")
        if every < 1 or not 0 < merge <= 1:
            raise ValueError(f"dlion: transfer_every must be at least 1, merge in (0, 1], got {every} and {merge}")
        self.rule = rule
        self.every = every
        self.merge = merge
        self.asked: PeerId | None = None
        """Whose weights are on the way to us."""

    def ask(self, step: int, ctx: Context) -> Iterator[Action]:
        """Every P steps: ask the best neighbour for its weights, unless it is us or an answer is still on its way."""
        if self.rule == "off" or (step + 1) % self.every or self.asked is not None:
            return
        losses = {peer: m.loss for peer, m in ctx.members.items() if peer == ctx.me or peer in ctx.links}
        best = min(losses, key=lambda peer: (losses[peer], peer))
        worst = max(losses, key=lambda peer: (losses[peer], peer))
        if best != ctx.me and (self.rule == "best-to-all" or worst == ctx.me):
            self.asked = best
            yield Send((best,), Message("pull", ctx.step, stream=Stream.CONTROL))

    def hear(self, message: Message, ctx: Context) -> Iterator[Action]:
        if message.kind == "pull":
            weights = Message("weights", ctx.step, blocks=(dense(ctx.weights),), stream=Stream.BULK)
            yield Send((message.hop,), weights)
        elif message.hop == self.asked:
            self.asked = None
            for block in message.blocks:
                towards = block.values - ctx.weights[block.start : block.start + block.size]
                yield Add(dense(towards, start=block.start), self.merge, message=message)

    def forget(self, ctx: Context) -> None:
        if self.asked not in ctx.links:
            self.asked = None
