"""Weighted dynamic batching (Hong & Chandra, DLion, HPDC 2021): how many samples a peer takes per step.

Law: pure; time arrives as ``now``. Knows rates and sizes, no peer's address, no gradient.

Two parts: the global batch grows in place of a decaying rate, and each peer's part of it follows its measured compute
power. (The third, weighing what is said by that part, is the strategies'.) Constants, the profile's forgetting, and
measuring power at the batch in use (which levels the step times even where steps have a fixed cost) are ours.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from dlion.learn.partition import apportion


@dataclass(frozen=True)
class GlobalBatch:
    """Global batch size by age of the run: ``warm_add`` is added per period up to ``warm_share`` of the training set,
    then it is multiplied by ``speed_factor`` up to ``speed_share``, then it stays. An infinite period is a constant.
    """

    start: int
    train_size: int
    period_s: float = math.inf
    warm_add: int = 32
    speed_factor: float = 1.5
    warm_share: float = 0.01
    speed_share: float = 0.1

    def __post_init__(self) -> None:
        if self.start < 1 or self.warm_add < 1 or not self.period_s > 0 or not self.speed_factor > 1:
            raise ValueError(
                "global batch: start and warm_add must be at least 1, period_s above 0, speed_factor above 1; got "
                f"{self.start}, {self.warm_add}, {self.period_s}, {self.speed_factor}"
            )

    def at(self, age_s: float) -> int:
        """Samples per step of all peers together when the run is ``age_s`` old. A function of age alone, so that a
        peer that joins late knows it."""
        periods = int(max(age_s, 0.0) // self.period_s)
        value = float(self.start)
        warm_room = self.warm_share * self.train_size - value
        if warm_room >= 0:
            added = min(periods, int(warm_room // self.warm_add) + 1)
            value += added * self.warm_add
            periods -= added
        while periods and value <= self.speed_share * self.train_size:
            value *= self.speed_factor
            periods -= 1
        return round(value)


class Profile:
    """Step time t(b) = a·b + c by least squares over recent steps, of which the latest weigh most."""

    KEEP = 16
    FADE = 0.8
    """Weight of a step relative to the one after it."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, float]] = deque(maxlen=self.KEEP)
        self._fit: tuple[float, float] | None = None

    def __len__(self) -> int:
        return len(self._steps)

    def observe(self, batch: int, seconds: float) -> None:
        """A step of ``batch`` samples took ``seconds``."""
        if batch < 1 or not 0 <= seconds < math.inf:
            raise ValueError(f"a step of {batch} samples cannot take {seconds} s")
        self._steps.append((batch, max(seconds, 1e-9)))
        self._fit = None

    def fit(self) -> tuple[float, float]:
        """(a seconds per sample, c seconds per step), a > 0, c >= 0; (0, 0) before the first step.

        Where sizes hardly differ, or noise would make a or c negative, all the time is laid to the samples.
        """
        if self._fit is None:
            self._fit = self._least_squares()
        return self._fit

    @property
    def steps(self) -> list[tuple[int, float]]:
        """(samples, seconds) of the latest steps."""
        return list(self._steps)

    def seconds(self, batch: int) -> float:
        a, c = self.fit()
        return a * batch + c

    def samples_per_s(self, batch: int) -> float:
        """Compute power at ``batch``; 0 before the first step."""
        return batch / self.seconds(batch) if self._steps else 0.0

    def _least_squares(self) -> tuple[float, float]:
        if not self._steps:
            return 0.0, 0.0
        n = sb = st = 0.0
        weighted = [(self.FADE**age, b, t) for age, (b, t) in enumerate(reversed(self._steps))]
        for w, b, t in weighted:
            n, sb, st = n + w, sb + w * b, st + w * t
        mean_b, mean_t = sb / n, st / n
        spread = sum(w * (b - mean_b) ** 2 for w, b, _ in weighted)
        if spread > 1e-6 * n * mean_b**2:
            a = sum(w * (b - mean_b) * (t - mean_t) for w, b, t in weighted) / spread
            c = mean_t - a * mean_b
            if a > 0 and c >= -1e-9 * mean_t:
                return a, max(c, 0.0)
        return mean_t / mean_b, 0.0


def local_batches(global_batch: int, rates: Mapping[str, float]) -> dict[str, int]:
    """Parts of ``global_batch`` in proportion to ``rates`` (samples per second): whole, at least 1, of exact sum.

    Raises ValueError when a rate is not finite and above 0, or when there are more peers than samples.
    """
    peers = sorted(rates)
    return dict(zip(peers, apportion(global_batch, [rates[p] for p in peers]), strict=True))


DEALT_MAX = 64
"""Peers among whom the global batch is dealt to the last sample; of more, each rounds its own part."""


class Batcher(Protocol):
    """What the node asks for its next batch, and tells its timings."""

    def batch(self, now: float) -> int:
        """Samples of the step that starts now."""

    def global_batch(self, now: float) -> int:
        """Samples per step of all living peers together."""

    def observe(self, batch: int, seconds: float) -> None:
        """One of our own steps is done."""

    def members(self, rates: Mapping[str, float]) -> None:
        """Samples per second of all living peers, ourselves included; 0 where not known yet."""

    @property
    def samples_per_s(self) -> float:
        """Our own compute power, to be told to the others; 0 before the first step."""


class Fixed:
    """Always the same local batch."""

    def __init__(self, batch: int) -> None:
        if batch < 1:
            raise ValueError(f"batch must be at least 1, not {batch}")
        self._batch = batch
        self._peers = 1
        self._profile = Profile()

    def batch(self, now: float) -> int:
        return self._batch

    def global_batch(self, now: float) -> int:
        return self._batch * self._peers

    def observe(self, batch: int, seconds: float) -> None:
        self._profile.observe(batch, seconds)

    def members(self, rates: Mapping[str, float]) -> None:
        self._peers = max(1, len(rates))

    @property
    def samples_per_s(self) -> float:
        return self._profile.samples_per_s(self._batch)


class Weighted:
    """A part of the global batch in proportion to our share of all peers' compute power.

    The first steps try different sizes around the even part, so that the cost per sample and per step can be told
    apart. After that the part is dealt anew every ``period_s``, and at once when the peers, those whose power is known,
    or the global batch change.
    """

    PROBES = (0.25, 0.5)
    """Sizes tried first, in even parts: small, for on a slow peer an even part may last many times its due."""

    def __init__(self, me: str, sizes: GlobalBatch, *, period_s: float = 5.0, started_at: float | None = None) -> None:
        """``started_at``: when the run began, on the clock of ``now``; None: at the first call."""
        self._me = me
        self._sizes = sizes
        self._period_s = period_s
        self._started_at = started_at
        self._rates: dict[str, float] = {me: 0.0}
        self._rated, self._sum = 0, 0.0
        """How many peers have told their power, and all of it."""
        self._told: Mapping[str, float] = {}
        """The very object that ``members`` was last given."""
        self._profile = Profile()
        self._probed = 0
        self._batch = 0
        self._known: tuple[str, ...] = ()
        """Peers, and once more those whose power is known."""
        self._dealt_for: tuple[int, tuple[str, ...]] = (0, ())
        self._due = -math.inf

    def global_batch(self, now: float) -> int:
        if self._started_at is None:
            self._started_at = now
        return max(self._sizes.at(now - self._started_at), len(self._rates))

    def batch(self, now: float) -> int:
        total = self.global_batch(now)
        if self._probed < len(self.PROBES):
            self._batch = max(1, round(self.PROBES[self._probed] * total / len(self._rates)))
            return self._batch
        dealt_for = (total, self._known)
        if now >= self._due or dealt_for != self._dealt_for:
            self._batch = self._part(total)
            self._dealt_for = dealt_for
            self._due = now + self._period_s
        return self._batch

    def observe(self, batch: int, seconds: float) -> None:
        self._profile.observe(batch, seconds)
        self._probed += 1

    def members(self, rates: Mapping[str, float]) -> None:
        if rates is self._told:
            return
        self._told = rates
        peers = sorted(rates if self._me in rates else [*rates, self._me])  # in order as they come
        self._rates = {peer: rates.get(peer, 0.0) for peer in peers}
        told = [rate for rate in self._rates.values() if 0 < rate < math.inf]
        self._rated, self._sum = len(told), math.fsum(told)
        self._known = (*peers, *[peer for peer in peers if self._rates[peer] > 0])

    def state(self) -> dict[str, Any]:
        """For a checkpoint: when the run began, and how long our steps took."""
        return {"started_at": self._started_at, "steps": self._profile.steps}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state``."""
        self._started_at = state["started_at"]
        for batch, seconds in state["steps"]:
            self.observe(int(batch), float(seconds))

    @property
    def samples_per_s(self) -> float:
        return self._profile.samples_per_s(max(self._batch, 1))

    def _part(self, total: int) -> int:
        """Ours of the global batch. Of very many parts, that all add up to the sample is not worth dealing them all."""
        told, mine = self._rates[self._me], self.samples_per_s
        others = self._rated - (0 < told < math.inf)
        if len(self._rates) <= DEALT_MAX or not others or not 0 < mine < math.inf:
            return local_batches(total, self._complete())[self._me]
        mean = (self._sum - (told if told < math.inf else 0.0)) / others
        return max(1, round(total * mine / (mean * (len(self._rates) - 1) + mine)))

    def _complete(self) -> dict[str, float]:
        """Everybody's rate: our own as measured now, and the mean of the known for those who have not told theirs."""
        told = self._rates | {self._me: self.samples_per_s}
        known = [rate for rate in told.values() if 0 < rate < math.inf]
        mean = math.fsum(known) / len(known)
        return {peer: rate if 0 < rate < math.inf else mean for peer, rate in told.items()}
