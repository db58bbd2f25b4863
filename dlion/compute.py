"""The seam of work: where a lane's job runs and how long it is taken to last.

Law: runs callables; knows nothing of what they do. Real lanes are threads; the simulated ones are in ``simulation``.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from typing import Protocol, TypeVar

T = TypeVar("T")

TICK_S = 2e-3
"""Loops wake up to a tick late: the last of a pause is slept by the lane's thread."""


class Lane(StrEnum):
    """One job at a time per lane; lanes run beside each other."""

    TRAIN = "train"
    EXCHANGE = "exchange"


class Compute(Protocol):
    """Runs jobs. ``cost_s`` maps a job's result to its modelled duration in seconds; real lanes may ignore it."""

    late_s: float
    """By how much more than modelled (or less, to make up for that) the last paced job took: a machine that is modelled
    does not notice."""
    exchange_s: float
    """Processor time of the exchange lane's jobs so far (modelled where lanes are)."""

    async def run(self, lane: Lane, job: Callable[[], T], cost_s: Callable[[T], float]) -> T: ...

    @property
    def overrun(self) -> float:
        """Share of modelled time by which this machine was too slow to keep the modelled pace (0: it kept it)."""

    def close(self) -> None: ...


class Threads:
    """A thread per lane. With ``paced`` the train lane pads each job that has a modelled duration to that; errors are
    carried over."""

    def __init__(self, *, paced: bool = False) -> None:
        self._lanes = {lane: ThreadPoolExecutor(1, thread_name_prefix=f"dlion-{lane.value}") for lane in Lane}
        self._paced = paced
        self._closed = threading.Event()
        self._busy = dict.fromkeys(Lane, False)
        self._behind_s = self._given_up_s = self._modelled_s = self.late_s = self.exchange_s = 0.0

    async def run(self, lane: Lane, job: Callable[[], T], cost_s: Callable[[T], float]) -> T:
        loop = asyncio.get_running_loop()
        started = loop.time()
        result = await loop.run_in_executor(self._lanes[lane], self._do, lane, job)
        if self._paced and lane is Lane.TRAIN and (modelled_s := cost_s(result)) > 0:
            await self._pad(loop, started, modelled_s)
        return result

    def _do(self, lane: Lane, job: Callable[[], T]) -> T:
        self._busy[lane] = True
        since = time.thread_time()
        try:
            return job()
        finally:
            self._busy[lane] = False
            if lane is Lane.EXCHANGE:
                self.exchange_s += time.thread_time() - since

    async def _pad(self, loop: asyncio.AbstractEventLoop, started: float, cost_s: float) -> None:
        """Sleep until the modelled end. What we are late by shortens the next step; more than a step is given up."""
        before_s = self._behind_s
        due = started + cost_s - before_s
        self._modelled_s += cost_s
        await asyncio.sleep(max(0.0, due - TICK_S - loop.time()))
        if (rest_s := due - loop.time()) > 0:
            await loop.run_in_executor(self._lanes[Lane.TRAIN], self._closed.wait, rest_s)
        self._behind_s = max(0.0, loop.time() - due)
        self.late_s = self._behind_s - before_s
        if self._behind_s > cost_s:
            self._given_up_s += self._behind_s
            self._behind_s = 0.0

    @property
    def overrun(self) -> float:
        return (self._given_up_s + self._behind_s) / self._modelled_s if self._modelled_s else 0.0

    def close(self) -> None:
        """End the threads and their pauses. One in the middle of a job, which nothing can interrupt, ends with it."""
        self._closed.set()
        for lane, thread in self._lanes.items():
            thread.shutdown(wait=not self._busy[lane], cancel_futures=True)
