"""The train lane: one local step after the other, its gradient taken as a whole or in slices.

Law: on the loop, but for ``_slice``. Knows the trainer, the replica to copy from, and how long work is modelled to
last; no link and no other peer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from dlion.compute import Compute, Lane
from dlion.lane import Replica
from dlion.learn.slices import Slices
from dlion.learn.trainer import StepResult, Trainer
from dlion.mesh.topology import Speed


class TrainLane:
    """``now()`` is the node's clock; ``samples()``, asked in the lane, what all peers together have trained on."""

    def __init__(
        self,
        compute: Compute,
        trainer: Trainer,
        replica: Replica,
        speed: Speed | None,
        now: Callable[[], float],
        samples: Callable[[], float],
    ) -> None:
        self._compute, self._trainer, self._replica = compute, trainer, replica
        self._speed, self._now, self._samples = speed, now, samples
        self._snapshot = np.empty(trainer.workload.layout.size, dtype=np.float32)
        self._slices = Slices()

    async def step(self, batch: int) -> tuple[StepResult, float]:
        """One step on ``batch`` samples, and the seconds that it took where the machine is as fast as modelled. Raises
        what the workload raises."""
        started, late_s, number = self._now(), 0.0, 1
        if (most := self._replica.exchange.slices) > 1 and self._trainer.divisible:
            number = self._slices.of(batch, most)
        for slice_ in range(number):
            first, end = (batch * part // number for part in (slice_, slice_ + 1))
            job = partial(self._slice, batch, first, end)
            result = await self._compute.run(Lane.TRAIN, job, partial(self._cost_s, end - first, self._now()))
            late_s += self._compute.late_s
        assert result is not None
        seconds = self._now() - started - late_s
        self._slices.observe(number, batch, seconds)
        return result, seconds

    def _slice(self, batch: int, first: int, end: int) -> StepResult | None:
        """In the train lane: snapshot, gradient; with the last samples, the optimizer."""
        self._replica.snapshot_into(self._snapshot)
        if not first:
            self._trainer.begin(batch, self._samples())
        return self._trainer.advance(self._snapshot, end - first, self._replica.exchange.reach)

    def _cost_s(self, samples: int, started: float, _: object) -> float:
        return 0.0 if self._speed is None else self._speed.seconds(samples, started)
