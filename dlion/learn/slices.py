"""In how many slices the gradient of a step is taken: as many as may be, while they cost little.

Law: pure; knows sizes and seconds. What slices are good for is ``Exchange.slices``.
"""

from __future__ import annotations

from collections import deque
from statistics import median

COST_MAX = 1.1
"""A sample in slices may cost so many times what it costs in a whole batch; above that, half as many slices."""
LOOKS = 3
"""Steps taken whole, each beside one in slices, before the cost is judged."""
LOOK_EVERY, DARE_EVERY = 32, 256
"""Steps from one such look to the next once enough were had; and from one try of twice as many slices to the next."""


class Slices:
    """How many slices the next step should have, by what the last ones cost."""

    def __init__(self) -> None:
        self._step = 0
        self._fewer = 1
        """The most is divided by this."""
        self._costs = deque[float](maxlen=LOOKS)
        self._last: tuple[int, float] = (0, 0.0)
        """Slices and seconds per sample of the last step."""

    def of(self, batch: int, most: int) -> int:
        """Slices of a step of ``batch`` samples, at most ``most``."""
        number = max(1, min(most // self._fewer, batch))
        looks = len(self._costs) < LOOKS or self._step % LOOK_EVERY == 0
        whole = looks and self._step % 2 == 0 and self._step > 0  # the first step is no measure: all is cold
        return 1 if whole else number

    def observe(self, slices: int, batch: int, seconds: float) -> None:
        """A step took ``seconds``."""
        (before, spent_s), spends_s = self._last, seconds / batch
        self._last = (slices, spends_s)
        self._step += 1
        if self._step > 2 and before > slices == 1 and spends_s > 0:
            self._costs.append(spent_s / spends_s)
            if len(self._costs) == LOOKS and median(self._costs) > COST_MAX:
                self._fewer *= 2
                self._costs.clear()
        if self._fewer > 1 and self._step % DARE_EVERY == 0:
            self._fewer //= 2
            self._costs.clear()
