"""Small runs of real nodes in virtual time, for the tests of the node and the simulation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import msgspec
import numpy as np

from dlion.compute import Compute
from dlion.cut import name_of
from dlion.exchange.base import Exchange
from dlion.exchange.dlion import DLion
from dlion.exchange.full import Full
from dlion.exchange.pace import PACES, Pace
from dlion.identity import Identity
from dlion.learn.batching import Batcher, Fixed
from dlion.learn.models import Mlp
from dlion.learn.optimizers import Sgd
from dlion.learn.schedules import Constant
from dlion.learn.trainer import Trainer, peer_seed
from dlion.learn.workload import Evaluation, Indices, Workload
from dlion.mesh.topology import LinkSpec, PeerSpec, Resource, Speed, Talk, Topology
from dlion.messages import PeerId
from dlion.net.link import Dialer
from dlion.net.wan import Rate
from dlion.node import Learner, Node, NodeSettings, Seams
from dlion.observe.runlog import Digest, Memory, RunLog, run_digest
from dlion.simulation import Birth, Death, MemoryDialer, Result, simulate
from dlion.tensors import Flat, Tensors

FEATURES, CLASSES, SAMPLES, BATCH, RATE = 7, 4, 96, 8, 0.2


def residual() -> DLion:
    """DLion that drops nothing: what it promises is that all replicas get every update in the end."""
    return DLion(residual=True, transfer="off")


class Softmax:
    """A ``Workload``: softmax regression on ``SAMPLES`` random samples of the peer's own."""

    train_size = global_train_size = SAMPLES

    def __init__(self, peer: str, features: int = FEATURES) -> None:
        self._model = Mlp((features, CLASSES))
        self.layout = self._model.layout
        rng = np.random.default_rng(list(peer.encode()))
        self._inputs = rng.standard_normal((SAMPLES, features), dtype=np.float32)
        self._labels = self._inputs[:, :CLASSES].argmax(1)

    def initial(self, seed: int) -> Tensors:
        return self._model.initial(seed)

    def gradient(self, weights: Flat, batch: Indices, out: Flat) -> float:
        return self._model.gradient(weights, self._inputs[batch], self._labels[batch], out)

    def evaluate(self, weights: Flat, limit: int | None = None) -> Evaluation:
        right = self._model.logits(weights, self._inputs).argmax(1) == self._labels
        return Evaluation(float(right.mean()), 0.0, SAMPLES)


def net(
    peers: str,
    talk: Talk = "mesh",
    *,
    mbps: float = 10.0,
    delay_s: float = 0.01,
    speeds: Mapping[str, float] | None = None,
    up: Mapping[tuple[str, str], Rate] | None = None,
) -> Topology:
    """``a1 a2 | b1``: micro-clouds between bars. Every directed pair has a path of ``mbps`` and ``delay_s``; a step
    lasts 0.1 s, or ``BATCH / speeds[peer]``. ``up`` is the presence of links, of both directions."""
    clouds = {name: group.split()[0][0] for group in peers.split("|") for name in group.split()}
    specs = {
        PeerId(p): PeerSpec(PeerId(p), clouds[p], Speed(Rate.constant((speeds or {}).get(p, BATCH / 0.1))))
        for p in sorted(clouds)
    }
    links, resources = {}, {}
    for a, b in permutations(specs, 2):
        name = f"{a}>{b}"
        resources[name] = Resource(name, "path", Rate.constant(mbps * 1e6))
        presence = (up or {}).get((a, b)) or (up or {}).get((b, a))
        links[a, b] = LinkSpec(a, b, (name,), delay_s, presence)
    return Topology("test", specs, links, resources, talk)


def outages(*spans: tuple[float, float]) -> Rate:
    """A link that is out from each first to each second time."""
    times = [0.0, *(t for span in spans for t in span)]
    return Rate.steps(times, [float(i % 2 == 0) for i in range(len(times))], loop=False)


def learner(
    peer: str,
    *,
    seed: int = 0,
    batcher: Batcher | None = None,
    workload: Workload | None = None,
    rate: float = RATE,
    momentum: float = 0.0,
) -> Learner:
    trainer = Trainer(workload or Softmax(peer), Sgd(momentum=momentum), Constant(rate), peer_seed(seed, peer))
    return Learner(trainer, batcher or Fixed(BATCH))


def node(
    topology: Topology,
    peer: str,
    dialer: Dialer,
    compute: Compute,
    *,
    exchange: Exchange,
    pace: Pace | None = None,
    seed: int = 0,
    log: RunLog | None = None,
    settings: NodeSettings | None = None,
    identity: Mapping[str, Any] | None = None,
    workload: Workload | None = None,
    more: Mapping[str, Any] | None = None,
    momentum: float = 0.0,
) -> Node:
    """A node of ``topology``; ``identity`` replaces parts of who it says it is."""
    taught = learner(peer, seed=seed, workload=workload, momentum=momentum)
    who = {"run": "test", "peer": PeerId(peer), "incarnation": 1, "job": "job", "model": "model", **(identity or {})}
    seams = Seams(dialer, compute, seed, log or RunLog(Memory()), **(more or {}))
    return Node(
        Identity(**who), topology, taught, exchange, pace or PACES[exchange.pace](), seams, settings or NodeSettings()
    )


@dataclass
class Ran:
    """A simulated run and its logs."""

    result: Result
    logs: Mapping[str, bytes]
    start: Flat
    digest: str
    nodes: dict[str, Node] = field(default_factory=dict)

    def events(self, peer: str, kind: str) -> list[dict[str, Any]]:
        lines = (msgspec.json.decode(line) for line in self.logs[peer].splitlines())
        return [line for line in lines if line["e"] == kind]

    @property
    def replicas(self) -> dict[str, Flat]:
        return {str(p): weights for p, weights in self.result.replicas.items()}


def far_off(ran: Ran) -> dict[str, float]:
    """Who took over the last view, and how far off its own was."""
    found = [(peer, e["why"]) for peer in ran.replicas for e in ran.events(peer, "member") if e["state"] == "concluded"]
    return {peer: float(why.split("ours was ")[1].split()[0]) for peer, why in found}


def run(
    topology: Topology,
    exchange: Callable[[], Exchange] = Full,
    *,
    pace: str = "",
    until_s: float = 3.0,
    seed: int = 0,
    deaths: Iterable[Death] = (),
    settings: Mapping[str, Any] | None = None,
    workload: Callable[[str], Workload] = Softmax,
    each: Callable[[Node], None] | None = None,
    seams: Callable[[str], Mapping[str, Any]] | None = None,
    start_s: float = 0.0,
    momentum: float = 0.0,
    births: Iterable[Birth] = (),
) -> Ran:
    """All peers of ``topology`` for ``until_s`` virtual seconds; ``each`` may change a node before it starts,
    ``seams`` adds to its seams."""
    memories = {peer: Memory() for peer in sorted(topology.peers)}
    digests = {peer: Digest(memory) for peer, memory in memories.items()}
    nodes: dict[str, Node] = {}

    def make(peer: PeerId, dialer: MemoryDialer, compute: Compute) -> Node:
        strategy, added = exchange(), seams(peer) if seams else {}
        nodes[peer] = made = node(
            topology,
            peer,
            dialer,
            compute,
            exchange=strategy,
            pace=PACES[pace or strategy.pace](),
            seed=seed,
            log=RunLog(digests[peer]),
            settings=NodeSettings(**{"until_s": until_s, **(settings or {})}),
            workload=workload(peer),
            more=added,
            identity={
                "incarnation": 1000 * dialer.life,
                **({"cut": name_of(added["resume"].number)} if added.get("resume") else {}),
            },
            momentum=momentum,
        )
        if each is not None:
            each(made)
        return made

    result = simulate(topology, make, tuple(deaths), births=tuple(births), start_s=start_s)
    logs = {str(peer): memory.data for peer, memory in memories.items()}
    start = workload(min(topology.peers)).initial(seed).flat
    return Ran(result, logs, start, run_digest({p: d.hexdigest for p, d in digests.items()}), nodes)
