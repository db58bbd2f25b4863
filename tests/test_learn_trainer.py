"""The trainer: whose buffers are whose, order of data, bit-exact resume."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlion.cut import frozen
from dlion.learn.optimizers import AdamW, Plain, Sgd
from dlion.learn.schedules import Constant, Cosine
from dlion.learn.trainer import Cursor, Order, Trainer, peer_seed
from dlion.learn.workload import Indices, WorkloadSpec
from dlion.learn.workloads import build
from dlion.tensors import Flat


def trainer(*, samples: int = 20, seed: int = 1) -> Trainer:
    workload = build(WorkloadSpec("toy", size=9, train_limit=samples), 0, ["a"], [1.0])
    return Trainer(workload, AdamW(), Cosine(0.1, 1000), seed)


@given(st.integers(1, 30), st.lists(st.integers(1, 80), min_size=1, max_size=8))
def test_each_pass_visits_every_sample_once_whatever_the_batches(size: int, batches: list[int]) -> None:
    order = Order(size, seed=4)
    taken = np.concatenate([order.take(b) for b in batches])
    assert len(taken) == sum(batches)
    for start in range(0, len(taken) - size + 1, size):
        assert np.array_equal(np.sort(taken[start : start + size]), np.arange(size))
    assert order.cursor == Cursor(*divmod(len(taken), size))


def test_a_cursor_is_enough_to_replay() -> None:
    order = Order(10, seed=4)
    order.take(17)
    cursor, expected = order.cursor, order.take(15)
    again = Order(10, seed=4)
    again.seek(cursor)
    assert np.array_equal(again.take(15), expected)


@pytest.mark.parametrize("cursor", [Cursor(-1, 0), Cursor(0, 10), Cursor(0, -1)])
def test_a_cursor_that_does_not_fit_is_refused(cursor: Cursor) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        Order(10, 0).seek(cursor)


def test_peers_have_seeds_of_their_own_equal_everywhere() -> None:
    """Pinned: the seed may not depend on the process (hash randomisation) or the machine."""
    assert peer_seed(0, "a1") == 7920819585095028649
    assert len({peer_seed(s, p) for s in range(10) for p in ("a1", "a2", "b1")}) == 30


def test_a_restored_trainer_goes_on_bit_by_bit() -> None:
    first, second = trainer(), trainer(seed=1)
    weights = np.ones(9, dtype=np.float32)
    for k in range(5):
        weights += first.step(weights, 7, 7.0 * k).values
    second.restore(first.state())
    for k in range(5, 12):
        a, b = first.step(weights, 7, 7.0 * k), second.step(weights, 7, 7.0 * k)
        assert (a.cursor, a.loss, a.learning_rate) == (b.cursor, b.loss, b.learning_rate)
        assert a.values.tobytes() == b.values.tobytes()
        weights += a.values


def test_a_frozen_state_does_not_change_as_training_goes_on() -> None:
    one, weights = trainer(), np.ones(9, dtype=np.float32)
    one.step(weights, 3, 0)
    state = frozen(one.state())
    before = state["optimizer"]["sum"].copy()
    one.step(weights, 3, 0)
    assert state["cursor"] == [0, 3]
    assert np.array_equal(state["optimizer"]["sum"], before)


def test_values_are_the_callers_own() -> None:
    one, weights = trainer(), np.ones(9, dtype=np.float32)
    first = one.step(weights, 3, 0).values
    copy = first.copy()
    second = one.step(weights, 3, 0).values
    assert second is not first
    assert np.array_equal(first, copy)


def test_the_step_is_the_optimizers_delta_at_the_schedules_rate_and_the_snapshot_stays() -> None:
    workload = build(WorkloadSpec("toy", size=9, train_limit=20), 0, ["a"], [1.0])
    snapshot = np.ones(9, dtype=np.float32)
    snapshot.flags.writeable = False
    gradient = Trainer(workload, Plain(), Constant(0.5), 1).step(snapshot, 4, 0)
    delta = Trainer(workload, Sgd(), Constant(0.5), 1).step(snapshot, 4, 0)
    assert np.array_equal(delta.values, np.float32(-0.5) * gradient.values)
    assert (delta.samples, delta.learning_rate, delta.cursor) == (4, 0.5, (0, 0))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from([0.0, 0.9]))
def test_a_step_in_slices_where_nothing_moves_is_the_step_as_a_whole(sizes: list[int], momentum: float) -> None:
    workload = build(WorkloadSpec("toy", size=9, train_limit=20), 0, ["a"], [1.0])
    samples = np.random.default_rng(2).standard_normal((20, 9), dtype=np.float32)

    def gradient(weights: Flat, batch: Indices, out: Flat) -> float:
        np.subtract(weights, samples[batch].mean(axis=0), out=out)
        return float(out.sum())

    workload.gradient = gradient  # type: ignore[method-assign]
    whole, sliced = (Trainer(workload, Sgd(momentum=momentum), Cosine(0.1, 1000), 1) for _ in range(2))
    weights = np.ones(9, dtype=np.float32)
    for k in range(3):
        expected = whole.step(weights, sum(sizes), 7.0 * k)
        sliced.begin(sum(sizes), 7.0 * k)
        *before, found = [sliced.advance(weights.copy(), size) for size in sizes]
        assert before == [None] * (len(sizes) - 1)
        assert found is not None
        np.testing.assert_allclose(found.values, expected.values, rtol=1e-4, atol=1e-6)
        assert found.loss == pytest.approx(expected.loss, rel=1e-4, abs=1e-5)
        assert (found.samples, found.learning_rate, found.cursor) == (
            expected.samples,
            expected.learning_rate,
            expected.cursor,
        )


def test_later_slices_are_taken_where_the_step_has_come_so_far() -> None:
    """Gradients 1, 2, ... in turn: after a third of the batch, a third of what the step would then be, four times."""
    workload = build(WorkloadSpec("toy", size=9, train_limit=20), 0, ["a"], [1.0])
    seen: list[float] = []

    def gradient(weights: Flat, batch: Indices, out: Flat) -> float:
        seen.append(float(weights[0]))
        out[:] = len(seen)
        return 0.0

    workload.gradient = gradient  # type: ignore[method-assign]
    one = Trainer(workload, Sgd(momentum=0.5), Constant(1.0), 1)
    velocity = 0.0
    for k in range(2):
        one.begin(6, 0.0)
        results = [one.advance(np.full(9, 10.0, dtype=np.float32), 2, reach=4.0) for _ in range(3)]
        first, second, third = 3 * k + 1.0, 3 * k + 2.0, 3 * k + 3.0
        after = [0.0, (velocity / 2 + first) / 3, 2 * (velocity / 2 + (first + second) / 2) / 3]
        np.testing.assert_allclose(seen[-3:], [10.0 - 4.0 * moved for moved in after], rtol=1e-5)
        velocity = velocity / 2 + (first + second + third) / 3
        assert results[2] is not None
        np.testing.assert_allclose(results[2].values, -velocity, rtol=1e-5)


def test_who_compares_samples_and_who_leaves_the_step_to_others_takes_a_batch_as_a_whole() -> None:
    workload = build(WorkloadSpec("toy", size=9, train_limit=20), 0, ["a"], [1.0])
    assert Trainer(workload, Sgd(), Constant(1.0), 1).divisible
    assert not Trainer(workload, Plain(), Constant(1.0), 1).divisible
    workload.separable = False  # type: ignore[attr-defined]
    assert not Trainer(workload, AdamW(), Constant(1.0), 1).divisible
