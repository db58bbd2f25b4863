"""A topology with one thing changed: begun later in its traces, or one link, cap or peer made faster or slower.

Law: pure, a ``Topology`` in and another out; the words people write for changes are understood here. The digest of
the result follows the change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace

from dlion.mesh.topology import LinkSpec, Topology
from dlion.messages import PeerId

FORMS = (
    "link.A-B.bandwidth, link.A-B.delay, egress.PEER.bandwidth, ingress.PEER.bandwidth, "
    "resource.NAME.bandwidth, peer.PEER.speed"
)


class ChangeError(ValueError):
    """A change cannot be made; the text says which, why, and what can."""

    exit_code = 2


def started(topology: Topology, start_s: float) -> Topology:
    """Every rate read ``start_s`` later: links, compute, presence and outages begin in mid-trace."""
    if not start_s:
        return topology
    return replace(
        topology,
        peers={
            name: replace(
                peer,
                speed=peer.speed and replace(peer.speed, samples_per_s=peer.speed.samples_per_s.shifted(start_s)),
                presence=peer.presence and peer.presence.shifted(start_s),
            )
            for name, peer in topology.peers.items()
        },
        links={
            ends: replace(k, up=k.up and k.up.shifted(start_s), delays_s=k.delays_s and k.delays_s.shifted(start_s))
            for ends, k in topology.links.items()
        },
        resources={name: replace(r, rate=r.rate.shifted(start_s)) for name, r in topology.resources.items()},
        digest=_digest(topology, f"start={start_s!r}"),
    )


def changed(topology: Topology, changes: Mapping[str, float]) -> Topology:
    """``topology`` with every named rate or delay multiplied: ``{"link.a-b.bandwidth": 2.0, "peer.a1.speed": 0.5}``.

    ``link.A-B``: both directions between two peers or two micro-clouds; ``link.A>B``: the one direction. Raises
    ChangeError.
    """
    for key, factor in changes.items():
        if not 0 < factor < float("inf"):
            raise ChangeError(f"{key}: cannot multiply by {factor:g}; above 0 is needed")
        topology = replace(_one(topology, key, factor), digest=_digest(topology, f"{key}={factor!r}"))
    return topology


def is_change(key: str) -> bool:
    """Whether ``key`` speaks of the network, and not of the job."""
    return key.partition(".")[0] in ("link", "egress", "ingress", "resource", "peer")


def factor_of(text: str) -> tuple[str, float]:
    """``link.a-b.bandwidth=x0.5`` as (key, factor); raises ChangeError."""
    key, _, value = text.partition("=")
    try:
        if not value.strip().startswith("x"):
            raise ValueError
        return key.strip(), float(value.strip()[1:])
    except ValueError:
        raise ChangeError(f"{text}: found {value!r}, expected a factor like x2 or x0.5") from None


def _one(topology: Topology, key: str, factor: float) -> Topology:
    kind, _, rest = key.partition(".")
    name, _, what = rest.rpartition(".")
    if kind == "peer" and what == "speed":
        return _speed(topology, key, name, factor)
    if kind == "link" and what == "delay":
        ends = _ends(topology, key, name)
        links = {
            e: replace(k, delay_s=k.delay_s * factor, delays_s=k.delays_s and k.delays_s.scaled(factor))
            if e in ends
            else k
            for e, k in topology.links.items()
        }
        return replace(topology, links=links)
    if kind in ("link", "egress", "ingress", "resource") and what == "bandwidth":
        chosen = _paths(topology, key, name) if kind == "link" else {name if kind == "resource" else f"{kind}:{name}"}
        unknown = sorted(chosen - topology.resources.keys())
        if unknown:
            raise ChangeError(f"{key}: there is no {unknown[0]}; there are {_some(topology.resources)}")
        resources = dict(topology.resources)
        for path in chosen:
            resources[path] = replace(resources[path], rate=resources[path].rate.scaled(factor))
        return replace(topology, resources=resources)
    raise ChangeError(f"{key}: not something that can be changed; there are {FORMS}")


def _speed(topology: Topology, key: str, name: str, factor: float) -> Topology:
    """A peer, or all of a micro-cloud. A slower machine is slower at everything, so its overhead grows as well."""
    members = set(topology.clouds.get(name, (PeerId(name),)))
    if not members <= topology.peers.keys():
        raise ChangeError(f"{key}: there is no peer or micro-cloud {name}; there are {_some(topology.peers)}")
    peers = dict(topology.peers)
    for member in sorted(members):
        speed = peers[member].speed
        if speed is None:
            raise ChangeError(f"{key}: the topology does not model the speed of {member}")
        faster = replace(speed, samples_per_s=speed.samples_per_s.scaled(factor), overhead_s=speed.overhead_s / factor)
        peers[member] = replace(peers[member], speed=faster)
    return replace(topology, peers=peers)


def _ends(topology: Topology, key: str, name: str) -> set[tuple[PeerId, PeerId]]:
    """The directed links that ``name`` means: ``a-b``, ``a1-b2`` (both directions) or ``a>b`` (one)."""
    groups = {**{str(p): {p} for p in topology.peers}, **{c: set(m) for c, m in topology.clouds.items()}}
    for i, mark in enumerate(name):
        one, other = groups.get(name[:i]), groups.get(name[i + 1 :])
        if mark not in "->" or one is None or other is None:
            continue
        pairs = {
            (s, t) for s, t in topology.links if (s in one and t in other) or (mark == "-" and s in other and t in one)
        }
        if pairs:
            return pairs
    raise ChangeError(f"{key}: no link {name}; write two peers or two micro-clouds of {_some(groups)} as A-B or A>B")


def _paths(topology: Topology, key: str, name: str) -> set[str]:
    """The paths that only these links cross: a shared one would change others' links as well."""
    ends = _ends(topology, key, name)
    users: dict[str, set[tuple[PeerId, PeerId]]] = {}
    for end, link in topology.links.items():
        for resource in _own(topology, link):
            users.setdefault(resource, set()).add(end)
    paths = {n for end in ends for n in _own(topology, topology.links[end])}
    if not paths:
        crossed = {n for end in ends for n in topology.links[end].resources}
        advice = f"it crosses {_some(crossed)}" if crossed else "it is not limited at all"
        raise ChangeError(f"{key}: the link has no path of its own; {advice}")
    for path in sorted(paths):
        others = users[path] - ends
        if others:
            raise ChangeError(f"{key}: others cross {path} as well; change resource.{path}.bandwidth")
    return paths


def _own(topology: Topology, link: LinkSpec) -> list[str]:
    return [name for name in link.resources if topology.resources[name].kind == "path"]


def _some(names: Iterable[str]) -> str:
    held = sorted(names)
    return ", ".join(held[:12]) + (" ..." if len(held) > 12 else "")


def _digest(topology: Topology, what: str) -> str:
    return hashlib.sha256(f"{topology.digest} {what}".encode()).hexdigest()
