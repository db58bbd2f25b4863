"""Who counts, and how the strategy sees them: roster, bridges, gossip, links.

Law: synchronous; ``now`` is an argument. Owns the roster and the plan of bridges, says what to gossip to whom, and
keeps the strategy's picture (``Context``) up to date, but only when the exchange lane is at rest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial

from dlion.exchange.base import Context, LinkView, Member
from dlion.mesh.bridges import PeerRoutes, Plan, left_of, name_of, shared_plan
from dlion.mesh.roster import COUNTED, LIVING, Record, Roster, State
from dlion.mesh.topology import Topology
from dlion.messages import PeerId

MET = (*LIVING, State.LEFT)
"""To whom something may still have to be said, neighbour or not."""

BEYOND_MAX = 32
"""Of those behind a silent micro-cloud, how many to look for."""


class Membership:
    """The living peers of one node's topology, and their routes."""

    def __init__(self, me: Record, topology: Topology, silent_after_s: float, period_s: float = 1.0) -> None:
        self.me = me.peer
        self.topology = topology
        self.roster = Roster(me, topology.peers, silent_after_s, period_s)
        self._held: dict[str, list[PeerId]] = {}
        """Who of each micro-cloud counted when one of it last did."""
        self._left: frozenset[PeerId] = frozenset()
        self._back: frozenset[PeerId] = frozenset()
        """Who had left and came again: plans in which they are gone are over."""
        self.plan_name = ""
        self.plan: Plan = self._replan()
        self._planned = self.roster.shape
        self.lost: frozenset[PeerId] | None = None
        """Who was there and fell silent before training began (None: it did not): who comes just in time never met
        them, and is told even in a mesh."""
        self._shown = -1
        self._rates: tuple[int, dict[str, float]] = (-1, {})

    def changed(self) -> None:
        """Somebody's state changed: plan the bridges anew if it makes a difference."""
        if self._planned != self.roster.shape:
            self._planned = self.roster.shape
            self.plan = self._replan()

    def _replan(self) -> Plan:
        """Bridges among the living; before the start all that are expected count, so that everybody plans alike."""
        states = dict(self.roster.states)
        left = frozenset(p for p, state in states.items() if state is State.LEFT)
        if self.topology.talk != "mesh":
            for cloud, peers in self._counted(states).items():
                self._held[cloud] = peers
            self._back = (self._back | self._left) - left
            self._left, self.plan_name = left, name_of(left, self.topology)
        late = [p for _, p in sorted((r.since_s, p) for p, r in self.roster.records.items() if r.since_s)]
        plan_of = partial(self._plan_of, dict(self._held), late)
        self._named = lru_cache(maxsize=8)(partial(self._plan_named, plan_of, states, self._back))
        return plan_of(states)

    def _counted(self, states: Mapping[PeerId, State]) -> dict[str, list[PeerId]]:
        """Of each micro-cloud those who count."""
        found: dict[str, list[PeerId]] = {}
        for peer, state in states.items():
            if state in COUNTED:
                found.setdefault(self.topology.cloud_of(peer), []).append(peer)
        return found

    def _plan_of(
        self, held: Mapping[str, list[PeerId]], late: Sequence[PeerId], states: Mapping[PeerId, State]
    ) -> Plan:
        """The plan when these are the states. A micro-cloud of which nobody is heard keeps its bridges, on which it is
        owed what is said meanwhile, to those who were heard last."""
        counted = self._counted(states)
        found = {p for peers in counted.values() for p in peers}
        silent = [p for p, state in states.items() if state is State.SILENT]
        if self.topology.talk != "mesh":
            found.update(p for cloud, peers in held.items() if cloud not in counted for p in peers if p in silent)
        return shared_plan(self.topology, sorted(found), silent, late)

    def _plan_named(
        self,
        plan_of: Callable[[Mapping[PeerId, State]], Plan],
        states: Mapping[PeerId, State],
        back: frozenset[PeerId],
        name: str,
    ) -> Plan:
        """The plan of somebody for whom others have left than for us. Called in the exchange lane too."""
        left = left_of(name, self.topology) - back
        there = {p: State.LIVE for p, state in states.items() if state is State.LEFT}
        return plan_of({**states, **there, **dict.fromkeys(left, State.LEFT)})

    @property
    def neighbours(self) -> tuple[PeerId, ...]:
        return self.plan.neighbours(self.me)

    @property
    def sought(self) -> tuple[PeerId, ...]:
        """Whom to keep a link with: our neighbours; and beyond our bridge to a micro-cloud of which nobody is heard,
        all of it, for there they may count on another bridge than we do; along a tree also those, of whom nobody is
        heard either, who may only have lost the way to us with it."""
        states, topology, home = self.roster.states, self.topology, self.topology.cloud_of(self.me)
        lost = {topology.cloud_of(p) for p in self.neighbours if states[p] is State.SILENT} - {home}
        found, links = [p for cloud in sorted(lost) for p in topology.clouds[cloud]], topology.links
        if lost and self.plan.towards is not None:
            beyond = [p for cloud, peers in topology.clouds.items() if cloud not in lost | {home} for p in peers]
            found += [p for p in beyond if (self.me, p) in links and (p, self.me) in links][:BEYOND_MAX]
        return tuple(sorted({*self.neighbours, *(p for p in found if states[p] is State.SILENT)}))

    def onward(self, came_from: PeerId | None, origin: PeerId, plan: str) -> tuple[PeerId, ...]:
        """Who must hear from us what ``origin`` said under the plan of that name."""
        return self._routes.onward(came_from, self.topology.cloud_of(origin), plan)

    @property
    def _routes(self) -> PeerRoutes:
        return PeerRoutes(self.plan, self.me, self.plan_name, self._named)

    def news(self, neighbour: PeerId) -> list[Record]:
        """What to tell ``neighbour``: our own record, and those of peers to which it has no link. What one of our
        micro-cloud told us it told the others of it too."""
        cloud_of, near = self.topology.cloud_of, self.plan.neighbours(neighbour)
        home = cloud_of(self.me)
        mate = cloud_of(neighbour) == home
        alike = mate and len(near) <= len(self.plan.mates.get(neighbour, ()))  # who has no bridge is told as all such

        def carried(peer: PeerId, teller: PeerId) -> bool:
            return peer not in near and not (mate and teller != self.me and cloud_of(teller) == home)

        if self.topology.talk == "mesh":
            return self.roster.news_for(neighbour, self._lost)
        return self.roster.news_for(neighbour, carried, home if alike else None)

    def _lost(self, peer: PeerId, teller: PeerId) -> bool:
        return self.roster.records[peer].silent if self.lost is None else peer in self.lost

    def show(self, ctx: Context, met: Collection[PeerId], connected: Iterable[PeerId]) -> bool:
        """Bring ``ctx`` up to date; True when its links are new. Called between two batches of the exchange lane."""
        roster, topology = self.roster, self.topology
        fresh, roster.fresh = roster.fresh, {}
        if self._shown == roster.version:
            for peer in fresh:
                if peer in ctx.members:
                    ctx.members[peer] = self._member(peer)
            return False
        self._shown = roster.version
        live = roster.live
        ctx.routes = self._routes
        known_members = ctx.members
        ctx.members = {p: known_members[p] if p in known_members and p not in fresh else self._member(p) for p in live}
        known = {**ctx.silent, **ctx.former, **ctx.links}
        here = [p for p in connected if roster.states[p] in MET and p not in roster.guests]
        links = {
            p: known.get(p) or LinkView(p, topology.cloud_of(p), topology.lan(self.me, p))
            for p in sorted({*known, *here, *self.neighbours})
        }
        near = {p for p in self.neighbours if p in ctx.members}
        ctx.links = {p: link for p, link in links.items() if p in near and p in met}
        ctx.silent = {
            p: link
            for p, link in links.items()
            if roster.states[p] is State.SILENT or (p in near and p not in met)  # a bridge moved: it is being dialled
        }
        ctx.former = {p: links[p] for p in sorted(here) if p not in ctx.links and p not in ctx.silent}
        return True

    def _member(self, peer: PeerId) -> Member:
        r = self.roster.records[peer]
        return Member(peer, self.topology.cloud_of(peer), r.step, r.samples_per_s, r.batch, r.loss, r.incarnation)

    def ways_to(self, peer: PeerId) -> Iterator[list[PeerId]]:
        """Who might pass us on to ``peer``: of the two micro-clouds, then of each other. Both ask in the same order."""
        clouds, cloud_of, live = self.topology.clouds, self.topology.cloud_of, self.roster.live
        near = sorted({cloud_of(self.me), cloud_of(peer)})
        for cloud in dict.fromkeys((*near, *clouds)):
            yield [p for p in clouds[cloud] if p in live and p not in (self.me, peer)]

    def life_of(self, peer: PeerId) -> int:
        """The incarnation of which news has come, directly or through others; 0: none."""
        record = self.roster.records.get(peer)
        return 0 if record is None else record.incarnation

    def near(self, peer: PeerId) -> bool:
        """Is ``peer`` one whom we talk to directly whenever both live?"""
        topology = self.topology
        return topology.talk == "mesh" or topology.cloud_of(peer) == topology.cloud_of(self.me)

    def unmet(self, peer: PeerId) -> bool:
        """Is ``peer`` beyond a bridge, in a micro-cloud of which nobody was ever heard? All that was said since the
        start is owed to it: whoever comes from there comes as at the start."""
        records, topology = self.roster.records, self.topology
        return not self.near(peer) and not any(records[p].incarnation for p in topology.clouds[topology.cloud_of(peer)])

    @property
    def rates(self) -> dict[str, float]:
        """Samples per second of the living; the same object as long as they are the same."""
        roster = self.roster
        if self._rates[0] != roster.rated:
            records = roster.records
            self._rates = roster.rated, {p: records[p].samples_per_s for p in roster.live}
        return self._rates[1]

    @property
    def samples(self) -> int:
        """Samples processed by all peers, as far as heard."""
        return self.roster.samples
