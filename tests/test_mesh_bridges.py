"""The routes of micro-clouds: flooding along them reaches every living peer exactly once, whoever died."""

from __future__ import annotations

from collections import Counter, deque
from itertools import permutations
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlion.mesh.bridges import Plan, plan
from dlion.mesh.topology import LinkSpec, PeerSpec, Resource, Topology
from dlion.messages import PeerId
from dlion.net.wan import Rate

Talk = Literal["mesh", "bridges", "tree"]


def topology(sizes: list[int], talk: Talk, cut: frozenset[tuple[str, str]] = frozenset()) -> Topology:
    """Clouds A, B, ... of the given sizes, all linked but for the pairs of clouds in ``cut``."""
    names = {PeerId(f"{chr(97 + c)}{i}"): chr(65 + c) for c, size in enumerate(sizes) for i in range(size)}
    links = {
        (a, b): LinkSpec(a, b, (), 0.001 * abs(ord(names[a]) - ord(names[b])))
        for a, b in permutations(names, 2)
        if (names[a], names[b]) not in cut and (names[b], names[a]) not in cut
    }
    return Topology("t", {p: PeerSpec(p, c) for p, c in names.items()}, links, {}, talk)


def flood(routes: Plan, origin: PeerId) -> Counter[PeerId]:
    """How often each peer hears one update of ``origin``, forwarded unchanged by everybody."""
    heard = Counter({origin: 1})
    todo: deque[tuple[PeerId, PeerId | None]] = deque([(origin, None)])
    while todo:
        here, came_from = todo.popleft()
        for peer in routes.onward(here, came_from, routes.cloud_of[origin]):
            assert peer in routes.neighbours(here)
            assert peer not in (origin, came_from), "an echo"
            heard[peer] += 1
            assert heard[peer] < 3
            todo.append((peer, here))
    return heard


def once(peers: list[PeerId]) -> Counter[PeerId]:
    return Counter(dict.fromkeys(peers, 1))


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=5),
    st.sampled_from(["mesh", "bridges", "tree"]),
    st.randoms(use_true_random=False),
)
def test_every_living_peer_hears_every_update_exactly_once(sizes: list[int], talk: Talk, random: object) -> None:
    net = topology(sizes, talk)
    live = {p: float(random.randint(1, 6)) for p in net.peers}  # type: ignore[attr-defined]
    routes = plan(net, live)
    while True:
        for origin in live:
            assert flood(routes, origin) == once(list(live))
        if len(live) == 1:
            break
        del live[random.choice(sorted(live))]  # type: ignore[attr-defined]
        routes = plan(net, live, routes)


@given(st.integers(2, 5), st.integers(1, 3), st.data())
def test_bridges_forward_along_a_tree_where_some_micro_clouds_cannot_meet(
    clouds: int, size: int, data: st.DataObject
) -> None:
    """A chain A-B-C-... is always there; any other pair of micro-clouds may be cut."""
    letters = [chr(65 + c) for c in range(clouds)]
    distant = [(a, b) for a in letters for b in letters if ord(b) - ord(a) > 1]
    cut = frozenset(data.draw(st.sets(st.sampled_from(distant)))) if distant else frozenset[tuple[str, str]]()
    net = topology([size] * clouds, "bridges", cut)
    routes = plan(net, dict.fromkeys(net.peers, 1.0))
    assert all(flood(routes, origin) == once(list(net.peers)) for origin in net.peers)


def test_a_bridge_moves_only_when_an_end_dies() -> None:
    net = topology([3, 3], "bridges")
    first = plan(net, dict.fromkeys(net.peers, 1.0))
    assert first.bridges == {("A", "B"): ("a0", "b0"), ("B", "A"): ("b0", "a0")}
    stronger = plan(net, {p: 9.0 if p in ("a2", "b1") else 1.0 for p in net.peers}, first)
    assert stronger.bridges == first.bridges
    after = plan(net, {p: 9.0 if p in ("a2", "b1") else 1.0 for p in net.peers if p != "a0"}, first)
    assert after.bridges["A", "B"] == ("a2", "b0"), "the end that lives holds what was to go that way"


@pytest.mark.parametrize("talk", ["bridges", "tree"])
def test_no_bridge_moves_because_somebody_comes(talk: Talk) -> None:
    net = topology([3, 2], talk)
    a0, a1, a2 = map(PeerId, ("a0", "a1", "a2"))
    power = dict.fromkeys(sorted(net.peers), 1.0)
    without = plan(net, {p: 1.0 for p in power if p != a0}, silent=[a0])
    assert plan(net, power).bridges != without.bridges
    assert plan(net, power, late=[a0]).bridges == without.bridges
    for first, second in ((a0, a1), (a1, a0)):
        came = plan(net, {p: 1.0 for p in power if p != a2}, silent=[a2], late=[first, second])
        assert came.bridges["A", "B"][0] == first, "of those who came, who came first"


def test_bridges_go_to_the_strong_and_are_spread() -> None:
    net = topology([2, 2, 2], "bridges")
    power = {p: 2.0 if p.endswith("1") else 1.0 for p in net.peers}
    routes = plan(net, power)
    carried = Counter(sender for sender, _ in routes.bridges.values())
    assert carried == dict.fromkeys(net.peers, 1)
    assert routes.bridges["A", "B"] == ("a1", "b1")
    assert all(len(routes.neighbours(p)) == 2 for p in net.peers)


def test_the_tree_follows_short_delays_then_wide_links() -> None:
    net = topology([1, 1, 1], "tree")
    a, b, c = (PeerId(x) for x in ("a0", "b0", "c0"))
    wide = Resource("wide", "path", Rate.constant(50e6))
    narrow = Resource("narrow", "path", Rate.constant(5e6))
    rates = {frozenset((a, b)): "narrow", frozenset((a, c)): "wide", frozenset((b, c)): "wide"}
    links = {(s, t): LinkSpec(s, t, (rates[frozenset((s, t))],), 0.03) for s, t in net.links}
    equal_delays = Topology("t", net.peers, links, {"wide": wide, "narrow": narrow}, "tree")
    assert plan(equal_delays, dict.fromkeys(net.peers, 1.0)).neighbours(c) == (a, b)
    links[b, c] = links[c, b] = LinkSpec(b, c, ("wide",), 0.1)
    assert plan(Topology("t", net.peers, links, equal_delays.resources, "tree"), {a: 1, b: 1, c: 1}).neighbours(a) == (
        b,
        c,
    )


def test_last_words_of_a_dead_bridge_still_reach_the_mates() -> None:
    net = topology([2, 2], "bridges")
    before = plan(net, dict.fromkeys(net.peers, 1.0))
    _, far = before.bridges["A", "B"]
    sender = before.bridges["A", "B"][0]
    after = plan(net, {p: 1.0 for p in net.peers if p != sender}, before)
    assert after.onward(far, sender, "A") == after.mates[far]


def test_a_stranger_is_refused() -> None:
    with pytest.raises(ValueError, match="no peer 'zz'"):
        plan(topology([1], "mesh"), {PeerId("zz"): 1.0})


@pytest.mark.parametrize("talk", ["bridges", "tree"])
def test_words_of_micro_clouds_that_are_none_take_no_memory(talk: Talk) -> None:
    found = plan(topology([2, 2, 2], talk), dict.fromkeys(topology([2, 2, 2], talk).peers, 1.0))
    me, mate = found.bridges["A", "B"][0], found.mates[found.bridges["A", "B"][0]][0]
    for number in range(1000):
        found.onward(me, mate, f"stranger {number}")
        assert not found.downstream(me, mate, f"stranger {number}")
    assert len(found._onward) < 10 and not found._downstream
