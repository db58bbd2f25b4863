"""What logs tell of links and machines: rates only where they showed, bounds marked as bounds, outages and speeds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from dlion.cli.build import Plan
from dlion.cli.errors import Fault
from dlion.cli.record import command as record
from dlion.cli.simulate import run_simulation
from dlion.config import load_job, load_topology
from dlion.mesh.topology import Resource, Speed, Topology
from dlion.messages import PeerId
from dlion.net.wan import Rate
from dlion.observe.read import PeerLog, read_directory
from dlion.observe.recording import link, recorded, speed, topology
from dlion.observe.runlog import AnyEvent, Event, Header, Link, Step

A, B = PeerId("a1"), PeerId("b1")
HEAD = Header(
    t=0, version="1", run="r", peer="a1", cloud="a", incarnation=1, seed=0, config="", exchange="x", job="j",
    topology="t", model="m", model_bytes=4,
)  # fmt: skip


def log(*events: AnyEvent) -> PeerLog:
    rows: list[Event] = [HEAD, *events]
    return PeerLog.of(rows)


def seconds(rates_mbit: list[float | None], best_mbit: float = 10.0, up: list[bool] | None = None) -> list[Link]:
    """One Link event a second; None: nothing stood waiting in that second."""
    events, shown_bytes, shown_s = [], 0, 0.0
    for i, rate in enumerate([None, *rates_mbit]):
        if rate is not None:
            shown_s += 0.5
            shown_bytes += round(rate * 1e6 / 8 * 0.5)
        events.append(
            Link(
                t=i,
                peer="b1",
                up=up[i] if up else True,
                rate_bps=best_mbit * 1e6,
                rtt_s=0.08 - 0.01 * (i == 2),
                unacked=0,
                queued=0,
                sent_bytes=1000 * i,
                acked_bytes=1000 * i,
                saturated=0.5,
                shown_bytes=shown_bytes,
                shown_s=shown_s,
            )
        )
    return events


def test_a_rate_is_what_the_link_showed_and_holds_where_it_did_not() -> None:
    found = link(A, B, log(*seconds([8, 8, None, 4, 8])).links()["b1"])
    assert found is not None and found.known and found.busy_s == 2.0
    assert [found.rate.at(t) / 1e6 for t in (0.5, 2.5, 3.5, 4.5, 99)] == pytest.approx([8, 8, 4, 8, 8])
    assert found.delay_s == pytest.approx(0.035) and found.up is None


def test_a_link_never_full_shows_only_a_bound() -> None:
    found = link(A, B, log(*seconds([None] * 5, best_mbit=3)).links()["b1"])
    assert found is not None and not found.known and found.rate == Rate.constant(3e6)


def test_outages_are_kept() -> None:
    found = link(A, B, log(*seconds([8] * 5, up=[True, True, False, False, True, True])).links()["b1"])
    assert found is not None and found.up is not None
    assert [found.up.at(t) for t in (0, 1.5, 2.5, 3.5, 4.5)] == [1, 1, 0, 0, 1]


def test_speed_over_time_and_the_fixed_cost_of_a_step() -> None:
    events: list[AnyEvent] = []
    t = 0.0
    for n in range(40):
        samples = 50 if n % 2 else 100
        cost = 0.1 + samples / (200 if n < 20 else 100)
        t += cost
        events.append(Step(t=t, n=n, loss=1.0, samples=samples, lr=0.1, seconds=cost))
    found = speed(log(*events[:20]))
    assert found is not None and found.overhead_s == pytest.approx(0.1, abs=1e-5)
    assert found.samples_per_s.at(0) == pytest.approx(200, rel=1e-4)
    both = speed(log(*events))
    assert both is not None and both.seconds(75, t) > 1.5 * both.seconds(75, 0)
    assert speed(log()) is None


def test_a_machine_that_slows_down_has_no_fixed_cost_for_it_and_its_last_seconds_count() -> None:
    """300 samples/s, from 9 s on 150, no overhead; the batch follows, as dynamic batching would have it."""
    events: list[AnyEvent] = []
    t = 0.0
    while t < 13.0:
        samples = 16 if len(events) % 7 == 0 else 82 if t < 11 else 62
        cost = samples / (300 if t < 9 else 150)
        t += cost
        events.append(Step(t=t, n=len(events), loss=1.0, samples=samples, lr=0.1, seconds=cost))
    found = speed(log(*events))
    assert found is not None and found.overhead_s < 0.02
    assert found.samples_per_s.at(1) == pytest.approx(300, rel=0.05)
    assert found.samples_per_s.at(12.5) == pytest.approx(150, rel=0.12)


# -- whole runs ---------------------------------------------------------------------------------------------------


def played(directory: Path, changes: dict[str, object], network: Topology) -> Path:
    flags = {"exchange.name": "full", "model.size": 100_000, "job.until": 20, "batching.mode": "fixed", **changes}
    run_simulation(Plan(load_job("toy", flags, environ={}), network), directory)
    return directory


@pytest.fixture
def varying() -> Topology:
    """Two machines; the way there falls from 8 to 4 Mbit/s after 10 s, so a full gradient always fills it."""
    base = load_topology("three-hosts")
    peers = list(base.peers)[:2]
    rate = Rate.steps([0, 10], [8e6, 4e6], loop=False)
    links = {e: replace(k, resources=("p" + e[0],), delay_s=0.02) for e, k in base.links.items() if {*e} == {*peers}}
    fast = {p: replace(base.peers[p], speed=Speed(Rate.constant(1000))) for p in peers}
    resources = {"p" + p: Resource("p" + p, "path", rate) for p in peers}
    return Topology("two", fast, links, resources, digest="two")


def test_recorded_rates_are_those_of_the_links(tmp_path: Path, varying: Topology) -> None:
    found = recorded(read_directory(played(tmp_path, {}, varying)))
    for one in found.links.values():
        assert one.known and 0.02 <= one.delay_s < 0.023
        assert one.rate.integral(2, 8) / 6 == pytest.approx(8e6, rel=0.02)
        assert one.rate.integral(13, 19) / 6 == pytest.approx(4e6, rel=0.02)


def test_the_written_topology_is_what_was_measured(tmp_path: Path, varying: Topology) -> None:
    found = recorded(read_directory(played(tmp_path / "run", {}, varying)))
    result = CliRunner().invoke(record, [str(tmp_path / "run"), "--out", str(tmp_path / "net")], catch_exceptions=False)
    made, direct = load_topology(tmp_path / "net" / "topology.toml"), topology(found, "topology")
    assert {p: s.speed for p, s in made.peers.items()} == {p: s.speed for p, s in direct.peers.items()}
    for ends, one in direct.links.items():
        (mine,), (other,) = one.resources, made.links[ends].resources
        assert direct.resources[mine].rate == made.resources[other].rate
        assert (one.delay_s, one.up) == (made.links[ends].delay_s, made.links[ends].up)
    assert "never saturated" not in result.output


def test_what_was_never_saturated_is_said(tmp_path: Path, varying: Topology) -> None:
    played(tmp_path / "run", {"model.size": 10}, varying)
    result = CliRunner().invoke(record, [str(tmp_path / "run"), "--out", str(tmp_path / "net")], catch_exceptions=False)
    assert "2 of 2 links were never saturated" in result.output
    assert (tmp_path / "net" / "topology.toml").read_text().count("never saturated") == 2


def test_a_missing_log_is_named(tmp_path: Path, varying: Topology) -> None:
    played(tmp_path / "run", {}, varying)
    absent = sorted(varying.peers)[1]
    (tmp_path / "run" / f"{absent}.jsonl").unlink()
    with pytest.raises(Fault, match=f"no log of {absent}"):
        CliRunner().invoke(record, [str(tmp_path / "run"), "--out", str(tmp_path / "net")], catch_exceptions=False)


def test_what_the_topology_states_is_not_taken_from_the_log(tmp_path: Path, varying: Topology) -> None:
    found = recorded(read_directory(played(tmp_path, {}, varying)))
    stated = topology(found, "two", varying)
    assert stated.peers == varying.peers and stated.links == varying.links and stated.resources == varying.resources
    bare = replace(varying, links={e: replace(k, resources=()) for e, k in varying.links.items()}, resources={})
    mixed = topology(found, "two", bare)
    assert all(name.startswith("recorded:") for k in mixed.links.values() for name in k.resources)
