"""What a link costs: goodput against raw sockets, exchange times, use and waiting behind an outside bottleneck, and
what a link that we shape ourselves delivers of its trace in a minute.

Every sender and receiver is a process of its own on loopback. Raw sockets and sessions take turns, so that a busy
machine slows both; the ratios are what to keep.

    python scripts/bench_link.py [--quick] [--json] [--only goodput|exchange|relay|shaped] [--loop asyncio|uvloop]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import statistics
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvloop

from dlion.net.connection import Connection
from dlion.net.link import Link
from dlion.net.relay import Lane, Way, relay
from dlion.net.session import Session, SessionLimits
from dlion.net.shaped import Bottleneck, Route
from dlion.net.upgrade import UpgradeDialer, peer_application, serve
from dlion.net.wan import Rate

CONTROL, UPDATE = 0, 1
MIB = 1 << 20
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}
TABLES = ("relay", "shaped")
SPAWN = multiprocessing.get_context("spawn")
TALLY = struct.Struct("<qdd")


class Talker:
    """One end of a session; remembers what came."""

    def __init__(self, link: Link) -> None:
        self.heard: asyncio.Queue[tuple[int, memoryview]] = asyncio.Queue()
        self.connection = Connection(
            Session(SessionLimits(), asyncio.get_running_loop().time()),
            on_message=self.on_message,
            on_writable=self.on_writable,
            on_lost=lambda reason: None,
        )
        self.connection.attach(link, {})

    def on_message(self, stream: int, seq: int, body: memoryview) -> None:
        self.heard.put_nowait((stream, body))

    def on_writable(self) -> None:
        pass

    def say(self, body: bytes, stream: int = CONTROL) -> None:
        self.connection.send(stream, body)

    async def hear(self) -> tuple[int, memoryview]:
        return await self.heard.get()


class Server(Talker):
    """Counts updates; answers control: ``e...`` comes back, ``x`` + size is answered by as many bytes at once,
    ``t`` + seconds by (bytes, seconds) of the updates that arrived since the first one that is that old."""

    def __init__(self, link: Link) -> None:
        super().__init__(link)
        self.arrived: list[tuple[float, int]] = []

    def on_message(self, stream: int, seq: int, body: memoryview) -> None:
        if stream == UPDATE:
            self.arrived.append((time.monotonic(), len(body)))
            if body[0] == ord("x"):
                self.say(b"got")
            return
        word, rest = bytes(body[:1]), bytes(body[1:])
        if word == b"e":
            self.say(bytes(body))
        elif word == b"x":
            self.say(bytes(int(rest)), UPDATE)
        elif word == b"t":
            first = self.arrived[0][0] + float(rest)
            counted = [(at, n) for at, n in self.arrived if at >= first]
            self.say(TALLY.pack(sum(n for _, n in counted[1:]), counted[0][0], counted[-1][0]))
            self.arrived.clear()


def serve_sessions(loop: str, pipe: Any) -> None:
    async def main() -> None:
        talkers: list[Server] = []
        site = await serve(peer_application(lambda link: talkers.append(Server(link))), "127.0.0.1", 0)
        pipe.send(site.port)
        await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        await site.close()

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(main())


def serve_raw(pipe: Any) -> None:
    """Receives messages of 1 MiB with recv_into; says how long all but the first took."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname()[1])
        place = memoryview(bytearray(MIB))
        while (count := pipe.recv()) is not None:
            connection, _ = listener.accept()
            with connection:
                start = 0.0
                for i in range(count):
                    filled = 0
                    while filled < MIB:
                        filled += connection.recv_into(place[filled:])
                    start = time.monotonic() if i == 0 else start
                pipe.send(time.monotonic() - start)


def serve_relay(target: int, rate_bps: float, rtt_s: float, pipe: Any) -> None:
    async def main() -> None:
        ways = Way(("there",), rtt_s / 2), Way(("back",), rtt_s / 2)
        rate = Rate.constant(rate_bps)
        running = await relay([Lane(f"127.0.0.1:{target}", *ways)], {"there": rate, "back": rate})
        pipe.send(running.ports[0])
        await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        await running.close()

    asyncio.run(main())


@contextmanager
def process(target: Callable[..., None], *arguments: object) -> Iterator[tuple[int, Any]]:
    """A process that says its port; it ends when told None."""
    here, there = SPAWN.Pipe()
    child = SPAWN.Process(target=target, args=(*arguments, there), daemon=True)
    child.start()
    try:
        yield here.recv(), here
    finally:
        here.send(None)
        child.join(5)
        child.kill()


async def connected(port: int, route: Route | None = None) -> Talker:
    link: Link = await UpgradeDialer({"peer": f"127.0.0.1:{port}"}).dial("peer")
    return Talker(route.shape(link) if route is not None else link)


async def tally(talker: Talker, skip_s: float = 0.0) -> tuple[int, float]:
    """(bytes, seconds) of the updates at the other end, when all sent before have arrived."""
    while talker.connection.session.queued_bytes or talker.connection.unacked_bytes:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    talker.say(b"t%g" % skip_s)
    while True:
        _, body = await talker.hear()
        if len(body) == TALLY.size:
            nbytes, first, last = TALLY.unpack(body)
            return nbytes, last - first


def raw_goodput(port: int, pipe: Any, count: int) -> float:
    pipe.send(count)
    message = bytes(MIB)
    with socket.create_connection(("127.0.0.1", port)) as sock:
        for _ in range(count):
            sock.sendall(message)
        return (count - 1) * MIB / float(pipe.recv())


async def session_goodput(talker: Talker, count: int) -> float:
    message = bytes(MIB)
    for _ in range(count):
        talker.say(message, UPDATE)
    nbytes, seconds = await tally(talker)
    return nbytes / seconds


def bench_goodput(loop: str, quick: bool) -> dict[str, float]:
    """Interleaved; the ratio is the median of the ratios of neighbours."""
    count, rounds = (200, 5) if quick else (400, 9)

    async def main(port: int, raw_port: int, raw_pipe: Any) -> list[tuple[float, float]]:
        talker = await connected(port)
        await session_goodput(talker, 50)
        raw_goodput(raw_port, raw_pipe, 50)
        return [(await session_goodput(talker, count), raw_goodput(raw_port, raw_pipe, count)) for _ in range(rounds)]

    with (
        process(serve_sessions, loop) as (port, _),
        process(serve_raw) as (raw_port, raw_pipe),
        asyncio.Runner(loop_factory=LOOPS[loop]) as runner,
    ):
        pairs = runner.run(main(port, raw_port, raw_pipe))
    return {
        "session_GB_per_s": statistics.median(s for s, _ in pairs) / 1e9,
        "raw_GB_per_s": statistics.median(r for _, r in pairs) / 1e9,
        "goodput_of_raw_socket": statistics.median(s / r for s, r in pairs),
    }


async def exchange(talker: Talker, size: int) -> float:
    """Seconds until both ends have what the other sent at the same time."""
    mine = b"x" + bytes(size - 1)
    start = time.perf_counter()
    talker.say(b"x%d" % size)
    talker.say(mine, UPDATE)
    missing = {"got", "theirs"}
    while missing:
        stream, _ = await talker.hear()
        missing.discard("theirs" if stream == UPDATE else "got")
    return time.perf_counter() - start


def bench_exchange(loop: str, quick: bool) -> dict[str, float]:
    async def main(port: int) -> dict[str, float]:
        talker = await connected(port)
        result = {}
        for name, size, times in (("40MB", 40_000_000, 9), ("4MB", 4_000_000, 25), ("1kB", 1000, 200)):
            await exchange(talker, size)
            rounds = [await exchange(talker, size) for _ in range(times if not quick else max(5, times // 3))]
            result[f"exchange_{name}_s"] = statistics.median(rounds)
        return result

    with process(serve_sessions, loop) as (port, _), asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        return runner.run(main(port))


async def saturate(
    port: int, rate_bps: float, rtt_s: float, seconds: float, route: Route | None = None
) -> tuple[float, float]:
    """(share of the rate used once it had ``warm_s`` to find it, longest echo of a control message beyond the RTT)."""
    talker = await connected(port, route)
    loop = asyncio.get_running_loop()
    message = bytes(max(1024, int(rate_bps / 8 * 0.02)))
    warm_s = 1.0 + 5 * rtt_s
    start = loop.time()
    end, next_echo, waits, asked = start + warm_s + seconds, start + warm_s, [0.0], 0.0
    while loop.time() < end:
        while talker.connection.session.queued_bytes < 20 * len(message):
            talker.say(message, UPDATE)
        if not asked and loop.time() >= next_echo:
            asked = loop.time()
            talker.say(b"e")
        await asyncio.sleep(0.002)
        while not talker.heard.empty():
            talker.heard.get_nowait()
            waits.append(loop.time() - asked - rtt_s)
            asked, next_echo = 0.0, loop.time() + 0.03
    nbytes, took = await tally(talker, warm_s)
    talker.connection.close()
    return nbytes * 8 / took / rate_bps, max(waits)


def bench_relay(loop: str, quick: bool) -> list[dict[str, float]]:
    rows = []
    for mbit in (5, 20, 50, 200):
        for rtt_ms in (1, 100) if quick else (1, 10, 50, 100, 200):
            with (
                process(serve_sessions, loop) as (target, _),
                process(serve_relay, target, mbit * 1e6, rtt_ms / 1e3) as (port, _),
                asyncio.Runner(loop_factory=LOOPS[loop]) as runner,
            ):
                used, wait = runner.run(saturate(port, mbit * 1e6, rtt_ms / 1e3, 1.5 if quick else 4.0))
            rows.append({"mbit_per_s": mbit, "rtt_ms": rtt_ms, "utilisation": used, "control_wait_s": wait})
    return rows


def bench_shaped(loop: str, quick: bool) -> list[dict[str, float]]:
    """Shares of a constant rate, and of one that jumps between a half and three halves of it every 0.7 s."""
    rows = []
    for mbit in (5, 50, 200):
        for jumps in (0.0, 0.5):
            steps = [mbit * 1e6 * (1 - jumps), mbit * 1e6 * (1 + jumps)]
            rate = Rate.steps([0.0, 0.7], steps, loop=True, period_s=1.4)
            with process(serve_sessions, loop) as (port, _), asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
                route = Route((Bottleneck(rate),), 0.01)
                used, wait = runner.run(saturate(port, mbit * 1e6, 0.01, 10 if quick else 60, route))
            rows.append({"mbit_per_s": mbit, "jumps": jumps, "delivered": used, "control_wait_s": wait})
    return rows


TARGETS = {
    "delivered_min": (">=", 0.97),
    "goodput_of_raw_socket": (">=", 0.85),
    "exchange_40MB_s": ("<=", 0.15),
    "exchange_4MB_s": ("<=", 0.020),
    "exchange_1kB_s": ("<=", 0.001),
    "utilisation_min": (">=", 0.95),
    "control_wait_s_max": ("<=", 0.150),
}


def worst(results: dict[str, Any], name: str) -> float | None:
    """The figure that misses its target most, over both loops."""
    values = [values[name] for values in results.values() if name in values]
    if not values:
        return None
    return min(values) if TARGETS[name][0] == ">=" else max(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, shorter runs")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, the table on stderr")
    parser.add_argument("--only", choices=("goodput", "exchange", "relay", "shaped"))
    parser.add_argument("--loop", choices=tuple(LOOPS))
    arguments = parser.parse_args()
    out = sys.stderr if arguments.json else sys.stdout
    results: dict[str, Any] = {}
    for loop in [arguments.loop] if arguments.loop else LOOPS:
        result: dict[str, Any] = {}
        if arguments.only in (None, "goodput"):
            result |= bench_goodput(loop, arguments.quick)
        if arguments.only in (None, "exchange"):
            result |= bench_exchange(loop, arguments.quick)
        if arguments.only in (None, "relay"):
            rows = bench_relay(loop, arguments.quick)
            result["utilisation_min"] = min(row["utilisation"] for row in rows)
            result["control_wait_s_max"] = max(row["control_wait_s"] for row in rows)
            result["relay"] = rows
        if arguments.only in (None, "shaped"):
            result["shaped"] = bench_shaped(loop, arguments.quick)
            result["delivered_min"] = min(row["delivered"] for row in result["shaped"])
        results[loop] = result
        for name, value in result.items():
            if name not in TABLES:
                sign, target = TARGETS.get(name, ("", 0.0))
                print(f"{loop:8} {name:24} {value:10.4f}  {sign} {target if sign else ''}", file=out)
        for table in TABLES:
            for row in result.get(table, []):
                print(f"{loop:8} {table} " + "  ".join(f"{key} {value:.4g}" for key, value in row.items()), file=out)
    ratios = {name: value for name in TARGETS if (value := worst(results, name)) is not None}
    if arguments.json:
        print(json.dumps({"ratios": ratios, "loops": results}))


if __name__ == "__main__":
    main()
