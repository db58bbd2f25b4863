"""Where the league is played: shipped topologies, changed ones, drawn ones, and settings of papers.

Law: a scenario is a topology, the deaths on it, and what its job changes; nothing runs here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import permutations, product
from typing import Any

import numpy as np

from dlion.config import load_topology
from dlion.mesh.topology import LinkSpec, PeerSpec, Resource, Speed, Talk, Topology
from dlion.messages import PeerId
from dlion.net.wan import Rate
from dlion.simulation import Death

MBIT = 1e6


@dataclass(frozen=True)
class Scenario:
    """``flags``: what its job changes of the league's. ``rate``: everybody's learning rate; 0 = each one's tuned."""

    topology: Callable[[], Topology]
    about: str = ""
    deaths: tuple[Death, ...] = ()
    flags: Mapping[str, Any] = field(default_factory=dict)
    rate: float = 0.0


def shipped(name: str, change: Callable[[Topology], Topology] = lambda topology: topology) -> Callable[[], Topology]:
    return lambda: change(load_topology(name))


def slower(peer: str, factor: float) -> Callable[[Topology], Topology]:
    def change(topology: Topology) -> Topology:
        spec = topology.peers[PeerId(peer)]
        assert spec.speed is not None
        slow = replace(spec, speed=Speed(Rate.constant(spec.speed.samples_per_s.mean / factor)))
        return replace(topology, peers={**topology.peers, PeerId(peer): slow})

    return change


def cut(some: str, others: str, since_s: float, until_s: float) -> Callable[[Topology], Topology]:
    """No link between any of ``some`` and any of ``others``, both named with spaces between."""

    def change(topology: Topology) -> Topology:
        up = Rate((0.0, since_s, until_s), (1.0, 0.0, 1.0))
        pairs = [(PeerId(a), PeerId(b)) for a in some.split() for b in others.split()]
        ends = [*pairs, *((b, a) for a, b in pairs)]
        return replace(topology, links={**topology.links, **{e: replace(topology.links[e], up=up) for e in ends}})

    return change


def talking(talk: Talk) -> Callable[[Topology], Topology]:
    return lambda topology: replace(topology, talk=talk)


def drawn(seed: int) -> Topology:
    """Nobody chose it: 3 or 4 micro-clouds of 1 to 3 peers; speeds, rates and delays over a factor of 8 to 20."""
    rng = np.random.default_rng(seed)
    clouds = [(chr(ord("a") + c), int(rng.integers(1, 4))) for c in range(rng.integers(3, 5))]
    peers, resources, links = {}, {}, {}
    for cloud, members in clouds:
        for number in range(1, members + 1):
            speed = Speed(Rate.constant(float(40.0 * 8.0 ** rng.random())))
            name = PeerId(f"{cloud}{number}")
            peers[name] = PeerSpec(name, cloud, speed)
    between = {
        pair: (float(5.0 * 20.0 ** rng.random()) * MBIT, float(0.005 * 20.0 ** rng.random()))
        for pair in permutations((cloud for cloud, _ in clouds), 2)
        if pair[0] < pair[1]
    }
    for a, b in permutations(peers, 2):
        near, far = sorted((peers[a].cloud, peers[b].cloud))
        rate, delay_s = (1000.0 * MBIT, 0.0002) if near == far else between[near, far]
        path = f"path:{a}-{b}"
        resources[path] = Resource(path, "path", Rate.constant(rate))
        links[a, b] = LinkSpec(a, b, (path,), delay_s)
    return Topology(f"drawn-{seed}", peers, links, resources, talk="bridges" if seed % 2 else "mesh")


def star(*egress_mbit: float) -> Topology:
    """A worker per figure, in a micro-cloud of its own, with so much egress and ingress; 104 samples in 0.5 s."""
    peers, resources, links = {}, {}, {}
    for number, mbit in enumerate(egress_mbit, start=1):
        name = PeerId(f"w{number}")
        peers[name] = PeerSpec(name, f"s{number}", Speed(Rate.constant(208.0)))
        for way in ("egress", "ingress"):
            resources[f"{way}:{name}"] = Resource(f"{way}:{name}", way, Rate.constant(mbit * MBIT), name)
    for a, b in permutations(peers, 2):
        links[a, b] = LinkSpec(a, b, (f"egress:{a}", f"ingress:{b}"), 0.02)
    return Topology("star", peers, links, resources)


def tfako(about: str, *egress_mbit: float) -> Scenario:
    """As TFAko was shown (SoCC 2018): a model of 17 MB, batches of 104, Adam. The data are ours."""
    flags = {
        "model.hidden": [1700, 1700],
        "train.batch": 104,
        "train.optimizer": "adamw",
        "train.momentum": 0.0,
        "batching.mode": "fixed",
    }
    return Scenario(lambda: star(*egress_mbit), f"TFAko's setting: {about}, 17 MB, Adam", flags=flags, rate=1e-3)


def crowd(clouds: int, mates: int, talk: str, samples_per_s: float) -> Topology:
    """Equal peers, so many samples a second in all; 20 Mbit/s and 30 ms between any two of different micro-clouds."""
    peers, resources, links = {}, {}, {}
    for cloud, number in product(range(clouds), range(1, mates + 1)):
        name = PeerId(f"{chr(ord('a') + cloud)}{number}")
        peers[name] = PeerSpec(name, name[0], Speed(Rate.constant(samples_per_s / (clouds * mates))))
    for a, b in permutations(peers, 2):
        rate, delay_s = (1000.0 * MBIT, 0.0002) if a[0] == b[0] else (20.0 * MBIT, 0.03)
        path = f"path:{a}-{b}"
        resources[path] = Resource(path, "path", Rate.constant(rate))
        links[a, b] = LinkSpec(a, b, (path,), delay_s)
    return Topology(f"crowd-{clouds}x{mates}", peers, links, resources, talk=talk)


def crowded(clouds: int, mates: int, talk: str, *, as_strong_as: int = 6) -> Scenario:
    """As many samples a second, and a step, as so many peers of the usual speed have."""
    about = f"{clouds} micro-clouds of {mates} peers, talk = {talk}; samples per second and step as of {as_strong_as}"
    flags = {"batching.global_start": 64 * as_strong_as}
    return Scenario(lambda: crowd(clouds, mates, talk, 160.0 * as_strong_as), about, flags=flags)


PAPERS = {
    "homogeneous": "Homo",
    "hetero-compute": "Hetero CPU",
    "hetero-network": "Hetero NET",
    "hetero-system": "Hetero SYS",
    "dynamic-system": "Dynamic SYS",
}
"""Shipped topologies, and the environments of the DLion paper that they stand for."""
SHIPPED = (
    "homogeneous",
    "hetero-compute",
    "hetero-network",
    "hetero-system",
    "hetero-system-5",
    "hetero-system-egress",
    "dynamic-system",
    "demo",
)
SCENARIOS: Mapping[str, Scenario] = {
    **{name: Scenario(shipped(name)) for name in SHIPPED},
    "hetero-system-mesh": Scenario(shipped("hetero-system", talking("mesh")), "hetero-system, a mesh for all"),
    "hetero-system-bridges": Scenario(shipped("hetero-system", talking("bridges")), "hetero-system, bridges for all"),
    "slow-peer": Scenario(shipped("hetero-system", slower("c2", 20.0)), "hetero-system with c2 20 times slower"),
    "link-out": Scenario(
        shipped("hetero-system", cut("a1", "b1", 20, 50)), "hetero-system, a1 and b1 cut off from 20 s to 50 s"
    ),
    "link-out-long": Scenario(
        shipped("hetero-system", cut("a1", "b1", 20, 380)), "hetero-system, a1 and b1 cut off from 20 s to 380 s"
    ),
    "island": Scenario(
        shipped("hetero-system", cut("c1 c2", "a1 a2 b1 b2", 20, 50)), "hetero-system, c cut off from 20 s to 50 s"
    ),
    "killed": Scenario(shipped("hetero-system"), "hetero-system, b1 killed at 25 s", (Death(PeerId("b1"), 25.0),)),
    **{f"drawn-{n}": Scenario(lambda n=n: drawn(n), f"drawn at random from seed {n}") for n in range(1, 5)},  # type: ignore[misc]
    "writers": Scenario(
        shipped("hetero-system"),
        "MNIST, each writer at one peer; see writers-finely for the first seconds",
        flags={"data.partition": "writer"},
    ),
    "writers-finely": Scenario(
        shipped("hetero-system"),
        "writers, evaluated every second",
        flags={"data.partition": "writer", "evaluate.every": 1.0},
    ),
    **{
        f"paper-{name}": Scenario(
            shipped(name),
            f"the DLion paper's {theirs}, with a model of its size, 5 MB",
            flags={"model.hidden": [1024, 420]},
        )
        for name, theirs in PAPERS.items()
    },
    "crowd-6": crowded(3, 2, "mesh"),
    "crowd-6-bridges": crowded(3, 2, "bridges"),
    "crowd-24": crowded(4, 6, "bridges"),
    "crowd-24-mesh": crowded(4, 6, "mesh"),
    "crowd-60": crowded(10, 6, "bridges"),
    "crowd-60-strong": crowded(10, 6, "bridges", as_strong_as=60),
    "crowd-60-tree": crowded(10, 6, "tree"),
    "tfako-2": tfako("two workers of 40 Mbit/s", 40, 40),
    "tfako-4": tfako("four workers of 40 Mbit/s", 40, 40, 40, 40),
    "tfako-uneven": tfako("workers of 40, 40, 20 and 10 Mbit/s", 40, 40, 20, 10),
}
