"""How long a drain lasts: as long as something moves, be it between others; and no longer, whoever says so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import pytest
from node_runs import Ran, Softmax, Talk, net, run
from test_node_life import stopping
from test_node_strangers import meet, victim, virtual

from dlion.exchange.base import Action, Context, Exchange, Send, Speech, Timer
from dlion.exchange.diloco import DiLoCo
from dlion.exchange.full import Full
from dlion.exchange.pride import Pride
from dlion.learn.workload import Ended, Indices
from dlion.mesh.topology import Resource, Topology
from dlion.messages import Message, PeerId, Stream
from dlion.net.wan import Rate
from dlion.node import Node
from dlion.patience import COUNT_MAX, DRAINS_MAX, TELL_S
from dlion.tensors import Flat, disagreement

DRAIN_S, UNTIL_S = 3.0, 6.0


def ended(network: Topology, exchange: Callable[[], Exchange] = Full, **of: Any) -> Ran:
    """``Full`` says 16 kB/s on each link, more than narrow ones carry."""
    of = {"pace": "free", "until_s": UNTIL_S, "workload": lambda _: Softmax("a1", 100), **of}
    return run(network, exchange, settings={"drain_s": DRAIN_S, "suspect_after_s": 30.0}, **of)


def ends(ran: Ran) -> list[tuple[str, float]]:
    return [(e["reason"], e["t"]) for peer in ran.replicas for e in ran.events(peer, "end")]


@pytest.mark.parametrize("talk", ["mesh", "bridges", "tree"])
def test_what_takes_longer_than_a_drain_is_said_to_the_end(talk: Talk) -> None:
    ran = ended(net("a1 a2 | b1 b2 | c1 c2", talk, mbps=0.04))
    assert max(at for _, at in ends(ran)) > UNTIL_S + 2 * DRAIN_S
    assert {reason for reason, _ in ends(ran)} == {"until"}
    assert disagreement(ran.result.replicas) < 1e-5


def test_a_loop_that_ends_with_the_others_is_in_no_hurry() -> None:
    """As ``torch.attach`` leaves: the node is told to finish, and then there is nothing more to train on."""
    nodes: dict[str, Node] = {}

    class Ending(Softmax):
        def gradient(self, weights: Flat, batch: Indices, out: Flat) -> float:
            for made in nodes.values():
                if asyncio.get_running_loop().time() > 4.0:
                    made.stop("the loop has ended", leaving=False)
            if nodes["a1"].ended:
                raise Ended("the training loop has ended")
            return super().gradient(weights, batch, out)

    def each(made: Node) -> None:
        nodes[made.me] = made

    ran = ended(net("a1 | b1", mbps=0.04), workload=lambda _: Ending("a1", 100), each=each, until_s=60.0)
    assert {reason for reason, _ in ends(ran)} == {"the loop has ended"}
    assert max(at for _, at in ends(ran)) > 4.0 + 2 * DRAIN_S and disagreement(ran.result.replicas) < 1e-5


@pytest.mark.parametrize("own_s", [{}, {"a1": 60.0, "b1": 60.0}])
def test_who_has_nothing_to_say_waits_for_others_that_have(own_s: Mapping[str, float]) -> None:
    """c1 has said and heard all there is over its own links at once; a1 and b1 close the last round over a narrow one,
    and c1 hears of it, however long these would wait themselves."""

    def each(made: Node) -> None:
        made.company.patience._drain_s = own_s.get(made.me, DRAIN_S)

    network = net("a1 | b1 | c1")
    narrow = {name: Resource(name, "path", Rate.constant(4e4)) for name in ("a1>b1", "b1>a1")}
    network = replace(network, resources={**network.resources, **narrow})
    ran = ended(network, partial(DiLoCo, local_steps=40), workload=lambda _: Softmax("a1", 3000), each=each)
    assert max(at for _, at in ends(ran)) > UNTIL_S + 2 * DRAIN_S
    assert {reason for reason, _ in ends(ran)} == {"until"}
    assert disagreement(ran.result.replicas) < 1e-5


class Owing(Exchange):
    """Owes for ever."""

    name = "owing"

    def owes(self, ctx: Context) -> bool:
        return True


def test_where_nothing_moves_it_is_over_after_one_drain() -> None:
    ran = run(net("a1 | b1"), Owing, until_s=1.0, settings={"drain_s": DRAIN_S})
    assert all(reason == "until (drain cut short)" and at < 1.2 + DRAIN_S for reason, at in ends(ran))


class Chatty(Owing):
    """Says in its drain, again and again, what nobody needs."""

    name = "chatty"
    speaks: ClassVar[Speech] = {"chat": {}}
    once = begun = False

    def drain(self, ctx: Context) -> Iterable[Action]:
        if not self.begun:
            yield Timer(ctx.now + 0.3, "chat")
        self.begun = True

    def on_timer(self, key: str, ctx: Context) -> Iterable[Action]:
        yield Send(tuple(ctx.links), Message("chat"))
        if not self.once:
            yield Timer(ctx.now + 0.3, "chat")


class Once(Chatty):
    name = "once"
    once = True


def test_that_something_moved_goes_round_and_comes_to_rest() -> None:
    """Over links so long that whoever is told of it tells it when others have long forgotten it."""
    settings = {"drain_s": 4.0, "suspect_after_s": 30.0}
    ran = run(net("a1 | b1 | c1", delay_s=3.0), Once, until_s=1.0, settings=settings)
    for reason, at in ends(ran):
        assert reason == "until (drain cut short)" and at < 1.4 + 6.0 + TELL_S + 3.0 + 4.0 + 1.0


def test_who_never_comes_to_an_end_is_cut_short_all_the_same() -> None:
    ran = run(net("a1 | b1"), Chatty, until_s=1.0, settings={"drain_s": 1.0})
    for reason, at in ends(ran):
        assert reason == "until (drain cut short)" and DRAINS_MAX < at < DRAINS_MAX + 1.3


@pytest.mark.parametrize("at_s", [0.95, 5.0])
def test_who_is_told_to_leave_while_it_drains_has_one_drain_more(at_s: float) -> None:
    """Also if it is told so before its drain has begun."""

    def each(made: Node) -> None:
        loop = asyncio.get_running_loop()
        loop.call_at(0.9, lambda: made.stop("stopped", leaving=False))
        loop.call_at(at_s, made.stop, "signal")

    for reason, at in ends(run(net("a1 | b1"), Chatty, settings={"drain_s": DRAIN_S}, each=each)):
        assert reason == "stopped (drain cut short)" and at_s + DRAIN_S - 0.1 < at < at_s + DRAIN_S + 0.3


def test_who_leaves_the_others_to_go_on_has_one_drain_in_all() -> None:
    ran = ended(net("a1 | b1", mbps=0.04), each=stopping("b1", 5.0), until_s=20.0)
    (end,) = ran.events("b1", "end")
    assert end["reason"] == "signal (drain cut short)" and end["t"] < 5.2 + DRAIN_S


def test_nobody_is_kept_for_ever_by_who_says_that_something_moves() -> None:
    """A stranger with the name of a peer, and counts that no honest peer would tell."""

    async def main() -> None:
        async with victim(drain_s=0.5) as v:
            stranger = await meet(v.node)
            v.node.stop("until", leaving=False)
            began = asyncio.get_running_loop().time()
            while v.node.state != "stopped":
                for count in (v.node.company.patience._count + 1, -(1 << 62), COUNT_MAX, (1 << 63) - 1):
                    stranger.say(Message("~still", fields={"count": count}, stream=Stream.CONTROL, origin=PeerId("b1")))
                await asyncio.sleep(0.1)
            assert 0.9 * DRAINS_MAX < (asyncio.get_running_loop().time() - began) / 0.5 < 1.1 * DRAINS_MAX
            assert 0 < v.node.company.patience._count < 400

    virtual(main)


@pytest.mark.parametrize("seed", [0, 1])
def test_nobody_ends_while_others_still_wait_for_words(seed: int) -> None:
    """Else it would be found silent, and those whose links are fuller would not wait for its last word any more."""
    speeds = {"a1": 24, "a2": 24, "b1": 12, "b2": 12, "c1": 4, "c2": 4}
    network, big = net("a1 a2 | b1 b2 | c1 c2", "bridges", mbps=50.0, speeds=speeds), partial(Softmax, features=20000)
    ran = run(network.capped(20000), Pride, until_s=8.0, seed=seed, workload=big, settings={"wan_bytes_per_s": 2e4})
    silent = [e for peer in ran.replicas for e in ran.events(peer, "member") if e["state"] == "silent"]
    assert not silent and disagreement(ran.result.views) < 1e-6
