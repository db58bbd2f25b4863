"""``hop``: every step the mean of the neighbours' weights, then the own step; slow neighbours are not waited for.

Source: Luo, Lin, Zhuo & Qian, "Hop: Heterogeneity-aware Decentralized Training", ASPLOS 2019. x_{k+1} = mean of x_k
over the neighbourhood + own step at x_k. Update queues tagged by iteration; backup workers: reduce when all but
``backup`` neighbours are there; bounded staleness: weights of iteration u >= k - s count, with weight u - (k - s) + 1;
tokens bound how far neighbours run apart (here the ``bounded`` pace). Skipping: who is behind all its neighbours
renews its weights with theirs of a later iteration, adds its own step, and goes on from there.

Differences from the paper. When a link has been full only the newest weights are said; a neighbour that misses x_k for
that reason takes the next one that comes. Coverage tells whose iterations have come through to a peer, however far
away, so that the pace sees everybody; skipped ones count as done. Where not everybody talks to everybody, who has said
nothing for a while says that alone, or all might wait for what another knows. Defaults backup 1, s 5, at most 10
iterations skipped at a time as in the paper's experiments, as far as remembered; that two behind is far behind is our
choice. Means are plain, whatever the batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from dlion.blocks import Block, dense
from dlion.exchange.base import Action, Add, Context, Exchange, LinkView, Send, Speech, Timer, Update
from dlion.messages import Message, PeerId, Span, Stream
from dlion.tensors import Flat

NEWS_STEPS, FIRST_STEP_S = 2.0, 1.0
"""Who has said nothing for so many of its steps says what it knows of others; what a step takes until that is known."""


class Hop(Exchange):
    """``backup``: neighbours not waited for; ``staleness``: s, in iterations; ``skip``: most at a time (0: none)."""

    name = "hop"
    pace = "bounded"
    paces = ("bounded", "free", "backup")
    newcomers = True
    speaks: ClassVar[Speech] = {"weights": {}, "news": {}}
    blocks: ClassVar[Mapping[str, int]] = {"weights": 1, "news": 0}

    def __init__(self, *, backup: int = 1, staleness: int = 5, skip: int = 10) -> None:
        if min(backup, staleness, skip) < 0:
            raise ValueError(f"hop: backup, staleness and skip must be 0 or more, got {backup}, {staleness} and {skip}")
        self.backup, self.staleness, self.skip = backup, staleness, skip
        self._next = 0
        """Iterations reduced or skipped: the replica is x of this number."""
        self._skipped = 0
        self._stepped = False
        self._queue: dict[PeerId, dict[int, Block]] = {}
        """Weights heard of each neighbour, by iteration; those too old to count are dropped."""
        self._last: dict[PeerId, int] = {}
        self._unsaid: set[PeerId] = set()
        self._told: tuple[Span, ...] = ()
        """What we told all neighbours last of whose iterations have come through, ..."""
        self._said_s = 0.0
        """... and when."""
        self._timed = False
        """Is a time set to look whether there is more to tell?"""

    def setup(self, ctx: Context) -> None:
        self._mine = dense(ctx.weights)
        self._start = self._mine

    def after_step(self, update: Update, ctx: Context) -> Iterable[Action]:
        self._last[ctx.me] = update.step + self._skipped
        self._stepped = True
        yield Add(update.values, coverage=(Span(ctx.me, update.step, update.step),))
        yield from self._reduce(ctx)

    def on_message(self, origin: PeerId, message: Message, ctx: Context) -> Iterable[Action]:
        for peer, _, last in message.coverage:
            self._last[peer] = max(last, self._last.get(peer, -1))
        if message.kind == "weights":
            self._queue.setdefault(origin, {0: self._start})[message.epoch] = message.blocks[0]
            yield from self._reduce(ctx)
        if not ctx.routes.mesh and not self._timed:
            yield self._news_at(ctx.now, ctx)

    def on_writable(self, link: LinkView, ctx: Context) -> Iterable[Action]:
        return self._say([link.peer] if link.peer in self._unsaid else [], ctx)

    def on_timer(self, key: str, ctx: Context) -> Iterable[Action]:
        """Say what we know of others, if that is new and we have said nothing for a while."""
        self._timed = False
        if self._heard == self._told or not ctx.links:
            return
        if ctx.now < self._said_s + self._patience_s(ctx):
            yield self._news_at(self._said_s, ctx)
            return
        self._told = self._heard
        yield Send(tuple(ctx.links), Message("news", ctx.step, self._next, coverage=self._told, stream=Stream.CONTROL))

    def _news_at(self, since_s: float, ctx: Context) -> Timer:
        self._timed = True
        return Timer(since_s + self._patience_s(ctx), "news")

    def _patience_s(self, ctx: Context) -> float:
        return NEWS_STEPS * (ctx.step_s or FIRST_STEP_S)

    def on_members(self, ctx: Context) -> Iterable[Action]:
        self._queue = {peer: queue for peer, queue in self._queue.items() if peer in ctx.links}
        fresh = [peer for peer in ctx.links if peer not in self._queue and self._next]
        self._unsaid = self._unsaid & set(ctx.links) | set(fresh)
        yield from self._say(fresh, ctx)
        yield from self._reduce(ctx)

    def ready(self, step: int, ctx: Context) -> bool:
        return not self._stepped

    def _reduce(self, ctx: Context) -> Iterator[Action]:
        """x_{k+1} = mean of x_k + own step, once enough neighbours' weights are here."""
        if not self._stepped:
            return
        queues = {peer: self._queue.setdefault(peer, {0: self._start}) for peer in ctx.links}
        skipped = self._far_behind(queues)
        current = self._next + skipped
        oldest = current - self.staleness
        usable: list[tuple[int, Block]] = []
        for queue in queues.values():
            for iteration in [i for i in queue if i < oldest]:
                del queue[iteration]
            if queue:
                best = max((i for i in queue if i <= current), default=min(queue))
                usable.append((min(best, current), queue[best]))
        if len(usable) < len(ctx.links) - self.backup:
            return
        if self._next >= oldest:
            usable.insert(0, (self._next, self._mine))
        weights = [iteration - oldest + 1 for iteration, _ in usable]
        change = np.zeros(ctx.layout.size, dtype=np.float32)
        for weight, (_, block) in zip(weights, usable, strict=True):
            block.add_to(change, weight / sum(weights))
        self._mine.add_to(change, -1.0)
        self._stepped = False
        self._next = current + 1
        for queue in queues.values():  # what is older than the newest that counted will not count again
            newest = max((i for i in queue if i <= current), default=0)
            for iteration in [i for i in queue if i < newest]:
                del queue[iteration]
        self._skipped += skipped
        self._last[ctx.me] += skipped
        yield Add(change)
        self._mine = dense(ctx.weights)
        self._unsaid = set(ctx.links)
        yield from self._say(list(ctx.links), ctx)

    def _far_behind(self, queues: Mapping[PeerId, Mapping[int, Block]]) -> int:
        """How many iterations to skip: two or more behind all neighbours, to the slowest of them."""
        behind = min((max(queue, default=0) for queue in queues.values()), default=0) - self._next
        return min(behind, self.skip) if behind >= 2 else 0

    def _say(self, peers: list[PeerId], ctx: Context) -> Iterator[Action]:
        """Our newest weights, to those whose links take them."""
        to = tuple(p for p in peers if ctx.links[p].writable_bytes > 0)
        if to:
            self._unsaid -= set(to)
            heard = self._heard
            if len(to) == len(ctx.links):
                self._told, self._said_s = heard, ctx.now
            yield Send(to, Message("weights", ctx.step, self._next, blocks=(self._mine,), coverage=heard))

    @property
    def _heard(self) -> tuple[Span, ...]:
        """Whose iterations have come through to us, and to which."""
        return tuple(Span(p, last, last) for p, last in sorted(self._last.items()))

    # -- newcomers -----------------------------------------------------------------------------------------------

    def introduce(
        self, peer: PeerId, sponsor: PeerId | None, life: int, ctx: Context, message: Message | None = None
    ) -> Iterable[Action]:
        self._queue.pop(peer, None)
        self._last.pop(peer, None)
        return ()

    def bequeath(self, peer: PeerId, ctx: Context) -> dict[str, Flat]:
        """The weights, and which iteration's they are."""
        return {f"{self._next} {ctx.step}": self._mine.values.copy()}

    def inherit(self, sponsor: PeerId, bequest: Mapping[str, Flat], ctx: Context) -> None:
        """Our next step is of our sponsor's iteration."""
        try:
            ((name, weights),) = bequest.items()
            self._next, step = map(int, name.split(" "))
        except ValueError as error:
            raise ValueError("it does not say of which iteration it is") from error
        self._skipped = self._next - step
        self._mine = dense(weights)
        self._queue, self._last = {}, {}

    # -- snapshots -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        queues = {peer: dict(queue) for peer, queue in self._queue.items()}
        told: dict[str, Any] = {"last": dict(self._last), "unsaid": set(self._unsaid)}
        told |= {"told": [tuple(span) for span in self._told], "said_s": self._said_s, "timed": self._timed}
        blocks = {"start": self._start, "mine": self._mine, "queues": queues}
        return {"next": self._next, "skipped": self._skipped, "stepped": self._stepped, **blocks, **told}

    def restore(self, state: Mapping[str, Any], ctx: Context) -> None:
        self._next, self._skipped, self._stepped = int(state["next"]), int(state["skipped"]), bool(state["stepped"])
        self._start, self._mine = state["start"], state["mine"]
        self._last, self._unsaid = dict(state["last"]), set(state["unsaid"])
        self._told = tuple(Span(*span) for span in state["told"])
        self._said_s, self._timed = float(state["said_s"]), bool(state["timed"])
        self._queue = {PeerId(peer): dict(queue) for peer, queue in state["queues"].items()}
