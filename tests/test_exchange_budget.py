"""A WAN budget is a hard limit on every link, in every window of time, whatever is said there, for every strategy."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from node_runs import net, outages, residual, run

from dlion import simulation
from dlion.cli.build import Plan
from dlion.cli.host import routes_of
from dlion.config import ConfigError, load_job, load_topology
from dlion.exchange.diloco import DiLoCo
from dlion.exchange.full import Full
from dlion.exchange.hop import Hop
from dlion.exchange.localsgd import LocalSGD
from dlion.exchange.pride import Pride
from dlion.messages import PeerId
from dlion.net.session import SessionLimits
from dlion.simulation import Birth, Death, MemoryNetwork
from dlion.tensors import disagreement

KINDS = {"pride": Pride, "full": Full, "residual": residual, "hop": Hop, "diloco": DiLoCo, "local-sgd": LocalSGD}
WRITES: defaultdict[tuple[PeerId, PeerId], list[tuple[float, int]]] = defaultdict(list)
"""By link: when how many bytes left, framing, signs of life, copies and resends included."""


@pytest.fixture(autouse=True)
def tapped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Beneath the shaping, as bytes enter the other side's network."""
    join, plain = MemoryNetwork.join, simulation.pipe

    def tap(end: Any, ends: tuple[PeerId, PeerId]) -> Any:
        write, now = end.write, asyncio.get_running_loop().time

        def counted(data: bytes) -> None:
            WRITES[ends].append((now(), memoryview(data).nbytes))
            write(data)

        end.write = counted
        return end

    def joined(network: MemoryNetwork, me: PeerId, other: PeerId) -> Any:
        def pipe() -> tuple[Any, Any]:
            mine, theirs = plain()
            return tap(mine, (me, other)), tap(theirs, (other, me))

        monkeypatch.setattr(simulation, "pipe", pipe)
        return join(network, me, other)

    monkeypatch.setattr(MemoryNetwork, "join", joined)
    yield
    WRITES.clear()


@settings(max_examples=12, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(sorted(KINDS)),
    limit=st.integers(1000, 20_000),
    talk=st.sampled_from(["mesh", "bridges", "tree"]),
    mbps=st.sampled_from([0.1, 1.0, 50.0]),
    delay_s=st.sampled_from([0.001, 0.08]),
    speeds=st.lists(st.sampled_from([20, 80, 300]), min_size=5, max_size=5),
    out=st.tuples(st.floats(0.5, 2.5), st.floats(0.2, 3.0)),
    again=st.booleans(),
)
def test_no_window_carries_more_than_it_earned(
    *,
    kind: str,
    limit: int,
    talk: Any,
    mbps: float,
    delay_s: float,
    speeds: list[int],
    out: tuple[float, float],
    again: bool,
) -> None:
    """After any write, until any later one on the same link: bytes <= limit * the time between them."""
    WRITES.clear()
    peers = ("a1", "a2", "b1", "b2", "c1")
    topology = net(
        "a1 a2 | b1 b2 | c1",
        talk,
        mbps=mbps,
        delay_s=delay_s,
        speeds=dict(zip(peers, speeds, strict=True)),
        up={("a1", "b1"): outages((out[0], out[0] + out[1]))},
    ).capped(limit)
    deaths, births = ([Death(PeerId("b2"), 2.0)], [Birth(PeerId("b2"), 4.0)]) if again else ((), ())
    of = {"wan_bytes_per_s": float(limit)}
    run(topology, KINDS[kind], until_s=8.0, deaths=deaths, births=births, settings=of)
    wan = {ends: writes for ends, writes in WRITES.items() if ends[0][0] != ends[1][0]}
    assert wan and WRITES.keys() - wan.keys()
    for ends, writes in wan.items():
        least = float("inf")
        for (t, _), total in zip(writes, accumulate(nbytes for _, nbytes in writes), strict=True):
            least = min(least, total - limit * t)
            assert total - limit * t <= least + 2, (ends, t)


@pytest.mark.parametrize("limit", [1000, 4000])
@pytest.mark.parametrize("talk", ["mesh", "bridges"])
@pytest.mark.parametrize("kind", ["pride", "full"])
def test_nobody_seems_dead_because_of_it(kind: str, talk: Any, limit: int) -> None:
    """Though every step is more than the budget of its second, as chunks and first windows are small."""
    topology = net("a1 a2 | b1 b2 | c1 c2", talk, mbps=50.0).capped(limit)
    ran = run(topology, KINDS[kind], pace="free", until_s=12.0, settings={"wan_bytes_per_s": float(limit)})
    states = [event["state"] for peer in ran.logs for event in ran.events(peer, "member")]
    assert "silent" not in states and disagreement(ran.result.views) < 1e-5


def test_real_links_are_held_to_it_too_and_those_of_the_micro_cloud_are_not() -> None:
    job = load_job("toy", {"budget.wan_bytes_per_s": 5000, "budget.wan_bytes_per_day": 100_000_000})
    plan, me = Plan(job, load_topology("hetero-system")), PeerId("a1")
    routes = routes_of(plan, me, 3.0, emulate=False)
    assert routes.keys() == {"b1", "b2", "c1", "c2"}
    for route in routes.values():
        (held,) = route.crosses
        assert held.rate.mean == pytest.approx(8e8 / 86400) and route.delay_s == 0 and route.up is None
    emulated, free = routes_of(plan, me, 3.0, emulate=True), replace(plan, job=load_job("toy"))
    assert len(emulated["b1"].crosses) == len(routes_of(free, me, 3.0, emulate=True)["b1"].crosses) + 1
    assert not routes_of(free, me, 3.0, emulate=False)


def test_sessions_of_wide_links_stay_as_they_are() -> None:
    usual = SessionLimits()
    assert usual.narrowed(0.0) is usual and usual.narrowed(1e6) == usual
    narrow = usual.narrowed(1000.0)
    assert (narrow.chunk_bytes_min, narrow.window_bytes_initial) == (250, 1000)


@pytest.mark.parametrize(("key", "found", "least"), [("s", 999, "1000"), ("day", 10**7, "86400000")])
def test_less_than_neighbours_need_to_seem_alive_is_refused(key: str, found: int, least: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"budget\.wan_bytes_per_{key}: found {found} bytes; expected at least {least}"
    ):
        load_job("toy", {f"budget.wan_bytes_per_{key}": found})
