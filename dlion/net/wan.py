"""A rate as a pure function of time: piecewise constant, with its exact integral and the inverse of that integral.

Law: mathematics only. No clock, no files, no asyncio; time and amounts arrive as arguments. The unit is the caller's
(bits per second of a resource, samples per second of a device). Everything about traces goes through ``Rate``.

A looping rate is never unrolled: a time is split into a whole number of periods and an exact remainder, so a day of
loops is as precise as the first one. Every question costs O(log steps).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Numbers = Sequence[float] | npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rate:
    """``values[i]`` holds from ``origin_s + starts[i]`` to the next start; use the constructors below.

    With a finite ``period_s`` the pattern repeats in both directions of time. Without, the first value holds before
    the first start and the last one for ever. A value of 0 is an outage.
    """

    starts: tuple[float, ...]
    values: tuple[float, ...]
    period_s: float = math.inf
    origin_s: float = 0.0
    _sums: tuple[float, ...] = field(init=False, repr=False, compare=False)
    """Integral from the origin to each start and, last, to the end of the period (without a period: no last)."""
    _constant: float | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        starts, values = np.asarray(self.starts, float), np.asarray(self.values, float)
        if starts.ndim != 1 or starts.shape != values.shape or starts.size == 0:
            raise ValueError(f"a rate needs as many times as values, at least one: {starts.shape}, {values.shape}")
        if not np.isfinite(values).all() or (values < 0).any():
            raise ValueError("a rate's values must be finite and not negative")
        if not np.isfinite(starts).all() or starts[0] != 0 or (np.diff(starts) <= 0).any():
            raise ValueError("a rate's times must be finite and strictly increasing")
        if not self.period_s > starts[-1] or not math.isfinite(self.origin_s):
            raise ValueError(f"a period of {self.period_s} s must reach beyond the last step at {starts[-1]} s")
        looped = math.isfinite(self.period_s)
        widths = np.diff(starts, append=self.period_s) if looped else np.diff(starts)
        sums = np.concatenate(([0.0], np.cumsum(widths * values[: widths.size])))
        object.__setattr__(self, "_sums", tuple(sums.tolist()))
        object.__setattr__(self, "_constant", self.values[0] if (values == values[0]).all() else None)

    # -- constructors -------------------------------------------------------------------------------------------

    @staticmethod
    def constant(value: float) -> Rate:
        """The same rate for ever."""
        return Rate((0.0,), (float(value),))

    @staticmethod
    def steps(
        times_s: Numbers, values: Numbers, *, loop: bool, period_s: float | None = None, offset_s: float = 0.0
    ) -> Rate:
        """``values[i]`` from ``times_s[i]`` on. ``offset_s``: how far into the trace time 0 lies.

        When it loops, ``period_s`` runs from the first time; left out, the last step is as wide as the one before it.
        Raises ValueError for times that do not increase, negative or non-finite values, a period too short.
        """
        times = np.asarray(times_s, float)
        if times.ndim != 1 or times.size == 0:
            raise ValueError("a rate needs at least one step")
        if not loop:
            period = math.inf
        elif period_s is not None:
            period = float(period_s)
        elif times.size > 1:
            period = float(2 * times[-1] - times[-2] - times[0])
        else:
            raise ValueError("a single looping step needs a period")
        first = float(times[0])
        return Rate(tuple((times - first).tolist()), tuple(map(float, values)), period, first - offset_s)

    def scaled(self, factor: float) -> Rate:
        """``factor`` times this rate."""
        return replace(self, values=tuple(v * factor for v in self.values))

    def shifted(self, offset_s: float) -> Rate:
        """This rate read ``offset_s`` later: the result at 0 is this rate at ``offset_s``."""
        return replace(self, origin_s=self.origin_s - offset_s)

    def resampled(self, dt_s: float) -> Rate:
        """Steps of ``dt_s`` (the last one of a period may be narrower), each the mean of what it replaces."""
        if not dt_s > 0:
            raise ValueError(f"steps must be wider than {dt_s} s")
        end = self.period_s if self.looped else self.starts[-1]
        if end == 0:
            return self
        edges = np.arange(math.ceil(end / dt_s)) * dt_s
        bounds = [*edges[edges < end * (1 - 1e-12)].tolist(), end]
        means = [self._within(b) - self._within(a) for a, b in pairwise(bounds)] / np.diff(bounds)
        if self.looped:
            return replace(self, starts=tuple(bounds[:-1]), values=tuple(means.tolist()))
        return replace(self, starts=tuple(bounds), values=(*means.tolist(), self.values[-1]))

    # -- questions ----------------------------------------------------------------------------------------------

    @property
    def looped(self) -> bool:
        return self.period_s < math.inf

    @property
    def mean(self) -> float:
        """Over one period; of a rate that does not loop, from its first step to its last."""
        if self._constant is not None:
            return self._constant
        return self._sums[-1] / (self.period_s if self.looped else self.starts[-1])

    def at(self, t: float) -> float:
        """The rate at time ``t``."""
        if self._constant is not None:
            return self._constant
        x = t - self.origin_s
        if self.looped:
            x %= self.period_s
        return self.values[max(bisect_right(self.starts, x) - 1, 0)]

    def integral(self, t0: float, t1: float) -> float:
        """The amount between ``t0`` and ``t1`` (negative when ``t1`` comes first)."""
        if self._constant is not None:
            return self._constant * (t1 - t0)
        x0, x1 = t0 - self.origin_s, t1 - self.origin_s
        if not self.looped:
            return self._within(x1) - self._within(x0)
        loops0, x0 = divmod(x0, self.period_s)
        loops1, x1 = divmod(x1, self.period_s)
        return (loops1 - loops0) * self._sums[-1] + (self._within(x1) - self._within(x0))

    def finish(self, t0: float, amount: float) -> float:
        """The earliest time by which ``amount`` has passed since ``t0``; infinity when it never will."""
        if amount <= 0:
            return t0
        if self._constant is not None:
            return t0 + amount / self._constant if self._constant else math.inf
        x = t0 - self.origin_s
        if not self.looped:
            return max(t0, self.origin_s + self._inverse(self._within(x) + amount))
        loops, x = divmod(x, self.period_s)
        total = self._sums[-1]
        more, rest = divmod(self._within(x) + amount, total)
        if rest == 0:  # the end of a period, not the start of the next: a trailing outage is not waited for
            more, rest = more - 1, total
        return max(t0, self.origin_s + ((loops + more) * self.period_s + self._inverse(rest)))

    def next_change(self, t: float) -> float:
        """The first time after ``t`` at which the rate differs from that at ``t``; infinity when there is none."""
        if self._constant is not None:
            return math.inf
        now, x, loops = self.at(t), t - self.origin_s, 0.0
        if self.looped:
            loops, x = divmod(x, self.period_s)
        first = bisect_right(self.starts, x)
        for i in range(first, first + len(self.starts) if self.looped else len(self.starts)):
            wraps, j = divmod(i, len(self.starts))
            if self.values[j] != now:
                change = self.origin_s + ((loops + wraps) * self.period_s if self.looped else 0.0) + self.starts[j]
                while self.at(change) == now:  # rounding may put the boundary a hair before itself
                    change = math.nextafter(change, math.inf)
                return change
        return math.inf

    def segments(self, t0: float, t1: float) -> Iterator[tuple[float, float, float]]:
        """(start, end, value) of the constant pieces that make up ``t0`` to ``t1``."""
        while t0 < t1:
            end = min(self.next_change(t0), t1)
            yield t0, end, self.at(t0)
            t0 = end

    # -- inside one period --------------------------------------------------------------------------------------

    def _within(self, x: float) -> float:
        """Integral from the origin to ``x`` seconds behind it, not looping."""
        i = max(bisect_right(self.starts, x) - 1, 0)
        return self._sums[i] + (x - self.starts[i]) * self.values[i]

    def _inverse(self, amount: float) -> float:
        """The earliest x with ``_within(x)`` >= ``amount``, where ``amount`` lies beyond all that is held flat."""
        i = max(bisect_left(self._sums, amount) - 1, 0)
        if not self.values[i]:
            return math.inf
        return self.starts[i] + (amount - self._sums[i]) / self.values[i]
