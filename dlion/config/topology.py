"""A topology file -> ``mesh.topology.Topology``: who is where, how fast, and what each directed link crosses.

Law: reads short tables (clouds, compute, lan, wan, egress, ingress, link) and spells out every peer, resource and
link they mean. Knows no peer process.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any, Literal

import msgspec

from dlion.config.errors import did_you_mean, one_of
from dlion.config.find import Found, find
from dlion.config.job import Table
from dlion.config.rates import Rates
from dlion.config.reader import Reader, read_toml, show
from dlion.config.units import Seconds
from dlion.mesh.topology import LinkSpec, PeerSpec, Resource, Speed, Talk, Topology
from dlion.messages import PeerId
from dlion.net.wan import Rate

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
RawRate = Any
"""Read by ``rates``."""


Delay = tuple[float, Rate | None]
"""One way, in seconds: its mean, and how it is over time when it varies."""


class LanTable(Table, frozen=True):
    bandwidth: RawRate = None
    """Of each directed pair of hosts; absent = unshaped."""
    delay: RawRate = 0.0


class CloudTable(Table, frozen=True):
    members: list[str]
    lan: LanTable | None = None
    """Absent: the file's ``[lan]``."""


class ComputeTable(Table, frozen=True):
    samples_per_s: RawRate
    overhead_s: Seconds = 0.0


class WanTable(Table, frozen=True):
    between: tuple[str, str]
    """Two micro-clouds, both directions alike."""
    bandwidth: RawRate = None
    delay: RawRate = 0.0
    """One way."""
    per: Literal["pair-of-hosts", "pair-of-clouds"] = "pair-of-hosts"
    """Each directed pair of hosts has its own path, or all of a directed pair of micro-clouds share one."""


class CapTable(Table, frozen=True):
    of: str
    """A peer, or a micro-cloud: then each member has its own cap."""
    bandwidth: RawRate
    crossing: Literal["wan", "all"] = "wan"


class LinkTable(Table, frozen=True):
    """One directed link, in place of what the tables above say about it."""

    source: str = msgspec.field(name="from")
    target: str = msgspec.field(name="to")
    bandwidth: RawRate = None
    """A path of its own; absent (with no resources either): what it crossed before."""
    resources: tuple[str, ...] = ()
    delay: RawRate = None
    up: RawRate = None
    """1 while the link is there, 0 while it is out."""


class ResourceTable(Table, frozen=True):
    bandwidth: RawRate


class TopologyFile(Table, frozen=True):
    clouds: dict[str, CloudTable]
    about: str = ""
    talk: Talk = "auto"
    compute: dict[str, ComputeTable] = msgspec.field(default_factory=dict)
    """By peer or micro-cloud; a peer's own entry wins. Absent = the machine's real speed."""
    lan: LanTable = LanTable()
    wan: tuple[WanTable, ...] = ()
    egress: tuple[CapTable, ...] = ()
    ingress: tuple[CapTable, ...] = ()
    resources: dict[str, ResourceTable] = msgspec.field(default_factory=dict)
    """Paths that several ``[[link]]`` share by name."""
    link: tuple[LinkTable, ...] = ()
    presence: dict[str, RawRate] = msgspec.field(default_factory=dict)
    addresses: dict[str, str] = msgspec.field(default_factory=dict)


def load_topology(name_or_path: str | Path, *, talk: Talk | None = None) -> Topology:
    """The topology, every link spelled out. ``talk`` overrules the file's. Raises ConfigError."""
    found = find("topology", name_or_path)
    reader = Reader(str(found.path))
    file = reader.struct(read_toml(found.path), TopologyFile)
    return _Builder(file, reader, Rates(reader, found.path.parent)).build(found, talk or file.talk)


class _Builder:
    """One file's tables, turned into peers, resources and links."""

    def __init__(self, file: TopologyFile, reader: Reader, rates: Rates) -> None:
        self.file, self.reader, self.rates = file, reader, rates
        self.clouds = {name: tuple(PeerId(m) for m in table.members) for name, table in file.clouds.items()}
        self.cloud_of = {member: cloud for cloud, members in self.clouds.items() for member in members}
        self.resources: dict[str, Resource] = {}
        self.links: dict[tuple[PeerId, PeerId], LinkSpec] = {}

    def build(self, found: Found, talk: Talk) -> Topology:
        self._check_names()
        peers = self._peers()
        self._lan_links()
        self._wan_links()
        self._caps("egress", self.file.egress)
        self._caps("ingress", self.file.ingress)
        self._explicit_links()
        self._check_joined(talk)
        return Topology(
            name=found.name,
            peers=peers,
            links=dict(sorted(self.links.items())),
            resources=self.resources,
            talk=talk,
            addresses={
                PeerId(p): checked_address(a.partition("/")[0], self.reader, f"addresses.{p}") and a
                for p, a in sorted(self.file.addresses.items())
            },
            about=self.file.about,
            digest=self._digest(found.path),
        )

    def _digest(self, path: Path) -> str:
        """Of the file, and of the traces that it names."""
        digest = hashlib.sha256(path.read_bytes())
        for name, trace in sorted(self.rates.digests.items()):
            digest.update(f"{name} {trace}\n".encode())
        return digest.hexdigest()

    def _check_names(self) -> None:
        if not self.cloud_of:
            raise self.reader.error("clouds", "found no peers", "at least one micro-cloud with members")
        seen: dict[str, str] = {}
        for cloud, table in self.file.clouds.items():
            for i, member in enumerate(table.members):
                key = f"clouds.{cloud}.members[{i}]"
                if not NAME.fullmatch(member) or member in self.clouds:
                    raise self.reader.error(
                        key, f'found "{member}"', "letters, digits, - _ . and no micro-cloud's name"
                    )
                if member in seen:
                    raise self.reader.error(key, f'"{member}" is already a member of {seen[member]}', "each peer once")
                seen[member] = cloud
            if not table.members or not NAME.fullmatch(cloud):
                raise self.reader.error(
                    f"clouds.{cloud}",
                    "found no members or an unusable name",
                    "a name of letters, digits, - _ . and at least one member",
                )
        for name in self.file.compute:
            self._known(name, f"compute.{name}", (*self.cloud_of, *self.clouds), "peer or micro-cloud")
        for section in ("presence", "addresses"):
            for name in getattr(self.file, section):
                self._known(name, f"{section}.{name}", self.cloud_of, "peer")

    def _known(self, name: str, key: str, names: Iterable[str], what: str) -> None:
        names = tuple(names)
        if name not in names:
            raise self.reader.error(key, f'unknown {what} "{name}"', one_of(names), did_you_mean(name, names))

    # -- peers ---------------------------------------------------------------------------------------------------

    def _peers(self) -> dict[PeerId, PeerSpec]:
        presence = {p: self._switch(raw, f"presence.{p}") for p, raw in self.file.presence.items()}
        return {
            peer: PeerSpec(peer, cloud, self._speed(peer, cloud), presence.get(peer))
            for peer, cloud in sorted(self.cloud_of.items())
        }

    def _speed(self, peer: str, cloud: str) -> Speed | None:
        owner = peer if peer in self.file.compute else cloud
        table = self.file.compute.get(owner)
        if table is None:
            return None
        key = f"compute.{owner}.samples_per_s"
        rate = self.rates.read(table.samples_per_s, "number", key)
        if not max(rate.values):
            raise self.reader.error(key, "found 0", "more than 0 samples per second, at least at times")
        return Speed(rate, table.overhead_s)

    def _switch(self, raw: RawRate, key: str) -> Rate:
        rate = self.rates.read(raw, "number", key)
        if not set(rate.values) <= {0.0, 1.0}:
            raise self.reader.error(key, f"found {show(sorted(set(rate.values)))}", "1 (there) and 0 (away) only")
        return rate

    # -- links ---------------------------------------------------------------------------------------------------

    def _resource(
        self, name: str, kind: Literal["egress", "ingress", "path"], raw: RawRate, key: str, owner: PeerId | None = None
    ) -> str:
        rate = self.rates.read(raw, "bits_per_s", key)
        if not max(rate.values):
            raise self.reader.error(key, "found 0", "more than 0 bits per second, at least at times")
        self.resources[name] = Resource(name, kind, rate, owner)
        return name

    def _lan_links(self) -> None:
        for cloud, members in self.clouds.items():
            own = self.file.clouds[cloud].lan
            lan, key = (own, f"clouds.{cloud}.lan") if own else (self.file.lan, "lan")
            delay = self._delay(lan.delay, f"{key}.delay")
            for source, target in permutations(members, 2):
                self._link(source, target, "lan", lan.bandwidth, delay, f"{key}.bandwidth")

    def _delay(self, raw: RawRate, key: str) -> Delay:
        delays_s = self.rates.read(raw, "seconds", key)
        return delays_s.mean, delays_s if len(set(delays_s.values)) > 1 else None

    def _link(self, source: PeerId, target: PeerId, kind: str, raw: RawRate, delay: Delay, key: str) -> None:
        crossed: tuple[str, ...] = ()
        if raw is not None:
            crossed = (self._resource(f"{kind}:{source}>{target}", "path", raw, key),)
        self.links[source, target] = LinkSpec(source, target, crossed, delay[0], delays_s=delay[1])

    def _wan_links(self) -> None:
        joined: set[frozenset[str]] = set()
        for i, wan in enumerate(self.file.wan):
            for cloud in wan.between:
                self._known(cloud, f"wan[{i}].between", self.clouds, "micro-cloud")
            pair = frozenset(wan.between)
            if len(pair) < 2 or pair in joined:
                raise self.reader.error(
                    f"wan[{i}].between",
                    f"found {show(list(wan.between))}",
                    "two different micro-clouds, each pair once",
                )
            joined.add(pair)
            for a, b in (wan.between, wan.between[::-1]):
                self._wan_direction(a, b, wan, f"wan[{i}]")

    def _wan_direction(self, a: str, b: str, wan: WanTable, key: str) -> None:
        hosts = [(source, target) for source in self.clouds[a] for target in self.clouds[b]]
        delay = self._delay(wan.delay, f"{key}.delay")
        if wan.per == "pair-of-hosts" or wan.bandwidth is None:
            for source, target in hosts:
                self._link(source, target, "wan", wan.bandwidth, delay, f"{key}.bandwidth")
            return
        shared = self._resource(f"wan:{a}>{b}", "path", wan.bandwidth, f"{key}.bandwidth")
        for source, target in hosts:
            self.links[source, target] = LinkSpec(source, target, (shared,), delay[0], delays_s=delay[1])

    def _caps(self, kind: Literal["egress", "ingress"], caps: Iterable[CapTable]) -> None:
        capped: set[str] = set()
        for i, cap in enumerate(caps):
            self._known(cap.of, f"{kind}[{i}].of", (*self.cloud_of, *self.clouds), "peer or micro-cloud")
            for peer in self.clouds.get(cap.of, (PeerId(cap.of),)):
                if peer in capped:
                    raise self.reader.error(f"{kind}[{i}].of", f"a second {kind} cap for {peer}", "one per peer")
                capped.add(peer)
                name = self._resource(f"{kind}:{peer}", kind, cap.bandwidth, f"{kind}[{i}].bandwidth", peer)
                for (source, target), link in self.links.items():
                    inside = self.cloud_of[source] == self.cloud_of[target]
                    if peer == (source if kind == "egress" else target) and not (inside and cap.crossing == "wan"):
                        self.links[source, target] = replace(link, resources=(*link.resources, name))

    def _explicit_links(self) -> None:
        for name, table in self.file.resources.items():
            if name in self.resources:
                raise self.reader.error(f"resources.{name}", "a name that is already taken", "another name")
            self._resource(name, "path", table.bandwidth, f"resources.{name}.bandwidth")
        named: set[tuple[str, str]] = set()
        for i, link in enumerate(self.file.link):
            for end, peer in (("from", link.source), ("to", link.target)):
                self._known(peer, f"link[{i}].{end}", self.cloud_of, "peer")
            if link.source == link.target or (link.source, link.target) in named:
                raise self.reader.error(
                    f"link[{i}]", f"found {link.source} to {link.target}", "two different peers, each direction once"
                )
            named.add((link.source, link.target))
            self._explicit_link(i, link)

    def _explicit_link(self, i: int, table: LinkTable) -> None:
        source, target = PeerId(table.source), PeerId(table.target)
        for name in table.resources:
            self._known(name, f"link[{i}].resources", self.resources, "resource")
        before = self.links.get((source, target), LinkSpec(source, target))
        crossed = tuple(table.resources)
        if table.bandwidth is not None:
            own = self._resource(f"link:{source}>{target}", "path", table.bandwidth, f"link[{i}].bandwidth")
            crossed = (own, *crossed)
        up = before.up if table.up is None else self._switch(table.up, f"link[{i}].up")
        was = before.delay_s, before.delays_s
        delay_s, delays_s = was if table.delay is None else self._delay(table.delay, f"link[{i}].delay")
        self.links[source, target] = LinkSpec(source, target, crossed or before.resources, delay_s, up, delays_s)

    def _check_joined(self, talk: Talk) -> None:
        """Every peer must be reachable both ways; with ``bridges`` every pair of micro-clouds must be linked."""
        for source, target in self.links:
            if (target, source) not in self.links:
                raise self.reader.error(
                    "link", f"{source} reaches {target}, but nothing leads back", "links in both directions"
                )
        reached, waiting = set[str](), [next(iter(self.cloud_of))]
        while waiting:
            peer = waiting.pop()
            if peer not in reached:
                reached.add(peer)
                waiting += [target for source, target in self.links if source == peer]
        lost = sorted(set(self.cloud_of) - reached)
        if lost:
            raise self.reader.error("wan", f"no link leads to {', '.join(lost)}", "links that join all peers")
        if talk == "bridges":
            pairs = {(self.cloud_of[s], self.cloud_of[t]) for s, t in self.links}
            for a, b in permutations(self.clouds, 2):
                if (a, b) not in pairs:
                    raise self.reader.error("talk", f"bridges, but no link from {a} to {b}", 'talk = "tree"')


def checked_address(text: str, reader: Reader, key: str) -> str:
    """``host:port`` (``[v6]:port``); raises ConfigError."""
    host, colon, port = text.rpartition(":")
    bare_v6 = ":" in host and not (host.startswith("[") and host.endswith("]"))
    if not host or not colon or bare_v6 or not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise reader.error(key, f'found "{text}"', '"host:port"')
    return text
