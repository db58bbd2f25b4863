"""How many slices a step has: as many as allowed while they cost little, found by measuring."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dlion.learn.slices import DARE_EVERY, LOOK_EVERY, Slices


def chosen(cost_s: Callable[[int, int], float], steps: int, batch: int = 64, most: int = 4) -> list[int]:
    """Slices of each step, where a step in so many slices lasts ``cost_s(step, slices)``."""
    slices, found = Slices(), list[int]()
    for step in range(steps):
        found.append(slices.of(batch, most))
        slices.observe(found[-1], batch, cost_s(step, found[-1]))
    return found


def test_what_costs_nothing_is_used_and_looked_at_now_and_then() -> None:
    found = chosen(lambda _, __: 1.0, 4 * LOOK_EVERY)
    assert LOOK_EVERY == 32 and found[:8] == [4, 4, 1, 4, 1, 4, 1, 4]
    assert [step for step, slices in enumerate(found) if slices == 1 and step >= 8] == [32, 64, 96]
    assert set(found[8:]) == {1, 4}


def test_a_first_step_that_takes_long_is_no_measure() -> None:
    assert set(chosen(lambda step, _: 50.0 if step == 0 else 1.0, LOOK_EVERY)[8:]) == {4}


@pytest.mark.parametrize("fixed, best", [(0.002, 4), (0.06, 2), (0.5, 1)])
def test_half_as_many_where_they_cost_more_than_a_tenth(fixed: float, best: int) -> None:
    """A step has a part that does not shrink with its samples, as where a device is not filled."""
    found = chosen(lambda _, slices: (1.0 - fixed) + fixed * slices, LOOK_EVERY)
    assert set(found[20:]) == {best}


def test_more_is_tried_again_later() -> None:
    found = chosen(lambda step, slices: float(slices) if step < 100 else 1.0, 3 * DARE_EVERY + 20)
    assert set(found[20:100]) == {1}
    assert found[DARE_EVERY + 10] == 2 and found[-1] == 4


@pytest.mark.parametrize("batch, most, expected", [(1, 4, 1), (3, 4, 3), (64, 1, 1)])
def test_a_slice_has_a_sample_at_least(batch: int, most: int, expected: int) -> None:
    assert chosen(lambda _, __: 1.0, 1, batch, most) == [expected]
