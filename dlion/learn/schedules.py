"""Learning rates as pure functions of the samples that all peers together have processed.

Law: no clock, no step counter, no state. Samples rather than steps, because peers step at different speeds and with
different batches, and those who join late must agree with the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi
from typing import Protocol


class Schedule(Protocol):
    def __call__(self, global_samples: float) -> float: ...


@dataclass(frozen=True)
class Constant:
    rate: float

    def __call__(self, global_samples: float) -> float:
        return self.rate


@dataclass(frozen=True)
class WarmUp:
    """Rises linearly from 0 to what ``then`` says, over the first ``samples``."""

    samples: float
    then: Schedule

    def __call__(self, global_samples: float) -> float:
        share = min(1.0, global_samples / self.samples) if self.samples > 0 else 1.0
        return share * self.then(global_samples)


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from ``rate`` to ``floor`` over ``samples``, then ``floor`` (Loshchilov & Hutter, SGDR, 2017)."""

    rate: float
    samples: float
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not self.samples > 0:
            raise ValueError(f"cosine schedule: samples must be above 0, not {self.samples}")

    def __call__(self, global_samples: float) -> float:
        done = min(1.0, max(0.0, global_samples / self.samples))
        return self.floor + (self.rate - self.floor) * 0.5 * (1.0 + cos(pi * done))


@dataclass(frozen=True)
class Step:
    """``rate``, multiplied by ``factor`` at each of the counts of samples in ``at``."""

    rate: float
    at: tuple[float, ...]
    factor: float = 0.1

    def __call__(self, global_samples: float) -> float:
        passed = sum(global_samples >= count for count in self.at)
        return float(self.rate * self.factor**passed)
