"""``pride``: small messages without pause, each link owed what it misses, the others assumed to move as we do.

Ours. What it takes from others: updates weighed by batch share, a byte budget per link, bridges (DLion); error feedback
per link, so that sent + residual = all updates and replicas cannot drift apart (as in Deep Gradient Compression, Lin et
al., ICLR 2018); four bits a value (as in Streaming DiLoCo). What holds it together:

- *Rounding is done once.* A step is rounded for all; what rounding leaves goes into the next. A link that keeps up is
  told the same bytes as all others, and needs no account. Where steps are so short that lanes could not keep up,
  several are rounded as one.
- *Staleness costs more than imprecision.* A link that does not keep up is told all that it is owed, in the finest
  numbers that leave within ``period_s``, else the largest entries, whenever it can take something. Nobody waits.
- *Speculation.* What a neighbour does reaches us late. Until then we assume, from the first step on, that it moves as
  we do, in proportion to its speed, and take that back when its word of that time arrives. Own steps are kept for
  this, at most ``trust_steps`` of them: who is silent for longer is no longer guessed.
- *Foresight.* A part of a whole step in the direction of our last is assumed once more until the next, whatever the
  others have said: gradients are taken where we shall be (as in Nesterov's method; Sutskever et al., ICML 2013).
- *Slices.* A step's gradient is taken in several, each where we are by then: with what was heard meanwhile, and with
  what the slices before it make of the step, for the others as for us.
- *Estates.* What a dead peer had told some and not others is settled in the drain: the first of those who heard it
  tells the rest what it had heard in all (``estates``). (A neighbour
  costs two arrays of the model's size: owed, and heard.)
- *The consensus view*, the replica without what is only assumed, is what is evaluated, saved and served.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dlion.blocks import Block, Encoding, block_bytes, compress, dense
from dlion.exchange.base import Action, Add, Context, LinkView, Member, Timer, Update
from dlion.exchange.estates import Estates
from dlion.exchange.owed import Owed, Piece, exact
from dlion.exchange.spread import Account
from dlion.messages import Message, PeerId, Span
from dlion.tensors import Flat, add_scaled

ENVELOPE_BYTES, SPAN_BYTES = 96, 16
"""What a message takes beyond its block, at most; and for each span, beyond its name."""
LANE_SHARE = 0.2
"""Most of a core that the exchange lane may take if all say as much as we do. No step waits longer than half of those
that are trusted."""
SAY_AS_HEAR = 2.4
"""What saying something to all costs a lane, in messages heard (``scripts/bench_exchange.py``: 2.2 to 2.7)."""
ECHO_PER_SAMPLE = 16.0
"""Most others, in our weighed steps, that each sample of an own step may stand for: one says little of them."""
SUMMED_PER_STEP = 64
"""Speeds of others added up for each step, at most."""
ENCODINGS: Mapping[int, Encoding] = {32: Encoding.F32, 16: Encoding.F16, 8: Encoding.I8, 4: Encoding.I4}


@dataclass
class Assumed:
    """An own step, done at ``at``, that others were assumed to do too: ``factors`` by whom we shall hear of theirs, and
    our own foresight."""

    at: float
    values: Flat
    factors: dict[Account, float]

    @property
    def total(self) -> float:
        return sum(self.factors.values())


class Pauses:
    """How long the exchange lane needs from one of our words to the next: for saying it, and for hearing as much from
    each neighbour."""

    def __init__(self) -> None:
        self.pause_s = 0.0
        self.heard = 0
        """Messages, since we last said something."""
        self._worked_s = 0.0
        self._hear_s = deque[float](maxlen=3)
        """What hearing a message cost lately."""

    def said(self, ctx: Context, most_s: float) -> None:
        self._hear_s.append((ctx.lane_s - self._worked_s) / (SAY_AS_HEAR + self.heard))
        self._worked_s, self.heard = ctx.lane_s, 0
        if len(self._hear_s) == 3:  # the middle one: a lane has other things to do, too
            lane_s = sorted(self._hear_s)[1] * (SAY_AS_HEAR + len(ctx.links))
            self.pause_s = min(lane_s / LANE_SHARE, most_s)


class Pride(Estates):
    """``period_s``: how long a message may keep a link busy; ``bits`` of a value at the finest; ``speculation``: how
    much of the others' moves to assume, and ``foresight``: of a whole step to be ahead, 0 to 1; ``slices`` of a step's
    gradient, at most."""

    name = "pride"
    paces: ClassVar[tuple[str, ...]] = ("free", "bounded")
    bridged = True

    def __init__(
        self,
        *,
        period_s: float = 0.15,
        bits: int = 4,
        speculation: float = 1.0,
        foresight: float = 0.25,
        slices: int = 4,
        trust_steps: int = 8,
    ) -> None:
        super().__init__()
        if period_s <= 0 or not 0 <= speculation <= 1 or trust_steps < 1:
            raise ValueError(
                "pride: expected period_s > 0, speculation in [0, 1] and trust_steps >= 1, "
                f"got {period_s}, {speculation} and {trust_steps}"
            )
        if not 0 <= foresight <= 1:
            raise ValueError(f"pride: foresight must be in [0, 1], got {foresight}")
        if slices < 1:
            raise ValueError(f"pride: slices must be at least 1, got {slices}")
        if bits not in ENCODINGS:
            raise ValueError(f"pride: bits must be one of {tuple(ENCODINGS)}, got {bits}")
        self.period_s = period_s
        self.ladder = tuple(encoding for b, encoding in ENCODINGS.items() if b <= bits)
        self.speculation, self.foresight, self.slices = speculation, foresight, slices
        self.trust_steps = trust_steps
        self._assumed: deque[Assumed] = deque()
        self._summed_at, self._speeds = 0, dict[Account, float]()
        self._via: dict[PeerId, Account] = {}
        """By whom we hear of each peer's steps."""
        self._heard_at: dict[Account, float] = {}
        self._draining = False
        self._unsaid_from: int | None = None
        """The first own step that is in ``_rest`` as a whole."""
        self._pauses, self._say_at = Pauses(), 0.0
        """Earlier than that lanes would have too much to do."""

    # -- hooks ---------------------------------------------------------------------------------------------------

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._rest = np.zeros(self._size, dtype=np.float32)

    def after_step(self, update: Update, ctx: Context) -> Iterable[Action]:
        """Add the own step; then round it for all who must hear of it, and say it, unless we did so just before."""
        values = update.values
        if ctx.share != 1.0:
            values *= np.float32(ctx.share)
        self._last[ctx.me] = update.step
        oldest_s = ctx.now - self.trust_steps * ctx.step_s
        while self._assumed and (len(self._assumed) >= self.trust_steps or self._assumed[0].at < oldest_s):
            yield self._drop()
        yield from self._take_back(mine := (ctx.me, ctx.cloud), until_s=ctx.now)
        assumed, told = Assumed(ctx.now, values, self._factors(ctx)), self._told(ctx)
        self.reach = ctx.share * (1.0 + assumed.total)
        if self.foresight and told:
            assumed.factors[mine] = self.foresight * min(1.0 / ctx.share, ECHO_PER_SAMPLE * max(ctx.batch, 1))
        if assumed.factors:
            self._assumed.append(assumed)
        yield Add(values, 1.0 + assumed.total, (Span(ctx.me, update.step, update.step),))
        if not told:
            return
        self._rest += values
        if self._unsaid_from is None:
            self._unsaid_from = update.step
        yield from self.on_timer("say", ctx)

    def _unsaid_steps(self, ctx: Context) -> tuple[Span, ...]:
        first, self._unsaid_from = self._unsaid_from, None
        return () if first is None else (Span(ctx.me, first, self._last[ctx.me]),)

    def _round(self, ctx: Context) -> None:
        """Own steps become a message to all."""
        self._pauses.said(ctx, self.trust_steps * ctx.step_s / 2)
        self._say_at = ctx.now + self._pauses.pause_s
        block = dense(self._rest, self.ladder[0])
        block.add_to(self._rest, -1.0)
        self._owe(block, self._unsaid_steps(ctx), ctx)

    @staticmethod
    def _told(ctx: Context) -> list[PeerId]:
        """Who must hear our updates from us."""
        return [peer for peer in ctx.routes.onward(None, ctx.cloud) if peer in ctx.links or peer in ctx.silent]

    def _owe(self, block: Block, coverage: tuple[Span, ...], ctx: Context) -> None:
        piece = Piece(block, ctx.me, ctx.layout.size)
        for peer in self._told(ctx):
            self._account(peer, ctx.cloud, ctx).add(piece, coverage)

    def on_timer(self, key: str, ctx: Context) -> Iterable[Action]:
        if self._draining:
            return
        if self._unsaid_from is not None and ctx.now >= self._say_at:
            self._round(ctx)
        yield from self._tell(list(self.owed), ctx)
        if self._unsaid_from is not None:
            yield Timer(self._say_at, "say")

    def on_message(self, origin: PeerId, message: Message, ctx: Context) -> Iterable[Action]:
        yield from super().on_message(origin, message, ctx)
        self._pauses.heard += 1
        link = ctx.links.get(message.hop)
        if link is None or not message.coverage:
            return
        key = (message.hop, str(message.fields["cloud"]) if link.cloud == ctx.cloud else ctx.cloud)
        self._heard_at[key] = ctx.now
        for span in message.coverage:
            self._via[span.origin] = key
        travelled_s = link.rtt_s / 2
        if link.rate_bps:
            travelled_s += 8 * sum(block.nbytes_max for block in message.blocks) / link.rate_bps
        yield from self._take_back(key, until_s=ctx.now - travelled_s + ctx.step_s / 2)  # the nearest of our steps

    def on_members(self, ctx: Context) -> Iterable[Action]:
        self._via = {p: key for p, key in self._via.items() if p in ctx.members and key[0] in ctx.links}
        for key in sorted({key for a in self._assumed for key in a.factors} - set(self._via.values())):
            yield from self._take_back(key, until_s=ctx.now)
        yield from super().on_members(ctx)

    def view(self, weights: Flat) -> Flat:
        return self.part(weights, slice(None)) if self._assumed else weights

    def part(self, weights: Flat, here: slice) -> Flat:
        part = weights[here].copy()
        for a in self._assumed:
            add_scaled(part, a.values[here], -a.total)
        return part

    def drain(self, ctx: Context) -> Iterable[Action]:
        """Nothing is assumed any more, and everything that is owed is said exactly."""
        self._draining = True
        while self._assumed:
            yield self._drop()
        if self._rest.any():
            self._owe(exact(self._rest), self._unsaid_steps(ctx), ctx)
            self._rest = np.zeros_like(self._rest)
        yield from self.settle(ctx)
        yield from self._tell(list(self.owed), ctx, everything=True)

    def unsaid(self) -> Flat:
        return self._rest

    def owes(self, ctx: Context) -> bool:
        return bool(self._rest.any()) or super().owes(ctx)

    def state(self) -> dict[str, Any]:
        assumed = self.view(np.zeros(self._size, dtype=np.float32))
        mine = {"rest": self._rest, "unsaid_from": self._unsaid_from}
        return {**super().state(), **mine, **({"assumed": -assumed} if self._assumed else {})}

    def restore(self, state: Mapping[str, Any], ctx: Context) -> None:
        """What was assumed is taken back as if of somebody who left."""
        super().restore(state, ctx)
        self._rest = np.array(state["rest"], dtype=np.float32)
        self._unsaid_from = state["unsaid_from"]
        if "assumed" in state:
            values = np.array(state["assumed"], dtype=np.float32)
            self._assumed.append(Assumed(-np.inf, values, {(PeerId(""), ""): 1.0}))

    # -- what to say ---------------------------------------------------------------------------------------------

    def say(self, owed: Owed, link: LinkView, ctx: Context) -> Block | None:
        """All that is owed when it fits in some encoding, else its largest entries. None: nothing new, or too poor."""
        if self._draining:
            return owed.everything()
        if not owed.unsaid:
            return None
        spans_bytes = sum(SPAN_BYTES + len(span.origin) for span in owed.coverage)
        budget_bytes = self.budget_bytes(link, ctx) - ENVELOPE_BYTES - spans_bytes
        latest = owed.latest.values if owed.latest is not None else None
        if isinstance(latest, Block) and latest.nbytes_max <= budget_bytes:
            return latest
        for encoding in self.ladder:
            if block_bytes(encoding, ctx.layout.size) <= budget_bytes:
                return dense(owed.flat, encoding)
        return compress(owed.flat, budget_bytes)

    def budget_bytes(self, link: LinkView, ctx: Context) -> int:
        """What the link carries in a period (longer where the lane could not keep up), or its window if larger."""
        return max(int(link.rate_bps * max(self.period_s, self._pauses.pause_s) / 8), link.writable_bytes)

    # -- what to assume ------------------------------------------------------------------------------------------

    def _factors(self, ctx: Context) -> dict[Account, float]:
        """What the others are assumed to do while we do one step, in our weighed steps, by whom we hear of it; all
        together no more than makes a whole local step of ours, nor than our samples can speak for."""
        factors = dict[Account, float]()
        if not self.speculation:
            return factors
        for key, speed in self._speeds_beyond(ctx).items():
            trusted = ctx.now - self._heard_at.setdefault(key, ctx.now) <= self.trust_steps * ctx.step_s
            if trusted and key[0] in ctx.links:
                factors[key] = self.speculation * speed
        most = min(max(1.0 / ctx.share - 1.0, 0.0), ECHO_PER_SAMPLE * max(ctx.batch, 1))
        scale = min(1.0, most / max(sum(factors.values()), most, 1e-9))
        return {key: scale * factor for key, factor in factors.items()}

    def _speeds_beyond(self, ctx: Context) -> dict[Account, float]:
        """How fast all those move together of whom we hear by each account; of very many peers not summed anew at
        every step."""
        if ctx.step >= self._summed_at + len(ctx.members) // SUMMED_PER_STEP:
            self._summed_at, self._speeds = ctx.step, {}
            for peer, member in ctx.members.items():
                key = self._via.get(peer, (peer, ctx.cloud))
                if peer != ctx.me and key[0] in ctx.links:
                    self._speeds[key] = self._speeds.get(key, 0.0) + self._speed(member, ctx)
        return self._speeds

    @staticmethod
    def _speed(member: Member, ctx: Context) -> float:
        """How fast a peer moves, ourselves being 1; until both are known, as its batch tells."""
        mine = ctx.members[ctx.me].samples_per_s
        if mine and member.samples_per_s:
            return member.samples_per_s / mine
        return ctx.share_of(member.peer) / ctx.share

    def _drop(self) -> Add:
        """The oldest assumption is given up."""
        old = self._assumed.popleft()
        return Add(old.values, -old.total)

    def _take_back(self, key: Account, until_s: float) -> Iterator[Add]:
        """What was assumed until then of those we hear of by ``key`` is no guess any more."""
        for a in self._assumed:
            if a.at <= until_s and (factor := a.factors.pop(key, 0.0)):
                yield Add(a.values, -factor)
        while self._assumed and not self._assumed[0].factors:
            self._assumed.popleft()
