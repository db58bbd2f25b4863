"""The exchange lane: runs the strategy, and is the only writer of the replica.

Law: synchronous; runs on one thread, a batch of things that happened at a time, and returns what is to be done on the
loop. Decoding, admission, hooks, selection, encoding and additions happen here; sockets, timers and tasks do not.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import numpy as np
from msgspec.structs import replace

from dlion.blocks import Block, dense
from dlion.cut import MARK, Cuts, Part, first_of, frozen, life_of
from dlion.exchange.base import Action, Add, Context, Exchange, Send, Timer, Update
from dlion.items import (
    Barrier,
    Conclude,
    DrainNow,
    Enter,
    Fired,
    Heard,
    Item,
    Look,
    MembersChanged,
    Outcome,
    Renewed,
    Rest,
    Resume,
    Spoken,
    TakeCut,
    Writable,
)
from dlion.lastview import FINAL
from dlion.messages import Message, PeerId, Stream
from dlion.newcomers import NEWCOMER_KINDS, Newcomers
from dlion.observe.runlog import Apply, Member, Refuse
from dlion.once import Once
from dlion.tensors import Flat, add_scaled
from dlion.wire.admit import Admit, Known, stranger
from dlion.wire.codec import Malformed, decode, encode
from dlion.wire.limits import Limits


class Diverged(ArithmeticError):  # noqa: N818 - what happened to the user
    """The peer's own update is not finite."""


class Replica:
    """The weights and the strategy that changes them. ``run`` is called in the exchange lane only.

    ``known``: whose updates may be heard (None: anybody's).
    """

    def __init__(
        self,
        exchange: Exchange,
        ctx: Context,
        weights: Flat,
        admit: Admit,
        limits: Limits,
        *,
        known: Known | None = None,
        cuts: Cuts | None = None,
    ) -> None:
        self.exchange = exchange
        self.ctx = ctx
        self.applied: dict[PeerId, int] = {}
        """Last step of each origin whose update was heard here."""
        self.staleness_max = 0
        self._weights = weights
        self._mutex = threading.Lock()
        self._admit = admit
        self._limits = limits
        self._known = known
        self._once = Once()
        self._staged: list[tuple[Add, int]] | None = None
        self._draining = self._concluded = False
        self._stepping = False
        """A step is under way: its snapshot is taken, its update did not come to this lane yet."""
        self._samples = 0
        self._timers: dict[str, float] = {}
        self._cuts = cuts or Cuts()
        self.newcomers = Newcomers(exchange, ctx, self._forget, self._become, lambda: self._cuts.newest)
        exchange.setup(ctx)

    def stage(self) -> None:
        """Hold additions back until a ``Barrier`` (lockstep); sums of several steps have no place in its order."""
        self.exchange.sums = self.exchange.ahead = False
        self._staged = []
        self.newcomers.staged = True

    def snapshot_into(self, buffer: Flat) -> None:
        """Copy the weights as they are between two additions; the one thing other lanes may do with them."""
        with self._mutex:
            np.copyto(buffer, self._weights)
            self._stepping = True

    def run(self, items: list[Item], now: float) -> Outcome:
        """Handle ``items`` in order at time ``now`` (seconds since the run began), or the first of them: the others
        are ``left``."""
        self.ctx.now = now
        outcome = Outcome()
        for number, item in enumerate(items, 1):
            if (rest := self._handle(item, outcome)) is not None:
                outcome.left = [rest, *items[number:]]
                break
        if self._draining and not outcome.left and not self._concluded:
            self._perform(self.exchange.drain(self.ctx), outcome)
            outcome.owes = self.exchange.owes(self.ctx)
        outcome.ready, outcome.lags = self.exchange.ready(self.ctx.step, self.ctx), self.exchange.lags(self.ctx)
        if why := self._cuts.give_up(now, self.ctx.links):
            outcome.events.append(Refuse(t=now, peer=self.ctx.me, reason=why))
        outcome.part = self._cuts.done()
        outcome.entered, self.newcomers.entered = self.newcomers.entered, None
        return outcome

    def _handle(self, item: Item, outcome: Outcome) -> Rest | None:
        """Returns what is left of it, to be handled before anything else is."""
        ctx, exchange = self.ctx, self.exchange
        match item:
            case Heard():
                self._hear(item, outcome)
                self._cuts.count(item.hop, item.stream)
            case Update() | Rest():
                return self._step(item, outcome)
            case Writable():
                if (link := ctx.links.get(item.peer) or ctx.former.get(item.peer)) is not None:
                    self._perform(exchange.on_writable(link, ctx), outcome)
            case Fired():
                self._timers.pop(item.key, None)
                self._perform(exchange.on_timer(item.key, ctx), outcome)
            case MembersChanged():
                self._perform(exchange.on_members(ctx), outcome)
                self._perform(self.newcomers.look(), outcome)
            case Barrier():
                self._commit(item.step, outcome)
            case DrainNow():
                self._draining = True
            case Look():
                outcome.events.extend(item.observer(exchange.view(ctx.weights), ctx.weights))
            case TakeCut():
                self._take_cut(item, outcome)
            case Resume():
                self._resume(item.part, outcome)
            case Enter() | Renewed() | Conclude():
                self._turn(item, outcome)
        return None

    def _step(self, item: Update | Rest, outcome: Outcome) -> Rest | None:
        """Add an own update; all the rest too, unless the strategy says that the next step need not wait for it."""
        if isinstance(item, Update):
            self._check(item)
            self._hand_over(item)
            item = Rest(iter(self.exchange.after_step(item, self.ctx)), item.step)
            for action in item.actions if self.exchange.ahead else ():
                self._perform((action,), outcome)
                if isinstance(action, Add) and action.coverage:
                    return item
        self._perform(item.actions, outcome)
        self.ctx.step = item.step + 1
        return None

    def _hear(self, item: Heard, outcome: Outcome) -> None:
        try:
            message = decode(item.body, self._limits, hop=item.hop, seq=item.seq)
        except Malformed as error:
            outcome.refused.append((item.hop, f"malformed: {error}"))
            return
        message = self.newcomers.unwrap(message)
        reason = self._admit.check(message)
        if reason is None and int(message.stream) != item.stream:
            reason = "said on another stream than it claims"
        reason = reason or stranger(message, self._known)
        if reason is not None:
            outcome.refused.append((item.hop, reason))
            return
        if self.newcomers.deaf(message) or (self._concluded and not message.kind.startswith("~")):
            return
        if message.kind.startswith("~"):
            self._hear_node(message, item, outcome)
            return
        self._cuts.hear(item.hop, item.stream, item.seq, item.body)
        if message.kind in self.exchange.additive and self._once.again(message):
            who, first, last = message.coverage[0]
            why = f"duplicate: {who}'s steps {first} to {last} came over another route"
            outcome.events.append(Refuse(t=self.ctx.now, peer=item.hop, reason=why))
            return
        self._perform(self.newcomers.pass_on(message), outcome)
        for origin, _, last in message.coverage:
            if last > self.applied.get(origin, -1):
                self.applied[origin] = last
        self._perform(self.exchange.on_message(message.origin, message, self.ctx), outcome)

    def _hear_node(self, message: Message, item: Heard, outcome: Outcome) -> None:
        """One of the node's own kinds."""
        if message.kind == MARK:
            self._marked(message, item, outcome)
            return
        if message.kind in NEWCOMER_KINDS:
            try:
                self._perform(self.newcomers.hear(message), outcome)
            except ValueError as error:
                outcome.refused.append((item.hop, str(error)))
                return
        leaves = message.kind == "~done" and message.fields["leaving"] and message.fields["peer"] == item.hop
        if leaves and (link := self.ctx.links.get(item.hop)) is not None:
            self._perform(self.exchange.on_leave(link, self.ctx), outcome)  # goes before our goodbye
        outcome.notices.append(message)

    def _perform(self, actions: Iterable[Action], outcome: Outcome) -> None:
        for action in actions:
            match action:
                case Send():
                    self._send(action, outcome)
                case Add():
                    if self._staged is None:
                        self._add(action, self.ctx.step, outcome)
                    else:
                        self._staged.append((action, self.ctx.step))
                case Timer():
                    self._timers[action.key] = action.at
                    outcome.timers.append(action)
                case _:
                    raise TypeError(f"{self.exchange.name}: a hook yields {action!r}, none of Send, Add, Timer")

    def _send(self, action: Send, outcome: Outcome) -> None:
        message, ctx = action.message, self.ctx
        if not message.origin:
            message = replace(message, origin=ctx.me)
        body = encode(message)
        for peer in action.to if message.stream is not Stream.CONTROL else ():
            if (link := ctx.links.get(peer) or ctx.former.get(peer)) is not None:
                link.writable_bytes = max(0, link.writable_bytes - len(body))
        self._cuts.said(action.to, message.stream)
        outcome.sends.append(Spoken(action.to, body, message, action.budgets_bytes))
        outcome.scanned += sum(block.scanned for block in message.blocks)

    def _add(self, action: Add, mine: int, outcome: Outcome) -> None:
        values = action.values
        with self._mutex:
            if isinstance(values, Block):
                values.add_to(self._weights, action.scale)
                outcome.scanned += values.count
            else:
                add_scaled(self._weights, values, action.scale)
                outcome.scanned += values.size
        if (message := action.message) is not None:
            entries = values.count if isinstance(values, Block) else values.size
            self.staleness_max = max(self.staleness_max, mine - 1 - message.step)
            outcome.events.append(
                Apply(
                    t=self.ctx.now,
                    origin=message.origin,
                    hop=message.hop,
                    seq=message.seq,
                    step=message.step,
                    mine=mine,
                    entries=entries,
                )
            )

    def _commit(self, step: int | None, outcome: Outcome) -> None:
        """Apply staged additions of steps up to ``step`` (None: all), ordered by step and origin: the same sums
        in the same order on every peer."""
        if self._staged is None:
            return
        staged, self._staged = self._staged, []

        def order(entry: tuple[Add, int]) -> tuple[int, str]:
            spans = entry[0].coverage
            return (spans[0].last, spans[0].origin) if spans else (-1, "")

        for add, mine in sorted(staged, key=order):
            if step is None or order((add, mine))[0] <= step:
                self._add(add, mine, outcome)
            else:
                self._staged.append((add, mine))

    def _check(self, update: Update) -> None:
        if not (np.isfinite(update.loss) and np.isfinite(np.dot(update.values, update.values))):
            raise Diverged(
                f"step {update.step}: the loss is {update.loss:g} and the update is not finite; "
                "lower train.learning_rate or check the data"
            )

    def _conclude(self, item: Conclude, outcome: Outcome) -> None:
        """Our replica is as it will stay: the first peer's view, or we are the first."""
        ctx, exchange, message, self._concluded = self.ctx, self.exchange, item.message, True
        if message is None:
            message = Message(FINAL, ctx.step, blocks=(dense(exchange.view(ctx.weights)),), stream=Stream.BULK)
        else:
            view, before = np.zeros_like(self._weights), exchange.view(ctx.weights).copy()
            message.blocks[0].add_to(view)
            for add in exchange.conclude(view, ctx):
                self._add(add, ctx.step, outcome)
            far = np.linalg.norm(view - before) / (np.linalg.norm(view) or 1.0)
            why = f"its view is everybody's in the end; ours was {far:.1e} of its norm away"
            outcome.events.append(Member(t=ctx.now, peer=message.origin, state="concluded", incarnation=0, why=why))
        self._send(Send(item.to, message), outcome)

    # -- newcomers ----------------------------------------------------------------------------------------------

    def _turn(self, item: Enter | Renewed | Conclude, outcome: Outcome) -> None:
        """A new life begins, ours or another's; or the run is over."""
        if isinstance(item, Conclude):
            self._conclude(item, outcome)
        elif isinstance(item, Renewed):
            self._forget(item.peer)
        else:
            self._become(item.start, 0, 0)
            self.newcomers.enter(item.sponsor, item.life, 2 * len(self._known.peers if self._known else ()) + 2)

    def _forget(self, peer: PeerId) -> None:
        self._once.forget(peer)
        self.applied.pop(peer, None)

    def _become(self, weights: Flat, step: int, cut: int) -> None:
        with self._mutex:
            np.copyto(self._weights, weights)
        self.ctx.step, self._cuts.newest = step, cut

    # -- cuts ---------------------------------------------------------------------------------------------------

    def _marked(self, message: Message, item: Heard, outcome: Outcome) -> None:
        """``item.hop`` has saved its part: so do we, if we have not, before anything else that it says."""
        number = int(message.fields["cut"])
        if life_of(number) != life_of(self._cuts.newest):
            outcome.refused.append((item.hop, f"{MARK}: cut {number} is of another life of this run"))
            return
        if item.hop in self.ctx.links and number > self._cuts.newest:
            if self.newcomers.settling:
                why = f"{MARK}: no checkpoint while somebody comes in"
                outcome.events.append(Refuse(t=self.ctx.now, peer=item.hop, reason=why))
                return
            self._cut(number, outcome)
        self._cuts.mark(number, item.hop, item.stream, int(message.fields["bulk"]))

    def _take_cut(self, item: TakeCut, outcome: Outcome) -> None:
        if item.last or (self._cuts.part is None and not self.newcomers.settling):
            self._cut(self._cuts.last if item.last else self._cuts.newest + 1, outcome)

    def _cut(self, number: int, outcome: Outcome) -> None:
        """Save our part as it is between two items, and say so on every link.

        The trainer is at rest while the mutex is ours and no step is under way; else its state waits for that step.
        """
        ctx, cuts, last = self.ctx, self._cuts, number == self._cuts.last
        with self._mutex:
            trainer = None if self._stepping and not last else cuts.learnt()
        weights = cuts.spool(self._weights)
        state = {
            "strategy": self.exchange.state(),
            "rng": ctx.rng.bit_generator.state,
            "applied": self.applied,
            "once": self._once.state(),
            "timers": self._timers,
            "staged": self._staged or [],
            "step": ctx.step,
        }
        links = () if last else tuple(ctx.links)
        state = frozen(state, cuts.spool)
        cuts.begin(Part(number, ctx.now, weights, state, ctx.step, self._samples, trainer), links)
        outcome.scanned += 2 * weights.size + self.exchange.state_bytes // 2
        for peer, mark in cuts.marks(links, ctx.me):
            outcome.sends.append(Spoken((peer,), encode(mark), mark, ()))

    def _hand_over(self, update: Update) -> None:
        """The step that was under way during a cut is done, and the trainer rests until we have taken its update."""
        self._stepping = False
        self._samples += update.samples
        part = self._cuts.part
        if part is not None and part.trainer is None:
            part.trainer = self._cuts.learnt()
            part.under_way = replace(update, values=self._cuts.spool(update.values))
            part.step, part.samples = update.step + 1, self._samples

    def _resume(self, part: Part, outcome: Outcome) -> None:
        """Be what we were at the cut; then take in what was under way."""
        ctx, state = self.ctx, part.state
        with self._mutex:
            np.copyto(self._weights, part.weights)
        ctx.rng.bit_generator.state = state["rng"]
        ctx.step = state["step"]
        self.exchange.restore(state["strategy"], ctx)
        self.applied.update(state["applied"])
        self._once.restore(state["once"])
        if self._staged is not None:
            self._staged = list(state["staged"])
        self._cuts.newest = first_of(life_of(part.number) + 1)
        self._perform([Timer(at, key) for key, at in state["timers"].items()], outcome)
        for said in part.heard:
            self._hear(Heard(*said), outcome)
        if part.under_way is not None:
            rest = self._handle(part.under_way, outcome)
            if rest is not None:
                self._handle(rest, outcome)
        self._samples = part.samples
