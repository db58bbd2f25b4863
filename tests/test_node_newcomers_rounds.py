"""Newcomers where work is done in rounds, or with partners: they begin with their sponsor's model, enter with the next
round, and in the end are where all others are, or as near as these are to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import pytest
from newcomer_runs import Scene
from node_runs import Ran, Talk, net, run

from dlion.exchange.base import Exchange
from dlion.exchange.choco import Choco
from dlion.exchange.diloco import DiLoCo
from dlion.exchange.fedavg import FedAvg
from dlion.exchange.hop import Hop
from dlion.exchange.localsgd import LocalSGD
from dlion.exchange.noloco import NoLoCo
from dlion.exchange.sparseloco import SparseLoCo
from dlion.exchange.streaming import Streaming
from dlion.messages import PeerId
from dlion.simulation import Birth, Death
from dlion.tensors import disagreement

ROUNDS: Mapping[str, Callable[[], Exchange]] = {
    "diloco": lambda: DiLoCo(local_steps=8),
    "by the clock": lambda: DiLoCo(round_s=1.0),
    "fedavg": lambda: FedAvg(local_steps=8, share=0.6, deadline_s=2.0),
    "sparseloco": lambda: SparseLoCo(local_steps=8, chunk=16, keep=4),
    "streaming": lambda: Streaming(local_steps=8),
    "local-sgd": LocalSGD,
}
NEAR: Mapping[str, Callable[[], Exchange]] = {
    "noloco": lambda: NoLoCo(local_steps=8),
    "hop": Hop,
    "choco": lambda: Choco(density=0.5, gossip=0.2),
}
B3, B4 = PeerId("b3"), PeerId("b4")
WAYS: Mapping[str, tuple[Iterable[Birth], Iterable[Death]]] = {
    "late": ([Birth(B4, 6.0)], []),
    "again": ([Birth(B4, 6.0)], [Death(B4, 5.0)]),
    "at once": ([Birth(B4, 5.05)], [Death(B4, 5.0)]),
    "late, while another is dead": ([Birth(B4, 8.0)], [Death(B3, 4.0)]),
    "two": ([Birth(B4, 7.0), Birth(B3, 7.05)], [Death(B4, 3.0)]),
}


SOME = (("mesh", "again"), ("bridges", "two"))
MORE = tuple((talk, way) for talk in ("mesh", "bridges") for way in WAYS if (talk, way) not in SOME)
scenes = pytest.mark.parametrize(
    ("talk", "way"), [*SOME, *(pytest.param(*scene, marks=pytest.mark.slow) for scene in MORE)]
)


def play(make: Callable[[], Exchange], talk: Talk, way: str = "") -> Ran:
    births, deaths = WAYS[way] if way else ([], [])
    peers = "a1 a2 | b1 b2 b3 b4" if talk == "bridges" else "a1 a2 | b1 b3 b4"
    settings = {"start_wait_s": 2.0, "drain_s": 30.0}
    return run(net(peers, talk, mbps=1.0), make, until_s=15.0, births=births, deaths=deaths, settings=settings)


def waited_s(ran: Ran, peer: str, since_s: float) -> float:
    """The longest time from one of its steps to the next, from ``since_s`` on."""
    return float(max(np.diff([e["t"] for e in ran.events(peer, "step") if e["t"] > since_s])))


def train_on(ran: Ran, until_s: float = 12.0) -> None:
    """All that live train until close to the end (their clocks begin up to 2 s apart), and all have their say."""
    for peer in map(str, ran.result.views):
        assert ran.events(peer, "step")[-1]["t"] > until_s
        assert not any("cut short" in end["reason"] for end in ran.events(peer, "end"))


@scenes
@pytest.mark.parametrize("name", ROUNDS)
def test_all_have_one_model_whoever_came_when(name: str, talk: Talk, way: str) -> None:
    ran = play(ROUNDS[name], talk, way)
    assert set(ran.result.views) == set(ran.nodes) - ({B3} if way == "late, while another is dead" else set())
    assert disagreement(ran.result.views) == 0.0
    train_on(ran)
    if way in ("late", "at once") and name != "fedavg":  # who is not chosen waits in any case
        longest_s = max(waited_s(ran, peer, 4.0) for peer in ("a1", "a2", "b1"))
        assert longest_s < 1.1, "nobody waits for longer than a round"


@scenes
@pytest.mark.parametrize("name", NEAR)
def test_whoever_came_is_as_near_as_the_others(name: str, talk: Talk, way: str) -> None:
    usual, ran = play(NEAR[name], talk), play(NEAR[name], talk, way)
    assert disagreement(ran.result.views) < 2 * disagreement(usual.result.views) + 0.02
    train_on(ran)
    newcomer = [e for e in ran.events("b4", "step") if e["t"] > 9.0]
    assert len(newcomer) > 0.6 * len([e for e in usual.events("b4", "step") if e["t"] > 9.0])


@pytest.mark.slow
@pytest.mark.parametrize("talk", ["mesh", "bridges", "tree"])
@pytest.mark.parametrize("name", ROUNDS)
def test_one_model_at_many_random_moments(name: str, talk: Talk) -> None:
    for seed in range(10):
        random_run(seed, talk, name)


def random_run(seed: int, talk: Talk, name: str) -> None:
    scene = Scene.draw(seed, talk)
    births, deaths, settings = scene.births, scene.deaths, {"start_wait_s": 2.5, "drain_s": 60.0}
    make = ROUNDS[name]
    ran = run(scene.topology, make, until_s=20.0, seed=seed, births=births, deaths=deaths, settings=settings)
    assert disagreement(ran.result.views) == 0.0
    train_on(ran, 14.0)
