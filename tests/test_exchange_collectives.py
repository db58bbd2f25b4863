"""The rounds' means under bridges: the flat mean to rounding, at a price per bridge that no number of mates raises; and
one anchor again after a network that had fallen apart."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from node_runs import net, outages, run

from dlion.exchange import find
from dlion.messages import PeerId
from dlion.tensors import disagreement
from dlion.testing import Bench
from dlion.testing.conformance import learn

CLOUDS = {"a0": "A", "a1": "A", "a2": "A", "b0": "B", "b1": "B", "c0": "C"}
ROUNDS = ["diloco", "local-sgd", "streaming", "sparseloco", "fedavg"]


@pytest.mark.parametrize("talk", ["bridges", "tree"])
@pytest.mark.parametrize("name", ["diloco", "fedavg"])
def test_in_two_levels_the_mean_is_the_flat_one(name: str, talk: str) -> None:
    """Uneven micro-clouds, uneven weights: what a peer counts does not depend on how its part travels."""
    batches = dict(zip(CLOUDS, (8, 16, 24, 32, 40, 48), strict=True))
    views = []
    for how in ("mesh", talk):
        bench = Bench(partial(find(name), local_steps=2), CLOUDS, talk=how, batches=batches)  # type: ignore[arg-type]
        bench.run(8, learn)
        bench.drain()
        assert bench.disagreement == 0.0
        views.append(bench.seats[PeerId("a0")].view)
    np.testing.assert_allclose(views[1], views[0], rtol=1e-5, atol=1e-5)


def test_what_rounding_leaves_out_of_a_sum_goes_into_a_later_one() -> None:
    """Four bits for parts and for their sums, constant steps: in the end the anchor has moved by the mean of all."""
    bench = Bench(find("local-sgd"), CLOUDS, talk="bridges")
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
    crossed = set()
    for mates in (1, 2, 5):
        clouds = {f"{cloud}{i}": cloud.upper() for cloud in "ab" for i in range(mates)}
        settings = {} if name in ("streaming", "local-sgd") else {"local_steps": 2}
        bench = Bench(partial(find(name), **settings), clouds, talk="bridges")
        while min(seat.exchange.round for seat in bench.seats.values()) < 4:  # type: ignore[attr-defined]
            for peer in clouds:
                if bench.may_step(peer):
                    bench.step(peer, learn)
            bench.deliver_all()
        sent = [line for line in bench.transcript if line.startswith("a") and " -> " in line and ": " in line]
        over = [line for line in sent if any(to.startswith("b") for to in line.split()[2].rstrip(":").split(","))]
        assert all(" sum " in line for line in over)
        crossed.add(len(over))
    assert crossed == {4}


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
