"""Who carries what to whom: the living peers' plan of bridges between micro-clouds.

Law: pure. A plan is a function of the topology, of who lives and of the plan before, so peers that agree on these
agree on the routes without a word. Knows nothing of what is carried.

Inside a micro-cloud everybody talks to everybody. Two micro-clouds talk through one pair of peers (DLion, HotCloud
2019). The paper lets the pair run both ways; so does this: one pair serves both directions, hence one session and
acknowledgements that ride on updates. Which peer is in which pair is our choice: strong first, and spread.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations, product

from dlion.mesh.topology import Topology
from dlion.messages import PeerId

Pair = tuple[PeerId, PeerId]
CloudPair = tuple[str, str]


@dataclass(frozen=True)
class Plan:
    """The routes of all living peers."""

    cloud_of: Mapping[PeerId, str]
    """Micro-cloud of every peer, the dead included: their last words are still on the way."""
    mates: Mapping[PeerId, tuple[PeerId, ...]]
    """For every living peer, who hears it directly: its micro-cloud, or in a mesh all peers linked to it."""
    bridges: Mapping[CloudPair, Pair]
    """(from, to) -> (sender, receiver), both directions of each bridge."""
    towards: Mapping[CloudPair, str] | None = None
    """Next micro-cloud on the way (from, to) in the spanning tree; None: every two micro-clouds have their bridge."""
    mesh: bool = False
    """True: nothing is ever carried on."""

    def neighbours(self, me: PeerId) -> tuple[PeerId, ...]:
        """Everybody ``me`` keeps a link with, sorted."""
        found = self._neighbours.get(me)
        if found is None:
            found = self._neighbours[me] = tuple(sorted({*self.mates.get(me, ()), *self._far_ends(me).values()}))
        return found

    def onward(self, me: PeerId, came_from: PeerId | None, origin_cloud: str) -> tuple[PeerId, ...]:
        """Who must hear from ``me`` an update of ``origin_cloud`` that came from ``came_from`` (None: our own)."""
        if me not in self.mates or (self.mesh and came_from is not None):
            return ()
        home = self.cloud_of[me]
        from_mate = came_from is not None and self.cloud_of.get(came_from) == home
        if self.towards is None:
            behind = None if origin_cloud == home else ""  # whichever it is: nothing goes over a bridge
        else:
            behind = self.towards.get((home, origin_cloud), self.cloud_of.get(came_from or me))
        key = me, from_mate, behind
        if (found := self._onward.get(key)) is None:
            over = {p for cloud, p in self._far_ends(me).items() if behind not in ("", cloud)}
            found = self._onward[key] = tuple(sorted({*(() if from_mate else self.mates[me]), *over}))
        return found

    def downstream(self, me: PeerId, came_from: PeerId, origin_cloud: str) -> frozenset[Pair]:
        """All links over which an update of ``origin_cloud`` goes on from ``me``, to which ``came_from`` said it."""
        if origin_cloud not in self.clouds:
            return frozenset()
        key = me, came_from, origin_cloud
        if (found := self._downstream.get(key)) is None:
            links, todo = set[Pair](), deque([(came_from, me)])
            while todo:
                hop, here = todo.popleft()
                onward = {(here, peer) for peer in self.onward(here, hop, origin_cloud)} - links
                links |= onward
                todo.extend(sorted(onward))
            found = self._downstream[key] = frozenset(links)
        return found

    def routes(self, me: PeerId) -> PeerRoutes:
        return PeerRoutes(self, me)

    def _far_ends(self, me: PeerId) -> Mapping[str, PeerId]:
        """The bridges of ``me``: the micro-cloud beyond -> its peer."""
        return self._ends.get(me, {})

    @cached_property
    def clouds(self) -> frozenset[str]:
        """All micro-clouds, whoever lives."""
        return frozenset(self.cloud_of.values())

    @cached_property
    def _neighbours(self) -> dict[PeerId, tuple[PeerId, ...]]:
        """``neighbours`` of those who were asked for."""
        return {}

    @cached_property
    def _onward(self) -> dict[tuple[PeerId, bool, str | None], tuple[PeerId, ...]]:
        """``onward`` of those who were asked for: whom of their mates and bridges it leaves out."""
        return {}

    @cached_property
    def _downstream(self) -> dict[tuple[PeerId, PeerId, str], frozenset[Pair]]:
        """``downstream`` of those that were asked for."""
        return {}

    @cached_property
    def _ends(self) -> Mapping[PeerId, Mapping[str, PeerId]]:
        """``_far_ends`` of everybody: asked for with every message."""
        ends: dict[PeerId, dict[str, PeerId]] = {}
        for (_, cloud), (near, far) in self.bridges.items():
            ends.setdefault(near, {})[cloud] = far
        return ends


@dataclass(frozen=True)
class PeerRoutes:
    """One peer's part of a plan: what strategies see (``exchange.base.Routes``)."""

    plan: Plan
    me: PeerId
    name: str = ""
    named: Callable[[str], Plan] | None = None
    """Other plans, by their names."""

    @property
    def mesh(self) -> bool:
        return self.plan.mesh

    @property
    def tree(self) -> bool:
        return self.plan.towards is not None

    @property
    def clouds(self) -> int:
        return len(self.plan.clouds)

    def onward(self, came_from: PeerId | None, origin_cloud: str, plan: str | None = None) -> tuple[PeerId, ...]:
        return self._plan(plan).onward(self.me, came_from, origin_cloud)

    def downstream(self, to: PeerId, origin_cloud: str, plan: str | None = None) -> frozenset[Pair]:
        return self._plan(plan).downstream(to, self.me, origin_cloud)

    def _plan(self, name: str | None) -> Plan:
        return self.plan if name is None or name == self.name or self.named is None else self.named(name)


def plan(
    topology: Topology,
    live: Mapping[PeerId, float],
    sticky: Plan | None = None,
    *,
    silent: Collection[PeerId] = (),
    late: Sequence[PeerId] = (),
) -> Plan:
    """The plan for the ``live`` peers (name -> compute power, any unit; the same on all peers).

    ``sticky``: the plan until now; its bridges stay as long as both ends live. ``silent`` peers, dead or merely cut
    off, stay mates, who are owed what the others hear, but are no bridges, unless they are among ``live``: of a
    micro-cloud that is silent as a whole, for whoever will be heard again. Nor are those who came ``late`` (in this
    order) as long as anybody who came before lives in their micro-cloud: no bridge moves because somebody comes. In
    ``bridges``, should two micro-clouds have no link that could bridge them, updates are forwarded along a spanning
    tree, as in ``tree``.
    Raises ValueError for a live peer the topology does not know.
    """
    if unknown := sorted(set(live) - set(topology.peers)):
        raise ValueError(f"topology {topology.name!r} has no peer {unknown[0]!r}")
    cloud_of = {peer: spec.cloud for peer, spec in sorted(topology.peers.items())}
    if topology.talk == "mesh":
        known = sorted({*live, *silent})
        mates = {me: tuple(p for p in known if p != me and _linked(topology, me, p)) for me in sorted(live)}
        return Plan(cloud_of, mates, {}, mesh=True)
    clouds = {c: able for c, all_of_it in topology.clouds.items() if (able := _able(all_of_it, live, late))}
    homes = {c: tuple(p for p in all_of_it if p in live or p in silent) for c, all_of_it in topology.clouds.items()}
    mates = {me: tuple(p for p in homes[cloud_of[me]] if p != me) for me in sorted(live)}
    joined = {(a, b): pairs for a, b in combinations(sorted(clouds), 2) if (pairs := _pairs(topology, clouds, a, b))}
    towards = None
    if topology.talk == "tree" or len(joined) < len(clouds) * (len(clouds) - 1) // 2:
        heard = {cloud for cloud, alive in clouds.items() if not set(alive) <= set(silent)}
        edges = _spanning_tree(topology, joined, heard)
        joined = {edge: joined[edge] for edge in edges}
        towards = _next_hops(edges)
    return Plan(cloud_of, mates, _choose(joined, live, sticky), towards)


class _Same:
    """A topology as a key of a cache: the same object, whatever is in it."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology

    def __hash__(self) -> int:
        return id(self.topology)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.topology is self.topology


def name_of(left: Collection[PeerId], topology: Topology) -> str:
    """Of the plan of those for whom these have left: a bit for each, of all peers in their order."""
    mask = sum(1 << i for i, peer in enumerate(sorted(topology.peers)) if peer in left)
    return f"{mask:x}" if mask else ""


def left_of(name: str, topology: Topology) -> frozenset[PeerId]:
    """Inverse of ``name_of``; of what is no name, nobody."""
    peers = sorted(topology.peers)
    if len(name) > len(peers) // 4 + 1 or not set(name) <= set("0123456789abcdef"):
        return frozenset()
    mask = int(name or "0", 16)
    return frozenset(peer for i, peer in enumerate(peers) if mask >> i & 1)


def shared_plan(
    topology: Topology, counted: Iterable[PeerId], silent: Iterable[PeerId], late: Iterable[PeerId] = ()
) -> Plan:
    """``plan`` with the compute power that the topology gives, which keeps what it can of the plan of all peers; made
    once for all nodes of a process that agree.

    Not what was measured: all peers must choose the same bridges.
    """
    return _shared_plan(_Same(topology), tuple(counted), tuple(silent), tuple(late))


@lru_cache(maxsize=64)
def _shared_plan(
    same: _Same, counted: tuple[PeerId, ...], silent: tuple[PeerId, ...], late: tuple[PeerId, ...]
) -> Plan:
    speeds = {peer: same.topology.peers[peer].speed for peer in counted}
    power = {peer: 1.0 if speed is None else speed.samples_per_s.mean for peer, speed in speeds.items()}
    everybody = tuple(sorted(same.topology.peers))
    if same.topology.talk == "mesh" or counted == everybody:
        return plan(same.topology, power, silent=silent, late=late)
    first = _shared_plan(same, everybody, (), ())
    return plan(same.topology, power, first, silent=silent, late=late)


def _able(cloud: Iterable[PeerId], live: Collection[PeerId], late: Sequence[PeerId]) -> tuple[PeerId, ...]:
    """Who of a micro-cloud may be a bridge: who lives and was there from the start, or else the first who came."""
    alive = tuple(p for p in cloud if p in live)
    return tuple(p for p in alive if p not in late) or tuple(sorted(alive, key=late.index)[:1])


def _linked(topology: Topology, a: PeerId, b: PeerId) -> bool:
    return (a, b) in topology.links and (b, a) in topology.links


def _pairs(topology: Topology, clouds: Mapping[str, tuple[PeerId, ...]], a: str, b: str) -> list[Pair]:
    return [pair for pair in product(clouds[a], clouds[b]) if _linked(topology, *pair)]


def _choose(
    joined: Mapping[CloudPair, list[Pair]], power: Mapping[PeerId, float], sticky: Plan | None
) -> dict[CloudPair, Pair]:
    """One pair per two micro-clouds: those that still live stay; others go to a pair with the end that does, for it
    holds what was to go that way; then to the least loaded, then the strongest."""
    kept = sticky.bridges if sticky else {}
    chosen = {edge: kept[edge] for edge, pairs in joined.items() if kept.get(edge) in pairs}
    load = Counter(peer for pair in chosen.values() for peer in pair)

    def strength(edge: CloudPair) -> tuple[float, CloudPair]:
        return -max(power[a] + power[b] for a, b in joined[edge]), edge

    def cost(pair: Pair, ends: Pair | None) -> tuple[bool, int, int, float, Pair]:
        a, b = load[pair[0]], load[pair[1]]
        strange = ends is None or not {*pair} & {*ends}
        return strange, max(a, b), a + b, -power[pair[0]] - power[pair[1]], pair

    for edge in sorted(joined.keys() - chosen.keys(), key=strength):
        chosen[edge] = min(joined[edge], key=lambda pair: cost(pair, kept.get(edge)))
        load.update(chosen[edge])
    both = {edge: pair for a_b in sorted(chosen) for edge, pair in _both_ways(a_b, chosen[a_b])}
    return dict(sorted(both.items()))


def _both_ways(edge: CloudPair, pair: Pair) -> tuple[tuple[CloudPair, Pair], ...]:
    return (edge, pair), (edge[::-1], pair[::-1])


def _spanning_tree(topology: Topology, joined: Mapping[CloudPair, list[Pair]], heard: set[str]) -> list[CloudPair]:
    """Kruskal over the micro-clouds, those that are ``heard`` first, so that none lies behind a silent one: least delay
    first, then most bandwidth, then by name (a forest if need be)."""

    def cost(edge: CloudPair) -> tuple[bool, float, float, CloudPair]:
        links = [topology.links[pair] for pair in joined[edge]]
        rates = [min((topology.resources[r].rate.mean for r in k.resources), default=float("inf")) for k in links]
        return not heard >= set(edge), min(k.delay_s for k in links), -max(rates), edge

    root = {cloud: cloud for edge in joined for cloud in edge}
    tree = []
    for a, b in sorted(joined, key=cost):
        if root[a] != root[b]:
            tree.append((a, b))
            old = root[b]
            root.update({cloud: root[a] for cloud in root if root[cloud] == old})
    return tree


def _next_hops(edges: Iterable[CloudPair]) -> dict[CloudPair, str]:
    """(from, to) -> the neighbour of ``from`` on the way to ``to``, for all pairs a tree connects."""
    beside: dict[str, list[str]] = {}
    for a, b in edges:
        beside.setdefault(a, []).append(b)
        beside.setdefault(b, []).append(a)
    hops = {}
    for goal in sorted(beside):
        queue, seen = deque([goal]), {goal}
        while queue:
            here = queue.popleft()
            for cloud in beside[here]:
                if cloud not in seen:
                    seen.add(cloud)
                    hops[cloud, goal] = here
                    queue.append(cloud)
    return hops
