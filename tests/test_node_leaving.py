"""Who leaves takes nothing with it: every step of everybody is added once by each of those who stay, whoever bridges.

The model is a ledger: each step marks an entry of its own, so that a replica says which steps it holds, and how often.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import numpy as np
import pytest
from node_runs import BATCH, Ran, Softmax, Talk, net, residual, run
from test_node_life import stopping

from dlion.blocks import dense
from dlion.exchange.base import Context, Exchange, LinkView, Member, Send, Update
from dlion.exchange.full import Full
from dlion.exchange.pride import Pride
from dlion.farewell import Farewell
from dlion.membership import Membership
from dlion.mesh.bridges import PeerRoutes, left_of, name_of, plan
from dlion.mesh.roster import Record
from dlion.messages import Message, PeerId, Span
from dlion.node import Node
from dlion.tensors import Layout, disagreement

STEPS_MAX = 80
ODD = 1000.0
"""Two steps share an entry: an even one adds 1 there, an odd one this."""
DUST = 1e-7
"""What a step adds elsewhere, so that it is said as a dense array, of the same size each time."""


def first_entry(peer: str, peers: list[str]) -> int:
    return peers.index(peer) * STEPS_MAX // 2


def ledger(peers: list[str]) -> type[Full]:
    class Ledger(Full):
        def weigh(self, update: Update, ctx: Context) -> float:
            assert update.step < STEPS_MAX
            update.values[:] = DUST
            update.values[first_entry(ctx.me, peers) + update.step // 2] = ODD if update.step % 2 else 1.0
            return 1.0

    return Ledger


def faults(ran: Ran, peers: list[str], stay: list[str]) -> list[tuple[str, str, int, int]]:
    """(replica, whose step, which, how often) wherever that is not once."""
    found = []
    for peer in stay:
        told = ran.replicas[peer] - ran.start
        for origin in peers:
            for step in range(STEPS_MAX):
                odd, even = divmod(round(float(told[first_entry(origin, peers) + step // 2])), int(ODD))
                times = odd if step % 2 else even
                if times != (step < ran.result.steps[PeerId(origin)]):
                    found.append((peer, origin, step, times))
    return found


@dataclass
class World:
    """One to three micro-clouds of one to three peers of any speeds over links of any rate and delay, of which one or
    two leave."""

    shape: str
    talk: Talk
    mbps: float
    delay_s: float
    speeds: dict[str, float]
    pace: str
    leave_at: dict[str, float]

    @classmethod
    def drawn(cls, seed: int) -> World:
        chance = Random(seed)
        shapes = ["a1 a2 | b1 b2 | c1 c2", "a1 a2 a3 | b1 b2 b3", "a1 a2 | b1 b2 b3 | c1 c2", "a1 | b1 b2 | c1"]
        shape = chance.choice([*shapes, "a1 a2 a3 | b1 b2 b3 | c1 c2 c3"])
        peers = shape.replace("|", "").split()
        talks: list[Talk] = ["bridges", "tree", "mesh"]
        talk = chance.choice(talks if seed % 4 == 0 else talks[:2])
        mbps = 10 ** chance.uniform(-1, 1) * len(peers) ** 2 / 60
        delay_s = 10 ** chance.uniform(-2.5, -0.7)
        speeds = {p: BATCH / chance.uniform(0.08, 0.4) for p in peers}
        pace = chance.choice(["free", "bounded"])
        leavers = chance.sample(peers, chance.choice([1, 1, 1, 2]))[: len(peers) - 2]
        return cls(shape, talk, mbps, delay_s, speeds, pace, {p: chance.uniform(1.0, 3.5) for p in leavers})

    @property
    def peers(self) -> list[str]:
        return self.shape.replace("|", "").split()

    def play(self, kind: Callable[[], Exchange]) -> Ran:
        peers, leave_at = self.peers, self.leave_at

        def each(made: Node) -> None:
            for peer, at_s in leave_at.items():
                stopping(peer, at_s)(made)

        return run(
            net(self.shape, self.talk, mbps=self.mbps, delay_s=self.delay_s, speeds=self.speeds),
            kind,
            pace=self.pace,
            until_s=6.0,
            workload=lambda peer: Softmax(peer, len(peers) * STEPS_MAX // 8),
            settings={"drain_s": 120.0},
            each=each,
        )


def leaves_nothing_out(world: World) -> None:
    ran = world.play(ledger(world.peers))
    assert not faults(ran, world.peers, [p for p in world.peers if p not in world.leave_at])
    assert not any("cut short" in ran.events(p, "end")[0]["reason"] for p in world.peers)
    for peer, at_s in world.leave_at.items():
        assert ran.events(peer, "end")[0]["t"] < at_s + 20.0


@pytest.mark.parametrize("seed", [12, 16, 37, 39, 63, 65, 74, 85, 353, 409, 512])
def test_every_step_is_added_once_by_all_who_stay(seed: int) -> None:
    """In these worlds steps were lost or added twice when everybody passed on by the plan that it had at the moment."""
    leaves_nothing_out(World.drawn(seed))


@pytest.mark.slow
@pytest.mark.parametrize("decade", range(20))
def test_every_step_is_added_once_by_all_who_stay_in_many_random_worlds(decade: int) -> None:
    for seed in range(10 * decade, 10 * decade + 10):
        leaves_nothing_out(World.drawn(seed))


@pytest.mark.parametrize("kind", [residual, Pride])
@pytest.mark.parametrize("seed", [16, 63])
def test_replicas_of_those_who_stay_agree(kind: Callable[[], Exchange], seed: int) -> None:
    """Also where steps are said in parts."""
    world = World.drawn(seed)
    ran = world.play(kind)
    assert disagreement({p: w for p, w in ran.result.views.items() if p not in world.leave_at}) < 1e-5


def test_a_word_goes_on_by_the_plan_under_which_it_was_said() -> None:
    """b1, the other end of a1's bridge, has left. What was said before goes on to it, and through it; what is said
    since to b2. Without room on the link nothing is lost, and the goodbye waits for that."""
    topology = net("a1 a2 | b1 b2", "bridges")
    before, after = (
        plan(topology, dict.fromkeys(topology.peers, 1.0)),
        plan(topology, {"a1": 1.0, "a2": 1.0, "b2": 1.0}),
    )
    left = name_of({PeerId("b1")}, topology)
    routes = PeerRoutes(after, PeerId("a1"), left, lambda name: after if name == left else before)
    weights, layout = np.zeros(4, dtype=np.float32), Layout(("w",), ((4,),))
    ctx = Context(PeerId("a1"), "a", layout, weights, np.random.default_rng(0), routes)
    ctx.members = {PeerId(p): Member(PeerId(p), p[0]) for p in ("a1", "a2", "b2")}
    ctx.links = {PeerId(p): LinkView(PeerId(p), p[0], p[0] == "a", writable_bytes=99) for p in ("a2", "b2")}
    ctx.former = {PeerId("b1"): LinkView(PeerId("b1"), "b", False, writable_bytes=99)}
    full = Full()
    full.setup(ctx)

    def passed_on(step: int, **more: str) -> list[tuple[tuple[str, ...], object]]:
        word = Message(
            "update",
            step,
            fields={"cloud": "a", **more},
            blocks=(dense(np.ones(4, dtype=np.float32)),),
            coverage=(Span(PeerId("a2"), step, step),),
            origin=PeerId("a2"),
            hop=PeerId("a2"),
        )
        said = [action for action in full.on_message(PeerId("a2"), word, ctx) if isinstance(action, Send)]
        return [(send.to, send.message.fields.get("plan")) for send in said]

    assert passed_on(0) == [(("b1",), None)]
    assert passed_on(1, plan=left) == [(("b2",), left)]
    ctx.former[PeerId("b1")].writable_bytes = 0
    assert not full.lags(ctx)
    assert passed_on(2) == [] and full.lags(ctx) and full.owes(ctx)
    ctx.former[PeerId("b1")].writable_bytes = 99
    (told,) = full.on_writable(ctx.former[PeerId("b1")], ctx)
    assert isinstance(told, Send) and told.to == ("b1",) and told.message.coverage == (("a2", 2, 2),)
    assert not full.lags(ctx) and not full.owes(ctx)


def test_what_is_owed_by_a_plan_that_came_twice_is_owed_together() -> None:
    """b1 leaves, comes again and leaves again, while its link takes nothing: both words are still owed to it."""
    topology = net("a1 a2 | b1 b2", "bridges")
    peers, gone, me = sorted(topology.peers), PeerId("b1"), PeerId("a1")
    before, after = (plan(topology, dict.fromkeys(found, 1.0)) for found in (peers, [p for p in peers if p != gone]))
    left = name_of({gone}, topology)
    there, away = (PeerRoutes(p, me, n, {"": before, left: after}.get) for p, n in ((before, ""), (after, left)))  # type: ignore[arg-type]
    ctx = Context(me, "a", Layout(("w",), ((4,),)), np.zeros(4, dtype=np.float32), np.random.default_rng(0), there)
    ctx.members = {p: Member(p, p[0]) for p in peers}
    link = LinkView(gone, "b", lan=False)
    full = Full()
    full.setup(ctx)
    for step in range(2):
        ctx.routes, ctx.links, ctx.former = there, {gone: link}, {}
        list(full.on_members(ctx))
        list(full.after_step(Update(step, np.ones(4, dtype=np.float32), 0.0, 1, 0.1, 0.1), ctx))
        ctx.routes, ctx.links, ctx.former = away, {}, {gone: link}
        list(full.on_members(ctx))
    link.writable_bytes = 99
    said = [action.message for action in full.on_writable(link, ctx) if isinstance(action, Send)]
    assert [span for message in said for span in message.coverage] == [("a1", 0, 1)]
    np.testing.assert_allclose(said[0].blocks[0].values, 2 * ctx.share)


def test_nobody_else_says_our_last_word() -> None:
    membership = Membership(Record(PeerId("a1")), net("a1 a2 a3"), 3.0)
    told: list[tuple[tuple[PeerId, ...], str]] = []
    farewell = Farewell(membership, {}, lambda to, message: told.append((to, message.kind)))
    word = Message("~done", fields={"peer": "a1", "leaving": True}, hop=PeerId("a2"))
    assert farewell.hear(word) == [] and told == [(("a2",), "~bye")]


def test_a_plan_is_known_by_who_has_left() -> None:
    topology = net("a1 a2 a3 | b1 b2 | c1 c2", "tree")
    for left in ([], ["a1"], ["b2", "c2"], sorted(topology.peers)):
        assert left_of(name_of({PeerId(p) for p in left}, topology), topology) == set(left)
    assert name_of((), topology) == ""
    for wrong in ("x", "-1", "1" * 100, "0x1", " 1"):
        assert left_of(wrong, topology) == frozenset()


def test_what_goes_downstream_reaches_each_of_the_others_once() -> None:
    topology = net("a1 a2 a3 | b1 b2 | c1 c2", "tree")
    routes = plan(topology, dict.fromkeys(topology.peers, 1.0))
    for me, spec in topology.peers.items():
        links = [(me, to) for to in routes.onward(me, None, spec.cloud)]
        links += [link for _, to in list(links) for link in routes.downstream(to, me, spec.cloud)]
        assert sorted(to for _, to in links) == sorted(topology.peers.keys() - {me})
