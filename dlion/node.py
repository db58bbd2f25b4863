"""One peer: the train loop, the exchange loop, and what happens when somebody comes, falls silent or leaves.

Law: joins all rooms. Does not know whether time is real, what a socket is, which model is trained, or any file: the
loop, the network, the lanes of work and the seed are given to it (the four seams).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from dlion.compute import Compute, Lane
from dlion.exchange.base import Context, Exchange, Member, Update
from dlion.exchange.pace import Pace, Progress
from dlion.farewell import DONE_FIELDS, Farewell
from dlion.lane import Barrier, DrainNow, Fired, Heard, Item, Look, MembersChanged, Outcome, Replica, Writable
from dlion.learn.batching import Batcher
from dlion.learn.trainer import StepResult, Trainer
from dlion.membership import Membership
from dlion.mesh.roster import STATUS_FIELDS, Change, Record, State, record_of
from dlion.mesh.topology import Topology
from dlion.messages import Message, PeerId, Stream
from dlion.neighbours import DialSettings, Identity, Neighbours
from dlion.net.link import Dialer, Link
from dlion.net.session import SessionLimits
from dlion.observe import runlog
from dlion.observe.meter import Meter
from dlion.observe.runlog import RunLog
from dlion.observe.status import State as NodeState
from dlion.tensors import Flat
from dlion.wire.admit import Admit
from dlion.wire.codec import encode
from dlion.wire.limits import Limits

NODE_KINDS = {"~status": STATUS_FIELDS, "~done": DONE_FIELDS, "~bye": {}, "~refused": {"reason": str}}
"""What nodes say to each other beside their strategies."""

VOID_ABOVE = 0.02
"""A run whose machine missed the modelled pace by more than this share says nothing about time."""


@dataclass(frozen=True)
class NodeSettings:
    """Limits and periods."""

    until_s: float | None = None
    """Training time after which everybody finishes; None: until stopped."""
    status_every_s: float = 1.0
    evaluate_every_s: float = 5.0
    suspect_after_s: float = 5.0
    lost_after_s: float = 2.0
    """A neighbour whose link is lost and cannot be dialled again counts as silent after this."""
    start_wait_s: float = 60.0
    """How long to wait for all neighbours before training starts without the missing."""
    drain_s: float = 20.0
    refusals_max: int = 16
    """Inadmissible messages from one peer before it is quarantined."""
    unacked_bytes_max: int = 64 << 20
    queue_s: float = 0.09
    exchange_s_per_byte: float = 1e-9
    exchange_s_per_item: float = 2e-5
    """Modelled cost of the exchange lane, per byte read or written and per item (simulation only)."""
    dial: DialSettings = DialSettings()


@dataclass(frozen=True)
class Seams:
    """What differs between a real and a simulated node (the fourth is the running event loop)."""

    dialer: Dialer
    compute: Compute
    seed: int
    log: RunLog
    observer: Callable[[float, int, Flat, Flat], Iterable[runlog.Event]] | None = None
    """Called in the exchange lane with (t, step, view, replica) every ``evaluate_every_s``; keeps neither."""


@dataclass(frozen=True)
class Learner:
    """What this peer computes, and with how many samples a step."""

    trainer: Trainer
    batcher: Batcher


@dataclass
class Waits:
    """Seconds the train loop waited before a step, by reason."""

    room: float = 0.0
    strategy: float = 0.0
    pace: float = 0.0

    @property
    def total(self) -> float:
        return self.room + self.strategy + self.pace


class Node:
    """A peer. ``async with Node(...) as node: await node.wait()``; leaving the block drains.

    ``accept`` is the door for incoming links. Nothing runs before ``__aenter__``, nothing is left after ``__aexit__``.
    Raises what the train or the exchange lane raised.
    """

    def __init__(
        self,
        identity: Identity,
        topology: Topology,
        learner: Learner,
        exchange: Exchange,
        pace: Pace,
        seams: Seams,
        settings: NodeSettings | None = None,
    ) -> None:
        self.identity = identity
        self.me = me = identity.peer
        self.topology = topology
        self.settings = s = settings or NodeSettings()
        self.learner, self.seams = learner, seams
        self.pace, self.exchange = pace, exchange
        self.step = 0
        self.state: NodeState = "starting"
        self.meter = Meter()
        self.membership = Membership(Record(me, identity.incarnation), topology, s.suspect_after_s)
        workload = learner.trainer.workload
        limits = Limits.of(workload.layout.size)
        chance = np.random.SeedSequence([seams.seed, *me.encode()]).spawn(2)
        weights = workload.initial(seams.seed).flat.copy()
        readonly = weights.view()
        readonly.flags.writeable = False
        self.ctx = Context(
            me=me,
            cloud=topology.cloud_of(me),
            layout=workload.layout,
            weights=readonly,
            rng=np.random.default_rng(chance[0]),
            routes=self.membership.plan.routes(me),
            members={me: Member(me, topology.cloud_of(me))},
        )
        admit = Admit(workload.layout.size, exchange.speaks, NODE_KINDS)
        self.replica = Replica(exchange, self.ctx, weights, admit, limits)
        if pace.staged:
            self.replica.stage()
        session_limits = SessionLimits(
            message_bytes_max=limits.message_bytes_max, unacked_bytes_max=s.unacked_bytes_max, queue_s=s.queue_s
        )
        self.neighbours = Neighbours(
            identity,
            topology.peers,
            self,
            seams.dialer,
            session_limits,
            s.dial,
            np.random.default_rng(chance[1]),
        )
        self.farewell = Farewell(me, self._tell, self.membership.onward)
        self._log = seams.log
        self._snapshot = np.empty_like(weights)
        self._inbox: list[Item] = []
        self._busy = False
        self._own_pending = 0
        self._outcome = Outcome()
        self._refusals: dict[PeerId, int] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._stopping = ""
        self._leaving = False

    # -- life ---------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Node:
        self._loop = asyncio.get_running_loop()
        self._zero = self._loop.time()
        self._work, self._changed, self._finished = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._group = asyncio.TaskGroup()
        self._tasks: set[asyncio.Task[None]] = set()
        await self._group.__aenter__()
        self.neighbours.start(self._spawn)
        self._spawn(self._live())
        return self

    async def __aexit__(self, *failure: Any) -> None:
        try:
            if failure[0] is None:
                self.stop("closed")
                await self.wait()
        finally:
            self._close()
            try:
                await self._group.__aexit__(*failure)
            except BaseExceptionGroup as group:
                raise group.exceptions[0] if len(group.exceptions) == 1 else group from None

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _close(self) -> None:
        """Leave no task, timer, thread or link of ours."""
        self.state = "stopped"
        for handle in self._timers.values():
            handle.cancel()
        self.neighbours.close()
        for task in list(self._tasks):
            task.cancel()
        self.seams.compute.close()
        self._log.close()

    async def wait(self) -> None:
        """Until training and draining are over."""
        await self._finished.wait()

    def stop(self, reason: str, *, leaving: bool = True) -> None:
        """End training after the step under way, then drain. ``leaving``: only we go; else everybody finishes now."""
        if not self._stopping:
            self._stopping, self._leaving = reason, leaving
            self._changed.set()

    @property
    def ended(self) -> str:
        """Why training ended; empty while it runs."""
        return self._stopping

    def accept(self, link: Link) -> None:
        self.neighbours.accept(link)

    @property
    def now(self) -> float:
        """Seconds since training began here."""
        return self._loop.time() - self._zero

    async def _live(self) -> None:
        running = [self._spawn(self._tick()), self._spawn(self._exchange())]
        await self._gather()
        await self._train()
        await self._drain()
        for task in running:
            task.cancel()
        overrun = self.seams.compute.overrun
        self._log.write(
            runlog.End(
                t=self.now, steps=self.step, reason=self._stopping, overrun=round(overrun, 4), void=overrun > VOID_ABOVE
            )
        )
        self._log.flush()
        self.state = "stopped"
        self._finished.set()

    async def _gather(self) -> None:
        """Wait for all neighbours, at most ``start_wait_s``; then training starts and newcomers are refused."""
        self.state = "joining"
        wanted = self.membership.neighbours
        self.neighbours.want(wanted)
        try:
            async with asyncio.timeout(self.settings.start_wait_s):
                while not self._stopping and not all(map(self.neighbours.connected, wanted)):
                    await self._change()
        except TimeoutError:
            pass
        self.neighbours.open_to_new = False
        self._zero = self._loop.time()
        self.state = "training"
        self.membership.start()
        self._put(MembersChanged())
        self._look()
        if self.settings.until_s is not None:
            end = partial(self.stop, "until", leaving=False)
            self._timers["~until"] = self._loop.call_later(self.settings.until_s, end)

    # -- train loop ---------------------------------------------------------------------------------------------

    async def _train(self) -> None:
        batcher, compute = self.learner.batcher, self.seams.compute
        waits = await self._gate()
        while not self._stopping:
            batch = batcher.batch(self.now)
            self._note_batch(batch)
            started = self.now
            result = await compute.run(
                Lane.TRAIN, partial(self._compute, batch), partial(self._step_cost_s, batch, started)
            )
            seconds = self.now - started
            self._stepped(result, seconds, waits)
            batcher.observe(batch, seconds)
            self.step += 1
            waits = await self._gate()

    def _compute(self, batch: int) -> StepResult:
        """In the train lane: snapshot, gradient, optimizer."""
        self.replica.snapshot_into(self._snapshot)
        others = self.membership.samples - self.membership.roster.me.samples
        return self.learner.trainer.step(self._snapshot, batch, float(others + self.meter.samples))

    def _step_cost_s(self, batch: int, started: float, _: StepResult) -> float:
        speed = self.topology.peers[self.me].speed
        return 0.0 if speed is None else speed.seconds(batch, started)

    def _note_batch(self, batch: int) -> None:
        if batch != self.ctx.batch:
            self.ctx.batch = batch
            self.ctx.global_batch = self.learner.batcher.global_batch(self.now)
            self.membership.roster.speak(batch=batch)
            self._log.write(runlog.Batch(t=self.now, size=batch, global_size=self.ctx.global_batch))

    def _stepped(self, result: StepResult, seconds: float, waits: Waits) -> None:
        self.meter.step(result.loss, result.samples, seconds, waits.total)
        self.ctx.step_s = self.meter.step_s
        self._log.write(
            runlog.Step(
                t=self.now,
                n=self.step,
                loss=result.loss if np.isfinite(result.loss) else None,
                samples=result.samples,
                lr=result.learning_rate,
                seconds=round(seconds, 6),
                epoch=result.cursor.epoch,
                position=result.cursor.position,
                waited=runlog.Waited(round(waits.pace, 6), round(waits.strategy, 6), round(waits.room, 6)),
            )
        )
        self._own_pending += 1
        self._put(Update(self.step, result.values, result.loss, result.samples, result.learning_rate, seconds))

    async def _gate(self) -> Waits:
        """Wait until the next step may start: the lane took our last update, strategy and pace agree."""
        waits = Waits()
        while not self._stopping:
            verdict = self.pace.may_start(self.step, self._progress())
            reason = "room" if self._own_pending else "pace" if verdict == "wait" else "strategy"
            if reason == "strategy" and self._outcome.ready:
                if isinstance(verdict, int):
                    self.step = max(self.step, verdict)
                if self.pace.staged and self.step:
                    await self._barrier()
                break
            since = self.now
            await self._change()
            setattr(waits, reason, getattr(waits, reason) + self.now - since)
        return waits

    def _progress(self) -> Progress:
        applied = self.replica.applied
        return Progress(self.step - 1, {p: applied.get(p, -1) for p in self.membership.roster.live if p != self.me})

    async def _barrier(self) -> None:
        """Have the lane apply the staged additions of the finished step, in order."""
        self._own_pending += 1
        self._put(Barrier(self.step - 1))
        while self._own_pending:
            await self._change()

    # -- exchange loop ------------------------------------------------------------------------------------------

    def _put(self, item: Item) -> None:
        self._inbox.append(item)
        self._work.set()

    async def _exchange(self) -> None:
        """Feed the lane with all that happened since its last batch."""
        s = self.settings
        while True:
            await self._work.wait()
            self._work.clear()
            items, self._inbox = self._inbox, []
            self._busy = True
            self._show()
            outcome = await self.seams.compute.run(
                Lane.EXCHANGE,
                partial(self.replica.run, items, self.now),
                lambda o: 4 * o.scanned * s.exchange_s_per_byte + len(items) * s.exchange_s_per_item,
            )
            self._busy = False
            self._own_pending -= sum(isinstance(i, Update | Barrier) for i in items)
            self._perform(outcome)
            self._changed.set()

    def _show(self) -> None:
        """The strategy's picture of members and links, brought up to date while its lane rests."""
        connections = self.neighbours.connections
        self.membership.show(self.ctx, connections)
        for peer, view in self.ctx.links.items():
            connection = connections[peer]
            view.rate_bps, view.rtt_s = connection.rate_bps, connection.rtt_s
            view.writable_bytes = connection.writable_bytes

    def _perform(self, outcome: Outcome) -> None:
        self._outcome = outcome
        for to, body, message in outcome.sends:
            self._say(to, body, message)
        for timer in outcome.timers:
            if (old := self._timers.pop(timer.key, None)) is not None:
                old.cancel()
            self._timers[timer.key] = self._loop.call_at(self._zero + timer.at, self._put, Fired(timer.key))
        for event in outcome.events:
            self._log.write(event)
        for peer, reason in outcome.refused:
            self._refuse(peer, reason)
        for message in outcome.notices:
            self._notice(message)

    def _say(self, to: tuple[PeerId, ...], body: bytes, message: Message) -> None:
        """Hand an encoded message to sessions; never waits."""
        entries = sum(block.count for block in message.blocks)
        for peer in to:
            seq = self.neighbours.send(peer, message.stream, body)
            wan = not self.topology.lan(self.me, peer)
            self.meter.sent(peer, len(body), entries, message.kind, wan)
            if seq and message.kind[0] != "~":
                self._log.write(
                    runlog.Send(
                        t=self.now, to=peer, seq=seq, kind=message.kind, entries=entries, bytes=len(body), wan=wan
                    )
                )

    def _tell(self, to: tuple[PeerId, ...], message: Message) -> None:
        """Say one of the node's own kinds."""
        if not message.origin:
            message = Message(message.kind, fields=message.fields, stream=message.stream, origin=self.me)
        self._say(to, encode(message), message)

    async def _change(self) -> None:
        """Until anything happened that a waiting loop should look at."""
        self._changed.clear()
        await self._changed.wait()

    # -- what neighbours do (neighbours.Listener) ---------------------------------------------------------------

    def heard(self, peer: PeerId, stream: int, seq: int, body: bytes | memoryview) -> None:
        self.meter.received(peer, len(body))
        self._put(Heard(peer, stream, seq, body))

    def writable(self, peer: PeerId) -> None:
        self._put(Writable(peer))

    def up(self, peer: PeerId, incarnation: int) -> None:
        self._turn(self.membership.roster.alive(peer, incarnation, self._loop.time()))
        self.membership.roster.version += 1
        self._put(MembersChanged())

    def down(self, peer: PeerId, reason: str) -> None:
        self.membership.roster.lost(peer, self._loop.time(), self.settings.lost_after_s)
        self._log.write(runlog.Member(t=self.now, peer=peer, state="link lost", incarnation=0, why=reason))

    def refused(self, peer: PeerId, reason: str) -> None:
        self.meter.refused(peer, reason)
        self._log.write(runlog.Refuse(t=self.now, peer=peer, reason=reason))

    def _refuse(self, peer: PeerId, reason: str) -> None:
        """An inadmissible message: counted, attributed, told to its sender; too many quarantine the sender."""
        self.refused(peer, reason)
        self._refusals[peer] = self._refusals.get(peer, 0) + 1
        if self._refusals[peer] < self.settings.refusals_max:
            self._tell((peer,), Message("~refused", fields={"reason": reason[:200]}, stream=Stream.CONTROL))
        else:
            self._refusals[peer] = 0
            self.neighbours.quarantine(peer, f"{self.settings.refusals_max} inadmissible messages, last: {reason}")

    def _notice(self, message: Message) -> None:
        match message.kind:
            case "~status":
                try:
                    self._turn(self.membership.roster.hear(record_of(message.fields), self._loop.time()))
                except ValueError as error:
                    self._refuse(message.hop, str(error))
            case "~done":
                if (last := self.farewell.hear(message)) is not None:
                    self._turn(self.membership.roster.finished(*last))
                    self._pass_on()
            case "~bye":
                self.farewell.bye(message.hop)
            case "~refused":
                self.refused(message.hop, f"it refused ours: {message.fields['reason']}")

    def _turn(self, change: Change | None) -> None:
        """Somebody's state changed."""
        if change is None:
            return
        peer, state = change.peer, change.state
        self._log.write(
            runlog.Member(t=self.now, peer=peer, state=state, incarnation=change.incarnation, why=change.why)
        )
        if state is State.LEFT:
            self.neighbours.forget(peer)
        self.membership.changed()
        if self.state in ("joining", "training"):
            self.neighbours.want(self.membership.neighbours)
        self._put(MembersChanged())
        self._changed.set()

    # -- once a period ------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        """Speak of ourselves, age the others, look at batch and weights, write the log."""
        s, roster, due = self.settings, self.membership.roster, self._loop.time()
        look_at = s.evaluate_every_s
        while True:
            due = max(due + s.status_every_s, self._loop.time())
            await asyncio.sleep(due - self._loop.time())
            lag_s = max(0.0, self._loop.time() - due)
            self.meter.lag(lag_s)
            self._gossip()
            for change in roster.age(self._loop.time(), lag_s):
                self._turn(change)
            if self.state == "training":
                self.learner.batcher.members(self.membership.rates)
                if self.now >= look_at:
                    look_at += s.evaluate_every_s
                    self._look()
            if self.state != "joining":
                self._log_links()
            self._log.flush()

    def _gossip(self) -> None:
        """Tell each neighbour our own record, and those that it hears only through us."""
        meter, roster = self.meter, self.membership.roster
        roster.speak(
            step=self.step,
            samples=meter.samples,
            samples_per_s=self.learner.batcher.samples_per_s or meter.samples_per_s,
            loss=meter.loss if meter.loss is not None and np.isfinite(meter.loss) else 0.0,
        )
        for peer, connection in self.neighbours.connections.items():
            if connection.connected:
                for record in roster.news_for(peer, self.membership.subjects(peer)):
                    self._tell((peer,), Message("~status", fields=record.fields(), stream=Stream.CONTROL))

    def _look(self) -> None:
        """Show the weights to the observer."""
        if self.seams.observer is not None:
            self._put(Look(partial(self.seams.observer, max(0.0, round(self.now, 6)), self.step)))

    def _log_links(self) -> None:
        for peer, connection in self.neighbours.connections.items():
            session = connection.session
            self._log.write(
                runlog.Link(
                    t=self.now,
                    peer=peer,
                    up=connection.connected,
                    rate_bps=round(connection.rate_bps, 1),
                    available_bps=self.available_bps(peer),
                    rtt_s=round(connection.rtt_s, 6),
                    unacked=session.unacked_bytes,
                    queued=session.queued_bytes,
                    sent_bytes=session.sent_bytes,
                    acked_bytes=session.acked_bytes,
                    saturated=round(self.meter.saturated(peer, connection.full_s, self.settings.status_every_s), 3),
                )
            )

    def available_bps(self, peer: PeerId) -> float | None:
        """What the topology gives the link to ``peer`` now."""
        link = self.topology.links.get((self.me, peer))
        if link is None or not link.resources:
            return None
        return min(self.topology.resources[name].rate.at(max(self.now, 0.0)) for name in link.resources)

    # -- end ----------------------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        """Flush what is owed, say so, wait until it was heard (and, when all finish, until all said so)."""
        self.state = "draining"
        self._put(DrainNow())
        try:
            async with asyncio.timeout(self.settings.drain_s):
                await self._settle()
                while self._outcome.owes:
                    await self._change()
                self.farewell.say(self._leaving)
                self._pass_on()
                while not self._all_said():
                    await asyncio.sleep(0.02)
        except TimeoutError:
            self._stopping += " (drain cut short)"
        self._look()
        await self._settle()
        self.neighbours.close()

    async def _settle(self) -> None:
        """Until the lane has taken all that is in the inbox."""
        while self._inbox or self._busy:
            await self._change()

    def _pass_on(self) -> None:
        """Last words go on behind what they must not overtake."""
        if not self._outcome.owes:
            self.farewell.pass_on()

    def _all_said(self) -> bool:
        self._pass_on()
        live, connections = self.membership.roster.live, self.neighbours.connections
        near = [
            p
            for p in self.membership.neighbours
            if p in connections and (connections[p].connected or not self.farewell.finished(p))
        ]
        return (
            not (self._outcome.owes or self._inbox or self._busy)
            and all(connections[p].session.idle for p in near)
            and self.farewell.complete(near, live, self._leaving)
        )
