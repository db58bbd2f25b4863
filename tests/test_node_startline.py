"""A bridge that is missing when the run starts: it is waited for, then others take its place, and all train as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random

import pytest
from node_runs import Ran, Talk, far_off, net, residual, run

from dlion.exchange.base import Exchange
from dlion.exchange.diloco import DiLoCo
from dlion.exchange.full import Full
from dlion.exchange.localsgd import LocalSGD
from dlion.exchange.pride import Pride
from dlion.mesh.bridges import shared_plan
from dlion.messages import PeerId
from dlion.simulation import Birth
from dlion.tensors import disagreement

NEVER = 1e6
WAIT_S = 6.0
KINDS: Mapping[str, Callable[[], Exchange]] = {
    "full": Full,
    "pride": Pride,
    "residual": residual,
    "local-sgd": lambda: LocalSGD(local_steps=5),
    "diloco": lambda: DiLoCo(local_steps=5),
}
MISSING = {
    "a1 a2 a3 | b1 b2": ("a1",),
    "a1 a2 | b1 b2": ("b1",),
    "a1 a2 | b1 b2 ": ("a1", "b1"),
    "a1 a2 a3 | b1 b2 b3 | c1 c2": ("a1", "b1"),
    "a1 a2 | b1 b2 | c1 c2": ("b1", "c1"),
}


def without(shape: str, talk: Talk, kind: str, missing: tuple[str, ...], *births: Birth, pace: str = "free") -> Ran:
    never = [Birth(PeerId(peer), NEVER) for peer in missing]
    pace = pace if kind in ("full", "pride", "residual") else ""
    settings = {"start_wait_s": WAIT_S}
    return run(net(shape, talk), KINDS[kind], until_s=10.0, births=[*never, *births], pace=pace, settings=settings)


def trained_as_one(ran: Ran) -> None:
    """And were equal before the last view made them so."""
    peers = sorted(ran.replicas)
    assert disagreement(ran.result.views) < 1e-4 and not ran.result.turned_away
    assert max(far_off(ran).values(), default=0.0) < 1e-4
    for peer in peers:
        assert ran.events(peer, "end")[0]["reason"] == "until"
        assert set(ran.nodes[peer].membership.roster.live) == {*peers}


@pytest.mark.parametrize("talk", ["bridges", "tree"])
@pytest.mark.parametrize("shape", MISSING)
@pytest.mark.parametrize("kind", KINDS)
def test_a_bridge_that_is_missing_at_the_start_is_replaced(kind: str, shape: str, talk: Talk) -> None:
    ran = without(shape, talk, kind, MISSING[shape])
    trained_as_one(ran)
    assert ran.result.virtual_seconds < WAIT_S + 10.0 + 5.0 * len(MISSING[shape]) + 2.0


@pytest.mark.parametrize("born_s", [7.0, 8.0, 9.5])
def test_who_knocks_while_others_wait_for_the_next_bridge_throws_nobody_out(born_s: float) -> None:
    births = [Birth(PeerId("b1"), NEVER), Birth(PeerId("b2"), NEVER), Birth(PeerId("a3"), born_s)]
    ran = run(
        net("a1 a2 a3 | b1 b2 b3", "bridges"), Full, until_s=10.0, births=births, settings={"start_wait_s": WAIT_S}
    )
    assert not {*ran.result.turned_away} - {"a3"}
    assert disagreement(ran.result.views) < 1e-4


def test_whoever_is_missing_comes_in_later_as_a_newcomer() -> None:
    comes = Birth(PeerId("a1"), WAIT_S + 4.0)
    ran = run(
        net("a1 a2 a3 | b1 b2", "bridges"), Pride, until_s=14.0, births=[comes], settings={"start_wait_s": WAIT_S}
    )
    trained_as_one(ran)
    assert len(ran.events("a1", "step")) > 10


def test_who_is_alone_and_comes_late_is_told_that_the_run_is_under_way() -> None:
    comes = Birth(PeerId("b1"), 3.0 * WAIT_S)
    ran = run(net("a1 a2 | b1", "bridges"), Full, until_s=20.0, births=[comes], settings={"start_wait_s": WAIT_S / 2})
    assert "under way" in ran.result.turned_away[PeerId("b1")]
    assert set(ran.replicas) == {"a1", "a2"} and disagreement(ran.result.views) < 1e-6


def test_one_side_may_begin_later_than_the_other() -> None:
    """b2 waits for nobody and begins at once; a2 is started when b1 has waited for most of its patience already."""
    late = [Birth(PeerId("a2"), 0.8 * WAIT_S), Birth(PeerId("a3"), 0.7 * WAIT_S)]
    for kind in ("full", "pride"):
        ran = without("a1 a2 a3 | b1 b2", "bridges", kind, ("a1",), *late)
        assert disagreement(ran.result.views) < 1e-4 and not ran.result.turned_away
        assert max(far_off(ran).values(), default=0.0) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("decade", range(10))
def test_random_worlds_without_some_of_their_bridges(decade: int) -> None:
    """Those who are there are started over half of the time that they are waited for."""
    for seed in range(10 * decade, 10 * decade + 10):
        chance = Random(seed)
        shape = chance.choice(["a1 a2 | b1 b2", "a1 a2 a3 | b1 b2", "a1 a2 | b1 b2 | c1 c2", "a1 a2 | b1 | c1 c2 c3"])
        talk: Talk = chance.choice(["bridges", "bridges", "tree"])
        topology = net(shape, talk, delay_s=10 ** chance.uniform(-2.3, -0.9))
        first = shared_plan(topology, sorted(topology.peers), ())
        ends = sorted({peer for pair in first.bridges.values() for peer in pair})
        missing = chance.sample([p for p in ends if len(topology.clouds[topology.cloud_of(p)]) > 1], 1)
        there = [p for p in sorted(topology.peers) if p not in missing]
        births = [Birth(p, chance.uniform(0.01, WAIT_S / 2)) for p in chance.sample(there, len(there) // 2)]
        births += [Birth(p, NEVER) for p in missing]
        kind = chance.choice(list(KINDS))
        ran = run(topology, KINDS[kind], until_s=10.0, seed=seed, births=births, settings={"start_wait_s": WAIT_S})
        far = disagreement(ran.result.views)
        assert far < 1e-4 and not ran.result.turned_away, f"seed {seed}: {kind}, {talk}, {shape} without {missing}"
