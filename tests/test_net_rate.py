"""The estimator alone: what each kind of sample may and may not change."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlion.net.rate import CLOCK_TICKS, LEAST_MEMORY_S, Arrival, Flight, RateEstimator

CLOCK_AHEAD_S = 4_290.0
"""The receiver's clock: it differs from ours, and wraps in the middle of these tests."""


def acked(
    estimate: RateEstimator, now: float, nbytes: int, flight: Flight, *, one_way_s: float, held_s: float = 0.0
) -> None:
    """An acknowledgement of a chunk that was ``one_way_s`` under way."""
    arrived(estimate, now, nbytes, flight, flight, one_way_s=one_way_s, held_s=held_s)


def arrived(
    estimate: RateEstimator,
    now: float,
    nbytes: int,
    flight: Flight,
    newest: Flight,
    *,
    one_way_s: float,
    held_s: float = 0.0,
) -> None:
    """An acknowledgement of ``flight``, and of a part of ``newest``, which was ``one_way_s`` under way."""
    ticks = int((newest.sent_at + one_way_s + CLOCK_AHEAD_S) * 1e6) % CLOCK_TICKS
    arrival = Arrival(held_s)
    arrival.add(nbytes, flight, newest)
    estimate.acked(now, arrival, ticks)


def busy(estimate: RateEstimator, start: float, seconds: float, rate: float, rtt_s: float) -> float:
    """A sender that always has ``rate * rtt_s`` in flight on a link of just that rate; returns the time it ends."""
    chunk = rate * rtt_s / 4
    estimate.filled(True)
    flights = [estimate.sent(start, int(chunk) * count, int(chunk)) for count in range(4)]
    now = start + rtt_s
    while now < start + seconds:
        now += rtt_s / 4
        flight = flights.pop(0)
        acked(estimate, now, int(chunk), flight, one_way_s=now - rtt_s / 2 - flight.sent_at)
        flights.append(estimate.sent(now, int(chunk) * 3, int(chunk)))
    return now


def test_it_finds_the_rate_of_a_busy_link() -> None:
    estimate = RateEstimator(0.1, 0.0)
    assert (estimate.rate, estimate.window_bytes(), estimate.proven) == (0.0, 0.0, False)
    busy(estimate, 0.0, 1.0, 1e6, 0.04)
    assert estimate.rate == pytest.approx(1e6, rel=0.05)
    assert estimate.proven
    assert estimate.window_bytes() == pytest.approx(estimate.rate * (estimate.distance_s + 0.1))


def test_a_clock_that_shows_no_time_between_shows_no_endless_rate() -> None:
    """Loops whose clock ticks in whole milliseconds see a chunk acknowledged in the instant in which it left."""
    estimate = RateEstimator(0.1, 0.0)
    estimate.filled(True)
    for tick in range(20):
        now = tick * 1e-3
        acked(estimate, now, 10_000, estimate.sent(now, 0, 10_000), one_way_s=0.0)
    assert estimate.rate <= 10_000 / 1e-3


def test_samples_of_a_starved_sender_raise_the_estimate_but_never_lower_it() -> None:
    estimate = RateEstimator(0.1, 0.0)
    now = busy(estimate, 0.0, 1.0, 1e6, 0.04)
    before = estimate.rate
    for nbytes, higher in ((100, False), (1_000_000, True)):
        estimate.starved(0)
        now += 60.0
        flight = estimate.sent(now, 0, 1000)
        now += 0.04
        acked(estimate, now, nbytes, flight, one_way_s=0.02)
        assert (estimate.rate > before) is higher
        assert estimate.rate >= before


@pytest.mark.parametrize("full", [False, True])
def test_a_silence_counts_in_no_sample_though_a_small_chunk_was_under_way(full: bool) -> None:
    """Its acknowledgement waits for the next burst: what leaves after that was not sent for as long as it seems."""
    estimate = RateEstimator(0.1, 0.0)
    now = 3.0
    busy(estimate, 0.0, now, 1e6, 0.04)
    for _ in range(4):  # longer than the estimate remembers
        small = estimate.sent(now, 0, 100)
        if full:  # the window just had room for it
            estimate.filled(False)
        else:
            estimate.starved(100)
        now += 0.5
        first = estimate.sent(now, 100, 10_000)
        estimate.filled(True)
        acked(estimate, now + 0.03, 100, small, one_way_s=0.02)
        last = estimate.sent(now + 0.03, 10_000, 10_000)
        acked(estimate, now + 0.04, 10_000, first, one_way_s=0.02)
        acked(estimate, now + 0.07, 10_000, last, one_way_s=0.02)
        now += 0.5
    assert estimate.rate == pytest.approx(1e6, rel=0.05)


def test_the_peers_holding_time_counts_neither_as_distance_nor_against_the_rate() -> None:
    held, prompt = RateEstimator(0.1, 0.0), RateEstimator(0.1, 0.0)
    for estimate, held_s in ((held, 0.02), (prompt, 0.0)):
        flight = estimate.sent(1.0, 0, 1000)
        acked(estimate, 1.05 + held_s, 10_000, flight, one_way_s=0.025, held_s=held_s)
    assert held.distance_s == pytest.approx(prompt.distance_s) == pytest.approx(0.05)
    assert held.rate == pytest.approx(prompt.rate)


def one(estimate: RateEstimator, at: float, forth_s: float, back_s: float) -> None:
    """A chunk that finds a filled link, ``forth_s`` under way; its acknowledgement ``back_s``."""
    flight = estimate.sent(at, 10_000, 1000)
    acked(estimate, at + forth_s + back_s, 1_000, flight, one_way_s=forth_s)


def test_the_opposite_queue_counts_in_the_window_and_ours_does_not() -> None:
    estimate = RateEstimator(0.1, 0.0)
    now = busy(estimate, 0.0, 1.0, 1e6, 0.04)
    for turn in range(50):
        one(estimate, now + turn * 0.01, 0.09, 0.02)
    assert estimate.distance_s == pytest.approx(0.04, rel=0.01)
    for turn in range(50):
        one(estimate, now + 0.5 + turn * 0.01, 0.09, 0.08)
    assert estimate.distance_s == pytest.approx(0.1, rel=0.01)
    one(estimate, now + 2.0, 0.09, 0.02)
    assert estimate.distance_s == pytest.approx(0.04, rel=0.01)


def test_a_longer_distance_is_believed_after_our_own_queue_had_time_to_drain() -> None:
    """Until then the excess counts as queue, and while it is measured the window leaves none."""
    estimate = RateEstimator(0.1, 0.0)
    now = busy(estimate, 0.0, 1.0, 1e6, 0.04)
    one(estimate, now + LEAST_MEMORY_S / 2, 0.10, 0.02)
    assert estimate.distance_s == pytest.approx(0.04, rel=0.01)
    one(estimate, now + LEAST_MEMORY_S + 0.2, 0.10, 0.02)
    assert estimate.window_bytes() == pytest.approx(estimate.rate * 0.04, rel=0.01)
    for turn in range(60):
        one(estimate, now + LEAST_MEMORY_S + 2.0 + turn * 0.01, 0.10, 0.02)
    assert estimate.distance_s == pytest.approx(0.12, rel=0.01)
    assert estimate.window_bytes() == pytest.approx(estimate.rate * 0.22, rel=0.01)


def test_a_queue_far_longer_than_intended_makes_the_newest_samples_count() -> None:
    """The maximum of ten round trips would keep flooding a link that has become slower."""
    estimate = RateEstimator(0.1, 0.0)
    now = busy(estimate, 0.0, 1.0, 1e6, 0.04)
    flights = [estimate.sent(now + 0.1 * turn, 40_000, 40_000) for turn in range(3)]
    for turn, flight in enumerate(flights):
        acked(estimate, now + 0.4 * (turn + 1) + 0.02, 40_000, flight, one_way_s=0.3 * (turn + 1) + 0.1)
    assert estimate.rate < 0.3e6


def test_the_word_of_a_small_rest_that_comes_with_the_next_message_is_no_queue() -> None:
    """Little is acknowledged by what leaves next; by then the first bytes of another message may have come."""
    estimate = RateEstimator(0.1, 0.0)
    now = busy(estimate, 0.0, 2.0, 1e6, 0.04)
    before = estimate.rate
    for _ in range(4):  # what was under way
        acked(estimate, now, 10_000, estimate.sent(now - 0.04, 0, 10_000), one_way_s=0.02)
    estimate.starved(0)
    rest = estimate.sent(now, 0, 100)
    estimate.starved(100)
    after = estimate.sent(now + 0.4, 100, 10_000)
    arrived(estimate, now + 0.44, 100 + 4, rest, after, one_way_s=0.02)
    assert estimate.rate == before and estimate.rtt_s < 0.06
    acked(estimate, now + 0.45, 10_000 - 4, after, one_way_s=0.03)
    assert estimate.rate == before and estimate.distance_s == pytest.approx(0.04, rel=0.1)


def test_a_new_link_is_measured_anew_but_its_rate_is_assumed() -> None:
    estimate = RateEstimator(0.1, 0.0)
    busy(estimate, 0.0, 1.0, 1e6, 0.04)
    before = estimate.rate
    estimate.restart(5.0)
    assert (estimate.rate, estimate.distance_s, estimate.rtt_s) == (before, 0.0, 0.0)
    estimate.pinged(0.07)
    assert estimate.distance_s == 0.07


@given(
    st.lists(
        st.tuples(st.floats(0, 50), st.integers(1, 10**9), st.floats(0, 7), st.integers(0, 2**32 - 1), st.booleans()),
        max_size=40,
    )
)
def test_no_history_of_samples_makes_it_absurd(history: list[tuple[float, int, float, int, bool]]) -> None:
    """Lying clocks and holding times included: rate and distance stay positive and finite."""
    estimate = RateEstimator(0.1, 0.0)
    now = 0.0
    for wait_s, nbytes, held_s, ticks, starving in history:
        if starving:
            estimate.starved(0)
        else:
            estimate.filled(True)
        flight = estimate.sent(now, nbytes if starving else 0, 1000)
        now += wait_s
        arrival = Arrival(held_s)
        arrival.add(nbytes, flight, flight)
        estimate.acked(now, arrival, ticks)
        assert 0 < estimate.rate <= 1e17
        assert 0 < estimate.distance_s <= 50
        assert 0 <= estimate.window_bytes() < float("inf")
