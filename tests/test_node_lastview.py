"""What a dead bridge took along leaves replicas apart; in the end the first peer's view becomes everybody's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from random import Random
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from node_runs import BATCH, Ran, Talk, far_off, net, outages, residual, run
from test_node_life import stopping
from test_node_strangers import SIZE, meet, victim, virtual

from dlion.blocks import Block, dense
from dlion.exchange.ako import Ako
from dlion.exchange.base import Exchange
from dlion.exchange.diloco import DiLoCo
from dlion.exchange.dlion import DLion
from dlion.exchange.full import Full
from dlion.exchange.gaia import Gaia
from dlion.exchange.localsgd import LocalSGD
from dlion.exchange.pride import Pride
from dlion.farewell import Farewell
from dlion.lastview import LastView
from dlion.membership import Membership
from dlion.messages import Message, PeerId, Stream
from dlion.node import Node
from dlion.simulation import Birth, Death
from dlion.tensors import disagreement

KINDS: Mapping[str, Callable[[], Exchange]] = {
    "full": Full,
    "pride": Pride,
    "residual": residual,
    "gaia": Gaia,
    "ako": Ako,
    "local-sgd": lambda: LocalSGD(local_steps=5),
    "diloco": lambda: DiLoCo(local_steps=5),
}
SIX = "a1 a2 a3 | b1 b2 b3 | c1 c2"


def told(ran: Ran) -> dict[str, int]:
    """To whom a view was said, and how many bytes of it."""
    found: dict[str, int] = {}
    for node in ran.nodes.values():
        for peer, link in node.meter.links.items():
            if nbytes := link.by_kind["~final"]:
                found[peer] = found.get(peer, 0) + nbytes
    return found


def reasons(ran: Ran) -> set[str]:
    return {ran.events(peer, "end")[0]["reason"] for peer in ran.replicas}


@pytest.mark.parametrize("at_s", [4.03, 9.5, 9.99])
@pytest.mark.parametrize("talk", ["bridges", "tree"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_dead_bridge_took_along_does_not_keep_replicas_apart(kind: str, talk: Talk, at_s: float) -> None:
    ran = run(net("a1 a2 | b1 b2 | c1 c2", talk), KINDS[kind], until_s=10.0, deaths=[Death(PeerId("b1"), at_s)])
    assert disagreement(ran.result.views) < 1e-6 and reasons(ran) == {"until"}
    off = far_off(ran)
    assert off.keys() == set(ran.replicas) - {"a1"} and ran.result.virtual_seconds < 15.0
    assert kind in ("local-sgd", "diloco") or max(off.values()) > 1e-4, "it would not have been exact without"


@pytest.mark.parametrize("kind", [Full, residual])
def test_in_lockstep_replicas_are_bit_equal_again(kind: Callable[[], Exchange]) -> None:
    ran = run(net(SIX, "bridges"), kind, pace="lockstep", until_s=10.0, deaths=[Death(PeerId("b1"), 5.0)])
    assert disagreement(ran.result.replicas) < 1e-9 and reasons(ran) == {"until"}


@pytest.mark.parametrize("hub", ["a", "b"])
def test_words_that_came_over_two_ways_or_none_while_the_hub_of_a_tree_was_cut_off(hub: str) -> None:
    peers = ["a1", "a2", "b1", "b2", "b3", "c1", "c2"]
    up = {(p, q): outages((4.0, 13.0)) for p in peers for q in peers if p[0] == hub != q[0]}
    ran = run(net("a1 a2 | b1 b2 b3 | c1 c2", "tree", up=up), Full, pace="free", until_s=17.0)
    assert disagreement(ran.result.views) < 1e-6 and reasons(ran) == {"until"}


@pytest.mark.parametrize("talk", ["bridges", "tree", "mesh"])
def test_where_nobody_was_silent_nothing_more_is_said(talk: Talk) -> None:
    ran = run(net("a1 a2 | b1 b2", talk), Pride, until_s=3.0)
    assert not far_off(ran) and not told(ran)
    if talk == "mesh":  # where estates tell what the dead had said
        ran = run(net("a1 a2 | b1 b2", talk), Pride, until_s=9.0, deaths=[Death(PeerId("b1"), 3.0)])
        assert not far_off(ran) and disagreement(ran.result.views) < 1e-5


def test_each_peer_says_it_once_to_those_beyond_it() -> None:
    ran = run(net(SIX, "bridges"), Full, pace="free", until_s=10.0, deaths=[Death(PeerId("b1"), 5.0)])
    views = told(ran)
    assert views.keys() == set(ran.replicas) - {"a1"}
    whole = 4 * ran.start.size
    assert all(whole < nbytes < whole + 200 for nbytes in views.values())


def test_what_is_not_meant_for_it_says_nothing() -> None:
    """No consensus is promised."""
    ran = run(
        net("a1 a2 | b1 b2", "bridges"), lambda: DLion(residual=False), until_s=9.0, deaths=[Death(PeerId("b1"), 4.0)]
    )
    assert not far_off(ran) and not told(ran) and reasons(ran) == {"until"}


def test_who_leaves_early_has_no_part_in_it() -> None:
    deaths = [Death(PeerId("b1"), 4.0)]
    ran = run(net(SIX, "bridges"), Pride, until_s=10.0, deaths=deaths, each=stopping("a1", 8.0))
    stay = {peer: view for peer, view in ran.result.views.items() if peer != "a1"}
    assert disagreement(stay) < 1e-6 and far_off(ran).keys() == stay.keys() - {"a2"}


def test_a_last_word_that_a_bridge_took_along_is_said_again() -> None:
    """Else those beyond would wait until the new end of the bridge is silent, too."""
    ran = run(net(SIX, "tree"), Full, pace="bounded", until_s=12.0, deaths=[Death(PeerId("b1"), 11.5)])
    assert ran.result.virtual_seconds < 16.0 and reasons(ran) == {"until"}


def test_a_view_that_does_not_come_is_waited_for_until_the_drain_is_over() -> None:
    def each(made: Node) -> None:
        made.company.last_view.size *= made.me != "a1"

    settings, deaths = {"drain_s": 5.0}, [Death(PeerId("b1"), 4.0)]
    ran = run(net("a1 a2 | b1 b2 | c1", "bridges"), Full, until_s=9.0, deaths=deaths, each=each, settings=settings)
    assert reasons(ran) == {"until", "until (the last view of a1 did not come)"}
    assert not far_off(ran) and ran.result.virtual_seconds < 20.0


@pytest.mark.parametrize("at_s", [10.15, 10.3])
def test_a_bridge_that_dies_in_the_drain_behind_its_last_word_is_missed_by_who_speaks_later(at_s: float) -> None:
    network = net("a1 a2 | b1 b2", "bridges", speeds={"b2": 8 / 1.5})
    ran = run(network, Full, until_s=10.0, deaths=[Death(PeerId("b1"), at_s)])
    assert disagreement(ran.result.views) < 1e-6 and reasons(ran) == {"until"}


def test_a_view_has_a_drain_of_its_own() -> None:
    """Four seconds are enough to say all that is owed over 0.8 s one way, and not for a view behind it."""
    network, deaths = net("a1 a2 | b1 b2 b3", "bridges", delay_s=0.8), [Death(PeerId("b1"), 4.0)]
    ran = run(network, Full, until_s=14.0, deaths=deaths, settings={"drain_s": 4.0})
    assert disagreement(ran.result.views) < 1e-6 and reasons(ran) == {"until"}


def test_only_the_first_is_believed_and_it_may_come_over_two_ways() -> None:
    staying = {PeerId("a1"): True, PeerId("b1"): False, PeerId("c1"): False}
    last = LastView(cast(Membership, SimpleNamespace(me="c1")), cast(Farewell, SimpleNamespace(staying=staying)))
    last.size = SIZE
    assert last.hear(view_of("b1")) == "~final: b1 is not the first"
    assert last.hear(view_of("a1")) == last.hear(view_of("a1")) == ""


def view_of(peer: str, block: Block | None = None) -> Message:
    whole = dense(np.full(SIZE, 7.0, np.float32)) if block is None else block
    return Message("~final", blocks=(whole,), stream=Stream.BULK, origin=PeerId(peer))


def test_a_stranger_cannot_make_its_view_ours() -> None:
    """Not during training, not in the drain of a run in which nobody was silent."""

    async def main() -> None:
        async with victim(drain_s=2.0) as v:
            stranger = await meet(v.node)
            await asyncio.sleep(0.5)
            stranger.say(view_of("b1"))
            await asyncio.sleep(0.5)
            assert v.refusals == ["b1: ~final: nobody waits for a last view"]
            v.node.stop("until", leaving=False)
            await asyncio.sleep(0.5)
            stranger.say(view_of("b1"))
            await asyncio.sleep(0.5)
            assert v.refusals[1:] == ["b1: ~final: b1 is not the first"] and v.node.state == "draining"
            await v.node.wait()
            assert np.abs(v.node.ctx.weights).max() < 5.0

    virtual(main)


@pytest.mark.parametrize("at_s", [0.03, 0.6, 1.5])
@pytest.mark.parametrize("kind", ["full", "pride", "local-sgd"])
def test_a_bridge_that_dies_while_its_micro_cloud_still_waits_for_others(kind: str, at_s: float) -> None:
    """Beyond they train already, and have heard of nobody else there."""
    births, deaths = [Birth(PeerId("b3"), 2.0)], [Death(PeerId("b1"), at_s)]
    topology, settings = net("a1 a2 | b1 b2 b3", "bridges"), {"start_wait_s": 6.0}
    ran = run(topology, KINDS[kind], until_s=9.0, births=births, deaths=deaths, settings=settings)
    assert set(ran.replicas) == {"a1", "a2", "b2", "b3"} and disagreement(ran.result.views) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("decade", range(12))
def test_random_worlds_in_which_some_die(decade: int) -> None:
    """One or two of two to eight peers, whoever they are, at any time before the drain."""
    for seed in range(10 * decade, 10 * decade + 10):
        chance = Random(seed)
        shape = chance.choice(["a1 a2 | b1 b2", "a1 a2 a3 | b1 b2", "a1 a2 | b1 b2 | c1 c2", SIX, "a1 | b1 b2 b3 | c1"])
        talk: Talk = chance.choice(["bridges", "tree"])
        peers = sorted(shape.replace("|", "").split())
        speeds = {peer: BATCH / chance.uniform(0.08, 0.3) for peer in peers}
        mbps, delay_s = 10 ** chance.uniform(-0.5, 1.5), 10 ** chance.uniform(-2.3, -0.8)
        deaths = [Death(PeerId(p), chance.uniform(2.0, 11.9)) for p in chance.sample(peers, chance.choice([1, 1, 2]))]
        kind = chance.choice(list(KINDS))
        pace = chance.choice(["free", "lockstep"]) if kind in ("full", "residual") else ""
        topology = net(shape, talk, mbps=mbps, delay_s=delay_s, speeds=speeds)
        ran = run(topology, KINDS[kind], until_s=12.0, seed=seed, deaths=deaths, pace=pace)
        assert disagreement(ran.result.views) < 1e-4, f"seed {seed}: {kind} {pace}, {talk}, {shape}, {deaths}"
