"""What it takes to exchange updates through two exchange lanes: choose, encode, send, decode, check, add.

    python scripts/bench_exchange.py [--json] [--rounds 9]

Two processes on loopback, each with a lane (``dlion.lane.Replica`` in a thread) and a session over an upgraded
connection. Both say a whole update (``full``) at the same time; a round ends when both have added both. What the bare
link takes for the same bytes is in bench_link.py (its ``exchange_*`` figures); the difference is the lanes.

Then the lane alone: seconds per item and per byte scanned, which virtual time charges for it
(``NodeSettings.exchange_s_per_item`` and ``exchange_s_per_byte``); and what ``pride`` takes to say and to hear a step,
per entry of the model (the first is ``SAY_AS_HEAR`` times the second).
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection as Pipe
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import click
import numpy as np
import uvloop

from dlion.exchange import find
from dlion.exchange.base import Context, LinkView, Member, Update
from dlion.lane import Heard, Outcome, Replica
from dlion.mesh.bridges import plan
from dlion.mesh.topology import LinkSpec, PeerSpec, Topology
from dlion.messages import PeerId
from dlion.net.connection import Connection
from dlion.net.link import Link
from dlion.net.session import Session, SessionLimits
from dlion.net.upgrade import UpgradeDialer, peer_application, serve
from dlion.tensors import Layout
from dlion.wire.admit import Admit
from dlion.wire.limits import Limits

A, B = PeerId("a"), PeerId("b")
SIZES = {"40MB": 10_000_000, "4MB": 1_000_000, "1kB": 256}
SPAWN = multiprocessing.get_context("spawn")
WIDE_BPS = 8e9


def lane_of(me: PeerId, other: PeerId, size: int, exchange: str, rate_bps: float = WIDE_BPS) -> Replica:
    """``me``'s exchange lane with one neighbour, to whom the link has room for ``rate_bps``."""
    topology = Topology(
        "pair", {p: PeerSpec(p, p) for p in (A, B)}, {ends: LinkSpec(*ends) for ends in ((A, B), (B, A))}
    )
    strategy = find(exchange)()
    weights = np.zeros(size, dtype=np.float32)
    room = 1 << 40
    ctx = Context(
        me=me,
        cloud=me,
        layout=Layout(("w",), ((size,),)),
        weights=weights.view(),
        rng=np.random.default_rng(0),
        routes=plan(topology, {A: 1.0, B: 1.0}).routes(me),
        members={p: Member(p, p, batch=64) for p in (A, B)},
        links={other: LinkView(other, other, False, rate_bps, 0.0, room)},
        step_s=1.0,
        batch=64,
        global_batch=128,
    )
    strategy.ahead = False  # all that a step asks for at once
    return Replica(strategy, ctx, weights, Admit(size, strategy.speaks), Limits.of(size))


class End:
    """One process's side: the lane in a thread, the session on the loop."""

    def __init__(self, me: PeerId, other: PeerId, size: int, link: Link) -> None:
        self.other, self.size = other, size
        self.lane = lane_of(me, other, size, "full")
        self.thread = ThreadPoolExecutor(1)
        self.arrived: asyncio.Queue[Heard] = asyncio.Queue()
        self.step = 0
        rng = np.random.default_rng(ord(me))
        self.values = rng.standard_normal(size, dtype=np.float32)
        self.connection = Connection(
            Session(SessionLimits(message_bytes_max=1 << 28), asyncio.get_running_loop().time()),
            on_message=lambda stream, seq, body: self.arrived.put_nowait(Heard(other, stream, seq, body)),
            on_writable=lambda: None,
            on_lost=lambda reason: None,
        )
        self.connection.attach(link, {})

    async def run(self, item: Any) -> Outcome:
        return await asyncio.get_running_loop().run_in_executor(self.thread, self.lane.run, [item], 0.0)

    async def exchange(self) -> None:
        """Say one update, hear one, add both."""
        self.lane.ctx.links[self.other].writable_bytes = 1 << 40
        said = asyncio.create_task(self.say(Update(self.step, self.values, 1.0, 64, 0.1, 0.1)))
        heard = await self.arrived.get()
        outcome = await self.run(heard)
        assert outcome.events and not outcome.refused, outcome.refused
        await said
        self.step += 1

    async def say(self, update: Update) -> None:
        for spoken in (await self.run(update)).sends:
            self.connection.send(int(spoken[2].stream), spoken[1])


def serve_end(size: int, pipe: Pipe) -> None:
    """The other process: exchanges each time when asked over the pipe, and says so."""

    async def main() -> None:
        links: asyncio.Queue[Link] = asyncio.Queue()
        site = await serve(peer_application(links.put_nowait), "127.0.0.1", 0)
        pipe.send(site.port)
        end = End(B, A, size, await links.get())
        while await asyncio.to_thread(pipe.recv):
            await end.exchange()
            pipe.send("done")
        end.connection.close()
        await site.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def measure(size: int, rounds: int) -> float:
    """Median seconds until both have added both."""
    pipe, far = SPAWN.Pipe()
    worker = SPAWN.Process(target=serve_end, args=(size, far))
    worker.start()

    async def main() -> list[float]:
        link = await UpgradeDialer({"peer": f"127.0.0.1:{pipe.recv()}"}).dial("peer")
        end = End(A, B, size, link)
        taken = []
        for _ in range(rounds + 2):
            begin = time.perf_counter()
            pipe.send(True)
            await end.exchange()
            await asyncio.to_thread(pipe.recv)
            taken.append(time.perf_counter() - begin)
        pipe.send(False)
        await asyncio.sleep(0.1)
        return taken[2:]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        taken = runner.run(main())
    worker.join(10)
    worker.kill()
    return statistics.median(taken)


def lane_costs(rounds: int) -> tuple[float, float]:
    """(seconds per item, seconds per byte scanned) of one lane that says and hears with ``dlion``."""
    say_s, hear_s, _ = lane_seconds("dlion", 64, 40 * rounds, 8 * 200.0)
    small_s, size = say_s + hear_s, SIZES["4MB"]
    say_s, hear_s, scanned = lane_seconds("dlion", size, rounds, 8 * 0.4 * size)
    return small_s / 2, max(say_s + hear_s - small_s, 0.0) / (4 * scanned)


def lane_seconds(exchange: str, size: int, rounds: int, rate_bps: float = WIDE_BPS) -> tuple[float, float, float]:
    """Median CPU seconds of an own update, and of one heard, and entries scanned for both."""
    mine, theirs = lane_of(A, B, size, exchange, rate_bps), lane_of(B, A, size, exchange, rate_bps)
    rng = np.random.default_rng(0)
    said_s, heard_s, scanned = [], [], []
    for step in range(rounds + 2):
        values = rng.standard_normal((2, size), dtype=np.float32)
        begin = time.thread_time()
        own = mine.run([Update(step, values[0], 1.0, 64, 0.1, 0.1)], float(step))
        said_s.append(time.thread_time() - begin)
        body = theirs.run([Update(step, values[1], 1.0, 64, 0.1, 0.1)], float(step)).sends[0][1]
        begin = time.thread_time()
        heard = mine.run([Heard(B, 1, step + 1, body)], step + 0.5)
        heard_s.append(time.thread_time() - begin)
        scanned.append(own.scanned + heard.scanned)
    return statistics.median(said_s[2:]), statistics.median(heard_s[2:]), statistics.median(scanned[2:])


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one object instead of a table.")
@click.option("--rounds", default=9)
def main(as_json: bool, rounds: int) -> None:
    ratios = {f"lane_exchange_{name}_s": measure(size, rounds) for name, size in SIZES.items()}
    per_item, per_byte = lane_costs(rounds)
    ratios |= {"exchange_s_per_item": per_item, "exchange_s_per_byte": per_byte}
    say_s, hear_s, _ = lane_seconds("pride", SIZES["4MB"], rounds)
    ratios |= {"pride_say_s_per_entry": say_s / SIZES["4MB"], "pride_hear_s_per_entry": hear_s / SIZES["4MB"]}
    if as_json:
        print(json.dumps({"ratios": ratios}))
        return
    for name, value in ratios.items():
        print(f"{name:<24} {value:.3g}")


if __name__ == "__main__":
    main()
