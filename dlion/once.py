"""Updates are added once: one that comes again over another route is known by whose step it is.

Law: names and numbers only. While views of who lives differ, two bridges may both believe in their role, and both
carry the same update into a micro-cloud. Sessions cannot see that: they are two.

Only messages that carry one span and some entries are judged: a sum of several peers' steps has no twin, and spans
without entries merely tell how far their origins are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dlion.messages import Message, PeerId

RUNS_MAX = 64
"""Stretches of steps remembered per origin; a new one begins when the route changes or steps are missing."""


class Once:
    """Remembers which steps of whom came over which hop."""

    def __init__(self) -> None:
        self._runs: dict[PeerId, list[tuple[int, int, PeerId]]] = {}

    def again(self, message: Message) -> bool:
        """True: all that ``message`` covers came before over another hop. Else it is remembered."""
        if len(message.coverage) != 1 or not any(block.count for block in message.blocks):
            return False
        ((origin, first, last),) = message.coverage
        runs = self._runs.setdefault(origin, [])
        if any(first >= begin and last <= end and hop != message.hop for begin, end, hop in reversed(runs)):
            return True
        if runs and runs[-1][2] == message.hop and runs[-1][0] <= first <= runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], max(last, runs[-1][1]), message.hop)
        else:
            runs.append((first, last, message.hop))
            del runs[:-RUNS_MAX]
        return False

    def forget(self, peer: PeerId) -> None:
        """``peer`` begins anew, and may count its steps as it likes."""
        self._runs.pop(peer, None)

    def state(self) -> dict[str, list[list[Any]]]:
        """For a checkpoint."""
        return {origin: [list(run) for run in runs] for origin, runs in self._runs.items()}

    def restore(self, state: Mapping[str, list[list[Any]]]) -> None:
        """Inverse of ``state``."""
        self._runs = {
            PeerId(origin): [(int(a), int(b), PeerId(hop)) for a, b, hop in runs] for origin, runs in state.items()
        }
