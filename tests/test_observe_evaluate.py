"""Evaluation beside the training: nothing is measured twice, nothing piles up, nothing half-written is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from dlion.observe.evaluate import SUFFIX, Pending, SnapshotStore, due, evaluate_directory, evaluate_one
from dlion.observe.read import parse
from dlion.observe.runlog import Eval
from dlion.tensors import Flat, Layout, Tensors

LAYOUT = Layout(("w", "b"), ((2, 2), (3,)))


@dataclass
class Result:
    accuracy: float
    loss: float
    samples: int


class Mean:
    """A workload whose accuracy is the mean of its weights."""

    layout = LAYOUT
    train_size = global_train_size = 1

    def initial(self, seed: int) -> Tensors:
        return Tensors(LAYOUT, np.zeros(7, np.float32))

    def gradient(self, weights: Flat, batch: np.ndarray, out: Flat) -> float:
        raise NotImplementedError

    def evaluate(self, weights: Flat, limit: int | None = None) -> Result:
        loss = float("inf") if weights[0] < 0 else 1.0
        return Result(float(weights.mean()), loss, limit or 7)


def weights(value: float) -> Tensors:
    return Tensors(LAYOUT, np.full(7, value, np.float32))


def test_snapshots_are_evaluated_oldest_first_logged_and_deleted(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path / "snapshots")
    store.write(2.0, 20, "b1", weights(-0.25))
    store.write(1.0, 10, "a1", weights(0.5))
    store.write(3.0, 30, "a1", weights(0.75), "replica")
    seen = list(evaluate_directory(tmp_path / "snapshots", Mean(), tmp_path))
    assert seen == [
        ("a1", Eval(t=1.0, step=10, accuracy=0.5, loss=1.0, samples=7)),
        ("b1", Eval(t=2.0, step=20, accuracy=-0.25, loss=None, samples=7)),
        ("a1", Eval(t=3.0, step=30, accuracy=0.75, loss=1.0, samples=7, which="replica")),
    ]
    assert parse((tmp_path / "a1.eval.jsonl").read_bytes()) == [seen[0][1], seen[2][1]]
    assert not list((tmp_path / "snapshots").iterdir())


def test_the_evaluator_skips_to_the_newest_when_it_falls_behind(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    for i in range(4):
        store.write(i, i, "a1", weights(i))
    for i in range(2):
        store.write(i, i, "b1", weights(i))
    assert [(one.peer, one.step) for one in due(tmp_path)] == [("b1", 0), ("b1", 1), ("a1", 3)]
    assert len(list(tmp_path.iterdir())) == 3


def test_without_an_evaluator_the_disk_stays_bounded(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path, pending_max=2)
    for i in range(20):
        store.write(i, i, "a1", weights(i))
    assert sorted(Pending.of(path).step for path in tmp_path.iterdir()) == [18, 19]


def test_what_is_still_being_written_is_not_looked_at(tmp_path: Path) -> None:
    (tmp_path / "a1.000000001.view.77.tmp").write_bytes(b"half")
    assert due(tmp_path) == []


def test_a_snapshot_taken_back_is_skipped_and_a_foreign_one_is_an_error(tmp_path: Path) -> None:
    gone = Pending(tmp_path / f"a1.000000001.view{SUFFIX}", "a1", "view", 1)
    assert evaluate_one(gone, Mean()) is None
    gone.path.write_bytes(b"no such format")
    with pytest.raises(ValueError, match=r"a1\.000000001\.view\.snapshot: not a snapshot of this model"):
        evaluate_one(gone, Mean())


def test_it_follows_until_finished_and_sees_what_was_written_last(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path / "s")
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        store.write(len(pauses), len(pauses), "a1", weights(1.0))

    follow: Iterator[tuple[str, Eval]] = evaluate_directory(
        tmp_path / "s", Mean(), tmp_path, finished=lambda: len(pauses) == 3, pause=pause
    )
    assert [event.step for _, event in follow] == [1, 2, 3]
