"""A virtual asyncio loop: its clock jumps to the next timer as soon as nothing is ready.

Law: no I/O, no threads, no wall clock. Callbacks run in the order in which they were scheduled; timers with equal
deadlines fire in the order in which they were set (CPython's own heap does not promise that). An exception that
reaches the loop stops the run, and a loop in which nothing can ever wake raises Deadlock at once.
"""

from __future__ import annotations

import asyncio
from asyncio import base_events, events
from collections.abc import Callable
from contextvars import Context
from heapq import heappop, heappush
from typing import Any

from msgspec import Struct


class Deadlock(RuntimeError):  # noqa: N818 - the field's name for it
    """The main task waits, and no callback or timer is left that could wake it."""


class VirtualLoop(base_events.BaseEventLoop):
    """Runs asyncio code in virtual time. ``time()`` starts at ``start_s`` and only moves forward."""

    def __init__(self, start_s: float = 0.0) -> None:
        super().__init__()
        self._now = start_s
        self._order = 0
        self._timers: list[tuple[float, int, _Handle]] = []
        self._failure: BaseException | None = None
        self._clock_resolution = 0.0
        self.set_exception_handler(_record)

    def time(self) -> float:
        return self._now

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> events.Handle:
        handle = _Handle(self._now, callback, args, context)
        self._ready.append(handle)  # type: ignore[attr-defined]
        return handle  # type: ignore[return-value]

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> events.TimerHandle:
        return self.call_at(self._now + delay if delay > 0.0 else self._now, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> events.TimerHandle:
        handle = _Handle(when, callback, args, context)
        self._order += 1
        heappush(self._timers, (when if when > self._now else self._now, self._order, handle))
        return handle  # type: ignore[return-value]

    def fail(self, failure: BaseException) -> None:
        """Stop the run with the first ``failure``."""
        if self._failure is None:
            self._failure = failure

    def _run_once(self) -> None:
        """All that can happen until somebody stops the loop: one flat loop, for it turns a million times a minute."""
        ready, timers = self._ready, self._timers  # type: ignore[attr-defined]
        while True:
            if ready:
                handle = ready.popleft()
            elif timers:
                when, _, handle = heappop(timers)
                if not handle._cancelled:
                    self._now = when
            else:
                raise Deadlock(f"at {self._now:.6f} virtual seconds: everybody waits and nothing can wake anybody")
            if handle._cancelled:
                continue
            try:
                if handle._context is None:
                    handle._callback(*handle._args)
                else:
                    handle._context.run(handle._callback, *handle._args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                self.fail(error)
            if self._failure is not None:
                failure, self._failure = self._failure, None
                raise failure
            if self._stopping:  # type: ignore[attr-defined]
                return

    def _write_to_self(self) -> None:
        """Nobody else's thread may wake a virtual loop."""

    def _process_events(self, event_list: object) -> None:
        """There are no file descriptors."""


class _Handle(Struct, eq=False):
    """Stands for asyncio's TimerHandle, whose constructor costs more than most callbacks. One that was given no context
    runs in the loop's own. Cancelled, it is dropped when its time comes."""

    _when: float
    _callback: Callable[..., object]
    _args: Any
    _context: Context | None
    _cancelled: bool = False

    def when(self) -> float:
        return self._when

    def cancelled(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        self._cancelled = True
        self._args = ()


def _record(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    assert isinstance(loop, VirtualLoop)
    loop.fail(context.get("exception") or RuntimeError(context.get("message", "a callback failed")))


def run(main: Any, start_s: float = 0.0) -> Any:
    """``asyncio.run`` on a fresh VirtualLoop whose clock shows ``start_s``."""
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(start_s)) as runner:
        return runner.run(main)
