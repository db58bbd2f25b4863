"""The rest of the family on the bench: every strategy conforms, and at its limits becomes the one it should."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from node_runs import net, run

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


def test_tfako_fits_each_link_and_scales_by_throughput() -> None:
    bench = Bench(find("tfako"), 3, layout=Layout(("w",), ((1000,),)), batches={"a": 10, "b": 10, "c": 20})
    bench.rates_bps["a", "c"] = 32 * 1000 / 0.1 / 5
    bench.step("a", ones)
    assert "a -> b: update 0/0 [a:0] cloud=A 1000 of 0+1000 F32" in bench.transcript
    assert "a -> c: update 0/0 [a:0] cloud=A 200 of 0+200 F32" in bench.transcript
    assert bench.transcript[1] == "a += [a:0]"


def nudge(peer: str, step: int, weights: Flat) -> Flat:
    values = 0.02 * weights
    values[:5] = 2 * weights[:5]
    return values


def test_gaia_says_only_what_is_significant() -> None:
    layout = Layout(("w",), ((100,),))
    bench = Bench(partial(Gaia, threshold=0.1), 2, layout=layout)
    seat = bench.seats[PeerId("a")]

    before = bench.seats[PeerId("b")].weights.copy()
    bench.step("a", nudge)
    bench.deliver_all()
    np.testing.assert_allclose(bench.seats[PeerId("b")].weights[:5], 2 * before[:5], rtol=1e-5)
    assert np.array_equal(bench.seats[PeerId("b")].weights[5:], before[5:])
    bench.drain()
    np.testing.assert_allclose(bench.seats[PeerId("b")].weights, seat.weights, rtol=1e-5)


def test_gaia_leaves_alone_what_it_adds_where_that_is_held_back() -> None:
    """It gathers in the update's own array only if that is said as it is."""
    bench = Bench(partial(Gaia, threshold=0.1), 2, pace="lockstep", layout=Layout(("w",), ((100,),)))
    bench.run(3, lambda peer, step, weights: nudge(peer, step, weights) * np.float32(1 + (peer == "a")))
    bench.drain()
    assert bench.disagreement < 1e-6


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


def test_gaias_barrier_is_lifted_when_every_index_it_stands_for_has_come() -> None:
    """It names a step, not indexes: but the next message on the full link holds all that is significant by then."""
    bench = Bench(partial(Gaia, threshold=0.5), 2, pace="free", layout=Layout(("w",), ((20,),)))
    bench.windows["a", "b"] = 0
    for step in range(3):
        bench.step("a", lambda p, s, w, at=step: 4.0 * np.eye(20, dtype=np.float32)[at] * np.abs(w))
    (owed,) = bench.seats[PeerId("a")].exchange.state()["owed"].values()
    assert list(np.flatnonzero(owed["sum"])) == [0, 1, 2]
    bench.open("a", "b")
    for _ in range(3):
        bench.deliver("a", "b")
        assert not bench.may_step("b"), "barriers came, values did not"
    before = bench.seats[PeerId("b")].weights.copy()
    bench.deliver("a", "b")
    assert list(np.flatnonzero(bench.seats[PeerId("b")].weights != before)) == [0, 1, 2]
    assert bench.may_step("b")


def test_a_stranger_is_found_by_dotted_name_and_nonsense_is_refused() -> None:
    assert find("dlion.exchange.full:Full") is Full
    for wrong in ("nobody", "dlion.exchange.full:Nothing", "no.such.module:X", "dlion.tensors:Layout"):
        with pytest.raises(ValueError, match="exchange"):
            find(wrong)


@pytest.mark.parametrize(
    "make",
    [
        partial(find("diloco"), local_steps=3, bits=8),
        partial(find("diloco"), round_s=1.0),
        partial(find("sparseloco"), local_steps=2),
        partial(find("streaming"), local_steps=4),
        partial(find("local-sgd"), local_steps=2),
        partial(find("noloco"), local_steps=2),
        partial(find("fedavg"), local_steps=2, share=0.5),
        partial(find("fedavg"), local_steps=3, deadline_s=0.4),
        partial(find("hop"), backup=0, staleness=0),
    ],
)
def test_short_rounds_conform(make: type[Full]) -> None:
    check(make)


def test_hop_without_backup_and_staleness_is_the_mean_of_the_neighbours_plus_the_own_step() -> None:
    bench = Bench(partial(find("hop"), backup=0, staleness=0), 3)
    weights = {p: bench.seats[PeerId(p)].weights.astype(np.float64) for p in "abc"}
    bench.run(6, learn)
    bench.deliver_all()
    for step in range(6):
        mean = sum(weights.values()) / 3
        weights = {p: mean + learn(p, step, w.astype(np.float32)) for p, w in weights.items()}
    for p, seat in bench.seats.items():
        np.testing.assert_allclose(seat.weights, weights[p], atol=1e-5)


def test_hop_weighs_newer_weights_more() -> None:
    """With s = 1, x of this iteration counts 2, of the one before 1."""
    bench = Bench(partial(find("hop"), backup=0, staleness=1), 2, layout=Layout(("w",), ((4,),)))
    start = bench.seats[PeerId("a")].weights.copy()
    bench.step("a", ones)
    bench.step("a", ones)
    np.testing.assert_allclose(bench.seats[PeerId("a")].weights - start, 2 / 3 * 1 + 1, rtol=1e-5)


def test_hop_skips_to_its_slowest_neighbour_and_renews_its_weights() -> None:
    """a is at x0 while b is at x5 and c at x3: its next step makes x4 of their x3 and its own step, not of its x0."""
    bench = Bench(partial(find("hop"), backup=2, staleness=2), 3, pace="free", layout=Layout(("w",), ((4,),)))
    for peer in "bbbbbccc":
        bench.step(peer, lambda p, s, w: float(ord(p)) * np.ones_like(w))
    bench.deliver_all()
    third = [bench.seats[PeerId("a")].exchange.state()["queues"][p][3].values for p in "bc"]
    bench.step("a", ones)
    np.testing.assert_allclose(bench.seats[PeerId("a")].weights, (third[0] + third[1]) / 2 + 1, rtol=1e-5)
    assert "a -> b,c: weights 0/4 [a:3 b:4 c:2] 4 of 0+4 F32" in "\n".join(bench.transcript)


def test_hop_with_a_straggler_that_skips_holds_the_others_less() -> None:
    topology = net("a1 a2 a3", speeds={"a1": 8, "a2": 80, "a3": 80})
    steps = {skip: run(topology, partial(find("hop"), skip=skip), until_s=10.0).result.steps for skip in (0, 10)}
    assert steps[0][PeerId("a2")] < 20, "held by the pace, five ahead of the straggler"
    assert steps[10][PeerId("a2")] > 3 * steps[0][PeerId("a2")]
    assert steps[10][PeerId("a1")] >= 9


def test_choco_replicas_meet_and_public_copies_are_the_same_everywhere() -> None:
    bench = Bench(partial(find("choco"), density=0.2, gossip=0.3), 3, layout=Layout(("w",), ((100,),)))
    bench.run(3, lambda p, s, w: ord(p) * np.ones_like(w) / 100)
    apart = max(np.ptp([seat.weights[i] for seat in bench.seats.values()]) for i in range(100))
    for _ in range(60):
        for peer in "abc":
            bench.step(peer, lambda p, s, w: np.zeros_like(w))
        bench.deliver_all()
    together = max(np.ptp([seat.weights[i] for seat in bench.seats.values()]) for i in range(100))
    assert together < 0.02 * apart
    bench.deliver_all()
    copies = {p: seat.exchange.state() for p, seat in bench.seats.items()}
    for peer in bench.seats:
        for other in bench.seats:
            mine, theirs = copies[peer][f"public/{peer}"], copies[other][f"public/{peer}"]
            np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_choco_replicas_stay_together_whatever_way_their_steps_go() -> None:
    """With defaults, of six that do as chance wills; with five times the step towards the neighbours they part."""
    bench, chance = Bench(find("choco"), 6, layout=Layout(("w",), ((400,),))), np.random.default_rng(0)
    apart = []
    for _ in range(4):
        for _ in range(40):
            for peer in sorted(bench.seats):
                bench.step(peer, lambda p, s, w: chance.standard_normal(w.size).astype(np.float32))
            bench.deliver_all()
        apart.append(float(np.ptp([seat.view for seat in bench.seats.values()], axis=0).mean()))
    assert max(apart) < 1.2 * apart[0]


def test_noloco_pairs_move_to_the_same_place_without_momentum() -> None:
    make = partial(find("noloco"), local_steps=1, momentum=0.0, outer_learning_rate=1.0, pull=1.0)
    bench = Bench(make, 2, layout=Layout(("w",), ((4,),)))
    start = bench.seats[PeerId("a")].weights.copy()
    bench.step("a", ones)
    assert not bench.may_step("a")
    bench.step("b", lambda p, s, w: 3 * np.ones_like(w))
    bench.deliver_all()
    for seat in bench.seats.values():
        np.testing.assert_allclose(seat.weights - start, 2.0, rtol=1e-5)


def test_noloco_goes_on_alone_when_its_partner_dies() -> None:
    bench = Bench(partial(find("noloco"), local_steps=1), 2)
    bench.step("a", ones)
    assert not bench.may_step("a")
    bench.kill("b")
    assert bench.may_step("a")


def test_fedavg_averages_the_chosen_by_their_data_and_the_others_rest() -> None:
    make = partial(find("fedavg"), local_steps=1, share=0.5)
    bench = Bench(make, 4, batches={"a": 10, "b": 20, "c": 30, "d": 40}, layout=Layout(("w",), ((4,),)))
    start = bench.seats[PeerId("a")].weights.copy()
    chosen = [p for p in "abcd" if bench.may_step(p)]
    assert len(chosen) == 2
    for p in chosen:
        bench.step(p, lambda p, s, w: float(ord(p)) * np.ones_like(w))
    bench.deliver_all()
    total = sum(bench.batches[PeerId(p)] for p in chosen)
    expected = sum(bench.batches[PeerId(p)] * ord(p) for p in chosen) / total
    for seat in bench.seats.values():
        np.testing.assert_allclose(seat.weights - start, expected, rtol=1e-4)


def test_fedavg_leaves_out_who_misses_the_deadline() -> None:
    make = partial(find("fedavg"), local_steps=2, deadline_s=1.0)
    bench = Bench(make, 2, layout=Layout(("w",), ((4,),)))
    start = bench.seats[PeerId("a")].weights.copy()
    for _ in range(2):
        bench.step("a", ones)
    bench.step("b", ones)
    while bench.fire():
        pass
    bench.deliver_all()
    for seat in bench.seats.values():
        np.testing.assert_allclose(seat.view - start, 2.0, rtol=1e-5)


ROUNDS = ["diloco", "local-sgd", "streaming", "sparseloco"]


def test_diloco_of_one_step_without_momentum_is_averaging() -> None:
    make = partial(find("diloco"), local_steps=1, outer_learning_rate=1.0, outer_momentum=0.0)
    full, diloco = Bench(Full, 4), Bench(make, 4)
    for bench in (full, diloco):
        bench.run(10, learn)
        bench.drain()
    for peer in full.seats:
        np.testing.assert_allclose(diloco.seats[peer].weights, full.seats[peer].weights, atol=1e-6)


def test_dilocos_outer_step_is_nesterovs() -> None:
    layout = Layout(("w",), ((4,),))
    bench = Bench(partial(find("diloco"), local_steps=2, outer_learning_rate=0.5, outer_momentum=0.9), 2, layout=layout)
    weights = bench.seats[PeerId("a")].weights.copy()
    velocity = np.zeros(4)
    for _ in range(3):
        for step in range(4):
            bench.step("ab"[step % 2], ones)
        assert not bench.may_step("a")
        bench.deliver_all()
        velocity = 0.9 * velocity + 2.0
        weights += 0.5 * (2.0 + 0.9 * velocity)
        np.testing.assert_allclose(bench.seats[PeerId("b")].weights, weights, rtol=1e-5)


def test_rounds_by_the_clock_let_fast_peers_do_more() -> None:
    bench = Bench(partial(find("diloco"), round_s=1.0), 2)
    while bench.may_step("a"):
        bench.step("a", ones)
    assert bench.seats[PeerId("a")].step > 20
    while bench.may_step("b"):
        bench.step("b", ones)
    assert bench.seats[PeerId("b")].step == 1
    bench.deliver_all()
    assert bench.may_step("a")


@pytest.mark.parametrize("name", ["local-sgd", "streaming"])
def test_overlapped_rounds_never_hold_a_step_back(name: str) -> None:
    bench = Bench(find(name), 3)
    for _ in range(50):
        assert bench.may_step("a")
        bench.step("a", learn)
    bench.run(50, learn)
    bench.drain()
    assert bench.disagreement < 1e-6
    for seat in bench.seats.values():
        np.testing.assert_allclose(seat.weights, seat.view, atol=1e-5)


def test_a_fragment_merges_as_alpha_local_and_the_rest_global() -> None:
    make = partial(find("streaming"), fragments=2, local_steps=2, bits=32, outer_learning_rate=1.0, outer_momentum=0.0)
    bench = Bench(make, 2, layout=Layout(("w",), ((8,),)))
    start = bench.seats[PeerId("a")].weights.copy()
    bench.step("a", ones)
    bench.step("b", lambda p, s, w: 3 * np.ones_like(w))
    bench.step("a", ones)
    bench.deliver("b", "a")
    moved = bench.seats[PeerId("a")].weights - start
    np.testing.assert_allclose(moved, [2.0] * 8, rtol=1e-5)  # 0.5 * local 2 + 0.5 * global (1 + 3) / 2
    bench.step("b", lambda p, s, w: 3 * np.ones_like(w))
    bench.deliver("a", "b")
    moved = bench.seats[PeerId("b")].weights - start
    np.testing.assert_allclose(moved, [4.0] * 4 + [6.0] * 4, rtol=1e-5)


def test_sparseloco_says_the_largest_of_every_chunk_and_remembers_the_rest() -> None:
    make = partial(find("sparseloco"), local_steps=1, chunk=100, keep=10)
    bench = Bench(make, 2, layout=Layout(("w",), ((1050,),)))
    bench.step("a", learn)
    assert any("part 0/0 [a:0] cloud=A weight=1.0 105 of 0+1050 I4" in line for line in bench.transcript)
    error = bench.seats[PeerId("a")].exchange.state()["error"]
    given = bench.seats[PeerId("a")].exchange.state()["given"]
    bench.deliver("a", "b")
    rows = np.abs(given[:1000]).reshape(10, 100)
    cut = np.sort(rows, axis=1)[:, -10]
    assert (np.abs(error[:1000].reshape(10, 100)).max(axis=1) <= cut).all()


@pytest.mark.parametrize("name", ROUNDS)
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


def test_hop_tells_the_others_what_it_told_one_whose_link_was_full() -> None:
    """b0 hears how far a1 is, though a0 has said it to a1 alone since it heard it, and has no weights to say."""
    bench = Bench(find("hop"), {"a0": "A", "a1": "A", "b0": "B"}, talk="bridges")
    bench.windows["a0", "a1"] = 0
    for peer in ("b0", "a0", "a1", "a1"):
        bench.step(peer, learn)
    bench.deliver_all()
    bench.open("a0", "a1")
    bench.deliver_all()
    assert bench.fire()
    while bench.fire():
        bench.deliver_all()
    assert any(line.startswith("a0 -> ") and "b0" in line and " news " in line for line in bench.transcript)
    assert bench.seats[PeerId("b0")].replica.applied["a1"] == 1
