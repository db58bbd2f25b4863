"""Strategies wired back to back: no event loop, no socket, no clock.

Law: the real lane, codec, admission, routes and paces, with queues in memory instead of a network. Everything that
happens is one of a few events (a step, a delivery, a timer), picked by the test or by a seeded generator.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import permutations

import numpy as np

from dlion.exchange.base import Context, Exchange, LinkView, Member, Update
from dlion.exchange.pace import PACES, Pace, Progress
from dlion.items import Barrier, DrainNow, Fired, Heard, Item, MembersChanged, Outcome, Writable
from dlion.lane import Replica
from dlion.mesh.bridges import Plan, plan
from dlion.mesh.topology import LinkSpec, PeerSpec, Talk, Topology
from dlion.messages import PeerId, Stream
from dlion.tensors import Flat, Layout, disagreement
from dlion.testing.watched import Nonconforming, Watched, demand
from dlion.wire.admit import Admit
from dlion.wire.limits import Limits

Make = Callable[[], Exchange]
Learn = Callable[[str, int, Flat], Flat]
"""(peer, step, weights) -> what its trainer hands to the strategy: a local step, or a gradient if it consumes those."""

OPEN_BYTES = 1 << 40
EVENTS_MAX = 100_000
EVENT_S = 0.01
STEP_S = 0.1
RATE_BPS = 1e9
SPEED, SHARD = 640.0, 6400


@dataclass
class Seat:
    """One peer on the bench."""

    name: PeerId
    exchange: Exchange
    """As the test made it."""
    ctx: Context
    weights: Flat
    replica: Replica
    pace: Pace
    step: int = 0
    ready: bool = True
    owes: bool = False
    timers: dict[str, float] = field(default_factory=dict)

    @property
    def view(self) -> Flat:
        """What the peer would save and serve."""
        return self.exchange.view(self.ctx.weights)


class Bench:
    """Peers ``a``, ``b``, ... (or name -> micro-cloud) around one strategy each, made by ``make``.

    ``size``: entries of the model; ``batches``: local batch size per peer (64); ``pace``: unless the strategy's own.
    ``windows[a, b]``: bytes that may be in flight from a to b (unbounded); ``rates_bps[a, b]``: the rate it is told.
    ``speeds[a]``: samples per second that all are told of a (640); ``shards[a]``: samples it has (6400).
    """

    def __init__(
        self,
        make: Make,
        peers: int | Mapping[str, str] = 3,
        *,
        layout: Layout | None = None,
        talk: Talk = "mesh",
        batches: Mapping[str, int] | None = None,
        pace: str | None = None,
        seed: int = 0,
    ) -> None:
        clouds = dict(peers) if isinstance(peers, Mapping) else {chr(97 + i): "A" for i in range(peers)}
        specs = {PeerId(p): PeerSpec(PeerId(p), cloud) for p, cloud in sorted(clouds.items())}
        links = {(a, b): LinkSpec(a, b) for a, b in permutations(specs, 2)}
        self.topology = Topology("bench", specs, links, {}, talk)
        self.layout = layout or Layout(("w", "b"), ((6, 4), (4,)))
        self.batches = {p: (batches or {}).get(p, 64) for p in specs}
        self.windows: dict[tuple[str, str], int] = {}
        self.rates_bps: dict[tuple[str, str], float] = {}
        self.speeds: dict[str, float] = {}
        self.shards: dict[str, int] = {}
        self.now = 0.0
        self.rng = np.random.default_rng(seed)
        self.transcript: list[str] = []
        self.flying: dict[tuple[PeerId, PeerId], list[deque[tuple[int, bytes]]]] = {
            pair: [deque() for _ in Stream] for pair in links
        }
        self.live: dict[PeerId, float] = dict.fromkeys(specs, 1.0)
        self.routes: Plan = plan(self.topology, self.live)
        self._sequence = dict.fromkeys(links, 0)
        self._losses = dict.fromkeys(specs, 1.0)
        draw = np.random.default_rng([seed, 1])  # whole numbers other than 0, for readable transcripts
        start = (draw.integers(1, 5, self.layout.size) * draw.choice((-1, 1), self.layout.size)).astype(np.float32)
        self.seats: dict[PeerId, Seat] = {}
        for i, p in enumerate(specs):
            self.seats[p] = self._seat(p, i, make(), start.copy(), pace)
        for seat in self.seats.values():
            self._handle(seat, MembersChanged())

    def _seat(self, name: PeerId, index: int, exchange: Exchange, weights: Flat, pace: str | None) -> Seat:
        shown = weights.view()
        shown.flags.writeable = False
        rng = np.random.default_rng([7, index])
        routes = self.routes.routes(name)
        ctx = Context(name, self.topology.cloud_of(name), self.layout, shown, rng, routes, step_s=STEP_S)
        self._refresh(ctx)
        watched = Watched(exchange, name, self.transcript)
        size = self.layout.size
        admit = Admit(size, exchange.speaks, blocks=exchange.blocks)
        replica = Replica(watched, ctx, weights, admit, Limits.of(size))
        seat = Seat(name, exchange, ctx, weights, replica, PACES[pace or exchange.pace]())
        if seat.pace.staged:
            replica.stage()
        return seat

    # -- what a test does ------------------------------------------------------------------------------------------

    def may_step(self, peer: str) -> bool:
        """Do the strategy and the pace allow the peer's next local step?"""
        seat = self.seats[PeerId(peer)]
        applied = {p: seat.replica.applied.get(p, -1) for p in self.live if p != seat.name}
        return seat.ready and seat.pace.may_start(seat.step, Progress(seat.step - 1, applied)) != "wait"

    def step(self, peer: str, learn: Learn, loss: float = 1.0) -> None:
        """The peer does one local step."""
        seat = self.seats[PeerId(peer)]
        if seat.pace.staged and seat.step:
            self._handle(seat, Barrier(seat.step - 1))
        values = np.array(learn(peer, seat.step, seat.ctx.weights), dtype=np.float32)
        self._losses[seat.name] = loss
        self.transcript.append(f"{peer}: step {seat.step}")
        seat.step += 1
        self._handle(seat, Update(seat.step - 1, values, loss, self.batches[seat.name], 0.1, STEP_S))

    def deliver(self, source: str, target: str) -> bool:
        """The next message from source to target arrives; False when there is none."""
        pair = PeerId(source), PeerId(target)
        for stream, queue in enumerate(self.flying[pair]):
            if queue:
                before = self.writable_bytes(*pair)
                seq, body = queue.popleft()
                self._handle(self.seats[pair[1]], Heard(pair[0], stream, seq, body))
                if before <= 0 < self.writable_bytes(*pair):
                    self._handle(self.seats[pair[0]], Writable(pair[1]))
                return True
        return False

    def deliver_all(self) -> None:
        """Deliver, in a fixed order of links, until nothing is on its way."""
        for _ in range(EVENTS_MAX):
            if not [1 for pair in self.flying if self.deliver(*pair)]:
                return
        raise Nonconforming("the peers never stop talking")

    def open(self, source: str, target: str, window_bytes: int = OPEN_BYTES) -> None:
        """Let a link that was closed (window 0) take bytes again."""
        self.windows[source, target] = window_bytes
        self._handle(self.seats[PeerId(source)], Writable(PeerId(target)))

    def kill(self, peer: str) -> None:
        """The peer is gone, with all that was on its way from and to it."""
        gone = PeerId(peer)
        del self.live[gone]
        for pair, queues in self.flying.items():
            if gone in pair:
                for queue in queues:
                    queue.clear()
        self.routes = plan(self.topology, self.live, self.routes)
        self.transcript.append(f"{peer}: dies")
        for p in self.live:
            self._handle(self.seats[p], MembersChanged())

    def fire(self, until: float = float("inf")) -> bool:
        """Jump to the next timer; False when there is none up to ``until``."""
        due = [(at, p, key) for p in self.live for key, at in self.seats[p].timers.items() if at <= until]
        if not due:
            return False
        at, peer, key = min(due)
        self.now = max(self.now, at)
        del self.seats[peer].timers[key]
        self._handle(self.seats[peer], Fired(key))
        return True

    def run(self, steps: int, learn: Learn, *, stall: bool = False) -> None:
        """All the living do at least ``steps`` local steps, with deliveries between them in random order.

        Raises Nonconforming when nobody can go on, unless a ``stall`` is expected.
        """
        for _ in range(EVENTS_MAX):
            if self.fire(self.now):
                continue
            waiting = [p for p in self.live if self.seats[p].step < steps]
            able = [p for p in waiting if self.may_step(p)]
            busy = [pair for pair, queues in self.flying.items() if any(queues)]
            if not waiting:
                return
            if not able and not busy:  # those who are done may be waited for
                able = [p for p in self.live if self.may_step(p)]
            pick = int(self.rng.integers(len(able) + len(busy))) if able or busy else -1
            if pick < 0:
                if not self.fire():
                    demand(stall, f"deadlock: {', '.join(waiting)} wait and nothing is on its way")
                    return
            elif pick < len(able):
                self.step(able[pick], learn)
            else:
                self.deliver(*busy[pick - len(able)])
        raise Nonconforming(f"{EVENTS_MAX} events and still not at step {steps}")

    def drain(self) -> None:
        """Training ends everywhere: all that is owed is said and heard."""
        self.deliver_all()
        for p in self.live:
            self._handle(self.seats[p], DrainNow())
        for _ in range(EVENTS_MAX):
            self.deliver_all()
            if self.fire():
                continue
            for p in self.live:
                self._handle(self.seats[p])
            if not any(map(any, self.flying.values())) and not any(self.seats[p].timers for p in self.live):
                break
        for p in self.live:
            self._handle(self.seats[p], Barrier(None))
        owing = [p for p in self.live if self.seats[p].owes]
        demand(not owing, f"after the drain {', '.join(owing)} still owe something")

    def writable_bytes(self, source: PeerId, target: PeerId) -> int:
        queues = self.flying[source, target]
        flying = sum(len(body) for stream in (Stream.UPDATE, Stream.BULK) for _, body in queues[stream])
        return max(0, self.windows.get((source, target), OPEN_BYTES) - flying)

    @property
    def disagreement(self) -> float:
        """Largest distance between what the living would serve, relative."""
        return disagreement({p: self.seats[p].view for p in self.live})

    # -- what the node does ----------------------------------------------------------------------------------------

    def _refresh(self, ctx: Context) -> None:
        """Bring a peer's context up to date, as the node does before each batch of events."""
        me = ctx.me
        ctx.now, ctx.batch, ctx.global_batch = self.now, self.batches[me], sum(self.batches[p] for p in self.live)
        ctx.shard = self.shards.get(me, SHARD)
        steps = {p: self.seats[p].step if p in self.seats else 0 for p in self.live}
        ctx.members = {
            p: Member(
                p, self.topology.cloud_of(p), steps[p], self.speeds.get(p, SPEED), self.batches[p], self._losses[p]
            )
            for p in self.live
        }
        ctx.routes = self.routes.routes(me)
        ctx.links = {
            p: ctx.links.get(p) or LinkView(p, self.topology.cloud_of(p), self.topology.lan(me, p))
            for p in self.routes.neighbours(me)
        }
        for p, link in ctx.links.items():
            link.rate_bps, link.rtt_s = self.rates_bps.get((me, p), RATE_BPS), EVENT_S
            link.writable_bytes = self.writable_bytes(me, p)

    def _handle(self, seat: Seat, *items: Item) -> None:
        self.now += EVENT_S
        self._refresh(seat.ctx)
        outcome = seat.replica.run(list(items), self.now)
        self._do(seat, outcome)
        while outcome.left:
            outcome = seat.replica.run(outcome.left, self.now)
            self._do(seat, outcome)

    def _do(self, seat: Seat, outcome: Outcome) -> None:
        for hop, reason in outcome.refused:
            raise Nonconforming(f"{seat.name} refuses a message of {hop}: {reason} (`speaks` names kinds and fields)")
        seat.ready, seat.owes = outcome.ready, outcome.owes
        seat.timers.update({timer.key: timer.at for timer in outcome.timers})
        for to, body, message, _ in outcome.sends:
            for peer in to:
                demand(peer in seat.ctx.links, f"{seat.name} says something to {peer}, which is no living neighbour")
                self._sequence[seat.name, peer] += 1
                self.flying[seat.name, peer][message.stream].append((self._sequence[seat.name, peer], body))
