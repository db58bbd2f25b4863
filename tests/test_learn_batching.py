"""Weighted dynamic batching: controllers' formulas, profile, parts, and the policy that joins them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlion.learn.batching import DEALT_MAX, Fixed, GlobalBatch, Profile, Weighted, local_batches


def test_the_global_batch_adds_then_multiplies_then_stays() -> None:
    """T_warm = 100 and T_speed = 1000 of 10,000 samples; the step that passes a threshold is the last of its kind."""
    sizes = GlobalBatch(start=40, train_size=10_000, period_s=10, warm_add=30, speed_factor=2)
    expected = [40, 70, 100, 130, 260, 520, 1040, 1040, 1040]
    assert [sizes.at(10 * k) for k in range(9)] == expected
    assert [sizes.at(10 * k + 9.9) for k in range(9)] == expected
    assert sizes.at(-1) == 40


@given(st.integers(1, 500), st.integers(100, 100_000), st.integers(1, 50), st.floats(1.01, 3), st.integers(0, 300))
def test_the_closed_form_equals_the_rule_period_by_period(
    start: int, train_size: int, add: int, factor: float, periods: int
) -> None:
    value = float(start)
    for _ in range(periods):
        if value <= 0.01 * train_size:
            value += add
        elif value <= 0.1 * train_size:
            value *= factor
    sizes = GlobalBatch(start, train_size, period_s=1, warm_add=add, speed_factor=factor)
    assert sizes.at(periods) == round(value)


def test_without_a_period_the_global_batch_is_constant() -> None:
    assert {GlobalBatch(48, 1_000_000).at(t) for t in (0, 1e3, 1e9)} == {48}


@pytest.mark.parametrize("settings", [{"start": 0}, {"warm_add": 0}, {"period_s": 0.0}, {"speed_factor": 1.0}])
def test_impossible_controllers_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="global batch"):
        GlobalBatch(**{"start": 1, "train_size": 10, **settings})  # type: ignore[arg-type]


@given(st.floats(1e-5, 1), st.floats(0, 10), st.lists(st.integers(1, 500), min_size=2, max_size=12, unique=True))
def test_the_profile_recovers_a_line(a: float, c: float, sizes: list[int]) -> None:
    profile = Profile()
    for b in sizes:
        profile.observe(b, a * b + c)
    for b in sizes:
        assert profile.seconds(b) == pytest.approx(a * b + c, rel=1e-3)


def test_the_profile_with_one_size_lays_all_time_to_the_samples() -> None:
    profile = Profile()
    assert profile.samples_per_s(8) == 0.0
    for _ in range(5):
        profile.observe(32, 0.5)
    assert profile.fit() == (pytest.approx(0.5 / 32), 0.0)
    assert profile.samples_per_s(32) == pytest.approx(64)


def test_the_profile_never_answers_with_negative_cost() -> None:
    """Larger batches that happened to be faster: no negative slope, and the mean time is kept."""
    profile = Profile()
    for b, t in ((10, 1.0), (20, 0.5), (30, 0.4)):
        profile.observe(b, t)
    a, c = profile.fit()
    assert a > 0
    assert c == 0


def test_the_profile_forgets() -> None:
    """After a third of a window at half the speed the estimate is within 20 %; after a window it is exact."""
    profile = Profile()
    for _ in range(Profile.KEEP):
        profile.observe(32, 1.0)
    for _ in range(8):
        profile.observe(32, 2.0)
    assert profile.samples_per_s(32) == pytest.approx(16, rel=0.2)
    for _ in range(Profile.KEEP):
        profile.observe(32, 2.0)
    assert profile.samples_per_s(32) == pytest.approx(16)


@pytest.mark.parametrize(("batch", "seconds"), [(0, 1.0), (1, -1.0), (1, math.nan), (1, math.inf)])
def test_impossible_timings_are_refused(batch: int, seconds: float) -> None:
    with pytest.raises(ValueError, match="cannot take"):
        Profile().observe(batch, seconds)


@given(st.dictionaries(st.text(max_size=4), st.floats(0.01, 1e6), min_size=1, max_size=12), st.integers(0, 2000))
def test_local_batches_sum_exactly_and_do_not_depend_on_order(rates: dict[str, float], extra: int) -> None:
    total = len(rates) + extra
    parts = local_batches(total, rates)
    assert sum(parts.values()) == total
    assert min(parts.values()) >= 1
    assert parts == local_batches(total, dict(reversed(rates.items())))


def test_local_batches_follow_compute_power() -> None:
    assert local_batches(192, {"a": 6, "b": 3, "c": 3}) == {"a": 96, "b": 48, "c": 48}
    with pytest.raises(ValueError, match="at least 1"):
        local_batches(1, {"a": 1, "b": 1})


def test_fixed_stays_and_still_tells_its_power() -> None:
    fixed = Fixed(16)
    fixed.observe(16, 0.5)
    fixed.members({"a": 1.0, "b": 100.0})
    assert (fixed.batch(0.0), fixed.global_batch(9.0), fixed.samples_per_s) == (16, 32, 32.0)
    with pytest.raises(ValueError, match="batch"):
        Fixed(0)


def test_weighted_probes_then_levels_the_step_times() -> None:
    """Three peers with unlike speeds and fixed costs, each with its own batcher: after a few deals all steps last
    alike, the parts sum to the global batch, and both costs of a step were found."""
    costs = {"a": (0.001, 0.05), "b": (0.003, 0.01), "c": (0.006, 0.0)}
    batchers = {p: Weighted(p, GlobalBatch(192, 10_000), period_s=1.0) for p in costs}
    now, batches, sizes_tried = 0.0, dict[str, int](), list[int]()
    for _ in range(30):
        now += 1.0
        for p, batcher in batchers.items():
            batcher.members({q: b.samples_per_s for q, b in batchers.items()})
            batches[p] = batcher.batch(now)
        sizes_tried.append(batches["a"])
        for p, (a, c) in costs.items():
            batchers[p].observe(batches[p], a * batches[p] + c)
    assert sizes_tried[:2] == [16, 32]
    assert sum(batches.values()) == 192
    times = [a * batches[p] + c for p, (a, c) in costs.items()]
    assert max(times) / min(times) < 1.08
    assert batchers["a"].global_batch(now) == 192


def settled(period_s: float = 5.0) -> Weighted:
    """Batcher of peer ``a``, at 100 samples per second, that has done its probes by time 0."""
    batcher = Weighted("a", GlobalBatch(100, 10_000), period_s=period_s, started_at=0.0)
    batcher.members({"a": 0.0, "b": 300.0})
    for _ in Weighted.PROBES:
        size = batcher.batch(0.0)
        batcher.observe(size, size / 100)
    return batcher


def test_weighted_deals_at_most_once_per_period_but_follows_the_living_at_once() -> None:
    batcher = settled()
    assert batcher.batch(0.0) == 25
    batcher.members({"a": 0.0, "b": 100.0})
    assert batcher.batch(4.9) == 25
    assert batcher.batch(5.0) == 50
    batcher.members({"a": 0.0, "b": 100.0, "c": 200.0})
    assert batcher.batch(5.1) == 25
    batcher.members({"a": 0.0})
    assert batcher.batch(5.2) == 100


@pytest.mark.parametrize("told", [0.0, -1.0, math.nan, math.inf])
def test_weighted_takes_the_mean_for_whoever_told_no_usable_rate(told: float) -> None:
    batcher = settled()
    batcher.members({"a": 0.0, "b": 300.0, "c": told})
    assert batcher.batch(0.0) == local_batches(100, {"a": 100, "b": 300, "c": 200})["a"]


def test_weighted_grows_with_the_runs_age_also_for_a_late_joiner() -> None:
    sizes = GlobalBatch(10, 10_000, period_s=10, warm_add=10)
    early, late = (Weighted(p, sizes, started_at=0.0) for p in "ab")
    assert early.global_batch(50.0) == late.global_batch(50.0) == 60


def test_a_global_batch_below_the_number_of_peers_gives_everybody_one() -> None:
    batcher = Weighted("a", GlobalBatch(2, 100))
    batcher.members({"a": 1.0, "b": 1.0, "c": 1.0})
    assert batcher.global_batch(0.0) == 3
    for _ in range(5):
        size = batcher.batch(0.0)
        assert size >= 1
        batcher.observe(size, 1.0)
    assert size == 1


def test_among_very_many_peers_each_rounds_its_own_part() -> None:
    """Near to what dealing to the last sample gives, whether or not all have told their power."""
    rates = {f"p{n:03d}": 10.0 + n % 7 for n in range(DEALT_MAX + 20)}
    for told in (rates, {**rates, "p007": 0.0}):
        weighted = Weighted("p003", GlobalBatch(start=5000, train_size=1 << 16))
        weighted.members(told)
        for _ in range(3):
            weighted.observe(130, 10.0)
        known = {peer: rate or 13.0 for peer, rate in told.items()}
        assert abs(weighted.batch(0.0) - local_batches(5000, known)["p003"]) <= 1
