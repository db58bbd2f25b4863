"""The real lanes: jobs run beside the loop; a paced lane keeps the modelled time or says by how much it missed."""

from __future__ import annotations

import asyncio
import threading
import time
from functools import partial

from dlion.compute import Lane, Threads


def test_lanes_run_beside_the_loop_and_beside_each_other() -> None:
    """Each lane's job waits for the other's: on one thread neither could end."""
    first, second = threading.Event(), threading.Event()

    def meet(mine: threading.Event, other: threading.Event) -> str:
        mine.set()
        assert other.wait(5)
        return threading.current_thread().name

    async def main() -> list[str]:
        threads = Threads()
        both = await asyncio.gather(
            threads.run(Lane.TRAIN, lambda: meet(first, second), lambda _: 0.0),
            threads.run(Lane.EXCHANGE, lambda: meet(second, first), lambda _: 0.0),
        )
        threads.close()
        return both

    names = asyncio.run(main())
    assert names[0].startswith("dlion-train") and names[1].startswith("dlion-exchange")


def test_a_paced_lane_lasts_as_long_as_modelled_and_carries_its_errors_over() -> None:
    """Twenty steps of 10 ms: the whole is late by no more than the last timer's error, however late each timer was."""

    async def main() -> tuple[float, float]:
        threads, loop = Threads(paced=True), asyncio.get_running_loop()
        started = loop.time()
        for _ in range(20):
            await threads.run(Lane.TRAIN, lambda: None, lambda _: 0.010)
        threads.close()
        return loop.time() - started - 0.200, threads.overrun

    late_s, overrun = asyncio.run(main())
    assert late_s > -0.001
    assert abs(overrun * 0.200 - max(0.0, late_s)) < 0.005 or overrun > 0.02


def test_what_a_step_is_late_by_is_not_the_modelled_machines() -> None:
    """A step that takes half as long again as modelled, and the next, which makes up for it: both last as modelled."""

    async def main() -> list[float]:
        threads, loop = Threads(paced=True), asyncio.get_running_loop()
        took_s = []
        for work_s in (0.3, 0.0):
            started = loop.time()
            await threads.run(Lane.TRAIN, partial(time.sleep, work_s), lambda _: 0.2)
            took_s += [loop.time() - started, loop.time() - started - threads.late_s]
        threads.close()
        return took_s

    slow_s, first_s, fast_s, second_s = asyncio.run(main())
    assert slow_s >= 0.3 and fast_s < 0.2
    assert abs(first_s - 0.2) < 0.05 and abs(second_s - 0.2) < 0.05


def test_who_has_no_modelled_speed_is_never_late() -> None:
    """A real loop whose links are emulated: its steps last as long as they last."""

    async def main() -> tuple[float, float]:
        threads = Threads(paced=True)
        await threads.run(Lane.TRAIN, partial(time.sleep, 0.01), lambda _: 0.0)
        threads.close()
        return threads.late_s, threads.overrun

    assert asyncio.run(main()) == (0.0, 0.0)


def test_only_the_exchange_lanes_work_is_counted_and_not_its_waiting() -> None:
    def work(seconds: float) -> None:
        until = time.thread_time() + seconds
        while time.thread_time() < until:
            pass

    async def main() -> float:
        threads = Threads()
        await threads.run(Lane.TRAIN, partial(work, 0.2), lambda _: 0.0)
        await threads.run(Lane.EXCHANGE, partial(time.sleep, 0.2), lambda _: 0.0)
        await threads.run(Lane.EXCHANGE, partial(work, 0.02), lambda _: 0.0)
        threads.close()
        return threads.exchange_s

    assert 0.02 <= asyncio.run(main()) < 0.2


def test_waiting_between_steps_does_not_shorten_them() -> None:
    async def main() -> float:
        threads, loop = Threads(paced=True), asyncio.get_running_loop()
        await threads.run(Lane.TRAIN, lambda: None, lambda _: 0.02)
        await asyncio.sleep(0.015)
        started = loop.time()
        await threads.run(Lane.TRAIN, lambda: None, lambda _: 0.02)
        threads.close()
        return loop.time() - started

    assert asyncio.run(main()) > 0.010


def test_a_machine_that_is_too_slow_says_so() -> None:
    """Jobs of 6 ms in steps modelled as 3 ms: at least the difference is missed."""

    async def main() -> float:
        threads = Threads(paced=True)
        for _ in range(10):
            await threads.run(Lane.TRAIN, lambda: time.sleep(0.006), lambda _: 0.003)
        threads.close()
        return threads.overrun

    assert asyncio.run(main()) >= 0.9
