"""Who speaks in bursts and is silent between them finds the rate of its link too, and never believes more for long."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dlion.clock import run
from dlion.net.connection import Connection
from dlion.net.link import Link
from dlion.net.pipe import pipe
from dlion.net.session import Session, SessionLimits
from dlion.net.shaped import Bottleneck, Shaped
from dlion.net.traces import mahimahi
from dlion.net.wan import Rate

CONTROL, UPDATE = 0, 1
DATA = Path(os.environ.get("DLION_DATA", Path(__file__).parents[1] / "../shared/data"))
LTE = DATA / "wan/mahimahi/TMobile-LTE-driving.down.xz"


def connected(link: Link) -> Connection:
    now = asyncio.get_running_loop().time()
    connection = Connection(
        Session(SessionLimits(), now),
        on_message=lambda stream, seq, body: None,
        on_writable=lambda: None,
        on_lost=lambda reason: None,
    )
    connection.attach(link, {})
    return connection


def joined(there: Bottleneck, back: Bottleneck, rtt_s: float) -> tuple[Connection, Connection]:
    a, b = pipe()
    return connected(Shaped(a, [there], rtt_s / 2)), connected(Shaped(b, [back], rtt_s / 2))


async def bursts(connection: Connection, nbytes: int, every_s: float) -> None:
    while True:
        connection.send(UPDATE, bytes(nbytes))
        await asyncio.sleep(every_s)


async def small_talk(connection: Connection) -> None:
    while True:
        connection.send(CONTROL, bytes(100))
        await asyncio.sleep(0.7)


async def estimates(
    rate: Rate, rtt_s: float, nbytes: int, every_s: float, until_s: float, *, both: bool = False, links: int = 1
) -> list[tuple[float, float, float]]:
    """(time, the first link's estimate in bits per second, its bytes in flight) ten times a second; every link sends
    bursts of ``nbytes`` through one egress."""
    there, back = Bottleneck(rate), Bottleneck(rate)
    pairs = [joined(there, back, rtt_s) for _ in range(links)]
    talks = [small_talk(end) for pair in pairs for end in pair]
    talks += [bursts(end, nbytes, every_s) for pair in pairs for end in pair[: 2 if both else 1]]
    tasks = [asyncio.create_task(talk) for talk in talks]
    seen = []
    for tick in range(1, int(until_s * 10) + 1):
        await asyncio.sleep(tick / 10 - asyncio.get_running_loop().time())
        seen.append((tick / 10, pairs[0][0].rate_bps, float(pairs[0][0].unacked_bytes)))
    for task in tasks:
        task.cancel()
    for pair in pairs:
        for end in pair:
            end.abort("over")
    return seen


@settings(max_examples=40, deadline=None)
@given(
    mbps=st.floats(3, 200),
    rtt_s=st.floats(0.001, 0.25),
    burst_s=st.floats(0.1, 0.25),
    pause_s=st.floats(0.02, 1.0),
    both=st.booleans(),
)
@example(mbps=55.0, rtt_s=0.109375, burst_s=0.109375, pause_s=0.5, both=False)  # a small chunk spans the silence
@example(mbps=88.0, rtt_s=0.1136, burst_s=0.1136, pause_s=0.4358, both=False)  # a probe holds the tail back
def test_bursts_of_a_few_chunks_find_the_rate(
    mbps: float, rtt_s: float, burst_s: float, pause_s: float, both: bool
) -> None:
    """Within a fifth after twelve bursts (and six seconds), be the other direction busy or not; at no time above."""
    nbytes, every_s = int(mbps * 125_000 * burst_s), burst_s + pause_s
    seen = run(estimates(Rate.constant(mbps * 1e6), rtt_s, nbytes, every_s, 6 + 12 * every_s, both=both))
    assert seen[-1][1] / 1e6 == pytest.approx(mbps, rel=0.2)
    assert max(bps for _, bps, _ in seen) <= 1.1e6 * mbps


@settings(max_examples=25, deadline=None)
@given(mbps=st.floats(2, 200), rtt_s=st.floats(0.001, 0.25), burst_s=st.floats(0.002, 0.2), links=st.integers(1, 3))
def test_no_burst_however_short_claims_more_than_the_egress_gives(
    mbps: float, rtt_s: float, burst_s: float, links: int
) -> None:
    nbytes = int(mbps * 125_000 * burst_s)
    seen = run(estimates(Rate.constant(mbps * 1e6), rtt_s, nbytes, burst_s + 0.15, 6.0, links=links, both=True))
    assert max(bps for _, bps, _ in seen[20:]) <= 1.15e6 * mbps


@pytest.mark.parametrize("rtt_s", [0.005, 0.05, 0.2])
@pytest.mark.parametrize("burst_s", [0.1, 0.2])
def test_a_link_that_halves_its_rate_is_noticed(burst_s: float, rtt_s: float) -> None:
    """Ten round trips, at least a second, and two bursts later, though no burst ever fills the window."""
    rate = Rate.steps([0.0, 6.0], [20e6, 10e6], loop=False)
    seen = run(estimates(rate, rtt_s, int(2.5e6 * burst_s), 0.15 + 2 * burst_s, 12.0))
    noticed = 6.0 + max(1.0, 10 * rtt_s) + 2 * (0.15 + 2 * burst_s) + 2 * rtt_s
    assert {round(bps / 20e6, 1) for t, bps, _ in seen if 4.0 < t < 6.0} == {1.0}
    assert {round(bps / 10e6, 1) for t, bps, _ in seen if t > noticed} == {1.0}


@pytest.mark.skipif(not LTE.is_file(), reason=f"no recorded trace at {LTE} (set DLION_DATA)")
@pytest.mark.parametrize("burst_s", [0.1, 0.2])
def test_bursts_follow_a_recorded_lte_link(burst_s: float) -> None:
    """Never far above what the link gave in some tenth of a second of the last two, mostly not below its mean."""
    rate = mahimahi(LTE)
    seen = run(estimates(rate, 0.06, int(rate.mean * burst_s / 8), burst_s + 0.15, 60.0))[30:]
    for t, bps, _ in seen:
        assert bps <= 1.15 * max(rate.integral(t - 0.1 * i - 0.1, t - 0.1 * i) * 10 for i in range(22))
    means = sorted(bps / max(rate.integral(t - 2.0, t) / 2.0, 1e4) for t, bps, _ in seen)
    assert 0.85 <= means[len(means) // 2] <= 1.6
