"""TFAko's scale: a peer counts by the data it trains per second, whatever its batch."""

from __future__ import annotations

import numpy as np
import pytest

from dlion.exchange.tfako import TFAko
from dlion.messages import PeerId
from dlion.tensors import Flat, Layout
from dlion.testing import Bench

SPEEDS = {"a": 800.0, "b": 400.0, "c": 200.0}
BATCHES = {"a": 10, "b": 10, "c": 20}
"""Not in proportion to the speeds, to tell the two apart."""


def bench_of(speeds: dict[str, float]) -> Bench:
    bench = Bench(TFAko, 3, layout=Layout(("w",), ((6,),)), batches=BATCHES)
    bench.speeds.update(speeds)
    return bench


def ones(peer: str, step: int, weights: Flat) -> Flat:
    return np.ones_like(weights)


def scale(bench: Bench, peer: str) -> float:
    """By how much a step of ``peer`` moves everybody, itself included: the same for all."""
    before = {p: seat.weights.copy() for p, seat in bench.seats.items()}
    bench.step(peer, ones)
    bench.deliver_all()
    moved = np.concatenate([seat.weights - before[p] for p, seat in bench.seats.items()])
    np.testing.assert_allclose(moved, moved[0], rtol=1e-5)
    return float(moved[0])


def test_a_contribution_is_scaled_by_throughput_over_mean_throughput_and_they_average() -> None:
    """s_k = throughput_k / mean throughput; the mean of n steps scaled so is their sum scaled by s_k / n."""
    bench = bench_of(SPEEDS)
    mean = sum(SPEEDS.values()) / 3
    found = {p: scale(bench, p) for p in "abc"}
    for peer, speed in SPEEDS.items():
        assert found[peer] == pytest.approx(speed / mean / 3, rel=1e-5)
    assert sum(found.values()) == pytest.approx(1.0, rel=1e-5)


def test_the_scale_follows_throughput_as_it_changes_and_what_is_said_is_not_scaled_again() -> None:
    bench = bench_of(SPEEDS)
    assert scale(bench, "a") == pytest.approx(800 / 1400, rel=1e-5)
    bench.windows["a", "b"] = 0  # b hears of this step later
    before = bench.seats[PeerId("b")].weights.copy()
    bench.step("a", ones)
    bench.speeds["a"] = 100.0
    assert scale_alone(bench, "a") == pytest.approx(100 / 700, rel=1e-5)
    bench.open("a", "b")
    bench.deliver_all()
    np.testing.assert_allclose(bench.seats[PeerId("b")].weights - before, 800 / 1400 + 100 / 700, rtol=1e-5)


def scale_alone(bench: Bench, peer: str) -> float:
    """By how much its step moves ``peer`` itself."""
    seat = bench.seats[PeerId(peer)]
    before = seat.weights.copy()
    bench.step(peer, ones)
    return float((seat.weights - before)[0])


@pytest.mark.parametrize("unknown", ["a", "c"])
def test_until_everybodys_throughput_is_known_the_batch_share_is_the_scale(unknown: str) -> None:
    bench = bench_of({**SPEEDS, unknown: 0.0})
    assert [scale(bench, p) for p in "abc"] == pytest.approx([0.25, 0.25, 0.5], rel=1e-5)
