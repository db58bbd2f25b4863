"""Crowds: where micro-clouds are large, bridges say sums, quiet links stay quiet, and nothing is lost by it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from node_runs import Softmax, net, run

from dlion.cli.build import Plan
from dlion.cli.simulate import Played, play
from dlion.config import load_job, load_topology
from dlion.exchange.pride import Pride
from dlion.mesh.topology import Topology
from dlion.messages import PeerId
from dlion.node import Node
from dlion.observe.runlog import Event, Link, Member, Send, Step
from dlion.simulation import Death

MEMBERS = 6


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Topology:
    """Two micro-clouds of six, steps of a second."""
    lines = ['talk = "bridges"', "[clouds]"]
    lines += [f"{c}.members = {json.dumps([f'{c}{n}' for n in range(MEMBERS)])}" for c in "ab"]
    lines += ["[compute]"] + [f"{c}.samples_per_s = 64" for c in "ab"]
    lines += ["[lan]", 'delay = "0.2ms"', "[[wan]]", 'between = ["a", "b"]', 'bandwidth = "20Mbit"', 'delay = "20ms"']
    path: Path = tmp_path_factory.mktemp("crowd") / "crowd.toml"
    path.write_text("\n".join(lines))
    return load_topology(str(path))


def played(crowd: Topology, exchange: str, until_s: float, *deaths: Death) -> Played:
    flags = {"job.until": until_s, "exchange.name": exchange, "batching.growth": False, "evaluate.every": 10}
    return play(Plan(load_job("toy", flags, environ={}), crowd), deaths)


@pytest.mark.parametrize("exchange", ["pride", "ako"])
def test_a_bridge_says_sums_and_everybody_has_everything(crowd: Topology, exchange: str) -> None:
    run = played(crowd, exchange, 20.0)
    steps = sum(log[Step]["t"].size for log in run.run.peers.values())
    over_wan = sum(int(log[Send]["wan"].sum()) for log in run.run.peers.values())
    assert over_wan <= 0.8 * steps, "one message for several steps"
    views = list(run.views.values())
    assert max(float(np.abs(v - views[0]).max()) for v in views) <= 1e-4 * float(np.abs(views[0]).max())


def test_quiet_links_are_logged_now_and_then(crowd: Topology) -> None:
    run = played(crowd, "pride", 20.0)
    for log in run.run.peers.values():
        rows = log[Link]
        for peer in np.unique(rows["peer"]):
            assert 2 <= (rows["peer"] == peer).sum() <= 14


def test_a_peer_that_dies_is_missed_as_soon_as_among_few(crowd: Topology) -> None:
    run = played(crowd, "pride", 30.0, Death(PeerId("a5"), 10.0))
    for me, log in run.run.peers.items():
        if me != "a5":
            rows = log[Member]
            silent = rows["t"][(rows["peer"] == "a5") & (rows["state"] == "silent")]
            assert silent.size == 1 and 10.0 < silent[0] <= 10.0 + 4.0


def cost(topology: Topology) -> tuple[float, float]:
    """Of a peer in the mean: most that its strategy keeps, in models; bytes that it says to other micro-clouds."""
    nodes: dict[PeerId, Node] = {}
    kept: dict[PeerId, int] = {}

    def look(peer: PeerId) -> Iterable[Event]:
        kept[peer] = max(kept.get(peer, 0), nodes[peer].exchange.state_bytes)
        return ()

    ran = run(
        topology,
        Pride,
        until_s=2.5,
        workload=partial(Softmax, features=1000),
        each=lambda made: nodes.update({made.me: made}),
        seams=lambda peer: {"observer": lambda *_: look(PeerId(peer))},
        settings={"evaluate_every_s": 0.5},
    )
    sent = sum(e["bytes"] for peer in ran.replicas for e in ran.events(peer, "send") if e["wan"])
    return sum(kept.values()) / len(kept) / ran.start.nbytes, sent / len(kept)


def test_a_peer_of_sixty_keeps_and_says_about_as_much_as_one_of_six() -> None:
    """Ten micro-clouds of six over bridges, against a flat mesh of three of two; peers and links alike."""
    sixty = " | ".join(" ".join(f"{c}{n}" for n in range(6)) for c in "abcdefghij")
    few, many = (
        cost(net(peers, talk, mbps=20.0, delay_s=0.03))
        for peers, talk in (("a1 a2 | b1 b2 | c1 c2", "mesh"), (sixty, "bridges"))  # type: ignore[arg-type]
    )
    assert many[0] < 1.5 * few[0] and many[1] < few[1], (few, many)
