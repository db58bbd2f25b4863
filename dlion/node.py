"""One peer: the train loop, the exchange loop, and its life from joining to the last word.

Law: joins all rooms. Does not know whether time is real, what a socket is, which model is trained, or any file: the
loop, the network, the lanes of work and the seed are given to it (the four seams).
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from functools import partial
from typing import Any

import numpy as np

from dlion.company import NODE_KINDS, Company
from dlion.compute import Lane
from dlion.exchange.base import Context, Exchange, Member, Update
from dlion.exchange.pace import Pace, Progress
from dlion.identity import Identity
from dlion.items import Barrier, DrainNow, Fired, Item, Look, MembersChanged, Outcome, Resume, TakeCut
from dlion.journal import Journal, Waits
from dlion.keeper import Keeper
from dlion.lane import Replica
from dlion.learn.trainer import StepResult
from dlion.learn.workload import Ended
from dlion.mesh.topology import Topology
from dlion.net.link import Link
from dlion.net.session import SessionLimits
from dlion.observe.status import State as NodeState
from dlion.seams import Learner, NodeSettings, Seams
from dlion.trainlane import TrainLane
from dlion.wire.admit import Admit, Known
from dlion.wire.limits import Limits

__all__ = ("Learner", "Node", "NodeSettings", "Seams")
FIRST_S = 0.001  # what is left of a step lets the next one begin first: threads share an interpreter
OWN = (Update, Barrier, Resume)  # what the next step waits for until the lane has taken it


class Node:
    """A peer. ``async with Node(...) as node: await node.wait()``; leaving the block drains.

    ``accept`` is the door for incoming links. Nothing runs before ``__aenter__``, nothing is left after ``__aexit__``.
    Raises what the train or the exchange lane raised, and LinkError when no other peer can be reached at all.
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
        self.topology = topology = topology.settled(bridged=exchange.bridged)
        self.settings = s = settings or NodeSettings()
        self.learner, self.seams = learner, seams
        self.pace, self.exchange = pace, exchange
        self.state: NodeState = "starting"
        workload = learner.trainer.workload
        limits = Limits.of(workload.layout.size)
        chance = np.random.SeedSequence([seams.seed, *me.encode()]).spawn(3)
        self.journal = Journal(me, topology, seams.log, lambda: self.now)
        self.meter = self.journal.meter
        session_limits = SessionLimits(
            message_bytes_max=limits.message_bytes_max, unacked_bytes_max=s.unacked_bytes_max, queue_s=s.queue_s
        ).narrowed(s.wan_bytes_per_s)
        self._phase, rng = float(chance[2].generate_state(1)[0]) / 2**32, np.random.default_rng(chance[1])
        self.company = Company(identity, topology, s, seams.dialer, session_limits, rng, self.journal)
        self.company.last_view.size = workload.layout.size * exchange.last_view
        self.membership, self.neighbours = self.company.membership, self.company.neighbours
        self.keeper = Keeper(seams, s.checkpoint_every_s, self.membership, learner)
        self.step, self.meter.samples = self.keeper.begun
        weights = self.keeper.weights
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
            shard=workload.train_size,
        )
        admit = Admit(workload.layout.size, exchange.speaks, NODE_KINDS, exchange.blocks)
        known, cuts = Known(frozenset(topology.peers), frozenset(topology.clouds)), self.keeper.cuts
        self.replica = Replica(exchange, self.ctx, weights, admit, limits, known=known, cuts=cuts)
        exchange.awaited = pace.waits
        if pace.staged:
            self.replica.stage()
        self.company.porch.refusal = lambda: self.replica.newcomers.refusal
        self._lane = TrainLane(
            seams.compute,
            learner.trainer,
            self.replica,
            topology.peers[me].speed,
            lambda: self.now,
            lambda: float(self.keeper.others() + self.meter.samples),
        )
        self._inbox: list[Item] = []
        self._busy = False
        self._own_pending = False
        self._outcome = Outcome()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._stopping, self._leaving, self._changed = "", False, asyncio.Event()

    # -- life ---------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Node:
        self._loop = asyncio.get_running_loop()
        self._zero = self._loop.time() - self.keeper.zero_s
        self._idle: asyncio.Future[None] = self._loop.create_future()
        self._group = asyncio.TaskGroup()
        self._tasks: set[asyncio.Task[None]] = set()
        await self._group.__aenter__()
        self.company.start(self._spawn, self._put, self._changed.set)
        self._life = self._spawn(self._live())
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
                self._stopping = f"{type(error := group.exceptions[0]).__name__}: {error}"
                raise error from None

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
        self.company.close()
        for task in list(self._tasks):
            task.cancel()
        self.seams.compute.close()
        self.journal.close()

    async def wait(self) -> None:
        """Until training and draining are over; what fails is raised by the block, where nothing after this is run."""
        await asyncio.wait([self._life])

    def stop(self, reason: str, *, leaving: bool = True) -> None:
        """End training after the step under way, then drain. ``leaving``: only we go; else everybody finishes now, and
        who is then told to leave as well hurries."""
        if not self._stopping:
            self._stopping, self._leaving = reason, leaving
            self._changed.set()
        elif leaving:
            self.company.patience.hurry()

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
        self.state = "joining"
        await self.company.start_line.gather(lambda: bool(self._stopping), self._change)
        if self.company.porch.under_way and not self._stopping:
            start, stopping = self.keeper.start_over(), lambda: bool(self._stopping)
            entered = await self.company.porch.enter(start, self.settings.start_wait_s, stopping, self._change)
            self.keeper.zero_s, self.step = entered.t, entered.step
        if self.neighbours.connections or not self._stopping:  # else there is nobody to take leave of
            self._begin()
            await self._train()
            await self._drain()
        for task in running:
            task.cancel()
        self.journal.end(self.step, self._stopping, self.seams.compute.overrun)
        self.state = "stopped"

    def _begin(self) -> None:
        """Training time starts now, or goes on from the checkpoint's."""
        self._zero = self._loop.time() - self.keeper.zero_s
        self.state = "training"
        self._put(MembersChanged())
        if self.keeper.resume is not None:
            self._put(Resume(self.keeper.resume))
        self.journal.begin((self.seams.clock or self._loop.time)())
        until_s = self.settings.until_s
        self.company.begin(None if until_s is None else self._zero + until_s)
        self._look()
        if until_s is not None:
            self._timers["~until"] = self._loop.call_at(self._zero + until_s, lambda: self.stop("until", leaving=False))

    async def _change(self) -> None:
        """Until anything happened that a waiting loop should look at."""
        self._changed.clear()
        await self._changed.wait()

    # -- train loop ---------------------------------------------------------------------------------------------

    async def _train(self) -> None:
        batcher = self.learner.batcher
        waits = await self._gate()
        while not self._stopping:
            batcher.members(self.membership.rates)
            batch = batcher.batch(self.now)
            self._note_batch(batch)
            try:
                result, seconds = await self._lane.step(batch)
            except Ended as end:
                self.stop(str(end), leaving=not self._stopping)  # who finishes with the others is in no hurry
                break
            self._stepped(result, seconds, waits)
            batcher.observe(batch, seconds)
            if not self.membership.roster.me.samples_per_s:  # all wait to hear how fast we are
                self._gossip()
            self.step += 1
            waits = await self._gate()

    def _note_batch(self, batch: int) -> None:
        if batch != self.ctx.batch:
            self.ctx.batch = batch
            self.ctx.global_batch = self.learner.batcher.global_batch(self.now)
            self.membership.roster.deal(batch)
            self.journal.batch(batch, self.ctx.global_batch)

    def _stepped(self, result: StepResult, seconds: float, waits: Waits) -> None:
        self.journal.step(self.step, result, seconds, waits)
        self.ctx.step_s = self.meter.step_s
        self._put(Update(self.step, result.values, result.loss, result.samples, result.learning_rate, seconds))

    async def _gate(self) -> Waits:
        """Wait until the next step may start: the lane took our last update, strategy and pace agree."""
        waits = Waits()
        while not self._stopping:
            self.company.porch.check(self.replica.newcomers.unsure)
            applied = self.company.porch.progress(self.replica.applied) if self.pace.waits else {}
            verdict = "wait" if self._own_pending else self.pace.may_start(self.step, Progress(self.step - 1, applied))
            reason = "room" if self._own_pending else "pace" if verdict == "wait" else "strategy"
            if reason == "strategy" and self._outcome.ready:
                if isinstance(verdict, int):
                    self.step = max(self.step, verdict)
                if self.pace.staged and self.step:  # the lane applies what was staged in the finished step, in order
                    self._put(Barrier(self.step - 1))
                    while self._own_pending:
                        await self._change()
                break
            since = self.now
            await self._change()
            setattr(waits, reason, getattr(waits, reason) + self.now - since)
        return waits

    # -- exchange loop ------------------------------------------------------------------------------------------

    def _put(self, item: Item) -> None:
        inbox = self._inbox
        if inbox and type(item) is MembersChanged and type(inbox[-1]) is MembersChanged:
            return
        inbox.append(item)
        self._own_pending = self._own_pending or isinstance(item, OWN)
        if not self._idle.done():
            self._idle.set_result(None)

    async def _exchange(self) -> None:
        """Feed the lane with all that happened since its last batch."""
        while True:
            if not self._inbox:
                self._idle = self._loop.create_future()
                await self._idle
            items, self._inbox = self._inbox, []
            self._busy = True
            self.company.show(self.ctx, self.seams.compute.exchange_s)
            outcome = await self.seams.compute.run(
                Lane.EXCHANGE,
                partial(self.replica.run, items, self.now),
                partial(self._batch_cost_s, len(items)),
            )
            self._busy = False
            self._inbox[:0] = outcome.left
            self._own_pending = bool(self._inbox) and any(isinstance(i, OWN) for i in self._inbox)
            self._perform(outcome)
            self._changed.set()
            if outcome.left:
                await asyncio.sleep(FIRST_S)

    def _batch_cost_s(self, items: int, outcome: Outcome) -> float:
        s = self.settings
        return 4 * outcome.scanned * s.exchange_s_per_byte + (items - len(outcome.left)) * s.exchange_s_per_item

    def _perform(self, outcome: Outcome) -> None:
        company, self._outcome = self.company, outcome
        company.owes, company.lags = outcome.owes, outcome.lags
        for spoken in outcome.sends:
            company.say(*spoken)
        company.want_room()
        for timer in outcome.timers:
            if (old := self._timers.pop(timer.key, None)) is not None:
                old.cancel()
            self._timers[timer.key] = self._loop.call_at(self._zero + timer.at, self._put, Fired(timer.key))
        for event in outcome.events:
            self.journal.write(event)
        for peer, reason in outcome.refused:
            company.refuse(peer, reason)
        for message in outcome.notices:
            company.notice(message)
        company.see_off()
        self.keeper.hand_over(outcome.part)
        company.porch.entered = outcome.entered or company.porch.entered

    def checkpoint(self) -> bool:
        """Start a checkpoint of all peers now; False when it cannot be (not training, or somebody is not there)."""
        if able := self.state == "training" and self.keeper.able:
            self._put(TakeCut())
        return able

    def _look(self) -> None:
        """Show the weights to the observer."""
        if self.seams.observer is not None:
            self._put(Look(partial(self.seams.observer, max(0.0, round(self.now, 6)), self.step)))

    # -- once a period ------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        """Speak of ourselves, age the others, look at batch and weights, write the log; not when all others do."""
        s, due = self.settings, self._loop.time() - self._phase * self.settings.status_every_s
        look_at = self.keeper.zero_s + s.evaluate_every_s
        while True:
            due = max(due + s.status_every_s, self._loop.time())
            await asyncio.sleep(due - self._loop.time())
            lag_s = max(0.0, self._loop.time() - due)
            self.journal.late(lag_s)
            self._gossip()
            self.company.age(lag_s)
            if self.state == "training":
                if self.keeper.due(self.now):
                    self._put(TakeCut())
                if self.now >= look_at:
                    look_at += s.evaluate_every_s * (1 + (self.now - look_at) // s.evaluate_every_s)
                    self._look()
            if self.state != "joining":
                self.journal.links(self.neighbours.connections, s.status_every_s)
            self.journal.flush()

    def _gossip(self) -> None:
        meter = self.meter
        self.company.gossip.beat(
            step=self.step,
            samples=meter.samples,
            samples_per_s=self.learner.batcher.samples_per_s or meter.samples_per_s,
            loss=meter.loss if meter.loss is not None and np.isfinite(meter.loss) else 0.0,
        )

    # -- end ----------------------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        """Flush what is owed, say so, wait until it was heard (and, when all finish, until all said so)."""
        self.state = "draining"
        self.company.rest()
        self._put(DrainNow())
        try:
            async with self.company.patience.while_moving(self._leaving):
                await self._settle()
                while self._outcome.owes or (self.company.farewell.parting and not self._leaving):
                    await self._change()
                await self.company.take_leave(
                    self._leaving, lambda: self._outcome.owes or bool(self._inbox) or self._busy
                )
        except TimeoutError:
            self._stopping += self.company.last_view.lack or " (drain cut short)"
        self._put(Barrier(None))
        if self.keeper.able and not self._leaving and "cut short" not in self._stopping:
            self._put(TakeCut(last=True))
        self._look()
        await self._settle()
        self.company.close()

    async def _settle(self) -> None:
        """Until the lane has taken all that is in the inbox."""
        while self._inbox or self._busy:
            await self._change()
