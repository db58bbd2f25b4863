"""The step loop's inside: next batch, gradient, optimizer.

Law: runs in the train lane only; knows no peer, link or time. The order of the data is a pure function of seed and
cursor, so a logged cursor is enough to replay a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, SupportsFloat

import numpy as np

from dlion.learn.optimizers import Foreseeing, Optimizer
from dlion.learn.schedules import Schedule
from dlion.learn.workload import Indices, Stateful, Workload
from dlion.tensors import Flat, add_scaled


class Cursor(NamedTuple):
    """Where in the shuffled passes over the shard a batch begins."""

    epoch: int
    position: int


@dataclass(frozen=True)
class StepResult:
    """What one local step produced. ``values`` belongs to the caller."""

    values: Flat = field(repr=False)
    loss: float
    samples: int
    learning_rate: float
    cursor: Cursor
    """Of the first sample of this step's batch."""


def peer_seed(seed: int, peer: str) -> int:
    """A seed of a peer's own: equal in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{peer}".encode(), digest_size=8).digest())


class Order:
    """An endless sequence of shuffled passes over ``size`` samples; each pass is drawn from (seed, epoch) alone."""

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError("this peer has no training samples")
        self._size = size
        self._seed = seed
        self.seek(Cursor(0, 0))

    @property
    def cursor(self) -> Cursor:
        """Of the sample that comes next."""
        return Cursor(self._epoch, self._position)

    def seek(self, cursor: Cursor) -> None:
        if cursor.epoch < 0 or not 0 <= cursor.position < self._size:
            raise ValueError(f"{cursor} does not fit a shard of {self._size} samples")
        self._epoch, self._position = cursor
        self._pass = self._shuffled(self._epoch)

    def take(self, count: int) -> Indices:
        """The next ``count`` samples, running on into the next pass where this one ends."""
        if count < 1:
            raise ValueError(f"a batch needs at least one sample, not {count}")
        pieces: list[Indices] = []
        while count:
            piece = self._pass[self._position : self._position + count]
            pieces.append(piece)
            count -= len(piece)
            self._position += len(piece)
            if self._position == self._size:
                self.seek(Cursor(self._epoch + 1, 0))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _shuffled(self, epoch: int) -> Indices:
        return np.random.default_rng((self._seed, epoch)).permutation(self._size)


@dataclass
class Work:
    """A step under way: its batch, and the gradient of the ``done`` samples so far, each counting 1 / batch."""

    indices: Indices
    rate: float
    cursor: Cursor
    gradient: Flat
    done: int = 0
    loss: float = 0.0


class Trainer:
    """One peer's local training: a workload, an optimizer, a schedule and an order of the data."""

    def __init__(self, workload: Workload, optimizer: Optimizer, schedule: Schedule, rng_seed: int) -> None:
        self.workload = workload
        self._optimizer = optimizer
        self._foreseeing = optimizer if isinstance(optimizer, Foreseeing) else None
        self._schedule = schedule
        self._order = Order(workload.train_size, rng_seed)
        self._work: Work | None = None
        self._spare: Flat | None = None

    @property
    def divisible(self) -> bool:
        """Can a gradient be taken in parts? Where the loss is a mean over samples, and the optimizer can be asked what
        it would do."""
        return self._foreseeing is not None and getattr(self.workload, "separable", True)

    def step(self, snapshot: Flat, batch: int, global_samples: float) -> StepResult:
        """One step on ``batch`` samples at the rate for ``global_samples``. ``snapshot`` is read only."""
        self.begin(batch, global_samples)
        result = self.advance(snapshot, batch)
        assert result is not None
        return result

    def begin(self, batch: int, global_samples: float) -> None:
        """Draw the batch of a step that ``advance`` computes."""
        cursor = self._order.cursor
        indices = self._order.take(batch)
        gradient = np.empty(self.workload.layout.size, dtype=np.float32)
        self._work = Work(indices, self._schedule(global_samples), cursor, gradient)

    def advance(self, snapshot: Flat, samples: int, reach: float = 0.0) -> StepResult | None:
        """The gradient of the next ``samples`` of the step's batch, at ``snapshot``; after the last of them the
        optimizer's step. But for the first samples, ``snapshot`` is moved to where the step has come so far: by
        ``reach`` of the part done of the step that it would be if its gradient were that of the part done.
        """
        work = self._work
        assert work is not None
        size, first = len(work.indices), work.done
        found, part = work.gradient, samples / size
        if first:
            if self._spare is None:
                self._spare = np.empty_like(snapshot)
            np.multiply(work.gradient, np.float32(size / first), out=self._spare)
            assert self._foreseeing is not None
            add_scaled(snapshot, self._foreseeing.foresee(self._spare, snapshot, work.rate), reach * first / size)
            found = self._spare
        loss = self.workload.gradient(snapshot, work.indices[first : first + samples], found)
        if not isinstance(loss, (float, SupportsFloat)):
            raise TypeError(f"{type(self.workload).__name__}.gradient: expected the mean loss as result, got {loss!r}")
        work.done += samples
        if first:
            add_scaled(work.gradient, found, part)
        elif work.done < size:
            work.gradient *= np.float32(part)
        work.loss += part * float(loss)
        if work.done < size:
            return None
        self._work = None
        values = self._optimizer.step(work.gradient, snapshot, work.rate)
        return StepResult(values, work.loss, size, work.rate, work.cursor)

    def state(self) -> dict[str, Any]:
        """Cursor, optimizer and the workload's own state, if any: with the weights, enough to go on bit by bit."""
        workload = self.workload.state() if isinstance(self.workload, Stateful) else {}
        return {"cursor": list(self._order.cursor), "optimizer": self._optimizer.state(), "workload": workload}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state``; raises ValueError when the cursor does not fit the shard."""
        epoch, position = state["cursor"]
        self._order.seek(Cursor(int(epoch), int(position)))
        if isinstance(self.workload, Stateful):
            self.workload.restore(state["workload"])
        self._optimizer.restore(state["optimizer"])
