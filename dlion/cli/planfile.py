"""``plan.json``: a run's resolved job and topology beside its logs, so that the run can be made again.

Law: a ``Plan`` to plain values and back, exactly. A rate stands once, however many links share it; a rate without an
end has the period null. Knows no log and no strategy.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from dlion.cli.build import Plan
from dlion.cli.errors import BAD_DATA, CANNOT_READ, Fault
from dlion.config.job import Job
from dlion.mesh.topology import LinkSpec, PeerSpec, Resource, Speed, Talk, Topology
from dlion.messages import PeerId
from dlion.net.wan import Rate

NAME = "plan.json"
FORMAT = 1


class _Rate(msgspec.Struct):
    starts: tuple[float, ...]
    values: tuple[float, ...]
    period_s: float | None
    origin_s: float


class _Peer(msgspec.Struct):
    name: str
    cloud: str
    samples_per_s: int | None = None
    """Like every rate below: an index into ``rates``."""
    overhead_s: float = 0.0
    presence: int | None = None


class _Resource(msgspec.Struct):
    name: str
    kind: Literal["egress", "ingress", "path"]
    rate: int
    owner: str | None = None


class _Link(msgspec.Struct):
    source: str
    target: str
    resources: tuple[str, ...]
    delay_s: float
    up: int | None = None
    delays: int | None = None


class _Topology(msgspec.Struct):
    talk: Talk
    about: str
    digest: str
    peers: list[_Peer]
    resources: list[_Resource]
    links: list[_Link]
    addresses: dict[str, str]
    rates: list[_Rate]


class _Plan(msgspec.Struct):
    format: int
    run: str
    shares: tuple[float, ...]
    job: dict[str, Any]
    topology_name: str
    topology: _Topology


def encode_plan(plan: Plan) -> bytes:
    """``plan`` as JSON."""
    file = _Plan(
        format=FORMAT,
        run=plan.run,
        shares=plan.shares,
        job=msgspec.to_builtins(plan.job),
        topology_name=plan.topology.name,
        topology=_packed(plan.topology),
    )
    return msgspec.json.encode(file)


def decode_plan(data: bytes, source: str = "plan") -> Plan:
    """What ``encode_plan`` made. Raises Fault when it is damaged."""
    try:
        file = msgspec.json.decode(data, type=_Plan)
        if file.format > FORMAT:
            raise Fault(BAD_DATA, f"{source}: format {file.format}, this version reads up to {FORMAT}")
        job = msgspec.convert(file.job, Job)
        return Plan(job, _unpacked(file.topology_name, file.topology), file.run, file.shares)
    except (msgspec.MsgspecError, ValueError, IndexError) as error:
        advice = "copy it again from where it was written"
        raise Fault(BAD_DATA, "a damaged plan", source, str(error), advice) from error


def save_plan(plan: Plan, directory: Path) -> Path:
    """Write ``plan`` to ``directory``/plan.json; appears only when complete. Raises OSError when it cannot."""
    directory.mkdir(parents=True, exist_ok=True)
    path, temporary = directory / NAME, directory / f".{NAME}.tmp"
    temporary.write_bytes(msgspec.json.format(encode_plan(plan), indent=1))
    temporary.replace(path)
    return path


def load_plan(directory: Path) -> Plan:
    """What ``save_plan`` wrote. Raises Fault when it is not there or is damaged."""
    path = directory / NAME
    try:
        return replace(decode_plan(path.read_bytes(), str(path)), origins={"": str(path)})
    except FileNotFoundError:
        advice = "name a directory that dlion up or dlion simulate --out has written"
        what = "the run directory does not say what was run"
        raise Fault(CANNOT_READ, what, str(path), "no such file", advice) from None


def _packed(topology: Topology) -> _Topology:
    index: dict[Rate, int] = {}

    def of(rate: Rate | None) -> int | None:
        return None if rate is None else index.setdefault(rate, len(index))

    peers = [
        _Peer(p.name, p.cloud, of(p.speed.samples_per_s), p.speed.overhead_s, of(p.presence))
        if p.speed
        else _Peer(p.name, p.cloud, presence=of(p.presence))
        for p in topology.peers.values()
    ]
    resources = [
        _Resource(r.name, r.kind, index.setdefault(r.rate, len(index)), r.owner) for r in topology.resources.values()
    ]
    links = [
        _Link(k.source, k.target, k.resources, k.delay_s, of(k.up), of(k.delays_s)) for k in topology.links.values()
    ]
    return _Topology(
        talk=topology.talk,
        about=topology.about,
        digest=topology.digest,
        peers=peers,
        resources=resources,
        links=links,
        addresses={str(p): address for p, address in topology.addresses.items()},
        rates=[_Rate(r.starts, r.values, r.period_s if r.looped else None, r.origin_s) for r in index],
    )


def _unpacked(name: str, file: _Topology) -> Topology:
    rates = [Rate(r.starts, r.values, math.inf if r.period_s is None else r.period_s, r.origin_s) for r in file.rates]

    def at(i: int | None) -> Rate | None:
        return None if i is None else rates[i]

    peers = {
        PeerId(p.name): PeerSpec(
            PeerId(p.name),
            p.cloud,
            None if p.samples_per_s is None else Speed(rates[p.samples_per_s], p.overhead_s),
            at(p.presence),
        )
        for p in file.peers
    }
    links = [
        LinkSpec(PeerId(k.source), PeerId(k.target), k.resources, k.delay_s, at(k.up), at(k.delays)) for k in file.links
    ]
    return Topology(
        name=name,
        peers=peers,
        links={(k.source, k.target): k for k in links},
        resources={
            r.name: Resource(r.name, r.kind, rates[r.rate], None if r.owner is None else PeerId(r.owner))
            for r in file.resources
        },
        talk=file.talk,
        addresses={PeerId(p): address for p, address in file.addresses.items()},
        about=file.about,
        digest=file.digest,
    )
