"""A peer file: who this host's peer is, where it listens, whom it can reach; with the topology and job it names.

Law: values and their cross checks. Starts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from dlion.config.errors import Origins, did_you_mean, one_of
from dlion.config.find import find
from dlion.config.job import Job, Table, read_job
from dlion.config.rates import Rates
from dlion.config.reader import Reader, read_toml
from dlion.config.topology import RawRate, checked_address, load_topology
from dlion.config.units import Share
from dlion.mesh.topology import Speed, Talk, Topology
from dlion.messages import PeerId


class PeerFile(Table, frozen=True):
    name: str
    topology: str
    job: str
    cloud: str = ""
    """Checked against the topology when given."""
    listen: str = "127.0.0.1:0"
    advertise: str = ""
    """The address neighbours use, where it differs from ``listen`` (behind NAT, in a container). Shown, not announced:
    it stands in the neighbours' own files."""
    admin: str = "127.0.0.1:0"
    data_share: Share | None = None
    """Use only this share of this peer's part of the training data; absent = all of it."""
    speed: RawRate = None
    """Samples per second to slow steps down to, in place of the topology's; 0 = the machine's real speed."""
    out: str = ""
    """Where log, report and model go; "" = a new directory under ``runs/``."""
    emulate: bool = False
    """Slow links and steps down to what the topology says; false = the network as it is, and the machine too unless
    ``speed`` is given."""
    insecure_plaintext: bool = False
    peers: dict[str, str] = msgspec.field(default_factory=dict)
    """Addresses of neighbours (host:port, or host:port/mount), in place of the topology's; "" = that one dials us."""


@dataclass(frozen=True)
class PeerSetup:
    """Everything one peer starts from."""

    path: Path
    peer: PeerFile
    job: Job
    topology: Topology
    speed: Speed | None
    addresses: Mapping[PeerId, str]
    """Of the peers it has links to and can dial."""
    origins: Origins = field(default_factory=dict)
    """Where the job's keys came from."""


def load_peer(name_or_path: str | Path) -> PeerFile:
    """The peer file alone. Raises ConfigError."""
    path = find("peer", name_or_path).path
    return _read(Reader(str(path)), path)


def load_setup(
    name_or_path: str | Path,
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
    talk: Talk | None = None,
) -> PeerSetup:
    """The peer with its job (and the job's layers) and topology; paths in it are relative to the peer file."""
    path = find("peer", name_or_path).path
    reader = Reader(str(path))
    peer = _read(reader, path)
    topology = load_topology(_beside(path, peer.topology), talk=talk)
    job, origins = read_job(_beside(path, peer.job), flags, environ)
    name = _checked_name(peer, topology, reader)
    speed = topology.peers[name].speed
    if peer.speed is not None:
        rate = Rates(reader).read(peer.speed, "number", "speed")
        overhead_s = speed.overhead_s if speed else 0.0
        speed = Speed(rate, overhead_s) if max(rate.values) else None
    return PeerSetup(path, peer, job, topology, speed, _addresses(peer, name, topology, reader), origins)


def _read(reader: Reader, path: Path) -> PeerFile:
    peer = reader.struct(read_toml(path), PeerFile)
    for key in ("listen", "advertise", "admin"):
        if getattr(peer, key) or key != "advertise":
            checked_address(getattr(peer, key), reader, key)
    if peer.data_share == 0:
        raise reader.error("data_share", "found 0", "above 0, at most 1")
    for name, address in peer.peers.items():
        if address:
            checked_address(address.partition("/")[0], reader, f"peers.{name}")
    return peer


def _beside(path: Path, text: str) -> str:
    """A path in a file is relative to that file; a packaged name stays a name."""
    beside = path.parent / Path(text).expanduser()
    return str(beside) if text.endswith(".toml") or "/" in text else text


def _checked_name(peer: PeerFile, topology: Topology, reader: Reader) -> PeerId:
    name = PeerId(peer.name)
    if name not in topology.peers:
        raise reader.error(
            "name",
            f'"{name}" is not in topology {topology.name}',
            one_of(topology.peers),
            did_you_mean(name, topology.peers),
        )
    if peer.cloud and peer.cloud != topology.cloud_of(name):
        raise reader.error("cloud", f'found "{peer.cloud}"', f'"{topology.cloud_of(name)}" as in {topology.name}')
    for other in peer.peers:
        if other not in topology.peers:
            raise reader.error(
                f"peers.{other}", "unknown peer", one_of(topology.peers), did_you_mean(other, topology.peers)
            )
    return name


def _addresses(peer: PeerFile, name: PeerId, topology: Topology, reader: Reader) -> dict[PeerId, str]:
    """The peer file's addresses, then the topology's. Every neighbour must have one, if only an empty one."""
    known = dict(topology.addresses) | {PeerId(p): a for p, a in peer.peers.items()}
    neighbours = sorted(target for source, target in topology.links if source == name)
    for other in neighbours:
        if other not in known:
            raise reader.error(
                f"peers.{other}",
                "no address for a neighbour",
                '"host:port" here or in the topology\'s [addresses]; "" when it dials us',
            )
    return {other: known[other] for other in neighbours if known[other]}
