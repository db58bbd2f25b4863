"""Runs that peers come into late or again, and books of what every replica must hold in the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from node_runs import BATCH, Ran, Talk, net, run

from dlion.cut import Part
from dlion.exchange.base import Action, Context, Exchange, Update
from dlion.exchange.estates import Estates
from dlion.exchange.pride import Pride
from dlion.mesh.bridges import shared_plan
from dlion.mesh.topology import Topology
from dlion.messages import Message, PeerId
from dlion.node import Node
from dlion.simulation import Birth, Death
from dlion.tensors import Flat, disagreement


@dataclass
class Books:
    """What every life of every peer did, and what was settled of the former ones: all that replicas may hold."""

    lives: list[tuple[Node, list[Flat]]] = field(default_factory=list)
    settled: dict[str, Flat] = field(default_factory=dict)
    """Of each who died: what its former lives had told in all. A sponsor may die while it says so; the next one says
    it again."""

    def keep(self, node: Node) -> None:
        strategy, did = node.exchange, []
        assert isinstance(strategy, Estates)
        after_step, introduce = strategy.after_step, strategy.introduce
        self.lives.append((node, did))

        def stepped(update: Update, ctx: Context) -> Iterable[Action]:
            yield from after_step(update, ctx)
            did.append(update.values.copy())

        def introduced(
            peer: PeerId, sponsor: PeerId | None, life: int, ctx: Context, message: Message | None = None
        ) -> Iterable[Action]:
            if message is None and (estate := strategy.estate(peer)) is not None:
                self.settled[peer] = estate.copy()
            yield from introduce(peer, sponsor, life, ctx, message)

        strategy.after_step, strategy.introduce = stepped, introduced  # type: ignore[method-assign]

    def missing(self, ran: Ran, talk: str) -> float:
        """How far the replicas are from: start + all steps of those who live + what was heard of all other lives."""
        views = ran.result.views
        total = ran.start.astype(np.float64)
        for node, did in self.lives:
            if node.me in views and ran.nodes[node.me] is node:
                total += sum(values.astype(np.float64) for values in did)
        settled = dict(self.settled)
        for dead in ran.nodes.keys() - views.keys():
            mates = [p for p in views if talk == "mesh" or p[0] == dead[0]]
            strategy = ran.nodes[mates[0]].exchange
            assert isinstance(strategy, Estates)
            if (heard := strategy.estate(PeerId(dead))) is not None:
                settled[dead] = heard
        total += sum(estate.astype(np.float64) for estate in settled.values())
        gap = max(float(np.abs(view - total).max()) for view in views.values())
        return gap / float(np.abs(total).max())


def churn(peers: Iterable[str], rng: np.random.Generator) -> tuple[list[Birth], list[Death]]:
    """Some of ``peers`` come late, die, come again, at random moments; never so late that the run is about to end."""
    births, deaths = [], []
    for i, peer in enumerate(map(PeerId, peers)):
        at = 0.0
        if rng.random() < 0.4 and i < 2:  # all cannot come late: a run of one does not begin
            births.append(Birth(peer, at := float(rng.uniform(3.0, 8.0))))
        if rng.random() < 0.7 or not at:
            deaths.append(Death(peer, at := max(at, 2.0) + float(rng.uniform(0.5, 6.0))))
            if rng.random() < 0.8 and (at := at + float(rng.uniform(0.05, 4.0))) < 13.0:
                births.append(Birth(peer, at))
    return births, deaths


def last_parts(births: Iterable[Birth]) -> Callable[[str], Mapping[str, Any]]:
    """Seams: everybody keeps its parts of all cuts, and each further life goes on from the last one of that peer."""
    parts: dict[str, Part] = {}
    lives = Counter({str(birth.peer): 0 for birth in births})

    def seams(peer: str) -> Mapping[str, Any]:
        lives[peer] += 1

        def keep(part: Part) -> None:
            parts[peer] = part

        return {"keep": keep, "resume": parts.get(peer) if lives[peer] > 1 else None}

    return seams


def played(
    topology: Topology, births: Iterable[Birth], deaths: Iterable[Death], *, until_s: float = 11.0, **options: Any
) -> tuple[Ran, Books]:
    """``cuts``: checkpoints are taken every second, and who comes again goes on from its last one."""
    books, births = Books(), list(births)
    settings = {"start_wait_s": 2.5, "drain_s": 60.0}
    if options.pop("cuts", False):
        settings["checkpoint_every_s"] = 1.0
        options["seams"] = last_parts(births)
    exchange = options.pop("exchange", Pride)
    ran = run(
        topology, exchange, until_s=until_s, births=births, deaths=deaths, each=books.keep, settings=settings, **options
    )
    return ran, books


def check(ran: Ran, books: Books, topology: Topology) -> None:
    """All that live agree, and hold everything once."""
    assert disagreement(ran.result.views) < 1e-4
    assert books.missing(ran, topology.talk) < 1e-4
    for peer in ran.result.views:
        assert not any("cut short" in end["reason"] for end in ran.events(str(peer), "end"))


@dataclass
class Scene:
    """A network and what happens there, drawn at random."""

    topology: Topology
    births: list[Birth]
    deaths: list[Death]
    rng: np.random.Generator

    @classmethod
    def draw(cls, seed: int, talk: Talk) -> Scene:
        rng = np.random.default_rng(seed)
        if talk == "mesh":
            peers = "a1 a2 b1 c1" if seed % 2 else "a1 a2 | b1 c1"
        else:
            peers = "a1 a2 a3 | b1 b2 b3" if seed % 2 else "a1 a2 a3 | b1 b2 | c1 c2 c3"
        speeds = {p: BATCH / 0.1 * float(rng.choice([0.3, 0.7, 1.0, 2.0])) for p in ["a1", "a2", "b1", "c1"]}
        topology = net(
            peers,
            talk,
            mbps=float(rng.choice([0.05, 0.2, 1.0, 10.0])),
            delay_s=float(rng.choice([0.002, 0.02, 0.1])),
            speeds=speeds if talk == "mesh" else None,
        )
        bridges = {p for pair in shared_plan(topology, sorted(topology.peers), ()).bridges.values() for p in pair}
        free = [p for p in sorted(topology.peers) if p not in bridges and p != "a1"]
        chosen = rng.choice(free, size=int(rng.integers(1, len(free) + 1)), replace=False)
        births, deaths = churn(map(str, chosen), rng)
        return cls(topology, births, deaths, rng)

    def play(self, seed: int, exchange: Callable[[], Exchange], **options: Any) -> tuple[Ran, Books]:
        return played(self.topology, self.births, self.deaths, until_s=20.0, seed=seed, exchange=exchange, **options)

    def gap_s(self, ran: Ran) -> float:
        """The longest time between two steps of a peer to which nothing happened."""
        others = self.topology.peers.keys() - {event.peer for event in (*self.births, *self.deaths)}
        return max(float(np.diff([e["t"] for e in ran.events(str(p), "step")]).max()) for p in others)
