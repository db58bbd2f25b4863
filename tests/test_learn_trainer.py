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
from dlion.learn.workload import WorkloadSpec
from dlion.learn.workloads import build


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
