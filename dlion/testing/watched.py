"""A strategy under observation: every action its hooks yield is checked and written down.

Law: changes nothing and decides nothing; raises Nonconforming at the first breach of ``exchange.base``'s contract.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import numpy as np

from dlion.blocks import Block
from dlion.exchange.base import Action, Add, Context, Exchange, LinkView, Send, Timer, Update
from dlion.messages import Message, PeerId, Stream
from dlion.tensors import Flat

ACTIONS_MAX = 10_000
"""No hook on a bench has that much to do."""
TINY = 8
"""Up to so many values are written out in a transcript, to three digits."""


class Nonconforming(AssertionError):  # noqa: N818 - a verdict, not an accident
    """The strategy breaks the contract; the text says which part of it."""


def demand(condition: object, text: str) -> None:
    if not condition:
        raise Nonconforming(text)


class Watched(Exchange):
    """A strategy under observation: what it yields is checked and written down, one line per action."""

    def __init__(self, inner: Exchange, me: PeerId, transcript: list[str]) -> None:
        self.inner, self.me, self.transcript = inner, me, transcript
        self.ahead = inner.ahead

    def _watch(self, hook: str, actions: object, ctx: Context) -> Iterable[Action]:
        of = type(actions).__name__
        demand(isinstance(actions, Iterable), f"{hook} returns {of}; expected actions: yield them, or return ()")
        for number, action in enumerate(cast(Iterable[object], actions)):
            demand(number < ACTIONS_MAX, f"{hook} yields {ACTIONS_MAX} actions and still goes on")
            match action:
                case Send():
                    self._check_send(action, ctx)
                    self.transcript.append(f"{self.me} -> {','.join(action.to)}: {describe(action.message)}")
                case Add():
                    self._check_add(action, ctx)
                    scale = "" if action.scale == 1.0 else f" * {action.scale:.3g}"
                    self.transcript.append(f"{self.me} += {_spans(action)}{scale} {_values(action.values)}".rstrip())
                case Timer():
                    self.transcript.append(f"{self.me} @ {action.key}")
                case _:
                    raise Nonconforming(f"{hook} yields {action!r}, which is none of Send, Add, Timer")
            yield action

    def _check_send(self, send: Send, ctx: Context) -> None:
        for peer in send.to:
            link = ctx.links.get(peer)
            full = link is not None and link.writable_bytes <= 0 and send.message.stream is Stream.UPDATE
            demand(not full, f"{self.me} says an update on the link to {peer}, which can take nothing now")

    def _check_add(self, add: Add, ctx: Context) -> None:
        values = add.values.values if isinstance(add.values, Block) else add.values
        demand(values.dtype == np.float32, f"{self.me} adds {values.dtype}; expected float32")
        demand(np.isfinite(values).all() and np.isfinite(add.scale), f"{self.me} adds what is not finite")
        whole = isinstance(add.values, Block) or values.shape == (ctx.layout.size,)
        demand(whole, f"{self.me} adds an array of shape {values.shape}; expected ({ctx.layout.size},)")

    def setup(self, ctx: Context) -> None:
        self.inner.setup(ctx)

    def after_step(self, update: Update, ctx: Context) -> Iterable[Action]:
        return self._watch("after_step", self.inner.after_step(update, ctx), ctx)

    def on_message(self, origin: PeerId, message: Message, ctx: Context) -> Iterable[Action]:
        demand(origin != self.me, f"{self.me} hears its own {message.kind} again")
        self.transcript.append(f"{self.me} < {message.hop}: {message.kind} {message.step}/{message.epoch}")
        return self._watch("on_message", self.inner.on_message(origin, message, ctx), ctx)

    def on_writable(self, link: LinkView, ctx: Context) -> Iterable[Action]:
        return self._watch("on_writable", self.inner.on_writable(link, ctx), ctx)

    def on_timer(self, key: str, ctx: Context) -> Iterable[Action]:
        return self._watch("on_timer", self.inner.on_timer(key, ctx), ctx)

    def on_members(self, ctx: Context) -> Iterable[Action]:
        return self._watch("on_members", self.inner.on_members(ctx), ctx)

    def ready(self, step: int, ctx: Context) -> bool:
        return self.inner.ready(step, ctx)

    def view(self, weights: Flat) -> Flat:
        return self.inner.view(weights)

    def drain(self, ctx: Context) -> Iterable[Action]:
        return self._watch("drain", self.inner.drain(ctx), ctx)

    def owes(self, ctx: Context) -> bool:
        return self.inner.owes(ctx)


def describe(message: Message) -> str:
    """One line about a message, for transcripts: kind, step/epoch, whose steps, fields, blocks."""
    fields = " ".join(f"{name}={value}" for name, value in sorted(message.fields.items()))
    blocks = ", ".join(
        f"{b.count} of {b.start}+{b.size} {b.encoding.name} {_values(b)}".rstrip() for b in message.blocks
    )
    said = f"{message.kind} {message.step}/{message.epoch}", _spans(message), fields, blocks
    return " ".join(part for part in said if part)


def _spans(covered: Message | Add) -> str:
    spans = (f"{s.origin}:{s.first}" + f"-{s.last}" * (s.last > s.first) for s in covered.coverage)
    return f"[{' '.join(spans)}]"


def _values(of: Flat | Block) -> str:
    """A handful of values; those of a sparse block behind their places."""
    values = of.values if isinstance(of, Block) else of
    if not 0 < values.size <= TINY:
        return ""
    places = [""] * values.size
    if isinstance(of, Block) and of.indices is not None:
        places = [f"{place}:" for place in of.indices]
    shown = (f"{place}{value + 0.0:.3g}" for place, value in zip(places, values, strict=True))
    return f"({' '.join(shown)})"
