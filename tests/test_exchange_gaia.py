"""Gaia's filter: how significance is judged as training goes on, and where a weight is nothing."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from dlion.exchange.gaia import Gaia
from dlion.messages import PeerId
from dlion.tensors import Flat, Layout
from dlion.testing import Bench

LAYOUT = Layout(("w",), ((200,),))


def heard(bench: Bench) -> list[int]:
    """The entries of b that move when it hears all that a has said."""
    weights = bench.seats[PeerId("b")].weights
    before = weights.copy()
    bench.deliver_all()
    return [int(place) for place in np.flatnonzero(weights != before)]


def test_the_threshold_falls_as_one_over_the_root_of_the_step() -> None:
    """The first step moves entry i by T / sqrt(i + 1/2) of its weight, and then nothing moves: entry i is said by the
    (i + 1)-th message and by no other, for T / sqrt(i + 1) < T / sqrt(i + 1/2) < T / sqrt(i)."""
    threshold, steps = 1e-3, 40
    bench = Bench(partial(Gaia, threshold=threshold), 2, layout=LAYOUT, pace="free")

    def push(peer: str, step: int, weights: Flat) -> Flat:
        values = np.zeros_like(weights)
        if step == 0:
            values[:steps] = 2 * weights[:steps] * threshold / np.sqrt(np.arange(steps) + 0.5)  # share: a half
        return values

    for step in range(steps):
        bench.step("a", push)
        assert heard(bench) == [step]


@pytest.mark.parametrize("pace", ["free", "lockstep"])
def test_where_a_weight_is_nothing_any_change_is_significant(pace: str) -> None:
    """Nothing is so small that it is little beside 0; beside a whole number it is. Without a change nothing is said."""
    bench = Bench(partial(Gaia, threshold=0.5), 2, layout=LAYOUT, pace=pace)

    def push(peer: str, step: int, weights: Flat) -> Flat:
        values = np.zeros_like(weights)
        if peer == "a":
            values[:3] = -2 * weights[:3] if step == 0 else [1e-30, 1e-30, 0]
            values[3:6] = 0 if step == 0 else 1e-3
        return values

    for _ in range(2):
        bench.step("a", push)
        bench.step("b", push)
        bench.deliver_all()
    seat = bench.seats[PeerId("a")]
    said = [line for line in bench.transcript if "a -> b: update" in line]
    assert " 3 of 0+200 F32 (0:" in said[0], "what makes a weight nothing is significant too"
    assert said[1].endswith(" 2 of 0+200 F32 (0:5e-31 1:5e-31)") and len(said) == 2
    assert list(np.flatnonzero(seat.exchange.state()["gathered"])) == [3, 4, 5]
