"""What strategies are at the limits of their settings: each other, and in the end plain averaging."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from dlion.exchange import find
from dlion.exchange.ako import Ako
from dlion.exchange.base import Exchange
from dlion.exchange.full import Full
from dlion.exchange.gaia import Gaia
from dlion.testing import Bench
from dlion.testing.conformance import learn


@pytest.mark.parametrize("make", [partial(Ako, partitions=1), partial(Gaia, threshold=0.0)])
def test_at_equal_pace_the_limit_cases_are_full_bit_by_bit(make: type[Full]) -> None:
    weights = set()
    for one in (Full, make):
        bench = Bench(one, 4, pace="lockstep", batches={"a": 16, "b": 48, "c": 32, "d": 32})
        bench.run(10, learn)
        bench.drain()
        weights |= {seat.weights.tobytes() for seat in bench.seats.values()}
    assert len(weights) == 1


PLAIN = {"outer_learning_rate": 1.0, "outer_momentum": 0.0}


@pytest.mark.parametrize(
    ("one", "like"),
    [
        (partial(find("pride"), bits=32, speculation=0.0, foresight=0.0), Full),
        (find("tfako"), Full),
        (partial(find("local-sgd"), bits=32), Full),
        (partial(find("streaming"), local_steps=1, fragments=1, alpha=0.0, bits=32, **PLAIN), Full),
        (
            partial(find("streaming"), local_steps=3, fragments=1, alpha=0.0, bits=32),
            partial(find("diloco"), local_steps=3, outer_learning_rate=0.7, outer_momentum=0.9),
        ),
    ],
)
def test_where_all_is_heard_at_once_the_limit_cases_are(
    one: Callable[[], Exchange], like: Callable[[], Exchange]
) -> None:
    """Nobody is ahead of anybody, and links take everything: nothing is assumed, overlapped or left for later."""
    ends = []
    for make in (one, like):
        bench = Bench(make, 4, pace="free" if "free" in make().paces else None)
        for _ in range(12):
            for peer in bench.seats:
                bench.step(peer, learn)
            bench.deliver_all()
        ends.append([seat.view.copy() for seat in bench.seats.values()])
    np.testing.assert_allclose(ends[0], ends[1], rtol=0, atol=2e-6)
