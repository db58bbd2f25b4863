"""The rounds' means between micro-clouds: the flat mean to rounding, at a price that no number of mates raises, whoever
dies; and one anchor again after a network that had fallen apart."""

from __future__ import annotations

from functools import partial
from itertools import pairwise, permutations

import numpy as np
import pytest
from node_runs import Talk, net, outages, run

from dlion.exchange import find
from dlion.messages import PeerId
from dlion.tensors import disagreement
from dlion.testing import Bench
from dlion.testing.conformance import learn

CLOUDS = {"a0": "A", "a1": "A", "a2": "A", "b0": "B", "b1": "B", "c0": "C"}
ROUNDS = ["diloco", "local-sgd", "streaming", "sparseloco", "fedavg"]


@pytest.mark.parametrize("talk", ["mesh", "bridges", "tree"])
@pytest.mark.parametrize("name", ["diloco", "fedavg"])
def test_in_two_levels_the_mean_is_the_flat_one(name: str, talk: str) -> None:
    """Uneven micro-clouds, uneven weights: what a peer counts does not depend on how its part travels."""
    batches = dict(zip(CLOUDS, (8, 16, 24, 32, 40, 48), strict=True))
    views = []
    for clouds, how in ((dict.fromkeys(CLOUDS, "A"), "mesh"), (CLOUDS, talk)):
        bench = Bench(partial(find(name), local_steps=2), clouds, talk=how, batches=batches)  # type: ignore[arg-type]
        bench.run(8, learn)
        bench.drain()
        assert bench.disagreement == 0.0
        views.append(bench.seats[PeerId("a0")].view)
    np.testing.assert_allclose(views[1], views[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("talk", ["mesh", "bridges"])
def test_what_rounding_leaves_out_of_a_sum_goes_into_a_later_one(talk: Talk) -> None:
    """Four bits for parts and for their sums, constant steps: in the end the anchor has moved by the mean of all."""
    bench = Bench(find("local-sgd"), CLOUDS, talk=talk)
    start = bench.seats[PeerId("a0")].view.copy()
    pushes = {p: np.random.default_rng([ord(p[0]), ord(p[1])]).standard_normal(28).astype(np.float32) for p in CLOUDS}
    for _ in range(12):
        for peer in CLOUDS:
            bench.step(peer, lambda p, s, w: pushes[p].copy())
        bench.deliver_all()
    assert any(seat.exchange.state().get("left") is not None for seat in bench.seats.values())
    bench.drain()
    assert bench.disagreement == 0.0
    moved = sum(12 * push / len(CLOUDS) for push in pushes.values())
    np.testing.assert_allclose(bench.seats[PeerId("b0")].view - start, moved, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ROUNDS)
def test_a_bridge_carries_no_more_for_more_mates(name: str) -> None:
    """Per round and direction one sum, whether a micro-cloud has one peer or five."""
    for mates in (1, 2, 5):
        over = crossing(name, mates, "bridges")
        assert len(over) == 4
        assert all(" sum " in line for line in over)


@pytest.mark.parametrize("name", ROUNDS)
def test_the_links_of_a_mesh_share_what_goes_from_one_micro_cloud_to_another(name: str) -> None:
    """Per round and direction one model in all: each mate tells one peer there an equal shard of the sum."""
    for mates in (1, 2, 5):
        over = crossing(name, mates, "mesh")
        assert all(" sum " in line for line in over)
        for number in range(4):
            said = [line for line in over if f"sum {line.split()[4].split('/')[0]}/{number} " in line]
            told = [to for line in said for to in line.split()[2].rstrip(":").split(",") if to.startswith("b")]
            entries = sorted(span(line) for line in said)
            assert sorted(told) == [f"b{i}" for i in range(mates)], "each of another"
            assert all(a[1] == b[0] for a, b in pairwise(entries)), "every entry once"
            whole = entries[-1][1] - entries[0][0]
            assert whole == (7 if name == "streaming" else 28)
            assert all(stop - start in (whole // mates, -(-whole // mates)) for start, stop in entries)


def crossing(name: str, mates: int, talk: Talk) -> list[str]:
    """What peers of the micro-cloud A say to those of B in four rounds."""
    clouds = {f"{cloud}{i}": cloud.upper() for cloud in "ab" for i in range(mates)}
    settings = {} if name in ("streaming", "local-sgd") else {"local_steps": 2}
    bench = Bench(partial(find(name), **settings), clouds, talk=talk)
    while min(seat.exchange.round for seat in bench.seats.values()) < 4:  # type: ignore[attr-defined]
        for peer in clouds:
            if bench.may_step(peer):
                bench.step(peer, learn)
        bench.deliver_all()
    sent = [line for line in bench.transcript if line.startswith("a") and " -> " in line and ": " in line]
    return [line for line in sent if any(to.startswith("b") for to in line.split()[2].rstrip(":").split(","))]


def span(line: str) -> tuple[int, int]:
    """First entry of a message's block, and the one behind its last: "28 of 0+28" in the transcript."""
    start, size = line.split(" of ")[1].split(maxsplit=1)[0].split("+")
    return int(start), int(start) + int(size)


@pytest.mark.parametrize("also", [(), ("b0",), ("b0", "b1")])
def test_a_shard_of_the_dead_is_not_lost_whoever_held_it(also: tuple[str, ...]) -> None:
    """a1 dies when b0 alone has its shard of the sum, with the first it was told to and even with its mate: the
    survivors count the round as one, and go on."""
    bench = Bench(partial(find("diloco"), local_steps=1), CLOUDS)
    for peer in CLOUDS:
        bench.step(peer, learn)
    for a, b in permutations(("a0", "a1", "a2"), 2):  # all parts of A are known there
        bench.deliver(a, b)
    told = [p for p in ("b0", "b1") if bench.deliver("a1", p)]
    assert len(told) == 1, "one of them, who passes it on"
    for peer in ("a1", *also):
        bench.kill(peer)
    bench.deliver_all()
    assert {seat.exchange.round for p, seat in bench.seats.items() if p in bench.live} == {1}  # type: ignore[attr-defined]
    assert bench.disagreement == 0.0
    bench.run(4, learn)
    bench.drain()
    assert bench.disagreement == 0.0


@pytest.mark.parametrize("name", ["diloco", "streaming", "fedavg"])
@pytest.mark.parametrize("talk", ["mesh", "bridges"])
def test_who_were_apart_go_on_with_one_anchor(name: str, talk: str) -> None:
    """Both halves close rounds without each other for three seconds; then their numbers and anchors differ."""
    ends = [(a, b) for a in ("a1", "a2") for b in ("b1", "b2")]
    up = dict.fromkeys(ends, outages((2.0, 6.0)))
    topology = net("a1 a2 | b1 b2", talk, speeds={"b1": 40, "b2": 160}, up=up)  # type: ignore[arg-type]
    quick = {"status_every_s": 0.3, "lost_after_s": 0.5, "suspect_after_s": 1.0}
    settings = {"local_steps": 4}
    ran = run(topology, lambda: find(name)(**settings), until_s=10.0, settings=quick)
    for peer in ran.logs:
        at = [event["t"] for event in ran.events(peer, "step")]
        assert any(4.0 < t < 6.0 for t in at), "its own half went on"
        assert at[-1] > 9.0, "and both together"
    assert disagreement(ran.result.views) == 0.0
