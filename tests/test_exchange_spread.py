"""full and dlion on the bench: identities, exactly once across bridges, budgets, residuals, knowledge transfer."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dlion.blocks import Encoding, compress
from dlion.exchange.base import Send
from dlion.exchange.dlion import Budget, DLion
from dlion.exchange.full import Full
from dlion.exchange.owed import SPANS_MAX, Owed, Piece
from dlion.messages import PeerId, Span
from dlion.tensors import Flat, Layout
from dlion.testing import Bench, check
from dlion.testing.conformance import learn

EVERYTHING = partial(DLion, transfer="off")
KEEPS_ALL = partial(DLion, residual=True, transfer="off")


@pytest.mark.parametrize(
    "make",
    [
        Full,
        DLion,
        KEEPS_ALL,
        partial(DLion, weighting="ratio", transfer="best-to-worst", transfer_every=3),
        partial(DLion, weighting="none", n_fixed=10.0),
    ],
)
def test_conforms(make: type[Full]) -> None:
    check(make)


def test_full_is_one_process_that_averages_the_gradients() -> None:
    batches = {"a": 10, "b": 30, "c": 60}
    bench = Bench(Full, batches=batches)
    alone = bench.seats[PeerId("a")].weights.astype(np.float64)
    bench.run(20, learn)
    bench.drain()
    for step in range(20):
        seen = alone.astype(np.float32)
        alone = alone + sum(n / 100 * learn(p, step, seen).astype(np.float64) for p, n in batches.items())
    for seat in bench.seats.values():
        np.testing.assert_allclose(seat.weights, alone, rtol=0, atol=2e-6)


def test_at_equal_pace_dlion_with_room_for_everything_is_full_bit_by_bit() -> None:
    full, dlion = Bench(Full, 4), Bench(EVERYTHING, 4, pace="lockstep", seed=0)
    for bench in (full, dlion):
        bench.run(10, learn)
        bench.drain()
    weights = [seat.weights.tobytes() for bench in (full, dlion) for seat in bench.seats.values()]
    assert len(set(weights)) == 1


def counting(step_count: int, peers: list[str]) -> tuple[Layout, object]:
    """Each peer's step adds 1 at an entry of its own, so that the weights count who was applied how often."""
    index = {(p, s): i for i, (p, s) in enumerate((p, s) for p in sorted(peers) for s in range(step_count))}

    def unit(peer: str, step: int, weights: Flat) -> Flat:
        values = np.zeros_like(weights)
        values[index[peer, step]] = len(peers)
        return values

    return Layout(("w",), ((len(index),),)), unit


@settings(max_examples=50)
@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=4),
    st.sampled_from(["mesh", "bridges", "tree"]),
    st.sampled_from(["full", "residual"]),
    st.integers(0, 2**16),
)
@example([6, 2, 5], "tree", "residual", 1)
@example([5, 1, 6], "bridges", "full", 2)
def test_every_update_is_applied_exactly_once_everywhere(sizes: list[int], talk: str, how: str, seed: int) -> None:
    """Whatever the order, through bridges and on links so narrow that most of it has to wait."""
    clouds = {f"{chr(97 + c)}{i}": chr(65 + c) for c, size in enumerate(sizes) for i in range(size)}
    layout, unit = counting(4, list(clouds))
    bench = Bench(Full if how == "full" else KEEPS_ALL, clouds, talk=talk, layout=layout, pace="free", seed=seed)  # type: ignore[arg-type]
    start = next(iter(bench.seats.values())).weights.copy()
    for pair in bench.flying:
        bench.windows[pair] = int(bench.rng.integers(1, 200))
        bench.rates_bps[pair] = float(bench.rng.integers(400, 20_000))
    bench.run(4, unit)  # type: ignore[arg-type]
    bench.drain()
    for seat in bench.seats.values():
        np.testing.assert_allclose(seat.weights - start, 1.0, atol=1e-5)


@given(st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 600), st.booleans()), max_size=8), st.booleans())
def test_sent_and_owed_together_are_what_was_added(events: list[tuple[int, int, bool]], eight_bits: bool) -> None:
    """Whether the newest update is said by itself, beside the dust of what was said whole, or all of it together."""
    size, encoding = 300, Encoding.I8 if eight_bits else Encoding.F32
    owed, added, sent = Owed(size), np.zeros(300), np.zeros(300)
    for seed, budget_bytes, alone in events:
        values = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
        owed.add(Piece(values, PeerId("a"), size), [Span(PeerId("a"), seed, seed)])
        added += values
        latest = owed.latest.block if alone and owed.latest is not None else None
        block = latest or compress(owed.flat, budget_bytes, encoding=encoding)
        if block is not None:
            said = np.zeros(size, dtype=np.float32)
            block.add_to(said)
            sent += said
            assert owed.said(block)
            assert not owed.fresh
    np.testing.assert_allclose(sent + owed.flat, added, atol=1e-5)


def test_messages_keep_to_the_budget_of_their_link_and_the_minimum_n() -> None:
    layout = Layout(("w",), ((4000,),))
    bench = Bench(EVERYTHING, 2, layout=layout, pace="free")
    bench.rates_bps["a", "b"], bench.windows["a", "b"] = 8 * 2000 / 0.1, 1
    bench.step("a", learn)
    ((_, body),) = bench.flying[PeerId("a"), PeerId("b")][1]
    assert 0.8 * 2000 <= len(body) <= 2000
    starved = Bench(partial(DLion, transfer="off", n_min=50.0), 2, layout=layout, pace="free")
    starved.rates_bps["a", "b"], starved.windows["a", "b"] = 8 * 10 / 0.1, 1
    starved.step("a", learn)
    ((_, body),) = starved.flying[PeerId("a"), PeerId("b")][1]
    assert len(body) > 500


def test_a_link_that_takes_more_than_its_measured_rate_is_offered_more() -> None:
    """Else a rate that was first measured too low would stay so for ever."""
    bench = Bench(EVERYTHING, 2, layout=Layout(("w",), ((4000,),)), pace="free")
    bench.rates_bps["a", "b"], bench.windows["a", "b"] = 8 * 2000 / 0.1, 6000
    bench.step("a", learn)
    ((_, body),) = bench.flying[PeerId("a"), PeerId("b")][1]
    assert 0.8 * 6000 <= len(body) <= 6000


def test_without_residual_the_rest_is_dropped_and_with_it_kept() -> None:
    layout = Layout(("w",), ((4000,),))
    for residual in (False, True):
        bench = Bench(partial(DLion, transfer="off", residual=residual), 2, layout=layout, pace="free")
        bench.rates_bps["a", "b"], bench.windows["a", "b"] = 8 * 2000 / 0.1, 1
        bench.step("a", learn)
        (owed,) = bench.seats[PeerId("a")].exchange.state()["owed"].values()
        assert (owed["sum"] is not None) is residual


def test_the_best_peers_weights_are_pulled_and_merged() -> None:
    bench = Bench(partial(DLion, transfer_every=2, merge=0.75), 3, pace="free")
    for _step in range(2):
        for peer, loss in (("a", 0.1), ("b", 0.5), ("c", 0.9)):
            drift = np.float32(ord(peer) - 98)
            bench.windows = dict.fromkeys(bench.flying, 0)
            bench.step(peer, lambda p, s, w, d=drift: np.full_like(w, d), loss=loss)
    pulls = [line for line in bench.transcript if "pull" in line]
    assert pulls == ["b -> a: pull 1/0 []", "c -> a: pull 1/0 []"]
    seats = bench.seats
    best, mine = seats[PeerId("a")].weights.copy(), seats[PeerId("b")].weights.copy()
    bench.deliver("b", "a")
    bench.deliver("a", "b")
    np.testing.assert_allclose(seats[PeerId("b")].weights, 0.25 * mine + 0.75 * best, atol=1e-6)


def test_only_the_worst_pulls_in_best_to_worst() -> None:
    bench = Bench(partial(DLion, transfer="best-to-worst", transfer_every=1), 3, pace="free")
    for peer, loss in (("a", 0.1), ("b", 0.5), ("c", 0.9)):
        bench.step(peer, learn, loss=loss)
    for peer, loss in (("a", 0.1), ("b", 0.5), ("c", 0.9)):
        bench.step(peer, learn, loss=loss)
    assert {line.split()[0] for line in bench.transcript[3:] if "pull" in line} == {"c"}


def test_ratio_weighting_scales_by_sender_over_receiver() -> None:
    bench = Bench(partial(DLion, weighting="ratio", transfer="off"), 2, batches={"a": 10, "b": 40}, pace="free")
    start = bench.seats[PeerId("a")].weights.copy()
    bench.step("b", lambda p, s, w: np.ones_like(w))
    bench.deliver_all()
    np.testing.assert_allclose(bench.seats[PeerId("a")].weights - start, 0.5 * 40 / 10, rtol=1e-5)
    np.testing.assert_allclose(bench.seats[PeerId("b")].weights - start, 0.5, rtol=1e-5)


def test_a_moved_bridge_tells_how_far_its_side_is_so_that_nobody_waits_for_the_dead() -> None:
    clouds = {"a0": "A", "a1": "A", "b0": "B", "b1": "B"}
    bench = Bench(Full, clouds, talk="bridges")
    bench.run(3, learn)
    for peer in ("a0", "b0", "a1"):
        while not bench.may_step(peer):
            bench.deliver_all()
        bench.step(peer, learn)
    bench.kill("a0")
    bench.run(8, learn)


def test_who_leaves_is_told_all_that_it_is_owed_however_little_room_there_is() -> None:
    """b0 is owed, on two accounts, what b1 does and what c0 does; the first word takes all the room there is."""
    bench = Bench(Full, {"a0": "A", "b0": "B", "b1": "B", "c0": "C"}, talk="bridges", pace="free")
    bench.windows["b1", "b0"] = 0
    bench.step("b1", learn)
    bench.step("c0", learn)
    assert bench.deliver("c0", "b1")
    seat, told = bench.seats[PeerId("b1")], []
    link = seat.ctx.links[PeerId("b0")]
    for action in seat.exchange.on_leave(link, seat.ctx):
        assert isinstance(action, Send) and action.to == ("b0",)
        told += action.message.coverage
        link.writable_bytes = 0
    assert sorted(told) == [("b1", 0, 0), ("c0", 0, 0)]


def test_unusable_settings_are_refused_with_what_was_expected() -> None:
    for wrong in ({"weighting": "x"}, {"n_min": 0.0}, {"transfer": "x"}, {"transfer_every": 0}, {"merge": 2.0}):
        with pytest.raises(ValueError, match="dlion: "):
            DLion(**wrong)  # type: ignore[arg-type]
    assert Budget(0.85).n_fixed is None


@pytest.mark.parametrize("awaited", [True, False])
@pytest.mark.parametrize("count", [4 * SPANS_MAX, 200])
def test_of_many_spans_all_are_named_in_turn_and_few_at_once_where_nobody_waits(awaited: bool, count: int) -> None:
    """Nothing is named twice, and values never wait for names."""
    owed, size = Owed(2, awaited=awaited), 2
    origins = [PeerId(f"p{n:03d}") for n in range(count)]
    named: list[PeerId] = []
    most = 0
    while len(named) < len(origins):
        coverage = tuple(Span(p, 0, 0) for p in origins) if not named else ()
        owed.add(Piece(np.ones(size, dtype=np.float32), origins[0], size), coverage)
        spans = owed.said(owed.everything())
        assert spans and not owed
        most = max(most, len(spans))
        named += [span.origin for span in spans]
    assert sorted(named) == origins and most == (count // 4 if awaited else SPANS_MAX)
