"""Who is there, as far as this peer has heard: one record per peer, spread by gossip, aged by silence.

Law: pure; ``now`` is an argument. Liveness is one rule for everybody: a peer is alive while news of it keeps coming,
directly or through others. Silence is not death: a silent peer is merely not counted, and counts again when heard.
Who finds a peer silent tells the others up to which beat it was heard; who knows of a later beat, or hears the peer
itself, does not believe it, and the peer, when it is told, refutes it with a new beat (as in SWIM: Das, Gupta,
Motivala, DSN 2002).

Everybody is told of everybody, so beats must become rarer as peers become more: each peer hears of about one other a
period, beyond the first few. Neighbours do not wait for beats, for what comes on their links shows that they live; the
rest is given more time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from functools import lru_cache
from typing import Annotated

import msgspec
import numpy as np
from msgspec.structs import replace

from dlion.messages import PeerId

FEW = 8
"""Up to so many other peers, each speaks once a period; of more, each speaks the less often."""
NEWSWORTHY = 0.05
"""A relative change of compute power that does not wait for the next beat."""
NEWS_RECORDS_MAX = 128
NEWS_CHARS_MAX = 4000
"""Of the text in one message: what a field may hold."""
TEXTS_KEPT = 1024
"""Of all nodes of a process: mates are told the same text, and hold the same records."""
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 53) - 1)]


class State(StrEnum):
    EXPECTED = "expected"
    """In the topology, never heard of."""
    LIVE = "live"
    SILENT = "silent"
    FINISHED = "finished"
    """Has said all it had to say, and still carries on what others say."""
    LEFT = "left"


LIVING = (State.LIVE, State.FINISHED)
COUNTED = (State.EXPECTED, *LIVING)
"""Who has a part in the plan of bridges."""
LAST_S = 1e9
"""When somebody came into the run who has not said that yet: after everybody else."""


class Record(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """What a peer says of itself, and whether others found it silent after that. A higher ``stamp`` supersedes."""

    peer: PeerId
    incarnation: Count = 0
    beat: Count = 0
    step: Count = 0
    samples: Count = 0
    samples_per_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    batch: Count = 0
    loss: float = 0.0
    silent: bool = False
    since_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Time of the run at which it came into it; 0: it was there when the run began."""

    @property
    def stamp(self) -> tuple[int, int, bool]:
        return self.incarnation, self.beat, self.silent


STATUS_FIELDS: Mapping[str, type] = {"news": str}
"""Of the message that carries records: a JSON array of them, each an array of its fields."""


def _plain(value: object) -> object:
    """A workload's loss or a batcher's batch may be one of numpy's numbers."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"news of a peer: found {value!r}, expected a number")


_encode = msgspec.json.Encoder(enc_hook=_plain).encode
_decode = msgspec.json.Decoder(list[Record]).decode


def news_texts(records: Iterable[Record]) -> list[str]:
    """``records`` as texts of at most NEWS_CHARS_MAX and NEWS_RECORDS_MAX each."""
    texts: list[str] = []
    held: list[str] = []
    room = NEWS_CHARS_MAX
    for record in records:
        piece = _encode(record).decode()
        room -= len(piece) + 1
        if held and (room < 2 or len(held) == NEWS_RECORDS_MAX):
            texts.append(f"[{','.join(held)}]")
            held, room = [], NEWS_CHARS_MAX - len(piece) - 1
        held.append(piece)
    return [*texts, f"[{','.join(held)}]"] if held else texts


@lru_cache(maxsize=TEXTS_KEPT)
def records_of(text: str) -> Sequence[Record]:
    """The records in one text of ``news_texts``; raises ValueError for anything else."""
    records = _decode(text)
    if len(records) > NEWS_RECORDS_MAX:
        raise ValueError(f"news of {len(records)} peers at once; at most {NEWS_RECORDS_MAX}")
    return records


class Change(msgspec.Struct, frozen=True, gc=False):
    """One change of state, for the log and the strategy."""

    peer: PeerId
    state: State
    incarnation: int
    why: str


class Roster:
    """All peers of the topology and their state, seen from ``me``."""

    def __init__(self, me: Record, others: Iterable[PeerId], silent_after_s: float, period_s: float = 1.0) -> None:
        self.me = me
        self.silent_after_s = silent_after_s
        self.records: dict[PeerId, Record] = {p: Record(p) for p in sorted({me.peer, *others})}
        self.beat_s = period_s * max(1, len(self.records) - FEW)
        """From one beat of a peer to its next, at most."""
        self._far_silent_after_s = silent_after_s + 2 * (self.beat_s - period_s)
        self._beat_at = -math.inf
        self._told_batch = 0
        self._near_at: dict[PeerId, float] = {}
        """When bytes last came from those who have a link to us."""
        self.look_at = -math.inf
        """Nobody can have been silent for too long before, ..."""
        self._far_look_at = -math.inf
        """... and nobody without a link to us."""
        self.states: dict[PeerId, State] = dict.fromkeys(self.records, State.EXPECTED)
        self.records[me.peer] = me
        self.states[me.peer] = State.LIVE
        self._heard_at: dict[PeerId, float] = {}
        self._news: dict[PeerId, int] = {}
        """Number of each record's last change, in the order of these numbers."""
        self._teller: dict[PeerId, PeerId] = {}
        """Which neighbour told us of it."""
        self._told: dict[PeerId, int] = {}
        """Up to which number each neighbour was told."""
        self._gathered: dict[tuple[int, str], list[Record]] = {}
        """The news since a number, for one side; as of ``_gathered_at`` changes."""
        self._gathered_at = 0
        self.changes = 0
        """Grows with every change of a record."""
        self.rated = 0
        """Grows when somebody's compute power changes, or who is there to have any."""
        self.samples = sum(r.samples for r in self.records.values())
        """Processed by all, as far as heard."""
        self.missed_at = -math.inf
        """When somebody was last found silent that had not said its last word."""
        self.guests: set[PeerId] = set()
        """Newcomers that are not ready to count, though they are heard."""
        self._live: tuple[PeerId, ...] | None = None
        self.version = 0
        """Grows when somebody begins or ceases to live."""
        self.shape = 0
        """Grows when somebody begins or ceases to count."""
        self.fresh: dict[PeerId, None] = {}
        """Whose record changed since somebody last emptied this."""

    @property
    def live(self) -> tuple[PeerId, ...]:
        """Peers that count (ourselves included), in sorted order."""
        if self._live is None:
            self._live = tuple(p for p, s in self.states.items() if s is State.LIVE or s is State.FINISHED)
        return self._live

    def speak(self, **changes: int | float) -> Record:
        """Bring our own record up to date and give it a new beat."""
        self.me = replace(self.me, beat=self.me.beat + 1, **changes)
        self._told_batch = self.me.batch
        self._note(self.me, self.me.peer)
        return self.me

    def deal(self, batch: int) -> None:
        """Our batch is another from now on: told at once among few or if by much, else with the next beat."""
        self.me = self.records[self.me.peer] = replace(self.me, batch=batch)
        if len(self.records) <= FEW + 1 or abs(batch - self._told_batch) > NEWSWORTHY * self._told_batch:
            self.speak()

    def beat(self, now: float, **own: int | float) -> bool:
        """Speak, if a beat is due or our compute power has become another. Did we?"""
        told = self.me.samples_per_s
        due = now >= self._beat_at or abs(own["samples_per_s"] - told) > NEWSWORTHY * told
        if due:
            self._beat_at = now + self.beat_s
            self.speak(**own)
        return due

    def _note(self, record: Record, teller: PeerId) -> None:
        known = self.records[record.peer]
        self.changes += 1
        self.rated += record.samples_per_s != known.samples_per_s
        self.samples += record.samples - known.samples
        self.shape += record.since_s != known.since_s
        self._news.pop(record.peer, None)
        self._news[record.peer] = self.changes
        self._teller[record.peer] = teller
        self.records[record.peer] = record
        self.fresh[record.peer] = None

    def hear(self, record: Record, teller: PeerId, now: float) -> Change | None:
        """News of a peer, told by itself or by another. Returns the change of state it makes, if any."""
        known = self.records.get(record.peer)
        if known is None or record is known or record.stamp <= known.stamp:
            return None
        if record.peer == self.me.peer:
            if record.silent and record.incarnation == known.incarnation:
                self._beat_at = -math.inf
            return None
        if record.silent and self.hears(record.peer, now):
            return None
        self._note(record, teller)
        if record.silent:
            counted = self.states[record.peer] in COUNTED
            return self._silence(record.peer, "others found it silent", now) if counted else None
        return self.alive(record.peer, record.incarnation, now)

    def alive(self, peer: PeerId, incarnation: int, now: float) -> Change | None:
        """Something arrived from ``peer`` itself: it lives. A peer that left stays gone until a new incarnation."""
        state = self.states.get(peer)
        if state is None or peer == self.me.peer or peer in self.guests:
            return None
        self._heard(peer, now)
        renewed = incarnation > self.records[peer].incarnation
        if state is State.LIVE or state is State.FINISHED or (state is State.LEFT and not renewed):
            return None
        known = Record(peer, incarnation) if renewed else self.records[peer]
        self.samples += known.samples - self.records[peer].samples
        self.records[peer] = replace(known, silent=False)
        why = "first heard" if state is State.EXPECTED else "heard again"
        return self._turn(peer, State.LIVE, why)

    def come(self, incarnation: int) -> None:
        """We begin a new life, to come into the run after everybody else."""
        self.me = self.records[self.me.peer] = replace(self.me, incarnation=incarnation, beat=0, since_s=LAST_S)
        self.shape += 1
        self.version += 1

    def introduce(self, peer: PeerId, incarnation: int) -> Change:
        """``peer`` begins a new life: what is known of its former one is over. It counts when it is heard."""
        life = replace(self.records[peer], incarnation=incarnation, beat=0, silent=True, since_s=LAST_S)
        self._note(life, self.me.peer)
        self._heard_at.pop(peer, None)
        self._near_at.pop(peer, None)
        return self._turn(peer, State.SILENT, "comes into the run")

    def near(self, peer: PeerId, at: float) -> Change | None:
        """Bytes came from ``peer`` over its link to us at the time ``at``, not long ago."""
        self.spoke(peer, at)
        if self.states[peer] in LIVING:
            self._heard(peer, at)
            return None
        return self.alive(peer, self.records[peer].incarnation, at)

    def spoke(self, peer: PeerId, at: float) -> None:
        """Its link to us brought something at the time ``at``, whatever we make of that."""
        self._near_at[peer] = at

    def hears(self, peer: PeerId, now: float) -> bool:
        """Does ``peer`` itself speak to us?"""
        return now - self._near_at.get(peer, -math.inf) <= self.silent_after_s

    def _heard(self, peer: PeerId, at: float) -> None:
        if at >= self._heard_at.get(peer, at):
            self._heard_at[peer] = at
        end = at + self._patience_s(peer)
        self.look_at = min(self.look_at, end)
        if peer not in self._near_at:
            self._far_look_at = min(self._far_look_at, end)

    def _patience_s(self, peer: PeerId) -> float:
        return self.silent_after_s if peer in self._near_at else self._far_silent_after_s

    def presume(self, now: float) -> list[Change]:
        """The run begins: whoever is expected counts as living until it has been silent too long."""
        expected = [p for p, s in self.states.items() if s is State.EXPECTED]
        for peer in expected:
            self._heard(peer, now)
        return [self._turn(p, State.LIVE, "presumed") for p in expected]

    def miss(self, peers: Iterable[PeerId], now: float) -> list[Change]:
        """The run begins soon, and waits for these no longer."""
        expected = [p for p in peers if self.states[p] is State.EXPECTED]
        return [self._silence(p, "missing at the start", now) for p in expected]

    def finished(self, peer: PeerId, leaving: bool) -> Change | None:
        """The peer said its last word; with ``leaving`` it goes, else it stays to carry on what others say."""
        state = State.LEFT if leaving else State.FINISHED
        if peer == self.me.peer or self.states.get(peer) in (None, State.LEFT, state):
            return None
        return self._turn(peer, state, "left" if leaving else "finished")

    def lost(self, peer: PeerId, now: float, patience_s: float) -> None:
        """The link to ``peer`` broke: unless news comes, it counts as silent after ``patience_s``."""
        self._near_at.pop(peer, None)
        if peer in self._heard_at:
            self._heard_at[peer] = min(self._heard_at[peer], now - self._patience_s(peer) + patience_s)
            self.look_at = self._far_look_at = min(self.look_at, now)

    def age(self, now: float, lag_s: float = 0.0) -> list[Change]:
        """Who has been silent for too long; ``lag_s`` is our own loop's lateness, which is not their silence."""
        if now - lag_s <= self.look_at:
            return []
        whole = now - lag_s > self._far_look_at
        known = self._heard_at if whole else {p: self._heard_at[p] for p in self._near_at if p in self._heard_at}
        ends = {p: at + self._patience_s(p) for p, at in known.items() if self.states[p] in LIVING}
        late = {p for p, end in ends.items() if now - lag_s > end}
        if whole:
            far = (end for p, end in ends.items() if p not in late and p not in self._near_at)
            self._far_look_at = min(far, default=math.inf)
        self.look_at = min((end for p, end in ends.items() if p not in late), default=math.inf)
        self.look_at = min(self.look_at, self._far_look_at)
        for peer in sorted(late):
            self._note(replace(self.records[peer], silent=True), self.me.peer)
        return [self._silence(p, "nothing was heard of it for too long", now) for p in sorted(late)]

    def news_for(
        self, neighbour: PeerId, carried: Callable[[PeerId, PeerId], bool], side: str | None = None
    ) -> list[Record]:
        """Records that changed since ``neighbour`` was last told, the newest first: our own, and those of peers that
        we have to carry to it, ``carried(peer, teller)``. Costs as much as there is news, not as there are peers.

        Neighbours of one ``side`` are carried the same and gathered for once: they get the very same list.
        """
        if self._gathered_at != self.changes:
            self._gathered_at = self.changes
            self._gathered.clear()
        told, me = self._told.get(neighbour, 0), self.me.peer
        self._told[neighbour] = self.changes
        key = told, neighbour if side is None else side
        news = self._gathered.get(key)
        if news is None:
            news = self._gathered[key] = []
            for peer, number in reversed(self._news.items()):
                if number <= told:
                    break
                teller = self._teller[peer]
                if peer == me or (neighbour not in (peer, teller) and carried(peer, teller)):
                    news.append(self.records[peer])
        return news

    def _silence(self, peer: PeerId, why: str, now: float) -> Change:
        if self.states[peer] is not State.FINISHED:
            self.missed_at = now
        return self._turn(peer, State.SILENT, why)

    def _turn(self, peer: PeerId, state: State, why: str) -> Change:
        before = self.states[peer]
        if before is not state and not (before in COUNTED and state in COUNTED):
            self.shape += 1
        self.states[peer] = state
        if not (before in LIVING and state in LIVING):
            self._live = None
            self.fresh[peer] = None
            self.version += 1
            self.rated += 1
        return Change(peer, state, self.records[peer].incarnation, why)
