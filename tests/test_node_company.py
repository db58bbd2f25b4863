"""The others around one node: what makes it wait for them, and what does not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import pytest
from node_runs import Softmax, Talk, net, outages, run

from dlion.blocks import dense
from dlion.exchange.base import Action, Context, Exchange, LinkView, Send, Speech, Update
from dlion.exchange.full import Full
from dlion.exchange.pride import Pride
from dlion.messages import Message, PeerId
from dlion.patience import STILL_S
from dlion.simulation import Birth, Death
from dlion.tensors import disagreement


@pytest.mark.parametrize("kind", [Full, Pride])
@pytest.mark.parametrize("talk", ["mesh", "bridges"])
def test_a_drain_does_not_wait_for_an_end_of_the_news(kind: type[Exchange], talk: Talk) -> None:
    """Round trips of 0.4 s: at every moment some news is under way."""
    settings = {"status_every_s": 0.3, "drain_s": 20.0}
    ran = run(net("a1 a2 | b1", talk, delay_s=0.2), kind, until_s=2.0, settings=settings)
    for peer in ("a1", "a2", "b1"):
        assert ran.events(peer, "end")[0]["reason"] == "until" and ran.events(peer, "end")[0]["t"] < 4.5 + STILL_S


@pytest.mark.parametrize(("patience_s", "delay_s", "seed"), [(2.0, 0.01, 1), (3.0, 0.1, 1), (3.0, 0.1, 2)])
@pytest.mark.parametrize("talk", ["bridges", "tree"])
def test_a_bridge_that_dies_does_not_split_its_clouds(talk: Talk, patience_s: float, delay_s: float, seed: int) -> None:
    """A link counts as lost, and its end as silent, when the rest beyond counts as silent too. With the third of these
    cases each side would use another bridge than the other, and have nobody carry news over its own."""
    settings = {"suspect_after_s": patience_s, "lost_after_s": patience_s}
    deaths = [Death(PeerId("a1"), 3.0 + 0.37 * seed)]
    topology = net("a1 a2 | b1 b2", talk, delay_s=delay_s)
    ran = run(topology, Full, until_s=12.0, seed=seed, deaths=deaths, settings=settings)
    for peer in ("b1", "b2"):
        assert max(e["t"] for e in ran.events(peer, "apply") if e["origin"] == "a2") > 11.0
    assert {e["origin"] for e in ran.events("a2", "apply") if e["t"] > 11.0} == {"b1", "b2"}


@pytest.mark.parametrize("kind", [Full, Pride])
@pytest.mark.parametrize(("talk", "cut"), [("bridges", "a"), ("bridges", "b"), ("tree", "b")])
def test_what_is_said_while_a_whole_micro_cloud_is_silent_is_owed_to_it(
    kind: type[Exchange], talk: Talk, cut: str
) -> None:
    """For longer than anybody is waited for; both sides go on meanwhile, and each choose another bridge."""
    peers = ["a1", "a2", "b1", "b2", "b3", "c1", "c2"]
    up = {(p, q): outages((4.0, 12.0)) for p in peers for q in peers if p[0] == cut != q[0]}
    ran = run(net("a1 a2 | b1 b2 b3 | c1 c2", talk, up=up), kind, until_s=17.0)
    far = [p for p in peers if p[0] != cut]
    lost = [e["t"] for e in ran.events(far[0], "member") if e["state"] == "silent" and e["peer"][0] == cut]
    assert len(lost) >= 2 and disagreement(ran.result.views) < 1e-5


@pytest.mark.parametrize(("talk", "dead"), [("mesh", "b1"), ("mesh", "b2"), ("bridges", "b2")])
def test_who_dies_during_the_start_is_not_waited_for(talk: Talk, dead: str) -> None:
    """One more comes after that death, so that others are still joining; it never met the dead, and is told."""
    births, deaths = [Birth(PeerId("a2"), 1.5)], [Death(PeerId(dead), 0.6)]
    ran = run(net("a1 a2 | b1 b2", talk), Full, until_s=4.0, deaths=deaths, births=births)
    rest = {"a1", "a2", "b1", "b2"} - {dead}
    assert set(ran.result.views) == rest and ran.result.virtual_seconds < 10.0
    for peer in rest:
        assert len(ran.events(peer, "step")) > 10


def ticks(peers: str, seed: int) -> dict[str, list[float]]:
    """When each peer looks at its links and speaks of itself, in the run's time."""
    ran = run(net(peers), Full, until_s=3.0, seed=seed)
    return {peer: sorted({e["t"] for e in ran.events(peer, "link")}) for peer in peers.split()}


def test_peers_tick_out_of_step_by_seed_and_name() -> None:
    """Else everybody would speak in the same instant. Time begins for all within some ms of each other."""
    many = ticks("a1 a2 a3 b1 b2 b3", 0)
    for times in many.values():
        assert len(times) >= 3 and np.diff(times) == pytest.approx(1.0)
    phases = {peer: times[0] % 1.0 for peer, times in many.items()}
    assert min(np.diff(sorted(phases.values()))) > 0.01 and np.ptp(list(phases.values())) > 0.5
    few, other = ticks("a1 b3", 0), ticks("a1 b3", 1)
    for peer in ("a1", "b3"):
        assert few[peer][0] % 1.0 == pytest.approx(phases[peer], abs=0.03), "a peer's own, whoever else is there"
        assert abs(other[peer][0] % 1.0 - phases[peer]) > 0.04


class Waits(Exchange):
    """Says all that its link takes, twice, and would say more as soon as that can."""

    name = "waits"
    speaks: ClassVar[Speech] = {"push": {}}

    def __init__(self) -> None:
        self.told_s = 0.0
        self.said_s = 0.0

    def after_step(self, update: Update, ctx: Context) -> Iterable[Action]:
        if update.step > 1:
            return
        for link in ctx.links.values():
            share = 0.6 if update.step == 0 else 1.0
            entries = min(ctx.layout.size, int(share * link.writable_bytes / 4) + 1)
            yield Send((link.peer,), Message("push", update.step, blocks=(dense(update.values[:entries]),)))
            if update.step == 1:
                assert link.writable_bytes == 0
                self.said_s = ctx.now

    def on_writable(self, link: LinkView, ctx: Context) -> Iterable[Action]:
        if self.said_s and not self.told_s:
            self.told_s = ctx.now
        return ()


def test_who_saw_a_full_link_is_told_that_it_is_not() -> None:
    """The lane looks at the link, and takes 0.3 s for a hook in which it says all that the link takes by that look. But
    what was under way then has arrived meanwhile, so the link was never full in truth."""
    settings = {"exchange_s_per_item": 0.3}
    topology = net("a1 | b1", mbps=20.0, delay_s=0.06, speeds={"a1": 160.0, "b1": 160.0})
    ran = run(topology, Waits, until_s=4.0, settings=settings, workload=lambda peer: Softmax(peer, features=40_000))
    for node in ran.nodes.values():
        assert isinstance(node.exchange, Waits)
        assert 0.0 < node.exchange.said_s < node.exchange.told_s < node.exchange.said_s + 1.0
