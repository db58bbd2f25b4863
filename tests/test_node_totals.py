"""Totals of micro-clouds: what a bridge took along is made good while the run goes on, whatever it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from node_runs import BATCH, Ran, Softmax, far_off, net, outages, residual, run
from test_node_life import stopping

from dlion.blocks import dense
from dlion.cut import Part
from dlion.exchange import totals
from dlion.exchange.ako import Ako
from dlion.exchange.base import Add, Exchange, Send
from dlion.exchange.full import Full
from dlion.exchange.gaia import Gaia
from dlion.exchange.pride import Pride
from dlion.exchange.tfako import TFAko
from dlion.mesh.topology import Talk, Topology
from dlion.messages import Message, PeerId
from dlion.net.wan import Rate
from dlion.simulation import Birth, Death
from dlion.tensors import disagreement
from dlion.testing.bench import Bench
from dlion.testing.conformance import learn
from dlion.wire.admit import Known, stranger

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


def apart(ran: Ran, left: str = "") -> float:
    """How far replicas of those who stayed were from one another when all had been said."""
    assert disagreement({p: view for p, view in ran.result.views.items() if p != left}) < 1e-5
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
    if kind in ("full", "pride"):
        monkeypatch.setattr(totals, "CLOUDS_MAX", 0)
        ran = played()
        assert apart(ran) > 1e-3 and not said(ran), "it would have been so without"


def test_over_narrow_links_a_total_is_said_in_pieces_between_words() -> None:
    """The model takes a bridge four seconds."""
    topology = net("a1 a2 | b1 b2", "bridges", mbps=0.5, up=alone("a1 a2 | b1 b2", "b1", CUT))
    ran = run(topology, Pride, until_s=40.0, workload=partial(Softmax, features=15000))
    assert apart(ran) < 1e-5
    kinds = [e["kind"] for e in ran.events("a1", "send") if e["to"] == "b1"]
    first, last = kinds.index("total"), len(kinds) - kinds[::-1].index("total")
    pieces = kinds[first:last].count("total")
    assert pieces > 5 and kinds[first:last].count("update") >= pieces - 2


def narrow_one_way() -> Topology:
    """From a to b a total takes seconds."""
    topology = net(
        "a1 a2 a3 | b1 b2 b3", "bridges", speeds=dict.fromkeys(["a1", "a2", "a3", "b1", "b2", "b3"], BATCH / 0.5)
    )
    slow = {n: replace(r, rate=Rate.constant(5e5)) for n, r in topology.resources.items() if n[0] == "a" and ">b" in n}
    return replace(topology, resources={**topology.resources, **slow})


@pytest.mark.parametrize("leaver", ["b2", "a1"])
def test_an_end_of_a_bridge_that_leaves_while_a_total_is_said_there(leaver: str) -> None:
    """The next one hears all of it, or says it."""
    deaths, big = [Death(PeerId("b1"), DEAD)], partial(Softmax, features=20000)
    ran = run(narrow_one_way(), Pride, until_s=60.0, deaths=deaths, each=stopping(leaver, 22.0), workload=big)
    times = [e["t"] for e in ran.events("a1", "send") if e["kind"] == "total"]
    assert min(times) < 22.0 < ran.events(leaver, "end")[0]["t"] and apart(ran, leaver) < 1e-5


def test_who_went_on_from_its_checkpoint_still_knows_how_all_began() -> None:
    """It comes as a newcomer, for the others had gone on, and later says the total of its micro-cloud."""
    parts: dict[str, Part] = {}
    b1, b2 = PeerId("b1"), PeerId("b2")

    def seams(peer: str) -> dict[str, Any]:
        resume = {"resume": parts[peer]} if peer in parts else {}
        return {"keep": lambda part: parts.update({peer: part}), **resume}

    ran = run(
        net("a1 a2 | b1 b2", "bridges", mbps=5.0),
        Full,
        pace="free",
        until_s=60.0,
        deaths=[Death(b2, 8.0), Death(b1, 25.0)],
        births=[Birth(b2, 12.0)],
        settings={"checkpoint_every_s": 5.0},
        seams=seams,
    )
    assert any(e["kind"] == "total" for e in ran.events("b2", "send")) and apart(ran) < 1e-5


def test_a_piece_that_comes_late_takes_nothing_back() -> None:
    """It was on the way when its link went out for long; meanwhile others have told more than that."""
    bench = Bench(Full, {"a1": "A", "a2": "A", "b1": "B"}, talk="bridges", pace="free")
    bench.now = 100.0
    for _ in range(3):
        bench.step("b1", learn)
        bench.deliver_all()
    a1 = bench.seats[PeerId("a1")]
    exchange, before = a1.exchange, a1.ctx.weights.copy()
    assert isinstance(exchange, Full)
    old = Message("total", 0, fields={"cloud": "B"}, blocks=(dense(np.zeros_like(before)),), hop=PeerId("b1"))
    exchange._calm_at = bench.now + totals.CALM_S
    assert not list(exchange.on_message(PeerId("b1"), old, a1.ctx))
    exchange._calm_at = bench.now
    assert [type(action) for action in exchange.on_message(PeerId("b1"), old, a1.ctx)] == [Add, Send]


@pytest.mark.parametrize("kind", ["total", "update"])
def test_micro_clouds_that_are_none_take_no_memory(kind: str) -> None:
    known = Known(frozenset({PeerId("a1")}), frozenset({"a"}))
    message = Message(kind, fields={"cloud": "a"}, origin=PeerId("a1"), hop=PeerId("a1"))
    assert stranger(message, known) is None
    assert stranger(structs.replace(message, fields={"cloud": "x"}), known) == f"{kind}: no micro-cloud is called 'x'"


@pytest.mark.parametrize(
    ("shape", "talk", "make"),
    [
        (SIX, "mesh", Full),
        ("a1 a2 | b1 b2 | c1 c2", "tree", Full),
        ("a1 a2 | b1 | c1 | d1 | e1", "bridges", Full),
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
