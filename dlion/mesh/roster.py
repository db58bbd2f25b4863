"""Who is there, as far as this peer has heard: one record per peer, spread by gossip, aged by silence.

Law: pure; ``now`` is an argument. Liveness is one rule for everybody: a peer is alive while news of it keeps coming,
directly or through others. Silence is not death: a silent peer is merely not counted, and counts again when heard.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from dlion.messages import PeerId, Scalar


class State(StrEnum):
    EXPECTED = "expected"
    """In the topology, never heard of."""
    LIVE = "live"
    SILENT = "silent"
    FINISHED = "finished"
    """Has said all it had to say, and still carries on what others say."""
    LEFT = "left"


@dataclass(frozen=True)
class Record:
    """What a peer says of itself. A higher (incarnation, beat) supersedes."""

    peer: PeerId
    incarnation: int = 0
    beat: int = 0
    step: int = 0
    samples: int = 0
    samples_per_s: float = 0.0
    batch: int = 0
    loss: float = 0.0

    def fields(self) -> dict[str, Scalar]:
        return {name: getattr(self, name) for name in STATUS_FIELDS}


STATUS_FIELDS: Mapping[str, type] = {
    "peer": str,
    "incarnation": int,
    "beat": int,
    "step": int,
    "samples": int,
    "samples_per_s": float,
    "batch": int,
    "loss": float,
}


def record_of(fields: Mapping[str, Scalar]) -> Record:
    """Inverse of ``Record.fields``; raises ValueError for impossible values."""
    record = Record(**{name: fields[name] for name in STATUS_FIELDS})  # type: ignore[arg-type]
    if min(record.incarnation, record.beat, record.step, record.samples, record.batch) < 0 or record.samples_per_s < 0:
        raise ValueError(f"status of {record.peer!r}: negative counts")
    return record


@dataclass(frozen=True)
class Change:
    """One change of state, for the log and the strategy."""

    peer: PeerId
    state: State
    incarnation: int
    why: str


class Roster:
    """All peers of the topology and their state, seen from ``me``."""

    def __init__(self, me: Record, others: Iterable[PeerId], silent_after_s: float) -> None:
        self.me = me
        self.silent_after_s = silent_after_s
        self.records: dict[PeerId, Record] = {p: Record(p) for p in sorted({me.peer, *others})}
        self.states: dict[PeerId, State] = dict.fromkeys(self.records, State.EXPECTED)
        self.records[me.peer] = me
        self.states[me.peer] = State.LIVE
        self._heard_at: dict[PeerId, float] = {}
        self._told: dict[PeerId, dict[PeerId, tuple[int, int]]] = {}
        self.version = 0
        """Grows with every change of a state or a record."""

    @property
    def live(self) -> tuple[PeerId, ...]:
        """Peers that count (ourselves included), in sorted order."""
        return tuple(p for p, s in self.states.items() if s in (State.LIVE, State.FINISHED))

    def speak(self, **changes: int | float) -> Record:
        """Bring our own record up to date and give it a new beat."""
        self.me = replace(self.me, beat=self.me.beat + 1, **changes)  # type: ignore[arg-type]
        self.records[self.me.peer] = self.me
        self.version += 1
        return self.me

    def hear(self, record: Record, now: float) -> Change | None:
        """News of a peer, from itself or passed on. Returns the change of state it makes, if any."""
        known = self.records.get(record.peer)
        if known is None or record.peer == self.me.peer:
            return None
        if (record.incarnation, record.beat) <= (known.incarnation, known.beat):
            return None
        self.records[record.peer] = record
        self.version += 1
        return self.alive(record.peer, record.incarnation, now)

    def alive(self, peer: PeerId, incarnation: int, now: float) -> Change | None:
        """Something arrived from ``peer`` itself: it lives. A peer that left stays gone until a new incarnation."""
        state = self.states.get(peer)
        if state is None or peer == self.me.peer:
            return None
        self._heard_at[peer] = now
        renewed = incarnation > self.records[peer].incarnation
        if state is State.LIVE or state is State.FINISHED or (state is State.LEFT and not renewed):
            return None
        if renewed:
            self.records[peer] = replace(Record(peer), incarnation=incarnation)
        why = "first heard" if state is State.EXPECTED else "heard again"
        return self._turn(peer, State.LIVE, why)

    def presume(self, now: float, missing: Collection[PeerId]) -> list[Change]:
        """The run begins: whoever is expected counts as living until it has been silent too long; not the missing."""
        expected = [p for p, s in self.states.items() if s is State.EXPECTED]
        for peer in expected:
            self._heard_at[peer] = now
        return [
            self._turn(p, State.SILENT, "missing at the start") if p in missing else self._turn(p, State.LIVE, "presumed")
            for p in expected
        ]

    def finished(self, peer: PeerId, leaving: bool) -> Change | None:
        """The peer said its last word; with ``leaving`` it goes, else it stays to carry on what others say."""
        state = State.LEFT if leaving else State.FINISHED
        if peer == self.me.peer or self.states.get(peer) in (None, State.LEFT, state):
            return None
        return self._turn(peer, state, "left" if leaving else "finished")

    def lost(self, peer: PeerId, now: float, patience_s: float) -> None:
        """The link to ``peer`` broke: unless news comes, it counts as silent after ``patience_s``."""
        if peer in self._heard_at:
            self._heard_at[peer] = min(self._heard_at[peer], now - self.silent_after_s + patience_s)

    def age(self, now: float, lag_s: float = 0.0) -> list[Change]:
        """Who has been silent for too long; ``lag_s`` is our own loop's lateness, which is not their silence."""
        late = [
            p
            for p, s in self.states.items()
            if s in (State.LIVE, State.FINISHED)
            and p != self.me.peer
            and now - self._heard_at.get(p, now) - lag_s > self.silent_after_s
        ]
        return [self._turn(p, State.SILENT, f"silent for {self.silent_after_s:g} s") for p in late]

    def news_for(self, neighbour: PeerId, subjects: Iterable[PeerId]) -> list[Record]:
        """Records among ``subjects`` that ``neighbour`` was not told yet; marks them as told."""
        told = self._told.setdefault(neighbour, {})
        news = []
        for peer in subjects:
            record = self.records[peer]
            stamp = (record.incarnation, record.beat)
            if peer != neighbour and record.beat and told.get(peer, (0, 0)) < stamp:
                told[peer] = stamp
                news.append(record)
        return news

    def _turn(self, peer: PeerId, state: State, why: str) -> Change:
        self.states[peer] = state
        self.version += 1
        return Change(peer, state, self.records[peer].incarnation, why)
