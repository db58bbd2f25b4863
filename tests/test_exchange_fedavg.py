"""FedAvg's rounds: who is chosen beyond its share, how long the others wait for them, and what a round is."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from node_runs import BATCH, SAMPLES, net, run

from dlion.exchange.fedavg import FedAvg
from dlion.messages import PeerId
from dlion.tensors import Flat, Layout
from dlion.testing import Bench, check

LAYOUT = Layout(("w",), ((4,),))
WEIGHTS = {"a": 10, "b": 20, "c": 30, "d": 40, "e": 50, "f": 60}


def own(peer: str, step: int, weights: Flat) -> Flat:
    """A step by which its peer is known."""
    return np.full_like(weights, ord(peer) - ord("a") + 1)


def able(bench: Bench) -> list[str]:
    return [str(peer) for peer in bench.seats if bench.may_step(peer)]


def expect(bench: Bench, start: Flat, counted: list[str]) -> None:
    """The round is closed everywhere, with one step of each of ``counted``, by their data."""
    total = sum(WEIGHTS[p] for p in counted)
    mean = sum(WEIGHTS[p] * own(p, 0, start) for p in counted) / total
    for seat in bench.seats.values():
        np.testing.assert_allclose(seat.view - start, mean, rtol=1e-5)


@pytest.mark.parametrize(
    ("share", "over_selection", "expected"),
    [(0.5, 1.0, 3), (0.5, 1.3, 4), (0.5, 1.5, 5), (0.2, 1.3, 2), (0.5, 2.0, 6), (1.0, 1.3, 6)],
)
def test_over_selection_chooses_so_many_times_the_share_in_every_round_and_all_of_them_count(
    share: float, over_selection: float, expected: int
) -> None:
    """Rounded up, and never more than there are."""
    make = partial(FedAvg, local_steps=1, share=share, over_selection=over_selection)
    bench = Bench(make, 6, batches=WEIGHTS, layout=LAYOUT)
    seen = set()
    for _ in range(8):
        start, chosen = bench.seats[PeerId("a")].view.copy(), able(bench)
        assert len(chosen) == expected
        seen |= {*chosen}
        for peer in chosen:
            bench.step(peer, own)
        bench.deliver_all()
        expect(bench, start, chosen)
    assert seen == {*WEIGHTS}, "in time everybody is chosen"


def test_a_share_that_is_a_whole_number_of_peers_chooses_no_one_more() -> None:
    bench = Bench(partial(FedAvg, local_steps=1, share=0.28), 25, layout=LAYOUT)
    assert 0.28 * 25 > 7 and len(able(bench)) == 7


def test_over_selection_makes_up_for_who_is_late() -> None:
    """Three are chosen where two are wanted; one misses the deadline, and the round is of the two that do not."""
    make = partial(FedAvg, local_steps=1, share=1 / 3, over_selection=1.5, deadline_s=1.0)
    bench = Bench(make, 6, batches=WEIGHTS, layout=LAYOUT)
    start, (first, late, second) = bench.seats[PeerId("a")].weights.copy(), able(bench)
    for peer in (first, second):
        bench.step(peer, own)
        bench.deliver_all()
    assert able(bench) == [late], "the round waits"
    while bench.seats[PeerId("a")].exchange.state()["round"] == 0:
        assert bench.fire()
        bench.deliver_all()
    expect(bench, start, [first, second])


def test_without_a_deadline_which_is_the_default_a_round_waits_for_its_slowest_however_long() -> None:
    bench = Bench(partial(FedAvg, local_steps=1), 2, batches=WEIGHTS, layout=LAYOUT)
    start = bench.seats[PeerId("a")].weights.copy()
    bench.step("a", own)
    bench.deliver_all()
    assert not bench.fire(), "nobody has set a timer"
    bench.now += 1e6
    assert able(bench) == ["b"]
    bench.step("b", own)
    bench.deliver_all()
    expect(bench, start, ["a", "b"])


@pytest.mark.parametrize("deadline_s", [0.0, 0.4])
def test_over_selection_conforms(deadline_s: float) -> None:
    check(partial(FedAvg, local_steps=2, share=0.4, over_selection=1.3, deadline_s=deadline_s))


def test_unusable_settings_are_refused_with_what_was_expected() -> None:
    for wrong in ({"share": 0.0}, {"share": 1.1}, {"over_selection": 0.9}, {"deadline_s": -1.0}, {"local_steps": 0}):
        with pytest.raises(ValueError, match=r"expected share|local_steps must"):
            FedAvg(**wrong)  # type: ignore[arg-type]
    for wrong in ({"epochs": -1.0}, {"epochs": 1.0, "round_s": 2.0}):
        with pytest.raises(ValueError, match=r"epochs must be 0 or more, and 0 beside round_s"):
            FedAvg(**wrong)  # type: ignore[arg-type]


def give(bench: Bench, peer: str) -> int:
    """Steps of ``peer`` until its part of the round is given."""
    count = 0
    while bench.may_step(peer):
        bench.step(peer, own)
        count += 1
    return count


def test_a_round_of_epochs_is_so_many_passes_over_each_peers_own_data_at_its_own_batch() -> None:
    """E x shard / batch steps, rounded up: twice 100 by 10, twice 55 by 20, twice 3 by 30; weighed by what that is."""
    bench = Bench(partial(FedAvg, epochs=2.0), 3, batches={"a": 10, "b": 20, "c": 30}, layout=LAYOUT)
    bench.shards.update({"a": 100, "b": 55, "c": 3})
    for _ in range(2):
        start = bench.seats[PeerId("a")].view.copy()
        assert [give(bench, p) for p in "abc"] == [20, 6, 1]
        bench.deliver_all()
        mean = (200 * 20 * 1 + 120 * 6 * 2 + 30 * 1 * 3) / 350
        for seat in bench.seats.values():
            np.testing.assert_allclose(seat.view - start, mean, rtol=1e-5)


def test_part_of_an_epoch_is_a_round_too_and_steps_count_where_no_epochs_are_asked_for() -> None:
    for settings, expected in (({"epochs": 0.25}, 3), ({"local_steps": 7}, 7), ({"epochs": 1.0, "local_steps": 7}, 10)):
        bench = Bench(partial(FedAvg, **settings), 2, batches={"a": 10, "b": 10}, layout=LAYOUT)  # type: ignore[arg-type]
        bench.shards.update({"a": 100, "b": 100})
        assert give(bench, "a") == expected


def test_epochs_conform() -> None:
    check(partial(FedAvg, epochs=0.03))


def test_nobody_waits_for_a_whole_epoch_of_a_newcomer() -> None:
    """It is met in a new era of rounds, and its first step is all that it gives to the first of them."""
    bench = Bench(partial(FedAvg, epochs=1.0), 2, batches={"a": 10, "b": 10}, layout=LAYOUT)
    bench.shards.update({"a": 1000, "b": 1000})
    seat = bench.seats[PeerId("b")]
    seat.exchange.inherit(PeerId("a"), {"": seat.weights.copy()}, seat.ctx)
    list(seat.exchange.introduce(PeerId("a"), None, 1, seat.ctx))
    list(seat.exchange.on_members(seat.ctx))
    assert give(bench, "b") == 1


def test_a_node_knows_how_much_its_peer_has_to_train_on() -> None:
    """A pass over 96 samples by 8 is 12 steps of 0.1 s, and then the round is said."""
    assert SAMPLES / BATCH == 12
    ran = run(net("a1 a2"), partial(FedAvg, epochs=1.0), until_s=4.0)
    for peer in ran.logs:
        parts = [e["t"] for e in ran.events(peer, "send") if e["kind"] == "part"]
        done = [sum(e["t"] <= t for e in ran.events(peer, "step")) for t in parts]
        assert done[:3] == [12, 24, 36]
