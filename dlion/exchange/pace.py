"""When the next local step may start, whatever the strategy says: lockstep, bounded staleness, backup workers, free.

Law: pure. A pace sees only steps: our own and, per living peer, the last one whose update was applied here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dlion.messages import PeerId

Verdict = Literal["run", "wait"] | int
"""``run``, ``wait``, or the number of the step to skip to."""


@dataclass(frozen=True)
class Progress:
    """Steps are counted from 0; -1 means none."""

    mine: int
    """My last finished step."""
    applied: Mapping[PeerId, int]
    """For every living peer but me, in peer order: its last step whose update has been heard here."""


class Pace:
    """Base: never waits, unless told when."""

    name = "free"
    staged = False
    """True: Adds become visible only at the barrier, in order of origin."""
    waits = True
    """False: never for others, and their steps need not be told."""

    def may_start(self, step: int, progress: Progress) -> Verdict:
        return "run"


class Free(Pace):
    """Nobody waits for anybody."""

    waits = False


class Lockstep(Pace):
    """Bulk-synchronous: step s starts when the updates of step s - 1 of all living peers are here."""

    name = "lockstep"
    staged = True

    def may_start(self, step: int, progress: Progress) -> Verdict:
        return "run" if all(seen >= step - 1 for seen in progress.applied.values()) else "wait"


@dataclass(frozen=True)
class Bounded(Pace):
    """Stale-synchronous: nobody runs more than ``staleness`` steps ahead of the slowest update heard (SSP; Hop)."""

    staleness: int = 5
    name = "bounded"

    def __post_init__(self) -> None:
        if self.staleness < 0:
            raise ValueError(f"pace bounded: staleness must be at least 0, got {self.staleness}")

    def may_start(self, step: int, progress: Progress) -> Verdict:
        return "run" if all(seen >= step - 1 - self.staleness for seen in progress.applied.values()) else "wait"


@dataclass(frozen=True)
class Backup(Pace):
    """Like lockstep, but the ``spare`` slowest peers are not waited for (Hop's backup workers)."""

    spare: int = 1
    name = "backup"

    def __post_init__(self) -> None:
        if self.spare < 0:
            raise ValueError(f"pace backup: spare must be at least 0, got {self.spare}")

    def may_start(self, step: int, progress: Progress) -> Verdict:
        late = sum(seen < step - 1 for seen in progress.applied.values())
        return "run" if late <= self.spare else "wait"


@dataclass(frozen=True)
class BoundedBackup(Bounded):
    """Both: nobody runs more than ``staleness`` steps ahead of any but the ``spare`` slowest (Hop)."""

    spare: int = 1
    name = "bounded+backup"

    def __post_init__(self) -> None:
        super().__post_init__()
        Backup(self.spare)

    def may_start(self, step: int, progress: Progress) -> Verdict:
        late = sum(seen < step - 1 - self.staleness for seen in progress.applied.values())
        return "run" if late <= self.spare else "wait"


PACES: Mapping[str, type[Pace]] = {p.name: p for p in (Free, Lockstep, Bounded, Backup, BoundedBackup)}
"""A name with a ``+`` is for strategies that bear each of its parts."""
