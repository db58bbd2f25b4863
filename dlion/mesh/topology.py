"""Who exists and what joins them: micro-clouds, peers, resources and links, as frozen values.

Law: pure data and questions about it. Files are read by ``config``; rates over time are ``net.wan``'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import permutations
from typing import Literal

from dlion.messages import PeerId
from dlion.net.wan import Rate

Talk = Literal["auto", "mesh", "bridges", "tree"]


@dataclass(frozen=True)
class Resource:
    """A rate over time that links share: a host's egress or ingress, or a path. Bits per second."""

    name: str
    kind: Literal["egress", "ingress", "path"]
    rate: Rate
    owner: PeerId | None = None
    """The host whose egress or ingress this is; None for a path."""


@dataclass(frozen=True)
class LinkSpec:
    """One directed link: the resources its bytes cross and the one-way delay."""

    source: PeerId
    target: PeerId
    resources: tuple[str, ...] = ()
    delay_s: float = 0.0
    """Where it varies over time, its mean."""
    up: Rate | None = None
    """Presence over time: the link is out while this rate is 0; None = always up."""
    delays_s: Rate | None = None
    """The delay over time; None = constant."""

    @property
    def way_s(self) -> float | Rate:
        """The delay, as ``net.shaped`` takes it."""
        return self.delay_s if self.delays_s is None else self.delays_s


@dataclass(frozen=True)
class Speed:
    """Modelled compute: a step of b samples lasts ``overhead_s`` + b / rate(t), rate in samples per second."""

    samples_per_s: Rate
    overhead_s: float = 0.0

    def seconds(self, samples: int, start_s: float) -> float:
        return (
            self.overhead_s
            + self.samples_per_s.finish(start_s + self.overhead_s, samples)
            - (start_s + self.overhead_s)
        )


@dataclass(frozen=True)
class PeerSpec:
    name: PeerId
    cloud: str
    speed: Speed | None = None
    """None: real, unpadded compute."""
    presence: Rate | None = None
    """Present while this rate is > 0 (churn traces); None = always."""


@dataclass(frozen=True)
class Topology:
    name: str
    peers: Mapping[PeerId, PeerSpec]
    links: Mapping[tuple[PeerId, PeerId], LinkSpec] = field(default_factory=dict)
    resources: Mapping[str, Resource] = field(default_factory=dict)
    talk: Talk = "auto"
    """``mesh``: everybody to everybody that a link joins; ``bridges``: one pair per directed pair of micro-clouds;
    ``tree``: bridges along a spanning tree of the micro-clouds, which forward; ``auto``: as the strategy likes."""
    addresses: Mapping[PeerId, str] = field(default_factory=dict)
    """``host:port`` of the peers whose place is fixed."""
    about: str = ""
    digest: str = ""
    """sha256 of the file this was read from; "" when made by hand."""

    @cached_property
    def clouds(self) -> dict[str, tuple[PeerId, ...]]:
        """Members of each micro-cloud, both in sorted order."""
        names = sorted({p.cloud for p in self.peers.values()})
        return {c: tuple(sorted(p.name for p in self.peers.values() if p.cloud == c)) for c in names}

    def cloud_of(self, peer: PeerId) -> str:
        return self.peers[peer].cloud

    def lan(self, a: PeerId, b: PeerId) -> bool:
        return self.peers[a].cloud == self.peers[b].cloud

    def capped(self, bytes_per_s: float) -> Topology:
        """Each link between micro-clouds also crosses a resource of its own, of that rate; 0: none does."""
        if not bytes_per_s:
            return self
        wan = {ends: f"budget:{ends[0]}>{ends[1]}" for ends in self.links if not self.lan(*ends)}
        cap = Rate.constant(8.0 * bytes_per_s)
        budgets = {name: Resource(name, "egress", cap, source) for (source, _), name in wan.items()}
        links = {
            ends: replace(link, resources=(*link.resources, wan[ends])) if ends in wan else link
            for ends, link in self.links.items()
        }
        return replace(self, links=links, resources={**self.resources, **budgets})

    def settled(self, *, bridged: bool) -> Topology:
        """``auto`` made a mesh, or bridges for a strategy that would rather be ``bridged``; the other one where links
        that it needs are missing. Where no micro-cloud has mates to speak for, the two are one: a mesh."""
        return self if self.talk != "auto" else self._settled[bridged]

    @cached_property
    def _settled(self) -> tuple[Topology, Topology]:
        """For who would not be bridged and who would; the same two for all nodes of a process."""

        def joined(peers: Iterable[PeerId]) -> bool:
            return all((a, b) in self.links for a, b in permutations(peers, 2))

        mesh, homes = joined(self.peers), all(joined(mates) for mates in self.clouds.values())
        mates = 1 < len(self.clouds) < len(self.peers)
        flat, bridged = replace(self, talk="mesh"), replace(self, talk="bridges")
        return (flat if mesh or not homes else bridged), (bridged if homes and (mates or not mesh) else flat)
