"""The estimator alone: what each kind of sample may and may not change."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlion.net.rate import RTT_MEMORY_S, RateEstimator


def busy(estimate: RateEstimator, start: float, seconds: float, rate: float, rtt_s: float) -> float:
    """A sender that always has ``rate * rtt_s`` in flight on a link of just that rate; returns the time it ends."""
    chunk = rate * rtt_s / 4
    estimate.filled()
    flights = [estimate.sent(start, int(chunk) * count) for count in range(4)]
    now = start + rtt_s
    while now < start + seconds:
        now += rtt_s / 4
        estimate.acked(now, int(chunk), flights.pop(0), 0.0)
        flights.append(estimate.sent(now, int(chunk) * 3))
    return now


def test_it_finds_the_rate_of_a_busy_link() -> None:
    estimate = RateEstimator(0.1, 0.0)
    assert (estimate.rate, estimate.window_bytes(), estimate.proven) == (0.0, 0.0, False)
    busy(estimate, 0.0, 1.0, 1e6, 0.04)
    assert estimate.rate == pytest.approx(1e6, rel=0.05)
    assert estimate.proven
    assert estimate.window_bytes() == pytest.approx(estimate.rate * (estimate.rtt_min_s + 0.1))


def test_samples_of_a_starved_sender_raise_the_estimate_but_never_lower_it() -> None:
    estimate = RateEstimator(0.1, 0.0)
    now = busy(estimate, 0.0, 1.0, 1e6, 0.04)
    before = estimate.rate
    for nbytes, higher in ((100, False), (1_000_000, True)):
        estimate.starved(0)
        now += 60.0
        flight = estimate.sent(now, 0)
        now += 0.04
        estimate.acked(now, nbytes, flight, 0.0)
        assert (estimate.rate > before) is higher
        assert estimate.rate >= before


def test_the_peers_holding_time_counts_neither_as_distance_nor_against_the_rate() -> None:
    held, prompt = RateEstimator(0.1, 0.0), RateEstimator(0.1, 0.0)
    for estimate, held_s in ((held, 0.02), (prompt, 0.0)):
        flight = estimate.sent(1.0, 0)
        estimate.acked(1.05 + held_s, 10_000, flight, held_s)
    assert held.rtt_min_s == pytest.approx(prompt.rtt_min_s) == pytest.approx(0.05)
    assert held.rate == pytest.approx(prompt.rate)


def test_a_longer_distance_is_believed_after_our_own_queue_had_time_to_drain() -> None:
    """Until then the old minimum holds, and while it is measured the window leaves no queue."""
    estimate = RateEstimator(0.1, 0.0)
    now = busy(estimate, 0.0, 1.0, 1e6, 0.04)
    shortest = estimate.rtt_min_s
    estimate.rtt_sample(now + RTT_MEMORY_S / 2, 0.12)
    assert estimate.rtt_min_s == shortest
    estimate.rtt_sample(now + RTT_MEMORY_S + 0.2, 0.12)
    assert estimate.window_bytes() == pytest.approx(estimate.rate * shortest)
    estimate.rtt_sample(now + RTT_MEMORY_S + 2.0, 0.11)
    assert estimate.rtt_min_s == pytest.approx(0.11)
    assert estimate.window_bytes() == pytest.approx(estimate.rate * 0.21)


def test_a_queue_far_longer_than_intended_makes_the_newest_samples_count() -> None:
    """The maximum of ten round trips would keep flooding a link that has become slower."""
    estimate = RateEstimator(0.1, 0.0)
    now = busy(estimate, 0.0, 1.0, 1e6, 0.04)
    flights = [estimate.sent(now + 0.1 * turn, 40_000) for turn in range(3)]
    for turn, flight in enumerate(flights):
        estimate.acked(now + 0.4 * (turn + 1), 40_000, flight, 0.0)
    assert estimate.rate < 0.2e6


def test_a_new_link_is_measured_anew_but_its_rate_is_assumed() -> None:
    estimate = RateEstimator(0.1, 0.0)
    busy(estimate, 0.0, 1.0, 1e6, 0.04)
    before = estimate.rate
    estimate.restart(5.0)
    assert (estimate.rate, estimate.rtt_min_s, estimate.rtt_s) == (before, 0.0, 0.0)


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(1, 10**9), st.floats(0, 5000), st.booleans()), max_size=40))
def test_no_history_of_samples_makes_it_absurd(history: list[tuple[float, int, float, bool]]) -> None:
    """Lying holding times included: rate and distance stay positive and finite, the probe always ends."""
    estimate = RateEstimator(0.1, 0.0)
    now = 0.0
    for wait_s, nbytes, held_s, starving in history:
        if starving:
            estimate.starved(0)
        else:
            estimate.filled()
        flight = estimate.sent(now, 0)
        now += wait_s
        estimate.acked(now, nbytes, flight, held_s)
        assert 0 < estimate.rate <= 1e15
        assert 0 < estimate.rtt_min_s <= 5 * len(history)
        assert 0 <= estimate.window_bytes() < float("inf")
