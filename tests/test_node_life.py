"""How a node begins and ends: waiting for others, leaving, draining, being cancelled, failing; and what is left."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import numpy as np
import pytest
from aiohttp import ClientSession, web
from node_runs import BATCH, Ran, Softmax, net, node, outages, residual, run

from dlion import clock
from dlion.compute import Threads
from dlion.exchange.full import Full
from dlion.mesh.topology import PeerSpec, Topology
from dlion.messages import PeerId
from dlion.neighbours import DialSettings
from dlion.net.link import Link, LinkError
from dlion.net.pipe import pipe
from dlion.net.upgrade import UpgradeDialer, peer_application, serve
from dlion.node import Node, NodeSettings
from dlion.observe.runlog import Memory, RunLog
from dlion.porch import Alone
from dlion.simulation import MemoryNetwork, ModelledCompute
from dlion.status import StatusReader
from dlion.tensors import Flat, disagreement

# -- in virtual time -----------------------------------------------------------------------------------------------


def test_who_reaches_nobody_ends_with_a_clear_fault() -> None:
    async def main() -> None:
        topology = net("a1 a2 | b1")
        dialer = MemoryNetwork(topology).dialer(PeerId("a1"))
        made = node(topology, "a1", dialer, ModelledCompute(), exchange=Full(), settings=NodeSettings(start_wait_s=7.0))
        with pytest.raises(Alone, match=r"a1: no peer reachable within 7 s, tried a2, b1") as fault:
            async with made:
                await made.wait()
        assert isinstance(fault.value, LinkError) and asyncio.get_running_loop().time() == pytest.approx(7.0)

    clock.run(main())


def test_a_topology_of_one_trains_alone() -> None:
    ran = run(net("a1"), until_s=1.0)
    assert ran.result.steps == {"a1": 10}


def test_training_starts_without_the_missing_and_says_so() -> None:
    """b1 never comes: the others wait start_wait_s, log it, train, and end without waiting for it again."""

    async def main() -> None:
        topology, logs = net("a1 a2 | b1"), {}
        network = MemoryNetwork(topology)

        async def live(peer: str) -> None:
            logs[peer] = Memory()
            made = node(
                topology,
                peer,
                network.dialer(PeerId(peer)),
                ModelledCompute(),
                exchange=Full(),
                log=RunLog(logs[peer]),
                settings=NodeSettings(start_wait_s=4.0, until_s=3.0),
            )
            async with made:
                network.doors[PeerId(peer)] = made.accept
                await made.wait()
            assert made.step == 30 or made.step > 25

        async with asyncio.TaskGroup() as tasks:
            for peer in ("a1", "a2"):
                tasks.create_task(live(peer))
        for log in logs.values():
            assert b'"peer":"b1","state":"silent","incarnation":0,"why":"missing at the start"' in log.data
        assert asyncio.get_running_loop().time() < 4.0 + 3.0 + 1.0

    clock.run(main())


def stopping(peer: str, at_s: float, reason: str = "signal") -> Callable[[Node], None]:
    """Tells ``peer`` to stop at that time of its life, as the first Ctrl-C does."""

    def each(made: Node) -> None:
        if made.me == peer:
            enter = made.company.begin

            def begin(end: float | None) -> None:
                enter(end)
                asyncio.get_running_loop().call_later(at_s, made.stop, reason)

            made.company.begin = begin  # type: ignore[method-assign]

    return each


@pytest.mark.parametrize("pace", ["lockstep", "bounded"])
@pytest.mark.parametrize("talk", ["mesh", "bridges", "tree"])
def test_a_leaver_leaves_cleanly_while_the_others_train_on(talk: str, pace: str) -> None:
    """It is a bridge where there are bridges. It flushes what it owes, hears the goodbyes and is gone in a second or
    two; the others do not pause longer than a new bridge takes, and end with one model that holds all it did."""
    ran = run(
        net("a1 a2 | b1 b2 | c1 c2", talk),  # type: ignore[arg-type]
        Full,
        pace=pace,
        until_s=8.0,
        each=stopping("b1", 2.0),
    )
    (end,) = ran.events("b1", "end")
    assert end["reason"] == "signal" and end["t"] < 4.0
    stayed = {p: w for p, w in ran.result.replicas.items() if p != "b1"}
    assert disagreement(stayed) <= 1e-5
    for peer in stayed:
        times = [e["t"] for e in ran.events(peer, "step")]
        assert np.diff(times).max() < 1.0 and times[-1] > 7.5
        assert [e["state"] for e in ran.events(peer, "member") if e["peer"] == "b1"][-1] in ("left", "link lost")
        assert not any("cut short" in e["reason"] for e in ran.events(peer, "end"))
    steps = ran.result.steps[PeerId("b1")]
    for peer in stayed:
        assert sorted(e["step"] for e in ran.events(str(peer), "apply") if e["origin"] == "b1") == list(range(steps))


@pytest.mark.parametrize("talk", ["bridges", "tree"])
def test_a_bridge_that_leaves_over_narrow_links_takes_nothing_with_it(talk: str) -> None:
    """Its mates say what they still owe it for the cloud beyond, it passes that on, and only then it is gone."""
    ran = run(
        net("a1 a2 | b1 b2 | c1 c2", talk, mbps=0.2),  # type: ignore[arg-type]
        Full,
        pace="free",
        until_s=12.0,
        workload=lambda peer: Softmax(peer, 100),
        settings={"drain_s": 60.0},
        each=stopping("b1", 3.0),
    )
    assert ran.events("b1", "end")[0]["reason"] == "signal"
    assert disagreement({p: w for p, w in ran.result.replicas.items() if p != "b1"}) <= 1e-4


def test_a_drain_does_not_wait_for_the_dead() -> None:
    """b1 is cut off for ever shortly before the end; a1 ends when it is known to be silent."""
    ran = run(net("a1 | b1", up={("a1", "b1"): outages((2.5, 1e6))}), residual, until_s=3.0)
    ends = [ran.events(peer, "end")[0] for peer in ran.replicas]
    assert all(e["t"] < 3.0 + 2.0 + 1.0 and e["reason"] == "until" for e in ends)


def test_staleness_counts_steps_behind_our_last_one() -> None:
    """Two peers in lockstep apply each other's step n behind their own step n: 0, not 1."""
    ran: Ran = run(net("a1 | b1"))
    assert {n.replica.staleness_max for n in ran.nodes.values()} == {0}
    free = run(net("a1 | b1", speeds={"b1": BATCH / 1.0}), Full, pace="free")
    assert free.nodes["a1"].replica.staleness_max >= 8
    assert StatusReader(free.nodes["a1"])()["staleness_max"] >= 8
    assert StatusReader(free.nodes["a1"])()["staleness_max"] == 0, "since the last look"


# -- in real time, with real threads -------------------------------------------------------------------------------


class Pipes:
    """Two nodes of one process, joined by pipes."""

    def __init__(self) -> None:
        self.doors: dict[str, Callable[[Link], None]] = {}

    async def dial(self, peer: str) -> Link:
        if peer not in self.doors:
            raise LinkError(f"{peer} is not there yet")
        mine, theirs = pipe()
        self.doors[peer](theirs)
        return mine


def real(topology: Topology) -> Topology:
    """Without modelled compute."""
    peers = {name: PeerSpec(name, spec.cloud) for name, spec in topology.peers.items()}
    return Topology("real", peers, topology.links, topology.resources, topology.talk)


def debugged(main: Coroutine[Any, Any, None]) -> None:
    """Run ``main`` in asyncio's debug mode; afterwards no task and no thread of ours is left."""
    before = set(threading.enumerate())
    left: list[object] = []

    async def whole() -> None:
        await main
        left.extend(asyncio.all_tasks() - {asyncio.current_task()})

    asyncio.run(whole(), debug=True)
    assert not left
    assert not set(threading.enumerate()) - before


def settings(**changes: Any) -> NodeSettings:
    quick = DialSettings(backoff_min_s=0.01, backoff_max_s=0.05)
    return NodeSettings(**{"dial": quick, "status_every_s": 0.1, "drain_s": 5.0, **changes})


def pair(pipes: Pipes, **changes: Any) -> dict[str, Node]:
    topology = real(net("a1 | b1", mbps=1000.0))
    return {
        peer: node(topology, peer, pipes, Threads(), exchange=residual(), settings=settings(**changes))
        for peer in ("a1", "b1")
    }


def test_two_nodes_on_threads_train_drain_and_leave_nothing() -> None:
    async def main() -> None:
        pipes = Pipes()
        nodes = pair(pipes, until_s=0.5)
        async with nodes["a1"] as a1, nodes["b1"] as b1:
            pipes.doors |= {"a1": a1.accept, "b1": b1.accept}
            await asyncio.gather(a1.wait(), b1.wait())
        assert min(a1.step, b1.step) > 5
        assert disagreement({"a1": a1.ctx.weights, "b1": b1.ctx.weights}) <= 1e-5

    debugged(main())


class Slow(Softmax):
    """A step lasts a fifth of a second, and cannot be interrupted."""

    def gradient(self, weights: Flat, batch: Any, out: Flat) -> float:
        time.sleep(0.2)
        return super().gradient(weights, batch, out)


@pytest.mark.parametrize("kind", [Softmax, Slow])
def test_cancellation_is_prompt_and_leaves_nothing(kind: type[Softmax]) -> None:
    """Within a second, in the middle of a step, a wait or a conversation."""

    async def main() -> None:
        topology, pipes = real(net("a1 | b1", mbps=1000.0)), Pipes()

        async def live(peer: str) -> None:
            made = node(topology, peer, pipes, Threads(), exchange=residual(), settings=settings(), workload=kind(peer))
            async with made:
                pipes.doors[peer] = made.accept
                started.release()
                await made.wait()

        started = asyncio.Semaphore(0)
        tasks = [asyncio.create_task(live(peer)) for peer in ("a1", "b1")]
        for _ in tasks:
            await started.acquire()
        await asyncio.sleep(0.5)
        began = time.perf_counter()
        for task in tasks:
            task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert time.perf_counter() - began < 1.0
        assert all(isinstance(f, asyncio.CancelledError) for f in found)
        await asyncio.sleep(0.25 if kind is Slow else 0)  # a job under way ends with itself, and its thread with it

    debugged(main())


@pytest.mark.parametrize("lane", ["train", "exchange"])
def test_what_a_lane_raises_arrives_at_the_block_as_it_is(lane: str) -> None:
    """While the body awaits something else: it is cancelled, and the block raises the lane's own exception."""

    def bad(*_: object) -> Any:
        raise ZeroDivisionError(lane)

    async def main() -> None:
        pipes = Pipes()
        nodes = pair(pipes)
        target, name = (
            (nodes["a1"].learner.trainer.workload, "gradient")
            if lane == "train"
            else (nodes["a1"].exchange, "after_step")
        )
        setattr(target, name, bad)
        with pytest.raises(ZeroDivisionError, match=lane):
            async with nodes["b1"] as b1:
                pipes.doors["b1"] = b1.accept
                async with nodes["a1"] as a1:
                    pipes.doors["a1"] = a1.accept
                    await asyncio.sleep(30.0)

    debugged(main())


def test_an_exception_of_the_body_passes_through() -> None:
    async def main() -> None:
        pipes = Pipes()
        nodes = pair(pipes)
        with pytest.raises(KeyError, match="mine"):
            async with nodes["a1"]:
                raise KeyError("mine")

    debugged(main())


def test_an_application_answers_while_its_embedded_node_trains(capsys: pytest.CaptureFixture[str]) -> None:
    """An aiohttp application with a node mounted under /dlion, and a neighbour elsewhere, over loopback: requests are
    answered while both train; the loop's lateness is printed (and bounded generously: machines are busy)."""

    async def main() -> None:
        topology = real(net("a1 | b1", mbps=1000.0))
        addresses: dict[str, str] = {}
        logs = {peer: Memory() for peer in ("a1", "b1")}
        big = {peer: Softmax(peer, features=2000) for peer in logs}
        paths = {"a1": "/link", "b1": "/dlion/link"}
        nodes = {
            me: node(
                topology,
                me,
                UpgradeDialer(addresses, name=me, path=paths[other]),
                Threads(),
                exchange=residual(),
                log=RunLog(logs[me]),
                settings=settings(until_s=2.0),
                workload=big[me],
            )
            for me, other in (("a1", "b1"), ("b1", "a1"))
        }

        async def hello(_: web.Request) -> web.Response:
            return web.json_response({"step": nodes["b1"].step})

        mine = web.Application()
        mine.router.add_get("/", hello)
        mine.add_subapp("/dlion", peer_application(nodes["b1"].accept))
        sites = {"a1": await serve(peer_application(nodes["a1"].accept), "127.0.0.1", 0)}
        sites["b1"] = await serve(mine, "127.0.0.1", 0)
        addresses |= {peer: f"127.0.0.1:{site.port}" for peer, site in sites.items()}
        waits, late = [], []
        loop = asyncio.get_running_loop()
        async with ClientSession() as client, nodes["a1"] as a1, nodes["b1"] as b1:
            while b1.state in ("starting", "joining", "training"):
                asked = loop.time()
                async with client.get(f"http://127.0.0.1:{sites['b1'].port}/") as response:
                    answer = await response.json()
                waits.append(loop.time() - asked)
                due = loop.time() + 0.01
                await asyncio.sleep(0.01)
                late.append(loop.time() - due)
            await asyncio.gather(a1.wait(), b1.wait())
        for site in sites.values():
            await site.close()
        assert answer["step"] > 10 and min(a1.step, b1.step) > 10 and len(waits) > 20
        assert disagreement({"a1": a1.ctx.weights, "b1": b1.ctx.weights}) <= 1e-5
        kinds = {msgspec.json.decode(line)["e"] for log in logs.values() for line in log.data.splitlines()}
        assert {"apply", "send", "end"} <= kinds
        p50, p99 = np.quantile(late, [0.5, 0.99]) * 1e3
        print(f"answers p99 {np.quantile(waits, 0.99) * 1e3:.1f} ms; loop late p50 {p50:.1f} ms, p99 {p99:.1f} ms")
        assert np.quantile(late, 0.5) < 0.25 and np.quantile(waits, 0.5) < 0.5

    before = set(threading.enumerate())
    asyncio.run(main())
    assert not {t for t in set(threading.enumerate()) - before if t.name.startswith("dlion")}
    with capsys.disabled():
        print(capsys.readouterr().out.strip(), end=" ")
