"""Newcomers of the other strategies that tell each other their updates: those that lose nothing hold everything once,
as with ``pride``; those that do take whoever comes, and go on as inexactly as before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import cycle

import pytest
from newcomer_runs import Scene, check, played
from node_runs import Talk, net, residual, run

from dlion.exchange.ako import Ako
from dlion.exchange.base import Exchange
from dlion.exchange.dlion import DLion, MaxN
from dlion.exchange.full import Full
from dlion.exchange.gaia import Gaia
from dlion.exchange.tfako import TFAko
from dlion.messages import PeerId
from dlion.simulation import Birth, Death
from dlion.tensors import disagreement

EXACT: Mapping[str, Callable[[], Exchange]] = {
    "full": Full,
    "ako": lambda: Ako(partitions=5),
    "tfako": TFAko,
    "gaia": lambda: Gaia(threshold=0.2),
    "dlion": residual,
    "maxn": lambda: MaxN(residual=True),
}
"""With settings at which something is always owed, where there are such."""


@pytest.mark.parametrize(("name", "talk"), [*zip(EXACT, cycle(["mesh", "bridges"]), strict=False)])
def test_one_comes_late_and_one_again(name: str, talk: Talk) -> None:
    topology = net("a1 a2 | b1 b2 b3 b4", talk, mbps=0.2)
    births, deaths = [Birth(PeerId("b3"), 3.0), Birth(PeerId("b4"), 5.0)], [Death(PeerId("b4"), 4.0)]
    ran, books = played(topology, births, deaths, until_s=11.0, exchange=EXACT[name], pace="free", cuts=True)
    check(ran, books, topology)
    assert set(ran.result.views) == set(topology.peers)


@pytest.mark.parametrize("make", [DLion, MaxN, lambda: DLion(weighting="ratio")])
def test_where_something_is_lost_the_newcomer_is_no_further_off_than_the_others(make: Callable[[], Exchange]) -> None:
    topology = net("a1 a2 b1", mbps=0.2)
    b1 = PeerId("b1")
    ran = run(topology, make, pace="free", until_s=14.0, births=[Birth(b1, 6.0)], deaths=[Death(b1, 5.0)])
    others = {peer: view for peer, view in ran.result.views.items() if peer != b1}
    assert disagreement(ran.result.views) < 3 * disagreement(others) + 0.02


def random_run(seed: int, talk: Talk, name: str) -> None:
    scene = Scene.draw(seed, talk)
    pace = str(scene.rng.choice(["free", "free", "bounded", "backup"]))
    ran, books = scene.play(seed, EXACT[name], pace=pace, cuts=bool(scene.rng.random() < 0.5))
    check(ran, books, scene.topology)
    if pace == "free" and name != "gaia":  # its barrier waits for slow links, with or without newcomers
        assert scene.gap_s(ran) < 0.5, "nobody waits"


@pytest.mark.slow
@pytest.mark.parametrize("talk", ["mesh", "bridges", "tree"])
@pytest.mark.parametrize("name", EXACT)
def test_at_many_random_moments(name: str, talk: Talk) -> None:
    for seed in range(10):
        random_run(seed, talk, name)
