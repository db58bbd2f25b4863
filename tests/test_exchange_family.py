"""The rest of the family on the bench: every strategy conforms, and at its limits becomes the one it should."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from dlion.exchange import EXCHANGES, find
from dlion.exchange.ako import Ako
from dlion.exchange.full import Full
from dlion.exchange.gaia import Gaia
from dlion.messages import PeerId
from dlion.tensors import Flat, Layout
from dlion.testing import Bench, check
from dlion.testing.conformance import learn


@pytest.mark.parametrize("name", sorted(EXCHANGES))
def test_every_built_in_conforms_and_bears_its_name(name: str) -> None:
    assert find(name).name == name
    check(find(name))


@pytest.mark.parametrize("make", [partial(Ako, partitions=1), partial(Gaia, threshold=0.0)])
def test_at_equal_pace_the_limit_cases_are_full_bit_by_bit(make: type[Full]) -> None:
    weights = set()
    for one in (Full, make):
        bench = Bench(one, 4, pace="lockstep", batches={"a": 16, "b": 48, "c": 32, "d": 32})
        bench.run(10, learn)
        bench.drain()
        weights |= {seat.weights.tobytes() for seat in bench.seats.values()}
    assert len(weights) == 1


def ones(peer: str, step: int, weights: Flat) -> Flat:
    return np.ones_like(weights)


def test_ako_says_each_partition_in_turn_with_all_it_gathered() -> None:
    bench = Bench(partial(Ako, partitions=4), 2, layout=Layout(("w",), ((8,),)))
    start = bench.seats[PeerId("b")].weights.copy()
    for _ in range(4):
        bench.step("a", ones)
    bench.deliver_all()
    heard = bench.seats[PeerId("b")].weights - start
    np.testing.assert_allclose(heard, np.repeat([1, 2, 3, 4], 2) * 0.5, rtol=1e-5)


@pytest.mark.parametrize(("rate_bps", "expected"), [(1e9, 1), (32 * 1000 / 0.1 / 3, 3), (1.0, 64)])
def test_akos_cost_model(rate_bps: float, expected: int) -> None:
    bench = Bench(Ako, 3, layout=Layout(("w",), ((1000,),)))
    bench.rates_bps.update(dict.fromkeys(bench.flying, rate_bps))
    bench.step("a", ones)
    exchange = bench.seats[PeerId("a")].exchange
    assert isinstance(exchange, Ako)
    assert exchange.count(bench.seats[PeerId("a")].ctx) == expected


def test_gaia_says_only_what_is_significant() -> None:
    layout = Layout(("w",), ((100,),))
    bench = Bench(partial(Gaia, threshold=0.1), 2, layout=layout)
    seat = bench.seats[PeerId("a")]

    def nudge(peer: str, step: int, weights: Flat) -> Flat:
        values = 0.02 * weights
        values[:5] = 2 * weights[:5]
        return values

    before = bench.seats[PeerId("b")].weights.copy()
    bench.step("a", nudge)
    bench.deliver_all()
    np.testing.assert_allclose(bench.seats[PeerId("b")].weights[:5], 2 * before[:5], rtol=1e-5)
    assert np.array_equal(bench.seats[PeerId("b")].weights[5:], before[5:])
    bench.drain()
    np.testing.assert_allclose(bench.seats[PeerId("b")].weights, seat.weights, rtol=1e-5)


def test_gaias_barrier_holds_the_receiver_until_the_update_is_there() -> None:
    bench = Bench(Gaia, 2, pace="free")
    bench.windows["a", "b"] = 1
    bench.step("a", ones)
    bench.step("a", ones)
    assert bench.may_step("b")
    bench.deliver("a", "b")
    assert not bench.may_step("b"), "the barrier overtakes the update"
    bench.deliver_all()
    assert bench.may_step("b")


def test_a_stranger_is_found_by_dotted_name_and_nonsense_is_refused() -> None:
    assert find("dlion.exchange.full:Full") is Full
    for wrong in ("nobody", "dlion.exchange.full:Nothing", "no.such.module:X", "dlion.tensors:Layout"):
        with pytest.raises(ValueError, match="exchange"):
            find(wrong)


@pytest.mark.parametrize("name", ["diloco", "local-sgd"])
@pytest.mark.parametrize("talk", ["mesh", "bridges", "tree"])
def test_rounds_survive_deaths_with_one_common_model(name: str, talk: str) -> None:
    """Whoever dies, wherever its last part got to: all survivors count the same parts."""
    clouds = {"a0": "A", "a1": "A", "b0": "B", "b1": "B", "c0": "C"}
    for seed in range(25):
        bench = Bench(find(name), clouds, talk=talk, seed=seed)  # type: ignore[arg-type]
        for dies_at in (25, 45):
            bench.run(dies_at, learn)
            for pair in list(bench.flying)[: seed % 7]:
                bench.deliver(*pair)
            bench.kill(sorted(bench.live)[seed % len(bench.live)])
        bench.run(65, learn)
        bench.drain()
        assert bench.disagreement < 1e-6, seed
