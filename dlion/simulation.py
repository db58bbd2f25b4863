"""The same Node on a virtual clock, all peers of a topology in one process.

Law: provides the four seams in their simulated form (loop, links, compute, seed) and nothing else; there is no second
implementation of anything. Real gradients, modelled durations.
"""

from __future__ import annotations

import asyncio
import gc
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import TypeVar
from weakref import WeakValueDictionary

from dlion import clock
from dlion.compute import Lane
from dlion.mesh.topology import Topology
from dlion.messages import PeerId
from dlion.net.link import Link, LinkError
from dlion.net.pipe import pipe
from dlion.net.shaped import Bottleneck, Route
from dlion.node import Node
from dlion.porch import NotShownIn
from dlion.tensors import Flat

T = TypeVar("T")

NEW_OBJECTS = 50_000
"""Made and not freed before the collector looks at them."""
WATCH_S = 120.0
"""Virtual seconds in which a run must move: no step of anybody and no update before training is over is a deadlock."""


class ModelledCompute:
    """Jobs run at once, in the loop; then their modelled duration passes. One job at a time per lane."""

    overrun = late_s = 0.0

    def __init__(self) -> None:
        self._free_at = dict.fromkeys(Lane, 0.0)
        self.exchange_s = 0.0

    async def run(self, lane: Lane, job: Callable[[], T], cost_s: Callable[[T], float]) -> T:
        loop = asyncio.get_running_loop()
        result = job()
        now = loop.time()
        seconds = cost_s(result)
        if lane is Lane.EXCHANGE:
            self.exchange_s += seconds
        end = max(now, self._free_at[lane]) + seconds
        self._free_at[lane] = end
        if end > now:
            done = loop.create_future()
            timer = loop.call_at(end, done.set_result, None)
            try:
                await done
            finally:
                timer.cancel()
        return result

    def close(self) -> None:
        pass


class MemoryNetwork:
    """Pipes between the nodes of one process, shaped as the topology says. Shared resources are shared here too."""

    def __init__(self, topology: Topology) -> None:
        self.doors: dict[PeerId, Callable[[Link], None]] = {}
        bottlenecks = {name: Bottleneck(resource.rate) for name, resource in topology.resources.items()}
        self.routes = {
            ends: Route(tuple(bottlenecks[r] for r in link.resources), link.way_s, link.up)
            for ends, link in topology.links.items()
        }
        self._ends: defaultdict[PeerId, WeakValueDictionary[int, Link]] = defaultdict(WeakValueDictionary)
        """Each peer's ends of its links, by number."""
        self._number = count()

    def join(self, me: PeerId, other: PeerId) -> Link:
        """A new link from ``me`` to the door of ``other``."""
        mine, theirs = pipe()
        mine, theirs = self.routes[me, other].shape(mine), self.routes[other, me].shape(theirs)
        number = next(self._number)
        self._ends[me][number], self._ends[other][number] = mine, theirs
        self.doors[other](theirs)
        return mine

    def kill(self, peer: PeerId) -> None:
        """Break all links of ``peer``, whatever they still carry, and close its door."""
        self.doors.pop(peer, None)
        for link in tuple(self._ends.pop(peer, {}).values()):
            link.abort()

    def dialer(self, me: PeerId, life: int = 1) -> MemoryDialer:
        return MemoryDialer(self, me, life)


@dataclass(frozen=True)
class MemoryDialer:
    """``me``'s way into the network."""

    network: MemoryNetwork
    me: PeerId
    life: int = 1
    """How often this peer was started."""

    async def dial(self, peer: str) -> Link:
        network, other = self.network, PeerId(peer)
        there, back = network.routes.get((self.me, other)), network.routes.get((other, self.me))
        if other not in network.doors or there is None or back is None:
            raise LinkError(f"{peer} cannot be reached from {self.me}")
        now = asyncio.get_running_loop().time()
        if any(route.up is not None and route.up.at(now) == 0 for route in (there, back)):
            raise LinkError(f"{peer}: the link is out")
        await asyncio.sleep(_delay(there, now) + _delay(back, now))
        if other not in network.doors:
            raise LinkError(f"{peer} has gone")
        return network.join(self.me, other)


def _delay(route: Route, now: float) -> float:
    return route.delay_s if isinstance(route.delay_s, float | int) else route.delay_s.at(now)


MakeNode = Callable[[PeerId, MemoryDialer, ModelledCompute], Node]


@dataclass(frozen=True)
class Death:
    """At ``at_s`` virtual seconds the peer vanishes without a word, as by SIGKILL."""

    peer: PeerId
    at_s: float


@dataclass(frozen=True)
class Birth:
    """At ``at_s`` virtual seconds the peer is started: late, if it was not there before, or again."""

    peer: PeerId
    at_s: float


@dataclass
class Result:
    """What is left of a simulated run."""

    virtual_seconds: float
    replicas: dict[PeerId, Flat] = field(repr=False)
    views: dict[PeerId, Flat] = field(repr=False)
    steps: dict[PeerId, int]
    turned_away: dict[PeerId, str] = field(default_factory=dict)
    """Who came into the run under way and was not taken, and why."""


class Stuck(clock.Deadlock):
    """Nobody has made a step for a long (virtual) time though training is not over."""


def simulate(
    topology: Topology,
    make: MakeNode,
    deaths: tuple[Death, ...] = (),
    on_progress: Callable[[float, Mapping[PeerId, Node]], None] | None = None,
    *,
    births: tuple[Birth, ...] = (),
    start_s: float = 0.0,
) -> Result:
    """Run all peers of ``topology`` until each has finished; ``make`` builds a peer's node, once for each of its lives
    (``dialer.life``). Who is born before it dies was not there at the start. The clock shows ``start_s``
    at first: a resumed run goes on in its network's traces where it was.

    Raises what any node raised, Deadlock when nothing can happen any more, Stuck when nobody steps.
    """
    with _seldom_collecting():
        result: Result = clock.run(_run(topology, make, deaths, births, on_progress), start_s)
    return result


@contextmanager
def _seldom_collecting() -> Iterator[None]:
    """A thousand nodes hold millions of objects, hardly any of them in circles: look for those less often."""
    before = gc.get_threshold()
    gc.set_threshold(NEW_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


class _Stage:
    """The peers that live now, and those that did."""

    def __init__(
        self,
        topology: Topology,
        make: MakeNode,
        group: asyncio.TaskGroup,
    ) -> None:
        self.network = MemoryNetwork(topology)
        self.nodes: dict[PeerId, Node] = {}
        self.lives: dict[PeerId, asyncio.Task[None]] = {}
        self.dead: set[PeerId] = set()
        self.turned_away: dict[PeerId, str] = {}
        self._make, self._group = make, group
        self._born: Counter[PeerId] = Counter()

    def begin(self, peer: PeerId) -> None:
        """A life of ``peer`` begins; nothing happens while another lasts."""
        if peer in self.lives and not self.lives[peer].done():
            return
        self._born[peer] += 1
        self.dead.discard(peer)
        self.nodes[peer] = node = self._make(peer, self.network.dialer(peer, self._born[peer]), ModelledCompute())
        self.lives[peer] = self._group.create_task(self._live(peer, node))

    async def _live(self, peer: PeerId, node: Node) -> None:
        try:
            async with node:
                self.network.doors[peer] = node.accept
                await node.wait()
                del self.network.doors[peer]
        except NotShownIn as fault:
            self.network.kill(peer)
            self.dead.add(peer)
            self.turned_away[peer] = str(fault)

    def kill(self, peer: PeerId) -> None:
        if peer in self.lives and not self.lives[peer].done():
            self.network.kill(peer)
            self.lives[peer].cancel()
            self.dead.add(peer)

    async def watch(self, on_progress: Callable[[float, Mapping[PeerId, Node]], None] | None) -> None:
        """Raises Stuck."""
        before, loop, nodes = (-1, -1), asyncio.get_running_loop(), self.nodes
        while True:
            await asyncio.sleep(WATCH_S)
            links = [link for node in nodes.values() for link in node.neighbours.connections.values()]
            after = sum(node.step for node in nodes.values()), sum(link.session.moved_bytes for link in links)
            if after == before and any(node.state == "training" for node in nodes.values()):
                waiting = ", ".join(f"{p} at step {n.step}" for p, n in nodes.items() if n.state == "training")
                raise Stuck(f"at {loop.time():.1f} virtual seconds nobody has stepped for {WATCH_S:g} s: {waiting}")
            before = after
            if on_progress is not None:
                on_progress(loop.time(), nodes)


async def _run(
    topology: Topology,
    make: MakeNode,
    deaths: tuple[Death, ...],
    births: tuple[Birth, ...],
    on_progress: Callable[[float, Mapping[PeerId, Node]], None] | None,
) -> Result:
    loop = asyncio.get_running_loop()
    comes = {peer: min((b.at_s for b in births if b.peer == peer), default=0.0) for peer in topology.peers}
    goes = {peer: min((d.at_s for d in deaths if d.peer == peer), default=0.0) for peer in topology.peers}
    try:
        async with asyncio.TaskGroup() as group:
            stage = _Stage(topology, make, group)
            for peer in sorted(topology.peers):
                if not comes[peer] or 0 < goes[peer] < comes[peer]:
                    stage.begin(peer)
            watching = group.create_task(stage.watch(on_progress))
            for death in deaths:
                loop.call_at(death.at_s, stage.kill, death.peer)
            for birth in births:
                loop.call_at(birth.at_s, stage.begin, birth.peer)
            while lives := [task for task in stage.lives.values() if not task.done()]:
                await asyncio.wait(lives)
            watching.cancel()
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    alive = {peer: node for peer, node in sorted(stage.nodes.items()) if peer not in stage.dead}
    return Result(
        loop.time(),
        {peer: node.ctx.weights for peer, node in alive.items()},
        {peer: node.exchange.view(node.ctx.weights) for peer, node in alive.items()},
        {peer: node.step for peer, node in sorted(stage.nodes.items())},
        stage.turned_away,
    )
