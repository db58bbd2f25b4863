"""The relay: bytes pass unchanged, at the rate of what they cross, delayed, held back when the queue is full."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from dlion.net.relay import Lane, Relay, Way, relay
from dlion.net.wan import Rate

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def through(
    resources: dict[str, Rate], *ways: tuple[Way, Way]
) -> AsyncIterator[tuple[Relay, list[Streams], list[Streams]]]:
    """A relay with one lane per pair of ways and one connection through each: (relay, near ends, far ends)."""
    far: list[Streams] = []
    arrived = asyncio.Queue[None]()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far.append((reader, writer))
        arrived.put_nowait(None)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    running = await relay([Lane(target, *pair) for pair in ways], resources)
    near: list[Streams] = []
    for port in running.ports:
        near.append(await asyncio.open_connection("127.0.0.1", port))
        await arrived.get()
    try:
        yield running, near, far
    finally:
        await running.close()
        for _, writer in (*near, *far):
            writer.close()
        server.close()
        await server.wait_closed()


@pytest.mark.asyncio
@pytest.mark.parametrize("mbit", [20, 200])
async def test_the_rate_is_exact_and_the_bytes_are_the_same(mbit: int) -> None:
    data = bytes(range(256)) * (mbit * 100)  # about 1 Mbit/s for 0.2 s each
    both = (Way(("path",), 0.02), Way((), 0.02))
    async with through({"path": Rate.constant(mbit * 1e6)}, both) as (_, near, far):
        near[0][1].write(data)
        loop = asyncio.get_running_loop()
        first = await far[0][0].readexactly(8192)
        start = loop.time()
        rest = await far[0][0].readexactly(len(data) - 8192)
        took = loop.time() - start
    assert first + rest == data
    assert took == pytest.approx(len(rest) * 8 / (mbit * 1e6), rel=0.1)


@pytest.mark.asyncio
async def test_delay_counts_both_ways() -> None:
    async with through({}, (Way((), 0.03), Way((), 0.05))) as (_, near, far):
        loop = asyncio.get_running_loop()
        start = loop.time()
        near[0][1].write(b"ping")
        assert await far[0][0].readexactly(4) == b"ping"
        far[0][1].write(b"pong")
        assert await near[0][0].readexactly(4) == b"pong"
        assert 0.08 <= loop.time() - start < 0.2


@pytest.mark.asyncio
async def test_lanes_share_a_resource_and_a_full_queue_stops_reading() -> None:
    way = (Way(("egress",)), Way())
    async with through({"egress": Rate.constant(8e6)}, way, way) as (_, near, far):
        for _, writer in near:
            writer.write(bytes(30 << 20))
        counts = [0, 0]

        async def count(i: int) -> None:
            while True:
                counts[i] += len(await far[i][0].read(65536))

        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5), asyncio.TaskGroup() as group:
                for i in range(2):
                    group.create_task(count(i))
        assert sum(counts) == pytest.approx(500_000, rel=0.15)
        assert min(counts) > 0.3 * sum(counts)
        assert all(writer.transport.get_write_buffer_size() > 20 << 20 for _, writer in near)
        for _, writer in near:
            writer.transport.abort()


@pytest.mark.asyncio
async def test_an_end_passes_through_after_the_bytes() -> None:
    async with through({"path": Rate.constant(1e6)}, (Way(("path",)), Way())) as (_, near, far):
        near[0][1].write(b"x" * 20_000)
        near[0][1].close()
        assert await far[0][0].read() == b"x" * 20_000


@pytest.mark.asyncio
async def test_nobody_behind_and_nonsense_lanes() -> None:
    with pytest.raises(ValueError, match="unknown resources: nothing"):
        await relay([Lane("127.0.0.1:1", Way(("nothing",)))], {})
    server = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    running = await relay([Lane(f"127.0.0.1:{port}")], {})
    reader, writer = await asyncio.open_connection("127.0.0.1", running.ports[0])
    assert await reader.read() == b""
    writer.close()
    await running.close()
