"""Two peers that cannot reach each other talk through a third; nothing above the link knows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from node_runs import Ran, net, node, outages, run
from test_node_strangers import meet, victim

from dlion import clock
from dlion.compute import Threads
from dlion.exchange.base import Exchange
from dlion.exchange.full import Full
from dlion.exchange.localsgd import LocalSGD
from dlion.exchange.pride import Pride
from dlion.messages import PeerId
from dlion.net.greeting import Greeting
from dlion.net.link import Dialer, Link, LinkError
from dlion.net.pipe import pipe
from dlion.net.upgrade import UpgradeDialer, peer_application, serve
from dlion.node import Node, NodeSettings
from dlion.passages import HOLD_S, PASSAGES_MAX, Passages
from dlion.tensors import disagreement

A, B = PeerId("a"), PeerId("b")
OUT = {("a1", "b1"): outages((1.0, 21.0))}


def states(ran: Ran, peer: str, of: str) -> list[str]:
    return [e["state"] for e in ran.events(peer, "member") if e["peer"] == of]


@pytest.mark.parametrize("how", [Full, LocalSGD, Pride])
@pytest.mark.parametrize("talk", ["mesh", "bridges"])
def test_a_link_that_is_out_for_long_is_gone_round(how: Callable[[], Exchange], talk: str) -> None:
    """Nobody falls silent, nobody waits for long, and the direct way is taken again when it is there."""
    ran = run(net("a1 a2 | b1 b2", talk, up=OUT), how, until_s=40.0)  # type: ignore[arg-type]
    found = states(ran, "a1", "b1")
    assert "detour" in found and "silent" not in found and "silent" not in states(ran, "b1", "a1")
    last = max(e["t"] for e in ran.events("a1", "member") if e["state"] == "detour")
    assert last < 21.0
    for peer in ran.replicas:
        assert np.diff([e["t"] for e in ran.events(peer, "step")]).max() < 1.5, "lockstep waits for the way round"
    assert disagreement(ran.result.replicas) < 1e-5


def test_a_way_round_that_comes_too_late_takes_the_place_of_nothing() -> None:
    """Greetings over 0.3 s last longer than one waits before asking others for a way: it is not taken any more."""
    topology = net("a1 a2 | b1 b2 | c1 c2")
    far = {
        e: replace(k, delay_s=0.3) for e, k in topology.links.items() if {topology.cloud_of(p) for p in e} == {"b", "c"}
    }
    ran = run(replace(topology, links={**topology.links, **far}), Full, until_s=4.0)
    for peer in ran.replicas:
        assert not ran.events(peer, "refuse")
        assert not {e["state"] for e in ran.events(peer, "member") if e["t"] < 4.0} & {"detour", "link lost"}


def test_a_run_may_end_on_a_way_round() -> None:
    """Who passes words on does not leave before they are through."""
    ran = run(net("a1 a2 | b1 b2 | c1", up=OUT), Pride, until_s=10.0, momentum=0.9)
    assert states(ran, "a1", "b1")[-1] in ("detour", "finished")
    assert disagreement(ran.result.replicas) < 1e-5
    assert not any("cut short" in e["reason"] for p in ran.logs for e in ran.events(p, "end"))


def test_a_peer_that_nobody_can_dial_is_met_half_way() -> None:
    """On loopback: c knows nobody's address, and a and b know c's only. Both ask c for each other."""

    async def main() -> dict[str, Node]:
        topology = net("a1 | b1 | c1")
        compute = {peer: Threads() for peer in topology.peers}
        made: dict[str, Node] = {}

        def grown(peer: str, dialer: Dialer) -> Node:
            settings = NodeSettings(until_s=2.5, status_every_s=0.2)
            return node(topology, peer, dialer, compute[PeerId(peer)], exchange=Full(), settings=settings)

        made["c1"] = grown("c1", UpgradeDialer({}))
        site = await serve(peer_application(made["c1"].accept), "127.0.0.1", 0)
        for peer in ("a1", "b1"):
            made[peer] = grown(peer, UpgradeDialer({"c1": f"127.0.0.1:{site.port}"}))
        async with made["a1"], made["b1"], made["c1"]:
            await asyncio.gather(*(one.wait() for one in made.values()))
        await site.close()
        return made

    made = asyncio.run(main())
    assert min(one.step for one in made.values()) > 3
    a, b = made["a1"].ctx.weights, made["b1"].ctx.weights
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a)


# -- the third -----------------------------------------------------------------------------------------------------


class Doors:
    """A dialer to doors of our own; who has none cannot be reached."""

    def __init__(self) -> None:
        self.answered: dict[str, Link] = {}
        self.open: set[str] = set()

    async def dial(self, peer: str) -> Link:
        if peer not in self.open:
            raise LinkError(f"{peer} has no door")
        mine, self.answered[peer] = pipe()
        return mine


def asked() -> tuple[Greeting, Greeting]:
    """A link to the third: the asker's end, and the third's."""
    mine, theirs = pipe()
    return Greeting(mine), Greeting(theirs)


class Ear:
    def __init__(self) -> None:
        self.heard, self.lost = bytearray(), False
        self._buffer = memoryview(bytearray(1000))

    def get_buffer(self, size_hint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.heard += self._buffer[:nbytes]

    def link_writable(self) -> None: ...

    def link_lost(self, reason: str) -> None:
        self.lost = True


def test_it_carries_every_byte_both_ways_and_ends_with_either_link() -> None:
    async def main() -> None:
        doors = Doors()
        doors.open = {"b"}
        passages = Passages(doors, "abc")  # type: ignore[arg-type]
        asker, near = asked()
        assert await passages.carry(near, b"hello b", (A, B)) == ""
        assert passages
        target = Greeting(doors.answered["b"])
        assert await target.hear(1.0) == b"hello b"
        target.say(b"hello a")
        assert await asker.hear(1.0) == b"hello a"
        ears = Ear(), Ear()
        for greeting, ear in zip((asker, target), ears, strict=True):
            greeting.hand_over(ear)
        words = bytes(range(256)) * 1000
        asker.link.write(words)
        target.link.write(words[::-1])
        await asyncio.sleep(0.05)
        assert bytes(ears[1].heard) == words and bytes(ears[0].heard) == words[::-1]
        asker.link.close()
        await asyncio.sleep(0.05)
        assert ears[1].lost and not passages

    asyncio.run(main())


def test_it_says_why_it_cannot() -> None:
    async def main() -> None:
        passages = Passages(Doors(), "abc")  # type: ignore[arg-type]
        assert "not both are in the topology" in await passages.carry(asked()[1], b"", (A, PeerId("z")))
        started = asyncio.get_running_loop().time()
        assert await passages.carry(asked()[1], b"", (A, B)) == "no way to b"
        assert asyncio.get_running_loop().time() - started >= HOLD_S - 0.1
        assert not passages

    clock.run(main())


def test_it_passes_on_nobody_of_another_run() -> None:
    async def main() -> None:
        async with victim() as third:
            assert "run mismatch" in (await meet(third.node, to="b1", run="another")).hello.refusal
            assert "not both are in the topology" in (await meet(third.node, to="c1")).hello.refusal

    clock.run(main())


def test_it_carries_only_so_many() -> None:
    async def main() -> None:
        doors = Doors()
        doors.open = {"b"}
        passages = Passages(doors, "abc")  # type: ignore[arg-type]
        keep = []
        for _ in range(PASSAGES_MAX):
            keep.append(asked())
            assert await passages.carry(keep[-1][1], b"", (A, B)) == ""
        assert "passed on already" in await passages.carry(asked()[1], b"", (A, B))
        passages.close()
        assert not passages

    asyncio.run(main())


def test_who_waits_for_a_way_counts_too() -> None:
    async def main() -> None:
        passages = Passages(Doors(), "abc")  # type: ignore[arg-type]
        keep = [asked() for _ in range(PASSAGES_MAX + 1)]
        waiting = [asyncio.create_task(passages.carry(near, b"", (A, B))) for _, near in keep[1:]]
        await asyncio.sleep(0)
        assert "passed on already" in await passages.carry(keep[0][1], b"", (A, B))
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        assert await passages.carry(keep[0][1], b"", (A, B)) == "no way to b"

    clock.run(main())
