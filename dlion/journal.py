"""What a node writes down: each thing it does becomes a line of the run log and a count of the meter.

Law: knows events and counters; decides nothing and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from dlion.learn.trainer import StepResult
from dlion.mesh.roster import FEW
from dlion.mesh.topology import Topology
from dlion.messages import PeerId
from dlion.net.connection import Connection
from dlion.observe import runlog
from dlion.observe.meter import Meter
from dlion.observe.runlog import Event, RunLog

VOID_ABOVE = 0.02
"""A run whose machine missed the modelled pace by more than this share says nothing about time."""
REASON_CHARS_MAX = 300
LAGS_PER_EVENT = 10
QUIET_PERIODS = 10
"""From one line about a link that is never full to its next, where there are many."""


@dataclass
class Waits:
    """Seconds the train loop waited before a step, by reason."""

    room: float = 0.0
    strategy: float = 0.0
    pace: float = 0.0

    @property
    def total(self) -> float:
        return self.room + self.strategy + self.pace


class Journal:
    """``now()`` is the node's clock: seconds since training began there."""

    def __init__(self, me: PeerId, topology: Topology, log: RunLog, now: Callable[[], float]) -> None:
        self.meter = Meter()
        self._me = me
        self._topology = topology
        self._log = log
        self._now = now
        self._lags = 0
        self._many = len(topology.peers) > FEW
        self._periods = 0
        self._stood: dict[PeerId, tuple[float, bool]] = {}
        """How long each link had been full, and whether it was up, in the last line about it."""

    def write(self, event: Event) -> None:
        self._log.write(event)

    def flush(self) -> None:
        self._log.flush()

    def close(self) -> None:
        self._log.close()

    def begin(self, clock_s: float) -> None:
        self._log.write(runlog.Begin(t=self._now(), clock_s=round(clock_s, 6)))

    def batch(self, size: int, global_size: int) -> None:
        self._log.write(runlog.Batch(t=self._now(), size=size, global_size=global_size))

    def step(self, number: int, result: StepResult, seconds: float, waits: Waits) -> None:
        self.meter.step(result.loss, result.samples, seconds, waits.total)
        self._log.write(
            runlog.Step(
                t=self._now(),
                n=number,
                loss=result.loss if np.isfinite(result.loss) else None,
                samples=result.samples,
                lr=result.learning_rate,
                seconds=round(seconds, 6),
                epoch=result.cursor.epoch,
                position=result.cursor.position,
                waited=runlog.Waited(round(waits.pace, 6), round(waits.strategy, 6), round(waits.room, 6)),
            )
        )

    def sent(self, to: PeerId, seq: int, nbytes: int, kind: str, entries: int, budget_bytes: int) -> None:
        """``seq`` 0: there was no session to take it."""
        self.meter.sent(to, nbytes, entries, kind)
        if seq and kind[0] != "~":
            self._log.write(
                runlog.Send(
                    t=self._now(),
                    to=to,
                    seq=seq,
                    kind=kind,
                    budget=budget_bytes,
                    entries=entries,
                    bytes=nbytes,
                    wan=not self._topology.lan(self._me, to),
                )
            )

    def late(self, seconds: float) -> None:
        """The loop was that late for its period; told now and then, and never where a clock cannot be late."""
        self.meter.lag(seconds)
        self._lags += 1
        if self._lags % LAGS_PER_EVENT == 0 and (p99 := self.meter.lag_p99_s) > 0:
            self._log.write(runlog.Lag(t=self._now(), p99=round(p99, 6)))

    def member(self, peer: PeerId, state: str, why: str, incarnation: int = 0) -> None:
        why = why[:REASON_CHARS_MAX]
        self._log.write(runlog.Member(t=self._now(), peer=peer, state=state, incarnation=incarnation, why=why))

    def refused(self, peer: PeerId, reason: str) -> None:
        """``peer`` may be anybody's claim: only names of the topology are counted as such."""
        peer, reason = peer if peer in self._topology.peers else PeerId("?"), reason[:REASON_CHARS_MAX]
        self.meter.refused(peer, reason)
        self._log.write(runlog.Refuse(t=self._now(), peer=peer, reason=reason))

    def links(self, connections: Mapping[PeerId, Connection], interval_s: float) -> None:
        """A line about each link; where there are many, now and then about those that are as they were."""
        self._periods += 1
        calm = self._many and self._periods % QUIET_PERIODS > 0
        for peer, connection in connections.items():
            stands = connection.full_s, connection.connected
            if calm and self._stood.get(peer) == stands:
                continue
            self._stood[peer] = stands
            session = connection.session
            self._log.write(
                runlog.Link(
                    t=self._now(),
                    peer=peer,
                    up=stands[1],
                    rate_bps=round(connection.rate_bps, 1),
                    available_bps=self.available_bps(peer),
                    rtt_s=round(connection.rtt_s, 6),
                    unacked=session.unacked_bytes,
                    queued=session.queued_bytes,
                    sent_bytes=session.sent_bytes,
                    acked_bytes=session.acked_bytes,
                    saturated=round(self.meter.saturated(peer, stands[0], interval_s), 3),
                    shown_bytes=session.estimate.shown_bytes,
                    shown_s=round(session.estimate.shown_s, 6),
                )
            )

    def available_bps(self, peer: PeerId) -> float | None:
        """What the topology gives the link to ``peer`` now."""
        link = self._topology.links.get((self._me, peer))
        if link is None or not link.resources:
            return None
        return min(self._topology.resources[name].rate.at(max(self._now(), 0.0)) for name in link.resources)

    def end(self, steps: int, reason: str, overrun: float) -> None:
        self._log.write(
            runlog.End(t=self._now(), steps=steps, reason=reason, overrun=round(overrun, 4), void=overrun > VOID_ABOVE)
        )
        self._log.flush()
