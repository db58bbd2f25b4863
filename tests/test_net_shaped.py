"""Shaped: never faster than the trace, never idle while something waits, first in first out, exact over a day."""

from __future__ import annotations

import asyncio
import functools
import math
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlion.clock import Deadlock, run
from dlion.net.link import Link, LinkError, Receiver
from dlion.net.shaped import Bottleneck, Route, Shaped, ShapedDialer
from dlion.net.traces import mahimahi
from dlion.net.wan import Rate

DATA = Path(os.environ.get("DLION_DATA", Path(__file__).parents[1] / "../shared/data"))
LTE = DATA / "wan/mahimahi/TMobile-LTE-driving.down.xz"


class Wire:
    """A link that notes what is written to it, and when."""

    def __init__(self) -> None:
        self.arrived: list[tuple[float, bytes]] = []
        self.congested = False
        self.backlog_bytes = 0
        self.closed = False
        self.receiver: Receiver | None = None

    def attach(self, receiver: Receiver) -> None:
        self.receiver = receiver

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.arrived.append((asyncio.get_running_loop().time(), bytes(data)))

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        assert self.receiver is not None
        self.receiver.link_lost("aborted")

    @property
    def nbytes(self) -> int:
        return sum(len(d) for _, d in self.arrived)


class Owner:
    """Writes ``chunk_bytes`` whenever the link takes them, up to ``total_bytes``."""

    def __init__(self, link: Link, chunk_bytes: int = 0, total_bytes: float = math.inf) -> None:
        self.link, self.chunk, self.left = link, bytes(chunk_bytes), total_bytes
        self.lost: list[str] = []
        self.writable = 0
        link.attach(self)

    def fill(self) -> None:
        while self.chunk and not self.link.congested and self.left > 0:
            self.link.write(self.chunk)
            self.left -= len(self.chunk)

    def get_buffer(self, size_hint: int) -> memoryview:
        raise AssertionError("nothing comes in here")

    def buffer_updated(self, nbytes: int) -> None:
        raise AssertionError("nothing comes in here")

    def link_writable(self) -> None:
        self.writable += 1
        self.fill()

    def link_lost(self, reason: str) -> None:
        self.lost.append(reason)


def virtual(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run the test body in virtual time."""

    @functools.wraps(test)
    def wrapper(**arguments: Any) -> None:
        run(test(**arguments))

    return wrapper


def test_never_more_than_the_trace_gives_and_first_in_first_out() -> None:
    steps = st.lists(st.tuples(st.floats(0.05, 2.0), st.sampled_from([0.0, 1e5, 3e6])), min_size=1, max_size=6)
    writes = st.lists(st.tuples(st.floats(0.0, 0.5), st.integers(1, 60_000)), min_size=1, max_size=30)

    @settings(max_examples=60, deadline=None)
    @given(steps=steps, writes=writes, delay=st.floats(0.0, 0.3))
    def check(steps: list[tuple[float, float]], writes: list[tuple[float, int]], delay: float) -> None:
        times = [sum(w for w, _ in steps[:i]) for i in range(len(steps))]
        end = sum(w for w, _ in steps)
        rate = Rate.steps([*times, end], [*(v for _, v in steps), 2e6], loop=False)

        async def body() -> None:
            wire = Wire()
            link = Shaped(wire, [Bottleneck(rate)], delay)
            Owner(link)
            for i, (pause, nbytes) in enumerate(writes):
                await asyncio.sleep(pause)
                link.write(i.to_bytes(2, "big") * nbytes)
            await asyncio.sleep(60.0)
            assert [int.from_bytes(d[:2], "big") for _, d in wire.arrived] == list(range(len(writes)))
            sent = 0.0
            for at, data in wire.arrived:
                sent += 8 * len(data)
                assert sent <= rate.integral(0.0, at - delay) + 1e-3
            assert link.backlog_bytes == 0 and link.delivered_bytes == link.written_bytes == sent / 8

        run(body())

    check()


@pytest.mark.parametrize(
    "rate",
    [
        Rate.constant(5e6),
        Rate.constant(200e6),
        Rate.steps([0.0, 1.0, 1.5, 4.0], [20e6, 0.0, 5e6, 90e6], loop=True, period_s=6.0),
        Rate.steps([0.1 * i for i in range(50)], [1e6 * (i * 7 % 13) for i in range(50)], loop=True),
    ],
    ids=["5Mbit", "200Mbit", "steps", "jagged"],
)
@virtual
async def test_a_saturated_link_delivers_what_the_trace_gives(rate: Rate) -> None:
    wire = Wire()
    link = Shaped(wire, [Bottleneck(rate)], 0.05)
    owner = Owner(link, 16_384)
    owner.fill()
    await asyncio.sleep(60.05)
    available = rate.integral(0.0, 60.0) / 8
    assert 0.99 * available <= wire.nbytes <= available + 1e-3
    assert link.capacity_bytes(0.0, 60.0) == available
    assert link.busy_s == pytest.approx(60.05, rel=1e-3)
    link.abort()


@pytest.mark.skipif(not LTE.is_file(), reason=f"no recorded trace at {LTE} (set DLION_DATA)")
@virtual
async def test_a_saturated_link_over_a_real_lte_trace_delivers_what_was_recorded() -> None:
    rate = mahimahi(LTE)
    assert 0.0 in rate.values
    wire = Wire()
    link = Shaped(wire, [Bottleneck(rate)], 0.03)
    owner = Owner(link, 4096)
    owner.fill()
    await asyncio.sleep(400.03)
    available = rate.integral(0.0, 400.0) / 8
    assert 0.99 * available <= wire.nbytes <= available + 1e-3
    link.abort()


@virtual
async def test_links_that_share_an_egress_get_its_rate_together_and_a_slow_path_does_not_hold_it() -> None:
    egress = Bottleneck(Rate.constant(50e6))
    slow, fast = Wire(), Wire()
    links = [
        Shaped(slow, [egress, Bottleneck(Rate.constant(2e6))], 0.02),
        Shaped(fast, [egress, Bottleneck(Rate.constant(100e6))], 0.02),
    ]
    for link in links:
        Owner(link, 8192).fill()
    await asyncio.sleep(20.02)
    got = [8 * w.nbytes / 20 for w in (slow, fast)]
    assert 0.99 * 2e6 <= got[0] <= 2e6
    assert 0.99 * 50e6 <= sum(got) <= 50e6
    for link in links:
        link.abort()


def test_saturated_links_deliver_what_the_resource_they_share_gives_and_never_more_by_any_time() -> None:
    steps = st.lists(st.tuples(st.floats(0.05, 2.0), st.sampled_from([0.0, 1e6, 7e6, 40e6])), min_size=1, max_size=6)

    @settings(max_examples=25, deadline=None)
    @given(steps=steps, links=st.integers(1, 3), delay_s=st.floats(0.0, 0.2))
    def check(steps: list[tuple[float, float]], links: int, delay_s: float) -> None:
        times = [sum(w for w, _ in steps[:i]) for i in range(len(steps) + 1)]
        rate = Rate.steps(times, [*(v for _, v in steps), 5e6], loop=True, period_s=times[-1] + 0.5)

        async def body() -> None:
            egress = Bottleneck(rate)
            wires = [Wire() for _ in range(links)]
            for wire in wires:
                Owner(Shaped(wire, [egress], delay_s), 4096).fill()
            await asyncio.sleep(20.0 + delay_s)
            sent = 0.0
            for at, data in sorted((a for wire in wires for a in wire.arrived), key=lambda a: a[0]):
                sent += 8 * len(data)
                assert sent <= rate.integral(0.0, at - delay_s) + 1e-3
            assert sent >= 0.99 * rate.integral(0.0, 20.0)

        run(body())

    check()


@virtual
async def test_no_drift_over_24_hours_of_loops() -> None:
    """A packet at each 10 s for a day over a looping trace with outages: each arrives exactly when the maths says."""
    rate = Rate.steps([0.0, 0.3, 1.1], [8e3, 0.0, 24e3], loop=True, period_s=1.7)
    wire = Wire()
    link = Shaped(wire, [Bottleneck(rate)], 0.1)
    Owner(link)
    for i in range(8640):
        await asyncio.sleep(i * 10.0 - asyncio.get_running_loop().time())
        link.write(bytes(1000))
    await asyncio.sleep(20.0)
    expected = [rate.finish(i * 10.0, 8000) + 0.1 for i in range(8640)]
    assert [t for t, _ in wire.arrived] == pytest.approx(expected, abs=1e-9)


@virtual
async def test_24_saturated_hours_lose_nothing() -> None:
    rate = Rate.steps([0.0, 0.3, 1.1], [8e3, 0.0, 24e3], loop=True, period_s=1.7)
    wire = Wire()
    link = Shaped(wire, [Bottleneck(rate)], backlog_s_max=60.0)
    owner = Owner(link, 25_000)
    owner.fill()
    await asyncio.sleep(86_400.0)
    available = rate.integral(0.0, 86_400.0) / 8
    assert available - 25_000 <= wire.nbytes <= available
    link.abort()


@virtual
async def test_the_queue_is_bounded_and_says_when_it_takes_more() -> None:
    wire = Wire()
    link = Shaped(wire, [Bottleneck(Rate.constant(8e6))], backlog_bytes_max=10_000, backlog_s_max=9.0)
    owner = Owner(link, 1000, total_bytes=11_000)
    owner.fill()
    assert link.congested and link.backlog_bytes == 11_000 and owner.writable == 0
    await asyncio.sleep(0.0059)
    assert link.congested
    await asyncio.sleep(0.0002)
    assert owner.writable == 1 and not link.congested and link.backlog_bytes == 5000

    slow = Shaped(Wire(), [Bottleneck(Rate.constant(8e3))], backlog_s_max=2.0)
    patient = Owner(slow, 1000, total_bytes=3000)
    patient.fill()
    assert slow.congested
    await asyncio.sleep(1.9)
    assert slow.congested
    await asyncio.sleep(0.2)
    assert not slow.congested and patient.writable == 1


@virtual
async def test_a_congested_link_below_holds_deliveries_back() -> None:
    wire = Wire()
    wire.congested = True
    link = Shaped(wire, [], 0.01)
    owner = Owner(link)
    for _ in range(3):
        link.write(b"abc")
    await asyncio.sleep(1.0)
    assert len(wire.arrived) == 1 and link.congested
    wire.congested = False
    assert wire.receiver is not None
    wire.receiver.link_writable()
    assert len(wire.arrived) == 3 and owner.writable == 1


@virtual
async def test_close_delivers_first_and_abort_drops() -> None:
    wire = Wire()
    link = Shaped(wire, [Bottleneck(Rate.constant(8e3))], 0.5)
    Owner(link)
    link.write(bytes(1000))
    link.close()
    link.write(b"too late")
    await asyncio.sleep(1.4)
    assert not wire.closed
    await asyncio.sleep(0.2)
    assert wire.closed and wire.nbytes == 1000

    gone = Wire()
    other = Shaped(gone, [Bottleneck(Rate.constant(8e3))], 0.5)
    owner = Owner(other, 1000, 1000)
    owner.fill()
    other.abort()
    await asyncio.sleep(5.0)
    assert gone.nbytes == 0 and owner.lost == ["aborted"]


@virtual
async def test_an_outage_loses_the_link_and_refuses_dials_until_it_ends() -> None:
    up = Rate.steps([0.0, 5.0, 8.0], [1.0, 0.0, 1.0], loop=False)
    wires: list[Wire] = []

    class Direct:
        async def dial(self, peer: str) -> Link:
            wires.append(Wire())
            return wires[-1]

    dialer = ShapedDialer(Direct(), {"b": Route((Bottleneck(Rate.constant(8e3)),), up=up)})
    link = await dialer.dial("b")
    owner = Owner(link, 1000, 1000)
    await asyncio.sleep(4.5)
    owner.fill()
    await asyncio.sleep(1.0)
    assert owner.lost == ["the link is out (its trace says so)"] and wires[0].nbytes == 0
    with pytest.raises(LinkError, match=r"b: the link is out until 2\.5 s"):
        await dialer.dial("b")
    await asyncio.sleep(2.5)
    await dialer.dial("b")
    await dialer.dial("unshaped")


def test_a_rate_that_never_comes_back_is_a_deadlock_not_a_timer_at_infinity() -> None:
    async def body() -> None:
        link = Shaped(Wire(), [Bottleneck(Rate.constant(0.0))])
        Owner(link, 1000, 1000).fill()
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Deadlock):
        run(body())


@virtual
async def test_a_delay_that_shrinks_does_not_reorder() -> None:
    wire = Wire()
    link = Shaped(wire, [], Rate.steps([0.0, 1.0], [2.0, 0.1], loop=False))
    Owner(link)
    link.write(b"first")
    await asyncio.sleep(1.0)
    link.write(b"second")
    await asyncio.sleep(2.0)
    assert wire.arrived == [(2.0, b"first"), (2.0, b"second")]


def test_whatever_the_delay_does_bytes_keep_their_order_and_never_come_before_their_time() -> None:
    """Each arrives its own delay after it left, or with the one before it where the delay has fallen since."""
    delays = st.lists(st.tuples(st.floats(0.01, 1.0), st.floats(0.0, 0.5)), min_size=1, max_size=8)
    writes = st.lists(st.tuples(st.floats(0.0, 0.3), st.integers(1, 20_000)), min_size=1, max_size=30)

    @settings(max_examples=60, deadline=None)
    @given(steps=delays, writes=writes, loop=st.booleans())
    def check(steps: list[tuple[float, float]], writes: list[tuple[float, int]], loop: bool) -> None:
        times = [sum(w for w, _ in steps[:i]) for i in range(len(steps))]
        end_s = sum(w for w, _ in steps)
        delay = Rate.steps(times, [v for _, v in steps], loop=loop, period_s=end_s if loop else None)

        async def body() -> None:
            wire, now = Wire(), asyncio.get_running_loop().time
            link = Shaped(wire, [Bottleneck(Rate.constant(1e6))], delay)
            Owner(link)
            free, expected = 0.0, [0.0]
            for i, (pause, nbytes) in enumerate(writes):
                await asyncio.sleep(pause)
                data = i.to_bytes(2, "big") * nbytes
                link.write(data)
                free = max(free, now()) + 8 * len(data) / 1e6
                expected.append(max(expected[-1], free + delay.at(free)))
            await asyncio.sleep(30.0)
            assert [int.from_bytes(d[:2], "big") for _, d in wire.arrived] == list(range(len(writes)))
            assert [t for t, _ in wire.arrived] == pytest.approx(expected[1:], abs=1e-6)

        run(body())

    check()


@pytest.mark.asyncio
async def test_in_real_time_a_late_loop_loses_no_rate() -> None:
    """The loop is blocked for 10 ms again and again; the trace's rate still comes through, and no more."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    rate = Rate.constant(80e6)
    wire = Wire()
    link = Shaped(wire, [Bottleneck(rate)], 0.001)
    Owner(link, 4096).fill()

    def block() -> None:
        until = loop.time() + 0.010
        while loop.time() < until:
            pass
        if loop.time() < start + 0.4:
            loop.call_later(0.01, block)

    block()
    await asyncio.sleep(0.4)
    at = wire.arrived[-1][0]
    available = rate.integral(start, at - 0.001) / 8
    assert 0.9 * available <= wire.nbytes <= available + 1
    link.abort()
