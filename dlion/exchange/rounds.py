"""Common ground of the strategies that work in rounds: DiLoCo, local SGD, SparseLoCo.

Law: a round is one part from every living peer; its mean moves the common weights (the *anchor*), which every peer
keeps, bit by bit the same. Who dies leaves the round; nobody waits for the dead. Parts travel along the routes.

A replica is anchor + what it moved since. When a round closes, the part it gave is taken back and the step of the
anchor is added instead, so local steps done meanwhile (overlap) stay.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from dlion.blocks import Block, Encoding, dense
from dlion.exchange.base import Action, Add, Context, Exchange, LinkView, Send, Speech, Update
from dlion.exchange.owed import exact
from dlion.messages import Message, PeerId, Scalar, Span
from dlion.tensors import Flat, add_scaled

ENCODINGS: Mapping[int, Encoding] = {32: Encoding.F32, 16: Encoding.F16, 8: Encoding.I8, 4: Encoding.I4}
"""Bits per value -> encoding."""


class Outbox:
    """Messages in order per neighbour, each said when its link can take it. The rounds bound their number."""

    def __init__(self) -> None:
        self._waiting: dict[PeerId, deque[Message]] = {}

    def say(self, to: Iterable[PeerId], message: Message, ctx: Context) -> Iterator[Send]:
        now = []
        for peer in to:
            if (link := ctx.links.get(peer)) is None:
                continue
            if link.writable_bytes > 0 and not self._waiting.get(peer):
                now.append(peer)
            else:
                self._waiting.setdefault(peer, deque()).append(message)
        if now:
            yield Send(tuple(now), message)

    def flush(self, ctx: Context, peers: Iterable[PeerId] | None = None) -> Iterator[Send]:
        """Say what waits for ``peers`` (None: all), as far as their links take it."""
        for peer in list(self._waiting if peers is None else peers):
            queue = self._waiting.get(peer)
            while queue and (link := ctx.links.get(peer)) is not None and link.writable_bytes > 0:
                yield Send((peer,), queue.popleft())

    def forget(self, ctx: Context) -> None:
        self._waiting = {peer: queue for peer, queue in self._waiting.items() if peer in ctx.links}

    def __bool__(self) -> bool:
        return any(self._waiting.values())

    def state(self) -> dict[str, Any]:
        return {"waiting": {peer: list(queue) for peer, queue in self._waiting.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._waiting = {PeerId(peer): deque(queue) for peer, queue in state["waiting"].items()}


class Parts:
    """Parts of the rounds that are open somewhere, passed on along the routes until everybody living has them all.

    A round counts the same parts on every peer, whoever dies: what a survivor holds of a dead peer it says again to
    all, then that it has done so (``gone``), and a round closes only when that is known of all survivors. A neighbour
    that is new because a bridge moved hears everything again; what is known already is not passed on.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, PeerId, str], Message] = {}
        self._living: set[PeerId] = set()
        self._beside: set[PeerId] = set()
        self._dead: set[PeerId] = set()
        self.outbox = Outbox()

    def setup(self, ctx: Context) -> None:
        self._living = set(ctx.members)
        self._beside = set(ctx.routes.onward(None, ctx.cloud)) & set(ctx.links)

    def say(self, message: Message, ctx: Context) -> Iterator[Send]:
        """Tell everybody something of our own."""
        self._known[_key(message)] = message
        yield from self.outbox.say(ctx.routes.onward(None, ctx.cloud), message, ctx)

    def hear(self, message: Message, number: int, ctx: Context) -> Iterator[Send]:
        """Keep a part or a ``gone`` and pass it on; ``number`` is the round now open here."""
        key = _key(message)
        if key in self._known or (message.kind == "part" and message.epoch < number - 1):
            return
        self._known[key] = message
        onward = ctx.routes.onward(message.hop, str(message.fields["cloud"]))
        if message.origin not in ctx.members:
            onward = tuple(p for p in ctx.routes.onward(None, ctx.cloud) if p != message.hop)
        yield from self.outbox.say(onward, message, ctx)

    def of(self, number: int) -> dict[PeerId, Message]:
        """The parts of a round, in order of their origins."""
        return {key[2]: m for key, m in sorted(self._known.items(), key=_by_key) if key[:2] == ("part", number)}

    def complete(self, number: int, ctx: Context) -> bool:
        """Is every living member's part here, and all that the survivors had of the dead?"""
        here = all(("part", number, peer, "") in self._known for peer in ctx.members)
        return here and all(("gone", 0, peer, dead) in self._known for dead in self._dead for peer in ctx.members)

    def close(self, number: int, ctx: Context) -> Flat:
        """The weighted mean of the round's parts, summed in the order of their origins."""
        parts = self.of(number)
        total = sum(float(m.fields["weight"]) for m in parts.values())
        mean = np.zeros(ctx.layout.size, dtype=np.float32)
        for message in parts.values():
            message.blocks[0].add_to(mean, float(message.fields["weight"]) / (total or 1.0))
        self._known = {key: m for key, m in self._known.items() if key[0] == "gone" or key[1] >= number}
        return mean

    def on_members(self, ctx: Context) -> Iterator[Send]:
        """Reconcile with the other survivors what the dead have said, and bring new neighbours up to date."""
        self.outbox.forget(ctx)
        died = sorted(self._living - set(ctx.members))
        self._dead = (self._dead | set(died)) - set(ctx.members)
        self._known = {k: m for k, m in self._known.items() if k[0] == "part" or k[3] in self._dead}
        before, self._beside = self._beside, set(ctx.routes.onward(None, ctx.cloud)) & set(ctx.links)
        self._living = set(ctx.members)
        for message in list(self._known.values()):
            again = self._beside - before if message.origin not in died else self._beside
            yield from self.outbox.say(sorted(again - {message.origin}), message, ctx)
        for dead in died:
            fields = {"cloud": ctx.cloud, "peer": dead}
            yield from self.say(Message("gone", fields=fields, origin=ctx.me), ctx)

    def state(self) -> dict[str, Any]:
        peers = {"living": set(self._living), "beside": set(self._beside), "dead": set(self._dead)}
        return {"known": list(self._known.values()), "outbox": self.outbox.state(), **peers}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._known = {_key(message): message for message in state["known"]}
        self._living, self._beside, self._dead = (set(state[who]) for who in ("living", "beside", "dead"))
        self.outbox.restore(state["outbox"])


def _key(message: Message) -> tuple[str, int, PeerId, str]:
    return message.kind, message.epoch, message.origin, str(message.fields.get("peer", ""))


def _by_key(item: tuple[tuple[str, int, PeerId, str], Message]) -> tuple[str, int, PeerId, str]:
    return item[0]


class Outer:
    """The outer optimizer: SGD with Nesterov momentum on the mean of what the peers moved (a step, sign included).

    ``momentum`` 0 and ``learning_rate`` 1 are plain averaging, exactly.
    """

    def __init__(self, learning_rate: float, momentum: float) -> None:
        if learning_rate <= 0 or not 0 <= momentum < 1:
            raise ValueError(
                f"outer_learning_rate must be positive and outer_momentum in [0, 1), got {learning_rate}, {momentum}"
            )
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.velocity: Flat | None = None

    def step(self, mean: Flat, start: int, size: int) -> Flat:
        """How the anchor moves at ``start``, given the ``mean`` there (taken over); ``size``: entries of the model."""
        if self.momentum:
            if self.velocity is None:
                self.velocity = np.zeros(size, dtype=np.float32)
            velocity = self.velocity[start : start + mean.size]
            velocity *= np.float32(self.momentum)
            velocity += mean
            add_scaled(mean, velocity, self.momentum)
        if self.learning_rate != 1.0:
            mean *= np.float32(self.learning_rate)
        return mean


class Rounds(Exchange):
    """Base: rounds of ``local_steps`` steps, or of ``round_s`` seconds by the clock, so that fast peers do more.

    ``overlap``: train on while a round closes; else wait for it. Subclasses say how a part is made and weighed.
    """

    pace = "free"
    paces = ("free",)
    consensus = True
    speaks: ClassVar[Speech] = {"part": {"cloud": str, "weight": float}, "gone": {"cloud": str, "peer": str}}
    overlap: ClassVar[bool] = False
    keep_error = False
    """True: what a part leaves out stays moved and goes into later ones (error feedback); False: it is dropped."""

    def __init__(self, local_steps: int, round_s: float, outer: Outer) -> None:
        if local_steps < 1 or round_s < 0:
            raise ValueError(f"local_steps must be at least 1 and round_s 0 or more, got {local_steps} and {round_s}")
        self.local_steps = local_steps
        self.round_s = round_s
        self.outer = outer
        self.round = 0
        """The round now open."""
        self._steps = 0
        self._samples = 0
        self._unspoken: list[int] = []
        self._given: Flat | None = None
        """What our part of the open round takes out of the replica when it closes; None: not given yet."""
        self._parts = Parts()
        self._draining = False

    # -- what a strategy decides ---------------------------------------------------------------------------------

    def part(self, moved: Flat, start: int, ctx: Context) -> Block:
        """What to say of ``moved``: local steps not yet given, in the round's fragment, which begins at ``start``."""
        return dense(moved, start=start)

    def fragment(self, ctx: Context) -> slice:
        """The entries that the open round is about: here the whole model."""
        return slice(0, ctx.layout.size)

    def merge(self, step: Flat, given: Flat, moved: Flat) -> Flat:
        """How the replica moves in the fragment when the anchor does; ``moved`` since we gave our part, may change."""
        return step - given

    def weight(self, ctx: Context) -> float:
        """How much our part counts in the mean."""
        return 1.0

    # -- hooks ---------------------------------------------------------------------------------------------------

    def setup(self, ctx: Context) -> None:
        self._anchor = ctx.weights.copy()
        self._moved = np.zeros_like(self._anchor)
        self._parts.setup(ctx)

    def after_step(self, update: Update, ctx: Context) -> Iterable[Action]:
        coverage = (Span(ctx.me, update.step, update.step),)
        yield Add(update.values, coverage=coverage)
        self._moved += update.values
        self._steps += 1
        self._samples += update.samples
        self._unspoken = [*self._unspoken[:1], update.step]
        if self._given is None and self._due(ctx):
            yield from self._give(ctx)

    def on_message(self, origin: PeerId, message: Message, ctx: Context) -> Iterable[Action]:
        yield from self._parts.hear(message, self.round, ctx)
        yield from self._close(ctx)

    def on_writable(self, link: LinkView, ctx: Context) -> Iterable[Action]:
        return self._parts.outbox.flush(ctx, [link.peer])

    def on_members(self, ctx: Context) -> Iterable[Action]:
        yield from self._parts.on_members(ctx)
        yield from self._close(ctx)

    def ready(self, step: int, ctx: Context) -> bool:
        return self.overlap or self._given is None

    def view(self, weights: Flat) -> Flat:
        return self._anchor

    def drain(self, ctx: Context) -> Iterable[Action]:
        """Give what was moved, exactly; and give nothing where others still need a part to close their round."""
        self._draining = True
        yield from self._parts.outbox.flush(ctx)
        if self._given is None and (self._steps or self._moved.any() or self._parts.of(self.round)):
            yield from self._give(ctx)

    def owes(self, ctx: Context) -> bool:
        waits = self._given is not None and len(ctx.members) > 1
        return waits or bool(self._parts.outbox) or bool(self._steps) or bool(self._moved.any())

    # -- the round -----------------------------------------------------------------------------------------------

    def _due(self, ctx: Context) -> bool:
        if self.round_s:
            return ctx.now >= (self.round + 1) * self.round_s
        return self._steps >= self.local_steps

    def _give(self, ctx: Context) -> Iterator[Action]:
        """Say our part of the open round to everybody."""
        fragment = self.fragment(ctx)
        moved = self._moved[fragment]
        part = self.part(moved, fragment.start, ctx) if not self._draining else exact(moved, start=fragment.start)
        given = moved.copy()
        if self.keep_error:
            said = np.zeros_like(self._moved)
            part.add_to(said)
            given = said[fragment]
        moved -= given
        self._given = given
        weight = self.weight(ctx)
        coverage = (Span(ctx.me, self._unspoken[0], self._unspoken[-1]),) if self._unspoken else ()
        self._unspoken, self._steps, self._samples = [], 0, 0
        fields: dict[str, Scalar] = {"cloud": ctx.cloud, "weight": weight}
        message = Message("part", ctx.step, self.round, fields, (part,), coverage, origin=ctx.me)
        yield from self._parts.say(message, ctx)
        yield from self._close(ctx)

    def _close(self, ctx: Context) -> Iterator[Action]:
        """When all parts are here: move the anchor, and the replica with it."""
        if self._given is None or not self._parts.complete(self.round, ctx):
            return
        fragment = self.fragment(ctx)
        mean = self._parts.close(self.round, ctx)[fragment]
        step = self.outer.step(mean, fragment.start, ctx.layout.size)
        self._anchor[fragment] += step
        given, self._given = self._given, None
        merge = Rounds.merge if self._draining else type(self).merge
        change = np.zeros_like(self._anchor)
        change[fragment] = merge(self, step, given, self._moved[fragment])
        self.round += 1
        yield Add(change)
        if self._due(ctx) and self._steps:
            yield from self._give(ctx)

    # -- snapshots -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        arrays = {"anchor": self._anchor, "moved": self._moved, "given": self._given, "velocity": self.outer.velocity}
        counts = {"round": self.round, "steps": self._steps, "samples": self._samples, "unspoken": self._unspoken}
        return {k: v for k, v in arrays.items() if v is not None} | counts | {"parts": self._parts.state()}

    def restore(self, state: Mapping[str, Any], ctx: Context) -> None:
        flat = {k: np.array(v, dtype=np.float32) for k, v in state.items() if isinstance(v, np.ndarray)}
        self._anchor, self._moved = flat["anchor"], flat["moved"]
        self._given, self.outer.velocity = flat.get("given"), flat.get("velocity")
        self.round, self._steps, self._samples = (int(state[name]) for name in ("round", "steps", "samples"))
        self._unspoken = list(state["unspoken"])
        self._parts.restore(state["parts"])
