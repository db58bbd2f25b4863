"""Rate: the integral is exact, ``finish`` is its inverse, and neither drifts over a day of loops."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlion.net.wan import Rate

VALUES = st.one_of(st.just(0.0), st.floats(0.5, 1e9))
TIMES = st.floats(-50.0, 5e3)


@st.composite
def rates(draw: st.DrawFn) -> Rate:
    values = draw(st.lists(VALUES, min_size=1, max_size=12))
    widths = draw(st.lists(st.floats(0.01, 30.0), min_size=len(values), max_size=len(values)))
    starts = [sum(widths[:i]) for i in range(len(widths))]
    loop = draw(st.booleans())
    return Rate.steps(starts, values, loop=loop, period_s=sum(widths) if loop else None, offset_s=draw(TIMES))


def tolerance(rate: Rate, *times: float) -> float:
    """What rounding of a time of this size is worth at the highest rate."""
    return max(rate.values) * math.ulp(max(map(abs, (*times, rate.origin_s, 1e3)))) * 16 + 1e-6


@given(rates(), TIMES, st.floats(0.0, 100.0))
def test_the_integral_is_the_sum_of_the_segments(rate: Rate, t0: float, span: float) -> None:
    t1 = t0 + span
    pieces = sum((b - a) * v for a, b, v in rate.segments(t0, t1))
    assert rate.integral(t0, t1) == pytest.approx(pieces, rel=1e-9, abs=tolerance(rate, t0, t1))
    assert rate.integral(t1, t0) == -rate.integral(t0, t1)


@given(rates(), TIMES, st.floats(1e-3, 1e10))
def test_finish_is_the_earliest_time_that_holds_the_amount(rate: Rate, t0: float, amount: float) -> None:
    t = rate.finish(t0, amount)
    if math.isinf(t):
        assert rate.values[-1] == 0 and rate.integral(t0, 1e12) <= amount + tolerance(rate, 1e4)
        return
    assert t >= t0
    slack = tolerance(rate, t0, t) + 1e-9 * amount
    assert amount - slack <= rate.integral(t0, t) <= amount + slack
    before = t - 1e-3
    waited = before > t0 and rate.integral(before, t) == 0  # rightly, if only a rounding error was still to come
    assert not waited or amount <= slack or rate.integral(t0, before) < amount, "an outage after the end was waited for"


@given(rates(), TIMES, st.floats(-100.0, 100.0), st.floats(0.1, 10.0))
def test_shift_and_scale_move_and_multiply(rate: Rate, t: float, offset: float, factor: float) -> None:
    moved = rate.shifted(offset).scaled(factor)
    span = 7.0
    expected = factor * rate.integral(t + offset, t + offset + span)
    assert moved.integral(t, t + span) == pytest.approx(expected, rel=1e-6, abs=10 * tolerance(rate, t, offset))


@given(rates(), st.floats(0.05, 5.0))
def test_resampling_keeps_the_amount_of_every_period(rate: Rate, dt: float) -> None:
    coarse = rate.resampled(dt)
    assert coarse.period_s == rate.period_s
    end = rate.period_s if rate.looped else rate.starts[-1]
    whole = rate.integral(rate.origin_s, rate.origin_s + end)
    same = pytest.approx(whole, rel=1e-9, abs=tolerance(rate, end))
    assert coarse.integral(rate.origin_s, rate.origin_s + end) == same


@given(rates(), TIMES)
def test_next_change_really_changes(rate: Rate, t: float) -> None:
    change = rate.next_change(t)
    if math.isfinite(change):
        assert change > t
        assert rate.at(change) != rate.at(t)


def test_a_day_of_loops_does_not_drift() -> None:
    rate = Rate.steps([0.0, 0.1, 0.3], [3e6, 0.0, 7e6], loop=True, period_s=0.7)
    day = 86_400.0
    exact = Fraction(3, 10) * 10**6 + Fraction(28, 10) * 10**6  # 3e6 * 0.1 + 7e6 * 0.4 in each 0.7 s
    loops, rest = divmod(Fraction(day), Fraction(7, 10))
    assert rest == Fraction(4, 10)  # 0.1 s at 3e6, an outage of 0.2 s, 0.1 s at 7e6
    total = loops * exact + 10**6
    assert rate.integral(0.0, day) == pytest.approx(float(total), rel=1e-14)
    t = 0.0
    for _ in range(1000):
        t = rate.finish(t, float(total) / 1000)
    assert t == pytest.approx(day, abs=1e-7)


def test_outages_hold_and_are_not_waited_for_at_the_end() -> None:
    rate = Rate.steps([0.0, 1.0], [8.0, 0.0], loop=True, period_s=3.0)
    assert rate.finish(0.0, 8.0) == 1.0
    assert rate.finish(0.0, 16.0) == 4.0
    assert rate.finish(1.5, 4.0) == 3.5
    assert rate.finish(0.0, 8.0 * 1e6) == pytest.approx(3.0 * (10**6 - 1) + 1.0)
    assert rate.mean == pytest.approx(8 / 3)
    once = Rate.steps([0.0, 1.0], [8.0, 0.0], loop=False)
    assert once.finish(0.0, 8.0) == 1.0
    assert once.finish(0.5, 8.0) == math.inf
    assert Rate.constant(0.0).finish(3.0, 1.0) == math.inf


def test_offset_starts_inside_the_trace_and_the_first_and_last_values_hold() -> None:
    rate = Rate.steps([10.0, 20.0, 40.0], [1.0, 2.0, 3.0], loop=False, offset_s=15.0)
    assert [rate.at(t) for t in (-100.0, 0.0, 4.9, 5.0, 24.9, 25.0, 1e9)] == [1, 1, 1, 2, 2, 3, 3]
    assert list(rate.segments(0.0, 30.0)) == [(0.0, 5.0, 1.0), (5.0, 25.0, 2.0), (25.0, 30.0, 3.0)]


@pytest.mark.parametrize(
    ("times", "values", "period"),
    [
        ([], [], 1.0),
        ([0.0, 0.0], [1.0, 2.0], 1.0),
        ([0.0, 1.0], [1.0], 2.0),
        ([0.0, 1.0], [1.0, -1.0], 2.0),
        ([0.0, 1.0], [1.0, math.nan], 2.0),
        ([0.0, 1.0], [1.0, 2.0], 1.0),
        ([0.0], [1.0], None),
    ],
)
def test_impossible_steps_are_refused(times: list[float], values: list[float], period: float | None) -> None:
    with pytest.raises(ValueError):
        Rate.steps(times, values, loop=True, period_s=period)
