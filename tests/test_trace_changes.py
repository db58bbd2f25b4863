"""What-if changes of a topology touch what they name and nothing else; presence becomes departures or is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dlion.config import load_topology
from dlion.mesh.changes import ChangeError, changed, is_change, started
from dlion.mesh.presence import PresenceError, turns
from dlion.mesh.topology import LinkSpec, PeerSpec, Resource, Speed, Topology
from dlion.messages import PeerId
from dlion.net.wan import Rate

A, B = PeerId("a-1"), PeerId("b")


def pair(presence: Rate | None = None) -> Topology:
    """a-1 and b, each in a micro-cloud of its own, over one varying path each way and a cap on a-1."""
    wave = Rate.steps([0, 10], [4e6, 8e6], loop=True, period_s=20)
    return Topology(
        "pair",
        {A: PeerSpec(A, "x", Speed(wave, 0.5)), B: PeerSpec(B, "y", Speed(Rate.constant(10)), presence)},
        {
            (A, B): LinkSpec(A, B, ("there", "egress:a-1"), 0.1, Rate.steps([0, 5], [1, 0], loop=False)),
            (B, A): LinkSpec(B, A, ("back",), 0.2),
        },
        {
            "there": Resource("there", "path", wave),
            "back": Resource("back", "path", Rate.constant(1e6)),
            "egress:a-1": Resource("egress:a-1", "egress", Rate.constant(9e6), A),
        },
        digest="d",
    )


def bandwidths(topology: Topology) -> dict[str, float]:
    return {name: r.rate.at(0) for name, r in topology.resources.items()}


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("link.a-1-b.bandwidth", {"there": 8e6, "back": 2e6, "egress:a-1": 9e6}),
        ("link.x-y.bandwidth", {"there": 8e6, "back": 2e6, "egress:a-1": 9e6}),
        ("link.b>a-1.bandwidth", {"there": 4e6, "back": 2e6, "egress:a-1": 9e6}),
        ("egress.a-1.bandwidth", {"there": 4e6, "back": 1e6, "egress:a-1": 18e6}),
        ("resource.there.bandwidth", {"there": 8e6, "back": 1e6, "egress:a-1": 9e6}),
    ],
)
def test_a_rate_is_doubled_where_it_was_named(key: str, expected: dict[str, float]) -> None:
    after = changed(pair(), {key: 2.0})
    assert bandwidths(after) == expected
    assert after.peers == pair().peers and after.links == pair().links and after.digest != "d"


def test_speed_and_delay() -> None:
    after = changed(pair(), {"peer.x.speed": 0.5, "link.a-1>b.delay": 3.0})
    before = pair().peers[A].speed
    assert before is not None and after.peers[A].speed is not None
    assert after.peers[A].speed.seconds(40, 0.0) == pytest.approx(2 * before.seconds(40, 0.0))
    assert [k.delay_s for k in after.links.values()] == pytest.approx([0.3, 0.2])
    assert after.peers[B] == pair().peers[B]


@pytest.mark.parametrize(
    ("key", "factor", "words"),
    [
        ("link.a-1-c.bandwidth", 2, "no link a-1-c"),
        ("link.a-1-b.bandwidth", 0, "above 0"),
        ("egress.b.bandwidth", 2, "no egress:b"),
        ("peer.nobody.speed", 2, "nobody"),
        ("link.a-1-b.colour", 2, "not something"),
    ],
)
def test_what_cannot_be_changed_is_said(key: str, factor: float, words: str) -> None:
    with pytest.raises(ChangeError, match=words):
        changed(pair(), {key: factor})


def test_a_shared_path_is_not_changed_behind_the_others_backs() -> None:
    shared = load_topology("hetero-system")
    wan = next(r.name for r in shared.resources.values() if r.kind == "path")
    ends = [e for e, link in shared.links.items() if wan in link.resources]
    one = shared.links[ends[0]]
    other = next(e for e in shared.links if e not in (ends[0], (ends[0][1], ends[0][0])))
    links = dict(shared.links) | {other: replace(shared.links[other], resources=one.resources)}
    with pytest.raises(ChangeError, match="others cross"):
        changed(replace(shared, links=links), {f"link.{ends[0][0]}>{ends[0][1]}.bandwidth": 2.0})


def test_network_and_job_keys_are_told_apart() -> None:
    assert is_change("link.a-b.bandwidth") and is_change("peer.a1.speed") and not is_change("train.batch")


def test_starting_later_reads_every_rate_later() -> None:
    later = started(pair(), 10.0)
    assert later.resources["there"].rate.at(0) == 8e6 and later.resources["there"].rate.at(10) == 4e6
    speed, up = later.peers[A].speed, later.links[A, B].up
    assert speed is not None and speed.samples_per_s.at(0) == 8e6 and up is not None and up.at(0) == 0
    assert later.digest != "d" and started(pair(), 0.0) == pair()


def test_presence_becomes_comings_and_goings() -> None:
    def found(*values: float, until_s: float = 60.0) -> list[tuple[str, float, bool]]:
        times = [0.0, 30.0, 40.0][: len(values)]
        return [(t.peer, t.at_s, t.comes) for t in turns(pair(Rate.steps(times, list(values), loop=False)), until_s)]

    assert found(1, 0) == [(B, 30, False)] and found(1, 0, until_s=30.0) == [] and turns(pair(), 60) == []
    assert found(1, 0, 1) == [(B, 30, False), (B, 40, True)]
    assert found(0, 1) == [(B, 30, True)]


def test_a_run_that_nobody_begins_or_ends_is_refused() -> None:
    here, gone = Rate.steps([0, 30], [1, 0], loop=False), Rate.steps([0, 30], [0, 1], loop=False)
    for presence, words in ((here, "nobody is left"), (gone, "nobody|no peer is there")):
        peers = {name: replace(peer, presence=presence) for name, peer in pair().peers.items()}
        with pytest.raises(PresenceError, match=words):
            turns(replace(pair(), peers=peers), 60)
