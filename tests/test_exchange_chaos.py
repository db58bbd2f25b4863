"""Every strategy on networks drawn at random, in virtual time: uneven speeds and links, outages, deaths. Weights stay
finite, nobody waits for ever, and nothing is said that the link could not have carried.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from node_runs import BATCH, Ran, Softmax, Talk, net, outages, run

from dlion.exchange import EXCHANGES, find
from dlion.mesh.topology import Topology
from dlion.messages import PeerId
from dlion.net.session import SessionLimits
from dlion.simulation import Death
from dlion.tensors import disagreement

UNTIL_S = 8.0
SETTLED_S = 4.0
"""After that nobody dies and no link goes out or comes back."""
DRAIN_S = 4.0
FEATURES, MESSAGE_BYTES = 60, 1100
"""A model of 244 entries: a whole one takes a twentieth of a second on the narrowest link."""
FULL_AFTER_S = 4.0
"""By then a link that is told more than it carries was full once."""
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "dlion": {"transfer_every": 5},
    "diloco": {"local_steps": 4},
    "fedavg": {"local_steps": 4, "share": 0.7},
    "noloco": {"local_steps": 4},
    "sparseloco": {"local_steps": 4},
    "streaming": {"local_steps": 4},
}

ROUNDS = ("diloco", "local-sgd", "streaming", "sparseloco", "fedavg")
"""Whatever happened, all end with one anchor."""
NEVER_WAIT = ("ako", "tfako", "choco", "local-sgd", "streaming", "pride")


@dataclass(frozen=True)
class World:
    """A network and what goes wrong in it."""

    peers: str
    talk: Talk
    mbps: float
    delay_s: float
    speeds: Mapping[str, float]
    out: Mapping[tuple[str, str], tuple[float, float]]
    deaths: tuple[tuple[str, float], ...]
    seed: int

    @property
    def topology(self) -> Topology:
        up = {pair: outages(span) for pair, span in self.out.items()}
        return net(self.peers, self.talk, mbps=self.mbps, delay_s=self.delay_s, speeds=self.speeds, up=up)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3).filter(lambda sizes: 2 <= sum(sizes) <= 5))
    clouds = [[f"{chr(97 + c)}{i}" for i in range(1, size + 1)] for c, size in enumerate(sizes)]
    names = [peer for cloud in clouds for peer in cloud]
    times = st.integers(20, 10 * int(SETTLED_S)).map(lambda t: t / 10)
    spans = st.tuples(times, times).filter(lambda span: span[0] < span[1])
    pairs = st.sampled_from(list(combinations(names, 2)))
    dead = draw(st.lists(st.sampled_from(names), unique=True, max_size=len(names) - 1))
    return World(
        " | ".join(" ".join(cloud) for cloud in clouds),
        draw(st.sampled_from(["mesh", "bridges", "tree"])),
        draw(st.sampled_from([0.2, 1.0, 20.0])),
        draw(st.sampled_from([0.001, 0.03, 0.1])),
        {peer: BATCH * draw(st.sampled_from([1, 4, 10, 16])) for peer in names},
        draw(st.dictionaries(pairs, spans, max_size=2)),
        tuple((peer, draw(times)) for peer in dead),
        draw(st.integers(0, 99)),
    )


def play(name: str, world: World) -> Ran:
    return run(
        world.topology,
        lambda: find(name)(**SETTINGS.get(name, {})),
        until_s=UNTIL_S,
        seed=world.seed,
        deaths=[Death(PeerId(peer), at) for peer, at in world.deaths],
        settings={"status_every_s": 0.3, "lost_after_s": 0.7, "suspect_after_s": 1.5, "drain_s": DRAIN_S},
        workload=lambda peer: Softmax(peer, features=FEATURES),
    )


def hold(name: str, world: World) -> None:
    """Who had been cut off may be ahead and have to wait for a slow one; but that one goes on, and with it all."""
    ran = play(name, world)
    living = set(ran.logs) - {peer for peer, _ in world.deaths}
    assert ran.result.virtual_seconds <= UNTIL_S + DRAIN_S + 4.0
    assert all(np.isfinite(ran.replicas[peer]).all() for peer in living)
    last = {peer: ran.events(peer, "step")[-1]["t"] for peer in living}
    held = min(last.values()) if name in NEVER_WAIT else max(last.values())
    assert held > UNTIL_S - 2.5, last
    said_within_capacity(ran, world)
    if name in ROUNDS:
        assert not [end for peer in living for end in ran.events(peer, "end") if "cut short" in end["reason"]]
        assert disagreement({peer: ran.result.views[PeerId(peer)] for peer in living}) <= 1e-5


def said_within_capacity(ran: Ran, world: World) -> None:
    """At any time a link was told no more than it carried, its window and six messages: no queue grows. Before a link
    was first full its window is the initial one."""
    bytes_per_s, in_flight_s = world.mbps * 1e6 / 8, 2 * world.delay_s + 0.5
    for peer in ran.logs:
        said: Counter[str] = Counter()
        for send in ran.events(peer, "send"):
            to, t = send["to"], send["t"]
            said[to] += send["bytes"]
            since, until = world.out.get((peer, to)) or world.out.get((to, peer)) or (0.0, 0.0)
            up_s = t - max(0.0, min(t, until) - since)
            first_bytes = SessionLimits().window_bytes_initial if t < FULL_AFTER_S else 0
            window_bytes = max(bytes_per_s * in_flight_s, first_bytes)
            assert said[to] <= bytes_per_s * up_s + window_bytes + 6 * MESSAGE_BYTES, (peer, to, t)


@pytest.mark.parametrize("name", EXCHANGES)
@settings(max_examples=3, derandomize=True)
@given(worlds())
def test_whatever_happens_the_living_go_on(name: str, world: World) -> None:
    hold(name, world)


def test_who_is_left_of_a_tree_without_its_hub_finds_each_other() -> None:
    """No link was ever between b2 and c1, and no news came to them but through those who died."""
    deaths = (("a1", 2.0), ("a2", 2.0), ("b1", 2.0))
    speeds = dict.fromkeys(("a1", "a2", "b1", "b2", "c1"), float(BATCH))
    hold("fedavg", World("a1 a2 | b1 b2 | c1", "tree", 0.2, 0.001, speeds, {}, deaths, 0))


@pytest.mark.parametrize("name", ["fedavg", "diloco"])
def test_who_died_twice_for_one_and_once_for_another_is_not_waited_for(name: str) -> None:
    """c1 is silent, back over a way round for a1 alone, and dies: b1 says again that it is gone, of its next life."""
    out = {("a1", "b1"): (2.0, 2.1), ("a1", "c1"): (2.0, 2.7)}
    hold(
        name, World("a1 | b1 | c1", "tree", 0.2, 0.001, dict.fromkeys(("a1", "b1", "c1"), 8.0), out, (("c1", 3.1),), 2)
    )


def test_a_part_that_is_lost_does_not_count_though_the_dead_had_summed_it() -> None:
    """a3 lacks a2's part; a1 and a2 have said shards of a sum that counts it, and die: a3 makes the sum without it."""
    out, deaths = {("a2", "a3"): (2.0, 2.1)}, (("a1", 2.7), ("a2", 2.6))
    speeds = dict.fromkeys(("a1", "a2", "a3", "b1", "b2"), 8.0)
    hold("local-sgd", World("a1 a2 a3 | b1 b2", "mesh", 0.2, 0.1, speeds, out, deaths, 0))


def test_nobody_waits_for_what_another_knows() -> None:
    """a1 knows how far a2 is, b3 how far b1 and b2 are; each waits for the other's, and has no weights to say."""
    speeds = {"a1": 80.0, "a2": 80.0, "b1": 32.0, "b2": 32.0, "b3": 80.0}
    hold("hop", World("a1 a2 | b1 b2 b3", "bridges", 0.2, 0.001, speeds, {("a1", "a2"): (2.0, 3.1)}, (), 0))


def test_what_a_silent_partner_had_said_still_counts_when_it_is_back() -> None:
    """a2 has said its part of the round, is silent for a moment, and does not say it again."""
    hold("noloco", World("a1 a2", "mesh", 0.2, 0.1, {"a1": 8.0, "a2": 32.0}, {("a1", "a2"): (2.0, 2.1)}, (), 0))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", EXCHANGES)
@settings(max_examples=150)
@given(worlds())
def test_whatever_happens_the_living_go_on_much_more(name: str, world: World) -> None:
    hold(name, world)
