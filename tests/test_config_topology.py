"""Topology files: what the short tables spell out, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import get_args

import pytest

from dlion.cli.options import TALKS
from dlion.config import ConfigError, load_topology
from dlion.mesh.topology import Talk, Topology
from dlion.messages import PeerId

TWO = """
[clouds]
a.members = ["a1", "a2"]
b.members = ["b1", "b2"]
[[wan]]
between = ["a", "b"]
bandwidth = "10Mbit"
delay = "30ms"
"""


def made(tmp_path: Path, text: str) -> Topology:
    path = tmp_path / "net.toml"
    path.write_text(text)
    return load_topology(path)


def rate_bps(topology: Topology, source: str, target: str, at_s: float = 0.0) -> float:
    """The narrowest resource of a link."""
    link = topology.links[PeerId(source), PeerId(target)]
    return min(topology.resources[name].rate.at(at_s) for name in link.resources)


def step_s(topology: Topology, peer: str, at_s: float = 0.0) -> float:
    speed = topology.peers[PeerId(peer)].speed
    assert speed is not None
    return speed.seconds(64, at_s)


# -- what ships ---------------------------------------------------------------------------------------------------


def test_hetero_system_is_what_the_issue_says() -> None:
    """Six peers; steps 1:1:2:2:6:6 of 0.2 s; each directed pair of hosts its own path; no host cap."""
    one = load_topology("hetero-system")
    assert list(one.peers) == ["a1", "a2", "b1", "b2", "c1", "c2"]
    assert [step_s(one, p) for p in one.peers] == pytest.approx([0.2, 0.2, 0.4, 0.4, 1.2, 1.2])
    assert set(one.links) == set(permutations(one.peers, 2))
    wan = {("a", "b"): (50e6, 0.030), ("a", "c"): (35e6, 0.060), ("b", "c"): (20e6, 0.100)}
    for (source, target), link in one.links.items():
        a, b = sorted((one.cloud_of(source), one.cloud_of(target)))
        rate, delay = (1e9, 0.0002) if a == b else wan[a, b]
        assert (rate_bps(one, source, target), link.delay_s) == (rate, delay)
    crossed = [name for link in one.links.values() for name in link.resources]
    assert len(crossed) == len(set(crossed)) == 30, "no resource is shared"


def test_the_other_shipped_topologies_differ_as_their_names_say() -> None:
    equal = [0.2] * 6
    uneven = [0.2, 0.2, 0.4, 0.4, 1.2, 1.2]
    for name, steps, rates in (
        ("homogeneous", equal, {1e9}),
        ("hetero-compute", uneven, {1e9}),
        ("hetero-network", equal, {1e9, 50e6, 35e6, 20e6}),
        ("hetero-system-5", uneven, {1e9, 5e6}),
        ("demo", uneven, {1e9, 50e6, 35e6, 20e6}),
    ):
        one = load_topology(name)
        assert [step_s(one, p) for p in one.peers] == pytest.approx(steps), name
        assert {rate_bps(one, *pair) for pair in one.links} == rates, name
    four = load_topology("four-clouds")
    assert (len(four.peers), len(four.clouds), four.talk) == (16, 4, "bridges")
    assert load_topology("demo").talk == "bridges" and load_topology("demo", talk="mesh").talk == "mesh"


def cut(topology: Topology, *ends: str) -> Topology:
    pairs = {(PeerId(a), PeerId(b)) for a, b in permutations(ends)}
    return replace(topology, links={pair: link for pair, link in topology.links.items() if pair not in pairs})


def test_how_peers_talk_is_as_the_strategy_likes_unless_the_file_says() -> None:
    """A mesh or bridges, and the other one where links that it needs are missing; the same object every time, for plans
    are made once for all nodes of a process that have the same."""
    assert get_args(Talk) == TALKS, "what the command line offers"
    six, hosts = load_topology("hetero-system"), load_topology("three-hosts")
    for topology, flat, bridged in (
        (six, "mesh", "bridges"),
        (cut(six, "a1", "b1"), "bridges", "bridges"),
        (cut(six, "a1", "a2"), "mesh", "mesh"),  # mates need each other to pass on what came over a bridge
        (hosts, "mesh", "mesh"),  # nobody has mates: a mesh is the same, and simpler
        (cut(hosts, *list(hosts.peers)[:2]), "bridges", "bridges"),
        (replace(six, peers={p: replace(spec, cloud="a") for p, spec in six.peers.items()}), "mesh", "mesh"),
        (load_topology("hetero-system", talk="mesh"), "mesh", "mesh"),
        (load_topology("hetero-system", talk="tree"), "tree", "tree"),
    ):
        settled = [topology.settled(bridged=likes) for likes in (False, True)]
        assert [one.talk for one in settled] == [flat, bridged]
        assert [topology.settled(bridged=likes) for likes in (False, True)] == settled
        assert topology.settled(bridged=True) is settled[1] and settled[1].settled(bridged=False) is settled[1]


def test_hetero_system_egress_caps_what_leaves_each_host() -> None:
    """All WAN links of a host share its one egress; LAN links do not cross it."""
    one = load_topology("hetero-system-egress")
    caps = {"a": 50e6, "b": 35e6, "c": 20e6}
    for (source, target), link in one.links.items():
        if one.lan(source, target):
            assert link.resources == (f"lan:{source}>{target}",)
        else:
            assert link.resources == (f"egress:{source}",)
            assert rate_bps(one, source, target) == caps[one.cloud_of(source)]
            assert one.resources[f"egress:{source}"].owner == source


def test_dynamic_system_changes_speeds_and_rates_and_comes_round() -> None:
    one = load_topology("dynamic-system")
    assert [step_s(one, "a1", t) for t in (0, 60, 120, 180)] == pytest.approx([0.2, 0.4, 1.2, 0.2])
    assert [rate_bps(one, "a1", "b1", t) for t in (0, 59, 60, 120, 180)] == [50e6, 50e6, 20e6, 35e6, 50e6]


# -- what can be written ------------------------------------------------------------------------------------------


def test_a_path_may_be_shared_by_a_pair_of_micro_clouds(tmp_path: Path) -> None:
    one = made(tmp_path, TWO + 'per = "pair-of-clouds"\n')
    assert one.links[PeerId("a1"), PeerId("b2")].resources == ("wan:a>b",)
    assert one.links[PeerId("b2"), PeerId("a1")].resources == ("wan:b>a",)
    assert one.links[PeerId("a1"), PeerId("a2")].resources == (), "no [lan]: unshaped"


def test_caps_links_presence_and_addresses(tmp_path: Path) -> None:
    """ingress caps, a link's own path or a named shared one, outages, presence, addresses, overhead, real speed."""
    one = made(
        tmp_path,
        TWO
        + """
[compute]
a.samples_per_s = 100
a.overhead = "10ms"
a2.samples_per_s = { steps = [[0, 100], ["1m", 50]] }
[[ingress]]
of = "b1"
bandwidth = "3Mbit"
crossing = "all"
[resources]
tunnel.bandwidth = "2Mbit"
[[link]]
from = "a1"
to = "b2"
resources = ["tunnel"]
delay = "5ms"
up = { steps = [[0, 1], ["10m", 0], ["16m", 1]] }
[[link]]
from = "b2"
to = "a1"
bandwidth = "1Mbit"
[presence]
b2 = { steps = [[0, 0], [30, 1]] }
[addresses]
a1 = "[::1]:7000"
""",
    )
    assert step_s(one, "a1") == pytest.approx(0.65) and step_s(one, "a2", 61) == pytest.approx(1.28)
    assert one.peers[PeerId("b1")].speed is None
    assert one.links[PeerId("a1"), PeerId("b1")].resources == ("wan:a1>b1", "ingress:b1")
    assert one.links[PeerId("b2"), PeerId("b1")].resources == ("ingress:b1",)
    link = one.links[PeerId("a1"), PeerId("b2")]
    assert (link.resources, link.delay_s) == (("tunnel",), 0.005)
    assert link.up is not None and [link.up.at(t) for t in (0, 700, 1000)] == [1, 0, 1]
    back = one.links[PeerId("b2"), PeerId("a1")]
    assert (back.delay_s, rate_bps(one, "b2", "a1")) == (0.030, 1e6)
    presence = one.peers[PeerId("b2")].presence
    assert presence is not None and presence.at(29) == 0 and presence.at(31) == 1
    assert one.addresses == {"a1": "[::1]:7000"}


def test_the_digest_follows_the_file(tmp_path: Path) -> None:
    assert made(tmp_path, TWO).digest != made(tmp_path, TWO + "# changed\n").digest
    assert made(tmp_path, TWO).digest == made(tmp_path, TWO).digest


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[clouds]\n", "clouds"),
        ("[clouds]\na.members = []\n", "clouds"),
        ("[clouds]\na.members = ['x']\nb.members = []\n", "clouds.b"),
        ("[clouds]\na.members = ['x', 'x']\n", "clouds.a.members[1]"),
        ("[clouds]\na.members = ['x']\nb.members = ['x']\n", "clouds.b.members[0]"),
        ("[clouds]\na.members = ['a']\n", "clouds.a.members[0]"),
        ("[clouds]\na.members = ['../x']\n", "clouds.a.members[0]"),
        ("[clouds]\na.members = ['x']\nb.members = ['y']\n", "wan"),
        ("talk = 'mesh'\n", "clouds"),
        (TWO + "[compute]\na3.samples_per_s = 1\n", "compute.a3"),
        (TWO + "[compute]\na1.samples_per_s = 0\n", "compute.a1.samples_per_s"),
        (TWO + "[compute]\na1.samples_per_s = -5\n", "compute.a1.samples_per_s"),
        (TWO + "[compute]\na1.samples_per_s = '5Mbit'\n", "compute.a1.samples_per_s"),
        (TWO + "[compute]\na1.overhead = 1\n", "compute.a1.samples_per_s"),
        (TWO.replace("10Mbit", "-10Mbit"), "wan[0].bandwidth"),
        (TWO.replace('"10Mbit"', "nan"), "wan[0].bandwidth"),
        (TWO.replace('"10Mbit"', "0"), "wan[0].bandwidth"),
        (TWO.replace('"10Mbit"', "{ steps = [[1, 5]] }"), "wan[0].bandwidth.steps"),
        (TWO.replace('"10Mbit"', "{ steps = [[0, 5], [0, 6]] }"), "wan[0].bandwidth"),
        (TWO.replace('"10Mbit"', "{ steps = [[0, 5], [9, 6]], loop = 9 }"), "wan[0].bandwidth"),
        (TWO.replace('"10Mbit"', "{ steps = [[0, 5, 6]] }"), "wan[0].bandwidth.steps[0]"),
        (TWO.replace('"10Mbit"', "{ steps = [[0, -1]] }"), "wan[0].bandwidth.steps[0][1]"),
        (TWO.replace('"10Mbit"', "{ stepps = [[0, 1]] }"), "wan[0].bandwidth.stepps"),
        (TWO.replace("30ms", "30 lightyears"), "wan[0].delay"),
        (TWO.replace('["a", "b"]', '["a", "z"]'), "wan[0].between"),
        (TWO.replace('["a", "b"]', '["a", "a"]'), "wan[0].between"),
        (TWO + "[[wan]]\nbetween = ['b', 'a']\n", "wan[1].between"),
        (TWO + "[[egress]]\nof = 'z'\nbandwidth = 1\n", "egress[0].of"),
        (TWO + "[[egress]]\nof = 'a'\nbandwidth = 1\n[[egress]]\nof = 'a1'\nbandwidth = 1\n", "egress[1].of"),
        (TWO + "[[link]]\nfrom = 'a1'\nto = 'z1'\n", "link[0].to"),
        (TWO + "[[link]]\nfrom = 'a1'\nto = 'a1'\n", "link[0]"),
        (TWO + "[[link]]\nfrom = 'a1'\nto = 'b1'\n" * 2, "link[1]"),
        (TWO + "[[link]]\nfrom = 'a1'\nto = 'b1'\nresources = ['tunnel']\n", "link[0].resources"),
        (TWO + "[[link]]\nfrom = 'a1'\nto = 'b1'\nup = 0.5\n", "link[0].up"),
        (TWO + "[presence]\nz1 = 1\n", "presence.z1"),
        (TWO + "[addresses]\na1 = 'nowhere'\n", "addresses.a1"),
        ("talk = 'bridge'\n" + TWO, "talk"),
        ("speed = 1\n" + TWO, "speed"),
    ],
)
def test_impossible_topologies_are_refused_at_their_key(tmp_path: Path, text: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made(tmp_path, text)
    assert (caught.value.where, caught.value.key) == (str(tmp_path / "net.toml"), key)


def test_links_must_join_everybody_both_ways(tmp_path: Path) -> None:
    """A one-way link is refused, and bridges need a link between every two micro-clouds, where a tree does not."""
    three = TWO.replace("[[wan]]", 'c.members = ["c1"]\n[[wan]]') + "[[wan]]\nbetween = ['b', 'c']\n"
    assert made(tmp_path, 'talk = "tree"\n' + three).talk == "tree"
    with pytest.raises(ConfigError, match="no link from a to c"):
        made(tmp_path, 'talk = "bridges"\n' + three)
    with pytest.raises(ConfigError, match="nothing leads back"):
        made(tmp_path, three + "[[link]]\nfrom = 'a1'\nto = 'c1'\n")
