"""Newcomers: a peer comes late, or again, while the others go on. Every update reaches every replica once, whatever
happens when; nobody waits for the one who comes; and who may not come, or is let down, leaves the run as it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from newcomer_runs import Scene, check, played
from node_runs import Softmax, Talk, far_off, net, run

from dlion.blocks import Block, dense
from dlion.cli.build import Plan
from dlion.cli.simulate import Played, play
from dlion.config import load_job, load_topology
from dlion.exchange.full import Full
from dlion.exchange.pride import Pride
from dlion.mesh.presence import PresenceError
from dlion.mesh.topology import Topology
from dlion.messages import Message, PeerId, Stream
from dlion.net.wan import Rate
from dlion.newcomers import PIECE_ENTRIES, Entry, digest
from dlion.node import Node
from dlion.observe.runlog import Step
from dlion.simulation import Birth, Death
from dlion.tensors import disagreement


def random_run(seed: int, talk: Talk) -> None:
    scene = Scene.draw(seed, talk)
    speculation = float(scene.rng.choice([0.0, 1.0]))
    ran, books = scene.play(seed, lambda: Pride(speculation=speculation))
    check(ran, books, scene.topology)
    assert scene.gap_s(ran) < 0.5, "nobody waits"


# -- one at a time -------------------------------------------------------------------------------------------------


def test_who_comes_late_holds_all_and_counts_from_then_on() -> None:
    topology = net("a1 a2 b1")
    ran, books = played(topology, [Birth(PeerId("b1"), 5.0)], [])
    check(ran, books, topology)
    first = ran.events("b1", "step")[0]
    assert 5.0 - 2.5 < first["t"] < 5.5 and first["n"] >= 20, "it begins where the others are, in age and in steps"
    lives = [e for e in ran.events("a1", "member") if e["peer"] == "b1" and e["state"] != "detour"]
    assert [e["why"] for e in lives][:3] == ["missing at the start", "comes into the run", "heard again"]
    assert {e["origin"] for e in ran.events("a1", "apply")} == {"a2", "b1"}


@pytest.mark.parametrize("gap_s", [0.02, 1.0])
def test_who_died_comes_again_before_or_after_its_death_was_noticed(gap_s: float) -> None:
    topology = net("a1 a2 b1", mbps=0.2)
    b1 = PeerId("b1")
    ran, books = played(topology, [Birth(b1, 4.0 + gap_s)], [Death(b1, 4.0)])
    check(ran, books, topology)
    assert set(ran.result.views) == set(topology.peers)
    did = next(sum(did) for node, did in books.lives if node.me == b1)
    gap = np.abs(books.settled["b1"] - did).max() / np.abs(did).max()
    assert gap < 0.2, "its former life was heard, but for its end, and that is settled"


def test_who_comes_twice_leaves_one_estate_of_all_its_lives() -> None:
    b1 = PeerId("b1")
    births, deaths = [Birth(b1, 3.0), Birth(b1, 6.0)], [Death(b1, 2.0), Death(b1, 5.0)]
    topology = net("a1 a2 b1")
    ran, books = played(topology, births, deaths, until_s=16.0)
    check(ran, books, topology)
    first, second, _ = (sum(did) for node, did in books.lives if node.me == b1)
    assert np.abs(books.settled["b1"] - first - second).max() < 0.2 * np.abs(first + second).max()


def test_two_come_at_once_behind_two_sponsors() -> None:
    """Neither sponsor knows of the other's guest when it copies itself."""
    topology = net("a1 a2 b1 b2", delay_s=0.1)
    topology = Topology("test", topology.peers, topology.links, topology.resources, "mesh")
    ran, books = played(topology, [Birth(PeerId("a2"), 5.0), Birth(PeerId("b2"), 5.05)], [])
    check(ran, books, topology)
    assert set(ran.result.views) == set(topology.peers)


@pytest.mark.parametrize("talk", ["bridges", "tree"])
def test_behind_a_bridge_the_far_side_hears_it_too(talk: Talk) -> None:
    topology = net("a1 a2 | b1 b2 b3", talk)
    b3 = PeerId("b3")
    ran, books = played(topology, [Birth(b3, 4.5)], [Death(b3, 2.5)])
    check(ran, books, topology)
    assert b3 in ran.result.views and len(ran.events("b3", "step")) > 50


def test_a_bridge_that_died_comes_again_as_another() -> None:
    """What is said to a dead bridge, until its silence is noticed, is lost beyond, but for the last view; its return
    costs no more."""
    a1, deaths = PeerId("a1"), [Death(PeerId("a1"), 4.0)]
    topology = net("a1 a2 a3 | b1 b2", "bridges")
    ran, _ = played(topology, [Birth(a1, 6.0)], deaths, until_s=14.0)
    assert set(ran.result.views) == set(topology.peers) and disagreement(ran.result.views) < 1e-6
    off, without = far_off(ran), far_off(played(topology, [], deaths, until_s=14.0)[0])
    assert max(off["a2"], off["a3"]) < 1e-4
    assert max(off["b1"], off["b2"]) < 1.2 * max(without.values())
    assert {node.membership.plan.bridges["a", "b"] for node in ran.nodes.values()} == {("a2", "b1")}


def test_who_comes_is_a_bridge_when_all_who_came_before_are_gone() -> None:
    a1, a2 = PeerId("a1"), PeerId("a2")
    ran, _ = played(net("a1 a2 | b1 b2", "bridges"), [Birth(a1, 6.0)], [Death(a1, 4.0), Death(a2, 9.0)], until_s=16.0)
    assert {ran.nodes[str(peer)].membership.plan.bridges["a", "b"] for peer in ran.result.views} == {("a1", "b1")}
    for peer in ("b1", "b2"):
        assert [e["t"] for e in ran.events(peer, "apply") if e["origin"] == a1][-1] > 15.0, "the other side hears it"


# -- who is not taken, and who is let down -------------------------------------------------------------------------


def test_in_lockstep_nobody_is_taken_and_all_go_on() -> None:
    b1 = PeerId("b1")
    ran = run(net("a1 a2 b1"), Full, until_s=12.0, births=[Birth(b1, 5.0)], settings={"start_wait_s": 1.0})
    assert "full in lockstep takes nobody into a run under way" in ran.result.turned_away[b1]
    assert set(ran.result.views) == {"a1", "a2"} and ran.result.steps[PeerId("a1")] > 50


def test_nobody_is_taken_just_before_the_end() -> None:
    b1 = PeerId("b1")
    ran, _ = played(net("a1 a2 b1"), [Birth(b1, 9.0)], [])
    assert "about to end" in ran.result.turned_away[b1]
    assert disagreement(ran.result.views) < 1e-4


def test_a_sponsor_that_dies_while_it_is_copied_is_replaced_by_another() -> None:
    """Narrow links: the copy takes long. a1 is asked first, dies in the middle, and b1 comes in behind a2."""
    topology = net("a1 a2 b1", mbps=0.2)
    b1, wide = PeerId("b1"), lambda peer: Softmax(peer, 500)
    ran, books = played(topology, [Birth(b1, 4.0)], [Death(PeerId("a1"), 4.6)], workload=wide)
    check(ran, books, topology)
    assert set(ran.result.views) == {"a2", "b1"}


def test_a_newcomer_that_dies_on_the_threshold_leaves_nothing_behind() -> None:
    topology = net("a1 a2 b1", mbps=0.2)
    b1, wide = PeerId("b1"), lambda peer: Softmax(peer, 500)
    ran, books = played(topology, [Birth(b1, 4.0)], [Death(b1, 4.5)], workload=wide)
    check(ran, books, topology)
    assert set(ran.result.views) == {"a1", "a2"}
    for peer in ("a1", "a2"):
        assert np.diff([e["t"] for e in ran.events(peer, "step")]).max() < 0.2


@pytest.mark.parametrize(
    ("claim", "words"), [({"model": "other"}, "model mismatch"), ({"run": "other"}, "run mismatch")]
)
def test_who_is_of_another_run_or_model_is_refused_as_ever(claim: Mapping[str, Any], words: str) -> None:
    b1 = PeerId("b1")

    def each(node: Node) -> None:
        if node.me == b1:
            neighbours = node.neighbours
            neighbours.identity = neighbours.identity.__class__(**{**vars(neighbours.identity), **claim})

    topology = net("a1 a2 b1")
    with pytest.raises(Exception, match=words):
        run(topology, Pride, until_s=8.0, births=[Birth(b1, 4.0)], each=each, settings={"start_wait_s": 2.0})


def piece(entry: Entry, block: Block, **changes: Any) -> Message:
    fields = {"of": "", "at": 1, "count": 1, "hash": digest(block), "step": 3, "t": 1.0, "cut": 0, **changes}
    return Message("~piece", fields=fields, blocks=(block,), stream=Stream.BULK, hop=entry.sponsor)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"hash": "0" * 16}, "hash"),
        ({"at": 2}, "not asked for"),
        ({"count": 10**6}, "pieces"),
        ({"count": 0}, "pieces"),
    ],
)
def test_a_torn_or_forged_copy_is_refused(changes: Mapping[str, Any], fault: str) -> None:
    values = np.ones(10, dtype=np.float32)
    entry = Entry(PeerId("a1"), 1, 10, 3)
    assert fault in entry.take(piece(entry, dense(values), **changes))
    assert "entries" in entry.take(piece(entry, dense(values[:9])))
    assert not entry.done and entry.take(piece(entry, dense(values))) == "" and entry.done


def test_a_copy_that_has_no_end_is_refused() -> None:
    """Else its sender could fill our memory with arrays."""
    entry, block = Entry(PeerId("a1"), 1, 10, 3), dense(np.ones(10, dtype=np.float32))
    assert entry.take(piece(entry, block, count=2)) == ""
    assert "pieces" in entry.take(piece(entry, block, of="more", at=2, count=1))


def test_a_large_copy_comes_in_pieces() -> None:
    size = PIECE_ENTRIES + 5
    values = np.arange(size, dtype=np.float32)
    entry = Entry(PeerId("a1"), 1, size, 3)
    for at, start in enumerate((0, PIECE_ENTRIES), 1):
        block = dense(values[start : start + PIECE_ENTRIES], start=start)
        assert entry.take(piece(entry, block, at=at, count=2)) == ""
    assert entry.done
    np.testing.assert_array_equal(entry.arrays[""], values)


# -- at random -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [7])
def test_at_random_moments_everything_is_held_once(seed: int) -> None:
    random_run(seed, "mesh")


@pytest.mark.slow
@pytest.mark.parametrize("decade", range(12))
def test_at_many_random_moments_everything_is_held_once(decade: int) -> None:
    for seed in range(10 * decade, 10 * decade + 10):
        random_run(seed, "mesh")


@pytest.mark.slow
@pytest.mark.parametrize("talk", ["bridges", "tree"])
@pytest.mark.parametrize("decade", range(3))
def test_behind_bridges_at_many_random_moments(decade: int, talk: Talk) -> None:
    for seed in range(10 * decade, 10 * decade + 10):
        random_run(seed, talk)


# -- by their presence ---------------------------------------------------------------------------------------------


def present(peer: str, *times_s: float) -> Topology:
    """hetero-system, where ``peer`` is there from 0 to the first time, then from each second to each third, ..."""
    topology = load_topology("hetero-system")
    values = [float(i % 2 == 0) for i in range(len(times_s) + 1)]
    rate = Rate.steps([0.0, *times_s], values, loop=False)
    changed = replace(topology.peers[PeerId(peer)], presence=rate)
    return replace(topology, peers={**topology.peers, changed.name: changed})


def toy(topology: Topology, exchange: str) -> Played:
    return play(Plan(load_job("toy", {"exchange.name": exchange, "job.until": 14.0, "model.size": 300}), topology))


def test_simulate_plays_who_leaves_and_comes_back() -> None:
    run = toy(present("b1", 4.0, 6.0), "pride")
    assert set(run.views) == set(present("b1").peers) and disagreement(run.views) < 1e-4
    at = run.run.peers["b1"][Step]["t"]
    there = [((at > begin) & (at < end)).any() for begin, end in ((1.0, 3.9), (4.1, 5.4), (6.5, 14.0))]
    assert there == [True, False, True], "its clock is the run's, which began a moment later than the simulation"


def test_simulate_refuses_to_play_that_in_lockstep() -> None:
    with pytest.raises(PresenceError, match="b1 comes at 6 s, but full at pace lockstep"):
        toy(present("b1", 4.0, 6.0), "full")
