"""Totals of micro-clouds: what a bridge took along is made good while the run goes on, whatever it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from random import Random

import pytest
from node_runs import BATCH, Ran, Softmax, far_off, net, outages, residual, run
from test_node_life import stopping

from dlion.exchange import totals
from dlion.exchange.ako import Ako
from dlion.exchange.base import Exchange
from dlion.exchange.full import Full
from dlion.exchange.gaia import Gaia
from dlion.exchange.pride import Pride
from dlion.exchange.tfako import TFAko
from dlion.mesh.topology import Talk
from dlion.messages import PeerId
from dlion.net.wan import Rate
from dlion.simulation import Death
from dlion.tensors import disagreement

KINDS: Mapping[str, tuple[Callable[[], Exchange], str]] = {
    "full": (Full, "free"),
    "pride": (Pride, "free"),
    "residual": (residual, "free"),
    "gaia": (Gaia, "bounded"),
    "ako": (partial(Ako, partitions=3), "free"),
    "tfako": (TFAko, "free"),
}
SIX = "a1 a2 | b1 b2 | c1 c2"
CUT, DEAD, LATER_S = (3.0, 7.0), 4.0, 30.0
"""When a bridge is away, or dies; and when it is over, and totals were said."""


def alone(shape: str, who: str, *spans: tuple[float, float]) -> dict[tuple[str, str], Rate]:
    """``who`` is cut off from everybody."""
    return {(who, p): outages(*spans) for p in shape.replace("|", "").split() if p != who}


def said(ran: Ran) -> int:
    """Messages about totals."""
    return sum(e["kind"] == "total" for peer in ran.replicas for e in ran.events(peer, "send"))


def apart(ran: Ran) -> float:
    """How far replicas were from one another when all had been said."""
    assert disagreement(ran.result.views) < 1e-5
    return max(far_off(ran).values(), default=0.0)


@pytest.mark.parametrize("what", ["cut off", "dead"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_bridge_took_along_is_made_good(kind: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a bridge that died, and of one that was alone for a while, trained on and came back."""
    make, pace = KINDS[kind]
    up = alone(SIX, "b1", CUT) if what == "cut off" else {}
    deaths = [Death(PeerId("b1"), DEAD)] if what == "dead" else []
    played = partial(run, net(SIX, "bridges", mbps=1.0, up=up), make, pace=pace, until_s=LATER_S, deaths=deaths)
    ran = played()
    assert apart(ran) < 1e-5 and said(ran)
    monkeypatch.setattr(totals, "CLOUDS_MAX", 0)
    ran = played()
    assert apart(ran) > 1e-3 and not said(ran), "it would have been so without"


def test_over_narrow_links_a_total_is_said_in_pieces_between_words() -> None:
    topology = net(SIX, "bridges", mbps=0.1, up=alone(SIX, "b1", CUT))
    ran = run(topology, Pride, until_s=40.0, workload=partial(Softmax, features=1000))
    assert apart(ran) < 1e-5
    kinds = [e["kind"] for e in ran.events("a1", "send") if e["to"] == "b1"]
    first, last = kinds.index("total"), len(kinds) - kinds[::-1].index("total")
    assert kinds[first:last].count("total") > 1 and "update" in kinds[first:last]


@pytest.mark.parametrize(
    ("shape", "talk", "make"),
    [
        (SIX, "mesh", Full),
        ("a1 a2 | b1 b2 | c1 c2", "tree", Full),
        ("a1 a2 | b1 | c1 | d1 | e1", "bridges", Full),
        (SIX, "bridges", lambda: Pride(wan_bytes_per_s=4000.0)),
    ],
)
def test_where_totals_would_be_no_use_or_too_dear_none_are_said(shape: str, talk: Talk, make: type[Exchange]) -> None:
    assert not said(run(net(shape, talk), make, pace="free", until_s=25.0, deaths=[Death(PeerId("a1"), 4.0)]))


def test_who_leaves_takes_nothing_along_and_nobody_says_a_total() -> None:
    ran = run(net(SIX, "bridges"), Full, pace="free", until_s=25.0, each=stopping("b1", 4.0))
    assert not said(ran) and not far_off(ran)


def random_run(seed: int) -> None:
    """Bridges and others are cut off once or twice, or die; over wide and narrow links."""
    chance = Random(seed)
    kind = chance.choice(list(KINDS))
    make, pace = KINDS[kind]
    shape = chance.choice([SIX, "a1 a2 | b1 b2 b3", "a1 | b1 b2 | c1", "a1 a2 | b1 b2 | c1 c2 | d1 d2"])
    peers = shape.replace("|", "").split()
    up: dict[tuple[str, str], Rate] = {}
    for who in chance.sample(peers, chance.choice([1, 1, 2])):
        begin = chance.uniform(1.0, 6.0)
        up.update(alone(shape, who, (begin, begin + chance.uniform(0.5, 8.0))))
    deaths = [Death(PeerId(chance.choice(peers)), chance.uniform(2.0, 8.0))] if chance.random() < 0.4 else []
    speeds = {p: BATCH / chance.uniform(0.08, 0.3) for p in peers}
    wide = {"mbps": 10 ** chance.uniform(-1.5, 1.0), "delay_s": 10 ** chance.uniform(-2.3, -0.9)}
    ran = run(net(shape, "bridges", up=up, speeds=speeds, **wide), make, pace=pace, until_s=45.0, deaths=deaths)
    assert apart(ran) < 1e-4, f"seed {seed}: {kind}, {shape}, {deaths}, {wide}: {far_off(ran)}"


@pytest.mark.slow
@pytest.mark.parametrize("decade", range(6))
def test_at_many_random_moments(decade: int) -> None:
    for seed in range(10 * decade, 10 * decade + 10):
        random_run(seed)
